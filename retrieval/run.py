"""Steps of `eval_retrieval.py`: resolve the options, encode images and texts, match candidates, score."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers.utils.logging import disable_progress_bar

from ..common.errors import InputError
from ..common.logging import get_logger
from ..common.run_folder import RunFolder
from ..data.skipped_rows import SkippedRows
from ..evaluation.benchmarks import EvaluationSet, get_benchmark
from ..evaluation.captioning_run import load_images, start_processes, versions_of_weights, with_data_set
from ..evaluation.scoring import FaultyImage
from .arguments import RetrievalArguments
from .blocks import Block, BlockFolder, key_of
from .encoding import Corpus, encode_corpus, similarity_of
from .matching import match_pairs
from .model import RetrievalModel, load_stage1
from .ranking import Rankings, Reranking

logger = get_logger(__name__)

# Options that do not change what is kept on disk. A run can continue with other values of them.
UNRELATED_OPTIONS = (
    "output_dir",
    "overwrite_output_dir",
    "num_workers",
    "use_cpu",
    "output",
    "report",
    "allow_missing",
    "rerank_top_k",
    "rerank_score",
    "fold_size",
    "match_batch_size",
)
DEFAULT_TOP_K = 128  # LAVIS'
FOLD_SIZES = {"coco_karpathy_test": 1000, "coco_karpathy_validation": 1000}


@dataclass(frozen=True)
class RetrievalRun:
    """Model, images and ranking of a run, resolved from its options.

    Args:
        args: the options.
        state: the processes of the run.
        model: the model, on the device of this process.
        weights: version of the model's weights in each folder or Hub repository.
        split: the split of the data set.
        images: the images and texts.
        num_images: number of images of the whole split, including those that are left out.
        fold_size: number of images of a fold; `None` without folds.
        skipped_rows: record of the rows that are not in the data set's splits.
    """

    args: RetrievalArguments
    state: PartialState
    model: RetrievalModel
    weights: dict[str, Any]
    split: str
    images: EvaluationSet
    num_images: int
    fold_size: int | None
    skipped_rows: SkippedRows

    @property
    def name(self) -> str:
        """Name of the benchmark or of the data set."""
        return str(self.args.benchmark or self.args.dataset_name)

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return Path(self.args.output_dir)

    @property
    def reranking(self) -> Reranking:
        """How the first candidates are ranked again."""
        assert self.args.rerank_top_k is not None, "resolve_run sets it"
        return Reranking(self.args.rerank_top_k, self.args.rerank_score)

    def facts(self) -> dict[str, Any]:
        """Return facts that make the scores reproducible."""
        args = self.args
        dataset_name = None if args.benchmark is None else get_benchmark(args.benchmark).dataset_name
        facts = {
            "model": args.model,
            "revision": args.revision,
            "weights": self.weights,
            "dtype": args.dtype,
            "benchmark": args.benchmark,
            "dataset": args.dataset_name or dataset_name,
            "features": args.features,
            "split": self.split,
            "texts_sha256": hash_of_texts(self.images),
            "max_samples": args.max_samples,
            "max_length": self.model.max_length,
            "batch_size": args.batch_size,
            "rerank_top_k": args.rerank_top_k,
        }
        if args.rerank_top_k:
            facts |= {"rerank_score": args.rerank_score, "match_batch_size": args.match_batch_size}
        return facts

    def note(self, num_scored: int) -> str | None:
        """Return a note that only some images were scored, or `None`."""
        if num_scored == self.num_images:
            return None
        return f"Only {num_scored} of {self.num_images} images were scored, so this is not a score of {self.name}."


@dataclass(frozen=True)
class Retrieved:
    """Images and texts of a run with the scores of their pairs.

    Args:
        corpus: images and texts.
        contrast: rankings by similarity alone.
        reranked: rankings by similarity and matching; `None` for similarity alone.
        skipped: images that are not scored.
    """

    corpus: Corpus
    contrast: Rankings
    reranked: Rankings | None
    skipped: list[FaultyImage]

    @property
    def best(self) -> Rankings:
        """The rankings that the report shows."""
        return self.reranked or self.contrast


def resolve_run(args: RetrievalArguments) -> RetrievalRun:
    """Start the processes, and load the model, the images and the texts.

    Args:
        args: the options.

    Raises:
        InputError: if the model or the data cannot be loaded.
    """
    args, image_folder, store = with_data_set(args, args.image_folder)
    assert args.model is not None, "check_arguments checks it"
    if args.benchmark is not None and get_benchmark(args.benchmark).hidden_references:
        raise InputError(f"The texts of {args.benchmark} are hidden, and retrieval needs them: use another benchmark.")
    state = start_processes(args.use_cpu)
    disable_progress_bar()  # for loading weights
    stage1 = load_stage1(args.model, args.revision, args.dtype).to(state.device)
    model = RetrievalModel(stage1, args.max_length)
    if store is not None:
        store.check_model(stage1.config, model.processor.image_processor)
    elif not stage1.config.has_vision_model:
        raise InputError(
            f"The model {args.model!r} was trained on features and has no vision encoder: give it --features instead "
            "of images."
        )
    skipped_rows = SkippedRows()
    split, whole_split = load_images(args, image_folder, skipped_rows, store=store, num_frames=model.num_frames)
    return RetrievalRun(
        args=replace(args, rerank_top_k=resolve_top_k(args, stage1.config.itm_weight)),
        state=state,
        model=model,
        weights=versions_of_weights(stage1, args.model, args.revision),
        split=split,
        images=whole_split.first(args.max_samples),
        num_images=whole_split.num_images,
        fold_size=resolve_fold_size(args, len(whole_split.first(args.max_samples).row_of)),
        skipped_rows=skipped_rows,
    )


def resolve_top_k(args: RetrievalArguments, itm_weight: float) -> int:
    """Return the number of candidates that matching ranks again, by default none if matching was not trained."""
    if args.rerank_top_k is not None:
        return args.rerank_top_k
    if itm_weight == 0:
        logger.info("The model was trained without matching (`itm_weight` is 0), so contrast alone ranks.")
        return 0
    return DEFAULT_TOP_K


def resolve_fold_size(args: RetrievalArguments, num_images: int) -> int | None:
    """Return the number of images of a fold, or `None` for no folds.

    Raises:
        InputError: if the command line asks for folds that are larger than the data set.
    """
    if args.fold_size is not None and args.fold_size > num_images:
        raise InputError(f"--fold_size {args.fold_size} is more than the {num_images} images: choose smaller folds.")
    size = FOLD_SIZES.get(str(args.benchmark), 0) if args.fold_size is None else args.fold_size
    return size if 0 < size <= num_images else None


def retrieve(run: RetrievalRun) -> Retrieved | None:
    """Encode images and texts, match the first candidates, and end the process group.

    Args:
        run: the run.

    Returns:
        The scores, or `None` in every process but the main one.

    Raises:
        InputError: if the folder holds another run, or no image can be read.
    """
    args = run.args
    if run.state.is_main_process:
        RunFolder(run.folder, run_settings(run), args.overwrite_output_dir).start()
        if len(run.skipped_rows):
            run.skipped_rows.write_to(run.folder / "skipped_rows.jsonl")
            logger.info("%d rows could not be used; %s lists them.", len(run.skipped_rows), run.skipped_rows.path)
    run.state.wait_for_everyone()
    corpus = encode_corpus(run.model, run.images, run.folder, args.batch_size, args.num_workers)
    report_cut_texts(run.model, corpus.texts)
    contrast = Rankings(
        similarity_of(corpus.image_vectors, corpus.text_vectors, run.model.device), corpus.image_of_text
    )
    reranked = None
    if args.rerank_top_k:
        reranked = Rankings(contrast.similarity, corpus.image_of_text, reranking=run.reranking)
        pairs = choose_pairs(run, reranked)
        logits = match_pairs(
            run.model, corpus, pairs, run.images, run.folder / "pairs", args.match_batch_size, args.num_workers
        )
        reranked = Rankings(contrast.similarity, corpus.image_of_text, logits, run.reranking)
    is_main = run.state.is_main_process
    run.state.destroy_process_group()  # from here on only the main process works
    if not is_main:
        return None
    names = run.images.references.files
    faulty = [FaultyImage(image, str(names.get(image, image)), reason) for image, reason in corpus.unreadable.items()]
    return Retrieved(corpus, contrast, reranked, [*run.images.skipped, *faulty])


def choose_pairs(run: RetrievalRun, rankings: Rankings) -> torch.Tensor:
    """Return the pairs to match, `[P, 2]`. The main process chooses them, because others may round in another way."""
    folder = BlockFolder(run.folder / "candidates")
    images = [[image, fingerprint] for image, fingerprint in run.images.fingerprints().items()]
    key = key_of(run_settings(run), images, list(rankings.similarity.shape), run.args.rerank_top_k, run.fold_size)
    if run.state.is_main_process and not folder.has(0, key):
        folder.write(0, key, Block({"pairs": rankings.candidate_pairs(run.fold_size)}))
    run.state.wait_for_everyone()
    block = folder.read(0, key)
    if block is None:
        raise OSError(f"The file {str(folder.path(0))!r} was removed while the run used it.")
    return block.tensors["pairs"]


def report_cut_texts(model: RetrievalModel, texts: list[str]) -> None:
    """Log how many texts are longer than the model reads here."""
    cut = sum(length > model.max_length for length in model.count_tokens(texts))
    if cut:
        logger.warning("%d of %d texts are cut to %d tokens (--max_length).", cut, len(texts), model.max_length)


def run_settings(run: RetrievalRun) -> dict[str, Any]:
    """Return the settings that must be the same for a killed run to continue."""
    settings = {name: value for name, value in asdict(run.args).items() if name not in UNRELATED_OPTIONS}
    return {**settings, "weights": run.weights, "texts": hash_of_texts(run.images)}


def hash_of_texts(images: EvaluationSet) -> str:
    """Return a hash of the images' ids and texts."""
    return hashlib.sha256(json.dumps([*images.references.captions.items()]).encode()).hexdigest()


