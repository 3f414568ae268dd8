"""Calls of reward functions: their arguments, their weighted sum, and the errors that name them."""

import numpy as np
import pytest
import torch

from qformer_captioner.common.errors import InputError
from qformer_captioner.rewards import RewardContext, Rewards, load_rewards

COMPLETIONS = ["a dog", "a cat sleeps", ""]
PROMPTS = ["", "it is", ""]


def context(folder) -> RewardContext:
    return RewardContext(run_folder=folder, train_references=lambda: [["a dog"], ["a cat"]], eos_token_id=[2])


def score(function, weight: float = 1.0, **columns):
    return Rewards({"mine": function}, [weight])(PROMPTS, COMPLETIONS, **columns)


def test_a_function_gets_prompts_completions_and_all_columns_as_keywords():
    seen = {}

    def reward(prompts, completions, **columns):
        seen.update(prompts=prompts, completions=completions, **columns)
        return [0.0] * len(completions)

    score(reward, references=[["x"]] * 3, file=["1", "2", "3"])
    assert seen == {"prompts": PROMPTS, "completions": COMPLETIONS, "references": [["x"]] * 3, "file": ["1", "2", "3"]}


def test_a_function_without_double_stars_gets_the_columns_that_it_names():
    def reward(completions, file):
        return [float(name) for name in file]

    assert score(reward, references=[["x"]] * 3, file=["1", "2", "3"]).total.tolist() == [1, 2, 3]


def test_the_total_is_the_weighted_sum():
    functions = {
        "words": lambda completions: [len(text.split()) for text in completions],
        "one": lambda prompts: [1] * 3,
    }
    scores = Rewards(functions, [0.5, -2.0])(PROMPTS, COMPLETIONS)
    assert scores.by_name["words"].tolist() == [2, 3, 0] and scores.by_name["one"].tolist() == [1, 1, 1]
    assert scores.total.tolist() == [-1.0, -0.5, -2.0] and scores.total.dtype == torch.float32


def test_none_is_left_out_of_the_sum():
    functions = {"some": lambda completions: [1.0, None, 3.0], "one": lambda completions: [1.0] * 3}
    scores = Rewards(functions, [2.0, 1.0])(PROMPTS, COMPLETIONS)
    assert scores.total.tolist() == [3.0, 1.0, 7.0]
    assert scores.by_name["some"].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    "values",
    [(1, 2, 3), np.array([1.0, 2.0, 3.0], np.float32), torch.tensor([1, 2, 3]), [torch.tensor(i) for i in (1, 2, 3)]],
)
def test_values_may_be_arrays_and_tensors(values):
    assert score(lambda completions: values).total.tolist() == [1, 2, 3]


def test_columns_are_those_that_signatures_name(tmp_path):
    rewards = load_rewards(["cider", "length:9"], None, context(tmp_path))
    assert rewards.columns == {"references", "completion_ids"}
    assert Rewards({"mine": lambda prompts, completions, image=None, **columns: [0]}, [1]).columns == {"image"}


def raises(completions, **columns):
    return [1 / len(text) for text in completions]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raises, r"'mine' raised ZeroDivisionError in line \d+, so correct it \(division by zero\)"),
        (lambda completions: [0.0, float("nan"), 1.0], "'mine' returned nan for completion 1: it must return a finite"),
        (lambda completions: [0.0, 1.0, float("-inf")], "'mine' returned -inf for completion 2"),
        (lambda completions: [1e39] * 3, r"'mine' returned 1e\+39 for completion 0"),
        (lambda completions: [0.0, 1.0], "'mine' returned 2 values for 3 completions: it must return one number"),
        (lambda completions: ["good", "bad", "bad"], "'mine' returned 'good' for completion 0"),
        (lambda completions: [[1.0], [2.0], [3.0]], r"'mine' returned \[1.0\] for completion 0"),
        (lambda completions: torch.zeros(3, 1), r"'mine' returned \[0.0\] for completion 0"),
        (lambda completions: 1.0, "'mine' returned 1.0, which is not a list"),
        (lambda completions: None, "'mine' returned None, which is not a list"),
        (
            lambda completions, objects: [0.0] * 3,
            "'mine' needs the column 'objects', which this run lacks. The run has no columns",
        ),
    ],
)
def test_the_error_names_the_function_and_what_it_returned(function, message):
    with pytest.raises(InputError, match=message) as caught:
        score(function)
    assert len(str(caught.value)) <= 500 and "\n" not in str(caught.value)


def test_a_column_of_another_length_is_refused():
    with pytest.raises(ValueError, match="3 completions but 2 entries of 'file'"):
        score(lambda completions: [0.0] * 3, file=["1", "2"])


# --- Names and files --------------------------------------------------------------------------------------------------


def test_length_rewards_the_number_of_words(tmp_path):
    rewards = load_rewards(["length:2"], [2.0], context(tmp_path))
    assert rewards(PROMPTS, COMPLETIONS).total.tolist() == [0.0, -1.0, -2.0]
    assert list(rewards.functions) == ["length"]


@pytest.mark.parametrize("absolute", [True, False])
def test_a_function_of_a_file_is_loaded(tmp_path, monkeypatch, absolute):
    (tmp_path / "mine.py").write_text(
        "import dataclasses\n\n"
        "@dataclasses.dataclass\nclass Facts:\n    words: 'int'\n\n"
        "def count(prompts, completions, **columns):\n"
        "    return [float(Facts(len(text.split())).words) for text in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    name = f"{tmp_path}/mine.py:count" if absolute else "mine.py:count"
    rewards = load_rewards([name], None, context(tmp_path))
    assert rewards(PROMPTS, COMPLETIONS).by_name["count"].tolist() == [2, 3, 0]


def test_rewards_of_the_same_name_keep_the_whole_text(tmp_path):
    rewards = load_rewards(["length:2", "length:3"], None, context(tmp_path))
    assert list(rewards.functions) == ["length:2", "length:3"]


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        ([], None, "There is no reward: name at least one"),
        (["cidre"], None, "no reward 'cidre': choose from cider, bleu_4"),
        (["match"], None, "no reward 'match': choose from .*match:MODEL"),
        (["length:0"], None, "no reward 'length:0'"),
        (["cider:ptb"], None, "no reward 'cider:ptb'"),
        (["length:2", "length:2"], None, "'length:2' is named twice"),
        (["length:2"], [1.0, 2.0], "1 rewards but 2 weights"),
        (["length:2"], [float("nan")], "must be finite"),
        (["missing.py:f"], None, "There is no file 'missing.py' with the reward 'f'"),
        (["mine.py:g"], None, "'mine.py' has no function 'g': its functions are f"),
        (["mine.py:LIMIT"], None, "'LIMIT' in 'mine.py' is 3, which is not a function"),
        (["broken.py:f"], None, "'broken.py' cannot be run: SyntaxError"),
        (["match:/nowhere"], None, "'/nowhere' cannot be loaded"),
        (["clip_score:/nowhere"], None, "CLIP model '/nowhere' cannot be loaded"),
    ],
)
def test_the_error_says_what_cannot_be_loaded(tmp_path, monkeypatch, names, weights, message):
    (tmp_path / "mine.py").write_text("LIMIT = 3\n\ndef f(completions):\n    return completions\n")
    (tmp_path / "broken.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        load_rewards(names, weights, context(tmp_path))
    assert len(str(caught.value)) <= 500
