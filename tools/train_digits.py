"""Trains the model of the demo, `jobs/models/digits-vit`, and writes its card.

    python tools/train_digits.py            # trains and writes
    python tools/train_digits.py --check    # evaluates what is there; exit status 1 if the card says otherwise

The recipe is fixed: no choice of epoch, seed or setting looks at the held-out digits. They are scored once, at the
end, by the checkpoint as written and `transformers` alone.

Array names carry their layout: N image, C channel, H row, W column, K class.
"""

from __future__ import annotations

import argparse
import io
import math
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import PIL
import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from jobs.corpus import Digit, digits, encode
from jobs.models import FOLDER

MODEL = FOLDER / "digits-vit"
CARD = MODEL / "README.md"
CARD_RESULT = re.compile(r"\((\d+) of (\d+) held-out digits")

SEED = 0
# The number of threads decides in which order sums are taken, and with it the last bits of the weights.
THREADS = 2
EPOCHS = 120
BATCH = 64
PEAK_LEARNING_RATE = 1e-3
WARMUP_FRACTION = 0.1
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1
MAX_GRADIENT_NORM = 1.0

# How far an augmented image is from the original at most, in either direction.
MAX_ROTATION_DEGREES = 15.0
MAX_SCALE = 0.12
MAX_SHEAR = 0.15
# In half images, grid_sample's unit: 0.18 of 16 pixels is 3 pixels of 32.
MAX_SHIFT = 0.18


@dataclass(frozen=True, kw_only=True)
class Result:
    """How many of the held-out digits a model gets right."""

    correct: int
    total: int

    @property
    def percent(self) -> str:
        return f"{100 * self.correct / self.total:.2f} %"

    @property
    def interval(self) -> str:
        """Wilson's 95 % confidence interval of the accuracy: 360 digits cannot tell 99.5 % from 100 %."""
        z2 = 1.96**2
        middle = self.correct + z2 / 2
        half_width = math.sqrt(z2) * math.sqrt(self.correct * (self.total - self.correct) / self.total + z2 / 4)
        low, high = ((middle + side * half_width) / (self.total + z2) for side in (-1, 1))
        return f"{100 * low:.1f} % to {100 * high:.1f} %"


def new_processor() -> ViTImageProcessorPil:
    """The PIL backend: the other one resizes to slightly different pixels."""
    return ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def new_model() -> ViTForImageClassification:
    names = [str(label) for label in range(10)]
    config = ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        id2label=dict(enumerate(names)),
        label2id={name: label for label, name in enumerate(names)},
    )
    return ViTForImageClassification(config)


def decoded(members: Sequence[Digit]) -> list[Image.Image]:
    """RGB images of 8x8 pixels, as a user of the corpus gets them: with JPEG's losses."""
    return [Image.open(io.BytesIO(encode(digit)[1])).convert("RGB") for digit in members]


def augmented(images_NCHW: Tensor, random: torch.Generator) -> Tensor:
    """Each image rotated, scaled, sheared and shifted a little. Float32 in [-1, 1], in and out."""

    def uniform(limit: float) -> Tensor:
        return (torch.rand(len(images_NCHW), generator=random) * 2 - 1) * limit

    angle_N = uniform(math.radians(MAX_ROTATION_DEGREES))
    x_N = torch.stack([angle_N.cos() * (1 + uniform(MAX_SCALE)), uniform(MAX_SHEAR) - angle_N.sin()], dim=1)
    y_N = torch.stack([angle_N.sin(), angle_N.cos() * (1 + uniform(MAX_SCALE))], dim=1)
    shift_N = torch.stack([uniform(MAX_SHIFT), uniform(MAX_SHIFT)], dim=1)
    affine_N23 = torch.cat([torch.stack([x_N, y_N], dim=1), shift_N[:, :, None]], dim=2)
    grid_NHW2 = functional.affine_grid(affine_N23, list(images_NCHW.shape), align_corners=False)
    # grid_sample fills with 0 what comes from outside; paper is -1.
    return functional.grid_sample(images_NCHW + 1, grid_NHW2, align_corners=False) - 1


def batches(count: int, random: torch.Generator) -> Iterator[Tensor]:
    """Positions of one epoch's images, shuffled, BATCH at a time; the last batch may be smaller."""
    return iter(torch.split(torch.randperm(count, generator=random), BATCH))


def train(model: ViTForImageClassification, images_NCHW: Tensor, labels_N: Tensor) -> None:
    random = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        PEAK_LEARNING_RATE,
        total_steps=EPOCHS * math.ceil(len(labels_N) / BATCH),
        pct_start=WARMUP_FRACTION,
        anneal_strategy="cos",
    )
    model.train()
    for epoch in range(EPOCHS):
        for chosen in batches(len(labels_N), random):
            logits_NK = model(pixel_values=augmented(images_NCHW[chosen], random)).logits
            loss = functional.cross_entropy(logits_NK, labels_N[chosen], label_smoothing=LABEL_SMOOTHING)
            step(model, loss, optimizer)
            schedule.step()
        print(f"epoch {epoch + 1} of {EPOCHS}, loss of the last batch {loss.item():.3f}", flush=True)


