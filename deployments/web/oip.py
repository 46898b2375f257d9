"""The Open Inference Protocol, version 2, as KServe and Triton speak it over HTTP.

The model has one input, either `image` (BYTES [N], image files; in JSON as base64) or `pixels` (UINT8 [N, H, W, 3],
RGB of any size), and the outputs `scores` (FP32 [N, classes], in the order of the classes), `label` (BYTES [N], the
best class) and `embedding` (FP32 [N, size]). With the parameter `classification` an output of scores becomes BYTES
[N, k] of `score:index:label`, best first.

Sources: https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md and
https://github.com/triton-inference-server/server/tree/main/docs/protocol
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response

from deployments.web.bodies import OBJECT, documented_answer, documented_body, parse_json, read_body
from deployments.web.naming import VERSION, check_name, short_name
from deployments.web.problems import Problem, answers_in, documented, error_json
from deployments.web.scoring import Image, Scored, Service, Wanted
from deployments.web.tensors import InferRequest, OutputWanted, TensorOut, read_tensors, split_body, write_tensors
from pipeline import __version__
from pipeline.model_info import ModelInfo

LENGTH_HEADER = "inference-header-content-length"
IMAGE, PIXELS = "image", "pixels"
SCORES, LABEL, EMBEDDING = "scores", "label", "embedding"
_MODEL = "/v2/models/{name}", "/v2/models/{name}/versions/{version}"


def routes(service: Service) -> APIRouter:
    """The routes of this protocol."""
    router = APIRouter(tags=["oip"], route_class=answers_in(error_json))
    told = documented_answer(OBJECT)

    @router.get("/v2/health/live", responses=told)
    async def live() -> dict[str, bool]:
        """Answers while this process lives."""
        return {"live": True}

    @router.get("/v2/health/ready", responses={**told, **documented(error_json, 503)})
    async def ready() -> dict[str, bool]:
        """Answers while the pool does."""
        await service.describe()
        return {"ready": True}

    @router.get("/v2", responses=told)
    async def server() -> dict[str, Any]:
        """What serves."""
        return {"name": "tandem", "version": __version__, "extensions": ["binary_tensor_data", "classification"]}

    for path in _MODEL:
        _model_routes(router, service, path)
    return router


def _model_routes(router: APIRouter, service: Service, path: str) -> None:
    unknown = documented(error_json, 404, 503)

    @router.get(f"{path}/ready", responses={**documented_answer(OBJECT), **unknown})
    async def model_ready(name: str, version: str = VERSION) -> dict[str, Any]:
        """Answers while the pool does."""
        check_name(name, await service.describe(), version)
        return {"name": name, "ready": True}

    @router.get(path, responses={**documented_answer(OBJECT), **unknown})
    async def model(name: str, version: str = VERSION) -> dict[str, Any]:
        """The model's inputs and outputs."""
        info = service.info
        check_name(name, info, version)
        return _metadata(info)

    @router.post(
        f"{path}/infer",
        openapi_extra=documented_body(json=InferRequest),
        responses={
            **documented_answer(OBJECT),
            **documented(error_json, 400, 404, 408, 413, 415, 422, 500, 503, 504),
        },
    )
    async def infer(request: Request, name: str, version: str = VERSION) -> Response:
        """Scores images."""
        info = service.info
        check_name(name, info, version)
        text, binary = split_body(await read_body(request, service.config), request.headers.get(LENGTH_HEADER))
        asked = await parse_json(InferRequest, text)
        outputs = asked.outputs or [OutputWanted(name=SCORES), OutputWanted(name=LABEL)]
        wanted = Wanted(top_k=len(info.labels), embedding=any(one.name == EMBEDDING for one in outputs))
        images = await asyncio.to_thread(_images, asked, binary, service.config.max_images)
        scored = await service.score_all(images, wanted, within_s=_within_s(asked))
        all_binary = bool(asked.parameters.get("binary_data_output", False))
        told = [_output(one, scored, len(info.labels), all_binary) for one in outputs]
        head = {"model_name": name, "model_version": version, **({"id": asked.id} if asked.id else {})}
        body, length = write_tensors(head, told)
        if length is None:
            return Response(body, media_type="application/json")
        return Response(body, headers={LENGTH_HEADER: str(length)}, media_type="application/octet-stream")


