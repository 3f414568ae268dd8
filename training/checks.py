"""Checks of options before anything is loaded or written."""

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from transformers.trainer_utils import HubStrategy

from ..common.arguments import check_at_least, check_one_of
from ..common.errors import InputError
from ..common.run_folder import is_complete
from ..configuration_qformer import QFormerPretrainingConfig
from ..data.augmentation import check_image_augmentation
from .arguments import OBJECTIVES, DataArguments, ModelArguments, RunArguments, unread_options
from .scores import CAPTION_SCORES, RECALL_NAMES, SCENE_SCORES
from .training_arguments import QFormerTrainingArguments

EVAL_DATASET_OPTIONS = (  # each describes --eval_dataset_name with the prefix "eval_"
    "dataset_config_name",
    "dataset_revision",
    "image_column",
    "caption_column",
    "prompt_column",
    "image_folder",
)


def check_options(
    model_args: ModelArguments,
    data_args: DataArguments,
    run_args: RunArguments,
    training_args: QFormerTrainingArguments,
    changed_options: Iterable[str],
) -> None:
    """Check all options of a training run.

    Args:
        model_args, data_args, run_args, training_args: the options.
        changed_options: options whose values are not the defaults.

    Raises:
        InputError: for an option whose value is not valid, or options that contradict each other.
    """
    check_one_of(model_args, tuple(OBJECTIVES), "objective")
    check_are_read(changed_options, model_args.objective)
    if data_args.dataset_name is None:
        raise InputError(
            "There is no data set to train on: give --dataset_name (a Hub id, a local folder or file, or scenes) or a "
            "--recipe such as own_images. The recipe scenes needs no other option."
        )
    check_data(data_args, training_args.max_steps)
    check_one_of(run_args, ("auto", "true", "false"), "include_backbones")
    check_model(model_args)
    if model_args.objective == "pretrain":
        check_pretraining(model_args, training_args)
    else:
        check_captioner(model_args)
    if model_args.objective == "reward":
        check_rewards(model_args, data_args, training_args)
    check_learning_rates(model_args, training_args)
    check_training(training_args)
    check_best_model_score(training_args, known_scores(model_args, draws_scenes(data_args)))
    check_publishing(training_args)


def check_are_read(changed_options: Iterable[str], objective: str) -> None:
    """Check that no option is given that the objective does not read.

    Raises:
        InputError: if one is.
    """
    unread = unread_options(objective)
    if given := [f"--{name}" for name in changed_options if name in unread]:
        raise InputError(
            f"--objective {objective} does not read {', '.join(given[:8])}: leave out what it does not read."
        )


def draws_scenes(args: DataArguments) -> bool:
    """Return True if the run is evaluated on drawn scenes, whose captions are scored by the facts that they state."""
    name = args.eval_dataset_name or (args.dataset_name or [""])[0]
    return name == "scenes"


# ----------------------------------------------------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------------------------------------------------


def check_data(args: DataArguments, max_steps: int) -> None:
    """Check the options of the data.

    Args:
        args: the options.
        max_steps: number of training steps, or -1 if the number of epochs decides.

    Raises:
        InputError: for an option whose value is not valid, or options that contradict each other.
    """
    count, weights = len(args.dataset_name or []), args.dataset_weights
    if weights is not None and (len(weights) != count or not all(0 < weight < math.inf for weight in weights)):
        raise InputError(f"--dataset_weights must be {count} numbers above 0, one for each data set, not {weights}.")
    if args.features is not None and (args.streaming or count > 1 or args.eval_dataset_name is not None):
        raise InputError("--features works with one data set and without --streaming or --eval_dataset_name.")
    if args.streaming:
        check_streaming(args, max_steps)
    if args.eval_dataset_name is None:
        for name in EVAL_DATASET_OPTIONS:
            if getattr(args, f"eval_{name}") is not None:
                raise InputError(f"--eval_{name} describes --eval_dataset_name, which is missing: add it.")
    if args.eval_image_folder is not None and not os.path.isdir(args.eval_image_folder):
        raise InputError(f"There is no folder of images {args.eval_image_folder!r} (--eval_image_folder).")
    check_image_augmentation(args.random_resized_crop_scale, args.horizontal_flip_prob)
    check_at_least(args, 1, "captions_per_image", "max_train_samples", "max_eval_samples")
    check_share(args, "train_val_split")
    check_at_least(args, 2, "max_caption_length")  # a token and the end of the sequence
    check_at_least(args, 0, "shuffle_buffer", "max_skipped")


