"""Forms of captions: which caption belongs to which image, and which errors name the others."""

import json

import pytest
from PIL import Image

from qformer_captioner.common.errors import InputError
from qformer_captioner.data.caption_forms import VizWizRules
from qformer_captioner.data.captions import captions_of
from qformer_captioner.data.loading import load_rows
from qformer_captioner.data.names import CAPTION_NAMES, IMAGE_NAMES, find_name
from qformer_captioner.data.skipped_rows import SkippedRows
from qformer_captioner.data.text_rows import read_columns

from ..fixtures.read_rows import read_data

IMAGES = [{"id": 5, "file_name": "a.jpg"}, {"id": 3, "file_name": "b.jpg"}]
ANNOTATIONS = [
    {"image_id": 3, "caption": "a green"},
    {"image_id": 5, "caption": "a red"},
    {"image_id": 5, "caption": "red"},
]
EXPECTED = [("red", ["a red", "red"]), ("green", ["a green"])]
CAPTIONS = {"a.jpg": ["a red", "red"], "b.jpg": ["a green"]}


@pytest.fixture
def pictures(tmp_path):
    """Return a folder with a red `a.jpg` and a green `b.jpg`."""
    for name, colour in (("a", "red"), ("b", "green")):
        Image.new("RGB", (16, 16), colour).save(tmp_path / f"{name}.jpg")
    return tmp_path


def textcaps_rows(**more) -> list[dict]:
    """Return TextCaps' rows, one for each caption."""
    return [
        {"image_id": name[0], "image_path": name, "caption_str": text, "reference_strs": texts, **more}
        for name, texts in CAPTIONS.items()
        for text in texts
    ]


