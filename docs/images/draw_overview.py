"""Draw overview.png, the figure in the README that shows the steps from an image to a caption.

python docs/images/draw_overview.py
"""

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle

matplotlib.use("Agg")

OUTPUT = Path(__file__).with_name("overview.png")
INK, MUTED = "#1f2937", "#6b7280"
FROZEN_FACE, FROZEN_EDGE = "#eef4fb", "#8fb3d9"
TRAINED_FACE, TRAINED_EDGE = "#fff1e0", "#f0912d"
CENTRE = 1.75  # height of the row of boxes


def box(axes: Axes, left: float, width: float, title: str, note: str, examples: str, trained: bool) -> None:
    """Draw one part of the captioner, with its state (frozen or trained) above the title and examples below the box."""
    face, edge = (TRAINED_FACE, TRAINED_EDGE) if trained else (FROZEN_FACE, FROZEN_EDGE)
    shape = FancyBboxPatch(
        (left, CENTRE - 0.62), width, 1.24, boxstyle="round,pad=0,rounding_size=0.14", fc=face, ec=edge, lw=1.8
    )
    axes.add_patch(shape)
    middle = left + width / 2
    axes.text(middle, CENTRE + 0.13, title, ha="center", va="center", fontsize=13, color=INK, weight="bold")
    axes.text(
        middle, CENTRE - 0.26, note, ha="center", va="center", fontsize=9.5, color="#b45309" if trained else MUTED
    )
    axes.text(middle, CENTRE - 0.87, examples, ha="center", va="center", fontsize=9, color=MUTED)


def arrow(axes: Axes, left: float, right: float, label: str = "", shape: str = "") -> None:
    """Draw an arrow, with the name of the tensor above it and its shape below."""
    axes.add_patch(
        FancyArrowPatch((left, CENTRE), (right, CENTRE), arrowstyle="-|>", mutation_scale=15, lw=1.6, color=INK)
    )
    middle = (left + right) / 2
    axes.text(middle, CENTRE + 0.16, label, ha="center", va="bottom", fontsize=9.5, color=INK, linespacing=1.15)
    axes.text(middle, CENTRE - 0.17, shape, ha="center", va="top", fontsize=9, color=MUTED, family="monospace")


def image(axes: Axes, left: float, size: float) -> None:
    """Draw a small image of two shapes, divided into patches."""
    bottom = CENTRE - size / 2
    axes.add_patch(Rectangle((left, bottom), size, size, fc="#f6efdf", ec=INK, lw=1.4))
    for step in (1, 2):
        offset = size * step / 3
        axes.plot([left + offset] * 2, [bottom, bottom + size], color="#d8ccb0", lw=0.9)
        axes.plot([left, left + size], [bottom + offset] * 2, color="#d8ccb0", lw=0.9)
    axes.add_patch(Circle((left + size / 3.2, bottom + size * 0.68), size * 0.19, fc="#de2d2a", ec="none"))
    middle, height, half = left + size * 0.7, bottom + size * 0.3, size * 0.2
    triangle = [(middle - half, height - half), (middle + half, height - half), (middle, height + half)]
    axes.add_patch(Polygon(triangle, fc="#2c64dc", ec="none"))


def query_tokens(axes: Axes, middle: float) -> None:
    """Draw the learned query tokens, which enter the Q-Former from above."""
    side, gap, number = 0.17, 0.07, 5
    left = middle - (number * side + (number - 1) * gap) / 2
    for index in range(number):
        corner = (left + index * (side + gap), CENTRE + 1.0)
        axes.add_patch(Rectangle(corner, side, side, fc="#f7b267", ec=TRAINED_EDGE, lw=1))
    axes.text(middle, CENTRE + 1.25, "learned query tokens", ha="center", va="bottom", fontsize=9, color=MUTED)
    axes.add_patch(
        FancyArrowPatch(
            (middle, CENTRE + 0.98), (middle, CENTRE + 0.62), arrowstyle="-|>", mutation_scale=11, lw=1.2, color=INK
        )
    )


def main() -> None:
    figure = plt.figure(figsize=(12, 3.2), dpi=150)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 12.6), ylim=(0.35, 3.71))
    axes.axis("off")
    figure.patch.set_alpha(0)
    background = FancyBboxPatch(
        (0.1, 0.42), 12.4, 3.2, boxstyle="round,pad=0,rounding_size=0.2", fc="white", ec="#d1d5db", lw=1
    )
    axes.add_patch(background)
    image(axes, 0.4, 1.24)
    arrow(axes, 1.7, 2.15)
    box(axes, 2.2, 1.85, "Vision encoder", "frozen", "CLIP, SigLIP, DINOv2, ...", trained=False)
    arrow(axes, 4.1, 5.25, "image\nfeatures", "[B, N, Dv]")
    box(axes, 5.3, 1.5, "Q-Former", "trained", "as in BLIP-2", trained=True)
    query_tokens(axes, 6.05)
    arrow(axes, 6.85, 7.95, "soft\nprompt", "[B, Q, D]")
    box(axes, 8.0, 2.1, "Language model", "frozen, or with LoRA", "T5, Llama, SmolLM2, ...", trained=False)
    arrow(axes, 10.15, 10.6)
    caption = "“a red circle\nabove a blue\ntriangle”"
    axes.text(11.48, CENTRE, caption, ha="center", va="center", fontsize=12, color=INK, style="italic", linespacing=1.3)
    figure.savefig(OUTPUT, transparent=True)


if __name__ == "__main__":
    main()
