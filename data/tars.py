"""Tars of samples in the form of webdataset: the image and the texts of a sample are files of the same name."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import IO, Any

import datasets
from datasets.builder import Key
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from ..common.errors import InputError
from .names import IMAGE_SUFFIXES
from .samples import TEXT_KINDS, caption_kinds, captions_of_text, decode_text

END_BYTES = 512  # zeros; two such blocks follow the last file
COMPRESSED = (b"\x1f\x8b", b"BZ", b"\xfd7")  # first bytes of gzip, bzip2 and xz

PEEK_TARS, PEEK_SAMPLES = 16, 20  # tars, evenly spaced, and samples of each that are read to find the columns


@dataclass
class TarSample:
    """Files of a tar with the same name and different suffixes.

    Args:
        key: the name without suffix.
        files: content of each file by its suffix, in lower case and without the first dot.
    """

    key: str
    files: dict[str, bytes] = field(default_factory=dict)

    def texts(self) -> dict[str, list[str]]:
        """Return the captions in each text of the sample, by its suffix."""
        suffixes = [suffix for suffix in self.files if kind_of(suffix) in TEXT_KINDS]
        return {suffix: captions_of_text(kind_of(suffix), decode(suffix, self.files[suffix])) for suffix in suffixes}

    def images(self) -> list[str]:
        """Return the suffixes of the images of the sample."""
        return [suffix for suffix in self.files if is_image(suffix)]


@dataclass(frozen=True)
class TarLayout:
    """Columns that the samples of tars become.

    Args:
        last_dot: whether the name of a sample ends at its last dot, instead of at its first.
        image_column: column of the image, whatever its suffix. `None` if samples have several images.
        texts: suffixes of the texts that hold the captions, in the order in which they are tried.
    """

    last_dot: bool
    image_column: str | None
    texts: tuple[str, ...]

    @classmethod
    def of(cls, archives: Sequence[Iterable[tuple[str, IO[bytes]]]]) -> "tuple[TarLayout, list[TarSample]]":
        """Return the layout of some archives, and the samples that it was found from."""
        names = [name for archive in archives for name, _ in islice(archive, 2 * PEEK_SAMPLES)]
        last_dot = names_end_at_last_dot(names)
        samples = [sample for archive in archives for sample in islice(samples_of(archive, last_dot), PEEK_SAMPLES)]
        suffixes = list(dict.fromkeys(suffix for sample in samples for suffix in sample.images()))
        column = suffixes[0] if len(suffixes) == 1 else "image"
        has_several = any(len(sample.images()) > 1 for sample in samples)
        return cls(last_dot, None if has_several else column, caption_kinds(map(TarSample.texts, samples))), samples

    def row(self, sample: TarSample, url: str) -> dict[str, Any]:
        """Return a sample as a row."""
        row: dict[str, Any] = {}
        for suffix, content in sample.files.items():
            if is_image(suffix):
                cell = {"path": f"{sample.key}.{suffix}", "bytes": content}
                row.setdefault(self.image_column or suffix, cell)
            else:
                row[suffix] = decode(suffix, content)
        if self.texts:
            texts = sample.texts()
            row["caption"] = next(filter(None, map(texts.get, self.texts)), [])
        return {**row, "__key__": sample.key, "__url__": url}


class TarSamples(datasets.GeneratorBasedBuilder):
    """Builder that reads tars of samples, keeps them in the cache of `datasets`, and streams them.

    Images of all suffixes are in one column, which has the name of their suffix, or "image" if there are several. Other
    files are columns by their suffix. The column `caption` holds the captions in the texts.
    """

    VERSION = datasets.Version("1.0.0")  # increase it when the same file gives other rows: the cache depends on it
    DEFAULT_WRITER_BATCH_SIZE = 100

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo()

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        tars = dl_manager.download(list(map(str, self.config.data_files["train"])))
        for tar in tars:
            check_end(tar)
        archives = [dl_manager.iter_archive(tar) for tar in tars]
        some = archives[:: -(-len(archives) // PEEK_TARS)]
        layout, samples = TarLayout.of(some)
        features = dict(datasets.Dataset.from_list([layout.row(sample, "") for sample in samples]).features)
        for name in features:
            if name == layout.image_column or (layout.image_column is None and is_image(name)):
                features[name] = datasets.Image()
        if layout.texts:
            features["caption"] = datasets.List(datasets.Value("string"))
        self.info.features = datasets.Features(features)
        arguments = {"tars": tars, "archives": archives, "layout": layout}
        return [datasets.SplitGenerator(name="train", gen_kwargs=arguments)]

    def _generate_shards(self, tars: list[str], archives: list, layout: TarLayout) -> Iterator[str]:
        yield from tars

    def _generate_examples(
        self, tars: list[str], archives: list, layout: TarLayout
    ) -> Iterator[tuple[Key, dict[str, Any]]]:
        for number, (tar, archive) in enumerate(zip(tars, archives, strict=True)):
            for place, sample in enumerate(samples_of(archive, layout.last_dot)):
                row = layout.row(sample, tar)
                yield Key(number, place), {name: row.get(name) for name in self.info.features}


def check_end(tar: str) -> None:
    """Check that a local tar has its end, because Python reads one that was cut off without an error.

    Raises:
        InputError: if the tar does not end in a block of zeros.
    """
    if not os.path.isfile(tar):
        return
    with open(tar, "rb") as file:
        is_compressed = file.read(2) in COMPRESSED
        file.seek(max(0, os.path.getsize(tar) - END_BYTES))
        if not is_compressed and file.read() != bytes(END_BYTES):
            raise InputError(
                f"The tar {tar[-200:]!r} has no end, so it was cut off: download or write it again, or leave it out."
            )


# ----------------------------------------------------------------------------------------------------------------------
# Files of a sample
# ----------------------------------------------------------------------------------------------------------------------


def samples_of(archive: Iterable[tuple[str, IO[bytes]]], last_dot: bool) -> Iterator[TarSample]:
    """Yield the samples of a tar. Files of a sample follow each other, and a repeated file begins another sample.

    Args:
        archive: names and contents of its files.
        last_dot: whether the name of a sample ends at its last dot, instead of at its first.
    """
    sample = None
    for name, content in archive:
        key, suffix = split_name(name, last_dot)
        if not key or not suffix:
            continue
        if sample is None or key != sample.key or suffix in sample.files:
            if sample is not None:
                yield sample
            sample = TarSample(key)
        sample.files[suffix] = content.read()
    if sample is not None:
        yield sample


def split_name(name: str, last_dot: bool) -> tuple[str, str]:
    """Return the key and the suffix of a file: those of webdataset by default, `("a", "seg.png")` for `a.seg.png`."""
    folder, base = os.path.split(name)
    key, _, suffix = base.rpartition(".") if last_dot else base.partition(".")
    return os.path.join(folder, key) if key else "", suffix.lower()


def names_end_at_last_dot(names: Sequence[str]) -> bool:
    """Return whether dots belong to the names of samples, as in `1.5.jpg` and `1.5.txt`, rather than to suffixes.

    Webdataset splits at the first dot. That is wrong where the suffixes then are different for each sample and no
    sample has a file of a plain suffix.
    """
    parts = [split_name(name, last_dot=False) for name in names]
    plain = {key for key, suffix in parts if "." not in suffix}
    dotted = [(key, suffix) for key, suffix in parts if "." in suffix]
    repeated = Counter(suffix for _, suffix in set(dotted))
    return bool(dotted) and not any(key in plain or repeated[suffix] > 1 for key, suffix in dotted)


def kind_of(suffix: str) -> str:
    """Return the last part of a suffix: `png` for `seg.png`."""
    return suffix.rpartition(".")[2]


def is_image(suffix: str) -> bool:
    """Return whether a suffix is one of images."""
    return f".{kind_of(suffix)}" in IMAGE_SUFFIXES


def decode(suffix: str, content: bytes) -> Any:
    """Return the content of a file that is not an image, or `None` if it is damaged."""
    kind = kind_of(suffix)
    try:
        if kind in TEXT_KINDS:
            return decode_text(kind, content)
        return WebDataset.DECODERS.get(kind, bytes)(content)
    except Exception:  # each decoder raises its own errors
        return None
