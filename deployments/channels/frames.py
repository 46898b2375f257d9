"""What goes over a channel: frames of a head, a JSON object, and the bytes of arrays that it names.

A client's first bytes are no frame but a greeting with the replica's token. No pickle: whoever finds the port and has
no token is not heard, and whoever has it can send numbers alone.
"""

from __future__ import annotations

import asyncio
import json
import math
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

GREETING = b"tandem-channel-2 "  # with a number for the format of what follows
TOKEN_BYTES = 32
JSON_BYTES = 1 << 16
ARRAY_BYTES = 1 << 30
BUFFER_BYTES = 1 << 18
LOST_S = 10  # after which an end whose machine is gone counts as lost

_HEAD = struct.Struct("!QII")  # the call's number; the bytes of the JSON and of the arrays
_KINDS = "uif"  # of numbers in arrays


@dataclass(frozen=True)
class Address:
    """Where a replica listens, and the token that it wants to hear."""

    replica: str
    host: str
    port: int
    token: bytes = field(repr=False)


@dataclass(frozen=True)
class Frame:
    """What one end tells the other about the call with that number; 0 is no call's."""

    number: int
    told: dict[str, Any]
    arrays: Mapping[str, np.ndarray]


def send(writer: asyncio.StreamWriter, frame: Frame) -> None:
    """Sends a frame, without waiting for it to be gone."""
    arrays = {name: np.ascontiguousarray(array) for name, array in frame.arrays.items()}
    shapes = {name: [array.dtype.str, array.shape] for name, array in arrays.items()}
    text = json.dumps([frame.told, shapes]).encode()
    head = _HEAD.pack(frame.number, len(text), sum(array.nbytes for array in arrays.values()))
    writer.writelines([head + text, *(array.data.cast("B") for array in arrays.values() if array.size)])


async def receive(reader: asyncio.StreamReader) -> Frame:
    """The next frame; its arrays are read-only.

    Raises `EOFError` and `OSError` at the end, and others for what is no frame.
    """
    number, text_bytes, array_bytes = _HEAD.unpack(await reader.readexactly(_HEAD.size))
    if text_bytes > JSON_BYTES or array_bytes > ARRAY_BYTES:
        raise ValueError(f"a frame of {text_bytes} and {array_bytes} bytes")
    told, shapes = json.loads(await reader.readexactly(text_bytes))
    body = await reader.readexactly(array_bytes)
    arrays, offset = {}, 0
    for name, (kind, shape) in shapes.items():
        dtype = np.dtype(kind)
        if dtype.kind not in _KINDS:
            raise ValueError(f"an array of {kind}")
        arrays[name] = np.frombuffer(body, dtype, math.prod(shape), offset).reshape(shape)
        offset += arrays[name].nbytes
    return Frame(number, told, arrays)


def expect_loss(writer: asyncio.StreamWriter) -> None:
    """Has the system end a connection whose other end has gone without a word."""
    one: socket.socket = writer.get_extra_info("socket")
    one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, LOST_S // 2)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, LOST_S * 1000)
