"""What one checkpoint does to an image before the model sees it.

Two steps, split so that only bytes travel: `ImageTransform.pixels` resizes and crops to uint8 where images are
decoded, and the model gathers from `ImageTransform.lookup_table` on its device, which holds the exact float of each
byte. Together they give the bits of transformers' image processor, without importing it, unless the processor does
something that no recipe here covers: then it is run itself.

Layouts: H height, W width, C channel (R, G, B).
"""

from __future__ import annotations

import functools
import importlib
import json
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.errors import ModelError

# One definition of the usual steps: a class that overrides any of these may do anything.
_PLAIN_METHODS = (
    *("__call__", "preprocess", "_preprocess_image_like_inputs", "_prepare_image_like_inputs", "process_image"),
    *("_preprocess", "resize", "center_crop", "rescale", "normalize", "convert_to_rgb"),
)

# An RGB image, and what a processor makes of it: floats [C, H, W]
_Sample: TypeAlias = tuple[Image.Image, npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class ImageTransform:
    """Resize, perhaps centre crop, rescale, normalise; from an RGB image of any size to one of `height` x `width`.

    One of `resize_to` (height, width), `shortest_edge` or `processor` is set. `shortest_edge` keeps the aspect ratio,
    `longest_edge` bounds it; then `center_crop` cuts to `height` x `width`, or pads with black. `white_behind` makes
    white of the one colour that a file may declare transparent. `mean` and `std` are per channel, in units of a
    rescaled pixel. `processor` is the JSON of a transformers image processor to run.
    """

    height: int
    width: int
    resize_to: tuple[int, int] | None = None
    shortest_edge: int | None = None
    longest_edge: int | None = None
    resample: int = Image.Resampling.BILINEAR
    center_crop: bool = False
    white_behind: bool = False
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = False
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    processor: str | None = None

    def __post_init__(self) -> None:
        rules = (self.resize_to, self.shortest_edge, self.processor)
        if sum(rule is not None for rule in rules) != 1:
            raise ModelError(f"one of resize_to, shortest_edge and processor must be set, not {rules}")
        if self.processor is None and not self.center_crop and self.resize_to != (self.height, self.width):
            raise ModelError(f"without a crop, resize_to must be {self.height} x {self.width}, not {self.resize_to}")

    def to_json(self) -> str:
        """One line of JSON; floats keep every bit."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ImageTransform:
        """The inverse of `to_json`."""
        fields: dict[str, Any] = json.loads(text)
        for name, value in fields.items():
            fields[name] = tuple(value) if isinstance(value, list) else value
        return cls(**fields)

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the image between resize and crop: what the resize allocates.

        For a `processor`, whose rule is not known here, it is the rough size that keeps the aspect ratio.
        """
        if self.resize_to is not None:
            return self.resize_to
        edge = self.shortest_edge or max(self.height, self.width)
        short, long = min(height, width), max(height, width)
        if self.longest_edge is None or long / short * edge <= self.longest_edge:
            new_short, new_long = edge, int(edge * long / short)
        else:
            exact = self.longest_edge * float(short) / long
            new_short = round(exact)
            # transformers returns an image whose short edge fits already as it is
            new_long = long if short == new_short else int(exact * long / short)
        return (new_long, new_short) if width <= height else (new_short, new_long)

    def pixels(self, image_RGB: Image.Image) -> npt.NDArray[np.uint8]:
        """uint8 [height, width, 3] of an RGB image, contiguous and writable."""
        if self.processor is not None:
            return self._processed(image_RGB)
        if self.white_behind and image_RGB.info.get("transparency") is not None:
            image_RGB = _on_white(image_RGB)
        height, width = self.resized_size(image_RGB.height, image_RGB.width)
        # In one call: whether Pillow goes along x or y first depends on its version and the shape, and it rounds in
        # between (https://github.com/python-pillow/Pillow/pull/9549): to crop between two passes would change bits.
        image = image_RGB.resize((width, height), resample=self.resample)
        if self.center_crop:
            # Pillow fills what lies outside with black, as transformers does; // rounds down for both where negative
            top, left = (height - self.height) // 2, (width - self.width) // 2
            image = image.crop((left, top, left + self.width, top + self.height))
        return np.array(image)

    def _processed(self, image_RGB: Image.Image) -> npt.NDArray[np.uint8]:
        pixels_HWC = _processed(str(self.processor), image_RGB)
        if pixels_HWC.shape != (self.height, self.width, 3):
            raise ValueError(f"its processor makes it {pixels_HWC.shape}, not {(self.height, self.width, 3)}")
        return pixels_HWC

    def lookup_table(self) -> npt.NDArray[np.float32]:
        """float32 [3, 256]: the value that the model gets for each uint8 value, per channel.

        The arithmetic, its order and its precision are those of transformers' `rescale` and `normalize`.
        """
        if self.processor is not None:
            return _processed_table(self.processor)
        values = np.arange(256, dtype=np.uint8)
        table = (values.astype(np.float64) * self.rescale_factor if self.do_rescale else values).astype(np.float32)
        table_CV = np.tile(table, (3, 1))
        if self.do_normalize:
            mean_C1, std_C1 = (np.array(stat, dtype=np.float32)[:, None] for stat in (self.mean, self.std))
            table_CV = (table_CV - mean_C1) / std_C1
        return table_CV


def _on_white(image_RGB: Image.Image) -> Image.Image:
    image_RGBA = image_RGB.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image_RGB.size, "white"), image_RGBA).convert("RGB")


