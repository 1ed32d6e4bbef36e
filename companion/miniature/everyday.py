"""What the offline teacher says of real photographs: it reads captions and boxes as COCO has them, and speaks plainly.

Nothing here understands language. Known nouns, colors, numbers, places and actions are looked for, a fact counts when
enough annotators agree on it, and sentences are put together from facts. What it does not find it does not say.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from companion.miniature.language import NUMBERS, QA, listing, number_word, plural, sentence, with_article

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
_IRREGULAR = {
    "person": "people",
    "man": "men",
    "woman": "women",
    "child": "children",
    "knife": "knives",
    "mouse": "mice",
}
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


def _either(words: Iterable[str]) -> str:
    return "(?:" + "|".join(sorted(map(re.escape, words), key=len, reverse=True)) + ")"


_NOUN = _either(_SURFACES)
_COLORS = "red orange yellow green blue purple pink brown black white gray grey silver gold beige tan"
_COLOR = _either(_COLORS.split())
_ADJECTIVES = (
    "large small big little tiny tall long old older young younger adult elderly wooden metal leather plastic brick "
    "stone plush velvet city passenger double decker antique unique empty open closed wild baby fluffy adorable cute "
    "bright dark light round square parked male female full grown"
)
_ADJECTIVE = _either([*_ADJECTIVES.split(), *_COLORS.split(), "and"])
_NUMBER = {word: k for k, word in enumerate(NUMBERS) if k}
_SOME = "several|some|many|a few|a group of|a couple of|a herd of|a bunch of|a pair of|a flock of|a crowd of|group of"
_DETERMINER = rf"(?:(?P<number>{_either(_NUMBER)})|(?P<some>{_SOME})|an?|the)"
# A noun before one of these only says what kind of thing the next word is: a dog bed, an apple tree, a train station.
_HEADS_TEXT = (
    "bed bag bags board boards station stop tree trees track tracks park lot shelter house show shop store hat hats "
    "costume food bowl case box boxes cart holder stand rack race shirt cover wheel seat rider riders driver pole "
    "tower meter meters shaped mustache glove bat uniform field court frame paper side cream slices slice flavored "
    "patterned print toy window windows wing"
)
_HEADS = _either(_HEADS_TEXT.split())
_PLACE_WORDS = (
    "beach, street, city street, road, sidewalk, kitchen, bathroom, bedroom, living room, restaurant, bakery, bar, "
    "lobby, park, field, forest, lake, river, ski slope, airport, harbor, bridge, zoo, store, station, office, farm"
)
_PLACES = {word: with_article(word) for word in _PLACE_WORDS.split(", ")}
_PLACES |= {"woods": "a forest", "mountain": "the mountains", "mountains": "the mountains", "ocean": "the ocean"}
_ACTIONS = (
    "riding sitting standing walking running holding playing eating drinking lying laying flying talking wearing "
    "looking sleeping swimming surfing skiing grazing jumping cooking reading carrying pulling cutting brushing "
    "petting waiting resting working skating skateboarding smiling watching driving floating roaming wandering chewing "
    "leaning posing preparing throwing catching feeding staring crossing traveling touching pointing perched"
)
_ACTION = _either(_ACTIONS.split())
_STATE = "sitting|standing|parked|laying|lying|placed|sits|sit|stands|stand|lays|mounted|displayed|stacked|stuck|set up"
_PREPOSITION = (
    "on top of|in front of|next to|on the side of|in the middle of|on|in|inside "
    "of|inside|under|near|beside|by|behind|at| along|against|between"
)
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
    """A caption's first sentence: no shouting, no end mark, a small first letter, some common slips put right."""
    text = re.split(r"\. (?=[A-Z])", " ".join(caption.split()))[0].rstrip(" .,;!")
    text = text.lower() if text.isupper() else text
    text = re.sub(r"\blaying\b(?= (on|in|down|next|near|under|beside|by|upside)\b)", "lying", text)
    text = re.sub(r"\b([Aa]) (?=[aeio]\w)(?!eu|one\b|once\b)", r"\1n ", re.sub(r"\b([Aa]n?) [Aa]n?\b", r"\1", text))
    return text if text[:2].isalpha() and text[:2].isupper() else text[:1].lower() + text[1:]


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
            [m for k, m in enumerate(row) if k + 1 == len(row) or row[k + 1].start() != m.end() + 1] for row in found
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
            count = len(where) if where else self._count(name, word, mentions[name])
            seen_as = number.get(name, Counter({bool(count and count > 1): 1}))
            several = seen_as[True] > seen_as[False] or bool(count and count > 1 and not where)
            things.append(Thing(name, word, mentions[name], several, count, self._color(name), where))
        return sorted(things, key=lambda t: (-min(t.mentions, 3), -t.area, -t.mentions, t.name))

    def _count(self, name: str, word: str, mentions: int) -> int | None:
        """The number that captions give, if one does and none gives another; one for a single large thing."""
        given: Counter[int] = Counter()
        several = False
        for text, row in zip(self._plain, self._nouns, strict=True):
            for noun in (
                m for m in row if _SURFACES[m[0]][0] == name and (name != "person" or _SURFACES[m[0]][1] == word)
            ):
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
        if name == "person" or any(re.search(r"black and white (photo|image|picture)", text) for text in self._plain):
            return None
        given: Counter[str] = Counter()
        for text, row in zip(self._plain, self._nouns, strict=True):
            for noun in (m for m in row if _SURFACES[m[0]][0] == name):
                chain = rf"\b({_COLOR}(?:(?:,| and|, and)? {_COLOR})*) (?:(?!and ){_ADJECTIVE} ){{0,2}}$"
                found = re.search(chain, text[: noun.start()])
                if found and not re.search(rf"{_COLOR} an? $", text[: found.start()]):
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
            odd = bool(_TECHNICAL.search(self._plain[k])) + bool(re.search(r"\d|\b(this|these|they)\b", self._plain[k]))
            bare = not re.match(rf"{_DETERMINER}\b|there\b|people\b|\w+s\b", self._plain[k])
            loose = not re.search(rf"\b(?:{_PREPOSITION}|with|of|\w+ing)\b", self._plain[k])
            length = min(words, 14) / 4 - max(0, words - 18) - 6 * (words < 5)
            return sum(weight[n] for n in names) + length - 8 * odd - 4 * bare - 8 * loose

        order = sorted((k for k in range(len(self.texts)) if worth(k) > -4), key=lambda k: (-worth(k), k))
        return [_statement(self.texts[k]) for k in order or range(min(1, len(self.texts)))] or ["The image is empty."]

    def actions(self) -> list[QA]:
        """What the subjects of the captions do, one question per subject."""
        pattern = re.compile(
            rf"^(?:{_DETERMINER} )?(?:{_ADJECTIVE} ){{0,3}}(?P<noun>{_NOUN})(?: that| who)?(?P<be> is| are)? "
            rf"(?P<action>{_ACTION})\b(?P<tail>.*)$"
        )
        things = {t.name: t for t in self.sure if KIND[t.name] in ("person", "animal")}
        found: dict[str, QA] = {}
        for text in sorted(self.texts, key=lambda t: abs(len(t.split()) - 10)):
            m = pattern.match(text.lower())
            name, word, is_plural = _SURFACES[m["noun"]] if m else ("", "", False)
            tail = _END.sub("", m["tail"]) if m else ""
            broken = re.search(rf"{_TECHNICAL.pattern}|{_FINITE.pattern}| (an?|the|of|to|with|and|on)$", tail)
            if not m or name not in things or name in found or broken or len(tail.split()) > 12:
                continue
            if name != "person":
                word = things[name].word
            elif sum(bool(re.search(rf"\b{m['noun']}\b", text)) for text in self._plain) < 2:
                word = "person"  # only one annotator says that it is a man, a girl, ...
            several = is_plural or bool(m["some"]) or _NUMBER.get(m["number"] or "", 1) > 1 or m["be"] == " are"
            be, who = ("are", f"the {many(word)}") if several else ("is", f"the {word}")
            doing = m["action"] if m["action"] in ("wearing", "holding") and tail else "doing"
            answer = sentence(f"{who} {be} {m['action']}{tail}")
            found[name] = QA(f"What {be} {who} {doing}?", answer, "action")
        return list(found.values())

    def places_of(self) -> list[QA]:
        """Where things are, in the words of a caption."""
        things = {t.name: t for t in self.sure if t.name != "person"}
        found: dict[str, QA] = {}
        for text, row in zip(self._plain, self._nouns, strict=True):
            for noun in row:
                thing = things.get(_SURFACES[noun[0]][0])
                after = rf"(?P<that> that (?:is|are))?(?: (?:is|are))?(?: (?:{_STATE}))? (?P<where>(?:{_PREPOSITION}) "
                m = re.match(after + r"(?:an?|the|some|two) .+)$", text[noun.end() :])
                # only of a noun that is the subject: "a cup sits on a table next to a book" says nothing of the table
                if not thing or not m or (re.search(rf"\b{_PREPOSITION}\b", text[: noun.start()]) and not m["that"]):
                    continue
                phrase = re.sub(rf" (topped|filled|covered with|and|with|{_ACTION})\b.*", "", _END.sub("", m["where"]))
                if len(phrase.split()) in range(3, 10) and not (_VAGUE.search(phrase) or _TECHNICAL.search(phrase)):
                    who, be = thing.the.rsplit(" ", 1)
                    found.setdefault(thing.name, QA(f"Where {be} {who}?", sentence(f"{who} {be} {phrase}"), "position"))
        return list(found.values())


