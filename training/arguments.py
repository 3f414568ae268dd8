"""Options of `train_hf.py` for the model, the data, the training and the output folder.

Nothing here imports torch or transformers, so that `--help` is quick. The Trainer's own options join in
`training_arguments.py`.
"""

from dataclasses import dataclass, fields

from ..common.arguments import option


@dataclass
class SharedModelOptions:
    """Options of the model that every objective reads."""

    objective: str = option(
        "caption",
        "Objective of training: caption (a captioner), pretrain (a Q-Former that matches images and texts, stage 1 of "
        "BLIP-2), or reward (a captioner that improves by rewards).",
        "model",
    )
    model_name_or_path: str | None = option(None, "Model to continue training, as a Hub id or folder.", "model")
    vision_model_name_or_path: str | None = option(None, "Pretrained vision encoder, as a Hub id or folder.", "model")
    vision_model_revision: str | None = option(None, "Branch, tag or commit of the vision encoder on the Hub.", "model")
    vision_config: str | None = option(
        None, "Configuration of a vision encoder to train from scratch, as JSON.", "model"
    )
    qformer_config: str | None = option(
        None, 'Fields of the Q-Former as JSON, such as {"num_query_tokens": 16}.', "model"
    )
    num_frames: int | None = option(
        None,
        "Largest number of frames to read of a video, which is a list of images in a row. Longer videos are sampled "
        "evenly. Default: that of the model, or 1 for a new one, which reads images.",
        "model",
    )
    normalize_image_features_samples: int | None = option(
        None, "Number of training images whose statistics normalise the image features of a new Q-Former.", "model"
    )
    freeze_vision_model: bool = option(True, "Freeze a pretrained vision encoder.", "model")
    dtype: str = option(
        "auto", "Dtype of pretrained backbones. auto is bfloat16 on GPUs that support it, otherwise float32.", "model"
    )


@dataclass
class NewCaptionerOptions:
    """Options of a new captioner, which only `--objective caption` reads."""

    language_model_name_or_path: str | None = option(None, "Pretrained language model, as a Hub id or folder.", "model")
    language_model_revision: str | None = option(
        None, "Branch, tag or commit of the language model on the Hub.", "model"
    )
    text_config: str | None = option(None, "Configuration of a language model to train from scratch, as JSON.", "model")
    qformer_name_or_path: str | None = option(
        None,
        "Checkpoint to initialise the Q-Former from: BLIP-2, InstructBLIP, Granite Speech, BERT or a captioner.",
        "model",
    )
    qformer_module_name: str | None = option(
        None, "Module to take of a checkpoint with several Q-Formers, which an error lists.", "model"
    )
    qformer_revision: str | None = option(None, "Branch, tag or commit of --qformer_name_or_path on the Hub.", "model")
    qformer_tokenizer: str | None = option(
        None,
        "Tokenizer of a Q-Former that reads the prompt. Default: that of --qformer_name_or_path, otherwise BERT's.",
        "model",
    )
    projection_per_query: bool = option(
        False, "Give each query token its own projection into the language model. BLIP-2 has one for all.", "model"
    )
    freeze_language_model: bool = option(True, "Freeze a pretrained language model.", "model")


@dataclass
class CaptionModelOptions:
    """Options of the model that training of captioners reads."""

    prompt: list[str] | None = option(
        None, "Text between image and caption. With several prompts, training draws one for each row.", "model"
    )
    use_chat_template: bool = option(
        False, "Wrap the prompt as a user turn in the language model's chat template.", "model"
    )
    lora_r: int | None = option(None, "Rank of LoRA adapters on the language model. Default: no adapters.", "model")
    lora_alpha: int = option(32, "Scale of the LoRA adapters, whose output is multiplied by alpha / r.", "model")
    lora_dropout: float = option(0.0, "Dropout probability in front of the LoRA adapters.", "model")
    lora_target_modules: str | None = option(
        None, "Layers that receive LoRA adapters, such as q_proj,v_proj. Default: peft's choice.", "model"
    )
    load_in_4bit: bool = option(
        False, "Quantise the frozen language model to 4 bits. With --lora_r this is QLoRA.", "model"
    )
    load_in_8bit: bool = option(False, "Quantise the frozen language model to 8 bits.", "model")
    bnb_4bit_quant_type: str = option("nf4", "Data type of 4-bit weights: nf4 or fp4.", "model")
    use_bnb_nested_quant: bool = option(False, "Quantise the scales of 4-bit weights as well.", "model")


