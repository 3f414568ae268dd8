"""Metrics that are published as Spaces of a local Hub."""

import subprocess
import sys

import pytest

from ..conftest import ROOT
from ..fixtures.hub_server import Hub


@pytest.mark.slow
def test_a_published_metric_is_loaded_by_its_name(tmp_path):
    program = (
        "import sys; sys.argv[1:] = ['org', '--metrics', 'cider']\n"
        "from qformer_captioner.metrics.publish import main\n"
        "main()\n"
        "import evaluate\n"
        "print(evaluate.load('org/cider').compute(predictions=['a dog', 'b'], references=[['a dog'], ['c']]))"
    )
    with Hub() as hub:
        environment = hub.environment(tmp_path / "home")
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=ROOT.parent
        )
    assert done.stdout.splitlines()[-1:] == ["{'cider': 2.5}"], done.stderr
    assert set(hub.files["space", "org/cider"]) == {"README.md", "app.py", "requirements.txt", "cider.py"}
