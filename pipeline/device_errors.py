"""Which errors of an accelerator are for good. Free of torch, as is who asks."""

from __future__ import annotations

# After one of these a CUDA context refuses all that follows (CUDA Runtime API, cudaError_t: "the process must be
# terminated and relaunched"), so only a new process helps.
_STICKY = (
    "CUDA error",
    "CUDNN_STATUS_EXECUTION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR",
    "CUBLAS_STATUS_EXECUTION_FAILED",
    "device-side assert",
    "illegal memory access",
    "uncorrectable ECC error",
    "NVML_SUCCESS == r INTERNAL ASSERT",
)


def is_device_lost(error: BaseException) -> bool:
    """Whether nothing will run on the device of this process any more. Too little memory is not such an error."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "OutOfMemoryError" in kinds:
        return False
    return "AcceleratorError" in kinds or any(sign in str(error) for sign in _STICKY)
