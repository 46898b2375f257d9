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

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from deployments.web.bodies import (
    JSON,
    OBJECT,
    Base64,
    Instance,
    InstancesOrInputs,
    documented_answer,
    documented_body,
    is_raw,
    media_type,
    parse_json,
    read_body,
    unknown_type,
)
from deployments.web.huggingface import Parameters, ParametersOrNull
from deployments.web.problems import answers_in, documented, error_json
from deployments.web.scoring import Service, Wanted
from pipeline.errors import ImageError


class Instances(BaseModel):
    """Vertex AI's request."""

    instances: list[Instance]
    parameters: ParametersOrNull = Field(default_factory=Parameters)


class Invocation(InstancesOrInputs):
    """SageMaker's request in JSON: `instances`, or `inputs` as its Hugging Face containers take them."""

    inputs: Base64 | None = None
    parameters: ParametersOrNull = Field(default_factory=Parameters)


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
        responses={**documented_answer({"anyOf": [{"type": "array"}, OBJECT]}), **failures},
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
            (scored,) = await service.score_all([asked.inputs], asked.parameters.wanted)
            return JSONResponse(scored.predictions)
        return JSONResponse(await _predictions(service, asked.instances or [], asked.parameters))

    if config.predict_route:

        @router.post(
            config.predict_route,
            openapi_extra=documented_body(json=Instances),
            responses={**documented_answer(OBJECT), **failures},
        )
        async def predict(request: Request) -> dict[str, Any]:
            """Scores the instances."""
            asked = await parse_json(Instances, await read_body(request, config))
            return await _predictions(service, asked.instances, asked.parameters)

    return router


async def _predictions(service: Service, images: list[bytes], parameters: Parameters) -> dict[str, Any]:
    results = await service.score(images, parameters.wanted)
    told = [{"error": str(one)} if isinstance(one, ImageError) else one.predictions for one in results]
    return {"predictions": told}
