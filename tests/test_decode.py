"""Pixels equal transformers' bit for bit, and a bad file raises ImageError and nothing else.

Nothing was found that transformers decodes and this code cannot match. Very thin images, said to confuse its guess of
the channel axis, do not: the processors get Pillow images, and guess for bare arrays only.
"""

from __future__ import annotations

import functools
import io
import json
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, _imaging, features
from transformers import AutoImageProcessor
from transformers.image_transforms import get_resize_output_image_size, get_size_with_aspect_ratio
from transformers.image_utils import ChannelDimension, load_image

from pipeline.decode import decode_each, decode_image
from pipeline.errors import ImageError, ModelError
from pipeline.transform import ImageTransform, transform_of
from tests.images import ARITHMETIC_JPEG, bad_images, encode, icon_of, jpeg_of_scans, real_images

_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_RESIZE = {"do_normalize": True, "do_resize": True}

# preprocessor_config.json, in the form in which the checkpoints on the hub have it
_RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "google/vit-base-patch16-224": (
        "vit",
        _RESIZE | _HALF | {"feature_extractor_type": "ViTFeatureExtractor", "resample": 2, "size": 224},
    ),
    "google/vit-base-patch16-384": (
        "vit",
        _RESIZE | _HALF | {"image_processor_type": "ViTImageProcessor", "resample": 2, "size": 384},
    ),
    "microsoft/resnet-50": (
        "resnet",
        _RESIZE
        | _IMAGENET
        | {"crop_pct": 0.875, "feature_extractor_type": "ConvNextFeatureExtractor", "resample": 3, "size": 224},
    ),
    "facebook/convnext-base-384": (
        "convnext",
        _RESIZE
        | _IMAGENET
        | {"crop_pct": 0.875, "feature_extractor_type": "ConvNextFeatureExtractor", "resample": 3, "size": 384},
    ),
    "facebook/deit-base-patch16-224": (
        "deit",
        _RESIZE
        | _IMAGENET
        | {"crop_size": 224, "do_center_crop": True, "feature_extractor_type": "DeiTFeatureExtractor"}
        | {"resample": 3, "size": 256},
    ),
    "microsoft/swin-tiny-patch4-window7-224": (
        "swin",
        _RESIZE | _IMAGENET | {"feature_extractor_type": "ViTFeatureExtractor", "resample": 3, "size": 224},
    ),
    "facebook/dinov2-base-imagenet1k-1-layer": (
        "dinov2",
        _RESIZE
        | _IMAGENET
        | {"crop_size": {"height": 224, "width": 224}, "do_center_crop": True, "do_convert_rgb": True}
        | {"do_rescale": True, "image_processor_type": "BitImageProcessor", "resample": 3}
        | {"rescale_factor": 0.00392156862745098, "size": {"shortest_edge": 256}},
    ),
    "only a class": ("vit", {"image_processor_type": "ViTImageProcessor"}),
    "crop larger than the image": (
        "deit",
        {"image_processor_type": "DeiTImageProcessor", "size": [100, 150], "crop_size": [131, 120]},
    ),
}
# Classes that do more than the recipes cover, so that the processor itself is run
_FALLBACKS: dict[str, tuple[str, dict[str, Any]]] = {
    "google/efficientnet-b0": (
        "efficientnet",
        _RESIZE
        | {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.47853944, 0.4732864, 0.47434163]}
        | {"image_processor_type": "EfficientNetImageProcessor", "include_top": True, "resample": 0}
        | {"rescale_offset": False, "size": {"height": 224, "width": 224}},
    ),
    "facebook/levit-128S": (
        "levit",
        _RESIZE | _IMAGENET | {"feature_extractor_type": "LevitFeatureExtractor", "resample": 3, "size": 224},
    ),
    "microsoft/beit-base-patch16-224": (
        "beit",
        _RESIZE
        | _HALF
        | {"crop_size": 224, "do_center_crop": False, "feature_extractor_type": "BeitFeatureExtractor"}
        | {"resample": 2, "size": 224},
    ),
    "apple/mobilevit-small": (  # swaps red and blue
        "mobilevit",
        {"crop_size": 256, "do_center_crop": True, "do_flip_channel_order": True, "do_resize": True}
        | {"feature_extractor_type": "MobileViTFeatureExtractor", "resample": 2, "size": 288},
    ),
    "no resize": ("vit", {"image_processor_type": "CLIPImageProcessor", "do_resize": False, "crop_size": 96}),
}
_REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "no fixed size": ("detr", {"image_processor_type": "DetrImageProcessor", "do_pad": False}),
    "no crop": ("vit", {"image_processor_type": "CLIPImageProcessor", "do_center_crop": False}),
    "as it is": ("vit", {"image_processor_type": "ViTImageProcessor", "do_resize": False}),
    "no pixels": ("imagegpt", {"image_processor_type": "ImageGPTImageProcessor"}),
    "one mean": ("vit", {"image_processor_type": "ViTImageProcessor", "image_mean": [0.5]}),
}

