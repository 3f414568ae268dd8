"""Options of `eval_captions.py`, and their checks."""

from collections.abc import Collection
from dataclasses import dataclass, fields

from ..common.arguments import DTYPES, check_at_least, check_one_of, option
from ..common.errors import InputError, check_output
from ..metrics import DocumentFrequencies
from ..metrics.java import JAVA_METRICS
from .scoring import EXTRA_METRICS, check_extra_metrics

# Options that describe the columns of a data set. Benchmarks define their columns themselves.
COLUMN_OPTIONS = (
    "dataset_config_name",
    "dataset_revision",
    "split",
    "split_column",
    "image_column",
    "caption_column",
    "prompt_column",
    "image_id_column",
    "features",
)


@dataclass
class ScoringArguments:
    """Options for the captions to score and for the files of scores."""

    predictions: str | None = option(
        None,
        "Captions to score, in any form that training reads, such as COCO results or a table.",
        "scoring",
    )
    references: str | None = option(
        None, "References, in any form that training reads: COCO's or Karpathy's annotations, rows, tables.", "scoring"
    )
    ignore_rejected: bool = option(True, "Leave out references that VizWiz marks as rejected.", "data")
    ignore_precanned: bool = option(True, "Leave out references that VizWiz marks as precanned.", "data")
    image_folder: str | None = option(
        None,
        "Folder that paths of images are relative to. With --predictions, the report and CLIPScore need it.",
        "data",
    )
    output: str | None = option(None, "JSON file for the scores and for facts that make them reproducible.", "scoring")
    report: str | None = option(
        None, "HTML file for a report: scores, best and worst captions, and a searchable table.", "scoring"
    )
    per_image: bool = option(False, "Also write the scores of each image to the JSON file.", "scoring")
    allow_missing: bool = option(
        False,
        "Accept images without a prediction, and images that cannot be read or have no reference: score the others.",
        "scoring",
    )
    allow_empty: bool = option(
        False, "Accept empty predictions, which score 0, and blank references, which are left out.", "scoring"
    )
    tokenize: str | None = option(
        None,
        "Tokenizer of the scores: ptb (that of the COCO toolkit), characters, or a Hub id or folder. Default: ptb, but "
        "languages without spaces between words are refused.",
        "scoring",
    )
    df: str = option(
        "corpus",
        'Source of CIDEr\'s document frequencies: "corpus" for the references, or a file from --save_df.',
        "scoring",
    )
    save_df: str | None = option(
        None,
        "File (.json.gz) for the document frequencies of the references, for use with --df.",
        "scoring",
    )
    extra_metrics: list[str] | None = option(
        None,
        f"Metrics to add: {', '.join(EXTRA_METRICS)}. meteor and spice need Java; clip_score needs the images.",
        "scoring",
    )
    clip_model_name_or_path: str = option(
        "openai/clip-vit-base-patch32", "CLIP model of clip_score (Hub id or folder).", "scoring"
    )


@dataclass
class DataSetArguments:
    """Options for a benchmark or data set: its images, or their features, and its references."""

    benchmark: str | None = option(None, "Standard benchmark, such as coco_karpathy_test.", "data")
    dataset_name: str | None = option(
        None, "Your own data (Hub id, folder or file), or with --benchmark a copy of the benchmark.", "data"
    )
    features: str | None = option(
        None, "Folder of precomputed features to read. By default, its data set holds the references.", "data"
    )
    dataset_config_name: str | None = option(None, "Configuration of your data set.", "data")
    dataset_revision: str | None = option(None, "Branch, tag or commit of your data set on the Hub.", "data")
    split: str | None = option(
        None,
        "Split of your data set. The default is the first of test, validation, val and dev, or the only one.",
        "data",
    )
    split_column: str = option(
        "split", "Column that names the split of each row, for data sets that come as a single split.", "data"
    )
    image_column: str = option("image", "Column of the images, or of their paths.", "data")
    caption_column: str = option(
        "caption",
        "Column of the references: a string or a list of strings in each row. a,b are two columns. Default: caption, "
        "or a column of conversations.",
        "data",
    )
    image_id_column: str | None = option(
        None, "Column of image ids. Rows with the same id, by default the same file, describe one image.", "data"
    )
    allowed_image_folders: list[str] | None = option(
        None, "Further folders that paths of images may lead into; by default only the image folder.", "data"
    )
    max_samples: int | None = option(
        None, "Largest number of images to read. Scores of fewer images are not scores of the benchmark.", "data"
    )