def step(model: ViTForImageClassification, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
    optimizer.step()


def evaluate(folder: Path) -> Result:
    """Scores the held-out digits with the checkpoint in `folder`, by `transformers` alone."""
    held_out = [digit for digit in digits() if digit.held_out]
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")  # type: ignore[no-untyped-call]
    model = AutoModelForImageClassification.from_pretrained(folder)
    inputs = processor(decoded(held_out), return_tensors="pt")
    with torch.inference_mode():
        predicted_N = model(**inputs).logits.argmax(dim=-1).tolist()
    correct = sum(label == digit.label for label, digit in zip(predicted_N, held_out, strict=True))
    return Result(correct=correct, total=len(held_out))


def card_text(result: Result, weights: int, training_digits: int) -> str:
    return f"""\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-classification
tags:
- image-classification
- vit
- digits
---

# digits-vit

A Vision Transformer of {weights:,} weights that names handwritten digits, "0" to "9". It ships with Tandem so that the
demo and the tests have a real checkpoint where no model hub can be reached.

Held-out accuracy: {result.percent} ({result.correct} of {result.total} held-out digits; 95 % interval
{result.interval}).

`tools/train_digits.py` wrote this card and the checkpoint.

```python
from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained("jobs/models/digits-vit", backend="pil")
model = AutoModelForImageClassification.from_pretrained("jobs/models/digits-vit")
logits = model(**processor(image, return_tensors="pt")).logits  # image: PIL, mode RGB
```

## Data

The 1,797 digits of 8x8 pixels that scikit-learn ships: the test part of *Optical Recognition of Handwritten Digits*
(E. Alpaydin and C. Kaynak, 1998, UCI Machine Learning Repository, <https://doi.org/10.24432/C50P49>, CC BY 4.0).
The model saw them as `jobs.corpus` encodes them, half PNG and half JPEG, resized to 32x32 by the image processor.

Split: a fifth ({result.total} digits), stratified by label, drawn with seed 0, is held out; the model was trained on
the other {training_digits:,}. Settings were chosen on a part of those {training_digits:,}, and the number of epochs is
fixed: nothing was selected by its score on the held-out digits.

## Training

- AdamW, weight decay {WEIGHT_DECAY}, gradients clipped to norm {MAX_GRADIENT_NORM:g}, label smoothing {LABEL_SMOOTHING}
- {EPOCHS} epochs in batches of {BATCH}
- learning rate up to {PEAK_LEARNING_RATE:g} in the first {WARMUP_FRACTION:.0%} of the steps, then down along a cosine
- every image augmented anew: rotated by up to {MAX_ROTATION_DEGREES:g} degrees, scaled by up to {MAX_SCALE:.0%},
  sheared by up to {MAX_SHEAR}, shifted by up to {MAX_SHIFT * 16:.1f} of 32 pixels
- float32 on {THREADS} CPU threads, seed {SEED}; a few minutes
- {versions()}

To train it again: `python tools/train_digits.py`. To compare this card with the checkpoint beside it:
`python tools/train_digits.py --check`. Another CPU, other versions or another number of threads round sums differently,
and so may give slightly different weights.

## Limits

The same 13 people wrote the training and the held-out digits, so the accuracy says little about other hands. Images
must look like the corpus: one bright digit that fills a dark, square image.

Some of the score is luck of the split: the same recipe, trained and scored once on another split (seed 7 in
`tools/make_corpus.py`; measured with torch 2.13.0), got 355 of 360 right, 98.6 %.
"""


def versions() -> str:
    modules = (torch, transformers, PIL, numpy)
    return ", ".join([f"Python {platform.python_version()}", *(f"{m.__name__} {m.__version__}" for m in modules)])


def card_result(card: Path) -> Result:
    """What the card says. Raises ValueError if it does not say."""
    found = CARD_RESULT.search(card.read_text())
    if found is None:
        raise ValueError(f"{card} has no line that matches {CARD_RESULT.pattern!r}; train again to write it")
    return Result(correct=int(found[1]), total=int(found[2]))


def train_and_write() -> None:
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    processor, model = new_processor(), new_model()
    training = [digit for digit in digits() if not digit.held_out]
    images_NCHW = processor(decoded(training), return_tensors="pt")["pixel_values"]
    train(model, images_NCHW, torch.tensor([digit.label for digit in training]))
    model.save_pretrained(MODEL)
    processor.save_pretrained(MODEL)
    # safetensors leaves its file readable to nobody but its owner, and so would an installed package be.
    (MODEL / "model.safetensors").chmod(0o644)
    result = evaluate(MODEL)
    CARD.write_text(card_text(result, model.num_parameters(), len(training)))
    print(f"{MODEL}: {result.correct} of {result.total} held-out digits, {result.percent}")


def check() -> bool:
    """Whether the shipped model is as good as its card says."""
    measured, stated = evaluate(MODEL), card_result(CARD)
    print(f"{MODEL}: {measured.correct} of {measured.total}; its card: {stated.correct} of {stated.total}")
    return measured == stated


def main() -> int:
    parser = argparse.ArgumentParser(description="Trains the model of the demo and writes its card.")
    parser.add_argument("--check", action="store_true", help="evaluate the shipped model, compare with its card")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    if options.check:
        return 0 if check() else 1
    train_and_write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
