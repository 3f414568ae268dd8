"""BLEU, ROUGE-L and CIDEr of a corpus, with references that are tokenised and prepared once."""

import itertools
import os
import warnings
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from .bleu import bleu
from .checks import check_predictions, check_references
from .cider import DocumentFrequencies, cider
from .ngrams import ORDERS
from .rouge import rouge_l
from .tokenized import TokenizedReferences, split_at_spaces
from .tokenizers import Tokenize, resolve_tokenizer, tokenizer_name

METRICS = ("bleu", "rouge_l", "cider")


class References(TokenizedReferences):
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
        saved = df if isinstance(df, DocumentFrequencies) else None
        if saved is None and df != "corpus":
            saved = DocumentFrequencies.load(cast(str | os.PathLike, df))
        texts = [text for texts in references for text in texts]  # R strings
        self.tokenize, self.tokenizer = resolve_tokenizer(tokenize, texts), tokenizer_name(tokenize)
        if saved is not None:
            saved.check_tokenizer(self.tokenizer)
        self.tokens = self.tokenize(texts)  # R lists
        words = map(split_at_spaces, self.tokens)
        super().__init__([list(itertools.islice(words, len(texts))) for texts in references], saved)

    def document_frequencies(self, tokenizer: str | None = None) -> DocumentFrequencies:
        """Return the document frequencies of these references, to score smaller sets with (`df=`).

        Args:
            tokenizer: name of the tokenizer of the words; by default that of these references.
        """
        return super().document_frequencies(tokenizer or self.tokenizer)

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
        scores: dict[str, Any] = {}
        image_scores: dict[str, np.ndarray] = {}  # [I] each
        if "bleu" in metrics or "cider" in metrics:
            counts, lengths = self.count([split_at_spaces(each) for each in tokens])
        if "bleu" in metrics:
            corpus_bleu, image_bleu = bleu(counts, self.counts, lengths, self.closest_lengths(lengths))
            for n in ORDERS:
                scores[f"bleu_{n}"], image_scores[f"bleu_{n}"] = corpus_bleu[n - 1], image_bleu[n - 1]
        if "rouge_l" in metrics:
            image_scores["rouge_l"] = self._rouge_l(tokens)
            scores["rouge_l"] = float(image_scores["rouge_l"].mean())
        if "cider" in metrics:
            self._warn_about_single_image()
            image_scores["cider"] = cider(counts, self.counts, self.weights, lengths, self.lengths, self.image_of)
            scores["cider"] = float(image_scores["cider"].mean())
        if per_image:
            scores["per_image"] = {name: values.tolist() for name, values in image_scores.items()}
        return scores

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
