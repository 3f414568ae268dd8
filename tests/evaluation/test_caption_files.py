"""Files of captions: which can be read, and which error names the others."""

import gzip
import json

import pytest

from qformer_captioner.common.errors import InputError
from qformer_captioner.evaluation.caption_files import ReferenceSet, images_to_score, read_predictions, read_references

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
            "is not valid JSON and may have been cut off: Unterminated string .* line 1",
        ),
        ('{"image_id": 1, "caption": "a"}\n{"image_id": 2, "cap', "not valid JSON.* line 2"),
        ("[\n1,\n", "not valid JSON.* line 3"),
        ("[" * 100_000, "is not a file of captions"),
        ("[" + "1" * 5_000, "is not a file of captions"),
        ("image_id,caption\n1,a dog\n", "does not hold JSON of captions: give COCO's JSON, or JSON lines"),
        ([], "does not hold a list of captions: give COCO results JSON, or JSON lines"),
        ({"1": "a dog"}, """entry 0 has no 'image_id' .* as in {"image_id": 1, "caption": "a dog"}"""),
        ([{"caption": "a"}, {"image_id": 1, "caption": "a"}, {}], r"entry 0 has no 'image_id' .* \(2 in all\)"),
        ([1], "entry 0 has no 'image_id'"),
        ([{"image_id": 1}], "image 1 has no 'caption'"),
        ([{"image_id": [1], "caption": "a"}], r"\[1\] is not an image id"),
        (
            [{"image_id": 1, "caption": None}, {"image_id": 2, "caption": 3}],
            r"image 1 is None, which is not a string \(2 in all\)",
        ),
        ([{"image_id": 1, "caption": "a"}] * 3, "image 1 occurs more than once"),
        (COCO, "does not hold a list of captions"),
    ],
)
def test_the_error_names_and_counts_bad_predictions(write, content, message):
    path = write(content)
    with pytest.raises(InputError, match=f"^[^\n]*{path.name}[^\n]*{message}[^\n]*$"):
        read_predictions(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("5", "does not hold JSON of captions"),
        ([], "holds no images: give COCO annotation JSON, or JSON lines"),
        ({"images": [], "annotations": []}, "holds no images"),
        ({"annotations": []}, "no list 'images'"),
        (
            COCO | {"images": [{"id": 7, "domain": ["a"]}, {"id": 5}]},
            r"domain of image 7 is \['a'\], which is not a string",
        ),
        (COCO | {"images": COCO["images"] * 2}, r"image 7 occurs more than once \(2 in all\)"),
        (COCO | {"images": COCO["images"][:1]}, "an annotation is of image 5, which is not among"),
        (COCO | {"images": [*COCO["images"], {"id": 9}]}, "image 9 has no reference"),
        (COCO | {"annotations": [{"image_id": 5}]}, "annotation 0 has no 'image_id' and 'caption'"),
        (COCO | {"annotations": [{"image_id": [5], "caption": "a"}]}, r"an annotation is of image \[5\]"),
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
    with pytest.raises(InputError, match="is not UTF-8 text .*: give COCO's JSON, or JSON lines, not compressed"):
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
