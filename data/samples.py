"""Samples: an image and texts in files of the same name, in a folder or in a tar."""

import json
from collections.abc import Iterable
from typing import Any

from .captions import captions_of
from .text_files import text_encoding

TEXT_KINDS = ("caption", "txt", "text", "json")  # suffixes of texts with captions, the most explicit first


def captions_of_text(kind: str, value: Any) -> list[str]:
    """Return the captions in a text of a sample.

    Args:
        kind: suffix of its file. In `json`, captions are those of [`captions_of`]. Otherwise each line is a caption.
        value: content of the file.

    Example:

    ```python
    >>> captions_of_text("txt", "a dog\\n\\na brown dog\\n"), captions_of_text("json", {"caption": "a dog"})
    (['a dog', 'a brown dog'], ['a dog'])
    ```
    """
    lines = value.splitlines() if kind != "json" and isinstance(value, str) else value
    return captions_of(lines)


def caption_kinds(samples: Iterable[dict[str, list[str]]]) -> tuple[str, ...]:
    """Return the kinds of texts that hold the captions, in the order in which they are tried.

    Args:
        samples: the captions of each sample, by the kind of their text, or by a suffix that ends in it (`en.txt`).

    Returns:
        All kinds that occur, if no sample has different captions in two of them. Otherwise only `caption` if it occurs,
        as its name says what it holds, and nothing if it does not.

    Example:

    ```python
    >>> caption_kinds([{"txt": ["a dog"]}, {"caption": ["a cat"]}]), caption_kinds([{"txt": ["a"], "json": ["b"]}])
    (('caption', 'txt'), ())
    ```
    """
    seen: set[str] = set()
    differ = False
    for captions in samples:
        filled = [value for value in captions.values() if value]
        seen.update(kind for kind, value in captions.items() if value)
        differ = differ or any(value != filled[0] for value in filled)
    kinds = tuple(sorted(seen, key=lambda kind: TEXT_KINDS.index(kind.rpartition(".")[2])))
    return tuple(kind for kind in kinds if kind == "caption") if differ else kinds


def decode_text(kind: str, content: bytes) -> Any:
    """Return the content of a text file: a value of JSON, or a string.

    Raises:
        ValueError: if it is not UTF-8 or UTF-16, or not valid JSON.
    """
    try:
        text = content.decode(text_encoding(content[: 2**12])).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text (byte 0x{content[error.start]:02x}): save it as UTF-8") from error
    try:
        return json.loads(text) if kind == "json" else text
    except RecursionError as error:
        raise ValueError("brackets are nested too deep") from error
