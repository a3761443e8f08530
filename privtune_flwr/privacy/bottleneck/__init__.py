"""The mechanism ``bottleneck``: recipe, network, learner, release."""
