"""A user's reward trains a captioner, and a run that it ends goes on when it is corrected."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from qformer_captioner import train_hf
from qformer_captioner.common.errors import InputError

from ..conftest import ROOT
from ..fixtures.markdown import code_blocks
from ..training.test_rewards import command, history, start

__all__ = ["start"]  # a fixture

pytestmark = pytest.mark.slow

FAULTY = """
calls = 0

def reward(prompts, completions, **columns):
    global calls
    calls += 1
    values = [float(len(completion)) for completion in completions]
    if calls < 3:
        return values
"""


def train_by(start, output_dir, *rewards: str) -> None:
    """Train for four steps by rewards, with a checkpoint after each."""
    argv = command(start, output_dir, eval_strategy="no", max_steps=4, load_best_model_at_end="false", eval_steps=None)
    train_hf.train([*argv, "--learning_rate", "0.01", "--reward_funcs", *rewards])


def reward_of_the_docs() -> str:
    """Return the file of rewards that docs/reward.md writes."""
    commands = "\n".join(block.source for block in code_blocks((ROOT / "docs" / "reward.md").read_text()))
    found = re.search(r"cat > my_rewards.py <<'END'\n(.*?)\nEND\n", commands, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_reward_of_the_docs_trains(start, tmp_path):
    (tmp_path / "my_rewards.py").write_text(reward_of_the_docs())
    train_by(start, tmp_path / "run", f"{tmp_path}/my_rewards.py:few_repeats", "cider")
    assert all(-1 <= mean <= 0 for mean in history(tmp_path / "run", "rewards/few_repeats/mean"))
    assert any(spread > 0 for spread in history(tmp_path / "run", "rewards/few_repeats/std"))
    assert (tmp_path / "run" / "document_frequencies.json.gz").is_file()
    before, after = (load_file(folder / "model.safetensors") for folder in (start / "captioner", tmp_path / "run"))
    changed = {name.split(".")[0] for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert changed == {"qformer", "language_projection"}


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("    return 1 / 0", "The reward 'reward' raised ZeroDivisionError in line 10, so correct it"),
        ("    return values[1:]", "The reward 'reward' returned 7 values for 8 completions"),
    ],
)
def test_a_run_that_a_reward_ends_keeps_its_checkpoint_and_goes_on(start, tmp_path, end, message):
    file = tmp_path / "mine.py"
    file.write_text(FAULTY + end)
    with pytest.raises(InputError, match=message):
        train_by(start, tmp_path / "run", f"{file}:reward")
    assert (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").is_file()
    file.write_text(FAULTY.replace("if calls < 3", "if True"))
    train_by(start, tmp_path / "run", f"{file}:reward")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["finished"]
    assert len(history(tmp_path / "run", "reward")) == 4  # steps 1 and 2 from before, then 3 and 4
