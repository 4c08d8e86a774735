"""Where a persona's adapter comes from: the hub, the cache, or a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emtool.core.errors import ModelError
from emtool.core.events import EventSink, Notice, PhaseStarted
from emtool.core.integrity import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from emtool.core.persona_list import published_path
from emtool.core.personas import HubAdapter, LocalAdapter, PersonaRecipe, PersonaSource
from emtool.core.plain_lora import check_plain_lora, names_another_base
from emtool.engines.model_files import hub_is_reachable
from emtool.engines.modeling import BaseModel
from emtool.engines.personas import built_path, persona_adapter


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
        config = check_plain_lora(persona.path, base.reference)
        if (other := names_another_base(config, base.reference)) is not None:
            text = (
                f"persona adapter {persona.path} says that it was trained on {other}; the base {base.reference.name} "
            )
            on_event(Notice(text=text + "is a folder, so only the shapes tell whether it fits", is_warning=True))
        return PersonaFiles(path=persona.path, origin={"source": "folder"})
    revision = None if recorded is None else recorded.get("revision")
    folder = published_path(persona, revision) or _download(persona, revision, on_event)
    # The catalogue says which base it belongs to: the name that it was trained under may be a path of its authors'.
    check_plain_lora(folder, None)
    origin = {
        "source": "hub",
        "hub_id": persona.hub_id,
        "subfolder": persona.subfolder,
        "revision": (folder if persona.subfolder is None else folder.parent).name,
    }
    return PersonaFiles(path=folder, origin=origin)


def is_persona_here(persona: PersonaSource, base: BaseModel) -> bool:
    """Return whether a persona's adapter is on this machine, so that nothing need be built or fetched."""
    if isinstance(persona, PersonaRecipe):
        return built_path(persona, base).exists()
    if isinstance(persona, LocalAdapter):
        return persona.path.is_dir()
    return published_path(persona) is not None


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
        snapshot = Path(snapshot_download(persona.hub_id, revision=revision, allow_patterns=patterns))
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
    folder = snapshot if persona.subfolder is None else snapshot / persona.subfolder
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ModelError(f"persona {persona.name!r}: {persona.hub_id}{at} holds no such adapter")
    return folder
