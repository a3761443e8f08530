"""Federated averaging's device: train what came, send it back."""

from __future__ import annotations

from pathlib import Path

from privtune_flwr.federated.local import train_locally
from privtune_flwr.federated.methods import FitMethod, Outcome, Schema, Work
from privtune_flwr.privacy.learning import State


class WeightsMethod(FitMethod):
    """FedAvg, FedProx, FedAdam and DP-FedAvg: they differ in the cloud, and in one term here.

    McMahan et al., arXiv 1602.05629; Li et al., arXiv 1812.06127; Reddi et al., arXiv 2003.00295.
    """

    def fit(self, state: State, work: Work) -> Outcome:
        """Train for ``federated.local-epochs`` passes and give the weights back."""
        model = self.model
        model.load(state)
        epochs = self.settings.federated.local_epochs
        span = ((work.round - 1) / work.rounds, work.round / work.rounds)
        if self.settings.federated.example_privacy == "dp-sgd":
            from privtune_flwr.federated.dp_sgd import train_privately

            result, extra = train_privately(model, work, epochs=epochs, progress=span)
        else:
            result, extra = (
                train_locally(
                    model,
                    work.sequences,
                    work.labels,
                    epochs=epochs,
                    seed=work.seed,
                    progress=span,
                    proximal_mu=work.proximal_mu,
                ),
                {},
            )
        metrics = {
            "loss_sum": result.loss_sum,
            "correct": result.correct,
            "seen": result.seen,
            "steps": result.steps,
            **extra,
        }
        return Outcome(model.state(), metrics)

    def reply_schema(self, state: State, public: Path | None = None) -> Schema:
        """Promise the arrays that came."""
        return self.same_arrays(state)
