"""Images of every form that callers have, as upright RGB pictures.

[`open_image`] opens one image: a path, a URL, base64 text, the content of a file, an array, a tensor, a dict of
`datasets`, or a PIL image. Training, evaluation, captioning and the demo all call it, so the same picture has the same
pixels everywhere.
"""

import base64
import contextlib
import functools
import importlib
import io
import os
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar, cast, runtime_checkable
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

import numpy as np
import torch
from huggingface_hub.utils import httpx
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

# Images may come from untrusted sources. Pillow opens many more formats, and executes code in some of them
# (PostScript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "HEIF", "JXL")
MAX_PIXELS = 2**27  # half a gigabyte in memory; cameras with 100 megapixels need less.
MAX_ASPECT_RATIO = 200  # a 1 x 10,000 image needs gigabytes once its shorter side has 224 pixels.
MAX_BYTES = 2**28  # size limit of a downloaded image.
MAX_PATH = 4096  # characters; no system has longer paths.
MIN_BASE64 = 64  # characters; the smallest images need as many.
MAX_NAME = 200  # characters of a name that a message shows

DAMAGED = "it is cut off or damaged; copy or download it again"
UNKNOWN_VARIANT = "it is damaged, or of a kind that Pillow does not read; copy it again, or convert it to PNG"

# Beginnings of files, as regular expressions.
IMAGE_FILE = (  # of the formats that every Pillow reads
    rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF....WEBP|BM....\x00{4}|II\*\x00|MM\x00\*|P[1-7f]\s|\x00{3}\x0cjP  |\xff\x4f\xff"
)
PLUGIN_FILES = {  # of formats that need a plug-in or a new Pillow
    "HEIF": rb"....ftyp(hei|hev|mif1|msf1)",
    "AVIF": rb"....ftypavi",
    "JXL": rb"\xff\n|\x00{3}\x0cJXL ",
}
REMEDIES = {
    "HEIF": "it is a HEIC image; `pip install pillow-heif` lets Pillow read it",
    "AVIF": "it is an AVIF image; `pip install --upgrade pillow` lets Pillow read it",
    "JXL": "it is a JPEG XL image; `pip install pillow-jxl-plugin` lets Pillow read it",
}
OTHER_FILES = {  # after removing white space, in lower case
    "an SVG drawing; convert it to PNG": rb"(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*(<!doctype svg.*?>\s*)?<svg",
    "an HTML page; download the image itself": rb"(<\?xml[^>]*>\s*)?<(!doctype html|html|head|body|script|!--)",
    "an XML document, perhaps the error of a server; download the image again": rb"<\?xml|<[a-z]",
    "JSON, perhaps the error of a server; download the image again": rb"[{\[]",
    "a pointer of Git LFS; run `git lfs pull`": rb"version https://git-lfs",
    "a PDF document; convert its pages to PNG": rb"%pdf",
    "a PostScript document; convert it to PNG": rb"%!ps|\xc5\xd0\xd3\xc6",
    "a Photoshop document; convert it to PNG": rb"8bps",
    "an icon; convert it to PNG": rb"\x00\x00\x01\x00",
    "an audio file, not an image": rb"riff....wave|id3|\xff[\xfb\xf3\xf2]|flac|oggs|....ftypm4a",
    "a video; save its frames as images": rb"....(ftyp|moov|mdat)|riff....avi |\x1ae\xdf\xa3|\x00{2}\x01[\xba\xb3]|flv",
    "an archive; unpack it": rb"pk\x03\x04|\x1f\x8b|rar!|7z\xbc\xaf|bzh|\xfd7zxz|.{257}ustar",
    "an array of NumPy; open it with `numpy.load`": rb"\x93numpy",
}


@runtime_checkable
class BinaryFile(Protocol):
    """An open binary file."""

    def read(self, size: int, /) -> bytes:
        """Return the next bytes."""
        ...


ImageFile = str | os.PathLike | bytes | bytearray | memoryview | BinaryFile | Mapping[str, Any]
ImageInput = Image.Image | np.ndarray | torch.Tensor | ImageFile
Frame = TypeVar("Frame")
ACCEPTED = "a PIL image, an array, a tensor, a path, a URL, base64 text, bytes, or a dict with 'bytes' or 'path'"

# ----------------------------------------------------------------------------------------------------------------------
# One image
# ----------------------------------------------------------------------------------------------------------------------


