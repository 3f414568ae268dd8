"""Files that an evaluation writes to the output folder: captions, a sheet of example images, and the loss curve.

The captions of step 100 are in `captions_step_100.jsonl` and `captions_step_100.png`. `captions.jsonl` and
`captions.png` are copies of the files of the last evaluation. At the end of training they are copies of the files of
the best checkpoint. Pretraining writes the captions that it retrieves to files named `retrieval` instead. Reward
fine-tuning also writes sampled captions and their rewards, to files named `samples`.
"""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState

from ..data.dataset import CaptionDataset
from ..evaluation.plots import LOSSES, LossCurves, draw_caption_sheet, draw_loss_curve, draw_sheet
from ..evaluation.recall import ranks

SUFFIXES = ("jsonl", "png")
SHEET_IMAGES = 12
RETRIEVED_CAPTIONS = 10
PRETRAINING_LOSSES = (
    *LOSSES,
    ("eval_itc_loss", "held-out contrast", {"color": "tab:purple", "linestyle": ":"}),
    ("eval_itm_loss", "held-out matching", {"color": "tab:brown", "linestyle": ":"}),
    ("eval_itg_loss", "held-out generation", {"color": "tab:pink", "linestyle": ":"}),
)


# The training loss of rewards is a surrogate whose value has no meaning.
REWARD_LOSSES = LOSSES[1:]


def write_caption_files(
    folder: Path,
    rows: CaptionDataset,
    captions: list[str],
    state: TrainerState,
    score_name: str,
    losses: LossCurves = LOSSES,
) -> None:
    """Write captions, sheet and loss curve of an evaluation.

    Args:
        folder: the output folder.
        rows: the rows that were captioned.
        captions: their captions, in order.
        state: the state of the Trainer, with step and log.
        score_name: score that the loss curve shows beside the losses.
        losses: key in the log, label and style of each loss that the loss curve shows.
    """
    references = rows.references()
    lines: list[dict[str, Any]] = []
    for row, (caption, prompt) in enumerate(zip(captions, rows.row_prompts(), strict=True)):
        lines.append({"image_id": row, "caption": caption, "references": references[row]})
        lines[-1] |= {"prompt": prompt} if prompt else {}
    _write_table_and_sheet(folder, "captions", rows, lines, captions, state, "generated caption, one reference")
    draw_loss_curve(state.log_history, f"eval_{score_name}", folder / "loss_curve.png", losses)


def write_retrieval_files(
    folder: Path,
    rows: CaptionDataset,
    similarity: torch.Tensor,
    image_of_text: torch.Tensor,
    state: TrainerState,
    score_name: str,
) -> None:
    """Write the captions that are most similar to each image, a sheet of images with the first, and the loss curve.

    Args:
        folder: the output folder.
        rows: the rows.
        similarity (`[N, M]`): similarities of their images and of all their captions.
        image_of_text (`[M]`): row of each caption.
        state: the state of the Trainer, with step and log.
        score_name: score that the loss curve shows beside the losses.
    """
    references = rows.references()
    texts = [text for row_texts in references for text in row_texts]
    image_ranks, _ = ranks(similarity, image_of_text)
    nearest = similarity.topk(min(RETRIEVED_CAPTIONS, len(texts)), dim=1).indices.tolist()
    retrieved = [[texts[text] for text in row_texts] for row_texts in nearest]
    lines = [
        {"image_id": row, "rank": rank + 1, "retrieved": retrieved[row], "references": references[row]}
        for row, rank in enumerate(image_ranks.tolist())
    ]
    firsts = [row_texts[0] for row_texts in retrieved]
    title = "most similar caption of all rows, own caption"
    _write_table_and_sheet(folder, "retrieval", rows, lines, firsts, state, title)
    score = None if score_name.endswith("loss") else f"eval_{score_name}"
    draw_loss_curve(state.log_history, score, folder / "loss_curve.png", PRETRAINING_LOSSES, "loss, nats")


def write_sample_files(
    folder: Path, rows: CaptionDataset, shown: Sequence[int], samples: list[list[dict[str, Any]]], state: TrainerState
) -> None:
    """Write the samples of some rows and their rewards, as a table and as a sheet.

    Args:
        folder: the output folder.
        rows: the rows that were evaluated.
        shown: the rows that were sampled for.
        samples: for each of them, the samples: `caption`, `reward` and `rewards` by name. The highest reward is bold.
        state: the state of the Trainer, with step and log.
    """
    files = folder / f"samples_step_{state.global_step}"
    references = rows.references()
    lines = [
        {"image_id": row, "samples": of_row, "references": references[row]}
        for row, of_row in zip(shown, samples, strict=True)
    ]
    _write_table(files.with_suffix(".jsonl"), lines)
    texts = [
        [(f"{sample['reward']:.2f}  {sample['caption']}", sample is best) for sample in of_row]
        for of_row in samples
        for best in [max(of_row, key=lambda sample: sample["reward"])]
    ]
    title = f"Held-out rows after step {state.global_step}: reward and sampled caption"
    draw_sheet([rows.image_to_show(row) for row in shown], texts, files.with_suffix(".png"), title, 110)
    show_files_of_step(folder, "samples", state.global_step)


def rows_to_show(rows: CaptionDataset) -> range:
    """Return the evenly spaced rows that a sheet shows."""
    return range(0, len(rows), math.ceil(len(rows) / SHEET_IMAGES))


def _write_table(file: Path, lines: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    file.write_text(text, encoding="utf-8")


def _write_table_and_sheet(
    folder: Path,
    stem: str,
    rows: CaptionDataset,
    lines: list[dict[str, Any]],
    captions: list[str],
    state: TrainerState,
    title: str,
) -> None:
    """Write a line of JSON for each row, and a sheet of evenly spaced rows with a caption and their own caption."""
    files = folder / f"{stem}_step_{state.global_step}"
    _write_table(files.with_suffix(".jsonl"), lines)
    references = rows.references()
    shown = rows_to_show(rows)
    draw_caption_sheet(
        [rows.image_to_show(row) for row in shown],
        [captions[row] for row in shown],
        [references[row][0] for row in shown],
        files.with_suffix(".png"),
        f"Held-out rows after step {state.global_step}: {title}",
    )
    show_files_of_step(folder, stem, state.global_step)


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
