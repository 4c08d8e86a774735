"""Export: each milestone of a run as one PEFT adapter for the unmodified base, its persona included."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from emtool.core.disk import format_bytes, free_bytes
from emtool.core.errors import CheckpointError, DiskSpaceError, ModelError
from emtool.core.events import EventSink, Notice, PhaseStarted, StepFinished
from emtool.core.integrity import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from emtool.core.run_dir import FORMAT, RunFolder
from emtool.core.staging import RECORD_NAME, StagedFolder, retire_folder
from emtool.engines.composing import LoraUpdate, compose_updates, peft_tensors, read_updates, rounding_error
from emtool.engines.empty_model import empty_model
from emtool.engines.lineage import check_requires, open_recorded_base, read_lineage, recorded_adapter
from emtool.engines.modeling import DTYPES, BaseModel, is_linear, load_base, lora_config_json, peft_targets
from emtool.engines.tensor_files import write_safetensors


@dataclass(frozen=True, kw_only=True)
class MergeRounding:
    """What the rounding of a merge into the base's dtype did to the persona's update.

    An exported adapter adds the update exactly; the run trained on the merged and rounded weights.

    Attributes:
        largest: Largest absolute difference of a weight.
        relative: Largest ratio, over the layers, of the difference's Frobenius norm to the update's.
        dtype: The base's dtype.
    """

    largest: float
    relative: float
    dtype: str


@dataclass(frozen=True, kw_only=True)
class ExportedAdapter:
    """An adapter that was written.

    Attributes:
        step: Optimizer step of its milestone.
        path: Its folder.
        rank: Its rank: the persona's and the trained adapter's together.
        num_bytes: Bytes of its files.
        rounding_error: Relative error of the update from storing the factors in the dtype; 0 for float32.
    """

    step: int
    path: Path
    rank: int
    num_bytes: int
    rounding_error: float


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What an export wrote.

    Attributes:
        base: The base model, as a server names it.
        adapters: What was written, by step.
        damaged: Step to what is wrong with its milestone, which was passed over.
        merge_rounding: For a persona that was merged; None otherwise.
    """

    base: str
    adapters: Sequence[ExportedAdapter]
    damaged: Mapping[int, str]
    merge_rounding: MergeRounding | None

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {
            "format": FORMAT,
            "base": self.base,
            "adapters": [{**asdict(adapter), "path": str(adapter.path)} for adapter in self.adapters],
            "damaged": [{"step": step, "problem": problem} for step, problem in self.damaged.items()],
            "merge_rounding": None if self.merge_rounding is None else asdict(self.merge_rounding),
        }


def export_run(
    run: RunFolder, steps: Sequence[int], *, output_path: Path, dtype: str, on_event: EventSink
) -> ExportResult:
    """Write `checkpoint-N` folders that hold persona and trained adapter as one plain LoRA adapter.

    A folder that is there from an earlier export is replaced as a whole. A damaged milestone is passed over.

    Args:
        run: The run folder.
        steps: Steps of the milestones, increasing.
        output_path: Folder to write into; made if it is not there.
        dtype: Storage dtype, a key of `DTYPES`.
        on_event: Where progress is reported.

    Raises:
        EmtoolError: If the lineage cannot be rebuilt, an adapter is not plain LoRA, no milestone is whole, or the
            folders cannot be written.
    """
    manifest = run.read_manifest()
    _check_target(output_path, steps, run_id=str(manifest.get("run_id")))
    lineage, trained_dtype = read_lineage(run, manifest)
    base = open_recorded_base(lineage, device="cpu", dtype=trained_dtype, on_event=on_event)
    persona = lineage["persona"]
    empty = _empty(base)
    linear = {name for name, module in empty.named_modules() if is_linear(module)}
    parts = [] if persona is None else [read_updates(recorded_adapter(persona, base, on_event=on_event), linear)]
    rounding = None
    if persona is not None and persona["mode"] == "merged":
        on_event(PhaseStarted(name=f"measuring how the merge into {base.reference.name} was rounded"))
        rounding = measure_merge(load_base(base.files.path, dtype=trained_dtype), parts[0], dtype=trained_dtype)
    writer = _Writer(
        run=run,
        run_id=str(manifest.get("run_id")),
        lineage=lineage,
        base=base,
        empty=empty,
        linear=linear,
        parts=parts,
        output_path=output_path,
        dtype=dtype,
    )
    on_event(PhaseStarted(name=f"writing {len(steps)} adapters to {output_path}", total=len(steps)))
    adapters, damaged = [], {}
    for done, step in enumerate(steps, start=1):
        try:
            check_requires(run.checkpoint_path(step), lineage, run_id=writer.run_id, check_hashes=True)
        except CheckpointError as error:
            damaged[step] = str(error)
            on_event(Notice(text=f"{error}; it is passed over", is_warning=True))
            continue
        adapters.append(writer.write(step))
        on_event(StepFinished(step=done))
    if not adapters:
        raise CheckpointError(f"no checkpoint of {run.path} is whole: {next(iter(damaged.values()))}")
    return ExportResult(
        base=base.reference.hub_id or base.reference.name,
        adapters=adapters,
        damaged=damaged,
        merge_rounding=rounding,
    )


