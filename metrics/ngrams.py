"""Counts of n-grams (1 to 4 words) in many texts at once, as NumPy arrays.

BLEU and CIDEr need two counts: how often a caption contains an n-gram, and how often the references of its image
contain it. Words and n-grams are mapped to ids, and texts to arrays of ids. Sorting the arrays then gives both counts
for a whole corpus, without a Python loop over n-grams.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ORDERS = (1, 2, 3, 4)  # values of n: BLEU-4 and CIDEr both stop at four words


def pack(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Combine two arrays of ids below 2**31 into one array that sorts by the first, then by the second."""
    return (high.astype(np.int64) << 32) | low


def unpack_low(packed: np.ndarray) -> np.ndarray:
    """Return the second of the two arrays that `pack` combined."""
    return packed & 0x7FFFFFFF


@dataclass
class NgramCounts:
    """Counts of the n-grams of one length in texts: one row for each n-gram of a text, sorted by text and n-gram.

    Args:
        texts (`[rows]`): index of the text.
        ngrams (`[rows]`): id of the n-gram.
        counts (`[rows]`): number of occurrences.
    """

    texts: np.ndarray
    ngrams: np.ndarray
    counts: np.ndarray


@dataclass
class ReferenceCounts:
    """Counts of the n-grams of one length in references: rows sorted and grouped by image and n-gram.

    A group holds a row for each reference of the image that contains the n-gram.

    Args:
        keys (`[groups]`): image and n-gram, packed and sorted.
        starts (`[groups + 1]`): first row of each group.
        texts (`[rows]`): index of the reference.
        ngrams (`[rows]`): id of the n-gram.
        counts (`[rows]`): number of occurrences.
    """

    keys: np.ndarray
    starts: np.ndarray
    texts: np.ndarray
    ngrams: np.ndarray
    counts: np.ndarray

    @classmethod
    def group(cls, counts: NgramCounts, image_of: np.ndarray) -> "ReferenceCounts":
        """Group the counts of reference texts.

        Args:
            counts: counts of the references.
            image_of (`[R]`): index of the image of each reference.
        """
        keys = pack(image_of[counts.texts], counts.ngrams)
        order = np.argsort(keys, kind="stable")
        keys, starts = np.unique(keys[order], return_index=True)
        starts = np.append(starts, len(order))
        return cls(keys, starts, counts.texts[order], counts.ngrams[order], counts.counts[order])

    def find(self, predictions: NgramCounts) -> tuple[np.ndarray, np.ndarray]:
        """Find the n-grams of predictions that the references of the same image contain.

        Args:
            predictions: counts of one prediction for each image.

        Returns:
            The rows of `predictions` that have a group here (`[found]`), and these groups (`[found]`).
        """
        if not len(self.keys):
            return np.empty(0, np.int64), np.empty(0, np.int64)
        wanted = pack(predictions.texts, predictions.ngrams)
        groups = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        rows = np.flatnonzero(self.keys[groups] == wanted)
        return rows, groups[rows]


class _WordIds(dict[str, int]):
    """Dictionary that gives each new word the next id."""

    def __missing__(self, word: str) -> int:
        self[word] = word_id = len(self)
        return word_id


class Vocabulary:
    """Ids of words and n-grams. The key of an n-gram joins the id of its first n - 1 words and the id of its last word.

    Example:

    ```python
    >>> vocabulary = Vocabulary()
    >>> unigrams, bigrams, _, _ = vocabulary.learn([["a", "dog", "a", "dog"]])
    >>> unigrams.counts.tolist(), bigrams.counts.tolist()  # a, dog; a dog, dog a
    ([2, 2], [2, 1])
    ```
    """

    def __init__(self) -> None:
        self.words = _WordIds()
        self.keys = {n: np.empty(0, np.int64) for n in ORDERS[1:]}  # of the known n-grams, sorted
        self.ids = {n: np.empty(0, np.int64) for n in ORDERS[1:]}  # in the order of the keys

    def copy(self) -> "Vocabulary":
        """Return a copy with the same ids, to which more n-grams can be added."""
        other = Vocabulary()
        other.words = _WordIds(self.words)
        other.keys, other.ids = dict(self.keys), dict(self.ids)  # `learn` replaces these arrays and never changes them
        return other

    def size(self, n: int) -> int:
        """Return the number of known n-grams of `n` words."""
        return len(self.words) if n == 1 else len(self.keys[n])

    def learn(self, texts: Sequence[Sequence[str]]) -> list[NgramCounts]:
        """Count the n-grams of texts, and add new n-grams to the vocabulary.

        Args:
            texts: the words of each text.

        Returns:
            The counts for n = 1 to 4.
        """
        lengths = np.fromiter(map(len, texts), np.int64, len(texts))
        text_of = np.repeat(np.arange(len(texts), dtype=np.int32), lengths)  # [W], text of each word
        words = np.fromiter((self.words[word] for words in texts for word in words), np.int32, len(text_of))  # [W]
        counts = [_count(text_of, words)]
        first, ngrams = np.arange(len(text_of)), words  # position of the first word of each n-gram, and its id
        for n in ORDERS[1:]:
            last = np.minimum(first + n - 1, len(text_of) - 1)
            inside = (last - first == n - 1) & (text_of[last] == text_of[first])  # the n-gram ends inside its text
            first, last, ngrams = first[inside], last[inside], ngrams[inside]
            ngrams = self._ids_of(n, pack(ngrams, words[last]))
            counts.append(_count(text_of[first], ngrams))
        return counts

    def count(self, texts: Sequence[Sequence[str]]) -> list[NgramCounts]:
        """Count the n-grams of texts as `learn` does, without keeping ids.

        Unknown n-grams get ids above all known ones, which are valid for this call only.
        """
        return self.copy().learn(texts)

    def _ids_of(self, n: int, keys: np.ndarray) -> np.ndarray:
        """Return the ids of n-grams. New n-grams get the next ids."""
        known_keys, known_ids = self.keys[n], self.ids[n]
        is_known = np.zeros(len(keys), dtype=bool)
        ids = np.empty(len(keys), np.int64)
        if len(known_keys):
            places = np.minimum(np.searchsorted(known_keys, keys), len(known_keys) - 1)
            is_known = known_keys[places] == keys
            ids = known_ids[places]
        new_keys, index = np.unique(keys[~is_known], return_inverse=True)
        ids[~is_known] = len(known_keys) + index
        if len(new_keys):
            places = np.searchsorted(known_keys, new_keys)
            self.keys[n] = np.insert(known_keys, places, new_keys)
            self.ids[n] = np.insert(known_ids, places, np.arange(len(known_keys), len(known_keys) + len(new_keys)))
        return ids


def _count(texts: np.ndarray, ngrams: np.ndarray) -> NgramCounts:
    packed, counts = np.unique(pack(texts, ngrams), return_counts=True)
    return NgramCounts((packed >> 32).astype(np.int32), unpack_low(packed).astype(np.int32), counts.astype(np.int32))
