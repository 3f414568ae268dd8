"""Caption annotations of COCO and of Karpathy's splits."""

import json
import os
import re
from typing import Any

import datasets


def read_coco_annotations(file: str) -> datasets.Dataset | None:
    """Read COCO's `captions_*.json` or Karpathy's `dataset_coco.json`.

    Returns:
        One row for each image with the columns `image` (a path), `image_id` and `caption` (all captions of the image).
        Karpathy's file also gives a column `split`. `None` if the file has neither format.

    Raises:
        KeyError, TypeError: if entries lack fields, or the fields have other types.
    """
    with open(file, encoding="utf-8") as opened:
        if not re.search(r'^\s*\{.*"(images|annotations)"\s*:\s*\[', opened.read(2**20), re.DOTALL):
            return None
        opened.seek(0)
        content = json.load(opened)
    images = content.get("images")
    if not isinstance(images, list):
        return None
    return coco_rows(images, content["annotations"]) if "annotations" in content else karpathy_rows(images)


def coco_rows(images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> datasets.Dataset:
    """Gather the captions of each image."""
    captions: dict[Any, list[str]] = {image["id"]: [] for image in images}
    for annotation in annotations:
        captions[annotation["image_id"]].append(annotation["caption"])
    paths = [image["file_name"] for image in images]
    return datasets.Dataset.from_dict({"image": paths, "image_id": list(captions), "caption": list(captions.values())})


def karpathy_rows(images: list[dict[str, Any]]) -> datasets.Dataset:
    """Read the images of Karpathy's file. The split "restval" becomes part of "train", as is usual."""
    return datasets.Dataset.from_list(
        [
            {
                "image": os.path.join(image.get("filepath", ""), image["filename"]),
                "image_id": image.get("cocoid", image.get("imgid")),
                "caption": [sentence["raw"] for sentence in image["sentences"]],
                "split": "train" if image["split"] == "restval" else image["split"],
            }
            for image in images
        ]
    )
