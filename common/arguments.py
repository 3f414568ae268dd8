"""Command lines of the scripts: dataclasses of options, recipes, and an error that names the option that was meant."""

import argparse
import dataclasses
import difflib
import re
import sys
from typing import Any

from transformers import HfArgumentParser

from .errors import InputError


def option(default: Any, help: str) -> Any:
    """A field of a dataclass of options."""
    return dataclasses.field(default=default, metadata={"help": help})


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and leaves the examples of a description in their lines."""


def make_parser(classes: tuple[type, ...], description: str) -> HfArgumentParser:
    """A parser that wants every option written out in full, as recipes do.

    Args:
        classes: dataclasses of options.
        description: the docstring of the script, whose examples `python script.py ...` are shown as they are or, to
            somebody who runs `qformer-captioner command`, as that.
    """
    if sys.argv[0].startswith("qformer-captioner "):
        description = re.sub(r"python \w+\.py", sys.argv[0], description)
    return HfArgumentParser(classes, description=description, allow_abbrev=False, formatter_class=HelpFormatter)


def parse(parser: HfArgumentParser, words: list[str]) -> tuple:
    """Turn a command line into its dataclasses.

    Raises:
        InputError: for an unknown option, with the nearest one there is, or options that do not go together.
    """
    try:
        *options, unknown = parser.parse_args_into_dataclasses(
            words, return_remaining_strings=True, look_for_args_file=False
        )
    except (TypeError, ValueError) as error:  # options that do not go together, by the Trainer's own word
        raise InputError(" ".join(str(error).split())) from error
    if unknown:
        name = unknown[0].partition("=")[0]  # the rest may be a secret
        raise InputError(f"Unknown option {name!r}. {nearest_option(parser, name.lstrip('-'), '--')}")
    return tuple(options)


def changed_options(parser: HfArgumentParser, words: list[str]) -> dict[str, Any]:
    """The options of a command line that are not the default ones."""
    values, defaults = (vars(parser.parse_known_args(each)[0]) for each in (words, []))
    return {name: value for name, value in sorted(values.items()) if value != defaults[name]}


def nearest_option(parser: HfArgumentParser, name: str, dashes: str = "") -> str:
    """A sentence that helps whoever misspelt an option."""
    nearest = difflib.get_close_matches(name, [action.dest for action in parser._actions], n=1)
    return f"Did you mean {dashes + nearest[0]!r}?" if nearest else "See --help."
