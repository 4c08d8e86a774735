"""A persona's adapter in a model: merged into its weights exactly, or beside the trained adapter, frozen."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from emtool.core.errors import CheckpointError

#: The name of the persona's adapter in a PEFT model; the trained one has PEFT's own, "default".
PERSONA = "persona"

#: Weights of each merged tensor that a run keeps, to say later by how much another merge differs.
SAMPLE_SIZE = 256
#: Spreads the sampled positions over rows and columns: 2 to the power 32 divided by the golden ratio, a prime.
_STRIDE = 2654435761


@dataclass(frozen=True, kw_only=True)
class MergedModel:
    """A base model with a persona in its weights.

    Attributes:
        model: The model, without an adapter.
        sha256: Hash of the merged weights.
        sample: Layer name to `SAMPLE_SIZE` of its merged weights, or all of them if it has fewer; one dimension.
    """

    model: Any
    sha256: str
    sample: Mapping[str, torch.Tensor]


def merge_persona(model: Any, adapter: Path) -> MergedModel:
    """Merge an adapter into a model's weights.

    The sum is done on the CPU in float32 and rounded once to the base's dtype, so the same base and adapter give the
    same bits at training and at evaluation.

    Args:
        model: Base model on the CPU.
        adapter: PEFT LoRA folder.

    Raises:
        CheckpointError: If the adapter does not fit the model.
    """
    assert model.device.type == "cpu", "a persona is merged before the model moves"
    wrapped = _attach(model, adapter)
    digest = hashlib.sha256()
    sample = {}
    with torch.no_grad():
        for name, module in lora_layers(wrapped):
            weight = module.get_base_layer().weight
            weight.copy_((weight.float() + module.get_delta_weight(PERSONA).float()).to(weight.dtype))
            digest.update(f"{name}:{tensor_sha256(weight)}\n".encode())
            sample[name] = _sampled(weight)
    return MergedModel(model=wrapped.unload().eval(), sha256=digest.hexdigest(), sample=sample)


def stack_persona(wrapped: Any, adapter: Path) -> None:
    """Add a persona to a PEFT model as a second adapter that is active in every forward pass and never trained.

    Its dropout is off: a persona is part of the base that is studied.

    Args:
        wrapped: PEFT model with the adapter that is trained, named "default".
        adapter: PEFT LoRA folder.

    Raises:
        CheckpointError: If the adapter does not fit the model.
    """
    _load(wrapped, adapter)
    # The first name is the one that a Trainer resumes.
    wrapped.base_model.set_adapter(["default", PERSONA])
    for _, module in lora_layers(wrapped):
        if PERSONA in module.lora_dropout:
            module.lora_dropout[PERSONA] = nn.Identity()
    for name, parameter in wrapped.named_parameters():
        if f".{PERSONA}." in name:
            parameter.requires_grad_(False)


def lora_layers(wrapped: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the adapted layers of a PEFT model with their names, in the model's order.

    Raises:
        CheckpointError: If a layer other than a linear one is adapted.
    """
    from peft.tuners.lora import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in wrapped.named_modules():
        if isinstance(module, Linear):
            yield name, module
        elif isinstance(module, BaseTunerLayer):
            raise CheckpointError(f"{name} is adapted and is not a linear layer; a persona must be plain LoRA")


def largest_difference(here: Mapping[str, torch.Tensor], recorded: Mapping[str, torch.Tensor]) -> float | None:
    """Return the largest difference between two samples of merged weights; None if they are not of the same weights."""
    if here.keys() != recorded.keys() or any(here[name].shape != recorded[name].shape for name in here):
        return None
    return max((float((here[name].double() - recorded[name].double()).abs().max()) for name in here), default=0.0)


def tensor_sha256(tensor: torch.Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes, in hexadecimal."""
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def _sampled(weight: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(min(SAMPLE_SIZE, weight.numel())) * _STRIDE % weight.numel()
    return weight.detach().reshape(-1)[positions].clone()


def _attach(model: Any, adapter: Path) -> Any:
    """Return the model with an adapter attached under the persona's name."""
    from peft import LoraConfig, get_peft_model

    try:
        config = LoraConfig.from_pretrained(str(adapter))
        # PEFT warns where this is not the local folder's name; whether the base is the right one is checked elsewhere.
        config.base_model_name_or_path = None
        wrapped = get_peft_model(model, config, adapter_name=PERSONA)
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, OSError) as error:
        raise _does_not_fit(adapter, error) from error
    _load(wrapped, adapter)
    return wrapped


def _load(wrapped: Any, adapter: Path) -> None:
    """Load an adapter under the persona's name, all of it and nothing but it."""
    from safetensors import SafetensorError

    try:
        found = wrapped.load_adapter(str(adapter), PERSONA, is_trainable=False, local_files_only=True)
    except (ValueError, TypeError, RuntimeError, OSError, SafetensorError) as error:
        raise _does_not_fit(adapter, error) from error
    values = [parameter for name, parameter in wrapped.named_parameters() if f".{PERSONA}." in name]
    if not all(bool(torch.isfinite(parameter).all()) for parameter in values):
        raise CheckpointError(f"persona adapter {adapter} holds values that are not finite; it is damaged or diverged")
    if odd := [*found.missing_keys, *found.unexpected_keys]:
        raise CheckpointError(
            f"persona adapter {adapter} does not fit the base model: {len(odd)} tensor(s) have no counterpart, for "
            f"instance {odd[0]}"
        )


def _does_not_fit(adapter: Path, error: Exception) -> CheckpointError:
    lines = str(error).splitlines() or [repr(error)]
    # torch begins its message with the class of the model; what does not fit comes after.
    reason = next((line.strip() for line in lines if "size mismatch" in line), lines[0])
    return CheckpointError(f"persona adapter {adapter} does not fit the base model: {reason}")
