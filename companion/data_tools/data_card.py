"""The data card of a file of instruction records: `llava data audit`."""

from __future__ import annotations

import shlex
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from companion.data_tools.audit import Fault, find_faults, kind_rows, questions_of
from companion.data_tools.coco import load_annotations
from companion.data_tools.verbs import Verbs, root_verbs
from companion.figures import code_safe, markdown_safe, markdown_table
from llava_core.data.instruct import Sample, load_instruct
from llava_core.runtime import (
    ConfigError,
    DataError,
    atomic_write,
    display_path,
    printable,
    read_json,
    read_jsonl,
    sha256_file,
    shortened,
    write_json,
)

CARD, TWIN = "DATA_CARD.md", "audit.json"
_LIMITS_FILE = Path(__file__).with_name("data_card_limits.txt")
MAKER = "llava data audit"  # in the twin: marks the card as written by this project

_RELEASED = {
    "about": "LLaVA-Instruct, as released with the paper",
    "license": "CC BY NC 4.0; the texts come from GPT-4, so OpenAI's terms of use hold too",
    "images": "COCO 2014, named as in COCO 2017; each image under the license that COCO's files name for it",
}
RELEASED = dict.fromkeys(
    (
        "llava_instruct_150k.json", "llava_instruct_80k.json", "conversation_58k.json", "detail_23k.json",
        "complex_reasoning_77k.json",
    ),
    _RELEASED,
)  # fmt: skip
"""By file name. Source: the model and data cards of LLaVA v1."""


def audit_file(
    path: str | Path, annotations: str | Path | None = None, images: str | Path | None = None
) -> dict[str, Any]:
    """Audit a file of instruction records; the result of `summary`.

    Without `annotations` objects are not checked, without `images` no image is opened; without a parser root verbs are
    left out and `verbs_missing` says why. Raises DataError if the file has problems, or the annotations are of other
    images.
    """
    path, folder = Path(path), Path(images) if images is not None else None
    samples = load_instruct(path, folder)
    faults = find_faults(samples, None if annotations is None else load_annotations(annotations), folder)
    try:
        verbs, missing = root_verbs(questions_of(samples), path), None
    except ConfigError as error:
        verbs, missing = None, str(error)
    result = summary(path, samples, faults, verbs, annotations)
    return result | ({"verbs_missing": missing} if missing else {})


def summary(
    path: Path,
    samples: Sequence[Sample],
    faults: Sequence[Fault],
    verbs: Mapping[str, Verbs] | None,
    annotations: str | Path | None = None,
    tokens: Mapping[str, Mapping[str, float]] | None = None,
) -> dict[str, Any]:
    """Properties and counts of a data set, the content of its card: a JSON object.

    `provenance.jsonl` and `failures.jsonl` of `llava generate` are read from the folder of `path`; a `card.json` beside
    the annotations names the images' license. `tokens`: kind -> numbers on the length of its token sequences.
    """
    log = path.parent / "provenance.jsonl"
    rows = [row for row in read_jsonl(log) if isinstance(row, dict) and "request" in row] if log.is_file() else []
    for number, row in enumerate(rows, start=1):
        if (field := _wrong_number(row)) is not None:
            raise DataError(
                f"{display_path(log)}, request {number}: {field} is {shortened(row[field])}, and no request has that; "
                "correct it, or remove the file"
            )
    failures = path.parent / "failures.jsonl"
    return {
        "maker": MAKER,
        "file": _portable(path),
        "sha256": sha256_file(path),
        "annotations": None if annotations is None else _portable(Path(annotations)),
        "records": len(samples),
        "images": len({sample.image for sample in samples} - {None}),
        "turns": sum(len(sample.turns) for sample in samples),
        "source": _source(path, annotations, bool(rows)),
        "teacher": _teacher(rows, len(read_jsonl(failures)) if failures.is_file() else 0) if rows else None,
        "kinds": kind_rows(samples),
        "tokens": None if tokens is None else {kind: dict(numbers) for kind, numbers in tokens.items()},
        "faults": [fault.row() for fault in faults],
        "verbs": None
        if verbs is None
        else {
            kind: {**own.counts, "pairs": [[*pair, n] for pair, n in own.pairs.items()]} for kind, own in verbs.items()
        },
    }


