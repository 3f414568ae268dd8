"""Plots of results: the loss curve of a training run, a histogram of scores, and a sheet of captioned images."""

import io
import math
import os
import textwrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot, which would choose a backend for the whole process
from PIL import Image, ImageOps

# Key in the log, label and style of each loss in a plot
LossCurves = tuple[tuple[str, str, dict[str, Any]], ...]
LOSSES: LossCurves = (
    ("loss", "training loss", {"color": "tab:gray", "linewidth": 1, "alpha": 0.6}),
    ("eval_loss", "held-out loss, right inputs", {"color": "tab:blue", "marker": "o"}),
    ("eval_loss_shuffled", "held-out loss, shuffled inputs", {"color": "tab:orange", "marker": "o"}),
)

# Sizes of a sheet of captioned images, in pixels
SHEET_DPI, SIDE, COLUMN_WIDTH, ROW_HEIGHT, TITLE_HEIGHT, LINE_HEIGHT = 100, 320, 340, 470, 50, 18


def draw_loss_curve(
    log_history: list[dict[str, Any]],
    score_name: str | None,
    path: str | os.PathLike,
    losses: LossCurves = LOSSES,
    unit: str = "cross-entropy, nats per token",
) -> None:
    """Plot training loss, evaluation loss with right and with shuffled images, and a score against steps.

    The training loss is shown as logged and as the mean of each epoch. The upper axis shows epochs.

    Args:
        log_history: the log of the Trainer (`trainer.state.log_history`).
        score_name: key of the score in the log, such as "eval_cider". Its axis is on the right.
        path: the picture to write.
        losses: key in the log, label and style of each loss. Losses that the log lacks are left out.
        unit: label of the axis of losses.

    Example:

    ```python
    >>> draw_loss_curve(trainer.state.log_history, "eval_cider", "loss_curve.png")  # doctest: +SKIP
    ```
    """
    figure = Figure(figsize=(8, 5))  # a computed layout would take as long as the drawing
    axis = figure.add_axes((0.09, 0.1, 0.82, 0.8))
    for key, label, style in losses:
        steps, values = _series(log_history, key)
        if steps:
            axis.plot(steps, values, label=label, **style)
    epochs = mean_of_epochs(log_history)
    if len(epochs) > 1 and "loss" in [key for key, _, _ in losses]:
        axis.plot(*zip(*epochs, strict=True), label="training loss, mean of each epoch", color="black", marker=".")
    _add_epoch_axis(axis, log_history)
    axis.set_xlabel("step")
    axis.set_ylabel(unit)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    handles, labels = axis.get_legend_handles_labels()
    if score_name is not None:
        score_axis = axis.twinx()
        label = score_name.removeprefix("eval_")
        score_axis.plot(*_series(log_history, score_name), label=label, color="tab:green", linestyle="--")
        score_axis.set_ylim(bottom=0)
        score_axis.set_ylabel(label)
        score_handles, score_labels = score_axis.get_legend_handles_labels()
        handles, labels = handles + score_handles, labels + score_labels
    axis.legend(handles, labels)
    figure.savefig(path, dpi=120)


