"""TODO."""

from dataclasses import dataclass, field

import torch
from transformers import Seq2SeqTrainingArguments

from ..common.arguments import option
from ..common.errors import InputError


@dataclass
class CaptionTrainingArguments(Seq2SeqTrainingArguments):
    """transformers' `Seq2SeqTrainingArguments` with a captioner's defaults; every field can be set as usual."""

    remove_unused_columns: bool = field(default=False, metadata={"help": "The images would be such a column."})
    learning_rate: float = field(default=1e-4, metadata={"help": "The highest learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The scheduler type to use."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps, or below 1 a share of all steps."})
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay for AdamW."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save: no, steps, epoch or best."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep, the best one apart."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "End with the best checkpoint."})
    metric_for_best_model: str | None = field(default="cider", metadata={"help": "The score that says which it is."})
    generation_max_length: int | None = field(default=30, metadata={"help": "Tokens of a caption in evaluation."})
    generation_num_beams: int | None = field(default=3, metadata={"help": "Beams in evaluation."})
    bag_of_words_loss_weight: float = field(
        default=0.0, metadata={"help": "Add so much of the word loss (training/bag_of_words.py) to the caption loss."}
    )
    vision_model_learning_rate: float | None = field(
        default=None, metadata={"help": "Of the vision encoder, where it trains; by default as all the rest."}
    )
    language_model_learning_rate: float | None = field(
        default=None, metadata={"help": "Of the language model or its LoRA adapters; by default as all the rest."}
    )
    language_projection_learning_rate: float | None = field(
        default=None, metadata={"help": "Of the linear layer behind the Q-Former; by default as all the rest."}
    )
    ema_decay: float | None = field(
        default=None, metadata={"help": "Evaluate and end with a moving average of the weights, such as 0.999."}
    )
    bf16: bool | None = field(
        default=None, metadata={"help": "Compute in bfloat16; by default where the GPU has it. Weights stay float32."}
    )

    def __post_init__(self):
        if self.bf16 is None:
            gpu = torch.cuda.is_available() and not self.use_cpu
            self.bf16 = gpu and not self.fp16 and torch.cuda.is_bf16_supported()
        super().__post_init__()
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()


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
    eval_dataset_config_name: str | None = option(None, "Which of its configurations.")
    eval_dataset_revision: str | None = option(None, "Its branch, tag or commit on the Hub.")
    eval_image_column: str | None = option(None, "Its column of images, or of paths; by default the first data set's.")
    eval_caption_column: str | None = option(None, "Its column of captions; by default the first data set's.")
    eval_image_folder: str | None = option(
        None, "Where paths in its image column start; by default as for the first data set."
    )
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
    train_val_split: float | None = option(
        None, "Where there is no split to evaluate on: hold out this share of the training rows, the last ones."
    )
    max_train_samples: int | None = option(None, "Train on so many rows of each data set; of scenes: draw so many.")
    max_eval_samples: int | None = option(None, "Evaluate on so many rows only; of scenes: draw so many.")
    random_resized_crop_scale: float | None = option(
        None, "Train on random crops that keep at least this share of an image's area; by default on whole images."
    )
    captions_per_image: int | None = option(
        None, "Draw so many captions of an image each time it is seen; by default train on all of them."
    )
    horizontal_flip_prob: float = option(
        0.0, "Train on images mirrored left to right with this probability (0.5, unless captions tell left from right)."
    )
    features: str | None = option(
        None, "Folder of precompute_features.py: train on what is in it, without the vision encoder in memory."
    )
    max_caption_length: int = option(64, "Cut longer captions to so many tokens.")


def of_each(args: DataArguments, name: str, default: str | None = None) -> list:
    """What an option says of each data set: it may be given once for all."""
    values = getattr(args, name) or [default]
    if len(values) not in (1, len(args.dataset_name)):
        raise InputError(
            f"--{name} has {len(values)} values for {len(args.dataset_name)} data sets: give one of each, or of all."
        )
    return values if len(values) > 1 else values * len(args.dataset_name)


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
    normalize_image_features_samples: int | None = option(
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
