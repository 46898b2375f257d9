"""What callers of a model must know of it. Free of torch: callers do not load it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.transform import ImageTransform

Dtype = Literal["float32", "bfloat16", "float16"]
Function = Literal["softmax", "sigmoid", "none"]


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """A loaded checkpoint.

    `labels[index]` names a class; `function` makes scores of its logits; `embedding_size` is the length of an image's
    embedding, None where the model has none that is known; `versions` are those of the libraries that score.
    """

    model: str
    revision: str
    labels: tuple[str, ...]
    transform: ImageTransform
    dtype: Dtype
    versions: dict[str, str]
    function: Function = "softmax"
    embedding_size: int | None = None

    @property
    def scores_as(self) -> str:
        """Replicas of which this differs give different scores."""
        return f"revision {self.revision} in {self.dtype}"
