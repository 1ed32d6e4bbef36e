"""Replies of the offline teacher about real photographs, from captions and boxes as COCO has them.

No language model: known nouns, colors, numbers, places and actions are matched, a fact needs enough annotators that
agree, and sentences are assembled from facts. Vocabulary and common knowledge are in `everyday.yaml`.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from companion.miniature.language import NUMBERS, QA, listing, number_word, plural, sentence, with_article

Box = tuple[float, float, float, float]

_DATA: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


def _words(text: str) -> list[str]:
    return text.split(", ")


KIND = {name: kind for kind, names in _DATA["kinds"].items() for name in _words(names)}
_SYNONYMS: dict[str, str] = _DATA["synonyms"]
_IRREGULAR: dict[str, str] = _DATA["irregular_plurals"]
_MEASURE: dict[str, str] = _DATA["measures"]


def many(noun: str) -> str:
    return _IRREGULAR.get(noun) or plural(noun)


def counted(n: int, noun: str) -> str:
    """ "a dog", "two dogs", "a pair of skis", "three pairs of skis"."""
    if measure := _MEASURE.get(noun):
        return f"{with_article(measure) if n == 1 else f'{number_word(n)} {plural(measure)}'} of {noun}"
    return with_article(noun) if n == 1 else f"{number_word(n)} {many(noun)}"


def _surfaces() -> dict[str, tuple[str, str, bool]]:
    """Written form -> (name, singular word, whether it is a plural)."""
    found: dict[str, tuple[str, str, bool]] = {}
    for name in KIND:
        synonyms = _words(_SYNONYMS[name]) if name in _SYNONYMS else []
        for word in [name, *synonyms]:
            found[many(word)] = (name, word, True)
            if word not in ("orange", *_MEASURE):  # in the singular it is a color more often than a fruit
                found[word] = (name, word, False)
    return found


_SURFACES = _surfaces()


def either(words: Iterable[str]) -> str:
    return "(?:" + "|".join(sorted(map(re.escape, words), key=len, reverse=True)) + ")"


_NOUN = either(_SURFACES)
_COLOR = either(_words(_DATA["colors"]))
_ADJECTIVE = either([*_words(_DATA["adjectives"]), *_words(_DATA["colors"]), "and"])
_NUMBER = {word: k for k, word in enumerate(NUMBERS) if k}
_SOME = "|".join(_words(_DATA["quantifiers"]))
_DETERMINER = rf"(?:(?P<number>{either(_NUMBER)})|(?P<some>{_SOME})|an?|the)"
_HEADS = either(_words(_DATA["heads"]))
_PLACES = {word: with_article(word) for word in _words(_DATA["places"])}
_PLACES |= {"woods": "a forest", "mountain": "the mountains", "mountains": "the mountains", "ocean": "the ocean"}
_PLACE_PREPOSITION = {
    place: preposition for preposition, places in _DATA["place_prepositions"].items() for place in _words(places)
}
_ACTION = either(_words(_DATA["actions"]))
_STATE = "|".join(_words(_DATA["states"]))
_PREPOSITION = "|".join(_words(_DATA["prepositions"]))
_VAGUE = re.compile(r"\b(it|its|it's|him|her|his|them|their|each other|one another|others?|top of it|background)\b")
_TECHNICAL = re.compile(
    r"\b(photos?|photographs?|pictures?|pictured|images?|captions?|close ?up|view|shown|displayed)\b"
)
_END = re.compile(
    r"\s*(?:[,.;:]| while | that | which | who | because | as | and (?:is|are|has|\w+ing|\w+s)\b| \w+'s ).*"
)
_FINITE = re.compile(
    r"\b(is|are|was|has|have|does|there's|sits|stands|lays|lies|walks|rides|holds|wears|eats|looks|flies|grazes|watches|"
    r"poses|glances?|splashes|follows|rests|plays|includes|surrounds|overlooks|takes|stares)\b|"
    r"(s|people|men|women|children|couple) (sit|stand|lay|lie|walk|ride|hold|wear|eat|look|fly|graze|watch|pose|rest)\b"
)


@dataclass(frozen=True)
class PhotoObjects:
    """The objects of one category in a photograph.

    name: COCO's category, or a further known noun. word: the singular that captions use most. mentions: number of
    captions that name it. plural: whether most of these use the plural. count: number of boxes, or the number that
    captions agree on. color: e.g. `brown and white`. boxes: one per object, empty where there are none.
    """

    name: str
    word: str
    mentions: int
    plural: bool
    count: int | None
    color: str | None
    boxes: tuple[Box, ...]

    @property
    def the(self) -> str:
        """ "the dog is" or "the dogs are"."""
        return f"the {many(self.word)} are" if self.plural else f"the {self.word} is"

    @property
    def area(self) -> float:
        """Share of the image under its boxes, overlaps counted twice."""
        return sum((b[2] - b[0]) * (b[3] - b[1]) for b in self.boxes)


def tidy(caption: str) -> str:
    """A caption's first sentence without capitals and end mark, some common errors corrected."""
    text = re.split(r"\. (?=[A-Z])", " ".join(caption.split()))[0].rstrip(" .,;!")
    text = text.lower() if text.isupper() else text
    text = re.sub(r"\blaying\b(?= (on|in|down|next|near|under|beside|by|upside)\b)", "lying", text)
    text = re.sub(r"\b([Aa]) (?=[aeio]\w)(?!eu|one\b|once\b)", r"\1n ", re.sub(r"\b([Aa]n?) [Aa]n?\b", r"\1", text))
    return text if text[:2].isalpha() and text[:2].isupper() else text[:1].lower() + text[1:]


