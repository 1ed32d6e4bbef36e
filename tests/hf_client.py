"""A client of an exported folder that has only transformers, of whatever version is in its path.

Usage: hf_client.py FOLDER REQUEST ANSWER. The request has `texts`, `questions` (lists of turns), `image` and `new`; the
answer is a .npz with the ids of each text, and ids, logits and greedy tokens of each question about the image.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration


def messages(turns: list[list[str]], image: str) -> list[dict[str, Any]]:
    """Messages of the turns, of which the last has no answer; the first one shows the image."""
    result: list[dict[str, Any]] = []
    for question, *answer in turns:
        shown = [{"type": "image", "path": image}] if not result else []
        result.append({"role": "user", "content": [*shown, {"type": "text", "text": question}]})
        result += [{"role": "assistant", "content": [{"type": "text", "text": text}]} for text in answer]
    return result


def main(folder: str, request: dict[str, Any], answer: str) -> None:
    tokenizer, processor = AutoTokenizer.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder).float().eval()
    # 4.51's LlavaImageProcessor (padded images) does not take the nested list that `apply_chat_template` makes
    broken = transformers.__version__ < "4.52" and "Llava" in type(processor.image_processor).__name__
    arrays = {f"text{k}": tokenizer(text)["input_ids"] for k, text in enumerate(request["texts"])}
    for k, turns in enumerate(request["questions"]):
        asked = messages(turns, request["image"])
        prompt = processor.apply_chat_template(asked, add_generation_prompt=True)
        batch = processor(images=Image.open(request["image"]), text=prompt, return_tensors="pt")
        if not broken:
            options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
            at_once = processor.apply_chat_template(asked, **options)
            assert np.array(at_once["input_ids"]).reshape(-1).tolist() == batch["input_ids"][0].tolist()
        with torch.no_grad():
            logits = model(**batch).logits[0]
            greedy = model.generate(**batch, max_new_tokens=request["new"])[0, len(logits) :]
        arrays |= {f"ids{k}": batch["input_ids"][0], f"logits{k}": logits, f"greedy{k}": greedy}
    np.savez(answer, version=transformers.__version__, **{name: np.asarray(value) for name, value in arrays.items()})


if __name__ == "__main__":
    main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), sys.argv[3])
