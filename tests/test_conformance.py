"""The set-up of `make conformance`, which runs the common tests of transformers."""

import subprocess
import sys
from collections import Counter

import pytest

from .conformance import decisions, suite
from .conftest import ROOT

CAPTIONERS = ("LlamaTest", "OptTest", "T5Test", "BartTest", "PromptTest", "ProjectionPerQueryTest")
OTHERS = ("QFormerTest", "PromptQFormerTest", "PretrainingTest", "Blip2OptTest", "Blip2T5Test", "ProcessorTest")


@pytest.fixture(scope="module")
def collected() -> list[tuple[str, str]]:
    """Return the class and the name of each common test."""
    pytest.importorskip("parameterized")
    if not suite.FOLDER.is_dir():
        pytest.skip("needs the source archive of transformers, which `make conformance` fetches")
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests/conformance"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    return [tuple(line.split("::")[1:]) for line in done.stdout.splitlines() if line.count("::") == 2]


@pytest.mark.slow
def test_each_tester_collects_the_common_tests(collected):
    numbers = Counter(test_class for test_class, _ in collected)
    assert set(numbers) == {*CAPTIONERS, *OTHERS}
    assert min(numbers.values()) > 50


@pytest.mark.slow
def test_each_decision_is_about_a_test_that_exists(collected):
    lists = [decisions.CAPTIONER, decisions.PRETRAINING, decisions.WITHOUT_PROMPT, decisions.PROCESSOR]
    names = {name for _, name in collected}
    assert [name for each in lists for name in each if not any(test.startswith(name) for test in names)] == []
