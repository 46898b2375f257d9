"""A look into tar shards before a job begins: do they have what is asked for?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from pipeline.errors import UsageError
from pipeline.inputs.sample import Columns
from pipeline.inputs.tar_names import Names, skip_reason
from pipeline.inputs.tar_stream import members_of, open_tar
from pipeline.shards import Shard, is_image
from pipeline.storage import Store

MAX_SCAN_BYTES = 256 << 20  # of unpacked archive


def check_suffixes(store: Store, shards: Iterable[Shard], columns: Columns) -> None:
    """Raises `UsageError` where members of a suffix are asked for which none of these shards has.

    Reads them until all are found. Where an archive is too large to be read to its end, sidecars may stand behind its
    images, so that one is refused only where other sidecars have been seen. Raises `ShardError` for a damaged archive.
    """
    options = {suffix.lower().lstrip("."): f"--carry {suffix}" for suffix in columns.carry}
    if columns.image:
        options[columns.image.lower().lstrip(".")] = f"--image-column {columns.image}"
    found, whole = Counter[str](), True
    for shard in shards:
        if options.keys() <= found.keys():
            return
        whole &= _scan(store, shard, Names(columns.key_until), found)
    missing = options.keys() - found.keys()
    sidecars = any(not is_image(f"a.{suffix}") for suffix in found)
    if missing and (whole or sidecars):
        suffix = min(missing)
        there = ", ".join(one for one, _ in found.most_common(10)) or "none"
        raise UsageError(f"{options[suffix]}: no member of the first tar shards has this suffix; they have {there}")


def _scan(store: Store, shard: Shard, names: Names, found: Counter[str]) -> bool:
    """Counts the suffixes of a shard's files; False where it is larger than what is read."""
    with open_tar(store, shard) as archive:
        for member in members_of(archive):
            if not skip_reason(member):
                found[names.split_file(member.name)[1].lower()] += 1
            if archive.offset > MAX_SCAN_BYTES:
                return False
    return True
