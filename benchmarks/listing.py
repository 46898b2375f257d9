"""How long it takes to list an input of many shards, to plan it, and to look at it again when the job is resumed.

    python benchmarks/listing.py --shards 100000

In a folder, and in a real S3 store on this machine (radosgw, as the tests start it). Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it runs as a script, and uses what the tests do

from benchmarks.results import machine
from jobs.corpus import digits, encode
from jobs.models import shipped
from jobs.plan import make_plan, write_plan
from jobs.prepare import prepare
from jobs.spec import JobSpec
from pipeline.checkpoint import find_checkpoint
from pipeline.model import Classifier
from pipeline.storage import open_store
from tests.conftest import new_bucket
from tests.corpora import tar_of
from tests.stores import Radosgw, environment

MODEL = str(shipped("digits-vit"))
WRITERS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=100_000)
    options = parser.parse_args()
    result: dict[str, Any] = {**machine(), "shards": options.shards}
    with tempfile.TemporaryDirectory() as folder:
        result["folder"] = measure(f"{folder}/in", f"{folder}/out", options.shards)
        gateway = Radosgw(Path(folder) / "radosgw")
        try:
            gateway.start()
            os.environ |= environment(gateway.port)
            bucket = new_bucket()
            result["radosgw"] = measure(f"s3://{bucket}/in", f"s3://{bucket}/out", options.shards)
        finally:
            gateway.stop()
    print(json.dumps(result))


def measure(source_url: str, target_url: str, shards: int) -> dict[str, float]:
    """Seconds of each part, of a job that starts and of the same one resumed."""
    source, data = open_store(source_url), tar_of({"one.png": encode(digits()[0])[1]})
    with ThreadPoolExecutor(WRITERS) as threads:
        for _ in threads.map(lambda number: source.write(f"{number:06}.tar", data), range(shards)):
            pass
    spec = JobSpec(input=source_url, output=target_url, model=MODEL)
    info = Classifier(find_checkpoint(MODEL)).info
    started = time.perf_counter()
    job = prepare(spec)
    listed = time.perf_counter()
    write_plan(job.store, make_plan(spec, job.found, job.carried, info))
    planned = time.perf_counter()
    prepare(spec)
    resumed = time.perf_counter()
    assert len(job.found) == shards
    seconds = {"list_s": listed - started, "plan_s": planned - listed, "resume_s": resumed - planned}
    return {name: round(value, 1) for name, value in seconds.items()}


if __name__ == "__main__":
    main()
