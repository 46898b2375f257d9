"""Steps on a GPU: uploaded while the one before is computed, and replayed as CUDA graphs.

Steps have one of few sizes, each with a graph of its own; one between two sizes runs as the larger, and what fills it
up is not looked at. Where images wait on their way is allocated once: pinned memory that the device reads while this
process goes on, and a place for each on the device, so that an upload and the step before it overlap.
"""

from __future__ import annotations

import itertools
import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from pipeline.dispatcher import Scores
from pipeline.steps import step_sizes

SLOTS = 3  # steps that may be on their way: one computed, one behind it, one that is being filled
WARM_RUNS = 2  # before a graph is recorded: libraries choose their kernels then, which a graph cannot hold

_log = logging.getLogger(__name__)


class Outputs(NamedTuple):
    """All that a step gives, on its device: for each image every class.

    `order_NC` int64 class indices from best to worst, `scores_NC` float32 in that order, `logits_NC` float32 by class,
    and `embeddings_ND` float32 of a model that has them.
    """

    order_NC: torch.Tensor
    scores_NC: torch.Tensor
    logits_NC: torch.Tensor
    embeddings_ND: torch.Tensor | None

    def wanted(self, images: int, top_k: int, *, details: bool) -> tuple[torch.Tensor, ...]:
        """Those of the first `images`, and of them what was asked for."""
        best = self.order_NC[:images, :top_k].to(torch.int32), self.scores_NC[:images, :top_k]
        if not details:
            return best
        embeddings = () if self.embeddings_ND is None else (self.embeddings_ND[:images],)
        return (*best, self.logits_NC[:images], *embeddings)


Forward: TypeAlias = Callable[[torch.Tensor], Outputs]


def scores_of(wanted: Sequence[torch.Tensor]) -> Scores:
    """What `Outputs.wanted` gave, once it is on the host."""
    return Scores(*(tensor.numpy() for tensor in wanted))


class DeviceSteps:
    """Runs `forward`, which takes uint8 images [N, H, W, 3] on the device, in steps of at most `max_step` images.

    On a CPU, where nothing overlaps, it does the same one after another.
    """

    def __init__(
        self, forward: Forward, max_step: int, shape_HWC: tuple[int, int, int], device: torch.device, *, graphs: bool
    ) -> None:
        self._forward, self._sizes, self._cuda = forward, step_sizes(max_step), device.type == "cuda"
        self._backend: Any = torch.cuda if self._cuda else torch.cpu
        self._uploading, self._computing = self._backend.Stream(device), self._backend.Stream(device)
        shape = (max_step, *shape_HWC)
        self._input_NHWC = torch.zeros(shape, dtype=torch.uint8, device=device)
        slots = [_Slot(shape, device, self._event) for _ in range(SLOTS)]
        self._slots = itertools.cycle(slots)
        self._steps: dict[int, Callable[[], Outputs]] = {}
        self._pool = torch.cuda.graph_pool_handle() if self._cuda else None
        with torch.inference_mode():
            for size in reversed(self._sizes):  # the largest first: the memory of its graph serves the others too
                self._steps[size] = (graphs and self._cuda and self._recorded(size)) or partial(
                    forward, self._input_NHWC[:size]
                )

    def launch(self, images: Sequence[np.ndarray], top_k: int, *, details: bool) -> Callable[[], Scores]:
        """See `pipeline.dispatcher.Model`."""
        count = sum(map(len, images))
        slot = next(self._slots)
        slot.uploaded.synchronize()  # what it held last has left it
        np.concatenate(images, out=slot.pinned_NHWC.numpy()[:count])
        with torch.inference_mode():
            with self._backend.stream(self._uploading):
                self._uploading.wait_event(slot.consumed)
                slot.staged_NHWC[:count].copy_(slot.pinned_NHWC[:count], non_blocking=True)
                slot.uploaded.record(self._uploading)
            with self._backend.stream(self._computing):
                self._computing.wait_event(slot.uploaded)
                self._input_NHWC[:count].copy_(slot.staged_NHWC[:count])
                slot.consumed.record(self._computing)
                outputs = self._steps[self._sizes[bisect_left(self._sizes, count)]]()
                wanted = [self._to_host(tensor) for tensor in outputs.wanted(count, top_k, details=details)]
                done = self._event()
                done.record(self._computing)

        def read() -> Scores:
            done.synchronize()
            return scores_of(wanted)

        return read

    def _recorded(self, size: int) -> Callable[[], Outputs] | None:
        """A graph of a step, or None for a model that does what no graph can hold."""
        images_NHWC = self._input_NHWC[:size]
        with torch.cuda.stream(self._computing):
            for _ in range(WARM_RUNS):
                self._forward(images_NHWC)
        self._computing.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._computing, capture_error_mode="thread_local"):
                outputs = self._forward(images_NHWC)
        except RuntimeError as error:
            _log.warning("steps of %d images run without a CUDA graph: %s", size, str(error).splitlines()[0])
            return None

        def replay() -> Outputs:
            graph.replay()
            return outputs

        return replay

    def _event(self) -> Any:
        return self._backend.Event(**({"blocking": True} if self._cuda else {}))  # a thread that waits sleeps

    def _to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._cuda)
        return host.copy_(tensor, non_blocking=True)


class _Slot:
    """Where the images of one step wait, here and on the device."""

    def __init__(self, shape: tuple[int, ...], device: torch.device, event: Callable[[], Any]) -> None:
        self.pinned_NHWC = torch.zeros(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.staged_NHWC = torch.zeros(shape, dtype=torch.uint8, device=device)
        self.uploaded, self.consumed = event(), event()
