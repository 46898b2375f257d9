"""A checkpoint as a model that scores steps of images."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import PIL
import torch
import transformers

from pipeline.checkpoint import Checkpoint
from pipeline.class_token import narrow_last_layer
from pipeline.core_steps import CoreSteps
from pipeline.device_steps import DeviceSteps, Outputs, scores_of
from pipeline.dispatcher import Scores
from pipeline.errors import ModelError
from pipeline.heap import keep_freed_memory
from pipeline.model_info import Dtype, Function, ModelInfo
from pipeline.transform import transform_of

# Matrices of a smaller model take threads about as long as it takes them to meet, and meanwhile the core is nobody
# else's. A second one made a step of 8 images 1.2 to 1.7 times as fast with 0.5 million weights, a step of one slower,
# and 1.7 to 1.9 times with 5.5 million.
MIN_WEIGHTS_FOR_THREADS = 1_000_000


class Classifier:
    """An image classifier on one device: uint8 pixels in, its best classes out.

    The forward pass, what is done to its logits, and the order of equal scores (by index) are those of transformers'
    image-classification pipeline. Raises `ModelError` for a checkpoint or a device that cannot be used.
    """

    def __init__(
        self, checkpoint: Checkpoint, *, device: str = "auto", dtype: Dtype = "float32", compile: bool = False
    ) -> None:
        self.device = _device(device)
        self._steps: DeviceSteps | None = None
        self._here = threading.local()  # what a hook leaves for the call that it is part of
        self._cores = CoreSteps(1)
        processor, self._network = _load(checkpoint, getattr(torch, dtype))
        self._network.to(self.device).eval()
        config = self._network.config
        function = _function(config)
        self._to_scores = _ACTIVATIONS[function]
        head = _head(self._network)
        if head is not None:
            head.register_forward_pre_hook(self._keep_embeddings)
        self.info = ModelInfo(
            model=checkpoint.name,
            revision=checkpoint.revision,
            labels=_labels(checkpoint, config),
            transform=transform_of(processor),
            dtype=dtype,
            function=function,
            embedding_size=None if head is None else head.in_features,
            # Pillow too: its resize has changed bits between releases
            versions={
                "torch": str(torch.__version__),  # it is of torch's own type, and who unpickles that loads torch
                "transformers": transformers.__version__,
                "pillow": PIL.__version__,
            },
        )
        height, width = self.info.transform.height, self.info.transform.width
        noise_NCHW = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
        narrow_last_layer(self._network, noise_NCHW.to(self.device, self._network.dtype))
        if compile:
            # one program for steps of any size: one for each would take minutes
            self._network = torch.compile(self._network, dynamic=True)
        table = torch.from_numpy(self.info.transform.lookup_table()).to(self.device)
        self._table = table.flatten().to(self._network.dtype)
        self._channel_offsets = torch.arange(3, dtype=torch.int32, device=self.device) * table.shape[1]

    @property
    def suitable_threads(self) -> int:
        """How many CPU threads serve the model well: one for each core, but one alone where it is small."""
        weights = sum(weight.numel() for weight in self._network.parameters())
        return 1 if weights < MIN_WEIGHTS_FOR_THREADS else os.cpu_count() or 1

    def use_threads(self, threads: int) -> None:
        """Has the model run on so many CPU threads, and this process keep the memory of their steps."""
        keep_freed_memory()
        self._cores = CoreSteps(threads)

    def launch(self, images: Sequence[np.ndarray], top_k: int, *, details: bool) -> Callable[[], Scores]:
        """See `pipeline.dispatcher.Model`."""
        if self._steps:
            return self._steps.launch(images, top_k, details=details)
        images_NHWC = np.concatenate(images)
        return lambda: self._cores.score(images_NHWC, partial(self.score, top_k=top_k, details=details))

    def score(self, images_NHWC: np.ndarray, top_k: int, *, details: bool = False) -> Scores:
        """The `top_k` best classes (at most as many as there are) of uint8 images [N, H, W, 3]."""
        with torch.inference_mode():
            outputs = self.forward(torch.from_numpy(images_NHWC).to(self.device))
            return scores_of([one.cpu() for one in outputs.wanted(len(images_NHWC), top_k, details=details)])

    def forward(self, images_NHWC: torch.Tensor) -> Outputs:
        """All that a step of uint8 images [N, H, W, 3] on the model's device gives, still there."""
        logits_NC = self.logits(images_NHWC)
        # all of an image's, so that one look suffices: an infinite logit would be a score of 1 by a sigmoid
        finite_N1 = torch.isfinite(logits_NC).all(dim=-1, keepdim=True)
        scores_NC = torch.where(finite_N1, self._to_scores(logits_NC), torch.nan)
        # topk promises no order among equal scores, and saturated ones are often equal
        best = torch.sort(scores_NC, dim=-1, descending=True, stable=True)
        embeddings_ND = self._here.embeddings_ND.float() if self.info.embedding_size else None
        return Outputs(best.indices, best.values, logits_NC, embeddings_ND)

    def _keep_embeddings(self, head: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        (self._here.embeddings_ND,) = inputs

    def logits(self, images_NHWC: torch.Tensor) -> torch.Tensor:
        """float32 logits [N, classes] of uint8 images [N, H, W, 3] on the model's device."""
        indices = images_NHWC.to(torch.int32) + self._channel_offsets
        # A table of the 256 values of each channel gives the very floats that the checkpoint's processor computes.
        pixels_NHWC = torch.index_select(self._table, 0, indices.flatten()).view(indices.shape)
        logits: torch.Tensor = self._network(pixel_values=pixels_NHWC.permute(0, 3, 1, 2)).logits
        return logits.float()

    def warm(self, max_step: int, *, graphs: bool = True) -> dict[int, float]:
        """Makes ready for steps of at most so many images, so that no request pays for allocation and kernel choice.

        On a GPU, with `graphs`, steps are CUDA graphs from here on. Gives the ms of steps of one image and of the
        most. Raises `ModelError` where the model does not run, for want of memory or on images of its processor's size,
        or gives what is no number.
        """
        height, width = self.info.transform.height, self.info.transform.width
        images, found = max_step, dict[int, float]()
        try:
            if self.device.type == "cuda":
                self._steps = DeviceSteps(self.forward, max_step, (height, width, 3), self.device, graphs=graphs)
            for images in (max_step, 1):
                pixels_NHWC = _warm_images(images, height, width)
                self._check_finite(self.launch([pixels_NHWC], 1, details=False)())
                started = time.perf_counter()
                self.launch([pixels_NHWC], 1, details=False)()
                found[images] = (time.perf_counter() - started) * 1e3
        except ModelError:
            raise
        except Exception as error:  # of whatever kind: transformers promises none
            told = f"a step of {images} images of {width} x {height} pixels on {self.device}"
            raise ModelError(f"{self.info.model} fails on {told}: {_reason(error)}") from error
        return found

    def _check_finite(self, scores: Scores) -> None:
        if not scores.finite_N.all():
            advice = "check its weights" if self.info.dtype == "float32" else "use dtype float32, or check its weights"
            raise ModelError(f"{self.info.model} gives scores that are not finite in {self.info.dtype}: {advice}")

    def check(self) -> None:
        """Raises `RuntimeError` where the device is lost, as it is after an illegal access: nothing will run on it."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).query()


def _warm_images(count: int, height: int, width: int) -> np.ndarray:
    """uint8 [N, H, W, 3] of noise, in which numbers grow larger within a model than in a blank image."""
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise ModelError(f"device {name!r} cannot be used here: {_reason(error)}") from error


_ACTIVATIONS: dict[Function, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": partial(torch.softmax, dim=-1),
    "sigmoid": torch.sigmoid,
    "none": lambda logits_NC: logits_NC,
}


def _function(config: Any) -> Function:
    """What makes scores of logits, by the rules of transformers' pipeline."""
    if config.problem_type == "regression":
        return "none"
    if config.problem_type == "multi_label_classification" or config.num_labels == 1:
        return "sigmoid"
    return "softmax"


def _head(network: Any) -> torch.nn.Linear | None:
    """The layer that makes logits of an embedding: the last linear one that has an output for each class."""
    classes = network.config.num_labels
    heads = [part for part in network.modules() if isinstance(part, torch.nn.Linear) and part.out_features == classes]
    return heads[-1] if heads else None


def _labels(checkpoint: Checkpoint, config: Any) -> tuple[str, ...]:
    try:
        return tuple(str(config.id2label[index]) for index in range(config.num_labels))
    except KeyError as error:
        raise ModelError(f"{checkpoint.name}: its config.json gives class {error} no label in id2label") from error


def _load(checkpoint: Checkpoint, dtype: torch.dtype) -> tuple[Any, Any]:
    """The image processor and the network. Code and pickles that a checkpoint may bring are never run."""
    try:
        # the PIL backend is the one whose pixels are the reference; torchvision's differ by rounding
        load: Callable[..., Any] = transformers.AutoImageProcessor.from_pretrained
        processor = load(checkpoint.path, backend="pil", trust_remote_code=False)
        network, report = transformers.AutoModelForImageClassification.from_pretrained(
            checkpoint.path, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # of whatever kind: transformers promises none
        raise ModelError(f"{checkpoint.name} cannot be loaded as an image classifier: {_reason(error)}") from error
    if missing := sorted(report["missing_keys"]):
        # transformers would fill them with random numbers, and the scores would mean nothing
        raise ModelError(f"{checkpoint.name} has no trained weights for {', '.join(missing[:3])}: not a classifier")
    return processor, network


def _reason(error: Exception) -> str:
    """The first line of it; some exceptions carry no text."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
