"""What the offline teacher says of real photographs: it reads captions (and boxes) as COCO has them, and speaks plainly.

Nothing here understands language. Known nouns, colors, numbers, places and actions are looked for, a fact counts when enough
annotators agree on it, and sentences are put together from facts. What it does not find it does not say.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from llava_core.miniature.language import NUMBERS, QA, listing, number_word, plural, sentence, with_article

Box = tuple[float, float, float, float]

# ------------------------------------------------------------------------------------------------ words

_NAMES = {  # COCO's 80 categories, and further things that captions name; those after the bar have no boxes in COCO
    "person": "person",
    "vehicle": "bicycle, car, motorcycle, airplane, bus, train, truck, boat",
    "street": "traffic light, fire hydrant, stop sign, parking meter, bench | street sign, fence, building",
    "animal": "bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe",
    "accessory": "backpack, umbrella, handbag, tie, suitcase | hat, helmet",
    "sport": "frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, "
    "tennis racket",
    "kitchenware": "bottle, wine glass, cup, fork, knife, spoon, bowl | plate",
    "food": "banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake",
    "furniture": "chair, couch, potted plant, bed, dining table, toilet | desk, cabinet, mirror, lamp",
    "electronics": "tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator",
    "thing": "book, clock, vase, scissors, teddy bear, hair drier, toothbrush | tree",
}
KIND = {name.strip(): kind for kind, names in _NAMES.items() for name in re.split("[,|]", names)}
_OTHER_WORDS = {
    "person": "man, woman, boy, girl, child, kid, baby, guy, lady, skier, surfer, rider, player",
    "bicycle": "bike",
    "motorcycle": "motorbike, motor bike, scooter, moped",
    "airplane": "plane, jet, airliner",
    "boat": "ship, sailboat, yacht",
    "bird": "duck, goose, seagull, pigeon, parrot",
    "cat": "kitten",
    "dog": "puppy",
    "cow": "bull, calf",
    "couch": "sofa",
    "dining table": "table",
    "potted plant": "plant",
    "donut": "doughnut",
    "tv": "television",
    "cell phone": "phone, cellphone, smartphone",
    "refrigerator": "fridge",
    "remote": "controller, remote control",
    "suitcase": "bag",
    "skateboard": "skate board",
    "surfboard": "surf board, boogie board",
    "tennis racket": "racket, racquet",
    "sports ball": "ball, soccer ball, tennis ball",
    "cup": "mug",
    "laptop": "laptop computer",
    "keyboard": "computer keyboard",
}
_IRREGULAR = {"person": "people", "man": "men", "woman": "women", "child": "children", "knife": "knives", "mouse": "mice"}
_IRREGULAR |= {"sheep": "sheep", "skis": "skis", "scissors": "scissors", "broccoli": "broccoli", "goose": "geese"}
_IRREGULAR |= {"calf": "calves"}
_MEASURE = {"skis": "pair", "scissors": "pair", "broccoli": "piece"}


def many(noun: str) -> str:
    """The plural of a noun, in which irregular words are known."""
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
        others = _OTHER_WORDS.get(name, "").split(", ")
        for word in [name, *filter(None, others)]:
            found[many(word)] = (name, word, True)
            if word not in ("orange", *_MEASURE):  # in the singular it is a color more often than a fruit
                found[word] = (name, word, False)
    return found


_SURFACES = _surfaces()
_PERSON_WORDS = {"person", *_OTHER_WORDS["person"].split(", ")}


def _either(words: Iterable[str]) -> str:
    return "(?:" + "|".join(sorted(map(re.escape, words), key=len, reverse=True)) + ")"


_NOUN = _either(_SURFACES)
_COLORS = "red orange yellow green blue purple pink brown black white gray grey silver gold beige tan".split()
_COLOR = _either(_COLORS)
_ADJECTIVES = (
    "large small big little tiny tall long old older young younger adult elderly wooden metal leather plastic brick stone "
    "plush velvet city passenger double decker antique unique empty open closed wild baby fluffy adorable cute bright dark "
    "light round square parked male female full grown"
)
_ADJECTIVE = _either([*_ADJECTIVES.split(), *_COLORS, "and"])
_NUMBER = {word: k for k, word in enumerate(NUMBERS) if k}
_SOME = "several|some|many|a few|a group of|a couple of|a herd of|a bunch of|a pair of|a flock of|a crowd of|group of"
_DETERMINER = rf"(?:(?P<number>{_either(_NUMBER)})|(?P<some>{_SOME})|an?|the)"
# A noun before one of these only says what kind of thing the next word is: a dog bed, an apple tree, a train station.
_HEADS = _either(
    "bed bag bags board boards station stop tree trees track tracks park lot shelter house show shop store hat hats costume "
    "food bowl case box boxes cart holder stand rack race shirt cover wheel seat rider riders driver pole tower meter meters "
    "shaped mustache glove bat uniform field court frame paper side cream slices slice flavored patterned print toy".split()
)
_PLACES = {
    "beach": "a beach",
    "street": "a street",
    "city street": "a city street",
    "road": "a road",
    "sidewalk": "a sidewalk",
    "kitchen": "a kitchen",
    "bathroom": "a bathroom",
    "bedroom": "a bedroom",
    "living room": "a living room",
    "restaurant": "a restaurant",
    "bakery": "a bakery",
    "bar": "a bar",
    "lobby": "a lobby",
    "park": "a park",
    "field": "a field",
    "forest": "a forest",
    "woods": "a forest",
    "lake": "a lake",
    "river": "a river",
    "ocean": "the ocean",
    "mountain": "the mountains",
    "mountains": "the mountains",
    "slope": "a ski slope",
    "airport": "an airport",
    "harbor": "a harbor",
    "bridge": "a bridge",
    "zoo": "a zoo",
    "store": "a store",
    "station": "a station",
    "office": "an office",
    "farm": "a farm",
}
_ACTIONS = (
    "riding sitting standing walking running holding playing eating drinking lying laying flying talking wearing looking "
    "sleeping swimming surfing skiing grazing jumping cooking reading carrying pulling cutting brushing petting waiting "
    "resting working skating skateboarding smiling watching driving floating roaming wandering chewing leaning posing "
    "preparing throwing catching feeding staring crossing traveling touching pointing perched"
)
_ACTION = _either(_ACTIONS.split())
_STATE = "sitting|standing|parked|laying|lying|placed|sits|sit|stands|stand|lays|mounted|displayed|stacked|stuck|set up"
_PREPOSITION = (
    "on top of|in front of|next to|on the side of|in the middle of|on|in|inside of|inside|under|near|beside|by|behind|at|"
    "along|against|between"
)
_VAGUE = re.compile(r"\b(it|its|it's|him|her|his|them|their|each other|one another|others?|top of it|background)\b")
_TECHNICAL = re.compile(r"\b(photos?|photographs?|pictures?|pictured|images?|captions?|close ?up|view|shown|displayed)\b")
_END = re.compile(r"\s*(?:[,.;:]| while | that | which | who | because | as | and (?:is|are|has|\w+ing|\w+s)\b| \w+'s ).*")
_FINITE = re.compile(
    r"\b(is|are|was|has|have|there's|sits?|stands?|lays?|lies|lie|walks?|rides?|holds?|wears?|eats?|looks?|flies|grazes?|"
    r"watch(?:es)?|poses?|follows?|rests?|plays?|shows?|includes?|surrounds?|overlooks?|takes?|does|stare?s?|stop|pause)\b"
)


# ------------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True)
class Thing:
    """What is known of one sort of things in a photograph.

    Attributes:
        name: COCO's category, or a further known noun.
        word: the singular that captions use most; the name where none does.
        mentions: in how many captions it is.
        plural: whether most of these speak of several.
        count: how many there are; None where captions do not agree (boxes always tell).
        color: e.g. `red`, `brown and white`; None where not known.
        boxes: one per object, empty where there are no boxes.
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
    """A caption with even spaces, no shouting, no end mark and a small first letter."""
    text = " ".join(caption.split()).rstrip(" .,;!")
    text = text.lower() if text.isupper() else text
    text = re.sub(r"\blaying\b(?= (on|in|down|next|near|under|beside|by)\b)", "lying", text)
    return text if text[:2].isupper() else text[:1].lower() + text[1:]


