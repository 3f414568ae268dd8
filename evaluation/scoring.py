"""Scores of captions: extra metrics, the scores of each domain, and the names of scores in tables.

To add a metric, write a function like `metrics.java.java_scores` in a new file of `metrics/`. Then name the metric in
`EXTRA_METRICS` and its scores in `SCORE_NAMES`, and call the function in `extra_scores`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..common.errors import InputError, printable
from ..metrics import DocumentFrequencies, References
from ..metrics.java import JAVA_METRICS, java_scores, load_java_metrics
from .caption_files import ImageId, ReferenceSet, images_to_score

OpenImage = Callable[[ImageId], Image.Image]

# Keys of scores in JSON files, and their names in tables and reports.
SCORE_NAMES = {
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr",
    "meteor": "METEOR",
    "spice": "SPICE",
    "clip_score": "CLIPScore",
    "ref_clip_score": "RefCLIPScore",
}
EXTRA_METRICS = (*JAVA_METRICS, "clip_score")  # the choices of --extra_metrics


@dataclass
class PartScores:
    """Scores of all images, or of the images of one domain."""

    num_images: int
    scores: dict[str, float]


@dataclass
class ScoredCaptions:
    """Captions with their references and scores.

    Args:
        images: ids of the I images, in the order of the references. All lists below have this order.
        names: file name of each image, or its id.
        captions: the caption of each image.
        references: the reference captions of each image.
        parts: scores of all images, then of each domain.
        per_image: for each score, its value for each image.
    """

    images: list[ImageId]
    names: list[str]
    captions: list[str]
    references: list[list[str]]
    parts: dict[str, PartScores]
    per_image: dict[str, list[float]]

    @property
    def scores(self) -> dict[str, float]:
        """The scores of all images."""
        return next(iter(self.parts.values())).scores

    def table(self) -> str:
        """Return a table of the scores times 100, with a line for each part."""
        widths = {name: len(SCORE_NAMES[name]) + 3 for name in self.scores}
        header = "".join(f"{SCORE_NAMES[name]:>{width}}" for name, width in widths.items())
        lines = [f"{'':<12}{'images':>8}{header}"]
        for part_name, part in self.parts.items():
            values = "".join(f"{100 * value:>{widths[name]}.2f}" for name, value in part.scores.items())
            lines.append(f"{printable(part_name):<12}{part.num_images:>8}{values}")
        return "\n".join(lines)

    def to_json(self, facts: dict[str, Any], per_image: bool = False) -> dict[str, Any]:
        """Return the content of a JSON file of scores.

        Args:
            facts: facts that make the scores reproducible.
            per_image: include the scores of each image.
        """
        content: dict[str, Any] = {"scores": self.scores}
        if len(self.parts) > 1:
            content["parts"] = {
                name: {"images": part.num_images, "scores": part.scores} for name, part in self.parts.items()
            }
        content |= facts
        if per_image:
            content["per_image"] = {
                str(image): {name: values[index] for name, values in self.per_image.items()}
                for index, image in enumerate(self.images)
            }
        return content


def score_captions(
    predictions: dict[ImageId, str],
    references: ReferenceSet,
    open_image: OpenImage | None = None,
    *,
    df: str = "corpus",
    save_df: str | None = None,
    extra_metrics: Sequence[str] = (),
    clip_model_name_or_path: str = "openai/clip-vit-base-patch32",
    allow_missing: bool = False,
    allow_empty: bool = False,
) -> ScoredCaptions:
    """Score captions by BLEU, ROUGE-L, CIDEr and extra metrics, for all images and for each domain.

    The scores of a domain use the document frequencies of that domain, as in the official evaluation of NoCaps. Extra
    metrics are computed for all images only.

    Args:
        predictions: the caption of each image.
        references: the reference captions.
        open_image: function that opens an image by its id, for CLIPScore.
        df: source of CIDEr's document frequencies: `"corpus"`, or the path of a saved [`DocumentFrequencies`].
        save_df: file for the document frequencies of the references. It is written before any caption is scored, so
            that a metric that fails does not lose it.
        extra_metrics: names from `EXTRA_METRICS`.
        clip_model_name_or_path: the model of CLIPScore.
        allow_missing: score only the images that have a prediction.
        allow_empty: score an empty prediction as 0 instead of refusing it.

    Raises:
        InputError: for predictions that do not match the references, or a metric that cannot run.
        OSError: for an image that cannot be read, or a file that cannot be written.

    Example:

    ```python
    >>> from qformer_captioner.evaluation.caption_files import ReferenceSet
    >>> from qformer_captioner.evaluation.scoring import score_captions
    >>> references = ReferenceSet({1: ["a dog runs"], 2: ["a cat sleeps"]})
    >>> scored = score_captions({1: "a dog runs", 2: "a cat"}, references)
    >>> round(scored.scores["rouge_l"], 3)
    0.886
    ```
    """
    check_extra_metrics(extra_metrics, open_image is not None)
    images = images_to_score(predictions, references, allow_missing, allow_empty)
    captions = [predictions[image] for image in images]
    texts = [references.captions[image] for image in images]
    frequencies = df if df == "corpus" else DocumentFrequencies.load(df)
    corpus = References(texts, frequencies)
    if save_df is not None:
        corpus.document_frequencies().save(save_df)
    scores = corpus.score(captions, per_image=True, allow_empty=allow_empty)
    per_image = scores.pop("per_image")
    for more_scores in extra_scores(
        extra_metrics, captions, texts, images, open_image, clip_model_name_or_path, allow_empty
    ):
        per_image |= more_scores.pop("per_image")
        scores |= more_scores
    parts = {"entire" if references.domains else "all": PartScores(len(images), scores)}
    for domain in sorted(set(references.domains.values())):
        members = [index for index, image in enumerate(images) if references.domains.get(image) == domain]
        if members:
            domain_corpus = References([texts[index] for index in members], frequencies)
            domain_scores = domain_corpus.score([captions[index] for index in members], allow_empty=allow_empty)
            parts[domain] = PartScores(len(members), domain_scores)
    names = [str(references.files.get(image, image)) for image in images]
    return ScoredCaptions(images, names, captions, texts, parts, per_image)


def check_extra_metrics(metrics: Sequence[str], has_images: bool) -> None:
    """Check that extra metrics can run.

    Args:
        metrics: names from `EXTRA_METRICS`.
        has_images: whether the images are available.

    Raises:
        InputError: if a package, Java or the images of a metric are missing; the message says what to add.
    """
    load_java_metrics([metric for metric in JAVA_METRICS if metric in metrics])
    if "clip_score" in metrics and not has_images:
        raise InputError("clip_score needs the images: give their folder with --image_folder.")


def extra_scores(
    metrics: Sequence[str],
    captions: list[str],
    references: list[list[str]],
    images: list[ImageId],
    open_image: OpenImage | None,
    clip_model_name_or_path: str,
    allow_empty: bool,
) -> Iterator[dict[str, Any]]:
    """Yield the scores of extra metrics: a dictionary of scores, with those of each image as `"per_image"`.

    Args:
        metrics: names from `EXTRA_METRICS`.
        captions: the captions of I images.
        references: the reference captions of each image.
        images: id of each image.
        open_image: function that opens an image by its id.
        clip_model_name_or_path: the model of CLIPScore.
        allow_empty: score an empty caption instead of refusing it.
    """
    if java_metrics := [metric for metric in JAVA_METRICS if metric in metrics]:
        yield java_scores(captions, references, java_metrics, per_image=True, allow_empty=allow_empty)
    if "clip_score" in metrics and open_image is not None:
        from ..metrics.clip import clip_scores  # here, because it imports torch

        opened = map(open_image, images)  # a generator, so that images are opened one batch at a time
        yield clip_scores(
            opened, captions, references, clip_model_name_or_path, per_image=True, allow_empty=allow_empty
        )
