"""CIDEr-D (Vedantam et al. 2015, arXiv 1411.5726), which the COCO caption toolkit and every paper call CIDEr."""

import gzip
import json
import math
import os
from collections.abc import Sequence

import numpy as np

from ..common.errors import InputError
from .ngrams import ORDERS, Counts, ImageCounts, Vocabulary

SIGMA = 6.0  # words by which a prediction may be off before the length penalty weighs


class DocumentFrequencies:
    """How many images of a corpus have each n-gram in their references, so that small sets are scored by a large one.

    CIDEr values rare n-grams. What is rare depends on the references: the same captions get 112.6 beside 50 images and
    107.1 beside 5,000. Frequencies of one corpus make scores of its parts comparable.

    Args:
        images: number of images of the corpus.
        counts: for n = 1 to 4, number of images of each n-gram, its words joined by spaces.

    Example:

    ```python
    >>> from qformer_captioner.metrics import References
    >>> frequencies = References([["a dog", "a cat"], ["a bird"]]).document_frequencies()
    >>> frequencies.images, frequencies.counts[0]
    (2, {'a': 2, 'dog': 1, 'cat': 1, 'bird': 1})
    ```
    """

    def __init__(self, images: int, counts: Sequence[dict[str, int]]):
        self.images = images
        self.counts = list(counts)

    def save(self, path: str | os.PathLike) -> None:
        """Write gzipped JSON."""
        with gzip.open(path, "wt") as file:
            json.dump({"images": self.images, "counts": self.counts}, file)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "DocumentFrequencies":
        """Read what `save` wrote.

        Raises:
            InputError: if there is no such file, or it holds something else.
        """
        try:
            with gzip.open(path, "rt") as file:
                table = json.load(file)
            if (images := int(table["images"])) < 1:
                raise ValueError(f"it is of {images} images")
            return cls(images, [dict(table["counts"][n - 1]) for n in ORDERS])
        except (OSError, EOFError, ValueError, TypeError, LookupError) as error:
            raise InputError(f"{str(path)!r} is no saved table of document frequencies ({error}).") from error

    def numbered(self, vocabulary: Vocabulary) -> list[np.ndarray]:
        """Let the vocabulary learn these n-grams; for n = 1 to 4, how many images have the n-gram of each number."""
        numbered = []
        texts = [ngram.split(" ") for counts in self.counts for ngram in counts]
        sizes = np.cumsum([0, *map(len, self.counts)])
        learnt = vocabulary.learn(texts)
        for n, counts, begin, end in zip(ORDERS, learnt, sizes, sizes[1:], strict=False):
            own = (counts.text >= begin) & (counts.text < end)  # the one n-gram that a text of n words has
            frequency = np.zeros(vocabulary.size(n))
            frequency[counts.ngram[own]] = list(self.counts[n - 1].values())
            numbered.append(frequency)
        return numbered


class Weights:
    """tf-idf weights of references, and what is needed to weigh predictions alike.

    Args:
        frequencies: for n = 1 to 4, how many images have the n-gram of each number; n-grams numbered behind have none.
        images: of the corpus that the frequencies come from.
        references: n-gram counts for n = 1 to 4.
        number: of reference texts.
    """

    def __init__(self, frequencies: list[np.ndarray], images: int, references: list[ImageCounts], number: int):
        self.log_images = math.log(images)
        self.idf = [self.log_images - np.log(np.maximum(frequency, 1)) for frequency in frequencies]
        self.references = [self.weigh(n, counts) for n, counts in zip(ORDERS, references, strict=True)]
        self.norms = [
            np.sqrt(np.bincount(counts.text, weight**2, minlength=number))
            for counts, weight in zip(references, self.references, strict=True)
        ]

    def weigh(self, n: int, counts: Counts | ImageCounts) -> np.ndarray:
        """tf-idf of each row. An n-gram that no image has counts as if one had it."""
        idf = self.idf[n - 1]
        known = counts.ngram < len(idf)
        return counts.count * np.where(known, idf[np.where(known, counts.ngram, 0)] if len(idf) else 0, self.log_images)


def cider(
    predictions: list[Counts],
    references: list[ImageCounts],
    weights: Weights,
    prediction_lengths: np.ndarray,
    reference_lengths: np.ndarray,
    image_of: np.ndarray,
) -> np.ndarray:
    """Cosine between tf-idf vectors of clipped n-grams, averaged over n and the references, with a length penalty.

    Args:
        predictions, references: n-gram counts for n = 1 to 4.
        weights: of the references.
        prediction_lengths (`[I]`), reference_lengths (`[R]`): in words.
        image_of (`[R]`): the image of each reference.

    Returns:
        CIDEr of each image (`[I]`), between 0 and 10; the corpus score is their mean.
    """
    images, number = len(prediction_lengths), len(image_of)
    # The toolkit counts bigrams, of which an empty text and one of a single word have none.
    difference = np.maximum(prediction_lengths - 1, 0)[image_of] - np.maximum(reference_lengths - 1, 0)
    penalty = np.exp(-(difference**2) / (2 * SIGMA**2))  # [R]
    similarity = np.zeros(number)
    for n, counts, own, own_weight, own_norm in zip(
        ORDERS, predictions, references, weights.references, weights.norms, strict=True
    ):
        weight = weights.weigh(n, counts)
        norm = np.sqrt(np.bincount(counts.text, weight**2, minlength=images))
        rows, group = own.find(counts)
        # Each row of a prediction meets every row of its group: the references that hold the same n-gram.
        repeats = own.start[group + 1] - own.start[group]
        weight = np.repeat(weight[rows], repeats)
        meets = np.arange(len(weight)) - np.repeat(np.cumsum(repeats) - repeats - own.start[group], repeats)
        product = np.minimum(weight, own_weight[meets]) * own_weight[meets]
        dot = np.bincount(own.text[meets], product, minlength=number)
        norms = norm[image_of] * own_norm
        similarity += np.divide(dot, norms, out=np.zeros(number), where=norms > 0) * penalty
    texts = np.bincount(image_of, minlength=images)
    return 10 * np.bincount(image_of, similarity / len(ORDERS), minlength=images) / texts