def open_image(image: ImageInput, name: str | None = None, input_data_format: str | None = None) -> Image.Image:
    """Open an image as upright RGB. A decoded PIL image that is already upright RGB is returned unchanged.

    Transparent pixels become white. Grey values of 16 or 32 bits are scaled by their range to 8 bits. An animation
    gives its first frame.

    Args:
        image: one of these:

            - a PIL image of any mode;
            - an array or a tensor: `[H, W]`, `[H, W, C]` or `[C, H, W]` with 1 to 4 channels. Values are integers, or
              floats from 0 to 1 or from 0 to 255;
            - a path, or a URL (`http`, `https`, `file` or `data`);
            - base64 text, the content of a file (`bytes`), or an open binary file;
            - a dict of `datasets`, with `bytes` or `path`.
        name (`str`, *optional*): name of the image in error messages. Defaults to its path or URL, if it has one.
        input_data_format (`str`, *optional*): `"channels_first"` or `"channels_last"`, for an array whose shape does
            not tell.

    Raises:
        FileNotFoundError: if the file does not exist.
        OSError: if the image is damaged, too large, or not in one of the formats that are read. The message names it
            and says what it is.
        TypeError: if `image` is something else, such as a number.
        ValueError: if an array does not have the shape or the values of an image.

    Example:

    ```python
    >>> from PIL import Image
    >>> from qformer_captioner.images_qformer import open_image
    >>> open_image(Image.new("L", (4, 3))).mode
    'RGB'
    >>> open_image(np.zeros((3, 4, 4), dtype=np.uint8)).getpixel((0, 0))  # transparent
    (255, 255, 255)
    ```
    """
    if isinstance(image, Image.Image):
        source: Image.Image | str | os.PathLike | bytes = image
    elif isinstance(image, (np.ndarray, torch.Tensor)):
        source = picture_of_array(image, input_data_format)
    else:
        source = path_or_content(image)
    try:
        if isinstance(source, Image.Image):
            return as_upright_rgb(source)
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(file, formats=readable_formats()) as opened:
            return as_upright_rgb(opened)
    except Exception as error:  # Pillow raises many types: truncated, unidentified, decompression bomb, bad EXIF ...
        subject = in_message(image if name is None else name)
        raise OSError(f"{subject} cannot be read: {reason_for(source, error).rstrip('.')}.") from error


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """Return the formats that are read, after plug-ins that are installed have added theirs to Pillow."""
    Image.init()
    for plugin in ("pillow_heif.HeifImagePlugin", "pillow_jxl"):
        with contextlib.suppress(ImportError):  # not installed
            importlib.import_module(plugin)  # adds its format to Pillow
    return tuple(kind for kind in FORMATS if kind in Image.OPEN)  # Pillow may be built without some of them


