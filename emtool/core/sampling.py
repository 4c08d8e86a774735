"""How answers are drawn: the values in effect, all of them written down."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from emtool.core.errors import ModelError, shown

#: The model's distribution as it is, or with the values that its publisher recommends.
PURE, MODEL = "pure", "model"
SAMPLINGS = (PURE, MODEL)

#: Fields of a generation configuration that do not change which answers are drawn, or that emtool decides.
_HARMLESS = frozenset(
    {
        "_from_model_config",
        "bos_token_id",
        "cache_config",
        "cache_implementation",
        "compile_config",
        "disable_compile",
        "do_sample",
        "eos_token_id",
        "low_memory",
        "max_length",
        "max_new_tokens",
        "pad_token_id",
        "transformers_version",
        "use_cache",
    }
)
#: Values with which a field of a generation configuration changes nothing.
_NEUTRAL: tuple[object, ...] = (None, False, 0, 1, [], {})


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The values that shape a token's distribution.

    Attributes:
        temperature: Divides the logits; above 0.
        top_p: Least probability that the kept tokens have together; 1 keeps all.
        top_k: Tokens that are kept; 0 keeps all.
        min_p: Least probability of a kept token, relative to the likeliest; 0 keeps all.
        repetition_penalty: Divides or multiplies the logits of tokens that are there already; 1 is none.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return the values by name."""
        return asdict(self)


def model_sampling(values: Mapping[str, Any]) -> Sampling:
    """Return the sampling that a model's generation configuration asks for; what it does not set is off.

    Args:
        values: `GenerationConfig.to_dict()`.

    Raises:
        ModelError: If it sets something that emtool does not reproduce, or a value that is out of range.
    """
    known = {name: values[name] for name in Sampling.__dataclass_fields__ if values.get(name) is not None}
    other = sorted(
        name for name in values.keys() - known.keys() - _HARMLESS if not any(values[name] == off for off in _NEUTRAL)
    )
    if other:
        raise ModelError(
            f"the model's generation configuration sets {', '.join(other)}, which is not reproduced here; use "
            "--sampling pure"
        )
    defaults = Sampling()
    for name, value in known.items():
        low, high = _RANGES[name]
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or not low <= value <= high or (isinstance(getattr(defaults, name), int) and value % 1):
            raise ModelError(
                f"the model's generation configuration has {name} = {shown(value)}, which cannot be sampled with; use "
                "--sampling pure"
            )
    return Sampling(**{name: type(getattr(defaults, name))(value) for name, value in known.items()})


_RANGES: Mapping[str, tuple[float, float]] = {
    "temperature": (1e-3, 100.0),
    "top_p": (1e-6, 1.0),
    "top_k": (0, 2**31),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-3, 100.0),
}
