"""Every way to give an image, and every kind of image file, shows what a viewer shows."""

import base64
import io
import warnings

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageOps

from llava_cot.data.annotation.images import read_image
from llava_cot.data.images import ImageChecks
from llava_cot.image import image_size, is_plain, open_image, to_8_bits

WHITE, BLACK = (255, 255, 255), (0, 0, 0)
MODES = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I", "F"]
MODES += ["I;16", "I;16B", "I;16L"]


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def drawing(mode: str, ink) -> Image.Image:
    """Ink on a clear ground that would be ink too if its transparency were lost."""
    image = Image.new(mode, (12, 8), (0,) * len(mode))
    ImageDraw.Draw(image).rectangle((2, 2, 6, 5), fill=ink)
    return image


@pytest.fixture
def photo():
    """Colours in which every corner differs."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8))


def test_every_way_to_give_an_image(photo, tmp_path):
    data, path = encoded(photo), tmp_path / "a photo.png"
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    given = {
        "path": path,
        "string": str(path),
        "URI of a file": path.as_uri(),
        "data URI": f"data:image/png;base64,{text}",
        "data URI with line ends": f"data:image/png;base64,{text[:40]}%0A{text[40:]}",
        "data URI without base64": "data:," + "".join(f"%{byte:02x}" for byte in data),
        "bytes": data,
        "bytearray": bytearray(data),
        "memoryview": memoryview(data),
        "buffer": io.BytesIO(data),
        "file": path.open("rb"),
        "bytes in a mapping": {"bytes": data, "path": None},
        "path in a mapping": {"bytes": None, "path": str(path)},
        "image": photo,
        "opened file": Image.open(path),
        "array": np.asarray(photo),
        "array in another order": np.asfortranarray(photo),
    }
    for name, image in given.items():
        found = open_image(image)
        assert found.mode == "RGB" and found.tobytes() == photo.tobytes(), name
    given["file"].close()


@pytest.mark.parametrize("mode, ink", [("RGBA", (0, 0, 0, 255)), ("LA", (0, 255)), ("PA", (0, 255)), ("RGBa", None)])
def test_transparency_is_laid_on_white(mode, ink):
    if mode == "RGBa":
        image = drawing("RGBA", (0, 0, 0, 255)).convert("RGBa")
    elif mode == "PA":
        image = drawing("RGBA", (0, 0, 0, 255)).convert("PA")
    else:
        image = drawing(mode, ink)
    found = open_image(image)
    assert found.getpixel((0, 0)) == WHITE and found.getpixel((3, 3)) == BLACK
    if mode in ("RGBA", "LA"):
        clear = image.convert("RGBA")
        expected = Image.alpha_composite(Image.new("RGBA", image.size, WHITE), clear).convert("RGB")
        assert found.tobytes() == expected.tobytes(), "as transformers' image processors do"
    assert not is_plain(image)


@pytest.mark.parametrize("format", ["PNG", "GIF", "TIFF", "WEBP"])
@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA"])
def test_transparency_of_files(mode, format):
    """A PNG may declare one grey value or colour as transparent, a PNG or GIF one palette entry."""
    image = drawing("RGBA", (9, 9, 9, 255))
    options = {"lossless": True} if format == "WEBP" else {}
    if mode != "RGBA":
        image = Image.new("L", (12, 8), 3)
        image.paste(9, (2, 2, 7, 6))
        image = image.convert(mode)
        options["transparency"] = image.getpixel((0, 0))
    if (mode, format) == ("RGB", "GIF"):
        del options["transparency"]  # its colours become a palette of Pillow's choice
    has_it = mode == "RGBA" or ("transparency" in options and format in ("PNG", "GIF"))
    found = open_image(encoded(image, format, **options))
    assert found.getpixel((0, 0)) == (WHITE if has_it else (3, 3, 3)) and found.getpixel((3, 3)) == (9, 9, 9)


def test_a_grey_value_of_16_bits_may_be_transparent():
    image = Image.fromarray(np.array([[0, 30_000, 65_535]], np.uint16))
    with pytest.warns(UserWarning, match=r"image values in \[0, 65535\] were scaled to 8 bits"):
        found = open_image(encoded(image, transparency=0))
    assert [found.getpixel((x, 0)) for x in range(3)] == [WHITE, (117,) * 3, WHITE]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_the_orientation_of_photos(photo, format, orientation, tmp_path):
    exif = photo.getexif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}.get(format, {})
    data = encoded(photo, format, exif=exif, **options)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    found = open_image(data)
    assert found.size == expected.size == ((12, 8) if orientation < 5 else (8, 12))
    (tmp_path / "photo").write_bytes(data)
    assert image_size(str(tmp_path / "photo")) == found.size
    assert found.tobytes() == expected.tobytes()
    assert is_plain(Image.open(io.BytesIO(data))) == (orientation == 1)


def test_metadata_that_can_not_be_read_says_nothing(photo):
    assert open_image(encoded(photo, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")).tobytes() == photo.tobytes()


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_the_first_of_several_frames(format):
    first, second = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    data = encoded(first, format, save_all=True, append_images=[second])
    opened = Image.open(io.BytesIO(data))
    assert opened.n_frames == 2 and not is_plain(opened)
    red, green, blue = open_image(data).getpixel((8, 8))
    assert red > 240 and max(green, blue) < 10


@pytest.mark.parametrize(
    "values, dtype, expected",
    [
        ([0, 128, 255], np.uint8, [0, 128, 255]),
        ([0, 1], bool, [0, 255]),
        ([0, 255, 257, 65_535], np.uint16, [0, 1, 1, 255]),
        ([0, 255], np.int32, [0, 255]),
        ([0, 256, 65_535], np.int64, [0, 1, 255]),
        ([0, 65_536, 131_072], np.uint32, [0, 128, 255]),
        ([-1, 0, 1], np.int8, [0, 128, 255]),
        ([0.0, 0.5, 1.0], np.float32, [0, 128, 255]),
        ([0.0, 1.5, 255.0], np.float64, [0, 2, 255]),
        ([0.0, 65_535.0], np.float64, [0, 255]),
        ([-2.0, 0.0, 2.0], np.float16, [0, 128, 255]),
        ([7.0e9], np.float64, [0]),
        ([0.0], np.float32, [0]),
    ],
)
def test_more_than_8_bits_are_scaled(values, dtype, expected):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert to_8_bits(np.array(values, dtype)).tolist() == expected
    is_scaled = dtype not in (np.uint8, bool) and max(values) != 255
    assert [str(w.message)[:15] for w in caught] == ["image values in"] * is_scaled


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_files_of_more_than_8_bits(dtype):
    values = np.linspace(0, 60_000, 96).reshape(8, 12).astype(dtype)
    image = Image.fromarray(values)
    with pytest.warns(UserWarning, match="were scaled to 8 bits"):
        found = np.asarray(open_image(encoded(image, "TIFF")))
    assert np.abs(found[..., 0] - values / 257).max() <= 0.5 and len(np.unique(found)) > 90


BROKEN = {
    "no file": (lambda f: f / "none.png", r"'.*none.png': No such file or directory"),
    "a folder": (lambda f: f, "it is not a file"),
    "a device": (lambda f: "/dev/zero", "'/dev/zero': it is not a file"),
    "a URL": (lambda f: "https://host/a.png", "'https://host/a.png': nothing is downloaded; give its bytes"),
    "no image": (lambda f: b"text", "4 bytes: its format is not known"),
    "nothing": (lambda f: b"", "0 bytes: its format is not known"),
    "an empty mapping": (lambda f: {"bytes": None, "path": None}, "a mapping: it has neither 'bytes' nor a 'path'"),
    "bad base64": (lambda f: "data:image/png;base64,@@@", "a data URI of 25 characters: its base64 is wrong"),
    "an empty data URI": (lambda f: "data:image/png;base64,", "a data URI must be data:TYPE;base64,DATA"),
    "bare base64": (lambda f: "iVBORw0KGgo" * 900, r"a string of 9900 characters, 'iVBORw0KGgo\w+'\.\.\.: File name"),
    "a null byte": (lambda f: "a\0b.png", r"'a\\x00b.png'"),
    "no pixels": (lambda f: Image.new("RGB", (0, 3)), "an image of mode RGB: it has 0 x 3 pixels"),
    "no rows": (lambda f: np.zeros((0, 3, 3), np.uint8), r"is \[0, 3, 3\]"),
    "five channels": (lambda f: np.zeros((3, 3, 5)), r"is \[3, 3, 5\]"),
    "one dimension": (lambda f: np.zeros(3), r"is \[3\]"),
    "complex numbers": (lambda f: np.zeros((3, 3), np.complex64), "an array of complex64: its values must be"),
    "NaN": (lambda f: np.full((3, 3), np.nan), "its values must be finite"),
    "infinity": (lambda f: np.full((3, 3), np.inf, np.float32), "its values must be finite"),
}


@pytest.mark.parametrize("make, message", BROKEN.values(), ids=BROKEN)
def test_what_can_not_be_opened(tmp_path, make, message):
    with pytest.raises(ValueError, match="image must be a readable image, got .*" + message) as caught:
        open_image(make(tmp_path))
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


@pytest.mark.parametrize("image", [None, 3, 1.5, ["a.png"], io.StringIO("a.png"), object()])
def test_what_is_no_image(image):
    with pytest.raises(TypeError, match="image must be a "):
        open_image(image)


@pytest.mark.parametrize("format", ["png", "jpg", "gif", "webp", "tif", "bmp"])
def test_a_file_that_breaks_off_is_named(tmp_path, format):
    path = tmp_path / f"half.{format}"
    noise = np.random.default_rng(1).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"got '.*half\.{format}': "):
        open_image(path)
    with pytest.raises(ValueError, match=rf"half\.{format}"):
        read_image(path)


@given(
    st.sampled_from(MODES),
    st.integers(1, 9) | st.integers(1, 300),
    st.integers(1, 9) | st.integers(1, 300),
    st.integers(0, 2**32 - 1),
)
@example("I;16B", 1, 1, 259_752)  # dark: a type of foreign byte order was not known to have 16 bits
def test_every_mode_and_size(mode, width, height, seed):
    """Whatever Pillow can make, in memory and, where PNG or TIFF have the mode, in a file."""
    size = len(Image.new(mode, (width, height)).tobytes())
    image = Image.frombytes(mode, (width, height), np.random.default_rng(seed).bytes(size))
    if mode == "F":
        image = Image.fromarray(np.random.default_rng(seed).uniform(-2, 400, (height, width)).astype(np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = open_image(image)
        assert (found.mode, found.size) == ("RGB", (width, height)) and image.mode == mode
        for format in ("PNG", "TIFF"):
            try:
                data = encoded(image, format)
            except (OSError, KeyError, ValueError):  # the format does not have this mode
                continue
            again = open_image(data)
            assert again.size == found.size
            if mode not in ("CMYK", "YCbCr", "LAB", "HSV", "I", "RGBX", "RGBa", "La", "PA"):  # stored in another mode
                assert again.tobytes() == found.tobytes(), format


def test_annotation_sends_what_the_model_would_see(tmp_path, photo):
    """A file is sent as it is only if every reader shows the same pixels."""
    exif = photo.getexif()
    exif[0x0112] = 6
    kept = {"plain.png": encoded(photo), "plain.jpg": encoded(photo, "JPEG"), "grey.png": encoded(photo.convert("L"))}
    changed = {
        "clear.png": encoded(drawing("RGBA", (0, 0, 0, 255))),
        "clear.gif": encoded(drawing("RGBA", (0, 0, 0, 255)), "GIF"),
        "turned.jpg": encoded(photo, "JPEG", exif=exif),
        "film.webp": encoded(photo, "WEBP", lossless=True, save_all=True, append_images=[photo.rotate(180)]),
        "deep.png": encoded(Image.fromarray(np.array([[0, 65_535]], np.uint16))),
        "print.jpg": encoded(photo.convert("CMYK"), "JPEG"),
    }
    for name, data in {**kept, **changed}.items():
        (tmp_path / name).write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sent = base64.b64decode(read_image(tmp_path / name).url.split(",")[1])
            assert (sent == data) == (name in kept), name
            assert Image.open(io.BytesIO(sent)).convert("RGB").tobytes() == open_image(data).tobytes(), name


def test_validation_knows_a_test_image_that_was_saved_with_a_clear_ground(tmp_path):
    """The hash is of the pixels that the model would see."""
    from llava_cot.data.images import image_hashes

    image = drawing("RGBA", (0, 0, 0, 255))
    (tmp_path / "test").mkdir()
    image.save(tmp_path / "test" / "a.png")
    open_image(image).save(tmp_path / "copy.bmp")
    checks = ImageChecks(tmp_path, forbidden=image_hashes(tmp_path / "test"))
    with pytest.raises(Exception, match="is one of the test images"):
        checks.check("copy.bmp")


@pytest.mark.parametrize("kind", ["u2", "i2", "u4", "i8", "f4", "f8"])
def test_arrays_of_foreign_byte_order(kind):
    values = np.array([[0, 20, 200, 30_000]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.array_equal(*(to_8_bits(values.astype(order + kind)) for order in "<>"))


def test_files_that_were_read_before(photo, tiny):
    """Pillow goes back to the start of a file too. One file may be asked about twice."""
    file = io.BytesIO()
    photo.save(file, "PNG")
    expected = open_image(photo)
    assert open_image(file).tobytes() == open_image(file).tobytes() == expected.tobytes()
    first, second = tiny.answer_batch([file, file], ["?", "?"], "greedy", max_new_tokens=3)
    assert first.tokens == second.tokens


def test_a_file_uri_may_have_one_slash_or_three(photo, tmp_path):
    photo.save(tmp_path / "a b%.png")
    path = str(tmp_path / "a b%.png").replace("%", "%25").replace(" ", "%20")
    for uri in (f"file:{path}", f"file://{path}", f"FILE://localhost{path}"):
        assert open_image(uri).tobytes() == open_image(photo).tobytes()
    with pytest.raises(ValueError, match="its host must be this one, got 'elsewhere'"):
        open_image(f"file://elsewhere{path}")


def test_a_file_that_can_not_be_read_stands_in_its_place(photo, tiny, tmp_path):
    closed = io.BytesIO(b"x")
    closed.close()
    text = io.StringIO("x")
    found = tiny.answer_batch([closed, photo, text], ["?"] * 3, "greedy", max_new_tokens=3, return_exceptions=True)
    assert isinstance(found[0], ValueError) and "image must be a readable image, got 'BytesIO'" in str(found[0])
    assert isinstance(found[2], TypeError) and "opened in binary mode" in str(found[2])
    assert len(found[1].tokens) == 3
    with pytest.raises(ValueError, match="image must be a readable image, got 'BytesIO'"):
        tiny.answer(closed, "?", "greedy", max_new_tokens=3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_that_has_been_opened_stays_as_it_is(photo, tiny, monkeypatch, orientation):
    """A search opens what it is given before it makes the model's inputs of it."""
    exif = photo.getexif()
    exif[0x0112] = orientation
    data = encoded(photo, "JPEG", exif=exif)
    once = open_image(data)
    assert open_image(once).tobytes() == once.tobytes() and open_image(once).size == once.size
    given = Image.open(io.BytesIO(data))
    assert open_image(given).tobytes() == once.tobytes() == open_image(given).tobytes()  # the caller's own is unchanged
    seen, process = [], tiny.processor.image_processor.preprocess
    monkeypatch.setattr(
        tiny.processor.image_processor,
        "preprocess",
        lambda images, *a, **k: seen.append(images) or process(images, *a, **k),
    )
    tiny.answer(data, "?", "greedy", max_new_tokens=2)
    (((shown,),),) = seen
    assert shown.size == once.size and shown.tobytes() == once.tobytes()