VIT = ImageTransform(height=224, width=224, resize_to=(224, 224), do_normalize=True, mean=(0.5,) * 3, std=(0.5,) * 3)
RESNET = ImageTransform(height=224, width=224, shortest_edge=256, center_crop=True)


@functools.cache
def _loaded(name: str) -> Image.Image:
    """The image as transformers loads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_image(Image.open(io.BytesIO(real_images()[name])))


def _processor(folder: Path, model_type: str, config: dict[str, Any]) -> Any:
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    load: Callable[[Path], Any] = AutoImageProcessor.from_pretrained
    return load(folder)


def _model_input(transform: ImageTransform, data: bytes) -> npt.NDArray[np.float32]:
    """[C, H, W] as the model sees it: each byte replaced by its channel's float."""
    pixels_HWC = decode_image(data, transform)
    assert pixels_HWC.flags.c_contiguous
    assert pixels_HWC.flags.writeable
    return transform.lookup_table()[np.arange(3), pixels_HWC].transpose(2, 0, 1)


def _assert_same_pixels(transform: ImageTransform, processor: Any, names: list[str]) -> None:
    for name in names:
        expected_CHW = processor(_loaded(name), return_tensors="np")["pixel_values"][0]
        actual_CHW = _model_input(transform, real_images()[name])
        assert actual_CHW.dtype == expected_CHW.dtype == np.float32
        assert np.array_equal(actual_CHW, expected_CHW), name


@pytest.mark.parametrize("checkpoint", _RECIPES)
def test_a_recipe_gives_the_pixels_of_transformers(checkpoint: str, tmp_path: Path) -> None:
    processor = _processor(tmp_path, *_RECIPES[checkpoint])
    transform = transform_of(processor)
    assert transform.processor is None
    _assert_same_pixels(transform, processor, list(real_images()))


@pytest.mark.parametrize("checkpoint", _FALLBACKS)
def test_without_a_recipe_the_processor_itself_is_run(checkpoint: str, tmp_path: Path) -> None:
    processor = _processor(tmp_path, *_FALLBACKS[checkpoint])
    transform = transform_of(processor)
    assert transform.processor is not None
    _assert_same_pixels(transform, processor, ["rocket.jpg", "horse.png", "jpeg-orientation-6", "1x1", "255x257"])


@pytest.mark.parametrize("resample", Image.Resampling)
def test_every_filter_of_pillow(resample: Image.Resampling, tmp_path: Path) -> None:
    config = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 150}, "crop_size": [120, 170]}
    processor = _processor(tmp_path, "vit", config | {"resample": int(resample)})
    transform = transform_of(processor)
    assert transform.processor is None
    assert transform.resample == resample
    _assert_same_pixels(transform, processor, ["chelsea.png", "coffee.png", "jpeg", "1x1", "255x257", "256x256"])


@pytest.mark.parametrize("do_rescale", [True, False])
@pytest.mark.parametrize("stat", [0.5, None])
def test_every_way_to_scale(do_rescale: bool, stat: float | None, tmp_path: Path) -> None:
    config = {"image_processor_type": "ViTImageProcessor", "do_rescale": do_rescale, "do_normalize": stat is not None}
    processor = _processor(tmp_path, "vit", config | {"image_mean": stat, "image_std": stat, "rescale_factor": 1 / 127})
    expected_CHW = processor(_loaded("rocket.jpg"), return_tensors="np")["pixel_values"][0]
    assert np.array_equal(_model_input(transform_of(processor), real_images()["rocket.jpg"]), expected_CHW)


@pytest.mark.parametrize("case", _REFUSED)
def test_what_is_no_fixed_size_of_rgb_is_refused(case: str, tmp_path: Path) -> None:
    processor = _processor(tmp_path, *_REFUSED[case])
    with pytest.raises(ModelError, match=f"image processor {type(processor).__name__}"):
        transform_of(processor)


def test_a_processor_that_is_not_backed_by_pillow_is_refused() -> None:
    with pytest.raises(ModelError, match="image processor object does not use Pillow"):
        transform_of(object())


