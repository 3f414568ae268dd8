"""Find the images of a folder that a text describes.

    qformer-captioner search "a dog in snow" photos
    qformer-captioner search "a red car" "two children" photos --model outputs/stage1 --top_k 5 --output page.html
    qformer-captioner search "a dog in snow" photos --model outputs/stage1 --rerank_top_k 64

The images in FOLDER and below it are encoded once. Later searches encode only images that are new or have changed, and
a killed search continues. Images that cannot be read are counted and named, and the others are searched.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..common.arguments import CommandParser, check_at_least
from ..common.command import run_command
from ..common.errors import InputError, check_output, printable
from ..common.logging import get_logger
from ..common.machine_faults import explain_faults

logger = get_logger(__name__)

DEFAULT_MODEL = "Salesforce/blip2-itm-vit-g"
SHOWN_FAULTS = 5  # images named on the terminal


def parse_options(words: Sequence[str]) -> argparse.Namespace:
    """Return the options of a command line.

    Raises:
        InputError: if an option does not exist or has a value that is not valid.
    """
    parser = CommandParser(description=__doc__)
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="Description of the images, such as a caption.")
    parser.add_argument("folder", metavar="FOLDER", help="Folder of the images.")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="Model of stage 1, as a Hub id or folder.")
    parser.add_argument("--revision", help="Branch, tag or commit of the model on the Hub.")
    parser.add_argument("--top_k", type=int, default=12, help="Number of images for each text.")
    parser.add_argument(
        "--rerank_top_k",
        type=int,
        default=0,
        help="Number of first images that matching ranks again; scores are then probabilities.",
    )
    parser.add_argument("--index", help="Folder of the index; by default it is in the cache folder of Hugging Face.")
    parser.add_argument("--output", help="HTML file for a page of the images that were found.")
    parser.add_argument("--batch_size", type=int, default=32, help="Number of images per batch.")
    parser.add_argument("--num_workers", type=int, default=0, help="Number of processes that open images in advance.")
    options = parser.parse_args(words)
    check_at_least(options, 1, "top_k", "batch_size")
    check_at_least(options, 0, "rerank_top_k", "num_workers")
    if 0 < options.rerank_top_k < options.top_k:
        raise InputError(
            f"--rerank_top_k {options.rerank_top_k} is less than the {options.top_k} images of --top_k: rank at least "
            "as many again as are shown, or give a smaller --top_k."
        )
    if options.output is not None:
        check_output(options.output)
    if not Path(options.folder).is_dir():
        raise InputError(f"There is no folder {options.folder!r}: give the folder of the images after the texts.")
    return options


def search(words: Sequence[str]) -> None:
    """Print the images that fit the texts of a command line, and write a page of them.

    Args:
        words: the command line.

    Raises:
        InputError: if an option, the model, the folder or a text cannot be used.
        OSError: if the index or the page cannot be written.
    """
    options = parse_options(words)

    # torch and the model take seconds to import.
    from transformers.utils.logging import disable_progress_bar

    from ..retrieval.index import open_index
    from ..retrieval.report import write_search_page

    disable_progress_bar()
    index = open_index(options.folder, options.model, options.revision, options.index)
    if options.rerank_top_k and index.model.model.config.itm_weight == 0:
        raise InputError(
            f"The model {options.model!r} was trained without matching (`itm_weight` is 0): leave out --rerank_top_k."
        )
    with explain_faults(index.folder, "Finished batches are kept, and the same command continues."):
        index.refresh(options.batch_size, options.num_workers)
    found = dict(zip(options.texts, index.search(options.texts, options.top_k, options.rerank_top_k), strict=True))
    for text, images in found.items():
        if len(found) > 1:
            print(printable_line(text))  # noqa: T201 -- the output of the command
        for path, score in images:
            print(f"{score:.3f}  {printable_line(str(Path(options.folder, path)))}")  # noqa: T201
    if options.output is not None:
        facts = {"model": options.model, "folder": options.folder, "images": len(index.paths)}
        write_search_page(options.output, found, index.open, facts)
    report_faults(index.unreadable)


def report_faults(unreadable: dict[str, str]) -> None:
    """Count the images that cannot be read, and name the first ones."""
    for path, reason in list(unreadable.items())[:SHOWN_FAULTS]:
        logger.warning("Not searched: %r: %s", path, printable(reason))
    if len(unreadable) > SHOWN_FAULTS:
        logger.warning("Not searched: %d images in all cannot be read.", len(unreadable))


def printable_line(text: str) -> str:
    """Return a text as one line in which every control character is escaped."""
    return printable(text).replace("\n", r"\n").replace("\t", r"\t")


def main() -> None:
    run_command(search)


if __name__ == "__main__":
    main()
