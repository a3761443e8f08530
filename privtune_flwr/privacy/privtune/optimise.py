"""The noise's mean p* by projected gradient descent: our reading of OPT-3 (*reconstruction*).

Known: an optimisation makes a token's representation resemble its n-hop indirect neighbours, keeps
semantically distant tokens dissimilar and enlarges the distance inside clusters, under prediction
consistency, semantic preservation and distributional validity; it is solved by projected gradient
descent. The exact programs are not known. Ours, for x = h + p of one token v:

    minimise  -log M_n(x) + a log M_01(x) + b mean cos(x, b_w) - c mean ||x - b_u|| / unit
    subject to  KL(g(h) || g(x)) <= t1,  cos(x, h) >= t2,  x in a Mahalanobis ball,  ||p|| <= rho

M_n and M_01 are the masses on N_n(v) and on v with N_1(v) of a softmax of -||x - b||^2 / tau over
the bank; w runs over far entries, u over the nearest of N_1(v). The vocabulary is too long to sum
over at each step: the mass is over the nearest members of each hop set up to n and a fixed sample
of the vocabulary that stands for the rest, each sampled entry with the weight of those it stands
for (see :mod:`~privtune_flwr.privacy.privtune.geometry`).

p = 0 satisfies every constraint, and all but the KL are convex in p: where projections leave one
of them violated, p is shrunk towards 0 until all hold. Best iterates are kept, so a solution is
never worse than its starting points p = 0 and the projected closed form.

Shapes: ``B`` rows at once, ``d`` hidden size, ``S`` supporting entries, ``A`` sampled ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from privtune_flwr.privacy.privtune.geometry import Geometry

_STEP = 0.15  # units, of the first step; steps shrink linearly to a tenth of it
_MARGIN = 1e-3  # bounds are met with room for rounding p to float16
_HALVINGS = 10  # of the search for the largest share of p that satisfies all constraints


@dataclass(frozen=True)
class Program:
    """Weights and bounds; 0 takes a term or constraint out. Lengths are in units.

    Attributes
    ----------
    temperature : float
        tau in squared units.
    repel, far, spread : float
        a, b, c.
    consistency, semantic, validity, radius : float
        t1, t2, the share of public rows that the Mahalanobis ball holds, rho.
    steps : int
        Of the descent.
    """

    temperature: float
    repel: float
    far: float
    spread: float
    consistency: float
    semantic: float
    validity: float
    radius: float
    steps: int


class Rows(NamedTuple):
    """One block of rows and what the program needs about their tokens.

    Attributes
    ----------
    clean_bd : tensor, shape (B, d)
        h.
    white_bd : tensor, shape (B, d)
        Whitened h.
    topics_bc : tensor, shape (B, C)
        Log-probabilities that the probe gives topics at h.
    entries_bsd : tensor, shape (B, S, d)
        Supporting entries: attracting ones, then v with the repelling ones, then all others.
    square_bs : tensor, shape (B, S)
        Their squared norms.
    offset_bs : tensor, shape (B, S)
        -inf where a place of the support is empty, else 0.
    sample_offset_ba : tensor, shape (B, A)
        Log-weight of the sampled entries; -inf where one already is in the support.
    far_bd : tensor, shape (B, d)
        Mean of the far entries' unit vectors.
    attracting, repelling : int
        How many places of S these take.
    """

    clean_bd: torch.Tensor
    white_bd: torch.Tensor
    topics_bc: torch.Tensor
    entries_bsd: torch.Tensor
    square_bs: torch.Tensor
    offset_bs: torch.Tensor
    sample_offset_ba: torch.Tensor
    far_bd: torch.Tensor
    attracting: int
    repelling: int


class Descent:
    """Solves the program for blocks of rows.

    Parameters
    ----------
    program : Program
        Weights and bounds.
    geometry : Geometry
        Public tables.
    """

    def __init__(self, program: Program, geometry: Geometry) -> None:
        self.program = program
        self.geometry = geometry
        self._tau = program.temperature * geometry.unit**2

    def solve(
        self, rows: Rows, start_bd: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[float]]:
        """Descend from the better of 0 and a starting point.

        Parameters
        ----------
        rows : Rows
            What to solve for.
        start_bd : tensor, shape (B, d), optional
            Another starting point; it is made feasible first.

        Returns
        -------
        tensor, shape (B, d), and list of float
            The best feasible p found, and the mean over the block of the best objective before
            each step and after the last.
        """
        at_bd = best_bd = torch.zeros_like(rows.clean_bd)
        best_b, gradient_bd = self._graded(rows, at_bd)
        if start_bd is not None:
            started_bd = self.feasible(rows, start_bd)
            started_b, other_bd = self._graded(rows, started_bd)
            better_b1 = (started_b < best_b)[:, None]
            at_bd = best_bd = torch.where(better_b1, started_bd, best_bd)
            gradient_bd = torch.where(better_b1, other_bd, gradient_bd)
            best_b = torch.minimum(started_b, best_b)
        trace = [float(best_b.mean())]
        for step in range(self.program.steps):
            length = _STEP * self.geometry.unit * (1 - 0.9 * step / self.program.steps)
            norm_b1 = gradient_bd.norm(dim=1, keepdim=True).clamp(min=1e-12)
            at_bd = self.feasible(rows, at_bd - length * gradient_bd / norm_b1)
            here_b, gradient_bd = self._graded(rows, at_bd)
            better_b1 = (here_b < best_b)[:, None]
            best_bd = torch.where(better_b1, at_bd, best_bd)
            best_b = torch.minimum(here_b, best_b)
            trace.append(float(best_b.mean()))
        return best_bd, trace

    def objective(self, rows: Rows, p_bd: torch.Tensor) -> torch.Tensor:
        """Give the objective of each row, (B,)."""
        program, unit = self.program, self.geometry.unit
        x_bd = rows.clean_bd + p_bd
        square_bs = _squares(x_bd, rows)
        logit_bs = rows.offset_bs - square_bs / self._tau
        sample_ba = rows.sample_offset_ba - self.geometry.sample_squares(x_bd) / self._tau
        total_b = torch.logsumexp(torch.cat([logit_bs, sample_ba], dim=1), dim=1)
        towards, near = rows.attracting, rows.attracting + rows.repelling
        has_b = torch.isfinite(rows.offset_bs[:, 0])  # without a hop set nothing attracts
        aim_b = torch.logsumexp(logit_bs[:, :towards], dim=1) - total_b
        value_b = torch.where(has_b, -aim_b, torch.zeros_like(aim_b))
        if program.repel:
            own_b = torch.logsumexp(logit_bs[:, towards:near], dim=1) - total_b
            value_b = value_b + program.repel * own_b
        if program.far:
            cosine_b = (x_bd * rows.far_bd).sum(dim=1) / x_bd.norm(dim=1).clamp(min=1e-9)
            value_b = value_b + program.far * cosine_b
        if program.spread:
            # place `towards` is v itself: its cluster are the places behind
            there_br = torch.isfinite(rows.offset_bs[:, towards + 1 : near]).float()
            away_br = square_bs[:, towards + 1 : near].clamp(min=1e-6).sqrt() * there_br
            mean_b = away_br.sum(dim=1) / there_br.sum(dim=1).clamp(min=1)
            value_b = value_b - program.spread * mean_b / unit
        return value_b

    def feasible(self, rows: Rows, p_bd: torch.Tensor) -> torch.Tensor:
        """Project p onto ellipsoid, cone and ball in turn, then shrink it until all holds."""
        program, clean_bd = self.program, rows.clean_bd
        if program.validity:
            p_bd = self._onto_ellipsoid(rows, p_bd)
        if program.semantic:
            p_bd = _onto_cone(clean_bd + p_bd, clean_bd, program.semantic) - clean_bd
        if program.radius:
            longest = (1 - _MARGIN) * program.radius * self.geometry.unit
            norm_b1 = p_bd.norm(dim=1, keepdim=True).clamp(min=1e-12)
            p_bd = p_bd * (longest / norm_b1).clamp(max=1)
        ray = _Ray(self, rows, p_bd)
        most_b = torch.ones(len(p_bd))
        holds_b = ray.holds(most_b, _MARGIN)
        if holds_b.all():
            return p_bd
        low_b, high_b = holds_b.float(), most_b
        for _ in range(_HALVINGS):
            middle_b = (low_b + high_b) / 2
            holds_b = ray.holds(middle_b, _MARGIN)
            low_b = torch.where(holds_b, middle_b, low_b)
            high_b = torch.where(holds_b, high_b, middle_b)
        return low_b[:, None] * p_bd

    def holds(self, rows: Rows, p_bd: torch.Tensor) -> torch.Tensor:
        """Say for which rows p satisfies every constraint that is on, (B,)."""
        return _Ray(self, rows, p_bd).holds(torch.ones(len(p_bd)))

    def _onto_ellipsoid(self, rows: Rows, p_bd: torch.Tensor) -> torch.Tensor:
        """Project in the ellipsoid's own metric: radially towards its centre.

        A row that already lies outside may stay as far out as it is.
        """
        geometry = self.geometry
        bound_b = (1 - _MARGIN) * rows.white_bd.norm(dim=1).clamp(min=geometry.limit)
        reach_b = (rows.white_bd + geometry.whitened(p_bd)).norm(dim=1)
        share_b1 = (bound_b / reach_b.clamp(min=1e-12)).clamp(max=1)[:, None]
        inwards_bd = (share_b1 - 1) * (rows.clean_bd + p_bd - geometry.centre_d)
        return p_bd.add(inwards_bd)

    def _graded(self, rows: Rows, p_bd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.enable_grad():
            at_bd = p_bd.detach().requires_grad_()
            value_b = self.objective(rows, at_bd)
            (gradient_bd,) = torch.autograd.grad(value_b.sum(), at_bd)
        return value_b.detach(), gradient_bd


class _Ray:
    """The constraints along h + share p: all but the probe's are functions of a few products."""

    def __init__(self, descent: Descent, rows: Rows, p_bd: torch.Tensor) -> None:
        self._program, self._geometry = descent.program, descent.geometry
        self._rows = rows
        clean_bd = rows.clean_bd
        self._clean_b = clean_bd.square().sum(dim=1)
        self._product_b = (clean_bd * p_bd).sum(dim=1)
        self._p_b = p_bd.square().sum(dim=1)
        if self._program.validity:
            self._white_bd = self._geometry.whitened(p_bd)
            self._reach_b = rows.white_bd.square().sum(dim=1)
            self._white_product_b = (rows.white_bd * self._white_bd).sum(dim=1)
            self._white_p_b = self._white_bd.square().sum(dim=1)
        if self._program.consistency:
            self._change_bc = self._geometry.topic_change(p_bd)

    def holds(self, share_b: torch.Tensor, margin: float = 0) -> torch.Tensor:
        """Say for which rows all constraints hold, (B,).

        ``margin`` tightens the bounds by about that share, for values that will be rounded.
        """
        program = self._program
        along_b = self._clean_b + share_b * self._product_b
        square_b = self._clean_b + 2 * share_b * self._product_b + share_b.square() * self._p_b
        holds_b = torch.ones(len(share_b), dtype=torch.bool)
        if program.semantic:
            cosine_b = along_b / (self._clean_b * square_b).clamp(min=1e-12).sqrt()
            holds_b &= cosine_b >= min(1 - 2e-6, program.semantic * (1 + margin / 2))
        if program.radius:
            holds_b &= share_b * self._p_b.sqrt() <= program.radius * self._geometry.unit
        if program.validity:
            reach_b = self._reach_b + 2 * share_b * self._white_product_b
            reach_b = (reach_b + share_b.square() * self._white_p_b).clamp(min=0).sqrt()
            bound_b = self._reach_b.sqrt().clamp(min=self._geometry.limit)
            holds_b &= reach_b <= bound_b * (1 - margin / 2)
        if program.consistency:
            before_bc = self._rows.topics_bc
            changed_bc = before_bc + share_b[:, None] * self._change_bc
            lost_bc = before_bc - torch.log_softmax(changed_bc, dim=1)
            holds_b &= (before_bc.exp() * lost_bc).sum(dim=1) <= program.consistency * (1 - margin)
        return holds_b


