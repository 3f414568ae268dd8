"""Files of captions: which can be read, and which error names the others."""

import gzip
import json

import pytest

from qformer_captioner.common.errors import InputError
from qformer_captioner.data.caption_forms import VizWizRules
from qformer_captioner.evaluation.caption_files import (
    ReferenceSet,
    images_to_score,
    join,
    read_predictions,
    read_references,
)

COCO = {
    "images": [{"id": 7, "file_name": "seven.jpg"}, {"id": 5}],
    "annotations": [
        {"image_id": 5, "caption": "a cat"},
        {"image_id": 7, "caption": "a dog"},
        {"image_id": 7, "caption": "a brown dog"},
    ],
}


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a file: text unchanged, other values as JSON."""

    def write(content, name="captions.json"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def json_lines(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_coco_annotations_are_read_in_the_order_of_their_images(write):
    references = read_references(write(COCO))
    assert references.captions == {7: ["a dog", "a brown dog"], 5: ["a cat"]}
    assert list(references.captions) == [7, 5]
    assert references.files == {7: "seven.jpg"}


def test_written_references_are_read_unchanged(tmp_path):
    references = ReferenceSet({7: ["a dog"], 5: ["a", "b"]}, {7: "seven.jpg"}, {7: "in-domain", 5: "out-domain"})
    references.write(tmp_path / "references.json")
    assert read_references(tmp_path / "references.json") == references


@pytest.mark.parametrize(
    "rows",
    [
        [{"image_id": "a", "captions": ["a dog", "a cat"]}],
        [{"id": "a", "caption": ["a dog", "a cat"]}],
        [{"file_name": "a", "references": ["a dog", "a cat"], "caption": "ours"}],
    ],
)
def test_json_lines_and_lists_of_rows_are_references(write, rows):
    for content in (rows, json_lines(*rows)):
        assert read_references(write(content)).captions == {"a": ["a dog", "a cat"]}


def test_predictions_are_coco_results_or_json_lines(write):
    rows = [{"image_id": 7, "caption": "a dog"}, {"image_id": 5, "caption": "a\rcat"}]
    for content in (rows, json_lines(*rows), "\ufeff" + json_lines(*rows)):
        assert read_predictions(write(content)) == {7: "a dog", 5: "a\rcat"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        (
            '[{"image_id": 1, "caption": "a d',
            "line 1 is not valid JSON .Unterminated string .* may have been cut off",
        ),
        ('{"image_id": 1, "caption": "a"}\n{"image_id": 2, "cap', "line 2 is not valid JSON"),
        ("[\n1,\n", "line 3 is not valid JSON"),
        ("[" * 100_000, "cannot be read: maximum recursion"),
        ("[" + "1" * 5_000, "cannot be read: Exceeds the limit"),
        ([], "has no rows"),
        ([{"caption": "a"}], """entry 0 has no 'image_id' .* as in {"image_id": 1, "caption": "a dog"}"""),
        ([{"caption": "a"}, {"image_id": 1, "caption": "a"}, {}], r"entry 0 has no 'image_id' \(2 in all\)"),
        ([1], "is of type int, not an object"),
        ([{"image_id": 1}], "entry 0 has no 'caption'; it has 'image_id'"),
        ([{"image_id": [1], "caption": "a"}], r"\[1\] is not an image id"),
        (
            [{"image_id": 1, "caption": None}, {"image_id": 2, "caption": 3}],
            r"image 1 is None, which is not a string \(2 in all\)",
        ),
        ([{"image_id": 1, "caption": "a"}] * 3, "image 1 occurs more than once"),
        (COCO, "image 7 has 2 captions, but one is scored"),
    ],
)
def test_the_error_names_and_counts_bad_predictions(write, content, message):
    path = write(content)
    with pytest.raises(InputError, match=f"^[^\n]*{path.name}[^\n]*{message}[^\n]*$"):
        read_predictions(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("5", "has no rows"),
        ([], "has no rows"),
        ({"images": [], "annotations": []}, "holds no images"),
        ({"annotations": []}, "JSON object with 'annotations', which is not a known form of captions"),
        (
            COCO | {"images": [{"id": 7, "domain": ["a"]}, {"id": 5}]},
            r"domain of image 7 is \['a'\], which is not a string",
        ),
        (COCO | {"images": COCO["images"] * 2}, r"image 7 occurs more than once \(2 in all\)"),
        (COCO | {"images": COCO["images"][:1]}, "annotation 0 is of image 5, which is not among"),
        (COCO | {"images": [*COCO["images"], {"id": 9}]}, "image 9 has no reference"),
        (
            COCO | {"annotations": [{"image_id": 5}]},
            "no captions: its annotations are dictionaries with 'image_id'",
        ),
        (COCO | {"annotations": [{"image_id": [5], "caption": "a"}]}, r"annotation 0 is of image \[5\]"),
        ([{"image_id": 1, "captions": []}, {"image_id": 2}], r"image 1 has no reference caption \(2 in all\)"),
        ([{"image_id": 1, "captions": ["a", 2]}], "references of image 1 are .* which are not all strings"),
        ([{"image_id": 1, "captions": {"a": 1}}], "references of image 1 are .* which are not all strings"),
    ],
)
def test_the_error_names_and_counts_bad_references(write, content, message):
    with pytest.raises(InputError, match=f"^[^\n]*{message}[^\n]*$"):
        read_references(write(content))


def test_the_error_says_that_a_file_may_not_be_compressed(tmp_path):
    (tmp_path / "captions.json.gz").write_bytes(gzip.compress(b"[]"))
    with pytest.raises(InputError, match="is not a file of captions: give rows .*, not compressed"):
        read_predictions(tmp_path / "captions.json.gz")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"There is no file .*nowhere\.json"):
        read_predictions(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        ({7: "a", 5: "b", 8: "c", 9: "d"}, r"prediction for image 8 has no references \(2 of 4 predictions"),
        ({5: "b"}, r"no prediction for image 7 \(1 of 2 images .*--allow_missing"),
        ({7: "a", 5: " "}, r"prediction for image 5 is empty \(1 of 2 .*--allow_empty"),
    ],
)
def test_predictions_must_fit_the_references(predictions, message):
    with pytest.raises(InputError, match=f"^[^\n]*{message}[^\n]*$"):
        images_to_score(predictions, ReferenceSet({7: ["a"], 5: ["b"]}))


def test_allowed_predictions_are_scored_in_the_order_of_the_references():
    references = ReferenceSet({7: ["a"], 5: ["b"], 3: ["c"]})
    assert images_to_score({5: "", 7: "a"}, references, allow_missing=True, allow_empty=True) == [7, 5]


ROWS = {"1": ["a dog runs", "a brown dog"], "2": ["a cat"]}
REFERENCES = {
    "COCO": {
        "images": [{"id": int(key), "file_name": f"{key}.jpg"} for key in ROWS],
        "annotations": [{"image_id": int(key), "caption": text} for key, texts in ROWS.items() for text in texts],
    },
    "COCO, long file names": {
        "images": [{"id": int(key), "file_name": f"COCO_val2014_00000000000{key}.jpg"} for key in ROWS],
        "annotations": [{"image_id": int(key), "caption": text} for key, texts in ROWS.items() for text in texts],
    },
    "Karpathy": {
        "images": [
            {
                "imgid": int(key),
                "filename": f"{key}.jpg",
                "split": "test",
                "sentences": [{"raw": text} for text in texts],
            }
            for key, texts in ROWS.items()
        ]
    },
    "TextCaps": {"data": [{"image_id": key, "image_path": f"{key}.jpg", "reference_strs": ROWS[key]} for key in ROWS]},
    "lists by image": ROWS,
    "dicts by image": {key: [{"caption": text} for text in texts] for key, texts in ROWS.items()},
    "rows": [{"image_id": int(key), "captions": texts} for key, texts in ROWS.items()],
    "a row for each caption": [
        {"id": f"c{text}", "image": f"photos/{key}.jpg", "caption": text}
        for key, texts in ROWS.items()
        for text in texts
    ],
    "table": "image,caption\n1.jpg,a dog runs\n1.jpg,a brown dog\n2.jpg,a cat\n",
    "table of ids": "image_id,caption\n1,a dog runs\n1,a brown dog\n2,a cat\n",
    "token file": "1.jpg#0\ta dog runs\n1.jpg#1\ta brown dog\n2.jpg#0\ta cat\n",
}
PREDICTIONS = {
    "COCO results": [{"image_id": 1, "caption": "a dog"}, {"image_id": 2, "caption": "a cat"}],
    "command caption": [{"image_id": "imgs/1.jpg", "caption": "a dog"}, {"image_id": "imgs/2.jpg", "caption": "a cat"}],
    "lists by image": {"1": ["a dog"], "2": ["a cat"]},
    "dicts by image": {"1": [{"caption": "a dog"}], "2": [{"caption": "a cat"}]},
    "captions by file": {"1.jpg": "a dog", "2.jpg": "a cat"},
    "table": "image_id,caption\n1,a dog\n2,a cat\n",
    "Windows paths": [
        {"file_name": "imgs\\1.jpg", "caption": "a dog"},
        {"file_name": "imgs\\2.jpg", "caption": "a cat"},
    ],
}


@pytest.mark.parametrize("references", REFERENCES)
@pytest.mark.parametrize("predictions", PREDICTIONS)
def test_predictions_of_every_form_join_references_of_every_form(write, references, predictions):
    files = REFERENCES[references], PREDICTIONS[predictions]
    names = (f"{number}.{'csv' if isinstance(content, str) else 'json'}" for number, content in enumerate(files))
    references_file, predictions_file = map(write, files, names)
    captions, found = join(read_predictions(predictions_file), read_references(references_file))
    pairs = {captions[image]: found.captions[image] for image in images_to_score(captions, found)}
    assert pairs == {"a dog": ROWS["1"], "a cat": ROWS["2"]}


def test_conversations_of_one_round_are_references(write):
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "a dog runs"}]
    row = {"image": "1.jpg", "conversations": turns}
    assert read_references(write([row], "r.json")).captions == {"1.jpg": ["a dog runs"]}
    with pytest.raises(InputError, match="entry 0 has several prompts: score it with --dataset_name"):
        read_references(write([{**row, "conversations": turns * 2}], "r.json"))


def test_predictions_that_fit_no_reference_are_refused_with_an_example_of_each():
    with pytest.raises(InputError, match="No prediction is of an image .* predictions is 'x.jpg', one of .* is 'y'"):
        join({"x.jpg": "a dog"}, ReferenceSet({"y": ["a dog"]}))


def test_a_name_that_two_references_have_joins_neither():
    references = ReferenceSet({7: ["a"], 8: ["b"], 9: ["c"]}, {7: "a/1.jpg", 8: "b/1.jpg", 9: "2.jpg"})
    assert join({"1.jpg": "x", "2.jpg": "y"}, references)[0] == {"1.jpg": "x", 9: "y"}


def test_only_the_split_of_the_predictions_is_scored(write):
    images = [
        {"cocoid": number, "filename": f"{number}.jpg", "split": split, "sentences": [{"raw": split}]}
        for number, split in enumerate(["train", "test", "test"])
    ]
    _, references = join({1: "a dog"}, read_references(write({"images": images})))
    assert references.captions == {1: ["test"], 2: ["test"]}


def test_images_without_a_valid_caption_of_vizwiz_are_not_scored(write):
    marks = {"is_rejected": False, "is_precanned": False}
    annotations = [
        {"image_id": 0, "caption": "a red box", **marks},
        {"image_id": 0, "caption": "spam", **marks, "is_rejected": True},
        {"image_id": 1, "caption": "bad quality", **marks, "is_precanned": True},
    ]
    path = write({"images": [{"id": 0}, {"id": 1}], "annotations": annotations})
    captions, references = join({0: "a box", 1: "a dog"}, read_references(path))
    assert captions == {0: "a box"} and references.captions == {0: ["a red box"]}
    kept = read_references(path, VizWizRules(ignore_rejected=False, ignore_precanned=False))
    assert kept.captions == {0: ["a red box", "spam"], 1: ["bad quality"]}


def test_references_in_parquet_are_read_without_their_images(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"image": [{"bytes": b"x", "path": "1.jpg"}], "image_id": [1], "caption": [["a dog", "dog"]]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "references.parquet")
    assert read_references(tmp_path / "references.parquet").captions == {1: ["a dog", "dog"]}
