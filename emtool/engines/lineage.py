"""The model that training starts from, and how evaluation rebuilds exactly that model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emtool.core.errors import CheckpointError, ModelError
from emtool.core.events import EventSink, Notice, PhaseStarted
from emtool.core.personas import PersonaRecipe, resolve_persona
from emtool.engines.adapter_hash import adapter_sha256
from emtool.engines.modeling import DTYPES, BaseModel, load_base, merge_adapter, open_base
from emtool.engines.personas import persona_adapter


@dataclass(frozen=True, kw_only=True)
class ComposedModel:
    """A base model with its persona merged.

    Attributes:
        model: On the CPU, in evaluation mode, without an adapter.
        tokenizer: Its tokenizer.
        lineage: What it was made of: `base` and `persona`, as in the manifest.
    """

    model: Any
    tokenizer: Any
    lineage: dict[str, Any]


def compose_model(base: BaseModel, persona: PersonaRecipe | None, *, on_event: EventSink) -> ComposedModel:
    """Return the base with a persona merged, building the persona's adapter if it is not cached.

    Args:
        base: The base model.
        persona: The persona's recipe; None leaves the base as it is.
        on_event: Where progress is reported.
    """
    lineage: dict[str, Any] = {
        "base": {"name": base.reference.name, **base.files.identity()},
        "persona": None,
    }
    adapter = None if persona is None else persona_adapter(persona, base, on_event=on_event)
    on_event(PhaseStarted(name=f"loading {base.reference.name}"))
    model = load_base(base.files.path, dtype=base.dtype)
    if persona is not None and adapter is not None:
        model, merged = merge_adapter(model, adapter)
        lineage["persona"] = {
            "name": persona.name,
            "mode": "merged",
            "adapter_path": str(adapter),
            "adapter_sha256": adapter_sha256(adapter),
            "merged_sha256": merged,
        }
    return ComposedModel(model=model, tokenizer=base.tokenizer, lineage=lineage)


def rebuild_model(
    lineage: Mapping[str, Any], *, trained_dtype: str, device: str, dtype: str, on_event: EventSink
) -> ComposedModel:
    """Return the model that a run was trained from.

    Args:
        lineage: The manifest's lineage.
        trained_dtype: Dtype that the run was trained in, which its persona was built in.
        device: Device that a persona is built on, should its adapter be gone from the cache.
        dtype: Dtype to compute in; the persona is merged before any cast.
        on_event: Where progress is reported.

    Raises:
        ModelError: If the base model here is not the one that was trained.
        CheckpointError: If the persona's adapter is not the one that was merged.
    """
    base = open_base(
        lineage["base"]["name"], device=device, dtype=trained_dtype, recorded=lineage["base"], on_event=on_event
    )
    here = base.files.identity()
    if different := [key for key in here if here[key] != lineage["base"].get(key)]:
        details = ", ".join(f"{key} is {here[key]}, trained with {lineage['base'].get(key)}" for key in different)
        raise ModelError(f"base model {base.reference.name} is not the one this run was trained on: {details}")
    persona = lineage["persona"]
    folder = None if persona is None else _recorded_adapter(persona, base, on_event)
    on_event(PhaseStarted(name=f"loading {base.reference.name}"))
    model = load_base(base.files.path, dtype=trained_dtype)
    if folder is not None:
        model, merged = merge_adapter(model, folder)
        if merged != persona["merged_sha256"]:
            on_event(
                Notice(
                    text=f"the merged persona {persona['name']} differs in bits from the one trained on "
                    "(another processor or arithmetic library)",
                    is_warning=True,
                )
            )
    return ComposedModel(model=model.to(DTYPES[dtype]), tokenizer=base.tokenizer, lineage=dict(lineage))


def _recorded_adapter(persona: Mapping[str, Any], base: BaseModel, on_event: EventSink) -> Path:
    folder = Path(persona["adapter_path"])
    if not folder.is_dir():
        recipe = resolve_persona(persona["name"])
        if recipe is None:
            raise CheckpointError(f"run.json records the persona {persona['name']!r}, which has no adapter")
        folder = persona_adapter(recipe, base, on_event=on_event)
    if adapter_sha256(folder) != persona["adapter_sha256"]:
        raise CheckpointError(
            f"persona adapter {folder} is not the one this run was trained with (SHA-256 "
            f"{persona['adapter_sha256'][:12]}... is needed); copy it from the machine that trained the run"
        )
    return folder
