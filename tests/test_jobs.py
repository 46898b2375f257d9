"""Batch jobs and an endpoint on a real cluster, by the command that a user runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import daft
import duckdb
import httpx
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
from PIL import Image

from jobs.corpus import digits, encode
from jobs.spec import JobPaths
from pipeline.shards import Format
from pipeline.storage import open_store
from tests.check import Best, check_output, read_output
from tests.cluster import OPEN, clean_environment
from tests.command import MODEL, TOP_K, Done, submit
from tests.conftest import lead_to_store, new_bucket
from tests.corpora import parquet_of, write_corpus
from tests.images import bad_images, real_images
from tests.stores import Radosgw

COUNTS = ("images", "scored", "errors", "skipped")


@pytest.fixture(scope="module")
def images() -> dict[str, bytes]:
    """Good and bad images by file name, all names with an image's suffix and without a second dot."""
    named = {f"good {name}": data for name, data in real_images().items()}
    named |= {f"bad-{name}": data for name, data in bad_images().items()}
    return {f"{name.replace('.', '_')}.jpg": data for name, data in named.items()}


@pytest.fixture(scope="module")
def expected(images: dict[str, bytes]) -> dict[str, Best]:
    """What plain transformers says of every good image."""
    processor = transformers.AutoImageProcessor.from_pretrained(MODEL, backend="pil")
    model = transformers.AutoModelForImageClassification.from_pretrained(MODEL)
    classify = transformers.pipeline("image-classification", model=model, image_processor=processor)
    answers: dict[str, Best] = {}
    with warnings.catch_warnings(action="ignore"):  # Pillow's, of odd files
        for name in [name for name in images if name.startswith("good")]:
            best = classify(Image.open(BytesIO(images[name])), top_k=TOP_K)
            answers[name] = [one["label"] for one in best], [one["score"] for one in best]
    return answers


@dataclass(frozen=True)
class Scored:
    """A job that was run: where its input and output are, the keys of its images by file name, and what was told."""

    source: str
    target: str
    keys: dict[str, str]
    done: Done


@pytest.fixture(scope="module")
def scored(
    tmp_path_factory: pytest.TempPathFactory, address: str, endpoint: str, images: dict[str, bytes], moto_port: int,
    radosgw: Radosgw,
) -> dict[Format, Scored]:  # fmt: skip
    """A job for each format, each in a store of another kind: tars in a folder, files in the real S3 store."""
    ports: dict[Format, int | None] = {"tar": None, "parquet": moto_port, "images": radosgw.port}
    jobs: dict[Format, Scored] = {}
    for format, port in ports.items():
        with pytest.MonkeyPatch.context() as monkeypatch:
            if port is None:
                url = str(tmp_path_factory.mktemp("scored"))
            else:
                lead_to_store(monkeypatch, port)
                url = f"s3://{new_bucket()}"
            source, target = open_store(f"{url}/in"), f"{url}/out"
            keys = write_corpus(source, format, images)
            jobs[format] = Scored(source.url, target, keys, submit(address, source.url, target))
    return jobs


