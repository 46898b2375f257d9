"""What it costs to go on with a job whose driver was killed when 97 % of its shards were done.

    python benchmarks/resume.py --rounds 3

A cluster and an endpoint on this machine, the shipped small model, the digits eight times. Prints one JSON object: for
each round the images that were done again, though they had been scored or decoded before, and the seconds until the
first of the rest was scored.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it runs as a script, and uses what the tests do

from benchmarks.results import machine
from jobs.corpus import digits, encode
from jobs.spec import JobPaths
from pipeline.chunks import from_ipc
from pipeline.storage import Store, open_store
from tests.cluster import ray_cluster
from tests.command import MODEL, submit, submitting, tandem
from tests.corpora import tar_of
from tests.faults import driver, names_in, wait_for
from tests.stores import free_ports

COPIES, PER_SHARD, SHARE = 8, 50, 0.97


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ray_cluster(Path(folder), {}) as cluster:
        (port,) = free_ports(1)
        assert tandem("serve", "--model", MODEL, "--port", str(port), "--address", cluster.address).code == 0
        source = open_store(f"{folder}/in")
        images = write_input(source)
        rounds = [
            measure(cluster.address, source, open_store(f"{folder}/out-{number}"), images)
            for number in range(options.rounds)
        ]
    print(json.dumps({**machine(), "images": images, "images_per_shard": PER_SHARD, "rounds": rounds}))


def write_input(store: Store) -> int:
    """Writes the digits in small shards; their number."""
    encoded = [(digit.key, *encode(digit)) for digit in digits()]
    members = [(f"{key}-{copy}.{suffix}", data) for copy in range(COPIES) for key, suffix, data in encoded]
    for number, start in enumerate(range(0, len(members), PER_SHARD)):
        store.write(f"{number:05}.tar", tar_of(dict(members[start : start + PER_SHARD])))
    return len(members)


def measure(address: str, source: Store, target: Store, images: int) -> dict[str, Any]:
    """One job, killed and resumed."""

    def nearly_done(store: Store, names: list[str]) -> bool:
        return sum(name.endswith(".parquet") for name in names) >= SHARE * images / PER_SHARD

    with submitting(address, source.url, target.url) as process:
        wait_for(nearly_done, target)
        seen = json.loads(target.read(JobPaths.PROGRESS))
        os.kill(driver(target), signal.SIGKILL)
        process.communicate()
    names = names_in(target)
    committed = sum(name.endswith(".parquet") for name in names)
    staged = sum(len(from_ipc(target.read(name))) for name in names if JobPaths.parse_staged(name))
    report = submit(address, source.url, target.url).json
    return {
        "committed_shards": committed,
        "staged_images": staged,
        "images_of_the_second_run": report["run_images"],
        "images_that_neither_stood_nor_were_staged": images - committed * PER_SHARD - staged,
        "seconds": report["seconds"],
        "startup_s": report["startup_s"],
        "images_per_s_before": seen["images_per_s"],
    }


if __name__ == "__main__":
    main()
