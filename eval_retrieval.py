#!/usr/bin/env python
"""Score how well a model of stage 1 retrieves texts for images, and images for texts.

    python eval_retrieval.py --model outputs/stage1 --benchmark coco_karpathy_test --output_dir outputs/coco
    python eval_retrieval.py --model outputs/stage1 --dataset_name my_folder --split dev --caption_column captions
    python eval_retrieval.py --model outputs/stage1 --features outputs/features --split test --rerank_top_k 0
    torchrun --nproc_per_node 2 eval_retrieval.py --model outputs/stage1 --benchmark flickr30k_karpathy_test

Candidates are ranked by contrast, then the first ones again by matching. A killed run continues when the same command
is given again.

Images that cannot be read do not stop a run. They are counted, and listed on the terminal or in the file of scores. The
exit status is then 1, and 0 with --allow_missing.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qformer_captioner import __version__
from qformer_captioner.common.command import run_command
from qformer_captioner.common.errors import InputError, printable
from qformer_captioner.common.files import write_atomically
from qformer_captioner.common.logging import get_logger
from qformer_captioner.common.machine_faults import explain_faults
from qformer_captioner.common.option_parser import OptionParser
from qformer_captioner.retrieval.arguments import RetrievalArguments, check_arguments

if TYPE_CHECKING:
    from qformer_captioner.evaluation.scoring import FaultyImage
    from qformer_captioner.retrieval.run import RetrievalRun, Retrieved

# `--help` needs neither torch nor models nor data sets, which take seconds to import. Functions that need them import
# them.

logger = get_logger(__name__)

SHOWN_FAULTS = 5  # images named on the terminal


def evaluate(arguments: Sequence[str]) -> None:
    """Run the script on a command line.

    Args:
        arguments: the command line without the name of the program.

    Raises:
        InputError: for options, a model or data that cannot be used. Also, after the results are written, for images
            that are not scored, unless the options accept them.
        OSError: for a file that cannot be written.
    """
    args = parse_arguments(arguments)

    from qformer_captioner.retrieval.run import resolve_run, retrieve

    run = resolve_run(args)
    logger.info("%s: %s.", run.name, run.images)
    with explain_faults(run.folder, "Finished batches are kept, and the same command continues."):
        retrieved = retrieve(run)
        if retrieved is None:  # another process writes the results
            return
        write_results(run, retrieved)
    report_faults(retrieved.skipped, args.allow_missing)


def parse_arguments(arguments: Sequence[str]) -> RetrievalArguments:
    """Return the options of a command line after a check that all of them can be used."""
    parser = OptionParser((RetrievalArguments,), __doc__ or "")
    (args,) = parser.parse(arguments)
    check_arguments(args, parser.changed_options(arguments))
    return args


def write_results(run: "RetrievalRun", retrieved: "Retrieved") -> None:
    """Print the table of recalls, and write the JSON file and the report with the facts of the run."""
    from qformer_captioner.retrieval.report import write_report
    from qformer_captioner.retrieval.run import recalls_of, table_of

    corpus = retrieved.corpus
    rows = recalls_of(retrieved, run.fold_size)
    facts: dict[str, Any] = {
        "images": len(corpus.images),
        "texts": len(corpus.texts),
        "scale": "recall: 0 to 1; tables: percent",
        **run.facts(),
        "version": __version__,
    }
    if (note := run.note(len(corpus.images))) is not None:
        facts["note"] = note
        print(note)
    print(table_of(rows))
    output = Path(run.args.output or run.folder / "scores.json")
    content = {"scores": rows, **facts}
    if retrieved.skipped:
        content["skipped"] = list(map(asdict, retrieved.skipped))
    write_atomically(output, json.dumps(content, indent=2) + "\n")
    logger.info("The scores are in %s.", output)
    report = Path(run.args.report or run.folder / "report.html")
    write_report(report, run.images, retrieved, rows, facts)
    logger.info("The report is in %s.", report)


def report_faults(skipped: "list[FaultyImage]", allow_missing: bool) -> None:
    """Name the first images that are not scored; the file of scores lists all.

    Raises:
        InputError: if there are such images and the options do not accept them.
    """
    for image in skipped[:SHOWN_FAULTS]:
        logger.warning("Not scored: %s", printable(image))
    if len(skipped) > SHOWN_FAULTS:
        logger.warning("Not scored: %d more, which are listed in the file of scores.", len(skipped) - SHOWN_FAULTS)
    if skipped and not allow_missing:
        raise InputError(
            f"The results are written, but {len(skipped)} images are not scored (--allow_missing accepts this)."
        )


def main() -> None:
    """Run the command."""
    run_command(evaluate)


if __name__ == "__main__":
    main()
