"""Scenes: a data set of drawn pictures with five captions each, whose captions can be checked fact by fact.

A picture shows one to three coloured shapes. A caption names the shapes and says where they are. Both are generated
from a small description, a `Scene`. [`judge`] parses a caption with the grammar that generated it, and checks every
statement against the scene. Captions are never compared with reference strings: any sentence of the grammar is right if
its statements are true.

The validation split tests generalisation. Six pairs of a colour and a shape (`HELD_OUT`) never occur in training, and
every object of every validation picture is one of them. A model that describes these pictures correctly has learned
colour, shape, size and position as separate concepts.

The sections of this file are objects and scenes, drawing, captions, judging, and the data set.
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

# --- Objects and scenes -----------------------------------------------------------------------------------------------

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
SIZES = {"small": 0.09, "large": 0.135}  # half the width of an object; all lengths are fractions of the picture's side

# Pairs for validation: red circle, orange square, yellow triangle, green star, blue heart and purple cross.
HELD_OUT = tuple(zip(COLOURS, SHAPES, strict=False))
SEEN = tuple((colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in HELD_OUT)

OBJECTS_PER_PICTURE = {1: 0.35, 2: 0.5, 3: 0.15}
CELLS = 3  # rows and columns of an invisible grid; an object lies inside one cell
GAP = 0.01  # smallest gap between neighbours, which the margins of the cells guarantee


@dataclass(frozen=True)
class Thing:
    """Object of a scene.

    Args:
        shape: one of `SHAPES`.
        colour: one of `COLOURS`.
        size: one of `SIZES`.
        x: horizontal position of its centre, from 0 (left) to 1 (right).
        y: vertical position of its centre, from 0 (top) to 1 (bottom).
    """

    shape: str
    colour: str
    size: str
    x: float
    y: float

    def stands(self, relation: str, other: "Thing") -> bool:
        """Return whether this object is clearly left of, right of, above or below another one.

        Two relations can hold at once: an object can be left of another and above it.

        Args:
            relation: "left", "right", "above" or "below".
            other: the other object.
        """
        distances = {
            "left": other.x - self.x,
            "right": self.x - other.x,
            "above": other.y - self.y,
            "below": self.y - other.y,
        }
        return distances[relation] >= SIZES[self.size] + SIZES[other.size] + GAP


MIDDLE = Thing("", "", "small", 0.5, 0.5)  # middle of the picture, from which "on the left" is measured


@dataclass(frozen=True)
class Scene:
    """Ground truth of a picture. No two objects have the same colour and shape, so colour and shape identify an object.

    Example:

    ```python
    >>> scene = Scene((Thing("star", "red", "small", 0.2, 0.5), Thing("heart", "blue", "large", 0.7, 0.5)))
    >>> Scene.from_json(scene.to_json()) == scene
    True
    ```
    """

    things: tuple[Thing, ...]

    def to_json(self) -> str:
        """Return the scene as a JSON string."""
        return json.dumps([asdict(thing) for thing in self.things])

    @classmethod
    def from_json(cls, text: str) -> "Scene":
        """Read a scene from a JSON string."""
        return cls(tuple(Thing(**thing) for thing in json.loads(text)))


def make_scene(rng: random.Random, pairs: Iterable[tuple[str, str]]) -> Scene:
    """Return a random scene of one to three objects, no two of them in the same row or column of the grid.

    Args:
        rng: source of the random numbers.
        pairs: the pairs of colour and shape to choose from.

    Example:

    ```python
    >>> scene = make_scene(random.Random(0), HELD_OUT)
    >>> all((thing.colour, thing.shape) in HELD_OUT for thing in scene.things)
    True
    ```
    """
    count = rng.choices(list(OBJECTS_PER_PICTURE), list(OBJECTS_PER_PICTURE.values()))[0]
    drawn_pairs = rng.sample(list(pairs), count)
    columns, rows = (rng.sample(range(CELLS), count) for _ in "xy")
    things = []
    for (colour, shape), column, row in zip(drawn_pairs, columns, rows, strict=True):
        size = rng.choice(list(SIZES))
        room = 0.48 / CELLS - SIZES[size]  # from the middle of the cell to either side, less a margin
        x, y = (round((cell + 0.5) / CELLS + rng.uniform(-room, room), 3) for cell in (column, row))
        things.append(Thing(shape, colour, size, x, y))
    return Scene(tuple(things))


# --- Drawing ----------------------------------------------------------------------------------------------------------


def _ring(count: int, *radii: float) -> list[tuple[float, float]]:
    """Return `count` corners around the origin, starting at the top, whose radii alternate between the given ones."""
    angles = [2 * math.pi * i / count for i in range(count)]
    return [(radii[i % len(radii)] * math.sin(a), -radii[i % len(radii)] * math.cos(a)) for i, a in enumerate(angles)]


def _heart(count: int = 40) -> list[tuple[float, float]]:
    """Return the outline of a heart."""
    turns = [2 * math.pi * i / count for i in range(count)]
    height = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in turns]
    return [(math.sin(t) ** 3, -(h + 2.5) / 15.5) for t, h in zip(turns, height, strict=True)]


_QUARTER_TURNS = ((1, 0), (0, 1), (-1, 0), (0, -1))
_ARM = ((-0.34, -0.95), (0.34, -0.95), (0.34, -0.34))  # the end of one arm of the cross, and the notch after it
# Outlines in a box from -1 to 1. Their sizes differ a little, so that all shapes appear equally large.
_OUTLINES = {
    "circle": _ring(48, 0.92),
    "square": [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)],
    "triangle": [(0.0, -0.90), (0.95, 0.78), (-0.95, 0.78)],
    "star": _ring(10, 1.04, 0.44),
    "heart": _heart(),
    "cross": [(u * cos - v * sin, u * sin + v * cos) for cos, sin in _QUARTER_TURNS for u, v in _ARM],
}
_OVERSAMPLING = 4  # PIL draws hard edges, so draw a larger picture and average it


def draw(scene: Scene, rng: random.Random, image_size: int) -> PILImage.Image:
    """Draw a scene on a light background.

    Args:
        scene: the scene.
        rng: source of the random shades and slight tilts, which captions do not mention.
        image_size: side of the picture in pixels.

    Example:

    ```python
    >>> draw(make_scene(random.Random(0), SEEN), random.Random(0), image_size=48).size
    (48, 48)
    ```
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


