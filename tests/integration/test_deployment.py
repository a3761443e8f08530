"""The same app on a SuperLink and SuperNodes as processes: a new process for every message."""

from __future__ import annotations

import csv
import json
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_kit import SMALL, Run
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from privtune_flwr.audit.auditor import Auditor
from privtune_flwr.audit.evidence import gather
from privtune_flwr.audit.operator import AuditError
from privtune_flwr.audit.plan import QUICK
from privtune_flwr.audit.summary import summarise
from privtune_flwr.bundle import BundleCache
from privtune_flwr.client_app import app
from privtune_flwr.config import PUBLIC_CORPORA, RunConfig, flatten, load_run_config
from privtune_flwr.data import load_source
from privtune_flwr.launcher import (
    SuperLink,
    end_process_tree,
    federate,
    free_port,
    local_superlink,
)
from privtune_flwr.protocol import ReleaseRequest, read_release, to_message
from privtune_flwr.training.store import SmashedStore

pytestmark = pytest.mark.flower

SETTINGS = {
    **SMALL,
    "privacy.mechanism": "dchi",
    "privacy.eta": 60.0,
    "model.cut": 2,
    "data.train-examples": 96,
    "data.test-examples": 32,
    "data.labels": "negative,positive",
    "privacy.chunk-size": 32,
    "train.epochs": 1,
    "run.min-devices": 3,
}


@contextmanager
def supernode(link: SuperLink, node_config: str, log: Path) -> Iterator[None]:
    with log.open("w") as sink:
        process = subprocess.Popen(
            [
                str(Path(sys.executable).with_name("flower-supernode")),
                "--insecure",
                "--superlink", link.address,
                "--port", str(free_port()),
                "--node-config", node_config,
            ],
            env=link.environment, stdout=sink, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        yield
    finally:
        end_process_tree(process.pid)


def own_file(path: Path) -> None:
    source = load_source("movie-snippets")
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["review", "mood"])
        names = source.features["label"].names
        for row in range(0, 400, 10):
            label = (row // 10) % 2
            match = source[row] if source[row]["label"] == label else source[len(source) - 1 - row]
            writer.writerow([match["text"], names[match["label"]]])


def in_this_process(run: Run, node: dict[str, Any], request: ReleaseRequest) -> Message:
    # what Flower's own process sets before it runs an app
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    context = Context(1, 1, node, RecordDict(), flatten(run.config))
    message = to_message(request.to_content(), 1, request.action)
    message.metadata.__dict__["_message_id"] = "again"
    return app(message, context)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, Path]]:
    root = tmp_path_factory.mktemp("deployment")
    own_file(root / "own.csv")
    (root / "policy.toml").write_text(
        'mechanisms = ["dchi"]\nmax-eta = 100.0\nshare-labels = true\n', encoding="utf-8"
    )
    homes = {name: root / name for name in ("own", "part", "careful")}
    policy = f"policy='{root / 'policy.toml'}'"
    nodes = {
        "own": f"device-home='{homes['own']}' data='{root / 'own.csv'}' text-column='review' "
        f"label-column='mood' {policy}",
        "part": f"device-home='{homes['part']}' partition-id=0 num-partitions=3 {policy}",
        # no policy file: a real device's defaults keep labels at home
        "careful": f"device-home='{homes['careful']}' partition-id=1 num-partitions=3",
    }
    config = load_run_config(
        flatten(RunConfig()) | SETTINGS | {"run.name": "deployed", "run.folder": str(root)}
    )
    log: list[str] = []
    with local_superlink(simulation=False) as link:
        with (
            supernode(link, nodes["own"], root / "own.log"),
            supernode(link, nodes["part"], root / "part.log"),
            supernode(link, nodes["careful"], root / "careful.log"),
        ):
            try:
                folder = federate(config, None, superlink=link, app=Path(), on_output=log.extend)
            except Exception as error:
                logs = [root / f"{name}.log" for name in nodes]
                tails = ["".join(path.read_text()[-3000:]) for path in logs]
                error.add_note("".join(log[-50:]) + "\n".join(tails))
                raise
        return Run(folder, config, "".join(log)), homes


