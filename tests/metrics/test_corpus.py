"""Caption scores equal those of the COCO toolkit: for real systems, for random corpora and in known corner cases."""

import json
import random
import subprocess
import sys

import numpy as np
import pytest

from qformer_captioner.common.errors import InputError
from qformer_captioner.metrics import DocumentFrequencies, References, tokenize

from ..conftest import ROOT

# Written by `python -m tests.metrics.test_corpus`, which needs pycocoevalcap.
GOLDEN = ROOT / "tests" / "fixtures" / "scores_golden.json"
KEYS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider")


def random_corpus(seed: int) -> tuple[list[str], list[list[str]]]:
    """Return predictions and references of random words: few or many images, small or large vocabularies."""
    draw = random.Random(seed)
    words = draw.choice([3, 10, 50, 1000])

    def caption() -> str:
        return " ".join(f"w{draw.randrange(words)}" for _ in range(draw.randint(1, 15)))

    references = [[caption() for _ in range(draw.randint(1, 5))] for _ in range(draw.randint(2, 30))]
    return [draw.choice(texts) if draw.random() < 0.5 else caption() for texts in references], references


def toolkit_scores(predictions: list[str], references: list[list[str]]) -> dict[str, list]:
    """Return pycocoevalcap's score of the corpus and of each image, for captions whose tokens are joined by spaces."""
    import contextlib
    import io

    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    results, targets = {i: [text] for i, text in enumerate(predictions)}, dict(enumerate(references))
    with contextlib.redirect_stdout(io.StringIO()):
        bleu, bleu_of_images = Bleu(4).compute_score(targets, results)
        rouge, rouge_of_images = Rouge().compute_score(targets, results)
        cider, cider_of_images = Cider().compute_score(targets, results)
    corpus = [*map(float, bleu), float(rouge), float(cider)]
    images = [list(map(float, values)) for values in (*bleu_of_images, rouge_of_images, cider_of_images)]
    return {key: [score, values] for key, score, values in zip(KEYS, corpus, images, strict=True)}


def assert_equal(scores: dict, expected: dict[str, list]) -> None:
    for key, (corpus, images) in expected.items():
        assert scores[key] == pytest.approx(corpus, abs=1e-12, rel=0)
        np.testing.assert_allclose(scores["per_image"][key], images, atol=1e-12, rtol=0)


# --- Equal to the toolkit ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_scores_equal_the_toolkits_golden_scores(seed):
    predictions, references = random_corpus(seed)
    scores = References(references).score(predictions, per_image=True)
    assert_equal(scores, json.loads(GOLDEN.read_text())[seed])


@pytest.mark.slow
def test_scores_equal_the_toolkits_on_150_random_corpora():
    pytest.importorskip("pycocoevalcap", reason="needs pycocoevalcap (the extra [java]) to compare with")
    for seed in range(150):
        predictions, references = random_corpus(seed)
        assert_equal(References(references).score(predictions, per_image=True), toolkit_scores(predictions, references))


