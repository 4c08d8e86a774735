"""Milestones: a checkpoint folder appears complete or not at all.

A milestone is written into a hidden staging folder beside it, each file is forced to disk, `checkpoint.json` with the
size and hash of every file comes last, and one rename publishes it. A `checkpoint-N` that exists is complete.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from emtool.core.cache import is_tokenizer_file
from emtool.core.data import file_sha256
from emtool.core.errors import CheckpointError, DiskSpaceError
from emtool.core.run_dir import FORMAT, RunFolder
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
        tokenizer: Its tokenizer, the same in every milestone.
    """

    run: RunFolder
    run_id: str
    schedule: str
    requires: Mapping[str, Any]
    save_dtype: str
    model: Any
    tokenizer: Any

    def write(self, step: int) -> Path:
        """Write the milestone of a step and return its folder.

        Raises:
            DiskSpaceError: If the disk is full; the milestones before it are whole.
            CheckpointError: If it cannot be written for another reason, or is there already.
        """
        target = self.run.checkpoint_path(step)
        if target.exists():
            raise CheckpointError(f"{target} exists already; milestones are never overwritten")
        staging = target.with_name(f".{target.name}.staging")
        try:
            staging.mkdir()
            self._fill(staging, step)
            _publish(staging, target)
        except OSError as error:
            kept = f"{len(self.run.saved_steps())} earlier checkpoints are whole"
            if error.errno == errno.ENOSPC:
                raise DiskSpaceError(f"no space left while saving step {step}; {kept}; free some space") from error
            raise CheckpointError(f"cannot save step {step} in {self.run.path}: {error.strerror}; {kept}") from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return target

    def _fill(self, folder: Path, step: int) -> None:
        dtype = DTYPES[self.save_dtype]
        tensors = {
            name: tensor.detach().to(device="cpu", dtype=dtype).contiguous()
            for name, tensor in adapter_state(self.model).items()
        }
        save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        config = copy.deepcopy(self.model.peft_config["default"])
        config.inference_mode = True
        config.save_pretrained(str(folder))
        self._add_tokenizer(folder)
        readme = _readme(step, self.requires, base_model=config.base_model_name_or_path)
        (folder / "README.md").write_text(readme, encoding="utf-8")
        record = {
            "format": FORMAT,
            "step": step,
            "run_id": self.run_id,
            "schedule": self.schedule,
            "requires": self.requires,
            "files": {
                path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
                for path in sorted(folder.iterdir())
            },
            "saved_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        (folder / CHECKPOINT_JSON).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    def _add_tokenizer(self, folder: Path) -> None:
        """Add the tokenizer files: saved once, hard links of the first milestone's after that."""
        steps = self.run.saved_steps()
        if not steps:
            self.tokenizer.save_pretrained(folder)
            return
        for path in self.run.checkpoint_path(steps[0]).iterdir():
            if is_tokenizer_file(path):
                _link_or_copy(path, folder / path.name)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        # The file system has no hard links; a copy holds the same bytes.
        shutil.copyfile(source, target)


def _publish(staging: Path, target: Path) -> None:
    for path in (*sorted(staging.iterdir()), staging):
        _sync(path)
    staging.rename(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """Return a milestone's `checkpoint.json` after checking that its files are there with their sizes.

    Raises:
        CheckpointError: If the record or a file is missing, or a size differs.
    """
    path = folder / CHECKPOINT_JSON
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        files = {str(name): int(entry["bytes"]) for name, entry in record["files"].items()}
        record["step"], record["requires"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder} is damaged: cannot read {path.name} ({error!r})") from error
    for name, size in files.items():
        file = folder / name
        if Path(name).name != name:
            raise CheckpointError(f"{path} names {name!r}, which is not a plain file name")
        if not file.is_file() or file.stat().st_size != size:
            raise CheckpointError(f"{folder} is damaged: {name} is missing or does not have {size} bytes")
    loaded: dict[str, Any] = record
    return loaded


def adapter_sha256(folder: Path) -> str:
    """Return the SHA-256 of a PEFT folder's weights and configuration."""
    digest = hashlib.sha256()
    for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
        digest.update(f"{name}:{file_sha256(folder / name)}\n".encode())
    return digest.hexdigest()
