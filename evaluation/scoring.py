"""Scores of captions: extra metrics, the scores of each domain, and the names of scores in tables.

To add a metric, write a function like `metrics.java.java_scores` in a new file of `metrics/`. Then name the metric in
`EXTRA_METRICS` and its scores in `SCORE_NAMES`, and call the function in `extra_scores`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from PIL import Image

from ..common.errors import InputError, one_line, printable
from ..metrics import DocumentFrequencies, References
from ..metrics.java import JAVA_METRICS, java_scores, load_java_metrics
from ..metrics.tokenizers import Tokenize, describe_tokenizer, tokenizer_name
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


@dataclass(frozen=True)
class FaultyImage:
    """Image that is left out of the scores, or whose captions are blank.

    Args:
        image_id: id of the image.
        file_name: name of its file, or its id.
        reason: what is wrong with it.
    """

    image_id: ImageId
    file_name: str
    reason: str

    def __str__(self) -> str:
        """Return file name and reason in one line of at most 300 characters."""
        return one_line(f"{self.file_name!r}: {self.reason}", 300)


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
        skipped: images that are not scored, with the reasons.
        blank: images with an empty prediction, which scores 0, or with a blank reference, which is left out.
        tokenize: tokenizer of the scores, as [`References`] takes it.
    """

    images: list[ImageId]
    names: list[str]
    captions: list[str]
    references: list[list[str]]
    parts: dict[str, PartScores]
    per_image: dict[str, list[float]]
    skipped: list[FaultyImage] = field(default_factory=list)
    blank: list[FaultyImage] = field(default_factory=list)
    tokenize: str | Tokenize | None = None

    @property
    def scores(self) -> dict[str, float]:
        """The scores of all images."""
        return next(iter(self.parts.values())).scores

    def table(self) -> str:
        """Return a table of the scores times 100, with a line for each part.

        A last line names the tokenizer, unless it is that of the COCO caption toolkit.
        """
        widths = {name: len(SCORE_NAMES[name]) + 3 for name in self.scores}
        header = "".join(f"{SCORE_NAMES[name]:>{width}}" for name, width in widths.items())
        lines = [f"{'':<12}{'images':>8}{header}"]
        for part_name, part in self.parts.items():
            values = "".join(f"{100 * value:>{widths[name]}.2f}" for name, value in part.scores.items())
            lines.append(f"{printable(part_name):<12}{part.num_images:>8}{values}")
        if tokenizer_name(self.tokenize) != "ptb":
            lines.append(f"Tokens: {printable(describe_tokenizer(self.tokenize))}.")
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
        for name, images in {"skipped": self.skipped, "blank": self.blank}.items():
            if images:
                content[name] = list(map(asdict, images))
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
    tokenize: str | Tokenize | None = None,
    extra_metrics: Sequence[str] = (),
    clip_model_name_or_path: str = "openai/clip-vit-base-patch32",
    allow_missing: bool = False,
    skipped: Iterable[FaultyImage] = (),
) -> ScoredCaptions:
    """Score captions by BLEU, ROUGE-L, CIDEr and extra metrics, for all images and for each domain.

    The scores of a domain use the document frequencies of that domain, as in the official evaluation of NoCaps. Extra
    metrics are computed for all images only. An empty prediction scores 0. A blank reference is left out, and so is an
    image that has no other reference, or that CLIPScore cannot open. `blank` and `skipped` of the result list them.

    Args:
        predictions: the caption of each image.
        references: the reference captions.
        open_image: function that opens an image by its id, for CLIPScore.
        df: source of CIDEr's document frequencies: `"corpus"`, or the path of a saved [`DocumentFrequencies`].
        save_df: file for the document frequencies of the references. It is written before any caption is scored, so
            that a metric that fails does not lose it.
        tokenize: tokenizer of the scores, as [`References`] takes it.
        extra_metrics: names from `EXTRA_METRICS`.
        clip_model_name_or_path: the model of CLIPScore.
        allow_missing: score only the images that have a prediction.
        skipped: images that are left out already, for the result.

    Raises:
        InputError: for predictions that do not match the references, references that are all blank or have no spaces
            between words, or a metric that cannot run.
        OSError: for a file that cannot be written.

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
    images_to_score(predictions, references, allow_missing, allow_empty=True)
    references, blank, unusable = without_blank_references(references)
    images = [image for image in references.captions if image in predictions]
    if "clip_score" in extra_metrics and open_image is not None:
        images, unreadable = readable_images(images, references, open_image)
        unusable += unreadable
    captions = [predictions[image] for image in images]
    texts = [references.captions[image] for image in images]
    frequencies = df if df == "corpus" else DocumentFrequencies.load(df)
    corpus = References(texts, frequencies, tokenize)
    if save_df is not None:
        corpus.document_frequencies().save(save_df)
    scores = corpus.score(captions, per_image=True, allow_empty=True)
    per_image = scores.pop("per_image")
    for more_scores in extra_scores(extra_metrics, captions, texts, images, open_image, clip_model_name_or_path):
        per_image |= more_scores.pop("per_image")
        scores |= more_scores
    parts = {"entire" if references.domains else "all": PartScores(len(images), scores)}
    for domain in sorted(set(references.domains.values())):
        members = [index for index, image in enumerate(images) if references.domains.get(image) == domain]
        if members:
            domain_corpus = References([texts[index] for index in members], frequencies, tokenize or "ptb")
            domain_scores = domain_corpus.score([captions[index] for index in members], allow_empty=True)
            parts[domain] = PartScores(len(members), domain_scores)
    names = [str(references.files.get(image, image)) for image in images]
    blank += [
        FaultyImage(image, name, "the prediction is empty and scores 0")
        for image, name, caption in zip(images, names, captions, strict=True)
        if not caption.strip()
    ]
    return ScoredCaptions(images, names, captions, texts, parts, per_image, [*skipped, *unusable], blank, tokenize)


def without_blank_references(references: ReferenceSet) -> tuple[ReferenceSet, list[FaultyImage], list[FaultyImage]]:
    """Leave out blank references.

    Returns:
        The other references, the images that have blank and other references, and the images that have no other ones.

    Raises:
        InputError: if all references are blank.
    """
    captions: dict[ImageId, list[str]] = {}
    blank: list[FaultyImage] = []
    unusable: list[FaultyImage] = []
    for image, texts in references.captions.items():
        kept = [text for text in texts if text.strip()]
        name = str(references.files.get(image, image))
        if not kept:
            unusable.append(FaultyImage(image, name, "it has no reference"))
            continue
        captions[image] = kept
        if len(kept) < len(texts):
            blank.append(FaultyImage(image, name, f"{len(texts) - len(kept)} of {len(texts)} references are blank"))
    if not captions:
        raise InputError("All references are blank, so no caption can be scored: check the file or column of captions.")
    return replace(references, captions=captions), blank, unusable


def readable_images(
    images: list[ImageId], references: ReferenceSet, open_image: OpenImage
) -> tuple[list[ImageId], list[FaultyImage]]:
    """Return the images that can be opened, and the others.

    Raises:
        InputError: if no image can be opened.
    """
    readable: list[ImageId] = []
    unreadable: list[FaultyImage] = []
    for image in images:
        try:
            open_image(image)
            readable.append(image)
        except OSError as error:
            unreadable.append(FaultyImage(image, str(references.files.get(image, image)), one_line(error)))
    if not readable:
        raise InputError(f"No image can be read; the first of {len(unreadable)} is {unreadable[0]}")
    return readable, unreadable


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
) -> Iterator[dict[str, Any]]:
    """Yield the scores of extra metrics: a dictionary of scores, with those of each image as `"per_image"`.

    Args:
        metrics: names from `EXTRA_METRICS`.
        captions: the captions of I images.
        references: the reference captions of each image.
        images: id of each image.
        open_image: function that opens an image by its id.
        clip_model_name_or_path: the model of CLIPScore.
    """
    if java_metrics := [metric for metric in JAVA_METRICS if metric in metrics]:
        yield java_scores(captions, references, java_metrics, per_image=True, allow_empty=True)
    if "clip_score" in metrics and open_image is not None:
        from ..metrics.clip import clip_scores  # here, because it imports torch

        opened = map(open_image, images)  # a generator, so that images are opened one batch at a time
        yield clip_scores(opened, captions, references, clip_model_name_or_path, per_image=True, allow_empty=True)
