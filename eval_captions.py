#!/usr/bin/env python
"""Score captions, or caption a benchmark and score that.

    python eval_captions.py --predictions results.json --references annotations.json --report report.html
    python eval_captions.py --model outputs/mine --benchmark coco_karpathy_test --output_dir outputs/coco
    python eval_captions.py --model outputs/mine --dataset_name my_folder --split dev --caption_column captions
    torchrun --nproc_per_node 2 eval_captions.py --model outputs/mine --benchmark flickr30k_karpathy_test

BLEU, ROUGE-L and CIDEr equal the COCO caption toolkit's to 1e-12, without Java. Files are COCO's JSON (annotations and
results) or JSON lines. A killed captioning run goes on when the same command is given again.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from qformer_captioner import __version__
from qformer_captioner.common.arguments import option
from qformer_captioner.common.command import run_command
from qformer_captioner.common.errors import InputError, check_output, printable
from qformer_captioner.common.option_parser import OptionParser
from qformer_captioner.evaluation.caption_files import (
    ImageId,
    ReferenceSet,
    file_sha256,
    in_order,
    read_predictions,
    read_references,
    write_predictions,
)
from qformer_captioner.metrics import DocumentFrequencies, References
from qformer_captioner.metrics.java import JAVA_METRICS, java_scorers

if TYPE_CHECKING:
    from qformer_captioner.modeling_qformer import QFormerCaptioner

# torch, the model and the data sets take seconds to import. Scoring files needs none of them, so what captions imports
# them where it starts.

OpenPicture = Callable[[ImageId], Image.Image]
NAMES = {"bleu_1": "BLEU-1", "bleu_2": "BLEU-2", "bleu_3": "BLEU-3", "bleu_4": "BLEU-4", "rouge_l": "ROUGE-L"}
NAMES |= {
    "cider": "CIDEr",
    "meteor": "METEOR",
    "spice": "SPICE",
    "clip_score": "CLIPScore",
    "ref_clip_score": "RefCLIPScore",
}

# ----------------------------------------------------------------------------------------------------------------------
# Options
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class ScoringArguments:
    """What to score, and where the scores go."""

    predictions: str | None = option(
        None, "Captions to score: COCO results JSON, or JSON lines with image_id, caption."
    )
    references: str | None = option(None, "Their references: COCO annotation JSON, or JSON lines with captions.")
    image_folder: str | None = option(
        None, "Where the images that the references name are, for pictures and CLIPScore."
    )
    output: str | None = option(None, "Write the scores, and what makes them reproducible, to this JSON file.")
    report: str | None = option(None, "Write a page to look at: scores, best and worst captions, a searchable table.")
    per_image: bool = option(False, "Put the scores of each image into the JSON file, too.")
    allow_missing: bool = option(False, "Score the images that have a prediction, though others have none.")
    allow_empty: bool = option(False, "Score empty predictions as 0 instead of refusing them.")
    df: str = option("corpus", "Document frequencies of CIDEr: those of the references, or a file of --save_df.")
    save_df: str | None = option(None, "Write the document frequencies of these references to this file (.json.gz).")
    extra_metrics: list[str] | None = field(
        default=None, metadata={"help": "More metrics: meteor, spice (need Java), clip_score (needs the images)."}
    )
    clip_model_name_or_path: str = option("openai/clip-vit-base-patch32", "The model of clip_score.")


@dataclass
class CaptioningArguments:
    """Which captioner captions what, and how."""

    model: str | None = option(None, "Caption with this captioner (Hub id or folder), then score.")
    revision: str | None = option(None, "Its branch, tag or commit.")
    benchmark: str | None = option(None, "A standard benchmark, such as coco_karpathy_test.")
    dataset_name: str | None = option(None, "Your own data (Hub id, folder or file), or a copy of the benchmark.")
    dataset_config_name: str | None = option(None, "Which of its configurations.")
    split: str | None = option(None, "Its split; by default test, validation, val or dev.")
    image_column: str = option("image", "The column of images, or of paths.")
    caption_column: str = option("caption", "The column of references: a string or a list of strings in each row.")
    id_column: str | None = option(None, "The column of ids; rows of one id (default: of one file) are of one image.")
    max_samples: int | None = option(None, "Caption so many images only: no score of the benchmark.")
    prompt: str | None = option(
        None, "Text that captions follow. Default: the benchmark's, of own data the captioner's."
    )
    num_beams: int | None = option(None, "Beams. Default: the benchmark's, of own data 5.")
    max_new_tokens: int | None = option(None, "Tokens of a caption at most. Default: the benchmark's, of own data 30.")
    min_new_tokens: int | None = option(None, "Tokens of a caption at least. Default: the benchmark's, of own data 0.")
    length_penalty: float | None = option(None, "Of beam search. Default: 1.")
    batch_size: int = option(32, "Images at a time.")
    num_workers: int = option(0, "Processes that open images ahead.")
    dtype: str = option("auto", "Of the captioner's weights; auto is as they were saved.")
    use_cpu: bool = option(False, "Leave the GPU alone.")
    output_dir: str = option("outputs/eval", "Folder of captions, references, scores and report.")
    overwrite_output_dir: bool = option(False, "Throw away what another run left in that folder.")


# ----------------------------------------------------------------------------------------------------------------------
# Scoring
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Scored:
    """Captions and references in the order of the images, and their scores."""

    images: list[ImageId]
    names: list[str]  # of the images' files, or their ids
    captions: list[str]
    references: list[list[str]]
    parts: dict[str, tuple[int, dict[str, float]]]  # number of images and scores: of all, then of each domain
    per_image: dict[str, list[float]]

    @property
    def scores(self) -> dict[str, float]:
        """Of all images."""
        return next(iter(self.parts.values()))[1]

    def table(self) -> str:
        """Scores times 100, a line for each part."""
        width = {name: len(NAMES[name]) + 3 for name in self.scores}
        lines = [f"{'':<12}{'images':>8}" + "".join(f"{NAMES[name]:>{width[name]}}" for name in self.scores)]
        for part, (count, scores) in self.parts.items():
            lines.append(
                f"{printable(part):<12}{count:>8}" + "".join(f"{100 * scores[n]:>{width[n]}.2f}" for n in scores)
            )
        return "\n".join(lines)


def score(
    predictions: dict[ImageId, str],
    references: ReferenceSet,
    args: ScoringArguments,
    open_picture: OpenPicture | None,
) -> Scored:
    """Score captions, those of each domain also by themselves: document frequencies are a domain's own there."""
    images = in_order(predictions, references, args.allow_missing, args.allow_empty)
    captions = [predictions[image] for image in images]
    own_references = [references.captions[image] for image in images]
    df = args.df if args.df == "corpus" else DocumentFrequencies.load(args.df)
    corpus = References(own_references, df)
    if args.save_df is not None:
        corpus.document_frequencies().save(args.save_df)
    scores = corpus.score(captions, per_image=True, allow_empty=args.allow_empty)
    per_image = scores.pop("per_image")
    parts = {"entire" if references.domains else "all": (len(images), scores)}
    for domain in sorted(set(references.domains.values())):
        inside = [place for place, image in enumerate(images) if references.domains.get(image) == domain]
        if inside:
            part = References([own_references[place] for place in inside], df)
            parts[domain] = len(inside), part.score([captions[p] for p in inside], allow_empty=args.allow_empty)
    for more in extra_scores(args, captions, own_references, images, open_picture):
        per_image |= more.pop("per_image")
        scores |= more
    names = [str(references.files.get(image, image)) for image in images]
    return Scored(images, names, captions, own_references, parts, per_image)


