"""Attacks on tokens, one file each."""
