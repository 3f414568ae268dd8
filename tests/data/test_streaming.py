"""Streams: their order, how readers share the rows, rows that cannot be used, and mixtures of streams."""

from collections import Counter

import datasets
import pytest
from torch.utils.data import DataLoader

from qformer_captioner.common.errors import InputError
from qformer_captioner.data.augmentation import Augmentation
from qformer_captioner.data.dataset import CaptionSource
from qformer_captioner.data.image_paths import ImageFolder
from qformer_captioner.data.skipped_rows import SkippedRows
from qformer_captioner.data.splits import load_splits
from qformer_captioner.data.streaming import CaptionStream

from ..fixtures.captioned_files import CAPTIONS, KINDS, numbered, rows_with_paths, stream, take, write_jsonl, write_tar


@pytest.fixture
def many(folder):
    """Return a pattern for three files of 5, 4 and 3 rows, whose captions are their numbers."""
    number = iter(range(12))
    for file, rows in enumerate((5, 4, 3)):
        rows = [{"image": "pictures/red.png", "caption": str(next(number))} for _ in range(rows)]
        write_jsonl(folder / f"many-{file}.jsonl", rows)
    return folder / "many-*.jsonl"


def numbers(rows, count) -> list[int]:
    """Return the numbers that the captions of the first rows are."""
    return [int(row["captions"][0]) for row, _ in zip(iter(rows), range(count), strict=False)]


def test_a_stream_starts_again_in_another_order(many):
    rows = numbers(stream(many, shuffle_buffer=4), 36)
    passes = [rows[:12], rows[12:24], rows[24:]]
    assert all(sorted(each) == list(range(12)) for each in passes)
    assert passes[0] != passes[1] != passes[2] and passes[0] != sorted(passes[0])
    assert numbers(stream(many, shuffle_buffer=4), 36) == rows, "the order follows from the seed"
    assert numbers(stream(many, shuffle_buffer=4, augmentation=Augmentation(seed=7)), 36) != rows


@pytest.mark.parametrize("shuffle_buffer", [0, 4])
@pytest.mark.parametrize(("processes", "workers"), [(2, 1), (1, 3), (3, 1), (2, 2)])
def test_processes_and_workers_share_the_rows_of_a_pass(many, processes, workers, shuffle_buffer):
    """With (2, 1) and (1, 3) there are at least as many files as readers, with (2, 2) there are not."""
    shown = Counter()
    for process in range(processes):
        data = stream(many, shuffle_buffer=shuffle_buffer, process_index=process, num_processes=processes)
        for worker in range(workers):
            rows = data._one_pass(data.sources[0], 0, process * workers + worker, processes * workers)
            shown.update(row["caption"] for row in rows)
    assert shown == Counter(map(str, range(12)))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_data_loading_processes_share_the_rows(many):
    loader = DataLoader(stream(many), batch_size=1, num_workers=3, collate_fn=lambda rows: rows[0])
    rows = numbers(loader, 9)  # in turn, from files of 5, 4 and 3 rows
    assert rows == [0, 5, 9, 1, 6, 10, 2, 7, 11]


def test_the_first_rows_of_a_stream_are_also_shared(many):
    rows = load_splits(str(many), streaming=True)[0]
    for readers in (1, 2, 3):
        data = CaptionStream(
            [CaptionSource("rows", rows, image_folder=ImageFolder(many.parent))], SkippedRows(), max_rows=7
        )
        shown = [
            row["caption"] for reader in range(readers) for row in data._one_pass(data.sources[0], 0, reader, readers)
        ]
        assert sorted(map(int, shown)) == list(range(7)), readers


def test_too_few_rows_for_the_readers_is_an_error(many):
    with pytest.raises(InputError, match="too few rows for 40 processes"):
        next(iter(stream(many, process_index=39, num_processes=40)))


def test_a_damaged_image_of_a_stream_is_skipped(folder):
    (folder / "pictures" / "red.png").write_bytes(b"no image")
    for kind in ("folder of images", "parquet, images"):
        skipped = SkippedRows()
        assert take(stream(KINDS[kind](folder), skipped=skipped), 1)[0][1] == tuple(CAPTIONS[1])
        assert "cannot be read: it is plain text" in skipped.pending[0]["reason"], kind


def test_a_skipped_row_of_a_stream_is_recorded_once(folder):
    rows = rows_with_paths()
    rows[1]["image"] = "gone.png"
    rows[2]["caption"] = []
    skipped = SkippedRows()
    data = stream(write_jsonl(folder / "rows.jsonl", rows), skipped=skipped)
    assert len({captions for _, captions in take(data, 20)}) == 4
    assert [entry["file"] for entry in skipped.pending] == ["gone.png", "pictures/blue.png"]
    assert {entry["row"] for entry in skipped.pending} == {None}, "the rows of a stream have no numbers"
    assert len(skipped) == 2


def test_skipped_images_without_a_name_count_one_by_one(folder, tmp_path):
    rows = [{"image": {"bytes": b"no image", "path": None}, "caption": "one"} for _ in range(3)]
    rows += [{"image": {"bytes": (folder / "pictures" / "red.png").read_bytes(), "path": None}, "caption": "two"}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    skipped = SkippedRows()
    take(stream(tmp_path / "rows.parquet", skipped=skipped), 2)
    assert len(skipped) == 3


def test_a_stream_without_a_usable_row_is_an_error(folder):
    rows = [{"image": "gone.png", "caption": "one"}] * 3
    with pytest.raises(InputError, match="No row of train of .* can be used; .*no image file"):
        next(iter(stream(write_jsonl(folder / "rows.jsonl", rows))))


def test_a_stream_augments_its_rows_as_a_data_set_does(folder):
    name = write_jsonl(folder / "rows.jsonl", rows_with_paths())
    data = stream(
        name, augmentation=Augmentation(random_resized_crop_scale=0.3, captions_per_image=1, prompts=["a", "b"])
    )
    rows = [row for row, _ in zip(iter(data), range(60), strict=False)]
    assert {len(row["captions"]) for row in rows} == {1} and {row["prompt"] for row in rows} == {"a", "b"}
    assert len({row["image"].size for row in rows}) > 5
    again = [row for row, _ in zip(iter(data), range(60), strict=False)]
    assert [row["captions"] for row in again] == [row["captions"] for row in rows]


def test_references_of_a_stream_are_the_captions_of_its_first_rows(folder):
    name, _ = write_tar(folder / "rows.tar", folder), None
    assert list(stream(name, image="png", caption="json.all.captions").references()) == CAPTIONS


def test_scenes_can_be_streamed():
    rows = load_splits("scenes", max_train_samples=3, max_eval_samples=1, streaming=True)[0]
    data = CaptionStream([CaptionSource("scenes", rows)], SkippedRows())
    assert next(iter(data))["image"].size == (48, 48)


@pytest.mark.parametrize("weights", [[3, 1], [0.1, 0.3], [7, 1]])
def test_streams_are_mixed_in_the_shares_of_their_weights_at_any_time(folder, weights):
    data = stream(numbered(folder, "a", 5), numbered(folder, "b", 4), weights=weights)
    for count in (8, 24, 80):
        shown = Counter(row["captions"][0][0] for row, _ in zip(iter(data), range(count), strict=False))
        assert abs(shown["a"] - count * weights[0] / sum(weights)) <= 1, (count, shown)
