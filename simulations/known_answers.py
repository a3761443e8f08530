"""Attacks on releases whose right answer is known: ``python -m simulations.known_answers``.

No noise at cut 1 (ceiling: every token has a bank entry), noise far beyond the unit at cut 2
(floor), cells with randomised response at cut 0 (the table says what exact MAP can reach, and
nothing released says what bigrams can). MiniLM, movie-snippets. Figures go to
``simulations/results/known_answers.json``. Canaries: see ``audited.json``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from privtune_flwr.audit.attacks.base import Attack, Released
from privtune_flwr.audit.attacks.bigram import Bigram
from privtune_flwr.audit.attacks.context import Context
from privtune_flwr.audit.attacks.exact import Exact, expected_map_accuracy
from privtune_flwr.audit.attacks.gaussian import Gaussian
from privtune_flwr.audit.floors import prior_guess_by_position
from privtune_flwr.audit.knowledge import Knowledge
from privtune_flwr.audit.measure import recovery
from privtune_flwr.audit.plan import QUICK, Kind, attacks_on_tokens
from privtune_flwr.cloud import CloudSide, prepare_cloud
from privtune_flwr.config import RunConfig, Scalar, flatten, load_run_config
from privtune_flwr.data import load_source, split_source, tokenise
from privtune_flwr.privacy.base import Mechanism
from privtune_flwr.privacy.keyed import keyed_generator
from privtune_flwr.results.run_folder import write_text
from simulations.cells import Cells
from simulations.study import RESULTS

CASES: dict[str, dict[str, Scalar]] = {
    "no noise, cut 1": {"privacy.mechanism": "none", "model.cut": 1},
    "noise of 40 units, cut 2": {
        "privacy.mechanism": "dchi",
        "privacy.noise": 40.0,
        "model.cut": 2,
    },
}
_SENTENCES, _IN_DOMAIN = 100, 1000


class _World:
    """Private and in-domain sentences of movie-snippets, and a cloud."""

    def __init__(self, settings: dict[str, Scalar]) -> None:
        config = load_run_config(flatten(RunConfig()) | settings)
        self.cloud: CloudSide = prepare_cloud(config)
        pool = split_source(load_source(config.data.source), config.data, seed=0).pool
        ids = tokenise(self.cloud.bottom.tokenizer, list(pool["text"]), config.model.max_length)
        self.ids = ids[:_SENTENCES]
        self.in_domain = ids[_SENTENCES : _SENTENCES + _IN_DOMAIN]

    def release(self, mechanism: Mechanism) -> Released:
        """Release the private sentences, each with noise of its own."""
        clean = self.cloud.bottom.encode(self.ids)
        keys = [keyed_generator(bytes(32), "known answers", n) for n in range(len(self.ids))]
        pairs = zip(clean, self.ids, keys, strict=True)
        return Released([mechanism.perturb(rows, ids, rng) for rows, ids, rng in pairs])

    def attacked(self, attack: Attack, mechanism: Mechanism, released: Released) -> float:
        """Fit an attack and give the share of tokens that it recovers."""
        own = self.in_domain if attack.level == "in-domain" else []
        public = self.cloud.public
        attack.prepare(Knowledge(attack.level, self.cloud.bottom, public, mechanism, own), released)
        return self.judged(attack.guess(released))

    def judged(self, guesses: Sequence[NDArray[np.int64]]) -> float:
        """Give the share of tokens that first guesses recover."""
        ids = self.ids[: len(guesses)]
        return recovery(ids, [g[:, 0] for g in guesses], self.cloud.bottom.tokenizer).all

    def floors(self) -> dict[str, float]:
        """Measure what is right with nothing released: by position, and by bigrams from lengths."""
        lengths = [len(i) for i in self.ids]
        chain = Bigram.fit(
            self.cloud.public.sequences, self.cloud.public.vocab_size, in_domain=self.in_domain
        )
        by_position = prior_guess_by_position(self.in_domain, lengths)
        return {
            "in-domain prior by position": self.judged(by_position),
            "in-domain bigrams from lengths": self.judged(chain.prior_guess(lengths)),
        }


class _Blank(Gaussian):
    """Nothing released: every row says the same about every token."""

    def log_posterior(self, rows_TD: NDArray[np.float32]) -> NDArray[np.float32]:
        """Give the prior for every row."""
        return np.tile(self.log_prior().astype(np.float32), (len(rows_TD), 1))


def continuous(settings: dict[str, Scalar]) -> dict[str, Any]:
    """Let every attack of the quick audit look at one release."""
    world = _World(settings)
    mechanism = world.cloud.mechanism
    released = world.release(mechanism)
    levels: tuple[Any, ...] = ("unaware", "adaptive")
    both = tuple((network, level) for level in levels for network in ("mlp", "sequence"))
    preset = replace(QUICK, learned=both)  # type: ignore[arg-type]
    attacks, _ = attacks_on_tokens(preset, Kind(), in_domain=True, seed=0)
    found = {a.key: world.attacked(a, mechanism, released) for a in attacks}
    return {"attacks": found, "floors": world.floors(), "ceiling": 1.0}


def discrete() -> dict[str, Any]:
    """Hold exact MAP against its table, and bigrams against what lengths alone give."""
    world = _World({"privacy.mechanism": "none", "model.cut": 0})
    mechanism = Cells(world.cloud.public)
    released = world.release(mechanism)
    public, special = world.cloud.public, world.cloud.public.special_ids
    prior_V = Knowledge("adaptive", world.cloud.bottom, public, mechanism).prior
    frequency_V = np.bincount(np.concatenate(world.ids), minlength=public.vocab_size)
    frequency_V[special] = 0
    exact = Exact("adaptive")
    blank = Context(_Blank("in-domain"))
    return {
        "attacks": {
            a.key: world.attacked(a, mechanism, released)
            for a in (exact, Context(exact), Context(Exact("in-domain")), Gaussian("adaptive"))
        },
        "exact MAP by the table": expected_map_accuracy(mechanism.channel(), prior_V, frequency_V),
        "tokens": int(frequency_V.sum()),
        "bigrams, nothing released": world.attacked(blank, mechanism, released),
        "floors": world.floors(),
    }


def _cases() -> Iterator[tuple[str, Any]]:
    for name, settings in CASES.items():
        yield name, lambda settings=settings: continuous(settings)
    yield "cells with randomised response, cut 0", discrete


def main(threads: Annotated[int, typer.Option(help="CPU threads; 0 = all.")] = 0) -> None:
    """Measure all cases; what is stored already is kept."""
    if threads:
        torch.set_num_threads(threads)
    target = RESULTS / "known_answers.json"
    content: dict[str, Any] = {"command": "python -m simulations.known_answers", "cases": {}}
    if target.exists():
        content = json.loads(target.read_text(encoding="utf-8"))
    for name, measure in _cases():
        if name not in content["cases"]:
            content["cases"][name] = {"sentences": _SENTENCES, **measure()}
            write_text(target, json.dumps(content, indent=1, sort_keys=True) + "\n")
        print(name, json.dumps(content["cases"][name], indent=1))


if __name__ == "__main__":
    typer.run(main)
