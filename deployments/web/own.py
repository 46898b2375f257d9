"""Tandem's own protocol: `/predict`, and the routes that tell of health.

    POST /predict    one image as the body, several as files of a form, or several as base64 in JSON
    GET  /healthz    200 while this process lives
    GET  /readyz     200 while the pool answers, otherwise 503

Errors are `application/problem+json` (RFC 9457); their `detail` says what to do. Where a request has several images,
each has an answer of its own, in their order, and a bad one an error.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from deployments.web.bodies import (
    JSON,
    MULTIPART,
    Base64,
    documented_answer,
    documented_body,
    files_of,
    is_raw,
    media_type,
    parse_json,
    read_body,
    schema_of,
    unknown_type,
)
from deployments.web.problems import answers_in, documented, problem_json
from deployments.web.scoring import REPLICA_HEADER, TOP_K, Scored, Service, Wanted
from pipeline.errors import ImageError
from pipeline.model_info import Function

NDJSON = "application/x-ndjson"
MOST_CLASSES = 100_000

TopK = Annotated[int, Field(ge=1, le=MOST_CLASSES, description="how many classes, best first")]


class Options(BaseModel):
    """What may be wanted of images."""

    model_config = ConfigDict(extra="forbid")

    top_k: TopK = TOP_K
    function_to_apply: Function | None = Field(None, description="makes scores of logits; null means the model's own")
    embedding: bool = Field(False, description="whether to give the embedding too")

    @property
    def wanted(self) -> Wanted:
        """The same, for the scorer."""
        return Wanted(top_k=self.top_k, function=self.function_to_apply, embedding=self.embedding)


class Images(Options):
    """Several images in JSON."""

    images: list[Base64] = Field(min_length=1)


class Prediction(BaseModel):
    """One class of an image, and its score."""

    label: str
    score: float


class Answer(BaseModel):
    """What is told of one image."""

    predictions: list[Prediction]
    embedding: list[float] | None = None


class Failure(BaseModel):
    """Why an image has no answer."""

    error: str


class Answers(BaseModel):
    """What is told of several images, in their order."""

    results: list[Answer | Failure]


def routes(service: Service) -> APIRouter:
    """The routes of this protocol."""
    router = APIRouter(tags=["tandem"], route_class=answers_in(problem_json))

    @router.post(
        "/predict",
        openapi_extra=documented_body(raw=True, files=True, json=Images),
        responses={
            **documented_answer({"anyOf": [schema_of(Answer), schema_of(Answers)]}),
            **documented(problem_json, 400, 408, 413, 415, 422, 500, 503, 504),
        },
    )
    async def predict(request: Request, options: Annotated[Options, Query()]) -> Response:
        """Scores one image, or several."""
        body, media = await read_body(request, service.config), media_type(request)
        lines = NDJSON in request.headers.get("accept", "")
        if is_raw(media):
            (scored,) = await service.score_all([body], options.wanted)
            return _response([scored], _told(scored), lines)
        if media == JSON:
            content = await parse_json(Images, body)
            images, wanted = list(content.images), content.wanted
        elif media == MULTIPART:
            images, wanted = await files_of(request, body, service.config.max_images), options.wanted
        else:
            raise unknown_type(media, "an image", MULTIPART, JSON)
        results = await service.score(images, wanted)
        return _response(results, {"results": [_told(one) for one in results]}, lines)

    @router.get("/healthz")
    async def healthz() -> dict[Literal["status"], Literal["ok"]]:
        """Answers while this process lives."""
        return {"status": "ok"}

    @router.get("/readyz", responses=documented(problem_json, 503))
    async def readyz() -> dict[Literal["status", "model", "revision"], str]:
        """Answers with the model while the pool does."""
        info = await service.describe()
        return {"status": "ready", "model": info.model, "revision": info.revision}

    return router


def _told(one: Scored | ImageError) -> dict[str, Any]:
    if isinstance(one, ImageError):
        return {"error": str(one)}
    return {"predictions": one.predictions, **({"embedding": one.embedding} if one.embedding else {})}


def _response(results: list[Scored | ImageError], content: dict[str, Any], lines: bool) -> Response:
    """The answer in JSON, or with one line for each image."""
    replicas = dict.fromkeys(one.replica for one in results if isinstance(one, Scored))
    headers = {REPLICA_HEADER: ",".join(replicas)} if replicas else {}
    if not lines:
        return JSONResponse(content, headers=headers)
    text = "".join(json.dumps(_told(one)) + "\n" for one in results)
    return Response(text, headers=headers, media_type=NDJSON)
