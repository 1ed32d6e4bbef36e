"""What the teacher is told: system message, worked examples, and the query image as captions and boxes.

The three kinds and the layout are the paper's, the wording and the examples are ours; the released folders of prompts
can be loaded instead. Conversations are written from the captions alone, the other two kinds from captions and boxes.

Source: paper Section 3, Tables 13-16; playground/data/prompts of haotian-liu/LLaVA; issue #87 there (no boxes in
conversations).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from companion.teacher.client import Message
from llava_core.constants import DETAIL_INSTRUCTIONS
from llava_core.registry import unknown
from llava_core.runtime import ConfigError, DataError, fingerprint, shown

FOLDERS = {"conversation": "conversation", "detail": "detail_description", "complex": "complex_reasoning"}
KINDS = tuple(FOLDERS)
KINDS_WITH_BOXES = ("detail", "complex")

DETAIL_QUESTIONS = DETAIL_INSTRUCTIONS
"""Sixteen ways to ask for a description, drawn per record: as many as Table 12 has, and the list of `data.expansion`.

The released descriptions mostly ask otherwise: the thirty of LLaVA-Bench (COCO) have eleven wordings, one of them of
Table 12. `generate(detail_questions=...)` takes any other list."""


@dataclass(frozen=True)
class Prompt:
    """A kind's system message and its worked examples, (context, reply) each."""

    system: str
    examples: tuple[tuple[str, str], ...]

    @property
    def version(self) -> str:
        """Fingerprint of the wording, stored with every record that was made with it."""
        return fingerprint([self.system, self.examples])


def context_text(captions: Sequence[str], boxes: Sequence[tuple[str, Sequence[float]]] = ()) -> str:
    """Write an image as the teacher reads it.

    Args:
        captions: one sentence per annotator.
        boxes: (category, (x1, y1, x2, y2)), corners from 0 to 1; none for conversations.

    Returns:
        A caption per line; with boxes an empty line, then `category: [x1, y1, x2, y2]` per object, to 3 decimals.
    """
    lines = [" ".join(caption.split()) for caption in captions]
    if boxes:
        lines += ["", *(f"{category}: {[round(float(x), 3) for x in box]}" for category, box in boxes)]
    return "\n".join(lines)


def build_messages(kind: str, context: str, prompts: Mapping[str, Prompt] | None = None) -> list[Message]:
    """Return the chat for one image: system message, examples as past turns, the context as the last user message.

    Args:
        kind: one of `KINDS`.
        context: what `context_text` wrote.
        prompts: by kind, e.g. from `load_prompts`; ours when None.

    Raises:
        ConfigError: unknown kind.
    """
    prompts = PROMPTS if prompts is None else prompts
    if kind not in prompts:
        raise ConfigError(unknown("kind of instruction data", kind, prompts))
    messages = [{"role": "system", "content": prompts[kind].system}]
    for question, answer in prompts[kind].examples:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": context}]


def load_prompt_folder(path: str | Path) -> Prompt:
    """Load one kind's prompt in the released layout.

    Args:
        path: folder with `system_message.txt` and pairs `NNN_caps.txt` (context), `NNN_conv.txt` (reply).

    Raises:
        DataError: a file is missing, empty or no UTF-8 text.
    """
    folder = Path(path)
    names = sorted(file.name for file in folder.glob("*.txt")) if folder.is_dir() else []
    numbers = sorted({found[1] for name in names if (found := re.fullmatch(r"(\d+)_(caps|conv)\.txt", name))})

    def text(name: str) -> str:
        try:
            content = (folder / name).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"{shown(folder / name)}: {error}; a folder of prompts holds system_message.txt and pairs "
                "NNN_caps.txt, NNN_conv.txt"
            ) from error
        if not content:
            raise DataError(f"{shown(folder / name)}: is empty; write it or remove its pair")
        return content

    system = text("system_message.txt")
    return Prompt(system, tuple((text(f"{n}_caps.txt"), text(f"{n}_conv.txt")) for n in numbers))


def load_prompts(path: str | Path) -> dict[str, Prompt]:
    """Load all three kinds from a folder of the released folders (`conversation`, `detail_description`, ...)."""
    return {kind: load_prompt_folder(Path(path) / folder) for kind, folder in FOLDERS.items()}


# ------------------------------------------------------------------------------------------------ our wording