def as_upright_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB and apply its EXIF orientation, unless it is decoded upright RGB already.

    Raises:
        ValueError: if its size would exhaust the memory, when it is decoded or when an image processor resizes it.
    """
    longer, shorter = max(image.size), min(image.size)
    if longer * shorter > MAX_PIXELS or longer > MAX_ASPECT_RATIO * shorter:
        raise ValueError(
            f"it has {image.width} x {image.height} pixels; at most {MAX_PIXELS:,} pixels and an aspect ratio of "
            f"{MAX_ASPECT_RATIO} are allowed"
        )
    # Training images are already upright. Subclasses such as `JpegImageFile` may not be decoded yet.
    is_decoded_rgb = type(image) is Image.Image and image.mode == "RGB" and not image.has_transparency_data
    if is_decoded_rgb and image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
        return image
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = as_grey(image)
    elif image.has_transparency_data:
        if image.mode == "La":  # Pillow converts grey with premultiplied alpha to no other mode
            image = image.convert("LA")
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return image if image.mode == "RGB" else image.convert("RGB")


def as_grey(image: Image.Image) -> Image.Image:
    """Scale grey values of 16 or 32 bits to 8 bits, where Pillow would cut them off; a transparent value is white."""
    values = np.asarray(image)
    grey = as_8_bits(values)
    if "transparency" in image.info:
        grey = np.where(values == image.info["transparency"], np.uint8(255), grey)
    return Image.fromarray(grey)


def as_8_bits(values: np.ndarray) -> np.ndarray:
    """Scale the values of an image to 0..255 (uint8) by their range.

    The range of integers is 0..255 or 0..65535, and that of floats 0..1 or 0..255, whichever holds the values.
    Resampled floats may exceed it by 5 %. Grey values outside, such as depths, are scaled from their minimum to their
    maximum.

    Args:
        values: array `[H, W]` or `[H, W, C]`.

    Raises:
        ValueError: if values are not numbers, or colours are outside the range.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * 255
    if values.dtype.kind not in "iuf" or not np.isfinite(values).all():
        raise ValueError(f"An array of {values.dtype} with values that are not finite numbers is not an image.")
    tops, slack = ((1, 255), 0.05) if values.dtype.kind == "f" else ((255, 65535), 0.0)
    low, high = float(values.min()), float(values.max())
    fitting = [top for top in tops if low >= -slack * high and high <= (1 + slack) * top]
    if fitting:
        scaled = values * (255 / fitting[0])
    elif values.ndim == 2:
        scaled = (values - low) * (255 / (high - low or 1))
    else:
        raise ValueError(
            f"An array with values from {low:g} to {high:g} is not an image: images have integers, or floats from 0 to "
            "1 or from 0 to 255. Give normalised values to the model, as `pixel_values`."
        )
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def picture_of_array(array: np.ndarray | torch.Tensor, input_data_format: str | None = None) -> Image.Image:
    """Convert an array or a tensor to a PIL image of mode L, LA, RGB or RGBA.

    If both the first and the last axis could be the channels, they are last in arrays and first in tensors.

    Args:
        array: `[H, W]`, `[H, W, C]` or `[C, H, W]`.
        input_data_format: `"channels_first"` or `"channels_last"`, if it is known.

    Raises:
        ValueError: if the shape or the values are not those of an image.
    """
    axes: tuple[int, ...] = (0, 2) if isinstance(array, torch.Tensor) else (2, 0)
    if input_data_format is not None:
        axes = (0,) if input_data_format == "channels_first" else (2,)
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
    is_channel = [array.ndim == 3 and 1 <= array.shape[axis] <= 4 for axis in axes]
    if array.size == 0 or (array.ndim != 2 and not any(is_channel)):
        raise ValueError(
            f"An array of shape {array.shape} is not an image: the shape of an image is [height, width], [height, "
            "width, channels] or [channels, height, width], with 1 to 4 channels."
        )
    if array.ndim == 3:
        array = np.moveaxis(array, axes[is_channel.index(True)], 2)
        array = array[:, :, 0] if array.shape[2] == 1 else array
    return Image.fromarray(np.ascontiguousarray(as_8_bits(array)))


# ----------------------------------------------------------------------------------------------------------------------
# Where an image is
# ----------------------------------------------------------------------------------------------------------------------


def path_or_content(image: Any) -> str | os.PathLike | bytes:
    """Return the path of an image, or the content of its file.

    Args:
        image: path, URL, base64 text, bytes, file, or dict of `datasets`.

    Raises:
        FileNotFoundError: if the file does not exist.
        OSError: if a URL cannot be read.
        TypeError: if the image is of another type.
    """
    if isinstance(image, Mapping):
        image = value_of_dict(image)
    if isinstance(image, BinaryFile) and not isinstance(image, io.TextIOBase):
        image = content_of_file(image)
    if isinstance(image, (bytes, bytearray, memoryview)):
        content = bytes(image)
        embedded = embedded_content(content.decode()) if content.isascii() else None
        return content if embedded is None else embedded
    if isinstance(image, str):
        embedded = embedded_content(image)
        if embedded is not None:
            return embedded
        scheme = re.match(r"(file(?=:)|[a-z][a-z0-9+.-]+(?=://))", image, re.IGNORECASE)
        match scheme and scheme[1].lower():
            case "http" | "https":
                return fetch(image)
            case "file":
                image = url2pathname(urlsplit(image).path)
            case str(other):
                raise OSError(f"{in_message(image)} is at an address with {other[:20]}://: download it first.")
    if not isinstance(image, (str, os.PathLike)):
        raise TypeError(f"An image is of type {type(image).__name__!r}: give {ACCEPTED}.")
    if not os.path.isfile(image):  # opening a pipe would block
        raise FileNotFoundError(f"There is no image file {shown(os.fspath(image))}. Check the path.")
    return image


