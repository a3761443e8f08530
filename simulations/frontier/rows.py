"""One case of the frontier study to one row: accuracy, bounds, bytes, what the auditor reads."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

import privtune_flwr.audit
from privtune_flwr.audit.attacks.base import LEVELS
from privtune_flwr.audit.auditor import Auditor
from privtune_flwr.audit.plan import Preset
from privtune_flwr.audit.summary import best_value, summarise
from privtune_flwr.config import RunConfig, Scalar, flatten, load_run_config
from privtune_flwr.results.report import versions
from privtune_flwr.results.run_folder import write_text
from privtune_flwr.training.store import Example
from privtune_flwr.training.trainer import accuracy_and_loss
from simulations.frontier.learned import learn, source_id
from simulations.frontier.release import LocalRun, Stopwatch, local_run

Row = dict[str, Any]
_MEASURES = ("top1", "content_top1")


@dataclass(frozen=True)
class Case:
    """One row of the study.

    Attributes
    ----------
    name : str
        ``<source>-<variant>-seed<n>``; a row that is there already is not made again.
    settings : Mapping
        Run configuration keys that differ from the defaults, the seed among them.
    variant : str
        What tables call the release.
    label : str
        Its strength, in words.
    devices : int
    scored : {"test", "validation"}
        By the public test set, or by the devices' evaluation examples (a search must not see the
        test set).
    audited : bool
        Whether an attacker looks at it.
    private : bool
        Whether the cloud trains on the devices' text; else on public labels alone.
    """

    name: str
    settings: Mapping[str, Scalar]
    variant: str
    label: str = ""
    devices: int = 10
    scored: Literal["test", "validation"] = "test"
    audited: bool = True
    private: bool = True

    def config(self, runs: Path, threads: int) -> RunConfig:
        """Give the whole run configuration."""
        own: dict[str, Scalar] = {
            "run.name": self.name.replace("+", "."),
            "run.folder": str(runs.absolute()),
            "train.threads": threads,
            "train.device": "cpu",
        }
        return load_run_config(flatten(RunConfig()) | dict(self.settings) | own)


def measure(case: Case, runs: Path, preset: Preset, *, threads: int, keep: bool) -> Row:
    """Release, train, test and audit.

    Parameters
    ----------
    case : Case
    runs : Path
        For run folders and for what rows share: clean representations and audits.
    preset : Preset
        Of the audit.
    threads : int
        Of PyTorch and of NumPy's libraries.
    keep : bool
        Keep the run folder; else it is removed once the row is made.

    Returns
    -------
    dict
        JSON values, without the command that made them.
    """
    torch.set_num_threads(threads)
    watch = Stopwatch()
    config = case.config(runs, threads)
    with watch.stage("total"), threadpool_limits(limits=threads):
        with local_run(config, case.devices, runs / "clean", watch) as run:
            references: Row = {}
            if run.cloud.learns:
                references = learn(run, runs / "learned", scored=case.scored)
            row = _utility(case, run) | {"references": references}
        if case.audited:
            with watch.stage("audit"):
                row |= _audited(run, preset, runs / "audits")
    if not keep:
        shutil.rmtree(run.folder.path, ignore_errors=True)
    return row | {
        "seconds": {k: round(v, 2) for k, v in watch.seconds.items()},
        "cpu_seconds": {k: round(v, 2) for k, v in watch.cpu_seconds.items()},
        "threads": threads,
    }


def _utility(case: Case, run: LocalRun) -> Row:
    row: Row = {
        "name": case.name,
        "variant": case.variant,
        "label": case.label,
        "source": run.config.data.source,
        "seed": run.config.run.seed,
        "settings": dict(case.settings),
        "scored": case.scored,
        "mechanism": run.config.privacy.mechanism,
        "versions": versions(),
    }
    store = run.open_store()
    train = run.release_training() if case.private else []
    if case.scored == "test":
        with run.watch.stage("test set"):
            judged = run.release_test()
    else:
        judged = run.release_validation()
    accuracy, loss = _trained(run, train, judged)
    run.close({"test_accuracy": accuracy} if case.scored == "test" else {})
    mechanism, cloud = run.cloud.mechanism, run.cloud
    guarantee = mechanism.guarantee()
    fits = cloud.width == cloud.bottom.hidden_size and run.tokens > 0
    sent = sum(run.wire_bytes.values())
    return row | {
        "accuracy": accuracy,
        "loss": loss,
        "sizes": {
            "devices": case.devices,
            "train": len(train),
            "judged": len(judged),
            "tokens": run.tokens,
            "classes": len(run.labels),
            "width": cloud.width,
            "store_bytes": store.nbytes,
        },
        "noise_units": run.noise_norm_sum / run.tokens / cloud.public.unit if fits else None,
        "wire_bytes_per_token": sent / run.tokens if run.tokens else None,
        "adaptation": dict(cloud.adaptation),
        "strength": asdict(mechanism.strength),
        "guarantee": {"metric": guarantee.metric, "adversary": guarantee.adversary},
    }


def _trained(run: LocalRun, train: list[Example], judged: list[Example]) -> tuple[float, float]:
    """Train the top model for ``train.epochs`` passes over everything; give accuracy and loss.

    Without examples it stays as the cloud adapted it to public text.
    """
    with run.watch.stage("adapt"):
        _, trainer = run.cloud.build_top(run.labels)
    rows_ND = run.store.training_rows()
    with run.watch.stage("train"):
        passes = run.config.train.epochs if train else 0
        total = passes * -(-len(train) // run.config.train.batch_size)
        for number in range(1, passes + 1):
            trainer.train_pass(rows_ND, train, round_number=number, total_steps=total)
    with run.watch.stage("test"):
        logits_BC = trainer.logits(rows_ND, judged)
    return accuracy_and_loss(logits_BC, [e.label for e in judged])


def _audited(run: LocalRun, preset: Preset, folder: Path) -> Row:
    """Audit a run, or take the audit of a run that released the very same rows.

    What the cloud does afterwards (decoding, adapting) changes no released row.
    """
    config, cloud = run.config, run.cloud
    determined = [
        cloud.bottom_id,
        cloud.spec.id,
        config.data.model_dump(),
        config.model.max_length,
        config.privacy.wire,
        config.privacy.chunk_size,
        config.run.seed,
        len(run.devices),
        preset.settings(),
        source_id(Path(privtune_flwr.audit.__file__).parent),
    ]
    name = hashlib.sha256(json.dumps(determined, sort_keys=True).encode()).hexdigest()[:24]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            write_text(path, json.dumps(_audit(run, preset)))
    found: Row = json.loads(path.read_text(encoding="utf-8"))
    return found


def _audit(run: LocalRun, preset: Preset) -> Row:
    auditor = Auditor(run.folder.path, preset, seed=run.config.run.seed)
    # the attackers' own text is the same for every mechanism
    auditor.cloud.bottom = run.cloud.bottom
    audit = summarise(auditor, auditor.run(lambda name, share: None), show_text=False)
    return {
        "recovered": {
            level: {name: best_value(audit, level, name) for name in _MEASURES}
            | {"attack": audit["best"].get(level)}
            for level in LEVELS
        },
        "floors": {
            floor: {name: figures[name]["value"] for name in _MEASURES}
            for floor, figures in audit["floors"].items()
        },
        "attacks": {
            a["key"]: {
                **{name: a["measures"][name]["value"] for name in _MEASURES},
                "seconds": round(a["seconds"], 1),
            }
            for a in audit["attacks"]
        },
        "attributes": audit["attributes"],
        "linkage": (audit.get("repeats") or {}).get("linkage"),
        "valid": audit["valid"],
        "invalid_because": audit["invalid_because"],
        "audit_evidence": audit["evidence"],
        "audit_preset": audit["settings"],
    }
