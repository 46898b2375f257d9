"""An accelerator that is lost is told from a step that failed."""

from __future__ import annotations

import pytest
import torch

from pipeline.device_errors import is_device_lost

ILLEGAL = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported"


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError(ILLEGAL),
        RuntimeError(ILLEGAL),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        RuntimeError("CUDA error: uncorrectable ECC error encountered"),
    ],
)
def test_an_error_after_which_nothing_runs_is_recognised(error: Exception) -> None:
    assert is_device_lost(error)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (1x2 and 3x4)"),
        ValueError("the model gave 3 scores for 4 images"),
    ],
)
def test_a_step_that_failed_by_itself_loses_no_device(error: Exception) -> None:
    assert not is_device_lost(error)
