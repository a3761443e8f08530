"""Mechanisms of other authors that replace tokens by tokens before the bottom model."""
