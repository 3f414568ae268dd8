"""Reading image features from disk with our feature store and with its alternatives, from a warm page cache.

    python -m benchmarks.features [--rows 4000] [--repetitions 5]

Rows are `[50, 768]` in float16, as from CLIP ViT-B/32, and are read in shuffled batches on one core. All sides must
give the same rows before their epochs are timed in turn. Reading more and more rows of a store of 1,000,000 then shows
how memory grows. Last, a store of 1,000,000 rows of 8 to 64 features is compared with one of equal rows of the mean
length. The files of the large stores are sparse. h5py takes part if it is installed. The benchmark needs 2 GB of disk.
"""

import argparse
import importlib.util
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qformer_captioner.data.feature_shards import FeatureBatch, SplitLayout
from qformer_captioner.data.feature_store import FeatureStore, finish_store
from qformer_captioner.data.features import SplitFeatures
from qformer_captioner.data.vision_fingerprint import VisionFingerprint

from .common import (
    machine_facts,
    new_figure,
    peak_memory,
    resident_memory,
    run_worker,
    save_figure,
    summarize,
    time_in_turn,
    write_result,
)

SHAPE = (50, 768)
BATCH_SIZES = (64, 256, 1024)
ROWS_IN_LARGE_STORE = 1_000_000
LARGE_STORE_SIDES = ("ours", "numpy memmap")
LENGTHS, WIDTH = (8, 64), 64  # smallest and largest number of features of a row, and their width

ReadRows = Callable[[list[int]], torch.Tensor]  # row numbers to features [B, N, Dv]
Rates = dict[str, dict[str, dict[str, float]]]  # by batch size and side: summary of rows per second


def make_layout(folder: Path, rows: int, shape: tuple[int | None, int] = SHAPE) -> SplitLayout:
    return SplitLayout(folder / "train", rows, rows_per_shard=2048, views=1, shape=shape, dtype="float16")


def finish_and_open(folder: Path, layout: SplitLayout) -> SplitFeatures:
    """Complete a store whose shards are written, and open its split."""
    finish_store(folder, VisionFingerprint("made up", None, None, {}), {}, {"train": layout})
    return FeatureStore(folder).split("train")


# --- The sides: each writes features `[R, N, Dv]` to a folder, and returns a function that reads rows from it ---------


def feature_store(folder: Path, features: np.ndarray) -> ReadRows:
    layout = make_layout(folder, len(features))
    for shard in layout.shards:
        values = features[layout.rows_of(shard)]
        layout.write(shard, [FeatureBatch(values.reshape(-1, SHAPE[1]), np.full((len(values), 1), SHAPE[0]), [])])
    split = finish_and_open(folder, layout)
    return lambda rows: split.read(rows).image_embeds


def numpy_memmap(folder: Path, features: np.ndarray) -> ReadRows:
    np.save(folder / "features.npy", features)
    array = np.load(folder / "features.npy", mmap_mode="r")
    return lambda rows: torch.from_numpy(array[rows])


def safetensors_mmap(folder: Path, features: np.ndarray) -> ReadRows:
    from safetensors import safe_open
    from safetensors.numpy import save_file

    save_file({"features": features}, folder / "features.safetensors")
    tensor = safe_open(folder / "features.safetensors", framework="pt").get_slice("features")
    return lambda rows: torch.stack([tensor[row] for row in rows])


def datasets_array2d(folder: Path, features: np.ndarray) -> ReadRows:
    from datasets import Array2D, Dataset, Features, load_from_disk

    def examples() -> Iterator[dict[str, np.ndarray]]:
        for row in features:
            yield {"features": row}

    schema = Features({"features": Array2D(shape=SHAPE, dtype="float16")})
    dataset = Dataset.from_generator(examples, features=schema, cache_dir=str(folder / "cache"))
    dataset.save_to_disk(folder / "data")
    dataset.cleanup_cache_files()
    saved = load_from_disk(folder / "data").with_format("torch")
    return lambda rows: saved[rows]["features"]


def file_per_row(folder: Path, features: np.ndarray) -> ReadRows:
    for number, row in enumerate(features):
        torch.save(torch.from_numpy(row.copy()), folder / f"{number}.pt")
    return lambda rows: torch.stack([torch.load(folder / f"{row}.pt") for row in rows])


def hdf5(folder: Path, features: np.ndarray) -> ReadRows:
    import h5py

    with h5py.File(folder / "features.h5", "w") as file:
        file["features"] = features
    dataset = h5py.File(folder / "features.h5")["features"]
    return lambda rows: torch.from_numpy(np.stack([dataset[row] for row in rows]))  # a list of rows must be sorted


