"""The command on a machine without a cluster: the demo, a job on a Ray of its own, an endpoint with a job beside it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path

import httpx
import psutil
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from PIL import Image
from transformers.image_utils import load_image

from deployments.pool import app_name
from jobs.corpus import Digit, digits, encode, write_shards
from jobs.models import shipped
from jobs.spec import JobPaths
from tests.check import check_output
from tests.cluster import BIN, clean_environment
from tests.command import tandem
from tests.conftest import Demo
from tests.stores import free_ports

MODEL = str(shipped("digits-vit"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    write_shards(folder)
    return folder


def test_the_demo_serves_both_lanes_from_the_same_actors_and_is_as_accurate_as_transformers(demo: Demo) -> None:
    done = demo.done

    assert done.code == 0, done.err
    result = done.json
    assert (result["images"], result["errors"], result["online_errors"]) == (1797, 0, 0)
    assert result["accuracy"] == _accuracy_by_transformers([digit for digit in digits() if digit.held_out])
    assert result["accuracy"] >= 0.97
    assert sum(one["batch_images"] for one in result["replicas"]) == 1797
    assert sum(one["online_images"] for one in result["replicas"]) == result["online_requests"] > 0
    assert any(one["batch_images"] and one["online_images"] for one in result["replicas"])
    assert 0 < result["online_p50_ms"] <= result["online_p99_ms"]
    assert result["batch_images_per_s"] > 0
    rows = pq.read_table(demo.folder / result["output"]).num_rows
    assert rows == 1797


def test_the_demo_shows_a_progress_bar_and_no_line_of_a_library(demo: Demo) -> None:
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", demo.done.err).replace("\r", "\n").split("\n")
    told = {re.sub(r"^. |\s+[━╸╺ ].*", "", line).strip() for line in lines}

    assert {"starting Ray", "starting the pool and the endpoint", "scoring"} <= told
    assert told <= {"", "starting", "uploading the corpus", "starting Ray", "starting the pool",
                    "starting the pool and the endpoint", "scoring", "done"}  # fmt: skip


def test_a_job_without_a_cluster_runs_on_a_ray_of_its_own_and_leaves_none_behind(
    corpus: Path, tmp_path: Path, state: dict[str, str]
) -> None:
    arguments = ("submit", str(corpus), "out", "--model", MODEL, "--carry", "cls", "--wait")

    done = tandem(*arguments, cwd=tmp_path, environment=state)
    again = tandem(*arguments, "--json", cwd=tmp_path, environment=state)

    assert (done.code, done.err) == (0, "")
    assert "1,797 images in 10 shards" in done.out
    output = check_output(str(tmp_path / "out"), [digit.key for digit in digits()])
    right = sum(row["label"] == row["cls"] for row in output.scores.to_pylist())
    assert right / 1797 > 0.97
    assert (again.code, again.err, again.json["resumed"]) == (0, "", 10)


def test_an_endpoint_and_a_job_on_the_same_machine_share_the_pool(
    corpus: Path, tmp_path: Path, state: dict[str, str]
) -> None:
    digit = digits()[7]
    (tmp_path / "seven.png").write_bytes(encode(digit)[1])
    (tmp_path / "bad.png").write_bytes(b"not an image")
    with _serving(state) as (url, serving):
        scheduled = _scheduled(serving)
        good = tandem("score", "seven.png", "--url", url, "--top-k", "2", "--json", cwd=tmp_path)
        bad = tandem("score", "seven.png", "bad.png", "--url", url, cwd=tmp_path)
        job = tandem(
            "submit", str(corpus), "out", "--model", MODEL, "--wait", "--json", cwd=tmp_path, environment=state
        )
        replica = httpx.post(f"{url}/predict", content=encode(digit)[1]).headers["x-tandem-replica"]
        port = str(httpx.URL(url).port)
        taken = tandem("serve", "--model", MODEL, "--port", port, environment=state | {"XDG_STATE_HOME": str(tmp_path)})
        beside = ("submit", str(corpus), "second", "--model", MODEL, "--wait")
        with _begun(*beside, lease=tmp_path / "second" / JobPaths.lease(1), environment=state) as interrupted:
            interrupted.send_signal(signal.SIGINT)
            stopped = (interrupted.wait(60), *interrupted.communicate())
        second = _begun(*beside, lease=tmp_path / "second" / JobPaths.lease(2), environment=state)
        last: list[httpx.Response] = []
        begun = threading.Event()
        sender = threading.Thread(target=lambda: last.append(_post_slowly(url, encode(digit)[1], begun)))
        sender.start()
        begun.wait()
    sender.join()
    with second:
        _, left = second.communicate(timeout=60)

    assert (good.code, good.err) == (0, "")
    assert good.json[0]["predictions"][0]["label"] == str(digit.label)
    assert len(good.json[0]["predictions"]) == 2
    assert bad.code == 1
    assert "not an image" in bad.err
    assert job.code == 0, job.err
    assert job.json["replicas"] == {replica: 1797}
    assert (taken.code, taken.out) == (2, "")
    assert f"--port {port}: cannot listen there: Address already in use" in taken.err
    assert scheduled["raylet"] == {os.SCHED_BATCH}
    assert scheduled[f"ray::ServeReplica:{app_name(MODEL)}:pool"] >= {os.SCHED_BATCH, os.SCHED_OTHER}
    assert scheduled["ray::ServeReplica:tandem-http:endpoint"] >= {os.SCHED_BATCH, os.SCHED_OTHER}
    assert stopped == (1, "", "\ntandem: stopped\n")
    assert second.returncode == 1
    assert left == (
        "tandem: the `tandem serve` that the job ran beside was stopped; submit it again to go on with it\n"
    )
    assert last[0].json()["predictions"][0]["label"] == str(digit.label)  # asked before SIGTERM, and sent after it
    assert not (Path(state["XDG_STATE_HOME"]) / "tandem" / "cluster.json").exists()


def test_wrong_usage_ends_with_2_and_failure_with_1(corpus: Path, tmp_path: Path, state: dict[str, str]) -> None:
    model = ("--model", MODEL)
    usage = [
        ("bogus",),
        ("submit", str(corpus)),
        ("submit", str(corpus), "out"),
        ("submit", str(corpus), "out", *model),  # no cluster, and no --wait
        ("submit", str(corpus), "out", *model, "--wait", "--top-k", "0"),
        ("submit", str(corpus), "out", *model, "--wait", "--format", "zip"),
        ("submit", "ftp://x/y", "out", *model, "--wait"),
        ("submit", str(corpus), f"{corpus}/out", *model, "--wait"),
        ("submit", str(corpus), "out", *model, "--wait", "--config", "missing.yaml"),
        ("serve", *model, "--port", "0"),
        ("serve", *model, "--address", "head:6379"),
        ("score",),
    ]
    failures = [
        ("submit", str(tmp_path / "nothing"), "out", *model, "--wait"),
        ("score", "empty.png", "--url", f"http://127.0.0.1:{free_ports(1)[0]}"),
    ]
    (tmp_path / "empty.png").touch()
    for arguments in usage:
        done = tandem(*arguments, cwd=tmp_path, environment=state)
        assert (done.code, done.out) == (2, ""), arguments
        assert done.err.strip(), arguments
    for arguments in failures:
        done = tandem(*arguments, cwd=tmp_path, environment=state)
        assert done.code == 1, arguments
        assert done.err.startswith("tandem: "), arguments


def test_a_model_that_cannot_be_had_is_told_in_one_line(corpus: Path, tmp_path: Path, state: dict[str, str]) -> None:
    offline = {**state, "HF_ENDPOINT": f"http://127.0.0.1:{free_ports(1)[0]}", "HF_HOME": str(tmp_path / "hf")}

    arguments = ("submit", str(corpus), "out", "--model", "google/vit-base-patch16-224", "--wait")
    hub = tandem(*arguments, cwd=tmp_path, environment=offline)

    assert hub.code == 1
    assert hub.err.splitlines()[0].startswith("tandem: model 'google/vit-base-patch16-224': no such folder here, and")
    assert "the model hub cannot be reached" in hub.err
    assert "Traceback" not in hub.err


def _accuracy_by_transformers(some: list[Digit]) -> float:
    processor = transformers.AutoImageProcessor.from_pretrained(MODEL, backend="pil")
    model = transformers.AutoModelForImageClassification.from_pretrained(MODEL).eval()
    images = [load_image(Image.open(BytesIO(encode(digit)[1]))) for digit in some]
    with torch.inference_mode():
        logits = model(**processor(images, return_tensors="pt")).logits
    right = sum(
        model.config.id2label[int(best)] == str(digit.label)
        for best, digit in zip(logits.argmax(-1), some, strict=True)
    )
    return right / len(some)


def _begun(*arguments: str, lease: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    """A command whose job has OUTPUT's lease."""
    process = subprocess.Popen(
        [str(BIN / "tandem"), *arguments],
        env=clean_environment(environment),
        cwd=lease.parents[3],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(600):
        if lease.exists():
            return process
        assert process.poll() is None
        time.sleep(0.1)
    raise AssertionError(f"no {lease}")


def _post_slowly(url: str, body: bytes, begun: threading.Event) -> httpx.Response:
    def parts() -> Iterator[bytes]:
        yield body[:10]
        time.sleep(0.2)
        begun.set()
        time.sleep(1)
        yield body[10:]

    return httpx.post(f"{url}/predict", content=parts(), timeout=30)


def _scheduled(process: psutil.Process) -> dict[str, set[int]]:
    """How the threads of the processes that it started are scheduled, by their programs."""
    found = dict[str, set[int]]()
    for started in process.children(recursive=True):
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            title = Path(next(iter(started.cmdline()), "")).name.partition(".")[0].strip()
            found[title] = {os.sched_getscheduler(thread.id) for thread in started.threads()}
    return found


@contextmanager
def _serving(state: dict[str, str]) -> Iterator[tuple[str, psutil.Process]]:
    """`tandem serve` for as long as the context lasts; the URL at which it answers, and its process."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(
        [str(BIN / "tandem"), "serve", "--model", MODEL, "--port", str(port)],
        env={**clean_environment(state), "PATH": os.defpath},  # as without an activated environment
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert f"answers at {url}" in process.stdout.readline()
            assert httpx.get(f"{url}/readyz").json()["status"] == "ready"
            yield url, psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=60)
    assert (process.returncode, err.splitlines()) == (0, ["starting Ray and the pool ...", "stopping ..."])
