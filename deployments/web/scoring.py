"""What the protocols have in common: images and wishes in, the best classes of each image out."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Protocol, TypeVar

import numpy as np

from deployments.config import EndpointConfig
from deployments.web.problems import Problem
from pipeline.dispatcher import Scores
from pipeline.errors import Busy, Expired, ImageError, PoolError, UsageError
from pipeline.model_info import Function, ModelInfo

REPLICA_HEADER = "x-tandem-replica"  # the replicas that scored, as the pool's statistics call them
READY_TIMEOUT_S = 2.0
TOP_K = 5

Image = bytes | np.ndarray  # a file of any type that Pillow opens, or uint8 RGB pixels [H, W, 3]
Result = TypeVar("Result")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a request wants of its images. `function` makes scores of logits; None means the model's own."""

    top_k: int = TOP_K
    function: Function | None = None
    embedding: bool = False


@dataclass(frozen=True)
class Scored:
    """The best classes of an image, best first, its embedding where wanted, and the replica that scored."""

    classes: list[int]
    labels: list[str]
    scores: list[float]
    embedding: list[float] | None
    replica: str

    @property
    def predictions(self) -> list[dict[str, str | float]]:
        """The classes as transformers' pipeline gives them."""
        return [{"label": label, "score": score} for label, score in zip(self.labels, self.scores, strict=True)]


class Scorer(Protocol):
    """What stands behind the routes."""

    async def score(self, images: Sequence[Image], wanted: Wanted, within_s: float) -> list[Scored | ImageError]:
        """The images' classes in their order, and for an image that is none, why.

        Raises `Busy` where there is no room, and `UsageError` for what the model cannot give.
        """

    async def describe(self) -> ModelInfo:
        """The model behind it, if it answers now. Raises `TandemError` where it does not."""

    @property
    def info(self) -> ModelInfo:
        """The model behind it, as it was when it last told."""


class Service:
    """The scorer as the routes use it: within limits, and with its errors as answers."""

    def __init__(self, scorer: Scorer, config: EndpointConfig) -> None:
        self.config = config
        self._scorer = scorer
        self._backlog = 0  # images

    async def score(
        self, images: Sequence[Image], wanted: Wanted, *, within_s: float = math.inf
    ) -> list[Scored | ImageError]:
        """The images' classes, and for an image that is none, why. Raises `Problem`."""
        if len(images) > self.config.max_images:
            detail = f"{len(images)} images, and a request may have {self.config.max_images} here; send fewer at a time"
            raise Problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, detail)
        self.check_room()  # also where there was some before the body was read
        within_s = min(within_s, self.config.timeout_s)
        self._backlog += len(images)
        try:
            results = await _answered(self._scorer.score(images, wanted, within_s), within_s) if images else []
        finally:
            self._backlog -= len(images)
        _check_finite(results)
        return results

    async def score_all(self, images: Sequence[Image], wanted: Wanted, *, within_s: float = math.inf) -> list[Scored]:
        """The images' classes. Raises `Problem`, also where one of the images is none."""
        scored = []
        for number, one in enumerate(await self.score(images, wanted, within_s=within_s)):
            if isinstance(one, ImageError):
                detail = str(one) if len(images) == 1 else f"image {number} (of {len(images)}, from 0): {one}"
                raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, detail)
            scored.append(one)
        return scored

    def check_room(self) -> None:
        """Raises `Problem` where so much waits that who asks should rather know at once."""
        if self._backlog >= self.config.max_backlog:
            detail = f"the endpoint is full: {self._backlog} images wait; try again"
            raise Problem(HTTPStatus.SERVICE_UNAVAILABLE, detail, **{"retry-after": "1"})

    @property
    def info(self) -> ModelInfo:
        """The model, whether or not the pool answers now."""
        return self._scorer.info

    async def describe(self) -> ModelInfo:
        """The model, while the pool answers. Raises `Problem`."""
        try:
            return await asyncio.wait_for(self._scorer.describe(), READY_TIMEOUT_S)
        except Exception as error:  # whatever keeps the pool from answering, this is the answer
            raise Problem(HTTPStatus.SERVICE_UNAVAILABLE, "the pool does not answer; try again later") from error