@dataclass
class PretrainingModelOptions:
    """Options of the model that only `--objective pretrain` reads."""

    text_model_name_or_path: str | None = option(
        None,
        "BERT whose weights and tokenizer a new Q-Former begins with, as a Hub id or folder. Default: new weights, and "
        "a tokenizer of the training texts.",
        "model",
    )
    text_model_revision: str | None = option(None, "Branch, tag or commit of the BERT on the Hub.", "model")
    tokenizer_vocab_size: int | None = option(
        None, "Largest number of tokens of a new tokenizer. Default: 8192.", "model"
    )
    tokenizer_lowercase: bool | None = option(
        None, "Let a new tokenizer read all texts in lower case. Default: true.", "model"
    )
    image_text_hidden_size: int | None = option(
        None, "Width of the vectors of images and texts that are compared. Default: 256.", "model"
    )
    itc_loss: str | None = option(
        None,
        "Contrastive loss: softmax as in BLIP-2, or sigmoid as in SigLIP. Default: that of the model, or softmax for a "
        "new one.",
        "objective",
    )
    itc_weight: float | None = option(
        None, "Weight of the contrastive loss. Default: that of the model, or 1 for a new one.", "objective"
    )
    itm_weight: float | None = option(
        None, "Weight of the matching loss. Default: that of the model, or 1 for a new one.", "objective"
    )
    itg_weight: float | None = option(
        None, "Weight of the generation loss. Default: that of the model, or 1 for a new one.", "objective"
    )
    label_smoothing: float | None = option(
        None,
        "Label smoothing of the softmax and generation losses. Default: that of the model, or 0.1 for a new one.",
        "objective",
    )


@dataclass
class ModelArguments(PretrainingModelOptions, CaptionModelOptions, NewCaptionerOptions, SharedModelOptions):
    """Options of the model: an existing model, pretrained backbones, or a model from scratch."""