@pytest.mark.parametrize("options", [{}, {"resize_to": (224, 224), "shortest_edge": 224}, {"shortest_edge": 224}])
def test_a_transform_without_one_output_size_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ModelError):
        ImageTransform(height=224, width=224, **options)


@pytest.mark.parametrize("longest_edge", [None, 100, 99])
def test_sizes_that_keep_the_aspect_ratio_are_those_of_transformers(longest_edge: int | None) -> None:
    transform = ImageTransform(height=64, width=64, shortest_edge=60, longest_edge=longest_edge, center_crop=True)
    for height in range(1, 130, 3):
        for width in range(1, 130):
            if longest_edge:
                expected = get_size_with_aspect_ratio((height, width), 60, longest_edge)
            else:
                image_CHW = np.broadcast_to(np.uint8(0), (3, height, width))
                channels = ChannelDimension.FIRST
                expected = get_resize_output_image_size(image_CHW, 60, False, input_data_format=channels)
            assert transform.resized_size(height, width) == expected


@pytest.mark.parametrize("checkpoint", ["microsoft/resnet-50", "google/efficientnet-b0"])
def test_json_gives_the_same_transform_back(checkpoint: str, tmp_path: Path) -> None:
    transform = transform_of(_processor(tmp_path, *(_RECIPES | _FALLBACKS)[checkpoint]))
    copy = ImageTransform.from_json(transform.to_json())
    assert copy == transform
    assert hash(copy) == hash(transform)
    assert np.array_equal(copy.lookup_table(), transform.lookup_table())


def test_the_first_frame_of_an_animation_counts() -> None:
    for name in ("animated-gif", "animated-webp", "animated-png"):
        image = Image.open(io.BytesIO(real_images()[name]))
        assert getattr(image, "n_frames", 1) == 3
        expected_HWC = np.array(image.convert("RGB").resize((224, 224), Image.Resampling.BILINEAR))
        assert np.array_equal(decode_image(real_images()[name], VIT), expected_HWC)


_BAD = {
    "empty": "the file is empty",
    "one-byte": "not an image",
    "text": "begin with b'an image, it'",
    "html": "text .HTML",
    "svg": "text .HTML, XML or SVG",
    "heic": "looks like HEIC",
    "eps": "EPS or PostScript, which is not read",
    "pdf": "PDF, which is not read",
    "python": "not an image",
    "unknown-tiff": "a TIFF file that is damaged, or of a kind",
    "truncated-jpeg": "the JPEG file is damaged or cut short",
    "truncated-jpeg-header": "a JPEG file whose header is damaged or cut short",
    "truncated-png": "the PNG file is damaged or cut short",
    "truncated-gif": "a GIF file whose header is damaged or cut short",
    "truncated-webp": "header is damaged",
    "truncated-tiff": "a TIFF file that is damaged",
    "truncated-bmp": "the BMP file is damaged or cut short",
    "wrong-header": "not an image",
    "corrupted-png": "the PNG file is damaged or cut short",
    "zero-size": "a PNG file whose header is damaged",
    "bomb": "the image is too large: .*2500000000 pixels",
    "small-bomb": "the image is too large: 12000 x 12000 pixels is more than max_pixels=89478485",
    "icon-bomb": "the image is too large: 12000 x 12000 pixels is more than max_pixels=89478485",
    "scan-bomb": "more than 100 scans",
}


_BOMBS = ("bomb", "small-bomb", "icon-bomb", "scan-bomb")


@pytest.mark.parametrize("name", bad_images())
def test_a_bad_image_says_what_is_wrong(name: str) -> None:
    with pytest.raises(ImageError, match=_BAD[name]) as caught:
        decode_image(bad_images()[name], VIT)
    assert "\n" not in str(caught.value)
    assert "object at 0x" not in str(caught.value)
    assert caught.value.__cause__ is not None or name in ("empty", *_BOMBS[1:])


@pytest.mark.parametrize("name", _BOMBS)
def test_a_bomb_is_refused_before_it_is_decoded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise AssertionError("the pixels were asked for")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(ImageError, match=_BAD[name]):
        decode_image(bad_images()[name], VIT)


@functools.cache
def _large(format: str) -> bytes:
    """A whole file of a megapixel, most of them all but empty."""
    image = Image.new("1" if format in ("MSP", "XBM") else "RGB", (1000, 1000), 1)
    if format == "ICO":
        return icon_of(encode(image, "PNG"))
    options: dict[str, Any] = {"speed": 10} if format == "AVIF" else {"lossless": True} if format == "WEBP" else {}
    return encode(image.quantize(2) if format == "GIF" else image, format, **options)


