"""Objects mentioned in a text, by comparing words without a model: category names, plurals and everyday words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from companion.data_tools.phrases import TOKENS, word_class

_WORDS = yaml.safe_load(Path(__file__).with_name("objects.yaml").read_text("utf-8"))
SYNONYMS: dict[str, str] = _WORDS["synonyms"]
IRREGULAR_PLURALS: dict[str, str] = _WORDS["irregular_plurals"]
AMBIGUOUS, NEGATIONS, NEGATION_ENDS = (
    frozenset(_WORDS[name].split()) for name in ("ambiguous", "negations", "negation_ends")
)


def plural(noun: str) -> str:
    """Plural of a noun; of several words the last one changes."""
    head, space, last = noun.rpartition(" ")
    if last in IRREGULAR_PLURALS:
        last = IRREGULAR_PLURALS[last]
    elif last.endswith("y") and last[-2:-1] not in tuple("aeiou"):
        last = f"{last[:-1]}ies"
    else:
        last += "es" if last.endswith(("s", "x", "z", "ch", "sh")) else "s"
    return head + space + last


@dataclass(frozen=True)
class Mention:
    category: str
    words: str
    negated: bool


class Vocabulary:
    """Categories, such as those of the boxes of an annotation file, and the words for them."""

    def __init__(self, categories: Iterable[str]) -> None:
        names = sorted(set(categories))
        self.forms: dict[tuple[str, ...], str] = {}
        for name in names:  # names before synonyms: a category name is no synonym of another category
            self._add(name, name)
        for name in names:
            for word in SYNONYMS.get(name.lower(), "").split():
                self._add(word.replace("_", " "), name)
        self.longest = max((len(form) for form in self.forms), default=0)

    def _add(self, word: str, category: str) -> None:
        for form in (word.lower(), plural(word.lower())):
            self.forms.setdefault(tuple(form.split()), category)

    def mentions(self, text: str, lenient: bool = False) -> Iterator[Mention]:
        """The mentions of categories in a text, in order.

        The longest name counts ("teddy bear" is no bear), and of two names in a row the second ("dog bed" is a bed).
        Mentions after "no", "not", "without" and the like are negated up to a "but" or the end of the sentence; a
        leading "No," or "No." answers a question and negates nothing. `lenient` counts every word that may name a
        category, even if another meaning is more likely.
        """
        words = [word.lower().removesuffix("'s").removesuffix("’s") for word in TOKENS.findall(text)]
        negated, position = False, 0
        while position < len(words):
            word = words[position]
            if word in NEGATION_ENDS:
                negated = False
            elif word in NEGATIONS or word.endswith(("n't", "n’t")):
                negated = negated or position > 0 or words[1:2] not in ([","], ["."], [])
            length = self._length(words, position)
            end = position + length
            if length and (lenient or self._is_object(words, position, end)):
                name = tuple(words[position:end])
                yield Mention(self.forms[name], " ".join(name), negated)
            position = end if length else position + 1

    def named(self, text: str) -> set[str]:
        """The categories that a text may name, negated or not."""
        return {mention.category for mention in self.mentions(text, lenient=True)}

    def _length(self, words: list[str], start: int) -> int:
        """Number of words of the name at a position; 0 for none."""
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
    """Category -> its words, of objects that an answer mentions and that are not among the `supported` categories.

    Negated mentions do not count, nor, if the answer is a no, those of the question.
    """
    result = {m.category: m.words for m in vocabulary.mentions(answer) if not m.negated and m.category not in supported}
    if result and TOKENS.findall(answer.lower())[:1] == ["no"]:
        asked = vocabulary.named(question)
        return {category: words for category, words in result.items() if category not in asked}
    return result
