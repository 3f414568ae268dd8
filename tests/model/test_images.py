"""Images in every form that callers have: the same picture has the same pixels, and anything else is named."""

import base64
import io
import os
import struct
import sys
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from qformer_captioner.images_qformer import flatten_images, open_image, readable_formats

from ..fixtures import tiny

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)  # [H, W, C]
PICTURE = Image.fromarray(PIXELS)
TENSOR = torch.tensor(PIXELS).permute(2, 0, 1)  # [C, H, W]
GRADIENT = np.tile(np.arange(256, dtype=np.uint8), (8, 1))  # grey from black to white
LONG = "x" * 3000


def saved(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    """Return the file of a picture."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


PNG = saved(PICTURE)
BASE64 = base64.b64encode(PNG).decode()


def pixels(image) -> np.ndarray:
    """Return the pixels of an opened image, `[H, W, 3]`."""
    return np.asarray(open_image(image))


# --- Forms ------------------------------------------------------------------------------------------------------------

FORMS = {
    "PIL": PICTURE,
    "array": PIXELS,
    "array, channels first": PIXELS.transpose(2, 0, 1),
    "array of floats to 1": PIXELS / 255,
    "array of floats to 255": PIXELS.astype(np.float32),
    "array of 16 bits": PIXELS.astype(np.uint16) * 257,
    "array with alpha": np.dstack([PIXELS, np.full((9, 11), 255, np.uint8)]),
    "batch of one": PIXELS[None],
    "tensor": TENSOR,
    "tensor, channels last": torch.tensor(PIXELS),
    "tensor of floats": TENSOR / 255,
    "tensor of bfloat16": TENSOR.bfloat16(),
    "tensor of integers": TENSOR.long(),
    "tensor with gradients": (TENSOR / 255).requires_grad_(),
    "bytes": PNG,
    "bytearray": bytearray(PNG),
    "memoryview": memoryview(PNG),
    "file": io.BytesIO(PNG),
    "dict of bytes": {"bytes": PNG, "path": None},
    "dict of base64": {"bytes": BASE64, "path": None},
    "base64": BASE64,
    "base64 in lines": base64.encodebytes(PNG).decode(),
    "base64 without padding": BASE64.rstrip("="),
    "base64 for URLs": base64.urlsafe_b64encode(PNG).decode(),
    "base64 as bytes": BASE64.encode(),
    "data URL": f"data:image/png;base64,{BASE64}",
    "data URL, upper case": f"DATA:image/png;BASE64,{BASE64}",
}


@pytest.mark.parametrize("form", FORMS)
def test_a_picture_has_the_same_pixels_in_every_form(form):
    (image,) = flatten_images(FORMS[form])
    assert np.array_equal(pixels(image), PIXELS)


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(str, id="str"),
        pytest.param(lambda path: path, id="Path"),
        pytest.param(lambda path: path.as_uri(), id="file URL"),
        pytest.param(lambda path: f"FILE://localhost{path.as_uri()[7:]}", id="file URL with a host"),
        pytest.param(lambda path: {"bytes": None, "path": str(path)}, id="dict of a path"),
        pytest.param(lambda path: path.open("rb"), id="open file"),
    ],
)
def test_a_picture_in_a_file_has_the_same_pixels(tmp_path, form):
    path = tmp_path / "a dög.png"  # `as_uri` writes it as a%20d%C3%B6g.png
    path.write_bytes(PNG)
    assert np.array_equal(pixels(form(path)), PIXELS)


@pytest.fixture(scope="module")
def site():
    """Address of a site that holds the picture, and an HTML page for every other name."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(404 if self.path == "/gone.png" else 200)
            self.end_headers()
            self.wfile.write(PNG if self.path == "/a.png" else b"<!DOCTYPE html><html>Sorry</html>")

        def log_message(self, *args):
            """Log nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_picture_at_a_url_has_the_same_pixels(site):
    assert np.array_equal(pixels(f"{site}/a.png"), PIXELS)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("page.jpg", "it is an HTML page"), ("gone.png", "cannot be downloaded: .*404"), (LONG, "HTML page")],
)
def test_a_url_without_a_picture_is_refused_with_the_reason(site, name, reason):
    with pytest.raises(OSError, match=reason) as refused:
        open_image(f"{site}/{name}")
    assert len(str(refused.value)) <= 500


@pytest.mark.parametrize("grey", [np.zeros((9, 11), np.uint8) + 7, np.zeros((1, 9, 11)) + 7, np.zeros((9, 11, 1)) + 7])
def test_a_grey_array_is_grey(grey):
    assert np.array_equal(pixels(grey), np.full((9, 11, 3), 7))


def test_an_ambiguous_shape_has_its_channels_last_in_arrays_and_first_in_tensors():
    cube = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    assert np.array_equal(pixels(cube), cube)
    assert np.array_equal(pixels(torch.tensor(cube)), cube.transpose(1, 2, 0))
    assert np.array_equal(np.asarray(open_image(cube, input_data_format="channels_first")), cube.transpose(1, 2, 0))


def test_resampled_floats_may_exceed_their_range_slightly():
    assert pixels(np.array([[-0.02, 0.5, 1.03]])).tolist() == [[[0] * 3, [128] * 3, [255] * 3]]


@pytest.mark.parametrize(
    ("several", "number"),
    [
        (np.stack([PIXELS] * 3), 3),
        (torch.stack([TENSOR] * 2)[:, None], 2),
        ([[PICTURE], [PIXELS], [[PNG]]], 3),
        ((PICTURE, "a.png"), 2),
        (np.array(["a.png", "b.png"]), 2),
        (iter([PICTURE, PICTURE]), 2),
        ({"bytes": PNG}, 1),
        ([], 0),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else type(value).__name__,
)
def test_images_are_counted(several, number):
    assert len(flatten_images(several)) == number


@pytest.mark.parametrize("decode", [True, False])
def test_a_column_of_a_data_set_is_several_images(decode):
    rows = datasets.Dataset.from_dict({"image": [{"bytes": PNG, "path": None}] * 2})
    column = rows.cast_column("image", datasets.Image(decode=decode))["image"]
    opened = [pixels(image) for image in flatten_images(column)]
    assert len(opened) == 2 and np.array_equal(opened[1], PIXELS)


@pytest.mark.parametrize("form", ["array", "tensor of floats", "bytes", "base64", "dict of bytes", "batch of one"])
def test_a_caption_does_not_depend_on_the_form_of_the_image(form):
    model = tiny.captioner()
    expected = model.caption(PICTURE, max_new_tokens=8)
    assert model.caption(FORMS[form], max_new_tokens=8) == ([expected] if form == "batch of one" else expected)
    assert model.caption([FORMS[form], PICTURE], max_new_tokens=8) == [expected, expected]


def test_an_empty_column_has_no_captions():
    assert tiny.captioner().caption(datasets.Dataset.from_dict({"image": []})["image"]) == []


def test_floats_that_are_not_to_be_rescaled_give_the_pixel_values_of_the_picture():
    """Users of transformers pass `do_rescale=False` with floats from 0 to 1."""
    processor = tiny.processor()
    values = processor(TENSOR / 255, do_rescale=False).pixel_values
    assert torch.equal(values, processor(PICTURE).pixel_values)


@pytest.mark.parametrize(
    "messages",
    [
        [{"type": "image", "image": PIXELS}],
        [{"type": "image", "base64": BASE64}],
        [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{BASE64}"}}],
    ],
    ids=["array", "base64", "OpenAI"],
)
def test_an_image_in_a_chat_message_has_the_same_pixels(messages):
    processor = tiny.processor()
    content = [*messages, {"type": "text", "text": "a star"}]
    batch = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True, return_dict=True)
    assert torch.equal(batch["pixel_values"], processor(PICTURE).pixel_values)


# --- What is not an image ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (5, "'int'"),
        ([None], "'NoneType'"),
        (float("nan"), "'float'"),
        (io.StringIO("text"), "'StringIO'"),
        ({"array": [0.0], "sampling_rate": 8000}, r"'dict' with the keys \['array', 'sampling_rate'\]"),
        ({LONG: 1}, "'dict' with the keys"),
    ],
)
def test_another_type_is_named(value, kind):
    with pytest.raises(TypeError, match=f"is of type {kind}.* give a PIL image, an array") as refused:
        tiny.captioner().caption(value)
    assert len(str(refused.value)) <= 500


@pytest.mark.parametrize(
    ("array", "problem"),
    [
        (np.zeros((5, 7, 9)), r"of shape \(5, 7, 9\) is not an image"),
        (torch.zeros(5), r"of shape \(5,\) is not an image"),
        (np.zeros((0, 4, 3)), "of shape"),
        (np.full((4, 4, 3), -2.0), "values from -2 to -2"),
        (np.linspace(-2.1, 2.6, 48).reshape(4, 4, 3), "as `pixel_values`"),  # normalised
        (np.full((4, 4), np.nan), "not finite numbers"),
        (np.zeros((4, 4), complex), "complex128"),
    ],
)
def test_an_array_that_is_not_an_image_is_refused(array, problem):
    with pytest.raises(ValueError, match=problem):
        open_image(array)


FTYP = b"\0\0\0\x20ftyp"
KINDS = {  # content of a file: what it is, and the remedy
    b"": "it is empty; copy or download it again",
    bytes(5000): "it holds only zero bytes",
    b"<!DOCTYPE html><html>": "an HTML page; download the image itself",
    b"\xef\xbb\xbf\n <HTML>": "an HTML page",
    b"<!-- x --><head>": "an HTML page",
    b'<?xml version="1.0"?><!DOCTYPE html>': "an HTML page",
    b'<svg xmlns="http://www.w3.org/2000/svg">': "an SVG drawing; convert it to PNG",
    b'<?xml version="1.0"?>\n<!-- x -->\n<!DOCTYPE svg PUBLIC "a">\n<svg>': "an SVG drawing",
    b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>': "an XML document, perhaps the error of a server",
    b'{"error": "not found"}': "JSON, perhaps the error of a server",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d": "a pointer of Git LFS; run `git lfs pull`",
    b"%PDF-1.7": "a PDF document",
    b"%!PS-Adobe-3.0": "a PostScript document",
    b"8BPS\0\1": "a Photoshop document",
    b"\0\0\1\0\1\0": "an icon",
    FTYP + b"isom": "a video",
    FTYP + b"qt  ": "a video",
    b"\x1a\x45\xdf\xa3\x01": "a video",
    b"RIFF\0\0\0\0AVI LIST": "a video",
    b"RIFF\0\0\0\0WAVEfmt ": "an audio file",
    b"ID3\4\0": "an audio file",
    b"OggS\0": "an audio file",
    b"PK\3\4\x14": "an archive; unpack it",
    b"\x1f\x8b\x08": "an archive",
    b"\x93NUMPY\1\0": "an array of NumPy",
    b"a cat on a mat": "plain text",
    "eine hübsche Katze".encode(): "plain text",
    bytes(range(128, 256)): "its format is unknown; convert it to JPEG or PNG",
    PNG[:60]: "it is cut off or damaged",
    saved(PICTURE, "JPEG")[:400]: "it is cut off or damaged",
    b"\xff\xd8\xff\xe0": "it is damaged, or of a kind that Pillow does not read",
}


@pytest.mark.parametrize("content", KINDS, ids=KINDS.values())
def test_a_file_is_named_for_what_it_is(tmp_path, content):
    path = tmp_path / "holiday.jpg"
    path.write_bytes(content)
    with pytest.raises(OSError, match=f"holiday.jpg' cannot be read: .*{KINDS[content]}"):
        open_image(path)
    with pytest.raises(OSError, match=f"An image without a name cannot be read: .*{KINDS[content]}"):
        open_image(content)


@pytest.fixture
def without_plugins(monkeypatch):
    """Forget the formats of plug-ins, and hide the plug-ins, as where they are not installed."""
    readable_formats.cache_clear()
    for plugin in ("pillow_heif.HeifImagePlugin", "pillow_jxl"):
        monkeypatch.setitem(sys.modules, plugin, None)
    for kind in ("HEIF", "AVIF", "JXL"):
        monkeypatch.delitem(Image.OPEN, kind, raising=False)
    yield
    readable_formats.cache_clear()


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        (FTYP + b"heic", "a HEIC image; `pip install pillow-heif`"),
        (FTYP + b"mif1", "a HEIC image"),
        (FTYP + b"avif", "an AVIF image; `pip install --upgrade pillow`"),
        (b"\xff\x0a\xfa\x1f", "a JPEG XL image; `pip install pillow-jxl-plugin`"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL image"),
    ],
)
def test_a_format_without_its_plugin_is_named_with_the_remedy(without_plugins, content, remedy):
    with pytest.raises(OSError, match=remedy):
        open_image(content)


@pytest.mark.parametrize(("kind", "plugin"), [("HEIF", "pillow_heif"), ("JXL", "pillow_jxl"), ("AVIF", "PIL")])
def test_a_format_is_read_where_its_plugin_is_installed(kind, plugin):
    pytest.importorskip(plugin, reason="make test EXTRAS=test,heif runs the tests of HEIC and JPEG XL")
    assert kind in readable_formats()
    red = Image.new("RGB", (64, 48), (200, 30, 30))
    opened = pixels(saved(red, kind))
    assert opened.shape == (48, 64, 3) and np.abs(opened.astype(int) - np.asarray(red)).max() < 12


@pytest.mark.parametrize(
    "value", [LONG, f"{LONG}.jpg", "a/" * 3000, "data:image/png;base64," + "A" * 9000, "QUJD" * 2000]
)
def test_a_message_about_a_long_name_is_short(value):
    with pytest.raises(OSError) as refused:
        open_image(value)
    assert len(str(refused.value)) <= 500


def test_an_address_that_is_not_read_is_refused():
    with pytest.raises(OSError, match="'s3://bucket/a.jpg' is at an address with s3://: download it first"):
        open_image("s3://bucket/a.jpg")


@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "Path"])
def test_the_error_for_a_missing_file_names_it(tmp_path, kind):
    with pytest.raises(FileNotFoundError, match=r"absent\.jpg"):
        open_image(kind(tmp_path / "absent.jpg"))


def test_a_folder_is_not_an_image(tmp_path):
    with pytest.raises(OSError, match=tmp_path.name):
        open_image(tmp_path)


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_the_error_for_a_file_that_is_cut_off_names_it(tmp_path, ending):
    path = tmp_path / f"broken.{ending}"
    tiny.picture(size=(200, 200)).save(path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(OSError, match=rf"broken\.{ending}' cannot be read: it is cut off or damaged"):
        open_image(path)


def test_the_error_for_an_image_opened_from_a_damaged_file_names_it(tmp_path):
    """Pillow decodes the pixels only when they are used."""
    path = tmp_path / "broken.png"
    tiny.picture(size=(200, 200)).save(path)
    os.truncate(path, 5000)
    with pytest.raises(OSError, match=r"broken\.png"):
        open_image(Image.open(path))


def test_a_decoded_image_of_absurd_size_is_refused():
    with pytest.raises(OSError, match="1 x 10000 pixels"):
        open_image(Image.new("RGB", (1, 10_000)))


# --- Pixels -----------------------------------------------------------------------------------------------------------

LAYER = PICTURE.convert("RGBA")
LAYER.putalpha(Image.fromarray(np.where(np.arange(11) < 5, np.uint8(0), np.uint8(255))[None].repeat(9, axis=0)))
ON_WHITE = np.where((np.arange(11) < 5)[None, :, None], np.uint8(255), PIXELS)  # the left 5 columns are transparent


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(LAYER, id="RGBA"),
        pytest.param(LAYER.convert("RGBa"), id="RGBa"),
        pytest.param(np.asarray(LAYER), id="array"),
        pytest.param(torch.tensor(np.asarray(LAYER)).permute(2, 0, 1) / 255, id="tensor"),
        pytest.param(saved(LAYER), id="PNG"),
        pytest.param(saved(LAYER, "WEBP", lossless=True, exact=True), id="WEBP"),
        pytest.param(saved(LAYER, "TIFF"), id="TIFF"),
    ],
)
def test_transparent_pixels_are_white(image):
    assert np.array_equal(pixels(image), ON_WHITE)


def test_half_transparent_pixels_are_mixed_with_white():
    assert open_image(Image.new("RGBA", (2, 2), (0, 0, 255, 51))).getpixel((0, 0)) == (204, 204, 255)


GREY = Image.fromarray(GRADIENT)
BLACK_AS_WHITE = np.where(GRADIENT == 0, 255, GRADIENT)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(saved(GREY, transparency=0), id="L"),
        pytest.param(saved(GREY.convert("RGB"), transparency=(0, 0, 0)), id="RGB"),
        pytest.param(saved(GREY.convert("P"), transparency=0), id="palette, one colour"),
        pytest.param(saved(GREY.convert("P"), transparency=b"\0"), id="palette, alpha of each colour"),
        pytest.param(saved(Image.fromarray(GRADIENT.astype(np.uint16) * 257), transparency=0), id="16 bits"),
        pytest.param(saved(GREY.convert("P"), "GIF", transparency=0), id="GIF"),
    ],
)
def test_a_colour_that_a_file_declares_transparent_is_white(content):
    assert np.array_equal(pixels(content)[..., 0], BLACK_AS_WHITE)


def test_a_bitmap_whose_black_is_transparent_is_white():
    assert pixels(saved(GREY.convert("1"), transparency=0)).min() == 255


def test_transparent_grey_is_white():
    layer = GREY.convert("LA")
    layer.putalpha(Image.fromarray(np.where(GRADIENT == 0, np.uint8(0), np.uint8(255))))
    for image in (layer, layer.convert("La"), saved(layer)):
        assert np.array_equal(pixels(image)[..., 0], BLACK_AS_WHITE)


DEEP = {
    "I;16": Image.fromarray(GRADIENT.astype(np.uint16) * 257),
    "I": Image.fromarray(GRADIENT.astype(np.int32) * 257),
    "F to 1": Image.fromarray((GRADIENT / 255).astype(np.float32)),
    "F to 255": Image.fromarray(GRADIENT.astype(np.float32)),
    "depths in millimetres": Image.fromarray(GRADIENT.astype(np.float32) * 20 + 300),
    "heights below zero": Image.fromarray(GRADIENT.astype(np.int32) * 1000 - 90_000),
    "8 bits in I": GREY.convert("I"),
    "8 bits in I;16": GREY.convert("I;16"),
    "PNG of 16 bits": saved(Image.fromarray(GRADIENT.astype(np.uint16) * 257)),
    "TIFF of 16 bits": saved(Image.fromarray(GRADIENT.astype(np.uint16) * 257), "TIFF"),
    "TIFF of floats": saved(Image.fromarray((GRADIENT / 255).astype(np.float32)), "TIFF"),
    "PGM of 16 bits": b"P5\n256 8\n65535\n" + (GRADIENT.astype(">u2") * 257).tobytes(),
}


@pytest.mark.parametrize("kind", DEEP)
def test_grey_values_of_many_bits_are_scaled_by_their_range(kind):
    assert np.array_equal(pixels(DEEP[kind]), np.dstack([GRADIENT] * 3))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I", "F"])
def test_pictures_of_every_mode_have_three_channels(mode):
    """The pixels of an opaque picture equal those of Pillow's conversion to RGB."""
    source = tiny.picture().convert("L" if mode in ("I", "F") else "P" if mode == "PA" else "RGB")
    picture = source.convert(mode)
    expected = source if mode in ("I", "F") else picture
    assert np.array_equal(pixels(picture), np.asarray(expected.convert("RGB")))


def test_a_cmyk_photograph_keeps_its_colours():
    """Adobe stores the inks inverted."""
    red = Image.new("RGB", (16, 16), (220, 20, 20)).convert("CMYK")
    assert np.abs(pixels(saved(red, "JPEG")).astype(int) - [220, 20, 20]).max() < 12


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_an_animation_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    content = saved(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    assert open_image(content).getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_photographs_are_turned_upright(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = np.zeros((32, 16, 3), np.uint8)
    upright[:16] = 255  # the upper half is white
    to_file = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    content = saved(Image.fromarray(np.ascontiguousarray(to_file)), kind, exif=exif)
    opened = pixels(content)
    assert opened.shape == upright.shape and np.abs(opened.astype(int) - upright).mean() < 3


def test_a_decoded_upright_rgb_image_is_not_copied():
    picture = tiny.picture()
    assert open_image(picture) is picture


def test_a_decoded_image_with_an_exif_orientation_is_turned_upright():
    picture, exif = tiny.picture(size=(40, 20)), Image.Exif()
    exif[0x0112] = 6
    picture.info["exif"] = exif.tobytes()
    upright = open_image(picture)
    assert upright.size == (20, 40)
    assert open_image(upright) is upright


def test_a_png_of_16_bits_with_colours_is_read():
    """Pillow reduces it to 8 bits itself."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in PIXELS.astype(int) * 257)
    parts = {b"IHDR": struct.pack(">IIBBBBB", 11, 9, 16, 2, 0, 0, 0), b"IDAT": zlib.compress(rows), b"IEND": b""}
    file = b"\x89PNG\r\n\x1a\n"
    for kind, content in parts.items():
        file += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    assert np.array_equal(pixels(file), PIXELS)