def extra_scores(
    args: ScoringArguments,
    captions: list[str],
    references: list[list[str]],
    images: list[ImageId],
    open_picture: OpenPicture | None,
) -> list[dict]:
    """METEOR, SPICE and CLIPScore, of those that were asked for."""
    wanted = args.extra_metrics or []
    scores = []
    if java := [metric for metric in JAVA_METRICS if metric in wanted]:
        from qformer_captioner.metrics import java_scores

        scores.append(java_scores(captions, references, java, True, args.allow_empty))
    if "clip_score" in wanted:
        from qformer_captioner.metrics import clip_scores

        pictures = (open_picture(image) for image in images)
        clip = args.clip_model_name_or_path
        scores.append(clip_scores(pictures, captions, references, clip, per_image=True, allow_empty=args.allow_empty))
    return scores


def write_scores(
    scored: Scored, args: ScoringArguments, about: dict[str, object], open_picture: OpenPicture | None
) -> None:
    """Print the table, and write scores and page where the options want them, with what makes them reproducible."""
    if "note" in about:
        print(about["note"])
    print(scored.table())
    facts = {
        "images": len(scored.images),
        "references": sum(map(len, scored.references)),
        "tokenizer": "PTB, as in the COCO caption toolkit, punctuation removed",
        "df": "corpus" if args.df == "corpus" else f"{args.df}, sha256 {file_sha256(args.df)}",
        "scale": "bleu, rouge_l: 0 to 1; cider: 0 to 10 (CIDEr-D); tables: times 100",
        **about,
        "version": __version__,
    }
    if args.output is not None:
        content: dict[str, object] = {"scores": scored.scores}
        if len(scored.parts) > 1:
            content["parts"] = {name: {"images": count, "scores": own} for name, (count, own) in scored.parts.items()}
        content |= facts
        if args.per_image:
            each = scored.per_image
            content["per_image"] = {
                str(image): {name: each[name][place] for name in each} for place, image in enumerate(scored.images)
            }
        Path(args.output).write_text(json.dumps(content, indent=2) + "\n")
        print(f"The scores are in {args.output}.")
    if args.report is not None:
        from qformer_captioner.evaluation.report import write_report

        write_report(args.report, scored, NAMES, facts, open_picture)
        print(f"To look at: {args.report}.")


