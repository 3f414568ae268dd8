"""Features on disk: rows a second of ours beside what a user would keep them in instead, from a warm page cache.

python -m benchmarks.features [--rows 4000] [--repetitions 5]

Rows are [50 x 768] in float16 (CLIP ViT-B/32), read in shuffled batches on one core. It first checks that all sides
give the same rows, then times epochs in turn; then it reads more and more rows of a store of 1,000,000, which is files
of nothing but a hole, to show how memory grows. h5py takes part where it is installed. Needs 2 GB of disk for a while.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from qformer_captioner.data.feature_shards import FeatureBatch, SplitLayout
from qformer_captioner.data.feature_store import FeatureStore, finish_store
from qformer_captioner.data.features import SplitFeatures
from qformer_captioner.data.vision_fingerprint import VisionFingerprint

from .common import RESULTS, alternate, machine, memory, spread, write_result

SHAPE = (50, 768)
BATCHES = (64, 256, 1024)
Read = Callable[[list[int]], torch.Tensor]


def layout_of(folder: Path, rows: int) -> SplitLayout:
    return SplitLayout(folder / "train", rows, rows_per_shard=2048, views=1, shape=SHAPE, dtype="float16")


def opened(folder: Path, layout: SplitLayout) -> SplitFeatures:
    finish_store(folder, VisionFingerprint("made up", None, None, {}), {}, {"train": layout})
    return FeatureStore(folder).split("train")


# --- The sides: each writes the same rows its own way, and returns what reads a batch of them -------------------------


def ours(folder: Path, rows: np.ndarray) -> Read:
    layout = layout_of(folder, len(rows))
    for shard in layout.shards:
        layout.write(shard, [FeatureBatch(rows[layout.rows_of(shard), None], [])])
    return opened(folder, layout).read


def numpy_memmap(folder: Path, rows: np.ndarray) -> Read:
    np.save(folder / "features.npy", rows)
    array = np.load(folder / "features.npy", mmap_mode="r")
    return lambda batch: torch.from_numpy(array[batch])


def safetensors_mmap(folder: Path, rows: np.ndarray) -> Read:
    from safetensors import safe_open
    from safetensors.numpy import save_file

    save_file({"features": rows}, folder / "features.safetensors")
    tensor = safe_open(folder / "features.safetensors", framework="pt").get_slice("features")
    return lambda batch: torch.stack([tensor[row] for row in batch])


def datasets_array2d(folder: Path, rows: np.ndarray) -> Read:
    from datasets import Array2D, Dataset, Features, load_from_disk

    def each():
        for row in rows:
            yield {"features": row}

    features = Features({"features": Array2D(shape=SHAPE, dtype="float16")})
    made = Dataset.from_generator(each, features=features, cache_dir=str(folder / "cache"))
    made.save_to_disk(folder / "data")
    made.cleanup_cache_files()
    data = load_from_disk(folder / "data").with_format("torch")
    return lambda batch: data[batch]["features"]


def a_file_each(folder: Path, rows: np.ndarray) -> Read:
    for row, features in enumerate(rows):
        torch.save(torch.from_numpy(features.copy()), folder / f"{row}.pt")
    return lambda batch: torch.stack([torch.load(folder / f"{row}.pt") for row in batch])


def h5(folder: Path, rows: np.ndarray) -> Read:
    import h5py

    with h5py.File(folder / "features.h5", "w") as file:
        file["features"] = rows
    data = h5py.File(folder / "features.h5")["features"]
    return lambda batch: torch.from_numpy(np.stack([data[row] for row in batch]))  # h5py wants sorted rows otherwise


SIDES = {
    "ours": ours,
    "numpy memmap": numpy_memmap,
    "safetensors": safetensors_mmap,
    "datasets Array2D": datasets_array2d,
    "a .pt file each": a_file_each,
}


def speed(number: int, repetitions: int, folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Rows a second by batch size and side."""
    rows = np.random.default_rng(0).standard_normal((number, *SHAPE), dtype=np.float32).astype(np.float16)
    sides = SIDES | ({"h5py": h5} if importlib.util.find_spec("h5py") else {})
    readers = {}
    for name, write in sides.items():
        own = folder / name.replace(" ", "_")
        own.mkdir()
        readers[name] = write(own, rows)
    some = np.random.default_rng(1).permutation(number)[:256].tolist()
    for name, read in readers.items():
        if not np.array_equal(read(some).numpy(), rows[some]):
            raise SystemExit(f"{name} gives other rows: no timing.")
    print(f"All sides give the same {len(some)} of {number:,} rows.")
    del rows

    results = {}
    for size in BATCHES:
        order = np.random.default_rng(2).permutation(number)
        batches = [order[start : start + size].tolist() for start in range(0, number - size + 1, size)]

        def epoch(read: Read, batches=batches) -> None:
            for batch in batches:
                read(batch)

        runs = {name: (lambda read=read: epoch(read)) for name, read in readers.items()}
        seconds = alternate(repetitions, **runs)
        count = len(batches) * size
        results[str(size)] = {name: spread([count / each for each in values]) for name, values in seconds.items()}
        for name, rates in results[str(size)].items():
            ratio = results[str(size)]["ours"]["median"] / rates["median"]
            span = f"({rates['min']:,.0f} to {rates['max']:,.0f})"
            print(f"batches of {size:>4}  {name:<17} {rates['median']:>9,.0f} rows/s  {span:<22} {ratio:6.2f} x")
    return results


