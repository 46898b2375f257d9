"""What the batch benchmarks score: JPEG files cut from real photographs, and a vision transformer to tell them apart.

The photographs are those in scikit-image's wheel, so nothing is downloaded.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import skimage
from PIL import Image

from tests.images import encode

PHOTOS = ("astronaut.png", "coffee.png", "motorcycle_left.png", "rocket.jpg", "retina.jpg", "hubble_deep_field.jpg")
WIDTH, HEIGHT = 500, 375
SMALLEST_BYTES, LARGEST_BYTES = 45_000, 60_000
QUALITIES = (98, 96, 94, 92, 90, 87, 84, 80, 75, 70, 60, 50, 40, 30)
CLASSES, HIDDEN, LAYERS, HEADS, SIDE, PATCH = 10, 192, 12, 3, 224, 16


def write_photos(folder: Path, count: int) -> None:
    """Writes `count` different JPEG files of 500 x 375 pixels and 45 to 60 KB, `00000.jpg` and on."""
    folder.mkdir(parents=True)
    sources = [_source(name) for name in PHOTOS]
    random = np.random.default_rng(0)
    for number in range(count):
        (folder / f"{number:05}.jpg").write_bytes(_photo(sources[number % len(sources)], random))


def link_photos(source: Path, folder: Path, count: int) -> None:
    """The first `count` of the files under another folder."""
    folder.mkdir()
    for number in range(count):
        os.link(source / f"{number:05}.jpg", folder / f"{number:05}.jpg")


def _source(name: str) -> Image.Image:
    with Image.open(Path(skimage.__file__).parent / "data" / name) as image:
        return image.convert("RGB")


def _photo(source: Image.Image, random: np.random.Generator) -> bytes:
    """A part of the photograph, of a size that a file may have."""
    while True:
        width = int(random.uniform(0.35, 1.0) * min(source.width, source.height * WIDTH / HEIGHT))
        height = width * HEIGHT // WIDTH
        left, top = (int(random.integers(0, free + 1)) for free in (source.width - width, source.height - height))
        part = source.crop((left, top, left + width, top + height)).resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
        for quality in QUALITIES:
            data = encode(part, "JPEG", quality=quality)
            if SMALLEST_BYTES <= len(data) <= LARGEST_BYTES:
                return data
            if len(data) < SMALLEST_BYTES:
                break  # too smooth a part


def write_checkpoint(folder: Path, photos: Sequence[Path]) -> None:
    """Saves a ViT of 192 x 12 (5.5 million weights) with random weights, whose head tells these photographs apart.

    A random head would give nearly all images one class, and a comparison of answers would show nothing.
    """
    import torch
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * HIDDEN,
        image_size=SIDE,
        patch_size=PATCH,
        id2label={index: f"class {index}" for index in range(CLASSES)},
        label2id={f"class {index}": index for index in range(CLASSES)},
    )
    processor: Any = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})
    model: Any = ViTForImageClassification(config).eval()
    images = [Image.open(photo).convert("RGB") for photo in photos]
    with torch.inference_mode():
        tokens = model.vit(**processor(images, return_tensors="pt")).last_hidden_state[:, 0]
        centred = tokens - tokens.mean(0)
        _, spread, directions = torch.linalg.svd(centred, full_matrices=False)
        weight = torch.randn(CLASSES, 8) @ (directions[:8] / spread[:8, None]) * len(images) ** 0.5
        model.classifier.weight.copy_(weight)
        model.classifier.bias.copy_(-weight @ tokens.mean(0))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