# --- Captions ---------------------------------------------------------------------------------------------------------

# The same phrases and sentence frames are used to write captions and to parse them. The slots of a frame are:
#
#   {a} {b} {c}   Objects, such as "a small red star".
#   {the_a}       An object that has been named, such as "the red star".
#   {of_ab}       Position of a relative to b. In {of_abc} it is the same relative to b and to c.
#   {its_ba}      Position of b relative to a, with a pronoun: "with b to its right".
#   {side_ab}     Position of a relative to b, as a side: "on the left".
#   {side_a}      Position of a relative to the middle of the picture, which is written m.
#   {order_abc}   Direction in which a comes before b, and b before c.
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
    """Return the pairs of objects whose relation a slot states: `of_abc` -> ab, ac; `order_abc` -> ab, bc."""
    kind, names = slot.split("_")
    names = names if len(names) > 1 else names + "m"
    return list(pairwise(names)) if kind == "order" else [(names[0], name) for name in names[1:]]


def write_scene_caption(scene: Scene, rng: random.Random) -> str:
    """Return a random caption that names every object of a scene and, if there are several, at least one relation.

    Args:
        scene: the scene.
        rng: source of the random numbers.

    Example:

    ```python
    >>> scene = Scene((Thing("star", "red", "small", 0.2, 0.5), Thing("heart", "blue", "large", 0.7, 0.5)))
    >>> judge(write_scene_caption(scene, random.Random(0)), scene).right
    True
    ```
    """
    # People describe pictures from left to right, whether they talk about left and right or about top and bottom.
    things = dict(zip("abc", sorted(scene.things, key=lambda thing: thing.x), strict=False))
    while True:  # the frame does not fit the scene, so draw another frame
        relations = rng.choice([("left", "right"), ("above", "below")])
        frame = rng.choice(_FRAMES[len(things)])
        texts = {"open": rng.choice(_OPENERS), **_name_things(things, rng)}
        texts |= _phrase_relations(frame, things, relations)
        if all(slot in texts for slot in _SLOT.findall(frame)):
            return frame.format(**texts)


