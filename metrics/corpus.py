"""Scores of a corpus: every metric in one pass over one tokenisation, the references' share of the work done once."""

import os
import warnings
from collections import Counter
from collections.abc import Collection, Sequence
from functools import cached_property

import numpy as np

from ..common.errors import InputError
from .bleu import bleu
from .cider import DocumentFrequencies, Weights, cider
from .ngrams import ORDERS, ImageCounts, Vocabulary
from .ptb_tokenizer import tokenize
from .rouge import rouge_l

METRICS = ("bleu", "rouge_l", "cider")


def check_predictions(predictions: Sequence[str], number: int | None = None, allow_empty: bool = False) -> None:
    """See that predictions can be scored, and that they are as many as there are lists of references.

    Raises:
        InputError: if not; the message names the first offender and counts all of them.
    """
    if isinstance(predictions, str):
        raise InputError("The predictions are one string: give a list of captions, one for each image.")
    if number is not None and len(predictions) != number:
        raise InputError(
            f"There are {len(predictions)} predictions but {number} lists of references: give one list of references "
            "for each prediction."
        )
    if not len(predictions):
        raise InputError("There is nothing to score: the list of predictions is empty.")
    _refuse(
        [i for i, text in enumerate(predictions) if not isinstance(text, str)],
        lambda i: f"Prediction {i} is {predictions[i]!r} and no string",
    )
    if not allow_empty:
        _refuse(
            [i for i, text in enumerate(predictions) if not text.strip()],
            lambda i: f"Prediction {i} is empty (`allow_empty` scores it as 0)",
        )


def check_references(references: Sequence[Sequence[str]]) -> None:
    """See that every image has references, and all of them are strings.

    Raises:
        InputError: if not; the message names the first offender and counts all of them.
    """
    _refuse(
        [i for i, own in enumerate(references) if isinstance(own, str) or not isinstance(own, Collection)],
        lambda i: f"The references of prediction {i} are {references[i]!r} and no list of strings",
    )
    _refuse([i for i, own in enumerate(references) if len(own) == 0], lambda i: f"Prediction {i} has no references")
    _refuse(
        [i for i, own in enumerate(references) if not all(isinstance(text, str) for text in own)],
        lambda i: f"The references of prediction {i} are {references[i]!r}, and not all of them are strings",
    )


def _refuse(offenders: list[int], describe) -> None:
    if offenders:
        others = f", and {len(offenders) - 1} more are like it" if len(offenders) > 1 else ""
        raise InputError(f"{describe(offenders[0])}{others}.")


