"""Files that an evaluation writes to the output folder: captions, a sheet of example images, and the loss curve.

The captions of step 100 are in `captions_step_100.jsonl` and `captions_step_100.png`. `captions.jsonl` and
`captions.png` are copies of the files of the last evaluation. At the end of training they are copies of the files of
the best checkpoint.
"""

import json
import math
import shutil
from pathlib import Path

from transformers import TrainerState

from ..data.dataset import CaptionDataset
from ..evaluation.plots import draw_caption_sheet, draw_loss_curve

SUFFIXES = ("jsonl", "png")
SHEET_IMAGES = 12


def write_caption_files(
    folder: Path, rows: CaptionDataset, captions: list[str], state: TrainerState, score_name: str
) -> None:
    """Write captions, sheet and loss curve of an evaluation.

    Args:
        folder: the output folder.
        rows: the rows that were captioned.
        captions: their captions, in order.
        state: the state of the Trainer, with step and log.
        score_name: score that the loss curve shows beside the losses.
    """
    references = rows.references()
    stem = folder / f"captions_step_{state.global_step}"
    with stem.with_suffix(".jsonl").open("w", encoding="utf-8") as file:
        texts = zip(captions, references, rows.row_prompts(), strict=True)
        for row, (caption, row_references, prompt) in enumerate(texts):
            line = {"image_id": row, "caption": caption, "references": row_references}
            line |= {"prompt": prompt} if prompt else {}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    shown = range(0, len(rows), math.ceil(len(rows) / SHEET_IMAGES))
    draw_caption_sheet(
        [rows.image_to_show(row) for row in shown],
        [captions[row] for row in shown],
        [references[row][0] for row in shown],
        stem.with_suffix(".png"),
        f"Held-out rows after step {state.global_step}: generated caption, one reference",
    )
    show_files_of_step(folder, "captions", state.global_step)
    draw_loss_curve(state.log_history, f"eval_{score_name}", folder / "loss_curve.png")


def show_files_of_step(folder: Path, stem: str, step: int | None) -> None:
    """Copy the table and the sheet of a step, such as `captions_step_100.png`, to `captions.png`, if they exist.

    They do not exist if the run was resumed in another folder after that step.

    Args:
        folder: the output folder.
        stem: beginning of the names of the files, such as "captions".
        step: the step.
    """
    for suffix in SUFFIXES:
        file = folder / f"{stem}_step_{step}.{suffix}"
        if file.exists():
            shutil.copyfile(file, folder / f"{stem}.{suffix}")
