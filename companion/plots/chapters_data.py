"""What the overview, the data chapters and the demo draw and write, beyond the plain charts of `figures`."""

from __future__ import annotations

import base64
import html
import io
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from companion.plots.figures import BLUE, CARD, COLORS, INK, MUTED, _axes, _styled

if TYPE_CHECKING:
    from IPython.display import HTML
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from companion.book.notebooks import Chapter
    from llava_core.models.llava import Llava

PARTS = ("Read me", "Data", "Training", "Evaluation", "Ablations", "Kernels", "Demo")  # by the first digit of a chapter
PAPER_TOWER = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 224, "patch_size": 14,
}  # fmt: skip
PAPER_LANGUAGE_MODELS = {
    "vicuna-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "vicuna-13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}

# ------------------------------------------------------------------------------------------------ the overview


@_styled
def chapter_graph(chapters: Mapping[str, Chapter]) -> Figure:
    """Draw the notebooks, one row per part of the book, with an arrow from each to those that need it.

    Args:
        chapters: what `notebooks.read_chapters` gives.
    """
    from matplotlib.patches import FancyBboxPatch

    rows: dict[int, list[str]] = {}
    for name in sorted(chapters):
        rows.setdefault(int(name[0]), []).append(name)
    place = {n: (1.65 * k, -float(r)) for r, part in enumerate(sorted(rows)) for k, n in enumerate(rows[part])}
    figure, (axes,) = _axes(8.4, 0.95 * len(rows) + 0.2)
    for name, chapter in chapters.items():
        for need in _direct(chapters, chapter):
            (x0, y0), (x1, y1) = place[need], place[name]
            beside = y0 == y1
            near = beside and x1 - x0 < 2
            below = ((x0, y0 - 0.28), (x1 - 0.3, y1 - 0.28)) if beside else ((x0, y0 - 0.28), (x1, y1 + 0.28))
            ends = ((x0 + 0.72, y0), (x1 - 0.72, y1)) if near else below
            bend = 0.0 if near else 0.45 / (x1 - x0) if beside else 0.08
            arrow = {"arrowstyle": "-|>", "color": MUTED, "alpha": 0.8, "lw": 0.9, "shrinkA": 0, "shrinkB": 0}
            arrow |= {"connectionstyle": f"arc3,rad={bend}"}
            axes.annotate("", ends[1], ends[0], arrowprops=arrow, zorder=1)  # below the boxes
    for name, (x, y) in place.items():
        color = COLORS[int(name[0]) % len(COLORS)]
        shape = "round,pad=0.02,rounding_size=0.07"
        axes.add_patch(FancyBboxPatch((x - 0.7, y - 0.26), 1.4, 0.52, shape, fc=CARD, ec=color, lw=1.3, zorder=2))
        number, _, title = name.partition("_")
        words = textwrap.fill(title.replace("_", " "), 17)
        axes.text(x - 0.64, y, number, va="center", fontsize=9, fontweight="bold", color=color, zorder=3)
        axes.text(x - 0.42, y, words, va="center", fontsize=7.5, color=INK, linespacing=1.05, zorder=3)
    for row, part in enumerate(sorted(rows)):
        axes.text(-0.95, -row, PARTS[part], ha="right", va="center", fontsize=9, color=MUTED)
    axes.set(xlim=(-1.75, max(x for x, _ in place.values()) + 0.8), ylim=(-len(rows) + 0.55, 0.45))
    axes.axis("off")
    return figure


def _direct(chapters: Mapping[str, Chapter], chapter: Chapter) -> list[str]:
    """The needs of a chapter that no other of its needs brings along."""
    further: set[str] = set()
    todo = [n for need in chapter.needs for n in chapters[need].needs]
    while todo:
        further.add(name := todo.pop())
        todo += chapters[name].needs
    return [need for need in chapter.needs if need not in further]


def paper_model(language_model: str = "vicuna-13b") -> Llava:
    """Build the paper's model without its memory: every tensor has its shape and no numbers (PyTorch's meta device).

    Source: config.json of openai/clip-vit-large-patch14 and of the Vicuna sizes that the paper uses.
    """
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    from llava_core.models.llava import Llava

    with torch.device("meta"):
        tower = CLIPVisionModel(CLIPVisionConfig(**PAPER_TOWER))
        text = LlamaForCausalLM(LlamaConfig(vocab_size=32000, **PAPER_LANGUAGE_MODELS[language_model]))
        return Llava(tower, text)


def traced_shapes(model: Llava, question_tokens: int, answer_tokens: int) -> dict[str, Any]:
    """Send an empty image and a question through a model, on whatever device it lies, and note the shapes.

    Returns:
        The shapes for `figures.architecture_diagram`, batch dimension left out; sizes of the three boxes as text.
    """
    import torch

    side, device = model.vision_tower.config.image_size, next(model.parameters()).device
    with torch.no_grad():
        pixels = torch.zeros(1, 3, side, side, device=device)
        features = model.tower_features(pixels)
        projected = model.multi_modal_projector(features)
        words = torch.zeros(1, question_tokens, dtype=torch.long, device=device)
        question = model.language_model.get_input_embeddings()(words)
        logits = model.language_model.get_output_embeddings()(question[:, :1])

    def size(part: Any, layers: int | None = None) -> str:
        count = sum(p.numel() for p in part.parameters())
        unit, word = ((1e9, "B"), (1e6, "M"), (1e3, "K"))[0 if count >= 1e9 else 1 if count >= 1e6 else 2]
        return f"{layers} layers, {count / unit:.3g} {word} parameters" if layers else f"{count:,} parameters"

    return {
        "image": (3, side, side),
        "vision_tower": size(model.vision_tower, model.vision_tower.config.num_hidden_layers),
        "features": tuple(features.shape[1:]),
        "projector": size(model.multi_modal_projector),
        "image_tokens": tuple(projected.shape[1:]),
        "question_tokens": tuple(question.shape[1:]),
        "language_model": size(model.language_model, model.language_model.config.num_hidden_layers),
        "answer": (answer_tokens, logits.shape[-1]),
    }