def score_files(args: ScoringArguments) -> None:
    """Score a file of captions against a file of references."""
    references = read_references(args.references)
    about = {
        "references_file": args.references,
        "references_sha256": file_sha256(args.references),
        "predictions": args.predictions,
        "predictions_sha256": file_sha256(args.predictions),
    }
    open_picture = None
    if args.image_folder is not None:
        folder = Path(args.image_folder)
        if not folder.is_dir():
            raise InputError(f"There is no folder {args.image_folder!r}: --image_folder says where the images are.")
        from qformer_captioner.data.images import locate
        from qformer_captioner.processing_qformer import open_image

        def open_picture(image: ImageId) -> Image.Image:
            return open_image(locate(references.files.get(image, str(image)), folder))

    write_scores(score(read_predictions(args.predictions), references, args, open_picture), args, about, open_picture)


# ----------------------------------------------------------------------------------------------------------------------
# Captioning
# ----------------------------------------------------------------------------------------------------------------------


def versions_of(model: "QFormerCaptioner", name: str, revision: str | None) -> dict[str, object]:
    """What tells a captioner from others by the same name: the versions of all folders and repositories it came from.

    These are its own, that of the captioner which an adapter is on, and those of backbones that it refers to.
    """
    revisions = {model.name_or_path: None, name: revision}
    for part in model.config.referenced_backbones or []:
        source = getattr(model.config, f"{part}_name_or_path")
        revisions.setdefault(source, getattr(model.config, f"{part}_revision"))
    return {source: version_of(source, own) for source, own in revisions.items()}