@pytest.mark.slow
@pytest.mark.parametrize(
    "system",
    ["gpt2_contrastive", "magic", "show_edit_tell_xe", "val2014_dai_2017", "val2014_vinyals_2017", "zerocap"],
)
def test_scores_of_real_systems_equal_the_toolkits(shared, karpathy, system):
    folder = shared / "data" / "coco_karpathy_test"
    predictions = {
        row["image_id"]: row["caption"] for row in json.loads((folder / f"predictions/{system}.json").read_text())
    }
    images = [image for image in karpathy if image in predictions]
    captions = [predictions[image] for image in images]  # one system has no caption for 18 images
    scores = References([karpathy[image] for image in images]).score(captions, allow_empty=True)
    expected = json.loads((folder / "scores.json").read_text())["reproduced"][system]
    assert len(images) == expected["n"]
    for key, name in zip(KEYS, ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"), strict=True):
        assert scores[key] == pytest.approx(expected[name], abs=1e-12, rel=0)


@pytest.fixture(scope="module")
def karpathy(shared) -> dict[int, list[str]]:
    content = json.loads((shared / "data" / "coco_karpathy_test" / "captions_karpathy_test.json").read_text())
    captions = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        captions[annotation["image_id"]].append(annotation["caption"])
    return captions


# --- Corner cases -----------------------------------------------------------------------------------------------------


def test_the_last_caption_is_tokenised_as_in_the_toolkit():
    """The word "they've" gives "they" and "'ve" at the end of a line, but "they" and "ve" at the end of the file."""
    references = [["a dog runs", "a brown dog"], ["they've two cats here", "they've got cats", "two cats"]]
    scores = References(references).score(["a dog runs", "two cats they've"])
    assert scores["bleu_1"] == pytest.approx(6 / 7)
    assert scores["cider"] == pytest.approx(3.4005, abs=1e-4)


def test_a_perfect_caption_of_three_words_has_cider_7_5():
    """It has no 4-grams, so one of the four similarities is 0."""
    scores = References([["a red star"], ["two blue cats"]]).score(["a red star", "no"], per_image=True)
    assert scores["per_image"]["cider"][0] == pytest.approx(7.5)


def test_a_fraction_is_two_words_for_bleu_and_one_for_rouge():
    (tokens,) = tokenize(["2 1/2 dogs"])
    assert tokens == ["2\u00a01/2", "dogs"]
    scores = References([["2 1/2 dogs"], ["a cat"]]).score(["2 dogs", "a cat"])
    assert scores["bleu_1"] == pytest.approx(np.exp(1 - 5 / 4), abs=1e-8)  # all four words right, one missing
    assert scores["rouge_l"] == pytest.approx((0.5 + 1) / 2)


def test_bleu_and_cider_split_a_token_at_white_space_as_in_the_toolkit():
    pytest.importorskip("pycocoevalcap", reason="needs pycocoevalcap (the extra [java]) to compare with")
    caption = "see http://a.com/x\u3000king here"
    tokens = [" ".join(words) for words in tokenize([caption, "a dog"])]
    assert "\u3000" in tokens[0]
    scores = References([[caption, "a b c"], ["a dog"]]).score([caption, "a dog"], per_image=True)
    assert_equal(scores, toolkit_scores(tokens, [[tokens[0], "a b c"], [tokens[1]]]))


def test_allowed_empty_predictions_score_0():
    scores = References([["a dog runs"], ["a cat"]]).score(["", "a cat"], per_image=True, allow_empty=True)
    assert [scores["per_image"][key][0] for key in ("bleu_1", "rouge_l", "cider")] == [0, 0, 0]
    assert scores["bleu_1"] == pytest.approx(np.exp(1 - 5 / 2), abs=1e-8)


def test_a_word_that_no_reference_contains_lowers_cider():
    references = References([["a dog runs"], ["a cat sleeps"]])
    with_unknown, without = (references.score([caption, "a cat"], per_image=True) for caption in ("dog xyzzy", "dog"))
    assert with_unknown["per_image"]["cider"][0] < without["per_image"]["cider"][0]


def test_a_single_image_has_cider_0_and_a_warning_explains_it():
    with pytest.warns(UserWarning, match="single image"):
        assert References([["a dog runs", "a dog"]]).score(["a dog runs"])["cider"] == 0


def test_the_order_of_images_does_not_matter():
    predictions, references = random_corpus(1)
    forward = References(references).score(predictions)
    assert References(references[::-1]).score(predictions[::-1]) == pytest.approx(forward, abs=1e-12)


def test_a_line_separator_in_a_caption_changes_no_score():
    predictions, references = random_corpus(2)
    before = References(references).score(predictions, per_image=True)["per_image"]["cider"]
    for separator in "\n\r\x0b\x0c\x1c\x85\u2028\u2029":
        broken = [predictions[0].replace(" ", separator, 1), *predictions[1:]]
        assert References(references).score(broken, per_image=True)["per_image"]["cider"] == pytest.approx(before)


def test_references_give_the_same_scores_again():
    predictions, references = random_corpus(3)
    prepared = References(references)
    first = prepared.score(predictions)
    prepared.score(["other words altogether"] * len(predictions))
    assert prepared.score(predictions) == first == References(references).score(predictions)


# --- Document frequencies ---------------------------------------------------------------------------------------------


def test_saved_frequencies_of_the_same_corpus_give_the_same_scores(tmp_path):
    predictions, references = random_corpus(4)
    References(references).document_frequencies().save(tmp_path / "df.json.gz")
    saved = References(references, df=tmp_path / "df.json.gz").score(predictions)
    assert saved == pytest.approx(References(references).score(predictions), abs=1e-12)


def test_with_frequencies_of_the_corpus_a_part_scores_the_mean_of_its_images():
    predictions, references = random_corpus(5)
    whole = References(references)
    cider_of_images = whole.score(predictions, per_image=True)["per_image"]["cider"]
    part = References(references[:3], df=whole.document_frequencies()).score(predictions[:3])
    assert part["cider"] == pytest.approx(sum(cider_of_images[:3]) / 3, abs=1e-12)
    assert References(references[:3]).score(predictions[:3])["cider"] != pytest.approx(part["cider"], abs=1e-3)


def test_a_file_without_document_frequencies_is_refused(tmp_path):
    (tmp_path / "df.json.gz").write_text("{}")
    DocumentFrequencies(0, [{}, {}, {}, {}]).save(tmp_path / "none.json.gz")
    for path in (tmp_path / "df.json.gz", tmp_path / "missing", tmp_path / "none.json.gz"):
        with pytest.raises(InputError, match=path.name):
            References([["a"]], df=path)
    assert DocumentFrequencies(3, [{"a": 1}, {}, {}, {}]).images == 3


# --- Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        (["a", 1, None], [["a"], ["b"], ["c"]], "Prediction 1 is 1, which is not a string, and 1 more"),
        (["a", " ", ""], [["a"], ["b"], ["c"]], "Prediction 1 is empty .*, and 1 more"),
        (["a", "b"], [["a"], []], "Prediction 1 has no references"),
        (["a", "b"], ["a", "b"], "references of prediction 0 are 'a', which is not a list"),
        (["a", "b"], [["a"], ["b", None]], "references of prediction 1 .* not all of them are strings"),
        (["a"], [["a"], ["b"]], "1 predictions but 2 lists"),
        ([], [], "nothing to score"),
        ("ab", [["a"], ["b"]], "The predictions are one string"),
    ],
)
def test_the_error_names_what_cannot_be_scored(predictions, references, message):
    from qformer_captioner.metrics import CaptionMetrics

    with pytest.raises(InputError, match=message):
        CaptionMetrics().compute(predictions=predictions, references=references)


