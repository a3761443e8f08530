"""The real app behind its real mods: what a release sends, and what the owner refuses."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_kit import (
    DCHI,
    HIDDEN,
    NONE,
    Device,
    array_bytes,
    released_rows,
)

from privtune_flwr.privacy.base import MechanismSpec
from privtune_flwr.privacy.mods import (
    REFUSED,
)
from privtune_flwr.protocol import (
    LABELS,
    METRICS,
    RELEASE_HEADER,
    SMASHED,
    DescribeRequest,
)
from privtune_flwr.protocol.replies import MARK

pytestmark = pytest.mark.usefixtures("one_torch_thread")
MakeDevice = Callable[..., Device]


def test_the_released_rows_are_noisy_and_only_the_protocols_records_leave(
    device: Device, clean: np.ndarray
) -> None:
    reply = device.ask(device.request())
    assert set(reply.content) == {SMASHED, LABELS, RELEASE_HEADER, METRICS}
    assert MARK not in reply.content.config_records[RELEASE_HEADER]
    rows = released_rows(reply)
    noise = np.linalg.norm(rows - clean, axis=1)
    assert rows.shape == clean.shape
    assert noise.min() > 0.5 * HIDDEN / 50
    np.testing.assert_array_equal(released_rows(device.ask(device.request(spec=NONE))), clean)


def test_asking_twice_gives_the_same_bytes_and_spends_nothing(device: Device) -> None:
    first, again = device.ask(device.request()), device.ask(device.request())
    for record in (SMASHED, LABELS):
        assert array_bytes(first.content, record) == array_bytes(again.content, record)
    assert again.content.metric_records[METRICS]["new_releases"] == 0


def test_a_fresh_process_gives_the_same_bytes(device: Device) -> None:
    here = hashlib.sha256(array_bytes(device.ask(device.request()).content, SMASHED)).hexdigest()
    program = (
        "import sys, hashlib; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "import torch; torch.set_num_threads(1)\n"
        "from device_kit import Device\n"
        "from device_kit import array_bytes\n"
        "node = {'policy-mechanisms': '*', 'policy-releases-per-example': 0}\n"
        "device = Device(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], node)\n"
        "content = device.ask(device.request()).content\n"
        "print(hashlib.sha256(array_bytes(content, 'smashed')).hexdigest())\n"
    )
    arguments = [Path(__file__).parent, device.root, device.bundles, device.bottom_id]
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split()[-1] == here


@pytest.mark.parametrize(
    "changes",
    [
        {"spec": MechanismSpec("dchi", {**DCHI.params, "eta": 100.0})},
        {"epoch": 1},
        {"max_length": 127},
    ],
    ids=["eta", "epoch", "max-length"],
)
def test_another_release_has_independent_noise_and_counts(
    changes: dict[str, Any], device: Device, clean: np.ndarray
) -> None:
    one = released_rows(device.ask(device.request())) - clean
    reply = device.ask(device.request(**changes))
    other = released_rows(reply) - clean
    cosine = (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
    assert np.abs(cosine).max() < 0.3  # 1 if one were a multiple of the other; sd 1/sqrt(384)
    assert reply.content.metric_records[METRICS]["new_releases"] == 4


def test_the_wire_format_rounds_the_same_noise(device: Device) -> None:
    half = device.ask(device.request(wire="float16"))
    assert half.content.metric_records[METRICS]["new_releases"] == 0
    np.testing.assert_array_equal(
        released_rows(half), released_rows(device.ask(device.request())).astype(np.float16)
    )


def test_the_same_sentence_gets_the_same_noise_in_another_chunk(device: Device) -> None:
    whole = device.ask(device.request(chunk_size=2)).content.array_records[SMASHED]
    rows = int(whole["lengths"].numpy().sum())
    np.testing.assert_allclose(
        whole["values"].numpy(), released_rows(device.ask(device.request()))[:rows], atol=1e-5
    )


def test_a_device_with_the_same_text_draws_other_noise(make_device: MakeDevice) -> None:
    few = {"data.train-examples": 160}
    one, other = make_device(few), make_device(few)
    assert sorted(one.holdings.train.texts) == sorted(other.holdings.train.texts)
    mine, theirs = (
        {bytes(row) for row in released_rows(device.ask(device.request(chunk_size=16)))}
        for device in (one, other)
    )
    assert len(mine) == len(theirs) > 200
    assert not mine & theirs


def test_evaluation_examples_leave_without_labels(device: Device) -> None:
    reply = device.ask(device.request(split="eval"))
    assert set(reply.content) == {SMASHED, RELEASE_HEADER, METRICS}


# -------------------------------------------------------------------------------- the owner's word


def spent(device: Device) -> int:
    return device.home.ledger.spent().releases


@pytest.mark.parametrize(
    ("node_config", "changes", "named"),
    [
        ({}, {"spec": NONE}, "policy.mechanisms: 'none'"),
        ({"policy_mechanisms": "privtune"}, {}, "policy.mechanisms: 'dchi'"),
        ({"policy_max_eta": 10.0}, {}, "policy.max-eta: the run needs 50, allowed: 10"),
        ({"policy_share_labels": False}, {}, "policy.share-labels"),
        ({"policy_bottom_models": "f" * 64}, {}, "policy.bottom-models"),
        ({}, {"bottom_id": "f" * 64}, "request.bottom_id: this bottom model"),
        ({}, {"split": "test"}, "request.split = 'test'"),
        ({}, {"chunk": 10_000}, "request.chunk = 10000"),
    ],
)
def test_a_run_that_asks_for_too_much_is_refused_by_name(
    node_config: dict[str, Any], changes: dict[str, Any], named: str, make_device: MakeDevice
) -> None:
    device = make_device(**node_config)
    reply = device.ask(device.request(**changes))
    assert reply.has_error()
    assert (reply.error.code, reply.error.reason.split(": ")[0]) == (REFUSED, "refused")
    assert named in reply.error.reason
    assert spent(device) == 0


@pytest.mark.parametrize("changes", [{"epoch": 1}, {"max_length": 64}, {"max_length": 8}])
def test_a_second_release_of_an_example_is_refused(
    changes: dict[str, Any], make_device: MakeDevice
) -> None:
    device = make_device()
    assert device.ask(device.request()).has_content()
    reply = device.ask(device.request(**changes))
    assert reply.has_error()
    assert reply.error.code == REFUSED
    assert "policy.releases-per-example: the run needs 2, allowed: 1" in reply.error.reason
    assert spent(device) == 4
    assert device.ask(device.request()).has_content()


def test_a_per_epoch_run_is_refused_before_any_work(make_device: MakeDevice) -> None:
    device = make_device()
    terms = {"run_id": "ab" * 16, "bottom_id": device.bottom_id, "mechanism": DCHI.to_json()}
    reply = device.ask(DescribeRequest(**terms, labels=True, epochs=3, bundles=""))
    assert "policy.releases-per-example: the run needs 3" in reply.error.reason


def test_a_device_that_shares_no_labels_still_releases_rows(make_device: MakeDevice) -> None:
    device = make_device(policy_share_labels=False)
    reply = device.ask(device.request(labels=False))
    assert set(reply.content) == {SMASHED, RELEASE_HEADER, METRICS}
