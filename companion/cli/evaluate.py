"""`llava predict` and `evaluate`, but for LLaVA-Bench."""

from __future__ import annotations

import argparse
from pathlib import Path

from companion.cli import llava_bench
from companion.cli.arguments import Commands, Parser, Result, chat_client, command, given, group, loaded, names
from llava_core.runtime import ROOT, CompanionError, DataError, display_path


def _predict_science_qa(args: argparse.Namespace) -> Result:
    from companion.evaluation.predict import predict_science_qa

    model = loaded(args, args.device, args.dtype)
    chosen = given(args, "split", "limit", "max_new_tokens", "temperature", "batch", "released")
    answers = predict_science_qa(model, args.model, args.data, args.out, images=not args.blind, **chosen)
    return {"answers": len(answers), "prompt_format": model.manifest["prompt_format"], "out": display_path(args.out)}


def _score(args: argparse.Namespace) -> Result:
    from companion.evaluation.science_qa import evaluate_files

    chosen = given(args, "era", "split", "subset", "prompt_format", "checkpoint", "released")
    return evaluate_files(args.predictions, args.questions, **chosen)


def _show_score(result: Result) -> str:
    from companion.evaluation.science_qa import format_report

    return format_report(result)


def _compare(args: argparse.Namespace) -> Result:
    from companion.evaluation.science_qa import compare_files

    chosen = given(args, "era", "split", "subset", "released")
    return compare_files(args.first, args.second, args.questions, **chosen)


def _show_comparison(result: Result) -> str:
    from companion.evaluation.science_qa import format_comparison

    return format_comparison(result)


def _ensemble(args: argparse.Namespace) -> Result:
    from companion.data_tools.scienceqa import load_problems
    from companion.evaluation import ensemble
    from companion.evaluation.predictions import read_predictions

    everything = load_problems(args.data, args.split, check_images=False)
    problems = everything[: args.limit]
    answers = read_predictions(args.predictions).answers
    if args.gpt4 is not None:
        return ensemble.run_files(problems, answers, args.gpt4, args.requery)
    if args.requery is not None:
        raise CompanionError("--requery has the answers to a second query; give those to the first with --gpt4 FILE")
    train = load_problems(args.data, "train", check_images=False)
    shots = [p for p in train if p.id in args.shots] if args.shots else ensemble.pick_shots(train)
    if args.shots and len(shots) < len(args.shots):
        raise DataError(
            f"--shots {','.join(args.shots)}: not all are problems of the train split of {display_path(args.data)}"
        )
    tape = args.predictions.with_suffix(".cassette.sqlite")
    client, chosen = chat_client(args, args.cassette or tape), given(args, "model", "max_tokens")
    if args.client == "offline":
        known, asked = ensemble.answerable(client, everything, shots)
        if 20 * known < asked:
            raise DataError(
                f"{display_path(args.data)}: the client 'offline' cannot answer these problems: it knows the facts of "
                f"the miniature, and named a choice in {known} of {asked}; give GPT-4's answers (--gpt4 FILE), or "
                "query a model (--client record)"
            )
    result = ensemble.run(problems, answers, client, shots=shots, **chosen)
    return {key: value for key, value in result.items() if key != "texts"}  # they are in the cassette


def _show_ensemble(result: Result) -> str:
    from companion.evaluation.ensemble import format_report

    return format_report(result)


def _unanswered(result: Result) -> bool:
    return "bills" in result and bool(result["bills"]["gpt4"]["unanswered"] == result["n"])


def _problems(parser: Parser) -> None:
    parser.option("--split", "NAME", "which problems (default: test)", default="test")
    parser.limit(" problems")


def _extraction(parser: Parser) -> None:
    parser.path("--questions", "FILE", "the questions and right answers", required=True)
    text = "answer-extraction rule (default: ours, which never guesses)"
    parser.choice("--era", ["ours", "v0", "1.0", "1.5"], "ours", text)
    parser.option("--split", "NAME", "of problems.json (default: test)", default="test")
    parser.switch("--subset", "only the given questions, even if the file has more answers")
    parser.switch("--released", "the choices that a released file stores, its random draws included, not its texts")


