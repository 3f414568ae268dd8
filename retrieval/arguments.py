"""Options of `eval_retrieval.py`, and their checks."""

from collections.abc import Collection
from dataclasses import dataclass

from ..common.arguments import DTYPES, check_at_least, check_one_of, option
from ..common.errors import InputError, check_output
from ..evaluation.arguments import COLUMN_OPTIONS, DataSetArguments

RERANK_SCORES = ("sum", "match")


@dataclass
class RetrievalArguments(DataSetArguments):
    """Options for the model, its images and texts, and their ranking."""

    model: str | None = option(None, "Model of stage 1 (Hub id or folder).", "model")
    revision: str | None = option(None, "Branch, tag or commit of the model.", "model")
    dtype: str = option("auto", "Dtype of the model's weights; auto keeps the saved dtype.", "model")
    image_folder: str | None = option(None, "Folder that paths of images are relative to.", "data")
    max_length: int = option(35, "Largest number of tokens of a text; longer texts are cut.", "data")
    rerank_top_k: int | None = option(
        None,
        "Number of first candidates that matching ranks again; 0 ranks by contrast alone. The default is 128, or 0 for "
        "a model that was trained without matching.",
        "scoring",
    )
    rerank_score: str = option(
        "sum", "Score of these candidates: sum adds matching logit and similarity; match is matching alone.", "scoring"
    )
    fold_size: int | None = option(
        None,
        "Number of images of a fold, for scores that are means over folds; 0 for no folds. The default is 1,000 for "
        "COCO.",
        "scoring",
    )
    output: str | None = option(None, "JSON file for the scores, by default in the output folder.", "scoring")
    report: str | None = option(None, "HTML file for the report, by default in the output folder.", "scoring")
    allow_missing: bool = option(
        False, "Accept images that cannot be read or have no text: score the others.", "scoring"
    )
    batch_size: int = option(32, "Number of images in a batch.", "run")
    match_batch_size: int = option(256, "Number of pairs of an image and a text in a batch of matching.", "run")
    num_workers: int = option(0, "Number of processes that open images in advance.", "run")
    use_cpu: bool = option(False, "Run on the CPU even if there is a GPU.", "run")
    output_dir: str = option("outputs/retrieval", "Folder for progress, scores and report.", "run")
    overwrite_output_dir: bool = option(False, "Delete the run that the output folder holds.", "run")


def check_arguments(args: RetrievalArguments, changed: Collection[str]) -> None:
    """Check that all options can be used and that no option would be ignored.

    Args:
        args: the options.
        changed: names of the options that differ from their defaults.

    Raises:
        InputError: for the first option that cannot be used; the message names it.
    """
    if args.model is None:
        raise InputError("Say which model of stage 1 retrieves: --model.")
    check_at_least(args, 1, "max_samples", "batch_size", "match_batch_size")
    check_at_least(args, 0, "num_workers", "rerank_top_k", "fold_size")
    check_at_least(args, 3, "max_length")
    check_one_of(args, DTYPES, "dtype")
    check_one_of(args, RERANK_SCORES, "rerank_score")
    for path in (args.output, args.report):
        if path is not None:
            check_output(path)
    if args.benchmark is not None and (ignored := [name for name in COLUMN_OPTIONS if name in changed]):
        names = ", ".join(f"--{name}" for name in ignored)
        raise InputError(f"--benchmark defines its split and columns: leave out {names}.")
