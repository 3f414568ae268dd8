"""CIDEr-D (Vedantam et al. 2015, arXiv 1411.5726), which the COCO caption toolkit and every paper call CIDEr."""

import gzip
import json
import math
import os
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from ..common.errors import InputError
from ..common.files import atomic_path
from .ngrams import ORDERS, NgramCounts, ReferenceCounts, Vocabulary

SIGMA = 6.0  # standard deviation of the length penalty, in words


class DocumentFrequencies:
    """Table of the number of images whose references contain each n-gram.

    CIDEr gives more weight to n-grams that occur for few images of a corpus, so a score depends on the corpus. The same
    captions score 112.6 as a set of 50 images and 107.1 as a part of 5,000. Scores computed with the same table are
    comparable.

    Args:
        images: number of images of the corpus.
        counts: for n = 1 to 4, the number of images for each n-gram. The words of an n-gram are joined by spaces.
        tokenizer: name of the tokenizer of the words, as in [`References`]; `"custom"` for a function.

    Example:

    ```python
    >>> from qformer_captioner.metrics import References
    >>> frequencies = References([["a dog", "a cat"], ["a bird"]]).document_frequencies()
    >>> frequencies.images, frequencies.counts[0]
    (2, {'a': 2, 'dog': 1, 'cat': 1, 'bird': 1})
    ```
    """

    def __init__(self, images: int, counts: Sequence[dict[str, int]], tokenizer: str = "ptb"):
        self.images = images
        self.counts = list(counts)
        self.tokenizer = tokenizer

    def save(self, path: str | os.PathLike) -> None:
        """Write the table as gzipped JSON.

        Args:
            path: the file to write, by convention `*.json.gz`.
        """
        with atomic_path(path) as unfinished, gzip.open(unfinished, "wt") as file:
            json.dump({"images": self.images, "tokenizer": self.tokenizer, "counts": self.counts}, file)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "DocumentFrequencies":
        """Read a table that `save` wrote.

        Args:
            path: the file to read.

        Raises:
            InputError: if the file does not exist or is not such a table.
        """
        try:
            with gzip.open(path, "rt") as file:
                table = json.load(file)
            if (images := int(table["images"])) < 1:
                raise ValueError(f"it counts {images} images")
            counts = [dict(table["counts"][n - 1]) for n in ORDERS]
            return cls(images, counts, str(table.get("tokenizer", "ptb")))
        except (OSError, EOFError, ValueError, TypeError, LookupError) as error:
            raise InputError(f"{str(path)!r} is not a saved table of document frequencies ({error}).") from error

    def check_tokenizer(self, tokenizer: str) -> None:
        """Check that the table is one of the words of a tokenizer.

        Args:
            tokenizer: name of the tokenizer.

        Raises:
            InputError: if the table is one of other words.
        """
        if self.tokenizer != tokenizer:
            raise InputError(
                f"The document frequencies (--df) are of the tokenizer {self.tokenizer!r}, not {tokenizer!r}: "
                f"score with --tokenize {self.tokenizer}, or save new ones with --save_df."
            )

    @cached_property
    def index(self) -> "FrequencyIndex":
        """The table by ids of n-grams. It is made on first use, which takes a second for 30,000 captions."""
        vocabulary = Vocabulary()
        texts = [ngram.split(" ") for counts in self.counts for ngram in counts]
        bounds = np.cumsum([0, *map(len, self.counts)])
        by_id = []
        for n, learnt, begin, end in zip(ORDERS, vocabulary.learn(texts), bounds, bounds[1:], strict=False):
            whole = (learnt.texts >= begin) & (learnt.texts < end)  # a text of n words holds one n-gram of n words
            frequency = np.zeros(vocabulary.size(n))
            frequency[learnt.ngrams[whole]] = list(self.counts[n - 1].values())
            by_id.append(frequency)
        return FrequencyIndex(vocabulary, by_id, self.images)


