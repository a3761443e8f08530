"""SplitFed on one device: steps are taken once, in order, and nothing leaves but what may."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_kit import wire_bytes_of
from federated_kit import Place, assert_same
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from splitfed_kit import (
    ALLOWED,
    HIDDEN,
    SPLITFED_RUN,
    Asker,
    asker_content,
    bottom_of,
    gradients_for,
    open_place,
    start,
    strategy_of,
)

from privtune_flwr.client_splitfed import evaluations
from privtune_flwr.errors import InvalidReplyError
from privtune_flwr.federated.settings import FitSettings
from privtune_flwr.privacy.mods import GUARDED, REFUSED, egress_guard
from privtune_flwr.protocol.fit import ANSWER
from privtune_flwr.protocol.replies import LABELS as LABELS_RECORD
from privtune_flwr.protocol.replies import SMASHED
from privtune_flwr.protocol.splitfed import (
    GRADIENTS,
    SPLITFED,
    gradient_record,
    read_gradients,
    read_rows,
)

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    yield from open_place(tmp_path, monkeypatch)


@pytest.fixture
def asker(place: Place) -> Asker:
    """A device with eight training sentences: two batches of four, three messages a round."""
    return Asker(place, place.device(1, 10, **ALLOWED))


def test_a_retry_takes_no_second_step(asker: Asker) -> None:
    one = asker.batch(asker.ask(1), 1)
    again = asker.batch(asker.ask(1), 1)
    np.testing.assert_array_equal(one.rows_ND, again.rows_ND)
    gradient = gradients_for(one)
    second, repeated = asker.ask(2, gradient), asker.ask(2, gradient)
    two = asker.batch(second, 2)
    np.testing.assert_array_equal(two.rows_ND, asker.batch(repeated, 2).rows_ND)
    last = gradients_for(two, 1)
    ended = bottom_of(asker.ask(3, last))
    assert_same(ended, bottom_of(asker.ask(3, last)))
    assert asker.device.home.fit_ledger.spent().fits == 1
    # both steps were taken, once: two AdamW steps of warm-up-free rate move a number at most so far
    moved = max(float(np.abs(ended[n] - asker.state[n]).max()) for n in ended)
    assert 1.5e-2 < moved < 2.05e-2


@pytest.mark.parametrize("step", [2, 3])
def test_a_step_out_of_order_or_with_other_gradients_is_refused(asker: Asker, step: int) -> None:
    one = asker.batch(asker.ask(1), 1)
    gradient = gradients_for(one)
    if step == 2:
        asker.batch(asker.ask(2, gradient), 2)
        reply = asker.ask(2, gradients_for(one, 5))
    else:
        ids_of_second = asker.batch(asker.ask(2, gradient), 2)
        asker.ask(1)  # the round starts again
        reply = asker.ask(3, gradients_for(ids_of_second))
    assert reply.has_error()
    assert reply.error.code == REFUSED
    assert "request.step" in reply.error.reason


def test_other_batches_in_the_middle_of_a_round_are_refused(asker: Asker) -> None:
    one = asker.batch(asker.ask(1), 1)
    reply = asker.ask(2, gradients_for(one), batch=6)
    assert reply.has_error()
    assert reply.error.code == REFUSED


@pytest.mark.parametrize(
    ("policy", "named"),
    [
        ({"share_labels": False}, "policy.share-labels"),
        ({"mechanisms": "dchi"}, "policy.mechanisms"),
        ({"releases_per_example": 1}, "policy.releases-per-example"),
        ({"fit_shares": "adapters"}, "policy.fit-shares"),
        ({"fit_rounds": 2}, "policy.fit-rounds"),
        ({"max_fit_epsilon": 8.0}, "policy.max-fit-epsilon"),
        ({"max_eta": 100.0}, "policy.max-eta"),
    ],
)
def test_the_owner_has_the_last_word(place: Place, policy: dict[str, Any], named: str) -> None:
    device = place.device(1, 10, **ALLOWED | policy)
    strategy = strategy_of(place, "run")
    with pytest.raises(Exception, match=named):
        start(strategy, {1: device})
    reply = Asker(place, device).ask(1)
    assert reply.has_error()
    assert reply.error.code == REFUSED
    assert named in reply.error.reason


def test_evaluations_count_as_answers(place: Place) -> None:
    settings = FitSettings.of(place.config(**SPLITFED_RUN, train__epochs=5))
    assert evaluations(settings) == 1
    every = place.config(**SPLITFED_RUN, train__epochs=5, train__evaluate_every=2)
    assert evaluations(FitSettings.of(every)) == 3


@pytest.mark.parametrize(
    "spoil",
    ["nan", "shape", "dtype", "missing", "scale"],
)
def test_a_device_trusts_no_gradient(asker: Asker, spoil: str) -> None:
    wire = "float16"
    one = asker.batch(asker.ask(1, wire=wire), 1, wire=wire)
    gradient = gradients_for(one)
    content = asker.request(2, wire=wire).to_content_with(None, gradient)
    record = content.array_records[GRADIENTS]
    if spoil == "nan":
        gradient[0, 0] = np.nan
        record["values"] = Array(gradient.astype(np.float16))
    elif spoil == "shape":
        record["values"] = Array(gradient[1:].astype(np.float16))
    elif spoil == "dtype":
        record["values"] = Array(gradient)
    elif spoil == "missing":
        del content[GRADIENTS]
    else:
        record["scale"] = Array(np.array([0.0], dtype=np.float32))
    reply = asker.device.send(content, SPLITFED)
    assert reply.has_error()
    assert reply.error.code == REFUSED
    assert "request.gradients" in reply.error.reason


def test_small_gradients_survive_half_precision() -> None:
    rng = np.random.default_rng(0)
    for size in (1e-9, 1e-3, 1e6):
        gradient = rng.normal(0, size, (20, 8)).astype(np.float32)
        content = RecordDict({GRADIENTS: gradient_record(gradient, "float16")})
        back = read_gradients(content, (20, 8), "float16")
        assert np.abs(back - gradient).max() < 1e-3 * np.abs(gradient).max()
    zero = RecordDict({GRADIENTS: gradient_record(np.zeros((3, 8), np.float32), "int8")})
    assert not read_gradients(zero, (3, 8), "int8").any()


def test_nothing_leaves_that_was_not_asked_for(asker: Asker) -> None:
    """The guard holds what a careless handler makes to the schema."""
    good = asker.ask(1)
    assert good.has_content()

    def careless(change: Callable[[RecordDict], None]) -> Message:
        app = ClientApp(mods=[egress_guard])

        @app.train("splitfed")
        def handler(message: Message, context: Any) -> Message:
            content = asker_content(good)
            change(content)
            return Message(content, reply_to=message)

        return asker.ask(1, app=app)

    def text(content: RecordDict) -> None:
        content[SMASHED]["text"] = Array(np.zeros(3, np.uint8))  # type: ignore[index]

    def bigger(content: RecordDict) -> None:
        rows = content.array_records[SMASHED]["values"].numpy()
        content.array_records[SMASHED]["values"] = Array(np.concatenate([rows, rows]))

    def bottom(content: RecordDict) -> None:
        for name in (SMASHED, LABELS_RECORD):
            del content[name]
        content[ANSWER] = ArrayRecord({n: Array(v) for n, v in asker.state.items()})

    def named(content: RecordDict) -> None:
        content.metric_records["metrics"]["first_token"] = 5

    def other(content: RecordDict) -> None:
        content.config_records["splitfed"]["device_id"] = "what the text says"

    assert careless(lambda content: None).has_content()
    for change in (text, bigger, bottom, named, other):
        reply = careless(change)
        assert reply.has_error(), change.__name__
        assert reply.error.code == GUARDED


def test_evaluation_rows_leave_without_labels(asker: Asker) -> None:
    reply = asker.ask(1, split="eval", batch=64)
    assert LABELS_RECORD not in reply.content
    batch = asker.batch(reply, 1, split="eval", batch=64)
    assert batch.labels_B.tolist() == [-1, -1]
    assert asker.device.home.fit_ledger.spent().fits == 1
    # one row for all chunks of an evaluation; other chunks are another answer
    asker.ask(1, split="eval", batch=1)
    asker.ask(2, split="eval", batch=1)
    assert asker.device.home.fit_ledger.spent().fits == 2
    assert asker.ask(3, split="eval", batch=1).has_error()


def test_the_cloud_trusts_no_batch(asker: Asker) -> None:
    good = asker.ask(1)
    assert len(wire_bytes_of(good)) > 4 * HIDDEN
    for record, key, value in (
        (SMASHED, "values", np.nan),
        (SMASHED, "values", 1e6),
        (LABELS_RECORD, "labels", 7),
    ):
        content = asker_content(good)
        array = content.array_records[record][key].numpy().copy()
        array.flat[0] = value
        content.array_records[record][key] = Array(array)
        with pytest.raises(InvalidReplyError, match=record):
            read_rows(
                content,
                asker.request(1),
                device_id=asker.device.home.device_id,
                examples=None,
                hidden=HIDDEN,
                num_labels=2,
            )
