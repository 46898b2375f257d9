"""`tandem demo`: the whole system on this machine, with nothing but what ships with it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table

from deployments.config import Config
from jobs.corpus import digits, encode, write_shards
from jobs.models import shipped
from jobs.online import Answers, Online
from jobs.screen import JobBar, Screen
from jobs.spec import JobSpec
from pipeline.errors import JobError
from pipeline.inputs import Columns
from pipeline.storage import Store, open_store

BUCKET = "tandem-demo"
FOLDER = Path("tandem-demo")  # in the current folder: the corpus, the model and the output, to try things with
ONLINE_PER_S = 20.0
STORE_START_S = 30.0


def run_demo(screen: Screen) -> None:
    """Runs the demo and tells what happened. Raises `TandemError`."""
    started = time.monotonic()
    with screen.progress("starting") as bar:
        _copy_corpus()
        with _emulated_s3(), Online(ONLINE_PER_S) as online, _ray(bar):
            report = _score(bar, online)
            store = open_store(f"s3://{BUCKET}/scores")
            _download(store, FOLDER / "scores")
    result = _result(report, online.answers, time.monotonic() - started)
    _show(screen, result)
    screen.result(result)


def _copy_corpus() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    for folder in ("digits", "images"):
        (FOLDER / folder).mkdir(parents=True)
    write_shards(FOLDER / "digits")
    for digit in [digit for digit in digits() if digit.held_out][:10]:
        suffix, data = encode(digit)
        (FOLDER / "images" / f"{digit.key}.{suffix}").write_bytes(data)
    shutil.copytree(shipped("digits-vit"), FOLDER / "digits-vit")


@contextmanager
def _emulated_s3() -> Iterator[None]:
    """An S3 emulator in a process of its own, and the environment that leads there."""
    port = _free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            del os.environ[name]  # a profile or a real endpoint must not take part
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "demo",
            "AWS_SECRET_ACCESS_KEY": "demo",
            "AWS_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }
        try:
            yield
        finally:
            server.terminate()


@contextmanager
def _ray(bar: JobBar) -> Iterator[None]:
    from deployments.cluster import local_ray

    bar.say("starting Ray")
    with local_ray():
        yield


def _score(bar: JobBar, online: Online) -> dict[str, Any]:
    """Brings up pool and endpoint, then runs the job and the online requests at once."""
    from deployments.cluster import start_serve
    from deployments.endpoint import serve_model
    from jobs.prepare import prepare
    from jobs.run import run_job

    model, config = str((FOLDER / "digits-vit").absolute()), Config()
    start_serve()
    bar.say("starting the pool and the endpoint")
    host, port = "127.0.0.1", _free_port()
    serve_model(model, host, port, config)
    bar.say("uploading the corpus")
    _upload()
    spec = JobSpec(
        input=f"s3://{BUCKET}/digits",
        output=f"s3://{BUCKET}/scores",
        model=model,
        columns=Columns(carry=("cls",)),
    )
    with online.to(f"http://{host}:{port}"):
        return run_job(prepare(spec), config, bar.show).to_dict()


def _upload() -> None:
    import boto3
    from botocore.exceptions import BotoCoreError

    deadline = time.monotonic() + STORE_START_S
    while True:
        try:
            boto3.client("s3", region_name="us-east-1").create_bucket(Bucket=BUCKET)
            break
        except BotoCoreError as error:
            if time.monotonic() > deadline:
                raise JobError("the S3 emulator (moto_server) does not start") from error
            time.sleep(0.2)
    store = open_store(f"s3://{BUCKET}/digits")
    for shard in sorted((FOLDER / "digits").iterdir()):
        store.write(shard.name, shard.read_bytes())


def _download(store: Store, folder: Path) -> None:
    for info in store.list():
        path = folder / info.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(store.read(info.name))


def _result(report: dict[str, Any], online: Answers, seconds: float) -> dict[str, Any]:
    scores = FOLDER / "scores"
    tables = [pq.read_table(path) for path in sorted(scores.glob("digits-heldout-*.parquet"))]
    held_out = pa.concat_tables(tables).to_pylist()
    right = sum(row["label"] == row["cls"] for row in held_out)
    return {
        "images": report["images"],
        "held_out": len(held_out),
        "accuracy": right / len(held_out),
        "errors": report["errors"],
        "batch_images_per_s": report["images_per_s"],
        "online_requests": len(online.latencies_ms),
        "online_errors": online.errors,
        "online_p50_ms": round(float(np.percentile(online.latencies_ms, 50)), 1),
        "online_p99_ms": round(float(np.percentile(online.latencies_ms, 99)), 1),
        "replicas": [
            {
                "id": replica,
                "batch_images": report["replicas"].get(replica, 0),
                "online_images": online.replicas[replica],
            }
            for replica in sorted({*report["replicas"], *online.replicas})
        ],
        "seconds": round(seconds, 1),
        "output": str(scores),
    }


def _show(screen: Screen, result: dict[str, Any]) -> None:
    if screen.as_json:
        return
    table = Table(title="One pool of model actors, two kinds of traffic", show_header=False, title_justify="left")
    rows = {
        "images scored by the job": f"{result['images']:,} ({result['errors']} errors)",
        "job": f"{result['batch_images_per_s']:,.0f} images/s, its start included",
        "accuracy": f"{result['accuracy']:.2%} of the {result['held_out']} images never trained on",
        "online requests meanwhile": f"{result['online_requests']:,} ({result['online_errors']} errors)",
        "online latency": f"p50 {result['online_p50_ms']:.0f} ms, p99 {result['online_p99_ms']:.0f} ms",
        **{
            f"replica {one['id']}": f"{one['batch_images']:,} batch and {one['online_images']:,} online images"
            for one in result["replicas"]
        },
        "whole demo": f"{result['seconds']:.0f} s",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    screen.console.print(table)
    screen.say(f"\nThe output, one Parquet file for each input shard, is in {result['output']}:")
    for row in pq.read_table(Path(result["output"]) / "digits-heldout-00000.parquet").slice(0, 3).to_pylist():
        screen.say(f"  {row['key']}  label {row['label']}  score {row['score']:.4f}  (truth {row['cls']})")
    screen.say("\nTry next:")
    model = f"--model {FOLDER}/digits-vit"
    screen.say(f"  tandem submit {FOLDER}/digits {FOLDER}/again {model} --wait")
    screen.say(f"  tandem serve {model}")
    screen.say(f"  tandem score {FOLDER}/images/*            # in another terminal")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
