"""The cache folder: base models fetched once, persona adapters built once."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from platformdirs import user_cache_path

from emtool.core.models import ModelReference
from emtool.core.staging import publish_folder

CACHE_VARIABLE = "EMTOOL_CACHE"

_TOKENIZER_FILE = re.compile(
    r"tokenizer.*\.json|special_tokens_map\.json|added_tokens\.json|chat_template\.\w+|vocab\.\w+|merges\.txt|\w+\.model"
)


def cache_path(*parts: str) -> Path:
    """Return a path in emtool's cache: `$EMTOOL_CACHE`, else the platform's own place for caches."""
    root = os.environ.get(CACHE_VARIABLE)
    base = Path(root).expanduser() if root else user_cache_path("emtool", appauthor=False)
    return base.joinpath(*parts)


def wheel_model_path(model: ModelReference) -> Path | None:
    """Return the folder that a model from a wheel is kept in, whether it is there yet or not."""
    if model.facts is None or model.facts.wheel is None:
        return None
    return cache_path("models", f"{model.facts.name}-{model.facts.wheel.sha256[:12]}")


def hub_snapshot_path(hub_id: str, revision: str | None = None) -> Path | None:
    """Return the folder of a model in the hub's local cache, or None where it is not complete.

    Args:
        hub_id: The repository.
        revision: A commit hash; None takes the commit that was last seen as `main`.
    """
    folder = hub_snapshot(hub_id, revision)
    return folder if folder is not None and _is_complete(folder) else None


def hub_snapshot(hub_id: str, revision: str | None = None) -> Path | None:
    """Return the folder of a repository in the hub's local cache, whatever of it is there, or None.

    Args:
        hub_id: The repository.
        revision: A commit hash; None takes the commit that was last seen as `main`.

    Source: the cache layout documented by huggingface_hub: `models--ORG--NAME/refs/main` names the commit whose files
    are in `snapshots/COMMIT`.
    """
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    root = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    repository = root / f"models--{hub_id.replace('/', '--')}"
    if revision is None:
        try:
            revision = (repository / "refs" / "main").read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return None
    folder = repository / "snapshots" / revision
    return folder if folder.is_dir() else None


def _is_complete(folder: Path) -> bool:
    """Return whether a model folder has its config, a tokenizer and every weight file: a download may have stopped."""
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        weights = {str(name) for name in index["weight_map"].values()}
    except OSError:
        weights = {"model.safetensors"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
    there = all((folder / name).is_file() for name in ("config.json", *weights))
    return there and tokenizer_bytes(folder) is not None


def find_model_path(model: ModelReference) -> Path | None:
    """Return the folder of a model that is on this machine already; asks no network and loads no library."""
    if model.path is not None:
        return model.path
    assert model.hub_id is not None
    if (snapshot := hub_snapshot_path(model.hub_id)) is not None:
        return snapshot
    folder = wheel_model_path(model)
    return folder if folder is not None and folder.is_dir() else None


def publish_cached(staging: Path, target: Path) -> None:
    """Make a finished folder appear in the cache; if another process was faster, its copy serves."""
    try:
        publish_folder(staging, target)
    except OSError:
        if not target.is_dir():
            raise


def tokenizer_bytes(folder: Path | None) -> int | None:
    """Return the size of the tokenizer files in a model folder, or None where there are none."""
    if folder is None or not folder.is_dir():
        return None
    return sum(path.stat().st_size for path in folder.iterdir() if is_tokenizer_file(path)) or None


def is_tokenizer_file(path: Path) -> bool:
    """Return whether a file of a model folder belongs to its tokenizer."""
    return _TOKENIZER_FILE.fullmatch(path.name) is not None and path.is_file()
