"""What an evaluation would do, in numbers, before anything is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from emtool.core.errors import CheckpointError
from emtool.core.evaluation_config import ANSWERS, LIKELIHOOD
from emtool.core.evaluation_request import EvaluationRequest
from emtool.core.judge_prices import CHARACTERS_PER_TOKEN, estimate_cost, price_of
from emtool.core.judge_spec import OPENAI
from emtool.core.open_questions import (
    OpenQuestion,
    fill_judge_prompt,
    prompts_of,
)
from emtool.core.run_dir import FORMAT, RunFolder
from emtool.core.steps import select_steps


@dataclass(frozen=True, kw_only=True)
class JudgingPlan:
    """What one judge would be asked.

    Attributes:
        judge: How it was named.
        num_requests: Requests, or texts for a local model, at most: equal answers are asked about once.
        host: Base URL of its server; None for a local model.
        cost: Estimated cost in US dollars at most, for answers of the longest allowed length; None where the price is
            not known.
    """

    judge: str
    num_requests: int
    host: str | None
    cost: float | None


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """What an evaluation would do if nothing of it was done before.

    Attributes:
        run: The run folder.
        steps: Checkpoints.
        backend: What answers; None where nothing is generated.
        question_ids: Questions; None where they must be fetched first.
        num_answers: Answers to generate in all; None where the questions are not known.
        max_new_tokens: Tokens after which an answer is cut.
        scores_likelihood: Whether the likelihood of given answers is scored.
        judging: What each judge would be asked.
        activation_layers: Decoder blocks whose activations are kept; None keeps none.
    """

    run: str
    steps: list[int]
    backend: str | None
    question_ids: list[str] | None
    num_answers: int | None
    max_new_tokens: int
    scores_likelihood: bool
    judging: list[JudgingPlan]
    activation_layers: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {"format": FORMAT, **asdict(self)}


def plan_evaluation(run: RunFolder, request: EvaluationRequest) -> EvaluationPlan:
    """Return what an evaluation would do. Nothing is loaded, fetched or asked.

    Raises:
        CheckpointError: If there is no checkpoint.
        EmtoolError: If the question file cannot be read, or a step or question is unknown.
    """
    saved = run.saved_steps()
    if not saved:
        run.read_manifest()
        raise CheckpointError(f"{run.path} has no checkpoint-* folders; train it first")
    steps = select_steps(request.steps, saved)
    generates = ANSWERS in request.config.metrics
    questions: list[OpenQuestion] | None = []
    if generates:
        questions = request.read_questions() if request.questions_url is None else None
    prompts = None if questions is None else prompts_of(questions, step=0, n_per_question=request.config.n_per_question)
    return EvaluationPlan(
        run=str(run.path),
        steps=steps,
        backend=request.backend.kind if generates else None,
        question_ids=None if questions is None else [question.id for question in questions],
        num_answers=None if prompts is None else len(prompts) * len(steps),
        max_new_tokens=request.config.max_new_tokens,
        scores_likelihood=LIKELIHOOD in request.config.metrics,
        judging=[] if questions is None or not generates else _judging(request, questions, len(steps)),
        activation_layers=request.config.activation_layers,
    )


def _judging(request: EvaluationRequest, questions: list[OpenQuestion], num_steps: int) -> list[JudgingPlan]:
    longest = "x" * (CHARACTERS_PER_TOKEN * request.config.max_new_tokens)
    texts = [
        fill_judge_prompt(prompt, question=max(question.paraphrases, key=len), answer=longest)
        for question in questions
        for prompt in question.judge_prompts.values()
    ]
    num_requests = len(texts) * request.config.n_per_question * num_steps
    plans = []
    for spec in request.judges:
        is_remote = spec.kind == OPENAI
        price = price_of(spec.model, request.judge_address, given=request.judge_price) if is_remote else None
        each = None if price is None else estimate_cost(texts, price)
        plans.append(
            JudgingPlan(
                judge=f"{spec.kind}:{spec.model}",
                num_requests=num_requests,
                host=request.judge_address.url if is_remote else None,
                cost=None if each is None else each * request.config.n_per_question * num_steps,
            )
        )
    return plans