FORMS = {
    "COCO": {"info": {}, "images": IMAGES, "annotations": ANNOTATIONS},
    "Karpathy": {
        "images": [
            {"filename": name, "imgid": number, "split": "restval", "sentences": [{"raw": text} for text in texts]}
            for number, (name, texts) in enumerate(CAPTIONS.items())
        ]
    },
    "Karpathy, captions as strings": {
        "images": [{"filename": name, "split": "train", "sentences": texts} for name, texts in CAPTIONS.items()]
    },
    "TextCaps": {"dataset_name": "textcaps", "data": textcaps_rows(set_name="train")},
    "captions by image": CAPTIONS,
    "dicts by image": {name: [{"caption": text} for text in texts] for name, texts in CAPTIONS.items()},
    "an object with a list of rows": {"version": 1, "rows": [{"image": n, "captions": t} for n, t in CAPTIONS.items()]},
    "rows with other names": [{"File Name": name, "sentences": texts} for name, texts in CAPTIONS.items()],
    "rows with dicts": [{"img": n, "captions": [{"text": text} for text in t]} for n, t in CAPTIONS.items()],
    "rows with a dict of lists": [{"filename": n, "sentences": {"raw": t}} for n, t in CAPTIONS.items()],
    "rows with lists as text": [{"image": n, "text": json.dumps(t)} for n, t in CAPTIONS.items()],
    "rows with lists and strings": [
        {"image": "a.jpg", "caption": CAPTIONS["a.jpg"]},
        {"image": "b.jpg", "caption": "a green"},
    ],
    "rows by image": {name[0]: {"caption": texts, "tags": "one, two"} for name, texts in CAPTIONS.items()},
    "columns of lists": {"image": list(CAPTIONS), "caption": list(CAPTIONS.values())},
    "columns by row number": {"image": dict(enumerate(CAPTIONS)), "captions": dict(enumerate(CAPTIONS.values()))},
    "rows with lists of one image": [{"images": [name], "caption": texts} for name, texts in CAPTIONS.items()],
    "rows with files as ids": [{"image_id": name, "caption": texts} for name, texts in CAPTIONS.items()],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("indent", [None, 1])
def test_every_form_gives_each_image_its_captions(form, indent, pictures):
    (pictures / "captions.json").write_text(json.dumps(FORMS[form], indent=indent))
    data = read_data("--dataset_name", pictures / "captions.json")
    assert data.train == EXPECTED and not data.skipped


def test_json_lines_with_columns_that_come_late_are_read(pictures):
    last = {"image": "b.jpg", "caption": ["a green"], "late": "yes"}
    rows = [*[{"image": "a.jpg", "caption": "a red"}] * 10_001, last]
    (pictures / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = load_rows(str(pictures / "rows.jsonl"))["train"]
    assert len(read) == 10_002 and read[0]["late"] is None and read[10_001]["late"] == "yes"
    assert [captions_of(read[number]["caption"]) for number in (0, 10_001)] == [["a red"], ["a green"]]


def test_domains_and_splits_of_annotations_are_columns(pictures):
    images = [{**image, "domain": "in-domain", "split": "val"} for image in IMAGES]
    (pictures / "captions.json").write_text(json.dumps({"images": images, "annotations": ANNOTATIONS}))
    columns = read_columns(str(pictures / "captions.json"))
    assert columns["domain"] == ["in-domain"] * 2 and columns["split"] == ["val"] * 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"images": IMAGES, "annotations": [*ANNOTATIONS, {"image_id": 99999, "caption": "x"}]},
            "annotation 3 is of image 99999, which is not among its images",
        ),
        (
            {"images": IMAGES, "annotations": [{"image_id": 5, "bbox": [1, 2, 3, 4], "category_id": 1}]},
            "holds no captions: its annotations are dictionaries with 'image_id', 'bbox', 'category_id'",
        ),
        ({"images": IMAGES, "annotations": [*ANNOTATIONS, {"image_id": 5}]}, "annotation 3 has no 'caption'"),
        ({"images": IMAGES * 2, "annotations": ANNOTATIONS}, r"image 5 occurs more than once \(2 in all\)"),
        ({"info": {}, "licenses": []}, "a JSON object with 'info', 'licenses', which is not a known form of captions"),
        (
            {"image_urls": ["http://a"], "captions": ["a red"]},
            "with 'image_urls', 'captions', which is not a known form",
        ),
        ({"image": ["a.jpg"], "caption": ["a red", "a"]}, "'image' and 'caption' do not have the same rows"),
        (["a.jpg", "b.jpg"], "Row 1 of .* is of type str, not an object such as"),
    ],
)
def test_a_file_without_usable_captions_is_refused_by_name(pictures, content, message):
    (pictures / "captions.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        read_data("--dataset_name", pictures / "captions.json")


def test_an_object_with_a_list_for_each_split_has_these_splits(pictures):
    rows = [{"image": name, "caption": texts} for name, texts in CAPTIONS.items()]
    (pictures / "captions.json").write_text(json.dumps({"train": rows[:1], "val": rows[1:], "test": [], "version": 1}))
    data = read_data("--dataset_name", pictures / "captions.json")
    assert (data.train, data.evaluation) == (EXPECTED[:1], EXPECTED[1:])


@pytest.mark.parametrize("name", ["captions.json", "captions.jsonl"])
def test_nan_in_json_is_an_empty_cell(pictures, name):
    (pictures / name).write_text(
        '{"image": "a.jpg", "caption": "a red"}\n{"image": "b.jpg", "caption": NaN, "size": Infinity}'
    )
    data = read_data("--dataset_name", pictures / name)
    assert data.train == [("red", ["a red"])] and [row["reason"] for row in data.skipped] == ["no caption"]


@pytest.mark.parametrize(
    "content",
    ['{"a.jpg": "a red", "b.jpg": "a green", "a.jpg": "red"}', '{"image": "a.jpg", "text": "a", "text": "b"}\n' * 2],
)
def test_a_value_that_would_replace_another_of_the_same_name_is_refused(pictures, content):
    (pictures / "captions.json").write_text(content)
    with pytest.raises(InputError, match="an object has several values named '(a.jpg|text)'"):
        read_data("--dataset_name", pictures / "captions.json")


def test_the_error_says_what_a_column_without_captions_holds(pictures):
    rows = [{"image": "a.jpg", "caption": [{"from": "human", "value": "What?"}], "mood": 1}]
    (pictures / "rows.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match="which holds dictionaries with 'from', 'value'; the columns are .*'mood'"):
        read_data("--dataset_name", pictures / "rows.json")


def test_one_row_without_a_caption_says_what_its_cell_holds(pictures):
    rows = [{"image": "a.jpg", "caption": {"mood": "sad"}}, {"image": "b.jpg", "caption": "a green"}]
    (pictures / "rows.json").write_text(json.dumps(rows))
    data = read_data("--dataset_name", pictures / "rows.json")
    assert data.train == [("green", ["a green"])]
    assert [row["reason"] for row in data.skipped] == ["no caption: the cell holds a dictionary with 'mood'"]


@pytest.mark.parametrize("streaming", [False, True])
def test_class_labels_become_the_names_of_their_classes(pictures, streaming):
    for name, label in (("a", "cat"), ("b", "dog")):
        (pictures / "classes" / label).mkdir(parents=True)
        (pictures / f"{name}.jpg").rename(pictures / "classes" / label / f"{name}.jpg")
    rows = load_rows(str(pictures / "classes"), streaming=streaming)["train"]
    assert [row["label"] for row in rows] == ["cat", "dog"]


VIZWIZ = {
    "images": IMAGES,
    "annotations": [
        {"image_id": 5, "caption": "a red", "is_rejected": False, "is_precanned": False},
        {"image_id": 5, "caption": "asdf", "is_rejected": True, "is_precanned": False},
        {"image_id": 3, "caption": "Quality issues are too severe.", "is_rejected": False, "is_precanned": True},
    ],
}


def test_rejected_and_precanned_captions_of_vizwiz_are_left_out_and_counted(pictures):
    (pictures / "captions.json").write_text(json.dumps(VIZWIZ))
    data = read_data("--dataset_name", pictures / "captions.json")
    assert data.train == [("red", ["a red"])]
    reasons = [row["reason"] for row in data.skipped]
    assert [reason.rsplit(" ", 1)[-1] for reason in reasons] == ["is_rejected", "is_precanned", "caption"]


def test_options_keep_captions_that_vizwiz_leaves_out(pictures):
    (pictures / "captions.json").write_text(json.dumps(VIZWIZ))
    options = ["--ignore_rejected", "false", "--ignore_precanned", "false"]
    data = read_data("--dataset_name", pictures / "captions.json", *options)
    assert data.train == [("red", ["a red", "asdf"]), ("green", ["Quality issues are too severe."])]
    assert not data.skipped
    skipped = SkippedRows()
    columns = read_columns(str(pictures / "captions.json"), VizWizRules(ignore_rejected=False), skipped)
    assert columns["caption"] == [["a red", "asdf"], []] and len(skipped) == 1


@pytest.mark.parametrize(
    ("names", "existing", "asked", "found"),
    [
        (CAPTION_NAMES, ["text", "caption"], "caption", "caption"),
        (CAPTION_NAMES, ["image", "captions"], "caption", "captions"),
        (CAPTION_NAMES, ["Image Name", " Comment"], "caption", " Comment"),
        (CAPTION_NAMES, ["Caption", "text"], "caption", "Caption"),
        (CAPTION_NAMES, ["text", "description"], "caption", None),
        (CAPTION_NAMES, ["text"], "title", None),
        (IMAGE_NAMES, ["file_name", "filepath"], "image", None),
        (IMAGE_NAMES, ["File-Name", "size"], "image", "File-Name"),
    ],
)
def test_a_name_with_the_same_meaning_is_found_if_there_is_only_one(names, existing, asked, found):
    assert find_name(names, existing, asked) == found


@pytest.mark.parametrize(
    ("cell", "captions"),
    [
        ('["a red", "red"]', ["a red", "red"]),
        ("['a red', \"it's red\"]", ["a red", "it's red"]),
        ("['a red' 'red'\n 'a big one']", ["a red", "red", "a big one"]),
        ("[{'raw': 'a red'}, {'raw': 'red'}]", ["a red", "red"]),
        ('{"caption": "a red"}', ["a red"]),
        ("[]", []),
        ("('a red', 'red')", ["a red", "red"]),
        ("('a red')", ["('a red')"]),
        ("(a red)", ["(a red)"]),
        ("[red] on [green]", ["[red] on [green]"]),
        ("[1, 2]", ["[1, 2]"]),
        ("[" * 1_000 + "]" * 1_000, ["[" * 1_000 + "]" * 1_000]),
    ],
)
def test_a_list_that_is_written_as_text_is_a_list_of_captions(cell, captions):
    assert captions_of(cell) == captions
