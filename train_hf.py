#!/usr/bin/env python
r"""Train a Q-Former captioner.

    python train_hf.py                                    # recipes/scenes.yaml: needs no data and no network
    python train_hf.py --recipe flickr8k --dataset_name photographs
    python train_hf.py --vision_model_name_or_path facebook/dinov2-small \
        --language_model_name_or_path HuggingFaceTB/SmolLM2-135M \
        --dataset_name my_folder --caption_column text --output_dir outputs/mine

A recipe is a YAML file of the options below; it may begin with another, and several may be named (`--recipe clip_llama
coco_karpathy`). Options on the command line win over it. The folder that comes out opens with
`AutoModel.from_pretrained(folder, trust_remote_code=True)`. A killed run goes on when the same command is given again.
"""

import contextlib
import io
import os
import pickle
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import IntervalStrategy, set_seed
from transformers.trainer_utils import HubStrategy, SaveStrategy

from qformer_captioner.common.arguments import option
from qformer_captioner.common.errors import UNUSABLE, InputError, printable
from qformer_captioner.common.option_parser import OptionParser
from qformer_captioner.common.recipes import read_recipes, recipes_of
from qformer_captioner.common.run_folder import RunFolder, is_complete
from qformer_captioner.configuration_qformer import is_hub_id
from qformer_captioner.data.augmentation import Augmentation
from qformer_captioner.data.collator import CaptionCollator
from qformer_captioner.data.dataset import CaptionDataset
from qformer_captioner.data.feature_store import FeatureStore
from qformer_captioner.data.scenes import Scene, score_facts
from qformer_captioner.data.skipped_rows import SkippedRows
from qformer_captioner.hub.layout import pictures_of
from qformer_captioner.hub.push import publish
from qformer_captioner.metrics import CaptionMetrics
from qformer_captioner.modeling_qformer import QFormerCaptioner
from qformer_captioner.training.arguments import CaptionTrainingArguments, DataArguments, ModelArguments
from qformer_captioner.training.data_setup import check_data, load_data
from qformer_captioner.training.model_setup import (
    add_lora,
    build_model,
    check_model,
    read_quantization,
    save_base_model,
    standardize,
)
from qformer_captioner.training.run_facts import (
    describe_data,
    describe_evaluation,
    describe_machine,
    describe_options,
    describe_parts,
    shown_name,
)
from qformer_captioner.training.trainer import CaptionTrainer

# ----------------------------------------------------------------------------------------------------------------------
# Options
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class RunArguments:
    """What becomes of the output folder."""

    recipe: list[str] | None = option(
        None, "YAML files of options, or names of such in recipes/: later ones win, and the command line over all."
    )
    overwrite_output_dir: bool = option(False, "Throw away the run that is in the output folder.")
    include_backbones: str = option(
        "auto", "Put frozen backbones into the final folder: true, false, or auto for those from a local folder."
    )


def parse_options(words: list[str]) -> tuple[ModelArguments, DataArguments, RunArguments, CaptionTrainingArguments]:
    """The recipes' options, overridden by the command line's. With neither, the recipe is `scenes`."""
    parser, words = parser_and_words(words)
    return parser.parse(words)


def parser_and_words(words: list[str]) -> tuple[OptionParser, list[str]]:
    """The parser of all options, and a command line with its recipes written out."""
    classes = (ModelArguments, DataArguments, RunArguments, CaptionTrainingArguments)
    parser = OptionParser(classes, __doc__)
    if not words or not words[0].startswith("-"):  # `train_hf.py recipe.yaml`, as transformers' examples take a file
        words = ["--recipe", *(words or ["scenes"])]
    return parser, [*read_recipes(recipes_of(words), parser), *words]


# ----------------------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------------------


SCENE_SCORES = ("facts", "complete", "objects", "relations")  # of captions of drawn pictures
CAPTION_SCORES = ("cider", "bleu_4", "rouge_l")


