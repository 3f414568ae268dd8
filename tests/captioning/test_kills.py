"""Runs that are killed and resumed write what a run without a stop writes, byte for byte."""

import pytest

from benchmarks.caption_kills import check, make_images

from ..fixtures import tiny

IMAGES, KILLS = 100, 2

RUNS = [("jsonl", 1), ("sidecars", 1), ("parquet", 1), ("tar", 1), ("jsonl", 2), ("sidecars", 2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    tiny.captioner().save_pretrained(folder / "model")
    make_images(folder / "images", IMAGES)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "processes"), RUNS)
def test_a_killed_run_ends_as_a_run_without_a_stop(folder, kind, processes):
    figures = check(folder / "model", folder / "images", kind, processes, KILLS, batch_size=8 if processes == 1 else 2)
    assert figures["equal"] and figures["kills"] == KILLS
    assert figures["files"] == (IMAGES if kind == "sidecars" else 1)
    assert figures["exit"] == [1, 1]  # one image is broken