def value_of_dict(image: Mapping[str, Any]) -> Any:
    """Return the bytes of a dict of `datasets`, or its path if it has no bytes.

    Raises:
        OSError: if it has neither.
        TypeError: if it is a dict of something else.
    """
    if not {"bytes", "path"} & image.keys():
        keys = reprlib.repr(list(image))
        raise TypeError(f"An image is of type {type(image).__name__!r} with the keys {keys}: give {ACCEPTED}.")
    value = image.get("path") if image.get("bytes") is None else image["bytes"]
    if value is None:
        raise OSError("An image has neither bytes nor a path.")
    return value


def content_of_file(file: BinaryFile) -> bytes:
    """Return the content of an open file from its beginning, as Pillow reads files."""
    if isinstance(file, io.IOBase) and file.seekable():
        file.seek(0)
    return file.read(MAX_BYTES)


def embedded_content(text: str) -> bytes | None:
    """Return the content of a file that a text holds as a `data:` URL or in base64, or `None` for any other text.

    Base64 may have line breaks, lack its padding, or use the alphabet of URLs. Short text is base64 only if it holds an
    image. Text that is too long for a path needs only the letters of base64.

    Example:

    ```python
    >>> embedded_content("data:image/gif;base64,R0lGODdh")
    b'GIF87a'
    >>> embedded_content("photos/dog.jpg") is None
    True
    ```
    """
    if text[:5].lower() == "data:":
        kind, _, data = text.partition(",")
        content = unquote_to_bytes(data)
        return decode_base64(content) if kind.lower().endswith(";base64") else content
    if len(text) < MIN_BASE64 or not re.fullmatch(r"[A-Za-z0-9+/_\-\s]+[=\s]*", text, re.ASCII):
        return None
    content = decode_base64(text.encode())
    return content if len(text) > MAX_PATH or begins_as(content, IMAGE_FILE, *PLUGIN_FILES.values()) else None


def decode_base64(text: bytes) -> bytes:
    """Decode base64 as far as possible."""
    letters = re.sub(rb"[^A-Za-z0-9+/]", b"", text.replace(b"-", b"+").replace(b"_", b"/"))
    return base64.b64decode(letters[: len(letters) - (len(letters) % 4 == 1)] + b"==")


def fetch(url: str) -> bytes:
    """Download the content of a URL.

    Raises:
        OSError: if it cannot be reached, or is too large for an image.
    """
    content = bytearray()
    try:
        with httpx.stream("GET", url, timeout=60, follow_redirects=True) as response:
            response.raise_for_status()
            for part in response.iter_bytes():
                content += part
                if len(content) > MAX_BYTES:
                    raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
    except Exception as error:  # the client raises errors of many libraries
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise OSError(f"{in_message(url)} cannot be downloaded: {reason}. Check the address.") from error
    return bytes(content)


# ----------------------------------------------------------------------------------------------------------------------
# Messages
# ----------------------------------------------------------------------------------------------------------------------


def in_message(image: Any) -> str:
    """Return the beginning of a sentence about an image: "The image 'dog.jpg'"."""
    if isinstance(image, Image.Image):
        image = getattr(image, "filename", "")  # only files have names
    elif isinstance(image, Mapping):
        image = image.get("path")
    if isinstance(image, os.PathLike):
        image = os.fspath(image)
    return f"The image {shown(image)}" if isinstance(image, str) and image else "An image without a name"


def shown(text: str) -> str:
    """Return a name in quotes. The middle of a long name is left out, and almost all of an embedded image."""
    shorten = reprlib.Repr()
    shorten.maxstring = 40 if embedded_content(text) is not None else MAX_NAME
    return shorten.repr(text)


def begins_as(content: bytes, *beginnings: bytes) -> bool:
    """Return True if content matches one of several regular expressions at its beginning."""
    return any(re.match(beginning, content, re.DOTALL) for beginning in beginnings)


