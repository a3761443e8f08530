"""Designing PrivTune's tables from public knowledge: shift, scale, and what a device solves over.

Each step is cached on its own: another noise scale does not solve for the shifts again.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.privacy.base import MechanismError, Param
from privtune_flwr.privacy.privtune.targets import Members, farthest_set, hop_members, mixed_points

if TYPE_CHECKING:
    from privtune_flwr.config import PrivacyConfig
    from privtune_flwr.privacy.privtune.geometry import Geometry
    from privtune_flwr.privacy.privtune.optimise import Program
    from privtune_flwr.privacy.public import PublicKnowledge

Tables = dict[str, NDArray[Any]]

_MEMBERS = 16  # of each hop set at least: closed form and descent then share one search
_ROWS_AT_ONCE = 256


def shift_table(config: PrivacyConfig, public: PublicKnowledge) -> NDArray[np.float16]:
    """Give ``p*_v`` of the whole vocabulary, (V, d); zero for special tokens.

    Raises
    ------
    MechanismError
        If a shift does not fit float16.
    """
    pgd = config.privtune.vector == "pgd"
    recipe: dict[str, Param] = {
        "hops": config.hops,
        "neighbours": config.neighbours,
        "targets": config.targets,
        "shift": config.shift,
        "vector": config.privtune.vector,
        **(program_params(config) if pgd else {}),
    }

    def build() -> Tables:
        # Special tokens are no nodes: nothing should come to resemble them.
        text = public.text_ids
        bank_ND = np.ascontiguousarray(public.bank[text])
        members = farthest_set(hop_sets(config, public))
        points_ND = mixed_points(bank_ND, members, targets=config.targets, unit=public.unit)
        shift_VD = np.zeros(public.bank.shape, dtype=np.float32)
        shift_VD[text] = config.shift * (points_ND - bank_ND)
        if pgd:
            shift_VD = _descended(config, public, shift_VD)
        with np.errstate(over="ignore"):
            rounded = shift_VD.astype(np.float16)
        if not np.isfinite(rounded).all():
            raise MechanismError("privtune: a shift does not fit float16")
        return {"shift": rounded}

    return public.cached("privtune-shift", recipe, build)["shift"]


def scale_table(config: PrivacyConfig, public: PublicKnowledge) -> NDArray[np.float32]:
    """Give ``s_v`` of the whole vocabulary, (V,)."""
    from privtune_flwr.privacy.privtune.importance import (
        importance,
        noise_scale,
        protected_entries,
    )

    settings = config.privtune

    def build() -> Tables:
        return {"score": importance(public.sequences, public.bank, kind=settings.importance)}

    score_V = public.cached("privtune-importance", {"kind": settings.importance}, build)["score"]
    protected = protected_entries(public.tokenizer, len(score_V), settings.protect_patterns)
    special = np.setdiff1d(np.arange(len(score_V)), public.text_ids)
    return noise_scale(
        score_V,
        np.union1d(special, protected),
        floor=config.importance_floor,
        buckets=settings.buckets,
    )


def occurrence_tables(config: PrivacyConfig, public: PublicKnowledge) -> Tables:
    """Give the tables with which a device solves for its own rows, of the types it expects.

    Raises
    ------
    MechanismError
        If the bank does not fit float16.
    """
    from privtune_flwr.privacy.privtune.geometry import TABLES, geometry_tables

    tables = geometry_tables(public, hop_sets(config, public), config.privtune.validity)
    with np.errstate(over="ignore"):
        typed = {name: np.ascontiguousarray(tables[name], kind) for name, kind in TABLES.items()}
    if not np.isfinite(typed["bank"]).all():
        raise MechanismError("privtune: the bank does not fit float16")
    return typed


def program_params(config: PrivacyConfig) -> dict[str, Param]:
    """Give the program's weights and bounds as parameters of a specification."""
    from privtune_flwr.privacy.privtune.optimise import Program

    return {field.name: getattr(config.privtune, field.name) for field in fields(Program)}


def hop_sets(config: PrivacyConfig, public: PublicKnowledge) -> list[Members]:
    """Find the nearest members of N_1 to N_n of the text entries; cached."""
    count = max(_MEMBERS, config.targets)

    def build() -> Tables:
        from privtune_flwr.privacy.privtune.graph import symmetric_graph

        graph = symmetric_graph(public.nearest(config.neighbours)[1])
        bank_ND = np.ascontiguousarray(public.bank[public.text_ids])
        found = hop_members(bank_ND, graph, hops=config.hops, count=count)
        return {
            "ids": np.stack([members.ids for members in found]),
            "distances": np.stack([members.distances for members in found]),
        }

    key = {"hops": config.hops, "neighbours": config.neighbours, "count": count}
    tables = public.cached("privtune-hops", key, build)
    return [Members(*pair) for pair in zip(tables["ids"], tables["distances"], strict=True)]


def _descended(
    config: PrivacyConfig, public: PublicKnowledge, start_VD: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Solve the program for each text entry, h being its bank entry."""
    import torch

    from privtune_flwr.privacy.privtune.geometry import Geometry

    program = _program(config)
    geometry = Geometry.of(public, hop_sets(config, public), program.validity, public.unit)
    shift_VD = np.zeros_like(start_VD)
    for block in np.split(
        public.text_ids, range(_ROWS_AT_ONCE, len(public.text_ids), _ROWS_AT_ONCE)
    ):
        start = torch.from_numpy(start_VD[block])
        clean = torch.from_numpy(np.asarray(public.bank[block], dtype=np.float32))
        shift_VD[block] = solve(program, geometry, clean, block, start)
    return shift_VD


def solve(
    program: Program, geometry: Geometry, clean: Any, ids: NDArray[np.int64], start: Any
) -> NDArray[np.float32]:
    """Solve for rows (B, d) of tokens (B,), starting from the better of 0 and ``start``."""
    import torch

    from privtune_flwr.privacy.privtune.optimise import Descent

    rows = geometry.rows(clean, torch.from_numpy(np.asarray(ids, dtype=np.int64)))
    solution, _ = Descent(program, geometry).solve(rows, start)
    found: NDArray[np.float32] = solution.numpy()
    return found


def _program(config: PrivacyConfig) -> Program:
    from privtune_flwr.privacy.privtune.optimise import Program

    values: dict[str, Any] = program_params(config)
    return Program(**values)
