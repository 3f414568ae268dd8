"""`train_hf.py` as a user runs it: a run from options to final folder, runs that continue, and options that fail."""

import json
import subprocess
import time

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from qformer_captioner import QFormerCaptioner, train_hf
from qformer_captioner.common.errors import InputError

from ..conftest import ROOT

TINY = {
    "dataset_name": "scenes",
    "max_train_samples": 24,
    "max_eval_samples": 6,
    "vision_config": {
        "model_type": "dinov2",
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    "qformer_config": {
        "num_query_tokens": 2,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    "text_config": {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    "per_device_train_batch_size": 4,
    "num_train_epochs": 2,
    "logging_steps": 2,
    "generation_num_beams": 1,
    "generation_max_length": 8,
    "use_cpu": True,
    "disable_tqdm": True,
}


@pytest.fixture
def recipe(tmp_path):
    """Return a function that writes the recipe TINY with changes, and returns its path."""

    def write(**changes) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**TINY, "output_dir": str(tmp_path / "run"), **changes}))
        return str(path)

    return write


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """Run TINY from start to end, and return its output folder and its recipe."""
    folder = tmp_path_factory.mktemp("finished")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**TINY, "output_dir": str(folder / "run")}))
    train_hf.train(["--recipe", str(path)])
    return folder / "run", path


def history(folder, key: str) -> list:
    """Return the logged values of a key, in order."""
    log_history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in log_history if key in entry]


# ----------------------------------------------------------------------------------------------------------------------
# A run from options to final folder
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_writes_model_plots_and_captions(finished_run):
    folder, _ = finished_run
    for name in ("model.safetensors", "modeling_qformer.py", "loss_curve.png", "captions.png", "captions_step_12.png"):
        assert (folder / name).stat().st_size > 0, name
    assert len((folder / "captions.jsonl").read_text().splitlines()) == TINY["max_eval_samples"]


def test_every_evaluation_logs_right_and_shuffled_images(finished_run):
    folder, _ = finished_run
    for key in ("eval_loss", "eval_loss_shuffled", "eval_facts", "eval_facts_shuffled"):
        assert len(history(folder, key)) == 2, key


def test_the_final_folder_loads_and_captions(finished_run):
    folder, _ = finished_run
    model = QFormerCaptioner.from_pretrained(folder)
    assert isinstance(model.caption(Image.new("RGB", (40, 40), "red"), max_new_tokens=4), str)


def test_a_checkpoint_restores_every_weight(finished_run):
    """Weights keep the names they have in memory. The Trainer would silently drop DINOv2's translated names."""
    folder, _ = finished_run
    checkpoint = folder / "checkpoint-12"
    model = QFormerCaptioner.from_pretrained(checkpoint)
    weights = load_file(checkpoint / "model.safetensors")
    assert set(weights) == set(model.state_dict())
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_the_last_of_equal_scores_is_the_best(finished_run):
    """After twelve steps no caption is right, so both evaluations score 0."""
    folder, _ = finished_run
    state = json.loads((folder / "trainer_state.json").read_text())
    assert (state["best_metric"], state["best_global_step"]) == (0.0, 12)
    assert (folder / "captions.jsonl").read_text() == (folder / "captions_step_12.jsonl").read_text()


def test_the_command_line_overrides_the_recipe(recipe):
    *_, arguments = train_hf.parse_options(["--recipe", recipe(), "--learning_rate", "0.5", "--num_train_epochs", "7"])
    assert (arguments.learning_rate, arguments.num_train_epochs) == (0.5, 7)


@pytest.mark.slow
def test_an_existing_captioner_continues_training(finished_run, recipe, tmp_path):
    folder, _ = finished_run
    no_new_model = {"vision_config": None, "text_config": None, "qformer_config": None}
    train_hf.train(["--recipe", recipe(model_name_or_path=str(folder), num_train_epochs=1, **no_new_model)])
    before, after = (load_file(run / "model.safetensors") for run in (folder, tmp_path / "run"))
    assert before.keys() == after.keys()
    assert not torch.equal(before["qformer.query_tokens"], after["qformer.query_tokens"])


