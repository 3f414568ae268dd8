"""Rewards of n-grams equal the toolkit, count the end of a caption as a word, and keep frequencies with the run."""

import gzip
import json
import math
from collections import Counter

import numpy as np
import pytest

from qformer_captioner.common.errors import InputError
from qformer_captioner.metrics import DocumentFrequencies, References
from qformer_captioner.metrics.tokenized import TokenizedReferences
from qformer_captioner.rewards import RewardContext, load_rewards
from qformer_captioner.rewards.ngrams import FREQUENCIES_NAME

from ..metrics.test_corpus import GOLDEN, random_corpus

END = 2
TRAIN = [
    ["a man rides a wave", "a surfer on a wave"],
    ["a dog runs on the beach", "a brown dog on sand"],
    ["two cats sleep on a bed"],
]


def load(folder, *names: str, references=TRAIN, **fields):
    context = RewardContext(run_folder=folder, train_references=lambda: references, eos_token_id=[END], **fields)
    return load_rewards(names, None, context)


def score(rewards, completions: list[str], references: list[list[str]], ended: list[bool] | None = None):
    ids = [[7, 8, END] if end else [7, 8] for end in ended or [True] * len(completions)]
    return rewards([""] * len(completions), completions, references=references, completion_ids=ids)


def refuse() -> list[list[str]]:
    raise AssertionError("the training references were read again")


# --- CIDEr of a few images with stored frequencies --------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_one_image_at_a_time_scores_as_in_the_whole_corpus_of_the_toolkit(seed):
    """Images are scored as in a batch of samples: each alone, with the document frequencies of all."""
    predictions, references = random_corpus(seed)
    _, expected = json.loads(GOLDEN.read_text())[seed]["cider"]
    frequencies = References(references).document_frequencies()
    for prediction, texts, cider in zip(predictions, references, expected, strict=True):
        alone = TokenizedReferences([[text.split() for text in texts]], frequencies)
        assert alone.cider([prediction.split()])[0] == pytest.approx(cider, abs=1e-9, rel=0)


def test_the_table_of_frequencies_is_indexed_once(monkeypatch):
    frequencies = References(TRAIN).document_frequencies()
    first = References(TRAIN[:1], frequencies).score(["a dog"])
    index = frequencies.index
    size = index.vocabulary.size(4)
    assert References(TRAIN[:1], frequencies).score(["a dog"]) == first
    assert frequencies.index is index and index.vocabulary.size(4) == size


def test_cider_with_the_end_equals_the_toolkit_with_a_last_word(tmp_path):
    pytest.importorskip("pycocoevalcap", reason="needs pycocoevalcap (the extra [java]) to compare with")
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    completions, ended = ["a man rides on a", "a dog runs on the beach", "two cats"], [False, True, True]
    scorer = CiderScorer()
    for completion, has_end, captions in zip(completions, ended, TRAIN, strict=True):
        scorer += (completion + " <eos>" * has_end, [caption + " <eos>" for caption in captions])
    _, expected = scorer.compute_score()
    scores = score(load(tmp_path, "cider"), completions, TRAIN, ended)
    np.testing.assert_allclose(scores.total, expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["cider", "bleu_4"])
def test_a_caption_that_breaks_off_loses(tmp_path, name):
    rewards = load(tmp_path, name)
    complete, broken, padded = score(
        rewards,
        ["a man rides a wave", "a man rides a wave on a", "a man rides a wave"],
        TRAIN[:1] * 3,
        [True, True, False],
    ).total.tolist()
    assert complete > broken and complete > padded


# --- BLEU-4 -----------------------------------------------------------------------------------------------------------


def bleu_plus_one(prediction: list[str], references: list[list[str]]) -> float:
    """BLEU-4 of one caption by the definition of Lin and Och, with Python's counters."""
    logs = []
    for n in range(1, 5):
        ngrams = [Counter(zip(*(words[i:] for i in range(n)), strict=False)) for words in (prediction, *references)]
        best = Counter()
        for reference in ngrams[1:]:
            best |= reference
        correct, possible = (ngrams[0] & best).total(), ngrams[0].total()
        logs.append(math.log((correct + (n > 1)) / (possible + (n > 1))))
    closest = min((abs(len(reference) - len(prediction)), len(reference)) for reference in references)[1]
    return math.exp(sum(logs) / 4 + min(1 - closest / len(prediction), 0))


def test_bleu_4_is_that_of_lin_and_och(tmp_path):
    completions = ["a surfer rides a wave", "dog on a the the sand", "cats"]
    ended = [True, False, True]
    expected = [
        bleu_plus_one(completion.split() + ["<eos>"] * end, [[*caption.split(), "<eos>"] for caption in captions])
        for completion, end, captions in zip(completions, ended, TRAIN, strict=True)
    ]
    np.testing.assert_allclose(score(load(tmp_path, "bleu_4"), completions, TRAIN, ended).total, expected, rtol=1e-6)


def test_empty_captions_score_0(tmp_path):
    scores = score(load(tmp_path, "cider", "bleu_4"), ["", ""], TRAIN[:2], [False, True])
    assert scores.by_name["cider"].tolist() == [0, 0]
    assert scores.by_name["bleu_4"][0] == 0 and scores.by_name["bleu_4"][1] < 0.05


# --- Document frequencies of a run ------------------------------------------------------------------------------------


def test_frequencies_are_stored_with_the_run_and_read_again(tmp_path):
    before = score(load(tmp_path / "run", "cider"), ["a dog"], TRAIN[1:2]).total
    with gzip.open(tmp_path / "run" / FREQUENCIES_NAME, "rt") as file:
        table = json.load(file)
    assert table["images"] == 3 and table["counts"][0]["<eos>"] == 3 and table["counts"][1]["wave <eos>"] == 1
    context = RewardContext(run_folder=tmp_path / "run", train_references=refuse, eos_token_id=[END])
    after = score(load_rewards(["cider"], None, context), ["a dog"], TRAIN[1:2]).total
    assert before == after > 0


def test_frequencies_of_another_tokenizer_are_refused(tmp_path):
    load(tmp_path, "cider", tokenize="characters")
    with pytest.raises(InputError, match=r"is of the tokenizer 'characters <eos>', not 'ptb <eos>': delete it"):
        load(tmp_path, "cider")


def test_frequencies_need_two_images_with_captions(tmp_path):
    with pytest.raises(InputError, match="there are 1 images with captions: use at least two"):
        load(tmp_path, "cider", references=[["a dog"], []])
    assert not (tmp_path / FREQUENCIES_NAME).exists()


def test_references_without_spaces_need_a_tokenizer(tmp_path):
    chinese = [["一只狗在草地上奔跑"], ["两只猫在床上睡觉"]]
    for name in ("cider", "bleu_4"):
        with pytest.raises(InputError, match="no spaces between words.*--tokenize characters"):
            score(load(tmp_path, name, references=chinese), ["一只狗"], chinese[:1])
        assert score(load(tmp_path, name, references=chinese, tokenize="characters"), ["一只狗"], chinese[:1]).total > 0
        (tmp_path / FREQUENCIES_NAME).unlink(missing_ok=True)


def test_an_image_without_references_is_refused(tmp_path):
    with pytest.raises(InputError, match="needs a reference caption for every image"):
        score(load(tmp_path, "cider"), ["a dog", "a cat"], [TRAIN[0], []])


def test_a_table_of_the_public_metrics_has_no_ends():
    assert isinstance(frequencies := References(TRAIN).document_frequencies(), DocumentFrequencies)
    assert "<eos>" not in frequencies.counts[0] and frequencies.tokenizer == "ptb"
