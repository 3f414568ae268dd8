#!/usr/bin/env python
"""Train a Q-Former captioner.

    python train_hf.py                                    # recipes/scenes.yaml: needs no data and no network
    python train_hf.py --recipe flickr8k_words --dataset_name photographs
    python train_hf.py --vision_model_name_or_path facebook/dinov2-small \
        --language_model_name_or_path HuggingFaceTB/SmolLM2-135M \
        --dataset_name my_folder --caption_column text --output_dir outputs/mine

A recipe is a YAML file of the options below; options on the command line win over it. The folder that comes out opens
with `AutoModel.from_pretrained(folder, trust_remote_code=True)`. A killed run goes on when the same command is given
again.
"""

import contextlib
import io
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

if not __package__:  # run as a file of a checkout that need not be installed (PEP 366)
    import importlib.util

    _here = Path(__file__).resolve().parent
    _spec = importlib.util.spec_from_file_location(
        "qformer_captioner", _here / "__init__.py", submodule_search_locations=[str(_here)]
    )
    sys.modules["qformer_captioner"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["qformer_captioner"])
    __package__ = "qformer_captioner"

import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import HfArgumentParser, IntervalStrategy, set_seed
from transformers.trainer_utils import SaveStrategy

from .captioning import InputError
from .captioning.data import CaptionCollator, CaptionDataset, SkippedRows, Variations
from .captioning.features import FeatureStore
from .captioning.metrics import CaptionMetrics
from .captioning.mixing import CaptionMixture
from .captioning.options import make_parser, nearest_option, option, parse
from .captioning.runs import RunFolder
from .captioning.scenes import Scene, score_facts
from .captioning.scratch import build_from_scratch
from .captioning.sources import EVAL_SPLITS, folder_of_images, load_held_out, load_splits
from .captioning.streams import CaptionStream, StreamSource
from .captioning.trainer import CaptionTrainer, CaptionTrainingArguments
from .modeling_qformer import QFormerCaptioner

# ----------------------------------------------------------------------------------------------------------------------
# Options
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class ModelArguments:
    """Which captioner: one that exists, two pretrained backbones with a fresh Q-Former, or all from scratch."""

    model_name_or_path: str | None = option(None, "A captioner to go on training (Hub id or folder).")
    vision_model_name_or_path: str | None = option(None, "A pretrained vision encoder (Hub id or folder).")
    vision_model_revision: str | None = option(None, "Its branch, tag or commit.")
    language_model_name_or_path: str | None = option(None, "A pretrained language model (Hub id or folder).")
    language_model_revision: str | None = option(None, "Its branch, tag or commit.")
    vision_config: str | None = option(None, "From scratch: the vision encoder's configuration, as JSON.")
    text_config: str | None = option(None, "From scratch: the language model's configuration, as JSON.")
    qformer_config: str | None = option(None, 'Fields of the Q-Former as JSON, such as {"num_query_tokens": 16}.')
    freeze_vision_model: bool = option(True, "Keep a pretrained vision encoder as it is.")
    freeze_language_model: bool = option(True, "Keep a pretrained language model as it is.")
    dtype: str = option("auto", "Of pretrained backbones. auto: bfloat16 where the GPU has it, else float32.")
    prompt: list[str] | None = option(None, "Text between the image and the caption; of several, training draws one.")
    use_chat_template: bool = option(False, "Put the prompt into the language model's chat template, as a user's turn.")
    lora_r: int | None = option(None, "Train LoRA adapters of this rank on the language model, beside the Q-Former.")
    lora_alpha: int = option(32, "Scale of LoRA adapters; what they add counts alpha / r times.")
    lora_dropout: float = option(0.0, "Dropout in front of LoRA adapters.")
    lora_target_modules: str | None = option(
        None, "Which layers of the language model get them, such as q_proj,v_proj; by default peft's choice."
    )