@dataclass(frozen=True)
class Photo:
    """Captions and boxes of a photograph, and what is extracted from them: objects, place, actions."""

    captions: tuple[str, ...]
    boxes: tuple[tuple[str, Box], ...] = ()

    @cached_property
    def texts(self) -> list[str]:
        return [tidy(caption) for caption in self.captions if caption.strip()]

    @cached_property
    def _plain(self) -> list[str]:
        return [re.sub(r"[^\w\s',.;/-]", " ", text.lower()) for text in self.texts]

    @cached_property
    def _nouns(self) -> list[list[re.Match[str]]]:
        matches = [list(re.finditer(rf"(?<![\w-]){_NOUN}(?![\w-])(?!'s)(?! {_HEADS}\b)", text)) for text in self._plain]
        return [
            [m for k, m in enumerate(row) if k + 1 == len(row) or row[k + 1].start() != m.end() + 1] for row in matches
        ]

    @cached_property
    def objects(self) -> list[PhotoObjects]:
        """All objects by category; those in most captions and with the largest boxes first."""
        boxes: dict[str, list[Box]] = {}
        for name, box in self.boxes:
            boxes.setdefault(name, []).append(box)
        words: dict[str, Counter[str]] = {}
        number: dict[str, Counter[bool]] = {}
        mentions: Counter[str] = Counter()
        for row in self._nouns:
            seen = [_SURFACES[m[0]] for m in row]
            mentions.update({name for name, _, _ in seen})
            for name, word, is_plural in seen:
                words.setdefault(name, Counter())[word] += 1
                number.setdefault(name, Counter())[is_plural] += 1
        objects = []
        for name in dict.fromkeys([*mentions, *boxes]):
            word = words[name].most_common(1)[0][0] if name in words else name
            if name == "person" and name in words and len(words[name]) > 1 and words[name][word] < 2:
                word = "person"  # annotators write a man, a boy, a guy: no two agree
            where = tuple(boxes.get(name, ()))
            count = len(where) if where else self._count(name, word, mentions[name])
            seen_as = number.get(name, Counter({bool(count and count > 1): 1}))
            several = seen_as[True] > seen_as[False] or bool(count and count > 1 and not where)
            objects.append(PhotoObjects(name, word, mentions[name], several, count, self._color(name), where))
        return sorted(objects, key=lambda t: (-min(t.mentions, 3), -t.area, -t.mentions, t.name))

    def _count(self, name: str, word: str, mentions: int) -> int | None:
        """The number in the captions, if they do not contradict; 1 for a single large object."""
        given: Counter[int] = Counter()
        several = False
        for text, row in zip(self._plain, self._nouns, strict=True):
            for noun in (
                m for m in row if _SURFACES[m[0]][0] == name and (name != "person" or _SURFACES[m[0]][1] == word)
            ):
                before = text[: noun.start()]
                if match := re.search(rf"\b({either(_NUMBER)}) (?:{_ADJECTIVE} ){{0,3}}$", before):
                    given[_NUMBER[match[1]]] += 1
                elif _SURFACES[noun[0]][2] or re.search(rf"\b(?:{_SOME}|two) (?:\w+ ){{0,2}}$", before):
                    several = True
        given.pop(1, None)
        if given:
            return next(iter(given)) if len(given) == 1 and mentions >= 2 else None
        large = KIND[name] == "animal" or name in ("train", "airplane", "bus", "toilet")
        return 1 if large and mentions >= 3 and not several else None

    def _color(self, name: str) -> str | None:
        """The color in the captions, if it is named at least twice as often as any other."""
        if name == "person" or any(re.search(r"black and white (photo|image|picture)", text) for text in self._plain):
            return None
        given: Counter[str] = Counter()
        for text, row in zip(self._plain, self._nouns, strict=True):
            for noun in (m for m in row if _SURFACES[m[0]][0] == name):
                chain = rf"\b({_COLOR}(?:(?:,| and|, and)? {_COLOR})*) (?:(?!and ){_ADJECTIVE} ){{0,2}}$"
                match = re.search(chain, text[: noun.start()])
                if match and not re.search(rf"{_COLOR} an? $", text[: match.start()]):
                    colors = [c.replace("grey", "gray") for c in re.findall(rf"\b{_COLOR}\b", match[1])]
                    given[listing(sorted(set(colors)))] += 1
        ranked = given.most_common(2)
        if not ranked or (len(ranked) > 1 and ranked[0][1] < 2 * ranked[1][1]):
            return None
        return ranked[0][0]

    @cached_property
    def confirmed(self) -> list[PhotoObjects]:
        return [t for t in self.objects if t.mentions >= min(2, len(self.texts))]

    @cached_property
    def place(self) -> str | None:
        """The place ("a beach"), if two captions name it."""
        votes: Counter[str] = Counter()
        pattern = rf"\b({either(_PLACES)})\b(?!-)(?! (?:{_NOUN}|{_HEADS}|sign|signs|light|lights|floor)\b)"
        for text in self._plain:
            votes.update({_PLACES[m[1]] for m in re.finditer(pattern, text)})
        best = votes.most_common(1)
        return best[0][0] if best and best[0][1] >= 2 else None

    @cached_property
    def statements(self) -> list[str]:
        """The captions as sentences; first those that name the objects of other captions, at medium length."""
        weight = {t.name: t.mentions for t in self.objects}

        def score(k: int) -> float:
            words = len(self.texts[k].split())
            names = {_SURFACES[m[0]][0] for m in self._nouns[k]}
            odd = bool(_TECHNICAL.search(self._plain[k])) + bool(re.search(r"\d|\b(this|these|they)\b", self._plain[k]))
            bare = not re.match(rf"{_DETERMINER}\b|there\b|people\b|\w+s\b", self._plain[k])
            loose = not re.search(rf"\b(?:{_PREPOSITION}|with|of|\w+ing)\b", self._plain[k])
            length = min(words, 14) / 4 - max(0, words - 18) - 6 * (words < 5)
            return sum(weight[n] for n in names) + length - 8 * odd - 4 * bare - 8 * loose

        order = sorted((k for k in range(len(self.texts)) if score(k) > -4), key=lambda k: (-score(k), k))
        return [_statement(self.texts[k]) for k in order or range(min(1, len(self.texts)))] or ["The image is empty."]

    def actions(self) -> list[QA]:
        """Questions about the actions of the captions' subjects, one per subject."""
        pattern = re.compile(
            rf"^(?:{_DETERMINER} )?(?:{_ADJECTIVE} ){{0,3}}(?P<noun>{_NOUN})(?: that| who)?(?P<be> is| are)? "
            rf"(?P<action>{_ACTION})\b(?P<tail>.*)$"
        )
        objects = {t.name: t for t in self.confirmed if KIND[t.name] in ("person", "animal")}
        result: dict[str, QA] = {}
        for text in sorted(self.texts, key=lambda t: abs(len(t.split()) - 10)):
            m = pattern.match(text.lower())
            name, word, is_plural = _SURFACES[m["noun"]] if m else ("", "", False)
            tail = _END.sub("", m["tail"]) if m else ""
            broken = re.search(rf"{_TECHNICAL.pattern}|{_FINITE.pattern}| (an?|the|of|to|with|and|on)$", tail)
            if not m or name not in objects or name in result or broken or len(tail.split()) > 12:
                continue
            if name != "person":
                word = objects[name].word
            elif sum(bool(re.search(rf"\b{m['noun']}\b", text)) for text in self._plain) < 2:
                word = "person"  # only one annotator says that it is a man, a girl, ...
            several = is_plural or bool(m["some"]) or _NUMBER.get(m["number"] or "", 1) > 1 or m["be"] == " are"
            be, who = ("are", f"the {many(word)}") if several else ("is", f"the {word}")
            doing = m["action"] if m["action"] in ("wearing", "holding") and tail else "doing"
            answer = sentence(f"{who} {be} {m['action']}{tail}")
            result[name] = QA(f"What {be} {who} {doing}?", answer, "action")
        return list(result.values())

    def places_of(self) -> list[QA]:
        """Questions about positions, answered with a caption's words."""
        objects = {t.name: t for t in self.confirmed if t.name != "person"}
        result: dict[str, QA] = {}
        for text, row in zip(self._plain, self._nouns, strict=True):
            for noun in row:
                item = objects.get(_SURFACES[noun[0]][0])
                after = rf"(?P<that> that (?:is|are))?(?: (?:is|are))?(?: (?:{_STATE}))? (?P<where>(?:{_PREPOSITION}) "
                m = re.match(after + r"(?:an?|the|some|two) .+)$", text[noun.end() :])
                # subjects only: "a cup sits on a table next to a book" does not place the table
                if not item or not m or (re.search(rf"\b{_PREPOSITION}\b", text[: noun.start()]) and not m["that"]):
                    continue
                phrase = re.sub(rf" (topped|filled|covered with|and|with|{_ACTION})\b.*", "", _END.sub("", m["where"]))
                if len(phrase.split()) in range(3, 10) and not (_VAGUE.search(phrase) or _TECHNICAL.search(phrase)):
                    who, be = item.the.rsplit(" ", 1)
                    result.setdefault(item.name, QA(f"Where {be} {who}?", sentence(f"{who} {be} {phrase}"), "position"))
        return list(result.values())


