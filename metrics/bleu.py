"""BLEU-1 to BLEU-4 (Papineni et al. 2002, aclanthology.org/P02-1040), as the COCO caption toolkit computes them."""

import numpy as np

from .ngrams import ORDERS, Counts, ImageCounts

# The toolkit adds these instead of smoothing, so that nothing divides by zero. They show in captions of fewer than four
# words: two perfect ones of three words each have BLEU-4 (1e-15 / 1e-9) ** (1 / 4), about 0.03.
TINY, SMALL = 1e-15, 1e-9


def bleu(
    predictions: list[Counts],
    references: list[ImageCounts],
    prediction_lengths: np.ndarray,
    closest_lengths: np.ndarray,
) -> tuple[list[float], np.ndarray]:
    """Clipped n-gram precision, with a penalty for predictions that are shorter than their references.

    The corpus score is made of summed counts; it is not the mean of the scores per image.

    Args:
        predictions, references: n-gram counts for n = 1 to 4.
        prediction_lengths (`[I]`): words of the prediction of each image.
        closest_lengths (`[I]`): words of its reference whose length comes closest, the shorter one of two as close.

    Returns:
        BLEU-1 to BLEU-4 of the corpus, between 0 and 1, and of each image (`[4, I]`).
    """
    images = len(prediction_lengths)
    correct, possible = np.zeros((2, len(ORDERS), images))
    for n, counts, own in zip(ORDERS, predictions, references, strict=True):
        rows, group = own.find(counts)
        most = np.maximum.reduceat(own.count, own.start[:-1]) if len(own.pair) else own.count
        clipped = np.minimum(counts.count[rows], most[group])
        correct[n - 1] = np.bincount(counts.text[rows], clipped, minlength=images)
        possible[n - 1] = np.maximum(prediction_lengths - n + 1, 0)
    corpus = _score(correct.sum(axis=1), possible.sum(axis=1), prediction_lengths.sum(), closest_lengths.sum())
    return corpus.tolist(), _score(correct, possible, prediction_lengths, closest_lengths)


def _score(correct: np.ndarray, possible: np.ndarray, length: np.ndarray, reference_length: np.ndarray) -> np.ndarray:
    precision = np.cumprod((correct + TINY) / (possible + SMALL), axis=0)
    mean = precision ** (1 / np.array(ORDERS).reshape(-1, *[1] * (precision.ndim - 1)))  # geometric
    ratio = (length + TINY) / (reference_length + SMALL)
    return mean * np.where(ratio < 1, np.exp(1 - 1 / ratio), 1.0)
