"""The benchmark of shared image prefixes: token counts, and a loss that sharing does not change."""

from __future__ import annotations

import pytest

from benchmarks import train_step
from benchmarks.shared_prefix import bench_shared_prefix

TINY = {
    "tower": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 16},
    "text": {"vocab_size": 32000, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 2, "max_position_embeddings": 4096},
}  # fmt: skip


def test_rows_have_the_bound_of_the_tokens_and_equal_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(train_step.SIZES, "60m", TINY)
    monkeypatch.setattr("benchmarks.common.MAX_RANGE", float("inf"))
    result = bench_shared_prefix(image_tokens=(9, 64), per_image=(1, 3), rounds=1)
    rows = result["cases"]
    assert [(row["image_tokens"], row["per_image"], row["samples"]) for row in rows] == [
        (9, 1, 8), (9, 3, 6), (64, 1, 8), (64, 3, 6),
    ]  # fmt: skip
    for row in rows:
        image = row["samples"] - row["samples"] // row["per_image"]  # copies of an image that sharing saves
        system = row["samples"] // row["per_image"] - 1  # copies of the system text, besides those of the images
        saved = image * (row["image_tokens"] + train_step.SYSTEM_TOKENS) + system * train_step.SYSTEM_TOKENS
        assert row["tokens"] - row["tokens_shared"] == saved
        assert row["ideal"] == pytest.approx(row["tokens"] / row["tokens_shared"], abs=1e-3)
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert float(row["loss_difference"]) < 1e-4
    assert rows[3]["ideal"] > rows[2]["ideal"]
    assert result["ideal"] == rows[3]["ideal"]