_WRITTEN = (
    *("BMP", "DIB", "GIF", "ICO", "JPEG", "MSP", "PCX", "PNG", "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP"),
    *("XBM", *(name for name, feature in (("AVIF", "avif"), ("JPEG2000", "jpg_2000")) if features.check(feature))),
)


@pytest.mark.parametrize("format", _WRITTEN)
def test_what_is_too_large_takes_no_memory_for_pixels(format: str) -> None:
    decode_image(_large(format), VIT)
    _imaging.reset_stats()
    with pytest.raises(ImageError, match="too large: 1000 x 1000 pixels is more than max_pixels=999999"):
        decode_image(_large(format), VIT, max_pixels=999_999)
    assert _imaging.get_stats()["new_count"] == 0
    decode_image(_large(format), VIT)
    assert _imaging.get_stats()["new_count"] > 0  # what is counted is what a decode takes


_PEAK = """
import re, sys
from pipeline.decode import decode_image
from pipeline.errors import ImageError
from pipeline.transform import ImageTransform

def peak_kb():
    return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])

vit = ImageTransform(height=224, width=224, resize_to=(224, 224))
max_pixels, *paths = sys.argv[1:]
files = [open(path, "rb").read() for path in paths]
decode_image(files[0], vit)
before_kb = peak_kb()
for data in files[1:]:
    try:
        decode_image(data, vit, max_pixels=int(max_pixels))
    except ImageError:
        pass
print(peak_kb() - before_kb)
"""


