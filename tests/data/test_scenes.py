"""Scenes: the drawn data set, and the judge of its captions."""

import hashlib
import io
import random
from itertools import combinations

import pytest

from qformer_captioner.data.scenes import (
    COLOURS,
    HELD_OUT,
    SEEN,
    SHAPES,
    Scene,
    Thing,
    draw,
    judge,
    load_scenes,
    make_scene,
    score_facts,
    write_scene_captions,
)

STAR = Thing("star", "red", "small", 0.2, 0.5)
HEART = Thing("heart", "blue", "large", 0.7, 0.5)
PAIR = Scene((STAR, HEART))
SCENES = [make_scene(random.Random(seed), SEEN) for seed in range(60)]
DIRECTIONS = {"left": "right", "right": "left", "above": "below", "below": "above", "top": "bottom", "bottom": "top"}
OTHER_SIZE = {"small": "large", "large": "small"}


def captioned(scenes=SCENES):
    """Return pairs of a caption and its scene."""
    return [
        (caption, scene) for i, scene in enumerate(scenes) for caption in write_scene_captions(scene, random.Random(i))
    ]


def replaced(caption, table):
    """Return the caption with the words of `table` replaced, or `None` if it has no such word."""
    words = caption.replace(",", "").replace(":", "").split()
    return " ".join(table.get(word, word) for word in words) if set(words) & set(table) else None


def test_own_captions_are_right_and_name_every_object():
    for caption, scene in captioned():
        verdict = judge(caption, scene)
        assert verdict.right and verdict.complete, (caption, verdict.wrong_facts)


def test_own_captions_name_one_fact_per_object_and_a_relation_between_two():
    for caption, scene in captioned():
        kinds = [fact.kind for fact in judge(caption, scene).facts]
        assert kinds.count("object") == len(scene.things)
        assert kinds.count("relation") >= (len(scene.things) > 1)


def test_captions_of_a_scene_differ():
    assert all(len(set(write_scene_captions(scene, random.Random(0)))) == 5 for scene in SCENES)


def test_one_wrong_colour_is_wrong():
    names = list(COLOURS)
    for caption, scene in captioned():
        thing = scene.things[0]
        other = names[(names.index(thing.colour) + 1) % len(names)]
        wrong = caption.replace(f"{thing.colour} {thing.shape}", f"{other} {thing.shape}")
        assert wrong != caption and not judge(wrong, scene).right


def test_one_wrong_shape_is_wrong():
    for caption, scene in captioned():
        thing = scene.things[-1]
        other = SHAPES[(SHAPES.index(thing.shape) + 1) % len(SHAPES)]
        wrong = caption.replace(f"{thing.colour} {thing.shape}", f"{thing.colour} {other}")
        assert wrong != caption and not judge(wrong, scene).right


@pytest.mark.parametrize("table", [DIRECTIONS, OTHER_SIZE])
def test_swapped_relations_or_sizes_are_wrong_and_named(table):
    kind = "relation" if "left" in table else "size"
    tried = 0
    for caption, scene in captioned():
        if wrong := replaced(caption, table):
            verdict, tried = judge(wrong, scene), tried + 1
            assert not verdict.right
            assert {fact.kind for fact in verdict.wrong_facts} <= {kind, "form"}
    assert tried > 100


def test_the_wrong_axis_is_wrong():
    assert judge("a red star left of a blue heart", PAIR).right
    assert not judge("a red star above a blue heart", PAIR).right


def test_swapped_objects_are_wrong():
    assert not judge("a blue heart left of a red star", PAIR).right
    assert not judge("a blue star left of a red heart", PAIR).right


def test_naming_an_object_twice_is_wrong():
    assert judge("a picture of a red star", PAIR).right
    assert not judge("a red star left of a red star", PAIR).right


def test_leaving_out_an_object_is_right_but_not_complete():
    verdict = judge("a picture of a red star", PAIR)
    assert verdict.right and not verdict.complete


def test_naming_an_absent_object_is_wrong():
    assert not judge("a red star left of a blue heart, and a green cross above the blue heart", PAIR).right


def test_a_name_that_refers_to_nothing_is_wrong():
    scene = Scene((STAR, HEART, Thing("cross", "green", "small", 0.7, 0.1)))
    assert judge("a red star left of a blue heart, and a green cross below the red star", scene).wrong_facts
    assert (
        judge("a red star left of a blue heart, and a green cross above the pink star", scene).facts[0].kind == "form"
    )