_BOXES = (
    "You get several sentences in which different people describe one photograph, and below them a list of the things "
    "in it. Each line of the list names a thing and gives four numbers: left, top, right and bottom edge of the "
    "rectangle around it, from 0 (left or top edge of the photograph) to 1 (right or bottom edge)."
)
_WITNESS = (
    "Put the numbers into words: how many there are, where each thing is, what stands beside, before or behind what. "
    "Say nothing that the sentences and the list do not support. Write as somebody who has the photograph before their "
    "eyes: never speak of sentences, lists, rectangles or numbers that you were given."
)
_SYSTEM = {
    "conversation": (
        "You get several sentences in which different people describe one photograph. Talk as somebody who has the "
        "photograph before their eyes, and never speak of the sentences.\n\n"
        "Write a conversation in which a curious person asks about the photograph and you reply. Vary the topics: "
        "which things there are and how many, their colors, where they are and how they lie to each other, what people "
        "and animals do, the surroundings. Ask only what has one sure answer: either it can plainly be seen, or it is "
        "plain that the thing asked for is not there. Leave out whatever would be a guess.\n\n"
        "Near the end, ask one or two questions that need knowledge or thought about what is seen, and answer these at "
        "length, with reasons and examples.\n\n"
        "Write a line `Question:`, below it the question, a line `===`, a line `Answer:`, below it the answer, again a "
        "line `===`, and so on until the last answer."
    ),
    "detail": (
        f"{_BOXES}\n\nDescribe the photograph in detail, in one or more paragraphs of running text, from what matters "
        f"most to what matters least. {_WITNESS}"
    ),
    "complex": (
        f"{_BOXES}\n\nThink of one question about the photograph that takes reasoning: why something is as it is, what "
        "may come next, what somebody there should know or do. The question must not tell what is to be seen, so that "
        "whoever answers has to look first and think afterwards. Then answer it thoroughly: what is seen, what is "
        f"known about such things, what follows. {_WITNESS}\n\n"
        "Write a line `Question:`, below it the question, a line `===`, a line `Answer:`, below it the answer."
    ),
}
_HARBOR = (
    (
        "Two fishermen mend a net on the pier.",
        "A man in a yellow coat and another man sit on crates beside a green net.",
        "Fishing boats lie in a small harbor behind two men.",
        "Men repairing a fishing net near their boats.",
        "A white gull watches two men at work on a quay.",
    ),
    (
        ("person", (0.182, 0.41, 0.334, 0.872)),
        ("person", (0.46, 0.43, 0.607, 0.881)),
        ("boat", (0.02, 0.2, 0.41, 0.47)),
        ("boat", (0.52, 0.22, 0.97, 0.5)),
        ("bird", (0.78, 0.61, 0.85, 0.7)),
    ),
)
_MARKET = (
    (
        "A woman sells vegetables at a market stall.",
        "A stall with baskets of tomatoes and peppers under a striped umbrella.",
        "An old woman in a blue apron weighs tomatoes for a customer.",
        "A customer waits with her bicycle at a vegetable stand.",
        "Fresh vegetables are on sale in a town square.",
    ),
    (
        ("person", (0.39, 0.28, 0.55, 0.76)),
        ("person", (0.66, 0.3, 0.8, 0.95)),
        ("bicycle", (0.7, 0.52, 0.98, 0.97)),
        ("umbrella", (0.2, 0.02, 0.74, 0.31)),
    ),
)
_TRAIL = (
    (
        "A hiker with a large backpack crosses a hanging bridge.",
        "A person walks over a narrow bridge above a river.",
        "A dog follows a hiker across a rope bridge.",
        "A hiker in a red jacket on a swaying bridge in the mountains.",
        "Someone and a brown dog on a footbridge over rapids.",
    ),
    (
        ("person", (0.44, 0.33, 0.54, 0.66)),
        ("backpack", (0.45, 0.37, 0.53, 0.52)),
        ("dog", (0.31, 0.53, 0.39, 0.66)),
    ),
)


def _dialogue(*turns: tuple[str, str]) -> str:
    return "\n===\n".join(f"Question:\n{question}\n===\nAnswer:\n{answer}" for question, answer in turns)


