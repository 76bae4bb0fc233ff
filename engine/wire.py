"""Frames on the socket between server and engine: a length, then msgpack of a tagged struct."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import msgspec

from .config import EngineConfig
from .messages import EngineCommand, EngineReply

if TYPE_CHECKING:
    import asyncio
    import socket

LENGTH = struct.Struct("<I")

encoder = msgspec.msgpack.Encoder()
config_decoder = msgspec.msgpack.Decoder(EngineConfig)
command_decoder = msgspec.msgpack.Decoder(EngineCommand)
reply_decoder = msgspec.msgpack.Decoder(EngineReply)


def frame(message: msgspec.Struct) -> bytes:
    """The bytes of one message."""
    body = encoder.encode(message)
    return LENGTH.pack(len(body)) + body


async def read_frame(reader: asyncio.StreamReader) -> bytes:
    """The body of the next frame; raises IncompleteReadError at the end of the stream."""
    (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
    return await reader.readexactly(length)


def receive_frame(sock: socket.socket) -> bytes | None:
    """The body of the next frame of a blocking socket; None at its end."""
    header = _receive_exactly(sock, LENGTH.size)
    return None if header is None else _receive_exactly(sock, LENGTH.unpack(header)[0])


def _receive_exactly(sock: socket.socket, count: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < count:
        part = sock.recv(count - len(parts))
        if not part:
            return None
        parts += part
    return bytes(parts)
