"""What the chapters share: plot style, tables, and the numbers and figures that a chapter saves.

`save_figure` writes a plot as SVG with a JSON twin (its numbers and the runs behind them); `save_numbers` writes a
chapter's numbers and its checks against the paper.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from companion.paper.verdict import verdict_of
from llava_core.config import META, RunConfig
from llava_core.config_files import value_of
from llava_core.constants import IGNORE_INDEX, IMAGE_MARKER
from llava_core.runtime import ROOT, DataError, atomic_write, printable, write_json

if TYPE_CHECKING:
    from IPython.display import HTML
    from matplotlib.figure import Figure
    from pandas.io.formats.style import Styler
    from PIL.Image import Image

STYLE = Path(__file__).with_suffix(".mplstyle")
COLORS = ("#0067A5", "#C75B00", "#00806A", "#A6438C", "#8A6D00", "#3B8FC4", "#555555")  # as in the style file
BLUE, ORANGE, CARD, INK, MUTED = COLORS[0], COLORS[1], "#FBFAF7", "#1F1F1F", "#6B6B66"
NO_MATH = "mathjax_ignore tex2jax_ignore"  # classes: MathJax reads no formula in texts of data
CURATED = (
    "00_overview_architecture",
    "10_cc3m_filtering_concepts",
    "21_visual_instruction_tuning_attention",
    "21_visual_instruction_tuning_grounding",
    "21_visual_instruction_tuning_loss",
    "30_llava_bench_scores",
    "42_ablation_pretraining_arms",
    "50_fused_attention_mask",
)
"""The figures that are kept in git, in `figures/`."""


def output_folder() -> Path:
    """Return the folder of executed notebooks and their numbers; the pipeline sets it as `LLAVA_OUT`."""
    return Path(os.environ.get("LLAVA_OUT") or ROOT / "book" / "notebooks")


def figure_folder() -> Path:
    return output_folder() / "figures"


def copy_curated(target: Path = ROOT / "figures") -> list[Path]:
    """Copy the curated figures and their JSON twins to the folder in git; DataError if a chapter has not run."""
    sources = [figure_folder() / f"{name}{suffix}" for name in CURATED for suffix in (".svg", ".json")]
    if missing := [path.stem for path in sources if not path.is_file()]:
        raise DataError(f"no figure {', '.join(dict.fromkeys(missing))} in {figure_folder()}; run `make reproduce`")
    target.mkdir(exist_ok=True)
    return [Path(shutil.copyfile(path, target / path.name)) for path in sources]


def _plain(value: Any, where: str) -> Any:
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


def _paths(runs: Iterable[Any]) -> list[str]:
    paths = (Path(getattr(run, "path", run)) for run in runs)
    return [str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path) for path in paths]


def check(claim: str, published: Any, measured: Any, ok: bool | None, note: str = "") -> dict[str, Any]:
    """Return a row of the table of results: a measured number with its claim.

    Args:
        claim: the claim in a few words, with its unit.
        published: the paper's value, or None if it gives none.
        measured: the value at this scale: a number, a text, or `[low, high]`.
        ok: whether the direction or bound of the claim holds here; None if this scale can only show the value.
        note: what a reader has to know to compare the two.
    """
    row = {"claim": claim, "published": published, "measured": measured, "verdict": verdict_of(ok), "note": note}
    return {key: _plain(value, f"{claim}.{key}") for key, value in row.items()}


def check_claim(name: str, measured: Any, ok: bool | None, note: str = "") -> dict[str, Any]:
    """Return a row as `check` does, for a claim id of companion/paper/claims.yaml."""
    from companion.paper.claims import claim

    known = claim(name)
    return {**check(known.text, known.value_text, measured, ok, note), "id": name, "place": known.place}


def save_numbers(
    name: str, numbers: Mapping[str, Any], checks: Sequence[Mapping[str, Any]] = (), runs: Iterable[Any] = ()
) -> None:
    """Write a notebook's numbers to the folder of its executed copy, with those of the solutions of its exercises.

    A solution is a variable `solution_1`, `solution_2` ... of the notebook; `scale` and `fast` are its variables, too.

    Args:
        name: the notebook's file name without extension.
        numbers: finite numbers, texts, or lists and dicts of these, by name.
        checks: rows of `check`.
        runs: the records, or their paths, that the numbers come from.
    """
    notebook = vars(sys.modules["__main__"])  # in a kernel, the notebook's variables are in this module
    for row in checks:
        if missing := {"claim", "published", "measured", "verdict"} - set(row):
            raise DataError(f"{name}: a check lacks {', '.join(sorted(missing))}; make it with check(...)")
    content = {
        "notebook": name,
        "scale": notebook.get("scale", "mini"),
        "fast": bool(notebook.get("fast", False)),
        "numbers": _plain(numbers, "numbers"),
        "solutions": _plain({k: notebook[k] for k in sorted(notebook) if re.fullmatch(r"solution_\d", k)}, "solutions"),
        "checks": _plain(list(checks), "checks"),
        "runs": _paths(runs),
    }
    write_json(output_folder() / f"{name}.json", content)


def save_figure(
    notebook: str, name: str, figure: Figure | HTML, numbers: Mapping[str, Any], runs: Iterable[Any] = ()
) -> None:
    """Show a plot or SVG and write it as `<notebook>_<name>.svg`, with its numbers and runs in a `.json`."""
    import matplotlib.pyplot as plt
    from IPython import get_ipython
    from IPython.display import display

    path = figure_folder() / f"{notebook}_{name}.svg"
    if isinstance(svg := getattr(figure, "data", None), str):
        atomic_write(path, svg)
    else:
        buffer = io.BytesIO()
        with plt.style.context(STYLE):  # the style's hash salt and no date: equal figures are equal files
            figure.savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches="tight")
        plt.close(figure)  # otherwise the inline backend shows it a second time
        atomic_write(path, buffer.getvalue())
    facts = {"notebook": notebook, "figure": name, "numbers": _plain(numbers, "numbers"), "runs": _paths(runs)}
    write_json(path.with_suffix(".json"), facts)
    if get_ipython() is not None:
        display(figure)


def use_style() -> None:
    """Set the book's plot style; in a notebook, figures are shown as SVG."""
    import matplotlib.scale
    import matplotlib.style
    from IPython import get_ipython
    from matplotlib.ticker import LogFormatter

    class PlainFormatter(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            shown = super().__call__(x, pos)
            return self.fix_minus(f"{x:g}".replace("e-0", "e-").replace("e+0", "e")) if shown else ""

    class PlainLogScale(matplotlib.scale.LogScale):
        """A log axis with labels as 1e-5; matplotlib's own are TeX, which the style does not parse."""

        def set_default_locators_and_formatters(self, axis: Any) -> None:
            super().set_default_locators_and_formatters(axis)
            axis.set_major_formatter(PlainFormatter(self.base))
            axis.set_minor_formatter(PlainFormatter(self.base, labelOnlyBase=self.subs is not None))

    matplotlib.scale.register_scale(PlainLogScale)  # under the name of its base, "log"
    matplotlib.style.use(STYLE)
    if get_ipython() is not None:
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("svg")


# what Markdown, HTML, MyST or MathJax read as markup; at the start of a block also marks of lists, headings and code
_MARKUP = re.compile(
    r"""[&<>"`*~^$\\{}|@\[\]]|/(?=/)|(?<=www)\.|(?<![^\W_])_|_(?![^\W_])"""
    r"""|^(?:[:%]|[-+#=](?=[-+#=]*(?:\s|$))|\d(?=\d*[.)](?:\s|$))|\((?=.*\)=))""",
    re.IGNORECASE,
)


def markdown_safe(text: object) -> str:
    """Return text of data, of a model or of a server as inline Markdown or HTML that has no markup of its own.

    The result is one line and has no braces, so no `{{ ... }}` of a page either.
    """

    def entity(match: re.Match[str]) -> str:
        code = f"&#{ord(match[0])};"
        return f"<span>{code}</span>" if match[0] in "$\\" else code  # a delimiter of math must be in the text's node

    return _MARKUP.sub(entity, printable(" ".join(str(text).split())))


def html_safe(text: object) -> str:
    """Return text of data as HTML without markup of its own; its line breaks stay."""
    return html.escape(printable(text, keep="\n\t"))


def cell_text(value: Any, digits: int | None = None) -> str:
    """Return a value in words; a float with `digits` decimals, or four significant digits, those of a list alike."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and digits is not None and math.isfinite(value):
        return f"{round(value, digits) + 0.0:,.{digits}f}"  # no -0.00
    if isinstance(value, int | float):
        return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, list | tuple):
        interval = len(value) == 2 and all(isinstance(part, int | float) for part in value)
        shared = decimals(value) if digits is None else digits
        return (" to " if interval else ", ").join(cell_text(part, shared) for part in value)
    return str(value)


def decimals(values: Iterable[Any]) -> int | None:
    """Return equal decimals for the floats of a column or list; None if their sizes differ too much for that.

    As many as any needs for four significant digits, and no more than the largest needs.
    """
    floats = [value for value in values if isinstance(value, float) and math.isfinite(value) and value]
    texts = [f"{value:.4g}" for value in floats]
    largest = max(map(abs, floats), default=0)
    if not floats or largest > 1000 * min(map(abs, floats)) or any("e" in text for text in texts):
        return None
    return min(max(len(text.partition(".")[2]) for text in texts), max(0, 3 - math.floor(math.log10(largest))))


def code_safe(text: object) -> str:
    """Return a text of data as code inside of Markdown."""
    return f"<code>{markdown_safe(text)}</code>"


def markdown_table(heads: Sequence[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Return the lines of a table in Markdown, and an empty one; cells are Markdown."""
    return [*(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)), ""]