def _statement(text: str) -> str:
    main = re.split(r"\b(?:that|who|which|with|while|as)\b", text.lower())[0]
    return sentence(text if _FINITE.search(main) else f"the image shows {text}")


_TURNS = 6
_CONSPICUOUS = _words(_DATA["conspicuous"])


def conversation(photo: Photo, rng: random.Random) -> list[QA]:
    """Questions with certain answers, then one that needs common knowledge; never empty."""
    pool = []
    for item in photo.confirmed:
        if item.color:
            be, name = ("are", many(item.word)) if item.plural else ("is", item.word)
            pool.append(QA(f"What color {be} the {name}?", sentence(f"{item.the} {item.color}"), "color"))
        if item.count:
            there = f"there {'is one' if item.count == 1 else f'are {number_word(item.count)}'}"
            name = item.word if item.count == 1 else many(item.word)
            pool.append(QA(f"How many {many(item.word)} are there?", sentence(f"{there} {name}"), "count"))
    kinds = {KIND[t.name] for t in photo.objects}
    traffic = {"vehicle", "street"} & kinds or photo.place in ("a street", "a city street", "a road", "an airport")
    rules_out = kinds | ({"vehicle"} if traffic else set())
    absent = [name for name in _CONSPICUOUS if KIND[name] not in rules_out]
    for name in rng.sample(absent, min(2, len(absent))):
        a = with_article(name)
        pool.append(QA(f"Is there {a} in the image?", f"No, there is no {name} in the image.", "presence"))
    if photo.confirmed:
        item = rng.choice(photo.confirmed[:3])
        is_, a = ("Are", many(item.word)) if item.plural else ("Is", counted(1, item.word))
        answer = f"Yes, there {is_.lower()} {a} in the image."
        pool.append(QA(f"{is_} there {'any ' if item.plural else ''}{a} in the image?", answer, "presence"))
    if photo.place:
        pool.append(QA("What kind of place does the image show?", f"The image shows {photo.place}.", "background"))
    pool += photo.actions() + photo.places_of()
    rng.shuffle(pool)
    chosen: list[QA] = []
    kinds_asked = Counter[str]()
    while pool and len(chosen) < _TURNS:  # every kind of question once before any repeats
        chosen.append(min(pool, key=lambda q: kinds_asked[q.kind]))
        kinds_asked[chosen[-1].kind] += 1
        pool.remove(chosen[-1])
    if len(chosen) < 3:
        chosen.insert(0, QA("What can be seen in the image?", photo.statements[0], "description"))
    return [*chosen, reasoning(photo)]


