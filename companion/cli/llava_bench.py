"""`llava evaluate bench`, `llava-bench` and `judges`."""

from __future__ import annotations

import argparse
from pathlib import Path

from companion.cli.arguments import Commands, Parser, Result, chat_client, command, given, group, loaded, names, table


def _answers(args: argparse.Namespace) -> Result:
    from companion.evaluation.bench_steps import load_bench
    from companion.evaluation.predict import predict_questions

    rows, images = load_bench(args.bench, args.limit).rows(args.images)
    chosen = given(args, "max_new_tokens", "temperature", "seed", "batch")
    return predict_questions(loaded(args), args.model, rows, images, args.out, **chosen)


def _cassette_path(args: argparse.Namespace) -> Path:
    tape: Path = args.cassette or args.out.with_suffix(".sqlite")
    return tape


def _reference(args: argparse.Namespace) -> Result:
    from companion.evaluation.bench_steps import load_bench, write_reference

    bench, client = load_bench(args.bench, args.limit), chat_client(args, _cassette_path(args))
    return write_reference(bench, client, args.out, args.judge, max_tokens=args.max_tokens)


def _judge(args: argparse.Namespace) -> Result:
    from companion.evaluation.bench_steps import load_bench, write_reviews

    bench, client = load_bench(args.bench, args.limit), chat_client(args, _cassette_path(args))
    chosen = given(args, "reference", "swap", "max_tokens", "rule")
    return write_reviews(bench, args.answers, client, args.out, model=args.judge, **chosen)


def _controls(args: argparse.Namespace) -> Result:
    from companion.evaluation.bench_controls import score_controls
    from companion.evaluation.bench_steps import load_bench
    from companion.miniature.world import CATEGORIES

    bench, client = load_bench(args.bench, args.limit), chat_client(args, args.cassette or Path("controls.sqlite"))
    objects = args.objects or list(CATEGORIES)
    return {"controls": score_controls(bench, client, objects, args.judge, args.max_tokens)}


def _no_review(result: Result) -> bool:
    return not any(row["n"] for row in result["controls"])


def _show_controls(result: Result) -> str:
    import pandas as pd

    title = "relative score (%) of answers of known quality: floors, and the reference as the ceiling"
    return f"{title}\n{pd.DataFrame(result['controls']).to_string(index=False)}"


def _judges(args: argparse.Namespace) -> Result:
    from companion.evaluation.judges import agreement

    return agreement(args.first, args.second)


def _show_judges(result: Result) -> str:
    from companion.evaluation.judges import format_agreement

    return format_agreement(result)


def _score(args: argparse.Namespace) -> Result:
    from companion.evaluation.reporting import repeats, review_report

    if len(args.reviews) > 1:
        return repeats(args.reviews, released=args.released)
    return review_report(args.reviews[0], released=args.released)


def _show_score(result: Result) -> str:
    from companion.evaluation.llava_bench import format_repeats
    from companion.evaluation.reporting import format_rules

    if "repeats" in result:
        return format_repeats(result)
    rules = result.pop("reporting", None)
    return "\n".join([table(result), *([format_rules(rules)] if rules else [])])


def _bench(parser: Parser) -> None:
    parser.path("--bench", "DIR", "the official files: questions, context, reference answers", required=True)


def _asking(parser: Parser, max_tokens: int) -> None:
    parser.teacher("OUT with the ending .sqlite", "--judge", max_tokens)
    parser.limit(" questions")


def add(commands: Commands) -> None:
    example = "llava evaluate bench answers --model data/LLaVA-7b --bench data/mini/bench-coco --out a.jsonl"
    text = "LLaVA-Bench step by step: answers, reference, judge, score"
    steps = group(commands, "bench", text, example)
    new = command(steps, "answers", "answer the questions with a checkpoint", example, _answers)
    _bench(new)
    new.images(" (default: images in the bench's)")
    new.path("--out", "FILE", "answers; an existing file is resumed", required=True)
    new.number("--max-new-tokens", 1024, "longest answer")
    new.option("--temperature", "T", "0, the default, is greedy", type=float, default=0.0)
    new.option("--seed", "N", "of sampled answers; each gives another run", type=int, default=0)
    new.number("--batch", 16, "questions answered together")
    new.checkpoint()
    new.limit()
    new.bases()
    new.assumptions()

    example = "llava evaluate bench reference --bench data/mini/bench-coco --out reference.jsonl"
    text = "answer with a text-only model from captions and boxes"
    new = command(steps, "reference", text, example, _reference, failed=lambda result: not result["answers"])
    _bench(new)
    new.path("--out", "FILE", "reference answers", required=True)
    _asking(new, 2048)

    example = "llava evaluate bench judge --bench data/mini/bench-coco --answers a.jsonl --out reviews.jsonl"
    text = "judge answers against reference answers"
    new = command(steps, "judge", text, example, _judge, _show_score, lambda result: not result["n"])
    _bench(new)
    new.path("--answers", "FILE", "of a checkpoint", required=True)
    new.path("--reference", "FILE", "reference answers, instead of the bench's own")
    new.path("--out", "FILE", "reviews, with their own cassette; for a repeat give another name", required=True)
    new.path("--rule", "FILE", "the judge's rules by category, as LLaVA's rule.json (default: this project's)")
    new.switch("--swap", "judge each pair in both orders")
    _asking(new, 1024)

    example = "llava evaluate bench controls --bench data/mini/bench-coco"
    text = "floors and ceiling of a judge: its scores of answers of known quality"
    new = command(steps, "controls", text, example, _controls, _show_controls, _no_review)
    _bench(new)
    new.option("--objects", "NAME,NAME", "of the control that lists them (default: the miniature's)", type=names)
    new.teacher("controls.sqlite", "--judge")
    new.limit(" questions")

    text = "score a judge's reviews; of several files also mean and standard deviation"
    for into, name, call in ((commands, "llava-bench", "llava-bench"), (steps, "score", "bench score")):
        new = command(into, name, text, f"llava evaluate {call} --reviews reviews.jsonl", _score, _show_score)
        new.path("--reviews", "FILE", "a review per line", nargs="+", required=True)
        new.switch("--released", "average failed reviews as -1, as the released script")

    example, text = "llava evaluate judges a.jsonl b.jsonl", "agreement of two judges on the same answers"
    new = command(commands, "judges", text, example, _judges, _show_judges)
    new.path("first", "A", "one judge's reviews")
    new.path("second", "B", "another judge's, or a repeat of the first")