HEADS = {
    "final_loss": "final loss",
    "heldout_loss": "held-out loss",
    "samples_per_s": "samples per second",
    "tokens_per_s": "tokens per second",
    "spend_usd": "USD spent",
    "image_tokens": "image tokens",
    "n": "number",
    "n_images": "images",
    "gflop": "GFLOP",
    "mb": "MB",
    "ratio_low": "ratio, lowest",
    "ratio_high": "ratio, highest",
    "peak_ratio": "ratio of peak memory",
    "per_image": "samples per image",
    "pairs_kept": "pairs kept",
    "phrases_kept": "phrases kept",
    "times_off": "times off",
}
"""Heads of columns that are named as in a record."""
DECIMALS = {"hours": 1, "MB": 1, "mb": 1, "(%)": 2, "percent": 2, "points": 2, "(points)": 2}
"""The most decimals in a column, by the last word of its head; the paper's percentages have up to two."""


def _column_text(head: str, values: Sequence[Any]) -> Callable[[Any], str]:
    """Return what formats the values of a column."""
    from companion.evaluation.statistics import p_text

    if re.search(r"\bp( \(Holm\))?$", head):
        return lambda value: p_text(value) if isinstance(value, float) and not math.isnan(value) else cell_text(value)
    parts = itertools.chain.from_iterable(value if isinstance(value, list | tuple) else [value] for value in values)
    shared, most = decimals(parts), DECIMALS.get(head.rpartition(" ")[2])
    return partial(cell_text, digits=most if shared is None else min(shared, most if most is not None else shared))