def _statement(text: str) -> str:
    """A caption as a whole sentence."""
    main = re.split(r"\b(?:that|who|which|with|while|as)\b", text.lower())[0]
    return sentence(text if _FINITE.search(main) else f"the image shows {text}")


# ------------------------------------------------------------------------------------------------ speaking

_TURNS = 6
_CONSPICUOUS = "elephant giraffe zebra bear cow horse sheep airplane train boat bus truck motorcycle"


def conversation(photo: Photo, rng: random.Random) -> list[QA]:
    """Questions that the captions answer beyond doubt, then one that takes knowledge; never empty."""
    found = []
    for thing in photo.sure:
        if thing.color:
            be, name = ("are", many(thing.word)) if thing.plural else ("is", thing.word)
            found.append(QA(f"What color {be} the {name}?", sentence(f"{thing.the} {thing.color}"), "color"))
        if thing.count:
            there = f"there {'is one' if thing.count == 1 else f'are {number_word(thing.count)}'}"
            name = thing.word if thing.count == 1 else many(thing.word)
            found.append(QA(f"How many {many(thing.word)} are there?", sentence(f"{there} {name}"), "count"))
    kinds = {KIND[t.name] for t in photo.things}
    traffic = {"vehicle", "street"} & kinds or photo.place in ("a street", "a city street", "a road", "an airport")
    rules_out = kinds | ({"vehicle"} if traffic else set())
    absent = [name for name in _CONSPICUOUS.split() if KIND[name] not in rules_out]
    for name in rng.sample(absent, min(2, len(absent))):
        a = with_article(name)
        found.append(QA(f"Is there {a} in the image?", f"No, there is no {name} in the image.", "presence"))
    if photo.sure:
        thing = rng.choice(photo.sure[:3])
        is_, a = ("Are", many(thing.word)) if thing.plural else ("Is", counted(1, thing.word))
        answer = f"Yes, there {is_.lower()} {a} in the image."
        found.append(QA(f"{is_} there {'any ' if thing.plural else ''}{a} in the image?", answer, "presence"))
    if photo.place:
        found.append(QA("What kind of place does the image show?", f"The image shows {photo.place}.", "background"))
    found += photo.actions() + photo.places_of()
    rng.shuffle(found)
    chosen: list[QA] = []
    kinds_asked = Counter[str]()
    while found and len(chosen) < _TURNS:  # every kind of question once before any comes twice
        chosen.append(min(found, key=lambda q: kinds_asked[q.kind]))
        kinds_asked[chosen[-1].kind] += 1
        found.remove(chosen[-1])
    if len(chosen) < 3:
        chosen.insert(0, QA("What can be seen in the image?", photo.statements[0], "description"))
    return [*chosen, reasoning(photo)]


