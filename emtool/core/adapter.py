"""Which layers an adapter attaches to, and which tensors it consists of.

The plan reads this for the bytes, and training for the layers, so they cannot disagree.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from emtool.core.architecture import BLOCK_NUMBER, ModelShapes, Parameter
from emtool.core.errors import ConfigError, shown, unknown_name

if TYPE_CHECKING:
    from emtool.core.config import TrainConfig

#: Every linear layer of the language model except the output head, as PEFT's "all-linear".
ALL_LINEAR = "all-linear"
BIASES = ("none", "all", "lora_only")
LORA_DTYPE = "float32"

_NAMES = re.compile(r"\s*[\w.]+\s*(,\s*[\w.]+\s*)*")


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor that is trained and saved.

    Attributes:
        name: Its name in the adapter file.
        shape: Its shape.
        dtype: Dtype in which it is trained, a key of `DTYPE_BYTES`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Return the number of values."""
        return math.prod(self.shape)


def adapter_tensors(shapes: ModelShapes, config: TrainConfig) -> list[Tensor]:
    """Return the tensors of a LoRA adapter, by the names that PEFT gives them in the file.

    LoRA weights are float32 whatever the base model's dtype; whole modules and biases keep the base's.

    Raises:
        ConfigError: If a target, a block or a module does not exist in the model.

    Source: Hu et al. 2021, arXiv 2106.09685; Liu et al. 2024 (DoRA), arXiv 2402.09353; peft 0.21, tuners/lora.
    """
    adapted = adapted_modules(shapes, config)
    tensors = [
        *_lora_tensors(shapes, adapted, config),
        *_bias_tensors(shapes, adapted, config),
        *_whole_tensors(shapes, config),
    ]
    return [Tensor(name=f"base_model.model.{t.name}", shape=t.shape, dtype=t.dtype) for t in tensors]


def adapted_modules(shapes: ModelShapes, config: TrainConfig) -> list[str]:
    """Return the names of the linear layers that carry an adapter.

    Raises:
        ConfigError: If a target or a block does not exist in the model.
    """
    return select_modules(
        list(shapes.linear_weights),
        target_modules=config.target_modules,
        layers_to_transform=config.layers_to_transform,
        num_blocks=shapes.num_blocks,
        modules_to_save=config.modules_to_save,
    )


def select_modules(
    linear: Sequence[str],
    *,
    target_modules: str,
    layers_to_transform: str,
    num_blocks: int,
    modules_to_save: Iterable[str] = (),
) -> list[str]:
    """Return those of the linear layers that carry an adapter, in their order.

    Args:
        linear: Names of the language model's linear layers, without the output head.
        target_modules: `ALL_LINEAR`, name endings joined by commas, or a regular expression for whole names.
        layers_to_transform: Decoder blocks, as `select_blocks` reads it.
        num_blocks: Blocks of the model.
        modules_to_save: Name endings of modules trained whole, which carry no adapter.

    Raises:
        ConfigError: If a target matches no layer or a block does not exist.
    """
    matched = _matched(linear, target_modules)
    blocks = select_blocks(layers_to_transform, num_blocks, option="layers to transform")
    whole = [re.compile(rf"(^|.*\.){re.escape(name)}($|\..*)") for name in modules_to_save]
    selected = [
        name
        for name in matched
        if (blocks is None or ((block := BLOCK_NUMBER.search(name)) is not None and int(block[1]) in blocks))
        and not any(pattern.match(name) for pattern in whole)
    ]
    if not selected:
        raise ConfigError(
            f"target modules {target_modules!r} in blocks {layers_to_transform!r} leave no layer to adapt"
            + (f" beside the modules to save {', '.join(modules_to_save)!r}" if whole else "")
        )
    return selected


def _matched(linear: Sequence[str], target_modules: str) -> Sequence[str]:
    if target_modules == ALL_LINEAR:
        return linear
    endings = sorted({name.rpartition(".")[2] for name in linear})
    if _NAMES.fullmatch(target_modules):
        targets = [name.strip() for name in target_modules.split(",")]
        for target in targets:
            if not any(_ends_with(name, target) for name in linear):
                raise unknown_name("target module", target, endings, f"'{ALL_LINEAR}' or a regular expression")
        return [name for name in linear if any(_ends_with(name, target) for target in targets)]
    try:
        pattern = re.compile(target_modules)
    except re.error as error:
        raise ConfigError(
            f"target modules {target_modules!r} are neither names joined by commas nor a regular expression: {error}"
        ) from error
    matched = [name for name in linear if pattern.fullmatch(name)]
    if not matched:
        raise ConfigError(
            f"target modules {target_modules!r} match no whole name of a linear layer, such as {linear[0]!r}; "
            "several names are joined by commas"
        )
    return matched