def reason_for(source: str | os.PathLike | bytes | Image.Image, error: Exception) -> str:
    """Return why an image cannot be read: what its file is, or what is wrong with it.

    Args:
        source: what was opened.
        error: the error of Pillow.
    """
    message = (str(error) or type(error).__name__)[:150]
    if not isinstance(error, UnidentifiedImageError):
        is_unsuitable = isinstance(error, (ValueError, Image.DecompressionBombError))
        return message if is_unsuitable else f"{DAMAGED} ({message})"
    if isinstance(source, Image.Image):
        return message
    if isinstance(source, bytes):
        start = source[:4096]
    else:
        with open(source, "rb") as file:
            start = file.read(4096)
    if not start.strip(b"\0"):
        return f"it {'holds only zero bytes' if start else 'is empty'}; copy or download it again"
    if begins_as(start, IMAGE_FILE):
        return UNKNOWN_VARIANT
    for kind, beginning in PLUGIN_FILES.items():
        if begins_as(start, beginning):
            return UNKNOWN_VARIANT if kind in readable_formats() else REMEDIES[kind]
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n").lower()
    for what, beginning in OTHER_FILES.items():
        if begins_as(text, beginning):
            return f"it is {what}"
    # The last character may be cut off.
    is_text = not re.search("[\0-\b\x0e-\x1a\x7f\ufffd]", start.decode(errors="replace")[:-1])
    return "it is plain text, not an image" if is_text else "its format is unknown; convert it to JPEG or PNG"


# ----------------------------------------------------------------------------------------------------------------------
# Several images, and videos
# ----------------------------------------------------------------------------------------------------------------------


def is_batch(images: Any) -> bool:
    """Return True for several images (a list, a column, an array `[B, H, W, C]`), in contrast to one image."""
    if isinstance(images, (np.ndarray, torch.Tensor)):
        return images.ndim > 3 or (isinstance(images, np.ndarray) and images.dtype.kind in "OUS" and images.ndim > 0)
    one = (str, bytes, bytearray, memoryview, Mapping, os.PathLike, Image.Image)
    return isinstance(images, Iterable) and not isinstance(images, one) and not isinstance(images, BinaryFile)


def flatten_images(images: Any) -> list[ImageInput | list[ImageInput]]:
    """Return a list of single images and of videos. A video is a list of its frames, at least two.

    Args:
        images: one image, several images, or nested lists. An inner list holds the frames of a video, or the only image
            of a conversation, as pipelines pass it. An array `[B, H, W, C]` or `[B, C, H, W]` is B images, and an array
            of five dimensions B videos.

    Raises:
        ValueError: if an inner list is empty, or nested too deep.

    Example:

    ```python
    >>> flatten_images([["frame_1.png", "frame_2.png"], ["dog.jpg"], "cat.jpg"])
    [['frame_1.png', 'frame_2.png'], 'dog.jpg', 'cat.jpg']
    ```
    """
    if not is_batch(images):
        return [images]
    flat: list[ImageInput | list[ImageInput]] = []
    for number, entry in enumerate(images, start=1):
        own = flatten_images(entry)
        if not own:
            raise ValueError(
                f"A captioner reads an image or the frames of a video, but entry {number} of the images has 0: "
                "give each entry an image."
            )
        if len(own) > 1 and any(isinstance(frame, list) for frame in own):
            raise ValueError(
                f"Entry {number} of the images holds {len(own)} lists of images: give each video as one list of frames."
            )
        flat.append(own[0] if len(own) == 1 else cast(list[ImageInput], own))
    return flat


def sample_frames(frames: Sequence[Frame], num_frames: int) -> list[Frame]:
    """Return the frames of a video, or `num_frames` of a longer one: the first, the last, and evenly between them.

    Raises:
        ValueError: if `num_frames` is less than 1.

    Example:

    ```python
    >>> sample_frames("abcdefg", num_frames=4), sample_frames("ab", num_frames=4)
    (['a', 'c', 'e', 'g'], ['a', 'b'])
    ```
    """
    if num_frames < 1:
        raise ValueError(f"`num_frames` must be at least 1, got {num_frames}.")
    if len(frames) <= num_frames:
        return list(frames)
    step = (len(frames) - 1) / max(1, num_frames - 1)
    return [frames[round(number * step)] for number in range(num_frames)]


def are_floats(images: Sequence[ImageInput]) -> bool:
    """Return True if all images are arrays or tensors of floats."""
    return all(
        (isinstance(image, np.ndarray) and image.dtype.kind == "f")
        or (isinstance(image, torch.Tensor) and image.is_floating_point())
        for image in images
    )


__all__ = ["flatten_images", "is_batch", "open_image", "sample_frames"]
