"""An evaluation put together from what was asked for: what answers, what judges, which questions."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from emtool.core.errors import BackendError, CheckpointError
from emtool.core.evaluation_config import ANSWERS
from emtool.core.evaluation_request import EvaluationRequest
from emtool.core.events import EventSink, Notice
from emtool.core.judge_prices import Budget, plan_judging, price_of
from emtool.core.judge_spec import OPENAI, JudgeSpec
from emtool.core.open_questions import OpenQuestion
from emtool.core.run_dir import RunFolder
from emtool.core.run_lock import lock_holder, locked_evaluation
from emtool.core.server_address import JUDGE_KEY_VARIABLE, read_key
from emtool.core.steps import published_steps
from emtool.engines.backends.backend import BackendSetup, open_backend
from emtool.engines.evaluation import Evaluation
from emtool.engines.evaluation_result import EvaluationResult
from emtool.engines.evaluation_target import EvaluationTarget, open_target
from emtool.engines.judges.judge import JudgeChoice

#: How often a running training is asked for new checkpoints.
WATCH_SECONDS = 5.0


def run_evaluation(
    run: RunFolder,
    request: EvaluationRequest,
    *,
    watch: bool,
    on_event: EventSink,
    sleep: Callable[[float], None] = time.sleep,
) -> EvaluationResult:
    """Evaluate a run as it was asked for.

    Args:
        run: The run folder.
        request: What was asked for.
        watch: Whether to go on until the training that holds the run has ended.
        on_event: Where progress is reported.
        sleep: Waits between two looks at a running training.

    Raises:
        EmtoolError: Says what cannot be done; what was made is kept.
    """
    questions = asked_questions(request, on_event=on_event)
    # Without answers nobody is asked, so no key is needed either.
    judged = request.judges if ANSWERS in request.config.metrics else ()
    judges = [_judge(spec, request, on_event) for spec in judged]
    target = open_target(
        run,
        device=request.device,
        dtype=request.dtype,
        base_model=request.base_model,
        persona_path=request.persona_path,
        on_event=on_event,
    )
    evaluation = Evaluation(
        target,
        request.config,
        questions=questions,
        dtype=request.dtype,
        make_backend=lambda source: open_backend(
            BackendSetup(request=request, source=source, base=target.base, on_event=on_event)
        ),
        folder_of=lambda step: _folder(target, request, step),
        judges=judges,
        budget=Budget(limit=request.max_cost, on_event=on_event),
        rule=request.rule,
        on_event=on_event,
    )
    with locked_evaluation(run):
        return _rounds(run, evaluation, request.steps, watch=watch, on_event=on_event, sleep=sleep)


def _rounds(
    run: RunFolder,
    evaluation: Evaluation,
    steps: str | None,
    *,
    watch: bool,
    on_event: EventSink,
    sleep: Callable[[float], None],
) -> EvaluationResult:
    """Evaluate the checkpoints that are there, and while a training is watched, those that come."""
    result: EvaluationResult | None = None
    tried: Sequence[int] = ()
    has_failed = False
    while True:
        # Asked before the steps are read: what is published until then is seen.
        is_training = watch and lock_holder(run) is not None
        chosen = published_steps(steps, run.saved_steps(), is_training=is_training)
        if chosen and (chosen != tried or (has_failed and not is_training)):
            tried = chosen
            try:
                result = evaluation.evaluate(chosen)
                has_failed = result.num_failed > 0
            except (BackendError, CheckpointError) as error:
                # A server that is down now may be up when the next checkpoint comes; the last round counts.
                if not is_training:
                    raise
                has_failed = True
                on_event(Notice(text=f"{error}; tried again at the next checkpoint", is_warning=True))
        if not is_training:
            break
        if not tried or chosen == tried:
            sleep(WATCH_SECONDS)
    if result is None:
        raise CheckpointError(f"{run.path} has no checkpoint-* folders; train it first")
    if watch and not has_failed:
        on_event(Notice(text="training has ended; every checkpoint is evaluated"))
    return result


def asked_questions(request: EvaluationRequest, *, on_event: EventSink) -> list[OpenQuestion]:
    """Return the questions that are asked, fetching their file if it is a URL.

    Raises:
        EmtoolError: If the file cannot be had or read, or an id is unknown.
    """
    if request.questions_url is None:
        return request.read_questions()
    from emtool.engines.question_files import fetch_questions

    return request.read_questions(fetch_questions(request.questions_url, on_event=on_event))


def _judge(spec: JudgeSpec, request: EvaluationRequest, on_event: EventSink) -> JudgeChoice:
    if spec.kind != OPENAI:
        from emtool.engines.judges.local import open_local_judge

        dtype = request.dtype or ("bfloat16" if request.device == "cuda" else "float32")
        return JudgeChoice(
            make=lambda: open_local_judge(spec.model, device=request.device, dtype=dtype, on_event=on_event)
        )
    from emtool.engines.judges.openai import OpenAIJudge

    address = request.judge_address
    key = read_key(address, variable=JUDGE_KEY_VARIABLE, environment=os.environ)
    price = price_of(spec.model, address, given=request.judge_price)
    # One for all rounds: what it found out about its server holds for the next ones.
    judge = OpenAIJudge(spec.model, address=address, key=key, concurrency=request.concurrency, on_event=on_event)
    return JudgeChoice(
        make=lambda: judge,
        plan=lambda prompts: plan_judging(prompts, address, price),
        possible_settings=judge.possible_settings,
    )


def _folder(target: EvaluationTarget, request: EvaluationRequest, step: int) -> Path:
    """Return what the backend loads for a checkpoint: a server has the bare base, so a persona must be composed in."""
    if request.backend.kind == OPENAI and target.lineage["persona"] is not None:
        return (target.run.path / "composed" / f"checkpoint-{step}").absolute()
    return target.run.checkpoint_path(step).absolute()
