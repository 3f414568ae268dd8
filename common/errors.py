"""What `train_hf.py` and `eval_captions.py` share and the Hub never sees."""

import os
import unicodedata
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

# What transformers raises for a folder whose configuration or weights cannot be used: each of its parts something else.
UNUSABLE = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,  # also brackets nested thousands deep
    ImportError,
    StrictDataclassError,
)


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one sentence that names it and says what to do."""


def cannot_use(name: object, error: Exception) -> InputError:
    """Which captioner transformers could make nothing of, and why."""
    return InputError(f"The captioner {str(name)!r} cannot be used: {' '.join(str(error).split())[:500]}")


def check_output(path: str | os.PathLike) -> None:
    """See that a file can be written there, before there is anything to lose.

    Raises:
        InputError: if its folder is missing, or it is itself one.
    """
    if not Path(path).absolute().parent.is_dir():
        raise InputError(f"There is no folder for {str(path)!r}: make it first.")
    if Path(path).is_dir():
        raise InputError(f"{str(path)!r} is a folder: name a file in it.")


def one_line(error: object, max_length: int | None = None) -> str:
    r"""Return an error message as one line: every run of white space becomes a space.

    Args:
        error: an exception, or a message.
        max_length: cut the message to this number of characters.

    Example:

    ```python
    >>> one_line(ValueError("The file is\n  damaged."))
    'The file is damaged.'
    ```
    """
    return " ".join(str(error).split())[:max_length]


def printable(text: object) -> str:
    """A text that may hold strangers' words, for a terminal: what moves its cursor or turns its lines is spelt out."""
    return "".join(
        character.encode("unicode_escape").decode()
        if character not in "\n\t\u200c\u200d" and unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        else character
        for character in str(text)
    )
