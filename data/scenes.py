"""Scenes: drawn pictures that come with five captions each and with their own ground truth.

A picture shows one to three coloured shapes; a caption names each of them and says where they stand. Both are drawn
from the same small description, a `Scene`, so that a caption can be checked *fact by fact*: `judge` reads a caption
back with the very grammar that wrote it and says which of its statements hold. No string is ever compared with a
reference: whichever sentence of the grammar a model chooses, it is right if what it states is true.

The validation split asks for more than memory. Six colour-shape pairs (`HELD_OUT`, a diagonal: one colour per shape)
never occur in training, and *every* object of *every* validation picture is one of them. A model that gets these
captions right has learned colour, shape, size and place as separate things.

Reading order: what there is -> how it is drawn -> how it is said -> how it is judged -> the data set.
"""

import io
import json
import math
import random
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise

from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PILImage
from PIL import ImageDraw

# ------------------------------------------------------------------------------------------------- what there is

COLOURS = {
    "red": (222, 45, 42),
    "orange": (247, 140, 30),
    "yellow": (244, 208, 40),
    "green": (44, 160, 72),
    "blue": (44, 100, 220),
    "purple": (126, 60, 176),
    "pink": (246, 130, 184),
    "black": (38, 38, 44),
    "gray": (140, 142, 148),
    "turquoise": (50, 196, 200),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
SIZES = {"small": 0.09, "large": 0.135}  # half the width of an object, as a share of the picture's side

# Red circle, orange square, yellow triangle, green star, blue heart and purple cross.
HELD_OUT = tuple(zip(COLOURS, SHAPES, strict=False))
SEEN = tuple((colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in HELD_OUT)

OBJECTS_PER_PICTURE = {1: 0.35, 2: 0.5, 3: 0.15}
CELLS = 3  # an object stands inside one cell of an invisible grid with so many rows and columns
GAP = 0.01  # free space between neighbours, as a share of the side; the margins of the cells leave at least this


@dataclass(frozen=True)
class Thing:
    """One object: what it is, and its centre in shares of the picture's side (x to the right, y downwards)."""

    shape: str
    colour: str
    size: str
    x: float
    y: float

    def stands(self, relation: str, other: "Thing") -> bool:
        """Whether this object stands "left" or "right" of another, "above" or "below" it, with a clear gap between.

        An object may well stand left of another and above it: then both are true.
        """
        along = {
            "left": other.x - self.x,
            "right": self.x - other.x,
            "above": other.y - self.y,
            "below": self.y - other.y,
        }
        return along[relation] >= SIZES[self.size] + SIZES[other.size] + GAP


MIDDLE = Thing("", "", "small", 0.5, 0.5)  # of the picture, for saying on which side of it an object stands


@dataclass(frozen=True)
class Scene:
    """The ground truth of a picture. No two objects share both colour and shape, so a name points at one object.

    >>> scene = Scene((Thing("star", "red", "small", 0.2, 0.5), Thing("heart", "blue", "large", 0.7, 0.5)))
    >>> Scene.from_json(scene.to_json()) == scene
    True
    """

    things: tuple[Thing, ...]

    def to_json(self) -> str:
        return json.dumps([asdict(thing) for thing in self.things])

    @classmethod
    def from_json(cls, text: str) -> "Scene":
        return cls(tuple(Thing(**thing) for thing in json.loads(text)))


def make_scene(rng: random.Random, pairs: Iterable[tuple[str, str]]) -> Scene:
    """Draw one to three different (colour, shape) pairs, no two of them in the same row or column of the grid.

    >>> scene = make_scene(random.Random(0), HELD_OUT)
    >>> all((thing.colour, thing.shape) in HELD_OUT for thing in scene.things)
    True
    """
    count = rng.choices(list(OBJECTS_PER_PICTURE), list(OBJECTS_PER_PICTURE.values()))[0]
    named = rng.sample(list(pairs), count)
    columns, rows = (rng.sample(range(CELLS), count) for _ in "xy")
    things = []
    for (colour, shape), column, row in zip(named, columns, rows, strict=True):
        size = rng.choice(list(SIZES))
        room = 0.48 / CELLS - SIZES[size]  # to either side of the middle of the cell, less a margin
        x, y = (round((cell + 0.5) / CELLS + rng.uniform(-room, room), 3) for cell in (column, row))
        things.append(Thing(shape, colour, size, x, y))
    return Scene(tuple(things))


# ------------------------------------------------------------------------------------------------- how it is drawn


def _ring(count: int, *radii: float) -> list[tuple[float, float]]:
    """`count` corners around the origin, the first one on top, taking turns with the radii."""
    angles = [2 * math.pi * i / count for i in range(count)]
    return [(radii[i % len(radii)] * math.sin(a), -radii[i % len(radii)] * math.cos(a)) for i, a in enumerate(angles)]


def _heart(count: int = 40) -> list[tuple[float, float]]:
    turns = [2 * math.pi * i / count for i in range(count)]
    height = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in turns]
    return [(math.sin(t) ** 3, -(h + 2.5) / 15.5) for t, h in zip(turns, height, strict=True)]


_QUARTER_TURNS = ((1, 0), (0, 1), (-1, 0), (0, -1))
_ARM = ((-0.34, -0.95), (0.34, -0.95), (0.34, -0.34))  # the end of one arm of the cross, and the notch after it
# Outlines in a box from -1 to 1. The measures differ a little so that all shapes *look* equally large.
_OUTLINES = {
    "circle": _ring(48, 0.92),
    "square": [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)],
    "triangle": [(0.0, -0.90), (0.95, 0.78), (-0.95, 0.78)],
    "star": _ring(10, 1.04, 0.44),
    "heart": _heart(),
    "cross": [(u * cos - v * sin, u * sin + v * cos) for cos, sin in _QUARTER_TURNS for u, v in _ARM],
}
_OVERSAMPLING = 4  # PIL draws hard edges: draw larger, then average


