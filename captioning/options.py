"""Command lines of both scripts: dataclasses of options, and an error that names the option that was meant."""

import dataclasses
import difflib
from typing import Any

from transformers import HfArgumentParser

from . import InputError


def option(default: Any, help: str) -> Any:
    """A field of a dataclass of options."""
    return dataclasses.field(default=default, metadata={"help": help})


def make_parser(classes: tuple[type, ...], description: str) -> HfArgumentParser:
    """A parser that wants every option written out in full, as recipes do."""
    return HfArgumentParser(classes, description=description, allow_abbrev=False)


def parse(parser: HfArgumentParser, words: list[str]) -> tuple:
    """Turn a command line into its dataclasses.

    Raises:
        InputError: for an unknown option, with the nearest one there is, or options that do not go together.
    """
    try:
        *options, unknown = parser.parse_args_into_dataclasses(
            words, return_remaining_strings=True, look_for_args_file=False
        )
    except ValueError as error:  # options that do not go together, by the Trainer's own word
        raise InputError(" ".join(str(error).split())) from error
    if unknown:
        raise InputError(f"Unknown option {unknown[0]!r}. {nearest_option(parser, unknown[0].lstrip('-'), '--')}")
    return tuple(options)


def nearest_option(parser: HfArgumentParser, name: str, dashes: str = "") -> str:
    """A sentence that helps whoever misspelt an option."""
    nearest = difflib.get_close_matches(name, [action.dest for action in parser._actions], n=1)
    return f"Did you mean {dashes + nearest[0]!r}?" if nearest else "See --help."
