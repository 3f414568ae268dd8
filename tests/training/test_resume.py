"""Killed runs that resume and runs of several processes end with the weights of an unbroken run of one process."""

import json
import random
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file

from qformer_captioner import QFormerCaptioner, precompute_features, train_hf

from ..conftest import ROOT
from ..fixtures import tiny
from ..fixtures.processes import command_line

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """Return a folder with a vision encoder, a language model, captioned pictures, and the features of the pictures."""
    folder = tmp_path_factory.mktemp("backbones")
    tiny.save_vision(folder / "vision")
    # Many tokens end a caption: captions have different lengths, for which processes need different numbers of steps.
    tiny.save_language(folder / "llama", max_position_embeddings=256, eos_token_id=[1, *range(2, 12)])
    (folder / "pictures").mkdir()
    lines = []
    for row in range(30):
        tiny.picture(row).save(folder / "pictures" / f"{row}.png")
        captions = [tiny.CAPTIONS[(row + shift) % 3] for shift in range(1 + row % 2)]
        split = "train" if row < 24 else "dev"
        lines.append(json.dumps({"file_name": f"{row}.png", "caption": captions, "split": split}))
    (folder / "pictures" / "metadata.jsonl").write_text("\n".join(lines))
    start = tiny.captioner(hidden_dropout_prob=0.1)
    for part in (start.vision_model, start.language_model):
        part.requires_grad_(False)
    start.generation_config.eos_token_id = [1, *range(2, 20)]
    start.save_pretrained(folder / "captioner")
    named = {"dataset_name": folder / "pictures", "vision_model_name_or_path": folder / "vision"}
    precompute_features.precompute(
        command_line(**named, output_dir=folder / "features", views=2, horizontal_flip_prob=0.5)
    )
    return folder


def command(folder, output_dir, batch_size: int = 4, **changes) -> list[str]:
    """Return the command line of two epochs of six steps, with every source of random numbers except dropout."""
    values = {
        "vision_model_name_or_path": folder / "vision",
        "language_model_name_or_path": folder / "llama",
        "qformer_config": json.dumps(tiny.QFORMER),
        "dataset_name": folder / "pictures",
        "captions_per_image": 1,
        "random_resized_crop_scale": 0.5,
        "horizontal_flip_prob": 0.5,
        "bag_of_words_loss_weight": 0.1,
        "output_dir": output_dir,
        "per_device_train_batch_size": batch_size,
        "num_train_epochs": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "epoch",
        "load_best_model_at_end": "false",
        "logging_steps": 1,
        "generation_num_beams": 1,
        "generation_max_length": 6,
        "use_cpu": "true",
        "disable_tqdm": "true",
    } | changes
    return command_line(**values)


PRETRAINING = {
    "objective": "pretrain",
    **dict.fromkeys(("language_model_name_or_path", "bag_of_words_loss_weight")),
    **dict.fromkeys(("generation_num_beams", "generation_max_length")),
}
REWARDS = {
    "objective": "reward",
    **dict.fromkeys(("vision_model_name_or_path", "language_model_name_or_path", "qformer_config")),
    **dict.fromkeys(("captions_per_image", "bag_of_words_loss_weight")),
    "num_generations": 3,
    "beta": 0.1,
    "caption_loss_weight": 0.1,
}
VARIANTS = {
    "images": {
        "qformer_config": json.dumps(tiny.QFORMER | {"hidden_dropout_prob": 0.1}),
        "ema_decay": 0.9,
        "projection_per_query": "true",
        "normalize_image_features_samples": 8,
    },
    "lora on features": {
        "lora_r": 4,
        "lora_dropout": 0.1,
        "language_model_learning_rate": 0.01,
        "random_resized_crop_scale": None,
        "horizontal_flip_prob": None,
        "dataloader_num_workers": 1,
    },
    "pretraining": PRETRAINING
    | {"qformer_config": json.dumps(tiny.QFORMER | {"hidden_dropout_prob": 0.1}), "ema_decay": 0.9},
    "rewards": REWARDS | {"num_iterations": 2, "save_steps": 3},  # also between two steps on the same samples
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_killed_at_a_random_moment_resumes_to_the_weights_of_an_unbroken_one(
    backbones, commands, tmp_path, variant
):
    changes = dict(VARIANTS[variant])
    if variant == "lora on features":
        changes["features"] = backbones / "features"
    if variant == "rewards":
        changes["model_name_or_path"] = backbones / "captioner"
    train_hf.train(command(backbones, tmp_path / "unbroken", **changes))
    run = ["python", str(ROOT / "train_hf.py"), *command(backbones, tmp_path / "broken", **changes)]
    process = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=commands.environment())
    while not list((tmp_path / "broken").glob("checkpoint-*")):
        assert process.poll() is None, "the run ended before it was killed"
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.4))
    commands.kill()
    process.wait()
    assert not (tmp_path / "broken" / "model.safetensors").exists(), "the run ended before it was killed"
    subprocess.run(run, env=commands.environment(), check=True, capture_output=True, timeout=300)
    file = "adapter_model.safetensors" if "lora" in variant else "model.safetensors"
    broken, unbroken = (load_file(tmp_path / name / file) for name in ("broken", "unbroken"))
    assert broken.keys() == unbroken.keys()
    assert all(torch.equal(broken[name], unbroken[name]) for name in unbroken)


def losses(folder, key: str) -> dict[int, float]:
    """Return the logged values of a key by step."""
    log_history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry[key] for entry in log_history if key in entry}