def draw(scene: Scene, rng: random.Random, image_size: int) -> PILImage.Image:
    """Draw a scene on a light background. `rng` varies what no caption mentions: shades and a slight tilt.

    >>> draw(make_scene(random.Random(0), SEEN), random.Random(0), image_size=48).size
    (48, 48)
    """
    side = image_size * _OVERSAMPLING
    light = rng.randint(236, 250)
    picture = PILImage.new("RGB", (side, side), tuple(light + rng.randint(-5, 5) for _ in "rgb"))
    canvas = ImageDraw.Draw(picture)
    for thing in scene.things:
        shade = rng.uniform(0.88, 1.08)
        shaded = [round(channel * shade) + rng.randint(-14, 14) for channel in COLOURS[thing.colour]]
        tilt, scale = math.radians(rng.uniform(-8, 8)), side * SIZES[thing.size]
        sin, cos, x, y = math.sin(tilt) * scale, math.cos(tilt) * scale, side * thing.x, side * thing.y
        corners = [(x + cos * u - sin * v, y + sin * u + cos * v) for u, v in _OUTLINES[thing.shape]]
        canvas.polygon(corners, fill=tuple(min(255, max(0, channel)) for channel in shaded))
    return picture.reduce(_OVERSAMPLING)


# ------------------------------------------------------------------------------------------------- how it is said

# One table of phrases and one of sentence frames serve both writing and reading. A frame's slots are
#   {a} {b} {c}   the objects; {the_a} names one again
#   {of_ab}       where a stands, seen from b; {of_abc}: seen from b and from c, which must agree
#   {its_ba}      the same with a pronoun: "with b to its right" says where b stands, seen from a
#   {side_ab}     the same as a side of the picture; {side_a}: seen from the middle of the picture, written m
#   {order_abc}   a before b before c in one direction
_OPENERS = ("", "there is ", "the picture shows ", "we see ")
_PHRASES = {
    "of": {"left": "left of", "right": "right of", "above": "above", "below": "below"},
    "its": {"left": "to its left", "right": "to its right", "above": "above it", "below": "below it"},
    "side": {"left": "on the left", "right": "on the right", "above": "at the top", "below": "at the bottom"},
    "order": {"left": "from left to right", "above": "from top to bottom"},
}
_FRAMES = {
    1: (
        "{side_a} there is {a}",
        "{open}{a} {side_a}",
        "{open}{a} and nothing else",
        "{a} all by itself",
        "a picture of {a}",
    ),
    2: (
        "{side_ab} {a}, {side_ba} {b}",
        "{side_ab} {a} and {side_ba} {b}",
        "{order_ab}: {a} and {b}",
        "{of_ba} {a} there is {b}",
        "{open}{a} {of_ab} {b}",
        "{open}{a} with {b} {its_ba}",
        "{a} is {of_ab} {b}",
    ),
    3: (
        "{side_ab} {a}, {side_ba} {b}, and {c} {of_cab} both",
        "{order_abc}: {a}, {b} and {c}",
        "{open}{a} {of_abc} both {b} and {c}",
        "{open}{a} {of_ab} {b} and {of_ac} {c}",
        "{open}{a} {of_ab} {b}, and {c} {of_ca} {the_a}",
    ),
}
_SLOT = re.compile(r"\{(\w+)\}")


