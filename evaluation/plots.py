"""Results that people would rather look at than read: the loss curve and a sheet of captioned images."""

import io
import math
import os
import textwrap

import matplotlib
from matplotlib import pyplot
from PIL import Image, ImageOps

matplotlib.use("Agg")  # files only; a server has no screen


def draw_loss_curve(log_history: list[dict], score_name: str | None, path: str | os.PathLike) -> None:
    """Draw training loss, evaluation loss with right and with shuffled images, and the caption score, over steps.

    The training loss is drawn as it was logged, and as the mean of each epoch in its middle; the axis on top counts
    epochs.

    Args:
        log_history: the Trainer's (`trainer.state.log_history`).
        score_name: key of the caption score in it, such as "eval_facts"; drawn against the right-hand axis.
        path: of the picture.
    """

    def series(key: str) -> tuple[list[int], list[float]]:
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        return [step for step, _ in points], [value for _, value in points]

    figure, axis = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for key, label, style in (
        ("loss", "training loss", {"color": "tab:gray", "linewidth": 1, "alpha": 0.6}),
        ("eval_loss", "held-out loss, right images", {"color": "tab:blue", "marker": "o"}),
        ("eval_loss_shuffled", "held-out loss, shuffled images", {"color": "tab:orange", "marker": "o"}),
    ):
        axis.plot(*series(key), label=label, **style)
    epochs = mean_of_epochs(log_history)
    if len(epochs) > 1:
        axis.plot(*zip(*epochs, strict=True), label="training loss, mean of each epoch", color="black", marker=".")
    last = max((entry for entry in log_history if entry.get("epoch")), key=lambda entry: entry["step"], default=None)
    if last is not None:
        steps_per_epoch = last["step"] / last["epoch"]
        top = axis.secondary_xaxis(
            "top", functions=(lambda step: step / steps_per_epoch, lambda epoch: epoch * steps_per_epoch)
        )
        top.set_xlabel("epoch")
    axis.set_xlabel("step")
    axis.set_ylabel("cross-entropy, nats per token")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    handles, labels = axis.get_legend_handles_labels()
    if score_name is not None:
        right = axis.twinx()
        right.plot(*series(score_name), label=score_name.removeprefix("eval_"), color="tab:green", linestyle="--")
        right.set_ylim(bottom=0)
        right.set_ylabel(score_name.removeprefix("eval_"))
        more = right.get_legend_handles_labels()
        handles, labels = handles + more[0], labels + more[1]
    axis.legend(handles, labels)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def mean_of_epochs(log_history: list[dict]) -> list[tuple[float, float]]:
    """The mean training loss of each epoch, with the step in its middle."""
    epochs: dict[int, list[dict]] = {}
    for entry in log_history:
        if "loss" in entry:
            epochs.setdefault(math.ceil(entry["epoch"]), []).append(entry)
    return [
        (sum(entry["step"] for entry in own) / len(own), sum(entry["loss"] for entry in own) / len(own))
        for own in epochs.values()
    ]


def draw_histogram(values: list[float], label: str, count_label: str) -> bytes:
    """Draw how often values occur, with a line at their mean; returns a PNG file."""
    figure, axis = pyplot.subplots(figsize=(8, 3), layout="constrained")
    low, high = min(values), max(values)
    axis.hist(values, bins=50, range=(low, max(high, low + 1e-3)), color="tab:blue")  # all may be the same
    mean = sum(values) / len(values)
    axis.axvline(mean, color="tab:orange", label=f"mean {mean:.1f}")
    axis.set_xlabel(label)
    axis.set_ylabel(count_label)
    axis.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    pyplot.close(figure)
    return file.getvalue()


def draw_caption_sheet(
    images: list[Image.Image], captions: list[str], references: list[str], path: str | os.PathLike, title: str = ""
) -> None:
    """Draw images in rows of four, the generated caption in bold above one reference below each.

    Args:
        images, captions, references: as many of each.
        path: of the picture.
        title: a line on top.
    """
    columns = min(4, len(images))
    rows = -(-len(images) // columns)
    width, height = 3.4, 4.7  # inches per image: a square, and room for its lines of text below
    figure, axes = pyplot.subplots(rows, columns, figsize=(width * columns, height * rows + 0.5), squeeze=False)
    top = 1 - 0.5 / (height * rows + 0.5)
    figure.subplots_adjust(left=0.02, right=0.98, top=top, bottom=0, hspace=0, wspace=0.06)
    figure.suptitle(title, y=1 - 0.1 / (height * rows + 0.5), va="top")
    for axis in axes.flat:
        axis.axis("off")
        axis.set_anchor("N")
    for axis, image, caption, reference in zip(axes.flat, images, captions, references, strict=False):
        # A square, at whose lower edge the image stands: text below tall images would fall off the sheet.
        axis.imshow(ImageOps.pad(image, (340, 340), color="white", centering=(0, 1)))
        below = -6  # points under the image
        for text, weight in ((caption or "(nothing)", "bold"), (reference, "normal")):
            text = textwrap.fill(textwrap.shorten(text, 150), 40)
            axis.annotate(
                text.replace("$", r"\$"),  # or matplotlib would set mathematics
                (0, 0),
                (0, below),
                xycoords="axes fraction",
                textcoords="offset points",
                va="top",
                fontsize=8.5,
                weight=weight,
            )
            below -= 13 * (text.count("\n") + 1) + 3
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
