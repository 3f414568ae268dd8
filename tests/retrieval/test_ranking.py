"""Re-ranking and folds equal plain transcriptions of LAVIS' evaluation and of papers."""

import pytest
import torch

from qformer_captioner.evaluation.recall import recalls
from qformer_captioner.retrieval.ranking import Rankings, Reranking
from qformer_captioner.retrieval.report import cases_of
from qformer_captioner.retrieval.run import table_of


@pytest.fixture
def scores():
    """Return similarities and matching logits of 12 images with 2 texts each, and the image of each text."""
    draw = torch.Generator().manual_seed(3)
    return (
        torch.rand(12, 24, generator=draw) * 2 - 1,
        torch.randn(12, 24, 2, generator=draw),
        torch.arange(24) // 2,
    )


def plain_scores(similarity, logits, top_k, score, to_texts):
    """Rank again row by row, as LAVIS does for each image and then for each text."""
    result = torch.full_like(similarity, -100)
    rows = range(len(similarity)) if to_texts else range(similarity.shape[1])
    for row in rows:
        values = similarity[row] if to_texts else similarity[:, row]
        for place in sorted(range(len(values)), key=lambda place: -values[place])[:top_k]:
            image, text = (row, place) if to_texts else (place, row)
            probability = logits[image, text].softmax(dim=0)[1]
            result[image, text] = logits[image, text, 1] + similarity[image, text] if score == "sum" else probability
    return result


@pytest.mark.parametrize("score", ["sum", "match"])
@pytest.mark.parametrize("top_k", [1, 4, 100])
def test_reranking_equals_a_plain_transcription(scores, top_k, score):
    similarity, logits, image_of_text = scores
    result = Rankings(similarity, image_of_text, logits, Reranking(top_k, score)).recalls()
    for to_texts, way in ((True, "image_to_text"), (False, "text_to_image")):
        expected = recalls(plain_scores(similarity, logits, top_k, score, to_texts), image_of_text)
        assert {name: result[name] for name in result if way in name} == {
            name: expected[name] for name in expected if way in name
        }


def test_pairs_are_all_that_recalls_and_their_folds_read(scores):
    similarity, logits, image_of_text = scores
    reranking = Reranking(3)
    pairs = Rankings(similarity, image_of_text, reranking=reranking).candidate_pairs(fold_size=4)
    assert len(pairs) < similarity.numel() and pairs.tolist() == sorted(pairs.tolist())
    matched = torch.full_like(logits, torch.nan)
    matched[pairs[:, 0], pairs[:, 1]] = logits[pairs[:, 0], pairs[:, 1]]
    few = Rankings(similarity, image_of_text, matched, reranking)  # NaN would be refused
    everything = Rankings(similarity, image_of_text, logits, reranking)
    assert few.recalls() == everything.recalls()
    assert few.recalls_of_folds(4) == everything.recalls_of_folds(4)
    without_folds = Rankings(similarity, image_of_text, reranking=reranking).candidate_pairs()
    assert len(without_folds) < len(pairs)


def test_folds_are_scored_as_data_sets_of_their_own(scores):
    similarity, _, image_of_text = scores
    result = Rankings(similarity, image_of_text).recalls_of_folds(5)  # the last two images are left out
    parts = [
        recalls(similarity[start : start + 5, 2 * start : 2 * start + 10], torch.arange(10) // 2) for start in (0, 5)
    ]
    assert result == pytest.approx({name: (parts[0][name] + parts[1][name]) / 2 for name in result})


def test_cases_are_sorted_by_rank(scores):
    similarity, _, image_of_text = scores
    rankings = Rankings(similarity, image_of_text)
    for to_texts in (True, False):
        ranks = rankings.ranks()[0 if to_texts else 1]
        cases = cases_of(rankings, to_texts, number=3)
        assert [case.rank for case in cases["worst"]] == (ranks.sort(descending=True).values[:3] + 1).tolist()
        assert [case.rank for case in cases["best"]] == (ranks.sort().values[:3] + 1).tolist()
        best = cases["best"][0]
        assert (best.found[0][0] in best.wanted) == (best.rank == 1)


def test_candidates_that_matching_left_out_are_not_shown(scores):
    similarity, logits, image_of_text = scores
    cases = cases_of(Rankings(similarity, image_of_text, logits, Reranking(2)), to_texts=True)
    assert {len(case.found) for case in cases["worst"]} == {2}
    for case in [*cases["best"], *cases["worst"]]:
        is_found = any(place in case.wanted for place, _ in case.found)
        assert case.rank is None if not is_found else case.rank in (1, 2)


def test_the_table_shows_percent():
    names = [f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    rows = {"contrast": dict(zip(names, (0.1, 0.2, 0.3, 0.4, 0.5, 1.0), strict=True)) | {"mean_recall": 0.416}}
    *_, last = table_of(rows).splitlines()
    assert last.split() == ["contrast", "10.00", "20.00", "30.00", "40.00", "50.00", "100.00", "41.60"]
