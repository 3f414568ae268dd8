"""`train_hf.py --objective pretrain`: what it learns, logs and writes, and rows and options that it refuses."""

import itertools
import json

import datasets
import pytest
import torch
from PIL import Image
from transformers import AutoModel, Trainer, TrainingArguments

from qformer_captioner import QFormerCaptioner, QFormerForPretraining, train_hf
from qformer_captioner.common.errors import InputError
from qformer_captioner.data.augmentation import Augmentation
from qformer_captioner.data.collator import PretrainingCollator
from qformer_captioner.data.dataset import CaptionDataset, CaptionSource
from qformer_captioner.data.skipped_rows import SkippedRows
from qformer_captioner.hub.layout import check_folder
from qformer_captioner.hub.model_card import card_for_hub
from qformer_captioner.hub.push import collect_files
from qformer_captioner.training.checks import check_options
from qformer_captioner.training.data_setup import load_datasets
from qformer_captioner.training.from_scratch import pretraining_from_scratch, train_text_tokenizer
from qformer_captioner.training.pretraining_setup import check_rows
from qformer_captioner.training.pretraining_trainer import PretrainingTrainer
from qformer_captioner.training.training_arguments import QFormerTrainingArguments

from ..fixtures import tiny
from ..fixtures.processes import command_line