@pytest.mark.slow
def test_the_bag_of_words_loss_is_added_with_its_weight(recipe, tmp_path):
    """The loss has no parameters, so without learning the training losses differ by its weighted value only."""
    no_learning = {"num_train_epochs": 1, "logging_steps": 1, "learning_rate": 0.0, "weight_decay": 0.0}
    losses = []
    for weight in (0.0, 0.1, 0.2):
        train_hf.train(["--recipe", recipe(**no_learning, bag_of_words_loss_weight=weight), "--overwrite_output_dir"])
        losses.append(torch.tensor(history(tmp_path / "run", "loss")))
    assert (losses[1] - losses[0]).min() > 0.1
    torch.testing.assert_close(losses[2] - losses[0], 2 * (losses[1] - losses[0]), rtol=1e-3, atol=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# The best checkpoint
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_only_saved_weights_can_be_the_best(recipe, tmp_path):
    """The run evaluates after steps 3 and 6 and saves after 2, 4 and 6, so the better step 3 cannot be kept."""
    steps = dict(eval_strategy="steps", eval_steps=0.5, save_strategy="steps", save_steps=2, max_steps=6)
    train_hf.train(["--recipe", recipe(**steps, metric_for_best_model="loss", greater_is_better=True)])
    first, last = history(tmp_path / "run", "eval_loss")
    assert first > last
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["best_global_step"] == 6
    assert "after step 6, chosen by the best loss" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.slow
def test_the_card_does_not_say_chosen_when_the_last_weights_are_kept(recipe, tmp_path):
    train_hf.train(["--recipe", recipe(load_best_model_at_end=False)])
    card = (tmp_path / "run" / "README.md").read_text()
    assert "| weights | after step 12 |" in card


def test_without_an_evaluation_split_the_last_checkpoint_is_kept(tmp_path, recipe, log):
    (tmp_path / "pictures").mkdir()
    lines = []
    for index in range(4):
        Image.new("RGB", (8, 8), (60 * index, 0, 0)).save(tmp_path / "pictures" / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "caption": f"number {index}"}))
    (tmp_path / "pictures" / "metadata.jsonl").write_text("\n".join(lines))
    changes = {"dataset_name": str(tmp_path / "pictures"), "num_train_epochs": 1}
    words = ["--recipe", recipe(**changes)]
    train_hf.train(words)
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert "the last checkpoint is kept" in log.text
    train_hf.train(words)
    assert "already holds this run" in log.text
    assert "captions.png" not in log.text and "loss_curve.png" not in log.text


@pytest.mark.slow
@pytest.mark.parametrize("images", [1, 2])
def test_a_single_evaluation_image_is_reported_because_it_cannot_be_shuffled(recipe, log, images):
    train_hf.train(["--recipe", recipe(max_eval_samples=images, max_train_samples=4, num_train_epochs=1)])
    assert ("eval_loss_shuffled will equal eval_loss" in log.text) == (images == 1)


# ----------------------------------------------------------------------------------------------------------------------
# Runs that continue, and output folders
# ----------------------------------------------------------------------------------------------------------------------


def test_a_finished_run_is_left_as_it_is(finished_run, log):
    folder, path = finished_run
    before = (folder / "model.safetensors").stat().st_mtime_ns
    train_hf.train(["--recipe", str(path)])
    assert "already holds this run, finished" in log.text and "--overwrite_output_dir" in log.text
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_finished_run_names_its_plots_and_the_option_that_makes_it_longer(finished_run, recipe, log):
    folder, path = finished_run
    train_hf.train(["--recipe", str(path)])
    assert f"Look at {folder / 'captions.png'} and {folder / 'loss_curve.png'}." in log.messages
    assert "give more than --num_train_epochs 2." in log.text
    words = ["--recipe", recipe(), "--max_steps", "2"]
    train_hf.train(words)
    assert "its captions in captions.png, its losses in loss_curve.png." in log.text
    train_hf.train(words)
    assert "give more than --max_steps 2." in log.text


@pytest.mark.slow
def test_a_longer_run_resumes_where_the_finished_one_ended(recipe, tmp_path, log):
    words = ["--recipe", recipe(num_train_epochs=1)]
    train_hf.train(words)
    train_hf.train([*words, "--num_train_epochs", "2"])
    assert "Resuming from" in log.text
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["global_step"] == 12


@pytest.mark.slow
def test_a_killed_run_ends_with_the_weights_of_an_unbroken_one(finished_run, commands, recipe, tmp_path):
    folder, _ = finished_run
    command = ["python", str(ROOT / "train_hf.py"), "--recipe", recipe()]
    same = {"cwd": tmp_path, "env": commands.environment()}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **same)
    while not (tmp_path / "run" / "checkpoint-6" / "trainer_state.json").exists():
        assert process.poll() is None, "the run ended before it was killed"
        time.sleep(0.02)
    commands.kill()
    process.wait()
    assert not (tmp_path / "run" / "model.safetensors").exists()
    subprocess.run(command, check=True, capture_output=True, **same)
    broken, unbroken = (load_file(run / "model.safetensors") for run in (tmp_path / "run", folder))
    assert all(torch.equal(broken[name], unbroken[name]) for name in unbroken)


@pytest.mark.slow
def test_overwriting_starts_a_new_run(recipe, tmp_path, log):
    words = ["--recipe", recipe(num_train_epochs=1)]
    train_hf.train(words)
    (tmp_path / "run" / "note.txt").write_text("from the first run")
    train_hf.train([*words, "--overwrite_output_dir"])
    assert "Resuming from" not in log.text
    assert (tmp_path / "run" / "model.safetensors").exists() and not (tmp_path / "run" / "note.txt").exists()


def test_an_output_folder_with_another_run_is_left_alone(finished_run, recipe):
    folder, _ = finished_run
    with pytest.raises(InputError, match="holds another run: it differs in max_train_samples"):
        train_hf.train(["--recipe", recipe(output_dir=str(folder), max_train_samples=20)])
    assert (folder / "model.safetensors").exists()