def recalls_of(retrieved: Retrieved, fold_size: int | None) -> dict[str, dict[str, float]]:
    """Return the recalls of each way of ranking, by its name in tables.

    Args:
        retrieved: the scores of all pairs.
        fold_size: number of images of a fold; `None` without folds.
    """
    rankings = {"contrast": retrieved.contrast, "reranked": retrieved.reranked}
    rows = {}
    for name, ranking in rankings.items():
        if ranking is None:
            continue
        rows[name] = ranking.recalls()
        if fold_size is not None:
            number = len(retrieved.corpus.images) // fold_size
            if number:
                rows[f"{name}, {number} folds of {fold_size}"] = ranking.recalls_of_folds(fold_size)
    return rows


def table_of(rows: dict[str, dict[str, float]]) -> str:
    """Return a table of recalls in percent.

    Args:
        rows: recalls by name, as [`recalls_of`] returns them.

    Example:

    ```python
    >>> from qformer_captioner.retrieval.run import table_of
    >>> print(table_of({"contrast": {"image_to_text_r1": 0.5, "text_to_image_r1": 0.25, "mean_recall": 0.375}}))
    recall in percent   image to text   text to image
                                  R@1             R@1   mean
    contrast                    50.00           25.00  37.50
    ```
    """
    names = list(next(iter(rows.values())))
    ways = {"image_to_text": "image to text", "text_to_image": "text to image"}
    columns = {way: [name for name in names if name.startswith(way)] for way in ways}
    width = max(len("recall in percent"), *map(len, rows))
    size = max(6, -(-len("image to text") // max(1, *map(len, columns.values()))))
    heads = ["recall in percent".ljust(width), " " * width]
    for way, title in ways.items():
        labels = "".join(f"{'R@' + name.rpartition('_r')[2]:>{size + 1}}" for name in columns[way])
        heads[0] += f"  {title:>{len(labels)}}"
        heads[1] += f"  {labels}"
    lines = [heads[0], heads[1] + "   mean"]
    for name, values in rows.items():
        cells = "".join("  " + "".join(f"{100 * values[each]:>{size + 1}.2f}" for each in columns[way]) for way in ways)
        lines.append(f"{name:<{width}}{cells}  {100 * values['mean_recall']:5.2f}")
    return "\n".join(lines)
