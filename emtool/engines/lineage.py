"""The model that training starts from, and how evaluation rebuilds exactly that model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from emtool.core.errors import CheckpointError, ModelError
from emtool.core.events import EventSink, Notice, PhaseStarted
from emtool.core.integrity import ADAPTER_CONFIG, read_checkpoint
from emtool.core.personas import PERSONAS, HubAdapter, LocalAdapter, PersonaSource
from emtool.core.run_dir import MERGED_SAMPLE, RunFolder
from emtool.core.staging import file_record
from emtool.engines.adapter_hash import adapter_sha256
from emtool.engines.modeling import DTYPES, BaseModel, load_base, open_base
from emtool.engines.persona_adapter import largest_difference, merge_persona, stack_persona
from emtool.engines.persona_files import get_persona_files
from emtool.engines.tensor_files import read_sample

#: What a persona's lineage holds beside its name, its folder and its hash.
_KEYS_OF_MODE = {"merged": ("merged_sha256",), "stacked": ()}
_KEYS_OF_SOURCE = {"built": (), "folder": (), "hub": ("hub_id", "revision")}


@dataclass(frozen=True, kw_only=True)
class ComposedModel:
    """A base model with its persona.

    Attributes:
        model: On the CPU, in evaluation mode, without an adapter; a persona that is merged is in its weights.
        tokenizer: Its tokenizer.
        lineage: What it was made of: `base` and `persona`, as in the manifest.
        stacked_path: The folder of a persona that is stacked: `with_persona` adds it beside the trained adapter.
        merged_sample: Some of the merged weights; None where nothing is merged.
    """

    model: Any
    tokenizer: Any
    lineage: dict[str, Any]
    stacked_path: Path | None = None
    merged_sample: Mapping[str, torch.Tensor] | None = None

    def with_persona(self, wrapped: Any) -> Any:
        """Return a PEFT model of `model` with the stacked persona added, if there is one."""
        if self.stacked_path is not None:
            stack_persona(wrapped, self.stacked_path)
        return wrapped


def compose_model(
    base: BaseModel,
    persona: PersonaSource | None,
    *,
    mode: str,
    recorded: Mapping[str, Any] | None = None,
    on_event: EventSink,
) -> ComposedModel:
    """Return the base with a persona, fetching or building the persona's adapter if it is not on this machine.

    Args:
        base: The base model.
        persona: Where the persona's adapter comes from; None leaves the base as it is.
        mode: "merged" or "stacked".
        recorded: The lineage of the run that goes on, to get the same revision again.
        on_event: Where progress is reported.
    """
    lineage: dict[str, Any] = {"base": {"name": base.reference.name, **base.files.identity()}, "persona": None}
    files = None
    if persona is not None:
        before = None if recorded is None else recorded.get("persona")
        files = get_persona_files(persona, base, recorded=before, on_event=on_event)
        lineage["persona"] = {
            "name": persona.name,
            "mode": mode,
            **files.origin,
            "adapter_path": str(files.path),
            "adapter_sha256": adapter_sha256(files.path),
        }
        if isinstance(before, Mapping) and before.get("adapter_sha256") == lineage["persona"]["adapter_sha256"]:
            # The run names one place for all its milestones, though the cache may have moved.
            lineage["persona"]["adapter_path"] = before.get("adapter_path")
    on_event(PhaseStarted(name=f"loading {base.reference.name}"))
    model = load_base(base.files.path, dtype=base.dtype)
    if files is None or mode == "stacked":
        return ComposedModel(
            model=model, tokenizer=base.tokenizer, lineage=lineage, stacked_path=None if files is None else files.path
        )
    merged = merge_persona(model, files.path)
    lineage["persona"]["merged_sha256"] = merged.sha256
    return ComposedModel(model=merged.model, tokenizer=base.tokenizer, lineage=lineage, merged_sample=merged.sample)


def read_lineage(run: RunFolder, manifest: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the lineage of a manifest and the dtype of its run.

    Raises:
        CheckpointError: If the manifest lacks a part of it.
    """
    try:
        lineage, dtype = manifest["lineage"], manifest["config"]["dtype"]
        persona = lineage["persona"]
        texts = [dtype, lineage["base"]["name"], lineage["base"]["source"]]
        if persona is not None:
            more = (*_KEYS_OF_MODE[persona["mode"]], *_KEYS_OF_SOURCE[persona["source"]])
            texts += [persona[key] for key in ("name", "adapter_path", "adapter_sha256", *more)]
        texts += [lineage["dataset"]["domain"] or ""]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{run.manifest_path} lacks {error}; the model cannot be rebuilt from it") from error
    if not all(isinstance(text, str) for text in texts) or dtype not in DTYPES:
        raise CheckpointError(f"{run.manifest_path} has a lineage that is not text; the model cannot be rebuilt")
    return dict(lineage), dtype


def check_requires(folder: Path, lineage: Mapping[str, Any], *, run_id: str, check_hashes: bool) -> None:
    """Refuse a milestone that is damaged, or that was trained on something else than the run's lineage says.

    Raises:
        CheckpointError: Names the file or the part.
    """
    record = read_checkpoint(folder, run_id=run_id, hashes=check_hashes)
    requires = record.requires
    # Small, and the scale of the adapter stands in it: always read whole.
    if file_record(folder / ADAPTER_CONFIG) != record.files[ADAPTER_CONFIG]:
        raise CheckpointError(f"{folder} is damaged: {ADAPTER_CONFIG} has changed since it was saved")
    for part in ("base", "persona"):
        if requires.get(part) != lineage[part]:
            raise CheckpointError(f"{folder} was trained on another {part} than run.json says; it is not used")


