"""The benchmarks that no machine of CI can run in full: that they run, and count right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.batch import compared, summary
from benchmarks.growth import Mark, of_an_image
from benchmarks.processes import Cpu, family, stop

ROOT = Path(__file__).resolve().parents[1]


def test_what_an_image_costs_is_what_the_further_ones_cost() -> None:
    def told(seconds: float, cpu_s: float) -> dict[str, float]:
        return {"seconds": seconds, "cpu_s": cpu_s, "startup_s": 2.0}

    rounds = [{"few": told(5.0, 1.0), "many": told(15.0 + late, 3.0)} for late in (0.0, 10.0, 0.0)]
    found = summary(rounds, 100, 600)
    assert (found["images_per_s"], found["range"]) == (50.0, [25.0, 50.0])
    assert (found["cpu_ms_per_image"], found["startup_s"], found["whole_s"]) == (4.0, 2.0, 15.0)


def test_what_an_image_costs_is_looked_at_in_the_middle_of_a_job() -> None:
    seen = [(0, 0.0, 0.0), (1_900, 5.0, 9.0), (2_500, 6.0, 10.0), (5_000, 7.0, 11.0), (7_500, 11.0, 20.0)]
    marks = [Mark(*one) for one in (*seen, (9_900, 11.5, 30.0))]
    assert of_an_image(marks, 10_000) == {"ms": 1.0, "cpu_ms": 2.0}
    assert of_an_image(marks, 4_600) == {}


def test_answers_that_differ_are_told() -> None:
    reference = {"a.jpg": ("cat", 0.5), "b.jpg": ("dog", 0.25)}
    found = {"a.jpg": ("cat", 0.75), "b.jpg": ("cow", 0.25)}
    assert compared(found, reference) == "1 of 2 labels as the loop's, scores within 0.2"


def test_what_a_process_used_that_ended_unwaited_for_is_counted() -> None:
    burn = "import time\nwhile time.process_time() < 2: pass"
    code = (
        "import signal, subprocess, sys\n"
        "signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"  # as Ray's raylet does: the kernel adds the time to nobody's
        f"subprocess.Popen([sys.executable, '-c', {burn!r}]).wait()\n"
        "print('done', flush=True)\n"
        "sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        with Cpu(parent.pid) as cpu:
            assert parent.stdout.readline() == b"done\n"
        stop(parent)
    assert 1.0 < cpu.used_s < 3.0


def test_what_has_ended_already_may_be_stopped() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
        stop(ended)
    assert family(ended.pid) == []


@pytest.mark.ray
def test_the_benchmark_of_a_gpu_runs_without_one() -> None:
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--small", "--dtype", "float32"]
    limits = ["--engines", "eager", "graphs", "--seconds", "0.1", "--tar-images", "96"]
    done = subprocess.run([*command, *limits], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert {"model_eager", "model_graphs", "decode_threads", "decode_processes", "from_memory"} <= told.keys()
    assert all(rate > 0 for rate in told["model_graphs"].values())
    assert told["from_tars"]["images"] == told["job_beside_online"]["images"] == 96
    assert {"online_alone", "online_beside_job"} <= told.keys()