def test_an_output_folder_with_other_files_is_left_alone(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("three years")
    with pytest.raises(InputError, match="not empty"):
        train_hf.train(["--recipe", recipe(), "--overwrite_output_dir"])
    assert (tmp_path / "run" / "thesis.txt").exists()


def test_a_run_that_cannot_start_creates_no_folder_and_deletes_none(finished_run, recipe, tmp_path):
    with pytest.raises(InputError):
        train_hf.train(["--recipe", recipe(qformer_config={"num_query_token": 3})])
    assert not (tmp_path / "run").exists()
    folder, _ = finished_run
    with pytest.raises(InputError):
        train_hf.train(["--recipe", recipe(output_dir=str(folder), caption_column="x"), "--overwrite_output_dir"])
    assert (folder / "model.safetensors").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Options that fail
# ----------------------------------------------------------------------------------------------------------------------

NO_FOLDER = {"dataset_name": "/no/such/folder"}


@pytest.mark.parametrize(
    ("changes", "words", "message"),
    [
        ({"lerning_rate": 1e-3}, [], "unknown field 'lerning_rate'. Did you mean 'learning_rate'"),
        ({}, ["--num_epochs_train", "3"], "Unknown option '--num_epochs_train'"),
        ({"caption_column": "text"}, [], "no column 'text'; its columns are 'image', 'caption', 'scene'"),
        (NO_FOLDER, [], "'/no/such/folder' cannot be loaded"),
        ({"vision_config": None}, [], "Say which captioner to train"),
        ({"qformer_config": {"num_query_token": 3}}, [], "num_query_token"),
        ({"qformer_config": {"num_frames": 4}}, [], "Set the number of frames with --num_frames"),
        ({"prompt": "word " * 3000}, [], "The language model accepts at most 2048 tokens"),
        ({}, ["--recipe", "no_such_recipe"], "There is no recipe 'no_such_recipe'"),
        ({}, ["--label_smoothing_factor", "0.1"], "--label_smoothing_factor does not work here"),
        ({}, ["--qformer_config", "{"], "--qformer_config is not valid JSON"),
        ({}, ["--metric_for_best_model", "cider"], "--metric_for_best_model must be one of loss, facts, complete"),
        ({}, ["--report_to", "no_such_service"], "no_such_service"),
        ({}, ["--ema_decay", "2"], "--ema_decay must lie between 0 and 1, not 2"),
        ({}, ["--num_train_epochs", "nan"], "--num_train_epochs must be at least 0, not nan"),
        ({}, ["--learning_rate", "nan"], "--learning_rate must be at least 0, not nan"),
        ({}, ["--per_device_train_batch_size", "0"], "--per_device_train_batch_size must be at least 1, not 0"),
        ({}, ["--generation_num_beams", "0"], "--generation_num_beams must be at least 1, not 0"),
        ({}, ["--seed", "-1"], "--seed must be between 0 and"),
        ({}, ["--train_val_split", "nan"], "--train_val_split must be between 0 and 1, not nan"),
        ({}, ["--resume_from_checkpoint", "recipes"], "There is no complete checkpoint in 'recipes'"),
        ({}, ["--normalize_image_features_samples", "1"], "_samples must be at least 2, not 1"),
        ({}, ["--normalize_image_features_samples", "-1"], "_samples must be at least 2, not -1"),
        ({}, ["--lora_r", "4", "--lora_dropout", "2"], "--lora_dropout must be between 0 and 1, not 2"),
        ({}, ["--dataloader_num_workers", "-1"], "--dataloader_num_workers must be at least 0, not -1"),
        ({}, ["--random_resized_crop_scale", "40"], "--random_resized_crop_scale"),
        ({}, ["--horizontal_flip_prob", "7"], "--horizontal_flip_prob"),
        ({}, ["--captions_per_image", "0"], "--captions_per_image must be at least 1, not 0"),
        ({}, ["--max_caption_length", "0"], "--max_caption_length must be at least 2, not 0"),
        ({}, ["--image_column", "scene"], "rows of train cannot be read"),
        ({}, ["--prompt", "a photo of", ""], "One of several prompts is empty"),
        ({}, ["--lora_r", "4", "--freeze_language_model", "false"], "--lora_r trains adapters on frozen backbones"),
    ],
)
def test_a_mistake_is_answered_in_one_line(recipe, changes, words, message):
    with pytest.raises(InputError, match="^[^\n]*$") as error:
        train_hf.train(words if "--recipe" in words else ["--recipe", recipe(**changes), *words])
    assert message in str(error.value)


@pytest.mark.slow
def test_an_error_reaches_the_shell_without_a_traceback(commands, tmp_path):
    command = ["python", str(ROOT / "train_hf.py"), "--dataset_name", "/nowhere", "--output_dir", "run"]
    done = subprocess.run(command, cwd=tmp_path, env=commands.environment(), capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: The data set '/nowhere' cannot be loaded")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_importing_the_trainer_shows_no_warning_about_quantisation(commands):
    """transformers' Trainer imports peft, and peft imports bitsandbytes, which warns about a kernel on CPUs.

    The server has imported `train_hf`, and its log holds what imports print.
    """
    assert "gemm_4bit" not in commands.log.read_text()
