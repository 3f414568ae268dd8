"""Properties of a run before data and model are loaded."""

from types import SimpleNamespace

import pytest

from qformer_captioner.training.run import TrainingRun


@pytest.mark.parametrize(
    ("epochs", "max_steps", "finished", "expected"),
    [
        (10, -1, None, False),
        (10, -1, [10.0, -1], True),
        (12, -1, [10.0, -1], False),
        (10, -1, [10.0, 4], False),
        (10, 4, [10.0, 4], True),
        (10, 5, [10.0, 4], False),
        (10, 4, [10.0, -1], True),
    ],
)
def test_a_run_is_finished_if_the_folder_holds_one_that_is_at_least_as_long(epochs, max_steps, finished, expected):
    run = TrainingRun(
        model_args=None,
        data_args=None,
        run_args=None,
        training_args=SimpleNamespace(num_train_epochs=epochs, max_steps=max_steps),
        changed_options={},
        folder=SimpleNamespace(finished=None if finished is None else {"length": finished}),
        checkpoint=None,
        features=None,
        augmentation=None,
    )
    assert run.is_finished is expected
