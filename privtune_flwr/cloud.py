"""The cloud's side of a run before any device is asked: bottom model, mechanism, decoder, test set.

Everything here is made from public things: a public model, public text, the run configuration.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from datasets import Dataset

from privtune_flwr.assets import cache_root
from privtune_flwr.bundle import BundleCache, Manifest
from privtune_flwr.codec import get_codec
from privtune_flwr.config import RunConfig
from privtune_flwr.data import load_public_text, tokenise
from privtune_flwr.data.held_out import class_positions, load_test_set
from privtune_flwr.models import (
    BottomModel,
    CutModel,
    apply_lora,
    create_lift,
    cut_model,
    parameter_groups,
    resolve_model,
)
from privtune_flwr.privacy.base import Mechanism, MechanismError, MechanismSpec
from privtune_flwr.privacy.keyed import keyed_generator
from privtune_flwr.privacy.public import PublicKnowledge
from privtune_flwr.privacy.registry import create_mechanism, mechanism_class
from privtune_flwr.training.store import SmashedStore
from privtune_flwr.training.trainer import TopModelTrainer, pick_device

Rows = npt.NDArray[np.float32]
logger = logging.getLogger("privtune.cloud")
TEST_CHUNK = 256
TEST_DEVICE = "cloud"


@dataclass
class CloudSide:
    """What the cloud prepared.

    Attributes
    ----------
    config : RunConfig
    bottom : BottomModel
        Also the cloud's own copy: it made the bundle, and runs public text through it.
    bundles : list of (Manifest, Path)
        Bottom model first, then the mechanism's public artefact if it has one.
    spec : MechanismSpec
        What devices are asked to use.
    mechanism : Mechanism
        The cloud's instance, for public text.
    public : PublicKnowledge
        Bank, counts and rows of public text.
    learned : bool
        Whether the mechanism is what a learning phase froze; see :meth:`adopt`.
    seconds : dict
        Time spent on preparation and on the cloud's post-processing.
    adaptation : dict
        What adapting the top model to public releases came to, if it was asked for.
    """

    config: RunConfig
    bottom: BottomModel
    bundles: list[tuple[Manifest, Path]]
    spec: MechanismSpec
    mechanism: Mechanism
    public: PublicKnowledge
    learned: bool = False
    seconds: dict[str, float] = field(default_factory=lambda: {"prepare": 0.0, "decode": 0.0})
    adaptation: dict[str, float] = field(default_factory=dict)

    @property
    def bottom_id(self) -> str:
        """Hash of the bottom model's bundle."""
        return self.bundles[0][0].id

    @property
    def learns(self) -> bool:
        """Whether the mechanism is a draft that must be learned before anything is released."""
        return self.mechanism.learned and not self.learned

    def adopt(self, spec: MechanismSpec, artefact: Path | None) -> None:
        """Take the mechanism up that a learning phase froze, in place of its draft.

        Raises
        ------
        MechanismError
            If it does not load, or releases rows of another width than the draft.
        """
        bundles = self.bundles[:1]
        folder = None
        if spec.artefact and artefact is not None:
            manifest = cloud_cache().add_folder(artefact)
            folder = cloud_cache().path(manifest.id)
            bundles.append((manifest, folder))
        mechanism = create_mechanism(spec, folder, self.bottom)
        if mechanism.name != self.mechanism.name or self.width != mechanism.width(
            self.bottom.hidden_size
        ):
            raise MechanismError(f"{spec.name}: what was learned is not what the draft promised")
        self.spec, self.mechanism, self.bundles, self.learned = spec, mechanism, bundles, True

    @property
    def width(self) -> int:
        """Width of a released row."""
        return self.mechanism.width(self.bottom.hidden_size)

    @property
    def store_dtype(self) -> str:
        """How received rows are kept."""
        return "float32" if self.config.privacy.wire.startswith("float32") else "float16"

    @property
    def uses_decoder(self) -> bool:
        """Whether received rows are post-processed before they are trained on."""
        recovery = self.config.recovery
        if recovery.denoise != "none" or recovery.scale != "none":
            return True
        return self.config.privacy.decoder and self.mechanism.shift() is not None

    def decoder(self) -> Callable[[Rows], Rows] | None:
        """Build the decoder: post-processing, so it costs the devices no privacy.

        It un-shifts or denoises and scales, from p* and the noise law. One cloud, one knowledge:
        the attacker has them as well.
        """
        if not self.uses_decoder:
            return None
        from privtune_flwr.training.recover import build_recovery

        device = str(pick_device(self.config.train.device))
        recover = build_recovery(self.config, self.mechanism, self.public, device=device)
        if recover is None:
            return None

        def decode(rows_ND: Rows) -> Rows:
            start = time.perf_counter()
            decoded = recover(rows_ND)
            self.seconds["decode"] += time.perf_counter() - start
            return decoded

        return decode

    def open_store(self, folder: Path) -> SmashedStore:
        """Open a store for received rows, with the decoder before it."""
        return SmashedStore(
            folder, hidden=self.width, dtype=self.store_dtype, decoder=self.decoder()
        )

    def build_top(
        self, labels: Sequence[str], *, fresh: bool = True
    ) -> tuple[CutModel, TopModelTrainer]:
        """Cut the model again, now with a head for these classes, and set its training up.

        Where released rows are not as wide as the model, its front is a lift. With
        ``recovery.adapt`` it is adapted to public releases first, unless it is not ``fresh``: a
        checkpoint will replace what it would have learned.
        """
        model, train = self.config.model, self.config.train
        cut = cut_model(
            resolve_model(model.name),
            cut=model.cut,
            num_labels=len(labels),
            head=model.head,
            seed=self.config.run.seed,
            labels=labels,
        )
        if model.tuning == "lora":
            apply_lora(cut.top, model)
        if self.width != self.bottom.hidden_size:
            start = getattr(self.mechanism, "lift_start", None)
            cut.top.lift = create_lift(
                self.width,
                model.max_length,
                self.public.rows().values,
                start=start() if start else None,
                seed=self.config.run.seed,
            )
        if fresh and self.config.recovery.adapt != "none":
            from privtune_flwr.training.adapt import adapt_top

            self.adaptation = adapt_top(self, cut)
        groups = parameter_groups(
            cut.top,
            lr=train.learning_rate,
            head_lr=train.head_learning_rate,
            weight_decay=train.weight_decay,
        )
        return cut, TopModelTrainer(cut.top, groups, train, seed=self.config.run.seed)

    def add_test_set(self, store: SmashedStore, labels: Sequence[str]) -> int:
        """Send the public test set through bottom model, mechanism and wire into the store.

        It is perturbed as a device's query would be, with a generator of the cloud's own: the
        accuracy on it is that of a private query, not of a clean one.

        Returns
        -------
        int
            Its examples; 0 with ``data.test-source = none``.
        """
        data = self.config.data
        if data.test_source == "none" or data.test_examples == 0:
            return 0
        test = self.load_test_set(labels)
        position = class_positions(test, labels, data)
        ids = tokenise(self.bottom.tokenizer, list(test["text"]), self.config.model.max_length)
        key = b"the cloud's own public test set".ljust(32)
        for chunk, start in enumerate(range(0, len(ids), TEST_CHUNK)):
            if (TEST_DEVICE, "test", 0, chunk) in store:
                continue
            part = ids[start : start + TEST_CHUNK]
            rows_ND, lengths = self.release(part, key, start)
            wanted = [position[int(v)] for v in test["label"][start : start + TEST_CHUNK]]
            store.append((TEST_DEVICE, "test", 0, chunk), rows_ND, lengths, wanted)
        return len(ids)

    def release(
        self, ids: Sequence[npt.NDArray[np.int32]], key: bytes, first: int
    ) -> tuple[Rows, list[int]]:
        """Send public sentences through bottom model, mechanism and wire, as a device would.

        Parameters
        ----------
        ids : sequence of int arrays (T,)
            The sentences.
        key : bytes
            32 bytes; it is the cloud's own, and no secret.
        first : int
            Number of the first sentence: each has noise of its own.

        Returns
        -------
        rows_ND, lengths
            What arrives, not decoded yet, and the tokens of each sentence.
        """
        rows = [
            self.mechanism.perturb(hidden, i, keyed_generator(key, self.config.run.seed, first + n))
            for n, (hidden, i) in enumerate(zip(self.bottom.encode(ids), ids, strict=True))
        ]
        lengths = np.array([len(i) for i in ids], dtype=np.uint16)
        codec = get_codec(self.config.privacy.wire)
        rows_ND = codec.decode(codec.encode(np.concatenate(rows), lengths), lengths)
        return rows_ND, lengths.tolist()

    def load_test_set(self, labels: Sequence[str]) -> Dataset:
        """Load the public test set in the order in which :meth:`add_test_set` sends it."""
        return load_test_set(self.config, labels)


