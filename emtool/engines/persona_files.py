"""Where a persona's adapter comes from: the hub, the cache, or a folder; and whether it is one that can be used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emtool.core.errors import ModelError
from emtool.core.events import EventSink, PhaseStarted
from emtool.core.integrity import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from emtool.core.models import ModelReference
from emtool.core.personas import HubAdapter, LocalAdapter, PersonaRecipe, PersonaSource
from emtool.engines.model_files import hub_is_reachable
from emtool.engines.modeling import BaseModel
from emtool.engines.personas import built_path, persona_adapter

#: A PEFT configuration has about a kilobyte, and lists of names up to some hundred.
MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class PersonaFiles:
    """A persona's adapter on this machine.

    Attributes:
        path: PEFT folder.
        origin: Where it came from, for the lineage: `source` is "built", "folder" or "hub", the last with `hub_id`,
            `subfolder` and `revision`.
    """

    path: Path
    origin: Mapping[str, str | None]


def get_persona_files(
    persona: PersonaSource, base: BaseModel, *, recorded: Mapping[str, Any] | None = None, on_event: EventSink
) -> PersonaFiles:
    """Return a persona's adapter for a base model, fetching or building it if it is not on this machine.

    Args:
        persona: Where it comes from.
        base: The base model.
        recorded: A run's lineage of it, to get the same revision again; None takes the hub's newest.
        on_event: Where progress is reported.

    Raises:
        ModelError: If it cannot be had, belongs to another base model, or is not a plain LoRA adapter.
    """
    if isinstance(persona, PersonaRecipe):
        return PersonaFiles(path=persona_adapter(persona, base, on_event=on_event), origin={"source": "built"})
    if isinstance(persona, LocalAdapter):
        check_plain_lora(persona.path, base.reference)
        return PersonaFiles(path=persona.path, origin={"source": "folder"})
    revision = None if recorded is None else recorded.get("revision")
    snapshot = _cached_snapshot(persona, revision) or _download(persona, revision, on_event)
    folder = snapshot if persona.subfolder is None else snapshot / persona.subfolder
    # The catalogue says which base it belongs to: the name that it was trained under may be a path of its authors'.
    check_plain_lora(folder, None)
    origin = {
        "source": "hub",
        "hub_id": persona.hub_id,
        "subfolder": persona.subfolder,
        "revision": snapshot.name,
    }
    return PersonaFiles(path=folder, origin=origin)


def is_persona_here(persona: PersonaSource, base: BaseModel) -> bool:
    """Return whether a persona's adapter is on this machine, so that nothing need be built or fetched."""
    if isinstance(persona, PersonaRecipe):
        return built_path(persona, base).exists()
    if isinstance(persona, LocalAdapter):
        return persona.path.is_dir()
    return _cached_snapshot(persona, None) is not None


def check_plain_lora(folder: Path, base: ModelReference | None) -> Mapping[str, Any]:
    """Return an adapter's configuration after refusing what cannot be merged, stacked and composed exactly.

    Args:
        folder: A PEFT folder.
        base: The base model that it must have been trained on, by name; None leaves that to the shapes.

    Raises:
        ModelError: If it is no adapter, not plain LoRA (DoRA, biases or whole modules), or another base's.
    """
    config = read_lora_config(folder)
    extras = [
        words
        for words, is_there in {
            "DoRA": config.get("use_dora"),
            "biases": config.get("bias", "none") != "none" or config.get("lora_bias"),
            "whole modules (modules_to_save)": config.get("modules_to_save"),
            "trained token embeddings": config.get("trainable_token_indices"),
        }.items()
        if is_there
    ]
    if extras:
        raise ModelError(
            f"adapter {folder} has {' and '.join(extras)}; a persona must be plain LoRA on linear layers, so that it "
            "can be merged, stacked and exported exactly"
        )
    trained_on = config.get("base_model_name_or_path")
    if base is not None and isinstance(trained_on, str) and not _may_be(trained_on, base):
        raise ModelError(
            f"adapter {folder} was trained on {trained_on}, and the base model is {base.hub_id or base.name}; "
            f"choose the adapter for this base, or --model {trained_on}"
        )
    return config


def read_lora_config(folder: Path) -> Mapping[str, Any]:
    """Return the configuration of a LoRA adapter.

    Raises:
        ModelError: If the folder holds no LoRA adapter in safetensors.
    """
    path = folder / ADAPTER_CONFIG
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ModelError(f"{path} is absurdly large for a PEFT configuration; it is not used")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{folder} holds no PEFT adapter: cannot read {ADAPTER_CONFIG} ({error})") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise ModelError(f"{path} describes {str(kind)[:40]!r}, not a LORA adapter")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ModelError(
            f"{folder} has no {ADAPTER_WEIGHTS}; weights in another format are not read, because pickled files can "
            "run code: save them as safetensors"
        )
    return config


def _may_be(trained_on: str, base: ModelReference) -> bool:
    """Return whether the name under which an adapter was trained may be a base model's.

    A hub id is told apart from another; the path of a folder, on whatever machine, says nothing.
    """
    is_path = trained_on.startswith((".", "/", "~")) or trained_on.count("/") != 1
    names = {name.lower() for name in (base.name, base.hub_id) if name}
    return is_path or base.hub_id is None or trained_on.lower() in names


def _cached_snapshot(persona: HubAdapter, revision: str | None) -> Path | None:
    """Return the snapshot in the hub's local cache that holds the adapter whole, or None."""
    from huggingface_hub import try_to_load_from_cache

    prefix = "" if persona.subfolder is None else f"{persona.subfolder}/"
    found = [
        try_to_load_from_cache(persona.hub_id, f"{prefix}{name}", revision=revision)
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
    ]
    paths = [Path(path) for path in found if isinstance(path, str)]
    if len(paths) < len(found):
        return None
    return paths[0].parent if persona.subfolder is None else paths[0].parent.parent


def _download(persona: HubAdapter, revision: str | None, on_event: EventSink) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError

    at = f" at revision {revision}" if revision else ""
    if not hub_is_reachable():
        raise ModelError(
            f"persona {persona.name!r}: {persona.place}{at} is not on this machine and the hub did not answer; fetch "
            f"it where there is a network, or give a folder with --persona-adapter"
        )
    on_event(PhaseStarted(name=f"downloading persona {persona.name} from {persona.place}"))
    prefix = "" if persona.subfolder is None else f"{persona.subfolder}/"
    patterns = [f"{prefix}{name}" for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
    try:
        return Path(snapshot_download(persona.hub_id, revision=revision, allow_patterns=patterns))
    except (GatedRepoError, RepositoryNotFoundError) as error:
        if persona.is_gated or isinstance(error, GatedRepoError):
            raise ModelError(
                f"persona {persona.name!r} is gated: accept the terms of {persona.hub_id} on its page with your "
                "account, then log in with 'hf auth login' or set HF_TOKEN to a token that may read it"
            ) from error
        raise ModelError(f"persona {persona.name!r}: the hub has no {persona.hub_id}{at}, or hides it") from error
    except (HTTPError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise ModelError(f"cannot download persona {persona.name!r} from {persona.place}{at}: {reason}") from error