def test_devices_with_their_owners_word_take_part(
    deployed: tuple[Run, dict[str, Path]],
) -> None:
    run, homes = deployed
    devices = run.results["devices"]
    assert devices["used"] == 2
    assert [r for r in devices["refused"].values() if "policy.share-labels" in r]
    assert not devices["quarantined"]
    used = {json.loads(line)["device"] for line in (run.folder / "store/index.jsonl").open()}
    identities = {(homes[name] / "device-id").read_text() for name in ("own", "part")}
    assert used - {"cloud"} == identities
    # the bottom model in one message: each is a new process on a device
    accounts = run.results["traffic"]["devices"]
    assert [accounts[device].get("provision_messages") for device in identities] == [1, 1]
    assert run.results["final"]["test_accuracy"] > 0
    assert run.results["final"]["eval_examples"] >= 12


def test_the_refusing_device_released_nothing(deployed: tuple[Run, dict[str, Path]]) -> None:
    _, homes = deployed
    assert not (homes["careful"] / "ledger.sqlite").exists()


def test_secrets_stay_on_their_disks(deployed: tuple[Run, dict[str, Path]]) -> None:
    run, homes = deployed
    secrets = [(home / "secret").read_bytes() for home in homes.values()]
    assert len(set(secrets)) == 3
    assert all(stat.S_IMODE((home / "secret").stat().st_mode) == 0o600 for home in homes.values())
    kept = [p.read_bytes() for p in run.folder.rglob("*") if p.is_file()]
    assert not any(secret in content for secret in secrets for content in kept)


def test_another_process_gives_the_same_bytes(deployed: tuple[Run, dict[str, Path]]) -> None:
    run, homes = deployed
    node = {
        "device-home": str(homes["part"]),
        "partition-id": 0,
        "num-partitions": 3,
        "policy": str(homes["part"].parent / "policy.toml"),
    }
    device = (homes["part"] / "device-id").read_text()
    (bundle,) = [p.name for p in (homes["part"] / "bundles").iterdir()]
    assert BundleCache(homes["part"] / "bundles").holds(bundle)
    run_id = json.loads((run.folder / "config.json").read_text())["run_id"]
    request = ReleaseRequest(
        run_id=run_id, bottom_id=bundle, mechanism=run.results["privacy"]["spec"], labels=True,
        epochs=1, split="train", chunk=0, chunk_size=32, epoch=0, wire="float16", max_length=128,
    )  # fmt: skip
    reply = in_this_process(run, node, request)
    chunk = read_release(
        reply.content, request, device_id=device, examples=32, hidden=384, num_labels=2
    )
    store = SmashedStore(run.folder / "store", hidden=384, dtype="float16")
    examples = store.examples((device, "train", 0, 0))
    kept = store.received()[examples[0].offset : examples[-1].offset + examples[-1].length]
    assert chunk.metrics["new_releases"] == 0
    np.testing.assert_array_equal(chunk.rows_ND.astype(np.float16), kept)


def test_an_audit_of_real_devices_attacks_a_stand_in(
    deployed: tuple[Run, dict[str, Path]],
) -> None:
    run, _ = deployed
    few = replace(QUICK, sentences=24, in_domain=200, repeats=8, attribute_sentences=200)
    auditor = Auditor(run.folder, few, only=["gaussian@adaptive", "retrieval-contextual-l2@*"])
    assert auditor.evidence.kind == "stand-in"
    audit = summarise(auditor, auditor.run(lambda name, share: None), show_text=True)
    assert audit["sentences"] == []
    assert "stand-in" in audit["evidence"]["said"]
    assert audit["evidence"]["sentences"] == 24
    best = max(a["measures"]["top1"]["value"] for a in audit["attacks"])
    assert best > audit["floors"]["constant"]["top1"]["value"] + 0.2

    # Without a test set a public corpus stands in that the mechanism was not designed on.
    data = run.config.data.model_copy(update={"test_source": "none"})
    config = run.config.model_copy(update={"data": data})
    evidence = gather(run.folder, config, auditor.cloud, auditor.store, sentences=5, in_domain=10)
    assert (evidence.kind, evidence.in_domain.ids) == ("stand-in", [])
    assert "tweets" in evidence.said
    everything = data.model_copy(update={"public_text": ",".join(PUBLIC_CORPORA)})
    config = run.config.model_copy(update={"data": everything})
    with pytest.raises(AuditError, match=r"data\.public-text"):
        gather(run.folder, config, auditor.cloud, auditor.store, sentences=5, in_domain=10)
