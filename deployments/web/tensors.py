"""Tensors on the wire of the Open Inference Protocol, in JSON and in the binary extension.

A request with binary data is JSON, then the data of one input after the other: little-endian numbers in row order, and
of BYTES elements each its length in 4 bytes and then itself. A response is written the same way.

Source: https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from http import HTTPStatus
from math import prod
from typing import Any

import numpy as np
from pydantic import BaseModel, Field

from deployments.web.bodies import from_base64
from deployments.web.problems import Problem

KINDS = {"UINT8": np.uint8, "FP32": np.float32}  # of numbers
BYTES = "BYTES"


class TensorIn(BaseModel):
    """An input as it stands in JSON."""

    name: str
    datatype: str
    shape: list[int] = Field(max_length=8)
    parameters: dict[str, Any] = {}
    data: Any = None


class OutputWanted(BaseModel):
    """An output that is asked for."""

    name: str
    parameters: dict[str, Any] = {}


class InferRequest(BaseModel):
    """A request as it stands in JSON."""

    id: str | None = None
    inputs: list[TensorIn] = Field(min_length=1, max_length=8)
    outputs: list[OutputWanted] = []
    parameters: dict[str, Any] = {}


@dataclass(frozen=True)
class TensorOut:
    """An output: `data` are numbers of shape and type, or of BYTES an array of objects that are bytes."""

    name: str
    data: np.ndarray
    binary: bool

    @property
    def datatype(self) -> str:
        """As the protocol calls it."""
        return (
            BYTES if self.data.dtype == object else {kind: name for name, kind in KINDS.items()}[self.data.dtype.type]
        )


def split_body(body: bytes, json_length: str | None) -> tuple[bytes, memoryview]:
    """The JSON and the binary data behind it. Raises `Problem`."""
    if json_length is None:
        return body, memoryview(b"")
    if not json_length.isdigit() or int(json_length) > len(body):
        detail = (
            f"Inference-Header-Content-Length is {json_length}; it must be a number, at most the body's {len(body)}"
        )
        raise Problem(HTTPStatus.BAD_REQUEST, detail)
    return body[: int(json_length)], memoryview(body)[int(json_length) :]


def read_tensors(inputs: list[TensorIn], binary: memoryview) -> dict[str, list[bytes] | np.ndarray]:
    """The inputs by name: BYTES as a list of its elements, in order, numbers as an array. Raises `Problem`."""
    found: dict[str, list[bytes] | np.ndarray] = {}
    for tensor in inputs:
        if tensor.datatype != BYTES and tensor.datatype not in KINDS:
            raise _wrong(tensor, f"is of {tensor.datatype}; send {BYTES} or UINT8")
        if any(size < 0 for size in tensor.shape):
            raise _wrong(tensor, f"has the shape {tensor.shape}, with a size below 0")
        size = tensor.parameters.get("binary_data_size")
        if "shared_memory_region" in tensor.parameters:
            raise _wrong(tensor, "is in shared memory, which is not read here; send its data")
        if size is None:
            found[tensor.name] = _from_json(tensor)
            continue
        if not isinstance(size, int) or not 0 <= size <= len(binary):
            raise _wrong(tensor, f"has a binary_data_size of {size}, and {len(binary)} bytes are left in the body")
        found[tensor.name] = _from_binary(tensor, binary[:size])
        binary = binary[size:]
    if len(binary):
        raise Problem(HTTPStatus.BAD_REQUEST, f"{len(binary)} bytes of the body belong to no input")
    return found


def _from_json(tensor: TensorIn) -> list[bytes] | np.ndarray:
    if not isinstance(tensor.data, list):
        raise _wrong(tensor, "has no data, which is to be a list")
    try:
        if tensor.datatype != BYTES:
            numbers = np.array(tensor.data)
            if numbers.dtype.kind not in "iuf":
                raise ValueError(f"numbers of one shape, not {numbers.dtype}")
            with np.errstate(invalid="ignore", over="ignore"):
                cast = numbers.astype(KINDS[tensor.datatype])
            if tensor.datatype == "UINT8" and not np.array_equal(cast, numbers):
                raise ValueError("whole numbers from 0 to 255")
            return cast.reshape(tensor.shape)
        elements = [from_base64(element) for element in _flat(tensor.data)]
    except ValueError as error:
        raise _wrong(tensor, f"has data that does not fit: {error}") from error
    return _checked(tensor, elements)


def _flat(data: list[Any]) -> list[Any]:
    """The elements of a list, or of the lists of one each in it."""
    return [element[0] if isinstance(element, list) and len(element) == 1 else element for element in data]


def _from_binary(tensor: TensorIn, data: memoryview) -> list[bytes] | np.ndarray:
    if tensor.datatype != BYTES:
        kind = np.dtype(KINDS[tensor.datatype])
        if prod(tensor.shape) * kind.itemsize != len(data):
            raise _wrong(tensor, f"has {len(data)} bytes for the shape {tensor.shape}")
        return np.frombuffer(data, kind).reshape(tensor.shape)
    elements, at = [], 0
    while at < len(data):
        end = at + 4 + int.from_bytes(data[at : at + 4], "little")
        if at + 4 > len(data) or end > len(data):
            raise _wrong(tensor, "ends within an element")
        elements.append(bytes(data[at + 4 : end]))
        at = end
    return _checked(tensor, elements)


def _checked(tensor: TensorIn, elements: list[bytes]) -> list[bytes]:
    if prod(tensor.shape) != len(elements):
        raise _wrong(tensor, f"has {len(elements)} elements for the shape {tensor.shape}")
    return elements


def _wrong(tensor: TensorIn, what: str) -> Problem:
    return Problem(HTTPStatus.BAD_REQUEST, f"input {tensor.name!r} {what}")


def write_tensors(head: dict[str, Any], outputs: list[TensorOut]) -> tuple[bytes, int | None]:
    """A response's body, and the length of its JSON where there is binary data behind it."""
    told, behind = [], []
    for output in outputs:
        one: dict[str, Any] = {"name": output.name, "datatype": output.datatype, "shape": list(output.data.shape)}
        if output.binary:
            data = _to_binary(output.data)
            behind.append(data)
            one["parameters"] = {"binary_data_size": len(data)}
        else:
            flat = output.data.flatten().tolist()
            one["data"] = [element.decode() for element in flat] if output.datatype == BYTES else flat
        told.append(one)
    text = json.dumps({**head, "outputs": told}).encode()
    return b"".join([text, *behind]), len(text) if behind else None


def _to_binary(data: np.ndarray) -> bytes:
    if data.dtype != object:
        return data.astype(data.dtype.newbyteorder("<")).tobytes()
    return b"".join(struct.pack("<I", len(element)) + element for element in data.flatten())
