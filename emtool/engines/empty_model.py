"""Shapes of a model that has no weights here: its class, built without memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from emtool.core.architecture import EMBEDDING, HEAD, LINEAR, OTHER, ModelShapes, Parameter
from emtool.core.models import ModelReference


def empty_shapes(model: ModelReference) -> ModelShapes | None:
    """Return the shapes of a local model from its class, or None where transformers has no such class.

    The model is built on torch's "meta" device, where tensors have a shape and no values.
    """
    if model.path is None or (empty := empty_model(model.path)) is None:
        return None
    return shapes_of(empty, num_blocks=empty.get_decoder().config.num_hidden_layers)


def empty_model(folder: Path) -> Any | None:
    """Return the model of a folder without weights, or None where transformers has no such class."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def shapes_of(model: nn.Module, *, num_blocks: int) -> ModelShapes:
    """Return the shapes of a model that exists.

    Args:
        model: A causal language model of transformers.
        num_blocks: Its decoder blocks.
    """
    inside = {id(module) for module in model.get_decoder().modules()}  # type: ignore[operator]
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    seen: set[int] = set()
    parameters = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        module_name, _, ending = name.rpartition(".")
        module = model.get_submodule(module_name)
        kind = OTHER
        if ending == "weight":
            if module is head:
                kind = HEAD
            elif module is embedding:
                kind = EMBEDDING
            elif isinstance(module, nn.Linear) and id(module) in inside:
                kind = LINEAR
        parameters.append(Parameter(name=name, shape=tuple(parameter.shape), kind=kind, is_tied=id(parameter) in seen))
        seen.add(id(parameter))
    return ModelShapes(parameters=tuple(parameters), num_blocks=num_blocks, source="the model's class, built empty")