@dataclass
class DataArguments:
    """Which captions of which images."""

    dataset_name: list[str] | None = option(
        None, 'Data sets: Hub ids, folders, files (parquet, JSON, CSV, tar; wildcards), or "scenes" for drawn pictures.'
    )
    dataset_weights: list[float] | None = option(None, "Of several: their shares of the rows; by default equal ones.")
    dataset_config_name: list[str] | None = option(None, "Which configuration of each, or of all.")
    dataset_revision: list[str] | None = option(None, "Branch, tag or commit of each on the Hub, or of all.")
    eval_dataset_name: str | None = option(None, "Evaluate on this data set; by default on the first one.")
    streaming: bool = option(False, "Read rows while training goes on, and keep none. Needs --max_steps.")
    shuffle_buffer: int = option(1000, "Shuffle so many rows of a stream among each other, and its files.")
    train_split: str = option("train", "The split to train on.")
    eval_split: str | None = option(None, "The split to evaluate on; by default validation, val, dev or test.")
    split_column: str = option("split", "Where one split holds all rows: the column that tells the splits.")
    image_column: list[str] | None = option(
        None, 'The column of images, or of paths, of each data set, or of all; by default "image".'
    )
    caption_column: list[str] | None = option(
        None, 'The column of captions: a string or a list in each row, also inside another (a.b). By default "caption".'
    )
    image_id_column: str | None = option(
        None, "Rows with the same value in this column are captions of one image: train on them in one pass."
    )
    image_folder: list[str] | None = option(
        None, "Where paths in the image column start, of each data set, or of all; by default where the file lies."
    )
    max_train_samples: int | None = option(None, "Train on so many rows of each data set; of scenes: draw so many.")
    max_eval_samples: int | None = option(None, "Evaluate on so many rows only; of scenes: draw so many.")
    smallest_crop: float | None = option(
        None, "Train on random crops that keep at least this share of an image's area; by default on whole images."
    )
    captions_per_image: int | None = option(
        None, "Draw so many captions of an image each time it is seen; by default train on all of them."
    )
    flip: float = option(
        0.0, "Train on images mirrored left to right with this probability (0.5, unless captions tell left from right)."
    )
    features: str | None = option(
        None, "Folder of precompute_features.py: train on what is in it, without the vision encoder in memory."
    )
    max_caption_length: int = option(64, "Cut longer captions to so many tokens.")


@dataclass
class RunArguments:
    """What becomes of the output folder."""

    recipe: str | None = option(None, "YAML file of options, or the name of one in recipes/. The command line wins.")
    overwrite_output_dir: bool = option(False, "Throw away the run that is in the output folder.")
    include_backbones: str = option(
        "auto", "Put frozen backbones into the final folder: true, false, or auto for those from a local folder."
    )