@dataclass
class SharedDataOptions:
    """Options of the data that every objective reads."""

    dataset_name: list[str] | None = option(
        None,
        'Data sets to train on: Hub ids, folders, files (parquet, JSON, CSV, tar; wildcards) or "scenes", which are '
        "drawn.",
        "data",
    )
    dataset_weights: list[float] | None = option(
        None, "Relative weights of several data sets in the training rows. Default: equal weights.", "data"
    )
    dataset_config_name: list[str] | None = option(
        None, "Configuration of the data set. Give one for each data set, or one for all.", "data"
    )
    dataset_revision: list[str] | None = option(
        None, "Branch, tag or commit of the data set on the Hub. Give one for each data set, or one for all.", "data"
    )
    image_column: list[str] | None = option(
        None, 'Column of images or of their paths, for each data set or for all. Default: "image".', "data"
    )
    caption_column: list[str] | None = option(
        None,
        "Column of captions, each a string or a list, for each data set or for all. a.b is the field b inside the "
        'column a. a,b are two columns of one data set. Default: "caption", or a column of conversations.',
        "data",
    )
    image_id_column: str | None = option(
        None, "Column that identifies the image. Rows with the same value become one row with all captions.", "data"
    )
    image_folder: list[str] | None = option(
        None, "Folder that paths in the image column are relative to. Default: the folder of the data set.", "data"
    )
    allowed_image_folders: list[str] | None = option(
        None, "Further folders that paths of images may lead into. Default: only the image folder.", "data"
    )
    ignore_rejected: bool = option(True, "Leave out captions that VizWiz marks as rejected.", "data")
    ignore_precanned: bool = option(True, "Leave out captions that VizWiz marks as precanned.", "data")
    train_split: str = option("train", "Split to train on.", "data")
    eval_split: str | None = option(
        None, "Split to evaluate on. Default: the first of validation, val, dev and test that exists.", "data"
    )
    split_column: str = option(
        "split", "Column that names the split of each row, for data sets that come as a single split.", "data"
    )
    train_val_split: float | None = option(
        None, "Share of the training rows to hold out for evaluation if there is no evaluation split.", "data"
    )
    eval_dataset_name: str | None = option(
        None, "Data set to evaluate on. Default: the first one of --dataset_name.", "data"
    )
    eval_dataset_config_name: str | None = option(None, "Configuration of --eval_dataset_name.", "data")
    eval_dataset_revision: str | None = option(None, "Branch, tag or commit of --eval_dataset_name on the Hub.", "data")
    eval_image_column: str | None = option(
        None, "Image column of --eval_dataset_name. Default: that of the first training data set.", "data"
    )
    eval_caption_column: str | None = option(
        None, "Caption column of --eval_dataset_name. Default: that of the first training data set.", "data"
    )
    eval_image_folder: str | None = option(
        None, "Image folder of --eval_dataset_name. Default: that of the first training data set.", "data"
    )
    max_train_samples: int | None = option(
        None, "Largest number of training rows of each data set. For scenes: number of pictures to draw.", "data"
    )
    max_eval_samples: int | None = option(
        None, "Largest number of evaluation rows. For scenes: number of pictures to draw.", "data"
    )
    max_skipped: float = option(
        0.1, "Largest share of rows, or number above 1, whose image may be unreadable before a run stops.", "data"
    )
    streaming: bool = option(False, "Stream the training rows instead of loading them. Needs --max_steps.", "data")
    shuffle_buffer: int = option(1000, "Size of the shuffle buffer of a stream, in rows. 0 keeps the order.", "data")
    features: str | None = option(
        None,
        "Folder of precomputed features, to train without a vision encoder in memory.",
        "data",
    )
    max_caption_length: int = option(64, "Largest number of tokens of a caption. Longer captions are cut.", "data")
    random_resized_crop_scale: float | None = option(
        None, "Smallest share of an image's area that a random crop keeps. Default: whole images.", "augmentation"
    )
    horizontal_flip_prob: float = option(
        0.0, "Probability of mirroring an image. Use 0 if captions mention left and right.", "augmentation"
    )
    captions_per_image: int | None = option(
        None, "Number of captions drawn each time an image is used. Default: all of them.", "augmentation"
    )


@dataclass
class CaptionDataOptions:
    """Options of the data that training of captioners reads."""

    prompt_column: list[str] | None = option(
        None, "Column of prompts, for each data set or for all. Default: all rows have the prompt of --prompt.", "data"
    )
    eval_prompt_column: str | None = option(
        None, "Prompt column of --eval_dataset_name. Default: that of the first training data set.", "data"
    )


@dataclass
class DataArguments(CaptionDataOptions, SharedDataOptions):
    """Options of the data: images and captions to train and evaluate on, and their augmentation."""


@dataclass
class SharedTrainingOptions:
    """Training options that every objective reads, and options of the Trainer with other defaults."""

    learning_rate: float = option(1e-4, "Peak learning rate.", "objective")
    vision_model_learning_rate: float | None = option(
        None, "Peak learning rate of a trainable vision encoder. Default: --learning_rate.", "objective"
    )
    lr_scheduler_type: str = option("cosine", "Learning-rate schedule, such as linear or cosine.", "objective")
    warmup_steps: float = option(0.05, "Number of warm-up steps. A value below 1 is a share of all steps.", "objective")
    weight_decay: float = option(0.05, "Weight decay of AdamW.", "objective")
    ema_decay: float | None = option(
        None, "Decay of an exponential moving average of the weights, such as 0.999. Default: no average.", "objective"
    )
    eval_strategy: str = option("epoch", "When to evaluate: no, steps or epoch.", "run")
    save_strategy: str = option("epoch", "When to save a checkpoint: no, steps, epoch or best.", "run")
    save_total_limit: int | None = option(2, "Number of checkpoints to keep, besides the best one.", "run")
    load_best_model_at_end: bool = option(True, "Load the best checkpoint at the end of training.", "run")
    metric_for_best_model: str | None = option(
        None,
        "Score or loss that selects the best checkpoint. Default: cider, facts with drawn scenes, or mean_recall with "
        "--objective pretrain (loss with --itc_weight 0).",
        "run",
    )
    logging_steps: float = option(10, "Number of steps between two log entries.", "run")
    bf16: bool | None = option(
        None,
        "Run the forward pass in bfloat16; trainable weights stay in float32. Default: on GPUs that support it.",
        "run",
    )


