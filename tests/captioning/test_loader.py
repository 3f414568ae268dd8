"""Opening and shrinking of images: the pixels that the model gets, errors, and large JPEGs."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFilter
from transformers import CLIPImageProcessorPil, ViTImageProcessorPil

from qformer_captioner.captioning.items import Item, TarImage
from qformer_captioner.captioning.loader import ImageLoader
from qformer_captioner.images_qformer import open_image

from ..fixtures import tiny
from ..fixtures.image_files import BAD_FILES, bad_file

PROCESSORS = {
    "square": tiny.image_processor(),
    "crop": CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
}


def smooth(width: int, height: int) -> Image.Image:
    """Return an image without fine structure, as photographs have it when they are shrunk."""
    return tiny.picture(1, size=(width, height)).filter(ImageFilter.GaussianBlur(8))


def load(processor, image, **options):
    return ImageLoader(processor, **options).load(Item("a", "a", image))


def pixels(processor, image) -> np.ndarray:
    return processor(image, return_tensors="np")["pixel_values"]


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", [(300, 201), (31, 500), (40, 33), (20, 20)])
def test_shrinking_does_not_change_what_the_processor_returns(tmp_path, name, size):
    processor = PROCESSORS[name]
    tiny.picture(size=size).save(tmp_path / "a.png")
    image = load(processor, str(tmp_path / "a.png")).image
    assert max(image.size) <= max(size)
    assert np.array_equal(pixels(processor, image), pixels(processor, open_image(str(tmp_path / "a.png"))))


def test_a_large_image_is_kept_at_the_size_that_is_needed(tmp_path):
    smooth(900, 600).save(tmp_path / "a.png")
    assert load(PROCESSORS["square"], str(tmp_path / "a.png")).image.size == (32, 32)
    assert load(PROCESSORS["crop"], str(tmp_path / "a.png")).image.size == (48, 32)


@pytest.mark.parametrize(("size", "is_equal"), [((120, 100), True), ((1200, 1000), False)])
def test_jpegs_are_opened_at_a_fraction_of_their_size_only_if_they_are_far_larger(tmp_path, size, is_equal):
    processor = PROCESSORS["square"]
    smooth(*size).save(tmp_path / "a.jpg", quality=95)
    ours = pixels(processor, load(processor, str(tmp_path / "a.jpg")).image)
    whole = pixels(processor, open_image(str(tmp_path / "a.jpg")))
    assert np.array_equal(ours, whole) == is_equal
    assert np.abs(ours - whole).max() < 0.05  # of values from -1 to 1


def test_an_image_may_be_in_a_file_in_bytes_or_in_a_tar(tmp_path):
    content = io.BytesIO()
    tiny.picture().save(content, "PNG")
    (tmp_path / "a.png").write_bytes(content.getvalue())
    (tmp_path / "a.tar").write_bytes(bytes(512) + content.getvalue())
    forms = (
        str(tmp_path / "a.png"),
        {"path": str(tmp_path / "a.png"), "bytes": None},
        {"path": "a.png", "bytes": content.getvalue()},
        TarImage(str(tmp_path / "a.tar"), 512, len(content.getvalue()), "a.png"),
    )
    for image in forms:
        loaded = load(PROCESSORS["square"], image, keep_content=True)
        assert loaded.content == content.getvalue()
        assert loaded.image.size == (32, 32)


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_becomes_the_error_that_opening_it_raises(tmp_path, kind):
    path = str(bad_file(kind, tmp_path))
    with pytest.raises(OSError) as expected:
        open_image(path)
    assert str(load(PROCESSORS["square"], path).image) == str(expected.value)


@pytest.mark.parametrize("image", [None, OSError("gone"), "absent.png", {"path": "absent.png", "bytes": None}])
def test_an_image_that_is_not_there_becomes_an_error(image):
    assert isinstance(load(PROCESSORS["square"], image).image, OSError)


def test_processors_that_resize_in_their_own_way_get_the_whole_image(tmp_path):
    class Own(ViTImageProcessorPil):
        def resize(self, image, *args, **kwargs):
            return super().resize(image[:, ::-1], *args, **kwargs)

    smooth(300, 200).save(tmp_path / "a.png")
    own = Own(size={"height": 32, "width": 32})
    assert load(own, str(tmp_path / "a.png")).image.size == (300, 200)
