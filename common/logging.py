"""One logger hierarchy, `qformer_captioner`, and its set-up for commands.

Library code logs and never prints:

```python
logger = get_logger(__name__)
logger.info("The captioner is in %s.", folder)
```

A program that imports the package configures logging itself. The commands call [`setup_logging`].
"""

import logging
import os
import sys

from .errors import without_middle

PACKAGE = "qformer_captioner"


def get_logger(name: str) -> logging.Logger:
    """Return a logger below `qformer_captioner`.

    Args:
        name: the `__name__` of a module, or of a script that runs as `__main__`.

    Example:

    ```python
    >>> get_logger("__main__").name
    'qformer_captioner.__main__'
    ```
    """
    inside = name == PACKAGE or name.startswith(f"{PACKAGE}.")
    return logging.getLogger(name if inside else f"{PACKAGE}.{name}")


class MessageHandler(logging.Handler):
    """Handler that writes messages to stdout, and warnings and errors to stderr with their level in front.

    The middle of a long warning or error is left out.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message to the current `sys.stdout` or `sys.stderr`."""
        try:
            if record.levelno < logging.WARNING:
                sys.stdout.write(f"{self.format(record)}\n")
                sys.stdout.flush()
            else:
                sys.stderr.write(without_middle(f"{record.levelname.lower()}: {self.format(record)}") + "\n")
        except OSError:  # the disk of a redirected stdout is full: a traceback for each message would not help
            pass
        except Exception:  # as in every handler of the standard library: a failed message must not end the run
            self.handleError(record)


def is_main_process() -> bool:
    """Return True in a single process and in the process of rank 0 of a distributed run."""
    return int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0) == 0


def setup_logging() -> None:
    """Show the package's messages: from INFO in the main process, from WARNING in the other processes of a run.

    Every command calls this once; further calls have no effect on the handlers. Nothing is redirected, so the user's
    own prints stay visible in every process.
    """
    logger = logging.getLogger(PACKAGE)
    logger.setLevel(logging.INFO if is_main_process() else logging.WARNING)
    if not any(isinstance(handler, MessageHandler) for handler in logger.handlers):
        logger.addHandler(MessageHandler())
