"""What chapters save and show: numbers, figures with their JSON twins, tables, texts with images."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import matplotlib.pyplot as plt
import numpy
import pandas as pd
import pytest
from IPython.display import HTML
from PIL import Image

from companion import figures
from llava_core.config import load_experiment
from llava_core.runtime import ROOT, ConfigError, DataError

matplotlib.use("agg")
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAVA_OUT", str(tmp_path))
    return tmp_path


def test_numbers_are_saved_as_plain_finite_json(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "fast", True, raising=False)

    class Record:
        path = ROOT / "runs" / "pretrain" / "mini" / "0123456789ab"

    row = figures.check("accuracy, %", 90.92, numpy.float32(81.5), numpy.bool_(True), "three seeds")
    assert row["verdict"] == "agrees"
    assert figures.check("x", None, 1, False)["verdict"] == "disagrees"
    assert figures.check("x", None, 1, None)["verdict"] == "shown only"
    figures.save_numbers("20_x", {"loss": numpy.float64(0.5), "per": numpy.arange(2)}, [row], [Record()])
    saved = json.loads((out / "20_x.json").read_text())
    assert saved == {
        "notebook": "20_x",
        "scale": "mini",
        "fast": True,
        "numbers": {"loss": 0.5, "per": [0, 1]},
        "solutions": {},
        "checks": [row],
        "runs": ["runs/pretrain/mini/0123456789ab"],
    }


def test_solutions_of_a_notebook_are_saved(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = sys.modules["__main__"]
    monkeypatch.setattr(notebook, "solution_2", {"steps": numpy.int64(4652)}, raising=False)
    monkeypatch.setattr(notebook, "solution", 1, raising=False)
    figures.save_numbers("20_x", {})
    assert json.loads((out / "20_x.json").read_text())["solutions"] == {"solution_2": {"steps": 4652}}


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
    figures.use_style()
    path = out / "figures" / "20_x_loss.svg"
    seen = []
    for _ in range(2):
        figure, ax = plt.subplots()
        ax.plot([2.0, 1.0, 0.5])
        figures.save_figure("20_x", "loss", figure, {"last": 0.5})
        seen.append(path.read_bytes())
    assert seen[0] == seen[1]
    assert ElementTree.fromstring(seen[0]).tag == f"{SVG}svg"
    assert figures.CARD.lower().encode() in seen[0].lower()  # the background that is readable on a dark page
    twin = json.loads(path.with_suffix(".json").read_text())
    assert twin == {"notebook": "20_x", "figure": "loss", "numbers": {"last": 0.5}, "runs": []}
    figures.save_figure("20_x", "model", HTML("<svg/>"), {})
    assert (out / "figures" / "20_x_model.svg").read_text() == "<svg/>"


def test_log_axes_have_plain_labels() -> None:
    figures.use_style()
    figure, ax = plt.subplots()
    ax.set_xscale("log")
    ax.set_xlim(1e-5, 1e3)
    figure.canvas.draw()
    labels = [label.get_text() for label in ax.get_xticklabels()]
    assert "1e\N{MINUS SIGN}5" in labels or "1e-5" in labels
    assert not [label for label in labels if "$" in label]
    plt.close(figure)


def test_curated_figures_are_copied_with_their_twins(out: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=figures.CURATED[0]):
        figures.copy_curated(tmp_path / "kept")
    (out / "figures").mkdir()
    for name in [*figures.CURATED, "20_other"]:
        (out / "figures" / f"{name}.svg").write_text("<svg/>")
        (out / "figures" / f"{name}.json").write_text("{}")
    copied = figures.copy_curated(tmp_path / "kept")
    assert len(copied) == 2 * len(figures.CURATED)
    assert not (tmp_path / "kept" / "20_other.svg").exists()


def test_setting_rows_have_every_departure_and_no_unused_setting() -> None:
    config = load_experiment("pretrain", "mini")
    rows = {row["setting"]: row for row in figures.setting_rows(config)}
    assert {d.field.removeprefix("scale.") for d in config.departures} <= rows.keys()
    assert rows["train.learning_rate"]["paper"] == "0.002" != rows["train.learning_rate"]["here"]
    assert "App. C" in rows["train.learning_rate"]["source, reason"]
    assert (rows["data.held_out"]["paper"], rows["data.held_out"]["here"]) == ("0", "0.04")
    assert rows["cc595k"]["paper"] == "the real one"
    assert not {"data.prompt_format", "data.on_bad_sample"} & rows.keys()
    assert figures.setting_rows(config, since=config) == []


def test_settings_are_texts_without_marks_of_python() -> None:
    adapters = load_experiment("finetune", "gpu").experiment.train.adapters
    assert figures.setting_text(adapters) == "r 128; alpha 256; dropout 0.05"
    values = (None, True, 1000.0, 2e-5, [0.5, "a"], {"mode": "crop", "mean": [0.5, 0.25]})
    texts = ["none", "yes", "1000", "2e-05", "0.5, a", "mode crop; mean 0.5, 0.25"]
    assert [figures.setting_text(value) for value in values] == texts


def test_supervised_tokens_are_marked() -> None:
    tokens, labels = ["What", "<image>", "<image>", " <b>", "\n"], [-100, -100, -100, 7, 2]
    text = figures.supervised_text_html(tokens, labels).data
    assert text.count('class="supervised"') == 1
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
    assert figures.cell_text(math.nan) == "–"
    assert figures.cell_text([-2.5, -0.4]) == "-2.5 to -0.4"
    assert figures.cell_text([80.8, 81.02, 83.8]) == "80.80, 81.02, 83.80"
    assert figures.cell_text([-10.11, -6.526]) == "-10.11 to -6.53"
    assert figures.cell_text([-0.0004, 12.0]) == "-0.0004 to 12"
    assert figures.cell_text([-0.004, 1.5, None]) == "-0.004, 1.500, –"
    assert figures.cell_text(["a", "b"]) == "a, b"
    text = figures.table([{"a": 1, "b": "<i>", "c": None}, {"a": 2.5}], caption="T & U").to_html()
    assert "&lt;i&gt;" in text
    assert "T &amp; U" in text
    assert ">c</th>" not in text
    assert figures.table(pd.DataFrame({"x": [1, 2]}), ["x"]).data.shape == (2, 1)
    row = {
        "right (%)": 2 / 3,
        "hours": [0.4983, 0.6525],
        "p (Holm)": 1e-187,
        "95 % interval": [1 / 3, 2 / 3],
        "mb": 1.0,
    }
    text = figures.table([row]).to_html()
    for shown in (">0.67<", ">0.5 to 0.7<", ">&lt; 0.001<", ">0.3333 to 0.6667<", ">MB</th>"):
        assert shown in text


def test_cards_escape_their_texts() -> None:
    page = figures.cards([Image.new("RGB", (40, 20)), None], [[("Human", "1 < 2?")], [("LLaVA", "<b>yes</b>")]]).data
    assert page.count("data:image/jpeg;base64,") == 1
    assert "1 &lt; 2?" in page
    assert "<b>yes" not in page
