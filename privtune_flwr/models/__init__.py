"""Cutting a Hugging Face model, its heads and adapters, and joining it again."""

from privtune_flwr.models.adapters import apply_lora, parameter_groups
from privtune_flwr.models.bottom import BottomModel
from privtune_flwr.models.cut import CutModel, CutSpec, cut_model
from privtune_flwr.models.errors import ModelError
from privtune_flwr.models.export import export
from privtune_flwr.models.families import FAMILIES, Family, family_of, supported_types
from privtune_flwr.models.heads import MeanPooledClassifier, load_mean_pooled
from privtune_flwr.models.lift import Lift, create_lift, load_lift
from privtune_flwr.models.source import resolve_model
from privtune_flwr.models.tokenizer import load_tokenizer
from privtune_flwr.models.top import TopModel, load_top_state, top_state

__all__ = [
    "FAMILIES",
    "BottomModel",
    "CutModel",
    "CutSpec",
    "Family",
    "Lift",
    "MeanPooledClassifier",
    "ModelError",
    "TopModel",
    "apply_lora",
    "create_lift",
    "cut_model",
    "export",
    "family_of",
    "load_lift",
    "load_mean_pooled",
    "load_tokenizer",
    "load_top_state",
    "parameter_groups",
    "resolve_model",
    "supported_types",
    "top_state",
]
