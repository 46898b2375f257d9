"""Work that ends its process, in a process of its own."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoImageProcessor

from pipeline import isolation
from pipeline.chunks import ChunkLimits, chunks
from pipeline.decode import decode_image
from pipeline.errors import ImageError, ProcessEnded, ShardError
from pipeline.inputs import Columns, open_reader
from pipeline.isolation import IsolatedReader, decode_isolated, isolated
from pipeline.local import LocalStore
from pipeline.shards import Shard, find_shards
from pipeline.transform import ImageTransform, transform_of
from tests.command import MODEL
from tests.corpora import parquet_of, tar_of
from tests.images import bad_images, real_images
from tests.poison import POISON, count, poisoned_environment, read_ten_and_die


@pytest.fixture
def transform() -> ImageTransform:
    return transform_of(AutoImageProcessor.from_pretrained(MODEL, backend="pil"))


@pytest.fixture
def poisoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes that this one starts die of what holds `POISON`."""
    for name, value in poisoned_environment(tmp_path / "poison").items():
        monkeypatch.setenv(name, value)
        monkeypatch.syspath_prepend(value)


def test_what_is_yielded_in_a_child_arrives_whatever_is_printed_there() -> None:
    assert list(isolated(count, 1000, "")) == list(range(1000))


@pytest.mark.parametrize(
    ("end", "kind", "told"),
    [
        ("exit", ProcessEnded, "with exit code 7"),
        ("kill", ProcessEnded, "by SIGSEGV"),
        ("raise", ShardError, "the end"),
    ],
)
def test_what_came_before_the_end_stands(end: str, kind: type[Exception], told: str) -> None:
    items = isolated(count, 5, end)
    assert list(islice(items, 5)) == list(range(5))
    with pytest.raises(kind, match=told):
        next(items)


def test_a_child_that_is_not_wanted_any_more_ends() -> None:
    others = _children()
    items = isolated(count, 10**9, "")
    assert next(items) == 0
    assert len(_children() - others) == 1
    items.close()
    assert _children() == others


@pytest.mark.usefixtures("poisoned")
def test_the_guilty_images_are_found_and_the_others_decoded(transform: ImageTransform) -> None:
    good, bad = list(real_images().values())[:5], next(iter(bad_images().values()))
    images = [good[0], POISON, good[1], bad, good[2], POISON, POISON, good[3], good[4], POISON]

    results = list(decode_isolated(images, transform))

    assert len(results) == len(images)
    for image, result in zip(images, results, strict=True):
        if image in good:
            np.testing.assert_array_equal(result, decode_image(image, transform))
        else:
            assert isinstance(result, ImageError)
            assert ("ends the process that does it (by SIGSEGV)" in str(result)) == (image == POISON)


@pytest.mark.parametrize("format", ["tar", "parquet"])
def test_a_reader_in_a_process_of_its_own_gives_the_same_samples(format: str, tmp_path: Path) -> None:
    store, shard, columns = _shard(tmp_path, format)
    reader = IsolatedReader(store, shard, columns)
    direct = open_reader(store, shard, columns)
    assert reader.carried == direct.carried
    assert list(reader) == list(direct)
    assert len(reader.carried) == 1


@pytest.mark.usefixtures("poisoned")
def test_a_shard_that_ends_its_reader_is_read_up_to_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, shard, columns = _shard(tmp_path, "tar")
    monkeypatch.setattr(isolation, "_read_shard", read_ten_and_die)

    found = list(chunks(IsolatedReader(store, shard, columns), shard.name, ChunkLimits(images=4)))

    assert [len(chunk.images) for chunk in found] == [4, 4, 2]
    assert found[-1].last
    assert "reading this shard ends the process that does it (by SIGSEGV)" in found[-1].rows["error"].to_pylist()[-1]


def _shard(folder: Path, format: str) -> tuple[LocalStore, Shard, Columns]:
    images = {f"{index}.jpg": data for index, data in enumerate(real_images().values())}
    store = LocalStore(folder / "in")
    store.write(f"a.{format}", tar_of(images) if format == "tar" else parquet_of(images))
    (shard,) = find_shards(store.list(), where="INPUT")
    return store, shard, Columns(carry=("txt" if format == "tar" else "label",))


def _children() -> set[int]:
    path = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    return {int(child) for child in path.read_text().split()}
