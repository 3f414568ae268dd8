"""The Trainer of captioners: EMA, evaluation, learning rates of parts, activation checkpointing and its log."""

import pytest
import torch
from transformers import TrainerControl, TrainerState
from transformers.modeling_layers import GradientCheckpointingLayer

from qformer_captioner.evaluation.plots import mean_of_epochs
from qformer_captioner.training.ema import EMACallback
from qformer_captioner.training.trainer import CaptionTrainer
from qformer_captioner.training.training_arguments import QFormerTrainingArguments

from ..fixtures import tiny


def arguments(tmp_path, **options) -> QFormerTrainingArguments:
    """Return training arguments without evaluation and checkpoints."""
    defaults = dict(eval_strategy="no", save_strategy="no", load_best_model_at_end=False)
    return QFormerTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **defaults, **options)


# --- EMA --------------------------------------------------------------------------------------------------------------


def test_the_ema_follows_its_formula(tmp_path):
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    ema = EMACallback(model, decay=0.9)
    expected = model.weight.detach().clone()
    state, control = TrainerState(), TrainerControl()
    for step in range(1, 101):
        with torch.no_grad():
            model.weight.normal_()
        state.global_step = step
        ema.on_step_end(arguments(tmp_path), state, control)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    assert list(ema.averages) == ["weight"], "frozen weights have no average"
    torch.testing.assert_close(ema.averages["weight"], expected)


def test_the_averages_are_in_the_model_inside_the_with_block_only():
    model = torch.nn.Linear(3, 2)
    ema = EMACallback(model, decay=0.9)
    before = model.weight.detach().clone()
    ema.averages["weight"].fill_(7)
    with ema.averaged_weights():
        assert (model.weight == 7).all()
    assert torch.equal(model.weight, before)


def test_saved_averages_are_loaded(tmp_path):
    model = torch.nn.Linear(3, 2)
    ema, other = EMACallback(model, decay=0.9), EMACallback(model, decay=0.9)
    ema.averages["weight"].fill_(7)
    ema.save(tmp_path)
    other.load(tmp_path)
    assert (other.averages["weight"] == 7).all()


@pytest.mark.parametrize("decay", [0.0, 1.0, 99.0])
def test_a_decay_that_is_not_between_0_and_1_is_an_error(decay):
    with pytest.raises(ValueError, match=f"--ema_decay must lie between 0 and 1, not {decay}"):
        EMACallback(torch.nn.Linear(1, 1), decay)


def test_the_averages_stay_in_the_model_after_training():
    """An evaluation after training must not exchange them for the last weights."""
    model = torch.nn.Linear(3, 2)
    ema = EMACallback(model, decay=0.9)
    ema.averages["weight"].fill_(7)
    ema.copy_to_model()
    with ema.averaged_weights():
        assert (model.weight == 7).all()
    assert (model.weight == 7).all()


# --- Evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["dataloader_persistent_workers", "dataloader_drop_last"])
def test_evaluation_reads_all_rows_of_the_data_set_that_is_passed(tmp_path, option):
    args = arguments(tmp_path, **{option: True}, dataloader_num_workers=1, per_device_eval_batch_size=2)
    trainer = CaptionTrainer(
        model=tiny.captioner(), args=args, score=None, train_dataset=[], eval_dataset=[1, 2, 3], data_collator=list
    )
    for rows in ([1, 2, 3], [3, 1, 2]):
        assert [row for batch in trainer.get_eval_dataloader(rows) for row in batch] == rows
    assert getattr(args, option) is True


# --- Learning rates ---------------------------------------------------------------------------------------------------


def test_parts_have_their_learning_rates_and_no_weight_decay_on_biases_and_norms(tmp_path):
    model = tiny.captioner()
    args = arguments(
        tmp_path,
        learning_rate=0.1,
        language_model_learning_rate=0.2,
        vision_model_learning_rate=0.3,
        language_projection_learning_rate=0.5,
        weight_decay=0.4,
    )
    trainer = CaptionTrainer(model=model, args=args, score=None, train_dataset=[], data_collator=None)
    groups = trainer.create_optimizer().param_groups
    seen = {}
    for group in groups:
        for parameter in group["params"]:
            assert parameter not in seen, "the parameter is in two groups"
            seen[parameter] = (group["lr"], group["weight_decay"])
    rates = {"vision_model": 0.3, "language_model": 0.2, "qformer": 0.1, "language_projection": 0.5}
    for name, parameter in model.named_parameters():
        no_decay = "norm" in name.lower() or name.endswith("bias")
        assert seen[parameter] == (rates[name.split(".")[0]], 0.0 if no_decay else 0.4), name


# --- Activation checkpointing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", tiny.TEXT)
def test_activation_checkpointing_changes_neither_loss_nor_gradients(language):
    model = tiny.captioner(language=language)
    model.vision_model.requires_grad_(False)
    model.language_model.requires_grad_(False)
    if language in ("opt", "bart"):  # layers that read their own dropout rate
        for layer in model.language_model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                setattr(layer, {"opt": "dropout", "bart": "activation_dropout"}[language], 0.5)
    batch = tiny.batch()
    model.train()
    expected = model(**batch).loss
    expected.backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    model.activation_checkpointing_enable()
    model.train()
    loss = model(**batch).loss
    loss.backward()
    assert torch.equal(loss, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)


def test_layers_of_a_frozen_language_model_are_recomputed_in_the_backward_pass():
    model = tiny.captioner()
    model.language_model.requires_grad_(False)
    model.activation_checkpointing_enable()
    model.train()
    calls = []
    model.language_model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    loss = model(**tiny.batch()).loss
    assert len(calls) == 1
    loss.backward()
    assert len(calls) == 2


# --- Log --------------------------------------------------------------------------------------------------------------


def test_the_loss_of_an_epoch_is_the_mean_of_its_logged_losses():
    history = [{"step": step, "epoch": step / 4, "loss": float(step)} for step in range(1, 9)]
    history.insert(4, {"step": 4, "epoch": 1.0, "eval_loss": 100.0})
    assert mean_of_epochs(history) == [(2.5, 2.5), (6.5, 6.5)]
