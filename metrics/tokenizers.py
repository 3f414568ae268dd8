"""Tokenizers of the metrics: that of the COCO caption toolkit, characters, or a tokenizer of the user."""

import re
from collections.abc import Callable, Sequence

from ..common.errors import UNUSABLE, InputError, one_line
from . import ptb_tokenizer

Tokenize = Callable[[Sequence[str]], list[list[str]]]

DESCRIPTIONS = {
    "ptb": "PTB, as in the COCO caption toolkit, punctuation removed",
    "characters": "characters, without white space",
}
# Letters of scripts that do not separate words by spaces, and the number of letters of a long word in them. Korean and
# Vietnamese have spaces.
EASTERN = re.compile(
    "[\u2e80-\u2fdf\u3005-\u3007\u3031-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\uff66-\uff9f\U0001b000-\U0001b16f\U00020000-\U0003fffd]"
)  # Chinese and Japanese
SOUTHERN = re.compile(
    "[\u0e01-\u0e30\u0e32\u0e33\u0e40-\u0e46\u0e81-\u0eb0\u0eb2\u0eb3\u0ebd\u0ec0-\u0ec6\u0edc-\u0edf\u0f40-\u0f6c"
    "\u1000-\u102a\u103f\u1050-\u1055\u1075-\u1081\u1780-\u17b3\u1950-\u19ab\u1a20-\u1a54\ua9e0-\ua9e4\uaa60-\uaa76]"
)  # Thai, Lao, Tibetan, Burmese, Khmer, Tai, without vowel signs
LONG_WORD = {EASTERN: 3, SOUTHERN: 4}
MAX_SHARE = 0.1  # of captions without spaces, above which their scores would not mean anything


def characters(captions: Sequence[str]) -> list[list[str]]:
    """Return the characters of each caption, without white space.

    Scores of characters equal those of the COCO caption toolkit's scorers for captions whose characters are separated
    by spaces. Letter case and punctuation stay.

    Args:
        captions: the captions.

    Example:

    ```python
    >>> characters(["一只 狗。"])
    [['一', '只', '狗', '。']]
    ```
    """
    return [[character for character in caption if not character.isspace()] for caption in captions]


def resolve_tokenizer(tokenize: str | Tokenize | None, captions: Sequence[str]) -> Tokenize:
    """Return the function that splits captions into tokens.

    Args:
        tokenize: `"ptb"` for the tokenizer of the COCO caption toolkit, or `"characters"`. Otherwise the Hub id or
            folder of a tokenizer for transformers, or a function from captions to their tokens. `None` is `"ptb"`, but
            refuses captions that have no spaces between words.
        captions: the reference captions.

    Raises:
        InputError: for `None` and captions without spaces, or a tokenizer that cannot be loaded.
    """
    if tokenize is None and (first := first_without_spaces(captions)) is not None:
        raise InputError(
            f"Captions such as {one_line(first, 40)!r} have no spaces between words, so their words cannot be counted: "
            "score characters with --tokenize characters (in Python: tokenize='characters'), or give a tokenizer of "
            "the language; --tokenize ptb splits at spaces all the same."
        )
    match tokenize:
        case None | "ptb":
            return ptb_tokenizer.tokenize
        case "characters":
            return characters
        case str():
            return load_tokenizer(tokenize)
    return tokenize


def load_tokenizer(name: str) -> Tokenize:
    """Return the function of a tokenizer for transformers.

    Args:
        name: Hub id or folder.

    Raises:
        InputError: if it cannot be loaded.
    """
    from transformers import AutoTokenizer  # here, because it imports slowly

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (*UNUSABLE, OSError) as error:
        raise InputError(
            f"The tokenizer {one_line(name, 80)!r} cannot be loaded: choose ptb, characters, or the Hub id or folder "
            f"of a tokenizer ({one_line(error, 200)})."
        ) from error
    return lambda captions: [tokenizer.tokenize(caption) for caption in captions]


def tokenizer_name(tokenize: str | Tokenize | None) -> str:
    """Return the name that is stored with scores: `"ptb"`, `"characters"`, a Hub id or folder, or `"custom"`."""
    return "custom" if callable(tokenize) else tokenize or "ptb"


def describe_tokenizer(tokenize: str | Tokenize | None) -> str:
    """Return a description of a tokenizer for files of scores and reports."""
    name = tokenizer_name(tokenize)
    return DESCRIPTIONS.get(name, name)


def first_without_spaces(captions: Sequence[str]) -> str | None:
    """Return the first caption without spaces between words, if more than a tenth of the captions are like it.

    Only letters count, so emoji and punctuation have no influence. Captions whose words or characters are already
    separated by spaces have spaces.

    Args:
        captions: the captions.

    Example:

    ```python
    >>> first_without_spaces(["一只狗在草地上奔跑", "两只猫"])
    '一只狗在草地上奔跑'
    >>> first_without_spaces(["一只 狗 在 草地 上 奔跑", "两只 猫"])  # None
    ```
    """
    suspects = [caption for caption in captions if not caption.isascii() and _is_mostly_unspaced(caption)]
    if len(suspects) <= MAX_SHARE * len(captions):
        return None
    chunks = [chunk for caption in suspects for chunk in caption.split() if _letters(chunk)]
    letters = sum(map(_letters, chunks))
    expected_words = sum(len(script.findall(chunk)) / long for chunk in chunks for script, long in LONG_WORD.items())
    # Where no caption has a space, captions of a few letters are not words either.
    has_no_space = len(chunks) == len(suspects) and letters >= 2 * len(suspects)
    return suspects[0] if has_no_space or expected_words > len(chunks) else None


def _letters(text: str) -> int:
    """Return the number of letters of scripts without spaces."""
    return sum(len(script.findall(text)) for script in LONG_WORD)


def _is_mostly_unspaced(caption: str) -> bool:
    """Return whether words of scripts without spaces, of two letters or more, outnumber the other words."""
    others = caption
    for script in LONG_WORD:
        others = script.sub(" ", others)
    return _letters(caption) / 2 > sum(any(map(str.isalpha, word)) for word in others.split())