SIDES: dict[str, Callable[[Path, np.ndarray], ReadRows]] = {
    "ours": feature_store,
    "numpy memmap": numpy_memmap,
    "safetensors": safetensors_mmap,
    "datasets Array2D": datasets_array2d,
    "a .pt file each": file_per_row,
}
if importlib.util.find_spec("h5py"):
    SIDES["h5py"] = hdf5


# --- Speed ------------------------------------------------------------------------------------------------------------


def write_sides(features: np.ndarray, folder: Path) -> dict[str, ReadRows]:
    """Write features `[R, N, Dv]` with every side, and check that all of them read the same rows.

    Raises:
        SystemExit: if a side reads other rows.
    """
    readers = {}
    for name, write in SIDES.items():
        side_folder = folder / name.replace(" ", "_")
        side_folder.mkdir()
        readers[name] = write(side_folder, features)
    sample = np.random.default_rng(1).permutation(len(features))[:256].tolist()
    for name, read in readers.items():
        if not np.array_equal(read(sample).numpy(), features[sample]):
            raise SystemExit(f"All sides must read the same rows, and {name} does not. Nothing was measured.")
    print(f"All sides give the same {len(sample)} of {len(features):,} rows.")
    return readers


def read_epoch(read: Callable[[list[int]], object], batches: list[list[int]]) -> None:
    for batch in batches:
        read(batch)


def measure_rates(readers: dict[str, ReadRows], num_rows: int, repetitions: int) -> Rates:
    """Time epochs in shuffled order in turn, for each batch size."""
    results: Rates = {}
    for batch_size in BATCH_SIZES:
        order = np.random.default_rng(2).permutation(num_rows)
        starts = range(0, num_rows - batch_size + 1, batch_size)
        batches = [order[start : start + batch_size].tolist() for start in starts]
        epochs = {name: partial(read_epoch, read, batches) for name, read in readers.items()}
        rows_read = len(batches) * batch_size
        rates = {
            name: summarize([rows_read / second for second in seconds])
            for name, seconds in time_in_turn(repetitions, **epochs).items()
        }
        for name, rate in rates.items():
            ratio = rates["ours"]["median"] / rate["median"]
            span = f"({rate['min']:,.0f} to {rate['max']:,.0f})"
            print(f"batches of {batch_size:>4}  {name:<17} {rate['median']:>9,.0f} rows/s  {span:<22} {ratio:6.2f} x")
        results[str(batch_size)] = rates
    return results


def measure_speed(num_rows: int, repetitions: int) -> Rates:
    """Return the rows per second of each batch size and side, for a store of `num_rows` random rows."""
    features = np.random.default_rng(0).standard_normal((num_rows, *SHAPE), dtype=np.float32).astype(np.float16)
    with tempfile.TemporaryDirectory() as folder:
        readers = write_sides(features, Path(folder))
        del features  # leaves the memory to the page cache
        return measure_rates(readers, num_rows, repetitions)


# --- Memory -----------------------------------------------------------------------------------------------------------


def write_sparse_store(layout: SplitLayout, lengths: np.ndarray) -> None:
    """Write a store whose files are sparse: their rows are zeros that take no space on disk.

    Args:
        layout: its layout.
        lengths: number of features of each row, `[R]`.
    """
    for shard in layout.shards:
        own = lengths[layout.rows_of(shard), None]
        layout.write(shard, [FeatureBatch(np.zeros((0, layout.shape[1]), np.float16), own, [])])
        end = layout.path(shard).stat().st_size
        os.truncate(layout.path(shard), end + own.sum().item() * layout.feature_bytes)


def memmap_reader(layout: SplitLayout) -> ReadRows:
    """Return a function that reads the files of a store as memory maps of numpy."""
    arrays = [np.load(layout.path(shard), mmap_mode="r") for shard in layout.shards]

    def read(rows: list[int]) -> torch.Tensor:
        positions = [divmod(row, layout.rows_per_shard) for row in rows]
        return torch.from_numpy(np.stack([arrays[shard][position, 0] for shard, position in positions]))

    return read


def read_in_this_process(side: str, num_rows: int, folder: Path) -> dict[str, float]:
    """Read random rows of a store, and return how far memory rises at most, in MB."""
    features = FeatureStore(folder).split("train")
    read: Callable[[list[int]], object] = features.read if side == "ours" else memmap_reader(features.layout)
    before = resident_memory()
    rows = np.random.default_rng(3).integers(len(features), size=num_rows)
    for start in range(0, num_rows, 250):
        read(rows[start : start + 250].tolist())
    return {"mb": peak_memory() - before}