class References:
    r"""The reference captions of images: tokens, n-grams and tf-idf weights, computed once, used for every scoring.

    Scores equal those of the COCO caption toolkit (pycocoevalcap) to 1e-12.

    Args:
        references: the captions of each image.
        df: what CIDEr takes document frequencies from: `"corpus"` for these references, as the toolkit does, or a
            [`DocumentFrequencies`] or the path of a saved one. Scores with another table are not comparable.

    Raises:
        InputError: for an image without references, a reference that is no string, or a `df` that is no table.

    Example:

    ```python
    >>> from qformer_captioner.metrics import References
    >>> references = References([["a dog runs", "a brown dog runs on grass"], ["a cat sleeps", "a cat"]])
    >>> scores = references.score(["a dog runs", "a black cat"])
    >>> round(scores["bleu_1"], 4), round(scores["cider"], 4)
    (0.8333, 3.1466)
    ```
    """

    def __init__(self, references: Sequence[Sequence[str]], df: str | os.PathLike | DocumentFrequencies = "corpus"):
        references = list(references)
        check_references(references)
        self.number_of_images = len(references)
        self.number_of_references = sum(map(len, references))
        is_path = df != "corpus" and not isinstance(df, DocumentFrequencies)
        self.df = DocumentFrequencies.load(df) if is_path else df
        self.tokens = tokenize([text for own in references for text in own])  # [R]
        self.image_of = np.repeat(np.arange(len(references)), [len(own) for own in references])  # [R]
        self.words = [_words(tokens) for tokens in self.tokens]
        self.lengths = np.fromiter(map(len, self.words), np.int64, len(self.words))
        self.vocabulary = Vocabulary()
        self.first = np.searchsorted(self.image_of, np.arange(len(references) + 1))  # reference of each image

    @cached_property
    def counts(self) -> list[ImageCounts]:
        """n-gram counts for n = 1 to 4."""
        return [ImageCounts.of(counts, self.image_of) for counts in self.vocabulary.learn(self.words)]

    @cached_property
    def weights(self) -> Weights:
        """What CIDEr weighs n-grams by."""
        if self.df == "corpus":
            frequencies = [np.bincount(counts.pair & 0x7FFFFFFF).astype(float) for counts in self.counts]
            images = self.number_of_images
        else:
            frequencies, images = self.df.numbered(self.vocabulary), self.df.images
        return Weights(frequencies, images, self.counts, len(self.words))

    def document_frequencies(self) -> DocumentFrequencies:
        """The table that other, smaller sets can be scored by (`df=`)."""
        counts = [Counter() for _ in ORDERS]
        for begin, end in zip(self.first, self.first[1:], strict=False):
            for n in ORDERS:
                ngrams = (
                    " ".join(words[i : i + n]) for words in self.words[begin:end] for i in range(len(words) - n + 1)
                )
                counts[n - 1].update(list(dict.fromkeys(ngrams)))  # each once for an image
        return DocumentFrequencies(self.number_of_images, [dict(each) for each in counts])

    def score(
        self,
        predictions: Sequence[str],
        metrics: Sequence[str] = METRICS,
        per_image: bool = False,
        allow_empty: bool = False,
    ) -> dict[str, float | dict[str, list[float]]]:
        """Score one caption of each image.

        Args:
            predictions: the captions, in the order of the references.
            metrics: which of "bleu", "rouge_l" and "cider".
            per_image: add `"per_image"`, a dictionary with the same keys and a list of scores each.
            allow_empty: score an empty prediction as the toolkit does (0, and shorter BLEU) instead of refusing it.

        Returns:
            `bleu_1` ... `bleu_4` and `rouge_l` (0 to 1), `cider` (0 to 10). Papers print them times 100.

        Raises:
            InputError: for another number of predictions, one that is empty or no string.
            ValueError: for an unknown metric.
        """
        check_predictions(predictions, self.number_of_images, allow_empty)
        if unknown := set(metrics) - set(METRICS):
            raise ValueError(f"There is no metric {min(unknown)!r} here; there are {', '.join(METRICS)}.")
        tokens = tokenize(predictions)
        words = [_words(each) for each in tokens]
        lengths = np.fromiter(map(len, words), np.int64, len(words))  # [I]
        images: dict[str, np.ndarray] = {}
        scores: dict[str, float | dict[str, list[float]]] = {}
        references = self.counts if "bleu" in metrics or "cider" in metrics else []
        weights = self.weights if "cider" in metrics else None
        counts = self.vocabulary.count(words) if references else []
        if "bleu" in metrics:
            corpus, each = bleu(counts, references, lengths, self._closest(lengths))
            for n in ORDERS:
                scores[f"bleu_{n}"], images[f"bleu_{n}"] = corpus[n - 1], each[n - 1]
        if "rouge_l" in metrics:
            images["rouge_l"] = np.array(
                [
                    rouge_l(own, self.tokens[begin:end])
                    for own, begin, end in zip(tokens, self.first, self.first[1:], strict=False)
                ]
            )
            scores["rouge_l"] = float(images["rouge_l"].mean())
        if "cider" in metrics:
            if self.number_of_images == 1 and self.df == "corpus":
                warnings.warn(
                    "CIDEr of a single image is 0: every n-gram is in all of the references, so none is worth anything."
                    " Score more images, or give document frequencies of a larger corpus (`df`).",
                    stacklevel=2,
                )
            images["cider"] = cider(counts, references, weights, lengths, self.lengths, self.image_of)
            scores["cider"] = float(images["cider"].mean())
        if per_image:
            scores["per_image"] = {name: values.tolist() for name, values in images.items()}
        return scores

    def _closest(self, lengths: np.ndarray) -> np.ndarray:
        """For a prediction of each length, the length of the closest reference; of two as close, the shorter one."""
        # Sorted by image, then distance, then length, the first row of each image is the one.
        distance = np.abs(self.lengths - lengths[self.image_of])
        order = np.lexsort((self.lengths, distance, self.image_of))
        return self.lengths[order[self.first[:-1]]]


def _words(tokens: list[str]) -> list[str]:
    """Tokens as BLEU and CIDEr see them: white space inside one, as in fractions ("2 1/2"), splits it."""
    return " ".join(tokens).split()