COLOURS = {
    "red": (220, 40, 40),
    "orange": (250, 140, 30),
    "yellow": (250, 230, 60),
    "green": (40, 160, 70),
    "blue": (40, 90, 220),
    "purple": (130, 60, 180),
    "pink": (250, 150, 190),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
    "brown": (120, 70, 20),
}
LAYERS = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = LAYERS | {"model_type": "vit", "image_size": 16, "patch_size": 16, "initializer_range": 0.2}
QFORMER = LAYERS | {"num_hidden_layers": 2, "num_query_tokens": 2, "initializer_range": 0.2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
OPTIONS = {
    "objective": "pretrain",
    "vision_config": json.dumps(VISION | {"hidden_dropout_prob": 0.0}),
    "qformer_config": json.dumps(QFORMER | NO_DROPOUT),
    "captions_per_image": 1,
    "label_smoothing": 0,
    "per_device_train_batch_size": 10,
    "per_device_eval_batch_size": 5,
    "max_steps": 100,
    "learning_rate": 5e-3,
    "eval_strategy": "steps",
    "eval_steps": 0.5,
    "save_strategy": "steps",
    "save_steps": 0.5,
    "use_cpu": "true",
    "disable_tqdm": "true",
}


def save_pictures(folder, captions_of=lambda name: [f"a {name} picture", f"all is {name}"], names=tuple(COLOURS)):
    """Save pictures of one colour each, the same ones to train and to evaluate on."""
    folder.mkdir()
    lines = []
    for split in ("train", "dev"):
        for name in names:
            Image.new("RGB", (16, 16), COLOURS[name]).save(folder / f"{name}.png")
            lines.append(json.dumps({"file_name": f"{name}.png", "caption": captions_of(name), "split": split}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Return a folder with ten pictures of one colour each."""
    return save_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="module")
def finished(pictures, tmp_path_factory):
    """Pretrain until the pictures are known, and return the output folder."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train_hf.train(command_line(**OPTIONS, dataset_name=pictures, output_dir=folder))
    return folder


def logged(folder, key: str) -> list[dict]:
    """Return the entries of the log that have a key."""
    log_history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in log_history if key in entry]


# ----------------------------------------------------------------------------------------------------------------------
# A run
# ----------------------------------------------------------------------------------------------------------------------


def test_recall_is_high_with_right_images_and_at_chance_with_shuffled_ones(finished):
    last = logged(finished, "eval_loss")[-1]
    for name in ("image_to_text_r1", "text_to_image_r1"):
        assert last[f"eval_{name}"] >= 0.8
        assert last[f"eval_{name}_shuffled"] <= 0.2  # chance is 0.1
    assert last["eval_itc_loss"] < 1 and last["eval_itc_loss_shuffled"] > torch.tensor(5.0).log()


def test_the_loss_is_the_sum_of_its_parts_in_training_and_evaluation(finished):
    parts = ("itc_loss", "itm_loss", "itg_loss")
    for prefix, suffix in (("", ""), ("eval_", ""), ("eval_", "_shuffled")):
        entries = logged(finished, f"{prefix}loss{suffix}")
        assert entries
        for entry in entries:
            total = sum(entry[f"{prefix}{part}{suffix}"] for part in parts)
            assert entry[f"{prefix}loss{suffix}"] == pytest.approx(total, abs=1e-3)


def test_the_best_recall_selects_the_checkpoint(finished):
    state = json.loads((finished / "trainer_state.json").read_text())
    assert state["best_metric"] == max(entry["eval_mean_recall"] for entry in logged(finished, "eval_loss"))


def test_the_table_has_the_retrieved_captions_of_each_image(finished):
    lines = [json.loads(line) for line in (finished / "retrieval.jsonl").read_text().splitlines()]
    assert len(lines) == len(COLOURS) and (finished / "retrieval.png").stat().st_size > 0
    for line in lines:
        assert (line["rank"] == 1) == (line["retrieved"][0] in line["references"])


def test_the_final_folder_compares_images_and_texts(finished):
    model = AutoModel.from_pretrained(finished, trust_remote_code=True)
    images = [Image.new("RGB", (16, 16), COLOURS[name]) for name in ("red", "blue")]
    similarity = model.similarity(images, ["a red picture", "a blue picture"])
    assert similarity.argmax(dim=1).tolist() == similarity.argmax(dim=0).tolist() == [0, 1]


def test_the_card_says_what_the_model_is_and_shows_its_recall(finished):
    card = (finished / "README.md").read_text()
    last = logged(finished, "eval_loss")[-1]
    assert 'model.similarity("image.png", texts)' in card
    recall = [100 * last[f"eval_text_to_image_r1{suffix}"] for suffix in ("", "_shuffled")]
    assert f"| R@1, text to image | {recall[0]:.2f} | {recall[1]:.2f} |" in card
    assert "](retrieval.png)" in card and "caption()" not in card
    assert card.count("image-text-retrieval") == 1


def test_the_folder_can_be_published_with_its_code_and_a_card_for_the_repository(finished):
    assert check_folder(finished) is None
    files = collect_files(finished, "me/stage1")
    names = {"pretraining_qformer.py", "model.safetensors", "tokenizer.json", "processor_config.json", "retrieval.png"}
    assert names <= files.keys()
    assert not any("checkpoint-" in name or name.endswith(".jsonl") for name in files)
    assert b'from_pretrained("me/stage1", trust_remote_code=True)' in files["README.md"]


def test_a_card_shows_captions_only_of_a_model_that_has_learned_them(finished, tmp_path):
    shown = 'print(model.caption("image.png"))'
    assert shown in (finished / "README.md").read_text()
    for weight in (0.0, 0.5):
        tiny.pretraining_model("vit", itg_weight=weight).save_pretrained(tmp_path)
        assert (shown in card_for_hub(tmp_path, "me/stage1")) == bool(weight)


def test_a_folder_without_a_run_gets_a_card_of_its_parts(tmp_path):
    tiny.save_stage1(tmp_path)
    card = card_for_hub(tmp_path, "me/stage1")
    assert "| itm\\_head |  | 66 |" in card and "model.match(" in card


@pytest.mark.slow
def test_a_captioner_begins_with_the_pretrained_qformer_without_its_text_part(finished, pictures, tmp_path):
    tiny.save_vision(tmp_path / "vision")
    tiny.save_language(tmp_path / "llama")
    options = {
        "vision_model_name_or_path": tmp_path / "vision",
        "language_model_name_or_path": tmp_path / "llama",
        "qformer_name_or_path": finished,
        "dataset_name": pictures,
        "output_dir": tmp_path / "run",
        "max_steps": 1,
        "learning_rate": 0,
        "generation_max_length": 2,
        "use_cpu": "true",
        "disable_tqdm": "true",
    }
    train_hf.train(command_line(**options))
    captioner = QFormerCaptioner.from_pretrained(tmp_path / "run")
    queries = AutoModel.from_pretrained(finished, trust_remote_code=True).qformer.query_tokens
    assert torch.equal(captioner.qformer.query_tokens, queries)
    assert not captioner.qformer.config.use_qformer_text_input


def test_features_that_a_qformer_has_learned_to_read_are_not_normalised_again(pictures, tmp_path):
    tiny.save_vision(tmp_path / "vision")
    tiny.save_language(tmp_path / "llama")
    tiny.pretraining_model("clip").save_pretrained(tmp_path / "stage1")
    options = {
        "vision_model_name_or_path": tmp_path / "vision",
        "language_model_name_or_path": tmp_path / "llama",
        "qformer_name_or_path": tmp_path / "stage1",
        "normalize_image_features_samples": 5,
        "dataset_name": pictures,
        "output_dir": tmp_path / "run",
    }
    with pytest.raises(InputError, match="has learned to read: unset it"):
        train_hf.train(command_line(**options))


@pytest.mark.slow
def test_a_pretrained_model_continues_with_another_weight(finished, pictures, tmp_path):
    changes = {"vision_config": None, "qformer_config": None, "model_name_or_path": finished, "itm_weight": 0.25}
    changes |= {"learning_rate": 1e-6}
    options = OPTIONS | changes | {"dataset_name": pictures, "output_dir": tmp_path / "run", "max_steps": 2}
    train_hf.train(command_line(**options))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["itm_weight"] == 0.25
    assert logged(tmp_path / "run", "eval_loss")[-1]["eval_text_to_image_r1"] >= 0.8


# ----------------------------------------------------------------------------------------------------------------------
# The trainer
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(pictures):
    """Return the pictures as rows with two captions each."""
    names = list(COLOURS)
    columns = {
        "image": [Image.open(pictures / f"{name}.png") for name in names],
        "caption": [[f"a {name} picture", f"all is {name}"] for name in names],
    }
    return CaptionDataset(CaptionSource("dev", datasets.Dataset.from_dict(columns)), SkippedRows())


def new_model(**fields):
    """Return a model of the pictures with fixed random weights."""
    torch.manual_seed(0)
    tokenizer = train_text_tokenizer([f"a {name} picture, all is {name}" for name in COLOURS])
    return pretraining_from_scratch(VISION, QFORMER, tokenizer, **fields)


@pytest.mark.parametrize(
    ("fields", "spread", "of_attention"), [({}, 0.01, 1.5 * 32**-0.5), ({"initializer_range": 0.02}, 0.02, 0.02)]
)
def test_attention_begins_with_large_weights_unless_the_fields_say_otherwise(fields, spread, of_attention):
    tokenizer = train_text_tokenizer(COLOURS)
    sizes = LAYERS | {"num_query_tokens": 8} | fields
    models = [
        pretraining_from_scratch(VISION, sizes, tokenizer),
        QFormerForPretraining.from_backbones(None, tokenizer, encoder_hidden_size=24, **sizes),
    ]
    for model in models:
        layer = model.qformer.encoder.layer[0]
        assert layer.attention.attention.query.weight.std().item() == pytest.approx(spread, rel=0.1)
        for weight in (layer.attention.attention.value.weight, layer.crossattention.output.dense.weight):
            assert weight.std().item() == pytest.approx(of_attention, rel=0.1)
        assert model.qformer.query_tokens.std().item() == pytest.approx(spread, rel=0.3)


def new_trainer(dataset, folder, train_data=None, model=None, **options) -> PretrainingTrainer:
    model = model or new_model()
    options = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False} | options
    return PretrainingTrainer(
        model=model,
        args=QFormerTrainingArguments(str(folder), use_cpu=True, disable_tqdm=True, report_to="none", **options),
        train_dataset=dataset if train_data is None else train_data,
        eval_dataset=dataset,
        data_collator=PretrainingCollator(model.processor),
    )


def test_evaluations_draw_the_same_negatives_and_leave_the_random_state_of_training(dataset, tmp_path):
    trainer = new_trainer(dataset, tmp_path)
    losses = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        losses.append({name: loss for name, loss in trainer.evaluate().items() if "loss" in name or "_r" in name})
        assert torch.equal(torch.get_rng_state(), before)
    del losses[0]["eval_runtime"], losses[1]["eval_runtime"]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_batches_of_evaluation_have_all_rows_once_and_no_row_alone(dataset, tmp_path, processes, size):
    trainer = new_trainer(dataset, tmp_path, per_device_eval_batch_size=size)
    for rows in range(max(2, processes), 20):
        parts = []
        for process in range(processes):
            trainer.args = type("Args", (), {})()
            trainer.args.world_size, trainer.args.process_index = processes, process
            trainer.args.per_device_eval_batch_size = size
            parts.append(trainer._evaluation_batches(rows))
        batches = [list(itertools.chain(*shares)) for shares in zip(*parts, strict=True)]
        assert list(itertools.chain(*batches)) == list(range(rows))
        assert all(len(batch) >= 2 for batch in batches) and all(all(part) for part in parts)


@pytest.mark.parametrize(("size", "steps"), [(3, 3), (4, 3), (9, 1)])
def test_a_last_batch_of_one_row_is_left_out(dataset, tmp_path, log, size, steps):
    trainer = new_trainer(dataset, tmp_path, per_device_train_batch_size=size)
    assert len(trainer.get_train_dataloader()) == steps
    assert ("is left out" in log.text) == (10 % size == 1)


def test_losses_that_are_logged_after_a_resume_are_means_of_the_same_steps(dataset, tmp_path):
    options = {"per_device_train_batch_size": 5, "save_strategy": "steps", "save_steps": 2, "logging_steps": 3}
    new_trainer(dataset, tmp_path, max_steps=2, **options).train()
    resumed = new_trainer(dataset, tmp_path, max_steps=6, **options)
    resumed.train(resume_from_checkpoint=True)
    entries = [entry for entry in resumed.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in entries] == [3, 6]
    for entry in entries:
        parts = entry["itc_loss"] + entry["itm_loss"] + entry["itg_loss"]
        assert entry["loss"] == pytest.approx(parts, abs=1e-3)


def test_only_matrices_decay(dataset, tmp_path):
    trainer = new_trainer(dataset, tmp_path)
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    assert "vision_projection.weight" in decayed
    assert all(weight.ndim > 1 for name, weight in trainer.model.named_parameters() if name in decayed)


def test_a_batch_has_all_captions_of_each_image_and_masks_missing_ones():
    model = new_model()
    rows = [{"image": tiny.picture(0), "captions": ["a red picture"]}]
    rows.append({"image": tiny.picture(1), "captions": ["all is blue", "a blue picture"]})
    batch = PretrainingCollator(model.processor)(rows)
    assert batch["input_ids"].shape[:2] == batch["attention_mask"].shape[:2] == (2, 2)
    assert batch["attention_mask"].any(dim=-1).tolist() == [[True, False], [True, True]]
    decode = model.processor.tokenizer.decode
    assert decode(batch["input_ids"][1, 0], skip_special_tokens=True).strip() == "all is blue"


def test_the_trainer_of_transformers_trains_and_evaluates_it(dataset, tmp_path):
    model = new_model()
    args = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        use_cpu=True,
        per_device_eval_batch_size=10,
        remove_unused_columns=False,
        report_to="none",
        save_strategy="no",
    )
    trainer = Trainer(model, args, PretrainingCollator(model.processor), dataset, dataset)
    assert trainer.train().training_loss > 0
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.predict(dataset).predictions.shape == (10, 20)  # similarities of one batch of images and texts


