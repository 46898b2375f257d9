"""Bodies of requests: read within bounds, unpacked, and taken for what they say they are."""

from __future__ import annotations

import asyncio
import base64
import zlib
from collections.abc import AsyncGenerator
from http import HTTPStatus
from typing import Annotated, Any, Self, TypeVar

from fastapi import Request
from pydantic import BaseModel, BeforeValidator, ValidationError, WithJsonSchema, model_validator
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from deployments.config import EndpointConfig
from deployments.web.problems import Problem, reasons

# curl names the last one for whatever it sends
RAW = ("application/octet-stream", "application/x-image", "application/x-www-form-urlencoded", "")
JSON = "application/json"
MULTIPART = "multipart/form-data"
LONG_JSON = 1 << 18  # bytes, from which on it is not parsed on the event loop

Content = TypeVar("Content", bound=BaseModel)


def media_type(request: Request) -> str:
    """What the body says it is, without parameters, in lower case; empty where it says nothing."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def is_raw(media: str) -> bool:
    """Whether a body of that type is taken for an image file."""
    return media in RAW or media.startswith("image/")


def unknown_type(media: str, *known: str) -> Problem:
    """For a body that is of none of the types that the route takes."""
    detail = f"a body of type {media} is not read here; send {' or '.join(known)}"
    return Problem(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, detail)


async def read_body(request: Request, config: EndpointConfig) -> bytes:
    """The request's body, unpacked where it is compressed.

    Raises `Problem` for an empty one, for one that does not come in time, and as soon as it is known to be too long.
    """
    max_bytes = config.max_body_bytes
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise _too_long(max_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(config.timeout_s):
            async for part in request.stream():
                body += part
                if len(body) > max_bytes:
                    raise _too_long(max_bytes)
    except ClientDisconnect as error:  # nobody reads the answer, but raised on it would be logged as a failure
        raise Problem(HTTPStatus.BAD_REQUEST, "the request was cut off before its end") from error
    except TimeoutError as error:
        detail = f"the body did not come within {config.timeout_s:g} s; send it faster, or less of it"
        raise Problem(HTTPStatus.REQUEST_TIMEOUT, detail) from error
    if not body:
        raise Problem(HTTPStatus.BAD_REQUEST, "the body is empty; send an image file as the body")
    return _unpacked(bytes(body), request.headers.get("content-encoding", "identity").strip().lower(), max_bytes)


def _too_long(max_bytes: int) -> Problem:
    detail = f"a request may have {max_bytes} bytes here; send a smaller one"
    return Problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, detail)


def _unpacked(body: bytes, encoding: str, max_bytes: int) -> bytes:
    if encoding == "identity":
        return body
    if encoding not in ("gzip", "deflate"):
        detail = f"a body with content-encoding {encoding} is not read here; send gzip, deflate or none"
        raise Problem(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, detail)
    inflater = zlib.decompressobj(zlib.MAX_WBITS | 32)  # either header
    try:
        unpacked = inflater.decompress(body, max_bytes + 1)
    except zlib.error as error:
        raise Problem(HTTPStatus.BAD_REQUEST, f"the body is not {encoding}: {error}") from error
    if len(unpacked) > max_bytes:
        raise _too_long(max_bytes)
    if not inflater.eof:
        raise Problem(HTTPStatus.BAD_REQUEST, f"the body, in {encoding}, ends too soon")
    return unpacked


async def parse_json(kind: type[Content], body: bytes) -> Content:
    """The body as what it should be. Raises `Problem`, which says what is wrong and where."""
    try:
        if len(body) < LONG_JSON:
            return kind.model_validate_json(body)
        return await asyncio.to_thread(kind.model_validate_json, body)
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_input=False, include_context=False)
        broken = any(one["type"] == "json_invalid" for one in wrong)
        status = HTTPStatus.BAD_REQUEST if broken else HTTPStatus.UNPROCESSABLE_ENTITY
        raise Problem(status, reasons(wrong)) from error


class _InMemory(MultiPartParser):
    spool_max_size = 1 << 62  # the body is there already, and nothing of it belongs on a disk


async def files_of(request: Request, body: bytes, max_files: int) -> list[bytes]:
    """The files of a multipart body, in their order. Raises `Problem`."""

    async def whole() -> AsyncGenerator[bytes, None]:
        yield body

    if "boundary=" not in request.headers["content-type"]:
        raise Problem(HTTPStatus.BAD_REQUEST, "the multipart body's content-type tells no boundary")
    try:
        parser = _InMemory(request.headers, whole(), max_files=max_files, max_fields=1, max_part_size=len(body))
        form = await parser.parse()
    except MultiPartException as error:
        too_many = error.message.startswith("Too many files")
        status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE if too_many else HTTPStatus.BAD_REQUEST
        raise Problem(status, f"the multipart body cannot be read: {error.message}") from error
    try:
        return [await _file(name, value) for name, value in form.multi_items()]
    finally:
        await form.close()


async def _file(name: str, value: UploadFile | str) -> bytes:
    if isinstance(value, UploadFile):
        return await value.read()
    detail = f"the part {name!r} is no file; send images as files, and options in the query"
    raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, detail)


def from_base64(text: Any) -> Any:
    """The bytes that base64 stands for, plain or in a `data:` URL. Raises `ValueError`."""
    if not isinstance(text, str):
        raise ValueError("an image in JSON is a string of base64")
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError(f"not base64: {error}") from error


Base64 = Annotated[bytes, BeforeValidator(from_base64), WithJsonSchema({"type": "string", "contentEncoding": "base64"})]


def _instance_image(instance: Any) -> Any:
    """The image of an instance as TensorFlow Serving and Vertex AI write them: `{"b64": ...}`, or that under a name."""
    if isinstance(instance, dict) and "b64" not in instance and len(instance) == 1:
        (instance,) = instance.values()
    if isinstance(instance, dict):
        instance = instance.get("b64")
    return from_base64(instance)


_B64 = {"type": "object", "properties": {"b64": {"type": "string", "contentEncoding": "base64"}}, "required": ["b64"]}
Instance = Annotated[
    bytes,
    BeforeValidator(_instance_image),
    WithJsonSchema({"anyOf": [_B64, {"type": "object", "additionalProperties": _B64, "maxProperties": 1}]}),
]


class InstancesOrInputs(BaseModel):
    """A request that has either of two forms; what `inputs` are, its protocol says."""

    instances: list[Instance] | None = None
    inputs: Any = None

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if (self.instances is None) == (self.inputs is None):
            raise ValueError("one of instances and inputs must be there")
        return self


OBJECT = {"type": "object"}  # as a schema


def documented_body(**kinds: Any) -> dict[str, Any]:
    """What OpenAPI says of a body: `raw` files, `files` in a form, or `json` of a model or a schema."""
    file = {"type": "string", "format": "binary"}
    content: dict[str, Any] = {}
    if "json" in kinds:
        content[JSON] = {"schema": schema_of(kinds["json"])}
    if "files" in kinds:
        form = {"type": "object", "properties": {"image": {"type": "array", "items": file}}}
        content[MULTIPART] = {"schema": form}
    if "raw" in kinds:
        content |= {media: {"schema": file} for media in ("application/octet-stream", "image/*")}
    return {"requestBody": {"required": True, "content": content}}


def schema_of(kind: Any) -> dict[str, Any]:
    """A model's JSON schema without references, so that it can stand anywhere."""
    if isinstance(kind, dict):
        return kind
    schema: dict[str, Any] = kind.model_json_schema()
    inlined: dict[str, Any] = _inlined(schema, schema.pop("$defs", {}))
    return inlined


def _inlined(schema: Any, known: dict[str, Any]) -> Any:
    if isinstance(schema, dict):
        if "$ref" in schema:
            return _inlined(known[schema["$ref"].rpartition("/")[2]], known)
        return {name: _inlined(value, known) for name, value in schema.items()}
    if isinstance(schema, list):
        return [_inlined(value, known) for value in schema]
    return schema


def documented_answer(kind: Any) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of a route's success."""
    return {200: {"description": "OK", "content": {JSON: {"schema": schema_of(kind)}}}}
