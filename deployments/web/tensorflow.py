"""TensorFlow Serving's REST API.

    GET  /v1/models/{name}[/versions/{v}]            whether the model is available
    POST /v1/models/{name}[/versions/{v}]:predict    `instances` in rows, or `inputs` in columns
    POST /v1/models/{name}[/versions/{v}]:classify   `examples`

An instance is `{"b64": ...}`, or that under a name. A prediction has the best `classes` and their `scores`.

Source: https://www.tensorflow.org/tfx/serving/api_rest
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Request
from pydantic import BaseModel, BeforeValidator, Field

from deployments.web.bodies import (
    OBJECT,
    Instance,
    InstancesOrInputs,
    documented_answer,
    documented_body,
    parse_json,
    read_body,
)
from deployments.web.naming import VERSION, check_name
from deployments.web.problems import Problem, answers_in, documented, error_json
from deployments.web.scoring import Scored, Service, Wanted

SIGNATURES = ("serving_default", "")
_MODEL = "/v1/models/{name}", "/v1/models/{name}/versions/{version}"


def _column(value: Any) -> Any:
    """The images of `inputs`: a list of them, one alone, or either under the input's name."""
    if isinstance(value, dict) and "b64" not in value and len(value) == 1:
        (value,) = value.values()
    return value if isinstance(value, list) else [value]


class Signed(BaseModel):
    """A request that may name a signature."""

    signature_name: str = ""


class Predict(Signed, InstancesOrInputs):
    """A request to predict. TensorFlow Serving takes either form, and answers in the same."""

    inputs: Annotated[list[Instance] | None, BeforeValidator(_column)] = None


class Classify(Signed):
    """A request to classify: each example is a mapping of one feature, the image."""

    examples: list[Instance] = Field(min_length=1)


Asked = TypeVar("Asked", bound=Signed)


def routes(service: Service) -> APIRouter:
    """The routes of this protocol."""
    router = APIRouter(tags=["tensorflow"], route_class=answers_in(error_json))
    for path in _MODEL:
        _model_routes(router, service, path)
    return router


def _model_routes(router: APIRouter, service: Service, path: str) -> None:
    answers = {**documented_answer(OBJECT), **documented(error_json, 400, 404, 408, 413, 415, 422, 500, 503, 504)}

    async def read(kind: type[Asked], request: Request, name: str, version: str) -> Asked:
        check_name(name, service.info, version)
        asked = await parse_json(kind, await read_body(request, service.config))
        if asked.signature_name not in SIGNATURES:
            detail = f"there is no signature {asked.signature_name!r}; there is {SIGNATURES[0]!r}"
            raise Problem(HTTPStatus.NOT_FOUND, detail)
        return asked

    @router.get(path, responses={**documented_answer(OBJECT), **documented(error_json, 404, 503)})
    async def status(name: str, version: str = VERSION) -> dict[str, Any]:
        """Whether the model is available."""
        check_name(name, await service.describe(), version)
        fine = {"error_code": "OK", "error_message": ""}
        return {"model_version_status": [{"version": VERSION, "state": "AVAILABLE", "status": fine}]}

    @router.post(f"{path}:predict", openapi_extra=documented_body(json=Predict), responses=answers)
    async def predict(request: Request, name: str, version: str = VERSION) -> dict[str, Any]:
        """Scores images."""
        asked = await read(Predict, request, name, version)
        scored = await service.score_all(asked.instances or asked.inputs or [], Wanted())
        if asked.instances is not None:
            return {"predictions": [{"classes": one.labels, "scores": one.scores} for one in scored]}
        return {"outputs": {"classes": [one.labels for one in scored], "scores": [one.scores for one in scored]}}

    @router.post(f"{path}:classify", openapi_extra=documented_body(json=Classify), responses=answers)
    async def classify(request: Request, name: str, version: str = VERSION) -> dict[str, Any]:
        """Scores images; the answer has a list of `[label, score]` for each."""
        asked = await read(Classify, request, name, version)
        return {"results": [_pairs(one) for one in await service.score_all(asked.examples, Wanted())]}


def _pairs(one: Scored) -> list[list[str | float]]:
    return [[label, score] for label, score in zip(one.labels, one.scores, strict=True)]