def _metadata(info: ModelInfo) -> dict[str, Any]:
    outputs = [_tensor(SCORES, "FP32", -1, len(info.labels)), _tensor(LABEL, "BYTES", -1)]
    if info.embedding_size is not None:
        outputs.append(_tensor(EMBEDDING, "FP32", -1, info.embedding_size))
    return {
        "name": short_name(info),
        "versions": [VERSION],
        "platform": "tandem",
        "inputs": [_tensor(IMAGE, "BYTES", -1), _tensor(PIXELS, "UINT8", -1, -1, -1, 3)],
        "outputs": outputs,
    }


def _tensor(name: str, datatype: str, *shape: int) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": list(shape)}


def _images(asked: InferRequest, binary: memoryview, most: int) -> Sequence[Image]:
    """The images of the request's one input, and not many more than `most`. Raises `Problem`."""
    inputs = read_tensors(asked.inputs, binary)
    if len(asked.inputs) != 1 or not inputs.keys() <= {IMAGE, PIXELS}:
        told = ", ".join(one.name for one in asked.inputs)
        detail = f"the inputs are {told}; send one: {IMAGE!r} (BYTES [N]) or {PIXELS!r} (UINT8 [N, H, W, 3])"
        raise Problem(HTTPStatus.BAD_REQUEST, detail)
    ((name, data),) = inputs.items()
    (tensor,) = asked.inputs
    if name == IMAGE and isinstance(data, list):
        return data
    if name == PIXELS and isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.shape[3:] == (3,):
        return list(data[: most + 1])  # of images without pixels, a body has any number
    shapes = {IMAGE: "BYTES [N]", PIXELS: "UINT8 [N, H, W, 3]"}
    detail = f"input {name!r} is {tensor.datatype} {tensor.shape}; it must be {shapes[name]}"
    raise Problem(HTTPStatus.BAD_REQUEST, detail)


def _within_s(asked: InferRequest) -> float:
    """The request's own deadline: Triton has it in microseconds."""
    timeout_us = asked.parameters.get("timeout")
    return timeout_us / 1e6 if isinstance(timeout_us, int | float) and timeout_us > 0 else math.inf


def _output(output: OutputWanted, scored: list[Scored], classes: int, all_binary: bool) -> TensorOut:
    """One output of the response. Raises `Problem` for one that there is not."""
    binary = bool(output.parameters.get("binary_data", all_binary))
    if output.name == SCORES:
        top_k = output.parameters.get("classification")
        data = _scores(scored, classes) if top_k is None else _classified(scored, top_k)
    elif output.name == LABEL:
        data = _of_bytes([one.labels[0] for one in scored], (len(scored),))
    elif output.name == EMBEDDING:
        data = np.array([one.embedding for one in scored], np.float32)
    else:
        detail = f"there is no output {output.name!r}; there are {SCORES}, {LABEL} and {EMBEDDING}"
        raise Problem(HTTPStatus.BAD_REQUEST, detail)
    return TensorOut(output.name, data, binary)


def _scores(scored: list[Scored], classes: int) -> np.ndarray:
    scores_NC = np.empty((len(scored), classes), np.float32)
    for number, one in enumerate(scored):
        scores_NC[number, one.classes] = one.scores
    return scores_NC


def _classified(scored: list[Scored], top_k: Any) -> np.ndarray:
    if not isinstance(top_k, int) or top_k < 1:
        raise Problem(HTTPStatus.BAD_REQUEST, f"classification is {top_k}; it must be how many classes, at least 1")
    rows = [list(zip(one.scores, one.classes, one.labels, strict=True))[:top_k] for one in scored]
    flat = [f"{score:f}:{index}:{label}" for row in rows for score, index, label in row]
    return _of_bytes(flat, (len(rows), len(flat) // max(1, len(rows))))


def _of_bytes(texts: list[str], shape: tuple[int, ...]) -> np.ndarray:
    data = np.empty(len(texts), object)
    data[:] = [text.encode() for text in texts]
    return data.reshape(shape)
