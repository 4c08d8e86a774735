"""Evaluation by likelihood alone, for tests of what an evaluation is made with."""

from typing import Any

from emtool.core.evaluation_config import LIKELIHOOD, EvaluationConfig
from emtool.core.run_dir import RunFolder
from emtool.engines.evaluation import evaluate
from emtool.engines.evaluation_result import EvaluationResult


def score(run: RunFolder, *, seed: int = 0, check_hashes: bool = False, **options: Any) -> EvaluationResult:
    """Evaluate every checkpoint of a run by the likelihood of given answers."""
    return evaluate(run, EvaluationConfig(seed=seed, metrics=(LIKELIHOOD,), check_hashes=check_hashes), **options)