def launch(commands, options: list[str], recipe: str, program: str = "train_hf.py") -> str:
    """Run a training command with two processes, and return what it prints."""
    command = ["-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "recipes" / "accelerate" / f"{recipe}.yaml")]
    command += ["--num_processes", "2", "--mixed_precision", "no", str(ROOT / program)]
    return subprocess.run(
        ["python", *command, *options],
        env={**commands.environment(), "DS_ACCELERATOR": "cpu"},
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    ).stdout


# accelerate leaves FSDP out where there is no GPU, so FSDP needs a program that puts it in.
PROGRAMS = {"cpu": "train_hf.py", "deepspeed_zero2": "train_hf.py", "fsdp2": "tests/fixtures/fsdp_on_cpu.py"}


CONSTANT = {"lr_scheduler_type": "constant", "warmup_steps": 0, "ema_decay": 0.9, "save_steps": 4}


@pytest.fixture(scope="module")
def one(backbones, tmp_path_factory):
    """Return the output folder of a run of one process."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    train_hf.train(command(backbones, folder, batch_size=4, **CONSTANT))
    return folder


@pytest.mark.parametrize("recipe", PROGRAMS)
def test_two_processes_train_and_resume_as_one(backbones, one, commands, tmp_path, recipe):
    if recipe == "deepspeed_zero2":
        pytest.importorskip("deepspeed", reason="needs deepspeed")
    for length in [{}] if recipe == "cpu" else [{"max_steps": 4}, {}]:
        options = command(backbones, tmp_path / "two", batch_size=2, **CONSTANT, **length)
        printed = launch(commands, options, recipe, PROGRAMS[recipe])
        assert printed.count("Trained in") == 1, "only the main process reports"
    assert ("Resuming from" in printed) == (recipe != "cpu")
    for key in ("loss", "eval_loss", "eval_loss_shuffled", "eval_cider"):
        expected, values = (losses(folder, key) for folder in (one, tmp_path / "two"))
        assert len(expected) > 1
        assert values == pytest.approx(expected, rel=1e-4, abs=1e-4)
    expected, weights = (load_file(folder / "model.safetensors") for folder in (one, tmp_path / "two"))
    assert expected.keys() == weights.keys()
    for name in expected:  # the gradient of a key's bias is zero but for rounding, which Adam makes as large as others
        tolerance = 1e-3 if name.endswith("key.bias") else 1e-4
        torch.testing.assert_close(weights[name], expected[name], rtol=0, atol=tolerance)
    captions = {QFormerCaptioner.from_pretrained(folder).caption(tiny.picture(1)) for folder in (one, tmp_path / "two")}
    assert len(captions) == 1
    code = json.loads((tmp_path / "two" / "config.json").read_text())["auto_map"]["AutoModel"]
    assert code == "modeling_qformer.QFormerCaptioner", "the code of the class that FSDP makes cannot be loaded"


def test_two_processes_pretrain_as_one(backbones, commands, tmp_path):
    """The processes share each batch: eight images are contrasted with their texts, four of each process."""
    changes = PRETRAINING | CONSTANT | {"max_steps": 3, "logging_steps": 1, "metric_for_best_model": "mean_recall"}
    sizes = {"one": 8, "two": 4}
    options = {
        name: command(backbones, tmp_path / name, size, **changes, per_device_eval_batch_size=size)
        for name, size in sizes.items()
    }
    train_hf.train(options["one"])
    launch(commands, options["two"], "cpu")
    for key in ("loss", "itc_loss", "itm_loss", "eval_itc_loss", "eval_itm_loss_shuffled", "eval_text_to_image_r1"):
        expected, values = (losses(tmp_path / name, key) for name in sizes)
        assert expected and values == pytest.approx(expected, rel=1e-3, abs=1e-4)
    expected, weights = (load_file(tmp_path / name / "model.safetensors") for name in sizes)
    assert expected.keys() == weights.keys()
    for name in expected:  # Adam makes gradients that are zero but for rounding as large as others
        tolerance = 1e-3 if name.endswith("key.bias") else 1e-4
        torch.testing.assert_close(weights[name], expected[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_train_by_rewards_as_one(backbones, commands, tmp_path, accumulation):
    """The samples of an image depend on its place in the batch of all processes, and on nothing else."""
    changes = REWARDS | CONSTANT | {"max_steps": 3, "learning_rate": 1e-2}
    changes["model_name_or_path"] = tmp_path / "captioner"
    model = QFormerCaptioner.from_pretrained(backbones / "captioner")
    model.qformer.config.hidden_dropout_prob = 0.0  # processes do not drop the same activations
    model.save_pretrained(tmp_path / "captioner")
    sizes = {"one": 8, "two": 4 // accumulation}
    options = {name: command(backbones, tmp_path / name, size, **changes) for name, size in sizes.items()}
    train_hf.train(options["one"])
    launch(commands, [*options["two"], "--gradient_accumulation_steps", str(accumulation)], "cpu")
    for key in ("reward", "reward_std", "rewards/cider/mean", "completions/mean_length", "kl", "loss", "eval_cider"):
        expected, values = (losses(tmp_path / name, key) for name in sizes)
        assert len(expected) >= 1 and values == pytest.approx(expected, rel=1e-3, abs=1e-3), key
    expected, weights = (load_file(tmp_path / name / "model.safetensors") for name in sizes)
    for name in expected:  # Adam makes gradients that are zero but for rounding as large as others
        if not name.endswith("key.bias"):
            torch.testing.assert_close(weights[name], expected[name], rtol=0, atol=1e-3, msg=name)


def test_an_incomplete_checkpoint_is_skipped(backbones, tmp_path, log):
    argv = command(backbones, tmp_path / "run", max_steps=4)
    train_hf.train(argv)
    (tmp_path / "run" / "checkpoint-4" / "trainer_state.json").write_text('{"best_met')
    train_hf.train([*argv, "--max_steps", "6"])
    assert any(message.startswith("Resuming from") and "checkpoint-2" in message for message in log.messages)
