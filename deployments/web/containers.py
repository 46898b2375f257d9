"""The contracts of Vertex AI's and SageMaker's model containers.

    GET  /ping             200 while the pool answers (SageMaker)
    POST /invocations      an image, or JSON as Vertex AI or Hugging Face write it (SageMaker)
    GET  health_route      200 while the pool answers (Vertex AI: AIP_HEALTH_ROUTE)
    POST predict_route     `instances` and `parameters` to `predictions` (Vertex AI: AIP_PREDICT_ROUTE)

The last two are there where the configuration names them. A bad image is an error in its own place of `predictions`, so
that it does not fail the others of its batch.

Sources: https://cloud.google.com/vertex-ai/docs/predictions/custom-container-requirements and
https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-inference-code.html
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, BeforeValidator, Field, model_validator

from deployments.web.bodies import (
    JSON,
    Base64,
    Instance,
    documented_answer,
    documented_body,
    is_raw,
    media_type,
    parse_json,
    read_body,
    unknown_type,
)
from deployments.web.huggingface import Parameters
from deployments.web.problems import answers_in, documented, error_json
from deployments.web.scoring import TOP_K, Service, Wanted
from pipeline.errors import ImageError

_Parameters = Annotated[Parameters, BeforeValidator(lambda value: {} if value is None else value)]
_OBJECT = {"type": "object"}


class Instances(BaseModel):
    """Vertex AI's request."""

    instances: list[Instance]
    parameters: _Parameters = Field(default_factory=Parameters)


class Invocation(BaseModel):
    """SageMaker's request in JSON: `instances`, or `inputs` as its Hugging Face containers take them."""

    instances: list[Instance] | None = None
    inputs: Base64 | None = None
    parameters: _Parameters = Field(default_factory=Parameters)

    @model_validator(mode="after")
    def _one_form(self) -> Invocation:
        if (self.instances is None) == (self.inputs is None):
            raise ValueError("one of instances and inputs must be there")
        return self


def routes(service: Service) -> APIRouter:
    """The routes of both contracts."""
    router = APIRouter(tags=["containers"], route_class=answers_in(error_json))
    failures = documented(error_json, 400, 408, 413, 415, 422, 500, 503, 504)
    config = service.config

    async def health() -> dict[str, str]:
        """Answers while the pool does."""
        await service.describe()
        return {"status": "ready"}

    for path in filter(None, ("/ping", config.health_route)):
        router.get(path, responses=documented(error_json, 503))(health)

    @router.post(
        "/invocations",
        openapi_extra=documented_body(raw=True, json=Invocation),
        responses={**documented_answer({"anyOf": [{"type": "array"}, _OBJECT]}), **failures},
    )
    async def invocations(request: Request) -> Response:
        """Scores one image, or the instances in JSON."""
        body, media = await read_body(request, config), media_type(request)
        if is_raw(media):
            (scored,) = await service.score_all([body], Wanted())
            return JSONResponse(scored.predictions)
        if media != JSON:
            raise unknown_type(media, "an image", JSON)
        asked = await parse_json(Invocation, body)
        if asked.inputs is not None:
            (scored,) = await service.score_all([asked.inputs], _wanted(asked.parameters))
            return JSONResponse(scored.predictions)
        return JSONResponse(await _predictions(service, asked.instances or [], asked.parameters))

    if config.predict_route:

        @router.post(
            config.predict_route,
            openapi_extra=documented_body(json=Instances),
            responses={**documented_answer(_OBJECT), **failures},
        )
        async def predict(request: Request) -> dict[str, Any]:
            """Scores the instances."""
            asked = await parse_json(Instances, await read_body(request, config))
            return await _predictions(service, asked.instances, asked.parameters)

    return router


def _wanted(parameters: Parameters) -> Wanted:
    return Wanted(top_k=parameters.top_k or TOP_K, function=parameters.function_to_apply)


async def _predictions(service: Service, images: list[bytes], parameters: Parameters) -> dict[str, Any]:
    results = await service.score(images, _wanted(parameters))
    told = [{"error": str(one)} if isinstance(one, ImageError) else one.predictions for one in results]
    return {"predictions": told}
