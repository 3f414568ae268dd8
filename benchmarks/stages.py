r"""Captioning with and without stage 1, in equal time of the processor.

    qformer-captioner features --dataset_name flickr8k --vision_model_name_or_path dinov2-small --output_dir features
    python -m benchmarks.stages --dataset_name flickr8k --vision_model dinov2-small --features features \
        --language_model smollm2 --minutes 8 --stage_1_share 0.3

"stage 2 alone" trains a captioner from scratch for all of the time. The others pretrain the Q-Former for a share of the
time, and then train the captioner. Their contrastive loss is softmax or sigmoid. Data, Q-Former and
language model are the same, and all Q-Formers begin with weights of the same size. The command first measures the time
of a step of each stage. From these times it takes the numbers of steps. Evaluation, which all have once at the end,
does not count.

docs/results.md has the figures. Only seed 0 has run so far.

Each run adds a line of JSON to benchmarks/results/stages.jsonl and is not repeated. A killed command therefore
continues where it stopped.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .common import RESULTS_DIR, machine_facts, write_result

ROOT = Path(__file__).parents[1]
ARMS = {"stage 2 alone": None, "softmax, then stage 2": "softmax", "sigmoid, then stage 2": "sigmoid"}
CALIBRATION_STEPS = (10, 40)  # the difference is the time of 30 steps, without loading
EVAL_BATCH_SIZE = 60
SCORES = ("cider", "bleu_4", "loss", "loss_shuffled")


@dataclass(frozen=True)
class Run:
    """Settings of a run. A line of results begins with them."""

    arm: str
    seed: int
    minutes: float
    stage_1_share: float
    stage_2_batch_size: int


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--dataset_name", required=True, help="Folder or Hub id of the captioned images.")
    parser.add_argument("--vision_model", required=True, help="Folder or Hub id of the encoder of the features.")
    parser.add_argument("--features", required=True, help="Folder of precomputed features.")
    parser.add_argument("--language_model", required=True, help="Folder or Hub id of the language model.")
    parser.add_argument("--stage_1_recipe", default="stage1_contrast", help="Recipe of the first stage.")
    parser.add_argument("--stage_2_recipe", default="flickr8k", help="Recipe of the second stage.")
    parser.add_argument("--stage_2_batch_size", type=int, default=8, help="Number of images in a batch of stage 2.")
    parser.add_argument(
        "--stage_2_learning_rate", type=float, default=5e-4, help="Learning rate of the Q-Former in stage 2."
    )
    parser.add_argument("--qformer_config", help="Fields of the Q-Former as JSON. Default: those of stage 1's recipe.")
    parser.add_argument("--minutes", type=float, default=20, help="Minutes of the processor for a run.")
    parser.add_argument("--stage_1_share", type=float, default=0.4, help="Share of the minutes for stage 1.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="Random seeds.")
    parser.add_argument("--dtype", default="float32", help="Dtype of the frozen language model.")
    parser.add_argument("--max_eval_samples", type=int, default=1000, help="Largest number of images to score on.")
    parser.add_argument("--output_dir", default="outputs/stages", help="Folder of the runs.")
    return parser.parse_args()


# --- Commands ---------------------------------------------------------------------------------------------------------


def shared_words(options: argparse.Namespace, recipe: str, seed: int) -> list[str]:
    """Return the options that both stages have."""
    words = ["--recipe", recipe, "--seed", str(seed), "--dtype", options.dtype, "--dataset_name", options.dataset_name]
    return [*words, "--features", options.features, "--vision_model_name_or_path", options.vision_model]


def stage_1_command(options: argparse.Namespace, itc_loss: str, seed: int) -> list[str]:
    words = [*shared_words(options, options.stage_1_recipe, seed), "--itc_loss", itc_loss, "--eval_strategy", "no"]
    return words + (["--qformer_config", options.qformer_config] if options.qformer_config else [])


def stage_2_command(options: argparse.Namespace, pretrained: Path | None, seed: int) -> list[str]:
    words = shared_words(options, options.stage_2_recipe, seed)
    words += ["--language_model_name_or_path", options.language_model]
    words += ["--learning_rate", str(options.stage_2_learning_rate)]
    words += ["--random_resized_crop_scale", "null", "--horizontal_flip_prob", "0"]  # the features are computed
    words += ["--per_device_train_batch_size", str(options.stage_2_batch_size)]
    words += ["--max_eval_samples", str(options.max_eval_samples), "--per_device_eval_batch_size", str(EVAL_BATCH_SIZE)]
    if pretrained is None:
        fields = json.loads(options.qformer_config or qformer_of_recipe(options.stage_1_recipe))
        return [*words, "--qformer_config", json.dumps(with_first_weights(fields))]
    kept = ["--qformer_config", "null", "--normalize_image_features_samples", "null"]
    return [*words, *kept, "--qformer_name_or_path", str(pretrained)]


def qformer_of_recipe(recipe: str) -> str:
    """Return the `--qformer_config` of a recipe as JSON, so that all captioners have the same Q-Former."""
    from qformer_captioner.train_hf import expand_recipes

    _, words = expand_recipes(["--recipe", recipe])
    return words[words.index("--qformer_config") + 1]


def with_first_weights(fields: dict[str, Any]) -> dict[str, Any]:
    """Return fields of a Q-Former together with the size of first weights that stage 1 gives it."""
    from qformer_captioner.pretraining_qformer import new_qformer_config

    config = new_qformer_config(fields, vocab_size=2)
    names = ("initializer_range", "attention_initializer_range")
    return fields | {name: getattr(config, name) for name in names}


def train(words: list[str], steps: int, output_dir: Path, *others: str) -> float:
    """Train in a process, and return the seconds that it used the processor."""
    command = [sys.executable, "-m", "qformer_captioner.train_hf", *words, "--max_steps", str(steps)]
    command += ["--output_dir", str(output_dir), "--save_strategy", "no", "--load_best_model_at_end", "false", *others]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    log = output_dir.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        subprocess.run(command, cwd=ROOT, check=True, stdout=file, stderr=subprocess.STDOUT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def seconds_of_a_step(words: list[str], output_dir: Path) -> float:
    """Return the seconds of the processor that a training step takes."""
    few, many = CALIBRATION_STEPS
    restart = ("--eval_strategy", "no", "--overwrite_output_dir")
    return (train(words, many, output_dir, *restart) - train(words, few, output_dir, *restart)) / (many - few)


# --- Runs -------------------------------------------------------------------------------------------------------------


def perform(run: Run, options: argparse.Namespace, speed: dict[str, float]) -> dict[str, Any]:
    """Train and score a captioner."""
    folder = Path(options.output_dir) / f"{run.arm.split(',')[0].replace(' ', '_')}_{run.seed}"
    itc_loss, pretrained, seconds, steps = ARMS[run.arm], None, 60 * run.minutes, {}
    if itc_loss is not None:
        pretrained = folder / "stage1"
        steps["stage_1_steps"] = round(run.stage_1_share * seconds / speed[itc_loss])
        train(
            stage_1_command(options, itc_loss, run.seed), steps["stage_1_steps"], pretrained, "--overwrite_output_dir"
        )
        seconds *= 1 - run.stage_1_share
    steps["stage_2_steps"] = round(seconds / speed["stage 2"])
    evaluation = ("--eval_strategy", "steps", "--eval_steps", str(steps["stage_2_steps"]), "--overwrite_output_dir")
    train(stage_2_command(options, pretrained, run.seed), steps["stage_2_steps"], folder / "stage2", *evaluation)
    history = json.loads((folder / "stage2" / "trainer_state.json").read_text())["log_history"]
    last = [entry for entry in history if "eval_loss" in entry][-1]
    return asdict(run) | steps | {name: last[f"eval_{name}"] for name in SCORES}


def measure_speed(options: argparse.Namespace) -> dict[str, float]:
    folder = Path(options.output_dir) / "speed"
    speed = {
        loss: seconds_of_a_step(stage_1_command(options, loss, 0), folder / loss) for loss in ("softmax", "sigmoid")
    }
    return speed | {"stage 2": seconds_of_a_step(stage_2_command(options, None, 0), folder / "stage_2")}


def print_table(results: list[dict[str, Any]]) -> None:
    print(f"{'':24}{'CIDEr':>16}{'BLEU-4':>16}{'loss':>8}{'shuffled':>10}  seeds")
    for arm in ARMS:
        own = [result for result in results if result["arm"] == arm]
        if own:
            cells = []
            for name in ("cider", "bleu_4"):
                values = [result[name] for result in own]
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                cells.append(f"{statistics.mean(values):.3f} ± {spread:.3f}")
            losses = [statistics.mean(result[name] for result in own) for name in ("loss", "loss_shuffled")]
            print(f"{arm:24}{cells[0]:>16}{cells[1]:>16}{losses[0]:8.3f}{losses[1]:10.3f}  {len(own)}")


def main() -> None:
    options = parse_options()
    file = RESULTS_DIR / "stages.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    runs = [
        Run(arm, seed, options.minutes, options.stage_1_share, options.stage_2_batch_size)
        for seed in options.seeds
        for arm in ARMS
    ]
    done = {Run(**{name: line[name] for name in Run.__dataclass_fields__}): line for line in lines}
    # All runs take the numbers of steps from one measurement, also after a pause.
    speed: dict[str, float] = next((done[run]["speed"] for run in runs if run in done), {})
    for run in runs:
        if run not in done:
            speed = speed or measure_speed(options)
            done[run] = perform(run, options, speed) | {"speed": speed} | machine_facts("torch", "transformers")
            write_result("stages", done[run])
            print_table([done[run]])
    print_table([done[run] for run in runs])


if __name__ == "__main__":
    main()
