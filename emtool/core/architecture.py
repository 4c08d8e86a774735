"""Names and shapes of a model's parameters, known before it is loaded.

They come from `config.json` for the families below, else from the headers of the model's safetensors files. To add a
family, write its entry in `FAMILIES`; `tests/core/test_architecture.py` compares every family with the real class.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from emtool.core.errors import ConfigError

#: What a parameter belongs to: a linear layer of the language model that an adapter can attach to, the output head,
#: an embedding, or anything else (norms, biases, a vision tower).
LINEAR, HEAD, EMBEDDING, OTHER = "linear", "head", "embedding", "other"

#: The number of the decoder block in the name of a module.
BLOCK_NUMBER = re.compile(r"\.(\d+)\.")

Config = Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of a model.

    Attributes:
        name: Dotted name inside the model.
        shape: Its shape; (out_features, in_features) for the weight of a linear layer.
        kind: `LINEAR`, `HEAD`, `EMBEDDING` or `OTHER`.
        is_tied: Whether it shares its values with the input embedding and is stored with that.
    """

    name: str
    shape: tuple[int, ...]
    kind: str = OTHER
    is_tied: bool = False

    @property
    def size(self) -> int:
        """Return the number of values."""
        return math.prod(self.shape)

    @property
    def module(self) -> str:
        """Return the name of the module that holds it."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True, kw_only=True)
class ModelShapes:
    """The parameters of a model.

    Attributes:
        parameters: All of them; a tied one is there and marked.
        num_blocks: Decoder blocks.
        source: Where they were read, in words.
        is_exact: Whether the names are those that the loaded model has, rather than those of its files.
    """

    parameters: tuple[Parameter, ...]
    num_blocks: int
    source: str
    is_exact: bool = True

    @property
    def num_parameters(self) -> int:
        """Return the number of values, tied ones counted once."""
        return sum(parameter.size for parameter in self.parameters if not parameter.is_tied)

    @property
    def linear_weights(self) -> dict[str, Parameter]:
        """Return the weights of the language model's linear layers by the name of the layer."""
        return {p.module: p for p in self.parameters if p.kind == LINEAR}


class _MissingFieldError(Exception):
    """`config.json` leaves a field to the library's default, which is not known here."""


#: Decoder blocks above which a config is taken for a mistake.
MAX_BLOCKS = 10_000


def shapes_from_config(config: Config) -> ModelShapes | None:
    """Return a model's shapes, or None where its family or a field of its config is not known here.

    Args:
        config: Fields of `config.json`.

    Raises:
        ConfigError: If a field has a value that no model can have.
    """
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        return None
    text = config.get("text_config", config)
    if not isinstance(text, Mapping):
        raise ConfigError(f"config.json: text_config = {text!r} is not a mapping")
    if isinstance(blocks := text.get("num_hidden_layers"), int) and blocks > MAX_BLOCKS:
        raise ConfigError(f"config.json: num_hidden_layers = {blocks:,}; at most {MAX_BLOCKS:,} are believed")
    try:
        return ModelShapes(
            parameters=tuple(family(config)), num_blocks=_count(text, "num_hidden_layers"), source="config.json"
        )
    except _MissingFieldError:
        return None


def _llama_like(
    config: Config,
    *,
    prefix: str = "model",
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm"),
    has_head_norms: bool = False,
    has_qkv_bias: bool = False,
    is_fused: bool = False,
    is_tied: bool = False,
) -> Iterator[Parameter]:
    """Yield the parameters of a decoder built like Llama's.

    Args:
        config: Fields of the decoder's config.
        prefix: Module that holds the decoder.
        norms: Norms of a block.
        has_head_norms: Whether queries and keys are normalised a head at a time.
        has_qkv_bias: Whether queries, keys and values have a bias although the config does not say so.
        is_fused: Whether query, key and value, and gate and up, are one layer each.
        is_tied: Whether the head is tied where the config does not say.
    """
    hidden, intermediate = _count(config, "hidden_size"), _count(config, "intermediate_size")
    heads, vocabulary = _count(config, "num_attention_heads"), _count(config, "vocab_size")
    head_dim = _optional_count(config, "head_dim")
    if head_dim is None:
        if has_head_norms or len(norms) > 2:
            raise _MissingFieldError
        head_dim = hidden // heads
    queries, keys = heads * head_dim, (_optional_count(config, "num_key_value_heads") or heads) * head_dim
    layers = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    if is_fused:
        layers = {
            "self_attn.o_proj": (hidden, queries),
            "self_attn.qkv_proj": (queries + 2 * keys, hidden),
            "mlp.gate_up_proj": (2 * intermediate, hidden),
            "mlp.down_proj": (hidden, intermediate),
        }
    biased = {name for name in layers if _has_bias(name, config, has_qkv_bias=has_qkv_bias)}
    yield Parameter(name=f"{prefix}.embed_tokens.weight", shape=(vocabulary, hidden), kind=EMBEDDING)
    for block in range(_count(config, "num_hidden_layers")):
        here = f"{prefix}.layers.{block}"
        for name, shape in layers.items():
            yield from _linear(f"{here}.{name}", shape, has_bias=name in biased)
        if has_head_norms:
            for name in ("q_norm", "k_norm"):
                yield Parameter(name=f"{here}.self_attn.{name}.weight", shape=(head_dim,))
        for name in norms:
            yield Parameter(name=f"{here}.{name}.weight", shape=(hidden,))
    yield Parameter(name=f"{prefix}.norm.weight", shape=(hidden,))
    yield _head(config, (vocabulary, hidden), is_tied=is_tied)


