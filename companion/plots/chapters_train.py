"""What the chapters on training and evaluation show, each piece longer than a cell: tables, controls, pictures."""

from __future__ import annotations

import base64
import html
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from companion.data_tools.coco import load_annotations
from companion.data_tools.scienceqa import Problem
from companion.evaluation import science_qa
from companion.evaluation.grounding import shuffle_images
from companion.evaluation.relative_score import relative_scores
from companion.evaluation.statistics import paired_bootstrap
from companion.paper.claims import all_claims, claim
from companion.plots.figures import BLUE, MUTED, ORANGE, _axes, _styled
from companion.results import factual_folder, grounding_result, load_run
from companion.teacher.chat import ChatClient
from companion.teacher.client import OfflineClient
from llava_core.checkpoints.load import Loaded
from llava_core.config import FILE_FIELDS, META, RunConfig, value_of
from llava_core.constants import IGNORE_INDEX, IMAGE_TOKEN_ID
from llava_core.data.conversation import Encoded
from llava_core.data.images import load_image
from llava_core.data.instruct import Sample
from llava_core.inference import answer_questions, prompt_ids
from llava_core.models.generation import GenerationSettings, generate_tokens
from llava_core.train.dataset import TrainingSet, build_model, collate

if TYPE_CHECKING:
    from IPython.display import HTML
    from matplotlib.figure import Figure
    from PIL.Image import Image

PARTS = ("vision_tower", "multi_modal_projector", "language_model")
SEED = 0  # of every exchange of images

# ------------------------------------------------------------------------------------------------ what a run is


def claim_rows(names: Sequence[str]) -> list[dict[str, str]]:
    """What the paper says, as the ledger has it: one row per claim id."""
    return [{"claim": c.id, "place": c.place, "what it says": c.text, "published": c.shown} for c in map(claim, names)]


def config_rows(config: RunConfig, since: RunConfig | None = None) -> list[dict[str, str]]:
    """Every setting of a run beside the paper's value, where that one is written down, and why this run differs.

    Args:
        config: the run.
        since: leave out what the table of this run says already.
    """
    departures = {d.field: d for d in config.departures}
    sections = config.experiment.model_dump(exclude=dict.fromkeys((*META, "stage"), True) | {"data": FILE_FIELDS})
    fields = [
        f"{s}.{f}" if f else s for s, part in sections.items() for f in (part if isinstance(part, dict) else ("",))
    ]
    rows = []
    for field in fields:
        here, departure = value_of(config.experiment, field), departures.pop(field, None)
        paper = departure.paper if departure else here
        if paper in (None, {}) and here in (None, {}):
            continue  # a setting that neither of the two uses
        notes = [config.experiment.source_of(field) or "", f"here: {departure.why}" if departure else ""]
        rows.append(
            {
                "setting": field,
                "paper": paper,
                "here": here,
                "where it stands, why it differs": "; ".join(filter(None, notes)),
            }
        )
    for d in departures.values():
        name = d.field.removeprefix("scale.")
        rows.append(
            {
                "setting": name,
                "paper": "the real one",
                "here": d.here,
                "where it stands, why it differs": f"here: {d.why}",
            }
        )
    known = [list(row.values())[:3] for row in config_rows(since)] if since else []
    written = [{key: _written(value) for key, value in row.items()} for row in rows]
    return [row for row in written if list(row.values())[:3] not in known]


