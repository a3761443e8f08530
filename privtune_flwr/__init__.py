"""PrivTune split-learning federation on Flower."""

__version__ = "0.1.0"
