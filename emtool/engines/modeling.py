"""Models: loading, adapters, and the exact merge of a persona."""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from emtool.core.adapter import select_modules
from emtool.core.config import TrainConfig
from emtool.core.errors import BackendError, CheckpointError, ModelError
from emtool.core.events import EventSink, Notice
from emtool.core.integrity import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from emtool.core.models import ModelReference, resolve_model
from emtool.engines.model_files import ModelFiles, get_model_files
from emtool.engines.rounded_products import has_bfloat16_kernels

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A base model that is on this machine: everything but the loaded weights.

    Attributes:
        reference: What the user named.
        files: Its files and what pins them.
        tokenizer: Its tokenizer.
        device: Device to train or score on.
        dtype: Dtype to load it in, a key of `DTYPES`.
    """

    reference: ModelReference
    files: ModelFiles
    tokenizer: Any
    device: str
    dtype: str

    @property
    def num_blocks(self) -> int:
        """Return the number of decoder blocks, as the model's configuration says."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.files.path, local_files_only=True, trust_remote_code=False)
        num_blocks: int = config.get_text_config(decoder=True).num_hidden_layers
        return num_blocks


def check_device(device: str) -> None:
    """Refuse a CUDA device that torch cannot use.

    Raises:
        BackendError: If torch disagrees with the driver, for instance because it is a CPU build.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise BackendError(
            f"the driver reports a CUDA device and torch {torch.__version__} cannot use it; "
            "install a CUDA build of torch, or use --device cpu --profile demo"
        )


def warn_of_slow_dtype(device: str, dtype: str, on_event: EventSink) -> None:
    """Say so where the CPU computes bfloat16 without instructions for it (see `rounded_products`)."""
    if device == "cpu" and dtype == "bfloat16" and not has_bfloat16_kernels():
        text = "this CPU has no bfloat16 instructions: --dtype float32 takes less time"
        on_event(Notice(text=text, is_warning=True))


def open_base(
    name: str,
    *,
    device: str,
    dtype: str,
    recorded: Mapping[str, str | None] | None = None,
    on_event: EventSink,
) -> BaseModel:
    """Return a base model by its name, fetching its files if they are not here.

    Args:
        name: Catalogue name, hub id or local folder.
        device: Device to train or score on.
        dtype: Dtype to load it in.
        recorded: What pinned the weights of a run, to get the same again.
        on_event: Where progress is reported.

    Raises:
        EmtoolError: If the name is unknown, or no source has the files.
    """
    reference = resolve_model(name)
    files = get_model_files(reference, recorded=recorded, on_event=on_event)
    tokenizer = load_tokenizer(files.path)
    return BaseModel(reference=reference, files=files, tokenizer=tokenizer, device=device, dtype=dtype)


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a model folder, with a pad token.

    Raises:
        ModelError: If there is none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"no usable tokenizer in {folder}: {str(error).splitlines()[0]}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(folder: Path, *, dtype: str) -> Any:
    """Return a base model on the CPU, in evaluation mode.

    Args:
        folder: Model folder in the Hugging Face layout.
        dtype: Dtype of its weights, a key of `DTYPES`.

    Raises:
        ModelError: If it cannot be loaded as a causal language model.
    """
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[dtype], local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"cannot load the model in {folder}: {str(error).splitlines()[0]}") from error
    return model.eval()


def add_lora(model: Any, config: TrainConfig, reference: ModelReference) -> Any:
    """Return the model wrapped with a fresh, trainable LoRA adapter.

    The adapter's initial values follow from `config.seed` alone. Adapter weights are float32 whatever the base's
    dtype, PEFT's default.

    Raises:
        ConfigError: If a target, a block or a module to save does not exist in the model.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    names = lora_modules(model, config)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        target_modules=peft_targets(model, names),
        modules_to_save=list(config.modules_to_save) or None,
        bias=config.lora_bias,
        init_lora_weights=True,
    )
    set_seed(config.seed)
    wrapped = get_peft_model(model, lora)
    adapted = set(wrapped.targeted_module_names)
    assert adapted == set(names), f"PEFT adapted other layers than planned: {adapted ^ set(names)}"
    # PEFT puts the local folder here; whoever loads a milestone elsewhere needs the name.
    wrapped.peft_config["default"].base_model_name_or_path = reference.hub_id or reference.name
    return wrapped


