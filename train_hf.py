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
import itertools
import json
import os
import pickle
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
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors import SafetensorError
from transformers import BitsAndBytesConfig, HfArgumentParser, IntervalStrategy, set_seed
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import is_bitsandbytes_available

from .backbones_qformer import dtype_of, is_frozen
from .captioning import UNUSABLE, InputError, printable
from .captioning.card import (
    describe_data,
    describe_evaluation,
    describe_machine,
    describe_options,
    describe_parts,
    pictures_of,
    shown_name,
)
from .captioning.data import CaptionCollator, CaptionDataset, SkippedRows, Variations
from .captioning.features import FeatureStore
from .captioning.metrics import CaptionMetrics
from .captioning.options import changed_options, make_parser, option, parse, read_recipes, recipes_of
from .captioning.push import publish
from .captioning.runs import RunFolder, is_complete
from .captioning.scenes import Scene, score_facts
from .captioning.scratch import build_from_scratch
from .captioning.trainer import CaptionTrainer, CaptionTrainingArguments
from .captioning.training_data import DataArguments, check_data, load_data
from .configuration_qformer import is_hub_id
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
    qformer_name_or_path: str | None = option(
        None, "A pretrained Q-Former to begin with: of a BLIP-2, an InstructBLIP, a captioner of ours, or a BERT."
    )
    qformer_revision: str | None = option(None, "Its branch, tag or commit.")
    qformer_tokenizer: str | None = option(
        None, "The tokenizer of a Q-Former that reads the prompt; by default the pretrained one's, else BERT's."
    )
    qformer_config: str | None = option(None, 'Fields of the Q-Former as JSON, such as {"num_query_tokens": 16}.')
    projection_per_query: bool = option(
        False, "Give each query a projection of its own into the language model; BLIP-2 has one for all."
    )
    standardize_features: int | None = option(
        None, "Let a fresh Q-Former see how images differ from the mean of so many images of the training data."
    )
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
    load_in_4bit: bool = option(False, "Keep the frozen language model in 4 bits; with --lora_r that is QLoRA.")
    load_in_8bit: bool = option(False, "Keep the frozen language model in 8 bits.")
    bnb_4bit_quant_type: str = option("nf4", "The 4 bits: nf4 or fp4.")
    use_bnb_nested_quant: bool = option(False, "Quantise the scales of the 4 bits, too.")


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
    return parse(*parser_and_words(words))


def parser_and_words(words: list[str]) -> tuple[HfArgumentParser, list[str]]:
    """The parser of all options, and a command line with its recipes written out."""
    classes = (ModelArguments, DataArguments, RunArguments, CaptionTrainingArguments)
    parser = make_parser(classes, __doc__)
    if not words or not words[0].startswith("-"):  # `train_hf.py recipe.yaml`, as transformers' examples take a file
        words = ["--recipe", *(words or ["scenes"])]
    return parser, [*read_recipes(recipes_of(words), parser), *words]


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
            projection_per_query=args.projection_per_query,
            qformer=args.qformer_name_or_path,
            qformer_revision=args.qformer_revision,
            qformer_tokenizer=args.qformer_tokenizer,
            **qformer_config,
        )
    name = args.model_name_or_path
    if os.path.isdir(name):  # peft writes it down for adapters, which are opened from elsewhere
        name = os.path.abspath(name)
    model = QFormerCaptioner.from_pretrained(name, load_vision_model=load_vision_model)
    if model.processor is None:
        raise InputError(f"The captioner {args.model_name_or_path!r} has no processor beside it.")
    return model


@torch.no_grad()
def standardize(model: QFormerCaptioner, rows: Iterable[dict], collate: CaptionCollator, number: int) -> None:
    """Fit a fresh Q-Former to the features of the first rows."""
    rows, features = itertools.islice(rows, number), []
    while some := list(itertools.islice(rows, 32)):
        batch = collate(some)
        embeds = batch.get("image_embeds")
        features.append(model.get_image_features(batch["pixel_values"].to(model.device)) if embeds is None else embeds)
    if sum(map(len, features)) < 2:  # the deviation of one is no number, and would become that of all weights
        raise InputError("--standardize_features needs two images or more.")
    model.qformer.standardize(torch.cat(features))


def keep_base(model: QFormerCaptioner, base: Path, included: bool | list[str]) -> None:
    """Save the fresh captioner that adapters are put on: they are nothing without it."""
    if base.exists():  # the run goes on
        return
    unfinished = base.with_suffix(".tmp")  # a kill while writing must not leave half of it
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished, include_backbones=included)
    unfinished.rename(base)


