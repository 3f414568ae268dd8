"""Images of requests: decoded in threads, with limits on their size and on what is in memory at once.

Nothing here opens a path. A source is a `data:` URL, base64 text, or a URL of an allowed host.
"""

import asyncio
import io
import re
from collections import deque
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress

from PIL import Image

from ..images_qformer import PLUGIN_FILES, begins_as, decode_base64, open_image, readable_formats
from .errors import ApiError
from .options import ServingOptions
from .remote import fetch

IMAGES_IN_MEMORY = 4  # of the largest size that is allowed


class PixelBudget:
    """Limit on the pixels of decoded images. Waiting requests are served in order.

    Args:
        limit: the largest number of pixels.
    """

    def __init__(self, limit: int):
        self.limit, self.used = limit, 0
        self.turn, self.released = asyncio.Lock(), asyncio.Event()

    @asynccontextmanager
    async def hold(self, pixels: int, param: str) -> AsyncIterator[None]:
        """Wait for room, and hold it for the block. Whoever holds room must not wait for more of it.

        Args:
            pixels: number of pixels of all images of a request.
            param: field of the request that holds them, for error messages.

        Raises:
            ApiError: if there are more pixels than the limit.
        """
        if pixels > self.limit:
            raise ApiError(
                413,
                f"The images have {pixels:,} pixels together, and at most {self.limit:,} are allowed: shrink them.",
                param,
            )
        async with self.turn:  # locks are fair
            while self.used + pixels > self.limit:
                self.released.clear()
                await self.released.wait()
            self.used += pixels
        try:
            yield
        finally:
            self.used -= pixels
            self.released.set()


class ImageReader:
    """Reader of the images of requests.

    Args:
        options: options of the server.
        threads: threads that decode.
        max_images: largest number of images of a request, which are the frames of a video.
    """

    def __init__(self, options: ServingOptions, threads: ThreadPoolExecutor, max_images: int = 1):
        self.options, self.threads, self.max_images = options, threads, max_images
        self.budget = PixelBudget(IMAGES_IN_MEMORY * options.max_image_pixels)

    @asynccontextmanager
    async def open(self, sources: Sequence[str], param: str, allows_base64: bool) -> AsyncIterator[list[Image.Image]]:
        """Read the images of a request for a block, upright and in RGB. Their room is held until the block ends.

        Args:
            sources: where the images are.
            param: field of the request that holds them, for error messages.
            allows_base64: whether a source may be base64 text without `data:`.

        Raises:
            ApiError: if there are too many images, they are too large together, or one cannot be read.
        """
        if len(sources) > self.max_images:
            raise ApiError(
                400, f"There are {len(sources)} images, but the captioner reads {self.max_images} at once.", param
            )
        contents: deque[bytes] = deque()
        pixels, bytes_left = 0, self.options.max_body_bytes
        for source in sources:
            content = await self.content_of(source, param, allows_base64, bytes_left)
            contents.append(content)
            bytes_left -= len(content)
            if bytes_left < 0:
                raise ApiError(413, "The images have too many bytes together: send smaller ones.", param, "too_large")
            pixels += await self.in_thread(count_pixels, content, param, self.options.max_image_pixels)
        async with self.budget.hold(pixels, param):
            images = []
            while contents:  # each content is dropped as soon as it is decoded
                images.append(await self.in_thread(decode, contents.popleft(), param))
            yield images

    async def content_of(self, source: str, param: str, allows_base64: bool, max_bytes: int) -> bytes:
        """Return the content of an image file.

        Args:
            source: where it is.
            param: field of the request that holds it, for error messages.
            allows_base64: whether it may be base64 text without `data:`.
            max_bytes: largest size of a file that is fetched.

        Raises:
            ApiError: if the source is not allowed or cannot be read.
        """
        scheme = match[1].lower() if (match := re.match(r"([a-z][a-z0-9+.-]*):", source[:40], re.IGNORECASE)) else ""
        if scheme in ("http", "https"):
            return await fetch(source, param, self.options, max_bytes)
        if scheme == "data" or (allows_base64 and not scheme):
            return await self.in_thread(embedded_content, source, param)
        raise ApiError(
            400,
            f"An image cannot be read from {source[:40]!r}: send it as a data: URL in base64, as in "
            "'data:image/jpeg;base64,...'.",
            param,
            "invalid_image_url",
        )

    async def in_thread(self, function, *args):  # type: ignore[no-untyped-def]
        """Call a function in one of the threads that decode."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, function, *args)


def embedded_content(source: str, param: str) -> bytes:
    """Return the content of a `data:` URL in base64, or of base64 text.

    Raises:
        ApiError: if it is not in base64.
    """
    if source[:5].lower() == "data:":
        kind, comma, source = source.partition(",")
        if not comma or not kind.lower().endswith(";base64"):
            raise ApiError(
                400,
                "A data: URL is not in base64: write it as 'data:image/jpeg;base64,...'.",
                param,
                "invalid_image_url",
            )
    if not source.isascii():
        raise ApiError(400, "An image holds characters that base64 does not have: encode it again.", param)
    return decode_base64(source.encode())


def count_pixels(content: bytes, param: str, limit: int) -> int:
    """Return the number of pixels that an image states at its beginning, 0 if that cannot be read.

    Raises:
        ApiError: if there are too many, or the format does not tell before it is decoded.
    """
    if begins_as(content, PLUGIN_FILES["JXL"]):  # its plug-in decodes the image before it tells the size
        raise ApiError(422, "The server does not read JPEG XL images: send JPEG or PNG.", param, "invalid_image")
    width = height = 0
    # Pillow raises many types for damaged files. `decode` then says what is wrong with the image.
    with suppress(Exception), Image.open(io.BytesIO(content), formats=readable_formats()) as image:
        width, height = image.size
    if width * height > limit:
        raise ApiError(
            413, f"An image has {width} x {height} pixels, and at most {limit:,} are allowed: make it smaller.", param
        )
    return width * height


def decode(content: bytes, param: str) -> Image.Image:
    """Return an image, upright and in RGB.

    Raises:
        ApiError: if it is damaged, or not in a format that is read.
    """
    try:
        return open_image(content)
    except (OSError, TypeError, ValueError) as error:
        raise ApiError(422, str(error), param, "invalid_image") from None