def _stated(slot: str) -> list[tuple[str, str]]:
    """The pairs whose common relation a slot states: of_abc -> ab, ac; order_abc -> ab, bc; side_a -> am."""
    kind, names = slot.split("_")
    names = names if len(names) > 1 else names + "m"
    return list(pairwise(names)) if kind == "order" else [(names[0], name) for name in names[1:]]


def write_scene_caption(scene: Scene, rng: random.Random) -> str:
    """Say what a scene shows: every object with colour and shape, some with size, and at least one relation.

    >>> scene = Scene((Thing("star", "red", "small", 0.2, 0.5), Thing("heart", "blue", "large", 0.7, 0.5)))
    >>> judge(write_scene_caption(scene, random.Random(0)), scene).right
    True
    """
    # People go through a picture from left to right; what they say about it may be about left and right or up and down.
    named = dict(zip("abc", sorted(scene.things, key=lambda thing: thing.x), strict=False))
    places = named | {"m": MIDDLE}
    while True:  # not every frame fits every scene: then draw again
        relations = rng.choice([("left", "right"), ("above", "below")])
        frame = rng.choice(_FRAMES[len(named)])
        words = {"open": rng.choice(_OPENERS)}
        for name, thing in named.items():
            size = f"{thing.size} " if rng.random() < 0.6 else ""
            article = "an" if (size + thing.colour)[0] in "aeiou" else "a"
            words[name] = f"{article} {size}{thing.colour} {thing.shape}"
            words[f"the_{name}"] = f"the {thing.colour} {thing.shape}"
        slots = _SLOT.findall(frame)
        for slot in (slot for slot in slots if slot not in words):
            phrases = _PHRASES[slot.split("_")[0]]
            for relation in relations:
                if relation in phrases and all(
                    places[one].stands(relation, places[other]) for one, other in _stated(slot)
                ):
                    words[slot] = phrases[relation]
        if all(slot in words for slot in slots):
            return frame.format(**words)


def write_scene_captions(scene: Scene, rng: random.Random, count: int = 5) -> list[str]:
    """`count` different captions of one scene."""
    captions: dict[str, None] = {}  # a set that keeps its order
    while len(captions) < count:
        captions[write_scene_caption(scene, rng)] = None
    return list(captions)


# ------------------------------------------------------------------------------------------------- how it is judged


@dataclass(frozen=True)
class Fact:
    """One statement of a caption. `kind` is "object", "size" or "relation", or "form" where nothing could be read."""

    kind: str
    text: str
    right: bool


@dataclass(frozen=True)
class Verdict:
    """All statements of a caption; `complete` where they name every object of the scene."""

    facts: tuple[Fact, ...]
    complete: bool

    @property
    def right(self) -> bool:
        return all(fact.right for fact in self.facts)

    @property
    def wrong_facts(self) -> tuple[Fact, ...]:
        return tuple(fact for fact in self.facts if not fact.right)


def _reader(frame: str) -> re.Pattern[str]:
    """The frame as a regular expression with one named group per stated fact."""

    def pattern(match: re.Match[str]) -> str:
        slot = match[1]
        if slot == "open":
            return f"(?:{'|'.join(_OPENERS)})"
        if slot.startswith("the_"):  # has to repeat the name given before
            return f"the (?P={slot[-1]}_colour) (?P={slot[-1]}_shape)"
        if len(slot) == 1:
            kinds = (("size", SIZES), ("colour", COLOURS), ("shape", SHAPES))
            size, colour, shape = (f"(?P<{slot}_{kind}>{'|'.join(names)})" for kind, names in kinds)
            return f"an? (?:{size} )?{colour} {shape}"
        return f"(?P<{slot}>{'|'.join(_PHRASES[slot.split('_')[0]].values())})"

    return re.compile(_SLOT.sub(pattern, re.sub("[,:]", "", frame)))


_READERS = tuple((frame, _reader(frame)) for frames in _FRAMES.values() for frame in frames)