@pytest.fixture(scope="module")
def whole_bombs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A small picture, and files of some kilobytes that are 25 megapixels each when they are decoded."""
    image, folder = Image.new("L", (5000, 5000)), tmp_path_factory.mktemp("bombs")
    png = encode(image, "PNG")
    files = {
        "small": real_images()["1x1"],
        "png": png,
        "ico": icon_of(png),
        "gif": encode(image.convert("P"), "GIF"),
        "tiff": encode(image, "TIFF", compression="tiff_deflate"),
        "webp": encode(image.convert("RGB"), "WEBP", lossless=True, method=0),
    }
    for name, data in files.items():
        assert len(data) < 100_000
        (folder / name).write_bytes(data)
    return [folder / name for name in files]


@pytest.mark.parametrize(("max_pixels", "refused"), [(24_999_999, True), (25_000_000, False)])
def test_a_bomb_that_is_refused_takes_no_memory(whole_bombs: list[Path], max_pixels: int, refused: bool) -> None:
    command = [sys.executable, "-c", _PEAK, str(max_pixels), *map(str, whole_bombs)]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True)
    assert (int(done.stdout) < 10_000) == refused, f"{done.stdout} KB"


def _scans(count: int) -> bytes:
    return jpeg_of_scans(count, side=64)


def test_an_ordinary_number_of_scans_is_read() -> None:
    filler = b"\xff" * 1_000_000  # which a JPEG may hold before any marker
    assert decode_image(_scans(100), VIT).shape == (224, 224, 3)
    assert decode_image(_scans(100)[:-2] + filler + b"\xd9" + _scans(100), VIT).shape == (224, 224, 3)
    with pytest.raises(ImageError, match="more than 100 scans"):
        decode_image(_scans(101), VIT)


def test_what_follows_a_picture_is_not_counted_as_its_scans() -> None:
    film = random.Random(1).randbytes(20_000_000)  # as the motion photos of telephones have one
    assert film.count(b"\xff\xda") > 100
    data = real_images()["jpeg-progressive"]
    assert np.array_equal(decode_image(data + film, VIT), decode_image(data, VIT))


@pytest.mark.parametrize("format", ["ICNS", "BLP"])
def test_a_file_whose_picture_may_be_larger_than_it_declares_is_not_read(format: str) -> None:
    image = Image.new("RGBA", (128, 128)) if format == "ICNS" else Image.new("P", (128, 128))
    with pytest.raises(ImageError, match="not an image in a format that can be read"):
        decode_image(encode(image, format), VIT)


def test_an_icon_is_read_as_pillow_reads_it() -> None:
    for data in (real_images()["ico"], encode(_loaded("jpeg"), "ICO", bitmap_format="bmp"), icon_of(_png())):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data)).convert("RGB")
        expected_HWC = np.array(image.resize((224, 224), Image.Resampling.BILINEAR))
        assert np.array_equal(decode_image(data, VIT), expected_HWC)


def _png() -> bytes:
    return encode(_loaded("jpeg"), "PNG")


def test_an_arithmetic_coded_jpeg_is_read_as_pillow_reads_it_or_refused() -> None:
    try:
        image = Image.open(io.BytesIO(ARITHMETIC_JPEG)).convert("RGB")
    except OSError:  # a Pillow whose libjpeg was built without it
        with pytest.raises(ImageError):
            decode_image(ARITHMETIC_JPEG, VIT)
    else:
        assert image.size == (16, 16)
        expected_HWC = np.array(image.resize((224, 224), Image.Resampling.BILINEAR))
        assert np.array_equal(decode_image(ARITHMETIC_JPEG, VIT), expected_HWC)


def test_max_pixels_is_the_largest_size_allowed() -> None:
    data = real_images()["224x224"]
    decode_image(data, VIT, max_pixels=224 * 224)
    with pytest.raises(ImageError, match="224 x 224 pixels is more than max_pixels=50175"):
        decode_image(data, VIT, max_pixels=224 * 224 - 1)


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1)])
def test_an_image_that_would_grow_without_bound_is_refused(size: tuple[int, int]) -> None:
    data = encode(Image.new("1", size), "PNG")
    start = time.perf_counter()
    with pytest.raises(ImageError, match="too thin"):
        decode_image(data, RESNET)
    assert time.perf_counter() - start < 1  # the resize would take gigabytes, and many seconds


def test_a_tall_image_is_refused_for_what_is_between_the_two_passes_of_the_resize() -> None:
    with pytest.raises(ImageError, match="too thin"):
        decode_image(encode(Image.new("1", (1, 60_000)), "PNG"), VIT, max_pixels=10_000_000)


def test_a_resize_to_nothing_is_an_image_error() -> None:
    transform = ImageTransform(height=8, width=8, shortest_edge=60, longest_edge=64, center_crop=True)
    with pytest.raises(ImageError, match="3 x 900 pixels cannot be resized"):
        decode_image(real_images()["3x900"], transform)


@pytest.mark.parametrize("action", ["error", "always"])
def test_warnings_of_pillow_stay_inside(action: Any, capfd: pytest.CaptureFixture[str]) -> None:
    noisy = ["png-palette-transparent", "jpeg-corrupted-exif"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter(action)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda name: decode_image(real_images()[name], VIT), noisy * 20))
        with pytest.raises(ImageError, match="more than max_pixels"):
            decode_image(bad_images()["small-bomb"], VIT)
    assert not caught
    assert capfd.readouterr() == ("", "")


def _flip(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.choice((1, 2, 8, 64))):
        data[rng.randrange(len(data))] = rng.randrange(256)


def _flip_header(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.choice((1, 2, 4))):
        data[rng.randrange(min(len(data), 200))] = rng.randrange(256)


def _cut_end(rng: random.Random, data: bytearray) -> None:
    del data[rng.randrange(len(data)) :]


def _cut_middle(rng: random.Random, data: bytearray) -> None:
    start = rng.randrange(len(data))
    del data[start : start + rng.randrange(1, 200)]


_MUTATIONS: tuple[Callable[[random.Random, bytearray], None], ...] = (_flip, _flip_header, _cut_end, _cut_middle)


def test_a_mutated_image_decodes_or_is_an_image_error() -> None:
    rng = random.Random(20)
    files = [data for data in real_images().values() if len(data) < 60_000]
    outcomes = {"decoded": 0, "refused": 0}
    for _ in range(1200):
        data = bytearray(rng.choice(files))
        rng.choice(_MUTATIONS)(rng, data)
        try:
            assert decode_image(bytes(data), VIT, max_pixels=1_000_000).shape == (224, 224, 3)
            outcomes["decoded"] += 1
        except ImageError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 200


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7])
def test_threads_give_the_same_in_the_same_order(count: int) -> None:
    images = ([real_images()["rocket.jpg"], b"no image", real_images()["horse.png"]] * 3)[:count]

    found = [list(decode_each(images, VIT, threads)) for threads in (1, 2, 3)]

    for results in found:
        assert len(results) == count
        for image, result in zip(images, results, strict=True):
            if isinstance(result, ImageError):
                assert image == b"no image"
            else:
                assert np.array_equal(result, decode_image(image, VIT))


def test_decoding_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, pipeline.decode; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
