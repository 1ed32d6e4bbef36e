"""A root folder for training runs in tests: configs, tiny base models, records and images."""

from __future__ import annotations

import json
from pathlib import Path

import tiny
from PIL import Image

SCALE = """
name: mini
title: test
device: cpu
threads: 1
row_tokens: {row_tokens}
parallel: {{kind: none}}
offline: true
cache_pixels: true
data:
  {{cc595k: data/cc, cc595k_images: data/images, instruct158k: data/it, instruct158k_images: data/images,
    scienceqa: data/sqa, scienceqa_images: data/sqa/images}}
models: {{vicuna-7b: models/llm, vicuna-13b: models/llm, clip-vit-large-patch14: models/clip}}
states: {{every_s: 0.000001}}
eval_samples: 4
seeds: [0]
departs:
  "*": {{set: {{train.precision: float32}}, why: a CPU}}
  pretrain: {{set: {{data.held_out: 0.04}}, why: few samples}}
  finetune: {{set: {{data.held_out: 0.04}}, why: few samples}}
"""


def make_training_root(workspace: Path) -> None:
    """Fill a root with tiny base models, 26 captions and dialogues (two of them text only), and its own mini scale."""
    real = (workspace / "configs").resolve()
    (workspace / "configs").unlink()
    (workspace / "configs" / "scales").mkdir(parents=True)
    (workspace / "configs" / "experiments").symlink_to(real / "experiments")
    (workspace / "configs" / "scales" / "mini.yaml").write_text(SCALE.format(row_tokens=768))
    tiny.base_models(workspace / "models")
    images = workspace / "data" / "images"
    images.mkdir(parents=True)
    records = []
    for k in range(26):
        Image.new("RGB", (32, 32), (k * 9, 255 - k * 9, 40)).save(images / f"{k}.png")
        record = {"id": str(k), "image": f"{k}.png", "conversations": [
            {"from": "human", "value": "<image>\nwhat color is the car"},
            {"from": "gpt", "value": "red" if k % 2 else "blue and red"},
        ]}  # fmt: skip
        if k in (5, 6):
            del record["image"]
            record["conversations"][0]["value"] = "what color is the dog"
        records.append(record)
    for folder, name in (("cc", "chat.json"), ("it", "llava_instruct.json")):
        (workspace / "data" / folder).mkdir()
        (workspace / "data" / folder / name).write_text(json.dumps(records))
