"""BLEU and CIDEr of captions that are already split into words."""

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from .bleu import smoothed_bleu
from .cider import DocumentFrequencies, FrequencyIndex, TfIdfWeights, cider
from .ngrams import ORDERS, NgramCounts, ReferenceCounts, Vocabulary, unpack_low


class CountedPredictions(NamedTuple):
    """Predictions as BLEU and CIDEr read them.

    Attributes:
        counts: n-gram counts for n = 1 to 4.
        lengths: number of words of each prediction, `[I]`.
    """

    counts: list[NgramCounts]
    lengths: np.ndarray


class TokenizedReferences:
    """Words of the references of images, prepared for any number of scorings.

    With saved document frequencies, the cost depends on the size of these references only. The n-grams of the table are
    indexed once for all objects that share it.

    Args:
        references: the words of each reference of each image. Images may have different numbers of references.
        frequencies: the document frequencies of CIDEr. `None` counts them in these references.

    Example:

    ```python
    >>> from qformer_captioner.metrics.tokenized import TokenizedReferences
    >>> references = TokenizedReferences([[["a", "dog", "runs"]], [["a", "cat"], ["two", "cats"]]])
    >>> references.cider([["a", "dog"], ["a", "bird"]]).round(2).tolist()
    [3.49, 0.0]
    ```
    """

    def __init__(self, references: Sequence[Sequence[Sequence[str]]], frequencies: DocumentFrequencies | None = None):
        sizes = [len(texts) for texts in references]
        self.num_images, self.num_references = len(references), sum(sizes)
        self.words = [words for texts in references for words in texts]  # R lists
        self.lengths = np.fromiter(map(len, self.words), np.int64, len(self.words))  # [R]
        self.image_of = np.repeat(np.arange(len(references)), sizes)  # [R]
        self.starts = np.cumsum([0, *sizes])  # [I + 1], first reference of each image
        self.saved_frequencies = frequencies
        self.vocabulary = Vocabulary() if frequencies is None else frequencies.index.vocabulary.copy()

    @cached_property
    def counts(self) -> list[ReferenceCounts]:
        """The n-gram counts of the references for n = 1 to 4."""
        return [ReferenceCounts.group(counts, self.image_of) for counts in self.vocabulary.learn(self.words)]

    @cached_property
    def weights(self) -> TfIdfWeights:
        """The tf-idf weights of CIDEr."""
        if self.saved_frequencies is not None:
            index = self.saved_frequencies.index
        else:
            frequencies = [np.bincount(unpack_low(each.keys)).astype(float) for each in self.counts]
            index = FrequencyIndex(self.vocabulary, frequencies, self.num_images)
        return TfIdfWeights(index, self.counts, len(self.words))

    def document_frequencies(self, tokenizer: str) -> DocumentFrequencies:
        """Return the document frequencies of these references, to score smaller sets with.

        Args:
            tokenizer: name of the tokenizer of the words.
        """
        counts: list[Counter[str]] = [Counter() for _ in ORDERS]
        for begin, end in zip(self.starts, self.starts[1:], strict=False):
            for n in ORDERS:
                ngrams = (
                    " ".join(words[i : i + n]) for words in self.words[begin:end] for i in range(len(words) - n + 1)
                )
                counts[n - 1].update(list(dict.fromkeys(ngrams)))  # each n-gram counts once per image
        return DocumentFrequencies(self.num_images, [dict(each) for each in counts], tokenizer)

    def count(self, predictions: Sequence[Sequence[str]]) -> CountedPredictions:
        """Count the n-grams of predictions.

        Args:
            predictions: the words of one caption for each image, in the order of the references.
        """
        _ = self.counts  # the n-grams of the references get the lower ids
        lengths = np.fromiter(map(len, predictions), np.int64, len(predictions))
        return CountedPredictions(self.vocabulary.count(predictions), lengths)

    def cider(self, predictions: Sequence[Sequence[str]]) -> np.ndarray:
        """Return CIDEr-D of each image, between 0 and 10 (`[I]`).

        Args:
            predictions: the words of one caption for each image, in the order of the references.
        """
        counts, lengths = self.count(predictions)
        return cider(counts, self.counts, self.weights, lengths, self.lengths, self.image_of)

    def smoothed_bleu(self, predictions: Sequence[Sequence[str]]) -> np.ndarray:
        """Return smoothed BLEU-4 of each image, between 0 and 1 (`[I]`).

        Args:
            predictions: the words of one caption for each image, in the order of the references.
        """
        counts, lengths = self.count(predictions)
        return smoothed_bleu(counts, self.counts, lengths, self.closest_lengths(lengths))

    def closest_lengths(self, lengths: np.ndarray) -> np.ndarray:
        """Return the length of the reference that is closest to each prediction in length.

        Ties go to the shorter reference.

        Args:
            lengths (`[I]`): number of words of each prediction.
        """
        # Sorted by image, then distance, then length, the first row of each image is the closest one.
        distance = np.abs(self.lengths - lengths[self.image_of])
        order = np.lexsort((self.lengths, distance, self.image_of))
        return self.lengths[order[self.starts[:-1]]]


def split_at_spaces(tokens: list[str]) -> list[str]:
    """Return the words that BLEU and CIDEr count. White space inside a token, as in "2 1/2", splits the token."""
    return " ".join(tokens).split()
