"""Figures, tables and the numbers behind them: what a notebook shows and what it leaves behind.

Every function returns a figure that is not yet shown; `save_figure` shows it and writes it with its numbers. One style
serves all: see companion.mplstyle.
"""

from __future__ import annotations

import base64
import functools
import html
import io
import math
import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, ParamSpec

from companion.paper.verdict import verdict_of
from llava_core.runtime import ROOT, DataError, atomic_write, write_json

if TYPE_CHECKING:
    from IPython.display import HTML
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

P = ParamSpec("P")
STYLE = Path(__file__).with_name("companion.mplstyle")
COLORS = ("#0067A5", "#C75B00", "#00806A", "#A6438C", "#8A6D00", "#3B8FC4", "#555555")  # as in the style file
BLUE, ORANGE, CARD, INK, MUTED = COLORS[0], COLORS[1], "#FBFAF7", "#1F1F1F", "#6B6B66"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IGNORED = -100

# ------------------------------------------------------------------------------------------------ what is saved


def output_folder() -> Path:
    """Return the folder of executed copies and numbers; the pipeline names it in `LLAVA_OUT`."""
    return Path(os.environ.get("LLAVA_OUT") or ROOT / "book" / "notebooks")


def figure_folder() -> Path:
    """Return the folder of figures: `figures/`, or one beside the numbers when those go elsewhere."""
    out = output_folder()
    return ROOT / "figures" if out == ROOT / "book" / "notebooks" else out / "figures"


def _plain(value: Any, where: str) -> Any:
    """Return a value as JSON can hold it; NumPy's and PyTorch's numbers and arrays become Python's."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"the number '{where}' is {value}; a saved number must be finite")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(part, f"{where}.{key}") for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part, f"{where}[{i}]") for i, part in enumerate(value)]
    raise DataError(f"the number '{where}' is a {type(value).__name__}; save numbers, texts, lists or dicts of these")


def _runs(runs: Iterable[Any]) -> list[str]:
    paths = (Path(getattr(run, "path", run)) for run in runs)
    return [str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path) for path in paths]


def check(claim: str, published: Any, measured: Any, ok: bool | None, note: str = "") -> dict[str, Any]:
    """Return one row of the table of results.

    Args:
        claim: the claim in a few words, with its unit.
        published: the paper's value, or None when it gives none.
        measured: the value at this scale: a number, a text, or `[low, high]`.
        ok: whether the claim's direction or bound holds here; None when this scale can only show the value.
        note: what a reader has to know to compare the two.
    """
    verdict = verdict_of(ok)
    row = {"claim": claim, "published": published, "measured": measured, "verdict": verdict, "note": note}
    return {key: _plain(value, f"{claim}.{key}") for key, value in row.items()}


def check_claim(name: str, measured: Any, ok: bool | None, note: str = "") -> dict[str, Any]:
    """Return one row of the table of results for a claim of the paper, looked up by its id.

    Args:
        name: the claim's id in companion/paper/claims.yaml.
        measured, ok, note: as in `check`.
    """
    from companion.paper.claims import claim

    known = claim(name)
    return {**check(known.text, known.shown, measured, ok, note), "id": name, "place": known.place}


def save_numbers(
    name: str,
    numbers: Mapping[str, Any],
    checks: Sequence[Mapping[str, Any]] = (),
    runs: Iterable[Any] = (),
    scale: str | None = None,
    fast: bool | None = None,
) -> None:
    """Write a notebook's numbers beside its executed copy.

    Args:
        name: the notebook's file name without extension.
        numbers: finite numbers, texts, or lists and dicts of these, by name.
        checks: rows made by `check`.
        runs: the records, or their paths, that the numbers come from.
        scale, fast: the notebook's parameters; by default the notebook's own variables of these names.

    Raises:
        DataError: a number is not finite or cannot be stored, or a check lacks a field.
    """
    notebook = vars(sys.modules["__main__"])  # in a kernel the notebook's variables live here
    for row in checks:
        if missing := {"claim", "published", "measured", "verdict"} - set(row):
            raise DataError(f"{name}: a check lacks {', '.join(sorted(missing))}; make it with check(...)")
    content = {
        "notebook": name,
        "scale": scale if scale is not None else notebook.get("scale", "mini"),
        "fast": fast if fast is not None else bool(notebook.get("fast", False)),
        "numbers": _plain(numbers, "numbers"),
        "checks": _plain(list(checks), "checks"),
        "runs": _runs(runs),
    }
    write_json(output_folder() / f"{name}.json", content)


def save_figure(
    notebook: str, name: str, figure: Figure | HTML, numbers: Mapping[str, Any], runs: Iterable[Any] = ()
) -> None:
    """Show a figure and write it as `figures/<notebook>_<name>.svg`, with its numbers in a `.json` of the same name.

    Args:
        notebook: the notebook's file name without extension.
        name: the figure's name within the notebook.
        figure: a Matplotlib figure, or what `architecture_diagram` returns.
        numbers: what the figure shows.
        runs: the records, or their paths, that the numbers come from.
    """
    path = figure_folder() / f"{notebook}_{name}.svg"
    if isinstance(data := getattr(figure, "data", None), str):
        atomic_write(path, data)
    else:
        import matplotlib.style

        buffer = io.BytesIO()
        with matplotlib.style.context(STYLE):  # without a date and with the style's salt, equal figures are equal files
            figure.savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches="tight")
        atomic_write(path, buffer.getvalue())
    facts = {"notebook": notebook, "figure": name, "numbers": _plain(numbers, "numbers"), "runs": _runs(runs)}
    write_json(path.with_suffix(".json"), facts)
    from IPython import get_ipython

    if get_ipython() is not None:
        import matplotlib.pyplot
        from IPython.display import display

        matplotlib.pyplot.close(figure if hasattr(figure, "savefig") else None)  # else the cell's end shows it again
        display(figure)


# ------------------------------------------------------------------------------------------------ style


def use_style() -> None:
    """Give every Matplotlib figure of this process the book's look; in a notebook as sharp SVG."""
    import matplotlib.style
    from IPython import get_ipython

    matplotlib.style.use(STYLE)
    if get_ipython() is not None:
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("svg")


