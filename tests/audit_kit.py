"""Shared by the auditor's tests: a real bottom model, real text, releases of it."""

from __future__ import annotations

import functools
import gc
import tempfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from privtune_flwr.audit.attacks.base import Level, Released
from privtune_flwr.audit.knowledge import Knowledge
from privtune_flwr.config import PrivacyConfig
from privtune_flwr.models import BottomModel
from privtune_flwr.privacy.base import Mechanism
from privtune_flwr.privacy.keyed import example_identity, keyed_generator
from privtune_flwr.privacy.privtune.posterior import ShiftPosterior
from privtune_flwr.privacy.public import PublicKnowledge
from privtune_flwr.privacy.registry import create_mechanism, mechanism_class

# knowledge of one world in use at a time: each holds tables over the whole vocabulary
_KNOWN: OrderedDict[tuple[int, str, int, int], Shared] = OrderedDict()
_KEPT = 3


class Shared(Knowledge):
    """Knowledge whose Gaussian is fitted once, for all attacks that start from it."""

    @functools.cached_property
    def _fitted(self) -> ShiftPosterior:
        return super().posterior()

    def posterior(self) -> ShiftPosterior:
        return self._fitted


@dataclass
class Real:
    """MiniLM cut somewhere, public knowledge, and private sentences seen through it.

    ``in_domain`` are other sentences of the private source.
    """

    bottom: BottomModel
    public: PublicKnowledge
    texts: list[str]
    sequences: list[np.ndarray]
    clean: list[np.ndarray]
    in_domain: list[np.ndarray]

    def build(self, folder: Path, **changes: Any) -> Mechanism:
        """Design and load a mechanism; changes are those of PrivTune's privacy section."""
        config = PrivacyConfig(mechanism="privtune").model_copy(update=changes)
        spec = mechanism_class(config.mechanism).design(config, self.public, folder)
        return create_mechanism(spec, folder)

    def release(self, mechanism: Mechanism) -> Released:
        """Release all private sentences as a device would."""
        return Released(
            [
                mechanism.perturb(
                    h, s, keyed_generator(bytes(32), mechanism.spec.id, example_identity(s))
                )
                for h, s in zip(self.clean, self.sequences, strict=True)
            ]
        )

    def knowledge(self, level: Level, mechanism: Mechanism, own: int = 800) -> Knowledge:
        """What an attacker of a level knows of it; ``own`` sentences of the source at most.

        One object for the same mechanism, as the auditor shares one among its attacks.
        """
        in_domain = self.in_domain[:own] if level == "in-domain" else []
        # the mechanism is held by what is kept, so that its id is its own
        key = (id(self.public), level, id(mechanism), len(in_domain))
        if key not in _KNOWN:
            _KNOWN[key] = Shared(level, self.bottom, self.public, mechanism, in_domain)
        _KNOWN.move_to_end(key)
        while len(_KNOWN) > _KEPT:
            _KNOWN.popitem(last=False)
        return _KNOWN[key]


@functools.cache
def real(cut: int = 2, sentences: int = 150) -> Real:
    """Give MiniLM with movie-snippets as private and amazon- and nyt-snippets as public text."""
    from privtune_flwr.assets import cache_root, model_folder
    from privtune_flwr.bundle import Manifest
    from privtune_flwr.data import load_public_text, load_source, tokenise
    from privtune_flwr.models import cut_model

    model = cut_model(model_folder("minilm"), cut=cut, num_labels=2, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        model.bottom.save(folder)
        bottom_id = Manifest.of(Path(folder)).id
    public = PublicKnowledge(
        model.bottom,
        model.tokenizer,
        load_public_text(["amazon-snippets", "nyt-snippets"]),
        cache_root(),
        bottom_id=bottom_id,
    )
    texts = load_source("movie-snippets")["text"]
    order = np.random.default_rng(1).permutation(len(texts))
    private = [texts[int(i)] for i in order[:sentences]]
    own = [texts[int(i)] for i in order[sentences : sentences + 2000]]
    sequences = tokenise(model.tokenizer, private, 128)
    in_domain = tokenise(model.tokenizer, own, 128)
    gathered = Real(
        model.bottom, public, private, sequences, model.bottom.encode(sequences), in_domain
    )
    gc.collect()
    return gathered
