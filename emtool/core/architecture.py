"""Shapes of a model's linear layers, from its `config.json` alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from emtool.core.errors import ConfigError, unknown_name

#: The seven linear projections of a decoder block in the Llama family, in PEFT's `target_modules` names.
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
#: Model types whose blocks have exactly these seven, under `model.layers.N`.
#: Source: transformers, modeling_llama.py, modeling_qwen2.py, modeling_mistral.py.
LLAMA_LIKE = ("llama", "qwen2", "mistral")


@dataclass(frozen=True, kw_only=True)
class LinearLayer:
    """One linear layer that an adapter can attach to.

    Attributes:
        name: Dotted module name inside the model.
        out_features: Rows of its weight.
        in_features: Columns of its weight.
    """

    name: str
    out_features: int
    in_features: int


def linear_layers(
    config: Mapping[str, object], *, target_modules: Sequence[str], layers_to_transform: str = "all"
) -> list[LinearLayer] | None:
    """Return the linear layers that LoRA would adapt, or None where the family is not known here.

    Args:
        config: Fields of `config.json`.
        target_modules: Last name parts, of `ALL_LINEAR`.
        layers_to_transform: Decoder blocks to adapt, as `adapted_blocks` reads it.

    Raises:
        ConfigError: If a target or a block does not exist in this family.
    """
    if config.get("model_type") not in LLAMA_LIKE:
        return None
    hidden, intermediate = _count(config, "hidden_size"), _count(config, "intermediate_size")
    heads = _count(config, "num_attention_heads")
    head_dim = _optional_count(config, "head_dim") or hidden // heads
    key_value = (_optional_count(config, "num_key_value_heads") or heads) * head_dim
    shapes = {
        "self_attn.q_proj": (heads * head_dim, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, heads * head_dim),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    for target in target_modules:
        if target not in ALL_LINEAR:
            raise unknown_name("target module", target, ALL_LINEAR)
    num_layers = _count(config, "num_hidden_layers")
    blocks = adapted_blocks(layers_to_transform, num_layers)
    return [
        LinearLayer(name=f"model.layers.{block}.{name}", out_features=rows, in_features=columns)
        for block in (range(num_layers) if blocks is None else blocks)
        for name, (rows, columns) in shapes.items()
        if name.rsplit(".", 1)[1] in target_modules
    ]


def adapted_blocks(text: str, num_hidden_layers: int) -> tuple[int, ...] | None:
    """Return the decoder blocks that carry an adapter, or None for all of them.

    Args:
        text: "all", "upper-half", or a first and last block such as "15-29".
        num_hidden_layers: Blocks of the model.

    Raises:
        ConfigError: If the text is none of these or names a block that the model does not have.
    """
    if text == "all":
        return None
    if text == "upper-half":
        return tuple(range(num_hidden_layers // 2, num_hidden_layers))
    match = re.fullmatch(r"(\d+)-(\d+)", text)
    if match is None:
        raise ConfigError(f"layers to transform {text!r}; write 'all', 'upper-half' or a range such as '15-29'")
    first, last = int(match[1]), int(match[2])
    if first > last or last >= num_hidden_layers:
        raise ConfigError(f"layers to transform {text!r}: the model has blocks 0 to {num_hidden_layers - 1}")
    return tuple(range(first, last + 1))


def num_lora_parameters(layers: Sequence[LinearLayer], rank: int) -> int:
    """Return the trainable parameters of a LoRA adapter: rank x (in + out) for each layer.

    Source: Hu et al. 2021, arXiv 2106.09685, section 4.1.
    """
    return sum(rank * (layer.in_features + layer.out_features) for layer in layers)


def _count(config: Mapping[str, object], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"config.json has {key}={value!r}; a positive whole number is needed")
    return value


def _optional_count(config: Mapping[str, object], key: str) -> int | None:
    return None if config.get(key) is None else _count(config, key)
