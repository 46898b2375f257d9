"""The shipped corpus and the shipped model: what the demo starts from."""

from __future__ import annotations

import io
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTForImageClassification

from jobs.corpus import Digit, digits, encode, write_shards
from jobs.models import shipped
from pipeline.errors import UsageError

FORMATS = {"png": "PNG", "jpg": "JPEG"}


@pytest.fixture(scope="module")
def corpus() -> list[Digit]:
    return digits()


def samples(shard: Path) -> Iterator[tuple[str, str, bytes, str]]:
    """(key, suffix, encoded image, label) of each sample, read by adjacency as WebDataset does."""
    with tarfile.open(shard) as tar:
        members = tar.getmembers()
        for image, label in zip(members[::2], members[1::2], strict=True):
            key, _, suffix = image.name.partition(".")
            assert label.name == f"{key}.cls"
            yield key, suffix, content(tar, image), content(tar, label).decode("ascii")


def content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    return file.read()


def test_the_corpus_is_1797_digits_of_ten_labels(corpus: Sequence[Digit]) -> None:
    assert [digit.key for digit in corpus] == [f"digit-{index:05}" for index in range(1797)]
    assert Counter(digit.label for digit in corpus) == dict(
        enumerate([178, 182, 177, 183, 181, 182, 181, 179, 174, 180])
    )


def test_images_are_read_only_uint8_of_17_levels(corpus: Sequence[Digit]) -> None:
    images_NHW = np.stack([digit.image_HW for digit in corpus])
    assert images_NHW.shape == (1797, 8, 8)
    assert images_NHW.dtype == np.uint8
    assert (images_NHW.min(), images_NHW.max()) == (0, 16)
    with pytest.raises(ValueError, match="read-only"):
        corpus[0].image_HW[0, 0] = 1


def test_a_fifth_of_each_label_is_held_out(corpus: Sequence[Digit]) -> None:
    of_label = Counter(digit.label for digit in corpus)
    held_out = Counter(digit.label for digit in corpus if digit.held_out)
    assert 359 <= held_out.total() <= 361
    assert all(abs(held_out[label] - of_label[label] / 5) < 1 for label in range(10))


def test_no_held_out_image_is_among_those_trained_on(corpus: Sequence[Digit]) -> None:
    trained_on = {digit.image_HW.tobytes() for digit in corpus if not digit.held_out}
    assert trained_on.isdisjoint(digit.image_HW.tobytes() for digit in corpus if digit.held_out)


def test_png_keeps_every_pixel_and_jpeg_nearly(corpus: Sequence[Digit]) -> None:
    for digit in corpus[:100]:
        suffix, encoded = encode(digit)
        image = Image.open(io.BytesIO(encoded))
        assert (image.format, image.mode) == (FORMATS[suffix], "L")
        off = np.abs(np.asarray(image, dtype=float) - digit.image_HW.astype(float) * 255 / 16)
        assert off.max() <= (0.5 if suffix == "png" else 16)


def test_formats_alternate(corpus: Sequence[Digit]) -> None:
    assert [encode(digit)[0] for digit in corpus[:4]] == ["png", "jpg", "png", "jpg"]


def test_the_shards_hold_every_digit_once_in_its_split(corpus: Sequence[Digit], tmp_path: Path) -> None:
    found = {"train": Counter[str](), "heldout": Counter[str]()}
    for shard in write_shards(tmp_path):
        found[shard.name.split("-")[1]].update(key for key, *_ in samples(shard))
    assert found["train"] == Counter(digit.key for digit in corpus if not digit.held_out)
    assert found["heldout"] == Counter(digit.key for digit in corpus if digit.held_out)


def test_every_sample_decodes_and_has_its_label(corpus: Sequence[Digit], tmp_path: Path) -> None:
    by_key = {digit.key: digit for digit in corpus}
    suffixes = Counter[str]()
    for shard in write_shards(tmp_path):
        for key, suffix, encoded, label in samples(shard):
            image = Image.open(io.BytesIO(encoded))
            image.load()
            assert (image.format, image.size) == (FORMATS[suffix], (8, 8))
            assert (suffix, encoded) == encode(by_key[key])
            assert label == str(by_key[key].label)
            suffixes[suffix] += 1
    assert suffixes == {"png": 899, "jpg": 898}


def test_shards_are_named_in_order_and_all_but_the_last_are_full(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, digits_per_shard=500)
    assert [(shard.name, len(list(samples(shard)))) for shard in shards] == [
        ("digits-train-00000.tar", 500),
        ("digits-train-00001.tar", 500),
        ("digits-train-00002.tar", 437),
        ("digits-heldout-00000.tar", 360),
    ]
    assert sorted(tmp_path.iterdir()) == sorted(shards)


def test_shards_are_the_same_byte_for_byte(tmp_path: Path) -> None:
    first, second = write_shards(tmp_path / "first"), write_shards(tmp_path / "second")
    assert [(shard.name, shard.read_bytes()) for shard in first] == [
        (shard.name, shard.read_bytes()) for shard in second
    ]


def test_shards_carry_nothing_of_the_machine(tmp_path: Path) -> None:
    with tarfile.open(write_shards(tmp_path)[0]) as tar:
        marks = {(member.uid, member.gid, member.uname, member.gname, member.mtime) for member in tar}
    assert marks == {(0, 0, "", "", 0)}


@pytest.mark.parametrize("digits_per_shard", [0, -1])
def test_a_shard_of_no_digits_is_refused(digits_per_shard: int, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"digits_per_shard is {digits_per_shard}"):
        write_shards(tmp_path, digits_per_shard)


def test_a_model_that_does_not_ship_is_refused_with_the_list() -> None:
    with pytest.raises(UsageError, match=r"'digits-vti'.*choose from: .*digits-vit"):
        shipped("digits-vti")


def test_the_shipped_model_is_a_small_vit() -> None:
    folder = shipped("digits-vit")
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert isinstance(model, ViTForImageClassification)
    assert 200_000 <= model.num_parameters() <= 1_000_000
    assert sum(file.stat().st_size for file in folder.iterdir()) < 4_000_000
    assert model.config.id2label == {label: str(label) for label in range(10)}


def test_the_shipped_model_is_as_accurate_as_its_card_says(corpus: Sequence[Digit]) -> None:
    folder = shipped("digits-vit")
    stated = re.search(r"\((\d+) of (\d+) held-out digits", (folder / "README.md").read_text())
    assert stated is not None
    held_out = [digit for digit in corpus if digit.held_out]
    correct = sum(label == digit.label for label, digit in zip(predicted(folder, held_out), held_out, strict=True))
    assert (correct, len(held_out)) == (int(stated[1]), int(stated[2]))
    assert correct / len(held_out) >= 0.97


def predicted(folder: Path, members: Sequence[Digit]) -> list[int]:
    """Labels by `transformers` alone, without a line of Tandem's own inference."""
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    model = AutoModelForImageClassification.from_pretrained(folder)
    images = [Image.open(io.BytesIO(encode(digit)[1])).convert("RGB") for digit in members]
    with torch.inference_mode():
        logits = model(**processor(images, return_tensors="pt")).logits
    labels: list[int] = logits.argmax(dim=-1).tolist()
    return labels