def _wrong_number(row: Mapping[str, Any]) -> str | None:
    """The field of a log's row that has no finite numbers from 0 on; prices are two of them."""
    for field, size in (("prompt_tokens", 1), ("completion_tokens", 1), ("cost_usd", 1), ("price", 2)):
        value = row.get(field)
        numbers = value if size == 2 and isinstance(value, list) else [value]
        if value and (len(numbers) != size or not all(isinstance(n, int | float) and 0 <= n < 1e15 for n in numbers)):
            return field
    return None


def _portable(path: Path) -> str:
    """A path for the card: relative to the repository, or only the name."""
    return path.name if Path(display_path(path.absolute())).is_absolute() else display_path(path.absolute())


def _source(path: Path, annotations: str | Path | None, logged: bool) -> dict[str, str]:
    unknown = "not stated in the file; ask its author"
    source = {"about": unknown, "license": unknown, "images": unknown}
    if logged:
        source["about"] = "written by a teacher that read captions and boxes; each of its replies is logged"
        source["license"] = "that of the captions and boxes, and the terms of the teacher named below"
    elif path.name in RELEASED:
        source = dict(RELEASED[path.name])
    place = None if annotations is None else Path(annotations)
    cards = [folder / "card.json" for folder in (place, place.parent, place.parent.parent)] if place else []
    card: Any = next((read_json(file) for file in cards if file.is_file()), {})
    if isinstance(card, dict) and {"name", "about", "license"} <= card.keys():
        source["images"] = f"{card['name']}: {card['about']} License: {card['license']}"
    return source


def _teacher(rows: Sequence[Mapping[str, Any]], failures: int) -> dict[str, Any]:

    def different(key: str) -> list[Any]:
        return sorted({str(row[key]) for row in rows if row.get(key) is not None})

    prompts: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        prompts[str(row.get("type"))].add(str(row.get("prompt")))
    dates = different("date")
    sums = {key: sum(row.get(key) or 0 for row in rows) for key in ("prompt_tokens", "completion_tokens", "cost_usd")}
    return {
        "models": dict(sorted(Counter(str(row.get("model")) for row in rows).items())),
        "asked_for": different("asked_model"),
        "clients": different("client"),
        "replies": len(rows),
        "refused_replies": failures,
        **sums,
        "usd_per_million_tokens": sorted({tuple(row["price"]) for row in rows if row.get("price")}),
        "temperature": different("temperature"),
        "prompts": {kind: sorted(versions) for kind, versions in sorted(prompts.items())},
        "dates": [dates[0], dates[-1]] if dates else None,
    }


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else markdown_safe(value)


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return markdown_table([*rows[0]], ([_number(value) for value in row.values()] for row in rows))


def _properties(rows: Mapping[str, str]) -> list[str]:
    """A table of names and texts in Markdown."""
    return markdown_table(["property", "value"], rows.items())


