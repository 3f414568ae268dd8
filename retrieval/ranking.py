"""Recall of a corpus by contrast alone, and re-ranked by matching."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..evaluation.recall import ranks, recalls_of_ranks


@dataclass(frozen=True)
class Reranking:
    """How the first candidates are ranked again.

    Args:
        top_k: number of candidates that are ranked again; LAVIS takes 128.
        score: "sum" for the matching logit plus the similarity, as LAVIS does, or "match" for the probability of
            matching alone.
    """

    top_k: int = 128
    score: str = "sum"


@dataclass(frozen=True)
class Rankings:
    """Scores of all pairs of images and texts, for each direction of retrieval.

    Args:
        similarity: similarity of N images and M texts, `[N, M]`.
        image_of_text: place of the image of each text, int64 `[M]`.
        match_logits: logits of not matching and of matching of pairs, `[N, M, 2]`, NaN for pairs that are not matched;
            `None` for similarity alone.
        reranking: how the first candidates are ranked again.

    Example:

    ```python
    >>> import torch
    >>> from qformer_captioner.retrieval.ranking import Rankings
    >>> Rankings(torch.eye(2), torch.tensor([0, 1])).recalls()["text_to_image_r1"]
    1.0
    ```
    """

    similarity: torch.Tensor
    image_of_text: torch.Tensor
    match_logits: torch.Tensor | None = None
    reranking: Reranking = Reranking()

    def scores(self, to_texts: bool) -> torch.Tensor:
        """Return the scores `[N, M]` by which images rank texts (`to_texts`), or texts rank images.

        With matching, candidates after the first `top_k` have the score -inf, which is below all others.
        """
        if self.match_logits is None:
            return self.similarity
        is_candidate = first_candidates(self.similarity, self.reranking.top_k, dim=1 if to_texts else 0)
        no_match, match = self.match_logits.unbind(dim=-1)
        scores = match + self.similarity if self.reranking.score == "sum" else match - no_match
        return torch.where(is_candidate, scores, -torch.inf)

    def ranks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rank of each image among the texts `[N]`, and of each text among the images `[M]`, from 0."""
        image_ranks, _ = ranks(self.scores(to_texts=True), self.image_of_text)
        _, text_ranks = ranks(self.scores(to_texts=False), self.image_of_text)
        return image_ranks, text_ranks

    def recalls(self) -> dict[str, float]:
        """Return the recall in both directions, as [`recalls`] of evaluation/recall.py names it."""
        return recalls_of_ranks(*self.ranks())

    def folds(self, size: int) -> Iterator["Rankings"]:
        """Yield the rankings of each fold of consecutive images and their texts.

        Args:
            size: number of images of a fold. Images after the last whole fold are left out.
        """
        for start in range(0, len(self.similarity) - size + 1, size):
            images = slice(start, start + size)
            texts = (self.image_of_text >= start) & (self.image_of_text < start + size)
            yield Rankings(
                self.similarity[images][:, texts],
                self.image_of_text[texts] - start,
                None if self.match_logits is None else self.match_logits[images][:, texts],
                self.reranking,
            )

    def recalls_of_folds(self, size: int) -> dict[str, float]:
        """Return the mean of the recalls of all folds, as papers report it for 5 folds of 1,000 images of COCO."""
        recalls = [fold.recalls() for fold in self.folds(size)]
        return {name: sum(values[name] for values in recalls) / len(recalls) for name in recalls[0]}

    def candidate_pairs(self, fold_size: int | None = None) -> torch.Tensor:
        """Return the pairs whose matching logits the recalls need, as places `[P, 2]` of image and text, sorted.

        They are the first texts of each image, and the first images of each text. A fold has its own.

        Args:
            fold_size: number of images of a fold; `None` without folds.
        """
        needed = torch.zeros(self.similarity.shape, dtype=torch.bool)
        for dim in (0, 1):
            needed |= first_candidates(self.similarity, self.reranking.top_k, dim)
        if fold_size is not None:
            for number, fold in enumerate(self.folds(fold_size)):
                start = number * fold_size
                texts = torch.nonzero((self.image_of_text >= start) & (self.image_of_text < start + fold_size))[:, 0]
                pairs = fold.candidate_pairs()
                needed[pairs[:, 0] + start, texts[pairs[:, 1]]] = True
        return needed.nonzero()


def first_candidates(scores: torch.Tensor, k: int, dim: int) -> torch.Tensor:
    """Return a mask, bool `[N, M]`, of the k candidates with the highest scores along a dimension."""
    k = min(k, scores.shape[dim])
    return torch.zeros_like(scores, dtype=torch.bool).scatter(dim, scores.topk(k, dim=dim).indices, True)
