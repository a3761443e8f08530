"""Federated baselines: what devices and cloud do when weights, losses or logits travel.

No Flower in here; the strategies and the client app call it.
"""