def lora_modules(model: Any, config: TrainConfig) -> list[str]:
    """Return the names of the layers to adapt: linear layers inside the language model only.

    A vision tower has layers of the same names; it is never adapted.

    Raises:
        ConfigError: If a target or a block does not exist in the model.
    """
    decoder = model.get_decoder()
    inside = {id(module) for module in decoder.modules()}
    linear = [name for name, module in model.named_modules() if is_linear(module) and id(module) in inside]
    return select_modules(
        linear,
        target_modules=config.target_modules,
        layers_to_transform=config.layers_to_transform,
        num_blocks=decoder.config.num_hidden_layers,
        modules_to_save=config.modules_to_save,
    )


def peft_targets(model: nn.Module, names: Sequence[str]) -> list[str] | str:
    """Return `target_modules` for PEFT that match exactly these layers, as short as possible.

    Name endings where these are unambiguous, else a regular expression over blocks and endings, else the names.
    """
    every = [name for name, _ in model.named_modules()]
    endings = sorted({name.rpartition(".")[2] for name in names})
    if {name for name in every if name.rpartition(".")[2] in endings} == set(names):
        return endings
    parts = [re.fullmatch(r"(.*?)\.(\d+)\.(.*)", name) for name in names]
    if all(parts):
        prefixes, blocks, tails = (sorted({match[index] for match in parts if match}) for index in (1, 2, 3))
        pattern = rf"{_either(prefixes)}\.{_either(sorted(blocks, key=int))}\.{_either(tails)}"
        if {name for name in every if re.fullmatch(pattern, name)} == set(names):
            return pattern
    return list(names)


def _either(texts: Sequence[str]) -> str:
    return "(" + "|".join(map(re.escape, texts)) + ")"


def is_linear(module: nn.Module) -> bool:
    """Return whether LoRA adapts a module as a linear layer."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def attach_adapter(model: Any, folder: Path) -> Any:
    """Return the model with the adapter of a PEFT folder attached and active, not merged.

    Raises:
        CheckpointError: If the adapter cannot be read or does not fit the model.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    try:
        return PeftModel.from_pretrained(model, str(folder), local_files_only=True)
    except (ValueError, RuntimeError, OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"adapter {folder} does not fit the base model: {reason}") from error


def adapter_config_json(model: Any) -> bytes:
    """Return the contents of `adapter_config.json` for a model's adapter, the same every time."""
    return lora_config_json(copy.deepcopy(model.peft_config["default"]))


def lora_config_json(config: Any) -> bytes:
    """Return the contents of `adapter_config.json` for a `LoraConfig`, which is changed: sets as sorted lists."""
    config.inference_mode = True
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)
    with tempfile.TemporaryDirectory(prefix="emtool-") as scratch:
        config.save_pretrained(scratch)
        return (Path(scratch) / ADAPTER_CONFIG).read_bytes()


def adapter_state(model: Any) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors under the names that PEFT saves, without copying them."""
    from peft import get_peft_model_state_dict

    state: dict[str, torch.Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return state


def load_adapter_into(model: Any, folder: Path) -> None:
    """Replace the adapter's weights in place by those of a checkpoint of the same shape.

    Raises:
        CheckpointError: If the checkpoint's tensors are not exactly the adapter's, or cannot be read.
    """
    from peft import set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / ADAPTER_WEIGHTS
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; the checkpoint is damaged or incomplete") from error
    expected = {name: tuple(tensor.shape) for name, tensor in adapter_state(model).items()}
    if expected != {name: tuple(tensor.shape) for name, tensor in tensors.items()}:
        raise CheckpointError(f"{path} holds another adapter than the first checkpoint of this run")
    set_peft_model_state_dict(model, tensors)
