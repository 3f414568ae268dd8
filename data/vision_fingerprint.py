"""Fingerprint of a vision encoder, to check that it computed the features of a store."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import BaseImageProcessor

from ..backbones_qformer import commit_of


@dataclass(frozen=True)
class VisionFingerprint:
    """Identity of the weights and the image processor that the features of an image depend on.

    Weights from the Hub are identified by name and commit. Weights in a folder are identified by their content, because
    a folder may move and its weights may change.

    Args:
        name_or_path: id on the Hub, or absolute path of the folder.
        revision: commit on the Hub; `None` for a folder.
        weights_sha256: hash of the weight files in a folder; `None` for a model on the Hub.
        image_processor: configuration of the image processor.
    """

    name_or_path: str
    revision: str | None
    weights_sha256: str | None
    image_processor: dict[str, Any]

    @classmethod
    def of(cls, name_or_path: str, revision: str | None, image_processor: BaseImageProcessor) -> "VisionFingerprint":
        """Take the fingerprint of a vision encoder.

        Args:
            name_or_path: id on the Hub, or a folder.
            revision: branch, tag or commit on the Hub.
            image_processor: its image processor.

        Raises:
            OSError: if the model does not exist.
        """
        weights_sha256 = None
        if os.path.isdir(name_or_path):
            name_or_path = os.path.abspath(name_or_path)
            weights_sha256 = hash_weights(Path(name_or_path))
        config = json.loads(image_processor.to_json_string())
        for irrelevant in ("auto_map", "processor_class"):
            config.pop(irrelevant, None)
        return cls(str(name_or_path), commit_of(name_or_path, revision), weights_sha256, config)

    def has_same_weights(self, other: "VisionFingerprint") -> bool:
        """Return whether two fingerprints have the same weights. The paths of folders may differ."""
        if self.weights_sha256 is not None or other.weights_sha256 is not None:
            return self.weights_sha256 == other.weights_sha256
        return (self.name_or_path, self.revision) == (other.name_or_path, other.revision)

    def __str__(self) -> str:
        version = f"weights {self.weights_sha256[:12]}" if self.weights_sha256 else f"revision {self.revision}"
        return f"{self.name_or_path!r} ({version})"


def hash_weights(folder: Path) -> str:
    """Return the SHA-256 of all weight files in a folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")):
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()