@dataclass
class CaptionTrainingOptions:
    """Training options that training of captioners reads."""

    language_model_learning_rate: float | None = option(
        None,
        "Peak learning rate of a trainable language model or of its LoRA adapters. Default: --learning_rate.",
        "objective",
    )
    language_projection_learning_rate: float | None = option(
        None, "Peak learning rate of the projection after the Q-Former. Default: --learning_rate.", "objective"
    )
    generation_max_length: int | None = option(
        30,
        "Largest number of tokens of a caption generated in evaluation, or sampled by --objective reward.",
        "generation",
    )
    generation_num_beams: int | None = option(3, "Number of beams in evaluation.", "generation")
    tokenize: str | None = option(
        None,
        "Tokenizer of the scores: ptb, characters, or a Hub id or folder. Default: ptb, or characters if the captions "
        "have no spaces between words.",
        "scoring",
    )


@dataclass
class CaptionLossOptions:
    """Training options that only `--objective caption` reads."""

    bag_of_words_loss_weight: float = option(
        0.0, "Weight of the bag-of-words loss, which is added to the caption loss.", "objective"
    )


@dataclass
class RewardTrainingOptions:
    """Training options that only `--objective reward` reads. trl's `RLOOConfig` has most of their names."""

    reward_funcs: list[str] | None = option(
        None,
        "Rewards of sampled captions: cider, bleu_4, clip_score[:MODEL], match:MODEL, length:WORDS, or "
        "FILE.py:FUNCTION. Default: cider.",
        "objective",
    )
    reward_weights: list[float] | None = option(None, "Weight of each reward in their sum. Default: 1.", "objective")
    num_generations: int = option(5, "Number of captions to sample for each image.", "objective")
    temperature: float = option(1.0, "Temperature of the samples.", "objective")
    baseline: str = option(
        "leave_one_out",
        "Value to subtract from a reward: leave_one_out, the mean reward of the other samples of the image, or greedy, "
        "the reward of its greedy caption.",
        "objective",
    )
    num_iterations: int = option(
        1, "Number of steps on the same samples. An epoch then has as many steps for each batch.", "objective"
    )
    epsilon: float = option(
        0.2, "Clip of the probability of a caption, relative to that at the time of sampling.", "objective"
    )
    beta: float = option(
        0.0, "Weight of the KL divergence from the captioner at the start, which is subtracted.", "objective"
    )
    caption_loss_weight: float = option(
        0.0, "Weight of the loss of the captions of the data set, which is added.", "objective"
    )


@dataclass
class TrainingOptions(RewardTrainingOptions, CaptionLossOptions, CaptionTrainingOptions, SharedTrainingOptions):
    """Training options of this package, and options of the Trainer with other defaults."""


# The options that not all objectives read. An objective refuses those that it does not read.
CAPTIONER_OPTIONS = (CaptionModelOptions, CaptionDataOptions, CaptionTrainingOptions)
OBJECTIVES: dict[str, tuple[type, ...]] = {
    "caption": (*CAPTIONER_OPTIONS, NewCaptionerOptions, CaptionLossOptions),
    "pretrain": (PretrainingModelOptions,),
    "reward": (*CAPTIONER_OPTIONS, RewardTrainingOptions),
}


def unread_options(objective: str) -> set[str]:
    """Return the names of the options that the objective does not read."""
    others = {each for classes in OBJECTIVES.values() for each in classes}.difference(OBJECTIVES[objective])
    return {field.name for each in others for field in fields(each)}


@dataclass
class RunArguments:
    """Options of the run: recipes and the output folder."""

    recipe: list[str] | None = option(
        None,
        "YAML files of options, or names of files in recipes/. Later recipes override earlier ones, and the command "
        "line overrides all.",
        "run",
    )
    overwrite_output_dir: bool = option(False, "Delete the run that the output folder holds and start again.", "run")
    include_backbones: str = option(
        "auto",
        "Store frozen backbones in the final folder: true, false, or auto for those loaded from a local folder.",
        "run",
    )
