"""Names under which files store images, captions and image ids."""

import re
from collections.abc import Iterable

IMAGE_NAMES = (
    "image",
    "images",
    "frames",
    "image_path",
    "image_file",
    "image_name",
    "image_filename",
    "img",
    "img_path",
    "img_name",
    "picture",
    "photo",
    "file",
    "file_name",
    "filename",
    "filepath",
    "file_path",
    "path",
)
CAPTION_NAMES = (
    "caption",
    "captions",
    "caption_text",
    "text",
    "texts",
    "sentence",
    "sentences",
    "description",
    "descriptions",
    "comment",
    "comments",
    "raw",
    "alt_text",
    "caption_str",
    "references",
    "reference_strs",
)
ID_NAMES = ("image_id", "id")

# Suffixes of files that count as images. Those that cannot be opened are named as such later.
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".tga"}
    | {".avif", ".avifs", ".heic", ".heics", ".heif", ".heifs", ".hif", ".jxl"}
    | {".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm"}
)
IMAGE_FILE = re.compile(
    rf"[^\s|].*\.({'|'.join(suffix[1:] for suffix in sorted(IMAGE_SUFFIXES))})(\.\d+)?(#\d+)?", re.IGNORECASE
)
URL = re.compile(r"https?://\S+", re.IGNORECASE)


def find_name(names: tuple[str, ...], existing: Iterable[str], asked: str | None = None) -> str | None:
    """Return the one name of a file that means images, or captions.

    Args:
        names: names with this meaning, `IMAGE_NAMES` or `CAPTION_NAMES`. The first one is the usual name.
        existing: names that the file has.
        asked: name that the user chose. By default it is the usual name.

    Returns:
        The chosen name if it exists. For the usual name, otherwise the only name with the same meaning, in any case.
        `None` if there is no such name or there are several.

    Example:

    ```python
    >>> find_name(CAPTION_NAMES, ["File name", "Comment"]), find_name(CAPTION_NAMES, ["text", "comment"])
    ('Comment', None)
    ```
    """
    existing = list(existing)
    asked = names[0] if asked is None else asked
    if asked in existing:
        return asked
    if asked != names[0]:
        return None
    same = [name for name in existing if normal(name) == asked]
    candidates = same or [name for name in existing if normal(name) in names]
    return candidates[0] if len(candidates) == 1 else None


def normal(name: object) -> str:
    """Return a name in lower case, with underscores for spaces and hyphens."""
    return re.sub(r"[\s-]+", "_", str(name).strip()).lower()


def is_image_reference(text: str) -> bool:
    """Return whether a text is the name of an image file, or a URL."""
    return bool(IMAGE_FILE.fullmatch(text.strip()) or URL.fullmatch(text.strip()))