def _written(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else "none" if value is None else str(value)


def what_moves(config: RunConfig, samples: Sequence[Sample], initial: Path | None = None) -> list[dict[str, Any]]:
    """Take one gradient step on a few samples and see which weights are others afterwards.

    Args:
        config: the run; its trainable parts are the only ones that may move.
        samples: what the step is taken on.
        initial: checkpoint whose projector the run starts from.

    Returns:
        Per part of the model: its parameters, how many of them train, its tensors, and how many of these moved.
    """
    loaded = build_model(config, initial)
    before = {name: p.detach().clone() for name, p in loaded.model.named_parameters()}
    loaded.model.train()
    data = TrainingSet(list(samples), loaded.tokenizer, loaded.processor, config, loaded.model.n_image_tokens)
    batch = collate([data[k] for k in range(len(data))], loaded.processor.normalise)
    logits = loaded.model(batch.input_ids, batch.pixel_values, batch.attention_mask, use_cache=False).logits
    _token_losses(logits, batch.labels).mean().backward()
    # plain descent with a large step: in half precision a step of the run's own size may vanish in the rounding
    torch.optim.SGD([p for p in loaded.model.parameters() if p.requires_grad], lr=1.0).step()
    rows = []
    for part in PARTS:
        own = {n: p for n, p in loaded.model.named_parameters() if n.startswith(part)}
        rows.append(
            {
                "part": part,
                "parameters": sum(p.numel() for p in own.values()),
                "that train": sum(p.numel() for p in own.values() if p.requires_grad),
                "tensors": len(own),
                "that moved": sum(not torch.equal(before[n], p.detach()) for n, p in own.items()),
            }
        )
    return rows


def _token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy (B, T - 1) of each next token, 0 where it is not supervised."""
    flat = F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    return flat.view(len(labels), -1)


def pieces(encoded: Encoded, tokenizer: Any) -> list[str]:
    """The text of every position of a sample; image positions are `<image>`."""
    return ["<image>" if t == IMAGE_TOKEN_ID else str(tokenizer.decode([t])) for t in encoded.input_ids]


# ------------------------------------------------------------------------------------------------ losses and answers


@torch.inference_mode()
def sample_losses(loaded: Loaded, config: RunConfig, samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
    """Loss of each sample, not averaged.

    Args:
        loaded: the model.
        config: its run, which says template and longest sample.
        samples: what it reads.

    Returns:
        Summed loss in nats (N,) and supervised tokens (N,); the sums' quotient is a run's `heldout_loss`.
    """
    loaded.model.eval()
    data = TrainingSet(list(samples), loaded.tokenizer, loaded.processor, config, loaded.model.n_image_tokens)
    size, sums, counts = config.scale.micro_batch, [], []
    for k in range(0, len(data), size):
        batch = collate([data[j] for j in range(k, min(k + size, len(data)))], loaded.processor.normalise).to(
            loaded.model.language_model.device
        )
        logits = loaded.model(batch.input_ids, batch.pixel_values, batch.attention_mask, use_cache=False).logits
        sums.append(_token_losses(logits, batch.labels).sum(1).cpu().numpy())
        counts.append((batch.labels[:, 1:] != IGNORE_INDEX).sum(1).cpu().numpy())
    return np.concatenate(sums), np.concatenate(counts)


def with_other_images(samples: Sequence[Sample]) -> list[Sample]:
    """The same samples, each with the image of another."""
    rows = shuffle_images([{"image": sample.image} for sample in samples], SEED)
    return [replace(sample, image=row["image"]) for sample, row in zip(samples, rows, strict=True)]


def answers_about(loaded: Loaded, images: Sequence[Path], question: str, max_new_tokens: int = 40) -> list[str]:
    """The same question about each image."""
    rows = [{"question_id": k, "text": question, "image": path} for k, path in enumerate(images)]
    return list(answer_questions(loaded, rows, max_new_tokens=max_new_tokens, desc="captions").values())


def offline_model(terse: bool = False) -> ChatClient:
    """The rule-based stand-in for GPT-4 as teacher, judge and text-only student: it costs nothing and never changes.

    Args:
        terse: as a judge it asks for little and dislikes long answers (`miniature.offline_chat.TERSE`).
    """
    from companion.miniature.offline_chat import TERSE, THOROUGH, respond

    return OfflineClient(partial(respond, settings=TERSE if terse else THOROUGH))


def bench_rows(
    reviews: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]], published: Mapping[tuple[str, str], str]
) -> list[dict[str, Any]]:
    """The table of a bench chapter.

    Args:
        reviews: (bench, model) -> the judge's reviews.
        published: (bench, model) -> claim id of its score over all questions, with or without `-all`; those of the
            categories end in `-conv`, `-detail`, `-complex`.

    Returns:
        One row per bench, model and category, relative scores in %.
    """
    rows = []
    for pair, own in reviews.items():
        for kind, found in relative_scores(own).items():
            ids = [published[pair], f"{published[pair]}-{kind}"] if pair in published else []
            known = [all_claims()[i].value for i in ids[kind != "all" :] if i in all_claims()]
            row = {
                "bench": pair[0],
                "model": pair[1],
                "questions": kind,
                "n": found["n"],
                "judge failed": found["failed"],
            }
            row |= {"relative score (%)": found["value"], "95 % interval": found["interval"]}
            rows.append(row | {"published (%)": known[0] if known else None})
    return rows


def judge_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table of two judges' agreement, of what `judges.agreement` returns."""
    names = {"candidate": "scores of the candidate", "reference": "scores of the reference", "ratio": "their ratio (%)"}
    measures = {"spearman": "rank correlation (Spearman)", "kendall": "rank correlation (Kendall's tau-b)"}
    measures["shift"] = "mean of the second minus the first"
    numbers = [
        (f"{label}: {text}", found[key]["n"], found[key][measure])
        for key, label in names.items()
        for measure, text in measures.items()
    ]
    numbers += [("relative score (%): second minus first", found["n"], found["relative_score"]["shift"])]
    numbers += [("win, tie or loss: Cohen's kappa", found["n"], found["verdicts"]["kappa"])]
    numbers += [("win, tie or loss: share with the same verdict", found["n"], found["verdicts"]["same"])]
    return [
        {"measure": label, "n": n, "value": number["value"], "95 % interval": number["interval"]}
        for label, n, number in numbers
    ]


def science_baselines(
    problems: Sequence[Problem], train: Sequence[Problem], answers: Mapping[str, Mapping[str, str]]
) -> list[dict[str, Any]]:
    """Accuracy in % of answers beside a blind guess and the position that is most often right in training.

    Args:
        problems: what was asked.
        train: where positions are counted.
        answers: name -> answers by problem id.

    Returns:
        A row for all problems, for those with and for those without an image.
    """
    usual = Counter(p.answer for p in train).most_common(1)[0][0]
    groups = {"all": list(problems), "with an image": [p for p in problems if p.image]}
    groups["without"] = [p for p in problems if not p.image]
    return [
        {
            "questions": name,
            "n": len(own),
            "blind guess": 100 * float(np.mean([1 / len(p.choices) for p in own])),
            "usual position": 100 * float(np.mean([p.answer == usual for p in own])),
            **{who: 100 * float(np.mean(science_hits(own, said))) for who, said in answers.items()},
        }
        for name, own in groups.items()
        if own
    ]


def science_hits(problems: Sequence[Problem], answers: Mapping[str, str]) -> list[bool]:
    """Whether each problem's answer names the right choice."""
    return [science_qa.parse_answer(answers[p.id], len(p.choices)) == p.answer for p in problems]


def difference_of(problems: Sequence[Problem], first: Mapping[str, str], second: Mapping[str, str]) -> dict[str, Any]:
    """How many points of accuracy the second answers are above the first: `n`, `effect` and its 95 % `interval`."""
    found = paired_bootstrap(science_hits(problems, first), science_hits(problems, second))
    return {"n": found["n"], "effect": 100 * found["difference"], "interval": [100 * end for end in found["interval"]]}


def ensemble_rows(systems: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The table of `ensemble.evaluate`'s systems, each beside LLaVA alone and beside the paper's number."""
    published = {name: f"sqa-{'accuracy' if name == 'llava' else name}" for name in systems}
    rows = []
    for name, s in systems.items():
        against = s.get("against_llava") or dict.fromkeys(("difference", "interval", "p"))
        row = {"system": name, "accuracy (%)": s["accuracy"], "interval": s["interval"]}
        row |= {"no answer": s["unparsed"] + s["invalid"], "minus LLaVA": against["difference"]}
        row |= {"its interval": against["interval"], "McNemar's p": against["p"]}
        known = all_claims().get(published[name])
        rows.append(row | {"published (%)": known.value if known else None})
    return rows


# ------------------------------------------------------------------------------------------------ pictures


@_styled
def grounding_figure(result: Mapping[str, Any], title: str = "") -> Figure:
    """Accuracy by kind of question with the right and with another image, intervals of 95 %, and the text prior."""
    kinds = ["all", *result["right"]["by_kind"]]
    figure, (axes,) = _axes(height=0.9 + 0.5 * len(kinds), grid="x")
    for name, color, marker, shift in (("right", BLUE, "o", -0.14), ("shuffled", ORANGE, "s", 0.14)):
        rows = [result[name] if kind == "all" else result[name]["by_kind"][kind] for kind in kinds]
        values = [row["accuracy"] for row in rows]
        reach = [[max(0.0, v - row["interval"][0]) for v, row in zip(values, rows, strict=True)],
                 [max(0.0, row["interval"][1] - v) for v, row in zip(values, rows, strict=True)]]  # fmt: skip
        label = {"right": "right image", "shuffled": "another image"}[name]
        places = [k + shift for k in range(len(kinds))]
        axes.errorbar(values, places, xerr=reach, fmt=marker, color=color, markersize=7, capsize=3, label=label)
    prior = [result["prior"] if kind == "all" else result["prior"]["by_kind"][kind] for kind in kinds]
    axes.plot(
        [p["accuracy"] for p in prior],
        range(len(kinds)),
        "|",
        color=MUTED,
        markersize=17,
        markeredgewidth=2.5,
        label="text alone",
    )
    counts = [result["right"]["n"] if kind == "all" else result["right"]["by_kind"][kind]["n"] for kind in kinds]
    axes.set_yticks(range(len(kinds)), [f"{kind} ({n})" for kind, n in zip(kinds, counts, strict=True)])
    axes.set(xlabel="right answers (%)", title=title, xlim=(-2, 102))
    axes.invert_yaxis()
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _answer_ids(loaded: Loaded, ids: list[int], pixels: torch.Tensor, max_new_tokens: int) -> Iterator[int]:
    """Greedy continuation up to the line break or sign that ends an answer."""
    for tokens in generate_tokens(loaded.model, [ids], pixels, GenerationSettings(max_new_tokens)):
        token = int(tokens[0])
        text = loaded.tokenizer.decode([token])
        if token == loaded.tokenizer.eos_token_id or "#" in text or not text.strip():
            return
        yield token


@torch.inference_mode()
def answer_attention(
    loaded: Loaded, image: Image, question: str, max_new_tokens: int = 12
) -> tuple[list[str], np.ndarray]:
    """How the answer's tokens attend to the image, as a mean over layers and heads.

    Args:
        loaded: the model; its language model is switched to plain attention, the only kind that gives weights out.
        image: RGB.
        question: asked in a turn of its own.
        max_new_tokens: longest answer.

    Returns:
        The answer's tokens as text, and (tokens, rows, columns): the share of its attention that the position which
        predicts the token pays to each patch. The rest goes to the text.
    """
    pixels = torch.from_numpy(loaded.processor(image))[None].to(loaded.model.language_model.device)
    ids = prompt_ids(loaded, [(question, None)], has_image=True)
    answer = list(_answer_ids(loaded, ids, pixels, max_new_tokens))
    loaded.model.language_model.set_attn_implementation("eager")
    whole = torch.tensor([ids + answer], device=pixels.device)
    output = loaded.model(whole, pixels, output_attentions=True, use_cache=False)
    mean = torch.stack(output.attentions).float().mean((0, 2))[0]  # (T, T), from the attending to the attended position
    side, first = round(loaded.model.n_image_tokens**0.5), len(ids) - 1
    maps = mean[first : first + max(1, len(answer)), whole[0] == IMAGE_TOKEN_ID].view(-1, side, side)
    return [str(loaded.tokenizer.decode([t])) for t in answer] or ["(nothing)"], maps.cpu().numpy()


def looks_where_asked(loaded: Loaded, folder: Path, limit: int = 60) -> dict[str, list[float]]:
    """Ask for the color of one of two things and see how much of the attention to the image lies on either of them.

    Args:
        loaded: the model.
        folder: COCO's layout with square images, as the miniature has.
        limit: at most so many images, each with at least two things of which there is only one.

    Returns:
        Per image, the attention per area on the thing asked for and on the other one, where 1 is the image's mean;
        the attention is that of the answer's first token.
    """
    found: dict[str, list[float]] = {"asked": [], "other": []}
    for image in load_annotations(folder, "val2014"):
        names = [name for name, _ in image.boxes]
        single = [(name, box) for name, box in image.boxes if names.count(name) == 1]
        if len(single) < 2 or len(found["asked"]) == limit:
            continue
        picture = load_image(folder / "val2014" / image.image)
        (weights, *_) = answer_attention(loaded, picture, f"What color is the {single[0][0]}?", 1)[1]
        for key, (_, box) in zip(("asked", "other"), single, strict=False):
            share = _covered(box, len(weights))
            found[key].append(float((weights * share).sum() / share.sum() / weights.mean()))
    return found


def _covered(box: tuple[float, float, float, float], side: int) -> np.ndarray:
    """Share of each patch (side, side) that a box of fractions covers."""
    edges = np.arange(side + 1) / side
    x = np.clip(np.minimum(edges[1:], box[2]) - np.maximum(edges[:-1], box[0]), 0, None)
    y = np.clip(np.minimum(edges[1:], box[3]) - np.maximum(edges[:-1], box[1]), 0, None)
    return np.outer(y, x) * side**2


def cards(images: Sequence[Image], lines: Sequence[Sequence[tuple[str, str]]], width: int = 150) -> HTML:
    """Images with what was said about each: lines of (who, text) at its side."""
    from IPython.display import HTML

    made = []
    for image, said in zip(images, lines, strict=True):
        buffer = io.BytesIO()
        image.resize((2 * width, 2 * width)).save(buffer, "JPEG", quality=88)  # twice as large for sharp screens
        picture = base64.b64encode(buffer.getvalue()).decode()
        texts = "".join(
            f"<div style='margin: 0 0 .3em'><b>{html.escape(w)}:</b> {html.escape(x)}</div>" for w, x in said
        )
        made.append(
            "<div style='display: flex; gap: .9em; flex: 0 1 calc(50% - .6em); min-width: 20em;"
            " align-items: flex-start'>"
            f"<img alt='' width='{width}' height='{width}' src='data:image/jpeg;base64,{picture}'>"
            f"<div style='font-size: .9em; line-height: 1.35'>{texts}</div></div>"
        )
    return HTML(f"<div style='display: flex; flex-wrap: wrap; gap: 1.2em'>{''.join(made)}</div>")


__all__ = [
    "answer_attention",
    "answers_about",
    "bench_rows",
    "cards",
    "claim_rows",
    "config_rows",
    "difference_of",
    "ensemble_rows",
    "factual_folder",
    "grounding_figure",
    "grounding_result",
    "judge_rows",
    "load_image",
    "load_run",
    "looks_where_asked",
    "offline_model",
    "pieces",
    "relative_scores",
    "sample_losses",
    "science_baselines",
    "science_hits",
    "what_moves",
    "with_other_images",
]