def _name_things(things: dict[str, Thing], rng: random.Random) -> dict[str, str]:
    """Return the texts of the slots that name objects. Some names mention the size."""
    texts = {}
    for name, thing in things.items():
        size = f"{thing.size} " if rng.random() < 0.6 else ""
        article = "an" if (size + thing.colour)[0] in "aeiou" else "a"
        texts[name] = f"{article} {size}{thing.colour} {thing.shape}"
        texts[f"the_{name}"] = f"the {thing.colour} {thing.shape}"
    return texts


def _phrase_relations(frame: str, things: dict[str, Thing], relations: tuple[str, str]) -> dict[str, str]:
    """Return the texts of the slots that state relations. A slot is left out if neither of its two relations holds."""
    places = things | {"m": MIDDLE}
    texts = {}
    for slot in _SLOT.findall(frame):
        phrases = _PHRASES.get(slot.split("_")[0], {})
        for relation in relations:
            if relation in phrases and all(places[one].stands(relation, places[two]) for one, two in _stated(slot)):
                texts[slot] = phrases[relation]
    return texts


def write_scene_captions(scene: Scene, rng: random.Random, count: int = 5) -> list[str]:
    """Return `count` different captions of a scene."""
    captions: dict[str, None] = {}  # an ordered set
    while len(captions) < count:
        captions[write_scene_caption(scene, rng)] = None
    return list(captions)


# --- Judging ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fact:
    """Statement of a caption.

    Args:
        kind: "object", "size" or "relation"; "form" for a caption outside the grammar.
        text: the statement.
        right: whether the statement is true.
    """

    kind: str
    text: str
    right: bool


@dataclass(frozen=True)
class Verdict:
    """All statements of a caption.

    Args:
        facts: the statements.
        complete: whether the statements name every object of the scene.
    """

    facts: tuple[Fact, ...]
    complete: bool

    @property
    def right(self) -> bool:
        """`True` if all statements are true."""
        return all(fact.right for fact in self.facts)

    @property
    def wrong_facts(self) -> tuple[Fact, ...]:
        """Statements that are not true."""
        return tuple(fact for fact in self.facts if not fact.right)


def _reader(frame: str) -> re.Pattern[str]:
    """Return a sentence frame as a regular expression, with a named group for every statement."""

    def pattern(match: re.Match[str]) -> str:
        slot = match[1]
        if slot == "open":
            return f"(?:{'|'.join(_OPENERS)})"
        if slot.startswith("the_"):  # must repeat the name of the object
            return f"the (?P={slot[-1]}_colour) (?P={slot[-1]}_shape)"
        if len(slot) == 1:
            kinds = (("size", SIZES), ("colour", COLOURS), ("shape", SHAPES))
            size, colour, shape = (f"(?P<{slot}_{kind}>{'|'.join(names)})" for kind, names in kinds)
            return f"an? (?:{size} )?{colour} {shape}"
        return f"(?P<{slot}>{'|'.join(_PHRASES[slot.split('_')[0]].values())})"

    return re.compile(_SLOT.sub(pattern, re.sub("[,:]", "", frame)))


_READERS = tuple((frame, _reader(frame)) for frames in _FRAMES.values() for frame in frames)