def test_a_new_tokenizer_is_the_same_each_time_and_keeps_words(pictures):
    texts = [caption for caption in tiny.CAPTIONS for _ in range(3)]
    tokenizers = [train_text_tokenizer(texts).backend_tokenizer.to_str() for _ in range(5)]
    assert len(set(tokenizers)) == 1
    tokenizer = train_text_tokenizer(texts)
    ids = tokenizer("A Green heart, Übergröße").input_ids
    assert ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "a green heart, übergröße"


# ----------------------------------------------------------------------------------------------------------------------
# Rows and options that fail
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "pretraining"}, "--objective must be caption, pretrain or reward, not 'pretraining'"),
        ({"prompt": "a photo of", "lora_r": 4}, "--objective pretrain does not read --lora_r, --prompt"),
        ({"objective": None}, "--objective caption does not read --label_smoothing"),
        ({"per_device_train_batch_size": 1}, "A batch of one row has no wrong pairs"),
        ({"itc_loss": "cosine"}, "--itc_loss must be softmax or sigmoid"),
        ({"itm_weight": -1}, "--itm_weight must be at least 0"),
        ({"itc_weight": 0, "itm_weight": 0, "itg_weight": 0}, "All losses have the weight 0"),
        ({"label_smoothing": 1}, "`label_smoothing` must be at least 0 and below 1"),
        ({"metric_for_best_model": "cider"}, "--metric_for_best_model must be one of loss, itc_loss"),
        ({"metric_for_best_model": "bleu_4"}, "--metric_for_best_model must be one of loss, itc_loss"),
        ({"metric_for_best_model": "itm_loss", "itm_weight": 0}, "must be one of loss, itc_loss, itg_loss, image"),
        ({"qformer_config": json.dumps(LAYERS)}, "Text generation needs a Q-Former of at least 2 layers"),
        ({"max_caption_length": 600}, "reads texts of at most 512 tokens"),
        ({"max_caption_length": 2}, "`max_length` must be at least 3"),
        ({"text_model_name_or_path": "bert", "tokenizer_vocab_size": 500}, "--tokenizer_vocab_size describes a new"),
        ({"vision_config": None}, "Say which model to pretrain"),
        ({"text_model_name_or_path": "bert"}, "--vision_config trains all parts from scratch"),
        ({"model_name_or_path": "tests"}, "Say which model to pretrain"),
        ({"model_name_or_path": "tests", "vision_config": None}, "--qformer_config describes a new model"),
    ],
)
def test_options_that_do_not_fit_are_answered_in_one_sentence(pictures, tmp_path, changes, message):
    options = OPTIONS | {"dataset_name": pictures, "output_dir": tmp_path / "run"} | changes
    with pytest.raises(InputError, match="^[^\n]*$") as error:
        train_hf.train(command_line(**options))
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_the_loaded_model_leaves_out_cannot_select_the_best_checkpoint(pictures, tmp_path):
    model = new_model(itm_weight=0.0)
    model.save_pretrained(tmp_path / "stage1")
    changes = {"vision_config": None, "qformer_config": None, "model_name_or_path": tmp_path / "stage1"}
    options = OPTIONS | changes | {"dataset_name": pictures, "output_dir": tmp_path / "run"}
    with pytest.raises(InputError, match="must be one of loss, itc_loss, itg_loss, image.* not 'itm_loss'"):
        train_hf.train(command_line(**options, metric_for_best_model="itm_loss"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("weight", "name", "is_greater"), [(1.0, "mean_recall", True), (0.0, "loss", False)])
def test_the_weights_of_the_model_choose_what_selects_the_best_checkpoint(dataset, tmp_path, weight, name, is_greater):
    args = new_trainer(dataset, tmp_path, model=new_model(itc_weight=weight)).args
    assert (args.metric_for_best_model, args.greater_is_better) == (name, is_greater)


def test_several_gpus_in_one_process_are_refused(pictures, tmp_path):
    options = train_hf.parse_options(command_line(**OPTIONS, dataset_name=pictures, output_dir=tmp_path / "run"))
    options[3]._n_gpu = 2
    with pytest.raises(InputError, match="torchrun --nproc_per_node 2"):
        check_options(*options, changed_options=[])


def test_sharding_by_fsdp_is_refused_before_training(pictures, tmp_path, monkeypatch):
    create = PretrainingTrainer.create_accelerator_and_postprocess

    def with_fsdp(trainer: PretrainingTrainer) -> None:
        create(trainer)
        trainer.is_fsdp_enabled = True

    monkeypatch.setattr(PretrainingTrainer, "create_accelerator_and_postprocess", with_fsdp)
    with pytest.raises(InputError, match="FSDP cannot shard a Q-Former of stage 1"):
        train_hf.train(command_line(**OPTIONS, dataset_name=pictures, output_dir=tmp_path / "run"))


def conversation(name: str) -> list[dict]:
    return [{"from": "human", "value": "What do you see?"}, {"from": "gpt", "value": f"a {name} picture"}]


@pytest.mark.parametrize(
    ("captions_of", "names", "message"),
    [
        (lambda name: "a picture", tuple(COLOURS), "All captions to train on are equal"),
        (lambda name: [f"a {name} picture", "a picture"], ("red",), "All rows to train on have the same image"),
        (conversation, ("red", "blue"), "Rows to train on have prompts"),
    ],
)
def test_rows_without_wrong_pairs_are_answered_in_one_sentence(tmp_path, captions_of, names, message):
    folder = save_pictures(tmp_path / "pictures", captions_of, names)
    with pytest.raises(InputError, match="^[^\n]*$") as error:
        train_hf.train(command_line(**OPTIONS, dataset_name=folder, output_dir=tmp_path / "run"))
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_rows_of_one_image_that_are_not_merged_are_reported(tmp_path, log):
    folder = save_pictures(tmp_path / "pictures", lambda name: f"a {name} picture", ("red", "blue", "pink"))
    again = '\n{"file_name": "red.png", "caption": "all is red", "split": "train"}'
    with (folder / "metadata.jsonl").open("a") as file:
        file.write(again)
    for column, reported in ((None, True), ("image", False)):
        log.clear()
        data_args = train_hf.parse_options(command_line(dataset_name=folder, image_id_column=column))[1]
        check_rows(*load_datasets(data_args, None, SkippedRows(), Augmentation()), processes=1)
        assert ("1 of 4 rows of the train split have the image of another row" in log.text) is reported


def test_one_row_to_evaluate_on_is_refused(pictures, tmp_path):
    options = OPTIONS | {"dataset_name": pictures, "output_dir": tmp_path / "run", "max_eval_samples": 1}
    with pytest.raises(InputError, match="There are 1 rows to evaluate on"):
        train_hf.train(command_line(**options))


def test_a_qformer_without_text_input_is_refused(pictures, tmp_path):
    tiny.captioner().save_pretrained(tmp_path / "captioner")
    options = OPTIONS | {"dataset_name": pictures, "output_dir": tmp_path / "run"}
    options |= {"vision_config": None, "qformer_config": None, "model_name_or_path": tmp_path / "captioner"}
    with pytest.raises(InputError, match="holds a captioner"):
        train_hf.train(command_line(**options))