def read_quantization(
    model: QFormerCaptioner, args: ModelArguments, include_backbones: str
) -> BitsAndBytesConfig | None:
    """How the options want the language model quantised, if at all.

    Raises:
        InputError: if it cannot be, or the captioner could not be saved.
    """
    if not args.load_in_4bit and not args.load_in_8bit:
        return None
    if args.load_in_4bit and args.load_in_8bit:
        raise InputError("Choose between --load_in_4bit and --load_in_8bit.")
    if args.bnb_4bit_quant_type not in ("nf4", "fp4"):
        raise InputError(f"--bnb_4bit_quant_type must be nf4 or fp4, not {args.bnb_4bit_quant_type!r}.")
    if not is_bitsandbytes_available():
        raise InputError("--load_in_4bit and --load_in_8bit need bitsandbytes: pip install 'qformer-captioner[qlora]'.")
    if not is_frozen(model.language_model):
        raise InputError("A language model in 4 or 8 bits cannot train, only adapters on it can: leave it frozen.")
    named = model.config.language_model_name_or_path is not None
    if args.lora_r is None and (not named or include_backbones == "true"):  # an adapter refers to the whole captioner
        raise InputError(
            "Of a language model in 4 or 8 bits only the name can be saved, not the weights: leave out "
            "--include_backbones true, or add --lora_r."
        )
    return BitsAndBytesConfig(
        load_in_4bit=args.load_in_4bit,
        load_in_8bit=args.load_in_8bit,
        bnb_4bit_compute_dtype=dtype_of(model.language_model),
        bnb_4bit_quant_type=args.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=args.use_bnb_nested_quant,
    )


def add_lora(model: QFormerCaptioner, args: ModelArguments) -> PeftModel:
    """Put LoRA adapters on the language model; they, the Q-Former and the projection train and are saved together.

    On one in 4 bits as on any: peft's `prepare_model_for_kbit_training` would only turn what is frozen to float32.

    Raises:
        InputError: if the language model has no layers of the names asked for.
    """
    names = [name.strip() for name in (args.lora_target_modules or "").split(",") if name.strip()]
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
    layers = {name.split(".")[-1] for name, _ in model.language_model.named_modules()}
    if args.lora_target_modules and (unknown := [name for name in names if name.split(".")[-1] not in layers]):
        raise InputError(f"The language model has no layers named {' or '.join(unknown)} (--lora_target_modules).")
    model = get_peft_model(model, config)
    model.print_trainable_parameters()
    return model


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
    frozen = model_args.freeze_vision_model and model_args.freeze_language_model
    if model_args.lora_r is not None and model_args.lora_r < 1:
        raise InputError(f"--lora_r is the rank of the adapters and at least 1, not {model_args.lora_r}.")
    if not 0 <= model_args.lora_dropout <= 1:
        raise InputError(f"--lora_dropout is a probability, from 0 to 1, not {model_args.lora_dropout:g}.")
    if model_args.lora_r is not None and not frozen:
        raise InputError("--lora_r leaves the backbones frozen beside the adapters: leave out --freeze_... false.")
    pretrained = model_args.vision_model_name_or_path is not None and model_args.lora_r is None
    for part in ("vision_model", "language_model"):
        rate = getattr(training_args, f"{part}_learning_rate")
        if rate is not None and pretrained and getattr(model_args, f"freeze_{part}"):
            raise InputError(f"--{part}_learning_rate is of no use while it is frozen: add --freeze_{part} false.")
    if len(model_args.prompt or ()) > 1 and not all(prompt.strip() for prompt in model_args.prompt):
        raise InputError("One of several prompts is empty: give each some words.")
    if model_args.standardize_features is not None and model_args.standardize_features < 2:
        raise InputError(f"--standardize_features needs two images or more, not {model_args.standardize_features}.")
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
    if training_args.dataloader_drop_last:
        raise InputError("--dataloader_drop_last would leave out rows of the evaluation, too: leave it out.")
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
    # 1. Options, and the folder that the run owns.
    model_args, data_args, run_args, training_args = parse_options(words)
    store = None
    if data_args.features is not None:
        store = FeatureStore(data_args.features)
        read_features(store, model_args, data_args)
    if data_args.dataset_name is None:
        raise InputError("Say what to train on: --dataset_name (a Hub id, a local folder or file, or scenes).")
    check_data(data_args, store, training_args.max_steps)
    if run_args.include_backbones not in ("auto", "true", "false"):
        raise InputError(f"--include_backbones must be auto, true or false, not {run_args.include_backbones!r}.")
    scenes = (data_args.eval_dataset_name or data_args.dataset_name[0]) == "scenes"
    if scenes and training_args.metric_for_best_model == "cider":  # which drawn pictures have not
        training_args.metric_for_best_model = "facts"
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
    variations = Variations(
        data_args.smallest_crop, data_args.flip, data_args.captions_per_image, seed=training_args.seed, any_view=True
    )
    processes = (training_args.process_index, training_args.world_size)
    train_data, eval_data = load_data(data_args, store, skipped, variations, *processes)
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
        variations.prompts = prompts if len(prompts) > 1 else ()
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
    if model_args.standardize_features is not None and model_args.model_name_or_path is None and checkpoint is None:
        model.to(training_args.device)
        standardize(model, train_data, collate, model_args.standardize_features)
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
                keep_base(model, folder / "base", included)
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

    facts = {
        "model": training_args.hub_model_id or shown_name(folder.absolute()),
        "starts_from": model_args.model_name_or_path if is_hub_id(model_args.model_name_or_path) else None,
        "parts": describe_parts(model),
        "data": describe_data(data_args, train_data),
        "options": describe_options(changed_options(*parser_and_words(words))),
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
    trainer.save_for_others(folder, weights, training={**training, "resumed": checkpoint is not None})
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