def table(rows: Any, columns: Sequence[str] | None = None, caption: str = "") -> Styler:
    """Return a pandas table of a DataFrame or of mappings; by default with all columns that have a value."""
    import pandas as pd

    frame = pd.DataFrame(rows, dtype=object)
    if columns is None:
        columns = [name for name in frame if frame[name].notna().any() and (frame[name] != "").any()]
    frame = frame[list(columns)].reset_index(drop=True)
    numeric = frame.map(lambda value: isinstance(value, int | float))
    classes = numeric.map({True: "number", False: "text"}.get)

    def cell(head: Any) -> Callable[[Any], str]:
        text = _column_text(str(head), list(frame[head]))
        return lambda value: html_safe(text(value))

    style = frame.style.format({head: cell(head) for head in frame}).hide(axis="index").set_td_classes(classes)
    style = style.format_index(lambda head: html_safe(HEADS.get(head, head)), axis="columns")
    style = style.set_caption(html_safe(caption))
    return style.set_table_attributes(f'class="companion {NO_MATH}"')


FILE_FIELDS = {"file", "validation_file", "held_out", "on_bad_sample", "written_by"}
"""Fields of an experiment's `data` about this project's files; shown only where a scale departs in them."""


def setting_rows(config: RunConfig, since: RunConfig | None = None) -> list[dict[str, str]]:
    """Return the settings of a run that differ from `since`: paper's value, source, why this scale departs."""
    departures = {d.field: d for d in config.departures}
    rows: list[tuple[str, Any, Any, str]] = []
    for section, part in config.experiment.model_dump(
        exclude=dict.fromkeys((*META, "stage"), True) | {"data": FILE_FIELDS}
    ).items():
        for field in [f"{section}.{name}" for name in part] if isinstance(part, dict) else [section]:
            here, departure = value_of(config.experiment, field), departures.pop(field, None)
            paper = departure.paper if departure else here
            notes = [config.experiment.source_of(field) or "", f"here: {departure.why}" if departure else ""]
            if not (paper in (None, {}) and here in (None, {})):  # neither uses the setting
                rows.append((field, paper, here, "; ".join(filter(None, notes))))
    for d in departures.values():
        stand_in = d.field.startswith("scale.")
        rows.append((d.field.removeprefix("scale."), "the real one" if stand_in else d.paper, d.here, f"here: {d.why}"))
    keys = ("setting", "paper", "here", "source, reason")
    texts = [dict(zip(keys, map(setting_text, row), strict=True)) for row in rows]
    known = {row["setting"]: (row["paper"], row["here"]) for row in setting_rows(since)} if since else {}
    return [row for row in texts if known.get(row["setting"]) != (row["paper"], row["here"])]


