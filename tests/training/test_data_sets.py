"""Training on streams, on mixtures, and with an evaluation set from elsewhere."""

import json
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file

from qformer_captioner import train_hf
from qformer_captioner.common.errors import InputError
from qformer_captioner.data.augmentation import Augmentation
from qformer_captioner.data.skipped_rows import SkippedRows
from qformer_captioner.training.data_setup import load_datasets, replace_epochs_by_steps

from ..conftest import ROOT
from ..fixtures import tiny
from ..fixtures.captioned_files import COLOURS, rows_with_paths, write_jsonl, write_pictures, write_tar


@pytest.fixture
def folder(tmp_path):
    """Return a folder with a picture of each colour in `pictures/`."""
    return write_pictures(tmp_path)


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """Return folders of a small vision encoder and language model."""
    folder = tmp_path_factory.mktemp("backbones")
    return tiny.save_vision(folder / "vision"), tiny.save_language(folder / "llama")


@pytest.fixture
def words(backbones, folder):
    """Return a function that makes a command line. It streams 40 rows from two files for eight steps."""
    for file in range(2):
        rows = [
            {"image": f"pictures/{COLOURS[number % 6]}.png", "caption": tiny.CAPTIONS[number % 3]}
            for number in range(20 * file, 20 * file + 20)
        ]
        write_jsonl(folder / f"train-{file}.jsonl", rows)
    write_jsonl(folder / "dev.jsonl", [{**row, "caption": tiny.CAPTIONS, "number": 3} for row in rows_with_paths()])

    def make(**options) -> list[str]:
        options = {
            "dataset_name": folder / "train-*.jsonl",
            "eval_dataset_name": folder / "dev.jsonl",
            "streaming": "true",
            "shuffle_buffer": 5,
            "max_steps": 8,
            "random_resized_crop_scale": 0.5,
            "vision_model_name_or_path": backbones[0],
            "language_model_name_or_path": backbones[1],
            "qformer_config": json.dumps(tiny.QFORMER),
            "output_dir": folder / "run",
            "per_device_train_batch_size": 8,
            "learning_rate": 0.01,
            "logging_steps": 1,
            "eval_strategy": "no",
            "load_best_model_at_end": "false",
            "save_strategy": "steps",
            "save_steps": 3,
            "save_total_limit": 9,
            "generation_num_beams": 1,
            "generation_max_length": 6,
            "use_cpu": "true",
            "disable_tqdm": "true",
        } | options
        command = []
        for name, value in options.items():
            command += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        return command

    return make