@dataclass
class CaptioningArguments(DataSetArguments):
    """Options for the captioner, its images and its decoding."""

    model: str | None = option(
        None, "Captioner or model of stage 1 whose captions are scored (Hub id or folder).", "model"
    )
    revision: str | None = option(None, "Branch, tag or commit of the captioner.", "model")
    dtype: str = option("auto", "Dtype of the captioner's weights; auto keeps the saved dtype.", "model")
    prompt_column: str | None = option(
        None, "Column of prompts. Default: all images have the prompt of --prompt.", "data"
    )
    prompt: str | None = option(
        None, "Text that captions continue. The default is that of the benchmark or of the captioner.", "generation"
    )
    num_beams: int | None = option(
        None, "Number of beams. The default is that of the benchmark; 5 for your own data.", "generation"
    )
    max_new_tokens: int | None = option(
        None,
        "Largest number of tokens of a caption. The default is that of the benchmark; 30 for your own data.",
        "generation",
    )
    min_new_tokens: int | None = option(
        None,
        "Smallest number of tokens of a caption. The default is that of the benchmark; 0 for your own data.",
        "generation",
    )
    length_penalty: float | None = option(
        None,
        "Exponent of the length in the score of a beam; higher values give longer captions. The default is 1.",
        "generation",
    )
    batch_size: int = option(32, "Number of images in a batch.", "run")
    num_workers: int = option(0, "Number of processes that open images in advance.", "run")
    use_cpu: bool = option(False, "Run on the CPU even if there is a GPU.", "run")
    output_dir: str = option("outputs/eval", "Folder for captions, references, scores and report.", "run")
    overwrite_output_dir: bool = option(False, "Delete the run that the output folder holds.", "run")


def check_arguments(scoring: ScoringArguments, captioning: CaptioningArguments, changed: Collection[str]) -> None:
    """Check that all options can be used and that no option would be ignored.

    Args:
        scoring: the options of scoring.
        captioning: the options of captioning.
        changed: names of the options that differ from their defaults.

    Raises:
        InputError: for the first option that cannot be used; the message names it.
    """
    _check_what_to_score(scoring, captioning)
    check_at_least(captioning, 1, "max_samples", "num_beams", "max_new_tokens", "batch_size")
    check_at_least(captioning, 0, "min_new_tokens", "num_workers")
    check_one_of(captioning, DTYPES, "dtype")
    check_one_of(scoring, EXTRA_METRICS, "extra_metrics")
    if scoring.df != "corpus":
        DocumentFrequencies.load(scoring.df)
    for path in (scoring.output, scoring.report, scoring.save_df):
        if path is not None:
            check_output(path)
    if {*JAVA_METRICS} & {*(scoring.extra_metrics or [])} and scoring.tokenize not in (None, "ptb"):
        raise InputError("meteor and spice read English words only: leave out --tokenize, or these --extra_metrics.")
    has_images = captioning.model is not None or scoring.image_folder is not None
    check_extra_metrics(scoring.extra_metrics or [], has_images)
    if captioning.model is None:
        _refuse_ignored([each.name for each in fields(captioning)], changed, "--predictions holds finished captions")
    elif captioning.benchmark is not None:
        _refuse_ignored(COLUMN_OPTIONS, changed, "--benchmark defines its split and columns")


def _check_what_to_score(scoring: ScoringArguments, captioning: CaptioningArguments) -> None:
    has_predictions, has_references = scoring.predictions is not None, scoring.references is not None
    has_files = captioning.model is None  # captioning writes the files of predictions and references itself
    if has_predictions != has_files or has_references != has_files:
        raise InputError(
            "Say what to score: --predictions with --references, or --model with --benchmark, --dataset_name or "
            "--features."
        )


def _refuse_ignored(names: Collection[str], changed: Collection[str], reason: str) -> None:
    if ignored := [name for name in names if name in changed]:
        raise InputError(f"{reason}: leave out {', '.join(f'--{name}' for name in ignored)}.")
