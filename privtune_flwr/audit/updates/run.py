"""What the cloud of a finished baseline could read: ``privtune audit`` for runs that send weights.

Only a simulation's text is known. The first round's updates of a few devices are made again, by
the code that devices run, from the same data and the state that they were sent; the order of
batches is drawn anew (in the run it is keyed by the whole request). The first round is the easiest
to repeat, not the worst for the devices: adapters that start at zero say little before they have
moved once, so with LoRA a later round is attacked as well.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from privtune_flwr.audit.operator import AuditError
from privtune_flwr.audit.updates.attacks import attack_update, best_attack, over_devices
from privtune_flwr.audit.updates.base import CloudKnowledge, Update
from privtune_flwr.audit.updates.devices import Device, held_by
from privtune_flwr.audit.updates.steps import splitfed_rounds
from privtune_flwr.config import RunConfig, load_run_config
from privtune_flwr.data import load_public_text, tokenise
from privtune_flwr.federated.methods import FitMethod, Work, create_method
from privtune_flwr.federated.settings import FitSettings
from privtune_flwr.federated_config import WEIGHT_STRATEGIES
from privtune_flwr.models import resolve_model
from privtune_flwr.privacy.learned_update import norm_of
from privtune_flwr.privacy.learning import State
from privtune_flwr.results.run_folder import write_text

_SIMULATED = re.compile(r"device-\d{5}")
_NOT_MEASURED = {
    "distil": "devices send logits on public text",
    "bbt": "devices send losses of candidate prompts",
    "local": "nothing leaves a device",
    "central": "the cloud holds all text",
}


def print_inversion(found: dict[str, Any], console: Console) -> None:
    """Print what was read, as a table: recall / precision of distinct tokens and content words."""
    title = f"{found['run']}: read from the updates of {found['devices']} devices"
    table = Table(title=Text(title))
    for column in ("round", "attack", "tokens", "content words", "by guessing common words"):
        table.add_column(column, justify="left" if column in ("round", "attack") else "right")
    for kind, attacked in found["rounds"].items():
        for name, figures in attacked["attacks"].items():
            floor = figures["floor"]
            cells = [_pair(f, k) for f, k in product((figures, floor), ("token", "content"))]
            table.add_row(kind, name, cells[0], cells[1], f"{cells[2]}, {cells[3]}")
    console.print(table)
    console.print("recall / precision, %; lower bounds: a stronger attacker may read more")


def _pair(figures: dict[str, Any], kind: str) -> str:
    both = (figures[f"{kind}_recall"], figures[f"{kind}_precision"])
    return " / ".join("-" if value is None else f"{100 * value:.1f}" for value in both)


def sends_weights(folder: Path) -> bool:
    """Whether a run's devices send weights: updates of all that they train, or of a bottom model.

    Raises
    ------
    AuditError
        If it is another baseline, of which nothing is measured.
    """
    path = folder / "config.json"
    if not path.is_file():
        return False
    saved = json.loads(path.read_text(encoding="utf-8"))["config"]
    strategy = saved.get("train.strategy", "split")
    if strategy in _NOT_MEASURED:
        raise AuditError(
            f"{folder.name}: nothing is measured for train.strategy = {strategy!r} (yet): "
            f"{_NOT_MEASURED[strategy]}"
        )
    return strategy in (*WEIGHT_STRATEGIES, "splitfed")


def invert_run(folder: Path, devices: int = 3) -> dict[str, Any]:
    """Measure what the cloud of a simulated run reads from updates, and write ``inversion.json``.

    Parameters
    ----------
    folder : Path
        A finished run that sends weights.
    devices : int
        How many devices are attacked, the first ones.

    Returns
    -------
    dict
        ``attack``, the best one's name, its ``token_recall``, ``token_precision``,
        ``content_recall`` and ``content_precision`` (means over devices), ``spread`` over devices,
        ``floor``, ``attacks`` with all of them, and what was attacked.

    Raises
    ------
    AuditError
        If the run is none of a simulation, or has not finished.
    """
    if not sends_weights(folder):
        raise AuditError(f"{folder.name}: its devices send no weights")
    results = folder / "results.json"
    if not results.is_file():
        raise AuditError(f"{folder.name}: has not finished")
    names = sorted(json.loads(results.read_text(encoding="utf-8"))["traffic"]["devices"])
    if not names or not all(_SIMULATED.fullmatch(name) for name in names):
        raise AuditError(f"{folder.name}: its devices are real ones, their text is not known here")
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = load_run_config(saved["config"])
    found = _attack_run(config, held_by(config, names, devices), len(names))
    content = {"run": folder.name, "strategy": config.train.strategy, **found}
    write_text(folder / "inversion.json", json.dumps(content, indent=1, sort_keys=True) + "\n")
    return content


def _attack_run(config: RunConfig, devices: Sequence[Device], fleet: int) -> dict[str, Any]:
    if config.train.strategy == "splitfed":
        rounds = splitfed_rounds(config, devices, fleet)
    else:
        rounds = _update_rounds(config, devices)
    found = {kind: _summed(attacked) for kind, attacked in rounds.items() if attacked}
    worst = max(found, key=lambda kind: found[kind]["content_recall"] or 0.0)
    return {
        **found[worst],
        "round": worst,
        "rounds": found,
        "devices": len(devices),
        "examples": [len(d.holdings.train.texts) for d in devices],
    }


def _update_rounds(config: RunConfig, devices: Sequence[Device]) -> dict[str, list[dict[str, Any]]]:
    settings = FitSettings.of(config)
    labels = devices[0].holdings.label_names
    method = create_method(settings, Path(resolve_model(config.model.name)), labels)
    knowledge = cloud_knowledge(method, config)
    start = method.model.state()
    rounds: dict[str, list[dict[str, Any]]] = {"first": [], "later": []}
    later = config.model.tuning == "lora" and settings.rounds > 1
    for number, device in enumerate(devices):
        state, kinds = start, ["first", *(["later"] if later else [])]
        for kind in kinds:
            if kind == "later":
                # adapters as another device's first round left them
                other = devices[(number + 1) % len(devices)]
                state = _answer(method, start, other, config, 1).received
            update = _answer(method, state, device, config, 1 if kind == "first" else 2)
            ids = _ids(knowledge, device, config)
            rounds[kind].append(attack_update(update, ids, knowledge))
    return rounds


def cloud_knowledge(method: FitMethod, config: RunConfig) -> CloudKnowledge:
    """Give what the cloud knows: the method's model and the run's public text."""
    texts = load_public_text(config.data.public_corpora)
    tokenizer = method.model.parts.tokenizer
    return CloudKnowledge(method.model, tokenise(tokenizer, texts, config.model.max_length))


def clipped(update: Update, clip: float) -> Update:
    """Scale an answer as a device of DP-FedAvg does before it leaves; the noise is the cloud's."""
    change = {n: update.received[n] - update.sent[n] for n in update.sent}
    scale = np.float32(min(1.0, clip / max(norm_of(change), 1e-12)))
    received: State = {n: update.sent[n] + scale * change[n] for n in update.sent}
    return Update(update.sent, received, update.examples, update.round, update.rounds)


