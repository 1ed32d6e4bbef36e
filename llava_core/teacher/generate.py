"""Ask the teacher about every image and write what it says as instruction data, with failures and provenance."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from llava_core.constants import IMAGE_MARKER
from llava_core.registry import unknown
from llava_core.runtime import ConfigError, progress, shown, write_json, write_jsonl
from llava_core.teacher.client import MAX_TOKENS, TEMPERATURE, ChatClient, request_key
from llava_core.teacher.parse import ReplyError, parse_detail, parse_dialogue, parse_reasoning
from llava_core.teacher.prompts import (
    DETAIL_QUESTIONS,
    KINDS,
    KINDS_WITH_BOXES,
    PROMPTS,
    Prompt,
    build_messages,
    context_text,
)

MODEL = "gpt-4-0314"


class Annotation(Protocol):
    """An image by what people wrote and drew about it; `llava_core.data.coco.AnnotatedImage` is one."""

    @property
    def id(self) -> str: ...
    @property
    def image(self) -> str: ...
    @property
    def captions(self) -> Sequence[str]: ...
    @property
    def boxes(self) -> Sequence[tuple[str, Sequence[float]]]: ...


def generate(
    annotations: Sequence[Annotation],
    kinds: Sequence[str],
    client: ChatClient,
    out: str | Path,
    limit: int | None = None,
    seed: int = 0,
    prompts: Mapping[str, Prompt] | None = None,
    model: str = MODEL,
    temperature: float = TEMPERATURE,
    max_tokens: int = MAX_TOKENS,
) -> dict[str, Any]:
    """Write instruction data about annotated images.

    Killed and called again with a recording client it goes on where it was: replies that the cassette holds are not
    asked for again, and the files come out as of an undisturbed run.

    Args:
        annotations: the images; captions for every kind, boxes for `detail` and `complex`.
        kinds: of `llava_core.teacher.prompts.KINDS`; every image is asked about once per kind.
        client: who answers.
        out: folder; gets `<kind>_<N>.json` per kind and `llava_instruct.json` with all (LLaVA-Instruct records with
            `type` and `provenance` added), `failures.jsonl` (replies of a wrong format, kept) and `provenance.jsonl`
            (request, model, tokens and cost per reply). Files of these names from an earlier call are replaced.
        limit: only the first so many images.
        seed: draws where the image stands in the first turn and how a description is asked for, per record.
        prompts: by kind, e.g. of `load_prompts`; ours when None.
        model: asked for by this name.
        temperature: of the model.
        max_tokens: of one reply.

    Returns:
        records; failed (replies that no record came from); requests (sent now) and replayed (from a cassette);
        spend_usd (paid now); failures (count by error class); files.

    Raises:
        ConfigError: unknown kind.
        ChatError, DataError: the client's; what was answered until then is in its cassette.
    """
    prompts, out = PROMPTS if prompts is None else prompts, Path(out)
    for kind in kinds:
        if kind not in KINDS or kind not in prompts:
            raise ConfigError(unknown("kind of instruction data", kind, [k for k in KINDS if k in prompts]))
    jobs = [(image, kind) for image in annotations[:limit] for kind in dict.fromkeys(kinds)]
    records: list[dict[str, Any]] = []
    failures: list[dict[str, Any]] = []
    provenance: list[dict[str, Any]] = []
    spend, sent = 0.0, 0
    with progress(len(jobs), "teacher", unit="reply") as bar:
        for image, kind in jobs:
            boxes = image.boxes if kind in KINDS_WITH_BOXES else ()
            messages = build_messages(kind, context_text(image.captions, boxes), prompts)
            reply = client.complete(messages, model=model, temperature=temperature, max_tokens=max_tokens)
            spend, sent = (spend, sent) if reply.cached else (spend + reply.cost_usd, sent + 1)
            key = request_key(messages, model=model, temperature=temperature, max_tokens=max_tokens)
            source = {"request": key, "model": reply.model, "prompt": prompts[kind].version, "seed": seed}
            row = {"id": image.id, "image": image.image, "type": kind}
            # by id and kind, not by position: a record stays the same when other images are added or left out
            rng = random.Random(f"{seed}-{image.id}-{kind}")
            try:
                turns = _turns(kind, reply.text, reply.finish_reason, rng)
            except ReplyError as error:
                failures.append(
                    row | {"error": type(error).__name__, "message": str(error), "reply": reply.text, **source}
                )
            else:
                records.append(row | {"conversations": _conversation(turns, rng), "provenance": source})
            provenance.append(
                row
                | source
                | {"asked_model": model, "temperature": temperature, "max_tokens": max_tokens}
                | {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.completion_tokens}
                | {"cost_usd": reply.cost_usd, "finish_reason": reply.finish_reason, "context": messages[-1]["content"]}
            )
            bar.set_postfix_str(f"{spend:.2f} USD, {len(failures)} failed", refresh=False)
            bar.update()
    errors = [row["error"] for row in failures]
    return {
        "records": len(records),
        "failed": len(failures),
        "spend_usd": round(spend, 6),
        "requests": sent,
        "replayed": len(jobs) - sent,
        "failures": {name: errors.count(name) for name in sorted(set(errors))},
        "files": _write(out, records, failures, provenance, list(dict.fromkeys(kinds))),
    }


def _turns(kind: str, text: str, finish_reason: str, rng: random.Random) -> list[tuple[str, str]]:
    if kind == "detail":
        return [(rng.choice(DETAIL_QUESTIONS), parse_detail(text, finish_reason))]
    return (parse_reasoning if kind == "complex" else parse_dialogue)(text, finish_reason)


def _conversation(turns: Sequence[tuple[str, str]], rng: random.Random) -> list[dict[str, str]]:
    """The turns as LLaVA-Instruct has them; the image stands first or last in the first one (paper, Equation 2)."""
    first = turns[0][0]
    first = f"{IMAGE_MARKER}\n{first}" if rng.random() < 0.5 else f"{first}\n{IMAGE_MARKER}"
    questions = [first, *(question for question, _ in turns[1:])]
    pairs = zip(questions, (answer for _, answer in turns), strict=True)
    return [turn for q, a in pairs for turn in ({"from": "human", "value": q}, {"from": "gpt", "value": a})]


def _write(
    out: Path,
    records: list[dict[str, Any]],
    failures: list[dict[str, Any]],
    provenance: list[dict[str, Any]],
    kinds: list[str],
) -> list[str]:
    files = []
    for kind in kinds:
        for old in out.glob(f"{kind}_*.json"):  # of an earlier call with another number of records
            if old.stem.removeprefix(f"{kind}_").isdecimal():
                old.unlink()
        part = [record for record in records if record["type"] == kind]
        files.append(write_json(out / f"{kind}_{len(part)}.json", part))
    files.append(write_json(out / "llava_instruct.json", records))
    files.append(write_jsonl(out / "failures.jsonl", failures))
    files.append(write_jsonl(out / "provenance.jsonl", provenance))
    return [shown(file) for file in files]
