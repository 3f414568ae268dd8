"""ROUGE-L (Lin 2004, aclanthology.org/W04-1013), as the COCO caption toolkit computes it."""

from collections.abc import Sequence

BETA = 1.2  # recall counts that much more than precision


def rouge_l(prediction: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """F-score of the longest common subsequence of words, between 0 and 1.

    Best precision and best recall may come from different references: that is the toolkit's definition.

    Example:

    ```python
    >>> round(rouge_l("a dog runs".split(), ["a dog sleeps".split(), "dogs".split()]), 4)
    0.6667
    ```
    """
    # The toolkit takes nothing for a text of one empty word.
    prediction, references = prediction or [""], [reference or [""] for reference in references]
    places: dict[str, int] = {}  # of each word in the prediction, as a bit set
    for place, word in enumerate(prediction):
        places[word] = places.get(word, 0) | 1 << place
    common = [_longest_common_subsequence(places, len(prediction), reference) for reference in references]
    precision = max(common) / len(prediction)
    recall = max(length / len(reference) for length, reference in zip(common, references, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _longest_common_subsequence(places: dict[str, int], length: int, other: Sequence[str]) -> int:
    """Length of it, a row of the usual table at a time in the bits of one integer (Hyyrö 2004)."""
    everywhere = row = (1 << length) - 1  # a zero bit for each place where the table's value grows
    for word in other:
        if matches := row & places.get(word, 0):
            row = (row + matches | row - matches) & everywhere
    return length - row.bit_count()
