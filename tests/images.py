"""Real image files, and bad ones, for the whole suite: scikit-image's photographs, and what Pillow makes of them.

Only the files in scikit-image's wheel are used, so nothing is downloaded. Same Pillow, same bytes.
"""

from __future__ import annotations

import base64
import functools
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import skimage
from hypothesis import strategies as st
from PIL import ExifTags, Image, features

# What `cjpeg -arithmetic -quality 60` of libjpeg-turbo makes of a 16 x 16 picture; Pillow reads it, and writes none
ARITHMETIC_JPEG = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywtQFdBRkxOUlNSMj5aYVpQ"
    "YEpRUk//2wBDAQ4ODhMREyYVFSZPNS01T09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT0//yQARCAAQABAD"
    "ASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwD9W2ZdeXiqvk+91taZqUd8ELAF6vMBIt17OtgVzSGUrOFRcNr3AcBMtWkh/s/67BU+"
    "kAE9uMhFCmA1y3HUVmbY8RbJWzv/2Q=="
)

_FOLDER = Path(skimage.__file__).parent / "data"
_PHOTOS = (
    *("astronaut.png", "camera.png", "chelsea.png", "chessboard_GRAY.png", "chessboard_RGB.png", "coffee.png"),
    *("coins.png", "color.png", "horse.png", "hubble_deep_field.jpg", "logo.png", "microaneurysms.png", "page.png"),
    *("motorcycle_left.png", "multipage.tif", "no_time_for_that_tiny.gif", "phantom.png", "retina.jpg", "rocket.jpg"),
)


@functools.cache
def real_images() -> dict[str, bytes]:
    """Name to encoded file: some seventy, of every mode and most formats that turn up in data sets."""
    photos = {name: (_FOLDER / name).read_bytes() for name in _PHOTOS}
    return photos | _jpegs() | _rotated() | _animated() | _modes() | _formats() | _shapes()


@functools.cache
def bad_images() -> dict[str, bytes]:
    """Name to a file that is no image, or a damaged one, or one that must not be opened."""
    return _not_images() | _damaged() | _bombs()