def _series(log_history: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Return the steps and values of one key of the log."""
    points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
    return [step for step, _ in points], [value for _, value in points]


def _add_epoch_axis(axis: Axes, log_history: list[dict[str, Any]]) -> None:
    """Add an axis of epochs above the plot, if the log has epochs."""
    last = max((entry for entry in log_history if entry.get("epoch")), key=lambda entry: entry["step"], default=None)
    if last is not None:
        steps_per_epoch = last["step"] / last["epoch"]
        functions = (lambda step: step / steps_per_epoch, lambda epoch: epoch * steps_per_epoch)
        axis.secondary_xaxis("top", functions=functions).set_xlabel("epoch")


def mean_of_epochs(log_history: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Return, for each epoch, the mean of its logged steps and the mean of its training loss.

    Args:
        log_history: the log of the Trainer.

    Example:

    ```python
    >>> mean_of_epochs([{"loss": 3.0, "step": 1, "epoch": 0.5}, {"loss": 2.0, "step": 2, "epoch": 1.0}])
    [(1.5, 2.5)]
    ```
    """
    epochs: dict[int, list[dict[str, Any]]] = {}
    for entry in log_history:
        if "loss" in entry:
            epochs.setdefault(math.ceil(entry["epoch"]), []).append(entry)
    return [
        (
            sum(entry["step"] for entry in entries) / len(entries),
            sum(entry["loss"] for entry in entries) / len(entries),
        )
        for entries in epochs.values()
    ]


def draw_histogram(values: list[float], label: str, count_label: str) -> bytes:
    """Draw a histogram with a line at the mean.

    Args:
        values: the values to count.
        label: label of the values.
        count_label: label of the counts.

    Returns:
        The content of a PNG file.
    """
    figure = Figure(figsize=(8, 3), layout="constrained")
    axis = figure.subplots()
    low, high = min(values), max(values)
    axis.hist(values, bins=50, range=(low, max(high, low + 1e-3)), color="tab:blue")  # all values may be equal
    mean = sum(values) / len(values)
    axis.axvline(mean, color="tab:orange", label=f"mean {mean:.1f}")
    axis.set_xlabel(label)
    axis.set_ylabel(count_label)
    axis.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def draw_caption_sheet(
    images: list[Image.Image], captions: list[str], references: list[str], path: str | os.PathLike, title: str = ""
) -> None:
    """Draw images in rows of four. Below each image are its caption in bold and one reference.

    Args:
        images: the images.
        captions: the generated caption of each image.
        references: a reference caption of each image.
        path: the picture to write.
        title: a line above the images.
    """
    texts = [
        [(caption or "(nothing)", True), (reference, False)]
        for caption, reference in zip(captions, references, strict=True)
    ]
    draw_sheet(images, texts, path, title, 150)


def draw_sheet(
    images: list[Image.Image],
    texts: list[list[tuple[str, bool]]],
    path: str | os.PathLike,
    title: str,
    max_length: int,
) -> None:
    """Draw images in rows of four, with texts below each.

    Args:
        images: the images.
        texts: for each image, texts and whether they are bold.
        path: the picture to write.
        title: a line above the images.
        max_length: largest number of characters of a text. The rest is left out.
    """
    columns = min(4, len(images))
    rows = math.ceil(len(images) / columns)
    lines = [
        [(textwrap.fill(textwrap.shorten(text, max_length), 40), is_bold) for text, is_bold in of_image]
        for of_image in texts
    ]
    heights = [sum(LINE_HEIGHT * (text.count("\n") + 1) + 4 for text, _ in of_image) for of_image in lines]
    row_height = max(ROW_HEIGHT, SIDE + 8 + max(heights))
    width, height = columns * COLUMN_WIDTH, rows * row_height + TITLE_HEIGHT
    # Images and texts are placed on the figure itself, because axes would take most of the time.
    figure = Figure(figsize=(width / SHEET_DPI, height / SHEET_DPI), dpi=SHEET_DPI)
    figure.text(0.5, 1 - 10 / height, title, ha="center", va="top", fontsize="large", parse_math=False)
    for number, (image, of_image) in enumerate(zip(images, lines, strict=True)):
        row, column = divmod(number, columns)
        left = column * COLUMN_WIDTH + (COLUMN_WIDTH - SIDE) // 2
        lower_edge = TITLE_HEIGHT + row * row_height + SIDE
        # Images are padded at the top to a square, because text below a tall image would leave the sheet.
        square = ImageOps.pad(image.convert("RGB"), (SIDE, SIDE), color="white", centering=(0, 1))
        figure.figimage(np.asarray(square), left, height - lower_edge)
        top = lower_edge + 8
        for text, is_bold in of_image:
            place, weight = (left / width, 1 - top / height), "bold" if is_bold else "normal"
            figure.text(*place, text, va="top", fontsize=8.5, weight=weight, parse_math=False)
            top += LINE_HEIGHT * (text.count("\n") + 1) + 4
    figure.savefig(path)