def losses(folder) -> list[float]:
    """Return the losses that a run has logged."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.mark.slow
def test_training_on_a_stream_resumes_with_the_same_rows(words, folder):
    """The run takes 64 rows and a pass has 40, so checkpoint 6 lies in the second pass."""
    train_hf.train(words())
    for step in (3, 6):
        again = folder / f"again-{step}"
        checkpoint = folder / "run" / f"checkpoint-{step}"
        train_hf.train(words(output_dir=again, resume_from_checkpoint=checkpoint))
        ours, theirs = (load_file(run / "model.safetensors") for run in (folder / "run", again))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), step
    train_hf.train(words(output_dir=folder / "other", shuffle_buffer=0))
    assert losses(folder / "other") != losses(folder / "run")


@pytest.mark.slow
def test_two_interrupted_processes_log_the_losses_of_one(commands, words, folder):
    """The rows come from one file, so that the processes share rows instead of files and see the batches of one."""
    one_file = {"dataset_name": folder / "train-0.jsonl", "dataloader_num_workers": 1}
    train_hf.train(words(output_dir=folder / "one", **one_file))
    options = words(output_dir=folder / "two", per_device_train_batch_size=4, **one_file)
    run = ["torchrun", "--standalone", "--nproc_per_node", "2", str(ROOT / "train_hf.py"), *options]
    environment = commands.environment()
    process = subprocess.Popen(run, env=environment, stderr=subprocess.DEVNULL)
    while not list((folder / "two").glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None, "the run ended before it was killed"
        time.sleep(0.01)
    commands.kill()
    process.wait()
    assert not (folder / "two" / "model.safetensors").exists()
    subprocess.run(run, env=environment, check=True, capture_output=True, timeout=120)
    torch.testing.assert_close(losses(folder / "two"), losses(folder / "one"), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_training_on_a_stream_evaluates_and_saves_by_steps(words, folder, log):
    epochs = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": "true"}
    *_, args = train_hf.parse_options(words(max_steps=20, **epochs))
    replace_epochs_by_steps(args)
    assert (args.eval_strategy, args.eval_steps, args.save_strategy, args.save_steps) == ("steps", 2, "steps", 2)
    train_hf.train(words(max_steps=3, **epochs))
    assert "--eval_strategy is steps, --eval_steps 1" in log.text
    history = json.loads((folder / "run" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [1, 2, 3]
    assert len((folder / "run" / "captions.jsonl").read_text().splitlines()) == len(COLOURS)


def test_the_bag_of_words_loss_and_a_fresh_tokenizer_read_the_captions_of_a_stream(words, folder):
    scratch = {"vision_model_name_or_path": None, "language_model_name_or_path": None}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    options = words(
        vision_config=json.dumps({"model_type": "vit", "image_size": 16, "patch_size": 8, **sizes}),
        text_config=json.dumps({"model_type": "llama", **sizes}),
        qformer_config=json.dumps(sizes),
        bag_of_words_loss_weight=0.1,
        max_steps=2,
    )
    for name in scratch:
        place = options.index(f"--{name}")
        del options[place : place + 2]
    train_hf.train(options)
    assert len(losses(folder / "run")) == 2


def test_a_mixture_trains(words, folder):
    train_hf.train(
        words(
            streaming="false",
            dataset_name=[folder / "train-0.jsonl", write_tar(folder / "rows.tar", folder)],
            dataset_weights=[3, 1],
            image_column=["image", "png"],
            caption_column=["caption", "json.caption"],
            max_steps=-1,
            num_train_epochs=1,
        )
    )
    assert len(losses(folder / "run")) == 3  # 6 rows of the tar, 18 of the other's 20


def test_an_evaluation_set_may_have_columns_and_a_folder_of_its_own(words, folder):
    (folder / "elsewhere").mkdir()
    (folder / "pictures" / "red.png").rename(folder / "elsewhere" / "moved.png")
    write_jsonl(folder / "dev.jsonl", [{"file": "moved.png", "says": ["one", "two"]}])
    own = {
        "max_skipped": 1,
        "eval_image_column": "file",
        "eval_caption_column": "says",
        "eval_image_folder": folder / "elsewhere",
    }
    args = train_hf.parse_options(words(streaming="false", **own))[1]
    training, evaluation = load_datasets(args, None, SkippedRows(), Augmentation())
    assert (len(training), evaluation.references()) == (40, [["one", "two"]])


def test_options_of_an_evaluation_set_need_its_name(words):
    options = words(eval_caption_column="text")
    place = options.index("--eval_dataset_name")
    with pytest.raises(InputError, match="--eval_caption_column describes --eval_dataset_name"):
        train_hf.train(options[:place] + options[place + 2 :])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": -1}, "A stream has no end: give .* --max_steps"),
        ({"dataset_weights": [1, 2]}, "--dataset_weights must be 1 numbers above 0"),
        ({"dataset_name": ["a", "b"], "dataset_weights": [1, 0]}, "--dataset_weights must be 2 numbers above 0"),
        (
            {"dataset_name": ["a.csv", "b.csv", "c.csv"], "image_column": ["a", "b"]},
            "--image_column has 2 values for 3",
        ),
        ({"dataset_name": "gone.csv"}, "There is no file 'gone.csv'"),
        ({"eval_dataset_name": "gone.csv"}, "There is no file 'gone.csv'"),
        ({"eval_caption_column": "text"}, "no column 'text'; its columns .* Choose one with --eval_caption_column"),
        ({"eval_image_column": "text"}, "no column 'text'; its columns .* Choose one with --eval_image_column"),
        (
            {"eval_image_column": "number"},
            "holds .*, not images or paths. Choose another column with --eval_image_column",
        ),
        ({"eval_image_folder": "gone"}, "There is no folder of images 'gone' .--eval_image_folder"),
        ({"image_folder": "gone"}, "There is no folder of images 'gone'"),
        ({"caption_column": "text"}, "no column 'text'; its columns are 'image', 'caption'"),
        ({"shuffle_buffer": -1}, "--shuffle_buffer must be at least 0, not -1"),
        ({"image_id_column": "image"}, "--image_id_column needs all rows"),
    ],
)
def test_options_that_contradict_each_other_end_in_one_sentence(words, options, message):
    with pytest.raises(InputError, match=f"^[^\n]*{message}[^\n]*$"):
        train_hf.train(words(**options))