def read_recipe(name: str, parser: HfArgumentParser) -> list[str]:
    """A recipe as command-line words, which the parser then checks like any others.

    Raises:
        InputError: if there is no such recipe, it is no YAML mapping, or one of its fields is unknown.
    """
    folder = Path(__file__).parent / "recipes"
    path = Path(name) if Path(name).is_file() else folder / f"{Path(name).stem}.yaml"
    if not path.is_file():
        there = ", ".join(sorted(each.stem for each in folder.glob("*.yaml")))
        raise InputError(f"There is no recipe {name!r}. Give a YAML file, or one of {there}.")
    try:
        recipe = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise InputError(f"The recipe {str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise InputError(f"The recipe {str(path)!r} must be a list of `option: value` lines.")
    known = {action.dest for action in parser._actions}
    words = []
    for key, value in recipe.items():
        if key not in known:
            raise InputError(
                f"The recipe {str(path)!r} has an unknown field {key!r}. {nearest_option(parser, str(key))}"
            )
        if isinstance(value, dict):
            words += [f"--{key}", json.dumps(value)]
        elif isinstance(value, list):
            words += [f"--{key}", *map(str, value)]
        elif value is not None:
            words += [f"--{key}", str(value)]
    return words


def parse_options(words: list[str]) -> tuple[ModelArguments, DataArguments, RunArguments, CaptionTrainingArguments]:
    """The recipe's options, overridden by the command line's. With neither, the recipe is `scenes`."""
    classes = (ModelArguments, DataArguments, RunArguments, CaptionTrainingArguments)
    parser = make_parser(classes, __doc__.split("\n\n")[0])
    if words and not words[0].startswith("-"):  # `train_hf.py recipe.yaml`, as transformers' examples take a file
        words = ["--recipe", *words]
    recipe = words[words.index("--recipe") + 1] if "--recipe" in words[:-1] else None if words else "scenes"
    if recipe is not None:
        words = [*read_recipe(recipe, parser), *words, "--recipe", recipe]
    return parse(parser, words)


def as_config(text: str | None, name: str) -> dict:
    try:
        config = json.loads(text) if text else {}
    except json.JSONDecodeError as error:
        raise InputError(f"--{name} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise InputError(f'--{name} must be JSON fields and values, such as {{"hidden_size": 384}}, not {text}.')
    return config


# ----------------------------------------------------------------------------------------------------------------------
# The captioner
# ----------------------------------------------------------------------------------------------------------------------


def build_model(
    args: ModelArguments, train_captions: Iterable[list[str]], load_vision_model: bool = True
) -> QFormerCaptioner:
    """The captioner that the options ask for, if need be without its vision encoder.

    Raises:
        InputError: if they ask for none, or for two.
        OSError: if a pretrained part cannot be fetched.
    """
    backbones = [args.vision_model_name_or_path, args.language_model_name_or_path]
    configs = [args.vision_config, args.text_config]
    ways = [args.model_name_or_path is not None, any(backbones), any(configs)]
    if sum(ways) != 1 or (any(backbones) and not all(backbones)) or (any(configs) and not all(configs)):
        raise InputError(
            "Say which captioner to train: --model_name_or_path, or --vision_model_name_or_path with "
            "--language_model_name_or_path, or --vision_config with --text_config."
        )
    dtype = args.dtype
    if dtype == "auto":
        dtype = "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"
    prompt = args.prompt[0] if args.prompt else ""
    qformer_config = as_config(args.qformer_config, "qformer_config")
    if all(configs):
        return build_from_scratch(
            as_config(args.vision_config, "vision_config"),
            as_config(args.text_config, "text_config"),
            qformer_config,
            (caption for captions in train_captions for caption in captions),
            prompt=prompt,
        )
    if all(backbones):
        return QFormerCaptioner.from_backbones(
            *backbones,
            vision_revision=args.vision_model_revision,
            language_revision=args.language_model_revision,
            freeze_vision_model=args.freeze_vision_model,
            freeze_language_model=args.freeze_language_model,
            dtype=dtype,
            prompt=prompt,
            load_vision_model=load_vision_model,
            **qformer_config,
        )
    model = QFormerCaptioner.from_pretrained(args.model_name_or_path, load_vision_model=load_vision_model)
    if model.processor is None:
        raise InputError(f"The captioner {args.model_name_or_path!r} has no processor beside it.")
    model.processor.prompt = prompt or model.processor.prompt
    return model


def keep_base(model: QFormerCaptioner, base: Path, included: bool | list[str]) -> None:
    """Save the fresh captioner that adapters are put on: they are nothing without it."""
    if base.exists():  # the run goes on
        return
    unfinished = base.with_suffix(".tmp")  # a kill while writing must not leave half of it
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished, include_backbones=included)
    unfinished.rename(base)


def add_lora(model: QFormerCaptioner, args: ModelArguments) -> PeftModel:
    """Put LoRA adapters on the language model; they, the Q-Former and the projection train and are saved together.

    Raises:
        InputError: if the language model has no layers of the names asked for.
    """
    if args.lora_r < 1:
        raise InputError(f"--lora_r is the rank of the adapters and at least 1, not {args.lora_r}.")
    names = args.lora_target_modules.split(",") if args.lora_target_modules else None
    names = names or TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.text_config.model_type)
    if names is None:
        kind = model.config.text_config.model_type
        raise InputError(f"peft knows no usual layers of a {kind!r}: name them with --lora_target_modules.")
    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=rf"language_model\..*\.({'|'.join(map(re.escape, names))})",
        modules_to_save=["qformer", "language_projection"],
    )
    try:
        model = get_peft_model(model, config)
    except ValueError as error:
        raise InputError(f"The language model has no layers named {' or '.join(names)} ({error}).") from error
    model.print_trainable_parameters()
    return model


