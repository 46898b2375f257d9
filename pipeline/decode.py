"""An encoded image file to the pixels of one model.

The steps of transformers' `load_image` and image processor, with their bits: open, turn upright, make RGB, resize and
crop. Whatever a bad file makes Pillow raise ends here as an ImageError, and its warnings end here too. (libtiff writes
a line to stderr itself about a few damaged TIFFs; only a redirect of the whole process could stop that.)
"""

from __future__ import annotations

import functools
import io
import logging
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
from PIL import IcoImagePlugin, Image, ImageOps, UnidentifiedImageError

from pipeline.errors import ImageError, ModelError
from pipeline.transform import ImageTransform

# The size at which Pillow itself begins to warn; above twice this it refuses, whatever the caller allows.
DEFAULT_MAX_PIXELS = 89_478_485

# Of a JPEG; ordinary ones have a dozen. Each takes the decoder over the whole image, in a file of a hundred bytes more.
MAX_SCANS = 100

# All that Pillow reads, but EPS (starts Ghostscript), IPTC (opens what it wraps as any format, EPS too), FITS (inflates
# gzip without a bound), BLP and ICNS (hold files that may be larger than they declare), and BUFR, GRIB, HDF5, MPEG and
# WMF (stubs that cannot decode).
_ALLOWED_FORMATS = {
    *(
        "AVIF",
        "BMP",
        "DIB",
        "GIF",
        "ICO",
        "JPEG",
        "JPEG2000",
        "PNG",
        "PPM",
        "PSD",
        "QOI",
        "TGA",
        "TIFF",
        "WEBP",
    ),
    *("CUR", "DCX", "DDS", "FLI", "FTEX", "GBR", "IM", "IMT", "MCIDAS", "MSP", "PCD", "PCX", "PIXAR", "SGI"),
    *("SPIDER", "SUN", "XBM", "XPM", "XVTHUMB"),
}

# How files begin that people take for images, or that are images with a damaged header.
_SIGNATURES = (
    (b"\xff\xd8", "a JPEG file whose header is damaged or cut short"),
    (b"\x89PNG", "a PNG file whose header is damaged or cut short"),
    (b"GIF8", "a GIF file whose header is damaged or cut short"),
    (b"RIFF", "a RIFF file (WebP, AVI or WAV) that holds no WebP image, or a damaged one"),
    (b"II*\0", "a TIFF file that is damaged, or of a kind that Pillow does not read"),
    (b"MM\0*", "a TIFF file that is damaged, or of a kind that Pillow does not read"),
    (b"%!PS", "EPS or PostScript, which is not read: convert it to PNG"),
    (b"\xc5\xd0\xd3\xc6", "EPS, which is not read: convert it to PNG"),
    (b"%PDF", "PDF, which is not read: convert it to PNG"),
    (b"<", "text (HTML, XML or SVG)"),
    (b"{", "text (JSON)"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "gzip data"),
)

_ICON = b"\0\0\1\0"
_SCAN = b"\xff\xda"
_MARKER = re.compile(rb"\xff([\xc0-\xcf\xd9-\xfe])")  # with a length after it, or the end of the image

# Pillow warns of odd files (EXIF, palettes, sizes) and logs odd TIFFs; in a batch of millions that is noise.
warnings.filterwarnings("ignore", module=r"PIL\.")
_IGNORE_PILLOW = warnings.filters[0]
logging.getLogger("PIL").addHandler(logging.NullHandler())


def decode_image(
    data: bytes, transform: ImageTransform, *, max_pixels: int = DEFAULT_MAX_PIXELS
) -> npt.NDArray[np.uint8]:
    """uint8 [height, width, 3], contiguous, of the first frame of an image file of any format in the allowlist.

    `max_pixels` bounds the image as its header declares it, checked before anything is decoded, and each intermediate
    of the resize. Safe to call from many threads.

    Raises ImageError for all that a bad image can cause.
    """
    _keep_pillow_quiet()
    image = _open(data, max_pixels)
    _check_declared(image, max_pixels)
    _check_scans(image, data)
    return _resized(_load_rgb(image), transform, max_pixels)


def resize_pixels(
    image_HWC: npt.NDArray[np.uint8], transform: ImageTransform, *, max_pixels: int = DEFAULT_MAX_PIXELS
) -> npt.NDArray[np.uint8]:
    """The same of an image that is decoded already, uint8 [H, W, 3] in RGB."""
    if not image_HWC.size:
        raise ImageError(f"the image is empty: {image_HWC.shape[1]} x {image_HWC.shape[0]} pixels")
    image_RGB = Image.fromarray(image_HWC)
    _check_declared(image_RGB, max_pixels)
    return _resized(image_RGB, transform, max_pixels)


def _resized(image_RGB: Image.Image, transform: ImageTransform, max_pixels: int) -> npt.NDArray[np.uint8]:
    _check_resized(image_RGB, transform, max_pixels)
    try:
        return transform.pixels(image_RGB)
    except ModelError:
        raise
    except Exception as error:  # a size of zero, no memory, or what a processor of transformers raises
        raise ImageError(f"{_size(image_RGB)} cannot be resized for this model: {_reason(error)}") from error


