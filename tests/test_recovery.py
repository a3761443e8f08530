"""Recovery in the cloud: denoising, scaling, adapting the top model, lifting narrow rows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from audit_kit import Real
from audit_kit import real as real_minilm

from privtune_flwr.cloud import CloudSide
from privtune_flwr.config import ConfigError, load_run_config
from privtune_flwr.data import load_public_labelled
from privtune_flwr.models import ModelError, create_lift, export, load_lift, load_top_state
from privtune_flwr.models import top_state as state_of
from privtune_flwr.privacy import released
from privtune_flwr.privacy.base import Mechanism, MechanismSpec
from privtune_flwr.privacy.dchi import DChi
from privtune_flwr.privacy.identity import Identity
from privtune_flwr.privacy.privtune.posterior import ShiftPosterior
from privtune_flwr.privacy.public import PublicKnowledge
from privtune_flwr.training import adapt, recover
from privtune_flwr.training.adapt import public_reference
from privtune_flwr.training.recover import RegressedMean, build_recovery, fit_denoiser, noise_power
from privtune_flwr.training.store import Example

LABELS = ["negative", "positive"]
ROWS = 400  # private rows that errors are measured on: the vocabulary is weighed for each


@pytest.fixture(scope="module")
def real() -> Real:
    return real_minilm()


@pytest.fixture(scope="module")
def public(real: Real, tmp_path_factory: pytest.TempPathFactory) -> PublicKnowledge:
    """The real public knowledge, but what is new goes to a folder of the tests' own."""
    real.public.cached("sequences", {}, dict)  # its folder exists
    folder = tmp_path_factory.mktemp("public")
    for table in real.public._folder.iterdir():
        if table.is_dir() and not table.name.startswith("."):
            (folder / table.name).symlink_to(table, target_is_directory=True)
    mine = copy.copy(real.public)
    mine._folder = folder
    return mine


class Halved(DChi):
    """A mechanism of which nobody says that it adds noise: half of what dchi releases."""

    name: ClassVar[str] = "halved"
    additive: ClassVar[bool] = False

    def _perturb(self, hidden_TD: Any, ids_T: Any, rng: np.random.Generator) -> Any:
        return super()._perturb(hidden_TD, ids_T, rng) / 2


class Narrow(Identity):
    """Releases the first four numbers of a row."""

    name: ClassVar[str] = "narrow"
    additive: ClassVar[bool] = False

    def width(self, hidden_size: int) -> int:
        return 4

    def _perturb(self, hidden_TD: Any, ids_T: Any, rng: np.random.Generator) -> Any:
        return hidden_TD[:, :4]


class Started(Narrow):
    """Says where its lift starts."""

    def lift_start(self) -> dict[str, Any]:
        return {"projection": np.ones((4, 384), np.float32), "positions": np.eye(8, 384)}


def cloud_side(
    real: Real, public: PublicKnowledge, mechanism: Mechanism, **settings: Any
) -> CloudSide:
    config = load_run_config({key.replace("__", "."): v for key, v in settings.items()})
    return CloudSide(config, real.bottom, [], mechanism.spec, mechanism, public)


def noisy(real: Real, folder: Path, name: str, noise: float) -> Mechanism:
    return real.build(folder, mechanism=name, noise=noise)


def error(rows: Any, real: Real) -> float:
    """Mean squared error to the clean private rows."""
    clean = np.concatenate(real.clean)[: len(rows)]
    return float(np.square(rows - clean).sum(axis=1).mean())


# denoising and scaling


@pytest.mark.parametrize(
    ("name", "noise", "of_raw", "of_unshifted"),
    [("dchi", 4.0, 0.06, 0.06), ("privtune", 0.25, 0.06, 0.9), ("privtune", 1.0, 0.2, 0.5)],
)
def test_the_posterior_mean_is_nearer_to_clean_rows(
    real: Real, tmp_path: Path, name: str, noise: float, of_raw: float, of_unshifted: float
) -> None:
    mechanism = noisy(real, tmp_path, name, noise)
    rows = real.release(mechanism).stacked[:ROWS]
    unshifted = ShiftPosterior.fit(mechanism, real.public).unshift(rows)
    denoised = fit_denoiser(mechanism, real.public)(rows)
    assert denoised.shape == rows.shape
    assert denoised.dtype == np.float32
    assert error(denoised, real) < of_raw * error(rows, real)
    assert error(denoised, real) < of_unshifted * error(unshifted, real)


