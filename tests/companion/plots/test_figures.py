"""What notebooks draw and save: numbers that can be trusted, figures with their twins, readable marks."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy
import pytest
from PIL import Image

from companion.plots import figures
from llava_core.runtime import ROOT, ConfigError, DataError

matplotlib.use("agg")
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAVA_OUT", str(tmp_path))
    return tmp_path


def test_numbers_are_saved_as_plain_finite_json(out: Path) -> None:
    class Record:
        path = ROOT / "runs" / "pretrain" / "mini" / "0123456789ab"

    row = figures.check("accuracy, %", 90.92, numpy.float32(81.5), numpy.bool_(True), "three seeds")
    assert row["verdict"] == "agrees"
    assert figures.check("x", None, 1, False)["verdict"] == "disagrees"
    assert figures.check("x", None, 1, None)["verdict"] == "shown only"
    figures.save_numbers("20_x", {"loss": numpy.float64(0.5), "per": numpy.arange(2)}, [row], [Record()], fast=True)
    saved = json.loads((out / "20_x.json").read_text())
    assert saved == {
        "notebook": "20_x",
        "scale": "mini",
        "fast": True,
        "numbers": {"loss": 0.5, "per": [0, 1]},
        "checks": [row],
        "runs": ["runs/pretrain/mini/0123456789ab"],
    }


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"a": {"b": math.nan}}, r"'numbers\.a\.b' is nan; a saved number must be finite"),
        ({"a": [1, math.inf]}, r"'numbers\.a\[1\]' is inf"),
        ({"a": object()}, r"'numbers\.a' is a object"),
    ],
)
def test_invalid_numbers_are_refused(out: Path, numbers: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        figures.save_numbers("20_x", numbers)
    assert not list(out.iterdir())


def test_check_without_a_verdict_is_refused(out: Path) -> None:
    with pytest.raises(DataError, match="lacks measured, verdict"):
        figures.save_numbers("20_x", {}, [{"claim": "c", "published": 1}])


def test_check_of_the_ledger_names_its_place() -> None:
    row = figures.check_claim("ablation-7b", [-2.0, -0.5], True)
    assert row["place"] == "Table 8"
    assert "points" in row["published"]
    with pytest.raises(ConfigError, match="ablation-7b"):
        figures.check_claim("ablation-7bb", 1, True)


def test_figures_are_saved_reproducibly_with_their_numbers(out: Path) -> None:
    rows = [{"step": step, "loss": 2 / (step + 1), "seconds": 1.0} for step in range(30)] + [
        {"step": 29, "heldout_loss": 1.0}
    ]
    path = out / "figures" / "20_x_loss.svg"
    seen = []
    for _ in range(2):
        figures.save_figure("20_x", "loss", figures.loss_curves({"stage 1": rows}, "Loss", (0.1, 0.2)), {"last": 0.07})
        seen.append(path.read_bytes())
    assert seen[0] == seen[1]
    assert ElementTree.fromstring(seen[0]).tag == f"{SVG}svg"
    assert figures.CARD.lower().encode() in seen[0].lower()  # the card that keeps it readable on a dark page
    twin = json.loads(path.with_suffix(".json").read_text())
    assert twin == {"notebook": "20_x", "figure": "loss", "numbers": {"last": 0.07}, "runs": []}


def test_smoothed_loss_does_not_lag(out: Path) -> None:
    rows = [{"step": step, "loss": 10.0 - step * 0.05} for step in range(100)]
    raw, smooth = figures.loss_curves({"a": rows}).axes[0].lines
    inner = slice(5, -5)
    assert numpy.allclose(raw.get_ydata()[inner], smooth.get_ydata()[inner])


def test_bars_show_value_interval_and_published() -> None:
    rows = [
        {"label": "image", "value": 80.0, "low": 75.0, "high": 85.0, "published": 90.0},
        {"label": "none", "value": 30.0},
    ]
    axes = figures.bars_with_intervals(rows, baseline=25).axes[0]
    assert [text.get_text() for text in axes.texts] == ["80", "30"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["image", "none"]
    assert {label.get_text() for label in axes.get_legend().get_texts()} == {"published", "chance"}
    assert axes.get_xlim()[1] > 90
    with pytest.raises(DataError, match="'none' has no value"):
        figures.bars_with_intervals([{"label": "none"}])


def test_frequency_plot_counts_concepts_and_is_small() -> None:
    before = Counter({f"noun {rank}": 100_000 // (rank + 1) + 1 for rank in range(50_000)})
    lines = figures.frequency_plot(before, [3, 5, 4]).axes[0].lines
    assert [line.get_label() for line in lines] == ["before: 50,000 concepts", "after: 3 concepts"]
    assert len(lines[0].get_xdata()) < 1000
    assert list(lines[1].get_ydata()) == [5, 4, 3]
    assert (lines[0].get_xdata()[0], lines[0].get_xdata()[-1]) == (1, 50_000)
    figures.frequency_plot([], {})


def test_images_are_denormalised_and_cut_into_patches() -> None:
    image = Image.new("RGB", (32, 24), (255, 0, 64))
    pixels = (numpy.asarray(image.resize((28, 28))) / 255 - figures.CLIP_MEAN) / figures.CLIP_STD
    figure = figures.patch_grid(image, pixels.transpose(2, 0, 1), patch=14)
    assert "2 × 2 = 4 patches" in figure.axes[1].get_title(loc="left")
    assert numpy.allclose(figure.axes[1].images[0].get_array(), numpy.array([255, 0, 64]) / 255, atol=1e-6)
    assert len(figures.sample_grid([image] * 3, ["a", "b", "c"], columns=2).axes) == 4
    assert len(figures.attention_over_image(image, [numpy.eye(2)] * 2, ["a", "b"]).axes) == 3


def test_supervised_tokens_are_marked() -> None:
    tokens, labels = ["What", "<image>", "<image>", " <b>", "\n"], [-100, -100, -100, 7, 2]
    text = figures.supervised_text_html(tokens, labels).data
    assert text.count('class="supervised"') == 2
    assert "image × 2" in text
    assert "&lt;b&gt;" in text
    assert "2 of 5 positions carry loss" in text
    with pytest.raises(DataError, match="5 tokens but 4 labels"):
        figures.supervised_text_html(tokens, labels[1:])


def test_tables_format_their_numbers() -> None:
    values = {
        None: "–",
        True: "yes",
        4241: "4,241",
        90.916: "90.92",
        0.00004: "4e-05",
        1234567.8: "1,234,568",
        "x": "x",
    }
    assert {value: figures.cell_text(value) for value in values} == values
    assert figures.cell_text([-2.5, -0.4]) == "-2.5 to -0.4"
    text = figures.table([{"a": 1, "b": "<i>", "c": None}], caption="T").data
    assert "&lt;i&gt;" in text
    assert "<th" in text
    assert ">c</th>" not in text


def test_diagram_shows_shapes_and_image() -> None:
    shapes = {"image": (3, 64, 64), "features": (64, 128), "projector": "linear, 128 → 256"}
    drawing = figures.architecture_diagram(shapes, Image.new("RGB", (8, 8)), question="What & why?").data
    words = [node.text for node in ElementTree.fromstring(drawing).iter(f"{SVG}text")]
    assert {"3 × 64 × 64", "64 × 128", "linear, 128 → 256", "What & why?"} <= set(words)
    assert "data:image/png;base64," in drawing
    with pytest.raises(DataError, match="unknown part tower; known: image"):
        figures.architecture_diagram({"tower": (1,)})
