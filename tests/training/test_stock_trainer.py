"""A captioner in the Trainer of transformers, without anything of this package's own trainer."""

import numpy as np
import pytest
import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from ..fixtures import tiny

CAPTION_LENGTHS = (5, 3, 2, 4, 7, 2)


class Rows(torch.utils.data.Dataset):
    """Six images with a prompt and a caption each."""

    def __init__(self):
        self.batch = tiny.batch(prompts=(2,) * 6, captions=CAPTION_LENGTHS)

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict:
        row = {name: tensor[index] for name, tensor in self.batch.items()}
        return {**row, "labels": row["labels"][row["labels"] != -100]}


def collate(rows: list[dict]) -> dict:
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0] if name != "labels"}
    return {**batch, "labels": tiny.pad([row["labels"] for row in rows], -100)}


def collate_two_captions(rows: list[dict]) -> dict:
    """Give each image its caption twice, as labels `[B*K, T]`."""
    batch = collate(rows)
    return {**batch, "labels": batch["labels"].repeat_interleave(2, dim=0)}


def trainer_of(model, folder, kind=Trainer, collator=collate, compute_metrics=None, **options):
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2} | options
    arguments = Seq2SeqTrainingArguments if kind is Seq2SeqTrainer else TrainingArguments
    args = arguments(str(folder), use_cpu=True, save_strategy="no", disable_tqdm=True, **options)
    return kind(model, args, collator, Rows(), Rows(), compute_metrics=compute_metrics)


@pytest.mark.parametrize("language", ["llama", "t5"])
def test_predictions_are_the_logits_at_the_labels(language, tmp_path):
    model = tiny.captioner(language=language)
    predicted = trainer_of(model, tmp_path).predict(Rows())
    assert predicted.predictions.shape == (6, 7, tiny.WORDS)
    assert predicted.label_ids.shape == (6, 7)
    for index, length in enumerate(CAPTION_LENGTHS):
        with torch.no_grad():
            logits = model(**collate([Rows()[index]])).logits[0]
        np.testing.assert_allclose(predicted.predictions[index, :length], logits, rtol=1e-3, atol=1e-4)
        assert (predicted.label_ids[index, length:] == -100).all()


def test_only_labels_are_labels(tmp_path):
    """The Trainer finds them by their names, and evaluates only batches that have all of them."""
    assert trainer_of(tiny.captioner(), tmp_path).label_names == ["labels"]


@pytest.mark.parametrize("options", [{}, {"eval_accumulation_steps": 1}, {"include_for_metrics": ["inputs", "loss"]}])
def test_compute_metrics_gets_logits_and_labels(tmp_path, options):
    def accuracy(eval_pred) -> dict:
        logits, labels = eval_pred.predictions, eval_pred.label_ids
        if options.get("include_for_metrics"):
            assert eval_pred.inputs.shape == (6, 3, tiny.SIDE, tiny.SIDE)
        return {"accuracy": float((logits.argmax(-1) == labels)[labels != -100].mean())}

    model = tiny.captioner()
    with torch.no_grad():
        batch = collate(list(Rows()))
        right = (model(**batch).logits.argmax(-1) == batch["labels"])[batch["labels"] != -100]
    metrics = trainer_of(model, tmp_path, compute_metrics=accuracy, **options).evaluate()
    assert metrics["eval_accuracy"] == pytest.approx(right.float().mean().item())


def test_several_captions_of_an_image_are_rows_of_the_predictions(tmp_path):
    model = tiny.captioner()
    once = trainer_of(model, tmp_path).predict(Rows())
    twice = trainer_of(model, tmp_path, collator=collate_two_captions).predict(Rows())
    assert twice.label_ids.shape == (12, 7)
    labels = once.label_ids.repeat(2, axis=0)
    assert (twice.label_ids == labels).all()
    expected = once.predictions.repeat(2, axis=0)
    np.testing.assert_allclose(twice.predictions[labels != -100], expected[labels != -100], rtol=1e-3, atol=1e-3)
    assert twice.metrics["test_loss"] == pytest.approx(once.metrics["test_loss"], rel=1e-4)


@pytest.mark.parametrize("prediction_loss_only", [True, False])
def test_seq2seq_trainer_predicts_generated_captions(tmp_path, prediction_loss_only):
    model = tiny.captioner()
    options = dict(predict_with_generate=True, generation_max_length=6, prediction_loss_only=prediction_loss_only)
    predicted = trainer_of(model, tmp_path, Seq2SeqTrainer, **options).predict(Rows())
    if prediction_loss_only:
        assert predicted.predictions is None
    else:
        ids = model.generate(**collate(list(Rows())), max_new_tokens=6)
        assert (predicted.predictions[:, : ids.shape[1]] == ids.numpy()).all()
    assert predicted.metrics["test_loss"] > 0


@pytest.mark.parametrize(
    "options", [{"label_smoothing_factor": 0.1}, {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2}]
)
def test_label_smoothing_is_refused_in_a_sentence(tmp_path, options):
    with pytest.raises(ValueError, match="removed the labels.*`label_smoothing_factor`.*`compute_loss`"):
        trainer_of(tiny.captioner(), tmp_path, **options).train()


def train_queries(folder, **options) -> torch.Tensor:
    """Train a Q-Former, and return its query tokens."""
    model = tiny.captioner()
    model.requires_grad_(False)
    model.qformer.requires_grad_(True)
    trainer_of(model, folder, **options).train()
    return model.qformer.query_tokens.detach()


@pytest.fixture(scope="module")
def trained_queries(tmp_path_factory):
    """Return the query tokens of a run without further options."""
    return train_queries(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"auto_find_batch_size": True},
        {"average_tokens_across_devices": False},
        {"remove_unused_columns": False},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
    ],
    ids=str,
)
def test_options_that_only_change_how_to_train_give_the_same_weights(trained_queries, tmp_path, options):
    torch.testing.assert_close(train_queries(tmp_path, **options), trained_queries, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("frozen", [True, False])
def test_neftune_adds_noise(tmp_path, frozen):
    losses = []
    for alpha in (None, 100.0):
        model = tiny.captioner()
        model.language_model.requires_grad_(not frozen)
        losses.append(trainer_of(model, tmp_path, max_steps=1, neftune_noise_alpha=alpha).train().training_loss)
    assert losses[1] != pytest.approx(losses[0], rel=1e-3)


def test_labels_that_repeat_the_prompt_are_refused():
    model, batch = tiny.captioner(), tiny.batch(prompts=(4, 3), captions=(2, 2))
    ids = batch["input_ids"]
    masked = ids.masked_fill(batch["attention_mask"] == 0, -100)
    for labels in (ids, masked, torch.cat([masked[:, :2] * 0 - 100, masked[:, 2:]], dim=1)):
        with pytest.raises(ValueError, match="`labels` repeat `input_ids`.*only the prompt"):
            model(**{**batch, "labels": labels})
    assert model(**{**batch, "labels": ids.flip(1)}).loss > 0
    assert model(**{**batch, "labels": torch.full_like(ids, -100)}).loss == 0


@pytest.mark.parametrize("shape", [(4, 5), (2, 2, 5)])
def test_labels_of_another_number_of_images_are_refused(shape):
    batch = tiny.batch()
    with pytest.raises(ValueError, match="`labels` of shape .* do not fit 3 images"):
        tiny.captioner()(**{**batch, "labels": torch.ones(shape, dtype=torch.long)})