def check_options(model_args: ModelArguments, training_args: CaptionTrainingArguments, scenes: bool) -> None:
    """Find what cannot work before anything is loaded or written.

    Raises:
        InputError: for such options.
    """
    pretrained = model_args.vision_model_name_or_path is not None and model_args.lora_r is None
    for part in ("vision_model", "language_model"):
        rate = getattr(training_args, f"{part}_learning_rate")
        if rate is not None and pretrained and getattr(model_args, f"freeze_{part}"):
            raise InputError(f"--{part}_learning_rate is of no use while it is frozen: add --freeze_{part} false.")
    if training_args.ema_decay is not None and not 0 < training_args.ema_decay < 1:
        raise InputError(f"--ema_decay must lie between 0 and 1, not {training_args.ema_decay:g}.")
    for name in (
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "generation_num_beams",
        "generation_max_length",
    ):
        if (value := getattr(training_args, name)) is not None and value < 1:
            raise InputError(f"--{name} is at least 1, not {value}.")
    if training_args.dataloader_num_workers < 0:
        raise InputError(f"--dataloader_num_workers is at least 0, not {training_args.dataloader_num_workers}.")
    for name in ("num_train_epochs", "learning_rate"):
        if not 0 <= (value := getattr(training_args, name)) < float("inf"):
            raise InputError(f"--{name} is a number from 0 on, not {value:g}.")
    if not 0 <= training_args.seed < 2**32:
        raise InputError(f"--seed is a number from 0 to 2**32 - 1, not {training_args.seed}.")
    asked = training_args.resume_from_checkpoint
    if asked is not None and not is_complete(Path(asked)):
        raise InputError(f"There is no whole checkpoint in {asked!r} (--resume_from_checkpoint).")
    if training_args.label_smoothing_factor:
        raise InputError("--label_smoothing_factor does not work here: the captioner computes its loss by itself.")
    score = training_args.metric_for_best_model.removeprefix("eval_")
    if score not in (known := ("loss", *(SCENE_SCORES if scenes else CAPTION_SCORES))):
        raise InputError(f"--metric_for_best_model is one of {', '.join(known)}, not {score!r}.")
    if training_args.push_to_hub and training_args.hub_strategy in (
        HubStrategy.CHECKPOINT,
        HubStrategy.ALL_CHECKPOINTS,
    ):
        raise InputError(
            f"--hub_strategy {training_args.hub_strategy.value} would publish what a run goes on from, pickles: it is "
            "every_save or end."
        )


def read_features(store: FeatureStore, model_args: ModelArguments, data_args: DataArguments) -> None:
    """Let the options say what a store of features says: which data set, which vision encoder.

    Raises:
        InputError: if other options ask for images.
    """
    if data_args.random_resized_crop_scale is not None or data_args.horizontal_flip_prob:
        raise InputError(
            "--random_resized_crop_scale and --horizontal_flip_prob change images, and --features has none any "
            "more: give them to precompute_features.py, with --views."
        )
    if not model_args.freeze_vision_model or model_args.vision_config is not None:
        raise InputError("With --features there is no vision encoder that could train.")
    if data_args.dataset_name is None:
        for option_name, key in (
            ("dataset_name", "name"),
            ("dataset_config_name", "config_name"),
            ("dataset_revision", "revision"),
            ("image_column", "image_column"),
            ("image_folder", "image_folder"),
        ):
            if store.dataset[key] is not None:
                setattr(data_args, option_name, [store.dataset[key]])
        data_args.split_column = store.dataset["split_column"]
    if model_args.language_model_name_or_path is not None and model_args.vision_model_name_or_path is None:
        model_args.vision_model_name_or_path = store.vision_model_name_or_path
        model_args.vision_model_revision = store.vision_model_revision