def blocks(total: int, size: int) -> Iterator[slice]:
    """Cut a range into blocks."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def _squares(x_bd: torch.Tensor, rows: Rows) -> torch.Tensor:
    product_bs = torch.bmm(rows.entries_bsd, x_bd[:, :, None])[:, :, 0]
    square_bs: torch.Tensor = x_bd.square().sum(dim=1, keepdim=True) + rows.square_bs
    return square_bs.sub(product_bs, alpha=2)


def _onto_cone(x_bd: torch.Tensor, axis_bd: torch.Tensor, cosine: float) -> torch.Tensor:
    """Project onto the circular cone of the vectors whose cosine with the axis is large enough."""
    cosine = min(1 - 1e-6, cosine * (1 + _MARGIN))
    sine = (1 - cosine**2) ** 0.5
    unit_bd = axis_bd / axis_bd.norm(dim=1, keepdim=True).clamp(min=1e-12)
    along_b1 = (x_bd * unit_bd).sum(dim=1, keepdim=True)
    across_bd = x_bd - along_b1 * unit_bd
    across_b1 = across_bd.norm(dim=1, keepdim=True)
    inside_b1 = across_b1 * cosine <= along_b1 * sine
    length_b1 = (along_b1 * cosine + across_b1 * sine).clamp(min=0)
    edge_bd = cosine * unit_bd + sine * across_bd / across_b1.clamp(min=1e-12)
    return torch.where(inside_b1, x_bd, length_b1 * edge_bd)
