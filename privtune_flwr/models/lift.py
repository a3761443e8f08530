"""The lift: the top model's front where released rows are not as wide as the model.

A row of r numbers becomes a row of the hidden size: a learned map, a learned vector for each
position (narrow rows carry no positions of their own) and a layer norm. The norm starts so that it
puts each row at the mean and spread that clean rows have, which is where the blocks expect them.

Legend: B sentences, T tokens, R width of a released row, D hidden size, P positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from privtune_flwr.models.errors import ModelError

if TYPE_CHECKING:
    from privtune_flwr.models.top import TopModel

LIFT_FILE = "lift.safetensors"
LIFT_NOTE = f"""
## Valid on clean input only

This model was trained on released rows that are narrower than its hidden size. `{LIFT_FILE}`
holds the layer that lifted them (`projection`, `positions`, `norm.weight`, `norm.bias`; read it
with `privtune_flwr.models.load_lift`). The model in this folder joins bottom and top without it:
it takes ordinary, clean text, on which its blocks were never trained, so measure it before you
use it.
"""


class Lift(nn.Module):
    """From released rows (B, T, R) to rows of the model's size (B, T, D).

    Parameters
    ----------
    projection_RD : Tensor
        Starting values of the map.
    positions_PD : Tensor
        Starting values of the positions' vectors; positions past the table share its last one.
    mean, spread : float
        Mean and standard deviation over its coordinates that a lifted row starts with.
    """

    def __init__(
        self, projection_RD: Tensor, positions_PD: Tensor, *, mean: float = 0.0, spread: float = 1.0
    ) -> None:
        super().__init__()
        if (
            projection_RD.ndim != 2
            or positions_PD.ndim != 2
            or projection_RD.shape[1] != positions_PD.shape[1]
            or not len(positions_PD)
        ):
            raise ModelError(
                "a lift needs a projection (R, D) and positions (P, D), got "
                f"{tuple(projection_RD.shape)} and {tuple(positions_PD.shape)}"
            )
        self.projection = nn.Parameter(projection_RD.detach().clone().float())
        self.positions = nn.Parameter(positions_PD.detach().clone().float())
        self.norm = nn.LayerNorm(projection_RD.shape[1])
        nn.init.constant_(self.norm.weight, spread)
        nn.init.constant_(self.norm.bias, mean)

    @property
    def width(self) -> int:
        """R."""
        return len(self.projection)

    def forward(self, rows_BTR: Tensor, attention_mask_BT: Tensor) -> Tensor:
        """Lift rows; rows at padding are zero."""
        number_T = torch.arange(rows_BTR.shape[1], device=rows_BTR.device)
        number_T = number_T.clamp(max=len(self.positions) - 1)
        real_BT1 = attention_mask_BT.unsqueeze(-1) != 0
        # Before the map as well: padding may hold anything, and zero times infinity is no zero.
        rows_BTR = rows_BTR.float().masked_fill(~real_BT1, 0.0)
        lifted_BTD: Tensor = self.norm(rows_BTR @ self.projection + self.positions[number_T])
        return lifted_BTD.masked_fill(~real_BT1, 0.0)


def create_lift(
    width: int,
    positions: int,
    clean_ND: NDArray[Any],
    *,
    start: Mapping[str, NDArray[Any]] | None = None,
    seed: int,
) -> Lift:
    """Create a lift.

    Parameters
    ----------
    width : int
        R.
    positions : int
        P, without ``start``.
    clean_ND : float array, shape (N, D)
        Clean public rows: lifted rows start with their mean and spread.
    start : mapping, optional
        ``projection`` (R, D) and ``positions`` (P, D), from the mechanism; random if None.
    seed : int
        Of random values; the global generator is left alone.

    Raises
    ------
    ModelError
        If the starting values are missing, of another width or not finite.
    """
    hidden = clean_ND.shape[1]
    if start is None:
        generator = torch.Generator().manual_seed(seed)
        projection_RD = torch.randn(width, hidden, generator=generator) / width**0.5
        positions_PD = torch.randn(positions, hidden, generator=generator) * 0.1
    else:
        try:
            projection_RD, positions_PD = (
                torch.tensor(np.asarray(start[name], dtype=np.float32))
                for name in ("projection", "positions")
            )
        except KeyError as error:
            raise ModelError(f"the mechanism's start of the lift lacks {error}") from None
        if projection_RD.shape != (width, hidden):
            raise ModelError(
                f"the mechanism's start of the lift is {tuple(projection_RD.shape)}, its rows "
                f"need {(width, hidden)}"
            )
        if not (projection_RD.isfinite().all() and positions_PD.isfinite().all()):
            raise ModelError("the mechanism's start of the lift is not finite")
    clean = np.asarray(clean_ND, dtype=np.float64)
    return Lift(
        projection_RD,
        positions_PD,
        mean=float(clean.mean()),
        spread=float(clean.std(axis=1).mean()),
    )


def save_lift(top: TopModel, folder: Path) -> None:
    """Write a top model's lift beside its export, and say in the README what that means."""
    assert top.lift is not None
    state = {name: t.detach().cpu().contiguous() for name, t in top.lift.state_dict().items()}
    save_file(state, folder / LIFT_FILE, metadata={"format": "pt"})
    readme = folder / "README.md"
    before = readme.read_text(encoding="utf-8") if readme.exists() else "# A tuned model\n"
    if LIFT_NOTE not in before:  # a resumed run exports again
        readme.write_text(before + LIFT_NOTE, encoding="utf-8")


def load_lift(folder: Path | str) -> Lift:
    """Load what :func:`~.export.export` saved of a lift.

    Raises
    ------
    ModelError
        If the folder holds none.
    """
    try:
        state = load_file(Path(folder) / LIFT_FILE)
        lift = Lift(state["projection"], state["positions"])
        lift.load_state_dict(state)
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise ModelError(f"{folder} holds no lift: {error}") from error
    return lift