# ----------------------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------------------


def read_features(store: FeatureStore, model_args: ModelArguments, data_args: DataArguments) -> None:
    """Let the options say what a store of features says: which data set, which vision encoder.

    Raises:
        InputError: if other options ask for images.
    """
    if data_args.smallest_crop is not None or data_args.flip:
        raise InputError(
            "--smallest_crop and --flip change images, and --features has none any more: give them to "
            "precompute_features.py, with --views."
        )
    if not model_args.freeze_vision_model or model_args.vision_config is not None:
        raise InputError("With --features there is no vision encoder that could train.")
    if data_args.dataset_name is None:
        for option_name, key in (
            ("dataset_name", "name"),
            ("dataset_config_name", "config_name"),
            ("dataset_revision", "revision"),
            ("image_column", "image_column"),
        ):
            if store.dataset[key] is not None:
                setattr(data_args, option_name, [store.dataset[key]])
        data_args.split_column = store.dataset["split_column"]
    if model_args.language_model_name_or_path is not None and model_args.vision_model_name_or_path is None:
        model_args.vision_model_name_or_path = store.vision_model_name_or_path
        model_args.vision_model_revision = store.vision_model_revision


def of_each(args: DataArguments, name: str, default: str | None = None) -> list:
    """What an option says of each data set: it may be given once for all."""
    values = getattr(args, name) or [default]
    if len(values) not in (1, len(args.dataset_name)):
        raise InputError(
            f"--{name} has {len(values)} values for {len(args.dataset_name)} data sets: give one of each, or of all."
        )
    return values if len(values) > 1 else values * len(args.dataset_name)


def check_data(args: DataArguments, store: FeatureStore | None, training_args: CaptionTrainingArguments) -> None:
    """Find options that do not go together before anything is loaded."""
    sets, weights = len(args.dataset_name), args.dataset_weights
    if weights is not None and (len(weights) != sets or not all(0 < weight < float("inf") for weight in weights)):
        raise InputError(f"--dataset_weights must be {sets} numbers above 0, one for each data set, not {weights}.")
    if store is not None and (args.streaming or sets > 1):
        raise InputError("--features are of one data set, and not of a stream: leave out --features, or the others.")
    if args.streaming and training_args.max_steps < 1:
        raise InputError("A stream has no end: say how long to train on it with --max_steps.")
    if args.streaming and training_args.word_warmup_epochs > 1:
        raise InputError("A stream has no epochs: --word_warmup_epochs is a share of the run here, at most 1.")
    if args.streaming and args.image_id_column is not None:
        raise InputError("--image_id_column gathers rows from all of a data set, and a stream is never there in full.")
    if args.shuffle_buffer < 0:
        raise InputError(f"--shuffle_buffer is a number of rows, or 0 to keep their order, not {args.shuffle_buffer}.")


