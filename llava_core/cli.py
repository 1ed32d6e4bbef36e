"""`llava`: the one entry point. Each command imports what it needs when it runs, so `--help` is instant.

Every command shows its progress on stderr and its result on stdout (with `--json`: exactly one JSON object), and exits
with 0, with 1 when the work failed (one line on stderr says why) or with 2 when it was called in a wrong way.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llava_core import __version__
from llava_core.runtime import ROOT, CompanionError, DataError, shown

Result = dict[str, Any]
KINDS = ("conversation", "detail", "complex")
BASE_MODELS = ("llm-7b", "llm-13b", "clip")
LAYOUTS = ("llava", "hf", "original", "mmpretrain", "projector")


# ------------------------------------------------------------------------------------------------ the commands


def _reproduce(args: argparse.Namespace) -> Result:
    from llava_core.lab import pipeline

    return pipeline.reproduce(
        scale=args.scale,
        fast=args.fast,
        only=args.only,
        start=args.start,
        dry_run=args.dry_run,
        parameters=dict(args.parameter),
        book=args.book,
    )


def _show_notebooks(result: Result) -> str:
    lines = [f"{notebook['status']:10}  {notebook['name']}" for notebook in result["notebooks"]]
    return "\n".join([*lines, f"book: {result['book'] or 'not built'}"])


def _claims(args: argparse.Namespace) -> Result:
    from llava_core.lab.ledger import claim_rows

    return {"claims": claim_rows(args.ids, args.kind)}


def _show_claims(result: Result) -> str:
    from llava_core.lab.figures import cell_text

    lines = []
    for row in result["claims"]:
        here = " ".join(cell_text(row[key]) for key in ("measured", "interval") if row[key] is not None)
        lines.append(f"{row['id']:34} {row['published']:28} {row['evidence']:14} {here:30} {row['verdict']}".rstrip())
        lines += [f"{'':34} flag: {row['flag']}"] if row["flag"] else []
    return "\n".join(lines)


def _train(args: argparse.Namespace) -> Result:
    from llava_core.config import load_experiment
    from llava_core.lab.launch import launch

    record = launch(load_experiment(args.experiment, args.scale, dict(args.set)), resume=args.resume == "auto")
    numbers = {key: record.summary.get(key) for key in ("final_loss", "samples_per_s")}
    return {"run": shown(record.path), **numbers, "checkpoint": shown(record.checkpoint)}


def _evaluate_science_qa(args: argparse.Namespace) -> Result:
    from llava_core.evaluate.science_qa import evaluate_files

    return evaluate_files(
        args.predictions,
        args.questions,
        era=args.era,
        split=args.split,
        subset=args.subset,
        prompt_format=args.prompt_format,
        checkpoint=args.checkpoint,
        released=args.released,
    )


def _show_science_qa(result: Result) -> str:
    from llava_core.evaluate.science_qa import format_report

    return format_report(result)


def _compare(args: argparse.Namespace) -> Result:
    from llava_core.evaluate.science_qa import compare_files

    return compare_files(args.first, args.second, args.questions, era=args.era, split=args.split)


def _show_comparison(result: Result) -> str:
    from llava_core.evaluate.science_qa import format_comparison

    return format_comparison(result)


def _ensemble(args: argparse.Namespace) -> Result:
    from llava_core.data.scienceqa import load_problems
    from llava_core.evaluate import ensemble
    from llava_core.evaluate.predictions import read_predictions

    problems = load_problems(args.data, args.split, check_images=False)[: args.limit]
    train = load_problems(args.data, "train", check_images=False)
    shots = [p for p in train if p.id in args.shots] if args.shots else ensemble.pick_shots(train)
    if args.shots and len(shots) < len(args.shots):
        raise DataError(
            f"--shots {','.join(args.shots)}: not all are problems of the train split of {shown(args.data)}"
        )
    answers, tape = read_predictions(args.predictions).answers, args.predictions.with_suffix(".cassette.sqlite")
    result = ensemble.run(problems, answers, _chat_client(args, args.cassette or tape), shots=shots, model=args.model)
    return {key: value for key, value in result.items() if key != "texts"}  # the cassette holds them


def _show_ensemble(result: Result) -> str:
    from llava_core.evaluate.ensemble import format_report

    return format_report(result)


def _predict_science_qa(args: argparse.Namespace) -> Result:
    from llava_core.evaluate.predict import predict_science_qa
    from llava_core.runtime import resolve_device, resolve_dtype
    from llava_core.weights.checkpoint import load

    loaded = load(args.model, resolve_dtype(args.dtype), resolve_device(args.device), _options(args), **dict(args.set))
    options = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "batch": args.batch}
    options |= {"images": not args.blind, "released": args.released}
    answers = predict_science_qa(loaded, args.model, args.data, args.out, split=args.split, limit=args.limit, **options)
    return {"answers": len(answers), "prompt_format": loaded.manifest["prompt_format"], "out": shown(args.out)}


def _evaluate_llava_bench(args: argparse.Namespace) -> Result:
    from llava_core.evaluate.llava_bench import score_reviews, summarize_repeats

    results = [score_reviews(path, released=args.released) for path in args.reviews]
    return results[0] if len(results) == 1 else {"repeats": summarize_repeats(results), "files": results}


def _loaded(args: argparse.Namespace) -> Any:
    from llava_core.runtime import resolve_device, resolve_dtype
    from llava_core.weights.checkpoint import load

    device = resolve_device("auto")
    dtype = resolve_dtype("bfloat16" if device.type == "cuda" else "float32")
    return load(args.model, dtype, device, _options(args), **dict(args.set))


def _chat_client(args: argparse.Namespace, tape: Path) -> Any:
    """The client that a command names: offline, replay, record, batch or live."""
    from llava_core.miniature.offline_chat import respond
    from llava_core.teacher.client import PAYING, client_from_name

    live: dict[str, Any] = {}
    if args.client in PAYING:
        live = {"base_url": args.base_url, "budget_usd": args.budget_usd, "price": args.price, "timeout": args.timeout}
        live |= {"poll": args.poll} if args.client == "batch" else {"concurrency": args.concurrency}
    # the miniature stands above the teacher, so only here the teacher can meet the offline model
    return client_from_name(args.client, responder=respond, cassette=tape, **live)


def _bench_answers(args: argparse.Namespace) -> Result:
    from llava_core.evaluate.bench_steps import load_bench, write_answers

    bench, settings = load_bench(args.bench, args.limit), {"max_new_tokens": args.max_new_tokens}
    settings |= {"temperature": args.temperature, "seed": args.seed, "batch": args.batch}
    return write_answers(_loaded(args), args.model, bench, args.out, args.images, **settings)


def _beside(args: argparse.Namespace) -> Path:
    tape: Path = args.cassette or args.out.with_suffix(".sqlite")
    return tape


def _bench_reference(args: argparse.Namespace) -> Result:
    from llava_core.evaluate.bench_steps import load_bench, write_reference

    return write_reference(load_bench(args.bench, args.limit), _chat_client(args, _beside(args)), args.out, args.judge)


def _bench_judge(args: argparse.Namespace) -> Result:
    from llava_core.evaluate.bench_steps import load_bench, write_reviews

    bench, client = load_bench(args.bench, args.limit), _chat_client(args, _beside(args))
    return write_reviews(bench, args.answers, client, args.out, args.reference, args.judge, args.swap)


def _evaluate_judges(args: argparse.Namespace) -> Result:
    from llava_core.evaluate.judges import agreement

    return agreement(args.first, args.second)


def _show_judges(result: Result) -> str:
    from llava_core.evaluate.judges import format_agreement

    return format_agreement(result)


def _evaluate_captions(args: argparse.Namespace) -> Result:
    from llava_core.evaluate.captions import evaluate_files, write_captions

    references, images, predictions = args.references, args.images, args.predictions
    if references is None:
        from llava_core import miniature

        folder = miniature.ensure(only=["mini-coco"]) / "mini-coco"
        references, images = folder / "annotations" / "captions_val2014.json", images or folder / "val2014"
    if args.model is None:
        return evaluate_files(references, predictions)
    if images is None or args.out is None:
        raise CompanionError("a model needs --out FILE for its captions and, with --references, --images DIR")
    options = {"request": args.request, "limit": args.limit}
    made = write_captions(_loaded(args), args.model, references, images, args.out, **options)
    return {**evaluate_files(references, args.out), "file": made["file"], "conditions": made["conditions"]}


def _data_check(args: argparse.Namespace) -> Result:
    limits = {"decode": args.decode, "max_words": args.max_words or None}
    if args.fix is not None:
        from llava_core.data.repair import fix_file

        return fix_file(args.file, args.fix, args.images, **limits)
    from llava_core.data.instruct import check_file

    return check_file(args.file, args.images, **limits)


def _show_problems(result: Result) -> str:
    unit = result.get("counted", "line")
    fixed = [
        f"{unit} {f['line']}, record {f['record']}: mended: {'; '.join(f['done'])}" for f in result.get("fixed", ())
    ]
    lines = [
        f"{unit} {p['line']}, record {p['record']}: {p['kind']}: {p['message']}"
        if p["record"] is not None
        else p["message"]
        for p in result["problems"]
    ]
    total = f"{result['records']} records, {len(lines)} problems"
    if "fixed" in result:
        total += f" left, {len(fixed)} records mended, {result['written']} written to {result['out']}"
    return "\n".join([*fixed, *lines, total])


def _data_convert(args: argparse.Namespace) -> Result:
    from llava_core.data.own_data import convert_data

    return convert_data(
        args.source,
        args.to,
        images=args.images,
        columns=args.columns,
        instructions=args.instructions,
        split=args.split,
        seed=args.seed,
        skip=args.skip,
    )


def _data_audit(args: argparse.Namespace) -> Result:
    from llava_core.data.audit import CARD, TWIN, audit_file, write_card
    from llava_core.lab.chapters_data import own_folder

    audit = audit_file(args.file, args.annotations, args.images)
    folder = args.out or own_folder(args.file.parent, CARD, TWIN)
    return audit | {"files": [shown(file) for file in write_card(audit, folder)]}


def _show_audit(result: Result) -> str:
    lines = [f"{fault['found']:8} of {fault['of']:8} {fault['unit']:8} {fault['fault']}" for fault in result["faults"]]
    size = f"{result['records']} records, {result['turns']} turns, {result['images']} images"
    return "\n".join([size, *lines, *filter(None, [result.get("verbs_missing")]), *result["files"]])


def _price(text: str) -> tuple[float, float]:
    prompt, reply = (float(part) for part in text.split(","))
    return prompt, reply


def _requests(args: argparse.Namespace) -> Any:
    """The jobs of `llava generate` and of its plan, with the prompts that they were made of."""
    from llava_core.data.coco import load_annotations
    from llava_core.teacher.generate import requests_for
    from llava_core.teacher.prompts import load_prompts

    prompts = load_prompts(args.prompts) if args.prompts else None
    images = load_annotations(args.annotations, args.split)[: args.limit]
    return list(requests_for(images, args.kinds, prompts, args.model)), prompts


def _generate(args: argparse.Namespace) -> Result:
    from llava_core.data.expansion import load_instructions
    from llava_core.teacher.client import PAYING
    from llava_core.teacher.generate import ask, write
    from llava_core.teacher.plan import in_words, plan

    jobs, prompts = _requests(args)
    questions = load_instructions(args.instructions)
    tape = args.cassette or args.out / "cassette.sqlite"
    if args.client in PAYING:
        known = None if args.client == "live" else tape
        told = plan((job[2] for job in jobs), args.client, known, args.price, args.concurrency)
        print(in_words(told), file=sys.stderr)
    records = ask(jobs, _chat_client(args, tape))
    return write(records, args.kinds, args.out, args.seed, prompts, questions)


def _plan_generate(args: argparse.Namespace) -> Result:
    from llava_core.teacher.plan import plan

    jobs, _ = _requests(args)
    return plan((job[2] for job in jobs), args.client, args.cassette, args.price, args.concurrency)


def _filter(args: argparse.Namespace) -> Result:
    from llava_core.data.cc3m import filter_file, settings_from

    return filter_file(
        args.captions, args.out, args.images, settings_from(dict(args.set)), True, args.cache, args.processes
    )


def _miniature(args: argparse.Namespace) -> Result:
    from llava_core import miniature

    return miniature.write(args.out, only=args.only)


def _show_cards(result: Result) -> str:
    return "\n".join(f"{name:16} {card['counts']}" for name, card in result.items())


def _base_models(args: argparse.Namespace) -> Result:
    from llava_core.miniature import base_models

    return base_models.train_base_models(args.out, only=args.only)


def _options(args: argparse.Namespace) -> Any:
    from llava_core.weights.layouts import Options

    return Options(base=args.base, vision_tower=args.vision_tower)


def _convert(args: argparse.Namespace) -> Result:
    from llava_core.weights.convert import convert

    return convert(
        args.source, args.target, args.to, _options(args), dict(args.set), int(args.shard_gb * 1e9), args.verify
    )


def _delta(args: argparse.Namespace) -> Result:
    from llava_core.weights import delta

    work = delta.make if args.make else delta.apply
    return work(args.base, args.source, args.out, int(args.shard_gb * 1e9), args.dry_run)


def _inspect(args: argparse.Namespace) -> Result:
    from llava_core.weights.inspection import inspect

    return inspect(args.path, _options(args), dict(args.set))


def _show_inspection(result: Result) -> str:
    facts = {**{k: v for k, v in result.items() if k not in ("facts", "notes", "problems")}, **result["facts"]}
    lines = [_table({key: value for key, value in facts.items() if value not in (None, [], {})})]
    lines += [f"note: {note}" for note in result["notes"]]
    return "\n".join([*lines, *(f"error: {problem}" for problem in result["problems"])])


def _chat(args: argparse.Namespace) -> None:
    from llava_core.lab.chat import chat_in_terminal, open_assistant

    bases = {name: value for name, value in vars(_options(args)).items() if value}
    chat_in_terminal(open_assistant(args.model, **bases, **dict(args.set)), args.image)


def _bench_generate(args: argparse.Namespace) -> Result:
    from llava_core.lab.bench_generate import bench_generate

    return bench_generate(args.model, args.batches, rounds=args.rounds, device=args.device)


def _bench_attention(args: argparse.Namespace) -> Result:
    from llava_core.lab.bench_attention import bench_attention

    return bench_attention(args.shapes, args.length, args.rows, args.rounds, args.device)


def _demo(args: argparse.Namespace) -> None:
    notebook = ROOT / "notebooks" / "60_chat_demo.ipynb"
    command = [sys.executable, "-m", "jupyterlab", "--ServerApp.ip=127.0.0.1", f"--notebook-dir={ROOT}", str(notebook)]
    if subprocess.run(command, check=False).returncode:
        raise CompanionError("JupyterLab ended with an error; its lines above say why")


# ------------------------------------------------------------------------------------------------ arguments


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _some_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = _names(text)
        if not names or not set(names) <= set(known):
            raise argparse.ArgumentTypeError(f"'{text}': choose from {', '.join(known)}, with commas between")
        return names

    return parse


def _assignment(text: str) -> tuple[str, Any]:
    import yaml

    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise argparse.ArgumentTypeError(f"'{text}': write KEY=VALUE, e.g. train.learning_rate=0.001")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        raise argparse.ArgumentTypeError(f"'{text}': the value is not valid YAML") from None


def _columns(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(field.strip() and column.strip() for field, _, column in pairs):
        raise argparse.ArgumentTypeError(f"'{text}': write FIELD=COLUMN,FIELD=COLUMN, e.g. image=file,answer=caption")
    return {field.strip(): column.strip() for field, _, column in pairs}


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}': give a number above 0")
    return value


def _table(result: Result) -> str:
    def text(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.4g}"
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)

    return "\n".join(f"{key:16} {text(value)}" for key, value in result.items())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava",
        description="Visual Instruction Tuning, step by step: train, evaluate and reproduce LLaVA.",
        epilog="example:\n  llava reproduce",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"llava-core {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def group(name: str, text: str, example: str, into: Any = commands) -> Any:
        inner = into.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        return inner.add_subparsers(metavar="COMMAND", required=True)

    def command(
        name: str,
        text: str,
        example: str,
        run: Callable[[argparse.Namespace], Result | None],
        show: Callable[[Result], str] = _table,
        failed: Callable[[Result], bool] = lambda result: False,
        into: Any = commands,
        interactive: bool = False,
    ) -> argparse.ArgumentParser:
        new: argparse.ArgumentParser = into.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if not interactive:
            new.add_argument("--json", action="store_true", help="print one JSON object on stdout and nothing else")
        new.set_defaults(run=run, show=show, failed=failed, interactive=interactive)
        return new

    new = command(
        "reproduce",
        "run the notebooks that are not up to date, and build the book",
        "llava reproduce --only 20,21",
        _reproduce,
        _show_notebooks,
        failed=lambda result: bool(result["failed"]),
    )
    new.add_argument("--scale", default="mini", help="hardware and data: mini (default), gpu or a100x8")
    new.add_argument("--fast", action="store_true", help="the shortest runs that still show every step")
    new.add_argument("--only", type=_names, metavar="N,N", help="only these notebooks, by number or name")
    new.add_argument("--from", dest="start", metavar="N", help="this notebook and all after it")
    new.add_argument("--dry-run", action="store_true", help="say what would run, and run nothing")
    new.add_argument(
        "-p",
        "--parameter",
        action="append",
        default=[],
        type=_assignment,
        metavar="NAME=VALUE",
        help="another value for a parameter of the notebooks",
    )
    new.add_argument("--book", choices=["auto", "only", "no"], default="auto", help="build the book too, only, or not")

    new = command(
        "claims",
        "list the paper's numbers and what stands behind each",
        "llava claims --kind measured",
        _claims,
        _show_claims,
    )
    new.add_argument("ids", nargs="*", metavar="ID", help="only these claims")
    new.add_argument("--kind", metavar="KIND", help="only claims with this kind of evidence, e.g. recomputed")

    new = command("train", "train one experiment", "llava train finetune --set train.seed=1", _train)
    new.add_argument("experiment", metavar="EXPERIMENT", help="a file of configs/experiments, without its extension")
    new.add_argument("--scale", default="mini", help="hardware and data: mini (default), gpu or a100x8")
    new.add_argument(
        "--set", action="append", default=[], type=_assignment, metavar="KEY=VALUE", help="another value for one field"
    )
    new.add_argument("--resume", choices=["auto", "never"], default="auto", help="go on, or start anew")

    def teacher(parser: argparse.ArgumentParser, tape: str, name: str = "--model") -> None:
        parser.add_argument(
            "--client", choices=["offline", "replay", "record", "live"], default="offline", help="who answers"
        )
        parser.add_argument("--cassette", type=Path, metavar="FILE", help=f"recorded replies; {tape} if not given")
        parser.add_argument(name, default="gpt-4-0314", help="the chat model, by the name that its server knows")
        parser.add_argument("--base-url", metavar="URL", help="a compatible server; OpenAI's if not given")
        parser.add_argument(
            "--budget-usd", type=float, metavar="USD", help="stop before more is spent (record: in all runs)"
        )
        parser.add_argument(
            "--price",
            type=_price,
            metavar="PROMPT,REPLY",
            help="USD per million tokens, for a model that is not listed",
        )
        parser.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests under way at once")
        parser.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="of one attempt")
        parser.add_argument("--seed", type=int, default=0, help="of what is drawn per record, and of the waits")

    def bases(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--base", metavar="DIR", help="language model of a projector, a LoRA or a .pth")
        parser.add_argument("--vision-tower", metavar="DIR", help="tower, instead of the one that the files name")

    def facts(parser: argparse.ArgumentParser) -> None:
        text = "what the files do not say, e.g. template=v0_exact or image_position=last; once for each"
        parser.add_argument("--set", action="append", default=[], type=_assignment, metavar="KEY=VALUE", help=text)

    into = group("predict", "let a model answer a benchmark", "llava predict science-qa --help")
    new = command(
        "science-qa",
        "answer ScienceQA into a file that says how it was made, and go on with one that was interrupted",
        "llava predict science-qa --model runs/science_qa/mini/ID/checkpoint --out answers.jsonl",
        _predict_science_qa,
        into=into,
    )
    new.add_argument("--model", type=Path, required=True, metavar="DIR", help="a checkpoint of any layout but a delta")
    data = ROOT / "data" / "mini" / "mini-scienceqa"
    new.add_argument("--data", type=Path, default=data, metavar="DIR", help="ScienceQA (default: the miniature's)")
    new.add_argument("--out", type=Path, required=True, metavar="FILE", help="the .jsonl to write")
    new.add_argument("--split", default="test", metavar="NAME", help="which problems (default: test)")
    new.add_argument("--limit", type=int, metavar="N", help="only the first N problems")
    new.add_argument("--batch", type=int, default=64, metavar="N", help="problems answered together (default: 64)")
    new.add_argument("--max-new-tokens", type=int, default=1024, metavar="N", help="longest reply (default: 1024)")
    new.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default: 0, greedy")
    new.add_argument("--blind", action="store_true", help="ask without the images")
    new.add_argument("--released", action="store_true", help="in the words of the released converter, faults included")
    new.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: auto")
    new.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="default: float32")
    bases(new)
    facts(new)

    into = group("evaluate", "score answers, reviews or captions", "llava evaluate llava-bench --reviews reviews.jsonl")

    def reading(parser: argparse.ArgumentParser) -> None:
        text = "the questions and right answers"
        parser.add_argument("--questions", type=Path, required=True, metavar="FILE", help=text)
        text = "whose reading of an answer (default: ours, which never guesses)"
        parser.add_argument("--era", choices=["ours", "v0", "1.0", "1.5"], default="ours", help=text)
        parser.add_argument("--split", default="test", metavar="NAME", help="of problems.json (default: test)")

    new = command(
        "science-qa",
        "score answers to ScienceQA",
        "llava evaluate science-qa --predictions answers.json --questions problems.json",
        _evaluate_science_qa,
        _show_science_qa,
        into=into,
    )
    new.add_argument("--predictions", type=Path, required=True, metavar="FILE", help="the answers")
    reading(new)
    new.add_argument("--subset", action="store_true", help="score the given questions only, though more are answered")
    new.add_argument("--prompt-format", metavar="NAME", help="refuse answers made with another one, e.g. QCM-LEPA")
    new.add_argument("--checkpoint", type=Path, metavar="DIR", help="refuse answers of another model")
    new.add_argument(
        "--released",
        action="store_true",
        help="score the choices that a released file stores, its random draws included",
    )
    new = command(
        "compare",
        "compare two files of answers to the same questions of ScienceQA",
        "llava evaluate compare answers.jsonl other.jsonl --questions problems.json",
        _compare,
        _show_comparison,
        into=into,
    )
    new.add_argument("first", type=Path, metavar="A", help="the answers to compare with")
    new.add_argument("second", type=Path, metavar="B", help="the other answers")
    reading(new)
    new = command(
        "science-qa-ensemble",
        "join answers to ScienceQA with those of a text-only GPT-4: complement, judge, upper bound",
        "llava evaluate science-qa-ensemble --predictions answers.jsonl --data data/scienceqa --client replay",
        _ensemble,
        _show_ensemble,
        into=into,
    )
    new.add_argument("--predictions", type=Path, required=True, metavar="FILE", help="LLaVA's answers")
    new.add_argument("--data", type=Path, required=True, metavar="DIR", help="ScienceQA")
    new.add_argument("--split", default="test", metavar="NAME", help="which problems (default: test)")
    new.add_argument("--limit", type=int, metavar="N", help="only the first N problems")
    new.add_argument("--shots", type=_names, metavar="ID,ID", help="solved examples (default: two of train, drawn)")
    teacher(new, "PREDICTIONS with the ending .cassette.sqlite")
    scoring = into

    into = group("data", "check, audit and convert training data", "llava data check chat.json --images images")
    new = command(
        "check",
        "find all problems of an instruction file",
        "llava data check chat.json --images images",
        _data_check,
        _show_problems,
        failed=lambda result: bool(result["errors"]),
        into=into,
    )
    new.add_argument("file", type=Path, metavar="FILE", help="LLaVA-Instruct JSON, JSONL or parquet")
    new.add_argument("--images", type=Path, metavar="DIR", help="folder of the images; without it they are not read")
    new.add_argument("--no-decode", dest="decode", action="store_false", help="look at the images' headers only")
    new.add_argument(
        "--max-words",
        type=int,
        default=1300,  # instruct.MAX_WORDS, which is not imported before a command runs
        metavar="N",
        help="a longer record does not fit into 2048 tokens beside its image (default: 1300; 0: no limit)",
    )
    new.add_argument("--fix", type=Path, metavar="OUT", help="write a repaired copy and report what is left")
    new = command(
        "audit",
        "count duplicates, leaks and unsupported objects, and write a data card",
        "llava data audit chat.json --annotations captions_and_boxes.jsonl",
        _data_audit,
        _show_audit,
        into=into,
    )
    new.add_argument("file", type=Path, metavar="FILE", help="LLaVA-Instruct JSON, JSONL or parquet")
    new.add_argument(
        "--annotations", type=Path, metavar="PATH", help="captions_<split>.json of COCO, or a .jsonl as for generate"
    )
    new.add_argument("--images", type=Path, metavar="DIR", help="folder of the images; without it they are not read")
    new.add_argument("--out", type=Path, metavar="DIR", help="for DATA_CARD.md and audit.json; default: beside FILE")
    new = command(
        "convert",
        "make instruction data of a folder of images and texts, a CSV, or a data set on disk",
        "llava data convert photos.csv --to data/mine.json --images photos --columns image=file,answer=legend",
        _data_convert,
        into=into,
    )
    new.add_argument(
        "source", type=Path, metavar="SRC", help="folder of image + .txt, .csv, .tsv, .parquet, or save_to_disk folder"
    )
    new.add_argument("--to", type=Path, required=True, metavar="OUT", help="the .json, .jsonl or .parquet to write")
    new.add_argument(
        "--images", type=Path, metavar="DIR", help="folder of the images (of those in arrow: where to write)"
    )
    new.add_argument(
        "--columns",
        type=_columns,
        metavar="FIELD=COLUMN,...",
        help="for id, image, question, answer, type, conversations; common names are known",
    )
    new.add_argument(
        "--instructions", default="brief", metavar="LIST", help="questions for answers without: brief, detail or a file"
    )
    new.add_argument("--split", metavar="NAME", help="part of a data set that has several")
    new.add_argument("--seed", type=int, default=0, metavar="N", help="decides which instruction a record gets")
    new.add_argument("--skip", action="store_true", help="leave rows with problems out, and report them")

    def asking(parser: argparse.ArgumentParser, cassette: str) -> None:
        parser.add_argument(
            "--annotations", type=Path, required=True, metavar="PATH", help="captions and boxes of each image"
        )
        parser.add_argument("--split", metavar="NAME", help="which of a folder's splits, e.g. train2014")
        parser.add_argument(
            "--kinds", type=_some_of(KINDS), default=list(KINDS), metavar="KIND,KIND", help=f"of {', '.join(KINDS)}"
        )
        parser.add_argument("--limit", type=int, metavar="N", help="only the first N images")
        parser.add_argument(
            "--prompts", type=Path, metavar="DIR", help="the released folders of prompts, or ones alike"
        )
        parser.add_argument("--model", default="gpt-4-0314", help="the teacher, by the name that its server knows")
        parser.add_argument("--cassette", type=Path, metavar="FILE", help=cassette)
        parser.add_argument(
            "--price",
            type=_price,
            metavar="PROMPT,REPLY",
            help="USD per million tokens, for a model that is not listed",
        )
        parser.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests under way at once")

    new = command(
        "generate",
        "write instruction data from captions and boxes",
        "llava generate --annotations caps_boxes.jsonl --kinds conversation,detail --client offline --out data/mine",
        _generate,
    )
    new.add_argument(
        "--client", choices=["offline", "replay", "record", "batch", "live"], default="offline", help="who answers"
    )
    asking(new, "recorded replies; OUT/cassette.sqlite if not given")
    new.add_argument("--base-url", metavar="URL", help="a compatible server; OpenAI's if not given")
    new.add_argument(
        "--budget-usd", type=float, metavar="USD", help="stop before more is spent (record, batch: in all runs)"
    )
    new.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="of one attempt")
    new.add_argument(
        "--poll", type=_positive, default=60.0, metavar="SECONDS", help="longest wait between two looks at a batch"
    )
    new.add_argument(
        "--instructions",
        default="detail",
        metavar="LIST",
        help="how a description is asked for: detail, brief or a file",
    )
    new.add_argument("--seed", type=int, default=0, help="of what is drawn per record, and of the waits")
    new.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the records go")

    into = group("plan", "say beforehand what work will take", "llava plan generate --annotations caps_boxes.jsonl")
    new = command(
        "generate",
        "estimate requests, tokens, USD and hours of `llava generate`; nothing is sent",
        "llava plan generate --annotations caps_boxes.jsonl --model gpt-4o --client batch",
        _plan_generate,
        into=into,
    )
    new.add_argument("--client", choices=["record", "batch"], default="record", help="one by one, or at half the price")
    asking(new, "recorded replies, which cost nothing")

    new = command(
        "filter",
        "choose caption pairs by their noun phrases",
        "llava filter --captions Train_GCC-training.tsv --out data/cc595k",
        _filter,
    )
    new.add_argument("--captions", type=Path, required=True, metavar="FILE", help="CC3M's TSV")
    new.add_argument("--images", type=Path, metavar="DIR", help="folder of the images, if they are there")
    new.add_argument("--out", type=Path, required=True, metavar="DIR", help="where chat.json and metadata.json go")
    new.add_argument("--cache", type=Path, metavar="DIR", help="where found phrases are kept (default: OUT/phrases)")
    new.add_argument("--processes", type=int, metavar="N", help="how many find phrases (default: one per core)")
    text = "another reading of the recipe, e.g. draw=top_up; the error for an unknown one lists them"
    new.add_argument("--set", action="append", default=[], type=_assignment, metavar="KEY=VALUE", help=text)

    def shards(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--shard-gb", type=_positive, default=5, metavar="GB", help="largest weights file (default: 5)"
        )

    def answering(parser: argparse.ArgumentParser, alone: Any = None) -> None:
        text = "a checkpoint of any layout but a delta"
        (alone or parser).add_argument("--model", type=Path, required=alone is None, metavar="DIR", help=text)
        parser.add_argument("--limit", type=int, metavar="N", help="only the first N")
        bases(parser)
        facts(parser)

    example = "llava evaluate bench answers --model data/LLaVA-7b --bench data/mini/bench-coco --out a.jsonl"
    steps = group("bench", "LLaVA-Bench step by step: answers, reference, judge, score", example, scoring)
    folder = "the bench's official files: questions, context, reference answers"
    new = command("answers", "let a checkpoint answer the questions", example, _bench_answers, into=steps)
    new.add_argument("--bench", type=Path, required=True, metavar="DIR", help=folder)
    new.add_argument("--images", type=Path, metavar="DIR", help="folder of the images (default: images in the bench's)")
    new.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="answers; a file that is there is continued"
    )
    new.add_argument("--max-new-tokens", type=int, default=1024, metavar="N", help="longest answer (default: 1024)")
    new.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    new.add_argument("--seed", type=int, default=0, metavar="N", help="of sampled answers; each gives another run")
    new.add_argument("--batch", type=int, default=16, metavar="N", help="questions answered together (default: 16)")
    answering(new)
    example = "llava evaluate bench reference --bench data/mini/bench-coco --out reference.jsonl"
    text = "let a text-only model answer by captions and boxes"
    new = command("reference", text, example, _bench_reference, into=steps)
    new.add_argument("--bench", type=Path, required=True, metavar="DIR", help=folder)
    new.add_argument("--out", type=Path, required=True, metavar="FILE", help="reference answers")
    teacher(new, "OUT with the ending .sqlite", "--judge")
    new.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    example = "llava evaluate bench judge --bench data/mini/bench-coco --answers a.jsonl --out reviews.jsonl"
    new = command("judge", "have answers judged beside reference answers", example, _bench_judge, into=steps)
    new.add_argument("--bench", type=Path, required=True, metavar="DIR", help=folder)
    new.add_argument("--answers", type=Path, required=True, metavar="FILE", help="of a checkpoint")
    new.add_argument("--reference", type=Path, metavar="FILE", help="reference answers, instead of the bench's own")
    text = "reviews, with a cassette of their own; for a repeat give another name"
    new.add_argument("--out", type=Path, required=True, metavar="FILE", help=text)
    new.add_argument("--swap", action="store_true", help="judge each pair in both orders")
    teacher(new, "OUT with the ending .sqlite", "--judge")
    new.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    for name, place in (("llava-bench", scoring), ("score", steps)):  # the last step; the first is its older name
        example = f"llava evaluate {'bench score' if place is steps else name} --reviews reviews.jsonl"
        text = "score a judge's reviews; of several files also mean and standard deviation"
        new = command(name, text, example, _evaluate_llava_bench, into=place)
        new.add_argument("--reviews", type=Path, nargs="+", required=True, metavar="FILE", help="a review per line")
        new.add_argument("--released", action="store_true", help="average failed reviews as -1, as the released script")
    example, text = "llava evaluate judges a.jsonl b.jsonl", "how far two judges agree on the same answers"
    new = command("judges", text, example, _evaluate_judges, _show_judges, into=scoring)
    new.add_argument("first", type=Path, metavar="A", help="one judge's reviews")
    new.add_argument("second", type=Path, metavar="B", help="another judge's, or a repeat of the first")
    example = "llava evaluate captions --references captions_val.json --predictions results.json"
    text = "score captions with BLEU and CIDEr, a file's or a checkpoint's"
    new = command("captions", text, example, _evaluate_captions, into=scoring)
    new.add_argument(
        "--references", type=Path, metavar="FILE", help="COCO's captions_*.json (default: the miniature's)"
    )
    either = new.add_mutually_exclusive_group(required=True)
    either.add_argument("--predictions", type=Path, metavar="FILE", help="captions in COCO's result layout")
    answering(new, alone=either)
    new.add_argument("--images", type=Path, metavar="DIR", help="folder of the images that a model captions")
    new.add_argument("--out", type=Path, metavar="FILE", help="where a model's captions go (.json)")
    new.add_argument("--request", default="Give this image a caption.", metavar="TEXT", help="what a model is asked")

    example = "llava convert llava-v1.5-7b data/llava-hf --to hf"
    new = command("convert", "write a checkpoint in another layout, and compare", example, _convert)
    new.add_argument("source", type=Path, metavar="SRC", help="folder or file of any layout")
    new.add_argument("target", type=Path, metavar="DST", help="a new folder")
    new.add_argument("--to", choices=LAYOUTS, required=True, help="the layout to write")
    bases(new)
    shards(new)
    new.add_argument("--verify", action="store_true", help="with --to hf: run both models and compare every module")
    facts(new)

    delta = {
        "make": (
            "subtract a base language model", "a checkpoint in the layout 'original'", "a new folder, for the delta",
            "llava delta make --base llama-7b --out data/LLaVA-7b-delta LLaVA-7b",
        ),
        "apply": (
            "add a base language model to a delta", "the delta", "a new folder, in the layout 'original'",
            "llava delta apply --base llama-7b --out data/LLaVA-7b LLaVA-7b-delta-v0",
        ),
    }  # fmt: skip
    into = group("delta", "make or apply delta weights", delta["apply"][-1])
    for name, (text, source, out, example) in delta.items():
        new = command(name, text, example, _delta, into=into)
        new.add_argument("source", type=Path, metavar="DIR", help=source)
        new.add_argument("--base", required=True, metavar="DIR", help="the base language model")
        new.add_argument("--out", type=Path, required=True, metavar="DIR", help=out)
        new.add_argument("--dry-run", action="store_true", help="say what would be done with each tensor, and stop")
        shards(new)
        new.set_defaults(make=name == "make")

    def unsound(result: Result) -> bool:
        return bool(result["problems"])

    example = "llava inspect runs/finetune/mini/ID/checkpoint"
    new = command("inspect", "say what a checkpoint is", example, _inspect, _show_inspection, failed=unsound)
    new.add_argument("path", type=Path, metavar="DIR", help="folder or file of any layout")
    bases(new)
    facts(new)

    example = "llava chat --model runs/finetune/mini/ID/checkpoint --image photo.jpg"
    new = command("chat", "chat about an image in the terminal", example, _chat, interactive=True)
    new.add_argument("--model", type=Path, required=True, metavar="DIR", help="a checkpoint of any layout but a delta")
    new.add_argument(
        "--image",
        type=Path,
        required=True,
        metavar="FILE",
        help="the image; a line `/image FILE` takes another, an empty line ends",
    )
    bases(new)
    facts(new)
    command("demo", "open the chat notebook in JupyterLab", "llava demo", _demo, interactive=True)

    into = group("bench", "measure speed beside a peer", "llava bench generate")
    new = command(
        "generate", "greedy generation beside transformers' own", "llava bench generate --model small", _bench_generate,
        failed=lambda result: not result["same_tokens"], into=into,
    )  # fmt: skip
    new.add_argument(
        "--model", choices=["tiny", "small", "smollm2-135m"], default="small", help="size; the weights are random"
    )
    new.add_argument("--batches", type=int, nargs="+", default=[1, 8], metavar="N", help="rows at once (default: 1 8)")
    new.add_argument("--rounds", type=int, default=7, metavar="N", help="repetitions (default: 7)")
    new.add_argument("--device", choices=["cpu", "cuda", "auto"], default="cpu", help="default: cpu")
    new = command(
        "attention", "attention over packed rows beside a padded batch", "llava bench attention --shapes 64",
        _bench_attention, lambda result: _table({k: v for k, v in result.items() if k != "cases"}), into=into,
    )  # fmt: skip
    new.add_argument(
        "--shapes", nargs="+", choices=["vicuna-7b", "llama-3.2-1b", "128", "64", "tiny"], default=["128", "64"],
        help="heads and their size (default: 128 64)",
    )  # fmt: skip
    new.add_argument("--length", type=int, default=2048, metavar="N", help="tokens of a row (default: 2048)")
    new.add_argument("--rows", type=int, default=1, metavar="N", help="rows of the batch (default: 1)")
    new.add_argument("--rounds", type=int, default=7, metavar="N", help="repetitions (default: 7)")
    new.add_argument("--device", choices=["cpu", "cuda", "auto"], default="cpu", help="default: cpu")

    new = command("miniature", "write the miniature's data sets", "llava miniature", _miniature, _show_cards)
    new.add_argument("--only", type=_names, metavar="NAME,NAME", help="these sets alone, e.g. mini-coco")
    new.add_argument("--out", type=Path, default=ROOT / "data" / "mini", metavar="DIR", help="default: data/mini")

    def missed(result: Result) -> bool:
        return not all(result["passed"].values())

    new = command(
        "base-models", "train the base models again", "llava base-models --only clip", _base_models, failed=missed
    )
    new.add_argument(
        "--only", type=_some_of(BASE_MODELS), metavar="NAME,NAME", help=f"of {', '.join(BASE_MODELS)}; all if not given"
    )
    new.add_argument("--out", type=Path, default=ROOT / "models" / "mini", metavar="DIR", help="default: models/mini")
    return parser


@contextlib.contextmanager
def _stdout_is_for_the_result() -> Iterator[None]:
    """Send whatever the work prints, from child processes too, to stderr."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after `llava`; the process's own when None.

    Returns:
        0, or 1 when the work failed (2, for a wrong call, leaves through argparse's SystemExit).
    """
    args = _parser().parse_args(argv)
    try:
        if args.interactive:
            args.run(args)
            return 0
        with _stdout_is_for_the_result():
            result = args.run(args)
        print(json.dumps(result, ensure_ascii=False, allow_nan=False, default=str) if args.json else args.show(result))
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("llava_core"):
            raise
        print(f"error: the package '{error.name}' is not installed; `make setup` installs it", file=sys.stderr)
        return 1
    except (CompanionError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 1
    return int(args.failed(result))
