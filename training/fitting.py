"""Steps around the Trainer: build the trainer, train, and write the final folder."""

import pickle
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from transformers.trainer_utils import TrainOutput

from ..common.errors import InputError, one_line
from ..common.logging import get_logger
from ..common.machine_faults import describe_fault
from ..data.collator import CaptionCollator, PretrainingCollator
from ..data.dataset import CaptionDataset
from ..modeling_qformer import QFormerCaptioner
from ..pretraining_qformer import QFormerForPretraining
from ..rewards import RewardContext, Rewards, load_rewards
from ..saving_qformer import QFormerPreTrainedModel
from .base_trainer import QFormerTrainer
from .data_setup import TrainingData
from .lora import captioner_of, without_adapters
from .pretraining_trainer import PretrainingTrainer
from .reward_trainer import RewardTrainer
from .run import TrainingRun
from .run_facts import describe_run, reward_names
from .sampling import end_tokens
from .scores import scorer_for
from .shared_setup import backbones_to_include
from .trainer import CaptionTrainer

if TYPE_CHECKING:
    from peft import PeftModel

logger = get_logger(__name__)


def build_trainer(
    run: TrainingRun,
    model: "QFormerPreTrainedModel | PeftModel",
    train_data: TrainingData,
    eval_data: CaptionDataset | None,
) -> CaptionTrainer | PretrainingTrainer:
    """Return the trainer of a run.

    Args:
        run: the run.
        model: the model, or the adapter on it.
        train_data: the rows to train on.
        eval_data: the rows to evaluate on, if there are any.

    Raises:
        InputError: if the Trainer refuses its options, for example because a package of `--report_to` is not installed.
            Also for FSDP with an encoder-decoder or in stage 1.
    """
    trainable, total = model.get_nb_trainable_parameters()
    logger.info("Trainable: %s of %s parameters (%.1f %%).", f"{trainable:,}", f"{total:,}", 100 * trainable / total)
    shared = {
        "args": run.training_args,
        "train_dataset": train_data,
        "eval_dataset": eval_data,
        "include_backbones": backbones_to_include(run, without_adapters(model)),
    }
    try:
        if isinstance(model, QFormerForPretraining):
            return _pretraining_trainer(run, model, shared)
        return _caption_trainer(run, model, shared)
    except InputError:
        raise
    except (ImportError, RuntimeError, ValueError) as error:
        raise InputError(one_line(error)) from error


def _caption_trainer(
    run: TrainingRun, model: "QFormerPreTrainedModel | PeftModel", shared: dict[str, Any]
) -> CaptionTrainer:
    captioner = captioner_of(model)
    assert captioner.processor is not None, "build_model checks it"
    score = scorer_for(run.draws_scenes, run.training_args.tokenize, shared["eval_dataset"])
    trainer_class: type[CaptionTrainer] = CaptionTrainer
    if run.objective == "reward":
        trainer_class = RewardTrainer
        shared = {**shared, "rewards": rewards_of_run(run, captioner, shared["train_dataset"])}
    trainer = trainer_class(
        model=model,
        data_collator=CaptionCollator(captioner.processor, run.data_args.max_caption_length),
        score=score,
        facts=describe_run(run, model, shared["train_dataset"], shared["eval_dataset"], score),
        **shared,
    )
    if trainer.is_fsdp_enabled and captioner.config.is_encoder_decoder:
        raise InputError(
            "FSDP cannot shard an embedding that encoder and decoder share, as in T5: train with "
            "recipes/accelerate/deepspeed_zero2.yaml or ddp.yaml instead."
        )
    if trainer.is_fsdp_enabled and run.objective == "reward":
        raise InputError(
            "FSDP shards weights that sampling needs at each token: train by rewards with "
            "recipes/accelerate/ddp.yaml instead."
        )
    return trainer


def rewards_of_run(run: TrainingRun, captioner: QFormerCaptioner, train_data: TrainingData) -> Rewards:
    """Load the rewards of a run.

    Args:
        run: the run. Its folder must exist.
        captioner: the captioner without adapters.
        train_data: the rows to train on.

    Raises:
        InputError: for an unknown reward, or one that cannot be loaded.
    """
    context = RewardContext(
        run_folder=run.output_dir,
        train_references=lambda: list(train_data.references()),
        eos_token_id=end_tokens(captioner),
        tokenize=run.training_args.tokenize,
        device=run.training_args.device,
    )
    with run.training_args.main_process_first(local=False):  # which writes the document frequencies of all
        return load_rewards(reward_names(run.training_args), run.training_args.reward_weights, context)


def _pretraining_trainer(run: TrainingRun, model: QFormerForPretraining, shared: dict[str, Any]) -> PretrainingTrainer:
    assert model.processor is not None, "build_model checks it"
    trainer = PretrainingTrainer(
        model=model,
        data_collator=PretrainingCollator(model.processor, run.data_args.max_caption_length),
        facts=describe_run(run, model, shared["train_dataset"], shared["eval_dataset"]),
        **shared,
    )
    if trainer.is_fsdp_enabled:
        raise InputError(
            "FSDP cannot shard a Q-Former of stage 1, whose layers run images and texts in one pass: train with "
            "recipes/accelerate/ddp.yaml instead."
        )
    return trainer


def fit(run: TrainingRun, trainer: QFormerTrainer) -> TrainOutput:
    """Train from the beginning or from the checkpoint of the run, and return steps, loss and speed.

    Raises:
        InputError: if the checkpoint is damaged or holds pickled objects.
    """
    if run.checkpoint is not None:
        logger.info("Resuming from %s.", run.checkpoint)
    try:
        return trainer.train(resume_from_checkpoint=run.checkpoint)
    except (pickle.UnpicklingError, SafetensorError) as error:  # torch's own message advises unsafe loading
        if run.checkpoint is None or describe_fault(error, run.output_dir):  # a checkpoint could not be written
            raise
        raise InputError(
            f"The checkpoint {run.checkpoint} is damaged, or holds more than tensors: delete it."
        ) from error


def finish(run: TrainingRun, trainer: QFormerTrainer, output: TrainOutput) -> str:
    """Write the final folder, record the end of the run, and return a summary of time, speed and best score.

    Every process calls this, because with FSDP and DeepSpeed each process holds a part of the weights.
    """
    weights = None
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    run.wait_for_everyone()
    seconds, speed = output.metrics["train_runtime"], output.metrics["train_samples_per_second"]
    score_name, best_score = run.training_args.best_score_name, trainer.state.best_metric
    unit = "images" if run.features is None else "rows"
    summary = f"{seconds / 60:.1f} minutes, {speed:.1f} {unit}/s"
    if best_score is not None:
        summary += f", best {score_name} {best_score:.3f} after step {trainer.state.best_global_step}"
    if run.is_main_process:
        training = {"steps": trainer.state.global_step, "epochs": trainer.state.epoch, "seconds": seconds}
        training["resumed"] = run.checkpoint is not None
        trainer.save_final_model(run.output_dir, weights, training=training)
        trainer.save_state()
        run.folder.finish(
            length=run.length,
            summary=summary,
            seconds=seconds,
            images_per_second=speed,
            best={score_name: best_score},
        )
    return summary
