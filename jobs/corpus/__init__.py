"""The demo's corpus: 1,797 handwritten digits, as image files in WebDataset shards.

The pixels, labels and the split ship beside this file (`digits.npz`, 8x8 pixels each); `tools/make_corpus.py`
made them, and `README.md` says where they come from. The images are encoded when they are asked for, so that the
demo's input is what a user's is: PNG and JPEG files in tars.

Array names carry their layout: N digit, H row, W column.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.errors import UsageError

DATA = Path(__file__).with_name("digits.npz")
BRIGHTEST = 16
JPEG_QUALITY = 95


# Compared by identity: == on arrays gives an array, and has no truth value.
@dataclass(frozen=True, kw_only=True, eq=False)
class Digit:
    """One labelled image.

    `key` is `digit-` and the position in the corpus, five places: `digit-00042`.
    `label` is 0 to 9, both included.
    `image_HW` is uint8 [8, 8], read-only, 0 (paper) to 16 (ink), both included.
    `held_out` is true for the fifth that the shipped model has not been trained on.
    """

    key: str
    label: int
    image_HW: npt.NDArray[np.uint8]
    held_out: bool

    @property
    def index(self) -> int:
        """Position in the corpus, 0 to 1,796."""
        return int(self.key.removeprefix("digit-"))


def digits() -> list[Digit]:
    """All 1,797 digits, always in the same order: scikit-learn's."""
    with np.load(DATA) as data:
        images_NHW, labels_N, held_out_N = data["images_NHW"], data["labels"], data["held_out"]
    images_NHW.setflags(write=False)
    return [
        Digit(key=f"digit-{index:05}", label=int(label), image_HW=image_HW, held_out=bool(held_out))
        for index, (image_HW, label, held_out) in enumerate(zip(images_NHW, labels_N, held_out_N, strict=True))
    ]


def encode(digit: Digit) -> tuple[str, bytes]:
    """The digit as a file of 8x8 grey pixels, 0 to 255: its suffix, without a dot, and its bytes.

    Digits at even positions are PNG (lossless), those at odd ones JPEG, so that both decoders run in the demo.
    The same digit gives the same bytes every time under one version of Pillow.
    """
    image = Image.fromarray(_grey(digit.image_HW))
    file = io.BytesIO()
    if digit.index % 2 == 0:
        image.save(file, format="PNG")
        return "png", file.getvalue()
    image.save(file, format="JPEG", quality=JPEG_QUALITY)
    return "jpg", file.getvalue()


def write_shards(folder: Path, digits_per_shard: int = 200) -> list[Path]:
    """Writes `digits-train-00000.tar` ..., `digits-heldout-00000.tar` ... and returns their paths in that order.

    A sample is `KEY.png` or `KEY.jpg`, then `KEY.cls`, the label in ASCII. `folder` is made if it is missing;
    shards of the same name are overwritten, other files there stay. The bytes are the same every time.

    Raises UsageError if `digits_per_shard` is below 1.
    """
    if digits_per_shard < 1:
        raise UsageError(f"digits_per_shard is {digits_per_shard}, and must be at least 1")
    folder.mkdir(parents=True, exist_ok=True)
    corpus = digits()
    train = [digit for digit in corpus if not digit.held_out]
    held_out = [digit for digit in corpus if digit.held_out]
    return [
        *_write_split(folder, "train", train, digits_per_shard),
        *_write_split(folder, "heldout", held_out, digits_per_shard),
    ]


def _write_split(folder: Path, split: str, members: Sequence[Digit], digits_per_shard: int) -> Iterator[Path]:
    for number, start in enumerate(range(0, len(members), digits_per_shard)):
        path = folder / f"digits-{split}-{number:05}.tar"
        path.write_bytes(_shard(members[start : start + digits_per_shard]))
        yield path


def _shard(members: Sequence[Digit]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for digit in members:
            suffix, encoded = encode(digit)
            _add(tar, f"{digit.key}.{suffix}", encoded)
            _add(tar, f"{digit.key}.cls", str(digit.label).encode("ascii"))
    return file.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    # A fresh TarInfo has uid, gid and mtime 0 and mode 0644: nothing of this machine gets into the shard.
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _grey(image_HW: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """0..16 -> 0..255, rounded half up."""
    scaled_HW = (image_HW.astype(np.uint16) * 255 + BRIGHTEST // 2) // BRIGHTEST
    return scaled_HW.astype(np.uint8)
