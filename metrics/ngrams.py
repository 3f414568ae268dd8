"""Counts of n-grams (1 to 4 words) in many texts at once, as NumPy arrays.

BLEU and CIDEr ask the same two questions: how often does a caption hold an n-gram, and how often do the references of
its image? Words and n-grams become numbers, texts become columns of numbers, and sorting answers both questions for a
whole corpus: no Python loop runs over n-grams.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ORDERS = (1, 2, 3, 4)  # BLEU-4 and CIDEr both stop at four words


def pack(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Two columns of numbers below 2**31 as one that sorts by the first, then by the second."""
    return (high.astype(np.int64) << 32) | low


@dataclass
class Counts:
    """How often texts hold n-grams of one length: a row for each text and n-gram in it, sorted by text, then n-gram."""

    text: np.ndarray  # [rows]
    ngram: np.ndarray  # [rows]
    count: np.ndarray  # [rows]


@dataclass
class ImageCounts:
    """The same of references, whose rows are sorted by image, then n-gram, and grouped by both."""

    pair: np.ndarray  # [groups], image and n-gram packed, sorted
    start: np.ndarray  # [groups + 1], where the rows of each group begin
    text: np.ndarray  # [rows]
    ngram: np.ndarray  # [rows]
    count: np.ndarray  # [rows]

    @classmethod
    def of(cls, counts: Counts, image_of: np.ndarray) -> "ImageCounts":
        """Group the counts of reference texts, of which the i-th belongs to image `image_of[i]`."""
        pair = pack(image_of[counts.text], counts.ngram)
        order = np.argsort(pair, kind="stable")
        pair, start = np.unique(pair[order], return_index=True)
        start = np.append(start, len(order))
        return cls(pair, start, counts.text[order], counts.ngram[order], counts.count[order])

    def find(self, counts: Counts) -> tuple[np.ndarray, np.ndarray]:
        """Which rows of predictions, one text to an image, have a group here: those rows, and their groups."""
        if not len(self.pair):
            return np.empty(0, np.int64), np.empty(0, np.int64)
        wanted = pack(counts.text, counts.ngram)
        group = np.minimum(np.searchsorted(self.pair, wanted), len(self.pair) - 1)
        rows = np.flatnonzero(self.pair[group] == wanted)
        return rows, group[rows]


class _Numbers(dict):
    """Gives each new key the next number."""

    def __missing__(self, key: str) -> int:
        self[key] = number = len(self)
        return number


class Vocabulary:
    """Numbers for words and n-grams. An n-gram is told by the number of all its words but the last, and the last."""

    def __init__(self):
        self.words = _Numbers()
        self.keys = {n: np.empty(0, np.int64) for n in ORDERS[1:]}  # of the known n-grams, sorted
        self.numbers = {n: np.empty(0, np.int64) for n in ORDERS[1:]}  # and their numbers

    def copy(self) -> "Vocabulary":
        """Another that knows the same and may learn more."""
        other = Vocabulary()
        other.words = _Numbers(self.words)
        other.keys, other.numbers = dict(self.keys), dict(self.numbers)  # `learn` replaces the arrays, never fills them
        return other

    def size(self, n: int) -> int:
        """How many n-grams have a number."""
        return len(self.words) if n == 1 else len(self.keys[n])

    def learn(self, texts: Sequence[Sequence[str]]) -> list[Counts]:
        """As `count`, and remember the n-grams met for the first time."""
        length = np.fromiter(map(len, texts), np.int64, len(texts))
        text = np.repeat(np.arange(len(texts), dtype=np.int32), length)  # [W] of each word
        word = np.fromiter((self.words[word] for words in texts for word in words), np.int32, len(text))  # [W]
        counts = [_count(text, word)]
        start, ngram = np.arange(len(text)), word  # of each n-gram: its first word, and its number
        for n in ORDERS[1:]:
            end = np.minimum(start + n - 1, len(text) - 1)
            whole = (end - start == n - 1) & (text[end] == text[start])  # not beyond the end of its text
            start, end, ngram = start[whole], end[whole], ngram[whole]
            ngram = self._number(n, pack(ngram, word[end]))
            counts.append(_count(text[start], ngram))
        return counts

    def count(self, texts: Sequence[Sequence[str]]) -> list[Counts]:
        """Count the n-grams of texts, given as lists of words: [`Counts`] for n = 1, 2, 3, 4.

        N-grams that the vocabulary does not know are numbered behind all it knows, for this call alone.
        """
        return self.copy().learn(texts)

    def _number(self, n: int, key: np.ndarray) -> np.ndarray:
        known, numbers = self.keys[n], self.numbers[n]
        found = np.zeros(len(key), dtype=bool)
        number = np.empty(len(key), np.int64)
        if len(known):
            place = np.minimum(np.searchsorted(known, key), len(known) - 1)
            found = known[place] == key
            number = numbers[place]
        new, index = np.unique(key[~found], return_inverse=True)
        number[~found] = len(known) + index
        if len(new):
            keys = np.concatenate([known, new])
            order = np.argsort(keys, kind="stable")
            self.keys[n] = keys[order]
            self.numbers[n] = np.concatenate([numbers, np.arange(len(known), len(keys))])[order]
        return number


def _count(text: np.ndarray, ngram: np.ndarray) -> Counts:
    pair, count = np.unique(pack(text, ngram), return_counts=True)
    return Counts((pair >> 32).astype(np.int32), (pair & 0x7FFFFFFF).astype(np.int32), count.astype(np.int32))
