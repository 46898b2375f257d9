"""What is not configured follows from the machine and the model, and everything is told with its reason."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deployments.choices import Choices
from deployments.config import PoolConfig


def _classifier(device: str = "cpu", threads: int = 1) -> Any:
    return SimpleNamespace(device=torch.device(device), suitable_threads=threads)


def test_a_cpu_gets_short_steps_and_says_that_there_is_no_gpu() -> None:
    choices = Choices(PoolConfig(), _classifier())
    assert (choices.threads, choices.limits.max_step, choices.limits.online_step_ms) == (1, 32, 50.0)
    assert choices.told["device"] == "cpu (no GPU is here)"
    assert choices.told["threads"] == "1 (fewer than 1,000,000 weights)"
    assert choices.told["dtype"] == "float32 (the notebook's)"
    assert "cuda_graphs" not in choices.told


def test_a_gpu_gets_long_steps_and_graphs() -> None:
    choices = Choices(PoolConfig(dtype="bfloat16"), _classifier("cuda"))
    assert (choices.limits.max_step, choices.limits.online_step_ms) == (128, 8.0)
    assert choices.told["max_step"] == "128 (on a GPU)"
    assert choices.told["dtype"] == "bfloat16 (faster and less exact)"
    assert choices.told["cuda_graphs"] == "True (launches cost less)"


@pytest.mark.parametrize(
    ("name", "value"), [("device", "cpu"), ("threads", 3), ("max_step", 7), ("online_step_ms", 0.0)]
)
def test_what_is_configured_is_taken_and_told_as_such(name: str, value: Any) -> None:
    choices = Choices(PoolConfig(**{name: value}), _classifier(threads=os.cpu_count() or 1))
    assert choices.told[name] == f"{value} (as configured)"
    taken = {"threads": choices.threads, "device": "cpu", **vars(choices.limits)}
    assert taken[name] == value
