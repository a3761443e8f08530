"""What a run would take on other links and devices: a projection, never a measurement.

A run is a sequence of stages, measured in this simulation. For a device that takes part in one:

    d = F f c + 8 u / U + 8 v / V + m L

with c its compute seconds here, f the factor of its class, F the factor by which it is slower than
its class, u and v the bytes it sends and receives, U and V the link's bits a second up and down, m
messages (each a round trip) and L the seconds of a round trip. s is what the cloud computes in the
stage, as measured here. All devices of a stage are taken as equal but for one that is F times
slower, F = 1 where there is none.

- A *synchronous* stage waits for the slowest device, then the cloud works: d + s.
- *Release* stages overlap with training: devices prepare the next chunk while the cloud trains on
  this one. R of them in a row take d_1 + sum over r = 2..R of max(d_r, s_{r-1}) + s_R.
- In a *cloud* stage no device takes part: s.
- Where devices work one after the other, each stage is one device's, and the slow one's is one in
  N: F is replaced by its mean over devices, (N - 1 + F) / N.

What a device must hold first is apart: 8 x model bytes / V. Links and devices are assumptions,
round figures; links do not share their capacity, nothing is lost, and the cloud's own link and
queues cost nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from privtune_flwr.compare.measure import count_devices, device_work

Kind = Literal["sync", "release", "cloud"]


@dataclass(frozen=True)
class Link:
    """A device's way to the cloud: bits a second up and down, seconds of a round trip."""

    up: float
    down: float
    round_trip: float


@dataclass(frozen=True)
class Stage:
    """One stage of a run, per device that takes part in it.

    Attributes
    ----------
    kind : str
    compute : float
        Seconds on this machine.
    bytes_up, bytes_down, messages : float
    cloud : float
        Seconds of the cloud.
    """

    kind: Kind
    compute: float
    bytes_up: float
    bytes_down: float
    messages: float
    cloud: float

    def device(self, link: Link, factor: float, slow: float = 1.0) -> float:
        """Give d: seconds of one device, ``slow`` times slower than its class."""
        transfer = 8 * self.bytes_up / link.up + 8 * self.bytes_down / link.down
        return slow * factor * self.compute + transfer + self.messages * link.round_trip


LINKS: dict[str, Link] = {
    "LTE": Link(5e6, 20e6, 0.05),
    "home": Link(20e6, 100e6, 0.02),
    "LAN": Link(1e9, 1e9, 0.001),
}
#: Seconds of a device's work there for one second here, on one core of this machine.
DEVICES: dict[str, float] = {"phone": 4.0, "laptop": 1.5, "this machine": 1.0}
#: How much slower the one slow device is.
SLOW = 5.0
#: What is shown where there is no room for all.
SHOWN: tuple[tuple[str, str, float], ...] = (
    ("LTE", "phone", 1.0),
    ("LTE", "phone", SLOW),
    ("home", "laptop", 1.0),
    ("LAN", "this machine", 1.0),
)
# a round of any other kind is synchronous
_KINDS: dict[str, Kind] = {"release": "release", "train": "cloud"}
ASSUMED = (
    "Projected, not measured: bytes, messages and seconds of this simulation on assumed links and "
    "devices; synchronous rounds wait for the slowest device, the release overlaps with training."
)


def stages_of(results: Mapping[str, Any]) -> list[Stage] | None:
    """Cut a run into stages.

    Parameters
    ----------
    results : Mapping
        ``results.json``.

    Returns
    -------
    list of Stage or None
        None where the records lack bytes, or no device sends anything.
    """
    before = {"bytes_up": 0.0, "bytes_down": 0.0, "messages": 0.0}
    stages: list[Stage] = []
    alone = float(results["seconds"].get("start", 0.0))
    if alone:
        stages.append(Stage("cloud", 0.0, 0.0, 0.0, 0.0, cloud=alone))
    for record in results["per_round"]:
        if "bytes_up" not in record:
            return None
        spent = {key: record[key] - value for key, value in before.items()}
        before = {key: float(record[key]) for key in before}
        devices = int(record.get("devices") or count_devices(results))
        stages.append(
            Stage(
                _KINDS.get(record["kind"], "sync"),
                compute=device_work(record) / devices,
                bytes_up=spent["bytes_up"] / devices,
                bytes_down=spent["bytes_down"] / devices,
                messages=spent["messages"] / devices,
                cloud=float(record.get("seconds_top", 0.0)),
            )
        )
    return stages if before["messages"] else None


def predict(stages: Sequence[Stage], link: Link, factor: float, slow: float = 1.0) -> float:
    """Give the wall seconds that stages take; see the module's formulas.

    Parameters
    ----------
    stages : sequence of Stage
    link : Link
        Of every device.
    factor : float
        Of every device's class.
    slow : float
        Of one device, on top; 1 = none is slow.
    """
    total = 0.0
    for kind, group in groupby(stages, key=lambda s: s.kind):
        run = list(group)
        if kind == "cloud":
            total += sum(s.cloud for s in run)
        elif kind == "sync":
            total += sum(s.device(link, factor, slow) + s.cloud for s in run)
        else:
            ready = [s.device(link, factor, slow) for s in run]
            waits = [max(d, s.cloud) for d, s in zip(ready[1:], run, strict=False)]
            total += ready[0] + sum(waits) + run[-1].cloud
    return total


def project(results: Mapping[str, Any], *, serial: bool = False) -> dict[str, Any] | None:
    """Project a run on every link and device class.

    Parameters
    ----------
    results : Mapping
        ``results.json``.
    serial : bool
        Whether devices work one after the other.

    Returns
    -------
    dict or None
        ``projected`` is always true. ``seconds`` has one row for each link, class and slow
        factor; ``model_seconds`` what it takes to fetch the model over each link.
    """
    stages = stages_of(results)
    if stages is None:
        return None
    number = count_devices(results)
    felt = (number - 1 + SLOW) / number if serial else SLOW
    held = results["traffic"].get("model_bytes")
    return {
        "projected": True,
        "seconds": [
            {
                "link": link,
                "device": device,
                "slow": slow,
                "seconds": predict(stages, LINKS[link], DEVICES[device], effect),
            }
            for link in LINKS
            for device in DEVICES
            for slow, effect in ((1.0, 1.0), (SLOW, felt))
        ],
        "model_seconds": {
            name: None if held is None else 8 * held / link.down for name, link in LINKS.items()
        },
    }


def assumptions() -> dict[str, Any]:
    """Give links, classes and what is said of them, for the record."""
    return {
        "projected": True,
        "statement": ASSUMED,
        "links": {
            name: {
                "bits_per_second_up": link.up,
                "bits_per_second_down": link.down,
                "seconds_round_trip": link.round_trip,
            }
            for name, link in LINKS.items()
        },
        "devices": dict(DEVICES),
        "slow": SLOW,
    }
