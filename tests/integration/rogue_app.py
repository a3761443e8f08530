"""A client app whose devices misbehave, each in its own way; two of them are honest."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Error, Message
from flwr.clientapp import ClientApp

from privtune_flwr.client_app import app as honest


def _smashed(reply: Message, change: Callable[[np.ndarray], np.ndarray]) -> Message:
    record = reply.content.array_records["smashed"]
    record["values"] = Array(change(record["values"].numpy()))
    return reply


def _poison(values: np.ndarray, number: float) -> np.ndarray:
    values = values.copy()
    values[0, 0] = number
    return values


def _header(reply: Message, key: str, value: int) -> Message:
    reply.content.config_records["release"][key] = value
    return reply


def _lengths(reply: Message) -> Message:
    record = reply.content.array_records["smashed"]
    lengths = record["lengths"].numpy().copy()
    lengths[0] = 60_000
    record["lengths"] = Array(lengths)
    return reply


def _oversize(reply: Message) -> Message:
    array = reply.content.array_records["smashed"]["values"]
    blob = Array(dtype=array.dtype, shape=array.shape, stype=array.stype, data=array.data * 20)
    reply.content.array_records["smashed"]["values"] = blob
    return reply


def _extra(reply: Message) -> Message:
    reply.content["gift"] = ArrayRecord({"x": Array(np.zeros(3))})
    return reply


def _fail(message: Message) -> Message:
    return Message(Error(code=200, reason="no wish to take part"), reply_to=message)


CORRUPT: dict[int, Callable[[Message, Message], Message]] = {
    2: lambda _, r: _smashed(r, lambda v: _poison(v, float("nan"))),
    3: lambda _, r: _smashed(r, lambda v: v[:-1]),
    4: lambda _, r: _header(r, "chunk", 7),
    5: lambda _, r: _smashed(r, lambda v: v.astype(np.float64)),
    6: lambda _, r: _oversize(r),
    7: lambda _, r: _lengths(r),
    8: lambda _, r: _extra(r),
    9: lambda m, _: _fail(m),
    10: lambda _, r: _smashed(r, lambda v: _poison(v, float("inf"))),
    # the chunk before last, again: a replay
    11: lambda _, r: _header(r, "chunk", 0),
}


class RogueApp(ClientApp):
    """Answer honestly, then spoil the answer."""

    def __call__(self, message: Message, context: Context) -> Message:
        reply = honest(message, context)
        partition = int(context.node_config["partition-id"])
        request = message.content.config_records["request"]
        trains = message.metadata.message_type == "train.release" and request["split"] == "train"
        first = request.get("chunk") == 0
        if trains and partition in CORRUPT and not (partition == 11 and first):
            return CORRUPT[partition](message, reply)
        return reply


app = RogueApp()