def check_streaming(args: DataArguments, max_steps: int) -> None:
    """Check that no option needs the length of a stream or all of its rows at once.

    Raises:
        InputError: for the first such option.
    """
    if max_steps < 1:
        raise InputError("A stream has no end: give the number of training steps with --max_steps.")
    if args.image_id_column is not None:
        raise InputError("--image_id_column needs all rows of a data set at once: leave it out, or --streaming.")
    if args.train_val_split is not None:
        raise InputError(
            "--train_val_split needs the number of rows, which a stream does not know: use --eval_dataset_name."
        )


def check_share(args: object, name: str) -> None:
    """Check that an option is a number between 0 and 1, or `None`.

    Raises:
        InputError: if it is not.
    """
    value = getattr(args, name)
    if value is not None and not 0 <= value <= 1:
        raise InputError(f"--{name} must be between 0 and 1, not {value:g}.")


# ----------------------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------------------


def check_model(args: ModelArguments) -> None:
    """Check the options of the model that every objective reads.

    Raises:
        InputError: for an option whose value is not valid.
    """
    check_at_least(args, 1, "num_frames")
    check_at_least(args, 2, "normalize_image_features_samples")  # the variance needs two images


def check_captioner(args: ModelArguments) -> None:
    """Check the options of a captioner.

    Raises:
        InputError: for an option whose value is not valid, or options that contradict each other.
    """
    check_at_least(args, 1, "lora_r")
    check_share(args, "lora_dropout")
    if args.lora_r is not None and not (args.freeze_vision_model and args.freeze_language_model):
        raise InputError("--lora_r trains adapters on frozen backbones: leave out --freeze_... false.")
    prompts = args.prompt or []
    if len(prompts) > 1 and not all(prompt.strip() for prompt in prompts):
        raise InputError("One of several prompts is empty: write some text in each --prompt.")
    if args.load_in_4bit and args.load_in_8bit:
        raise InputError("--load_in_4bit and --load_in_8bit exclude each other: choose one.")
    check_one_of(args, ("nf4", "fp4"), "bnb_4bit_quant_type")


def check_pretraining(args: ModelArguments, training_args: QFormerTrainingArguments) -> None:
    """Check the options of pretraining.

    Raises:
        InputError: for an option whose value is not valid, or options that contradict each other.
    """
    check_one_of(args, ("softmax", "sigmoid"), "itc_loss")
    check_at_least(args, 0, "itc_weight", "itm_weight", "itg_weight", "label_smoothing")
    check_at_least(args, 300, "tokenizer_vocab_size")  # all bytes, and special tokens
    for name in ("tokenizer_vocab_size", "tokenizer_lowercase"):
        source = "text_model_name_or_path" if args.text_model_name_or_path is not None else "model_name_or_path"
        if getattr(args, name) is not None and getattr(args, source) is not None:
            raise InputError(f"--{name} describes a new tokenizer, but --{source} has one: leave out one of the two.")
    compares = args.itc_weight != 0 or args.itm_weight != 0
    check_one_gpu(training_args, "pretraining")  # DataParallel would contrast only the rows of each GPU
    if compares and training_args.per_device_train_batch_size * training_args.world_size == 1:
        raise InputError(
            "A batch of one row has no wrong pairs to learn from: give --per_device_train_batch_size of at least 2, or "
            "--itc_weight 0 --itm_weight 0."
        )


def check_rewards(
    model_args: ModelArguments, data_args: DataArguments, training_args: QFormerTrainingArguments
) -> None:
    """Check the options of reward fine-tuning.

    Raises:
        InputError: for an option whose value is not valid, or options that contradict each other.
    """
    if model_args.model_name_or_path is None:
        raise InputError(
            "--objective reward improves a captioner that already writes captions: name it with --model_name_or_path."
        )
    if data_args.captions_per_image is not None:
        raise InputError(
            "--captions_per_image leaves out captions that rewards compare with: unset it with "
            "--captions_per_image null."
        )
    check_one_of(training_args, ("leave_one_out", "greedy"), "baseline")
    check_at_least(training_args, 2 if training_args.baseline == "leave_one_out" else 1, "num_generations")
    check_at_least(training_args, 1, "num_iterations")
    check_at_least(training_args, 0, "epsilon", "beta", "caption_loss_weight")
    if not 0 < training_args.temperature < math.inf:
        raise InputError(f"--temperature must be above 0, not {training_args.temperature:g}.")
    if training_args.num_iterations > 1 and data_args.streaming:
        raise InputError("--num_iterations above 1 reads a batch again, which a stream cannot: leave out --streaming.")
    check_one_gpu(training_args, "reward fine-tuning")