def _styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        import matplotlib.style

        with matplotlib.style.context(STYLE):
            return draw(*args, **kwargs)

    return styled


def _axes(
    width: float = 7.2, height: float = 3.6, rows: int = 1, columns: int = 1, grid: str = "y"
) -> tuple[Figure, list[Axes]]:
    """Return a figure that pyplot does not know (so nothing shows it a second time) and its axes, row by row.

    Where the values lie on x, the grid belongs to x too.
    """
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    with matplotlib.rc_context({"axes.grid.axis": grid}):
        return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


# ------------------------------------------------------------------------------------------------ charts


@_styled
def loss_curves(
    records: Mapping[str, Any],
    title: str = "",
    band: tuple[float, float] | None = None,
    band_label: str = "reference",
) -> Figure:
    """Draw the training loss by step, smoothed over the raw values, and the held-out loss as points.

    Args:
        records: label -> a run record, or the rows of its metrics (`step`, `loss`, now and then `heldout_loss`).
        title: the figure's title.
        band: a range of loss to compare with.
        band_label: what the range is.
    """
    figure, (axes,) = _axes()
    for index, (label, record) in enumerate(records.items()):
        rows = record.metrics() if hasattr(record, "metrics") else list(record)
        steps = [row["step"] for row in rows if row.get("loss") is not None]
        losses = [float(row["loss"]) for row in rows if row.get("loss") is not None]
        reach = round(len(losses) * 0.02)  # a mean over both sides does not lag behind, as one over the past would
        windows = [losses[max(0, k - reach) : k + reach + 1] for k in range(len(losses))]
        lines = [sum(window) / len(window) for window in windows]
        color = COLORS[index % len(COLORS)]
        axes.plot(steps, losses, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(steps, lines, color=color, label=label, linestyle=("-", "--", "-.", ":")[index % 4])
        held = [(row["step"], row["heldout_loss"]) for row in rows if row.get("heldout_loss") is not None]
        if held:
            axes.plot(*zip(*held, strict=True), "o", color=color, markersize=5, label=f"{label}, held out")
    if band is not None:
        axes.axhspan(*band, color=MUTED, alpha=0.15, linewidth=0, label=band_label)
    axes.set(xlabel="step", ylabel="loss per supervised token (nats)", title=title)
    axes.legend()
    return figure


@_styled
def bars_with_intervals(
    rows: Sequence[Mapping[str, Any]],
    title: str = "",
    unit: str = "",
    baseline: float | None = None,
    baseline_label: str = "chance",
) -> Figure:
    """Draw one horizontal bar per row with its interval and, where the paper has one, the published value.

    Args:
        rows: `label` and `value`; optionally `low` and `high` (the interval's ends) and `published`.
        title: the figure's title.
        unit: of all values, e.g. `%`.
        baseline: a value to compare with.
        baseline_label: what the value is.
    """
    figure, (axes,) = _axes(height=0.9 + 0.42 * len(rows), grid="x")
    ends = []
    for index, row in enumerate(rows):
        value, low, high = (float(row[key]) if row.get(key) is not None else None for key in ("value", "low", "high"))
        if value is None:
            raise DataError(f"bars_with_intervals: the row '{row.get('label')}' has no value")
        axes.barh(index, value, height=0.62, color=BLUE, alpha=0.85)
        if low is not None and high is not None:
            axes.errorbar(value, index, xerr=[[value - low], [high - value]], color=INK, capsize=3, linewidth=1.2)
        ends.append(max(value, high if high is not None else value, float(row.get("published") or value), 0.0))
        axes.annotate(f"{value:.3g}", (ends[-1], index), (7, 0), textcoords="offset points", va="center", fontsize=9)
    published = [(float(row["published"]), i) for i, row in enumerate(rows) if row.get("published") is not None]
    if published:
        axes.plot(
            *zip(*published, strict=True), "D", color=ORANGE, markeredgecolor=CARD, markersize=8, label="published"
        )
    if baseline is not None:
        axes.axvline(baseline, color=MUTED, linestyle="--", linewidth=1.2, label=baseline_label)
    axes.set_yticks(range(len(rows)), [str(row["label"]) for row in rows])
    axes.set(xlabel=unit, title=title, xlim=(min(0.0, *(float(row["value"]) for row in rows)), max(ends) * 1.12 or 1))
    axes.invert_yaxis()
    if published or baseline is not None:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


@_styled
def frequency_plot(before: Any, after: Any, title: str = "", labels: tuple[str, str] = ("before", "after")) -> Figure:
    """Draw how often each concept occurs, most frequent first, before and after filtering.

    Args:
        before, after: counts, or mappings from concept to count.
        title: the figure's title.
        labels: names of the two curves; the number of concepts is added.
    """
    figure, (axes,) = _axes()
    for index, (counts, label) in enumerate(zip((before, after), labels, strict=True)):
        values = sorted((int(n) for n in (counts.values() if isinstance(counts, Mapping) else counts)), reverse=True)
        # a hundred thousand points make a heavy drawing; on a logarithmic axis few of them are seen
        shown = sorted({min(len(values), round(1.02**k)) for k in range(round(math.log(len(values) or 1, 1.02)) + 2)})
        points = [(rank, values[rank - 1]) for rank in shown if values]
        label = f"{label}: {len(values):,} concepts"
        axes.plot(
            *zip(*points, strict=True) if points else ([], []),
            ("-", "--")[index],
            color=(BLUE, ORANGE)[index],
            label=label,
        )
    axes.set(xscale="log", yscale="log", xlabel="concepts, most frequent first", ylabel="captions with it", title=title)
    axes.legend()
    return figure


# ------------------------------------------------------------------------------------------------ images


@_styled
def sample_grid(images: Sequence[Any], captions: Sequence[str] = (), columns: int = 4, title: str = "") -> Figure:
    """Show images side by side, each with its text below."""
    columns = max(1, min(columns, len(images)))
    rows = math.ceil(len(images) / columns)
    width = 7.6 / columns
    texts = [textwrap.fill(text, max(14, round(15.5 * width))) for text in captions]
    tallest = max((pixels.shape[0] / pixels.shape[1] for pixels in map(_pixels, images)), default=1.0)
    height = width * tallest + 0.17 * max((text.count("\n") + 1 for text in texts), default=0) + 0.1
    figure, axes = _axes(7.6, rows * height, rows, columns)
    for ax in axes:
        ax.axis("off")
    for index, image in enumerate(images):
        axes[index].imshow(image)
        if index < len(texts):
            axes[index].text(0, -0.04, texts[index], transform=axes[index].transAxes, va="top", fontsize=8.5)
    if title:
        figure.suptitle(title, x=0.01, ha="left")
    return figure


def _pixels(image: Any) -> Any:
    """Return an image as (H, W, 3) values in 0-1; a normalised (3, H, W) array is taken back to colors."""
    import numpy

    array = numpy.asarray(image)
    if array.ndim == 4:
        array = array[0]
    if array.shape[0] == 3 and array.shape[-1] != 3:
        array = numpy.moveaxis(array.astype(float), 0, -1) * CLIP_STD + CLIP_MEAN
        return array.clip(0, 1)
    return array / 255 if array.dtype == numpy.uint8 else array


@_styled
def patch_grid(image: Any, processed: Any, patch: int, title: str = "") -> Figure:
    """Show an image as it is and as the model sees it, cut into patches.

    Args:
        image: the original.
        processed: pixel values (3, H, W) or (1, 3, H, W), normalised as for CLIP; or an RGB image.
        patch: side of a patch in pixels.
        title: the figure's title.
    """
    figure, (left, right) = _axes(7.2, 3.9, 1, 2)
    seen = _pixels(processed)
    side_y, side_x = seen.shape[:2]
    original = _pixels(image)
    left.imshow(original)
    left.set_title(f"the image: {original.shape[1]} × {original.shape[0]} pixels", fontweight="normal", fontsize=10)
    right.imshow(seen)
    for width, color in ((1.3, "white"), (0.5, "black")):  # two lines: one is seen on dark, the other on light pixels
        for x in range(0, side_x + 1, patch):
            right.axvline(x - 0.5, color=color, linewidth=width, alpha=0.55)
        for y in range(0, side_y + 1, patch):
            right.axhline(y - 0.5, color=color, linewidth=width, alpha=0.55)
    count = f"{side_y // patch} × {side_x // patch} = {(side_y // patch) * (side_x // patch)} patches"
    right.set_title(f"what the model sees: {count}", fontweight="normal", fontsize=10)
    for ax in (left, right):
        ax.axis("off")
    if title:
        figure.suptitle(title, x=0.01, ha="left")
    return figure


@_styled
def attention_over_image(image: Any, weights: Sequence[Any], labels: Sequence[str], title: str = "") -> Figure:
    """Show for each generated token how its attention lies over the image.

    Args:
        image: the image as the model sees it, or its pixel values (3, H, W).
        weights: per token the attention over the patches, (rows, columns).
        labels: the tokens.
        title: the figure's title.
    """
    import numpy

    pixels = _pixels(image)
    columns = min(5, len(weights) + 1)
    rows = math.ceil((len(weights) + 1) / columns)
    figure, axes = _axes(7.6, rows * (7.6 / columns + 0.3), rows, columns)
    for ax in axes:
        ax.axis("off")
    axes[0].imshow(pixels)
    extent = (-0.5, pixels.shape[1] - 0.5, pixels.shape[0] - 0.5, -0.5)
    for ax, weight, label in zip(axes[1:], weights, labels, strict=False):
        values = numpy.asarray(weight, dtype=float)
        ax.imshow(pixels.mean(-1), cmap="gray", alpha=0.75, vmin=0, vmax=1)
        scaled = values / (values.max() or 1)
        ax.imshow(scaled, cmap="inferno", alpha=0.15 + 0.6 * scaled, extent=extent, interpolation="bilinear")
        ax.set_title(label, fontweight="normal", fontsize=10, loc="center", pad=4)
    if title:
        figure.suptitle(title, x=0.01, ha="left")
    return figure


# ------------------------------------------------------------------------------------------------ text and tables


def cell_text(value: Any) -> str:
    """Return a table cell's text for a number, a text, an interval or nothing."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, list | tuple):
        return " to ".join(cell_text(part) for part in value)
    return str(value)


def supervised_text_html(
    tokens: Sequence[str], labels: Sequence[int], image_token: str = "<image>", ignored: int = IGNORED
) -> HTML:
    """Show a sample's tokens and mark those that carry loss.

    Args:
        tokens: the text of each position.
        labels: the label of each position.
        image_token: the text of an image position; a row of them is drawn as one.
        ignored: the label of a position without loss.
    """
    from IPython.display import HTML

    if len(tokens) != len(labels):
        raise DataError(
            f"supervised_text_html: {len(tokens)} tokens but {len(labels)} labels; give one label per token"
        )
    marked = "background: rgba(0, 150, 120, .25); border-bottom: 2px solid #00906f;"
    chip = "background: rgba(199, 91, 0, .18); border: 1px solid #C75B00; border-radius: 4px; padding: 0 .4em;"
    pieces: list[str] = []
    position = 0
    while position < len(tokens):
        if tokens[position] == image_token:
            end = position
            while end < len(tokens) and tokens[end] == image_token:
                end += 1
            pieces.append(f'<span style="{chip}">image × {end - position}</span>')
            position = end
            continue
        text = html.escape(tokens[position]).replace("\n", "↵\n")
        on = labels[position] != ignored
        style = marked if on else "opacity: .72;"
        pieces.append(f'<span class="{"supervised" if on else "context"}" style="{style}">{text}</span>')
        position += 1
    count = sum(label != ignored for label in labels)
    legend = f'<span style="{marked}">marked</span>: {count} of {len(labels)} positions carry loss'
    body = "font-family: monospace; white-space: pre-wrap; line-height: 1.75;"
    return HTML(
        f'<div class="companion-tokens"><div style="{body}">{"".join(pieces)}</div>'
        f'<div style="font-size: .85em; margin-top: .5em;">{legend}</div></div>'
    )


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None, caption: str = "") -> HTML:
    """Show rows as a table, numbers to the right.

    Args:
        rows: one mapping per row; checks made by `check` fit as they are.
        columns: the keys to show, in order; by default all of the first row that any row fills.
        caption: a line above the table.
    """
    from IPython.display import HTML

    if columns is None:
        columns = [key for key in (rows[0] if rows else ()) if any(row.get(key) not in (None, "") for row in rows)]
    numeric = {c for c in columns if all(isinstance(row.get(c), int | float | None) for row in rows)}
    side = {c: ' style="text-align: right"' if c in numeric else ' style="text-align: left"' for c in columns}
    head = "".join(f"<th{side[c]}>{html.escape(c)}</th>" for c in columns)
    body = "".join(
        "<tr>" + "".join(f"<td{side[c]}>{html.escape(cell_text(row.get(c)))}</td>" for c in columns) + "</tr>"
        for row in rows
    )
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return HTML(f'<table class="companion">{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>')


# ------------------------------------------------------------------------------------------------ Figure 1

PARTS = (
    "image",
    "vision_tower",
    "features",
    "projector",
    "image_tokens",
    "question_tokens",
    "language_model",
    "answer",
)
LANDSCAPE = (
    '<g transform="translate(139 516)"><rect width="110" height="110" rx="6" fill="#DDE7EE"/>'
    '<circle cx="33" cy="32" r="11" fill="#E8B93C"/>'
    '<path d="M0 92 L33 58 L57 82 L77 54 L110 92 V110 H0 Z" fill="#7FA68A"/></g>'
)


def architecture_diagram(
    shapes: Mapping[str, Any],
    image: Image | None = None,
    question: str = "What is in the picture?",
    answer: str = "An answer, token by token.",
) -> HTML:
    """Draw the model: image, vision tower, projector, language model, and the shape of what flows between them.

    Args:
        shapes: part -> shape (a tuple) or text; the parts are `image`, `vision_tower`, `features`, `projector`,
            `image_tokens`, `question_tokens`, `language_model` and `answer`; those left out have no line.
        image: drawn at the input.
        question: the instruction.
        answer: the response.

    Returns:
        The drawing as SVG inside HTML; its `data` is the SVG.

    Raises:
        DataError: a part is unknown.

    Source:
        paper §4.1, Figure 1 (drawn anew in architecture.svg).
    """
    from IPython.display import HTML

    if unknown := set(shapes) - set(PARTS):
        raise DataError(f"architecture_diagram: unknown part {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    words = {"question_text": textwrap.shorten(question, 46), "answer_text": textwrap.shorten(answer, 80)}
    for part in PARTS:
        shape = shapes.get(part, "")
        words[part] = " × ".join(f"{n:,}" for n in shape) if isinstance(shape, tuple | list) else str(shape)
    fields = {key: html.escape(text) for key, text in words.items()}
    picture = LANDSCAPE
    if image is not None:
        buffer = io.BytesIO()
        small = image.convert("RGB")
        small.thumbnail((240, 240))
        small.save(buffer, "PNG")
        data = base64.b64encode(buffer.getvalue()).decode()
        picture = f'<image x="139" y="516" width="110" height="110" href="data:image/png;base64,{data}"/>'
    drawing = Template(Path(__file__).with_name("architecture.svg").read_text(encoding="utf-8"))
    return HTML(drawing.substitute(fields, picture=picture))