def load_data(
    args: DataArguments,
    store: FeatureStore | None,
    skipped: SkippedRows,
    variations: Variations,
    process: int = 0,
    processes: int = 1,
) -> tuple[CaptionDataset | CaptionMixture | CaptionStream, CaptionDataset | None]:
    """The rows to train on, and those to evaluate on if there are any.

    Raises:
        InputError: if they cannot be loaded.
    """
    parts, sources, evaluation = [], [], None
    names = args.dataset_name
    for number, (name, config, revision, image_column, caption_column, image_folder) in enumerate(
        zip(
            names,
            of_each(args, "dataset_config_name"),
            of_each(args, "dataset_revision"),
            of_each(args, "image_column", "image"),
            of_each(args, "caption_column", "caption"),
            of_each(args, "image_folder"),
            strict=True,
        )
    ):
        train_rows, eval_rows = load_splits(
            name,
            config,
            args.train_split,
            args.eval_split,
            args.split_column,
            args.max_train_samples,
            args.max_eval_samples,
            revision=revision,
            streaming=args.streaming,
            evaluate=number == 0 and args.eval_dataset_name is None,
        )
        folder = folder_of_images(name, train_rows, image_folder)
        label = args.train_split if len(names) == 1 else f"{args.train_split} of {name}"
        if args.streaming:
            sources.append(
                StreamSource(label, train_rows, image_column, caption_column, folder, args.max_train_samples)
            )
        else:
            features = store and store.split(args.train_split)
            columns = (image_column, caption_column, skipped, variations, features, args.image_id_column, folder)
            parts.append(CaptionDataset(train_rows, label, *columns))
        if number == 0:
            if args.eval_dataset_name is not None:
                eval_rows = load_held_out(
                    args.eval_dataset_name, args.eval_split, args.split_column, args.max_eval_samples, args.streaming
                )
                folder = folder_of_images(args.eval_dataset_name, eval_rows, image_folder)
            if eval_rows is not None:
                split = args.eval_split or "evaluation"
                if store is not None:
                    split = args.eval_split or next((name for name in EVAL_SPLITS if name in store.layouts), "dev")
                features = store and store.split(split)
                columns = (image_column, caption_column, skipped, None, features, args.image_id_column, folder)
                evaluation = CaptionDataset(eval_rows, split, *columns).readable()
    if args.streaming:
        stream = CaptionStream(
            sources, skipped, variations, args.dataset_weights, args.shuffle_buffer, process, processes
        )
        return stream, evaluation
    if len(parts) > 1:
        return CaptionMixture(parts, args.dataset_weights or [1.0] * len(parts)), evaluation
    return parts[0], evaluation


