"""Parser of the scripts, which fills dataclasses of options from a command line.

`--help` must be quick, so a script imports slow modules after it has parsed its options. transformers' training
arguments need a slow import themselves, so `--help` shows only the options of this package:

```python
def parse_options(words: list[str]) -> tuple:
    if asks_for_help(words):
        training_options = TrainingOptions # without importing torch
    else:
        from qformer_captioner.training.training_arguments import QFormerTrainingArguments as training_options
    return OptionParser((ModelArguments, training_options), __doc__, help_all=True).parse(words)
```
"""

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from .arguments import TRAINER, CommandParser
from .errors import InputError, one_line

METAVARS = {int: "INT", float: "FLOAT", str: "TEXT", string_to_bool: "BOOL"}
UNSET = ("null", "none")  # in lower or upper case
UNSET_HELP = "An option without a default can be unset where a recipe sets it: --option null."


def asks_for_help(words: Sequence[str]) -> bool:
    """Return True if a command line contains `--help`."""
    return not {"-h", "--help"}.isdisjoint(words)


class OptionParser(CommandParser, HfArgumentParser):
    """Parser of dataclasses of options. `--help` shows each option in its group.

    Args:
        classes: dataclasses of transformers, or dataclasses whose fields are made with [`option`].
        description: the docstring of the script. Its examples `python script.py ...` are shown unchanged, or as
            `qformer-captioner command ...` if the script runs as a subcommand.
        help_all: add `--help_all`, which also shows the options that `--help` leaves out.
    """

    def __init__(self, classes: tuple[type, ...], description: str, help_all: bool = False):
        if sys.argv[0].startswith("qformer-captioner "):
            description = re.sub(r"python \w+\.py", sys.argv[0], description)
        super().__init__(classes, description=description, epilog=UNSET_HELP, usage="%(prog)s [--option value ...]")
        if help_all:
            self.add_argument("--help_all", action="help", help=f"show the options of {TRAINER}, too, and exit")

    def add_argument(self, *names: str, **kwargs: Any) -> Any:  # type: ignore[override]
        """Add an argument to its group. Options of transformers belong to the group of the Trainer."""
        action = kwargs.get("action")
        if action == "help":
            return super().add_argument(*names, **kwargs)
        if action == "store_false":  # `--no_x`, which transformers adds for every flag `x` that is true by default
            kwargs["help"] = argparse.SUPPRESS
        elif "choices" not in kwargs:
            kwargs.setdefault("metavar", METAVARS.get(kwargs["type"]))
        return super().add_argument(*names, **{"group": TRAINER, **kwargs})

    def parse(self, words: Sequence[str]) -> tuple:
        """Return the dataclasses with the values of a command line.

        Args:
            words: the command line. If an option occurs several times, the last value is used.

        Raises:
            InputError: for an unknown option, with a suggestion, or for options that contradict each other.
        """
        try:
            *options, unknown = self.parse_args_into_dataclasses(
                self.without_unset(words), return_remaining_strings=True, look_for_args_file=False
            )
        except InputError:
            raise
        except (TypeError, ValueError) as error:  # the Trainer's own checks
            raise InputError(one_line(error)) from error
        self.refuse(unknown)
        return tuple(options)

    def changed_options(self, words: Sequence[str]) -> dict[str, Any]:
        """Return the options of a command line whose values differ from the defaults, in alphabetical order."""
        values = vars(self.parse_known_args(self.without_unset(words))[0])
        defaults = vars(self.parse_known_args([])[0])
        return {name: value for name, value in sorted(values.items()) if value != defaults[name]}

    def without_unset(self, words: Sequence[str]) -> list[str]:
        """Return a command line without the options that it sets to `null`, and without their earlier values.

        Only an option whose default is `None` can be unset; for others `null` is an ordinary value.
        """
        parts: list[list[str]] = [[]]  # the words before the first option, then each option with its values
        for word in words:
            if word.startswith("--"):
                parts.append([])
            parts[-1].append(word)
        kept: list[tuple[str, list[str]]] = []
        for part in parts:
            name, values = split_option(part)
            is_unset = len(values) == 1 and values[0].lower() in UNSET
            if is_unset and name in self.option_names and self.get_default(name) is None:
                kept = [(other, own) for other, own in kept if other != name]
            else:
                kept.append((name, part))
        return [word for _, part in kept for word in part]


def split_option(words: Sequence[str]) -> tuple[str, list[str]]:
    """Split `["--name", "value"]` or `["--name=value"]` into the name of the option and its values."""
    if not words or not words[0].startswith("--"):
        return "", list(words)
    name, equals, value = words[0].partition("=")
    return name.lstrip("-").replace("-", "_"), [*([value] if equals else []), *words[1:]]
