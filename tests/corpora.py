"""Small inputs of every format, from real images and bad ones."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.shards import Format
from pipeline.storage import Store

PER_SHARD = 40


def write_corpus(store: Store, format: Format, images: Mapping[str, bytes]) -> dict[str, str]:
    """Writes the images, by name, as shards of a format; the key of each in the output, by its name."""
    names = sorted(images)
    parts = [names[start : start + PER_SHARD] for start in range(0, len(names), PER_SHARD)]
    keys: dict[str, str] = {}
    for number, part in enumerate(parts):
        some = {name: images[name] for name in part}
        if format == "tar":
            store.write(f"part-{number:03}.tar", tar_of(some))
            keys |= {name: name.partition(".")[0] for name in part}
        elif format == "parquet":
            store.write(f"part-{number:03}.parquet", parquet_of(some))
            keys |= {name: name for name in part}
        else:
            for name in part:
                store.write(f"part-{number:03}/{name}", images[name])
                keys[name] = f"part-{number:03}/{name}"
    return keys


def tar_of(members: Mapping[str, bytes]) -> bytes:
    """A tar archive of the members, each with a sidecar that holds its name."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for name, data in members.items():
            stem = name.partition(".")[0]
            for member, content in ((name, data), (f"{stem}.txt", name.encode())):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return sink.getvalue()


def parquet_of(images: Mapping[str, bytes]) -> bytes:
    """A Parquet file as Hugging Face's datasets writes them: a struct of bytes and path, and a label."""
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": data, "path": name} for name, data in images.items()]
    table = pa.table({"image": pa.array(rows, struct), "label": pa.array(range(len(rows)), pa.int64())})
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=16)
    return sink.getvalue()
