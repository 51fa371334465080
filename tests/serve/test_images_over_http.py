"""The images of a request: what is refused, with which words, and that what passes is what a viewer shows."""

import asyncio
import base64
import io
import logging
import re
import struct
import zlib

import pytest
from PIL import Image, features

from llava_cot.image import open_image
from llava_cot.serve import images
from llava_cot.serve.errors import RequestError
from llava_cot.serve.held import Held
from llava_cot.serve.images import MAX_SCANS, ImageReader
from llava_cot.serve.limits import Limits

LIMITS = Limits(max_images=3, max_pixels=20_000, max_image_bytes=30_000)
HELD = Held(LIMITS)
BASE64 = re.compile("(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{3}=|[A-Za-z0-9+/]{2}==)?")
PARAM = "messages[0].content[1].image_url.url"
SECRET = "SECRET-WORD"


def encoded(kind: str, size: tuple[int, int] = (40, 30), **options) -> bytes:
    file = io.BytesIO()
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    image.save(file, kind, **options)
    return file.getvalue()


def uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def read(*urls: str, limits: Limits = LIMITS) -> list[Image.Image]:
    reader = ImageReader(limits)
    try:
        return asyncio.run(reader.read([(PARAM, url) for url in urls], Held(limits).holding()))
    finally:
        reader.close()


