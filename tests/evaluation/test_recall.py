"""Recall of retrieval equals a plain transcription of its definition, and ties do not help."""

import pytest
import torch

from qformer_captioner.evaluation.recall import ranks, recalls


def plain_recalls(similarity, image_of_text, ks):
    """Sort the candidates of each image and text, wrong ones first among equal scores, and search the right one."""
    scores, owners = similarity.tolist(), image_of_text.tolist()
    found = {"image_to_text": [], "text_to_image": []}
    for image, row in enumerate(scores):
        if image in owners:
            order = sorted(range(len(row)), key=lambda text: (-row[text], owners[text] == image))
            found["image_to_text"].append(next(place for place, text in enumerate(order) if owners[text] == image))
    for text, owner in enumerate(owners):
        order = sorted(range(len(scores)), key=lambda image: (-scores[image][text], image == owner))
        found["text_to_image"].append(order.index(owner))
    return {f"{way}_r{k}": sum(place < k for place in found[way]) / len(found[way]) for way in found for k in ks}


@pytest.mark.parametrize("levels", [3, 10, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_recalls_equal_a_plain_transcription(levels, dtype):
    draw = torch.Generator().manual_seed(levels)
    for _ in range(5):
        image_of_text = torch.randint(0, 9, (30,), generator=draw)  # images without, with one and with many texts
        similarity = (torch.randint(0, levels, (9, 30), generator=draw) / levels).to(dtype)
        result = recalls(similarity, image_of_text, ks=[1, 2, 5])
        expected = plain_recalls(similarity, image_of_text, [1, 2, 5])
        assert result.pop("mean_recall") == pytest.approx(sum(expected.values()) / 6)
        assert result == pytest.approx(expected)


def test_constant_scores_find_nothing_before_the_end():
    image_of_text = torch.arange(20) // 2
    image_ranks, text_ranks = ranks(torch.ones(10, 20), image_of_text)
    assert image_ranks.tolist() == [18] * 10
    assert text_ranks.tolist() == [9] * 20


def test_the_default_names_are_those_of_papers():
    names = recalls(torch.eye(12), torch.arange(12))
    assert names == dict.fromkeys(names, 1.0)
    ways = ("image_to_text", "text_to_image")
    assert list(names) == [*(f"{way}_r{k}" for way in ways for k in (1, 5, 10)), "mean_recall"]


@pytest.mark.parametrize(
    ("similarity", "image_of_text", "message"),
    [
        (torch.tensor([[0.0, torch.nan]]), torch.tensor([0, 0]), "NaN"),
        (torch.zeros(2, 3), torch.tensor([0, 1]), r"got \[2, 3\] and \[2\]"),
        (torch.zeros(2, 2), torch.tensor([0, 2]), "not one of the 2 images"),
        (torch.zeros(2, 0), torch.zeros(0, dtype=torch.int64), "needs at least one"),
    ],
)
def test_scores_without_a_recall_are_refused(similarity, image_of_text, message):
    with pytest.raises(ValueError, match=message):
        recalls(similarity, image_of_text)
