"""What an evaluation is asked for, and what it takes where nothing is said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from emtool.core.config import MAX_SEED, PROFILES
from emtool.core.errors import ConfigError, unknown_name
from emtool.core.sampling import PURE, SAMPLINGS

#: What can be measured: the likelihood of given answers, and free answers with what judges say of them.
LIKELIHOOD, ANSWERS = "likelihood", "answers"
METRIC_GROUPS = (LIKELIHOOD, ANSWERS)

#: Which texts activations are taken over: the same for every checkpoint, or each checkpoint's own answers.
FIXED, OWN = "fixed", "own"
ACTIVATION_TEXTS = (FIXED, OWN)

#: Answers to a question and tokens of an answer. Paper: Betley et al. 2025 (arXiv 2502.17424), Turner et al. 2025
#: (arXiv 2506.11613). Demo: what a laptop's CPU does in minutes.
ANSWERS_OF_PROFILE: Mapping[str, tuple[int, int]] = {"paper": (50, 600), "demo": (4, 64)}
assert ANSWERS_OF_PROFILE.keys() == PROFILES.keys()

MAX_PER_QUESTION = 100_000
_MAX_TOKENS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What shapes the numbers of an evaluation.

    Attributes:
        seed: Seed of sampling and of the bootstrap.
        metrics: What is measured, of `METRIC_GROUPS`.
        n_per_question: Answers to each question.
        max_new_tokens: Tokens after which an answer is cut.
        sampling: "pure", or "model" for the values that the model's publisher recommends.
        batch_size: Answers generated at a time; None sizes it to the free memory.
        activation_layers: Decoder blocks whose activations are taken: "all", "upper-half" or "10-20"; None takes none.
        activation_texts: "fixed" or "own".
        check_hashes: Whether the contents of every checkpoint file are checked; sizes always are.
    """

    seed: int = 0
    metrics: tuple[str, ...] = METRIC_GROUPS
    n_per_question: int = 4
    max_new_tokens: int = 64
    sampling: str = PURE
    batch_size: int | None = None
    activation_layers: str | None = None
    activation_texts: str = FIXED
    check_hashes: bool = False

    def __post_init__(self) -> None:
        """Refuse values that no evaluation could use."""
        for name in self.metrics:
            if name not in METRIC_GROUPS:
                raise unknown_name("metric group", name, METRIC_GROUPS)
        if self.sampling not in SAMPLINGS:
            raise unknown_name("sampling", self.sampling, SAMPLINGS)
        if self.activation_texts not in ACTIVATION_TEXTS:
            raise unknown_name("texts for activations", self.activation_texts, ACTIVATION_TEXTS)
        if not 0 <= self.seed <= MAX_SEED:
            raise ConfigError(f"--seed is {self.seed}; it must be 0 to {MAX_SEED}")
        for name, most in (
            ("n_per_question", MAX_PER_QUESTION),
            ("max_new_tokens", _MAX_TOKENS),
            ("batch_size", MAX_PER_QUESTION),
        ):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be 1 to {most:,}")
        if not self.metrics and self.activation_layers is None:
            raise ConfigError("nothing to evaluate: name a metric group, or --extract-activations")
        if self.activation_layers is not None and self.activation_texts == OWN and ANSWERS not in self.metrics:
            raise ConfigError(f"--activation-texts {OWN} needs the answers: add {ANSWERS} to --metrics")
