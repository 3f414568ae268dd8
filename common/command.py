"""Frame of every command: logging, one-line error messages and the exit status."""

import sys
from collections.abc import Callable

from .errors import InputError, printable, without_middle
from .logging import setup_logging


def run_command(
    command: Callable[[list[str]], None],
    *,
    expected: tuple[type[Exception], ...] = (InputError, OSError),
    interrupted: str | None = None,
) -> None:
    """Run a command on the arguments of this process.

    An expected error is printed to stderr as `error: message`, and the exit status is 1. After Ctrl-C the exit status
    is 130, as in shells. Any other exception is a bug and keeps its traceback.

    Args:
        command: function that takes the command line after the program's name.
        expected: types of errors that the user can correct.
        interrupted: message to print after Ctrl-C.

    Raises:
        SystemExit: after an expected error or Ctrl-C.
    """
    setup_logging()
    try:
        command(sys.argv[1:])
    except expected as error:
        raise SystemExit(without_middle(f"error: {printable(error)}")) from error
    except KeyboardInterrupt:
        if interrupted is not None:
            sys.stderr.write(f"\n{interrupted}\n")
        raise SystemExit(130) from None
