"""Instruction records: what is loaded, what is refused, and the subsets of kinds."""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path
from typing import Any

import pytest
from instruct_records import images, record  # noqa: F401 - a fixture
from PIL import Image

from llava_core.data.images import load_image
from llava_core.data.instruct import Sample, image_fault, load_instruct
from llava_core.runtime import DataError


def test_check_agrees_with_the_reader(images: Path) -> None:
    (images / "folder.png").mkdir()
    Image.new("RGB", (300, 1)).save(images / "strip.png")
    Image.new("F", (4, 4)).save(images / "float.tif")
    Image.new("I;16", (4, 4)).save(images / "deep.png")
    large = bytearray((images / "good.png").read_bytes())
    large[16:24] = (30_000).to_bytes(4, "big") * 2
    large[29:33] = zlib.crc32(large[12:29]).to_bytes(4, "big")
    (images / "large.png").write_bytes(large)
    faults = {name: image_fault(images / name) for name in (*(path.name for path in images.iterdir()), "absent.jpg")}
    for name, fault in faults.items():
        if fault is None:
            load_image(images / name)
        else:
            with pytest.raises(DataError, match=re.escape(fault[1])):
                load_image(images / name)
            assert fault[0] == ("missing_image" if name in ("absent.jpg", "folder.png") else "unreadable_image")
    assert sorted(name for name, fault in faults.items() if not fault) == ["deep.png", "good.jpg", "good.png"]
    header = {name for name in faults if image_fault(images / name, decode=False)}
    assert header == {"absent.jpg", "empty.jpg", "folder.png", "large.png", "strip.png", "text.jpg"}


def test_load_keeps_text_and_image_marker(tmp_path: Path, images: Path) -> None:
    records = [record("a", type="detail"), record("b", None), record("c", "good.png")]
    records[2]["conversations"][0]["value"] = "<image>\nWhat is it — really?\u2028"
    for suffix in (".json", ".jsonl"):
        path = tmp_path / f"data{suffix}"
        path.write_text(json.dumps(records) if suffix == ".json" else "\n".join(map(json.dumps, records)))
        samples = load_instruct(path, images)
        assert samples[0] == Sample("a", [("What is it?\n<image>", "A cat.")], images / "good.jpg", "detail")
        assert samples[1].image is None
        assert samples[2].turns[0][0] == records[2]["conversations"][0]["value"]
    assert load_instruct(tmp_path / "data.json")[0].image == Path("good.jpg")


def test_load_refuses_a_file_with_problems_and_names_them(tmp_path: Path, images: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(
        json.dumps([record("a"), record("b", "absent.jpg"), record("c", "text.jpg"), record("a")], indent=1)
    )
    wanted = r"2 problem(.|\n)*record b: image .*absent\.jpg(.|\n)*record c: image .*text\.jpg(.|\n)*llava data check"
    with pytest.raises(DataError, match=wanted):
        load_instruct(path, images)
    with pytest.raises(DataError, match="no such folder"):
        load_instruct(path, tmp_path / "nowhere")
    with pytest.raises(DataError, match="no such file"):
        load_instruct(tmp_path / "nothing.json")
    with pytest.raises(DataError, match=r"neither \.json nor \.jsonl"):
        load_instruct(path.rename(tmp_path / "data.csv"))


def test_subsets_are_seeded_and_nested(tmp_path: Path) -> None:
    kinds = ["conversation"] * 40 + ["detail"] * 40 + ["complex"] * 20
    path = tmp_path / "data.json"
    path.write_text(json.dumps([record(str(k), None, type=kind) for k, kind in enumerate(kinds)]))

    def ids(**options: Any) -> list[int]:
        return [int(sample.id) for sample in load_instruct(path, **options)]

    mix = ids(subset={"conversation": 1.0, "detail": 0.05, "complex": 0.1})
    assert mix == sorted(mix)
    assert [sum(kinds[k] == kind for k in mix) for kind in ("conversation", "detail", "complex")] == [40, 2, 2]
    assert ids(subset={"detail": 0.5}) == ids(subset={"detail": 0.5})
    assert set(ids(subset={"detail": 0.25})) < set(ids(subset={"detail": 0.5}))
    assert ids(subset={"detail": 0.5}) != ids(subset={"detail": 0.5}, seed=1)
    with pytest.raises(DataError, match="did you mean 'detail'"):
        load_instruct(path, subset={"details": 1.0})
    with pytest.raises(DataError, match="from 0 to 1"):
        load_instruct(path, subset={"detail": 5})
