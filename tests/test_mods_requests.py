"""The real app behind its real mods: bundles that arrive, and evaluation that answers in sums."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_kit import (
    Device,
)
from flwr.app import (
    Message,
)

from privtune_flwr.bundle import Manifest, read_parts
from privtune_flwr.privacy.mods import (
    REFUSED,
)
from privtune_flwr.protocol import (
    EVALUATE,
    METRICS,
    EvaluateRequest,
    ProvisionRequest,
)
from privtune_flwr.protocol.requests import INQUIRY

pytestmark = pytest.mark.usefixtures("one_torch_thread")
MakeDevice = Callable[..., Device]


def test_a_bundle_arrives_in_parts_and_an_inquiry_brings_nothing(
    make_device: MakeDevice, tmp_path: Path
) -> None:
    device = make_device()
    (device.root / "bundles").unlink()
    (tmp_path / "config.json").write_bytes(b"x" * 100)
    manifest = Manifest.of(tmp_path)

    def send(part: int, data: bytes) -> int:
        request = ProvisionRequest(
            run_id="ab" * 16, manifest=manifest.to_json(), part=part, parts=2
        )
        reply = device.send(request.to_content_with(data), request.action)
        return int(reply.content.metric_records[METRICS]["held"])

    parts = list(read_parts(tmp_path, manifest, 60))
    assert [send(INQUIRY, b""), send(0, parts[0]), send(1, parts[1]), send(INQUIRY, b"")] == [
        *(0, 0),
        *(1, 1),
    ]


@pytest.mark.parametrize(
    ("bounds", "data", "named"),
    [
        ({"policy_max_bundle_bytes": 99}, b"x" * 100, "policy.max-bundle-bytes: the run sends 100"),
        ({}, b"y" * 100, "config.json does not match its hash"),
        ({}, b"y" * 101, "more bytes than its manifest says"),
    ],
)
def test_a_bundle_that_is_too_large_or_wrong_is_refused(
    bounds: dict[str, Any], data: bytes, named: str, make_device: MakeDevice, tmp_path: Path
) -> None:
    device = make_device(**bounds)
    (device.root / "bundles").unlink()
    (tmp_path / "config.json").write_bytes(b"x" * 100)
    manifest = Manifest.of(tmp_path)
    request = ProvisionRequest(run_id="ab" * 16, manifest=manifest.to_json(), part=0, parts=1)
    reply = device.send(request.to_content_with(data), request.action)
    assert reply.error.code == REFUSED
    assert named in reply.error.reason
    assert not device.home.bundles.holds(manifest.id)


def evaluate(device: Device, logits: np.ndarray) -> Message:
    request = EvaluateRequest(run_id="ab" * 16, split="eval", examples=len(logits))
    return device.send(request.to_content_with(logits), EVALUATE)


def test_evaluation_answers_with_sums_only(device: Device) -> None:
    labels = np.array(device.holdings.evaluation.labels)
    logits = np.eye(2, dtype=np.float32)[labels] * 3
    logits[0] = logits[0][::-1]
    reply = evaluate(device, logits)
    assert set(reply.content) == {METRICS}
    metrics = dict(reply.content.metric_records[METRICS])
    assert set(metrics) == {"examples", "correct", "loss_sum"}
    assert (metrics["examples"], metrics["correct"]) == (40, 39)
    assert metrics["loss_sum"] == pytest.approx(
        39 * np.log1p(np.exp(-3)) + np.log1p(np.exp(3)), abs=0.005
    )


def test_chosen_outputs_do_not_spell_the_labels_out(device: Device) -> None:
    labels = np.array(device.holdings.evaluation.labels)
    weights = np.stack([np.zeros(len(labels)), 2.0 ** np.arange(len(labels))], axis=1)
    first = dict(evaluate(device, weights.astype(np.float32)).content.metric_records[METRICS])
    # unbounded, this sum would be the integer whose bits are the labels
    spelled = float(sum(2.0**i for i, label in enumerate(labels) if label == 0))
    assert spelled > 1e9
    assert first["loss_sum"] < len(labels) * 21


def test_evaluation_of_too_few_or_other_examples_is_refused(make_device: MakeDevice) -> None:
    device = make_device(policy_min_metric_examples=41)
    assert (
        "policy.min-metric-examples: 40" in evaluate(device, np.zeros((40, 2), "f4")).error.reason
    )
    assert "40 evaluation examples" in evaluate(device, np.zeros((39, 2), "f4")).error.reason
