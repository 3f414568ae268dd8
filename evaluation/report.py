"""Report on scored captions as one HTML page, which contains its images and loads no other files."""

import base64
import contextlib
import io
import os
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from ..common.files import write_atomically
from .plots import draw_histogram
from .scoring import SCORE_NAMES, OpenImage, ScoredCaptions

NUM_EXTREMES = 12  # number of best and of worst captions shown with their images
MAX_SIDE = 320  # pixels of an image


def write_report(
    path: str | os.PathLike,
    scored: ScoredCaptions,
    facts: dict[str, Any],
    open_image: OpenImage | None = None,
) -> None:
    """Write a page with scores, a histogram, the best and worst captions, and a table that can be searched and sorted.

    Args:
        path: the file to write.
        scored: captions, references and scores.
        facts: facts that make the scores reproducible, among them `model` or `predictions`.
        open_image: function that opens an image by its id. Images that raise `OSError` are left out.

    Example:

    ```python
    >>> from qformer_captioner.evaluation.caption_files import ReferenceSet
    >>> from qformer_captioner.evaluation.scoring import score_captions
    >>> references = ReferenceSet({1: ["a dog runs"], 2: ["a cat sleeps"]})
    >>> scored = score_captions({1: "a dog runs", 2: "a cat"}, references)
    >>> write_report("report.html", scored, {"predictions": "results.json"})  # doctest: +SKIP
    ```
    """
    cider = scored.per_image["cider"]
    by_score = sorted(range(len(cider)), key=cider.__getitem__)
    best, worst = by_score[::-1][:NUM_EXTREMES], by_score[:NUM_EXTREMES]
    pictures = {}
    if open_image is not None:
        for index in {*best, *worst}:
            with contextlib.suppress(OSError):
                pictures[index] = base64_jpeg(open_image(scored.images[index]))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html").render(
        title=f"Captions of {facts.get('model') or facts['predictions']}",
        scored=scored,
        score_names=SCORE_NAMES,
        facts=facts,
        histogram=base64.b64encode(draw_histogram([100 * value for value in cider], "CIDEr", "images")).decode(),
        sheets={"Best captions": best, "Worst captions": worst},
        pictures=pictures,
    )
    write_atomically(path, page.encode(errors="replace"))


def base64_jpeg(image: Image.Image) -> str:
    """Return an image, at most `MAX_SIDE` pixels high and wide, as a JPEG file in base64."""
    image = image.convert("RGB")
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return base64.b64encode(file.getvalue()).decode()