def setting_text(value: Any) -> str:
    """Return the value of a setting in words; of a section its parts that are set."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if hasattr(value, "model_dump"):
        value = value.model_dump()
    if isinstance(value, Mapping):
        return "; ".join(f"{key} {setting_text(part)}" for key, part in value.items() if part is not None)
    if isinstance(value, list | tuple):
        return ", ".join(map(setting_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


_SAVED: dict[str, dict[str, Any]] = {
    "jpeg": {"quality": 88}, "png": {"optimize": True}, "webp": {"quality": 60, "method": 6}
}  # fmt: skip


def image_uri(image: Image, kind: str = "jpeg", within: tuple[int, int] | None = None) -> str:
    """Return an image as a `data:` address of `kind` jpeg, png or webp, shrunk to fit `within` (width, height) pixels.

    PNG keeps every pixel and transparency; WebP is the smallest.
    """
    shown = image.copy() if kind == "png" else image.convert("RGB")
    if within is not None:
        shown.thumbnail(within)
    buffer = io.BytesIO()
    shown.save(buffer, kind, **_SAVED[kind])
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def cards(images: Sequence[Image | None], lines: Sequence[Iterable[tuple[str, str]]], width: int = 180) -> HTML:
    """Show images (or None) with texts, per image (speaker, text) pairs: dialogues, captions, chat messages."""
    from IPython.display import HTML

    parts = []
    for number, (image, said) in enumerate(zip(images, lines, strict=True), start=1):
        picture = ""
        if image is not None:
            source = image_uri(image.resize((2 * width, 2 * width * image.height // image.width)))  # for sharp screens
            alt = f"image {number} of {len(images)}, which the text beside it is about"
            picture = f'<img alt="{alt}" width="{width}" src="{source}" style="border-radius: 6px; flex: none">'
        texts = "".join(
            '<div style="margin: 0 0 .4em; white-space: pre-wrap; overflow-wrap: anywhere">'
            f"<b>{html_safe(speaker)}</b>&ensp;{html_safe(text)}</div>"
            for speaker, text in said
        )
        layout = "display: flex; gap: .9em; flex: 1 1 26em; align-items: flex-start"
        parts.append(f'<div style="{layout}">{picture}<div style="font-size: .92em">{texts}</div></div>')
    layout = "display: flex; flex-wrap: wrap; gap: 1.2em; margin: .6em 0 1.2em"
    return HTML(f'<div class="companion-cards {NO_MATH}" style="{layout}">{"".join(parts)}</div>')


def supervised_text_html(tokens: Sequence[str], labels: Sequence[int]) -> HTML:
    """Show the tokens of a sample and mark those whose label is not -100; a run of image positions is one box."""
    from IPython.display import HTML

    if len(tokens) != len(labels):
        raise DataError(f"supervised_text_html: {len(tokens)} tokens but {len(labels)} labels")
    marked = "background: rgba(0, 150, 120, .25); border-bottom: 2px solid #00906f;"
    box = "background: rgba(199, 91, 0, .18); border: 1px solid #C75B00; border-radius: 4px; padding: 0 .4em;"
    kind = [(token == IMAGE_MARKER, label != IGNORE_INDEX) for token, label in zip(tokens, labels, strict=True)]
    spans = []
    for (is_image, supervised), group in itertools.groupby(zip(kind, tokens, strict=True), key=lambda pair: pair[0]):
        texts = [token for _, token in group]
        name, style = ("supervised", marked) if supervised else ("context", box if is_image else "opacity: .85;")
        text = f"image × {len(texts)}" if is_image else html_safe("".join(texts)).replace("\n", "↵\n")
        spans.append(f'<span class="{name}" style="{style}">{text}</span>')
    count = sum(supervised for _, supervised in kind)
    legend = f'<span style="{marked}">marked</span>: {count} of {len(labels)} positions carry loss'
    body = "font-family: monospace; white-space: pre-wrap; line-height: 1.75"
    inner = f'<div style="{body}">{"".join(spans)}</div><small>{legend}</small>'
    return HTML(f'<div class="companion-tokens {NO_MATH}">{inner}</div>')
