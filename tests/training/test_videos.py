"""A captioner of drawn videos tells in which direction a shape moves."""

import json
import random
from pathlib import Path

import pytest
import torch

from qformer_captioner.data.collator import CaptionCollator
from qformer_captioner.data.dataset import CaptionDataset, CaptionSource
from qformer_captioner.data.image_paths import ImageFolder
from qformer_captioner.data.loading import load_rows
from qformer_captioner.data.scenes import COLOURS, SHAPES, Scene, Thing, draw
from qformer_captioner.data.skipped_rows import SkippedRows
from qformer_captioner.training.from_scratch import build_from_scratch

FRAMES = 4
SIDE = 16
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SIZES = dict(hidden_size=96, intermediate_size=192, num_hidden_layers=1, num_attention_heads=4, initializer_range=0.07)


def write_videos(folder: Path, number: int, seed: int) -> CaptionDataset:
    """Draw videos of a shape that moves over a part of the picture, and return them as rows of a data set."""
    rng = random.Random(seed)
    folder.mkdir()
    rows = []
    for video in range(number):
        direction = rng.choice(list(DIRECTIONS))
        dx, dy = DIRECTIONS[direction]
        shape, colour, shade, step = rng.choice(SHAPES), rng.choice(list(COLOURS)), rng.random(), rng.uniform(0.1, 0.16)
        x, y = (rng.uniform(0.15, 0.85 - abs(d) * 3 * step) + (d < 0) * 3 * step for d in (dx, dy))
        names = [f"{video}_{frame}.png" for frame in range(FRAMES)]
        for frame, name in enumerate(names):
            thing = Thing(shape, colour, "large", x + dx * step * frame, y + dy * step * frame)
            draw(Scene((thing,)), random.Random(shade), SIDE).save(folder / name)
        rows.append({"frames": names, "caption": f"it moves {direction}"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = load_rows(str(folder / "rows.jsonl"))["train"]
    return CaptionDataset(CaptionSource("train", rows, image_folder=ImageFolder(folder), num_frames=4), SkippedRows())


def train(model, data: CaptionDataset, steps: int) -> None:
    batch = CaptionCollator(model.processor)([data[row] for row in range(len(data))])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20) * (1 - step / steps))
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(data), (32,))
        optimizer.zero_grad()
        model(**{name: values[rows] for name, values in batch.items()}).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


@pytest.mark.slow
def test_a_captioner_tells_the_direction_of_motion_by_the_order_of_frames(tmp_path):
    training, test = write_videos(tmp_path / "training", 500, seed=0), write_videos(tmp_path / "test", 120, seed=1)
    torch.manual_seed(0)
    # One patch is the whole picture, so that a tiny encoder sees positions, and only the Q-Former compares frames.
    vision = dict(SIZES, model_type="vit", image_size=SIDE, patch_size=SIDE, hidden_dropout_prob=0.0)
    text = dict(SIZES, model_type="llama", max_position_embeddings=32)
    qformer = dict(SIZES, num_query_tokens=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    captions = [caption for captions in training.references() for caption in captions]
    model = build_from_scratch(vision, text, dict(qformer, num_frames=FRAMES), captions)
    train(model, training, steps=120)

    videos = [test[row]["image"] for row in range(len(test))]
    expected = [caption for (caption,) in test.references()]

    def share_right(videos) -> float:
        found = model.caption(videos, max_new_tokens=4)
        return sum(caption == right for caption, right in zip(found, expected, strict=True)) / len(expected)

    assert share_right(videos) >= 0.95
    # The line of motion is seen in frames of any order, so half of the directions along it are right by chance.
    rng = random.Random(0)
    assert share_right([rng.sample(video, FRAMES) for video in videos]) < 0.65
    assert share_right([video[::-1] for video in videos]) < 0.05
    with torch.no_grad():
        model.qformer.frame_embeddings.zero_()
    assert share_right(videos) < 0.65
