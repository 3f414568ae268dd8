"""BLEU, ROUGE-L and CIDEr of a corpus, with references that are tokenised and prepared once."""

import os
import warnings
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from ..common.errors import InputError
from .bleu import bleu
from .checks import check_predictions, check_references
from .cider import DocumentFrequencies, TfIdfWeights, cider
from .ngrams import ORDERS, NgramCounts, ReferenceCounts, Vocabulary, unpack_low
from .rouge import rouge_l
from .tokenizers import Tokenize, resolve_tokenizer, tokenizer_name

METRICS = ("bleu", "rouge_l", "cider")


class References:
    r"""Reference captions of images, prepared for any number of scorings.

    Tokens, n-grams and tf-idf weights are computed once. Scores equal those of the COCO caption toolkit (pycocoevalcap
    1.2 with its Java tokenizer) to 1e-12.

    Args:
        references: the reference captions of each image. Images may have different numbers of them.
        df: source of CIDEr's document frequencies. `"corpus"` counts them in these references, as the toolkit does.
            Otherwise a [`DocumentFrequencies`] table or the path of a saved table. Scores with different tables are not
            comparable.
        tokenize: `"ptb"` for the tokenizer of the COCO caption toolkit, or `"characters"`. Otherwise the Hub id or
            folder of a tokenizer for transformers, or a function from captions to their tokens. The default is `"ptb"`,
            but it refuses languages without spaces between words.

    Raises:
        InputError: for an image without references, or a reference that is not a string. Also for a file that is not a
            table of document frequencies, a table of other tokens, or references without spaces between words.

    Example:

    ```python
    >>> from qformer_captioner.metrics import References
    >>> references = References([["a dog runs", "a brown dog runs on grass"], ["a cat sleeps", "a cat"]])
    >>> scores = references.score(["a dog runs", "a black cat"])
    >>> round(scores["bleu_1"], 4), round(scores["cider"], 4)
    (0.8333, 3.1466)
    ```
    """

    def __init__(
        self,
        references: Sequence[Sequence[str]],
        df: str | os.PathLike | DocumentFrequencies = "corpus",
        tokenize: str | Tokenize | None = None,
    ):
        references = list(references)
        check_references(references)
        self.num_images = len(references)
        self.num_references = sum(map(len, references))
        self.saved_frequencies: DocumentFrequencies | None = None  # None: those of these references
        if isinstance(df, DocumentFrequencies):
            self.saved_frequencies = df
        elif df != "corpus":
            self.saved_frequencies = DocumentFrequencies.load(df)
        texts = [text for texts in references for text in texts]  # R strings
        self.tokenize, self.tokenizer = resolve_tokenizer(tokenize, texts), tokenizer_name(tokenize)
        self._check_tokenizer_of_saved_frequencies()
        self.tokens = self.tokenize(texts)  # R lists
        self.words = [_split_at_spaces(tokens) for tokens in self.tokens]  # R lists
        self.lengths = np.fromiter(map(len, self.words), np.int64, len(self.words))  # [R]
        self.image_of = np.repeat(np.arange(len(references)), [len(texts) for texts in references])  # [R]
        self.starts = np.searchsorted(self.image_of, np.arange(len(references) + 1))  # [I + 1], first reference
        self.vocabulary = Vocabulary()

    def _check_tokenizer_of_saved_frequencies(self) -> None:
        saved = self.saved_frequencies
        if saved is not None and saved.tokenizer != self.tokenizer:
            raise InputError(
                f"The document frequencies (--df) are of the tokenizer {saved.tokenizer!r}, not {self.tokenizer!r}: "
                f"score with --tokenize {saved.tokenizer}, or save new ones with --save_df."
            )

    @cached_property
    def counts(self) -> list[ReferenceCounts]:
        """The n-gram counts of the references for n = 1 to 4."""
        return [ReferenceCounts.group(counts, self.image_of) for counts in self.vocabulary.learn(self.words)]

    @cached_property
    def weights(self) -> TfIdfWeights:
        """The tf-idf weights of CIDEr."""
        counts = self.counts  # added before the n-grams of a saved table, which get higher ids
        if self.saved_frequencies is None:
            frequencies = [np.bincount(unpack_low(each.keys)).astype(float) for each in counts]
            num_images = self.num_images
        else:
            frequencies = self.saved_frequencies.by_ngram_id(self.vocabulary)
            num_images = self.saved_frequencies.images
        return TfIdfWeights(frequencies, num_images, counts, len(self.words))

    def document_frequencies(self) -> DocumentFrequencies:
        """Return the document frequencies of these references, to score smaller sets with (`df=`)."""
        counts: list[Counter[str]] = [Counter() for _ in ORDERS]
        for begin, end in zip(self.starts, self.starts[1:], strict=False):
            for n in ORDERS:
                ngrams = (
                    " ".join(words[i : i + n]) for words in self.words[begin:end] for i in range(len(words) - n + 1)
                )
                counts[n - 1].update(list(dict.fromkeys(ngrams)))  # each n-gram counts once per image
        return DocumentFrequencies(self.num_images, [dict(each) for each in counts], self.tokenizer)

    def score(
        self,
        predictions: Sequence[str],
        metrics: Sequence[str] = METRICS,
        per_image: bool = False,
        allow_empty: bool = False,
    ) -> dict[str, Any]:
        """Score one caption for each image.

        Args:
            predictions: the captions, in the order of the references.
            metrics: metrics to compute, of "bleu", "rouge_l" and "cider".
            per_image: add `"per_image"`, a dictionary with the same keys and a list of I scores for each.
            allow_empty: score an empty prediction as the toolkit does instead of refusing it. It scores 0, and it
                shortens the text that BLEU compares with the references.

        Returns:
            A dictionary with `bleu_1` ... `bleu_4` and `rouge_l` between 0 and 1, and `cider` between 0 and 10. Papers
            print these scores times 100.

        Raises:
            InputError: for a wrong number of predictions, or one that is empty or not a string.
            ValueError: for an unknown metric.
        """
        check_predictions(predictions, self.num_images, allow_empty)
        if unknown := set(metrics) - set(METRICS):
            raise ValueError(f"Unknown metric {min(unknown)!r}: choose from {', '.join(METRICS)}.")
        tokens = self.tokenize(predictions)
        words = [_split_at_spaces(each) for each in tokens]
        lengths = np.fromiter(map(len, words), np.int64, len(words))  # [I]
        scores: dict[str, Any] = {}
        image_scores: dict[str, np.ndarray] = {}  # [I] each
        references: list[ReferenceCounts] = []
        counts: list[NgramCounts] = []
        weights = None
        if "bleu" in metrics or "cider" in metrics:
            # References and a saved table are added to the vocabulary first, so unknown n-grams get higher ids.
            references = self.counts
            weights = self.weights if "cider" in metrics else None
            counts = self.vocabulary.count(words)
        if "bleu" in metrics:
            corpus_bleu, image_bleu = bleu(counts, references, lengths, self._closest_lengths(lengths))
            for n in ORDERS:
                scores[f"bleu_{n}"], image_scores[f"bleu_{n}"] = corpus_bleu[n - 1], image_bleu[n - 1]
        if "rouge_l" in metrics:
            image_scores["rouge_l"] = self._rouge_l(tokens)
            scores["rouge_l"] = float(image_scores["rouge_l"].mean())
        if weights is not None:
            self._warn_about_single_image()
            image_scores["cider"] = cider(counts, references, weights, lengths, self.lengths, self.image_of)
            scores["cider"] = float(image_scores["cider"].mean())
        if per_image:
            scores["per_image"] = {name: values.tolist() for name, values in image_scores.items()}
        return scores

    def _closest_lengths(self, lengths: np.ndarray) -> np.ndarray:
        """Return the length of the reference that is closest to each prediction in length.

        Ties go to the shorter reference.

        Args:
            lengths (`[I]`): number of words of each prediction.
        """
        # Sorted by image, then distance, then length, the first row of each image is the closest one.
        distance = np.abs(self.lengths - lengths[self.image_of])
        order = np.lexsort((self.lengths, distance, self.image_of))
        return self.lengths[order[self.starts[:-1]]]

    def _rouge_l(self, tokens: list[list[str]]) -> np.ndarray:
        bounds = zip(tokens, self.starts, self.starts[1:], strict=False)
        return np.array([rouge_l(prediction, self.tokens[begin:end]) for prediction, begin, end in bounds])

    def _warn_about_single_image(self) -> None:
        if self.num_images == 1 and self.saved_frequencies is None:
            warnings.warn(
                "CIDEr of a single image is 0, because every n-gram occurs in all images of the corpus and has weight "
                "0. Score more images, or give document frequencies of a larger corpus (`df`).",
                stacklevel=3,
            )


def _split_at_spaces(tokens: list[str]) -> list[str]:
    """Return the words that BLEU and CIDEr count. White space inside a token, as in "2 1/2", splits the token."""
    return " ".join(tokens).split()
