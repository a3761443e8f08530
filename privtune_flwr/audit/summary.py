"""From an audit's figures to what people read: headline, verdict, sentences, limits, frontier."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from privtune_flwr.audit.attacks.base import LEVELS, Level
from privtune_flwr.audit.measure import DEFINITIONS
from privtune_flwr.audit.tokens import Kind
from privtune_flwr.config import flatten
from privtune_flwr.results.report import versions

if TYPE_CHECKING:
    from privtune_flwr.audit.auditor import Auditor

FORMAT = 1
_SHOWN = 20
LIMITS = (
    "A figure is what these attackers read, so a lower bound on what leaks: a stronger attacker "
    "may read more.",
    "Each sentence is attacked by itself; an attacker who knows which sentences belong together "
    "may do better.",
    "The best attack of a level is chosen after the fact, by the same sentences it is judged on: "
    "a small advantage for the attacker.",
    "Token recovery says little about meaning: a sentence with half its words right may be fully "
    "understood, or not at all.",
    "Only an honest-but-curious cloud is looked at: one that ships other app code, a crafted "
    "bottom model or a crafted artefact can do more.",
)


def summarise(auditor: Auditor, found: dict[str, Any], *, show_text: bool) -> dict[str, Any]:
    """Put an audit together.

    Parameters
    ----------
    auditor : Auditor
        After its run.
    found : dict
        What its run gave.
    show_text : bool
        Whether sentences may stand in the report.

    Returns
    -------
    dict
        The content of ``audit.json``.
    """
    best = best_attacks(found["attacks"], len(auditor.evidence.text.ids))
    failed = [c for c in found["canaries"] if not c["passed"]]
    because = [
        f"canary {c['name']} by {c['attack']}: found {c['found']:.3f} where at least "
        f"{c['needed']:.3f} was planted, {c['control']:.3f} in the control where at most "
        f"{c['control_limit']:.3f} is chance"
        for c in failed
    ]
    evidence, text = auditor.evidence, auditor.evidence.text
    shown, said = _sentences(auditor, best, show_text)
    results = _read(auditor.folder / "results.json")
    saved = json.loads((auditor.folder / "config.json").read_text(encoding="utf-8"))
    audit = {
        "format": FORMAT,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "run": {
            "name": auditor.folder.name,
            "run_id": saved["run_id"],
            "config": flatten(auditor.config),
            "final": results.get("final"),
            "privacy": results.get("privacy") or _promised(auditor),
        },
        # without a planted leak nothing is known either way
        "checked": bool(found["canaries"]),
        "valid": not failed if found["canaries"] else None,
        "invalid_because": because,
        "preset": auditor.preset.name,
        "evidence": {
            "kind": evidence.kind,
            "said": evidence.said,
            "sentences": len(text.ids),
            "tokens": _count(auditor, "text"),
            "content_tokens": _count(auditor, "content"),
            "seed": auditor.seed,
            "public_sentences": len(auditor.cloud.public.sequences),
            "in_domain_sentences": len(evidence.in_domain.ids),
        },
        "definitions": dict(DEFINITIONS),
        "levels": dict(LEVELS),
        "best": best,
        "best_content": best_attacks(found["attacks"], len(text.ids), "content_top1"),
        "sentences": shown,
        "sentences_said": said,
        "settings": auditor.preset.settings(),
        "versions": versions(),
        "limits": list(LIMITS),
        **found,
    }
    return {"headline": headline(audit), **audit}


def best_attacks(
    attacks: list[dict[str, Any]], sentences: int, name: str = "top1"
) -> dict[str, str]:
    """Name the attack with the highest figure at each level.

    Who knows more may also do what those do who know less. Attacks that saw less than half of the
    sentences are left out: their figures are too uncertain to be picked by.

    Parameters
    ----------
    attacks : list of dict
        As in ``audit.json``.
    sentences : int
        Under attack.
    name : str
        The measure.
    """
    order = list(LEVELS)
    best: dict[str, str] = {}
    for number, level in enumerate(order):
        able = [
            a
            for a in attacks
            if order.index(a["level"]) <= number and 2 * a["sentences"] >= sentences
        ]
        if any(a["level"] == level for a in able):
            best[level] = max(able, key=lambda a: _value(a, name))["key"]
    return best


def headline(audit: dict[str, Any]) -> str:
    """Say in one sentence how much text came out, the strongest attacker first."""
    if audit["valid"] is False:
        return "This audit is INVALID: it missed a planted leak, or found one where there was none."
    if not audit["best"]:
        return "No attack on tokens was run."
    strongest: Level = [level for level in LEVELS if level in audit["best"]][-1]
    floor = audit["floors"]["constant"]
    said = (
        f"An attacker who {_WHO[strongest]} reads {_read_by(audit, strongest)}; by chance it "
        f"would be {_percent(floor['top1']['value'])} and "
        f"{_percent(floor['content_top1']['value'])}."
    )
    if strongest != "unaware" and "unaware" in audit["best"]:
        said += (
            f" One who {_WHO['unaware']}, as the paper assumes, reads {_read_by(audit, 'unaware')}."
        )
    return said


_WHO: dict[Level, str] = {
    "unaware": "does not know the perturbation",
    "adaptive": "knows everything but the devices' secrets",
    "in-domain": "knows everything but the devices' secrets and owns similar text",
}


def best_value(audit: dict[str, Any], level: str, name: str) -> float | None:
    """Give the highest figure of a level: ``top1`` or ``content_top1``, each with its own best."""
    key = audit["best" if name == "top1" else "best_content"].get(level)
    found = {a["key"]: a["measures"][name]["value"] for a in audit["attacks"]}
    value: float | None = found.get(key)
    return value


def frontier_point(audit: dict[str, Any]) -> dict[str, Any]:
    """Give an audited run's place between utility and privacy."""
    config, final = audit["run"]["config"], audit["run"]["final"] or {}
    mechanism = config["privacy.mechanism"]
    label = mechanism if mechanism == "none" else f"{mechanism} {config['privacy.noise']:g}"
    shifted = audit["run"]["privacy"].get("decoder")
    return {
        "name": audit["run"]["name"],
        "label": f"{label} + decoder" if shifted else label,
        "accuracy": final.get("test_accuracy"),
        "unaware": best_value(audit, "unaware", "top1"),
        "adaptive": best_value(audit, "adaptive", "top1"),
        "adaptive_content": best_value(audit, "adaptive", "content_top1"),
        "in_domain": best_value(audit, "in-domain", "top1"),
        "floor": audit["floors"]["constant"]["top1"]["value"],
    }