def judge(caption: str, scene: Scene) -> Verdict:
    """Parse a caption and check each of its statements against a scene. Case and punctuation are ignored.

    Objects are matched one to one. Naming an object twice is wrong, and so is every relation of an object that does not
    exist. A caption outside the grammar is wrong as a whole: its only fact is `Fact("form", caption, False)`.

    Args:
        caption: the caption.
        scene: the ground truth.

    Example:

    ```python
    >>> scene = Scene((Thing("star", "red", "small", 0.2, 0.5), Thing("heart", "blue", "large", 0.7, 0.5)))
    >>> judge("A red star left of a large blue heart.", scene).right
    True
    >>> judge("a red star above a large blue heart", scene).wrong_facts
    (Fact(kind='relation', text='red star above blue heart', right=False),)
    ```
    """
    text = " ".join(re.sub("[^a-z]", " ", caption.lower()).split())
    matches = ((frame, reader.fullmatch(text)) for frame, reader in _READERS)
    frame, match = next(((frame, match) for frame, match in matches if match is not None), ("", None))
    if match is None:
        return Verdict((Fact("form", caption, False),), complete=False)

    slots = _SLOT.findall(frame)
    unnamed = {(thing.colour, thing.shape): thing for thing in scene.things}
    facts: list[Fact] = []
    named: dict[str, Thing | None] = {"m": MIDDLE}
    names = {"m": "the middle"}
    for slot in (slot for slot in slots if len(slot) == 1):
        colour, shape, size = match[f"{slot}_colour"], match[f"{slot}_shape"], match[f"{slot}_size"]
        names[slot] = f"{colour} {shape}"
        thing = named[slot] = unnamed.pop((colour, shape), None)
        facts.append(Fact("object", names[slot], thing is not None))
        if size is not None:
            facts.append(Fact("size", f"{size} {names[slot]}", thing is not None and thing.size == size))
    for slot in (slot for slot in slots if slot.split("_")[0] in _PHRASES):
        phrases = _PHRASES[slot.split("_")[0]]
        relation = next(relation for relation, phrase in phrases.items() if phrase == match[slot])
        for one, other in _stated(slot):
            first, second = named[one], named[other]
            right = first is not None and second is not None and first.stands(relation, second)
            facts.append(Fact("relation", f"{names[one]} {relation} {names[other]}", right))
    return Verdict(tuple(facts), complete=not unnamed)


def score_facts(captions: Iterable[str], scenes: Iterable[Scene]) -> dict[str, float]:
    """Score one caption for each scene.

    Args:
        captions: the captions.
        scenes: the ground truth of each caption.

    Returns:
        Shares of the captions, between 0 and 1:

        - `facts`: all statements are right. This is the main score.
        - `complete`: all statements are right, and no object is left out.
        - `objects`: all named objects exist in that colour and shape, and in that size if it is stated.
        - `relations`: at least one relation is stated, and all stated relations hold. Only scenes with two or more
          objects count.

    Example:

    ```python
    >>> scene = Scene((Thing("star", "red", "small", 0.2, 0.5), Thing("heart", "blue", "large", 0.7, 0.5)))
    >>> score_facts(["a red star above a blue heart"], [scene])
    {'facts': 0.0, 'complete': 0.0, 'objects': 1.0, 'relations': 0.0}
    ```
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


# --- The data set -----------------------------------------------------------------------------------------------------


def load_scenes(num_train: int, num_validation: int, image_size: int = 48, seed: int = 0) -> DatasetDict:
    """Draw the data set.

    The split "validation" contains only held-out pairs of colour and shape, "train" only the others.

    Each picture has its own random generator, so a larger data set begins with the pictures of a smaller one.

    Args:
        num_train: number of pictures in "train".
        num_validation: number of pictures in "validation".
        image_size: side of the pictures in pixels.
        seed: random seed.

    Returns:
        Rows with the columns `image` (PIL, RGB), `caption` (five strings) and `scene` (the ground truth, for
        [`Scene.from_json`]).

    Example:

    ```python
    >>> data = load_scenes(num_train=2, num_validation=1)
    >>> data["train"][0]["image"].size, len(data["train"][0]["caption"])
    ((48, 48), 5)
    ```
    """
    features = Features({"image": Image(), "caption": List(Value("string")), "scene": Value("string")})
    return DatasetDict(
        train=_draw_split("train", num_train, SEEN, image_size, seed, features),
        validation=_draw_split("validation", num_validation, HELD_OUT, image_size, seed, features),
    )


def _draw_split(
    name: str, count: int, pairs: tuple[tuple[str, str], ...], image_size: int, seed: int, features: Features
) -> Dataset:
    """Draw the pictures of a split, and write their captions."""
    columns: dict[str, list] = {column: [] for column in features}
    for index in range(count):
        rng = random.Random(f"{seed} {name} {index}")
        scene, file = make_scene(rng, pairs), io.BytesIO()
        draw(scene, rng, image_size).save(file, format="PNG", compress_level=1)
        columns["image"].append({"bytes": file.getvalue(), "path": None})
        columns["caption"].append(write_scene_captions(scene, rng))
        columns["scene"].append(scene.to_json())
    return Dataset.from_dict(columns, features=features)
