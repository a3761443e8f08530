"""The learning phase: rounds of federated averaging before anything is released.

Only a mechanism with learned parts has one. The cloud sends the state, devices answer with an
update that they clipped and noised themselves, the cloud averages; then the state is frozen into
the mechanism that devices release with.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any

from flwr.app import Message

from privtune_flwr.cloud import CloudSide
from privtune_flwr.config import ConfigError
from privtune_flwr.data.snippets import SNIPPET_CLASSES
from privtune_flwr.errors import InvalidReplyError, RunError
from privtune_flwr.learned import (
    LearningProgress,
    adopt_learned,
    freeze,
    load_state,
    save_state,
)
from privtune_flwr.privacy.learned_update import check_change, norm_of
from privtune_flwr.privacy.learning import Learner, State
from privtune_flwr.protocol import (
    LearnRequest,
    ReceivedUpdate,
    learn_content,
    read_update,
    to_message,
)
from privtune_flwr.results.run_folder import RunFolder
from privtune_flwr.training.averaging import WeightedMean
from strategies.exchange import Exchange, failure
from strategies.fleet import Fleet, provision
from strategies.intake import terms_of

logger = logging.getLogger("privtune.cloud")

# replies that are held at once, all together
WAVE_BYTES = 2**30
_SUMMED = ("loss_sum", "correct", "adversary_loss_sum", "seconds_learn")


def learning_terms(cloud: CloudSide) -> dict[str, Any]:
    """Say in a describe request what is still to be learned.

    Raises
    ------
    ConfigError
        If there would be noise in units of a clip that is not set.
    """
    settings = cloud.config.privacy.learning
    if cloud.learns and settings.noise > 0 and settings.clip == 0:
        raise ConfigError(
            f"privacy.learning.noise = {settings.noise}: is in units of privacy.learning.clip, "
            "which must then be above 0"
        )
    rounds = settings.rounds if cloud.learns else 0
    return {"learning_rounds": rounds, "clip": settings.clip, "noise": settings.noise}


def learn_first(
    cloud: CloudSide, folder: RunFolder, fleet: Fleet, exchange: Exchange
) -> tuple[list[dict[str, Any]], float]:
    """Have a learned mechanism learned, or take up what an earlier start of the run learned.

    Returns
    -------
    rounds : list of dict
        One record a learning round; none where nothing is to be learned.
    earlier : float
        Seconds of the phase that earlier starts of this run took.
    """
    if not cloud.mechanism.learned:
        return [], 0.0
    if cloud.learns:
        progress, earlier = LearningPhase(cloud, folder, fleet, exchange).run()
        for bundle in cloud.bundles[1:]:
            provision(fleet, {}, bundle, folder.run_id, exchange)
        return list(progress.rounds), earlier
    saved = load_state(folder.path)
    if saved is None:
        raise RunError(f"{folder.path}: has a learned mechanism, but not the record of its rounds")
    progress = saved[1]
    cloud.seconds["start"] = progress.start_seconds
    if not folder.checkpoint.exists():
        exchange.traffic.include(progress.traffic)
    drop_again(fleet, progress)
    return list(progress.rounds), progress.seconds


def drop_again(fleet: Fleet, progress: LearningProgress) -> None:
    """Leave those out that an earlier start of the phase dropped."""
    for device, reason in progress.dropped.items():
        if device in fleet.nodes:
            fleet.drop(device, reason)


class LearningPhase:
    """Learn a mechanism's parts with the devices of a fleet.

    Parameters
    ----------
    cloud : CloudSide
        Holds the draft; :func:`privtune_flwr.learned.adopt_learned` gives it what was learned.
    folder : RunFolder
        Where each round's state is kept.
    fleet : Fleet
        Devices; one that refuses, or answers with an update that cannot be used, is dropped.
    exchange : Exchange
        Messages and their traffic.
    """

    def __init__(
        self, cloud: CloudSide, folder: RunFolder, fleet: Fleet, exchange: Exchange
    ) -> None:
        self._cloud = cloud
        self._folder = folder
        self._fleet = fleet
        self._exchange = exchange
        self._settings = cloud.config.privacy.learning
        self._started = time.monotonic()

    def run(self) -> tuple[LearningProgress, float]:
        """Run the rounds that are left, freeze, and give the result to the cloud side.

        Returns
        -------
        progress : LearningProgress
        earlier : float
            Seconds of it that earlier starts of this run took.

        Raises
        ------
        RunError
            If no device takes part in a round. What earlier rounds learned is kept.
        ConfigError
            If it shall start from public labels, and the task has other classes.
        """
        learner = self._learner()
        state, progress = self._restore(learner)
        before = progress.seconds
        for number in range(progress.round + 1, self._settings.rounds + 1):
            state, record = self._round(learner, state, number, progress)
            progress.round = number
            progress.rounds.append(record)
            progress.traffic = self._exchange.traffic.totals
            progress.seconds = before + time.monotonic() - self._started
            save_state(self._folder.path, state, progress)
            self._report(record)
        self._cloud.seconds["start"] = progress.start_seconds
        freeze(self._folder.path, learner, state)
        if not adopt_learned(self._cloud, self._folder.path):
            raise RunError("the learning phase left no mechanism")
        return progress, before

    def _learner(self) -> Learner:
        cloud, names = self._cloud, self._fleet.label_names
        if self._settings.warm_start == "labels" and names != SNIPPET_CLASSES:
            raise ConfigError(
                "privacy.learning.warm-start = 'labels': the public text is labelled "
                f"{', '.join(SNIPPET_CLASSES)}, the task has {', '.join(names)}; allowed here: none"
            )
        folder = cloud.bundles[1][1] if cloud.spec.artefact else None
        return type(cloud.mechanism).learner(cloud.spec, folder, cloud.bottom, len(names))

    def _restore(self, learner: Learner) -> tuple[State, LearningProgress]:
        draft = self._cloud.spec.id
        saved = load_state(self._folder.path)
        if saved is None:
            begun = time.monotonic()
            state, progress = learner.start(), LearningProgress(draft)
            progress.seconds = time.monotonic() - begun
            progress.start_seconds = learner.start_seconds
            # a warm start takes minutes, and is all there is where no round follows
            save_state(self._folder.path, state, progress)
            logger.info("the cloud's own start of the learning: %.1f s", progress.seconds)
            progress.seconds = 0.0  # no earlier start of the run took any
            return state, progress
        state, progress = saved
        if progress.draft != draft:
            raise RunError("the learned state in the run folder is that of another mechanism")
        logger.info("resuming after learning round %d of %d", progress.round, self._settings.rounds)
        drop_again(self._fleet, progress)
        self._exchange.traffic.include(progress.traffic)
        return state, progress

    def _round(
        self, learner: Learner, state: State, number: int, progress: LearningProgress
    ) -> tuple[State, dict[str, Any]]:
        begun, waited = time.perf_counter(), self._exchange.seconds_waited
        request = self._request(number)
        mean = WeightedMean()
        sums: dict[str, float] = {}
        absent: dict[str, str] = {}
        for device, update in self._updates(request, state, progress, absent):
            mean.add(update.change, update.examples)
            for name in _SUMMED:
                if name in update.metrics:
                    sums[name] = sums.get(name, 0.0) + update.metrics[name]
                    sums[f"{name}_examples"] = sums.get(f"{name}_examples", 0) + update.examples
            logger.debug("learning round %d: %s answered", number, device)
        if not mean.updates:
            reasons = sorted({*absent.values(), *progress.dropped.values()})
            raise RunError(
                f"learning round {number}: no device took part: "
                f"{'; '.join(reasons[:5]) or 'none holds a training example'}"
            )
        change = mean.mean()
        state = check_change(learner.apply(state, change), state)
        record: dict[str, Any] = {
            "round": number,
            "kind": "learn",
            "devices": mean.updates,
            "examples": mean.examples,
            "update_norm": norm_of(change),
            "seconds_learn": sums.get("seconds_learn", 0.0),
            "seconds_wire": self._exchange.seconds_waited - waited,
            "seconds_round": time.perf_counter() - begun,
            "absent": absent,
            **self._exchange.traffic.training(),
        }
        if "loss_sum" in sums:
            # a device may keep its loss to itself: the mean is over those that tell it
            record["loss"] = sums["loss_sum"] / sums["loss_sum_examples"]
        return state, record

    def _request(self, number: int) -> LearnRequest:
        return LearnRequest(
            **terms_of(self._cloud, self._folder.run_id),
            round=number,
            rounds=self._settings.rounds,
            clip=self._settings.clip,
            noise=self._settings.noise,
            max_length=self._cloud.config.model.max_length,
            num_labels=len(self._fleet.label_names),
        )

    def _updates(
        self,
        request: LearnRequest,
        state: State,
        progress: LearningProgress,
        absent: dict[str, str],
    ) -> Iterator[tuple[str, ReceivedUpdate]]:
        """Ask all devices, a wave at a time, and yield sound updates in order of device."""
        content = learn_content(request, state)
        size = max(1, WAVE_BYTES // max(1, sum(v.nbytes for v in state.values())))
        devices = sorted(d for d in self._fleet.nodes if self._fleet.train.get(d))
        for start in range(0, len(devices), size):
            wave = devices[start : start + size]
            nodes = {device: self._fleet.nodes[device] for device in wave}
            replies = self._exchange.ask(
                to_message(content, node, request.action) for node in nodes.values()
            )
            for device, node in nodes.items():
                update = self._read(device, replies.get(node), request, state, progress, absent)
                if update is not None:
                    yield device, update

    def _read(
        self,
        device: str,
        reply: Message | None,
        request: LearnRequest,
        state: State,
        progress: LearningProgress,
        absent: dict[str, str],
    ) -> ReceivedUpdate | None:
        if why := failure(reply):
            if why.startswith("refused"):
                self._drop(device, why, progress)
            else:
                # a fault now need not be one in the next round, or at the release
                absent[device] = why
                logger.warning(
                    "%s is left out of learning round %d: %s", device, request.round, why
                )
            return None
        assert reply is not None
        try:
            return read_update(
                reply.content,
                request,
                state,
                device_id=device,
                examples=self._fleet.train[device],
            )
        except InvalidReplyError as error:
            self._drop(device, str(error), progress)
            return None

    def _drop(self, device: str, reason: str, progress: LearningProgress) -> None:
        progress.dropped[device] = reason
        self._fleet.drop(device, reason)

    def _report(self, record: Mapping[str, Any]) -> None:
        logger.info(
            "learning round %d/%d: %s, %d devices, %d examples, mean update of norm %.4g, %.1f s",
            record["round"],
            self._settings.rounds,
            f"loss {record['loss']:.4f}" if "loss" in record else "loss not told",
            record["devices"],
            record["examples"],
            record["update_norm"],
            record["seconds_round"],
        )
