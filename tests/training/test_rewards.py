"""`train_hf.py --objective reward` as a user runs it: options, files, model card, and rewards that fail."""

import json

import pytest
from safetensors.torch import load_file

from qformer_captioner import QFormerCaptioner, train_hf
from qformer_captioner.common.errors import InputError

from ..fixtures import tiny
from ..fixtures.processes import command_line


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Return a folder with a captioner and captioned pictures."""
    folder = tmp_path_factory.mktemp("start")
    model = tiny.captioner()
    for part in (model.vision_model, model.language_model):
        part.requires_grad_(False)
    model.config.freeze_vision_model = model.config.freeze_language_model = True
    model.save_pretrained(folder / "captioner")
    (folder / "pictures").mkdir()
    lines = []
    for row in range(11):
        tiny.picture(row).save(folder / "pictures" / f"{row}.png")
        split = "train" if row < 8 else "dev"
        lines.append(json.dumps({"file_name": f"{row}.png", "caption": tiny.CAPTIONS, "split": split}))
    (folder / "pictures" / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def command(start, output_dir, **changes) -> list[str]:
    """Return the command line of two steps."""
    options = {
        "objective": "reward",
        "model_name_or_path": start / "captioner",
        "dataset_name": start / "pictures",
        "output_dir": output_dir,
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_steps": 1,
        "generation_num_beams": 1,
        "generation_max_length": 5,
        "use_cpu": "true",
        "disable_tqdm": "true",
    }
    return command_line(**options | changes)


@pytest.fixture(scope="module")
def finished(start, tmp_path_factory):
    """Run two steps with two rewards, and return the output folder."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    argv = command(start, folder, load_best_model_at_end="false")
    train_hf.train([*argv, "--reward_funcs", "cider", "length:4", "--reward_weights", "1", "0.5"])
    return folder


def history(folder, key: str) -> list:
    log_history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in log_history if key in entry]


def test_the_log_has_every_reward_and_the_signs_of_a_gamed_one(finished):
    for key in ("reward", "rewards/cider/mean", "rewards/length/std", "eval_bad_endings", "eval_loss_shuffled"):
        assert len(history(finished, key)) == 2, key
    weighted = history(finished, "rewards/cider/mean")[0] + 0.5 * history(finished, "rewards/length/mean")[0]
    assert history(finished, "reward")[0] == pytest.approx(weighted, abs=1e-3)


def test_samples_and_their_rewards_are_in_a_table_and_a_sheet(finished):
    lines = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    assert [line["image_id"] for line in lines] == [0, 1, 2]
    for sample in lines[0]["samples"]:
        assert sample["reward"] == pytest.approx(sample["rewards"]["cider"] + 0.5 * sample["rewards"]["length"])
    assert len(lines[0]["samples"]) == 2
    assert (finished / "samples.png").read_bytes() == (finished / "samples_step_2.png").read_bytes()


def test_the_card_names_the_rewards_but_no_folder(start, tmp_path):
    file = tmp_path / "private" / "mine.py"
    file.parent.mkdir()
    file.write_text("def long(completions, **columns):\n    return [len(text) for text in completions]\n")
    train_hf.train(command(start, tmp_path / "run", reward_funcs=f"{file}:long", max_steps=1))
    card = (tmp_path / "run" / "README.md").read_text()
    assert "Trained by rewards of captions that it sampled: mine.py:long." in card
    assert "samples.png" in card
    assert "private" not in card


def test_a_reward_that_fails_ends_the_run_in_one_sentence_and_keeps_the_checkpoint(start, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "calls = []\ndef fragile(completions, **columns):\n    calls.append(1)\n"
        "    return [float('nan') if len(calls) > 4 else 1.0] * len(completions)\n"
    )
    with pytest.raises(InputError, match="The reward 'fragile' returned nan for completion 0: it must return"):
        train_hf.train(command(start, tmp_path / "run", reward_funcs=f"{file}:fragile", max_steps=3))
    assert (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name_or_path": None}, "improves a captioner that already writes captions: name it with --model_name"),
        ({"captions_per_image": 1}, "--captions_per_image leaves out captions that rewards compare with"),
        ({"bag_of_words_loss_weight": 0.1}, "--objective reward does not read --bag_of_words_loss_weight"),
        ({"text_config": "{}"}, "--objective reward does not read --text_config"),
        ({"itc_weight": 1}, "--objective reward does not read --itc_weight"),
        ({"objective": "caption"}, "--objective caption does not read --num_generations"),
        ({"num_generations": 1}, "--num_generations must be at least 2, not 1"),
        ({"num_generations": 0, "baseline": "greedy"}, "--num_generations must be at least 1, not 0"),
        ({"baseline": "mean"}, "--baseline must be leave_one_out or greedy, not 'mean'"),
        ({"temperature": 0}, "--temperature must be above 0, not 0"),
        ({"num_iterations": 0}, "--num_iterations must be at least 1"),
        ({"num_iterations": 2, "streaming": "true"}, "--num_iterations above 1 reads a batch again"),
        ({"epsilon": -1}, "--epsilon must be at least 0"),
        ({"beta": "nan"}, "--beta must be at least 0"),
        ({"caption_loss_weight": -0.1}, "--caption_loss_weight must be at least 0"),
        ({"reward_funcs": "cidre"}, "There is no reward 'cidre'"),
        ({"reward_weights": "1 2"}, "There are 1 rewards but 2 weights"),
    ],
)
def test_options_that_are_not_valid_end_in_one_sentence(start, tmp_path, changes, message):
    argv = command(start, tmp_path / "run", **{**changes, "reward_weights": None})
    argv += ["--reward_weights", "1", "2"] if "reward_weights" in changes else []
    with pytest.raises(InputError, match=message):
        train_hf.train(argv)


@pytest.mark.slow
def test_an_adapter_is_trained_further_and_not_replaced(start, tmp_path):
    options = {"objective": "caption", "num_generations": None, "lora_r": 2, "learning_rate": 0.05}
    train_hf.train(command(start, tmp_path / "adapter", **options))
    argv = command(start, tmp_path / "run", model_name_or_path=tmp_path / "adapter", learning_rate=1e-4)
    with pytest.raises(InputError, match="is an adapter, which new adapters .--lora_r. would replace"):
        train_hf.train([*argv, "--lora_r", "2"])
    train_hf.train(argv)
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "run"))
    assert before.keys() == after.keys()
    for part in ("lora_B", "qformer", "language_projection"):
        changes = [(after[name] - before[name]).abs().max() for name in before if part in name]
        assert 0 < max(changes) < 1e-3, part
    assert QFormerCaptioner.from_pretrained(tmp_path / "run").caption(tiny.picture(1), max_new_tokens=3) is not None
