"""ROUGE-L (Lin 2004, aclanthology.org/W04-1013), as the COCO caption toolkit computes it."""

from collections.abc import Sequence

BETA = 1.2  # weight of recall relative to precision


def rouge_l(prediction: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Compute the F-score of the longest common subsequence of words.

    The score is `(1 + BETA²) P R / (R + BETA² P)`. The precision P and the recall R are each the best over all
    references, so they may come from different references. This is the toolkit's definition.

    Args:
        prediction: words of a caption.
        references: words of each reference caption.

    Returns:
        A score between 0 and 1.

    Example:

    ```python
    >>> round(rouge_l("a dog runs".split(), ["a dog sleeps".split(), "dogs".split()]), 4)
    0.6667
    ```
    """
    # The toolkit treats an empty text as one empty word.
    prediction, references = prediction or [""], [reference or [""] for reference in references]
    positions: dict[str, int] = {}  # positions of each word in the prediction, as a bit set
    for position, word in enumerate(prediction):
        positions[word] = positions.get(word, 0) | 1 << position
    common = [_longest_common_subsequence(positions, len(prediction), reference) for reference in references]
    precision = max(common) / len(prediction)
    recall = max(length / len(reference) for length, reference in zip(common, references, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _longest_common_subsequence(positions: dict[str, int], length: int, other: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, by the bit-parallel algorithm of Hyyrö (2004).

    One integer holds a row of the dynamic-programming table: a zero bit marks where the value grows by one.

    Args:
        positions: positions of each word in the first text, as a bit set.
        length: number of words of the first text.
        other: words of the second text.
    """
    all_ones = row = (1 << length) - 1
    for word in other:
        if matches := row & positions.get(word, 0):
            row = (row + matches | row - matches) & all_ones
    return length - row.bit_count()
