"""A page about a scored set of captions that opens anywhere: no file beside it, nothing fetched."""

import base64
import contextlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
from PIL import Image

from .caption_files import ImageId
from .plots import draw_histogram

if TYPE_CHECKING:
    from ..eval_captions import Scored

SHOWN = 12  # best and worst captions, with their pictures
SIDE = 320  # pixels of a picture at the most


def write_report(
    path: str | os.PathLike,
    scored: "Scored",
    score_names: dict[str, str],
    facts: dict[str, object],
    open_picture: Callable[[ImageId], Image.Image] | None = None,
) -> None:
    """Write one HTML page: scores, histogram, best and worst captions, and a table of all to search and sort.

    Args:
        path: of the page.
        scored: captions, references and scores (`eval_captions.py`).
        score_names: how scores are called in tables.
        facts: what makes the scores reproducible.
        open_picture: gives the picture of an image; one that it cannot open (`OSError`) is left out.
    """
    cider = scored.per_image["cider"]
    ranked = sorted(range(len(cider)), key=cider.__getitem__)
    best, worst = ranked[::-1][:SHOWN], ranked[:SHOWN]
    pictures = {}
    for place in {*best, *worst} if open_picture is not None else ():
        with contextlib.suppress(OSError):
            pictures[place] = _as_base64_jpeg(open_picture(scored.images[place]))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html").render(
        title=f"Captions of {facts.get('model') or facts['predictions']}",
        scored=scored,
        score_names=score_names,
        facts=facts,
        histogram=base64.b64encode(draw_histogram([100 * value for value in cider], "CIDEr", "images")).decode(),
        sheets={"Best captions": best, "Worst captions": worst},
        pictures=pictures,
    )
    Path(path).write_text(page, encoding="utf-8", errors="replace")


def _as_base64_jpeg(picture: Image.Image) -> str:
    picture = picture.convert("RGB")
    picture.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return base64.b64encode(file.getvalue()).decode()