@pytest.mark.parametrize("shown", ["A Red star left of a LARGE blue heart.", "a red star , left of a blue heart !"])
def test_case_and_punctuation_do_not_matter(shown):
    assert judge(shown, PAIR).right


NONSENSE = [
    "",
    " ",
    ",",
    "a",
    "red",
    "a red",
    "left of",
    "a red star left of",
    "a red star left of a blue",
    "\n\0é中",
    "(" * 99,
]


@pytest.mark.parametrize("text", NONSENSE)
def test_nonsense_is_wrong_and_does_not_raise(text):
    assert [fact.kind for fact in judge(text, PAIR).wrong_facts] == ["form"]


def test_word_salad_is_wrong_and_does_not_raise():
    rng = random.Random(0)
    words = sorted({word for caption, _ in captioned() for word in caption.split()})
    salads = [" ".join(rng.choices(words, k=rng.randint(0, 20))) for _ in range(500)]
    assert score_facts(salads, [PAIR] * len(salads))["facts"] < 0.01


def test_scores_are_perfect_for_true_captions_and_near_chance_for_shuffled_ones():
    scenes = [make_scene(random.Random(seed), HELD_OUT) for seed in range(200)]
    captions = [write_scene_captions(scene, random.Random(0), count=1)[0] for scene in scenes]
    assert score_facts(captions, scenes) == {"facts": 1.0, "complete": 1.0, "objects": 1.0, "relations": 1.0}
    shuffled = score_facts(captions, scenes[1:] + scenes[:1])
    assert shuffled["facts"] < 0.1 and shuffled["complete"] < 0.05


def test_two_objects_stand_clearly_apart_along_both_axes():
    for scene in SCENES:
        for one, other in combinations(scene.things, 2):
            assert one.stands("left", other) != one.stands("right", other)
            assert one.stands("above", other) != one.stands("below", other)


def test_every_object_is_drawn_inside_the_picture():
    side = 128
    for scene in SCENES[:20]:
        picture = draw(scene, random.Random(0), image_size=side)
        frame = [picture.getpixel((x, y)) for x in range(side) for y in range(side) if {x, y} & {0, side - 1}]
        assert len(set(frame)) == 1
        for thing in scene.things:  # every outline covers its own centre
            shown = picture.getpixel((int(side * thing.x), int(side * thing.y)))
            assert max(abs(a - b) for a, b in zip(shown, COLOURS[thing.colour], strict=True)) < 40


def test_every_colour_and_shape_of_the_held_out_pairs_is_seen_elsewhere():
    assert not set(SEEN) & set(HELD_OUT)
    for colour, shape in HELD_OUT:
        assert sum(seen == colour for seen, _ in SEEN) >= 4
        assert sum(seen == shape for _, seen in SEEN) >= 4


def test_training_has_seen_pairs_only_and_validation_held_out_pairs_only():
    data = load_scenes(num_train=60, num_validation=30, image_size=32)
    for split, allowed in (("train", SEEN), ("validation", HELD_OUT)):
        for text in data[split]["scene"]:
            assert all((thing.colour, thing.shape) in allowed for thing in Scene.from_json(text).things)


def test_the_data_set_has_the_promised_columns():
    row = load_scenes(num_train=1, num_validation=1, image_size=32)["train"][0]
    assert row["image"].size == (32, 32) and row["image"].mode == "RGB"
    assert len(row["caption"]) == 5
    assert all(judge(caption, Scene.from_json(row["scene"])).right for caption in row["caption"])


def test_the_seed_decides_everything_and_a_larger_data_set_starts_with_the_smaller():
    small, large = load_scenes(3, 1, image_size=32), load_scenes(5, 1, image_size=32)
    assert small["train"].to_dict() == large["train"].select(range(3)).to_dict()
    assert small["train"]["scene"][:] != load_scenes(3, 1, image_size=32, seed=1)["train"]["scene"][:]


def test_the_data_set_is_the_same_on_every_machine_and_in_every_process():
    rows = load_scenes(num_train=20, num_validation=1, image_size=32)["train"]
    text = str([rows["caption"][:], rows["scene"][:]])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "91d1c7bca5bae0a5"  # changes with the grammar only


def test_the_image_column_is_a_png_without_a_file_behind_it():
    stored = load_scenes(1, 1, image_size=32)["train"].data.table.column("image")[0].as_py()
    assert stored["path"] is None and io.BytesIO(stored["bytes"]).read(4) == b"\x89PNG"
