"""Real image files, and bad ones, for the whole suite: scikit-image's photographs, and what Pillow makes of them.

Only the files in scikit-image's wheel are used, so nothing is downloaded. Same Pillow, same bytes.
"""

from __future__ import annotations

import functools
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import skimage
from PIL import ExifTags, Image, features

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
    """Small files that declare large images: one beyond Pillow's own bound, one that it only warns of."""
    return {"bomb": _png_of(50_000, 50_000), "small-bomb": _png_of(12_000, 12_000)}


def _png_of(width: int, height: int) -> bytes:
    """A PNG that declares a size; its pixels are missing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(kind, body) for kind, body in chunks)


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