@dataclass(frozen=True)
class Photo:
    """Captions and boxes of a photograph with what can be read out of them."""

    captions: tuple[str, ...]
    boxes: tuple[tuple[str, Box], ...] = ()

    @cached_property
    def texts(self) -> list[str]:
        """The captions, tidied, as they can be quoted."""
        return [tidy(caption) for caption in self.captions if caption.strip()]

    @cached_property
    def _plain(self) -> list[str]:
        return [re.sub(r"[^\w\s',.;/-]", " ", text.lower()) for text in self.texts]

    @cached_property
    def _nouns(self) -> list[list[re.Match[str]]]:
        found = [list(re.finditer(rf"(?<![\w-]){_NOUN}(?![\w-])(?!'s)(?! {_HEADS}\b)", text)) for text in self._plain]
        return [
            [m for m, after in zip(row, [*row[1:], None], strict=True) if not after or after.start() != m.end() + 1]
            for row in found
        ]

    @cached_property
    def things(self) -> list[Thing]:
        """All things, those of most captions and of the largest boxes first."""
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
        things = []
        for name in dict.fromkeys([*mentions, *boxes]):
            word = words[name].most_common(1)[0][0] if name in words else name
            if name == "person" and name in words and len(words[name]) > 1 and words[name][word] < 2:
                word = "person"  # annotators see a man, a boy, a guy: none of the words is sure
            where = tuple(boxes.get(name, ()))
            count = len(where) if where else self._count(name, mentions[name])
            several = count > 1 if count else number.get(name, Counter())[True] > number.get(name, Counter())[False]
            things.append(Thing(name, word, mentions[name], several, count, self._color(name), where))
        return sorted(things, key=lambda t: (-min(t.mentions, 3), -t.area, -t.mentions, t.name))

    def _count(self, name: str, mentions: int) -> int | None:
        """The number that captions give, if one does and none gives another; one for a single large thing."""
        given: Counter[int] = Counter()
        several = False
        for text, row in zip(self._plain, self._nouns, strict=True):
            for noun in (m for m in row if _SURFACES[m[0]][0] == name):
                before = text[: noun.start()]
                if found := re.search(rf"\b({_either(_NUMBER)}) (?:{_ADJECTIVE} ){{0,3}}$", before):
                    given[_NUMBER[found[1]]] += 1
                elif _SURFACES[noun[0]][2] or re.search(rf"\b(?:{_SOME}|two) (?:\w+ ){{0,2}}$", before):
                    several = True
        given.pop(1, None)
        if given:
            return next(iter(given)) if len(given) == 1 and mentions >= 2 else None
        large = KIND[name] == "animal" or name in ("train", "airplane", "bus", "toilet")
        return 1 if large and mentions >= 3 and not several else None

    def _color(self, name: str) -> str | None:
        """The color that captions give a thing, where they agree or one is named at least twice as often as another."""
        if any(re.search(r"black and white (photo|image|picture)", text) for text in self._plain):
            return None
        given: Counter[str] = Counter()
        for text, row in zip(self._plain, self._nouns, strict=True):
            for noun in (m for m in row if _SURFACES[m[0]][0] == name):
                chain = rf"\b({_COLOR}(?:(?:,| and|, and)? {_COLOR})*) (?:(?!and ){_ADJECTIVE} ){{0,2}}$"
                if found := re.search(chain, text[: noun.start()]):
                    colors = [c.replace("grey", "gray") for c in re.findall(rf"\b{_COLOR}\b", found[1])]
                    given[listing(sorted(set(colors)))] += 1
        ranked = given.most_common(2)
        if not ranked or (len(ranked) > 1 and ranked[0][1] < 2 * ranked[1][1]):
            return None
        return ranked[0][0]

    @cached_property
    def sure(self) -> list[Thing]:
        """The things that two captions name."""
        return [t for t in self.things if t.mentions >= min(2, len(self.texts))]

    @cached_property
    def place(self) -> str | None:
        """What place it is ("a beach"), if two captions say so."""
        found: Counter[str] = Counter()
        pattern = rf"\b({_either(_PLACES)})\b(?!-)(?! (?:{_NOUN}|{_HEADS}|sign|signs|light|lights|floor)\b)"
        for text in self._plain:
            found.update({_PLACES[m[1]] for m in re.finditer(pattern, text)})
        best = found.most_common(1)
        return best[0][0] if best and best[0][1] >= 2 else None

    @cached_property
    def statements(self) -> list[str]:
        """The captions as sentences, best first: those that name the things others name, and say it at some length."""
        weight = {t.name: t.mentions for t in self.things}

        def worth(k: int) -> float:
            words = len(self.texts[k].split())
            names = {_SURFACES[m[0]][0] for m in self._nouns[k]}
            odd = bool(_TECHNICAL.search(self._plain[k])) + bool(re.search(r"\d|\bthis\b|\bthese\b", self._plain[k]))
            return sum(weight[n] for n in names) + min(words, 14) / 4 - max(0, words - 18) - 8 * odd - 6 * (words < 5)

        order = sorted(range(len(self.texts)), key=lambda k: (-worth(k), k))
        return [_statement(self.texts[k]) for k in order]

    def actions(self) -> list[QA]:
        """What the subjects of the captions do, one question per subject."""
        pattern = re.compile(
            rf"^(?:{_DETERMINER} )?(?:{_ADJECTIVE} ){{0,3}}(?P<noun>{_NOUN})(?: that| who)?(?P<be> is| are)? "
            rf"(?P<action>{_ACTION})\b(?P<tail>.*)$"
        )
        found: dict[str, QA] = {}
        for text in sorted(self.texts, key=lambda t: abs(len(t.split()) - 10)):
            m = pattern.match(text.lower())
            tail = _END.sub("", m["tail"]) if m else ""
            if not m or _TECHNICAL.search(tail) or len(tail.split()) > 12 or re.search(r" (a|an|the|of|to|with|and|on)$", tail):
                continue
            name, word, is_plural = _SURFACES[m["noun"]]
            several = is_plural or bool(m["some"]) or _NUMBER.get(m["number"] or "", 1) > 1 or m["be"] == " are"
            if name not in [t.name for t in self.sure] or name in [q.kind for q in found.values()]:
                continue
            if name == "person" and word != "person" and sum(bool(re.search(rf"\b{m['noun']}\b", t)) for t in self._plain) < 2:
                word = "person"
            who = f"{'are' if several else 'is'} the {many(word) if several else word}"
            doing = m["action"] if m["action"] in ("wearing", "holding") and tail else "doing"
            be, subject = who.split(" ", 1)
            found[subject] = QA(f"What {who} {doing}?", sentence(f"{subject} {be} {m['action']}{tail}"), name)
        return [QA(q.question, q.answer, "action") for q in found.values()]

    def places_of(self) -> list[QA]:
        """Where things are, in the words of a caption."""
        found: dict[str, QA] = {}
        for text, row in zip(self._plain, self._nouns, strict=True):
            for noun in row:
                name, word, is_plural = _SURFACES[noun[0]]
                if name == "person" or name in found or name not in [t.name for t in self.sure]:
                    continue
                after = rf"(?: (?:that )?(?:is|are))?(?: (?:{_STATE}))? ((?:{_PREPOSITION}) (?:an?|the|some|two) .+)$"
                m = re.match(after, text[noun.end() :])
                phrase = re.sub(rf"(?<!{')(?<!'.join(_COLORS[:3])}) and .*", "", _END.sub("", m[1])) if m else ""
                if phrase and len(phrase.split()) in range(3, 10) and not _VAGUE.search(phrase) and not _TECHNICAL.search(phrase):
                    who = f"are the {many(word)}" if is_plural else f"is the {word}"
                    found[name] = QA(f"Where {who}?", sentence(f"{who.split(' ', 1)[1]} {who.split()[0]} {phrase}"), "position")
        return list(found.values())


def _statement(text: str) -> str:
    """A caption as a whole sentence."""
    return sentence(text if _FINITE.search(text.lower().split(" with ")[0]) else f"the image shows {text}")