def judge(caption: str, scene: Scene) -> Verdict:
    """Read a caption and check each of its statements against the scene. Case and punctuation do not matter.

    Objects are matched one to one: naming the same object twice is wrong, and so is any relation of an object that is
    not there. A caption outside the grammar is wrong as a whole, with the single fact `Fact("form", caption, False)`.

    >>> scene = Scene((Thing("star", "red", "small", 0.2, 0.5), Thing("heart", "blue", "large", 0.7, 0.5)))
    >>> judge("A red star left of a large blue heart.", scene).right
    True
    >>> judge("a red star above a large blue heart", scene).wrong_facts
    (Fact(kind='relation', text='red star above blue heart', right=False),)
    """
    text = " ".join(re.sub("[^a-z]", " ", caption.lower()).split())
    frame, match = next(((frame, found) for frame, reader in _READERS if (found := reader.fullmatch(text))), ("", None))
    if match is None:
        return Verdict((Fact("form", caption, False),), complete=False)

    said, slots = match.groupdict(), _SLOT.findall(frame)
    unnamed = {(thing.colour, thing.shape): thing for thing in scene.things}
    facts: list[Fact] = []
    found: dict[str, Thing | None] = {"m": MIDDLE}
    names = {"m": "the middle"}
    for slot in (slot for slot in slots if len(slot) == 1):
        colour, shape, size = said[f"{slot}_colour"], said[f"{slot}_shape"], said[f"{slot}_size"]
        names[slot] = f"{colour} {shape}"
        found[slot] = thing = unnamed.pop((colour, shape), None)
        facts.append(Fact("object", names[slot], thing is not None))
        if size is not None:
            facts.append(Fact("size", f"{size} {names[slot]}", thing is not None and thing.size == size))
    for slot in (slot for slot in slots if slot.split("_")[0] in _PHRASES):
        relation = next(r for r, phrase in _PHRASES[slot.split("_")[0]].items() if phrase == said[slot])
        for one, other in _stated(slot):
            a, b = found[one], found[other]
            right = a is not None and b is not None and a.stands(relation, b)
            facts.append(Fact("relation", f"{names[one]} {relation} {names[other]}", right))
    return Verdict(tuple(facts), complete=not unnamed)


def score_facts(captions: Iterable[str], scenes: Iterable[Scene]) -> dict[str, float]:
    """Score one caption per scene; all values are shares of captions between 0 and 1.

    - `facts`: every stated fact is right. The number to quote;
    - `complete`: every stated fact is right *and* no object is left out;
    - `objects`: every named object is there in that colour and shape (and size, where stated);
    - `relations`: at least one relation is stated and all hold, counted over the scenes with two or more objects.

    >>> scene = Scene((Thing("star", "red", "small", 0.2, 0.5), Thing("heart", "blue", "large", 0.7, 0.5)))
    >>> score_facts(["a red star above a blue heart"], [scene])
    {'facts': 0.0, 'complete': 0.0, 'objects': 1.0, 'relations': 0.0}
    """
    scenes = list(scenes)
    verdicts = [judge(caption, scene) for caption, scene in zip(captions, scenes, strict=True)]
    related = [verdict for verdict, scene in zip(verdicts, scenes, strict=True) if len(scene.things) > 1]

    def share(hits: list[bool]) -> float:
        return sum(hits) / max(len(hits), 1)

    def holds(verdict: Verdict, *kinds: str) -> bool:
        facts = [fact.right for fact in verdict.facts if fact.kind in kinds]
        return bool(facts) and all(facts)

    return {
        "facts": share([verdict.right for verdict in verdicts]),
        "complete": share([verdict.right and verdict.complete for verdict in verdicts]),
        "objects": share([holds(verdict, "object", "size") for verdict in verdicts]),
        "relations": share([holds(verdict, "relation") for verdict in related]),
    }


# ------------------------------------------------------------------------------------------------- the data set


def load_scenes(num_train: int, num_validation: int, image_size: int = 48, seed: int = 0) -> DatasetDict:
    """Draw the data set: `train` has seen pairs only, `validation` held-out pairs only.

    Columns: `image` (PIL, RGB), `caption` (five strings), `scene` (the ground truth; read with `Scene.from_json`).
    Each picture has its own random generator, so a larger data set starts with the smaller one, on every machine.

    >>> data = load_scenes(num_train=2, num_validation=1)
    >>> data["train"][0]["image"].size, len(data["train"][0]["caption"])
    ((48, 48), 5)
    """
    features = Features({"image": Image(), "caption": List(Value("string")), "scene": Value("string")})

    def split(name: str, count: int, pairs: tuple[tuple[str, str], ...]) -> Dataset:
        columns: dict[str, list] = {column: [] for column in features}
        for index in range(count):
            rng = random.Random(f"{seed} {name} {index}")
            scene, file = make_scene(rng, pairs), io.BytesIO()
            draw(scene, rng, image_size).save(file, format="PNG", compress_level=1)
            columns["image"].append({"bytes": file.getvalue(), "path": None})
            columns["caption"].append(write_scene_captions(scene, rng))
            columns["scene"].append(scene.to_json())
        return Dataset.from_dict(columns, features=features)

    return DatasetDict(
        train=split("train", num_train, SEEN),
        validation=split("validation", num_validation, HELD_OUT),
    )