def shape_text(shape: Any) -> str:
    """Return a shape as `3 × 224 × 224`; a text stays as it is."""
    return " × ".join(f"{n:,}" for n in shape) if isinstance(shape, tuple) else str(shape)


# ------------------------------------------------------------------------------------------------ images and texts


def boxed(image: Image, boxes: Iterable[tuple[str, Sequence[float]]], scale: int = 2) -> Image:
    """Draw named boxes, corners from 0 to 1, onto an enlarged copy of an image."""
    from PIL import Image as Images
    from PIL import ImageDraw, ImageFont

    drawn = image.convert("RGB").resize((image.width * scale, image.height * scale), Images.Resampling.LANCZOS)
    pen, font = ImageDraw.Draw(drawn), ImageFont.load_default(size=12 * scale)
    for k, (name, (x1, y1, x2, y2)) in enumerate(boxes):
        color = COLORS[k % len(COLORS)]
        left, top = x1 * drawn.width, y1 * drawn.height
        pen.rectangle((left, top, x2 * drawn.width, y2 * drawn.height), outline="white", width=2 * scale)
        pen.rectangle((left, top, x2 * drawn.width, y2 * drawn.height), outline=color, width=scale)
        label = pen.textbbox((left + 2 * scale, top + scale), name, font=font)
        pen.rectangle((left, top, label[2] + 2 * scale, label[3] + scale), fill=color)
        pen.text((left + 2 * scale, top + scale), name, fill="white", font=font)
    return drawn


def image_uri(image: Image) -> str:
    """Return an image as a data URI, PNG or JPEG, whichever is smaller: drawings are one, photographs the other."""
    encoded = {}
    for name, options in {"png": {}, "jpeg": {"quality": 85}}.items():
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, name, **options)
        encoded[name] = buffer.getvalue()
    name = min(encoded, key=lambda name: len(encoded[name]))
    return f"data:image/{name};base64,{base64.b64encode(encoded[name]).decode()}"


def dialogue_html(
    image: Image | None, turns: Iterable[tuple[str, str]], names: tuple[str, str] = ("Human", "LLaVA")
) -> HTML:
    """Show a dialogue, with the image that it is about at its left."""
    from IPython.display import HTML

    bubble = (
        "margin: .25em 0; padding: .35em .8em; border-radius: .8em; white-space: pre-wrap; overflow-wrap: anywhere;"
    )
    sides = (
        "background: rgba(0, 103, 165, .13); margin-right: 3em",
        "background: rgba(0, 128, 106, .16); margin-left: 3em",
    )
    said = "".join(
        f'<div style="{bubble}{sides[k]}"><b>{names[k]}</b>&ensp;{html.escape(text)}</div>'
        for turn in turns
        for k, text in enumerate(turn)
    )
    picture = ""
    if image is not None:
        picture = f'<img src="{image_uri(image)}" width="200" alt="" style="border-radius: 8px; flex: none">'
    said = f'<div style="flex: 1 1 18em; max-width: 44em">{said}</div>'
    layout = "display: flex; flex-wrap: wrap; gap: 1em; align-items: flex-start; margin: .6em 0 1.2em"
    return HTML(f'<div class="companion-dialogue" style="{layout}">{picture}{said}</div>')


def messages_html(messages: Sequence[Mapping[str, str]], most: int = 700) -> HTML:
    """Show a chat request as the server gets it, one block per message; long texts are cut for the page."""
    from IPython.display import HTML

    blocks = [
        f'<div style="padding-left: .8em; border-left: 4px solid {BLUE if m["role"] == "user" else MUTED}">'
        f'<b>{html.escape(m["role"])}</b><pre style="white-space: pre-wrap; margin: 0">'
        f"{html.escape(m['content'][:most])}{' …' if len(m['content']) > most else ''}</pre></div>"
        for m in messages
    ]
    return HTML(f'<div class="companion-prompt">{"".join(blocks)}</div>')


def opening_words(texts: Iterable[str], words: int = 2) -> Counter[str]:
    """Count how texts begin: the first words in lower case, markers and punctuation dropped."""
    cleaned = (text.replace("<image>", " ").lower().split()[:words] for text in texts)
    return Counter(" ".join(word.strip(".,?!:") for word in opening) for opening in cleaned)


# ------------------------------------------------------------------------------------------------ lengths


@_styled
def length_figure(lengths: Mapping[str, Sequence[int]], limit: int, title: str = "") -> Figure:
    """Draw how long samples are, one outlined histogram per kind.

    Args:
        lengths: kind -> tokens per sample, image positions included.
        limit: longest sequence that training takes.
        title: the figure's title.
    """
    figure, (axes,) = _axes(height=3.2)
    longest = max((max(values) for values in lengths.values() if len(values)), default=1)
    edges = [longest * k / 40 for k in range(41)]
    for k, (kind, values) in enumerate(lengths.items()):
        style = ("-", "--", "-.")[k % 3]
        axes.hist(values, edges, histtype="stepfilled", color=COLORS[k], alpha=0.18)
        axes.hist(values, edges, histtype="step", color=COLORS[k], linestyle=style, linewidth=1.6, label=kind)
    if limit <= 1.2 * longest:
        axes.axvline(limit, color=MUTED, linestyle=":", label=f"longest allowed: {limit}")
    axes.set(xlabel="tokens per sample, image included", ylabel="samples", title=title)
    axes.legend()
    return figure
