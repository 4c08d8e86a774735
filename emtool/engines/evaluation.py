"""Evaluation of a run: every milestone answers, is judged, scored and looked into, with the model that was trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from emtool.core.adapter import select_blocks
from emtool.core.answers import Answer, AnswerKey
from emtool.core.data import file_sha256
from emtool.core.em_metrics import EmRule
from emtool.core.errors import CheckpointError
from emtool.core.evaluation_config import ANSWERS, LIKELIHOOD, OWN, EvaluationConfig
from emtool.core.events import EventSink, Notice, ignore_events
from emtool.core.judge_prices import JudgePlan
from emtool.core.judgement import Judgement
from emtool.core.open_questions import (
    EVERYDAY_QUESTIONS,
    OpenQuestion,
    prompts_of,
    read_question_file,
    select_questions,
)
from emtool.core.questions import EVERYDAY_ITEMS, read_items
from emtool.core.record_file import settings_id
from emtool.core.run_dir import RunFolder, write_json
from emtool.core.run_lock import locked_evaluation
from emtool.core.steps import select_steps
from emtool.engines.activation_files import ActivationFolder, Text, answer_texts, fill_folder, item_texts
from emtool.engines.backends.backend import Backend
from emtool.engines.backends.hf import hf_backend
from emtool.engines.checkpoint_model import CheckpointModel
from emtool.engines.evaluation_result import EvaluationResult, JudgeResult, collect, judge_result, write_result
from emtool.engines.evaluation_target import EvaluationTarget, open_target
from emtool.engines.generating import AnswerRecord, CheckpointPrompts, generate_answers, with_step
from emtool.engines.item_scores import score_items
from emtool.engines.judges.judge import JudgeChoice
from emtool.engines.judging import (
    JudgementRecord,
    judge_answers,
    judge_tasks,
    missing_prompts,
    recorded_judgements,
    recorded_judges,
)
from emtool.engines.modeling import check_device
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
        approve: Called with what a remote judge is about to be asked; raises to stop it.
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
        approve: Callable[[JudgePlan], None] = lambda _plan: None,
        rule: EmRule | None = None,
        on_event: EventSink = ignore_events,
    ) -> None:
        check_device(target.base.device)
        self._target = target
        self._config = config
        self._questions = {question.id: question for question in questions}
        self._dtype = dtype or target.trained_dtype
        self._judges = judges
        self._approve = approve
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
        damaged = self._find_damaged(steps)
        whole = [step for step in steps if step not in damaged]
        answers: dict[int, list[Answer]] = {}
        judged: list[JudgeResult] = []
        scores: list[CheckpointScores] = []
        settings = self._settings()
        if ANSWERS in config.metrics:
            answers, problems, settings["generation"] = self._generate(whole)
            damaged |= problems
            judged = self._judge(answers)
        if config.activation_layers is not None:
            num_blocks = self._target.base.num_blocks
            layers = select_blocks(config.activation_layers, num_blocks, option="--activation-layers")
            folder, problems = self._take_activations(whole, answers, layers or range(num_blocks))
            settings["activations"] = str(folder.path.relative_to(run.path))
            damaged |= problems
        if LIKELIHOOD in config.metrics:
            pins = {name: settings[name] for name in ("device", "dtype", "items_sha256")}
            record = ScoreRecord(run=run, settings={**pins, "lineage": settings_id(self._lineage_pins())})
            scores, problems = score_items(self._source, whole, self._items, record, on_event=self._on_event)
            damaged |= problems
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
        write_result(result, scores, self._items, rule=self._rule)
        return result

    def _settings(self) -> dict[str, Any]:
        return {
            "seed": self._config.seed,
            "device": self._target.base.device,
            "dtype": self._dtype,
            "metrics": list(self._config.metrics),
            "items_sha256": file_sha256(EVERYDAY_ITEMS),
            "num_items": len(self._items),
            "trained_domain": self._target.domain,
        }

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
            if not path.exists():
                write_json(path, settings)
        except OSError as error:
            raise run.write_error(error, "writing the settings of the evaluation") from error
        return name

    def _generate(self, steps: Sequence[int]) -> tuple[dict[int, list[Answer]], dict[int, str], dict[str, Any]]:
        backend = self._make_backend(self._source)
        try:
            settings = {"stage": "generation", **backend.settings, **self._lineage_pins()}
            record = AnswerRecord(self._target.run, self._describe(settings))
            checkpoints = [
                CheckpointPrompts(
                    step=step,
                    folder=self._folder_of(step),
                    adapter_sha256=self._target.adapter_sha256(step),
                    prompts=with_step(self._prompts, step),
                )
                for step in steps
            ]
            answers, problems = generate_answers(backend, checkpoints, record, on_event=self._on_event)
        finally:
            backend.close()
        shown = {**settings, "id": settings_id(settings), "n_per_question": self._config.n_per_question}
        return answers, problems, {**shown, "questions": list(self._questions)}

    def _judge(self, answers: Mapping[int, Sequence[Answer]]) -> list[JudgeResult]:
        run = self._target.run
        tasks = judge_tasks([answer for found in answers.values() for answer in found], self._questions)
        if not self._judges:
            recorded = [(settings, recorded_judgements(tasks, run, settings)) for settings in recorded_judges(run)]
            shown = [(settings, found) for settings, found in recorded if found]
            # The sort is stable: of judges that know equally many answers, the one last asked comes first.
            shown.sort(key=lambda judge: len(judge[1]), reverse=True)
            return [self._judged(answers, found, settings) for settings, found in shown]
        judged = []
        for choice in self._judges:
            judge = choice.make()
            try:
                judge.prepare()
                settings = {"stage": "judging", **judge.settings}
                record = JudgementRecord(run, self._describe(settings), is_cached=choice.plan is not None)
                if choice.plan is not None and (missing := missing_prompts(tasks, record)):
                    self._approve(choice.plan(missing))
                found = judge_answers(judge, tasks, record, on_event=self._on_event)
            finally:
                judge.close()
            judged.append(self._judged(answers, found, settings))
        return judged

    def _judged(
        self,
        answers: Mapping[int, Sequence[Answer]],
        judgements: Mapping[tuple[AnswerKey, str], Judgement],
        settings: Mapping[str, Any],
    ) -> JudgeResult:
        return judge_result(answers, judgements, settings=settings, rule=self._rule, seed=self._config.seed)

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
        rule=rule,
        on_event=on_event,
    )
    with locked_evaluation(run):
        return evaluation.evaluate(chosen)