@functools.cache
def _photo(name: str = "chelsea.png", size: tuple[int, int] = (160, 107)) -> Image.Image:
    with Image.open(_FOLDER / name) as image:
        return image.convert("RGB").resize(size)


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    """The file of an image."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


# Where it begins, from 0 at the first byte to 1 at the end; what is put there; how many bytes make room for it.
Edits = list[tuple[float, bytes, int]]


def edits() -> st.SearchStrategy[Edits]:
    """Some damage to a file: bytes overwritten, inserted, cut out, or all that follows cut off."""
    where = st.floats(0, 1)
    some = st.binary(min_size=1, max_size=8)
    overwriting = st.builds(lambda at, new: (at, new, len(new)), where, some)
    others = st.tuples(where, st.just(b"") | some, st.sampled_from([0, 1, 7, 100, 512, 1 << 40]))
    return st.lists(overwriting | others, min_size=1, max_size=6)


def edited(data: bytes, edits: Edits) -> bytes:
    """The file with the damage done."""
    for where, new, dropped in edits:
        at = int(where * len(data))
        data = data[:at] + new + data[at + dropped :]
    return data


def _jpegs() -> dict[str, bytes]:
    photo = _photo()
    return {
        "jpeg": encode(photo, "JPEG"),
        "jpeg-progressive": encode(photo, "JPEG", progressive=True),
        "jpeg-444": encode(photo, "JPEG", subsampling=0, quality=95),
        "jpeg-grey": encode(photo.convert("L"), "JPEG"),
        "jpeg-cmyk": encode(photo.convert("CMYK"), "JPEG"),
        "jpeg-corrupted-exif": encode(photo, "JPEG", exif=b"Exif\0\0no TIFF header here"),
        "jpeg-two-pictures": encode(photo, "MPO", save_all=True, append_images=[_photo("coffee.png")]),
    }


def _rotated() -> dict[str, bytes]:
    images = {"png-orientation-8": encode(_photo(), "PNG", exif=_exif(8))}
    for orientation in range(1, 9):
        images[f"jpeg-orientation-{orientation}"] = encode(_photo(), "JPEG", exif=_exif(orientation))
    return images


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def _animated() -> dict[str, bytes]:
    frames = [_photo(name) for name in ("chelsea.png", "coffee.png", "astronaut.png")]
    return {
        f"animated-{format.lower()}": encode(frames[0], format, save_all=True, append_images=frames[1:], duration=80)
        for format in ("GIF", "WEBP", "PNG")
    }


def _modes() -> dict[str, bytes]:
    """One file for each way to hold a pixel."""
    photo, grey = _photo(), _photo("camera.png").convert("L")
    palette, alpha = photo.quantize(32), photo.copy()
    alpha.putalpha(grey)
    grey_16 = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    return {
        "png-1-bit": encode(grey.convert("1"), "PNG"),
        "png-grey": encode(grey, "PNG"),
        "png-grey-transparent": encode(grey, "PNG", transparency=128),
        "png-grey-alpha": encode(alpha.convert("LA"), "PNG"),
        "png-grey-16-bit": encode(grey_16, "PNG"),
        "png-palette": encode(palette, "PNG"),
        "png-palette-transparent": encode(palette, "PNG", transparency=bytes(range(0, 256, 8))),
        "png-palette-one-transparent": encode(palette, "PNG", transparency=3),
        "png-rgb-16-bit": _png_of(*photo.size, 16, np.asarray(photo).astype(">u2") * 257),
        "png-rgb-transparent": encode(photo, "PNG", transparency=(0, 0, 0)),
        "png-alpha": encode(alpha, "PNG"),
        "gif-transparent": encode(palette, "GIF", transparency=3),
        "webp-alpha": encode(alpha, "WEBP"),
        "tiff-grey-16-bit": encode(grey_16, "TIFF"),
        "tiff-float": encode(grey.convert("F"), "TIFF"),
        "tiff-32-bit": encode(grey.convert("I"), "TIFF"),
        "tiff-cmyk": encode(photo.convert("CMYK"), "TIFF"),
        "tiff-lab": encode(photo.convert("LAB"), "TIFF") if features.check("littlecms2") else encode(photo, "TIFF"),
    }


def _formats() -> dict[str, bytes]:
    photo = _photo()
    formats = ["BMP", "ICO", "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP"]
    formats += [name for name, feature in (("AVIF", "avif"), ("JPEG2000", "jpg_2000")) if features.check(feature)]
    files = {format.lower(): encode(photo, format) for format in formats}
    return files | {
        "tiff-lzw": encode(photo, "TIFF", compression="tiff_lzw"),
        "webp-lossless": encode(photo, "WEBP", lossless=True),
    }


def _shapes() -> dict[str, bytes]:
    sizes = ((1, 1), (2, 1), (3, 900), (900, 3), (224, 224), (256, 256), (384, 384), (255, 257))
    return {f"{width}x{height}": encode(_photo(size=(width, height)), "PNG") for width, height in sizes}


def _not_images() -> dict[str, bytes]:
    return {
        "empty": b"",
        "one-byte": b"\xff",
        "text": b"an image, it is not\n" * 20,
        "html": b"<!DOCTYPE html><title>404 Not Found</title>",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>',
        "heic": b"\0\0\0\x24ftypheic\0\0\0\0mif1heic",
        "eps": encode(_photo(), "EPS"),
        "pdf": encode(_photo(), "PDF"),
        "python": (_FOLDER / "_registry.py").read_bytes(),
        # scikit-image reads this TIFF with a library of its own; Pillow does not know its layout
        "unknown-tiff": (_FOLDER / "multipage_rgb.tif").read_bytes(),
    }


def _damaged() -> dict[str, bytes]:
    jpeg, png, photo = encode(_photo(), "JPEG"), encode(_photo(), "PNG"), _photo()
    middle = len(png) // 2
    return {
        "truncated-jpeg": jpeg[: len(jpeg) // 2],
        "truncated-jpeg-header": jpeg[:20],
        "truncated-png": png[: len(png) // 2],
        "truncated-gif": encode(photo, "GIF")[:500],
        "truncated-webp": encode(photo, "WEBP")[:500],
        "truncated-tiff": encode(photo, "TIFF", compression="tiff_lzw")[:500],
        "truncated-bmp": encode(photo, "BMP")[:500],
        "wrong-header": b"\0" * 8 + png[8:],
        "corrupted-png": png[:middle] + b"\0" * 64 + png[middle + 64 :],
        "zero-size": _png_of(0, 0),
    }


def _bombs() -> dict[str, bytes]:
    """Small files of large images, or of much work.

    One declares more than Pillow's own bound, one what Pillow only warns of, and one hides such a picture in an icon;
    one has five thousand scans, each of which takes the decoder over the whole image.
    """
    return {
        "bomb": _png_of(50_000, 50_000),
        "small-bomb": _png_of(12_000, 12_000),
        "icon-bomb": icon_of(_png_of(12_000, 12_000)),
        "scan-bomb": jpeg_of_scans(5_000),
    }


def icon_of(png: bytes) -> bytes:
    """An ICO file that declares 16 x 16 pixels, whatever it holds."""
    return struct.pack("<3H4B2H2I", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(png), 22) + png


def jpeg_of_scans(scans: int, side: int = 9_000) -> bytes:
    """A grey progressive JPEG whose scans all say that every block ends as it is, in some hundred bytes each."""
    tables = _jpeg_segment(0xDB, b"\0" + bytes([1] * 64)) + _jpeg_segment(0xC4, b"\x10\x01" + bytes(15) + b"\xe0")
    frame = _jpeg_segment(0xC2, struct.pack(">BHHB3B", 8, side, side, 1, 1, 0x11, 0))
    runs = -(-(((side + 7) // 8) ** 2) // 32767)  # a zero bit, and 14 ones: the next 32767 blocks
    bits = ("0" + "1" * 14) * runs + "1" * (-15 * runs % 8)
    data = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    scan = _jpeg_segment(0xDA, b"\x01\x01\x00\x01\x3f\x00") + data
    return b"\xff\xd8" + tables + frame + scan * scans + b"\xff\xd9"


def _jpeg_segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def _png_of(width: int, height: int, bits: int = 8, pixels_HWC: npt.NDArray[Any] | None = None) -> bytes:
    """A PNG of RGB; without `pixels_HWC`, which are big-endian, it declares its size and lacks its pixels."""
    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    rows = bytes(1000) if pixels_HWC is None else b"".join(b"\0" + row.tobytes() for row in pixels_HWC)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(kind, body) for kind, body in chunks)


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