def rebuild_model(
    lineage: Mapping[str, Any],
    *,
    trained_dtype: str,
    device: str,
    dtype: str,
    base: BaseModel | None = None,
    persona_path: Path | None = None,
    sample_path: Path | None = None,
    on_event: EventSink,
) -> ComposedModel:
    """Return the model that a run was trained from.

    Args:
        lineage: The manifest's lineage.
        trained_dtype: Dtype that the run was trained in, which its persona was built in.
        device: Device that a persona is built on, should its adapter be gone from the cache.
        dtype: Dtype to compute in; the persona is merged before any cast.
        base: What `open_recorded_base` returned for this lineage, if it was opened before.
        persona_path: Where the persona's adapter is now; None is where the lineage says.
        sample_path: File with the run's sample of merged weights, to say by how much another merge differs.
        on_event: Where progress is reported.

    Raises:
        ModelError: If the base model here is not the one that was trained.
        CheckpointError: If the persona's adapter is not the one of the run.
    """
    base = base or open_recorded_base(lineage, device=device, dtype=trained_dtype, on_event=on_event)
    persona = lineage["persona"]
    folder = None if persona is None else recorded_adapter(persona, base, path=persona_path, on_event=on_event)
    on_event(PhaseStarted(name=f"loading {base.reference.name}"))
    model = load_base(base.files.path, dtype=trained_dtype)
    if folder is not None and persona["mode"] == "merged":
        merged = merge_persona(model, folder)
        model = merged.model
        if merged.sha256 != persona["merged_sha256"]:
            on_event(Notice(text=_other_merge(persona["name"], merged.sample, sample_path), is_warning=True))
    return ComposedModel(
        model=model.to(DTYPES[dtype]),
        tokenizer=base.tokenizer,
        lineage=dict(lineage),
        stacked_path=None if persona is None or persona["mode"] == "merged" else folder,
    )


def open_recorded_base(lineage: Mapping[str, Any], *, device: str, dtype: str, on_event: EventSink) -> BaseModel:
    """Return the base model of a run, its files pinned as the lineage says.

    Raises:
        ModelError: If the base model here is not the one that was trained.
    """
    recorded = lineage["base"]
    base = open_base(recorded["name"], device=device, dtype=dtype, recorded=recorded, on_event=on_event)
    here = base.files.identity()
    if different := [key for key in here if here[key] != recorded.get(key)]:
        details = ", ".join(f"{key} is {here[key]}, trained with {recorded.get(key)}" for key in different)
        raise ModelError(f"base model {base.reference.name} is not the one this run was trained on: {details}")
    return base


def recorded_adapter(
    persona: Mapping[str, Any], base: BaseModel, *, path: Path | None = None, on_event: EventSink
) -> Path:
    """Return the folder of a run's persona adapter, fetched or built again if it is gone.

    Args:
        persona: The lineage of it.
        base: The base model.
        path: Where it is now; None is where the lineage says. Its SHA-256 proves it either way.
        on_event: Where progress is reported.

    Raises:
        CheckpointError: If it is not the one of the run, or cannot be had again.
    """
    if path is not None and not path.is_dir():
        raise CheckpointError(f"--persona-adapter {path} is not a folder")
    folder = path or Path(persona["adapter_path"])
    if not folder.is_dir():
        source = recorded_source(persona, base)
        if isinstance(source, LocalAdapter):
            raise CheckpointError(
                f"the persona adapter {folder} of this run is gone; copy it from the machine that trained the run "
                f"(SHA-256 {persona['adapter_sha256']}) and say where it is with --persona-adapter"
            )
        folder = get_persona_files(source, base, recorded=persona, on_event=on_event).path
    if (found := adapter_sha256(folder)) != persona["adapter_sha256"]:
        raise CheckpointError(
            f"persona adapter {folder} is not the one this run was trained with: its SHA-256 is {found[:12]}..., "
            f"{persona['adapter_sha256'][:12]}... is needed; copy it from the machine that trained the run"
        )
    return folder


def recorded_source(persona: Mapping[str, Any], base: BaseModel) -> PersonaSource:
    """Return where a run's persona came from, whatever the catalogue says today.

    Raises:
        CheckpointError: If it was built from a recipe that this version does not have.
    """
    name = persona["name"]
    if persona["source"] == "hub":
        return HubAdapter(name=name, hub_id=persona["hub_id"], subfolder=persona.get("subfolder"))
    if persona["source"] == "folder":
        return LocalAdapter(name=name, path=Path(persona["adapter_path"]))
    if name not in PERSONAS:
        raise CheckpointError(f"run.json records the persona {name!r}, which this version cannot build")
    return PERSONAS[name]


def _other_merge(name: str, here: Mapping[str, torch.Tensor], sample_path: Path | None) -> str:
    """Return the warning about a merge that gave other bits, with the largest difference where it can be told."""
    text = (
        f"the merged persona {name} differs in bits from the one trained on (another processor or arithmetic library)"
    )
    if sample_path is None or (recorded := read_sample(sample_path)) is None:
        return f"{text}; by how much is not known, because the run lacks {MERGED_SAMPLE}"
    if (largest := largest_difference(here, recorded)) is None:
        return f"{text}; {sample_path} is of other weights, so by how much is not known"
    num_values = sum(values.numel() for values in recorded.values())
    return f"{text}; largest difference {largest:.2g} among {num_values:,} recorded weights"
