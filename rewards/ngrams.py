"""Rewards that compare the words of a caption with those of its references: CIDEr-D and BLEU-4.

The end of a caption is a word of its own in completions that ended, in references and in document frequencies, as in
Luo's self-critical.pytorch. Without it, n-grams reward captions that break off ("a man riding a wave on a").
"""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import InputError
from ..common.logging import get_logger
from ..metrics.cider import DocumentFrequencies
from ..metrics.tokenized import TokenizedReferences, split_at_spaces
from ..metrics.tokenizers import Tokenize, resolve_tokenizer, tokenizer_name

logger = get_logger(__name__)

END = "<eos>"  # the word that ends a caption
FREQUENCIES_NAME = "document_frequencies.json.gz"  # in the run folder


class NgramReward:
    """Reward by a score of n-grams, which reads the columns `references` and `completion_ids`.

    Args:
        score: function from prepared references and the words of one caption for each image to `[n]` scores.
        tokenize: tokenizer of the captions, as [`References`] takes it.
        eos_token_id: the token ids that end a completion.
        frequencies: document frequencies, for CIDEr.
    """

    def __init__(
        self,
        score: Callable[[TokenizedReferences, list[list[str]]], np.ndarray],
        tokenize: str | Tokenize | None,
        eos_token_id: Collection[int],
        frequencies: DocumentFrequencies | None = None,
    ):
        self.score, self.frequencies = score, frequencies
        self.tokenize = None if tokenize is None else resolve_tokenizer(tokenize, [])
        self.eos_token_id = frozenset(eos_token_id)

    def __call__(
        self,
        prompts: list[str],
        completions: list[str],
        references: list[list[str]],
        completion_ids: Sequence[Any],
        **columns: Any,
    ) -> list[float]:
        """Score completions against the references of their images.

        Args:
            prompts: prompts, which are not read.
            completions: n captions.
            references: the reference captions of each completion's image.
            completion_ids: the token ids of each completion, with the end token if it was generated.
            columns: further columns, which are not read.

        Raises:
            InputError: for a completion whose image has no reference, or references without spaces between words.
        """
        if not all(references):
            raise InputError("A reward of n-grams needs a reference caption for every image: leave out the others.")
        tokenize = self.tokenize or resolve_tokenizer(
            None, [caption for captions in references for caption in captions]
        )
        ended = [not self.eos_token_id.isdisjoint(map(int, ids)) for ids in completion_ids]
        words = words_of(completions, tokenize)
        words = [[*each, END] if has_end else each for each, has_end in zip(words, ended, strict=True)]
        prepared = TokenizedReferences(words_of_references(references, tokenize), self.frequencies)
        return self.score(prepared, words).tolist()


def words_of(captions: Sequence[str], tokenize: Tokenize) -> list[list[str]]:
    """Return the words of captions. Equal captions are tokenised once."""
    distinct = list(dict.fromkeys(captions))
    tokens = dict(zip(distinct, tokenize(distinct), strict=True))
    return [split_at_spaces(tokens[caption]) for caption in captions]


def words_of_references(references: Sequence[Sequence[str]], tokenize: Tokenize) -> list[list[list[str]]]:
    """Return the words of the references of images, with the end of the caption as the last word."""
    words = iter(words_of([caption for captions in references for caption in captions], tokenize))
    return [[[*next(words), END] for _ in captions] for captions in references]


def run_frequencies(
    run_folder: Path, train_references: Callable[[], list[list[str]]], tokenize: str | Tokenize | None
) -> DocumentFrequencies:
    """Return the document frequencies of the training references, from the run folder or, in a new run, computed.

    Args:
        run_folder: folder of the run, which keeps the table as `document_frequencies.json.gz`.
        train_references: function that returns the reference captions of each training image.
        tokenize: tokenizer of the captions.

    Raises:
        InputError: if there are fewer than two images, so that all n-grams weigh nothing. Also if the stored table
            cannot be read or is one of another tokenizer.
    """
    file = run_folder / FREQUENCIES_NAME
    name = f"{tokenizer_name(tokenize)} {END}"
    if file.exists():
        frequencies = DocumentFrequencies.load(file)
        if frequencies.tokenizer != name:
            raise InputError(
                f"{str(file)!r} is of the tokenizer {frequencies.tokenizer!r}, not {name!r}: delete it, or choose "
                "another --output_dir."
            )
        return frequencies
    references = [captions for captions in train_references() if captions]
    if len(references) < 2:
        raise InputError(
            f"The reward 'cider' weighs n-grams by the number of training images that they occur for, and there are "
            f"{len(references)} images with captions: use at least two."
        )
    split = resolve_tokenizer(tokenize, [caption for captions in references for caption in captions])
    frequencies = TokenizedReferences(words_of_references(references, split)).document_frequencies(name)
    run_folder.mkdir(parents=True, exist_ok=True)
    frequencies.save(file)
    logger.info("Wrote the document frequencies of %d images to %s.", len(references), file)
    return frequencies
