"""The mechanisms ``cells`` and ``cells-labels``: codebook, learner, release."""