def version_of(name: str, revision: str | None) -> object:
    """The commit of a repository, or sizes and times of a folder's weights and configurations."""
    from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, cached_file
    from transformers.utils.hub import extract_commit_hash

    if not Path(name).is_dir():
        found = cached_file(name, ADAPTER_CONFIG_NAME, revision=revision, _raise_exceptions_for_missing_entries=False)
        return extract_commit_hash(found or cached_file(name, CONFIG_NAME, revision=revision), None)
    files = sorted(file for kind in ("*.safetensors", "*.bin", "*config.json") for file in Path(name).glob(kind))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def caption_and_score(args: CaptioningArguments, scoring: ScoringArguments) -> None:
    """Caption a benchmark, by as many processes as there are, and score on one."""
    from datetime import timedelta

    import torch
    from accelerate import PartialState
    from transformers.utils.logging import disable_progress_bar

    from qformer_captioner.common.run_folder import RunFolder
    from qformer_captioner.data.images import folder_of_images
    from qformer_captioner.data.loading import load_rows
    from qformer_captioner.data.splits import default_eval_split
    from qformer_captioner.evaluation.benchmarks import (
        BENCHMARKS,
        benchmark_of,
        first_images,
        load_benchmark,
        load_evaluation_set,
    )
    from qformer_captioner.evaluation.inference import caption_images
    from qformer_captioner.hub.load import load_captioner

    if args.benchmark is None and args.dataset_name is None:
        raise InputError(f"Say what to caption: --dataset_name, or --benchmark {', '.join(BENCHMARKS)}.")
    protocol = None if args.benchmark is None else benchmark_of(args.benchmark)

    # 1. Processes. accelerate finds out by itself about every kind of processor but this one.
    cpu = args.use_cpu or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, timeout=timedelta(hours=2))  # a fast process waits for a slow one

    # 2. The captioner.
    disable_progress_bar()
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    model = load_captioner(args.model, args.revision, dtype).to(state.device)

    # 3. Images and references.
    if args.benchmark is not None:
        split, whole = protocol.split, load_benchmark(args.benchmark, args.dataset_name, scoring.image_folder)
    else:
        rows = load_rows(args.dataset_name, args.dataset_config_name)
        split = args.split or default_eval_split(rows, prefer_test=True)
        if split not in rows:
            raise InputError(
                f"{args.dataset_name!r} has no split {split or 'test'!r}; choose with --split: "
                f"{', '.join(map(repr, rows))}."
            )
        columns = (args.image_column, args.caption_column, args.id_column)
        image_folder = folder_of_images(args.dataset_name, rows[split], scoring.image_folder)
        whole = load_evaluation_set(rows[split], *columns, row_per_caption=True, image_folder=image_folder)
    found = first_images(whole, args.max_samples)
    state.print(f"{args.benchmark or args.dataset_name}: {found}.")

    # 4. Decoding: the benchmark's protocol, unless the command line says otherwise.
    generation = dict(protocol.generation) if protocol else {"num_beams": 5, "max_new_tokens": 30}
    for name in ("num_beams", "max_new_tokens", "min_new_tokens", "length_penalty"):
        if (value := getattr(args, name)) is not None:
            generation[name] = value
    prompt = args.prompt if args.prompt is not None else protocol.prompt if protocol else ""

    # 5. Captions.
    folder = Path(args.output_dir)
    settings = {**asdict(args), "prompt": prompt, "generation": generation}
    for name in ("overwrite_output_dir", "output_dir", "num_workers", "use_cpu"):
        del settings[name]
    # Captions of a captioner that was trained on since, or of other data by the same name, are not to be gone on with.
    settings["weights"] = versions_of(model, args.model, args.revision)
    settings["references"] = hashlib.sha256(json.dumps(list(found.references.captions.items())).encode()).hexdigest()
    if state.is_main_process:
        RunFolder(folder, settings, args.overwrite_output_dir).start()
    state.wait_for_everyone()
    captions = caption_images(model, found, folder, prompt, args.batch_size, args.num_workers, **generation)
    state.wait_for_everyone()
    state.destroy_process_group()  # the others end here, and should not be missed
    if not state.is_main_process:
        return
    predictions_file, references_file = folder / "captions.json", folder / "references.json"
    write_predictions(captions, predictions_file)
    print(f"The captions are in {predictions_file}.")
    if protocol and protocol.hidden_references:
        print(f"The references of {args.benchmark} are on its server alone: upload that file there.")
        return
    found.references.write(references_file)

    # 6. Scores.
    scoring.output = scoring.output or str(folder / "scores.json")
    scoring.report = scoring.report or str(folder / "report.html")
    about = {
        "model": args.model,
        "revision": args.revision,
        "weights": settings["weights"],
        "dtype": args.dtype,
        "benchmark": args.benchmark,
        "dataset": args.dataset_name or protocol.dataset_name,
        "split": split,
        "max_samples": args.max_samples,
        "prompt": prompt or model.processor.prompt,
        "batch_size": args.batch_size,
        "generation": generation,
        "references_file": str(references_file),
        "references_sha256": file_sha256(references_file),
        "predictions": str(predictions_file),
        "predictions_sha256": file_sha256(predictions_file),
    }
    if len(found.row_of) < len(whole.row_of):
        name = args.benchmark or args.dataset_name
        about["note"] = f"Of {len(found.row_of)} of {len(whole.row_of)} images only: no score of {name}."
    write_scores(score(captions, found.references, scoring, found.open), scoring, about, found.open)


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------