# --- Memory -----------------------------------------------------------------------------------------------------------


def growth(folder: Path, rows: int = 1_000_000) -> list[dict[str, float]]:
    """MB above a process that has read nothing, by how many rows it reads: at the most, and what it keeps of files."""
    layout = layout_of(folder, rows)
    for shard in layout.shards:
        layout.write(shard, [])
        os.truncate(layout.path(shard), layout.path(shard).stat().st_size + layout.bytes_of(shard))
    opened(folder, layout)
    results = []
    for side in ("ours", "numpy memmap"):
        for read in (1_000, 5_000, 10_000, 20_000):
            run = [sys.executable, "-m", "benchmarks.features", "--one", side, str(read), str(folder)]
            peak = float(subprocess.run(run, check=True, capture_output=True, text=True).stdout.split()[-1])
            results.append({"side": side, "rows_read": read, "mb": peak})
            print(f"{side:<13} {read:>7,} of {rows:,} rows read: {peak:7.1f} MB more than before")
    return results


def read_one(side: str, number: int, folder: Path) -> None:
    features = FeatureStore(folder).split("train")
    layout = features.layout
    if side == "ours":
        read = features.read
    else:
        maps = [np.load(layout.path(shard), mmap_mode="r") for shard in layout.shards]

        def read(batch: list[int]) -> torch.Tensor:
            places = [divmod(row, layout.rows_per_shard) for row in batch]
            return torch.from_numpy(np.stack([maps[shard][place, 0] for shard, place in places]))

    before = memory("VmRSS")
    order = np.random.default_rng(3).integers(len(features), size=number)
    for start in range(0, number, 250):
        read(order[start : start + 250].tolist())
    print(memory("VmHWM") - before)


def draw(rates: dict[str, dict[str, dict[str, float]]], rows: list[dict[str, float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    sides = list(next(iter(rates.values())))
    for place, (size, own) in enumerate(rates.items()):
        values = [own[side]["median"] / 1000 for side in sides]
        errors = [[abs(own[side][end] / 1000 - own[side]["median"] / 1000) for side in sides] for end in ("min", "max")]
        axes[0].barh(np.arange(len(sides)) + 0.27 * (place - 1), values, 0.25, xerr=errors, label=f"batches of {size}")
    axes[0].axvline(80, color="grey", linestyle=":", linewidth=1)
    axes[0].set(yticks=range(len(sides)), yticklabels=sides, xlabel="thousand rows of [50 x 768] float16 a second")
    axes[0].invert_yaxis()
    axes[0].legend(fontsize=8)
    for side in ("ours", "numpy memmap"):
        own = [row for row in rows if row["side"] == side]
        axes[1].plot([row["rows_read"] for row in own], [row["mb"] for row in own], marker="o", label=side)
    axes[1].set(xlabel="rows read, of 1,000,000", ylabel="MB more than before", xlim=(0, None), ylim=(0, None))
    axes[1].legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(RESULTS / "features.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=4_000)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        read_one(options.one[0], int(options.one[1]), Path(options.one[2]))
        return
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        rates = speed(options.rows, options.repetitions, Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        rows = growth(Path(folder))
    RESULTS.mkdir(exist_ok=True)
    draw(rates, rows)
    facts = machine("qformer-captioner", "torch", "numpy", "datasets", "safetensors")
    write_result("features", facts | {"rows": options.rows, "shape": SHAPE, "rows_per_second": rates, "memory": rows})


if __name__ == "__main__":
    main()
