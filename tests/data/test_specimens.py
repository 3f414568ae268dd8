"""Small files of the forms that people have, and which captions belong to which image in them."""

import pytest

from qformer_captioner.common.errors import InputError
from qformer_captioner.evaluation.caption_files import images_to_score, join, read_predictions, read_references

from ..fixtures.read_rows import read_data


def one_each(*captions: str) -> list[tuple[str, list[str]]]:
    """Return rows of a red, a green and a blue image with one caption each."""
    return [(colour, [caption]) for colour, caption in zip(("red", "green", "blue"), captions, strict=False)]


COFFEE = one_each("a red café", "a green café", "a blue café")
RIGHT = {
    "K1_csv/numbers.csv": one_each("007", "42", "3.50"),
    "K1_csv/true_false.csv": one_each("True", "False"),
    "K1_csv/quote.tsv": one_each('"a red shape', "a green shape", 'a "blue" shape'),
    "K1_csv/trailing_comma.csv": one_each("a red shape", "a green shape"),
    "K2_text/semicolon.csv": COFFEE,
    "K2_text/UPPER.CSV": COFFEE,
    "K2_text/coco_with_bom.json": one_each("a red", "a green", "a blue"),
    "K3_structure/json_list_in_cell.csv": [
        (colour, [f"Two {colour} guys.", f"A {colour} yard."]) for colour in ("red", "green", "blue")
    ],
    "K3_structure/python_list_in_cell.csv": [("red", ["a red shape", "red thing"]), ("green", ["a green shape"])],
    "K3_structure/text_key.json": one_each("a red", "a green", "a blue"),
    "K19_forms/captions.txt": one_each("A red shape .", "A green shape .", "A blue shape ."),
    "K19_forms/Flickr8k.token.txt": [
        (colour, [f"A {colour} shape {number} ."]) for colour in ("red", "green", "blue") for number in (0, 1)
    ],
    "K19_forms/results.csv": [
        (colour, [f"A {colour} shape , view {number} ."]) for colour in ("red", "green", "blue") for number in (0, 1)
    ],
    "K19_forms/textcaps.json": [
        (colour, [f"a {colour} box", f"{colour} thing"]) for colour in ("red", "green", "blue")
    ],
}


@pytest.mark.parametrize("name", RIGHT)
def test_each_image_has_its_captions(name, shared):
    data = read_data("--dataset_name", shared / "specimens" / name)
    assert data.train == RIGHT[name] and not data.skipped


def test_labels_of_classes_are_captions(shared):
    data = read_data("--dataset_name", shared / "specimens/K3_structure/classes", "--caption_column", "label")
    assert data.train == one_each("cat", "dog")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("K1_csv/unquoted_comma.csv", "Line 2 of .* has 3 fields"),
        ("K8_coco/orphan.json", "is of image 99999, which is not among its images"),
        ("K8_coco/instances.json", "holds no captions: its annotations are dictionaries with .*'bbox'"),
        ("K19_forms/Train_GCC-training.tsv", "http://127.0.0.1:9/1.jpg"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason(name, message, shared):
    with pytest.raises(InputError, match=message) as caught:
        read_data("--dataset_name", shared / "specimens" / name)
    assert len(str(caught.value)) <= 500


def test_captions_that_vizwiz_marks_are_left_out_and_counted(shared):
    folder = shared / "specimens/K4_vizwiz"
    options = ["--dataset_name", folder / "annotations/train.json", "--image_folder", folder / "train"]
    data = read_data(*options)
    assert data.train == one_each("A red box on a table.", "A green can.")
    assert len(data.skipped) == 4  # three captions, and the image without another caption
    kept = read_data(*options, "--ignore_precanned", "false", "--ignore_rejected", "false")
    assert [len(captions) for _, captions in kept.train] == [3, 1, 1]


def test_references_of_vizwiz_are_those_of_its_evaluation(shared):
    folder = shared / "specimens/K4_vizwiz"
    captions, references = join(
        read_predictions(folder / "predictions.json"), read_references(folder / "annotations/train.json")
    )
    assert images_to_score(captions, references) == [0, 1]
    assert references.captions == {0: ["A red box on a table."], 1: ["A green can."]}


@pytest.mark.parametrize("references", ["refs_coco.json", "refs_karpathy.json", "toolkit_ref.json"])
@pytest.mark.parametrize(
    "predictions", ["preds.json", "preds.csv", "toolkit_hypo.json", "preds_of_caption_command.json"]
)
def test_predictions_join_references_of_another_form(references, predictions, shared):
    folder = shared / "specimens/K13_eval"
    captions, found = join(read_predictions(folder / predictions), read_references(folder / references))
    images = images_to_score(captions, found)
    assert [captions[image] for image in images] == ["a dog runs", "a cat"]
    assert [found.captions[image][0][:5] for image in images] == ["a dog", "a cat"]