def count_in_steps(args: CaptionTrainingArguments) -> None:
    """Evaluate and save a stream every so many steps: it has no epochs."""
    for kind, strategy in (("eval", IntervalStrategy), ("save", SaveStrategy)):
        if getattr(args, f"{kind}_strategy") == "epoch":
            setattr(args, f"{kind}_strategy", strategy("steps"))
            setattr(args, f"{kind}_steps", max(1, args.max_steps // 10))
            print(f"A stream has no epochs: --{kind}_strategy is steps, --{kind}_steps {max(1, args.max_steps // 10)}.")


def train(words: list[str]) -> None:
    # 1. Options, and the folder that the run owns.
    model_args, data_args, run_args, training_args = parse_options(words)
    store = None
    if data_args.features is not None:
        store = FeatureStore(data_args.features)
        read_features(store, model_args, data_args)
    if data_args.dataset_name is None:
        raise InputError("Say what to train on: --dataset_name (a Hub id, a local folder or file, or scenes).")
    check_data(data_args, store, training_args)
    if run_args.include_backbones not in ("auto", "true", "false"):
        raise InputError(f"--include_backbones must be auto, true or false, not {run_args.include_backbones!r}.")
    if training_args.label_smoothing_factor:
        raise InputError("--label_smoothing_factor does not work here: the captioner computes its loss by itself.")
    folder = Path(training_args.output_dir)
    run = RunFolder(folder, {**asdict(model_args), **asdict(data_args)}, run_args.overwrite_output_dir)
    length = [training_args.num_train_epochs, training_args.max_steps]
    if run.finished is not None and length <= run.finished["length"]:
        print(
            f"{folder} already holds this run, finished: {run.finished['summary']}.\n"
            f"Look at {folder / 'captions.png'} and {folder / 'loss_curve.png'}. To train it longer, ask for more than "
            f"--num_train_epochs {training_args.num_train_epochs:g}; to start afresh, add --overwrite_output_dir."
        )
        return
    set_seed(training_args.seed)

    # 2. Data.
    skipped = SkippedRows()
    variations = Variations(
        data_args.smallest_crop, data_args.flip, data_args.captions_per_image, seed=training_args.seed
    )
    processes = (training_args.process_index, training_args.world_size)
    train_data, eval_data = load_data(data_args, store, skipped, variations, *processes)
    if data_args.streaming:
        count_in_steps(training_args)
    if eval_data is None:
        training_args.eval_strategy, training_args.load_best_model_at_end = "no", False
        print("There is no split to evaluate on, so nothing is held out and the last checkpoint counts.")

    # 3. Captioner.
    try:
        model = build_model(model_args, train_data.references(), load_vision_model=store is None)
        processor = model.processor
        if model_args.use_chat_template:
            processor.prompt = processor.as_chat(processor.prompt)
        if len(model_args.prompt or ()) > 1:
            variations.prompts = model_args.prompt
            if model_args.use_chat_template:
                variations.prompts = [processor.as_chat(prompt) for prompt in model_args.prompt]
        if store is not None:
            name, revision = model.config.vision_model_name_or_path, model.config.vision_model_revision
            store.check(name, revision, processor.image_processor)
        collate = CaptionCollator(processor, data_args.max_caption_length)
        with torch.no_grad():  # what cannot work, such as a prompt that is too long, should fail now
            model(**collate([next(iter(train_data))]))
    except (OSError, TypeError, ValueError) as error:
        raise InputError(" ".join(str(error).split())) from error
    if training_args.fp16 and model.config.text_config.model_type in ("t5", "mt5", "umt5"):
        raise InputError("T5 overflows in float16 and trains to NaN. Use --bf16, or neither.")

    # 4. Training.
    first = training_args.process_index == 0  # the process that writes
    checkpoint = training_args.resume_from_checkpoint or run.last_checkpoint
    included = {"true": True, "false": False, "auto": model.local_backbones()}[run_args.include_backbones]
    wait_for_everyone = training_args.distributed_state.wait_for_everyone
    wait_for_everyone()  # nobody looks into the folder any more
    if first:
        run.start()
        skipped.write_to(folder / "skipped_rows.jsonl")
    wait_for_everyone()
    if model_args.lora_r is not None:
        if model_args.model_name_or_path is None:
            if first:
                keep_base(model, folder / "base", included)
            wait_for_everyone()
            model = QFormerCaptioner.from_pretrained(folder / "base", load_vision_model=store is None)
        model = add_lora(model, model_args)

    metrics = CaptionMetrics(keep_in_memory=True)  # processes of one run must not share its cache file

    def score(captions: list[str], rows: CaptionDataset) -> dict[str, float]:
        if (data_args.eval_dataset_name or data_args.dataset_name[0]) == "scenes":
            return score_facts(captions, map(Scene.from_json, rows.column("scene")))
        scores = metrics.compute(predictions=captions, references=rows.references(), allow_empty=True)
        return {name: scores[name] for name in ("cider", "bleu_4", "rouge_l")}

    trainer = CaptionTrainer(
        model=model,
        args=training_args,
        train_dataset=train_data,
        eval_dataset=eval_data,
        data_collator=collate,
        score=score,
    )
    if checkpoint is not None:
        print(f"Going on from {checkpoint}.")
    start = time.time()
    result = trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.time() - start

    # 5. The folder that others load.
    trainer.accelerator.wait_for_everyone()
    if not trainer.is_world_process_zero():
        return
    if isinstance(model, PeftModel):
        model.save_pretrained(folder)
        model.processor.save_pretrained(folder)
    else:
        model.save_pretrained(folder, include_backbones=included)
    trainer.save_state()
    speed = result.metrics["train_samples_per_second"]
    best = trainer.state.best_metric
    score_name = training_args.metric_for_best_model.removeprefix("eval_")
    summary = f"{seconds / 60:.1f} minutes, {speed:.1f} images/s" + (f", best {score_name} {best:.3f}" if best else "")
    run.finish(length=length, summary=summary, seconds=seconds, images_per_second=speed, best={score_name: best})

    # 6. What came out.
    print(f"\nTrained in {summary}.")
    if len(skipped):
        print(f"{len(skipped)} rows could not be used; {skipped.path} says which and why.")
    print(f"The captioner is in {folder}, its captions in captions.png, its losses in loss_curve.png. To use it:\n")
    print("    from transformers import AutoModel")
    print(f"    model = AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True)")
    print('    print(model.caption("image.png"))')


def main() -> None:
    # Of several processes the first one speaks.
    silent = contextlib.redirect_stdout(io.StringIO()) if int(os.environ.get("RANK", 0)) else contextlib.nullcontext()
    try:
        with silent:
            train(sys.argv[1:])
    except (InputError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
