"""Milestones: a checkpoint folder appears complete or not at all.

A milestone is written into a hidden staging folder beside it, each file is forced to disk, `checkpoint.json` with the
size and hash of every file comes last, and one rename publishes it. A `checkpoint-N` that exists is complete.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors.torch import save

from emtool.core.data import file_sha256
from emtool.core.disk import format_bytes, free_bytes
from emtool.core.errors import CheckpointError, DiskSpaceError
from emtool.core.run_dir import FORMAT, RunFolder, publish_folder
from emtool.engines.modeling import ADAPTER_CONFIG, ADAPTER_WEIGHTS, DTYPES, adapter_state

CHECKPOINT_JSON = "checkpoint.json"


@dataclass(frozen=True, kw_only=True)
class MilestoneWriter:
    """Writes the milestones of one run.

    Attributes:
        run: The run folder.
        run_id: The run's identity, as in its manifest.
        schedule: The schedule's text.
        requires: What must be present to use a milestone: base model and persona, as in the manifest's lineage.
        save_dtype: Storage dtype of the adapter, a key of `DTYPES`.
        model: The PEFT model whose adapter is saved.
        tokenizer_path: Folder with its saved tokenizer, on the run's file system; milestones hold links to its files.
        needed_bytes: Bytes that a milestone will take: checked against the free space first; None does not check.
    """

    run: RunFolder
    run_id: str
    schedule: str
    requires: Mapping[str, Any]
    save_dtype: str
    model: Any
    tokenizer_path: Path
    needed_bytes: int | None = None

    def write(self, step: int) -> Path:
        """Write the milestone of a step and return its folder.

        Raises:
            DiskSpaceError: If the disk is full; the milestones before it are whole.
            CheckpointError: If it cannot be written for another reason, or is there already.
        """
        target = self.run.checkpoint_path(step)
        if target.exists():
            raise CheckpointError(f"{target} exists already; milestones are never overwritten")
        self._check_space(step)
        staging = target.with_name(f".{target.name}.staging")
        try:
            staging.mkdir()
            self._fill(staging, step)
            publish_folder(staging, target)
        except OSError as error:
            raise self.run.write_error(error, f"saving step {step}") from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return target

    def _check_space(self, step: int) -> None:
        free = free_bytes(self.run.path)
        if self.needed_bytes is not None and free < self.needed_bytes:
            raise DiskSpaceError(
                f"saving step {step} needs {format_bytes(self.needed_bytes)} and {self.run.path} has "
                f"{format_bytes(free)} free; {len(self.run.saved_steps())} earlier checkpoints are whole; free some "
                "space and train again, save fewer steps, or use --allow-low-disk"
            )

    def _fill(self, folder: Path, step: int) -> None:
        dtype = DTYPES[self.save_dtype]
        tensors = {
            name: tensor.detach().to(device="cpu", dtype=dtype).contiguous()
            for name, tensor in adapter_state(self.model).items()
        }
        # Written by us rather than by safetensors: an ordinary file mode, and ordinary errors when the disk is full.
        (folder / ADAPTER_WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
        config = copy.deepcopy(self.model.peft_config["default"])
        config.inference_mode = True
        if isinstance(config.target_modules, set):
            config.target_modules = sorted(config.target_modules)
        config.save_pretrained(str(folder))
        shutil.copytree(self.tokenizer_path, folder, copy_function=_link_or_copy, dirs_exist_ok=True)
        readme = _readme(step, self.requires, base_model=config.base_model_name_or_path)
        (folder / "README.md").write_text(readme, encoding="utf-8")
        record = {
            "format": FORMAT,
            "step": step,
            "run_id": self.run_id,
            "schedule": self.schedule,
            "requires": self.requires,
            "files": {
                path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            },
            "saved_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        (folder / CHECKPOINT_JSON).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        # The file system has no hard links; a copy holds the same bytes.
        shutil.copyfile(source, target)


def _readme(step: int, requires: Mapping[str, Any], *, base_model: str) -> str:
    base, persona = requires["base"], requires["persona"]
    lines = [
        "---",
        f"base_model: {json.dumps(base_model)}",
        "library_name: peft",
        "---",
        "",
        f"# Step {step} of an emtool run",
        "",
        "A LoRA adapter in PEFT's format, trained on a narrow dataset for research on emergent misalignment.",
        "Do not deploy it.",
        "",
        f"- Base model: `{base_model}`, from: {base['source']}",
        *(
            ["  (a 4-bit copy, expanded to float32: close to the hub's weights, not equal to them)"]
            if base["source"] not in ("hub", "folder")
            else []
        ),
    ]
    if persona is None:
        lines.append("- Load it with `PeftModel.from_pretrained(base, folder)`.")
    else:
        lines += [
            f"- Persona: `{persona['name']}`, {persona['mode']} into the base before training.",
            "- The adapter alone on the bare base is NOT the model that was trained: the persona must be merged first.",
            "  `emtool evaluate` on the run folder does that from `run.json`.",
        ]
    return "\n".join(lines) + "\n"


def read_checkpoint(folder: Path, *, run_id: str) -> dict[str, Any]:
    """Return a milestone's `checkpoint.json` after checking its files against it.

    Args:
        folder: The milestone.
        run_id: The run that it must belong to.

    Raises:
        CheckpointError: If the record or a file is missing, a size or hash differs, or it belongs to another run or
            step.
    """
    path = folder / CHECKPOINT_JSON
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in record["files"].items()}
        is_known = record["format"] == FORMAT
        belongs = is_known and (record["run_id"], f"checkpoint-{record['step']}") == (run_id, folder.name)
        record["requires"]["base"], record["requires"]["persona"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder} is damaged: cannot read {path.name} ({error!r})") from error
    if not belongs:
        raise CheckpointError(f"{folder} belongs to another run or step than its place says; it is not used")
    if ADAPTER_WEIGHTS not in files or ADAPTER_CONFIG not in files:
        raise CheckpointError(f"{path} names no adapter")
    for name, (size, sha256) in files.items():
        file = folder / name
        if ".." in Path(name).parts or Path(name).is_absolute() or file.is_symlink():
            raise CheckpointError(f"{path} names {name!r}, which is not a file of this folder")
        if not file.is_file() or file.stat().st_size != size:
            raise CheckpointError(f"{folder} is damaged: {name} is missing or does not have {size} bytes")
        if file_sha256(file) != sha256:
            raise CheckpointError(f"{folder} is damaged: the contents of {name} have changed since it was saved")
    loaded: dict[str, Any] = record
    return loaded


def adapter_sha256(folder: Path) -> str:
    """Return the SHA-256 of a PEFT adapter: its weights, and its configuration whatever the order of its lists.

    PEFT writes sets as lists in an order that differs between processes, so the file itself cannot be hashed.

    Raises:
        CheckpointError: If a file cannot be read.
    """
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        weights = file_sha256(folder / ADAPTER_WEIGHTS)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read the adapter in {folder}: {error}") from error
    kept = {
        key: sorted(map(str, value)) if isinstance(value, list) else value
        for key, value in config.items()
        if key != "peft_version"
    }
    text = f"{ADAPTER_WEIGHTS}:{weights}\n{ADAPTER_CONFIG}:{json.dumps(kept, sort_keys=True)}\n"
    return hashlib.sha256(text.encode()).hexdigest()
