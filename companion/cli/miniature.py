"""`llava miniature` and `base-models`."""

from __future__ import annotations

import argparse

from companion.cli.arguments import Commands, Result, command, names, some_of
from llava_core.runtime import ROOT

BASE_MODELS = ("llm-7b", "llm-13b", "llm-7b-1", "llm-13b-1", "llm-7b-2", "llm-13b-2", "clip")


def _miniature(args: argparse.Namespace) -> Result:
    from companion import miniature

    return miniature.write(args.out, only=args.only)


def _show_cards(result: Result) -> str:
    return "\n".join(f"{name:16} {card['counts']}" for name, card in result.items())


def _base_models(args: argparse.Namespace) -> Result:
    from companion.miniature import base_models

    return base_models.train_base_models(args.out, only=args.only)


def add(commands: Commands) -> None:
    text = "write the miniature's data sets"
    new = command(commands, "miniature", text, "llava miniature", _miniature, _show_cards)
    new.option("--only", "NAME,NAME", "only these sets, e.g. mini-coco", type=names)
    new.path("--out", "DIR", "default: data/mini", default=ROOT / "data" / "mini")

    text, missed = "retrain the base models", lambda result: not all(result["passed"].values())
    new = command(commands, "base-models", text, "llava base-models --only clip", _base_models, failed=missed)
    new.option("--only", "NAME,NAME", f"of {', '.join(BASE_MODELS)}; all if not given", type=some_of(BASE_MODELS))
    new.path("--out", "DIR", "default: models/mini", default=ROOT / "models" / "mini")
