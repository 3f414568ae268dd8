"""BLEU-1 to BLEU-4 (Papineni et al. 2002, aclanthology.org/P02-1040), as the COCO caption toolkit computes them."""

import numpy as np

from .ngrams import ORDERS, NgramCounts, ReferenceCounts

# The toolkit does not smooth: it adds these constants so that no division is by zero. They affect captions of fewer
# than four words. Two perfect captions of three words have BLEU-4 (1e-15 / 1e-9) ** (1 / 4), which is about 0.03.
TINY = 1e-15
SMALL = 1e-9


def bleu(
    predictions: list[NgramCounts],
    references: list[ReferenceCounts],
    prediction_lengths: np.ndarray,
    closest_lengths: np.ndarray,
) -> tuple[list[float], np.ndarray]:
    """Compute clipped n-gram precision with a penalty for predictions that are shorter than their references.

    BLEU-N is `BP * exp(mean of log p_n for n = 1 to N)`, with the brevity penalty `BP = min(1, exp(1 - r / c))`. The
    corpus score uses counts summed over all images, so it is not the mean of the scores per image.

    Args:
        predictions: n-gram counts of the predictions for n = 1 to 4.
        references: n-gram counts of the references for n = 1 to 4.
        prediction_lengths (`[I]`): number of words of each prediction.
        closest_lengths (`[I]`): number of words of the reference whose length is closest to that of the prediction. Of
            two references that are equally close, the shorter one counts.

    Returns:
        BLEU-1 to BLEU-4 of the corpus, between 0 and 1, and of each image (`[4, I]`).
    """
    correct, possible = clipped_counts(predictions, references, prediction_lengths)
    corpus = _score(correct.sum(axis=1), possible.sum(axis=1), prediction_lengths.sum(), closest_lengths.sum())
    return corpus.tolist(), _score(correct, possible, prediction_lengths, closest_lengths)


def smoothed_bleu(
    predictions: list[NgramCounts],
    references: list[ReferenceCounts],
    prediction_lengths: np.ndarray,
    closest_lengths: np.ndarray,
) -> np.ndarray:
    """Compute BLEU-4 of each image with the smoothing of Lin and Och 2004 (aclanthology.org/C04-1072).

    It adds 1 to the correct and to the possible n-grams of two words and more. Without smoothing, a caption without a
    correct n-gram of four words scores 0, so most captions could not be told apart.

    Args:
        predictions, references, prediction_lengths, closest_lengths: as in [`bleu`].

    Returns:
        Scores between 0 and 1 (`[I]`). A caption without a correct word scores 0.
    """
    correct, possible = clipped_counts(predictions, references, prediction_lengths)
    correct[1:] += 1
    possible[1:] += 1
    precision = np.divide(correct, possible, out=np.zeros_like(correct), where=possible > 0).prod(axis=0)
    shortage = closest_lengths / np.maximum(prediction_lengths, 1)
    return precision ** (1 / len(ORDERS)) * np.exp(np.minimum(1 - shortage, 0))


def clipped_counts(
    predictions: list[NgramCounts], references: list[ReferenceCounts], prediction_lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Count the correct n-grams and all n-grams of each prediction.

    Args:
        predictions, references, prediction_lengths: as in [`bleu`].

    Returns:
        The number of correct and of possible n-grams for n = 1 to 4 (`[4, I]` each).
    """
    num_images = len(prediction_lengths)
    correct, possible = np.zeros((2, len(ORDERS), num_images))
    for n, predicted, reference in zip(ORDERS, predictions, references, strict=True):
        rows, groups = reference.find(predicted)
        # A word counts at most as often as in the reference that has it most often.
        maxima = (
            np.maximum.reduceat(reference.counts, reference.starts[:-1]) if len(reference.keys) else reference.counts
        )
        clipped = np.minimum(predicted.counts[rows], maxima[groups])
        correct[n - 1] = np.bincount(predicted.texts[rows], clipped, minlength=num_images)
        possible[n - 1] = np.maximum(prediction_lengths - n + 1, 0)
    return correct, possible


def _score(correct: np.ndarray, possible: np.ndarray, length: np.ndarray, reference_length: np.ndarray) -> np.ndarray:
    """Return BLEU-1 to BLEU-4 from the number of correct and possible n-grams, whose first axis is n."""
    precision = np.cumprod((correct + TINY) / (possible + SMALL), axis=0)
    roots = 1 / np.array(ORDERS).reshape(-1, *[1] * (precision.ndim - 1))  # exponents of the geometric mean
    ratio = (length + TINY) / (reference_length + SMALL)
    brevity_penalty = np.where(ratio < 1, np.exp(1 - 1 / ratio), 1.0)
    return precision**roots * brevity_penalty