def count_in_steps(args: CaptionTrainingArguments) -> None:
    """Evaluate and save a stream every so many steps: it has no epochs."""
    for kind, strategy in (("eval", IntervalStrategy), ("save", SaveStrategy)):
        if getattr(args, f"{kind}_strategy") == "epoch":
            setattr(args, f"{kind}_strategy", strategy("steps"))
            setattr(args, f"{kind}_steps", max(1, args.max_steps // 10))
            print(f"A stream has no epochs: --{kind}_strategy is steps, --{kind}_steps {max(1, args.max_steps // 10)}.")


def train(words: list[str]) -> None:
    """Train the captioner that a command line asks for, and leave the folder that others load.

    First come the options, and whether the output folder is free for this run; one that holds it finished already is
    left as it is. Then data and captioner are loaded and tried on one row. Only now is anything written: the run claims
    its folder, and the Trainer trains from the beginning or from the last checkpoint. At the end captioner, pictures
    and card are written, and published with `--push_to_hub`. In a run of several processes each calls this.

    Args:
        words: the command line; without any, the recipe `scenes`.

    Raises:
        InputError: if options do not go together, something that they name cannot be loaded or used, the folder holds
            another run, or the Hub does not take the captioner; one sentence that names the option or the file.
        OSError: if the folder cannot be written.

    Example:

    ```python
    >>> train(["--recipe", "scenes", "--output_dir", "outputs/mine"])  # doctest: +SKIP
    ```
    """
    # 1. Options, and the folder that the run owns.
    model_args, data_args, run_args, training_args = parse_options(words)
    store = None
    if data_args.features is not None:
        store = FeatureStore(data_args.features)
        read_features(store, model_args, data_args)
    if data_args.dataset_name is None:
        raise InputError(
            "Say what to train on: --dataset_name (a Hub id, a local folder or file, or scenes), or a --recipe such as "
            "own_images; scenes is the one that runs without any option."
        )
    check_data(data_args, store, training_args.max_steps)
    if run_args.include_backbones not in ("auto", "true", "false"):
        raise InputError(f"--include_backbones must be auto, true or false, not {run_args.include_backbones!r}.")
    scenes = (data_args.eval_dataset_name or data_args.dataset_name[0]) == "scenes"
    if scenes and training_args.metric_for_best_model == "cider":  # which drawn pictures have not
        training_args.metric_for_best_model = "facts"
    check_model(model_args)
    check_options(model_args, training_args, scenes)
    folder = Path(training_args.output_dir)
    run = RunFolder(folder, {**asdict(model_args), **asdict(data_args)}, run_args.overwrite_output_dir)
    length = [training_args.num_train_epochs, training_args.max_steps]
    if run.finished is not None and length <= run.finished["length"]:
        epochs, steps = run.finished["length"]
        print(f"{folder} already holds this run, finished: {run.finished['summary']}.")
        if pictures := pictures_of(folder):
            print(f"Look at {' and '.join(str(folder / name) for name in pictures)}.")
        length = f"--max_steps {steps}" if steps > 0 else f"--num_train_epochs {epochs:g}"
        print(f"To train it longer, ask for more than {length}; to start afresh, add --overwrite_output_dir.")
        if training_args.push_to_hub and training_args.process_index == 0:  # the Hub may have failed at the end
            repo_id = publish(
                folder,
                training_args.hub_model_id or folder.absolute().name,
                private=training_args.hub_private_repo,
                revision=training_args.hub_revision,
                token=training_args.hub_token,
                commit_message="End of training",
            )
            print(f"It is on the Hub as {repo_id}.")
        return
    set_seed(training_args.seed)

    # 2. Data.
    skipped = SkippedRows()
    augmentation = Augmentation(
        data_args.random_resized_crop_scale,
        data_args.horizontal_flip_prob,
        data_args.captions_per_image,
        seed=training_args.seed,
        sample_view=True,
    )
    processes = (training_args.process_index, training_args.world_size)
    train_data, eval_data = load_data(data_args, store, skipped, augmentation, *processes)
    if data_args.streaming:
        count_in_steps(training_args)
    if eval_data is None:
        training_args.eval_strategy, training_args.load_best_model_at_end = "no", False
        print("There is no split to evaluate on, so nothing is held out and the last checkpoint counts.")
    elif len(eval_data) == 1:
        print("There is one image to evaluate on, and none to change it for: eval_loss_shuffled will be eval_loss.")

    # 3. Captioner.
    try:
        model = build_model(model_args, train_data.references(), load_vision_model=store is None)
        processor = model.processor
        prompts = model_args.prompt or ([""] if model_args.model_name_or_path is None else [])
        if model_args.use_chat_template:  # a captioner that exists may have its prompt from there already
            prompts = [processor.as_chat(prompt) for prompt in prompts]
        processor.prompt = prompts[0] if prompts else processor.prompt
        augmentation.prompts = prompts if len(prompts) > 1 else ()
        if store is not None:
            name, revision = model.config.vision_model_name_or_path, model.config.vision_model_revision
            store.check(name, revision, processor.image_processor)
        collate = CaptionCollator(processor, data_args.max_caption_length)
        with torch.no_grad():  # what cannot work, such as a prompt that is too long, should fail now
            model(**collate([next(iter(train_data))]))
    except (*UNUSABLE, OSError) as error:
        raise InputError(" ".join(str(error).split())) from error
    if training_args.fp16 and model.config.text_config.model_type in ("t5", "mt5", "umt5"):
        raise InputError("T5 overflows in float16 and trains to NaN. Use --bf16, or neither.")
    quantization = read_quantization(model, model_args, run_args.include_backbones)
    if quantization is not None and model_args.lora_r is None:
        model.quantize_language_model(quantization)

    # 4. Training.
    first = training_args.process_index == 0  # the process that writes
    checkpoint = training_args.resume_from_checkpoint or run.last_checkpoint
    if (
        model_args.normalize_image_features_samples is not None
        and model_args.model_name_or_path is None
        and checkpoint is None
    ):
        model.to(training_args.device)
        standardize(model, train_data, collate, model_args.normalize_image_features_samples)
    included = {"true": True, "false": False, "auto": model.local_backbones()}[run_args.include_backbones]
    if training_args.push_to_hub and run_args.include_backbones == "false" and model.local_backbones():
        raise InputError(
            "--include_backbones false leaves out backbones that only this machine has, so nobody could open what "
            "--push_to_hub publishes: leave one of them out."
        )
    wait_for_everyone = training_args.distributed_state.wait_for_everyone
    wait_for_everyone()  # nobody looks into the folder any more
    if first:
        run.start()
        skipped.write_to(folder / "skipped_rows.jsonl")
    wait_for_everyone()
    if model_args.lora_r is not None:
        if model_args.model_name_or_path is None:
            if first:
                save_base_model(model, folder / "base", included)
            wait_for_everyone()
            # From the root: peft writes the path down, and the adapter is opened from elsewhere.
            base = (folder / "base").absolute()
            model = QFormerCaptioner.from_pretrained(base, load_vision_model=store is None)
        if quantization is not None:
            model.quantize_language_model(quantization)
        model = add_lora(model, model_args)

    metrics = CaptionMetrics(keep_in_memory=True)  # processes of one run must not share its cache file

    def score(captions: list[str], rows: CaptionDataset) -> dict[str, float]:
        if scenes:
            return score_facts(captions, map(Scene.from_json, rows.column("scene")))
        scores = metrics.compute(predictions=captions, references=rows.references(), allow_empty=True)
        return {name: scores[name] for name in CAPTION_SCORES}

    parser, all_words = parser_and_words(words)
    facts = {
        "model": training_args.hub_model_id or shown_name(folder.absolute()),
        "starts_from": model_args.model_name_or_path if is_hub_id(model_args.model_name_or_path) else None,
        "parts": describe_parts(model),
        "data": describe_data(data_args, train_data),
        "options": describe_options(parser.changed_options(all_words)),
        **describe_machine(training_args.world_size),
    }
    if eval_data is not None:
        decoding = (training_args.generation_num_beams, training_args.generation_max_length)
        facts["evaluation"] = describe_evaluation(data_args, eval_data, processor.prompt, *decoding)
    if isinstance(model, PeftModel):
        base = facts["starts_from"] or "the captioner in base/"
        facts["adapter"] = {"base": base, "base_is_on_hub": is_hub_id(facts["starts_from"])}

    try:
        trainer = CaptionTrainer(
            model=model,
            args=training_args,
            train_dataset=train_data,
            eval_dataset=eval_data,
            data_collator=collate,
            score=score,
            include_backbones=included,
            facts=facts,
        )
    except InputError:
        raise
    except (ImportError, RuntimeError, ValueError) as error:  # such as a service to report to that is not installed
        raise InputError(" ".join(str(error).split())) from error
    if checkpoint is not None:
        print(f"Going on from {checkpoint}.")
    start = time.time()
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    except (pickle.UnpicklingError, SafetensorError) as error:  # torch's own words would advise to run what is in it
        raise InputError(f"The checkpoint {checkpoint} is cut off, or holds more than data. Delete it.") from error
    seconds = time.time() - start

    # 5. The folder that others load.
    weights = None
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:  # each process has a share of them
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    trainer.accelerator.wait_for_everyone()
    if not first:
        return
    training = {"steps": trainer.state.global_step, "epochs": trainer.state.epoch, "seconds": seconds}
    trainer.save_final_model(folder, weights, training={**training, "resumed": checkpoint is not None})
    trainer.save_state()
    speed = result.metrics["train_samples_per_second"]
    best = trainer.state.best_metric
    score_name = training_args.metric_for_best_model.removeprefix("eval_")
    summary = f"{seconds / 60:.1f} minutes, {speed:.1f} images/s"
    if best is not None:
        summary += f", best {score_name} {best:.3f} after step {trainer.state.best_global_step}"
    run.finish(length=length, summary=summary, seconds=seconds, images_per_second=speed, best={score_name: best})

    # 6. What came out.
    print(f"\nTrained in {summary}.")
    if len(skipped):
        print(f"{len(skipped)} rows could not be used; {skipped.path} says which and why.")
    kinds = {"captions.png": "its captions", "loss_curve.png": "its losses"}
    pictures = "".join(f", {kinds[name]} in {name}" for name in pictures_of(folder))
    print(f"The captioner is in {folder}{pictures}. To use it:\n")
    print("    from transformers import AutoModel")
    print(f"    model = AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True)")
    print('    print(model.caption("image.png"))')
    if training_args.push_to_hub:
        trainer.push_to_hub()
        print(f"\nIt is on the Hub as {trainer.hub_model_id}.")


def main() -> None:
    # Of several processes the first one speaks.
    silent = contextlib.redirect_stdout(io.StringIO()) if int(os.environ.get("RANK", 0)) else contextlib.nullcontext()
    try:
        with silent:
            train(sys.argv[1:])
    except (InputError, OSError) as error:
        raise SystemExit(f"error: {printable(error)}") from error
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from the last checkpoint.", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
