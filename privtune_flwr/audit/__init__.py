"""Attacks on what the cloud received, floors to compare with, and how success is measured."""
