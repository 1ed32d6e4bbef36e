"""Prompts of the teacher: system message, few-shot examples, and the query image as captions and boxes.

The file format is that of the released prompts, which can be loaded instead of ours in `prompt_texts/`.

Source: paper Section 3, Tables 13-16; playground/data/prompts of haotian-liu/LLaVA; issue #87 there (no boxes in
conversations).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from companion.data_tools.expansion import DETAIL_INSTRUCTIONS
from companion.teacher.chat import Message
from llava_core.registry import unknown
from llava_core.runtime import ConfigError, DataError, display_path, fingerprint

FOLDERS = {"conversation": "conversation", "detail": "detail_description", "complex": "complex_reasoning"}
KINDS = tuple(FOLDERS)
KINDS_WITH_BOXES = ("detail", "complex")

DETAIL_QUESTIONS = DETAIL_INSTRUCTIONS
"""Sixteen instructions for a detailed description, as many as in Table 12; one is drawn per record. The released data
mostly use others: the thirty of LLaVA-Bench (COCO) have eleven wordings, one of them of Table 12."""


@dataclass(frozen=True)
class Prompt:
    """System message and few-shot examples of one kind, each example (context, reply)."""

    system: str
    examples: tuple[tuple[str, str], ...]

    @property
    def version(self) -> str:
        """Fingerprint of the texts, stored in every record that was generated with them."""
        return fingerprint([self.system, self.examples])


def context_text(captions: Sequence[str], boxes: Sequence[tuple[str, Sequence[float]]] = ()) -> str:
    """Return captions, an empty line and boxes (category, (x1, y1, x2, y2) from 0 to 1) as text, one per line."""
    lines = [" ".join(caption.split()) for caption in captions]
    if boxes:
        lines += ["", *(f"{category}: {[round(float(x), 3) for x in box]}" for category, box in boxes)]
    return "\n".join(lines)


def build_messages(kind: str, context: str, prompts: Mapping[str, Prompt] | None = None) -> list[Message]:
    """Return system message, examples as earlier turns, and context as a chat; ConfigError for an unknown kind."""
    prompts = PROMPTS if prompts is None else prompts
    if kind not in prompts:
        raise ConfigError(unknown("kind of instruction data", kind, prompts))
    messages = [{"role": "system", "content": prompts[kind].system}]
    for question, answer in prompts[kind].examples:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": context}]


def load_prompt_folder(path: str | Path) -> Prompt:
    """Load `system_message.txt` and pairs `NNN_caps.txt`, `NNN_conv.txt`; DataError if one is missing or empty."""
    folder = Path(path)
    names = sorted(file.name for file in folder.glob("*.txt")) if folder.is_dir() else []
    numbers = sorted({match[1] for name in names if (match := re.fullmatch(r"(\d+)_(caps|conv)\.txt", name))})

    def text(name: str) -> str:
        try:
            content = (folder / name).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"{display_path(folder / name)}: {error}; a folder of prompts holds system_message.txt and pairs "
                "NNN_caps.txt, NNN_conv.txt"
            ) from error
        if not content:
            raise DataError(f"{display_path(folder / name)}: is empty; write it or remove its pair")
        return content

    system = text("system_message.txt")
    return Prompt(system, tuple((text(f"{n}_caps.txt"), text(f"{n}_conv.txt")) for n in numbers))


def load_prompts(path: str | Path) -> dict[str, Prompt]:
    """Load all three kinds from a folder of the released folders (`conversation`, `detail_description`, ...)."""
    return {kind: load_prompt_folder(Path(path) / folder) for kind, folder in FOLDERS.items()}


PROMPTS = load_prompts(Path(__file__).parent / "prompt_texts")
"""The prompts of this project by kind, with as many few-shot examples as the paper used: 2, 3 and 3."""
