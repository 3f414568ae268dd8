"""Conversations about an image, as data sets for instruction tuning store them, as prompts and captions."""

import json
from collections.abc import Iterator
from typing import Any

CONVERSATION_NAMES = ("conversations", "conversation", "messages")
KEYS = (("from", "value"), ("role", "content"))  # of LLaVA, and of chat templates
ASSISTANTS = ("assistant", "gpt", "model", "chatgpt", "bot")
IMAGE_TOKEN = "<image>"


def is_conversation(value: Any) -> bool:
    """Return whether a cell holds the turns of a conversation.

    Example:

    ```python
    >>> is_conversation([{"from": "human", "value": "What is it?"}]), is_conversation([{"raw": "a dog"}])
    (True, False)
    ```
    """
    if isinstance(value, str) and value.lstrip()[:1] != "[":  # most cells; the rest would take longer than reading them
        return False
    turns = parse_turns(value)
    return bool(turns) and all(isinstance(turn, dict) and keys_of(turn) is not None for turn in turns)


def rounds_of(value: Any) -> Iterator[tuple[str, list[str]]]:
    """Yield each round of a conversation: the prompt, and the answers as captions.

    A system turn begins the prompt of every round. A round does not repeat earlier rounds. `<image>` and the parts of a
    message that are not text are left out. A prompt without an answer has no captions.

    Args:
        value: turns with `from` and `value` as in LLaVA, or with `role` and `content` as in chat templates. The turns
            may be written as JSON.

    Example:

    ```python
    >>> turns = [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "a dog"}]
    >>> list(rounds_of(turns))
    [('What is it?', ['a dog'])]
    ```
    """
    system: list[str] = []
    prompt: list[str] = []
    captions: list[str] = []
    for turn in parse_turns(value):
        role_key, text_key = keys_of(turn) or KEYS[0]
        role, text = str(turn.get(role_key)).lower(), text_of(turn.get(text_key))
        if role in ASSISTANTS:
            captions += [text] if text else []
            continue
        if captions:
            yield "\n".join([*system, *prompt]), captions
            prompt, captions = [], []
        (system if role == "system" else prompt).extend([text] if text else [])
    if prompt or captions:
        yield "\n".join([*system, *prompt]), captions


def parse_turns(value: Any) -> list:
    """Return the turns in a cell, or an empty list for a cell of another kind."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
    if isinstance(value, dict):  # `datasets` before version 4 stores a list of dicts as a dict of lists
        columns = {name: cells for name, cells in value.items() if isinstance(cells, list)}
        value = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=False)]
    return value if isinstance(value, list) else []


def keys_of(turn: dict[str, Any]) -> tuple[str, str] | None:
    """Return the keys of speaker and text in a turn, or `None` if it has neither pair."""
    return next((keys for keys in KEYS if set(keys) <= turn.keys() and turn[keys[0]] is not None), None)


def text_of(content: Any) -> str:
    """Return the text of a turn, whose content is a string or a list of parts, without `<image>`."""
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    lines = " ".join(text.strip() for text in texts if isinstance(text, str)).replace(IMAGE_TOKEN, "\n").splitlines()
    return "\n".join(line.strip() for line in lines if line.strip())