def cloud_cache() -> BundleCache:
    """Open the cloud's own bundles.

    Apart from the simulated devices' shared cache: what they hold must have been provisioned.
    """
    return BundleCache(cache_root() / "cloud-bundles")


def prepare_cloud(config: RunConfig) -> CloudSide:
    """Cut the model, make its bundle, and design the mechanism from public text.

    Raises
    ------
    ModelError, MechanismError, DataError, AssetError
        Before any device is asked, naming the key and what is allowed.
    """
    start = time.perf_counter()
    cache = cloud_cache()
    cut = cut_model(
        resolve_model(config.model.name),
        cut=config.model.cut,
        num_labels=2,
        head=config.model.head,
        seed=config.run.seed,
    )
    _check_length(config, cut.bottom)
    bundles = [_bundle(cache, cut.bottom.save)]
    logger.info("mechanism %s: tables of public text are built once", config.privacy.mechanism)
    public = PublicKnowledge(
        cut.bottom,
        cut.tokenizer,
        load_public_text(config.data.public_corpora),
        cache_root(),
        bottom_id=bundles[0][0].id,
        max_length=config.model.max_length,
    )
    specs: list[MechanismSpec] = []

    def design(folder: Path) -> None:
        kind = mechanism_class(config.privacy.mechanism)
        specs.append(kind.design(config.privacy, public, folder))

    artefact = _bundle(cache, design)
    spec = specs[0]
    if spec.artefact:
        bundles.append(artefact)
    mechanism = create_mechanism(spec, artefact[1] if spec.artefact else None, cut.bottom)
    side = CloudSide(config, cut.bottom, bundles, spec, mechanism, public)
    side.seconds["prepare"] = time.perf_counter() - start
    return side


def _check_length(config: RunConfig, bottom: BottomModel) -> None:
    from privtune_flwr.models import ModelError

    limit = bottom.max_positions
    if limit is not None and config.model.max_length > limit:
        raise ModelError(
            f"model.max-length = {config.model.max_length}: this model has {limit} positions"
        )


def _bundle(cache: BundleCache, write: Callable[[Path], Any]) -> tuple[Manifest, Path]:
    with tempfile.TemporaryDirectory(dir=cache.root) as folder:
        write(Path(folder))
        manifest = cache.add_folder(Path(folder))
    return manifest, cache.path(manifest.id)