def _sentences(
    auditor: Auditor, best: dict[str, str], show_text: bool
) -> tuple[list[dict[str, Any]], str]:
    if auditor.evidence.kind != "private":
        return [], "The devices are real ones: their text is not known here, and not shown."
    if not show_text:
        return [], "The operator asked for no text."
    if not best:
        return [], "No attack on tokens was run."
    key = best[next(level for level in reversed(list(LEVELS)) if level in best)]
    guesses = auditor.parts.guesses(key)
    truth, tokenizer = auditor.truth, auditor.tokenizer
    shown = []
    for ids, guess, counted, content in zip(
        truth.ids[:_SHOWN],
        guesses[:_SHOWN],
        truth.masks["text"],
        truth.masks["content"],
        strict=False,
    ):
        words = tokenizer.convert_ids_to_tokens([int(i) for i in ids])
        said = tokenizer.convert_ids_to_tokens([int(g) for g in guess[:, 0]])
        hits = np.asarray(ids) == guess[:, 0]
        shown.append(
            {
                "attack": key,
                "share": float(hits[counted].mean()) if counted.any() else None,
                "tokens": [
                    {
                        "text": w,
                        "guess": g,
                        "hit": bool(h),
                        "kind": "special" if not n else "content" if c else "function",
                    }
                    for w, g, h, n, c in zip(words, said, hits, counted, content, strict=True)
                ],
            }
        )
    return shown, "A simulation: the operator holds the devices' text."


def _promised(auditor: Auditor) -> dict[str, Any]:
    guarantee = auditor.cloud.mechanism.guarantee()
    return {
        "mechanism": auditor.cloud.mechanism.name,
        "metric": guarantee.metric,
        "adversary": guarantee.adversary,
        "statement": guarantee.statement,
        "eta_max": guarantee.eta,
    }


def _count(auditor: Auditor, kind: Kind) -> int:
    return int(sum(mask.sum() for mask in auditor.truth.masks[kind]))


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
    return content


def _value(attack: dict[str, Any], name: str) -> float:
    value = attack["measures"][name]["value"]
    return -1.0 if value is None else float(value)


def _read_by(audit: dict[str, Any], level: Level) -> str:
    return (
        f"{_percent(best_value(audit, level, 'top1'))} of the tokens and "
        f"{_percent(best_value(audit, level, 'content_top1'))} of the content words"
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