def decode_each(
    images: Sequence[bytes], transform: ImageTransform, threads: int = 1
) -> Iterator[npt.NDArray[np.uint8] | ImageError]:
    """For each image its pixels, as `decode_image` gives them, or what is wrong with it; in order.

    With several threads, each takes its share of the images at once: to hand over one at a time costs more than to
    decode a small one.
    """
    if threads == 1:
        for image in images:
            try:
                yield decode_image(image, transform)
            except ImageError as error:
                yield error
        return
    size = math.ceil(len(images) / threads) or 1
    shares = [images[start : start + size] for start in range(0, len(images), size)]
    with ThreadPoolExecutor(threads) as pool:
        for results in pool.map(lambda share: list(decode_each(share, transform)), shares):
            yield from results


def _keep_pillow_quiet() -> None:
    """Put the filter back in front where someone has put another before it, as a `warnings.catch_warnings` does.

    The filter is one for the process: `catch_warnings` around each decode would race between threads.
    """
    if warnings.filters[:1] != [_IGNORE_PILLOW]:
        warnings.filterwarnings("ignore", module=r"PIL\.")


@functools.cache
def _formats() -> tuple[str, ...]:
    """The allowlist as far as this Pillow was built with it, in the order in which Pillow would try."""
    Image.init()
    return tuple(name for name in Image.ID if name in _ALLOWED_FORMATS)


@functools.cache
def image_suffixes() -> frozenset[str]:
    """The suffixes (`.jpg`) that files of the allowed formats have, in lower case."""
    known = Image.registered_extensions()
    return frozenset(suffix for suffix, name in known.items() if name in _formats())


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """The image with its header read and nothing decoded; of an icon, nothing beyond `max_pixels`."""
    if not data:
        raise ImageError("the file is empty (0 bytes)")
    try:
        if data.startswith(_ICON):
            _check_declared(_inside_icon(data), max_pixels)
        return Image.open(io.BytesIO(data), formats=_formats())
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"the image is too large: {_reason(error)}") from error
    except UnidentifiedImageError as error:
        raise ImageError(_unidentified(data)) from error
    except Exception as error:  # Pillow's readers raise nearly anything, from struct.error to AttributeError
        raise ImageError(f"the image's header is damaged: {_reason(error)}") from error


def _inside_icon(data: bytes) -> Image.Image:
    """The file in the icon that Pillow will show, and decodes at once as it opens the icon, whatever its true size."""
    first = IcoImagePlugin.IcoFile(io.BytesIO(data)).entry[0]
    return Image.open(io.BytesIO(data[first.offset :]), formats=("PNG", "DIB"))


def _unidentified(data: bytes) -> str:
    for signature, kind in _SIGNATURES:
        if data.startswith(signature):
            return f"not a readable image: the file looks like {kind}"
    if data[4:8] == b"ftyp":
        return "not a readable image: the file looks like HEIC, or like an MP4 or MOV video; convert it to JPEG"
    return f"not an image in a format that can be read: its {len(data)} bytes begin with {data[:12]!r}"


def _check_declared(image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise ImageError(f"the image is too large: {_size(image)} is more than max_pixels={max_pixels}; shrink it")


def _check_scans(image: Image.Image, data: bytes) -> None:
    if image.format not in ("JPEG", "MPO") or data.count(_SCAN) <= MAX_SCANS:
        return
    if _scans(data) > MAX_SCANS:  # not thumbnails, further pictures, or the film of a motion photo
        raise ImageError(f"the JPEG file has more than {MAX_SCANS} scans; save it anew")


def _scans(data: bytes) -> int:
    """The scans of a JPEG file's first picture, counted from marker to marker."""
    count, at = 0, len(b"\xff\xd8")
    while (marker := _MARKER.search(data, at)) and marker[1] != b"\xd9":
        at = marker.end()
        count += marker[1] == _SCAN[1:]
        at += int.from_bytes(data[at : at + 2], "big")
    return count


def _load_rgb(image: Image.Image) -> Image.Image:
    """Decoded, upright as its EXIF says, and RGB; as `load_image`, less the copies of what is so already."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # see _open
        raise ImageError(f"the {image.format} file is damaged or cut short: {_reason(error)}") from error


def _check_resized(image: Image.Image, transform: ImageTransform, max_pixels: int) -> None:
    """Refuse what would grow without bound: kept in proportion, a hair's breadth of 1 x 50000 becomes gigabytes."""
    height, width = transform.resized_size(image.height, image.width)
    # Along x first, as Pillow does unless it is 13 and the image tall, there is one of new width and old height between
    if width * max(height, image.height) > max_pixels:
        raise ImageError(
            f"the image is too thin: {_size(image)} would grow beyond max_pixels={max_pixels} in the resize"
        )


def _size(image: Image.Image) -> str:
    return f"{image.width} x {image.height} pixels"


def _reason(error: Exception) -> str:
    """One line of it; some exceptions carry no text."""
    return " ".join(str(error).split()) or type(error).__name__
