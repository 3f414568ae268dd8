"""Options of `qformer-captioner caption`, and their checks. Nothing here imports torch, so that `--help` is quick."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common.arguments import DTYPES, CommandParser, check_at_least
from ..common.errors import InputError, check_output
from ..common.ray_workers import check_single_process
from ..data.names import IMAGE_SUFFIXES
from .outputs import OUTPUTS
from .sidecars import EXISTING

ENGINES = ("local", "ray")
# Options of `generate`: name, type and meaning.
GENERATION: tuple[tuple[str, type, str], ...] = (
    ("max_new_tokens", int, "Largest number of tokens of a caption."),
    ("min_new_tokens", int, "Smallest number of tokens of a caption."),
    ("num_beams", int, "Number of beams."),
    ("temperature", float, "Divisor of the logits in sampling."),
    ("top_k", int, "Number of the likeliest tokens to sample from."),
    ("top_p", float, "Probability of the likeliest tokens to sample from."),
    ("repetition_penalty", float, "Penalty for tokens that the caption already has; 1 for none."),
    ("length_penalty", float, "Exponent of the length in the score of a beam."),
    ("no_repeat_ngram_size", int, "Size of the n-grams that may occur only once."),
    ("num_return_sequences", int, "Number of captions of each image."),
)
ENDINGS_OF_INPUTS = frozenset(IMAGE_SUFFIXES) | {".npy", ".tar", ".tgz", ".gz", ".parquet"}
MAX_SEED = 2**64 - 1
SAMPLING = ("temperature", "top_k", "top_p")
DATA_SET_OPTIONS = (
    "dataset_config_name",
    "dataset_revision",
    "split",
    "image_id_column",
    "image_folder",
    "allowed_image_folders",
    "streaming",
)


def parse_options(words: Sequence[str], description: str) -> argparse.Namespace:
    """Return the options of a command line.

    Args:
        words: the command line.
        description: text of `--help`.

    Raises:
        InputError: if an option does not exist, has a value that is not valid, or contradicts another.
    """
    options = make_parser(description).parse_args(words)
    check_options(options)
    return options


def make_parser(description: str) -> CommandParser:
    """Return the parser of the options."""
    parser = CommandParser(description=description)
    add = parser.add_argument
    add("images", nargs="*", metavar="IMAGE", help="File, folder, pattern, URL, .tar, .parquet or .npy; - for stdin.")
    add("--filelist", help="File with the name of an image on each line; - for stdin.")
    add("--dataset_name", help="Data set on the Hub, folder, or files of rows, as `train` reads them.")
    add("--dataset_config_name", help="Configuration of the data set.")
    add("--dataset_revision", help="Branch, tag or commit of the data set on the Hub.")
    add("--split", help="Split of the data set; by default all of them.")
    add("--image_column", default="image", help="Column of images or paths, of a data set or a parquet file.")
    add("--image_id_column", help="Column of ids; by default image_id or id, otherwise the file or number of the row.")
    add("--image_folder", help="Folder where the paths of the data set start; by default that of its files.")
    add("--allowed_image_folders", nargs="+", help="Further folders that paths of the data set may lead into.")
    add("--streaming", action="store_true", help="Read the data set on demand, and do not store it.")
    add("--model", required=True, help="Captioner, adapter or model of stage 1, as a Hub id or folder.")
    add("--revision", help="Branch, tag or commit of the model on the Hub.")
    add("--dtype", choices=DTYPES, default="auto", help="Dtype of the weights; auto keeps that of the files.")
    add("--prompt", help="Text that the captions continue; by default the captioner's own prompt.")
    for name, kind, meaning in GENERATION:
        add(f"--{name}", type=kind, help=f"{meaning[:-1]}; by default the captioner's own.")
    add("--do_sample", action="store_true", help="Sample the captions.")
    add("--seed", type=int, default=0, help="Seed of sampling.")
    add("--score", action="store_true", help="Add the mean log-likelihood of each caption per token, in nats.")
    add("--output", help=f"File for the captions, in the form of its ending: {', '.join(OUTPUTS)}.")
    add("--overwrite_output", action="store_true", help="Replace an existing output instead of continuing it.")
    add("--sidecar", metavar="SUFFIX", help="Write texts beside the images, with this suffix, such as .txt.")
    add("--existing", choices=EXISTING, default="skip", help="Treatment of images that have such a text.")
    add("--separator", default=" ", help="Text between an existing text and a caption that is appended or prepended.")
    add("--prefix", default="", help="Text in front of each caption.")
    add("--suffix", default="", help="Text behind each caption.")
    add("--batch_size", type=int, default=8, help="Number of images per batch.")
    add("--num_workers", type=int, default=2, help="Number of threads that open images, or of workers of --engine ray.")
    add("--engine", choices=ENGINES, default="local", help="Processes that caption: this one, or workers of Ray.")
    add("--gpus_per_worker", type=float, default=0, help="Number of GPUs of each worker of --engine ray, such as 0.5.")
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Check the options before anything is loaded.

    Raises:
        InputError: for the first mistake.
    """
    check_at_least(options, 1, "num_beams", "max_new_tokens", "num_return_sequences", "batch_size", "num_workers")
    check_at_least(options, 0, "min_new_tokens", "top_k", "top_p", "no_repeat_ngram_size", "seed", "gpus_per_worker")
    if options.seed > MAX_SEED:
        raise InputError(f"--seed must be at most {MAX_SEED}, not {options.seed}.")
    for name in ("temperature", "repetition_penalty"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"--{name} must be above 0, not {value}.")
    for name in SAMPLING:
        if getattr(options, name) is not None and not options.do_sample:
            raise InputError(f"--{name} belongs to sampling: add --do_sample, or leave it out.")
    captions = options.num_return_sequences or 1
    if captions > 1 and not options.do_sample and (options.num_beams or 1) < captions:
        raise InputError(f"--num_return_sequences {captions} needs --do_sample, or --num_beams of at least {captions}.")
    if options.engine == "ray":
        check_single_process()
    elif options.gpus_per_worker:
        raise InputError("--gpus_per_worker belongs to --engine ray: add it, or leave --gpus_per_worker out.")
    if not (options.images or options.filelist or options.dataset_name):
        raise InputError("Say which images to caption: name files or folders, or give --filelist or --dataset_name.")
    if [*options.images, options.filelist].count("-") > 1:
        raise InputError("The names of images can be read from stdin only once: give one -.")
    if not options.dataset_name:
        for name in DATA_SET_OPTIONS:
            if getattr(options, name):
                raise InputError(f"--{name} belongs to --dataset_name: name the data set, or leave it out.")
    if options.output is not None:
        check_output(options.output)
    if options.sidecar is not None and not re.fullmatch(r"\.[^/\\]+", options.sidecar):
        raise InputError(f"--sidecar must be a suffix such as .txt or .caption, not {options.sidecar!r}.")
    if options.sidecar is not None and Path(f"image{options.sidecar}").suffix.lower() in ENDINGS_OF_INPUTS:
        raise InputError(f"--sidecar {options.sidecar} would replace images or data by texts: use .txt or .caption.")
    if options.sidecar is None and options.existing != "skip":
        raise InputError(f"--existing {options.existing} belongs to --sidecar: add it, or leave --existing out.")


def generation_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `generate` that a command line sets."""
    given = {name: getattr(options, name) for name, *_ in GENERATION}
    generation = {name: value for name, value in given.items() if value is not None}
    return {**generation, "do_sample": True} if options.do_sample else generation


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that decide the captions and how they are written. A run continues only with the same ones."""
    names = ("model", "revision", "dtype", "prompt", "score", "prefix", "suffix", "sidecar", "existing", "separator")
    settings = {name: getattr(options, name) for name in names}
    settings |= generation_of(options)
    if options.do_sample:  # the images of a batch share the random numbers
        settings |= {"seed": options.seed, "batch_size": options.batch_size}
    return settings
