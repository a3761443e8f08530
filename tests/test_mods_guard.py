"""The real app behind its real mods: what a misbehaving handler or mod cannot get out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from device_kit import (
    DCHI,
    Device,
    wire_bytes_of,
    wire_copy,
)
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.common.serde import recorddict_to_proto

from privtune_flwr import client_app
from privtune_flwr.data import tokenise
from privtune_flwr.errors import PrivTuneError
from privtune_flwr.models import load_tokenizer
from privtune_flwr.privacy.mods import (
    FAILED,
    GUARDED,
    REFUSED,
    egress_guard,
    mark_of,
    privacy_mod,
)
from privtune_flwr.protocol import (
    CLEAN,
    DEVICE_ONLY,
    LABELS,
    METRICS,
    RELEASE_HEADER,
    SMASHED,
    DescribeRequest,
    ReleaseRequest,
)
from privtune_flwr.protocol.replies import DEVICE, MARK

pytestmark = pytest.mark.usefixtures("one_torch_thread")
MakeDevice = Callable[..., Device]


def app_with(handler: Callable[[Message, Context], Message], *mods: Any) -> ClientApp:
    """An app with the real mods (or ``mods``) round another release handler."""
    app = ClientApp(mods=list(mods) or [egress_guard, privacy_mod])
    app.train("release")(handler)
    return app


def private_of(device: Device, clean: np.ndarray) -> list[bytes]:
    """Texts, their longer runs of words, token ids and clean rows of the first chunk."""
    folder = device.bundles / device.bottom_id
    texts = device.holdings.chunk("train", 0, 4).texts
    ids = tokenise(load_tokenizer(folder), texts, 128)
    runs = [" ".join(text.split()[i : i + 4]) for text in texts for i in range(0, 12, 4)]
    found = [run.encode() for run in runs if run.count(" ") == 3]
    found += [i.astype(kind)[:8].tobytes() for i in ids for kind in (np.int32, np.int64)]
    found += [clean[0].tobytes(), clean[-1].tobytes(), clean[0].astype(np.float16).tobytes()]
    return found


def texts_of(message: Message, context: Context) -> list[str]:
    request = ReleaseRequest.from_content(message.content)
    home = client_app.device_home(context, request.run_id)
    return client_app._holdings(context, home).chunk("train", 0, 4).texts


def changed(change: Callable[[RecordDict, list[str]], None]) -> Any:
    """The real handler, whose reply is then changed."""

    def handler(message: Message, context: Context) -> Message:
        reply = client_app.release(message, context)
        change(reply.content, texts_of(message, context))
        return reply

    return handler


def fails_quoting_text(message: Message, context: Context) -> Message:
    raise ValueError(f"cannot tokenise {texts_of(message, context)!r}")


def fails_quoting_a_key(message: Message, context: Context) -> Message:
    return {}[texts_of(message, context)[0]]


def fails_after_another(message: Message, context: Context) -> Message:
    try:
        return fails_quoting_text(message, context)
    except ValueError as error:
        raise RuntimeError("while handling") from error


def answers_with_an_error(message: Message, context: Context) -> Message:
    return Message(Error(code=0, reason=texts_of(message, context)[0]), reply_to=message)


def answers_with_a_known_code(message: Message, context: Context) -> Message:
    return Message(Error(code=REFUSED, reason=texts_of(message, context)[0]), reply_to=message)


def answers_with_nothing(message: Message, context: Context) -> Any:
    return None


def tokens(content: RecordDict) -> np.ndarray:
    return content.array_records[DEVICE_ONLY]["token-ids"].numpy()


def set_header(content: RecordDict, **values: Any) -> None:
    content.config_records[RELEASE_HEADER].update(values)


def smashed_without_mechanism(content: RecordDict, texts: list[str]) -> None:
    record = content.array_records.pop(CLEAN)
    content.array_records.pop(DEVICE_ONLY)
    content[SMASHED] = ArrayRecord({"values": record["hidden"], "lengths": record["lengths"]})
    set_header(content, mark=b"m" * 32)


def labels_as(values: Callable[[list[str]], np.ndarray]) -> Any:
    def change(content: RecordDict, texts: list[str]) -> None:
        content[LABELS] = ArrayRecord({"labels": Array(values(texts))})

    return changed(change)


HANDLERS: dict[str, tuple[Any, int]] = {
    "token ids in an extra record": (
        changed(lambda c, t: c.update({"more": ArrayRecord({"ids": Array(tokens(c))})})),
        GUARDED,
    ),
    "text in an extra record": (
        changed(lambda c, t: c.update({"note": ConfigRecord({"text": t})})),
        GUARDED,
    ),
    "text in the header": (changed(lambda c, t: set_header(c, text=t[0])), GUARDED),
    "text as device id": (changed(lambda c, t: set_header(c, device_id=t[0])), GUARDED),
    "text as run id": (changed(lambda c, t: set_header(c, run_id=t[0])), GUARDED),
    "text as a metric's name": (
        changed(lambda c, t: c.metric_records[METRICS].update({t[0]: 1.0})),
        GUARDED,
    ),
    "token ids as a metric": (
        changed(lambda c, t: c.metric_records[METRICS].update(seconds_bottom=tokens(c).tolist())),
        GUARDED,
    ),
    "token ids as an extra metric record": (
        changed(lambda c, t: c.update({"m": MetricRecord({"ids": tokens(c).tolist()})})),
        GUARDED,
    ),
    "clean rows in another record": (
        changed(lambda c, t: c.update({"hidden": c.array_records[CLEAN]})),
        GUARDED,
    ),
    "clean rows sent as smashed": (changed(smashed_without_mechanism), FAILED),
    "labels in another record": (
        changed(lambda c, t: c.update({"targets": c.array_records[LABELS]})),
        GUARDED,
    ),
    "token ids as labels": (
        labels_as(lambda t: np.array([30_000, 1, 2, 3], dtype=np.int32)),
        GUARDED,
    ),
    "labels of another type": (labels_as(lambda t: np.zeros(4, np.float64)), GUARDED),
    "text as the labels' type": (
        changed(
            lambda c, t: c.update(
                {LABELS: ArrayRecord({"labels": Array(t[0], (4,), "numpy.ndarray", b"")})}
            )
        ),
        GUARDED,
    ),
    "an exception that quotes text": (fails_quoting_text, FAILED),
    "an exception whose key is text": (fails_quoting_a_key, FAILED),
    "an exception caused by one that quotes text": (fails_after_another, FAILED),
    "an error of its own": (answers_with_an_error, GUARDED),
    "an error with our code": (answers_with_a_known_code, GUARDED),
    "no answer": (answers_with_nothing, FAILED),
}


@pytest.mark.parametrize("name", HANDLERS)
def test_a_misbehaving_handler_lets_nothing_out(
    name: str, device: Device, clean: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    handler, code = HANDLERS[name]
    reply = device.ask(device.request(), app_with(handler))
    assert reply.has_error()
    assert not reply.has_content()
    assert reply.error.code == code
    seen = wire_bytes_of(reply) + repr(reply).encode() + caplog.text.encode()
    for private in private_of(device, clean):
        assert private not in seen


def test_the_private_bytes_are_those_a_leak_would_show(device: Device, clean: np.ndarray) -> None:
    """The check above can fail: without mods each kind of private bytes is found."""
    request = device.request()
    naked = app_with(
        changed(lambda c, t: c.update({"note": ConfigRecord({"text": t})})), lambda m, c, n: n(m, c)
    )
    seen = wire_bytes_of(device.ask(request, naked))
    found = [private in seen for private in private_of(device, clean)]
    assert sum(found) >= len(found) / 2


def test_labels_against_the_policy_do_not_leave(make_device: MakeDevice) -> None:
    device = make_device(policy_share_labels=False)

    def handler(message: Message, context: Context) -> Message:
        # a handler that does not look at the policy
        context.node_config["policy-share-labels"] = True
        reply = client_app.release(message, context)
        context.node_config["policy-share-labels"] = False
        return reply

    reply = device.ask(device.request(), app_with(handler))
    assert (reply.error.code, LABELS in wire_bytes_of(reply).decode()) == (REFUSED, True)
    assert "policy.share-labels" in reply.error.reason


def test_labels_that_were_not_asked_for_do_not_leave(device: Device) -> None:
    handler = labels_as(lambda t: np.zeros(4, np.int32))
    reply = device.ask(device.request(labels=False), app_with(handler))
    assert reply.error.code == GUARDED
    reply = device.ask(device.request(split="eval"), app_with(handler))
    assert reply.error.code == GUARDED


def test_bytes_behind_an_arrays_values_do_not_leave(device: Device) -> None:
    def change(content: RecordDict, texts: list[str]) -> None:
        labels = content.array_records[LABELS]["labels"]
        data = labels.data + texts[0].encode()
        content.array_records[LABELS]["labels"] = Array("int32", (4,), "numpy.ndarray", data)

    reply = device.ask(device.request(), app_with(changed(change)))
    seen = wire_bytes_of(reply)
    assert device.holdings.chunk("train", 0, 4).texts[0].encode() not in seen
    labels = reply.content.array_records[LABELS]["labels"].numpy()
    assert labels.tolist() == device.holdings.chunk("train", 0, 4).labels


def sends_clean(mark: Callable[[Message, Context, dict[str, Any]], bytes | None]) -> Any:
    def handler(message: Message, context: Context) -> Message:
        reply = client_app.release(message, context)
        smashed_without_mechanism(reply.content, [])
        header = reply.content.config_records[RELEASE_HEADER]
        arrays = {k: v.numpy() for k, v in reply.content.array_records[SMASHED].items()}
        made = mark(message, context, arrays)
        header.pop(MARK)
        if made is not None:
            header[MARK] = made
        return reply

    return handler


def mark_of_other_rows(message: Message, context: Context, arrays: dict[str, Any]) -> bytes:
    request = ReleaseRequest.from_content(message.content)
    home = client_app.device_home(context, request.run_id)
    return mark_of(home, request, arrays | {"values": arrays["values"] + 1})


@pytest.mark.parametrize(
    ("mark", "named"),
    [
        (lambda m, c, a: None, "release.mark: missing"),
        (lambda m, c, a: b"", "did not come out of the mechanism"),
        (lambda m, c, a: bytes(32), "did not come out of the mechanism"),
        (mark_of_other_rows, "did not come out of the mechanism"),
    ],
    ids=["none", "empty", "made up", "of other rows"],
)
def test_clean_rows_with_a_forged_mark_do_not_leave(
    mark: Any, named: str, device: Device, clean: np.ndarray
) -> None:
    reply = device.ask(device.request(), app_with(sends_clean(mark), egress_guard))
    assert reply.error.code == GUARDED
    assert named in reply.error.reason
    assert clean[0].tobytes() not in wire_bytes_of(reply)


def test_without_the_privacy_mod_the_guard_lets_nothing_out(
    device: Device, clean: np.ndarray
) -> None:
    reply = device.ask(device.request(), app_with(client_app.release, egress_guard))
    assert reply.error.code == GUARDED
    assert clean[0].tobytes() not in wire_bytes_of(reply)


def swap_chunk(message: Message, context: Context, call_next: Any) -> Message:
    """A mod between guard and privacy that answers with the rows of another chunk."""
    content = wire_copy(message.content)
    content.config_records["request"]["chunk"] = 1
    other = call_next(Message(content=content, metadata=message.metadata), context)
    other.content.config_records[RELEASE_HEADER]["chunk"] = 0
    return other


def add_one(message: Message, context: Context, call_next: Any) -> Message:
    reply = call_next(message, context)
    values = reply.content.array_records[SMASHED]["values"].numpy()
    reply.content.array_records[SMASHED]["values"] = Array(values + 1)
    return reply


@pytest.mark.parametrize("between", [swap_chunk, add_one])
def test_rows_changed_after_the_mechanism_do_not_leave(between: Any, device: Device) -> None:
    app = app_with(client_app.release, egress_guard, between, privacy_mod)
    reply = device.ask(device.request(), app)
    assert reply.error.code == GUARDED
    assert "did not come out of the mechanism" in reply.error.reason


def test_a_fault_of_ours_is_named_in_the_log_but_not_in_the_reply(
    device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    def handler(message: Message, context: Context) -> Message:
        raise PrivTuneError("the tokenizer is broken")

    reply = device.ask(device.request(), app_with(handler))
    assert "the tokenizer is broken" in caplog.text
    assert reply.error.reason.startswith("device failed: PrivTuneError at test_mods_guard.py:")
    assert "broken" not in reply.error.reason


def test_an_action_that_the_protocol_does_not_name_is_refused(device: Device) -> None:
    app = ClientApp(mods=[egress_guard, privacy_mod])
    app.query("dump")(lambda message, context: Message(RecordDict(), reply_to=message))
    reply = device.send(device.request().to_content(), "query.dump", app)
    assert "the protocol has no such action" in reply.error.reason


@pytest.mark.parametrize("key", ["device_id", "policy", "held"])
def test_a_description_carries_no_free_text(key: str, device: Device) -> None:
    app = ClientApp(mods=[egress_guard, privacy_mod])

    def handler(message: Message, context: Context) -> Message:
        reply = client_app.describe(message, context)
        reply.content.config_records[DEVICE][key] = "a private sentence"
        return reply

    app.query("describe")(handler)
    terms = {"run_id": "ab" * 16, "bottom_id": device.bottom_id, "mechanism": DCHI.to_json()}
    request = DescribeRequest(**terms, labels=True, epochs=1, bundles=device.bottom_id)
    assert device.ask(request).has_content()
    reply = device.ask(request, app)
    assert reply.error.code == GUARDED
    assert b"a private sentence" not in wire_bytes_of(reply)


def test_the_secret_leaves_neither_in_bytes_nor_state_nor_logs(
    make_device: MakeDevice, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    device = make_device()
    terms = {"bottom_id": device.bottom_id, "mechanism": DCHI.to_json(), "run_id": "ab" * 16}
    replies = [
        device.ask(device.request()),
        device.ask(device.request(epoch=1)),
        device.ask(DescribeRequest(**terms, labels=True, epochs=1, bundles="")),
        device.ask(device.request(), app_with(fails_quoting_text)),
    ]
    assert [reply.has_error() for reply in replies] == [False, True, False, True]
    seen = b"".join(map(wire_bytes_of, replies)) + caplog.text.encode() + repr(replies).encode()
    seen += recorddict_to_proto(device.state).SerializeToString()
    home = device.home
    keys = [home.secret, *(home.derive(p) for p in ("noise", "mark", "ledger", "order"))]
    for key in keys:
        assert key not in seen
        assert key.hex().encode() not in seen
        assert repr(key)[2:-1].encode() not in seen
