"""The package's loggers, and what a command shows of their messages."""

import logging

import pytest

from qformer_captioner.common.logging import PACKAGE, MessageHandler, get_logger, setup_logging


@pytest.fixture(autouse=True)
def fresh_logger(monkeypatch):
    """Remove the handlers and the level of the package's logger, and the rank of this process."""
    logger = logging.getLogger(PACKAGE)
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    yield
    logging.getLogger(PACKAGE).manager._clear_cache()


@pytest.mark.parametrize("name", ["qformer_captioner.data.loading", "__main__", "qformer_captioner_of_others"])
def test_every_logger_is_below_the_packages(name):
    assert get_logger(name).name.startswith(f"{PACKAGE}.")


def test_messages_go_to_stdout_and_warnings_to_stderr(capsys):
    setup_logging()
    get_logger("qformer_captioner.data").info("%d rows", 3)
    get_logger("qformer_captioner.data").warning("a row is empty")
    assert capsys.readouterr() == ("3 rows\n", "warning: a row is empty\n")


def test_a_second_setup_does_not_repeat_messages(capsys):
    setup_logging()
    setup_logging()
    get_logger("__main__").info("once")
    assert capsys.readouterr().out == "once\n"


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK"])
def test_other_processes_show_warnings_only_and_keep_their_stdout(monkeypatch, capsys, variable):
    monkeypatch.setenv(variable, "1")
    setup_logging()
    get_logger("__main__").info("a message")
    get_logger("__main__").warning("a warning")
    print("printed by the user")
    assert capsys.readouterr() == ("printed by the user\n", "warning: a warning\n")


def test_a_program_that_sets_up_no_logging_sees_no_messages(capsys):
    get_logger("qformer_captioner.data").info("a message")
    assert capsys.readouterr() == ("", "")
    assert not any(isinstance(handler, MessageHandler) for handler in logging.getLogger(PACKAGE).handlers)