def card_text(audit: Mapping[str, Any]) -> str:
    """The data card, as Markdown, from the result of `summary`."""
    source, teacher, faults = audit["source"], audit["teacher"], audit["faults"]
    dates = teacher and teacher["dates"]
    properties = {
        "what": markdown_safe(source["about"]),
        "size": f"{audit['records']:,} records, {audit['turns']:,} turns, {audit['images']:,} images",
        "images": markdown_safe(source["images"]),
        "license": markdown_safe(source["license"]),
        "file": f"{code_safe(audit['file'])}, SHA-256 `{audit['sha256'][:16]}`",
        "date": markdown_safe(" to ".join(dict.fromkeys(date[:10] for date in dates))) if dates else "not recorded",
    }
    lines = ["# Data card", "", *_properties(properties)]
    lines += ["## What is in it", "", *_table(audit["kinds"])]
    if audit["tokens"]:
        lines += ["Tokens per record:", "", *_table([{"kind": k, **row} for k, row in audit["tokens"].items()])]
    lines += ["## Generation", "", *_teacher_table(teacher)]
    lines += ["## Faults", ""]
    columns = ("fault", "found", "of", "unit", "percent")
    lines += _table([{key: fault[key] for key in columns} for fault in faults])
    for fault in (fault for fault in faults if fault["found"]):
        kinds = ", ".join(f"{markdown_safe(k)} {n['found']:,} of {n['of']:,}" for k, n in fault["by_kind"].items())
        first = fault["examples"][0]
        example = f"{markdown_safe(first['kind'])} {code_safe(first['record'])}"
        lines.append(f"- **{markdown_safe(fault['fault'])}**: {kinds}. Such as {example}.")
    if not any(fault["found"] for fault in faults):
        lines.append("None of these was found.")
    if audit["annotations"] is None:
        lines.append("- Objects that nothing supports were not looked for: no annotations were given.")
    lines += ["", "## What is asked", "", *_verb_table(audit), ""]
    lines += [_LIMITS_FILE.read_text("utf-8").rstrip(), "", "## Reproduction", ""]
    words = ["llava", "data", "audit", audit["file"]]
    words += ["--annotations", audit["annotations"]] if audit["annotations"] else []
    provenance = "Prompts' versions and requests' keys are in `provenance.jsonl`, next to the records. " * bool(teacher)
    return "\n".join([*lines, f"{provenance}This card:", "", "```bash", printable(shlex.join(words)), "```", ""])


def _teacher_table(teacher: Mapping[str, Any] | None) -> list[str]:
    if teacher is None:
        return ["There is no log of requests next to the file.", ""]
    models = ", ".join(f"{model} ({n:,} replies)" for model, n in teacher["models"].items())
    properties = {
        "teacher": markdown_safe(models),
        "asked for": markdown_safe(", ".join(teacher["asked_for"])),
        "through": markdown_safe(", ".join(teacher["clients"])),
        "refused replies": f"{teacher['refused_replies']:,}",
        "tokens": f"{teacher['prompt_tokens']:,} of prompts, {teacher['completion_tokens']:,} of replies",
        "price": "; ".join(f"{a:g} and {b:g}" for a, b in teacher["usd_per_million_tokens"])
        + " USD per million tokens of prompt and reply",
        "paid": f"{teacher['cost_usd']:,.2f} USD",
        "temperature": markdown_safe(", ".join(teacher["temperature"])),
        "prompts": "; ".join(
            f"{markdown_safe(k)} {code_safe(', '.join(own))}" for k, own in teacher["prompts"].items()
        ),
    }
    return _properties(properties)


def _verb_table(audit: Mapping[str, Any]) -> list[str]:
    if audit["verbs"] is None:
        return [f"Root verbs were not looked for. {markdown_safe(audit.get('verbs_missing', ''))}".strip()]
    rows = []
    for kind, own in audit["verbs"].items():
        common = ", ".join(f"{verb} {noun} ({n:,})" for verb, noun, n in own["pairs"][:5])
        rows.append({"kind": kind, **{k: n for k, n in own.items() if k != "pairs"}, "commonest": common or "–"})
    return _table(rows)


def write_card(audit: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Write the card and its numbers; a DataError if the folder has a card of another project or file."""
    card, twin = Path(folder) / CARD, Path(folder) / TWIN
    for file in (card, twin):
        if file.exists() and not is_ours(twin):
            raise DataError(
                f"{display_path(file)}: written by somebody else, so it is not replaced; name another folder"
            )
    if twin.exists() and (other := read_json(twin).get("file")) != audit["file"]:
        raise DataError(f"{display_path(card)}: the card of {other}, so it is not replaced; name another folder")
    return [write_json(twin, audit), atomic_write(card, card_text(audit))]


def is_ours(twin: Path) -> bool:
    try:
        content = read_json(twin)
    except DataError:
        return False
    return isinstance(content, dict) and content.get("maker") == MAKER
