#!/usr/bin/env python
r"""Train a Q-Former captioner, pretrain a Q-Former (stage 1 of BLIP-2), or improve a captioner by rewards.

    python train_hf.py                                    # recipes/scenes.yaml: needs no data and no network
    python train_hf.py --recipe flickr8k --dataset_name photographs
    python train_hf.py --vision_model_name_or_path facebook/dinov2-small \
        --language_model_name_or_path HuggingFaceTB/SmolLM2-135M \
        --dataset_name my_folder --caption_column text --output_dir outputs/mine
    python train_hf.py --recipe stage1_own_images --dataset_name photos/captions.csv
    python train_hf.py --vision_model_name_or_path facebook/dinov2-small \
        --language_model_name_or_path HuggingFaceTB/SmolLM2-135M --qformer_name_or_path outputs/stage1_own_images \
        --dataset_name photos/captions.csv --output_dir outputs/stage2  # begins with the Q-Former of stage 1
    python train_hf.py --recipe reward_own_images --model_name_or_path outputs/own_images

A recipe is a YAML file of the options below. It can build on other recipes, and several can be combined (`--recipe
clip_llama coco_karpathy`). The command line overrides recipes. `--help_all` also shows the Trainer's own options, such
as `--output_dir`, `--num_train_epochs` and `--per_device_train_batch_size`.

`AutoModel.from_pretrained(folder, trust_remote_code=True)` opens the output folder. The same command resumes a run that
was killed.
"""

import contextlib
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING

from qformer_captioner.common.command import run_command
from qformer_captioner.common.errors import InputError, one_line
from qformer_captioner.common.logging import get_logger
from qformer_captioner.common.machine_faults import explain_faults
from qformer_captioner.common.option_parser import OptionParser, asks_for_help
from qformer_captioner.common.recipes import read_recipes, recipes_of
from qformer_captioner.training.arguments import (
    DataArguments,
    ModelArguments,
    RunArguments,
    TrainingOptions,
)

# torch, the Trainer and the steps of a run are imported after the options are parsed, so that `--help` is quick.
if TYPE_CHECKING:
    from qformer_captioner.training.base_trainer import QFormerTrainer
    from qformer_captioner.training.run import TrainingRun
    from qformer_captioner.training.training_arguments import QFormerTrainingArguments

logger = get_logger(__name__)


def train(argv: list[str]) -> None:
    """Train the model that a command line describes, and write a folder that others can load.

    A finished run in the output folder is not repeated. Nothing is written before the data and the model are loaded
    and the first rows have been tried. Training then starts, or resumes from the last checkpoint. In a distributed run,
    every process calls this function.

    Args:
        argv: the command line without the name of the program. Without arguments the recipe is `scenes`.

    Raises:
        InputError: if options contradict each other, a model or data set cannot be loaded, or the output folder holds
            another run. Also if the disk is full or a worker is killed, or if the Hub refuses the model.
        OSError: if the output folder cannot be written.

    Example:

    ```python
    >>> train(["--recipe", "scenes", "--output_dir", "outputs/mine"])  # doctest: +SKIP
    ```
    """
    parser, words = expand_recipes(argv)
    model_args, data_args, run_args, training_args = parser.parse(words)

    from huggingface_hub.constants import HF_HOME
    from transformers import set_seed

    from qformer_captioner.training.data_setup import load_data
    from qformer_captioner.training.fitting import build_trainer, finish, fit
    from qformer_captioner.training.lora import with_adapters
    from qformer_captioner.training.model_setup import build_model
    from qformer_captioner.training.run import resolve

    run = resolve(model_args, data_args, run_args, training_args, parser.changed_options(words))
    if run.is_finished:
        report_finished(run)
        return
    set_seed(run.training_args.seed)
    with explain_faults(HF_HOME, "The environment variable HF_HOME names another folder for downloads."):
        train_data, eval_data = load_data(run)
        built = build_model(run, train_data, eval_data)
    with explain_faults(run.output_dir, "Complete checkpoints are kept, and the same command continues from the last."):
        run.claim_folder()
        model = with_adapters(run, built)
        trainer = build_trainer(run, model, train_data, eval_data)
        output = fit(run, trainer)
        summary = finish(run, trainer, output)
    if run.is_main_process:
        report(run, trainer, summary)


# ----------------------------------------------------------------------------------------------------------------------
# Options
# ----------------------------------------------------------------------------------------------------------------------


def parse_options(argv: list[str]) -> tuple[ModelArguments, DataArguments, RunArguments, "QFormerTrainingArguments"]:
    """Return the options of a command line and of the recipes that it names.

    Args:
        argv: the command line without the name of the program.

    Raises:
        InputError: for an option or a recipe that does not exist, or a value of the wrong type.
    """
    parser, words = expand_recipes(argv)
    return parser.parse(words)