def _add_predict(commands: Commands) -> None:
    into = group(commands, "predict", "answer a benchmark with a model", "llava predict science-qa --help")
    example = "llava predict science-qa --model runs/science_qa/mini/ID/checkpoint --out answers.jsonl"
    text = "answer ScienceQA, with the conditions in the file; an interrupted file is resumed"
    new = command(into, "science-qa", text, example, _predict_science_qa)
    new.checkpoint()
    new.path("--data", "DIR", "ScienceQA (default: the miniature's)", default=ROOT / "data/mini/mini-scienceqa")
    new.path("--out", "FILE", "the .jsonl to write", required=True)
    _problems(new)
    new.number("--batch", 64, "problems answered together")
    new.number("--max-new-tokens", 1024, "longest reply")
    new.option("--temperature", "T", "default: 0, greedy", type=float, default=0.0)
    new.switch("--blind", "ask without the images")
    new.switch("--released", "prompts exactly as the released converter writes them")
    new.choice("--device", ["auto", "cpu", "cuda"], "auto")
    new.choice("--dtype", ["float32", "bfloat16", "float16"], "float32")
    new.bases()
    new.assumptions()


def _add_science_qa(into: Commands) -> None:
    example = "llava evaluate science-qa --predictions answers.json --questions problems.json"
    new = command(into, "science-qa", "score answers to ScienceQA", example, _score, _show_score)
    new.path("--predictions", "FILE", "the answers", required=True)
    _extraction(new)
    new.option("--prompt-format", "NAME", "refuse answers with a prompt format other than this one, e.g. QCM-LEPA")
    new.path("--checkpoint", "DIR", "refuse answers of another model")

    example = "llava evaluate compare answers.jsonl other.jsonl --questions problems.json"
    text = "compare two files of answers to the same questions of ScienceQA"
    new = command(into, "compare", text, example, _compare, _show_comparison)
    new.path("first", "A", "the answers of the first model")
    new.path("second", "B", "the answers of the second model")
    _extraction(new)

    example = "llava evaluate science-qa-ensemble --predictions answers.jsonl --data data/scienceqa --client replay"
    text = "combine answers to ScienceQA with those of a text-only GPT-4: complement, judge, upper bound"
    new = command(into, "science-qa-ensemble", text, example, _ensemble, _show_ensemble, _unanswered)
    new.path("--predictions", "FILE", "LLaVA's answers", required=True)
    new.path("--data", "DIR", "ScienceQA", required=True)
    _problems(new)
    new.path("--gpt4", "FILE", "GPT-4's answers, as the released scripts read them; no request is sent")
    new.path("--requery", "FILE", "with --gpt4: its answers to the second query, where the two differ")
    new.option("--shots", "ID,ID", "solved examples (default: two of train, drawn)", type=names)
    new.teacher("PREDICTIONS with the ending .cassette.sqlite")


def _captions(args: argparse.Namespace) -> Result:
    from companion.evaluation.captions import write_captions
    from companion.evaluation.reporting import caption_report

    references, images, predictions = args.references, args.images, args.predictions
    if references is None:
        from companion import miniature

        folder = miniature.ensure(only=["mini-coco"]) / "mini-coco"
        references, images = folder / "annotations" / "captions_val2014.json", images or folder / "val2014"
    if args.model is None:
        return caption_report(references, predictions, args.limit)
    if images is None or args.out is None:
        raise CompanionError("a model needs --out FILE for its captions and, with --references, --images DIR")
    chosen = given(args, "request", "limit")
    written = write_captions(loaded(args), args.model, references, images, args.out, **chosen)
    return {
        **caption_report(references, args.out, args.limit),
        "file": written["file"],
        "conditions": written["conditions"],
    }


def _show_captions(result: Result) -> str:
    from companion.evaluation.captions import PERCENT, format_report
    from companion.evaluation.reporting import format_rules

    rules = [format_rules(result["reporting"], PERCENT)] if result.get("reporting") else []
    return "\n".join([format_report(result), *rules])


def _add_captions(into: Commands) -> None:
    example = "llava evaluate captions --references captions_val.json --predictions results.json"
    text = "score captions with BLEU and CIDEr, of a file or of a checkpoint"
    new = command(into, "captions", text, example, _captions, _show_captions)
    new.path("--references", "FILE", "COCO's captions_*.json (default: the miniature's)")
    either = new.add_mutually_exclusive_group(required=True)
    either.add_argument("--predictions", type=Path, metavar="FILE", help="captions in COCO's result format")
    new.checkpoint(either)
    new.limit(" images of the references")
    new.bases()
    new.assumptions()
    new.images(" for --model")
    new.path("--out", "FILE", "where the captions of --model are written (.json)")
    new.option("--request", "TEXT", "the prompt", default="Give this image a caption.")


def add(commands: Commands) -> None:
    _add_predict(commands)
    example = "llava evaluate llava-bench --reviews reviews.jsonl"
    into = group(commands, "evaluate", "score answers, reviews or captions", example)
    _add_science_qa(into)
    llava_bench.add(into)
    _add_captions(into)
