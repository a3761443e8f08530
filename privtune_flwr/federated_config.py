"""The section of the run configuration that the federated baselines read."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from privtune_flwr.section import Section

#: Strategies in which devices send updates of a model that they hold whole.
WEIGHT_STRATEGIES = ("fedavg", "fedprox", "fedadam", "dp-fedavg", "scaffold")
#: Lines to hold the others against: no federation at all.
BOUND_STRATEGIES = ("central", "local")
#: Every strategy that trains the whole model somewhere, instead of one that is cut.
WHOLE_STRATEGIES = (*WEIGHT_STRATEGIES, *BOUND_STRATEGIES, "bbt", "distil")
#: Every strategy of the federated harness: those, and the cut model of which both parts train.
HARNESS_STRATEGIES = (*WHOLE_STRATEGIES, "splitfed")

#: Strategies whose devices can train with DP-SGD: local steps that look at nothing else.
DP_SGD_STRATEGIES = ("fedavg", "fedprox", "fedadam", "dp-fedavg")

Strategy = Literal[
    "split",
    "stepwise",
    "sequential",
    "splitfed",
    "fedavg",
    "fedprox",
    "fedadam",
    "dp-fedavg",
    "scaffold",
    "bbt",
    "distil",
    "central",
    "local",
]


class FederatedSection(Section):
    """What a federated baseline does beside the training that all methods share."""

    local_epochs: int = Field(
        1,
        ge=1,
        le=1000,
        description="passes a device makes a round; rounds = epochs / local-epochs",
    )
    proximal_mu: float = Field(0.01, ge=0, le=1e3, description="fedprox: weight of the term")
    server_learning_rate: float = Field(1e-3, gt=0, le=10, description="fedadam: eta")
    server_beta1: float = Field(0.9, ge=0, lt=1, description="fedadam")
    server_beta2: float = Field(0.99, ge=0, lt=1, description="fedadam")
    server_tau: float = Field(1e-3, gt=0, le=1, description="fedadam: adaptivity")
    scaffold_learning_rate: float = Field(
        1.0, gt=0, le=10, description="scaffold: the cloud's step; 1 = the mean itself"
    )
    update_clip: float = Field(1.0, gt=0, le=1e6, description="dp-fedavg: L2 norm of an update")
    update_noise: float = Field(
        1.0, gt=0, le=1e3, description="dp-fedavg: the cloud's noise, in units of the clip"
    )
    example_privacy: Literal["none", "dp-sgd"] = Field(
        "none", description="dp-sgd: each example is protected, by noise of the device's own"
    )
    epsilon: float = Field(8.0, gt=0, le=1e6, description="dp-sgd: of the whole run")
    delta: float = Field(1e-5, gt=0, lt=1, description="dp-sgd and dp-fedavg")
    example_clip: float = Field(1.0, gt=0, le=1e6, description="dp-sgd: norm of a gradient")
    prompt_tokens: int = Field(8, ge=1, le=256, description="soft prompt, tuning = prompt and bbt")
    prompt_learning_rate: float = Field(
        1e-2, gt=0, le=10, description="tuning = prompt; the head has train.head-learning-rate"
    )
    population: int = Field(10, ge=4, le=1000, description="bbt: candidates a round")
    generations: int = Field(40, ge=1, le=10_000, description="bbt: rounds of the run")
    intrinsic: int = Field(
        64, ge=2, le=10_000, description="bbt: numbers that are searched for the prompt"
    )
    bbt_examples: int = Field(
        16, ge=8, le=10**6, description="bbt: examples a device tries each candidate on"
    )
    sigma: float = Field(0.5, gt=0, le=100, description="bbt: first step of the search")
    public_examples: int = Field(800, ge=8, le=10**6, description="distil: public sentences")
    temperature: float = Field(2.0, gt=0, le=100, description="distil")
    distil_epochs: int = Field(1, ge=1, le=100, description="distil: passes over public text")
