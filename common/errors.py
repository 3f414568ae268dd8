"""Errors that a user can correct, and text that is safe to print."""

import os
import unicodedata
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

# Errors that transformers raises for a folder whose configuration or weights cannot be used.
UNUSABLE = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,  # also for JSON with thousands of nested brackets
    ImportError,
    StrictDataclassError,
)


MAX_MESSAGE = 500  # characters


class InputError(ValueError):
    """Error for a mistake in the user's input. The message is one sentence that names the mistake and the remedy.

    The middle of a long message is left out, because it quotes what the user gave.

    Args:
        message: the sentence.
    """

    def __init__(self, message: str):
        super().__init__(without_middle(message))


def without_middle(text: str, max_length: int = MAX_MESSAGE) -> str:
    """Return a text whose middle is replaced by "..." if it is long.

    Args:
        text: the text.
        max_length: the largest number of characters.

    Example:

    ```python
    >>> without_middle("There is no file 'aaaaaaaaaaaaaaaaaaaaaaaaaaaa'. Check it.", 40)
    "There is no file 'a ... aaaa'. Check it."
    ```
    """
    if len(text) <= max_length:
        return text
    half = (max_length - len(" ... ")) // 2
    return f"{text[:half]} ... {text[-half:]}"


def one_line(error: object, max_length: int = 400) -> str:
    """Return the message of an error in one line, for use inside another message.

    Args:
        error: the error, or any text.
        max_length: the largest number of characters; a longer message is cut and ends in "...".

    Example:

    ```python
    >>> one_line(ValueError("There is no\\n  file 'a'."))
    "There is no file 'a'."
    ```
    """
    text = " ".join(str(error).split())
    return text if len(text) <= max_length else text[: max_length - 3] + "..."


def cannot_use(name: object, error: Exception) -> InputError:
    """Return the error for a captioner that transformers cannot use.

    Args:
        name: folder or Hub id of the captioner.
        error: the error that transformers raised.
    """
    return InputError(f"The captioner {str(name)!r} cannot be used: {one_line(error)}")


def check_output(path: str | os.PathLike) -> None:
    """Check that an output file can be written, before the computation starts.

    Args:
        path: the file to write.

    Raises:
        InputError: if the folder of the file does not exist, or the path is a folder.
    """
    if not Path(path).absolute().parent.is_dir():
        raise InputError(f"There is no folder for {str(path)!r}: make it first.")
    if Path(path).is_dir():
        raise InputError(f"{str(path)!r} is a folder: name a file in it.")


def printable(text: object) -> str:
    """Escape the control characters of untrusted text, so that a terminal shows them instead of executing them.

    Line breaks and tabs stay. So do zero-width joiners, which some scripts and emoji need.

    Args:
        text: the text, or an object whose `str` is shown.
    """
    return "".join(
        character.encode("unicode_escape").decode()
        if character not in "\n\t\u200c\u200d" and unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        else character
        for character in str(text)
    )