PROMPTS = {
    "conversation": Prompt(
        _SYSTEM["conversation"],
        (
            (
                context_text(_HARBOR[0]),
                _dialogue(
                    ("How many men are on the pier?", "There are two men on the pier."),
                    ("What are they doing?", "They are mending a fishing net."),
                    ("What color is the net?", "The net is green."),
                    ("What are the men sitting on?", "They are sitting on crates."),
                    ("Is there a dog beside them?", "No, there is no dog. The only animal there is a white gull."),
                    (
                        "Why is this work worth their time?",
                        "A net with holes lets fish escape, and every torn mesh grows under the weight of a catch. "
                        "Mending it by hand takes hours but costs far less than a new net. Doing it in the harbor, "
                        "next to the boats, also means that they can put to sea again as soon as they have finished.",
                    ),
                ),
            ),
            (
                context_text(_MARKET[0]),
                _dialogue(
                    ("What is sold at the stall?", "Vegetables are sold there, among them tomatoes and peppers."),
                    ("What is the old woman wearing?", "She is wearing a blue apron."),
                    ("What is above the stall?", "A striped umbrella is spread above the stall."),
                    ("Where does this take place?", "It takes place on a town square, where a market is held."),
                    ("Is there a car in the picture?", "No, there is no car to be seen."),
                    (
                        "What speaks for shopping at such a place?",
                        "Vegetables at a market have often been picked the same day and come from nearby, so that they "
                        "are fresh and in season. One can look at them, choose single pieces and have just the amount "
                        "weighed that is needed, which wastes less. It is also a place to talk: who grew the tomatoes "
                        "can tell how to keep and cook them.",
                    ),
                ),
            ),
        ),
    ),
    "detail": Prompt(
        _SYSTEM["detail"],
        (
            (
                context_text(*_HARBOR),
                "Two fishermen sit on crates on the pier of a small harbor and mend a green net that lies between "
                "them. One of them, on the left, wears a yellow coat; the other sits near the middle. Both are bent "
                "over their work.\n\nBehind them lie two fishing boats, one reaching to the left edge and one filling "
                "the right half of the background. At the right, a white gull stands on the quay and watches the men.",
            ),
            (
                context_text(*_MARKET),
                "On a town square, a large striped umbrella shades a market stall full of baskets with tomatoes and "
                "peppers. In the middle, under the umbrella, an old woman in a blue apron is weighing tomatoes. To her "
                "right a customer is waiting; she has brought a bicycle, which stands beside her at the right edge. "
                "The two women are turned to each other across the vegetables.",
            ),
            (
                context_text(*_TRAIL),
                "A hiker in a red jacket is walking across a narrow rope bridge that hangs over the rapids of a "
                "mountain river. The hiker is at the center and carries a large backpack. A few steps behind, a little "
                "to the left, a brown dog is following over the planks. Apart from the two, the bridge is empty, and "
                "the mountains rise around them.",
            ),
        ),
    ),
    "complex": Prompt(
        _SYSTEM["complex"],
        (
            (
                context_text(*_HARBOR),
                _dialogue(
                    (
                        "What will probably have to be finished here before anyone can earn money again?",
                        "The two fishermen on the pier have to finish mending their net. Both sit over the green net "
                        "while their two boats lie idle in the harbor behind them. Without a sound net the boats are "
                        "of little use, since the catch would slip out through the holes. Once the net is whole they "
                        "can load it, put to sea and sell what they bring home. The waiting gull seems to know that, "
                        "too: where nets are handled, scraps of fish are not far.",
                    )
                ),
            ),
            (
                context_text(*_MARKET),
                _dialogue(
                    (
                        "What should the customer think of before starting the way home?",
                        "The woman on the right has come by bicycle and is buying tomatoes and other vegetables from "
                        "the old woman at the stall. Ripe tomatoes bruise easily, so on a bicycle they should lie on "
                        "top of the firmer peppers, in a basket or a stiff bag and not on a handlebar, where they "
                        "would swing against the wheel. Heavy shopping also changes the balance of a bicycle; spread "
                        "over both sides, or pushed instead of ridden across the crowded square, it arrives whole.",
                    )
                ),
            ),
            (
                context_text(*_TRAIL),
                _dialogue(
                    (
                        "What makes this passage harder for the second one than for the first?",
                        "The one who walks ahead is a hiker, who knows how a bridge works and can hold on to its "
                        "ropes. The second one is a brown dog, a few steps behind. A dog has no hand to hold on with, "
                        "its paws may slip between the planks, and every step of the hiker makes the bridge swing "
                        "under it, while the rapids roar below. It helps that the hiker goes first and slowly: the dog "
                        "sees that the way is safe and follows.",
                    )
                ),
            ),
        ),
    ),
}
"""Our prompts by kind, with as many worked examples as the paper used: 2, 3 and 3."""