@pytest.fixture
def in_moto(moto_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lead_to_store(monkeypatch, moto_port)


@pytest.fixture
def in_radosgw(radosgw: Radosgw, monkeypatch: pytest.MonkeyPatch) -> None:
    lead_to_store(monkeypatch, radosgw.port)


def test_tars_in_a_folder_are_scored_as_transformers_scores_them(
    scored: dict[Format, Scored], expected: dict[str, Best]
) -> None:
    _check_scored(scored["tar"], expected)


@pytest.mark.usefixtures("in_moto")
def test_parquet_in_an_emulated_store_is_scored_as_transformers_scores_it(
    scored: dict[Format, Scored], expected: dict[str, Best]
) -> None:
    _check_scored(scored["parquet"], expected)


@pytest.mark.usefixtures("in_radosgw")
def test_files_in_a_real_store_are_scored_as_transformers_scores_them(
    scored: dict[Format, Scored], expected: dict[str, Best]
) -> None:
    _check_scored(scored["images"], expected)


def _check_scored(job: Scored, expected: dict[str, Best]) -> None:
    assert job.done.code == 0, job.done.err
    output = check_output(job.target, job.keys.values(), {job.keys[name]: best for name, best in expected.items()})
    bad = sum(name.startswith("bad") for name in job.keys)
    assert (job.done.json["images"], job.done.json["errors"]) == (len(job.keys), bad)
    assert output.errors.num_rows == bad
    assert set(output.errors.column("stage").to_pylist()) == {"decode"}
    assert all(output.errors.column("error").to_pylist())


def test_batch_and_online_give_the_same_numbers_from_the_same_actors(
    scored: dict[Format, Scored], endpoint: str, images: dict[str, bytes]
) -> None:
    job = scored["tar"]
    batch = read_output(job.target).best()

    replicas = set()
    for name in [name for name in images if name.startswith("good")]:
        response = httpx.post(f"{endpoint}/predict", params={"top_k": TOP_K}, content=images[name]).raise_for_status()
        labels, scores = batch[job.keys[name]]
        assert [one["label"] for one in response.json()["predictions"]] == labels, name
        assert [one["score"] for one in response.json()["predictions"]] == pytest.approx(scores, abs=1e-6), name
        replicas.add(response.headers["x-tandem-replica"])
    assert set(job.done.json["replicas"]) == replicas


def test_what_stands_beside_an_image_is_carried_along(address: str, endpoint: str, tmp_path: Path) -> None:
    some = {f"{digit.key}.png": encode(digit)[1] for digit in digits()[:6]}
    tables = open_store(str(tmp_path / "in"))
    tables.write("a.parquet", parquet_of(some))

    assert submit(address, tables.url, str(tmp_path / "out"), "--carry", "label").code == 0

    table = pq.read_table(tmp_path / "out" / "a.parquet")
    assert table.column("input_label").to_pylist() == list(range(6))
    assert table.schema.field("input_label").type == pa.int64()


def test_an_unfinished_job_goes_on_and_a_finished_one_is_not_done_again(
    scored: dict[Format, Scored], address: str, tmp_path: Path
) -> None:
    job, target = scored["tar"], str(tmp_path / "out")
    shutil.copytree(job.target, target)
    first, before = job.done.json, check_output(target, job.keys.values())
    open_store(target).delete([JobPaths.SUCCESS, "part-001.parquet"])

    second = submit(address, job.source, target).json
    third = submit(address, job.source, target).json

    assert (first["resumed"], second["resumed"], third["resumed"]) == (0, first["shards"] - 1, first["shards"])
    assert 0 < second["run_images"] < first["run_images"]
    assert third["run_images"] == 0
    for report in (second, third):  # of the whole job, whichever run did it
        assert [report[name] for name in COUNTS] == [first[name] for name in COUNTS]
    assert check_output(target, job.keys.values()).scores.equals(before.scores)


def test_an_output_that_is_not_this_jobs_is_refused_with_the_difference(
    address: str, endpoint: str, images: dict[str, bytes], tmp_path: Path
) -> None:
    source, target = open_store(str(tmp_path / "in")), str(tmp_path / "out")
    write_corpus(source, "tar", {name: images[name] for name in sorted(images)[:50]})
    assert submit(address, source.url, target).code == 0
    open_store(target).delete([JobPaths.SUCCESS])

    other_k = submit(address, source.url, target, "--top-k", "1")
    source.write("part-001.tar", source.read("part-000.tar"))
    other_input = submit(address, source.url, target)
    foreign = submit(address, source.url, source.url + "/scores")

    assert (other_k.code, other_input.code, foreign.code) == (1, 1, 2)
    assert "top_k was 3, now 1" in other_k.err
    assert "part-001.tar changed" in other_input.err
    assert "lie within each other" in foreign.err


def test_a_job_with_too_many_bad_images_stops_and_goes_on_when_more_are_allowed(
    address: str, endpoint: str, images: dict[str, bytes], tmp_path: Path
) -> None:
    source, target = open_store(str(tmp_path / "in")), str(tmp_path / "out")
    keys = write_corpus(source, "tar", images)

    stopped = submit(address, source.url, target, "--max-error-share", "0.01")
    allowed = submit(address, source.url, target, "--max-error-share", "0.5")

    assert stopped.code == 1
    assert re.search(r"\d+ of \d+ images failed, more than --max-error-share 0.01 allows \(the first: ", stopped.err)
    assert allowed.code == 0, allowed.err
    check_output(target, keys.values())


def test_the_output_is_read_by_the_tools_that_people_have(scored: dict[Format, Scored]) -> None:
    target, report = scored["tar"].target, scored["tar"].done.json
    rows = report["images"] - report["errors"]

    assert len(pd.read_parquet(target)) == rows
    counted = duckdb.execute("select count(*) from read_parquet(?)", [f"{target}/*.parquet"]).fetchone()
    assert counted == (rows,)
    assert daft.read_parquet(f"{target}/*.parquet").count_rows() == rows
    shard = pq.ParquetFile(f"{target}/part-000.parquet")
    assert shard.schema_arrow.names == ["key", "shard", "row", "label", "score", "labels", "scores"]
    metadata = {key.decode(): value.decode() for key, value in shard.schema_arrow.metadata.items()}
    assert metadata["tandem.model"] == MODEL
    assert metadata["tandem.revision"] == report["revision"]
    assert metadata["tandem.version.transformers"] == transformers.__version__
    script = f"import ray; ray.init('local', num_cpus=1); print('rows', ray.data.read_parquet({target!r}).count())"
    assert f"rows {rows}" in _python(script)


@pytest.mark.usefixtures("in_radosgw")
def test_pyarrow_reads_the_output_by_the_same_environment(scored: dict[Format, Scored]) -> None:
    target, report = scored["images"].target, scored["images"].done.json
    script = f"import pyarrow.parquet as pq; print('rows', len(pq.read_table('{target}/')))"
    assert f"rows {report['images'] - report['errors']}" in _python(script)


def test_wrong_input_model_and_address_fail_in_one_line(
    address: str, endpoint: str, tmp_path: Path, radosgw_bucket: str
) -> None:
    out = str(tmp_path / "out")
    cases = {
        "holds no tar shards, Parquet or image files": submit(address, str(tmp_path / "nothing"), out),
        "there is no such bucket": submit(address, "s3://no-such-bucket-here", out),
        "no cluster answers there": submit("http://127.0.0.1:9", str(tmp_path / "in"), out),
    }
    for message, done in cases.items():
        assert done.code == 1
        assert message in done.err.splitlines()[0]
        assert "Traceback" not in done.err
        assert message in json.loads(done.out)["error"]


def _python(script: str) -> str:
    """What the script prints, in a process of its own: pyarrow reads the environment once, as it starts S3."""
    aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=clean_environment({**OPEN, **aws}),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