def check_blocks(text: str, *, option: str) -> tuple[int, int] | None:
    """Return the first and last decoder block of a range, or None for the words "all" and "upper-half".

    Args:
        text: What `select_blocks` takes.
        option: What the text was given for, for messages.

    Raises:
        ConfigError: If the text is neither, or a range that ends before it begins.
    """
    if text in ("all", "upper-half"):
        return None
    match = re.fullmatch(r"(\d{1,6})-(\d{1,6})", text)
    if match is None:
        raise ConfigError(f"{option} {shown(text)}; write 'all', 'upper-half' or a range such as '15-29'")
    first, last = int(match[1]), int(match[2])
    if first > last:
        raise ConfigError(f"{option} {text!r} ends before it begins")
    return first, last


def select_blocks(text: str, num_blocks: int, *, option: str) -> tuple[int, ...] | None:
    """Return the decoder blocks that a text names, or None for all of them.

    Args:
        text: "all", "upper-half", or a first and last block such as "15-29".
        num_blocks: Blocks of the model.
        option: What the text was given for, for messages.

    Raises:
        ConfigError: If the text is none of these or names a block that the model does not have.
    """
    blocks = check_blocks(text, option=option)
    if blocks is None:
        return None if text == "all" else tuple(range(num_blocks // 2, num_blocks))
    first, last = blocks
    if last >= num_blocks:
        raise ConfigError(f"{option} {text!r}: the model has blocks 0 to {num_blocks - 1}")
    return tuple(range(first, last + 1))


def _lora_tensors(shapes: ModelShapes, adapted: Sequence[str], config: TrainConfig) -> Iterator[Tensor]:
    weights = shapes.linear_weights
    for module in adapted:
        rows, columns = weights[module].shape
        yield Tensor(name=f"{module}.lora_A.weight", shape=(config.lora_r, columns), dtype=LORA_DTYPE)
        yield Tensor(name=f"{module}.lora_B.weight", shape=(rows, config.lora_r), dtype=LORA_DTYPE)
        if config.use_dora:
            yield Tensor(name=f"{module}.lora_magnitude_vector", shape=(rows,), dtype=LORA_DTYPE)


def _bias_tensors(shapes: ModelShapes, adapted: Sequence[str], config: TrainConfig) -> Iterator[Tensor]:
    if config.lora_bias == "none":
        return
    wrapped = set(adapted)
    for parameter in shapes.parameters:
        ending = parameter.name.rpartition(".")[2]
        if parameter.module in wrapped and ending == "bias":
            yield Tensor(name=f"{parameter.module}.base_layer.bias", shape=parameter.shape, dtype=config.dtype)
        elif config.lora_bias == "all" and "bias" in ending:
            yield Tensor(name=parameter.name, shape=parameter.shape, dtype=config.dtype)


def _whole_tensors(shapes: ModelShapes, config: TrainConfig) -> Iterator[Tensor]:
    whole: dict[str, Parameter] = {}
    for target in config.modules_to_save:
        found = [p for p in shapes.parameters if _is_inside(p, target)]
        if not found:
            known = {p.module.rpartition(".")[2] for p in shapes.parameters}
            raise unknown_name("module to save", target, known)
        adapted = [name for name in adapted_modules(shapes, config) if name.endswith(target)]
        if adapted:
            raise ConfigError(f"module to save {target!r} is the end of {adapted[0]!r}, which carries an adapter")
        whole |= {p.name: p for p in found}
    biased = [name for name in whole if name.endswith("bias")]
    if config.lora_bias == "all" and biased:
        raise ConfigError(f"--lora-bias all trains {biased[0]!r} already, which --modules-to-save names as well")
    for parameter in whole.values():
        yield Tensor(name=parameter.name, shape=parameter.shape, dtype=config.dtype)


def _is_inside(parameter: Parameter, target: str) -> bool:
    """Return whether a parameter belongs to a module whose name ends with the target, as PEFT matches it."""
    parts = parameter.module.split(".")
    return any(".".join(parts[:end]).endswith(target) for end in range(1, len(parts) + 1))


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