def refusal(*urls: str, limits: Limits = LIMITS) -> RequestError:
    with pytest.raises(RequestError) as caught:
        read(*urls, limits=limits)
    assert caught.value.param == PARAM
    return caught.value


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of(width: int, height: int) -> bytes:
    """A PNG that declares this size and has one row of it."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(b"\0" * 100)) + png_chunk(b"IEND", b"")


def jpeg_of(width: int, height: int) -> bytes:
    data = encoded("JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def webp_of(width: int, height: int, chunk: bytes = b"VP8X") -> bytes:
    if chunk == b"VP8X":
        body = b"\0\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    elif chunk == b"VP8L":
        body = b"\x2f" + ((width - 1) | (height - 1) << 14).to_bytes(4, "little") + bytes(5)
    else:
        body = b"\0\0\0\x9d\x01\x2a" + struct.pack("<HH", width, height)
    return b"RIFF" + struct.pack("<I", 22) + b"WEBP" + chunk + struct.pack("<I", 10) + body


def gif_of(width: int, height: int) -> bytes:
    data = encoded("GIF")
    return data[:6] + struct.pack("<HH", width, height) + data[10:]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
@pytest.mark.parametrize("declared", ["image/png", "text/html", "image/svg+xml;charset=utf-8", ""])
def test_the_four_formats_pass_whatever_type_is_declared(kind, declared):
    if kind == "WEBP" and not features.check("webp"):
        pytest.skip("Pillow was built without WebP")
    data = encoded(kind)
    (image,) = read(uri(data, declared))
    assert image.mode == "RGB"
    assert image.tobytes() == open_image(data).tobytes()


def test_the_first_frame_the_orientation_and_a_white_ground():
    red, blue = Image.new("RGB", (20, 20), "red"), Image.new("RGB", (20, 20), "blue")
    moving, turned, clear = io.BytesIO(), io.BytesIO(), io.BytesIO()
    red.save(moving, "GIF", save_all=True, append_images=[blue])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(turned, "JPEG", exif=exif)
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(clear, "PNG")
    first, upright, white = read(*(uri(file.getvalue()) for file in (moving, turned, clear)))
    assert first.getpixel((0, 0)) == (255, 0, 0)
    assert upright.size == (20, 40)
    assert white.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("piece", [4, 8])
@pytest.mark.parametrize(
    "text", ["", "A", "AA==AA", "AAAA=", "AAAA==", "AAAA====", "A===", "=", "AAA=AAAA", "AA\n==", "ä"]
)
def test_base64_is_read_in_pieces(monkeypatch, piece, text):
    monkeypatch.setattr(images, "PIECE", piece)
    for good in range(1, 20):
        data = base64.b64encode(bytes(range(good))).decode()
        assert images._data_of(PARAM, f"data:;base64,{data}", LIMITS) == bytes(range(good))
        if not BASE64.fullmatch(data + text):
            with pytest.raises(RequestError, match="base64 data is wrong"):
                images._data_of(PARAM, f"data:;base64,{data + text}", LIMITS)
        else:
            assert images._data_of(PARAM, f"data:;base64,{data + text}", LIMITS) == base64.b64decode(data + text)


def test_all_requests_together_hold_at_most_so_many_pixels_and_bytes():
    image = uri(encoded("PNG", (100, 80)))
    limits = Limits(max_pixels=10_000, max_held_pixels=20_000, max_held_bytes=2**26)

    async def run() -> None:
        held, reader = Held(limits), ImageReader(limits)
        first, second, third = held.holding(), held.holding(), held.holding()
        await reader.read([(PARAM, image)], first)
        await reader.read([(PARAM, image)], second)
        assert (held.pixels, held.bytes) == (16_000, 0)  # files are held only until they are decoded
        with pytest.raises(RequestError) as caught:
            await reader.read([(PARAM, image)], third)
        assert (caught.value.status, caught.value.code) == (429, "memory_full")
        assert caught.value.headers["Retry-After"]
        third.close()
        first.close()
        assert (held.pixels, held.bytes) == (8_000, 0)
        await reader.read([(PARAM, image)], held.holding())
        held.holding().add(bytes=held.max_bytes)
        with pytest.raises(RequestError, match="as much memory as they may"):
            await reader.read([(PARAM, image)], held.holding())
        reader.close()

    asyncio.run(run())


def test_a_limit_of_all_requests_lets_the_largest_one_in():
    with pytest.raises(ValueError, match="max_held_pixels must be at least max_pixels=50000000, got 7"):
        Limits(max_held_pixels=7)
    with pytest.raises(ValueError, match="max_held_bytes must be at least max_body_bytes=33554432, got 7"):
        Limits(max_held_bytes=7)


def test_what_follows_an_image_is_not_read():
    assert read(uri(encoded("PNG") + b"<script>alert(1)</script>"))[0].size == (40, 30)


@pytest.mark.parametrize(
    "url",
    [
        *("http://example.com/a.png", "https://example.com/a.png", "file:///etc/passwd", "FILE:/etc/passwd"),
        *("/etc/passwd", "../a.png", "a.png", "", " ", "ftp://example.com/a.png", "gopher://127.0.0.1:25/_HELO"),
        *("//example.com/a.png", "blob:https://example.com/1", "javascript:alert(1)", " data:image/png;base64,AAAA"),
        *("\\\\host\\share\\a.png", "https:\\\\example.com", "dict://localhost:11211/", "jar:file:///a.zip!/a.png"),
    ],
)
def test_other_addresses_than_data_uris_are_refused(url):
    error = refusal(url)
    assert (error.status, error.code) == (400, "image_url")
    assert error.message == "An image must be a base64 data URI: this server downloads none."


@pytest.mark.parametrize(
    "url",
    [
        *(
            "data:",
            "data:,",
            "data:image/png",
            "data:image/png;base64",
            "data:image/png;base64,",
            "data:image/png,AAAA",
        ),
        *("data:image/png;base32,AAAA", "data:" + "a" * 300 + ";base64,AAAA", "data:image/svg+xml,<svg/>"),
    ],
)
def test_other_data_uris_than_base64_are_refused(url):
    assert refusal(url).message == "An image's data URI must be data:TYPE;base64,DATA."


@pytest.mark.parametrize("data", ["A", "AAA", "AA=A", "AA AA", "AAAA\n", "AA-_", "A\u00c4AA", "%41AAA", "=AAA"])
def test_base64_is_read_strictly(data):
    assert refusal(f"data:image/png;base64,{data}").message == "An image's base64 data is wrong."


def test_base64_that_is_too_long_is_not_decoded():
    error = refusal("data:image/png;base64," + "!" * 40_001)  # which is no base64 either
    assert (error.status, error.message) == (413, "An image may have at most 30000 bytes.")


@pytest.mark.parametrize(
    "data",
    [
        *(
            b"<svg xmlns='http://www.w3.org/2000/svg'/>",
            b"BM" + bytes(60),
            b"II*\0" + bytes(60),
            b"%PDF-1.7 " + bytes(60),
        ),
        *(
            b"<html>" + encoded("PNG"),
            b"PK\x03\x04" + encoded("JPEG"),
            b"\x00\x00\x01\x00" + bytes(60),
            b"P6 40 30 255 ",
        ),
        *(b"SIMPLE  =                    T", b"RIFF\0\0\0\0WAVE" + bytes(60), b"%!PS-Adobe-3.0 EPSF", b"\0"),
        *(encoded("BMP"), encoded("TIFF"), encoded("TGA"), encoded("PPM"), encoded("ICO"), encoded("PCX")),
    ],
)
def test_other_formats_are_refused_by_their_first_bytes(data):
    assert refusal(uri(data)).message == "An image must be a JPEG, PNG, WebP or GIF file."


@pytest.mark.parametrize(
    "data",
    [
        *(png_of(201, 100), png_of(100_000, 100_000), png_of(2**31 - 1, 2**31 - 1)),
        *(jpeg_of(200, 101), jpeg_of(65_500, 65_500), gif_of(200, 101), gif_of(65_535, 65_535)),
        *(webp_of(200, 101), webp_of(2**24, 2**24), webp_of(16_383, 16_383, b"VP8L"), webp_of(16_383, 16_383, b"VP8 ")),
    ],
    ids=lambda data: f"{data[:4]!r}{data[16:24].hex()}",
)
def test_a_size_above_the_limit_is_refused_before_pixels_are_decoded(data):
    error = refusal(uri(data))
    assert (error.status, error.code) == (413, "image_too_large")
    assert error.message == "The images of a request may have at most 20000 pixels in all."


def test_the_images_of_a_request_share_one_limit():
    image = uri(encoded("PNG", (100, 90)))
    assert len(read(image, image)) == 2
    assert refusal(image, image, image).status == 413
    assert refusal(*[image] * 4).message == "A request may have at most 3 images."


@pytest.mark.parametrize("data", [png_of(1, 1), png_of(7, 100), encoded("GIF", (1, 1)), webp_of(1, 1), jpeg_of(40, 1)])
def test_a_tiny_image_is_refused(data):
    error = refusal(uri(data))
    assert (error.status, error.code) == (400, "image_too_small")
    assert error.message == "An image's sides must have at least 8 pixels."


def test_a_long_thin_image_is_refused():
    assert refusal(uri(png_of(1000, 9))).message == "An image's long side may be at most 100 times its short side."


GOOD = {kind: encoded(kind, (60, 50)) for kind in ("PNG", "JPEG", "GIF")}


@pytest.mark.parametrize(
    "data",
    [
        *(data[: len(data) // 2] for data in GOOD.values()),
        *(data[:12] for data in GOOD.values()),
        *(data[:-40] for data in (GOOD["PNG"], GOOD["JPEG"])),
        *(GOOD["PNG"][:60] + bytes([GOOD["PNG"][60] ^ 0xFF]) + GOOD["PNG"][61:], png_of(100, 100)),
        *(b"\x89PNG\r\n\x1a\n" + bytes(50), b"\xff\xd8\xff\xd9", b"GIF89a", webp_of(40, 30), b"RIFF\0\0\0\0WEBPVP8X"),
        GOOD["PNG"][:33] + png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**24))) + GOOD["PNG"][33:],
        GOOD["PNG"][:33] + png_chunk(b"zTXt", SECRET.encode()) + GOOD["PNG"][33:70],
    ],
    ids=lambda data: f"{data[:4]!r}{len(data)}",
)
def test_a_broken_file_is_refused_in_fixed_words(data, caplog):
    caplog.set_level(logging.INFO, "llava_cot.serve.images")
    error = refusal(uri(data))
    assert (error.status, error.code) == (400, "invalid_image")
    assert error.message == "The image can't be read: its file is broken or incomplete."
    assert "can't be read" in caplog.text  # the reason is in the log


def test_a_jpeg_with_more_scans_than_any_needs_is_refused():
    data = encoded("JPEG", (60, 50), progressive=True)
    assert read(uri(data))[0].size == (60, 50)
    start = data.index(b"\xff\xda")
    scans = data[start:-2] * (MAX_SCANS + 1)
    limits = Limits(max_image_bytes=10**6)
    assert "at most 100 scans" in refusal(uri(data[:start] + scans + b"\xff\xd9"), limits=limits).message
    comment = b"\xff\xfe" + struct.pack(">H", 2 + 2 * MAX_SCANS + 2) + b"\xff\xda" * (MAX_SCANS + 1)
    assert read(uri(data[:2] + comment + data[2:] + b"\xff\xda" * 1000))[0].size == (60, 50)  # those are none


def test_a_png_of_empty_chunks_is_refused():
    data = encoded("PNG")
    limits = Limits(max_image_bytes=10**6)
    padded = data[:33] + png_chunk(b"teSt", b"") * 10_000 + data[33:]
    assert "10000 parts" in refusal(uri(padded), limits=limits).message


def test_no_image_is_held_after_a_refusal():
    """The threads are the reader's own, and they keep nothing of a request that failed in them."""
    import gc
    import weakref

    async def run() -> weakref.ref:
        reader = ImageReader(LIMITS)
        (image,) = await reader.read([(PARAM, uri(GOOD["PNG"]))], HELD.holding())
        held = weakref.ref(image)
        del image
        with pytest.raises(RequestError):
            await reader.read([(PARAM, uri(GOOD["PNG"])), (PARAM, uri(GOOD["PNG"][:70]))], HELD.holding())
        reader.close()
        return held

    held = asyncio.run(run())
    gc.collect()
    assert held() is None


@pytest.mark.parametrize("field, value", [("max_queue", 0), ("max_seconds", float("inf")), ("min_side", -1)])
def test_limits_are_checked(field, value):
    with pytest.raises(ValueError, match=f"{field} must be positive and finite, got {value}"):
        Limits(**{field: value})
    with pytest.raises(TypeError, match=f"{field} must be"):
        Limits(**{field: "4"})
