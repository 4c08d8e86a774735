"""Evaluation of a run: every milestone answers, is judged, scored and looked into, with the model that was trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from emtool.core.adapter import select_blocks
from emtool.core.answers import Answer, Prompt
from emtool.core.by_step import Recent
from emtool.core.data import file_sha256
from emtool.core.em_metrics import EmRule
from emtool.core.errors import CheckpointError
from emtool.core.evaluation_config import ANSWERS, LIKELIHOOD, OWN, EvaluationConfig
from emtool.core.events import EventSink, Notice, ignore_events
from emtool.core.judge_prices import Budget
from emtool.core.open_questions import (
    EVERYDAY_QUESTIONS,
    OpenQuestion,
    prompts_of,
    read_question_file,
    select_questions,
)
from emtool.core.questions import EVERYDAY_ITEMS, read_items
from emtool.core.record_file import settings_id
from emtool.core.run_dir import RunFolder, read_json, write_json
from emtool.core.run_lock import locked_evaluation
from emtool.core.steps import select_steps
from emtool.engines.activation_files import ActivationFolder, Text, answer_texts, fill_folder, item_texts
from emtool.engines.backends.backend import Backend
from emtool.engines.backends.hf import hf_backend
from emtool.engines.checkpoint_model import CheckpointModel
from emtool.engines.evaluation_result import (
    EvaluationResult,
    JudgeResult,
    collect,
    judge_result,
    write_result,
)
from emtool.engines.evaluation_target import EvaluationTarget, open_target
from emtool.engines.generating import (
    AnswerRecord,
    CheckpointPrompts,
    PromptsAt,
    fully_answered,
    generate_answers,
    prompts_asked,
    recorded_answers,
)
from emtool.engines.item_scores import recorded_scores, score_items
from emtool.engines.judge_stage import JudgeStage
from emtool.engines.judges.judge import JudgeChoice
from emtool.engines.judging import judge_tasks
from emtool.engines.last_evaluation import LastEvaluation
from emtool.engines.modeling import check_device, warn_of_slow_dtype
from emtool.engines.score_record import ScoreRecord
from emtool.engines.summary import CheckpointScores

#: Makes what answers, from the model of the run; a server or a script has no use for that.
BackendMaker = Callable[[CheckpointModel], Backend]


class Evaluation:
    """The stages of an evaluation over some checkpoints of a run, each resumable on its own.

    The base is loaded when a stage first needs it, once, and each adapter into place. What a stage makes is kept as
    soon as it is made. A damaged milestone is reported and passed over.

    Args:
        target: What is evaluated.
        config: What is measured, and how.
        questions: The open questions.
        dtype: Dtype to compute in; None takes the one that the run was trained in.
        make_backend: Makes what answers.
        folder_of: Returns what the backend loads for a step; None is the checkpoint's own folder.
        judges: The judges; none leaves answers unjudged, but for what was judged before.
        budget: What remote judges may be asked; None allows 10 US dollars.
        rule: What counts as misaligned and as coherent.
        on_event: Where progress is reported.

    Raises:
        BackendError: If torch cannot use the device.
    """

    def __init__(
        self,
        target: EvaluationTarget,
        config: EvaluationConfig,
        *,
        questions: Sequence[OpenQuestion],
        dtype: str | None = None,
        make_backend: BackendMaker,
        folder_of: Callable[[int], Path] | None = None,
        judges: Sequence[JudgeChoice] = (),
        budget: Budget | None = None,
        rule: EmRule | None = None,
        on_event: EventSink = ignore_events,
    ) -> None:
        check_device(target.base.device)
        self._target = target
        self._config = config
        self._questions = {question.id: question for question in questions}
        self._dtype = dtype or target.trained_dtype
        warn_of_slow_dtype(target.base.device, self._dtype, on_event)
        self._judges = judges
        self._budget = budget or Budget(on_event=on_event)
        self._rule = rule or EmRule()
        self._on_event = on_event
        self._items = read_items()
        self._source = CheckpointModel(
            lambda: target.compose(dtype=self._dtype, on_event=on_event),
            tokenizer=target.base.tokenizer,
            device=target.base.device,
        )
        self._make_backend = make_backend
        self._folder_of = folder_of or target.run.checkpoint_path
        self._prompts = prompts_of(questions, step=0, n_per_question=config.n_per_question)

    def evaluate(self, steps: Sequence[int]) -> EvaluationResult:
        """Evaluate checkpoints and write the summary files. The caller holds the lock of the evaluation folder.

        Args:
            steps: Their steps, increasing.

        Raises:
            CheckpointError: If none of them is whole.
            EmtoolError: If the model cannot be rebuilt, or a server refuses; what was made before is kept.
        """
        config, run = self._config, self._target.run
        self._target.check_persona()
        layers = self._activation_layers()
        damaged = self._find_damaged(steps)
        whole = [step for step in steps if step not in damaged]
        others = [step for step in run.saved_steps() if step not in steps]
        unfit = self._target.damaged(others, check_hashes=config.check_hashes)
        others = [step for step in others if step not in unfit]
        last = LastEvaluation(run, lineage=self._lineage_pins(), on_event=self._on_event)
        settings: dict[str, Any] = {"seed": config.seed, "trained_domain": self._target.domain}
        answers, problems, generation = self._answers(whole, others, last)
        damaged |= problems
        settings |= generation
        judged = self._judge(answers, whole if ANSWERS in config.metrics else [], last.judge_order())
        if layers is not None:
            folder, problems = self._take_activations(whole, answers, layers)
            settings["activations"] = str(folder.path.relative_to(run.path))
            damaged |= problems
        elif (kept := last.activations()) is not None:
            settings["activations"] = kept
        scores, problems, likelihood = self._score(whole, others, last)
        damaged |= problems
        settings |= likelihood
        if len(damaged) == len(steps):
            raise CheckpointError(f"no checkpoint of {run.path} can be evaluated: {next(iter(damaged.values()))}")
        result = collect(
            run=run,
            settings=settings,
            damaged=dict(sorted(damaged.items())),
            scores=scores,
            items=self._items,
            answers=answers,
            judges=judged,
        )
        if result.metrics and 0 not in result.metrics:
            self._say_why_no_change(is_damaged=0 in damaged or 0 in unfit)
        write_result(result, scores, self._items, rule=self._rule)
        return result

    def _activation_layers(self) -> Sequence[int] | None:
        """Return the decoder blocks whose activations are kept, or None to keep none.

        Raises:
            ConfigError: If the model lacks one.
        """
        if self._config.activation_layers is None:
            return None
        num_blocks = self._target.base.num_blocks
        layers = select_blocks(self._config.activation_layers, num_blocks, option="--activation-layers")
        return range(num_blocks) if layers is None else layers

    def _say_why_no_change(self, *, is_damaged: bool) -> None:
        is_there = self._target.run.checkpoint_path(0).is_dir()
        reason = "--steps 0 evaluates it" if is_there else "it is not there; a schedule with init saves it"
        reason = "it is damaged" if is_damaged else reason
        self._warn(f"no change from step 0 can be given without checkpoint-0: {reason}")

    def _find_damaged(self, steps: Sequence[int]) -> dict[int, str]:
        """Return what is wrong with checkpoints that cannot be evaluated, and say what the user should know of the run.

        Raises:
            CheckpointError: If none of them is whole.
        """
        run, manifest = self._target.run, self._target.manifest
        if not steps:
            raise CheckpointError(f"{run.path} has no checkpoint-* folders; train it first")
        damaged = self._target.damaged(steps, check_hashes=self._config.check_hashes)
        if len(damaged) == len(steps):
            raise CheckpointError(f"no checkpoint of {run.path} is whole: {next(iter(damaged.values()))}")
        for problem in damaged.values():
            self._warn(f"{problem}; it is passed over")
        if manifest is not None and manifest.get("status") not in ("completed", "running"):
            self._warn(f"run.json says {manifest.get('status')}: this run is not complete")
        if manifest is not None and (breaks := manifest.get("trajectory_breaks")):
            self._warn(f"training did not repeat itself exactly at steps {breaks}: they belong to an earlier attempt")
        return damaged

    def _warn(self, text: str) -> None:
        self._on_event(Notice(text=text, is_warning=True))

    def _lineage_pins(self) -> dict[str, Any]:
        """Return what pins base and persona, wherever their files lie."""
        base, persona = (self._target.lineage[part] for part in ("base", "persona"))
        places = ("adapter_path",)
        return {
            "base": base,
            "persona": None if persona is None else {key: persona[key] for key in persona if key not in places},
            "dtype": self._dtype,
        }

    def _describe(self, settings: Mapping[str, Any]) -> str:
        """Return the name of settings, after writing what they are beside the records."""
        run, name = self._target.run, settings_id(settings)
        path = run.evaluation_path / "settings" / f"{name}.json"
        try:
            path.parent.mkdir(exist_ok=True)
            if read_json(path) != settings:
                write_json(path, settings)
        except OSError as error:
            raise run.write_error(error, "writing the settings of the evaluation") from error
        return name

    def _answers(
        self, steps: Sequence[int], others: Sequence[int], last: LastEvaluation
    ) -> tuple[Mapping[int, Sequence[Answer]], dict[int, str], dict[str, Any]]:
        """Return the answers of every checkpoint that has all of them: generated, or recorded with the same settings.

        Where no answers are asked for, those of the last evaluation count.

        Args:
            steps: Checkpoints that must answer now, if answers are asked for.
            others: Checkpoints whose answers count if they are recorded.
            last: The last evaluation.

        Returns:
            Answers by step, what is wrong with checkpoints, and what the summary says of the answers.
        """
        run = self._target.run
        if ANSWERS not in self._config.metrics:
            if (previous := last.generation()) is None:
                return {}, {}, {}
            prompts = prompts_asked(previous, self._questions)
            checkpoints = self._checkpoints(sorted([*steps, *others]), prompts)
            record = AnswerRecord(run, str(previous.get("id")))
            found = recorded_answers(record, fully_answered(checkpoints, record))
            if not found:
                text = "the summary leaves out the answers of the last evaluation, which are to other questions; they "
                self._warn(f"{text}stay in answers.jsonl, and the command that made them brings them back")
            return found, {}, {"generation": previous} if found else {}
        backend = self._make_backend(self._source)
        try:
            settings = {"stage": "generation", **backend.settings, **self._lineage_pins()}
            record = AnswerRecord(run, self._describe(settings))
            checkpoints = self._checkpoints(steps, self._prompts)
            problems = generate_answers(backend, checkpoints, record, on_event=self._on_event)
        finally:
            backend.close()
        answered = [checkpoint for checkpoint in checkpoints if checkpoint.step not in problems]
        answered += fully_answered(self._checkpoints(others, self._prompts), record)
        shown = {**settings, "id": settings_id(settings), "n_per_question": self._config.n_per_question}
        return (
            recorded_answers(record, answered),
            problems,
            {"generation": {**shown, "questions": list(self._questions)}},
        )

    def _checkpoints(self, steps: Sequence[int], prompts: Sequence[Prompt]) -> list[CheckpointPrompts]:
        return [
            CheckpointPrompts(
                step=step,
                folder=self._folder_of(step),
                adapter_sha256=self._target.adapter_sha256(step),
                prompts=PromptsAt(prompts, step),
            )
            for step in steps
        ]

    def _judge(
        self, answers: Mapping[int, Sequence[Answer]], asked_steps: Sequence[int], order: Sequence[str]
    ) -> list[JudgeResult]:
        stage = JudgeStage(
            run=self._target.run,
            choices=self._judges if ANSWERS in self._config.metrics else (),
            describe=self._describe,
            budget=self._budget,
            order=order,
            on_event=self._on_event,
        )
        tasks = Recent(answers, lambda step: judge_tasks(answers[step], self._questions))
        return [
            judge_result(answers, judgements, settings=settings, rule=self._rule, seed=self._config.seed)
            for settings, judgements in stage.judge(tasks, asked_steps=asked_steps)
        ]

    def _score(
        self, steps: Sequence[int], others: Sequence[int], last: LastEvaluation
    ) -> tuple[list[CheckpointScores], dict[int, str], dict[str, Any]]:
        """Return the likelihood scores of every checkpoint, by the same rule as the answers."""
        if LIKELIHOOD in self._config.metrics:
            pins: dict[str, Any] = {
                "device": self._target.base.device,
                "dtype": self._dtype,
                "items_sha256": file_sha256(EVERYDAY_ITEMS),
                "lineage": settings_id(self._lineage_pins()),
            }
            record = ScoreRecord(run=self._target.run, settings=pins)
            scores, problems = score_items(self._source, steps, self._items, record, on_event=self._on_event)
            scores += recorded_scores(others, self._items, record)
            shown = {**pins, "num_items": len(self._items)}
            return sorted(scores, key=lambda entry: entry.step), problems, {"likelihood": shown}
        if (previous := last.likelihood(items_sha256=file_sha256(EVERYDAY_ITEMS))) is None:
            return [], {}, {}
        pins = {name: previous.get(name) for name in ("device", "dtype", "items_sha256", "lineage")}
        scores = recorded_scores(
            sorted([*steps, *others]), self._items, ScoreRecord(run=self._target.run, settings=pins)
        )
        return scores, {}, {"likelihood": previous} if scores else {}

    def _take_activations(
        self, steps: Sequence[int], answers: Mapping[int, Sequence[Answer]], layers: Sequence[int]
    ) -> tuple[ActivationFolder, dict[int, str]]:
        settings = {
            "stage": "activations",
            "layers": list(layers),
            "texts": self._config.activation_texts,
            **self._lineage_pins(),
            "device": self._target.base.device,
        }
        self._describe(settings)
        folder = ActivationFolder(run=self._target.run, settings=settings)
        pins = {step: self._target.adapter_sha256(step) for step in steps}
        texts = {step: self._texts(answers.get(step, ())) for step in steps}
        return folder, fill_folder(folder, self._source, pins, texts, on_event=self._on_event)

    def _texts(self, answers: Sequence[Answer]) -> list[Text]:
        if self._config.activation_texts == OWN:
            return answer_texts(answers, {name: question.system for name, question in self._questions.items()})
        return item_texts(self._items)


def evaluate(
    run: RunFolder,
    config: EvaluationConfig | None = None,
    *,
    steps: str | None = None,
    questions: Sequence[OpenQuestion] | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    base_model: str | None = None,
    persona_path: Path | None = None,
    judges: Sequence[JudgeChoice] = (),
    budget: Budget | None = None,
    rule: EmRule | None = None,
    on_event: EventSink = ignore_events,
) -> EvaluationResult:
    """Evaluate checkpoints of a run with a model in this process, and write the summary files.

    Args:
        run: The run folder, or with `base_model` a folder of checkpoints that another trainer wrote.
        config: What is measured, and how.
        steps: As `select_steps` takes it; None is every checkpoint.
        questions: The open questions; None takes emtool's own.
        device: "cpu" or "cuda".
        dtype: Dtype to compute in; None takes the one that the run was trained in.
        base_model: The base of a folder that another trainer wrote.
        persona_path: Where the persona's adapter is now; None is where the run says.
        judges: The judges.
        budget: What remote judges may be asked; None allows 10 US dollars.
        rule: What counts as misaligned and as coherent.
        on_event: Where progress is reported.

    Raises:
        CheckpointError: If the run has no whole milestone, its lineage cannot be rebuilt, or another process evaluates.
        ModelError: If the base model here is not the one that was trained.
    """
    used = config or EvaluationConfig()
    target = open_target(
        run, device=device, dtype=dtype, base_model=base_model, persona_path=persona_path, on_event=on_event
    )
    chosen = select_steps(steps, run.saved_steps())
    asked = select_questions(read_question_file(EVERYDAY_QUESTIONS)) if questions is None else questions
    evaluation = Evaluation(
        target,
        used,
        questions=asked,
        dtype=dtype,
        make_backend=lambda source: hf_backend(source, target.base, used, on_event=on_event),
        judges=judges,
        budget=budget,
        rule=rule,
        on_event=on_event,
    )
    with locked_evaluation(run):
        return evaluation.evaluate(chosen)