def measure_memory() -> list[dict[str, Any]]:
    """Return the MB that reading takes, by side and number of rows. Each figure is from a fresh process."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        layout = make_layout(Path(folder), ROWS_IN_LARGE_STORE)
        write_sparse_store(layout, np.full(ROWS_IN_LARGE_STORE, SHAPE[0]))
        finish_and_open(Path(folder), layout)
        for side in LARGE_STORE_SIDES:
            for num_rows in (1_000, 5_000, 10_000, 20_000):
                mb = run_worker("features", side, num_rows, folder)["mb"]
                results.append({"side": side, "rows_read": num_rows, "mb": mb})
                print(f"{side:<13} {num_rows:>7,} of {ROWS_IN_LARGE_STORE:,} rows read: {mb:7.1f} MB more than before")
    return results


# --- Rows of different lengths ----------------------------------------------------------------------------------------


def measure_lengths(repetitions: int) -> Rates:
    """Return the rows per second, by batch size, of stores with rows of different and of equal lengths.

    The stores take turns after every batch, because a slow spell of the machine can be shorter than an epoch.
    """
    generator, num_rows = np.random.default_rng(4), ROWS_IN_LARGE_STORE
    different = generator.integers(LENGTHS[0], LENGTHS[1] + 1, size=num_rows)
    mean = sum(LENGTHS) // 2
    sides = {"different": ((None, WIDTH), different), "equal": ((mean, WIDTH), np.full(num_rows, mean))}
    results: Rates = {}
    with tempfile.TemporaryDirectory() as folder:
        readers = {}
        for name, (shape, lengths) in sides.items():
            layout = make_layout(Path(folder) / name, num_rows, shape)
            write_sparse_store(layout, lengths)
            readers[name] = SplitFeatures(layout, {}).read
        rows = generator.permutation(num_rows)[:65_536]
        for size in BATCH_SIZES:
            batches = [rows[start : start + size].tolist() for start in range(0, len(rows), size)]
            for read in readers.values():
                read_epoch(read, batches)  # fills the page cache
            seconds: dict[str, list[float]] = {name: [] for name in readers}
            for batch in batches * repetitions:
                for name, read in readers.items():
                    start = time.perf_counter()
                    read(batch)
                    seconds[name].append((time.perf_counter() - start) / len(batch))
            rates = {name: summarize([1 / second for second in own]) for name, own in seconds.items()}
            ratio = rates["different"]["median"] / rates["equal"]["median"]
            medians = ", ".join(f"{name} lengths {rate['median']:,.0f} rows/s" for name, rate in rates.items())
            print(f"batches of {size:>4}  {medians}: {ratio:.2f} x")
            results[str(size)] = rates
    return results


# --- Figure and command -----------------------------------------------------------------------------------------------


def plot(rates: Rates, memory: list[dict[str, Any]]) -> None:
    """Draw the rows per second of each side, and memory over the number of rows that were read."""
    figure, (rates_axis, memory_axis) = new_figure(2, 9, 3.2)
    sides = list(next(iter(rates.values())))
    for number, (batch_size, summaries) in enumerate(rates.items()):
        low, median, high = (
            np.array([summaries[side][name] for side in sides]) / 1000 for name in ("min", "median", "max")
        )
        positions = np.arange(len(sides)) + 0.27 * (number - 1)
        errors = [median - low, high - median]
        rates_axis.barh(positions, median, 0.25, xerr=errors, label=f"batches of {batch_size}")
    rates_axis.axvline(80, color="grey", linestyle=":", linewidth=1)
    rates_axis.set(yticks=range(len(sides)), yticklabels=sides, xlabel="thousand rows of [50 x 768] float16 per second")
    rates_axis.invert_yaxis()
    rates_axis.legend(fontsize=8)
    for side in LARGE_STORE_SIDES:
        points = [(row["rows_read"], row["mb"]) for row in memory if row["side"] == side]
        memory_axis.plot(*zip(*points, strict=True), marker="o", label=side)
    memory_axis.set(xlabel="rows read, of 1,000,000", ylabel="MB more than before", xlim=(0, None), ylim=(0, None))
    memory_axis.legend(fontsize=8)
    save_figure(figure, "features")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=4_000, help="Number of rows in the stores whose speed is measured.")
    parser.add_argument("--repetitions", type=int, default=5, help="Number of timed epochs of each side.")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)  # side, rows, folder: see run_worker
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)
    if options.worker:
        side, num_rows, folder = options.worker
        print(json.dumps(read_in_this_process(side, int(num_rows), Path(folder))))
        return
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rates, memory = measure_speed(options.rows, options.repetitions), measure_memory()
    plot(rates, memory)
    facts = machine_facts("qformer-captioner", "torch", "numpy", "datasets", "safetensors")
    facts |= {"rows": options.rows, "shape": SHAPE, "rows_per_second": rates, "memory": memory}
    write_result("features", facts | {"rows_per_second_by_lengths": measure_lengths(options.repetitions)})


if __name__ == "__main__":
    main()
