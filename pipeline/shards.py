"""What a job reads: the shards under INPUT, found in one listing.

A shard is a tar archive, a Parquet file, or a slice of a sorted listing of image files. One shard gives one output
file, named after it. Which of the three INPUT holds is told by the names, or given.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from pipeline.decode import image_suffixes
from pipeline.errors import NotFound, UsageError
from pipeline.storage import ObjectInfo

Format = Literal["tar", "parquet", "images"]
FORMATS: tuple[Format, ...] = get_args(Format)

IMAGES_PER_SHARD = 1000  # of a slice of a listing: one output file for so many images
_SUFFIXES: dict[Format, tuple[str, ...]] = {"tar": (".tar", ".tar.gz", ".tgz"), "parquet": (".parquet", ".pq")}


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One input shard.

    `name` is the object's name under INPUT, or that of the slice. `output` is its Parquet file's name under OUTPUT.
    `size` is in bytes. `etag` changes with the content; of a slice, with any of its files. A slice holds the files
    with names in (`after`, `last`]; the other formats leave both empty.
    """

    number: int
    name: str
    format: Format
    output: str
    size: int
    etag: str
    after: str = ""
    last: str = ""

    @property
    def images(self) -> int | None:
        """The number of images, where a listing shows it: of a slice, its files."""
        return Fingerprint.count_of(self.etag) if self.format == "images" else None


@dataclass(frozen=True)
class Found:
    """The shards of a listing in its order, and the objects that are in none of them, counted by reason."""

    shards: list[Shard]
    skipped: Counter[str]

    def __iter__(self) -> Iterator[Shard]:
        return iter(self.shards)

    def __len__(self) -> int:
        return len(self.shards)


def find_shards(
    objects: Iterable[ObjectInfo], *, format: Format | None = None, where: str, per_slice: int = IMAGES_PER_SHARD
) -> Found:
    """The shards among `objects` (sorted by name).

    `format` None means: whichever the names show. `where` names INPUT in messages. Raises `UsageError` where the
    names show two formats, `NotFound` where they show none.
    """
    found: dict[Format, list[Shard]] = {known: [] for known in FORMATS}
    reasons: dict[Format | None, Counter[str]] = {known: Counter() for known in (*FORMATS, None)}
    images = _Slices(per_slice)
    for info in objects:
        kind = None if hidden(info.name) else _format_of(info.name)
        if kind == "images":
            found[kind].extend(images.add(info))
        elif kind:
            found[kind].append(_of_object(info, kind))
        reasons[kind][_reason(info.name)] += 1
    found["images"].extend(images.finish())
    chosen = format or _chosen(found, where)
    skipped = sum((counts for kind, counts in reasons.items() if kind != chosen), Counter[str]())
    return Found(_named(found[chosen], format, where, skipped), skipped)


def hidden(name: str) -> bool:
    """Whether a part of the name starts with '_' or '.', as Spark, Hive and Arrow mark what is not data."""
    return any(part.startswith(("_", ".")) for part in name.split("/"))


def _reason(name: str) -> str:
    """Why an object is in no shard: its suffix, where nothing else is the cause."""
    return "hidden" if hidden(name) else os.path.splitext(name)[1].lower() or "no suffix"


def is_image(name: str) -> bool:
    """Whether the name's suffix is one of an image format that Tandem opens."""
    return os.path.splitext(name)[1].lower() in image_suffixes()


def slice_of(objects: Iterable[ObjectInfo], last: str) -> Iterator[ObjectInfo]:
    """The image files of a listing up to and with `last`: what `find_shards` put in one slice."""
    for info in objects:
        if os.fsencode(info.name) > os.fsencode(last):
            return
        if is_image(info.name) and not hidden(info.name):
            yield info


@dataclass
class Fingerprint:
    """The count, bytes and content tag of a list of objects, told one by one."""

    count: int = 0
    size: int = 0
    _digest: hashlib._Hash = field(default_factory=hashlib.sha256)

    def add(self, info: ObjectInfo) -> None:
        self.count += 1
        self.size += info.size
        self._digest.update(f"{info.name}\0{info.size}\0{info.etag}\n".encode(errors="surrogateescape"))

    def etag(self) -> str:
        return f"{self.count}-{self._digest.hexdigest()[:32]}"

    @staticmethod
    def count_of(etag: str) -> int:
        """The count in what `etag` returned."""
        return int(etag.partition("-")[0])


class _Slices:
    def __init__(self, per_slice: int) -> None:
        self._per_slice = per_slice
        self._after = self._last = ""
        self._print = Fingerprint()

    def add(self, info: ObjectInfo) -> Iterator[Shard]:
        if self._print.count == self._per_slice:
            yield from self.finish()
        self._print.add(info)
        self._last = info.name

    def finish(self) -> Iterator[Shard]:
        if self._print.count:
            yield Shard(
                number=0, name="", format="images", output="", size=self._print.size, etag=self._print.etag(),
                after=self._after, last=self._last,
            )  # fmt: skip
        self._after, self._print = self._last, Fingerprint()


def _format_of(name: str) -> Format | None:
    lower = name.lower()
    for kind, suffixes in _SUFFIXES.items():
        if lower.endswith(suffixes):
            return kind
    return "images" if is_image(name) else None


def _of_object(info: ObjectInfo, kind: Format) -> Shard:
    return Shard(number=0, name=info.name, format=kind, output="", size=info.size, etag=info.etag)


def _chosen(found: dict[Format, list[Shard]], where: str) -> Format:
    archives: list[Format] = [kind for kind in FORMATS if found[kind] and kind != "images"]
    if len(archives) == 2:
        raise UsageError(f"{where} holds tar and Parquet files; say which with --format tar or --format parquet")
    return archives[0] if archives else "images"


def _named(shards: list[Shard], format: Format | None, where: str, skipped: Counter[str]) -> list[Shard]:
    if not shards:
        seen = ", ".join(f"{count} x {suffix}" for suffix, count in skipped.most_common(5)) or "nothing"
        wanted = format or "tar shards, Parquet or image"
        raise NotFound(f"{where} holds no {wanted} files (found: {seen})")
    if shards[0].format == "images":
        return [
            replace(shard, number=number, name=f"images-{number:06d}", output=f"images-{number:06d}.parquet")
            for number, shard in enumerate(shards)
        ]
    stems = Counter(_stem(shard.name) for shard in shards)
    # two shards of one stem (a.tar, a.tgz) keep their whole names, so that neither hides the other's output
    taken = {shard.name for shard in shards} | {stem for stem, count in stems.items() if count > 1}
    return [
        replace(shard, number=number, output=(shard.name if stem in taken else stem) + ".parquet")
        for number, shard in enumerate(shards)
        for stem in [_stem(shard.name)]
    ]


def _stem(name: str) -> str:
    suffixes = sorted((suffix for some in _SUFFIXES.values() for suffix in some), key=len, reverse=True)
    return next(name[: -len(suffix)] for suffix in suffixes if name.lower().endswith(suffix))