def expand_recipes(argv: list[str]) -> tuple[OptionParser, list[str]]:
    """Return the parser of all options, and the command line preceded by the options of its recipes.

    Like the examples of transformers, `train_hf.py recipe.yaml` takes a file. Without arguments the recipe is `scenes`.
    """
    if not argv or not argv[0].startswith("-"):
        argv = ["--recipe", *(argv or ["scenes"])]
    if asks_for_help(argv):
        return option_parser(TrainingOptions), ["--help"]
    from qformer_captioner.training.training_arguments import QFormerTrainingArguments

    parser = option_parser(QFormerTrainingArguments)
    return parser, [*read_recipes(recipes_of(argv), parser), *argv]


def option_parser(training_options: type[TrainingOptions]) -> OptionParser:
    """Return the parser of this package's options and, through `QFormerTrainingArguments`, of the Trainer's."""
    return OptionParser((ModelArguments, DataArguments, RunArguments, training_options), __doc__, help_all=True)


# ----------------------------------------------------------------------------------------------------------------------
# Reports
# ----------------------------------------------------------------------------------------------------------------------


def report(run: "TrainingRun", trainer: "QFormerTrainer", summary: str) -> None:
    """Log where the model is and how to use it, and publish it with `--push_to_hub`.

    Raises:
        InputError: if the Hub refuses it.
    """
    from qformer_captioner.hub.layout import pictures_of

    logger.info("\nTrained in %s.", summary)
    if len(run.skipped_rows):
        logger.info("%d rows could not be used; %s lists them.", len(run.skipped_rows), run.skipped_rows.path)
    contents = {"captions.png": "captions", "samples.png": "samples and rewards"}
    contents |= {"retrieval.png": "retrieved captions", "loss_curve.png": "losses"}
    pictures = "".join(f", its {contents[name]} in {name}" for name in pictures_of(run.output_dir))
    logger.info("The %s is in %s%s. To use it:\n", name_of_model(run), run.output_dir, pictures)
    logger.info("    from transformers import AutoModel")
    logger.info("    model = AutoModel.from_pretrained(%r, trust_remote_code=True)", str(run.output_dir))
    logger.info("    print(%s)", usage_of(run))
    if run.objective == "pretrain":
        logger.info("\nTo train a captioner that begins with it, add --qformer_name_or_path %s.", run.output_dir)
    if run.training_args.push_to_hub:
        with explain_push(run, str(trainer.hub_model_id)):
            trainer.push_to_hub()
        logger.info("\nThe %s is on the Hub as %s.", name_of_model(run), trainer.hub_model_id)


def name_of_model(run: "TrainingRun") -> str:
    """Return what the run trains, in words."""
    return "pretrained Q-Former" if run.objective == "pretrain" else "captioner"


def usage_of(run: "TrainingRun") -> str:
    """Return an expression of Python that uses the model of a run."""
    reads_features = run.features is not None and run.features.vision is None
    if run.objective == "pretrain":
        image = "image_embeds=features, texts=" if reads_features else '"image.png", '
        return f'model.similarity({image}["a dog on the beach", "a red car"])'
    return "model.caption(image_embeds=features)" if reads_features else 'model.caption("image.png")'


def report_finished(run: "TrainingRun") -> None:
    """Log that the run is already finished, and publish it with `--push_to_hub`, in case an earlier upload failed.

    Raises:
        InputError: if the Hub refuses it.
    """
    from qformer_captioner.hub.layout import pictures_of
    from qformer_captioner.hub.push import publish

    finished, args = run.folder.finished or {}, run.training_args
    logger.info("%s already holds this run, finished: %s.", run.output_dir, finished["summary"])
    if pictures := pictures_of(run.output_dir):
        logger.info("Look at %s.", " and ".join(str(run.output_dir / name) for name in pictures))
    epochs, steps = finished["length"]
    length = f"--max_steps {steps}" if steps > 0 else f"--num_train_epochs {epochs:g}"
    logger.info("To train it longer, give more than %s. To start again, add --overwrite_output_dir.", length)
    if args.push_to_hub and run.is_main_process:
        name = args.hub_model_id or run.output_dir.absolute().name
        with explain_push(run, name):
            repo_id = publish(
                run.output_dir,
                name,
                private=args.hub_private_repo,
                revision=args.hub_revision,
                token=args.hub_token,
                commit_message="End of training",
            )
        logger.info("The %s is on the Hub as %s.", name_of_model(run), repo_id)


@contextlib.contextmanager
def explain_push(run: "TrainingRun", repo_id: str) -> Iterator[None]:
    """Add to an error of publishing that the model is kept, and the command that publishes it.

    Args:
        run: the finished run.
        repo_id: repository on the Hub.

    Raises:
        InputError: if publishing failed.
    """
    try:
        yield
    except (InputError, OSError) as error:
        command = ["qformer-captioner", "push", str(run.output_dir), repo_id]
        if run.training_args.hub_private_repo:
            command.append("--private")
        if run.training_args.hub_revision is not None:
            command += ["--revision", run.training_args.hub_revision]
        raise InputError(
            f"{one_line(error, 200)} The {name_of_model(run)} is kept in {str(run.output_dir)!r}; to publish it later: "
            f"{shlex.join(command)}"
        ) from error


def main() -> None:
    """Run the command line of this process."""
    run_command(train, interrupted="Stopped. The same command resumes from the last checkpoint.")


if __name__ == "__main__":
    main()
