"""Metrics that are published as Spaces of a local Hub."""

import pytest


@pytest.mark.slow
def test_a_published_metric_is_loaded_by_its_name(hub, commands, tmp_path):
    program = (
        "import sys; sys.argv[1:] = ['org', '--metrics', 'cider']\n"
        "from qformer_captioner.metrics.publish import main\n"
        "main()\n"
        "import evaluate\n"
        "print(evaluate.load('org/cider').compute(predictions=['a dog', 'b'], references=[['a dog'], ['c']]))"
    )
    done = commands.run("python", program, tmp_path)
    assert done.stdout.splitlines()[-1:] == ["{'cider': 2.5}"], done.stderr
    assert set(hub.files["space", "org/cider"]) == {"README.md", "app.py", "requirements.txt", "cider.py"}