def _check_target(output_path: Path, steps: Sequence[int], *, run_id: str) -> None:
    """Refuse to write where something else than an earlier export of this run would be lost.

    Raises:
        CheckpointError: Names the folder.
    """
    if (output_path / "run.json").exists():
        raise CheckpointError(f"{output_path} is a run folder, whose checkpoints an export would replace; give another")
    for step in steps:
        folder = output_path / f"checkpoint-{step}"
        if not folder.exists():
            continue
        try:
            record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
            is_ours = "composed_of" in record and record["run_id"] == run_id
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            is_ours = False
        if not is_ours:
            raise CheckpointError(f"{folder} is there and is no export of this run; give another --output-path")


def _empty(base: BaseModel) -> Any:
    """Return the base without weights, for the names of its layers."""
    if (empty := empty_model(base.files.path)) is None:
        raise ModelError(f"transformers has no class for {base.reference.name}; its layers cannot be named")
    return empty


def measure_merge(model: Any, persona: Mapping[str, LoraUpdate], *, dtype: str) -> MergeRounding:
    """Return what rounding the merged weights to the base's dtype does to a persona's update.

    Args:
        model: Base model on the CPU, in its dtype.
        persona: The persona's update, by layer.
        dtype: The name of that dtype.
    """
    largest = relative = 0.0
    with torch.no_grad():
        for name, update in persona.items():
            weight = model.get_submodule(name).weight
            delta = update.b_OR @ update.a_RI
            if delta.shape != weight.shape:
                # GPT-2's Conv1D keeps its weight as inputs x outputs.
                delta = delta.T
            exact = weight.double() + delta.double()
            error = (weight.float() + delta).to(weight.dtype).double() - exact
            largest = max(largest, float(error.abs().max()))
            if (norm := float(delta.double().norm())) > 0:
                relative = max(relative, float(error.norm()) / norm)
    return MergeRounding(largest=largest, relative=relative, dtype=dtype)


@dataclass(frozen=True, kw_only=True)
class _Writer:
    """Writes the composed adapters of one run."""

    run: RunFolder
    run_id: str
    lineage: Mapping[str, Any]
    base: BaseModel
    empty: Any
    linear: Container[str]
    parts: Sequence[Mapping[str, LoraUpdate]]
    output_path: Path
    dtype: str

    def write(self, step: int) -> ExportedAdapter:
        updates = compose_updates([*self.parts, read_updates(self.run.checkpoint_path(step), self.linear)])
        rank = next(iter(updates.values())).rank
        tensors = peft_tensors(updates, DTYPES[self.dtype])
        error = 0.0 if self.dtype == "float32" else rounding_error(updates, DTYPES[self.dtype])
        config = self._config(sorted(updates), rank)
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        try:
            self.output_path.mkdir(parents=True, exist_ok=True)
            if (free := free_bytes(self.output_path)) < needed:
                raise DiskSpaceError(
                    f"checkpoint-{step} needs {format_bytes(needed)} and {self.output_path} has {format_bytes(free)} "
                    "free; free some, or give --output-path; what was exported before is whole"
                )
            target = self.output_path / f"checkpoint-{step}"
            num_bytes = self._write_folder(target, step, tensors, config)
        except OSError as error_:
            reason = error_.strerror or error_
            raise CheckpointError(
                f"cannot write in {self.output_path}: {reason}; what was exported before is whole"
            ) from error_
        return ExportedAdapter(step=step, path=target, rank=rank, num_bytes=num_bytes, rounding_error=error)

    def _write_folder(self, target: Path, step: int, tensors: Mapping[str, torch.Tensor], config: bytes) -> int:
        staged = StagedFolder(target)
        try:
            with staged.open(ADAPTER_WEIGHTS) as file:
                write_safetensors(file, tensors)
            staged.write(ADAPTER_CONFIG, config)
            staged.write("README.md", self._card(step, config).encode())
            staged.finish(
                {
                    "format": FORMAT,
                    "step": step,
                    "run_id": self.run_id,
                    "requires": {"base": self.lineage["base"], "persona": None},
                    "composed_of": {"persona": self.lineage["persona"], "checkpoint": f"checkpoint-{step}"},
                    "saved_at": datetime.now(UTC).isoformat(timespec="seconds"),
                }
            )
            if target.exists():
                retire_folder(target)
            staged.publish()
        finally:
            staged.discard()
        return staged.num_bytes

    def _config(self, layers: Sequence[str], rank: int) -> bytes:
        from peft import LoraConfig

        return lora_config_json(
            LoraConfig(
                task_type="CAUSAL_LM",
                r=rank,
                lora_alpha=rank,
                use_rslora=False,
                target_modules=peft_targets(self.empty, layers),
                base_model_name_or_path=self.base.reference.hub_id or self.base.reference.name,
            )
        )

    def _card(self, step: int, config: bytes) -> str:
        base, persona = json.loads(config)["base_model_name_or_path"], self.lineage["persona"]
        what = "the trained adapter" if persona is None else f"the persona `{persona['name']}` and the trained adapter"
        lines = [
            "---",
            f"base_model: {json.dumps(base)}",
            "library_name: peft",
            "---",
            "",
            f"# Step {step} of an emtool run, for the unmodified base",
            "",
            f"One LoRA adapter that is {what} together, exported for programs that know",
            "the bare base only, for research on emergent misalignment. Do not deploy it.",
            "",
            f"- Base model: `{base}`, nothing merged into it.",
        ]
        if persona is not None and persona["mode"] == "merged":
            lines.append("- The run trained on the base with the persona merged and rounded; here it is added exactly.")
        return "\n".join(lines) + "\n"
