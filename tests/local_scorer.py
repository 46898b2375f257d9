"""A real model behind the HTTP side, without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from deployments.web.scoring import Image, Scored, Wanted, check_wanted, scored_as_wanted
from pipeline.checkpoint import find_checkpoint
from pipeline.decode import decode_image, resize_pixels
from pipeline.errors import ImageError
from pipeline.model import Classifier
from pipeline.model_info import ModelInfo
from tests.command import MODEL


class LocalScorer:
    """A `Scorer` that holds the model itself."""

    def __init__(self) -> None:
        self.asked: list[float] = []  # seconds that each request was given

    @cached_property
    def _classifier(self) -> Classifier:
        return Classifier(find_checkpoint(MODEL))

    async def describe(self) -> ModelInfo:
        return self.info

    @property
    def info(self) -> ModelInfo:
        return self._classifier.info

    async def score(self, images: Sequence[Image], wanted: Wanted, within_s: float) -> list[Scored | ImageError]:
        info = self._classifier.info
        check_wanted(wanted, info)
        self.asked.append(within_s)
        return [self._score(image, wanted, info) for image in images]

    def _score(self, image: Image, wanted: Wanted, info: ModelInfo) -> Scored | ImageError:
        try:
            pixels_HWC = (
                resize_pixels(image, info.transform)
                if isinstance(image, np.ndarray)
                else decode_image(image, info.transform)
            )
        except ImageError as error:
            return error
        scores = self._classifier.score(pixels_HWC[None], wanted.top_k, details=True)
        (scored,) = scored_as_wanted(scores, info, wanted, "replica-7")
        return scored
