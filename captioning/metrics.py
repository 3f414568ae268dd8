"""A plain caption score, to tell checkpoints apart while training."""

from collections import Counter


def word_f1(predictions: list[str], references: list[list[str]]) -> float:
    """Share of words in common with the nearest reference (F1 of the bags of words), averaged over the images.

    Between 0 and 1. It knows nothing of word order and is no published metric.

    Example:

    ```python
    >>> word_f1(["a dog runs"], [["a dog sleeps", "two cats"]])
    0.6666666666666666
    ```
    """

    def f1(prediction: str, reference: str) -> float:
        ours, theirs = (Counter(text.lower().replace(".", " ").split()) for text in (prediction, reference))
        return 2 * (ours & theirs).total() / max(ours.total() + theirs.total(), 1)

    scores = [
        max(f1(prediction, each) for each in own) for prediction, own in zip(predictions, references, strict=True)
    ]
    return sum(scores) / len(scores)