def _side(boxes: Sequence[Box]) -> list[str]:
    centers = [(b[0] + b[2]) / 2 for b in boxes]
    return ["on the left" if x < 0.37 else "on the right" if x > 0.63 else "in the middle" for x in centers]


def _whereabouts(thing: Thing) -> str:
    """One sentence with number and position of a thing that has boxes."""
    n, sides = len(thing.boxes), Counter(_side(thing.boxes))
    order = [side for side in ("on the left", "in the middle", "on the right") if sides[side]]
    word = thing.word if n == 1 and thing.mentions > 1 else thing.name
    if n == 1 and thing.area > 0.5:
        return f"The {word} takes up most of the image."
    if n == 1:
        pair = word in _MEASURE
        return (
            f"The {word} is {order[0]}." if thing.mentions and not pair else f"There is {counted(1, word)} {order[0]}."
        )
    if n >= 10:
        across = order[0] if len(order) == 1 else "across the image"
        return f"There are at least {counted(10, word)} {across}."
    if len(order) == 1:
        return f"There are {counted(n, word)}, {'both' if n == 2 else 'all'} {order[0]}."
    shares = [f"{number_word(sides[side])} {side}" for side in order]
    return f"There are {counted(n, word)}: {listing(shares)}."


def detail(photo: Photo) -> str:
    """A description: what the image shows, how many there are of each thing and where, what lies beside what."""
    first = photo.statements[0]
    known = set(re.findall(r"\w+", first.lower()))
    new = [len(set(re.findall(r"\w{4,}", s.lower())) - known) for s in photo.statements[1:]]
    opening = [first]
    good = [
        s for s, n in zip(photo.statements[1:], new, strict=True) if n >= 2 and not _TECHNICAL.search(s[16:].lower())
    ]
    if good:
        opening.append(re.sub(r"^The image shows ", "The image also shows ", good[0]))
    boxed = sorted((t for t in photo.things if t.boxes), key=lambda t: -t.area)
    body = [_whereabouts(t) for t in boxed[:6]]
    if boxed[6:]:
        body.append(
            f"There {'is' if len(boxed[6].boxes) == 1 else 'are'} also "
            f"{listing([counted(len(t.boxes), t.name) for t in boxed[6:]])} to be seen."
        )
    body += relations(photo)[:2]
    colors = [
        sentence(f"{t.the} {t.color}")
        for t in photo.sure
        if t.color and t.color not in " ".join(opening) and t.plural == (len(t.boxes) > 1)
    ]
    if photo.place and photo.place.split()[-1] not in " ".join(opening):
        colors.append(f"The scene is set {_PLACE_PREPOSITION.get(photo.place.split()[-1], 'in')} {photo.place}.")
    return "\n\n".join(" ".join(part) for part in (opening, body, colors) if part)


