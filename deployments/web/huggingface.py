"""Hugging Face's inference API for image classification, as `huggingface_hub.InferenceClient` speaks it.

    POST /              the image as the body, or JSON with `inputs` in base64 and `parameters`
    POST /models/{id}   the same, for who names the model

Source: https://huggingface.co/docs/inference-providers/tasks/image-classification
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, BeforeValidator, Field, RootModel

from deployments.web.bodies import (
    JSON,
    Base64,
    documented_answer,
    documented_body,
    is_raw,
    media_type,
    parse_json,
    read_body,
    unknown_type,
)
from deployments.web.naming import check_name
from deployments.web.own import Prediction, TopK
from deployments.web.problems import answers_in, documented, error_json
from deployments.web.scoring import REPLICA_HEADER, TOP_K, Service, Wanted
from pipeline.model_info import Function


class Parameters(BaseModel):
    """Of what a client may send, these do something here; null is the same as nothing."""

    top_k: TopK | None = None
    function_to_apply: Function | None = None

    @property
    def wanted(self) -> Wanted:
        """The same, for the scorer."""
        return Wanted(top_k=self.top_k or TOP_K, function=self.function_to_apply)


ParametersOrNull = Annotated[Parameters, BeforeValidator(lambda value: {} if value is None else value)]


class Task(BaseModel):
    """A task in JSON."""

    inputs: Base64
    parameters: ParametersOrNull = Field(default_factory=Parameters)


class Classes(RootModel[list[Prediction]]):
    """The best classes, best first."""


def routes(service: Service) -> APIRouter:
    """The routes of this protocol."""
    router = APIRouter(tags=["huggingface"], route_class=answers_in(error_json))
    documentation: dict[str, Any] = {
        "openapi_extra": documented_body(raw=True, json=Task),
        "responses": {
            **documented_answer(Classes),
            **documented(error_json, 400, 404, 408, 413, 415, 422, 500, 503, 504),
        },
    }

    @router.post("/", **documentation)
    async def task(request: Request) -> Response:
        """Classifies one image."""
        body, media = await read_body(request, service.config), media_type(request)
        wanted = Wanted()
        if media == JSON:
            content = await parse_json(Task, body)
            body, wanted = content.inputs, content.parameters.wanted
        elif not is_raw(media):
            raise unknown_type(media, "an image", JSON)
        (scored,) = await service.score_all([body], wanted)
        return JSONResponse(scored.predictions, headers={REPLICA_HEADER: scored.replica})

    @router.post("/models/{name:path}", **documentation)
    async def task_of_model(request: Request, name: str) -> Response:
        """Classifies one image with the model of that name."""
        check_name(name, service.info)
        return await task(request)

    return router
