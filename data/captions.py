"""Captions in the cells of a data set."""

import ast
import json
import re
from typing import Any

from .names import CAPTION_NAMES, find_name

CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")  # except tabs and line ends
MAX_CAPTION_CHARACTERS = 10_000
MAX_LIST_CHARACTERS = 1_000_000  # of a list that is written as text
QUOTED = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
# A list as Python or numpy writes it. numpy writes no commas, and Python would join adjacent strings.
WRITTEN_LIST = re.compile(rf"\[\s*{QUOTED}(?:[\s,]+{QUOTED})*[\s,]*\]", re.DOTALL)


def captions_of(value: Any) -> list[str]:
    """Return the captions in a cell, without blank ones.

    Numbers count as text. Control characters become spaces. Captions longer than 10,000 characters are cut.

    Args:
        value: a string, a list of strings, a dict with a caption under one of `CAPTION_NAMES`, or a list of such dicts.
            A list or dict may be written as text, as JSON or as Python writes it. Any other value counts as an empty
            cell.

    Example:

    ```python
    >>> captions_of([{"raw": "a dog"}, {"caption": "a brown dog"}, " "])
    ['a dog', 'a brown dog']
    >>> captions_of("['a dog', 'a brown dog']"), captions_of(None)
    (['a dog', 'a brown dog'], [])
    ```
    """
    value = parse_list(value) if isinstance(value, str) else value
    captions = [clean_caption(str(text)) for item in as_list(value) for text in texts_of(item)]
    return [caption for caption in captions if caption]


def texts_of(item: Any) -> list:
    """Return the text of an item of a cell, or the texts under the caption's name in a dict."""
    if isinstance(item, dict):
        given = {name: value for name, value in item.items() if value is not None}
        name = "raw" if "raw" in given else find_name(CAPTION_NAMES, given)
        return [] if name is None else [text for text in as_list(given[name]) if is_text(text)]
    return [item] if is_text(item) else []


def as_list(value: Any) -> list:
    """Return a list or tuple as a list, and any other value as a list of one item."""
    return list(value) if isinstance(value, list | tuple) else [value]


def parse_list(text: str) -> Any:
    """Return the list or dict of captions that a text writes out, or the text itself.

    Example:

    ```python
    >>> parse_list('["a dog", "a cat"]'), parse_list("['a dog'\\n 'a cat']"), parse_list("[sic]")
    (['a dog', 'a cat'], ['a dog', 'a cat'], '[sic]')
    ```
    """
    stripped = text.strip()
    if stripped[:1] + stripped[-1:] not in ("[]", "{}", "()") or len(stripped) > MAX_LIST_CHARACTERS:
        return text
    try:
        value = json.loads(stripped)
    except (ValueError, RecursionError):
        try:
            if WRITTEN_LIST.fullmatch(stripped):
                return [ast.literal_eval(item) for item in re.findall(QUOTED, stripped, re.DOTALL)]
            value = ast.literal_eval(stripped)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return text
    value = list(value) if isinstance(value, tuple) else value
    if stripped[0] == "(" and not isinstance(value, list):  # a caption in brackets
        return text
    return value if all(isinstance(item, str | dict | None) for item in as_list(value)) else text


def is_text(value: Any) -> bool:
    """Return whether a value is a string, or a number that is not NaN."""
    if isinstance(value, float):
        return value == value  # NaN marks an empty cell
    return isinstance(value, str | int) and not isinstance(value, bool)


def clean_caption(text: str) -> str:
    """Cut a caption to the allowed length, and replace its control characters."""
    return CONTROL_CHARACTERS.sub(" ", text[:MAX_CAPTION_CHARACTERS]).strip()


def describe(value: Any) -> str:
    """Return what a cell without a caption holds, for messages.

    Example:

    ```python
    >>> describe([{"from": "human", "value": "Describe it."}]), describe(" "), describe(b"...")
    ("dictionaries with 'from', 'value'", 'nothing', 'bytes')
    ```
    """
    value = parse_list(value) if isinstance(value, str) else value
    items = [item for item in as_list(value) if item is not None]
    if not items or (all(isinstance(item, str) and not item.strip() for item in items)):
        return "nothing"
    first = items[0]
    plural = isinstance(value, list | tuple)
    if isinstance(first, dict):
        names = ", ".join(repr(str(name)[:40]) for name in list(first)[:6]) or "nothing"
        return f"{'dictionaries' if plural else 'a dictionary'} with {names}"
    kind = "list" if isinstance(first, list | tuple) else type(first).__name__
    return f"a list of {kind} values" if plural else {"bool": "a truth value", "bytes": "bytes"}.get(kind, f"a {kind}")


def why_no_caption(value: Any) -> str:
    """Return the reason for a row without a caption: an empty cell, or a cell that holds something else."""
    held = describe(value)
    return "no caption" if held == "nothing" else f"no caption: the cell holds {held}"