def transform_of(processor: Any) -> ImageTransform:
    """The transform that a loaded transformers image processor stands for.

    `processor` is an object of a PIL-backed class, so every default is transformers' own. The result is compared with
    the processor itself on two images before it is returned: where a recipe would differ, the processor is run.

    Raises ModelError where images do not become one size of RGB that bytes and a table can hold.
    """
    from transformers.image_processing_backends import PilBackend

    if not isinstance(processor, PilBackend):
        name = type(processor).__name__
        raise ModelError(f"image processor {name} does not use Pillow: load it with backend='pil'")
    samples = _samples(processor)
    recipe = _recipe(processor)
    if recipe is not None and _agrees(recipe, samples):
        return recipe
    return _fallback(processor, samples)


def _recipe(processor: Any) -> ImageTransform | None:
    """The fast recipe of a class whose steps are known, or None."""
    from transformers.image_processing_backends import PilBackend
    from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil

    if not processor.do_resize or processor.do_pad:
        return None
    kind = type(processor)
    if kind is ConvNextImageProcessorPil:
        return _convnext_recipe(processor)
    if all(getattr(kind, name) is getattr(PilBackend, name) for name in _PLAIN_METHODS):
        return _plain_recipe(processor)
    return None


def _plain_recipe(processor: Any) -> ImageTransform | None:
    size, crop = processor.size, processor.crop_size
    exact = (size.height, size.width) if size.height and size.width and not size.shortest_edge else None
    output = (crop.height, crop.width) if processor.do_center_crop and crop else exact
    if output is None or not all(output) or not (exact or size.shortest_edge):
        return None
    return ImageTransform(
        height=output[0],
        width=output[1],
        resize_to=exact,
        shortest_edge=None if exact else size.shortest_edge,
        longest_edge=None if exact else size.longest_edge,
        center_crop=bool(processor.do_center_crop),
        **_values(processor),
    )


def _convnext_recipe(processor: Any) -> ImageTransform | None:
    """ConvNeXt and ResNet: below 384, resize to edge / crop_pct and crop; from 384 on, squeeze into the square."""
    edge = processor.size.shortest_edge
    if not edge or processor.do_center_crop:
        return None
    if edge >= 384:
        return ImageTransform(height=edge, width=edge, resize_to=(edge, edge), **_values(processor))
    shortest_edge = int(edge / processor.crop_pct)
    return ImageTransform(height=edge, width=edge, shortest_edge=shortest_edge, center_crop=True, **_values(processor))


def _values(processor: Any) -> dict[str, Any]:
    """The fields that do not depend on how the size is given."""
    values: dict[str, Any] = {"do_rescale": bool(processor.do_rescale), "do_normalize": bool(processor.do_normalize)}
    values["white_behind"] = bool(processor.do_convert_rgb)
    if processor.resample is not None:
        values["resample"] = int(processor.resample)
    if values["do_rescale"]:
        values["rescale_factor"] = float(processor.rescale_factor)
    if values["do_normalize"]:
        values |= {"mean": _per_channel(processor.image_mean), "std": _per_channel(processor.image_std)}
    return values