def check_one_gpu(args: QFormerTrainingArguments, what: str) -> None:
    """Check that the process does not distribute its batches to several GPUs itself.

    Raises:
        InputError: if it does.
    """
    if args.n_gpu > 1:
        raise InputError(
            f"This process has {args.n_gpu} GPUs, but {what} needs a process for each: start it with "
            f"torchrun --nproc_per_node {args.n_gpu}, or choose one GPU with CUDA_VISIBLE_DEVICES."
        )


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def check_learning_rates(model_args: ModelArguments, training_args: QFormerTrainingArguments) -> None:
    """Check that no learning rate is given for a frozen backbone.

    Raises:
        InputError: if one is.
    """
    if any((model_args.model_name_or_path, model_args.vision_config, model_args.text_config, model_args.lora_r)):
        return  # these options freeze nothing, and adapters train although the weights are frozen
    for part in ("vision_model", "language_model"):
        if getattr(training_args, f"{part}_learning_rate") is not None and getattr(model_args, f"freeze_{part}"):
            raise InputError(f"--{part}_learning_rate has no effect on a frozen backbone: add --freeze_{part} false.")


def check_training(args: QFormerTrainingArguments) -> None:
    """Check the options of training that the Trainer does not check.

    Raises:
        InputError: for an option whose value is not valid.
    """
    if args.ema_decay is not None and not 0 < args.ema_decay < 1:
        raise InputError(f"--ema_decay must lie between 0 and 1, not {args.ema_decay:g}.")
    check_at_least(
        args,
        1,
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "generation_num_beams",
        "generation_max_length",
    )
    check_at_least(args, 0, "dataloader_num_workers", "num_train_epochs", "learning_rate")
    if not 0 <= args.seed < 2**32:
        raise InputError(f"--seed must be between 0 and 2**32 - 1, not {args.seed}.")
    if args.resume_from_checkpoint is not None and not is_complete(Path(args.resume_from_checkpoint)):
        raise InputError(
            f"There is no complete checkpoint in {args.resume_from_checkpoint!r} (--resume_from_checkpoint)."
        )
    if args.label_smoothing_factor:
        raise InputError("--label_smoothing_factor does not work here: the model computes its own loss.")


def known_scores(model_args: ModelArguments, scenes: bool) -> tuple[str, ...]:
    """Return the losses and scores that an evaluation computes.

    Args:
        model_args: options of the model.
        scenes: whether the rows to evaluate on are drawn scenes.
    """
    if model_args.objective == "pretrain":
        return pretraining_scores(model_args)
    return ("loss", *(SCENE_SCORES if scenes else CAPTION_SCORES))


def pretraining_scores(weights: ModelArguments | QFormerPretrainingConfig) -> tuple[str, ...]:
    """Return the losses and scores that an evaluation of pretraining computes.

    Args:
        weights: options of the model, which may leave weights to the model, or its configuration.
    """
    losses = [f"{name}_loss" for name in ("itc", "itm", "itg") if getattr(weights, f"{name}_weight") != 0]
    return ("loss", *losses, *RECALL_NAMES)


def check_best_model_score(args: QFormerTrainingArguments, known: Sequence[str]) -> None:
    """Check that evaluation computes the score that selects the best checkpoint, if the options name one.

    Raises:
        InputError: if it does not.
    """
    if args.metric_for_best_model is not None and args.best_score_name not in known:
        raise InputError(f"--metric_for_best_model must be one of {', '.join(known)}, not {args.best_score_name!r}.")


def check_publishing(args: QFormerTrainingArguments) -> None:
    """Check that checkpoints are not published, because they hold pickles.

    Raises:
        InputError: if `--hub_strategy` asks for it.
    """
    strategy = HubStrategy(args.hub_strategy)
    if args.push_to_hub and strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        raise InputError(
            f"--hub_strategy {strategy.value} would publish checkpoints, which hold pickles: use every_save or end."
        )