def test_a_mechanism_that_is_not_additive_is_denoised_as_well(
    real: Real, public: PublicKnowledge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(released, "_DRAWS", 1)  # more text than this test needs is released thrice
    dchi = noisy(real, tmp_path, "dchi", 1.0)
    assert isinstance(dchi, DChi)
    halved = Halved(MechanismSpec("halved"), eta=dchi.eta, dimension=dchi.dimension)
    denoiser = fit_denoiser(halved, public)
    assert isinstance(denoiser, RegressedMean)
    known = error(fit_denoiser(dchi, public)(real.release(dchi).stacked[:ROWS]), real)
    learned = error(denoiser(real.release(halved).stacked[:ROWS]), real)
    # twice the noise of a half is the same knowledge; learning it from text costs a little
    assert learned < 1.15 * known


def test_rows_without_noise_stay(real: Real, public: PublicKnowledge) -> None:
    mechanism = Identity(MechanismSpec("none"))
    rows = np.concatenate(real.clean)[:300]
    assert error(fit_denoiser(mechanism, public)(rows), real) < 1e-3 * np.square(rows).sum(1).mean()


def test_noise_power_is_that_of_the_law() -> None:
    mechanism = DChi(MechanismSpec("dchi"), eta=2.0, dimension=64)
    bank_VD = np.random.default_rng(0).normal(size=(500, 64)).astype(np.float32)
    # E r^2 = d (d + 1) / eta^2 for r ~ Gamma(d, 1 / eta)
    power = noise_power(mechanism, bank_VD, bank_VD)
    assert power.mean() == pytest.approx(65 / 4, rel=0.03)
    assert power.std() / power.mean() < 0.2


def test_scaling_gives_clean_norms(
    real: Real, public: PublicKnowledge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recover, "_SCALE_TOKENS", 2000)
    mechanism = noisy(real, tmp_path, "dchi", 4.0)
    rows = real.release(mechanism).stacked[:ROWS]
    clean = np.linalg.norm(np.concatenate(real.clean)[:ROWS], axis=1).mean()
    for denoise in ("none", "posterior-mean"):
        config = load_run_config({"recovery.scale": "clean-norm", "recovery.denoise": denoise})
        process = build_recovery(config, mechanism, public)
        assert process is not None
        # the factor is that of public text, the rows are private ones of another kind
        assert np.linalg.norm(process(rows), axis=1).mean() == pytest.approx(clean, rel=0.06)
    assert np.linalg.norm(rows, axis=1).mean() > 2 * clean


def test_denoising_replaces_the_decoder(
    real: Real, public: PublicKnowledge, tmp_path: Path
) -> None:
    mechanism = noisy(real, tmp_path, "privtune", 0.25)
    rows = real.release(mechanism).stacked[:50]
    both = cloud_side(real, public, mechanism, recovery__denoise="posterior-mean")
    assert both.config.privacy.decoder
    decode = both.decoder()
    assert decode is not None
    np.testing.assert_array_equal(decode(rows), fit_denoiser(mechanism, public)(rows))
    assert both.seconds["decode"] > 0
    nothing = cloud_side(real, public, mechanism, privacy__decoder=False)
    assert nothing.decoder() is None
    assert not nothing.uses_decoder


@pytest.mark.parametrize(("key", "value"), [("denoise", "posterior-mean"), ("scale", "clean-norm")])
def test_narrow_rows_cannot_be_denoised(
    real: Real, public: PublicKnowledge, key: str, value: str
) -> None:
    side = cloud_side(real, public, Narrow(MechanismSpec("narrow")), **{f"recovery__{key}": value})
    with pytest.raises(ConfigError, match=rf"recovery\.{key} = '{value}'"):
        side.decoder()


# adapting


def adapting(kind: str, **more: Any) -> dict[str, Any]:
    return {
        "recovery__adapt": kind,
        "recovery__adapt-examples": 160,
        "recovery__adapt-epochs": 2,
        "recovery__adapt-learning-rate": 2e-4,
        "train__batch-size": 8,
        "train__device": "cpu",
        **more,
    }


@pytest.mark.parametrize(("kind", "count"), [("distil", 160), ("reconstruct", 60)])
def test_adapting_lowers_its_loss_on_held_out_text_and_is_done_once(
    real: Real,
    public: PublicKnowledge,
    tmp_path: Path,
    kind: str,
    count: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = adapting(kind, **{"recovery__adapt-examples": count})
    side = cloud_side(real, public, noisy(real, tmp_path, "dchi", 1.0), **settings)
    first, _ = side.build_top(LABELS)
    measured = dict(side.adaptation)
    assert measured["adapt_loss_after"] < 0.9 * measured["adapt_loss_before"]
    assert measured["adapt_examples"] == count * 9 // 10
    untouched, _ = side.build_top(LABELS, fresh=False)
    name = next(n for n, p in first.top.named_parameters() if ".layer." in n and p.ndim == 2)
    assert not torch.equal(state_of(first.top)[name], state_of(untouched.top)[name])

    def never(*_: Any) -> Any:
        raise AssertionError("adapted twice")

    monkeypatch.setattr(adapt, "_adapt", never)
    again, _ = side.build_top(LABELS)
    assert side.adaptation == measured
    for key, value in state_of(first.top).items():
        assert torch.equal(value, state_of(again.top)[key])
    settings |= {"recovery__adapt-epochs": 3}
    other = cloud_side(real, public, side.mechanism, **settings)
    with pytest.raises(AssertionError, match="adapted twice"):
        other.build_top(LABELS)


def test_public_labels_alone_beat_chance(
    real: Real, public: PublicKnowledge, tmp_path: Path
) -> None:
    settings = adapting(
        "none",
        **{
            "recovery__adapt-epochs": 1,
            "recovery__adapt-examples": 1000,
            "recovery__adapt-learning-rate": 2e-4,
            "train__batch-size": 16,  # half as many steps of the optimiser
            "model__max-length": 32,
            "data__test-examples": 200,
        },
    )
    side = cloud_side(real, public, noisy(real, tmp_path, "dchi", 0.25), **settings)
    measured = public_reference(side, LABELS)
    assert measured["test_examples"] == 200
    # a fair coin is above 0.61 of 200 in 0.1 % of cases
    assert measured["test_accuracy"] > 0.62
    assert measured["adapt_accuracy"] > 0.6
    assert side.config.recovery.adapt == "none"


def test_labels_of_another_task_do_not_serve(
    real: Real, public: PublicKnowledge, tmp_path: Path
) -> None:
    side = cloud_side(real, public, noisy(real, tmp_path, "dchi", 1.0), **adapting("labels"))
    with pytest.raises(ConfigError, match=r"recovery\.adapt = 'labels'"):
        side.build_top(["sport", "business"])


def test_labels_follow_the_order_of_the_classes(
    real: Real, public: PublicKnowledge, tmp_path: Path
) -> None:
    side = cloud_side(real, public, noisy(real, tmp_path, "dchi", 1.0), **adapting("labels"))
    drawn = []
    for names in (LABELS, LABELS[::-1]):
        model, _ = side.build_top(names, fresh=False)
        _, labels = adapt._material(side, model)
        assert labels is not None
        drawn.append(labels)
    assert drawn[0] == [1 - label for label in drawn[1]]
    assert 0 < sum(drawn[0]) < len(drawn[0])
    known = load_public_labelled(["amazon-snippets", "nyt-snippets"])
    assert len(known.texts) == len(known.labels)
    assert set(known.labels) == {0, 1}


# the lift


def padded(real: Real, width: int, extra: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [torch.from_numpy(h[:, :width]) for h in real.clean[:5]]
    longest = max(len(r) for r in rows) + extra
    hidden_BTR = torch.full((5, longest, width), float("inf"))
    mask_BT = torch.zeros(5, longest, dtype=torch.long)
    for i, part in enumerate(rows):
        hidden_BTR[i, : len(part)] = part
        mask_BT[i, : len(part)] = 1
    return hidden_BTR, mask_BT


def test_narrow_rows_are_lifted_and_the_lift_learns(real: Real, public: PublicKnowledge) -> None:
    side = cloud_side(real, public, Narrow(MechanismSpec("narrow")), train__device="cpu")
    model, trainer = side.build_top(LABELS)
    lift = model.top.lift
    assert lift is not None
    assert lift.width == 4
    head = [g for g in trainer.optimizer.param_groups if g["name"].startswith("head")]
    in_head = {id(p) for group in head for p in group["params"]}
    assert all(id(p) in in_head for p in lift.parameters())
    clean = public.rows().values
    hidden_BTR, mask_BT = padded(real, 4)
    lifted = lift(hidden_BTR, mask_BT)
    assert (lifted[mask_BT == 0] == 0).all()
    assert lifted.isfinite().all()
    spread = lifted[mask_BT == 1].std(dim=1).mean().item()
    assert spread == pytest.approx(float(clean.std(axis=1).mean()), rel=0.02)

    before = state_of(model.top)
    rows = np.concatenate([h[:, :4] for h in real.clean[:8]])
    starts = np.cumsum([0, *(len(h) for h in real.clean[:7])])
    examples = [
        Example(int(s), len(h), i % 2)
        for i, (s, h) in enumerate(zip(starts, real.clean[:8], strict=True))
    ]
    trainer.train_pass(rows, examples, round_number=1, total_steps=2)
    after = state_of(model.top)
    for name in ("projection", "positions", "norm.weight", "norm.bias"):
        assert not torch.equal(before[f"lift.{name}"], after[f"lift.{name}"])
    again, _ = side.build_top(LABELS)
    load_top_state(again.top, after)
    with torch.no_grad():
        expected = model.top(hidden_BTR, mask_BT)
        assert torch.equal(again.top(hidden_BTR, mask_BT), expected)
        longer = again.top(*padded(real, 4, extra=7))
    torch.testing.assert_close(longer, expected, atol=1e-5, rtol=1e-4)


def test_a_lift_starts_where_the_mechanism_says(real: Real, public: PublicKnowledge) -> None:
    side = cloud_side(real, public, Started(MechanismSpec("narrow")), train__device="cpu")
    lift = side.build_top(LABELS)[0].top.lift
    assert lift is not None
    assert (lift.projection == 1).all()
    assert torch.equal(lift.positions, torch.eye(8, 384))
    # a sentence longer than the table: its last vector serves
    mask_BT = torch.ones(1, 20, dtype=torch.long)
    lifted = lift(torch.zeros(1, 20, 4), mask_BT)
    assert torch.equal(lifted[0, 7], lifted[0, 19])
    assert not torch.equal(lifted[0, 6], lifted[0, 7])
    bad = {"projection": np.ones((3, 384)), "positions": np.ones((8, 384))}
    with pytest.raises(ModelError, match=r"\(3, 384\)"):
        create_lift(4, 8, public.rows().values, start=bad, seed=0)


def test_an_adapted_lift_is_exported_beside_the_model(
    real: Real, public: PublicKnowledge, tmp_path: Path
) -> None:
    settings = adapting("distil", **{"recovery__adapt-examples": 60, "recovery__adapt-epochs": 1})
    side = cloud_side(real, public, Narrow(MechanismSpec("narrow")), **settings)
    model, _ = side.build_top(LABELS)
    assert side.adaptation["adapt_loss_after"] < side.adaptation["adapt_loss_before"]
    for _ in range(2):
        export(model, tmp_path)
    assert (tmp_path / "README.md").read_text().count("Valid on clean input only") == 1
    lift = model.top.lift
    assert lift is not None
    for name, value in load_lift(tmp_path).state_dict().items():
        assert torch.equal(value, lift.state_dict()[name])
    with pytest.raises(ModelError, match="holds no lift"):
        load_lift(tmp_path / "nowhere")