def _per_channel(stat: Any) -> tuple[float, ...]:
    """Three floats of one, or of three; a wrong count is found by `_agrees`."""
    return tuple(map(float, stat)) if isinstance(stat, (tuple, list)) else (float(stat),) * 3


def _fallback(processor: Any, samples: list[_Sample]) -> ImageTransform:
    """A transform that runs the processor itself."""
    kind = type(processor)
    if not kind.__module__.startswith("transformers."):
        raise ModelError(f"image processor {kind.__name__} is not part of transformers, so no worker could load it")
    described = {"module": kind.__module__, "class": kind.__name__, "settings": json.loads(processor.to_json_string())}
    text = json.dumps(described)
    try:
        height, width, _ = _processed(text, samples[0][0]).shape
        transform = ImageTransform(height=height, width=width, processor=text)
        agrees = _agrees(transform, samples)
    except Exception as error:  # of whatever kind: transformers promises none
        raise ModelError(f"image processor {kind.__name__} gives no fixed size of RGB bytes: {error}") from error
    if not agrees:
        raise ModelError(f"image processor {kind.__name__} does more than resize, crop, rescale and normalise")
    return transform


def _samples(processor: Any) -> list[_Sample]:
    """What the processor makes of a wide and of a tall image."""
    images = [_noise_image(300, 400), _noise_image(500, 220)]
    try:
        return [(image, _run(processor, image)) for image in images]
    except Exception as error:
        raise ModelError(f"image processor {type(processor).__name__} fails on a usual image: {error!r}") from error


def _agrees(transform: ImageTransform, samples: list[_Sample]) -> bool:
    """Whether the transform gives the same bits."""
    table_CV = transform.lookup_table()
    for image, expected_CHW in samples:
        actual_HWC = table_CV[np.arange(3), transform.pixels(image)]
        if not np.array_equal(actual_HWC.transpose(2, 0, 1), expected_CHW):
            return False
    return True


def _noise_image(height: int, width: int) -> Image.Image:
    """Noise, the colour of its middle declared transparent: some processors heed that."""
    pixels_HWC = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels_HWC)
    image.info["transparency"] = tuple(pixels_HWC[height // 2, width // 2].tolist())
    return image


@functools.lru_cache(maxsize=8)
def _load_processor(text: str) -> Any:
    described = json.loads(text)
    try:
        kind = getattr(importlib.import_module(described["module"]), described["class"])
    except (ImportError, AttributeError) as error:
        raise ModelError(f"image processor {described['class']} cannot be loaded: {error}") from error
    return kind.from_dict(described["settings"])


def _run(processor: Any, image_RGB: Image.Image, **options: bool) -> npt.NDArray[Any]:
    """[C, H, W] of what the processor itself makes of one image."""
    pixels_CHW: npt.NDArray[Any] = processor(image_RGB, return_tensors="np", **options)["pixel_values"][0]
    return pixels_CHW


def _processed(text: str, image_RGB: Image.Image) -> npt.NDArray[np.uint8]:
    """uint8 [H, W, 3] of the processor of `text`, with all that changes values turned off."""
    processor = _load_processor(text)
    steps = [name for name in ("do_rescale", "do_normalize", "include_top") if hasattr(processor, name)]
    pixels_CHW = _run(processor, image_RGB, **dict.fromkeys(steps, False))
    if pixels_CHW.dtype != np.uint8 or pixels_CHW.ndim != 3 or len(pixels_CHW) != 3:
        raise ValueError(f"its pixels are {pixels_CHW.dtype} {pixels_CHW.shape}, not uint8 (3, height, width)")
    return np.ascontiguousarray(pixels_CHW.transpose(1, 2, 0))


def _processed_table(text: str) -> npt.NDArray[np.float32]:
    """The lookup table of the processor of `text`, read off an image that holds each grey value once."""
    greys_HW = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.repeat(greys_HW[:, :, None], 3, axis=2))
    table_CHW = _run(_load_processor(text), image, do_resize=False, do_center_crop=False, do_pad=False)
    return np.ascontiguousarray(table_CHW.reshape(3, 256), dtype=np.float32)
