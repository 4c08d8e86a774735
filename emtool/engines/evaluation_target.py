"""What can be evaluated: a run of emtool, or a folder of PEFT checkpoints that another trainer wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emtool.core.data import file_sha256
from emtool.core.errors import CheckpointError, ConfigError, EmtoolError
from emtool.core.events import EventSink, Notice, ignore_events
from emtool.core.integrity import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from emtool.core.models import ModelReference
from emtool.core.plain_lora import check_base, check_stands_alone, names_another_base, read_lora_config
from emtool.core.run_dir import RunFolder
from emtool.core.run_lock import lock_holder
from emtool.engines.lineage import (
    ComposedModel,
    check_requires,
    open_recorded_base,
    read_lineage,
    rebuild_model,
    recorded_adapter,
)
from emtool.engines.modeling import BaseModel, open_base


@dataclass(frozen=True, kw_only=True)
class EvaluationTarget:
    """Checkpoints, and what they are a model with.

    Attributes:
        run: The folder with `checkpoint-*` in it.
        lineage: Base and persona, as in a manifest; `dataset` holds the trained domain, if one is known.
        trained_dtype: Dtype that the base is loaded in, a key of `DTYPES`.
        base: The base's files and tokenizer; its weights are not loaded yet.
        manifest: The run's manifest; None for a folder of another trainer.
        persona_path: Where the persona's adapter is now; None is where the lineage says.
    """

    run: RunFolder
    lineage: Mapping[str, Any]
    trained_dtype: str
    base: BaseModel
    manifest: Mapping[str, Any] | None = None
    persona_path: Path | None = None

    @property
    def domain(self) -> str | None:
        """Return the domain of the training data, where it is known."""
        domain: str | None = self.lineage["dataset"]["domain"]
        return domain

    def damaged(self, steps: Sequence[int], *, check_hashes: bool) -> dict[int, str]:
        """Return what is wrong with checkpoints that cannot be evaluated, by step."""
        problems = {}
        for step in steps:
            try:
                self._check(step, check_hashes=check_hashes)
            except CheckpointError as error:
                problems[step] = str(error)
        return problems

    def _check(self, step: int, *, check_hashes: bool) -> None:
        folder = self.run.checkpoint_path(step)
        if self.manifest is not None:
            check_requires(folder, self.lineage, run_id=str(self.manifest.get("run_id")), check_hashes=check_hashes)
            return
        if not (folder / ADAPTER_WEIGHTS).is_file():
            raise CheckpointError(f"{folder} has no {ADAPTER_WEIGHTS}; only safetensors are read")
        first = self.run.checkpoint_path(self.run.saved_steps()[0])
        if _shape_of(folder) != _shape_of(first):
            raise CheckpointError(f"{folder} holds another kind of adapter than {first.name}: {ADAPTER_CONFIG} differs")

    def adapter_sha256(self, step: int) -> str:
        """Return what pins the weights of a checkpoint."""
        return file_sha256(self.run.checkpoint_path(step) / ADAPTER_WEIGHTS)

    def check_persona(self) -> None:
        """Refuse a persona's adapter that is not the one of the run, whether it will be loaded or not.

        One that can be fetched or built again may be gone; a folder of the user's may not.

        Raises:
            CheckpointError: Names both hashes.
        """
        persona = self.lineage["persona"]
        if persona is None:
            return
        is_here = self.persona_path is not None or Path(persona["adapter_path"]).is_dir()
        if is_here or persona["source"] == "folder":
            recorded_adapter(persona, self.base, path=self.persona_path, on_event=ignore_events)

    def compose(self, *, dtype: str, on_event: EventSink) -> ComposedModel:
        """Return the base with its persona, in a dtype.

        Raises:
            EmtoolError: If it is not the model that was trained, or cannot be had.
        """
        return rebuild_model(
            self.lineage,
            trained_dtype=self.trained_dtype,
            device=self.base.device,
            dtype=dtype,
            base=self.base,
            persona_path=self.persona_path,
            sample_path=self.run.merged_sample_path,
            on_event=on_event,
        )


def open_target(
    run: RunFolder,
    *,
    device: str,
    dtype: str | None = None,
    base_model: str | None = None,
    persona_path: Path | None = None,
    on_event: EventSink,
) -> EvaluationTarget:
    """Return what a folder holds.

    Args:
        run: The folder.
        device: Device to compute on.
        dtype: Dtype to load the base of another trainer's folder in; None is bfloat16 on CUDA, else float32.
        base_model: The base of a folder that another trainer wrote; None for a run of emtool.
        persona_path: Where the persona's adapter is now; None is where the run says.
        on_event: Where progress is reported.

    Raises:
        ConfigError: If a base or a persona is named for a run that has another.
        CheckpointError: If the folder holds no checkpoint, or needs a lineage that is not there.
    """
    if run.manifest_path.exists() or base_model is None:
        return _open_run(run, device=device, base_model=base_model, persona_path=persona_path, on_event=on_event)
    if persona_path is not None:
        raise ConfigError("--persona-adapter goes with a run of emtool, whose lineage it is checked against")
    if not (steps := run.saved_steps()):
        raise CheckpointError(f"{run.path} has no checkpoint-* folders")
    used_dtype = dtype or ("bfloat16" if device == "cuda" else "float32")
    base = open_base(base_model, device=device, dtype=used_dtype, on_event=on_event)
    for step in steps:
        _check_foreign(run, step, base.reference, on_event)
    lineage = {
        "base": {"name": base.reference.name, **base.files.identity()},
        "persona": None,
        "dataset": {"domain": None},
    }
    return EvaluationTarget(run=run, lineage=lineage, trained_dtype=used_dtype, base=base)


def _open_run(
    run: RunFolder, *, device: str, base_model: str | None, persona_path: Path | None, on_event: EventSink
) -> EvaluationTarget:
    """Return a run of emtool."""
    is_run = run.manifest_path.exists()
    if base_model is not None:
        raise ConfigError(f"--base-model {base_model}: {run.path} is a run of emtool, whose run.json names its base")
    steps = run.saved_steps()
    if not is_run and any((run.checkpoint_path(step) / ADAPTER_CONFIG).is_file() for step in steps):
        raise CheckpointError(
            f"{run.path} has checkpoints and no run.json: if another trainer wrote them, name their base with "
            "--base-model"
        )
    manifest = run.read_manifest()
    lineage, trained_dtype = read_lineage(run, manifest)
    if persona_path is not None and lineage["persona"] is None:
        raise ConfigError(f"--persona-adapter {persona_path}: {run.path} was trained without a persona")
    if not steps and lock_holder(run) is None:
        raise CheckpointError(f"{run.path} has no checkpoint-* folders; train it first")
    base = open_recorded_base(lineage, device=device, dtype=trained_dtype, on_event=on_event)
    return EvaluationTarget(
        run=run,
        lineage=lineage,
        trained_dtype=trained_dtype,
        base=base,
        manifest=manifest,
        persona_path=persona_path,
    )


def _check_foreign(run: RunFolder, step: int, base: ModelReference, on_event: EventSink) -> None:
    """Refuse a checkpoint that is a model with something else than the base that was named.

    Raises:
        ModelError: Says with what.
    """
    folder = run.checkpoint_path(step)
    check_stands_alone(folder)
    config = read_lora_config(folder)
    check_base(folder, config, base, option="--base-model")
    if (other := names_another_base(config, base)) is not None and step == run.saved_steps()[0]:
        text = f"{folder} says that it was trained on {other}; the base {base.name} is a folder, so only the shapes "
        on_event(Notice(text=f"{text}tell whether it fits", is_warning=True))


def _shape_of(folder: Path) -> dict[str, Any]:
    """Return an adapter's configuration without what does not change what it computes."""
    try:
        config = dict(read_lora_config(folder))
    except EmtoolError as error:
        raise CheckpointError(str(error)) from error
    for name in ("base_model_name_or_path", "inference_mode", "peft_version", "revision", "lora_dropout"):
        config.pop(name, None)
    targets = config.get("target_modules")
    return {**config, "target_modules": sorted(targets) if isinstance(targets, list) else targets}