def _side(boxes: Sequence[Box]) -> list[str]:
    centers = [(b[0] + b[2]) / 2 for b in boxes]
    return ["on the left" if x < 0.37 else "on the right" if x > 0.63 else "in the middle" for x in centers]


def _whereabouts(item: PhotoObjects) -> str:
    """One sentence with count and position of the objects of a category."""
    n, sides = len(item.boxes), Counter(_side(item.boxes))
    order = [side for side in ("on the left", "in the middle", "on the right") if sides[side]]
    word = item.word if n == 1 and item.mentions > 1 else item.name
    if n == 1 and item.area > 0.5:
        return f"The {word} takes up most of the image."
    if n == 1:
        pair = word in _MEASURE
        return (
            f"The {word} is {order[0]}." if item.mentions and not pair else f"There is {counted(1, word)} {order[0]}."
        )
    if n >= 10:
        across = order[0] if len(order) == 1 else "across the image"
        return f"There are at least {counted(10, word)} {across}."
    if len(order) == 1:
        return f"There are {counted(n, word)}, {'both' if n == 2 else 'all'} {order[0]}."
    shares = [f"{number_word(sides[side])} {side}" for side in order]
    return f"There are {counted(n, word)}: {listing(shares)}."


def detail(photo: Photo) -> str:
    """A description: a caption, count and position of each category, relations between objects, colors."""
    first = photo.statements[0]
    known = set(re.findall(r"\w+", first.lower()))
    new = [len(set(re.findall(r"\w{4,}", s.lower())) - known) for s in photo.statements[1:]]
    opening = [first]
    good = [
        s for s, n in zip(photo.statements[1:], new, strict=True) if n >= 2 and not _TECHNICAL.search(s[16:].lower())
    ]
    if good:
        opening.append(re.sub(r"^The image shows ", "The image also shows ", good[0]))
    boxed = sorted((t for t in photo.objects if t.boxes), key=lambda t: -t.area)
    body = [_whereabouts(t) for t in boxed[:6]]
    if boxed[6:]:
        body.append(
            f"There {'is' if len(boxed[6].boxes) == 1 else 'are'} also "
            f"{listing([counted(len(t.boxes), t.name) for t in boxed[6:]])} to be seen."
        )
    body += relations(photo)[:2]
    colors = [
        sentence(f"{t.the} {t.color}")
        for t in photo.confirmed
        if t.color and t.color not in " ".join(opening) and t.plural == (len(t.boxes) > 1)
    ]
    if photo.place and photo.place.split()[-1] not in " ".join(opening):
        colors.append(f"The scene is set {_PLACE_PREPOSITION.get(photo.place.split()[-1], 'in')} {photo.place}.")
    return "\n\n".join(" ".join(part) for part in (opening, body, colors) if part)