_PLACE_PREPOSITION = dict.fromkeys(["beach", "street", "road", "sidewalk", "bridge", "slope", "farm"], "on")
_PLACE_PREPOSITION |= dict.fromkeys(["bar", "airport", "station", "zoo"], "at")
_PLACE_PREPOSITION |= dict.fromkeys(["river", "lake", "ocean"], "by")


def relations(photo: Photo) -> list[str]:
    """ "The dog is to the left of the chair." for single things whose boxes lie apart."""
    single = sorted((t for t in photo.things if len(t.boxes) == 1 and t.word not in _MEASURE), key=lambda t: -t.area)[
        :4
    ]
    found = []
    for k, a in enumerate(single):
        for b in single[k + 1 :]:
            if a.boxes[0][2] <= b.boxes[0][0] + 0.02 or b.boxes[0][2] <= a.boxes[0][0] + 0.02:
                side = "left" if a.boxes[0][0] < b.boxes[0][0] else "right"
                found.append(f"The {a.word} is to the {side} of the {b.word}.")
    return found


# What a photograph of these things makes one think of: their names, a question that avoids them, common knowledge.
_KNOWLEDGE = """
bear, elephant, zebra, giraffe
What should a visitor to this place keep in mind?
{Many} are wild and strong, and they feel threatened when people come too close. A visitor should therefore keep at a
distance, stay quiet, offer no food and follow the rules of the place. That protects the visitor as well as the
{many}.

cat, dog
What does whoever lives here have to take care of every day?
{Many} depend on their people. They need fresh water and food at regular hours, a quiet place to sleep, and time for
play and exercise. Whoever keeps one should also look after its health and never leave it alone for long.

horse, cow, sheep
What kind of work stands behind a scene like this one?
{Many} have to be fed, watered and looked after every day, whatever the weather. They need pasture or hay, a dry place
to stand and somebody who notices early when one of them is ill. Keeping them well takes patience and experience.

bird
How should one behave here in order not to disturb anything?
{Many} are easily frightened and leave when something moves quickly or is loud. Who wants to watch them should move
slowly, keep some distance and not feed them, since bread and other leftovers make them ill.

surfboard, skis, snowboard, skateboard
What skills and precautions does this activity call for?
It takes balance, strength in the legs and much practice. Beginners should learn from somebody with experience, wear
what protects them, and choose an easy spot. Falls are part of it, so one should know the conditions of the day and
never go beyond one's own skill.

frisbee, kite, sports ball, baseball bat, baseball glove, tennis racket
What makes this a good way to spend some free time?
It brings people outdoors, gets them moving and needs little equipment. It trains the eye, the hand and quick
reactions, and it is more fun in company. An open space without traffic or wires nearby makes it safe as well.

airplane
What has to be right before a journey like this can begin?
{Many} are checked, fueled and loaded before each flight, and the crew studies the weather and the route. Traffic
control then decides when they may take off or land, so that they keep a safe distance from each other and from
everything else in the air.

train
Why might travelers prefer this way of going somewhere?
{Many} carry many people at once, do not get stuck in traffic and use little energy for each passenger. Travelers can
read, work or look out of the window instead of driving. They only have to keep to the timetable and to stay away from
the edge of the tracks.

boat
What should people here watch out for?
On the water, weather and currents can change quickly. People on {many} should know the forecast, have life jackets
within reach and keep clear of others. It is wise to tell somebody ashore when one means to be back.

bus, car, truck, motorcycle, bicycle, traffic light, stop sign, parking meter, street sign
What should somebody who passes through here pay attention to?
Where vehicles and people share the same space, everybody has to be alert. Drivers and riders should keep to the
signs, go slowly and give way; people on foot should look both ways before they cross and never count on being seen.
Standing vehicles deserve attention as well, since a door may open or one may pull out.

fire hydrant
Why does this spot have to be kept free?
The fire department takes its water from hydrants. If one is blocked or cannot be found, minutes are lost in which a
fire spreads. That is why nothing may be parked or piled up near it.

umbrella
What does this scene tell about the weather, and how did people prepare for it?
{Many} keep off rain and strong sun alike. Whoever brings one expects to be outside for a while and has thought of
staying dry or in the shade. In wind it has to be held or fixed well.

suitcase, backpack, handbag
What may be about to happen here, and what should be thought of?
Packed luggage speaks of a journey that begins or ends. Its owners should have labeled it, keep an eye on it, and have
papers and medicine where they can reach them. Fragile things belong in the middle, between soft ones.

broccoli, carrot, apple, orange, banana
Why is what can be seen here good for people?
Fruit and vegetables hold vitamins, minerals and fiber and few calories. Eaten fresh and in variety they help the body
to stay healthy. They should be washed first, and stored cool so that they keep.

pizza, donut, cake, sandwich, hot dog
What should somebody who wants to eat well think about here?
Food like this tastes good and is filling, but it holds much fat, salt or sugar. As a treat, shared with others, it
does no harm; every day it would be too much. Fruit, vegetables or a salad with it make a better balance.

bottle, wine glass, cup, fork, knife, spoon, bowl, plate, dining table
What will have to be done here, before or after people sit down?
A table with dishes and food means work on both ends of a meal. Before it, somebody has to cook, lay the table and see
that there is enough for everybody; after it, leftovers are put away and the dishes are washed. When everybody helps,
this is quickly done.

toilet, sink, toothbrush
Which habits matter in a place like this one?
Here, cleanliness protects health. Hands should be washed with soap, surfaces cleaned often and the air changed, so
that neither germs nor mold can spread. Brushing one's teeth twice a day belongs to the same good habits.

microwave, oven, toaster, refrigerator
What helps to work safely in this room?
In a kitchen, heat, sharp edges and electricity come together. Hot things should stand back from the edge, spills be
wiped up at once, and machines be switched off when they are not used. Food keeps best when it is put back into the
cold soon.

laptop, keyboard, mouse, tv, remote, cell phone
What should somebody who spends many hours like this look after?
Looking at screens for long strains eyes, neck and back. It helps to sit upright, to look into the distance from time
to time and to get up every hour. Devices last longer, too, when drinks stay away from them and cables lie where
nobody trips.

couch, bed, chair, potted plant
What makes this a place where people feel at home?
Comfortable furniture, light and a few personal things invite people to rest and to talk. A room feels larger when it
is tidy and when there is free space to walk through. What is used every day should be within reach.

clock
Why would this have been put where everybody can see it?
A clock that all can see helps people to be on time, to catch a bus or to keep an appointment, without having to look
for a watch or phone. A beautiful one is also a landmark where people meet.

book, vase, scissors, teddy bear, tie, bench, tree
What could the things here tell about the people who use them?
Things that people keep around them tell what they like and what they do. Whether they are neatly arranged or left
lying shows if somebody has just been busy here. To be sure, one would have to ask their owners.

person
What might have brought these circumstances about, and what could come next?
People come together or go out for a reason: to work, to enjoy themselves or to be with others. What they hold and
wear and where they look tells what they are busy with. Most likely they will go on with it for a while and then move
on together.

-
What would a visitor find remarkable about this place?
Places like this one tell how nature and people have shaped them. A visitor should take time to look, notice what is
near and what is far away, and leave everything as it was found.
"""


def reasoning(photo: Photo) -> QA:
    """A question about the most prominent thing that does not name it, and an answer of evidence and knowledge."""
    things = [t for t in photo.things if t.mentions > 1 or t.boxes]
    names = [*(t.name for t in sorted(things, key=lambda t: t.name == "person")), "-"]  # people do not say much
    blocks = [block.split("\n") for block in _KNOWLEDGE.strip().split("\n\n")]
    name, block = next((n, b) for n in names for b in blocks if n in b[0].split(", "))
    several = many(name)
    text = " ".join(block[2:]).format(many=several, Many=several[:1].upper() + several[1:])
    return QA(block[1], f"{photo.statements[0]} {text}", "reasoning")