LEAST = {"max_samples": 1, "num_beams": 1, "max_new_tokens": 1, "min_new_tokens": 0, "batch_size": 1, "num_workers": 0}
OF_OWN_DATA = ("dataset_config_name", "split", "image_column", "caption_column", "id_column")


def check(scoring: ScoringArguments, captioning: CaptioningArguments, changed: Iterable[str]) -> None:
    """See that the options can be used, and that all of them will be: before hours of captioning.

    Args:
        scoring, captioning: the options.
        changed: the names of those that are not the default ones.

    Raises:
        InputError: if not; the message names the option.
    """
    if scoring.df != "corpus":
        DocumentFrequencies.load(scoring.df)
    for path in (scoring.output, scoring.report, scoring.save_df):
        if path is not None:
            check_output(path)
    for name, least in LEAST.items():
        if (value := getattr(captioning, name)) is not None and value < least:
            raise InputError(f"--{name} is at least {least}, not {value}.")
    if captioning.dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise InputError(f"--dtype is auto, float32, bfloat16 or float16, not {captioning.dtype!r}.")

    metrics = scoring.extra_metrics or []
    if unknown := set(metrics) - {*JAVA_METRICS, "clip_score"}:
        raise InputError(f"--extra_metrics takes meteor, spice and clip_score, not {', '.join(sorted(unknown))}.")
    java_scorers([metric for metric in JAVA_METRICS if metric in metrics])
    if "clip_score" in metrics and captioning.model is None and scoring.image_folder is None:
        raise InputError("clip_score looks at the images: say with --image_folder where they are.")

    ignored, by = (), ""
    if captioning.model is None:
        ignored, by = [each.name for each in fields(captioning)], "--predictions are captions already"
    elif captioning.benchmark is not None:
        ignored, by = OF_OWN_DATA, "--benchmark knows its own split and columns"
    if ignored := [name for name in ignored if name in changed]:
        raise InputError(f"{by}: leave out {', '.join(f'--{name}' for name in ignored)}.")


def evaluate(words: list[str]) -> None:
    parser = OptionParser((ScoringArguments, CaptioningArguments), __doc__)
    scoring, captioning = parser.parse(words)
    given = [name for name in ("predictions", "references") if getattr(scoring, name) is not None]
    if len(given) != (2 if captioning.model is None else 0):
        raise InputError(
            "Say what to score: --predictions with --references, or --model with --benchmark or --dataset_name."
        )
    check(scoring, captioning, parser.changed_options(words))
    if captioning.model is None:
        score_files(scoring)
    else:
        caption_and_score(captioning, scoring)


def main() -> None:
    # `generate` raises ValueError for options that do not go together.
    run_command(evaluate, expected=(ValueError, OSError))


if __name__ == "__main__":
    main()
