"""From `tandem submit` to the first chunk that is scored, beside a `tandem serve` that holds the model.

    python benchmarks/start.py            # some 5 minutes: writes results

The commands are run as a user runs them: with `--wait`, which drives the job itself, and without, which has Ray's job
API start a driver. They take turns, after a job that is not measured: the first in a cluster's life starts Ray Data's
own actors as well. Seconds until OUTPUT has its lease (the driver is up and knows INPUT), and a staged chunk.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it runs as a script

from benchmarks.photos import write_checkpoint, write_photos
from benchmarks.results import write_results
from jobs.spec import JobPaths
from tests.cluster import BIN
from tests.stores import free_ports

IMAGES, PHOTOS_FOR_HEAD = 200, 60
WAYS = {"driven by the command": ["--wait"], "by Ray's job API": []}
LOOK_EVERY_S, PATIENCE_S, PAUSE_S = 0.02, 120.0, 3.0
TANDEM = str(BIN / "tandem")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photos(folder / "photos", IMAGES)
        write_checkpoint(folder / "model", sorted((folder / "photos").iterdir())[:PHOTOS_FOR_HEAD])
        environment = os.environ | {"XDG_STATE_HOME": str(folder / "state")}
        with serving(folder, environment):
            one_job(folder, "first", ["--wait"], environment)
            for number in range(options.rounds):
                for way, arguments in WAYS.items():
                    runs[way].append(one_job(folder, f"{number}{'-'.join(arguments)}", arguments, environment))
                    print(way, runs[way][-1], file=sys.stderr)
    medians = {
        way: {mark: statistics.median(one[mark] for one in rounds) for mark in rounds[0]}
        for way, rounds in runs.items()
    }
    print(json.dumps(medians, indent=1))
    write_results("start", {"rounds": options.rounds, "images": IMAGES, "seconds": medians, "runs": runs})


@contextmanager
def serving(folder: Path, environment: dict[str, str]) -> Iterator[None]:
    """`tandem serve`, from its first answer on."""
    command = [TANDEM, "serve", "--model", str(folder / "model"), "--port", str(free_ports(1)[0])]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            assert "answers at" in process.stdout.readline()
            yield
        finally:
            process.send_signal(signal.SIGTERM)


def one_job(folder: Path, name: str, arguments: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Seconds from the command's start to each mark. The job is waited for."""
    output = folder / f"out-{name}"
    command = [TANDEM, "submit", str(folder / "photos"), str(output), "--model", str(folder / "model"), *arguments]
    started_s = time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        marks = {
            "lease_s": seen(output, f"{JobPaths.LEASE}*.json", started_s),
            "first_chunk_s": seen(output, f"{JobPaths.STAGE}*/*.arrow", started_s),
        }
        seen(output, JobPaths.SUCCESS, started_s)
    assert process.returncode == 0
    time.sleep(PAUSE_S)  # what the job leaves is ended
    return marks


def seen(output: Path, pattern: str, started_s: float) -> float:
    """Seconds until OUTPUT has such a file."""
    while not any(output.glob(pattern)):
        assert time.perf_counter() - started_s < PATIENCE_S, pattern
        time.sleep(LOOK_EVERY_S)
    return round(time.perf_counter() - started_s, 2)


if __name__ == "__main__":
    main()