def _answer(
    method: FitMethod, state: State, device: Device, config: RunConfig, number: int
) -> Update:
    """Do what the device does in a round; the arrays that training moves are attacked."""
    settings = method.settings
    train = device.holdings.train
    ids = tokenise(method.model.parts.tokenizer, train.texts, config.model.max_length)
    prox = settings.federated.proximal_mu if settings.train.strategy == "fedprox" else 0.0
    # of DP-SGD's noise the law is known, not the device's key: another draw stands for it
    key = hashlib.sha256(f"{device.seed}/{number}".encode()).digest()
    work = Work(ids, train.labels, number, settings.rounds, prox, device.seed, {}, noise_key=key)
    received = fitted(method, state, work)
    update = Update(state, received, len(ids), number, settings.rounds)
    if settings.train.strategy == "dp-fedavg":
        return clipped(update, settings.federated.update_clip)
    return update


def fitted(method: FitMethod, state: State, work: Work) -> State:
    """Let a method work and give the trained weights of its answer.

    SCAFFOLD's control variates are at zero in the first round. Their change, which travels beside
    the weights, is the weights' change again, over the sum of rates.
    """
    if method.settings.train.strategy != "scaffold":
        return dict(method.fit(state, work).arrays)
    from privtune_flwr.federated.scaffold import join_parts, split_parts

    nothing = {name: np.zeros_like(value) for name, value in state.items()}
    weights, _ = split_parts(method.fit(join_parts(state, nothing), work).arrays)
    return weights


def _ids(knowledge: CloudKnowledge, device: Device, config: RunConfig) -> list[Any]:
    texts = device.holdings.train.texts
    return list(tokenise(knowledge.tokenizer, texts, config.model.max_length))


def _summed(devices: Sequence[dict[str, Any]]) -> dict[str, Any]:
    attacks = {name: over_devices(devices, name) for name in devices[0]}
    best = best_attack(attacks)
    return {"attack": best, **attacks[best], "attacks": attacks}
