"""Jobs whose processes are killed or paused: whatever happens, a finished job holds each image once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.corpus import digits, encode
from jobs.lease import LEASE_S
from jobs.online import Online
from jobs.spec import JobPaths
from pipeline.storage import open_store
from tests.check import check_output
from tests.command import submit, submitting
from tests.conftest import Demo
from tests.corpora import tar_of
from tests.faults import (
    DEADLINE_S,
    Corpus,
    actors,
    committing,
    driver,
    names_in,
    nearly_done,
    planning,
    staging,
    title,
    wait_for,
    wait_until,
    workers,
    write_digits,
)
from tests.poison import POISON


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, demo: Demo, address: str, endpoint: str) -> Corpus:
    return write_digits(open_store(str(tmp_path_factory.mktemp("faults"))), demo, share=0.5)


class Disk:
    """A file system in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tandem-test", folder], check=True)

    def resize(self, size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", self.folder], check=True)

    def close(self) -> None:
        subprocess.run(["umount", self.folder], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Making one takes root, which CI has."""
    if os.geteuid() != 0:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("only root can mount a file system")
    disk = Disk(tmp_path / "disk")
    yield disk
    disk.close()


def test_drivers_that_are_told_to_stop_and_killed_are_followed_by_one_that_goes_on(
    address: str, corpus: Corpus, tmp_path: Path
) -> None:
    target = open_store(str(tmp_path / "out"))
    with submitting(address, corpus.url, target.url) as process:
        wait_for(committing, target)
        os.kill(driver(target), signal.SIGTERM)
        _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert "the job was stopped; submit it again to go on with it" in err
    assert not json.loads(target.read(JobPaths.lease(1)))["held"]  # so that the next one need not wait

    with submitting(address, corpus.url, target.url) as process:
        wait_for(nearly_done, target)  # other moments, and exactly: test_store_faults.py
        os.kill(driver(target), signal.SIGKILL)
        _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1, err
    before = names_in(target)

    again = submit(address, corpus.url, target.url)

    assert again.code == 0, again.err
    check_output(target.url, corpus.keys, corpus.undisturbed)
    committed = sum(name.endswith(".parquet") for name in before)
    assert again.json["resumed"] >= committed  # the outputs that stood were not done again
    assert JobPaths.SUCCESS not in before


def test_ctrl_c_ends_the_following_and_not_the_job(address: str, corpus: Corpus, tmp_path: Path) -> None:
    target = open_store(str(tmp_path / "out"))
    with submitting(address, corpus.url, target.url) as process:
        wait_for(committing, target)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert "goes on; to end it: ray job stop --address" in err

    wait_until(lambda: JobPaths.SUCCESS in names_in(target))
    check_output(target.url, corpus.keys, corpus.undisturbed)


def test_actors_that_are_killed_cost_no_image_and_no_request(
    address: str, endpoint: str, corpus: Corpus, tmp_path: Path
) -> None:
    target = open_store(str(tmp_path / "out"))
    with (
        Online(5.0) as online,
        online.to(endpoint),
        submitting(address, corpus.url, target.url) as process,
    ):
        wait_for(staging, target)
        for victim in ("ServeReplica:tandem-pool", "MapWorker(MapBatches(_Caller))"):
            (actor,) = [one for one in actors(address) if one["class_name"].startswith(victim)]
            os.kill(actor["pid"], signal.SIGKILL)
        out, err = process.communicate(timeout=150)

    assert process.returncode == 0, err
    check_output(target.url, corpus.keys, corpus.undisturbed)
    assert json.loads(out)["images"] >= len(corpus.keys)  # a chunk may have been scored twice; it is held once
    assert online.answers.errors == 0
    assert len(online.answers.replicas) == 2  # the one that died, and the one that came


def test_a_reader_and_a_decoder_that_are_killed_cost_no_image(address: str, corpus: Corpus, tmp_path: Path) -> None:
    target = open_store(str(tmp_path / "out"))
    kinds, killed = {"ray::Read_Shards", "ray::MapBatches(_decode)"}, set[str]()

    def kill_one_of_each() -> bool:
        for worker in workers(address):
            for kind in kinds - killed:
                if title(worker["pid"]).startswith(kind):
                    os.kill(worker["pid"], signal.SIGKILL)
                    killed.add(kind)
        return killed == kinds

    with submitting(address, corpus.url, target.url) as process:
        wait_until(kill_one_of_each)
        _, err = process.communicate(timeout=150)

    assert process.returncode == 0, err
    check_output(target.url, corpus.keys, corpus.undisturbed)


def test_a_driver_that_sleeps_past_its_lease_is_replaced_and_wakes_to_no_harm(
    address: str, corpus: Corpus, tmp_path: Path
) -> None:
    target = open_store(str(tmp_path / "out"))
    with submitting(address, corpus.url, target.url) as process:
        wait_for(committing, target)
        sleeper = driver(target)
        os.kill(sleeper, signal.SIGSTOP)
        started_s = time.monotonic()
        second = submit(address, corpus.url, target.url)
        assert time.monotonic() - started_s > LEASE_S / 2  # it gave the sleeper its time
        os.kill(sleeper, signal.SIGCONT)
        _, err = process.communicate(timeout=DEADLINE_S)

    assert second.code == 0, second.err
    assert process.returncode == 1
    assert "another driver works on this OUTPUT now" in err
    check_output(target.url, corpus.keys, corpus.undisturbed)


def test_an_image_that_ends_its_process_becomes_an_error_row(address: str, endpoint: str, tmp_path: Path) -> None:
    source, target = open_store(str(tmp_path / "in")), str(tmp_path / "out")
    some = [(digit.key, *encode(digit)) for digit in digits()[:40]]
    guilty = {some[index][0] for index in (3, 21, 39)}
    images = {f"{key}.{suffix}": POISON if key in guilty else data for key, suffix, data in some}
    source.write("good.tar", tar_of(dict(list(images.items())[:3])))
    source.write("poisoned.tar", tar_of(dict(list(images.items())[3:])))

    done = submit(address, source.url, target)

    assert done.code == 0, done.err
    errors = check_output(target, [key for key, _, _ in some]).errors.to_pylist()
    assert {row["key"] for row in errors} == guilty
    assert {row["error"] for row in errors} == {"decoding this image ends the process that does it (by SIGSEGV)"}


def test_a_full_disk_stops_the_job_and_room_lets_it_go_on(address: str, corpus: Corpus, disk: Disk) -> None:
    disk.resize("64k")

    full = submit(address, corpus.url, str(disk.folder))
    disk.resize("64m")
    again = submit(address, corpus.url, str(disk.folder))

    assert full.code == 1
    assert "No space left on device" in full.err
    assert str(disk.folder) in full.err
    assert again.code == 0, again.err
    check_output(str(disk.folder), corpus.keys, corpus.undisturbed)


def test_a_second_driver_on_the_same_output_is_refused_while_the_first_goes_on(
    address: str, corpus: Corpus, tmp_path: Path
) -> None:
    target = open_store(str(tmp_path / "out"))
    with submitting(address, corpus.url, target.url) as process:
        wait_for(planning, target)
        second = submit(address, corpus.url, target.url)
        process.communicate(timeout=DEADLINE_S)

    assert process.returncode == 0
    check_output(target.url, corpus.keys, corpus.undisturbed)
    # refused, unless the first was done by the time that the second looked
    assert second.code == 1 or second.json["resumed"] == second.json["shards"]
    assert second.code == 0 or "another driver" in second.err
