"""Evaluation of a run: every milestone answers, is judged, scored and looked into, with the model that was trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from emtool.core.adapter import select_blocks
from emtool.core.answers import Answer
from emtool.core.data import file_sha256
from emtool.core.errors import CheckpointError
from emtool.core.evaluation_config import ANSWERS, LIKELIHOOD, OWN, EvaluationConfig
from emtool.core.events import EventSink, Notice, PhaseStarted, StepFinished, ignore_events
from emtool.core.open_questions import OpenQuestion, prompts_of
from emtool.core.questions import EVERYDAY_ITEMS, read_items
from emtool.core.record_file import settings_id
from emtool.core.run_dir import write_json
from emtool.engines.activation_files import ActivationFolder, Text, answer_texts, item_texts, take_activations
from emtool.engines.backends.backend import Backend
from emtool.engines.checkpoint_model import CheckpointModel
from emtool.engines.evaluation_result import EvaluationResult, JudgeResult, collect, judge_result, write_result
from emtool.engines.evaluation_target import EvaluationTarget
from emtool.engines.generating import AnswerRecord, CheckpointPrompts, generate_answers, with_step
from emtool.engines.item_scores import score_items
from emtool.engines.judges.judge import Judge
from emtool.engines.judging import JudgementRecord, judge_answers, judge_tasks, recorded_judges, recorded_judgements
from emtool.engines.modeling import check_device
from emtool.engines.score_record import ScoreRecord
from emtool.engines.summary import CheckpointScores

#: Makes what answers, from the model of the run; a server or a script has no use for that.
BackendMaker = Callable[[CheckpointModel], Backend]
#: Makes a judge. It is called when there is something to judge: a local judge loads a model of its own.
JudgeMaker = Callable[[], Judge]


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
        judges: What makes each judge; none leaves answers unjudged, but for what was judged before.
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
        judges: Sequence[JudgeMaker] = (),
        on_event: EventSink = ignore_events,
    ) -> None:
        check_device(target.base.device)
        self._target = target
        self._config = config
        self._questions = {question.id: question for question in questions}
        self._dtype = dtype or target.trained_dtype
        self._judges = judges
        self._on_event = on_event
        self._items = read_items()
        self._source = CheckpointModel(
            lambda: target.compose(dtype=self._dtype, on_event=on_event),
            tokenizer=target.base.tokenizer,
            device=target.base.device,
        )
        self._make_backend = make_backend
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
            record = ScoreRecord(
                run=run, settings={name: settings[name] for name in ("device", "dtype", "items_sha256")}
            )
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
            settings = {"kind": "answers", **backend.settings, **self._lineage_pins()}
            record = AnswerRecord(self._target.run, self._describe(settings))
            checkpoints = [
                CheckpointPrompts(
                    step=step,
                    folder=self._target.run.checkpoint_path(step),
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
            return [self._judged(answers, found, settings) for settings, found in recorded if found]
        judged = []
        for make in self._judges:
            judge = make(tasks)
            try:
                settings = {"kind": "judge", **judge.settings}
                record = JudgementRecord(run, self._describe(settings), is_cached=judge.is_remote)
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
        """Return the folder of activations, filled, and what is wrong with checkpoints that could not be loaded."""
        config, run = self._config, self._target.run
        settings = {
            "kind": "activations",
            "layers": list(layers),
            "texts": config.activation_texts,
            **self._lineage_pins(),
            "device": self._target.base.device,
        }
        self._describe(settings)
        folder = ActivationFolder(run=run, settings=settings)
        what = "its own answers" if config.activation_texts == OWN else f"{2 * len(self._items)} fixed texts"
        name = f"taking activations of {len(layers)} block(s) over {what} at {len(steps)} checkpoints"
        self._on_event(PhaseStarted(name=name, total=len(steps)))
        problems = {}
        for done, step in enumerate(steps, start=1):
            texts = self._texts(answers.get(step, ()))
            pins = {
                "adapter_sha256": self._target.adapter_sha256(step),
                "texts_sha256": settings_id({text.id: [turn.to_dict() for turn in text.messages] for text in texts}),
            }
            if not folder.has(step, pins):
                try:
                    model = self._source.at(run.checkpoint_path(step))
                except CheckpointError as error:
                    problems[step] = str(error)
                    self._warn(f"{error}; it is passed over")
                    continue
                ids, found = take_activations(model, self._source.tokenizer, texts, layers=layers)
                folder.write(step, found, text_ids=ids, pins=pins)
            self._on_event(StepFinished(step=done))
        return folder, problems

    def _texts(self, answers: Sequence[Answer]) -> list[Text]:
        if self._config.activation_texts == OWN:
            return answer_texts(answers, {name: question.system for name, question in self._questions.items()})
        return item_texts(self._items)
