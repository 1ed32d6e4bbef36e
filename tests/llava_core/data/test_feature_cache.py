"""Features of a frozen tower: bitwise equal, keyed by image bytes, computed once, refused on a full disk."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from llava_core.data import feature_cache as module
from llava_core.data.feature_cache import FeatureCache
from llava_core.runtime import DataError

SHAPE = (2, 3, 4)


def images(folder: Path, count: int) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{k}.png" for k in range(count)]
    for k, path in enumerate(paths):
        path.write_bytes(b"image %d" % k)
    return paths


class Tower:
    """Features that depend on an image's bytes."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype, self.seen = dtype, list[Path]()

    def __call__(self, paths: Sequence[Path]) -> torch.Tensor:
        self.seen += paths
        return torch.stack([self.of(path) for path in paths])

    def of(self, path: Path) -> torch.Tensor:
        generator = torch.Generator().manual_seed(sum(path.read_bytes()))
        return torch.randn(SHAPE, generator=generator).to(self.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_features_equal_computed_ones(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHARD", 4)
    paths, tower = images(tmp_path / "images", 10), Tower(dtype)
    cache = FeatureCache(tmp_path / "kept", {"tower": "a"}, SHAPE, dtype)
    assert cache.fill([*paths, paths[0]], tower) == 10
    for kept in (cache, FeatureCache(tmp_path / "kept", {"tower": "a"}, SHAPE, dtype)):
        for layer in (0, 1):
            result = kept.get([paths[7], paths[0], paths[7]], layer)
            expected = torch.stack([tower.of(paths[k])[layer] for k in (7, 0, 7)])
            assert result.dtype == dtype
            assert torch.equal(result, expected)
        assert kept.missing(paths) == []


def test_images_are_keyed_by_their_bytes(tmp_path: Path) -> None:
    paths, tower = images(tmp_path / "images", 4), Tower()
    cache = FeatureCache(tmp_path / "kept", {"tower": "a"}, SHAPE, torch.float32)
    cache.fill(paths, tower)
    shutil.copy(paths[2], tmp_path / "elsewhere.png")
    paths[1].write_bytes(b"another image")
    second = FeatureCache(tmp_path / "kept", {"tower": "a"}, SHAPE, torch.float32)
    assert second.missing([*paths, tmp_path / "elsewhere.png"]) == [paths[1]]
    assert second.fill([*paths, tmp_path / "elsewhere.png"], tower) == 1
    assert torch.equal(second.get([paths[1]])[0], tower.of(paths[1])[0])
    assert torch.equal(second.get([tmp_path / "elsewhere.png"])[0], tower.of(paths[2])[0])


def test_each_tower_has_its_own_features(tmp_path: Path) -> None:
    paths = images(tmp_path / "images", 2)
    FeatureCache(tmp_path / "kept", {"tower": "a"}, SHAPE, torch.float32).fill(paths, Tower())
    for facts in ({"tower": "b"}, {"tower": "a", "layers": [-1]}):
        assert FeatureCache(tmp_path / "kept", facts, SHAPE, torch.float32).missing(paths) == paths


def test_killed_run_loses_at_most_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD", 2)
    paths = images(tmp_path / "images", 7)

    class Dies(Tower):
        def __call__(self, some: Sequence[Path]) -> torch.Tensor:
            if len(self.seen) >= 4:
                raise KeyboardInterrupt
            return super().__call__(some)

    cache = FeatureCache(tmp_path / "kept", {"tower": "a"}, SHAPE, torch.float32)
    with pytest.raises(KeyboardInterrupt):
        cache.fill(paths, Dies())
    assert FeatureCache(tmp_path / "kept", {"tower": "a"}, SHAPE, torch.float32).missing(paths) == paths[4:]


def test_full_disk_error_names_the_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = FeatureCache(tmp_path / "kept", {"tower": "a"}, (2, 256, 1024), torch.bfloat16)
    assert cache.bytes_per_image() == 2**20
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**40, 0, 300 * 2**30))
    assert cache.disk_shortage(100_000) is None
    assert cache.disk_shortage(595_375) == (
        "features of 595375 images need 581.4 GiB; of the 300.0 GiB of free space 50% may be used"
    )


def test_damaged_file_is_named(tmp_path: Path) -> None:
    paths = images(tmp_path / "images", 2)
    cache = FeatureCache(tmp_path / "kept", {"tower": "a"}, SHAPE, torch.float32)
    cache.fill(paths, Tower())
    (file,) = cache.folder.glob("*.npy")
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(DataError, match=r"\.npy: no file of features .*; remove .*index\.json and it"):
        FeatureCache(tmp_path / "kept", {"tower": "a"}, SHAPE, torch.float32)


def test_features_of_a_removed_image_stay_usable(tmp_path: Path) -> None:
    paths, tower = images(tmp_path / "images", 2), Tower()
    cache = FeatureCache(tmp_path / "kept", {}, SHAPE, torch.float32)
    cache.fill(paths[:1], tower)
    expected = cache.get(paths[:1])
    for path in paths:
        path.unlink()
    cache = FeatureCache(tmp_path / "kept", {}, SHAPE, torch.float32)
    assert torch.equal(cache.get(paths[:1]), expected)
    with pytest.raises(DataError, match=r"1\.png: there is no such image; fix: "):
        cache.missing(paths)


PROGRAM = """
import sys, time
from pathlib import Path
import torch
from llava_core.data.feature_cache import FeatureCache
folder, images = Path(sys.argv[1]), sorted(Path(sys.argv[2]).iterdir())
print("ready", flush=True)
sys.stdin.read()
for k in range(20):
    cache = FeatureCache(folder / str(k), {"tower": "a"}, (2, 3, 4), torch.float32)
    cache.fill(images, lambda paths: torch.ones(len(paths), 2, 3, 4))
    assert float(cache.get(images).mean()) == 1
"""


def test_processes_may_open_and_fill_a_new_cache_at_once(tmp_path: Path) -> None:
    images(tmp_path / "images", 3)
    words = [sys.executable, "-c", PROGRAM, str(tmp_path / "kept"), str(tmp_path / "images")]
    processes = [
        subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
    errors = [process.stderr.read() for process in processes if process.stderr is not None]
    assert [process.wait(60) for process in processes] == [0, 0, 0], errors
