"""Declaration and checks of the options of commands, with suggestions for mistyped and former names.

Nothing here imports torch or transformers, so that `--help` is quick. [`OptionParser`] in `option_parser.py` turns
dataclasses of options into a command line.
"""

import argparse
import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from .errors import InputError, one_line

# The groups of `--help`, in order.
TRAINER = "transformers' Trainer"
GROUPS = ("model", "data", "augmentation", "objective", "generation", "scoring", "run", TRAINER)

DTYPES = ("auto", "float32", "bfloat16", "float16")  # of weights; `auto` is the dtype in which each part was saved

# Former names of options and recipe fields, and their current names.
FORMER_NAMES = {
    "flip": "horizontal_flip_prob",
    "id_column": "image_id_column",
    "smallest_crop": "random_resized_crop_scale",
    "standardize_features": "normalize_image_features_samples",
    "word_loss_weight": "bag_of_words_loss_weight",
}


def option(default: Any, help: str, group: str | None = None) -> Any:
    """Return a dataclass field that is an option of a command.

    Args:
        default: the value if the option is not given. An option whose default is `None` can be unset with `null`.
        help: a complete phrase for `--help`.
        group: the group of `--help` that shows the option, one of `GROUPS`.

    Raises:
        ValueError: if the group does not exist.

    Example:

    ```python
    @dataclass
    class ModelArguments:
        lora_r: int | None = option(None, "Rank of LoRA adapters on the language model.", "model")
    ```
    """
    if group is not None and group not in GROUPS:
        raise ValueError(f"{group!r} is not a group of options: use one of {', '.join(GROUPS)}.")
    return dataclasses.field(default=default, metadata={"help": help} | ({"group": group} if group else {}))


# ----------------------------------------------------------------------------------------------------------------------
# Checks
# ----------------------------------------------------------------------------------------------------------------------


def check_at_least(options: object, minimum: float, *names: str) -> None:
    """Check that numeric options are finite and not below a minimum. Options that are `None` pass.

    Args:
        options: dataclass or namespace of options.
        minimum: the smallest value that is accepted.
        names: the options to check.

    Raises:
        InputError: for the first option that is too small.

    Example:

    ```python
    >>> check_at_least(argparse.Namespace(batch_size=0), 1, "batch_size")
    Traceback (most recent call last):
    qformer_captioner.common.errors.InputError: --batch_size must be at least 1, not 0.
    ```
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and not minimum <= value < math.inf:  # also refuses NaN
            raise InputError(f"--{name} must be at least {minimum}, not {value}.")


def check_one_of(options: object, choices: Sequence[str], *names: str) -> None:
    """Check that options have accepted values. Options that are `None` pass.

    Args:
        options: dataclass or namespace of options.
        choices: the values that are accepted.
        names: the options to check. An option may hold one value or a list of values.

    Raises:
        InputError: for the first value that is not accepted; the message names the nearest choice.
    """
    for name in names:
        value = getattr(options, name)
        for each in value if isinstance(value, list) else [value]:
            if each is not None and each not in choices:
                raise InputError(f"--{name} must be {in_words(choices)}, not {each!r}.{did_you_mean(each, choices)}")


def in_words(choices: Sequence[str]) -> str:
    """Return choices as a phrase: "auto, true or false"."""
    *first, last = map(str, choices)
    return f"{', '.join(first)} or {last}" if first else last


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return " Did you mean ...?" with the nearest known name, or an empty string if no name is near.

    Args:
        name: what the user typed.
        known: the names that exist.
        prefix: text to show in front of the nearest name, such as `--`.
    """
    nearest = difflib.get_close_matches(str(name), list(known), n=1)
    return f" Did you mean {prefix + nearest[0]!r}?" if nearest else ""


def unknown_name(what: str, name: str, known: Iterable[str], prefix: str = "") -> InputError:
    """Return the error for an option or recipe field that does not exist, with the name that was probably meant.

    Args:
        what: the beginning of the sentence, such as "Unknown option".
        name: the option, without dashes in front.
        known: the options that exist.
        prefix: `--` for an option of a command line.
    """
    known = set(known)
    name = str(name)
    current = FORMER_NAMES.get(name.replace("-", "_"))
    if current in known:
        return InputError(f"{what} {prefix + name!r}: it is now called {prefix}{current}.")
    return InputError(
        f"{what} {prefix + name!r}.{did_you_mean(name.replace('-', '_'), known, prefix) or ' See --help.'}"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Command lines
# ----------------------------------------------------------------------------------------------------------------------


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help formatter that shows one spelling of each option, its default if it has one, and examples unchanged."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        long = [name for name in action.option_strings if name.startswith("--")]
        if len(long) < 2:
            return super()._format_action_invocation(action)
        return f"{long[0]} {self._format_args(action, action.dest.upper())}"


class CommandParser(argparse.ArgumentParser):
    """Parser that does not accept abbreviated options, and raises an [`InputError`] for a mistake.

    Args:
        args, kwargs: as for `argparse.ArgumentParser`.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self.option_names: set[str] = set()
        self.groups: dict[str, Any] = {}
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": HelpFormatter, **kwargs})

    def add_argument(  # type: ignore[override]
        self, *names: str, group: str | None = None, choices: Iterable[Any] | None = None, **kwargs: Any
    ) -> argparse.Action:
        """Add an argument as `argparse` does. The error for a mistyped choice suggests the nearest one.

        Args:
            names: positional name or option names.
            group: the group of the help that shows the argument, one of `GROUPS`.
            choices: the values that are accepted.
            kwargs: as for `argparse.ArgumentParser.add_argument`.
        """
        if choices is not None:
            words = [str(choice) for choice in choices]
            kwargs = {"metavar": f"{{{','.join(words)}}}", **kwargs, "type": one_of(words, kwargs.get("type", str))}
        if group is None:
            action = super().add_argument(*names, **kwargs)
        else:
            if not self.groups:  # all at once, because the help shows groups in the order in which they were created
                self.groups = {title: self.add_argument_group(title) for title in GROUPS}
            action = self.groups[group].add_argument(*names, **kwargs)
        if action.option_strings and kwargs.get("action") != "help":
            self.option_names.add(action.dest)
        return action

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse a command line.

        Raises:
            InputError: for an unknown option, a missing argument, or a value of the wrong type.
        """
        options, unknown = self.parse_known_args(args, namespace)
        self.refuse(unknown)
        return options

    def refuse(self, unknown: Sequence[str]) -> None:
        """Raise an error if there are arguments that the parser does not know.

        Raises:
            InputError: if there are unknown arguments.
        """
        if not unknown:
            return
        name = unknown[0].partition("=")[0]  # the value may be a secret
        if not name.startswith("-"):
            raise InputError(f"Unexpected argument {name!r}. See --help.")
        raise unknown_name("Unknown option", name.lstrip("-"), self.option_names, "--")

    def error(self, message: str) -> NoReturn:
        """Raise the error for a mistake that argparse found.

        Raises:
            InputError: always.
        """
        message = re.sub(r"^argument ([^/:]+)[^:]*:", r"\1:", message)  # one spelling of the option is enough
        end = "" if message.endswith((".", "?")) else "."
        raise InputError(one_line(f"{message[:1].upper()}{message[1:]}{end}"))


def one_of(choices: Sequence[str], convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a `type` for `add_argument` that accepts the given words, and suggests the nearest one for any other."""

    def parse(word: str) -> Any:
        if word not in choices:
            raise argparse.ArgumentTypeError(f"{word!r} is not {in_words(choices)}.{did_you_mean(word, choices)}")
        return convert(word)

    return parse
