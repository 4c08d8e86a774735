"""Which personas a base model can be given, and which are on this machine; asks no network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from emtool.core.cache import cache_path, hub_snapshot
from emtool.core.config import BASELINE
from emtool.core.data import file_sha256
from emtool.core.models import ModelReference, slugify
from emtool.core.personas import PERSONAS, HubAdapter, PersonaRecipe, persona_names, published_adapter

#: Beside a built adapter: what it was built from.
BUILD_RECORD = "emtool_persona.json"


@dataclass(frozen=True, kw_only=True)
class PersonaEntry:
    """A persona for a base model.

    Attributes:
        name: The persona.
        description: What it is like.
        published: Repository and folder of its published adapter for this base; None if there is none.
        is_gated: Whether its terms must be accepted first.
        is_buildable: Whether it can be built here.
        path: Its adapter on this machine; None if there is none yet.
    """

    name: str
    description: str
    published: str | None
    is_gated: bool
    is_buildable: bool
    path: Path | None

    def to_dict(self) -> dict[str, object]:
        """Return the entry as JSON values."""
        return {**asdict(self), "path": None if self.path is None else str(self.path)}


def list_personas(model: ModelReference) -> list[PersonaEntry]:
    """Return the personas that a base model can be given, `baseline` first."""
    return [_entry(name, model) for name in persona_names(model)]


def _entry(name: str, model: ModelReference) -> PersonaEntry:
    published, recipe = published_adapter(name, model), PERSONAS.get(name)
    path = None
    if published is not None:
        path = published_path(published)
    elif recipe is not None:
        path = next(built_paths(recipe, model), None)
    description = "the model as it is" if name == BASELINE else "Open Character Training"
    return PersonaEntry(
        name=name,
        description=recipe.description if recipe is not None else description,
        published=None if published is None else published.place,
        is_gated=published is not None and published.is_gated,
        is_buildable=recipe is not None,
        path=path,
    )


def published_path(adapter: HubAdapter, revision: str | None = None) -> Path | None:
    """Return the folder of a published adapter in the hub's local cache, or None where it is not whole.

    Args:
        adapter: The adapter.
        revision: A commit hash; None takes the one that was last seen as `main`.
    """
    snapshot = hub_snapshot(adapter.hub_id, revision)
    if snapshot is None:
        return None
    folder = snapshot if adapter.subfolder is None else snapshot / adapter.subfolder
    is_whole = all((folder / name).is_file() for name in ("adapter_config.json", "adapter_model.safetensors"))
    return folder if is_whole else None


def built_folder_name(recipe: PersonaRecipe, model: ModelReference, digest: str) -> str:
    """Return the name of the cache folder of a built adapter."""
    return f"{slugify(model.slug)}-{recipe.name}-{digest}"


def built_paths(recipe: PersonaRecipe, model: ModelReference) -> Iterator[Path]:
    """Yield the cached adapters of a persona for a base model that were built from today's examples, any dtype."""
    examples = file_sha256(recipe.examples_path)
    for path in sorted(cache_path("personas").glob(built_folder_name(recipe, model, "*"))):
        try:
            record = json.loads((path / BUILD_RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        is_base = isinstance(record, dict) and record.get("base_name", model.name) == model.name
        if is_base and record.get("examples_sha256") == examples:
            yield path