def relations(photo: Photo) -> list[str]:
    """ "The dog is to the left of the chair." for single objects with separate boxes."""
    single = sorted((t for t in photo.objects if len(t.boxes) == 1 and t.word not in _MEASURE), key=lambda t: -t.area)[
        :4
    ]
    sentences = []
    for k, a in enumerate(single):
        for b in single[k + 1 :]:
            if a.boxes[0][2] <= b.boxes[0][0] + 0.02 or b.boxes[0][2] <= a.boxes[0][0] + 0.02:
                side = "left" if a.boxes[0][0] < b.boxes[0][0] else "right"
                sentences.append(f"The {a.word} is to the {side} of the {b.word}.")
    return sentences


def reasoning(photo: Photo) -> QA:
    """A question about the most prominent object without its name; the answer is a caption and common knowledge."""
    objects = [t for t in photo.objects if t.mentions > 1 or t.boxes]
    names = [*(t.name for t in sorted(objects, key=lambda t: t.name == "person")), "-"]  # a person is the last choice
    entries = _DATA["knowledge"]
    name, entry = next((n, e) for n in names for e in entries if n in _words(e["things"]))
    several = many(name)
    text = entry["answer"].format(many=several, Many=several[:1].upper() + several[1:])
    return QA(entry["question"], f"{photo.statements[0]} {text}", "reasoning")