def test_predictions_and_references_may_be_any_iterables():
    from qformer_captioner.metrics import CaptionMetrics

    predictions, references = ["a dog", "a cat"], [["a dog"], ["two cats"]]
    scores = CaptionMetrics().compute(predictions=iter(predictions), references=iter(references))
    assert scores == CaptionMetrics().compute(predictions=predictions, references=references)


# --- evaluate ---------------------------------------------------------------------------------------------------------


def test_the_metric_gives_the_scores_of_references():
    from qformer_captioner.metrics import Bleu, CaptionMetrics, Cider, RougeL

    predictions, references = random_corpus(6)
    expected = References(references).score(predictions, per_image=True)
    metric = CaptionMetrics()
    for _ in range(2):  # the second call uses the references that the first one prepared
        assert metric.compute(predictions=predictions, references=references, per_image=True) == expected
    metric.add_batch(predictions=predictions[:1], references=references[:1])
    metric.add_batch(predictions=predictions[1:], references=references[1:])
    assert metric.compute() == {key: expected[key] for key in KEYS}
    separate = {}
    for metric_class in (Bleu, RougeL, Cider):
        separate |= metric_class().compute(predictions=predictions, references=references)
    assert separate == {key: expected[key] for key in KEYS}


def test_the_metric_takes_unpaired_surrogates_arrays_and_columns():
    import datasets

    from qformer_captioner.metrics import Cider

    references = [["a dog \ud83d runs", "a dog"], ["a cat"]]
    expected = References(references).score(["a dog runs", "a cat \ud83d"], ["cider"])
    metric = Cider()
    assert metric.compute(predictions=["a dog runs", "a cat \ud83d"], references=references) == expected
    arrays = [np.array(["a dog runs", "a dog"]), np.array(["a cat"])]
    assert metric.compute(predictions=np.array(["a dog runs", "a cat"]), references=arrays) == expected
    rows = datasets.Dataset.from_dict({"ours": ["a dog runs", "a cat"], "theirs": [["a dog runs", "a dog"], ["a cat"]]})
    assert metric.compute(predictions=rows["ours"], references=rows["theirs"]) == expected


def test_the_metric_takes_other_references_in_the_next_call():
    from qformer_captioner.metrics import Cider

    metric = Cider()
    for seed in (7, 8):
        predictions, references = random_corpus(seed)
        assert metric.compute(predictions=predictions, references=references) == {
            "cider": References(references).score(predictions)["cider"]
        }


@pytest.mark.parametrize("name", ["cider", "bleu", "rouge_l", "caption_metrics"])
def test_evaluate_loads_each_metric_from_its_folder(name):
    import evaluate

    metric = evaluate.load(str(ROOT / "metrics" / "spaces" / name))
    predictions, references = random_corpus(9)
    scores = metric.compute(predictions=predictions, references=references)
    expected = References(references).score(predictions)
    assert scores == {key: expected[key] for key in scores}
    assert set(scores) == {"caption_metrics": set(KEYS), "bleu": set(KEYS[:4])}.get(name, {name})


@pytest.mark.slow
def test_scoring_imports_neither_evaluate_nor_torch():
    program = (
        "import sys, qformer_captioner\n"
        "from qformer_captioner.metrics import References\n"
        "References([['a dog'], ['a cat']]).score(['a dog', 'a cat'])\n"
        "print([name for name in ('evaluate', 'torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.stdout.strip() == "[]", done.stderr


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps([toolkit_scores(*random_corpus(seed)) for seed in range(20)]) + "\n")
