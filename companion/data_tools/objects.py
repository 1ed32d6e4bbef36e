"""Objects that a text names: known categories, their plurals and everyday words for them; what is denied is marked.

Words are compared, no model is asked, so a set of millions of words takes seconds and gives the same everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from companion.data_tools.phrases import TOKENS, word_class

SYNONYMS = {
    "person": "man woman boy girl child kid baby toddler guy lady gentleman player rider skier surfer skateboarder",
    "airplane": "plane jet aircraft aeroplane airliner",
    "bicycle": "bike",
    "bird": "seagull gull pigeon duck parrot",
    "boat": "ship sailboat canoe kayak",
    "car": "automobile",
    "cat": "kitten kitty",
    "cell phone": "cellphone smartphone phone",
    "couch": "sofa",
    "cow": "cattle calf",
    "cup": "mug",
    "dining table": "table",
    "dog": "puppy",
    "donut": "doughnut",
    "fire hydrant": "hydrant",
    "hair drier": "hair_dryer",
    "handbag": "purse",
    "horse": "pony",
    "motorcycle": "motorbike",
    "potted plant": "plant houseplant",
    "refrigerator": "fridge",
    "sheep": "lamb",
    "skis": "ski",
    "sports ball": "ball basketball football",
    "teddy bear": "stuffed_bear",
    "tennis racket": "racket racquet tennis_racquet",
    "traffic light": "stoplight traffic_signal",
    "tv": "television",
}
"""Everyday words for COCO's categories, `_` for a space; our own list. A word that is a category itself stays one."""

IRREGULAR = {
    "person": "people", "man": "men", "woman": "women", "gentleman": "gentlemen", "child": "children",
    "mouse": "mice", "goose": "geese", "knife": "knives", "leaf": "leaves", "calf": "calves", "wolf": "wolves",
    "sheep": "sheep", "fish": "fish", "aircraft": "aircraft", "cattle": "cattle",
    "scissors": "scissors", "skis": "skis",
}  # fmt: skip


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# adjectives or verbs as often as nouns, and people in general ("rides for people who"): these are counted only where
# a noun phrase with a determiner or a number ends with them
AMBIGUOUS = _words("bear book fish orange people plant remote ship sink ski tie train")
NEGATIONS = _words("no not without never neither nor none nothing cannot lack lacks lacking absent")
TURNS = _words("but however although though while whereas instead only except rather . ! ? ;")  # where a denial ends


def plural(noun: str) -> str:
    """Return the plural of a noun; of several words the last one changes."""
    head, space, last = noun.rpartition(" ")
    if last in IRREGULAR:
        last = IRREGULAR[last]
    elif last.endswith("y") and last[-2:-1] not in tuple("aeiou"):
        last = f"{last[:-1]}ies"
    else:
        last += "es" if last.endswith(("s", "x", "z", "ch", "sh")) else "s"
    return head + space + last


@dataclass(frozen=True)
class Mention:
    """A category that a text names: the category, the words that name it, and whether the sentence denies it."""

    category: str
    words: str
    denied: bool


class Vocabulary:
    """The categories that are looked for.

    Args:
        categories: their names, such as those of an annotation file's boxes.
    """

    def __init__(self, categories: Iterable[str]) -> None:
        names = sorted(set(categories))
        self.forms: dict[tuple[str, ...], str] = {}
        for name in names:  # names before synonyms: a word that is a category is no other one's synonym
            self._add(name, name)
        for name in names:
            for word in SYNONYMS.get(name.lower(), "").split():
                self._add(word.replace("_", " "), name)
        self.longest = max((len(form) for form in self.forms), default=0)

    def _add(self, word: str, category: str) -> None:
        for form in (word.lower(), plural(word.lower())):
            self.forms.setdefault(tuple(form.split()), category)

    def mentions(self, text: str, lenient: bool = False) -> Iterator[Mention]:
        """Find the categories that a text names, in order.

        The longest name counts ("teddy bear" is no bear), and of two names in a row the second ("dog bed" is a bed).
        What stands behind "no", "not", "without" and the like in a sentence is denied, until a "but" or its like; a
        leading "No," or "No." denies nothing by itself, since it answers a question.

        Args:
            text: one or more sentences.
            lenient: count every word that may name a category, also where it more probably does not.
        """
        words = [word.lower().removesuffix("'s").removesuffix("’s") for word in TOKENS.findall(text)]
        denied, position = False, 0
        while position < len(words):
            word = words[position]
            if word in TURNS:
                denied = False
            elif word in NEGATIONS or word.endswith(("n't", "n’t")):
                denied = denied or position > 0 or words[1:2] not in ([","], ["."], [])
            length = self._length(words, position)
            behind = position + length
            if length and (lenient or self._is_object(words, position, behind)):
                name = tuple(words[position:behind])
                yield Mention(self.forms[name], " ".join(name), denied)
            position = behind if length else position + 1

    def named(self, text: str) -> set[str]:
        """Return the categories that a text may name, denied or not."""
        return {mention.category for mention in self.mentions(text, lenient=True)}

    def _length(self, words: list[str], start: int) -> int:
        """How many words from here on are a name; 0 for none."""
        sizes = range(min(self.longest, len(words) - start), 0, -1)
        return next((size for size in sizes if tuple(words[start : start + size]) in self.forms), 0)

    def _is_object(self, words: list[str], start: int, end: int) -> bool:
        if self._length(words, end):
            return False
        if end - start > 1 or words[start] not in AMBIGUOUS:
            return True
        first = start - 1
        while first >= 0 and word_class(words[first]) == "n":
            first -= 1
        # "an orange and white bus" has no orange in it
        after = words[end + 1 : end + 2] if words[end : end + 1] in (["and"], ["or"]) else words[end : end + 1]
        return first >= 0 and word_class(words[first]) in "d#" and (not after or word_class(after[0]) not in "n#")


def unsupported(vocabulary: Vocabulary, question: str, answer: str, supported: set[str]) -> dict[str, str]:
    """Find objects that an answer names although neither captions nor boxes of the image do.

    Not counted are objects that the answer denies, and, where the answer is a no, those that the question asks about.

    Args:
        vocabulary: the categories.
        question: what was asked.
        answer: what was answered.
        supported: the categories of the image's boxes, and those that its captions name.

    Returns:
        Category -> the words that name it.
    """
    found = {m.category: m.words for m in vocabulary.mentions(answer) if not m.denied and m.category not in supported}
    if found and TOKENS.findall(answer.lower())[:1] == ["no"]:
        asked = vocabulary.named(question)
        return {category: words for category, words in found.items() if category not in asked}
    return found
