"""Every object of INPUT that counts is in one shard, in order, and no two shards write one output."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline.errors import NotFound, UsageError
from pipeline.shards import FORMATS, Fingerprint, Format, Shard, find_shards, hidden, is_image, slice_of
from pipeline.storage import ObjectInfo

_part = st.text(alphabet="ab_.Zé🙂 ", min_size=1, max_size=4)
_suffix = st.sampled_from([".jpg", ".JPEG", ".png", ".txt", "", ".tar.jpg", ".json"])
_names = st.builds(lambda parts, suffix: "/".join(parts) + suffix, st.lists(_part, min_size=1, max_size=3), _suffix)
_archives = st.builds(
    lambda parts, suffix: "/".join(parts) + suffix,
    st.lists(st.sampled_from(["a", "b", "a.tar", "b.tgz", "a.tar.gz"]), min_size=1, max_size=2),
    st.sampled_from([".tar", ".TAR", ".tar.gz", ".tgz"]),
)


def objects(names: Iterable[str]) -> list[ObjectInfo]:
    """As a store lists them."""
    return [
        ObjectInfo(name=name, size=number, etag=f"tag-{number}")
        for number, name in enumerate(sorted(set(names), key=str.encode))
    ]


def found(*names: str, format: Format | None = None) -> list[Shard]:
    return find_shards(objects(names), format=format, where="INPUT").shards


@given(names=st.lists(_names, max_size=30), per_slice=st.integers(1, 7))
def test_every_image_is_in_one_slice_and_a_slice_finds_its_own_again(names: list[str], per_slice: int) -> None:
    listing = objects(names)
    images = [info for info in listing if is_image(info.name) and not hidden(info.name)]
    assume(images)
    shards = find_shards(listing, where="INPUT", per_slice=per_slice)
    # as the reader does: list after the slice before, up to the slice's last name
    slices = [
        list(slice_of((info for info in listing if info.name.encode() > shard.after.encode()), shard.last))
        for shard in shards
    ]
    assert [info for one in slices for info in one] == images
    assert all(len(one) == per_slice for one in slices[:-1])
    assert [shard.size for shard in shards] == [sum(info.size for info in one) for one in slices]
    assert [shard.number for shard in shards] == list(range(len(shards)))
    assert len({shard.name for shard in shards}) == len({shard.output for shard in shards}) == len(shards)
    for shard, one in zip(shards, slices, strict=True):
        again = Fingerprint()
        for info in one:
            again.add(info)
        assert again.etag() == shard.etag


@given(names=st.lists(_archives, min_size=1, max_size=30))
def test_every_archive_is_a_shard_with_an_output_of_its_own(names: list[str]) -> None:
    listing = objects(names)
    shards = find_shards(listing, where="INPUT")
    assert [(shard.name, shard.size, shard.etag) for shard in shards] == [
        (info.name, info.size, info.etag) for info in listing
    ]
    assert [shard.number for shard in shards] == list(range(len(listing)))
    assert len({shard.output for shard in shards}) == len(shards)
    assert all(shard.output.endswith(".parquet") and not hidden(shard.output) for shard in shards)


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("a.tar", "a.parquet"),
        ("dir/a.TAR.GZ", "dir/a.parquet"),
        ("a.b.tgz", "a.b.parquet"),
        ("a.parquet", "a.parquet"),
        ("a.pq", "a.parquet"),
    ],
)
def test_an_output_is_named_after_its_shard(name: str, output: str) -> None:
    assert [shard.output for shard in found(name)] == [output]


def test_shards_of_one_stem_keep_their_whole_names() -> None:
    assert [shard.output for shard in found("a.tar", "a.tgz", "b.tar")] == [
        *("a.tar.parquet", "a.tgz.parquet", "b.parquet"),
    ]


def test_a_stem_that_is_another_shards_name_is_not_taken() -> None:
    assert [shard.output for shard in found("a.tar", "a.tar.tar", "a.tgz")] == [
        *("a.tar.parquet", "a.tar.tar.parquet", "a.tgz.parquet"),
    ]


@pytest.mark.parametrize("name", ["_SUCCESS.jpg", ".hidden.jpg", "_tmp/a.jpg", "a/.b/c.jpg", "a/_metadata.parquet"])
def test_hidden_names_are_no_input(name: str) -> None:
    with pytest.raises(NotFound, match="1 x hidden"):
        found(name)


def test_a_name_may_hold_what_hides_only_in_front() -> None:
    assert len(found("a_b/c.d_.jpg")) == 1


def test_tar_and_parquet_together_need_a_format() -> None:
    with pytest.raises(UsageError, match=r"INPUT holds tar and Parquet.*--format"):
        found("a.tar", "b.parquet")


@pytest.mark.parametrize(("format", "name"), [("tar", "a.tar"), ("parquet", "b.parquet"), ("images", "images-000000")])
def test_a_format_that_is_given_chooses(format: Format, name: str) -> None:
    shards = found("a.tar", "b.parquet", "c.jpg", format=format)
    assert [(shard.name, shard.format) for shard in shards] == [(name, format)]


def test_archives_go_before_pictures_beside_them() -> None:
    assert [shard.name for shard in found("a.tar", "preview.png")] == ["a.tar"]


@pytest.mark.parametrize("format", [None, *FORMATS])
def test_nothing_found_says_what_was_found(format: Format | None) -> None:
    with pytest.raises(NotFound, match=r"INPUT holds no .*2 x \.txt, 1 x no suffix"):
        found("a.txt", "b.txt", "README", format=format)
    with pytest.raises(NotFound, match="found: nothing"):
        found(format=format)


def test_nothing_of_the_given_format_says_what_there_is_instead() -> None:
    with pytest.raises(NotFound, match=r"no tar files \(found: 2 x .jpg\)"):
        found("a.jpg", "b.jpg", format="tar")


@given(seed=st.integers(), change=st.sampled_from(["name", "size", "etag", "gone", "new", "order"]))
def test_a_slices_tag_changes_with_any_of_its_files(seed: int, change: str) -> None:
    chance = random.Random(seed)
    listing = objects(f"{number}.jpg" for number in range(chance.randint(2, 6)))
    (before,) = find_shards(listing, where="INPUT")
    index = chance.randrange(len(listing))
    info = listing[index]
    match change:
        case "gone":
            del listing[index]
        case "new":
            listing.insert(index, ObjectInfo(name=f"{info.name}.jpg", size=0, etag=""))
        case "order":
            listing.reverse()
        case "size":
            listing[index] = dataclasses.replace(info, size=info.size + 1)
        case _:
            listing[index] = dataclasses.replace(info, **{change: getattr(info, change).upper()})
    (after,) = find_shards(listing, where="INPUT")
    assert before.etag != after.etag


@pytest.mark.parametrize("name", ["a.jpg", "b/C.JPEG", "d.e.webp", "f.tif", "g.psd", "h.jp2", "i.avif"])
def test_files_of_every_format_that_is_opened_are_images(name: str) -> None:
    assert is_image(name)


@pytest.mark.parametrize("name", ["a", "a.txt", "b.jpg/c", "d.eps", "e.pdf", "f.mpg", "g.wmf", "h.json"])
def test_files_of_other_formats_are_not(name: str) -> None:
    assert not is_image(name)
