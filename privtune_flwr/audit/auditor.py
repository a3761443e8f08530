"""One run's audit: every attack at every level of knowledge, each part stored as it is done."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from privtune_flwr.audit.attacks.base import Attack, Level, Released, Tell
from privtune_flwr.audit.attacks.gaussian import Gaussian
from privtune_flwr.audit.attacks.learned import Learned
from privtune_flwr.audit.attacks.retrieval import Retrieval
from privtune_flwr.audit.attributes import infer_attribute
from privtune_flwr.audit.canary import Canary, codeword_canary, coin_canary
from privtune_flwr.audit.evidence import gather
from privtune_flwr.audit.floors import floor_figures, prior_guess_by_position
from privtune_flwr.audit.knowledge import Knowledge, Pair
from privtune_flwr.audit.linkage import linkage
from privtune_flwr.audit.measure import Figure, measure
from privtune_flwr.audit.operator import AuditError, open_run
from privtune_flwr.audit.parts import Parts
from privtune_flwr.audit.plan import Kind, Preset, attacks_on_tokens
from privtune_flwr.audit.repeats import (
    Averaged,
    average_releases,
    averaging_curve,
    gaussian_guess,
    store_repeats,
)
from privtune_flwr.audit.side_channels import side_channels
from privtune_flwr.audit.tokens import Truth
from privtune_flwr.privacy.base import MechanismSpec
from privtune_flwr.privacy.registry import create_mechanism

#: Told what an audit does now, and the share of the whole that is done.
Watch = Callable[[str, float], None]
_GUESSES = 5
_CANARY_TOKENS = 10_000
_CANARY_STEPS = 5


class Auditor:
    """Attacks what one run's cloud received.

    Parameters
    ----------
    folder : Path
        The run's.
    preset : Preset
        Sizes: one of :data:`~privtune_flwr.audit.plan.PRESETS`, or any other.
    seed : int
        Of the draw of sentences and of learned attackers.
    only : sequence of str
        Patterns of attack keys, for example ``gaussian@*``; empty for all.
    fresh : bool
        Do finished parts again.

    Raises
    ------
    AuditError
        If there is nothing to attack, or a pattern fits no attack.
    """

    def __init__(
        self,
        folder: Path,
        preset: Preset,
        *,
        seed: int = 0,
        only: Sequence[str] = (),
        fresh: bool = False,
    ) -> None:
        self.folder, self.preset, self.seed = folder, preset, seed
        self.config, self.cloud, self.store = open_run(folder)
        self.evidence = gather(
            folder,
            self.config,
            self.cloud,
            self.store,
            sentences=preset.sentences,
            in_domain=preset.in_domain,
            seed=seed,
        )
        self.released = self.evidence.released
        if not any(mask.any() for mask in self.truth.masks["text"]):
            raise AuditError(
                f"{folder}: its sentences are special tokens alone, nothing to recover"
            )
        run_id = json.loads((folder / "config.json").read_text(encoding="utf-8"))["run_id"]
        common = {
            "run": run_id,
            "spec": self.cloud.spec.id,
            "bytes": self.store.nbytes,
            "kind": self.evidence.kind,
            "sentences": preset.sentences,
            "in_domain": preset.in_domain,
            "seed": seed,
        }
        self.parts = Parts(folder / "audit" / "parts", common, fresh=fresh)
        self.skipped: list[dict[str, str]] = []
        self.attacks = self._chosen(only)
        self._knowledge: dict[Level, Knowledge] = {}

    @cached_property
    def truth(self) -> Truth:
        """What the guesses are judged by."""
        text = self.evidence.text
        return Truth.of(text.ids, text.texts, self.tokenizer, self.cloud.public.counts)

    @property
    def tokenizer(self) -> Any:
        """The bottom model's."""
        return self.cloud.bottom.tokenizer

    def knowledge(self, level: Level) -> Knowledge:
        """Give what an attacker of a level knows; shared, so that tables are made once."""
        if level not in self._knowledge:
            own = self.evidence.in_domain.ids if level == "in-domain" else []
            self._knowledge[level] = Knowledge(
                level, self.cloud.bottom, self.cloud.public, self.cloud.mechanism, own
            )
        return self._knowledge[level]

    def run(self, watch: Watch) -> dict[str, Any]:
        """Run all that is not done yet.

        Returns
        -------
        dict
            ``floors``, ``attacks``, ``attributes``, ``repeats``, ``side_channels``, ``canaries``
            and ``skipped``, as JSON values.
        """
        found: dict[str, Any] = {"attacks": [], "canaries": [], "skipped": self.skipped}
        steps = list(self._steps(found))
        for number, (name, step) in enumerate(steps):

            def tell(share: float, number: int = number, name: str = name) -> None:
                watch(name, (number + min(1.0, max(0.0, share))) / len(steps))

            tell(0.0)
            step(tell)
        watch("done", 1.0)
        return found

    def _steps(self, found: dict[str, Any]) -> Iterator[tuple[str, Callable[[Tell], None]]]:
        def keep(name: str, compute: Callable[[Tell], Any], tell: Tell) -> None:
            found[name] = compute(tell)

        def add(name: str, compute: Callable[[Tell], Any], tell: Tell) -> None:
            found[name].append(compute(tell))

        yield "floors", partial(keep, "floors", self._floors)
        for attack in self.attacks:
            yield attack.key, partial(add, "attacks", partial(self._attack, attack))
        yield "attributes", partial(keep, "attributes", self._attributes)
        yield "repeats", partial(keep, "repeats", self._repeats)
        yield "side channels", partial(keep, "side_channels", self._side_channels)
        if not self.preset.canaries:
            why = "no leak is planted in this audit: nothing shows that it would see one"
            self.skipped.append({"key": "canaries", "why": why})
        for name in self.preset.canaries:
            yield f"canary {name}", partial(add, "canaries", partial(self._canary, name))

    def _chosen(self, only: Sequence[str]) -> list[Attack]:
        kind = Kind.of(self.cloud.mechanism, self.cloud.bottom.hidden_size, self.released)
        own = bool(self.evidence.in_domain.ids)
        attacks, skipped = attacks_on_tokens(self.preset, kind, in_domain=own, seed=self.seed)
        for attack, why in skipped:
            if not only or any(fnmatch(attack.key, p) for p in only):
                self.skipped.append(
                    {
                        "key": attack.key,
                        "name": attack.name,
                        "family": attack.family,
                        "level": attack.level,
                        "why": why,
                    }
                )
        keys = [a.key for a in attacks]
        known = [*keys, *(s["key"] for s in self.skipped)]
        for pattern in only:
            if not any(fnmatch(key, pattern) for key in known):
                raise AuditError(f"attack {pattern!r}: fits none of {', '.join(keys)}")
        return [a for a in attacks if not only or any(fnmatch(a.key, p) for p in only)]

    def _attack(self, attack: Attack, tell: Tell) -> dict[str, Any]:
        def compute() -> dict[str, Any]:
            start = time.perf_counter()
            attack.prepare(self.knowledge(attack.level), self.released, lambda s: tell(0.8 * s))
            shown = self._first(attack.sentences)
            guesses = attack.guess(shown, _GUESSES, lambda s: tell(0.8 + 0.2 * s))
            seconds = time.perf_counter() - start
            truth = self.truth.first(len(shown.rows))
            return {
                "key": attack.key,
                "name": attack.name,
                "family": attack.family,
                "level": attack.level,
                "seconds": seconds,
                "sentences": len(shown.rows),
                "settings": attack.settings,
                "measures": _json(measure(truth, guesses, self.tokenizer, seed=self.seed)),
                "curve": attack.curve,
                "guesses": guesses,
            }

        return self.parts.get(attack.key, attack.settings, compute)

    def _first(self, sentences: int | None) -> Released:
        return Released(self.released.rows[:sentences])

    def _floors(self, tell: Tell) -> dict[str, Any]:
        def compute() -> dict[str, Any]:
            figures = {"constant": floor_figures(self.truth, self.tokenizer, seed=self.seed)}
            own = {"public-prior": self.cloud.public.sequences}
            if self.evidence.in_domain.ids:
                own["in-domain-prior"] = self.evidence.in_domain.ids
            for name, sequences in own.items():
                guesses = prior_guess_by_position(sequences, self.released.lengths, _GUESSES)
                figures[name] = measure(self.truth, guesses, self.tokenizer, seed=self.seed)
            return {name: _json(found) for name, found in figures.items()}

        return self.parts.get("floors", {}, compute)

    def _attributes(self, tell: Tell) -> list[dict[str, Any]]:
        own, labels = self.evidence.in_domain, self.evidence.text.labels
        if len(set(own.labels)) < 2 or len(set(labels)) < 2:
            self.skipped.append(
                {"key": "attributes", "why": "needs labelled text of the devices' source"}
            )
            return []
        size = self.preset.attribute_sentences

        def compute() -> dict[str, Any]:
            results = infer_attribute(
                self._own_release(size),
                own.labels[:size],
                self.released.rows,
                labels,
                seed=self.seed,
                quick=self.preset.name != "full",
                tell=tell,
            )
            return {
                "results": [
                    {**asdict(r), "attribute": "label", "shuffled": r.shuffled.value}
                    for r in results
                ]
            }

        stored = self.parts.get("attributes", {"size": size, "preset": self.preset.name}, compute)
        return list(stored["results"])

    def _own_release(self, size: int) -> list[Any]:
        """Release the attacker's own in-domain sentences, each with noise of its own."""
        knowledge = self.knowledge("in-domain" if self.evidence.in_domain.ids else "adaptive")
        ids = (self.evidence.in_domain.ids or self.cloud.public.sequences)[:size]
        rows = self.cloud.bottom.encode(ids)
        return [
            knowledge.perturb(Pair(r, i), 3, n)
            for n, (r, i) in enumerate(zip(rows, ids, strict=True))
        ]

    def _repeats(self, tell: Tell) -> dict[str, Any]:
        size = self.preset.repeats
        if not size:
            why = "repeated releases and linkage: not in this audit"
            self.skipped.append({"key": "repeats", "why": why})
            return {}

        def compute() -> dict[str, Any]:
            ids = self.evidence.text.ids[:size]
            clean = self.cloud.bottom.encode(ids)
            held = store_repeats(self.store)
            curve = averaging_curve(
                self.cloud.mechanism,
                [Pair(r, i) for r, i in zip(clean, ids, strict=True)],
                self.tokenizer,
                gaussian_guess(self.cloud.public),
                seed=self.seed,
                tell=tell,
            )
            linked = linkage(
                self.cloud.mechanism, clean, ids, public=self.cloud.public, seed=self.seed
            )
            return {
                "policy": self.config.privacy.release_policy,
                "releases_in_store": held.most,
                "differing": held.differing,
                "averaging": [
                    {
                        "releases": point.releases,
                        "top1": point.top1.value,
                        "content_top1": point.content_top1.value,
                    }
                    for point in curve
                ],
                "averaged_in_store": self._averaged(held.most) if held.differing else None,
                "linkage": {
                    "sentences": linked.share.n,
                    "linked": linked.share.value,
                    "by_length": linked.by_length,
                    "chance": linked.chance,
                },
            }

        return self.parts.get("repeats", {"size": size}, compute)

    def _averaged(self, releases: int) -> dict[str, Any] | None:
        """Attack the mean of the releases that the store really holds of each sentence."""
        if self.evidence.kind != "private":
            return None
        keys, means = average_releases(self.store)
        place = {key: index for index, key in enumerate(keys)}
        released = Released([means.rows[place[key]] for key in self.evidence.text.keys])
        averaged = Averaged(self.cloud.mechanism, releases)
        guesses = gaussian_guess(self.cloud.public)(averaged, released)
        found = measure(self.truth, guesses, self.tokenizer, seed=self.seed)
        return {"releases": releases, "measures": _json(found)}

    def _side_channels(self, tell: Tell) -> list[dict[str, Any]]:
        return [asdict(record) for record in side_channels(self.store)]

    def _canary(self, name: str, tell: Tell) -> dict[str, Any]:
        def compute() -> dict[str, Any]:
            canary = self._plant(name)
            return {**asdict(canary), "passed": canary.passed}

        return self.parts.get(f"canary-{name}", {}, compute)

    def _plant(self, name: str) -> Canary:
        if name == "coin":
            own = self._own_release(self.preset.attribute_sentences)
            return coin_canary(own, self.released.rows, seed=self.seed)
        attacks: dict[str, Attack] = {
            "codewords-retrieval": Retrieval("unaware"),
            "codewords-gaussian": Gaussian("adaptive"),
            "codewords-learned": Learned(
                "adaptive", network="mlp", steps=_CANARY_STEPS, tokens=_CANARY_TOKENS
            ),
        }
        attack = attacks[name]
        nothing = create_mechanism(MechanismSpec("none"), None)
        knowledge = Knowledge(attack.level, self.cloud.bottom, self.cloud.public, nothing)
        return codeword_canary(attack, knowledge, self.evidence.text.ids, seed=self.seed)


def _json(figures: dict[str, Figure]) -> dict[str, Any]:
    return {name: asdict(figure) for name, figure in figures.items()}
