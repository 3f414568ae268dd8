"""Files of a folder of images: images, files beside them, and the image that a path in a file of captions means."""

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from .image_paths import FileNames
from .names import IMAGE_SUFFIXES
from .split_names import split_word


@dataclass(frozen=True)
class FolderFiles:
    """Files of a folder and its subfolders, as paths relative to the folder.

    Args:
        images: files with a suffix of images.
        others: all other files.
        links: symbolic links to folders, which are not read.
    """

    images: list[str]
    others: list[str]
    links: list[str]

    @classmethod
    def of(cls, folder: str) -> "FolderFiles":
        """List a folder without hidden files, in the order of names."""
        images: list[str] = []
        others: list[str] = []
        links: list[str] = []
        for parent, folders, names in os.walk(folder):
            inside = os.path.relpath(parent, folder)
            folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
            links += [join(inside, name) for name in folders if os.path.islink(os.path.join(parent, name))]
            for name in sorted(name for name in names if not name.startswith(".")):
                is_image = os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
                (images if is_image else others).append(join(inside, name))
        return cls(images, others, links)


def join(folder: str, path: str) -> str:
    """Join a relative folder and a path, without a leading dot."""
    return os.path.normpath(os.path.join(folder, path))


class ImageFinder:
    """Images of a folder, found by the paths in a file of captions.

    Args:
        images: paths of the images, relative to the folder.
    """

    def __init__(self, images: Sequence[str]):
        self.images = set(images)
        self.by_name: dict[str, list[str]] = defaultdict(list)
        for image in images:
            self.by_name[os.path.basename(image)].append(image)
        self.names = FileNames(list(self.by_name))

    def find(self, path: object, folder: str, split: str | None = None) -> object:
        """Return the path of an image relative to the folder.

        Args:
            path: value of a column of images. A path is relative to the file of captions, or ends like the path of
                only one image.
            folder: folder of the file of captions.
            split: split of the file of captions. Of several images that fit, that in a folder of this split is chosen.

        Returns:
            The path of the image. If no image fits, the path as written, so that opening it says why. Values that are
            not paths are returned unchanged.
        """
        if not isinstance(path, str) or not path or "://" in path or len(path) > 1000:
            return path
        written = join(folder, path)
        if written in self.images:
            return written
        ending = os.path.normpath(path.strip().replace("\\", "/"))
        names = self.names.fitting(os.path.basename(ending))
        parent = os.path.dirname(ending)
        fitting = [image for name in names for image in self.by_name[name] if has_parent(image, parent)]
        if len(fitting) > 1 and split is not None:
            fitting = [image for image in fitting if split in map(split_word, os.path.dirname(image).split("/"))]
        return fitting[0] if len(fitting) == 1 else written


def has_parent(image: str, parent: str) -> bool:
    """Return whether the folder of an image ends with the folders of a path."""
    folder = os.path.dirname(image)
    return not parent or folder == parent or folder.endswith(f"/{parent}")
