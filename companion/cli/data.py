"""`llava data`, `generate`, `plan` and `filter`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from companion.cli.arguments import (
    Commands,
    Parser,
    Result,
    chat_client,
    command,
    given,
    group,
    names,
    positive,
    some_of,
)
from llava_core.runtime import display_path

KINDS = ("conversation", "detail", "complex")
FORMATS = ("QCM-LEPA", "QCM-ALE")


def _check(args: argparse.Namespace) -> Result:
    limits = {"decode": args.decode, "max_words": args.max_words or None}
    if args.fix is not None:
        from companion.data_tools.repair import fix_file

        return fix_file(args.file, args.fix, args.images, **limits)
    from companion.data_tools.check import check_file

    return check_file(args.file, args.images, **limits)


def _show_problems(result: Result) -> str:
    unit = result.get("counted", "line")
    fixed = [
        f"{unit} {f['line']}, record {f['record']}: repaired: {'; '.join(f['done'])}" for f in result.get("fixed", ())
    ]
    lines = [
        f"{unit} {p['line']}, record {p['record']}: {p['kind']}: {p['message']}"
        if p["record"] is not None
        else p["message"]
        for p in result["problems"]
    ]
    total = f"{result['records']} records, {result['errors'] + result.get('warnings', 0)} problems"
    if "fixed" in result:
        total += f" left, {len(fixed)} records repaired, {result['written']} written to {result['out']}"
    return "\n".join([*fixed, *lines, total])


def _audit(args: argparse.Namespace) -> Result:
    from companion.data_tools.data_card import CARD, TWIN, audit_file, write_card
    from companion.data_tools.folders import generated_folder

    audit = audit_file(args.file, args.annotations, args.images)
    folder = args.out or generated_folder(args.file.parent, CARD, TWIN)
    return audit | {"files": [display_path(file) for file in write_card(audit, folder)]}


def _show_audit(result: Result) -> str:
    lines = [f"{fault['found']:8} of {fault['of']:8} {fault['unit']:8} {fault['fault']}" for fault in result["faults"]]
    size = f"{result['records']} records, {result['turns']} turns, {result['images']} images"
    return "\n".join([size, *lines, *filter(None, [result.get("verbs_missing")]), *result["files"]])


def _convert(args: argparse.Namespace) -> Result:
    from companion.data_tools.convert import convert_data

    chosen = given(args, "images", "columns", "instructions", "split", "seed", "skip")
    return convert_data(args.source, args.to, **chosen)


def _scienceqa(args: argparse.Namespace) -> Result:
    from companion.data_tools.scienceqa import write_training_files

    counts = write_training_files(args.folder, args.formats)
    return {
        "records": sum(counts.values()),
        "files": {display_path(args.folder / name): n for name, n in counts.items()},
    }


def _columns(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(field.strip() and column.strip() for field, _, column in pairs):
        raise argparse.ArgumentTypeError(f"'{text}': write FIELD=COLUMN,FIELD=COLUMN, e.g. image=file,answer=caption")
    return {field.strip(): column.strip() for field, _, column in pairs}


def _add_data(commands: Commands) -> None:
    example = "llava data check chat.json --images images"
    into = group(commands, "data", "check, audit and convert training data", example)
    instructions, unread = "LLaVA-Instruct JSON, JSONL or parquet", "; without it they are not read"

    text = "find all problems of an instruction file"
    new = command(into, "check", text, example, _check, _show_problems, lambda result: bool(result["errors"]))
    new.path("file", "FILE", instructions)
    new.images(unread)
    new.add_argument("--no-decode", dest="decode", action="store_false", help="check only the images' headers")
    # 1300 is instruct.MAX_WORDS, which is not imported before a command runs
    text = "a longer record exceeds 2048 tokens with its image (default: 1300; 0: no limit)"
    new.option("--max-words", "N", text, type=int, default=1300)
    new.path("--fix", "OUT", "write a repaired copy and report the remaining problems")

    example = "llava data audit chat.json --annotations captions_and_boxes.jsonl"
    text = "count duplicates, leaks and unsupported objects, and write a data card"
    new = command(into, "audit", text, example, _audit, _show_audit)
    new.path("file", "FILE", instructions)
    new.path("--annotations", "PATH", "captions_<split>.json of COCO, or a .jsonl as for generate")
    new.images(unread)
    new.path("--out", "DIR", "for DATA_CARD.md and audit.json; default: the folder of FILE")

    example = "llava data convert photos.csv --to data/mine.json --images photos --columns image=file,answer=legend"
    text = "convert a folder of images and texts, a CSV or a data set on disk to instruction data"
    new = command(into, "convert", text, example, _convert)
    new.path("source", "SRC", "folder of image + .txt, .csv, .tsv, .parquet, or save_to_disk folder")
    new.path("--to", "OUT", "the .json, .jsonl or .parquet to write", required=True)
    new.images(" (of those in arrow: where to write)")
    text = "for id, image, question, answer, type, conversations; common names are detected"
    new.option("--columns", "FIELD=COLUMN,...", text, type=_columns)
    new.option("--instructions", "LIST", "questions for answers without one: brief, detail or a file", default="brief")
    new.option("--split", "NAME", "part of a data set that has several")
    new.option("--seed", "N", "decides which instruction a record gets", type=int, default=0)
    new.switch("--skip", "skip rows with problems, and report them")

    example = "llava data scienceqa data/scienceqa"
    text = "write ScienceQA's train and val splits as the instruction data that the experiments train on"
    new = command(into, "scienceqa", text, example, _scienceqa)
    new.path("folder", "DIR", "holds problems.json, pid_splits.json and images/<split>/<id>/image.png")
    text = "QCM-LEPA: reasoning first; QCM-ALE: answer first"
    new.option("--formats", "FORMAT,FORMAT", f"prompt formats; {text}", type=names, default=list(FORMATS))


def requests(args: argparse.Namespace) -> Any:
    from companion.data_tools.coco import load_annotations
    from companion.teacher.generate import requests_for
    from companion.teacher.prompts import load_prompts

    prompts = load_prompts(args.prompts) if args.prompts else None
    images = load_annotations(args.annotations, args.split)[: args.limit]
    return list(requests_for(images, args.kinds, prompts, args.model, max_tokens=args.max_tokens)), prompts


def _generate(args: argparse.Namespace) -> Result:
    from companion.data_tools.expansion import load_instructions
    from companion.teacher.client import PAID_CLIENTS
    from companion.teacher.generate import ask, write
    from companion.teacher.plan import plan, plan_text

    jobs, prompts = requests(args)
    questions = load_instructions(args.instructions)
    tape = args.cassette or args.out / "cassette.sqlite"
    if args.client in PAID_CLIENTS:
        known = None if args.client == "live" else tape
        estimate = plan((job[2] for job in jobs), args.client, known, args.price, args.concurrency)
        print(plan_text(estimate), file=sys.stderr)
    records = ask(jobs, chat_client(args, tape))
    return write(records, args.kinds, args.out, args.seed, prompts, questions)


def asking(parser: Parser, tape: str) -> None:
    parser.path("--annotations", "PATH", "captions and boxes of each image", required=True)
    parser.option("--split", "NAME", "which of a folder's splits, e.g. train2014")
    parser.option("--kinds", "KIND,KIND", f"of {', '.join(KINDS)}", type=some_of(KINDS), default=list(KINDS))
    parser.limit(" images")
    parser.path("--prompts", "DIR", "folder of prompts in the released format")
    parser.chat_model("teacher")
    parser.reply_tokens(2048)
    parser.cassette(tape)
    parser.pace()


def _add_generate(commands: Commands) -> None:
    file = "--annotations caps_boxes.jsonl"
    example = f"llava generate {file} --kinds conversation,detail --client offline --out data/mine"
    text = "write instruction data from captions and boxes; exit code 1 if no record came out"
    new = command(commands, "generate", text, example, _generate, failed=lambda result: not result["records"])
    new.client("batch")
    asking(new, "; OUT/cassette.sqlite if not given")
    new.server("record, batch")
    new.timeout()
    new.option("--poll", "SECONDS", "longest interval between two polls of a batch", type=positive, default=60.0)
    text = "share of the scene's facts that the offline teacher states wrongly, 0 to 1 (default: 0)"
    new.option("--teacher-error", "RATE", text, type=float, default=0.0)
    new.option("--instructions", "LIST", "prompts for descriptions: detail, brief or a file", default="detail")
    new.seed()
    new.path("--out", "DIR", "folder of the records", required=True)


def _filter(args: argparse.Namespace) -> Result:
    from companion.data_tools.cc3m import filter_file
    from companion.data_tools.filter_settings import settings_from

    settings = settings_from(dict(args.set))
    return filter_file(args.captions, args.out, args.images, settings, args.cache, args.processes)


def _add_filter(commands: Commands) -> None:
    example = "llava filter --captions Train_GCC-training.tsv --out data/cc595k"
    new = command(commands, "filter", "filter image-caption pairs by noun phrases", example, _filter)
    new.path("--captions", "FILE", "CC3M's TSV", required=True)
    new.images(", if they are there")
    new.path("--out", "DIR", "folder of chat.json and metadata.json", required=True)
    new.path("--cache", "DIR", "cache of the phrases (default: OUT/phrases)")
    new.option("--processes", "N", "processes that extract phrases (default: one per core)", type=int)
    new.assignments("a setting of the filter, e.g. draw=top_up; the error for an unknown name lists all")


def add(commands: Commands) -> None:
    _add_data(commands)
    _add_generate(commands)
    _add_filter(commands)