def scored_as_wanted(scores: Scores, info: ModelInfo, wanted: Wanted, replica: str) -> list[Scored]:
    """One result for each image that `scores` holds, with details where they are wanted."""
    top_NK, scores_NK = scores.top_NK, scores.scores_NK
    if other_function(wanted, info):
        assert scores.logits_NC is not None
        assert wanted.function is not None
        top_NK, scores_NK = _best(_apply(wanted.function, scores.logits_NC), wanted.top_k)
    embeddings = scores.embeddings_ND.tolist() if wanted.embedding and scores.embeddings_ND is not None else None
    return [
        Scored(
            classes=top_K,
            labels=[info.labels[index] for index in top_K],
            scores=scores_K,
            embedding=embeddings[number] if embeddings else None,
            replica=replica,
        )
        for number, (top_K, scores_K) in enumerate(zip(top_NK.tolist(), scores_NK.tolist(), strict=True))
    ]


def other_function(wanted: Wanted, info: ModelInfo) -> bool:
    """Whether the scores are wanted by another function than the model's own."""
    return wanted.function not in (None, info.function)


def check_wanted(wanted: Wanted, info: ModelInfo) -> None:
    """Raises `UsageError` for what the model cannot give."""
    if wanted.embedding and info.embedding_size is None:
        raise UsageError(f"{info.model} has no layer whose input is known to be an embedding; ask without embedding")


def _apply(function: Function, logits_NC: np.ndarray) -> np.ndarray:
    if function == "none":
        return logits_NC
    if function == "sigmoid":
        # exp of what is not positive does not overflow
        small_NC: np.ndarray = np.exp(-np.abs(logits_NC))
        return np.where(logits_NC >= 0, 1 / (1 + small_NC), small_NC / (1 + small_NC))
    odds_NC: np.ndarray = np.exp(logits_NC - logits_NC.max(axis=1, keepdims=True))
    odds_NC /= odds_NC.sum(axis=1, keepdims=True)
    return odds_NC


def _best(scores_NC: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """The best classes and their scores, best first, and of equal ones the first."""
    top_NK = np.argsort(-scores_NC, axis=1, kind="stable")[:, :top_k]
    return top_NK, np.take_along_axis(scores_NC, top_NK, axis=1)


def _check_finite(results: Sequence[Scored | ImageError]) -> None:
    """Raises `Problem` where a score or an embedding is no number: JSON has no NaN, and no client expects one."""
    for number, one in enumerate(results):
        if isinstance(one, Scored) and not math.isfinite(sum(one.scores) + sum(one.embedding or ())):
            where = "" if len(results) == 1 else f" of image {number} (of {len(results)}, from 0)"
            detail = f"the model's scores{where} are not finite; serve it with dtype float32, or check its weights"
            raise Problem(HTTPStatus.INTERNAL_SERVER_ERROR, detail)


async def _answered(call: Awaitable[Result], within_s: float) -> Result:
    """What the call gives, and what it raises as a `Problem`."""
    try:
        async with asyncio.timeout(within_s):
            return await call
    except UsageError as error:
        raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, str(error)) from error
    except Busy as error:
        headers = {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}
        raise Problem(HTTPStatus.SERVICE_UNAVAILABLE, f"{error}; try again", **headers) from error
    except (TimeoutError, Expired) as error:
        detail = f"no score within {within_s:g} s; try again later"
        raise Problem(HTTPStatus.GATEWAY_TIMEOUT, detail) from error
    except PoolError as error:
        raise Problem(HTTPStatus.SERVICE_UNAVAILABLE, str(error)) from error
    except Exception as error:
        # Not left to Starlette: it answers in plain text, and raises again into the Serve replica.
        _log.exception("a request failed")
        detail = "the endpoint failed on this request; its log says why"
        raise Problem(HTTPStatus.INTERNAL_SERVER_ERROR, detail) from error
