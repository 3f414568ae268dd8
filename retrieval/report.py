"""Pages of retrieval as single HTML files, which contain their images and load no other files."""

import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
from PIL import Image

from ..common.files import write_atomically
from ..data.images import middle_frame
from ..evaluation.benchmarks import EvaluationSet
from ..evaluation.report import base64_jpeg
from .ranking import Rankings
from .run import Retrieved

NUM_EXTREMES = 12  # number of best and of worst cases in each direction
NUM_CANDIDATES = 5  # number of first candidates of a case


@dataclass(frozen=True)
class Case:
    """Query with the candidates that were ranked first.

    Args:
        query: place of the text or image that was asked for.
        rank: rank of the right candidate, from 1. With several texts of an image, of the best of them. `None` if
            matching did not rank it, because it is not one of the first candidates.
        wanted: places of the right candidates.
        found: places and scores of the first candidates, the best first. Candidates that matching left out are missing.
    """

    query: int
    rank: int | None
    wanted: list[int]
    found: list[tuple[int, float]]


def cases_of(rankings: Rankings, to_texts: bool, number: int = NUM_EXTREMES) -> dict[str, list[Case]]:
    """Return the best and the worst cases of one direction.

    Ranks are compared first, then the margin between the right candidate and the best wrong one by similarity.

    Args:
        rankings: scores of all pairs.
        to_texts: images ask for texts; otherwise texts ask for images.
        number: number of cases of each kind.

    Example:

    ```python
    >>> import torch
    >>> from qformer_captioner.retrieval.ranking import Rankings
    >>> from qformer_captioner.retrieval.report import cases_of
    >>> rankings = Rankings(torch.tensor([[0.9, 0.1], [0.8, 0.2]]), torch.tensor([0, 1]))
    >>> cases_of(rankings, to_texts=True, number=1)["worst"][0].query
    1
    ```
    """
    ranks = rankings.ranks()[0 if to_texts else 1].tolist()
    scores, similarity = rankings.scores(to_texts), rankings.similarity
    is_right = rankings.image_of_text == torch.arange(len(similarity))[:, None]  # [N, M]
    if not to_texts:
        scores, similarity, is_right = scores.t(), similarity.t(), is_right.t()
    right = similarity.masked_fill(~is_right, -torch.inf).amax(dim=1)
    margin = (right - similarity.masked_fill(is_right, -torch.inf).amax(dim=1)).tolist()
    places = [place for place in range(len(ranks)) if ranks[place] >= 0]
    places.sort(key=lambda place: (ranks[place], -margin[place]))

    def case(place: int) -> Case:
        values, indices = scores[place].topk(min(NUM_CANDIDATES, scores.shape[1]))
        found = zip(indices.tolist(), values.tolist(), strict=True)
        is_ranked = scores[place][is_right[place]].max() > -torch.inf
        return Case(
            place,
            ranks[place] + 1 if is_ranked else None,
            is_right[place].nonzero()[:, 0].tolist(),
            [(index, value) for index, value in found if value > -torch.inf],
        )

    worst = places[::-1][: min(number, len(places) // 2)]
    return {"best": list(map(case, places[:number])), "worst": list(map(case, worst))}


def write_report(
    path: str | os.PathLike,
    images: EvaluationSet,
    retrieved: Retrieved,
    rows: dict[str, dict[str, float]],
    facts: dict[str, Any],
) -> None:
    """Write a page with recalls, facts, and the best and worst cases of both directions.

    Args:
        path: the file to write.
        images: the images. Those that cannot be opened are left out of the page.
        retrieved: scores of all pairs.
        rows: recalls by the name of the ranking.
        facts: facts that make the recalls reproducible, among them `model`.
    """
    corpus = retrieved.corpus
    to_images = cases_of(retrieved.best, to_texts=False)
    to_texts = cases_of(retrieved.best, to_texts=True)
    shown: set[int] = {case.query for cases in to_texts.values() for case in cases}
    for case in (case for cases in to_images.values() for case in cases):
        shown |= {*case.wanted, *(place for place, _ in case.found)}
    pictures = {}
    if images.rows is not None:
        for place in sorted(shown):
            with contextlib.suppress(OSError):
                pictures[place] = base64_jpeg(middle_frame(images.open(corpus.images[place])))
    names = [str(images.references.files.get(image, image)) for image in corpus.images]
    _render(
        "report.html",
        path,
        title=f"Retrieval with {facts['model']}",
        rows=rows,
        columns={name: label_of(name) for name in next(iter(rows.values()))},
        facts=facts,
        to_images=to_images,
        to_texts=to_texts,
        names=names,
        texts=corpus.texts,
        top_k=facts["rerank_top_k"],
        pictures=pictures,
        skipped=retrieved.skipped,
    )


def write_search_page(
    path: str | os.PathLike,
    found: dict[str, Sequence[tuple[str, float]]],
    open_image: Callable[[str], Image.Image],
    facts: dict[str, Any],
) -> None:
    """Write a page with the images that were found for each text.

    Args:
        path: the file to write.
        found: for each text, the names and scores of images, the best first.
        open_image: function that opens an image by its name. Images that raise `OSError` are left out.
        facts: facts to show, such as the model.
    """
    pictures = {}
    for name in sorted({name for names in found.values() for name, _ in names}):
        with contextlib.suppress(OSError):
            pictures[name] = base64_jpeg(open_image(name))
    _render("search.html", path, title=_title(found), found=found, pictures=pictures, facts=facts)


def label_of(name: str) -> str:
    """Return the heading of a column: "image_to_text_r1" is "image to text R@1"."""
    way, _, k = name.rpartition("_r")
    return f"{way} R@{k}".replace("_", " ") if k.isdecimal() else name.replace("_", " ")


def _title(texts: Iterable[str]) -> str:
    first, *others = texts
    return f"{first} and {len(others)} more" if others else first


def _render(template: str, path: str | os.PathLike, **values: Any) -> None:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    write_atomically(path, environment.get_template(template).render(**values).encode(errors="replace"))
