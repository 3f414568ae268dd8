#!/usr/bin/env python
"""Score captions, or caption a benchmark and score the captions.

    python eval_captions.py --predictions results.json --references annotations.json --report report.html
    python eval_captions.py --model outputs/mine --benchmark coco_karpathy_test --output_dir outputs/coco
    python eval_captions.py --model outputs/mine --dataset_name my_folder --split dev --caption_column captions
    python eval_captions.py --model outputs/mine --features outputs/features --split test
    torchrun --nproc_per_node 2 eval_captions.py --model outputs/mine --benchmark flickr30k_karpathy_test

BLEU, ROUGE-L and CIDEr equal those of the COCO caption toolkit to 1e-12, without Java. Files may have any form that
training reads. A killed captioning run continues when the same command is given again.

Images that cannot be read and blank captions do not stop a run. They are counted and listed on the terminal or in the
file of scores. The exit status is then 1, and 0 with --allow_missing and --allow_empty.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qformer_captioner import __version__
from qformer_captioner.common.command import run_command
from qformer_captioner.common.errors import InputError, printable
from qformer_captioner.common.files import write_atomically
from qformer_captioner.common.logging import get_logger
from qformer_captioner.common.machine_faults import explain_faults
from qformer_captioner.common.option_parser import OptionParser
from qformer_captioner.data.caption_forms import VizWizRules
from qformer_captioner.evaluation.arguments import CaptioningArguments, ScoringArguments, check_arguments
from qformer_captioner.evaluation.caption_files import (
    ImageId,
    ReferenceSet,
    file_sha256,
    join,
    read_predictions,
    read_references,
    write_predictions,
)
from qformer_captioner.evaluation.scoring import FaultyImage, OpenImage, ScoredCaptions, score_captions
from qformer_captioner.metrics.tokenizers import describe_tokenizer

# Scoring files needs neither torch nor models nor data sets, which take seconds to import. Functions that need them
# import them.

logger = get_logger(__name__)

SHOWN_FAULTS = 5  # images named on the terminal if a file lists all


@dataclass
class EvaluationRun:
    """Captions, references and images to score, and where to write the results.

    Args:
        captions: the caption of each image.
        references: the references of the images.
        open_image: function that opens an image by its id, if the images are available.
        facts: facts that make the scores reproducible, such as hashes and revisions.
        output: JSON file for the scores.
        report: HTML file for the report.
        skipped: images that cannot be scored.

    Example:

    ```python
    >>> from qformer_captioner.eval_captions import EvaluationRun
    >>> from qformer_captioner.evaluation.caption_files import ReferenceSet
    >>> run = EvaluationRun({1: "a dog"}, ReferenceSet({1: ["a dog runs"]}), None, {}, "scores.json", None)
    >>> run.references.captions[1]
    ['a dog runs']
    ```
    """

    captions: dict[ImageId, str]
    references: ReferenceSet
    open_image: OpenImage | None
    facts: dict[str, Any]
    output: str | None
    report: str | None
    skipped: list[FaultyImage] = field(default_factory=list)


def evaluate(arguments: Sequence[str]) -> None:
    """Run the script on a command line.

    Args:
        arguments: the command line without the name of the program.

    Raises:
        InputError: for options, files or data that cannot be used. Also, after the results are written, for images that
            are not scored and for blank captions, unless the options accept them.
        OSError: for a file that cannot be written.
        ValueError: for options of `generate` that contradict each other.
    """
    scoring, captioning = parse_arguments(arguments)
    output = Path(scoring.output or "scores.json").parent if captioning.model is None else Path(captioning.output_dir)
    with explain_faults(output, "The captions so far are kept, and the same command continues."):
        run = read_files(scoring) if captioning.model is None else caption_data_set(captioning, scoring)
        if run is None:  # nothing to score in this process
            return
        scored = score(run, scoring)
        write_results(run, scored, scoring)
    report_faults(scored.skipped, scored.blank, scoring, run.output)


def parse_arguments(arguments: Sequence[str]) -> tuple[ScoringArguments, CaptioningArguments]:
    """Return the options of a command line after a check that all of them can be used."""
    parser = OptionParser((ScoringArguments, CaptioningArguments), __doc__)
    scoring, captioning = parser.parse(arguments)
    check_arguments(scoring, captioning, parser.changed_options(arguments))
    return scoring, captioning


def read_files(scoring: ScoringArguments) -> EvaluationRun:
    """Read the files of captions and references.

    Args:
        scoring: the options, which name the files.

    Raises:
        InputError: if an option or the folder of images is missing, or a file cannot be used.
        OSError: if a file cannot be read.
    """
    if scoring.predictions is None or scoring.references is None:
        raise InputError("Give both --predictions and --references.")
    rules = VizWizRules(scoring.ignore_rejected, scoring.ignore_precanned)
    references = read_references(scoring.references, rules)
    captions, references = join(read_predictions(scoring.predictions), references)
    return EvaluationRun(
        captions=captions,
        references=references,
        open_image=None if scoring.image_folder is None else open_in_folder(references, Path(scoring.image_folder)),
        facts=facts_of_files(scoring.predictions, scoring.references),
        output=scoring.output,
        report=scoring.report,
    )


def open_in_folder(references: ReferenceSet, folder: Path) -> OpenImage:
    """Return a function that opens an image in a folder, by its file name or id.

    Raises:
        InputError: if the folder does not exist.
    """
    if not folder.is_dir():
        raise InputError(f"There is no folder {str(folder)!r}: give the folder of the images with --image_folder.")
    from qformer_captioner.data.image_paths import ImageFolder
    from qformer_captioner.images_qformer import open_image

    images = ImageFolder(folder)
    return lambda image: open_image(images.locate(references.files.get(image, str(image))))


def caption_data_set(captioning: CaptioningArguments, scoring: ScoringArguments) -> EvaluationRun | None:
    """Caption a benchmark or data set in all processes of the run, and write captions and references.

    Returns:
        The captions to score. `None` in every process but the main one, and for a benchmark with hidden references.
    """
    from qformer_captioner.data.images import middle_frame
    from qformer_captioner.evaluation.captioning_run import caption_all, resolve_run

    run = resolve_run(captioning, scoring.image_folder, VizWizRules(scoring.ignore_rejected, scoring.ignore_precanned))
    logger.info("%s: %s.", run.name, run.images)
    captions, skipped = caption_all(run)
    if not run.state.is_main_process:
        return None
    folder = Path(captioning.output_dir)
    predictions_file, references_file = folder / "captions.json", folder / "references.json"
    write_predictions(captions, predictions_file)
    logger.info("The captions are in %s.", predictions_file)
    if not run.has_references:
        logger.info("The references of %s are hidden: upload this file to its evaluation server.", run.name)
        report_faults(skipped, [], scoring)
        return None
    references = run.images.references.select(list(captions))
    references.write(references_file)
    facts = {**run.facts(), **facts_of_files(str(predictions_file), str(references_file))}
    if (note := run.note(len(captions))) is not None:
        facts["note"] = note
    return EvaluationRun(
        captions=captions,
        references=references,
        open_image=None if run.images.rows is None else lambda image: middle_frame(run.images.open(image)),
        facts=facts,
        output=scoring.output or str(folder / "scores.json"),
        report=scoring.report or str(folder / "report.html"),
        skipped=skipped,
    )


def facts_of_files(predictions: str, references: str) -> dict[str, Any]:
    """Return names and hashes of the files of captions and references."""
    return {
        "references_file": references,
        "references_sha256": file_sha256(references),
        "predictions": predictions,
        "predictions_sha256": file_sha256(predictions),
    }


def score(run: EvaluationRun, scoring: ScoringArguments) -> ScoredCaptions:
    """Score the captions, and save the document frequencies of the references if the options say so."""
    return score_captions(
        run.captions,
        run.references,
        run.open_image,
        df=scoring.df,
        save_df=scoring.save_df,
        tokenize=scoring.tokenize,
        extra_metrics=scoring.extra_metrics or [],
        clip_model_name_or_path=scoring.clip_model_name_or_path,
        allow_missing=scoring.allow_missing,
        skipped=run.skipped,
    )


def write_results(run: EvaluationRun, scored: ScoredCaptions, scoring: ScoringArguments) -> None:
    """Print the table of scores, and write the JSON file and the report with the facts of the run."""
    if "note" in run.facts:
        print(run.facts["note"])
    print(scored.table())
    facts = {
        "images": len(scored.images),
        "references": sum(map(len, scored.references)),
        "tokenizer": describe_tokenizer(scored.tokenize),
        "df": "corpus" if scoring.df == "corpus" else f"{scoring.df}, sha256 {file_sha256(scoring.df)}",
        "scale": "bleu, rouge_l: 0 to 1; cider: 0 to 10 (CIDEr-D); tables: times 100",
        **run.facts,
        "version": __version__,
    }
    if run.output is not None:
        write_atomically(run.output, json.dumps(scored.to_json(facts, scoring.per_image), indent=2) + "\n")
        logger.info("The scores are in %s.", run.output)
    if run.report is not None:
        from qformer_captioner.evaluation.report import write_report

        write_report(run.report, scored, facts, run.open_image)
        logger.info("The report is in %s.", run.report)


def report_faults(
    skipped: list[FaultyImage], blank: list[FaultyImage], scoring: ScoringArguments, file: str | None = None
) -> None:
    """Name images that are not scored and blank captions: the first ones, or all if no file lists them.

    Args:
        skipped: images that are not scored.
        blank: images with an empty prediction or a blank reference.
        scoring: the options, which may accept them.
        file: file of scores, which lists all of them.

    Raises:
        InputError: for images or captions that the options do not accept; the message counts them.
    """
    for kind, images in {"Not scored": skipped, "Blank caption": blank}.items():
        shown = images if file is None else images[:SHOWN_FAULTS]
        for image in shown:
            logger.warning("%s: %s", kind, printable(image))
        if len(images) > len(shown):
            logger.warning("%s: %d more, which are listed in %s.", kind, len(images) - len(shown), file)
    faults = []
    if skipped and not scoring.allow_missing:
        faults.append(f"{len(skipped)} images are not scored (--allow_missing accepts this)")
    if blank and not scoring.allow_empty:
        faults.append(f"{len(blank)} images have a blank caption (--allow_empty accepts this)")
    if faults:
        raise InputError(f"The results are written, but {' and '.join(faults)}.")


def main() -> None:
    # `generate` raises ValueError for options that contradict each other.
    run_command(evaluate, expected=(ValueError, OSError))


if __name__ == "__main__":
    main()