class FrequencyIndex:
    """Inverse document frequencies of n-grams by their ids.

    Args:
        vocabulary: ids of the n-grams. Copies of it can learn more n-grams, whose document frequency is 1.
        frequencies: for n = 1 to 4, the document frequency of each n-gram id (`[ids]`).
        images: number of images of the corpus that the frequencies come from.
    """

    def __init__(self, vocabulary: Vocabulary, frequencies: list[np.ndarray], images: int):
        self.vocabulary = vocabulary
        self.log_images = math.log(images)
        self.idf = [self.log_images - np.log(np.maximum(frequency, 1)) for frequency in frequencies]

    def weigh(self, n: int, counts: NgramCounts | ReferenceCounts) -> np.ndarray:
        """Return the tf-idf weight of each row of counts (`[rows]`). The document frequency of an unknown n-gram is 1.

        Args:
            n: number of words of the n-grams.
            counts: counts of n-grams of `n` words.
        """
        idf = self.idf[n - 1]
        known = counts.ngrams < len(idf)
        idf_of_row = np.where(known, idf[np.where(known, counts.ngrams, 0)] if len(idf) else 0, self.log_images)
        return counts.counts * idf_of_row


class TfIdfWeights:
    """tf-idf weights of the n-grams of references, and the same weighting for predictions.

    Args:
        index: inverse document frequencies of the n-grams.
        references: n-gram counts of the references for n = 1 to 4.
        num_references: number of reference texts.
    """

    def __init__(self, index: FrequencyIndex, references: list[ReferenceCounts], num_references: int):
        self.weigh = index.weigh
        self.references = [self.weigh(n, counts) for n, counts in zip(ORDERS, references, strict=True)]
        self.norms = [
            np.sqrt(np.bincount(counts.texts, weights**2, minlength=num_references))
            for counts, weights in zip(references, self.references, strict=True)
        ]


def cider(
    predictions: list[NgramCounts],
    references: list[ReferenceCounts],
    weights: TfIdfWeights,
    prediction_lengths: np.ndarray,
    reference_lengths: np.ndarray,
    image_of: np.ndarray,
) -> np.ndarray:
    """Compute CIDEr-D of each image.

    For each n and each reference, the similarity is the cosine of the tf-idf vectors of prediction and reference. The
    weights of the prediction are clipped to those of the reference, and a Gaussian of the difference in length
    multiplies the cosine. The score is ten times the mean similarity over n and the references.

    Args:
        predictions: n-gram counts of the predictions for n = 1 to 4.
        references: n-gram counts of the references for n = 1 to 4.
        weights: tf-idf weights of the references.
        prediction_lengths (`[I]`): number of words of each prediction.
        reference_lengths (`[R]`): number of words of each reference.
        image_of (`[R]`): index of the image of each reference.

    Returns:
        Scores between 0 and 10 (`[I]`). The score of the corpus is their mean.
    """
    num_images, num_references = len(prediction_lengths), len(image_of)
    # The toolkit compares numbers of bigrams, which are 0 both for an empty text and for a single word.
    difference = np.maximum(prediction_lengths - 1, 0)[image_of] - np.maximum(reference_lengths - 1, 0)
    penalty = np.exp(-(difference**2) / (2 * SIGMA**2))  # [R]
    similarity = np.zeros(num_references)
    for n, predicted, reference, reference_weights, reference_norms in zip(
        ORDERS, predictions, references, weights.references, weights.norms, strict=True
    ):
        prediction_weights = weights.weigh(n, predicted)
        prediction_norms = np.sqrt(np.bincount(predicted.texts, prediction_weights**2, minlength=num_images))
        rows, groups = reference.find(predicted)
        # Pair each row of a prediction with every row of its group: the references that contain the same n-gram.
        sizes = reference.starts[groups + 1] - reference.starts[groups]
        paired_weights = np.repeat(prediction_weights[rows], sizes)
        pairs = np.arange(len(paired_weights)) - np.repeat(np.cumsum(sizes) - sizes - reference.starts[groups], sizes)
        products = np.minimum(paired_weights, reference_weights[pairs]) * reference_weights[pairs]
        dot = np.bincount(reference.texts[pairs], products, minlength=num_references)
        norms = prediction_norms[image_of] * reference_norms
        similarity += np.divide(dot, norms, out=np.zeros(num_references), where=norms > 0) * penalty
    references_per_image = np.bincount(image_of, minlength=num_images)
    return 10 * np.bincount(image_of, similarity / len(ORDERS), minlength=num_images) / references_per_image