def _has_bias(name: str, config: Config, *, has_qkv_bias: bool) -> bool:
    if name.startswith("mlp."):
        return config.get("mlp_bias") is True
    return config.get("attention_bias") is True or (has_qkv_bias and not name.endswith("o_proj"))


def _gpt_neox(config: Config) -> Iterator[Parameter]:
    hidden, intermediate = _count(config, "hidden_size"), _count(config, "intermediate_size")
    vocabulary, has_bias = _count(config, "vocab_size"), config.get("attention_bias") is not False
    yield Parameter(name="gpt_neox.embed_in.weight", shape=(vocabulary, hidden), kind=EMBEDDING)
    for block in range(_count(config, "num_hidden_layers")):
        here = f"gpt_neox.layers.{block}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield from _norm(f"{here}.{name}", hidden)
        yield from _linear(f"{here}.attention.query_key_value", (3 * hidden, hidden), has_bias=has_bias)
        yield from _linear(f"{here}.attention.dense", (hidden, hidden), has_bias=has_bias)
        yield from _linear(f"{here}.mlp.dense_h_to_4h", (intermediate, hidden), has_bias=True)
        yield from _linear(f"{here}.mlp.dense_4h_to_h", (hidden, intermediate), has_bias=True)
    yield from _norm("gpt_neox.final_layer_norm", hidden)
    yield _head(config, (vocabulary, hidden))


def _gemma3_multimodal(config: Config) -> Iterator[Parameter]:
    """Yield Gemma 3 with its vision tower, which is how its checkpoints of 4B and more load."""
    text, vision = config.get("text_config"), config.get("vision_config")
    if not isinstance(text, Mapping) or not isinstance(vision, Mapping):
        raise _MissingFieldError
    hidden = _count(vision, "hidden_size")
    yield from _siglip(vision, prefix="model.vision_tower")
    yield Parameter(
        name="model.multi_modal_projector.mm_input_projection_weight", shape=(hidden, _count(text, "hidden_size"))
    )
    yield Parameter(name="model.multi_modal_projector.mm_soft_emb_norm.weight", shape=(hidden,))
    yield from _GEMMA3(text, prefix="model.language_model")


def _siglip(config: Config, *, prefix: str) -> Iterator[Parameter]:
    hidden, intermediate = _count(config, "hidden_size"), _count(config, "intermediate_size")
    patch, image = _count(config, "patch_size"), _count(config, "image_size")
    if config.get("vision_use_head") is not False:
        raise _MissingFieldError
    yield Parameter(name=f"{prefix}.embeddings.patch_embedding.weight", shape=(hidden, 3, patch, patch))
    yield Parameter(name=f"{prefix}.embeddings.patch_embedding.bias", shape=(hidden,))
    yield Parameter(name=f"{prefix}.embeddings.position_embedding.weight", shape=((image // patch) ** 2, hidden))
    for block in range(_count(config, "num_hidden_layers")):
        here = f"{prefix}.encoder.layers.{block}"
        for name in ("layer_norm1", "layer_norm2"):
            yield from _norm(f"{here}.{name}", hidden)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{here}.self_attn.{name}", (hidden, hidden), has_bias=True, kind=OTHER)
        yield from _linear(f"{here}.mlp.fc1", (intermediate, hidden), has_bias=True, kind=OTHER)
        yield from _linear(f"{here}.mlp.fc2", (hidden, intermediate), has_bias=True, kind=OTHER)
    yield from _norm(f"{prefix}.post_layernorm", hidden)


def _linear(name: str, shape: tuple[int, int], *, has_bias: bool, kind: str = LINEAR) -> Iterator[Parameter]:
    yield Parameter(name=f"{name}.weight", shape=shape, kind=kind)
    if has_bias:
        yield Parameter(name=f"{name}.bias", shape=shape[:1])


def _norm(name: str, hidden: int) -> Iterator[Parameter]:
    yield Parameter(name=f"{name}.weight", shape=(hidden,))
    yield Parameter(name=f"{name}.bias", shape=(hidden,))


def _head(config: Config, shape: tuple[int, int], *, is_tied: bool = False) -> Parameter:
    tied = config.get("tie_word_embeddings")
    return Parameter(name="lm_head.weight", shape=shape, kind=HEAD, is_tied=is_tied if tied is None else tied is True)


def _count(config: Config, key: str) -> int:
    if (value := _optional_count(config, key)) is None:
        raise _MissingFieldError
    return value


def _optional_count(config: Config, key: str) -> int | None:
    value = config.get(key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ConfigError(f"config.json has {key}={value!r}; a positive whole number is needed")
    return value


_GEMMA2_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_GEMMA3 = partial(_llama_like, norms=_GEMMA2_NORMS, has_head_norms=True, is_tied=True)

#: By `model_type`. Source: transformers 5.23, the `modeling_*.py` of each family.
FAMILIES: dict[str, Callable[[Config], Iterator[Parameter]]] = {
    "llama": _llama_like,
    "mistral": _llama_like,
    "qwen2": partial(_llama_like, has_qkv_bias=True),
    "qwen3": partial(_llama_like, has_head_norms=True),
    "gemma2": partial(_llama_like, norms=_GEMMA2_NORMS, is_tied=True),
    "gemma3_text": _GEMMA3,
    "gemma3": _gemma3_multimodal,
    "phi3": partial(_llama_like, is_fused=True),
    "gpt_neox": _gpt_neox,
}
