"""TensorFlow Serving's REST API.

    GET  /v1/models/{name}[/versions/{v}]            whether the model is available
    POST /v1/models/{name}[/versions/{v}]:predict    `instances` in rows, or `inputs` in columns
    POST /v1/models/{name}[/versions/{v}]:classify   `examples`

An instance is `{"b64": ...}`, or that under a name. A prediction has the best `classes` and their `scores`.

Source: https://www.tensorflow.org/tfx/serving/api_rest
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, BeforeValidator, Field, model_validator

from deployments.web.bodies import Instance, documented_answer, documented_body, parse_json, read_body
from deployments.web.naming import VERSION, check_name
from deployments.web.problems import Problem, answers_in, documented, error_json
from deployments.web.scoring import Scored, Service, Wanted

SIGNATURES = ("serving_default", "")
_OBJECT = {"type": "object"}
_MODEL = "/v1/models/{name}", "/v1/models/{name}/versions/{version}"


def _column(value: Any) -> Any:
    """The images of `inputs`: a list of them, one alone, or either under the input's name."""
    if isinstance(value, dict) and "b64" not in value and len(value) == 1:
        (value,) = value.values()
    return value if isinstance(value, list) else [value]


class Predict(BaseModel):
    """A request to predict. TensorFlow Serving takes either form, and answers in the same."""

    signature_name: str = ""
    instances: list[Instance] | None = None
    inputs: Annotated[list[Instance] | None, BeforeValidator(_column)] = None

    @model_validator(mode="after")
    def _one_form(self) -> Predict:
        if (self.instances is None) == (self.inputs is None):
            raise ValueError("one of instances and inputs must be there")
        return self


class Classify(BaseModel):
    """A request to classify: each example is a mapping of one feature, the image."""

    signature_name: str = ""
    examples: list[Instance] = Field(min_length=1)


def routes(service: Service) -> APIRouter:
    """The routes of this protocol."""
    router = APIRouter(tags=["tensorflow"], route_class=answers_in(error_json))
    for path in _MODEL:
        _model_routes(router, service, path)
    return router


def _model_routes(router: APIRouter, service: Service, path: str) -> None:
    failures = documented(error_json, 400, 404, 408, 413, 415, 422, 500, 503, 504)

    @router.get(path, responses={**documented_answer(_OBJECT), **documented(error_json, 404, 503)})
    async def status(name: str, version: str = VERSION) -> dict[str, Any]:
        """Whether the model is available."""
        check_name(name, await service.describe(), version)
        fine = {"error_code": "OK", "error_message": ""}
        return {"model_version_status": [{"version": VERSION, "state": "AVAILABLE", "status": fine}]}

    @router.post(
        f"{path}:predict",
        openapi_extra=documented_body(json=Predict),
        responses={**documented_answer(_OBJECT), **failures},
    )
    async def predict(request: Request, name: str, version: str = VERSION) -> dict[str, Any]:
        """Scores images."""
        check_name(name, service.info, version)
        asked = await parse_json(Predict, await read_body(request, service.config))
        _check_signature(asked.signature_name)
        scored = await service.score_all(asked.instances or asked.inputs or [], Wanted())
        if asked.instances is not None:
            return {"predictions": [{"classes": one.labels, "scores": one.scores} for one in scored]}
        return {"outputs": {"classes": [one.labels for one in scored], "scores": [one.scores for one in scored]}}

    @router.post(
        f"{path}:classify",
        openapi_extra=documented_body(json=Classify),
        responses={**documented_answer(_OBJECT), **failures},
    )
    async def classify(request: Request, name: str, version: str = VERSION) -> dict[str, Any]:
        """Scores images; the answer has a list of `[label, score]` for each."""
        check_name(name, service.info, version)
        asked = await parse_json(Classify, await read_body(request, service.config))
        _check_signature(asked.signature_name)
        return {"results": [_pairs(one) for one in await service.score_all(asked.examples, Wanted())]}


def _check_signature(name: str) -> None:
    if name not in SIGNATURES:
        raise Problem(HTTPStatus.NOT_FOUND, f"there is no signature {name!r}; there is {SIGNATURES[0]!r}")


def _pairs(one: Scored) -> list[list[str | float]]:
    return [[label, score] for label, score in zip(one.labels, one.scores, strict=True)]
