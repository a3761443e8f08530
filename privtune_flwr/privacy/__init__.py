"""Mechanisms, their registry, keyed noise and public knowledge."""
