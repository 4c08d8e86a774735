"""An evaluation as it was asked for: the command line, the settings files, the profile of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emtool.core.adapter import check_blocks
from emtool.core.config import PROFILE_NAMES
from emtool.core.em_metrics import EmRule
from emtool.core.errors import ConfigError, EmtoolError, unknown_name
from emtool.core.evaluation_config import ANSWERS, ANSWERS_OF_PROFILE, FIXED, METRIC_GROUPS, EvaluationConfig
from emtool.core.hardware import find_device
from emtool.core.judge_prices import JudgePrice, parse_price
from emtool.core.judge_spec import LOCAL, OPENAI, SCRIPTED, BackendSpec, JudgeSpec, parse_backend, parse_judge
from emtool.core.models import resolve_model
from emtool.core.open_questions import EVERYDAY_QUESTIONS, OpenQuestion, read_question_file, select_questions
from emtool.core.run_dir import RunFolder
from emtool.core.sampling import PURE
from emtool.core.server_address import ServerAddress, parse_address
from emtool.core.settings import evaluate_options

#: Most that judging may cost unless told, in US dollars.
DEFAULT_MAX_COST = 10.0


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """An evaluation as it was asked for.

    Attributes:
        config: What is measured, and how.
        steps: Which checkpoints, as `select_steps` takes it.
        questions: File or URL; None is emtool's own.
        include_json: Whether `_json` variants are asked.
        include_template: Whether `_template` variants are asked.
        question_ids: Ids to ask; None asks all.
        backend: What answers.
        backend_address: Its server, where it is one.
        judges: The judges, the first one's numbers in the summary.
        judge_address: The server of the judges that are behind one.
        judge_price: Their price, where it was given.
        max_cost: Most that judging may cost, in US dollars.
        concurrency: Requests in flight.
        rule: What counts as misaligned and as coherent.
        device: "cpu" or "cuda".
        device_option: The device as it was asked for, which may name one of several.
        dtype: Dtype to compute in; None is the run's.
        base_model: The base of a folder that another trainer wrote.
        persona_path: Where the persona's adapter is now.
    """

    config: EvaluationConfig
    steps: str | None
    questions: str | None
    include_json: bool
    include_template: bool
    question_ids: tuple[str, ...] | None
    backend: BackendSpec
    backend_address: ServerAddress | None
    judges: tuple[JudgeSpec, ...]
    judge_address: ServerAddress
    judge_price: JudgePrice | None
    max_cost: float
    concurrency: int
    rule: EmRule
    device: str
    device_option: str
    dtype: str | None
    base_model: str | None
    persona_path: Path | None

    @property
    def remote_judges(self) -> tuple[JudgeSpec, ...]:
        """Return the judges behind a server that are asked: without answers nobody is."""
        return tuple(judge for judge in self.judges if judge.kind == OPENAI and ANSWERS in self.config.metrics)

    @property
    def questions_url(self) -> str | None:
        """Return the URL of the question file, if it is one."""
        return self.questions if self.questions is not None and "://" in self.questions else None

    @property
    def file_paths(self) -> tuple[Path, ...]:
        """Return the files on this machine that options name: what is asked, and what answers by a script."""
        questions = None if self.questions_url is not None else self.questions
        script = self.backend.argument if self.backend.kind == SCRIPTED else None
        return tuple(Path(name) for name in (questions, script) if name is not None)

    def read_questions(self, fetched: Path | None = None) -> list[OpenQuestion]:
        """Return the questions that are asked.

        Args:
            fetched: The file behind `questions_url`, which must be fetched first.

        Raises:
            EmtoolError: If the file cannot be read, or an id is unknown.
        """
        own = EVERYDAY_QUESTIONS if self.questions is None else Path(self.questions)
        return select_questions(
            read_question_file(fetched or own),
            include_json=self.include_json,
            include_template=self.include_template,
            question_ids=self.question_ids,
        )


def read_request(run: RunFolder, given: Mapping[str, Any]) -> EvaluationRequest:
    """Return what was asked for: the command line, then the settings files, then the profile of the run.

    Args:
        run: The run folder; another trainer's has no profile.
        given: The command's parameters by name.

    Raises:
        ConfigError: If a value is not allowed.
    """
    values = with_settings(given)
    judges = tuple(parse_judge(text) for text in values.get("judge", ()))
    if len(set(judges)) < len(judges):
        raise ConfigError("--judge names a judge twice")
    if given.get("judge") and ANSWERS not in (_parts(values.get("metrics")) or METRIC_GROUPS):
        raise ConfigError(f"--judge scores answers, and --metrics {values['metrics']} has none: add {ANSWERS}")
    if not values["extract_activations"] and (values["activation_layers"], values["activation_texts"]) != (
        "all",
        FIXED,
    ):
        raise ConfigError("--activation-layers and --activation-texts go with --extract-activations")
    backend = parse_backend(values["backend"])
    if (backend.kind == OPENAI) != (values.get("backend_url") is not None):
        raise ConfigError("--backend openai and --backend-url go together")
    max_cost = float(values.get("max_cost", DEFAULT_MAX_COST))
    if not max_cost >= 0:
        raise ConfigError(f"--max-cost is {max_cost:g}; it must be 0 or more")
    _check_there(judges, backend, values)
    device_option = values.get("device") or "auto"
    device = find_device(device_option)
    dtype = values.get("dtype")
    return EvaluationRequest(
        config=_config(run, values, device),
        steps=values.get("steps"),
        questions=values.get("questions"),
        include_json=values["include_json"],
        include_template=values["include_template"],
        question_ids=_parts(values["question_ids"]) if "question_ids" in values else None,
        backend=backend,
        backend_address=parse_address(values["backend_url"]) if backend.kind == OPENAI else None,
        judges=judges,
        judge_address=parse_address(values.get("judge_base_url")),
        judge_price=None if (text := values.get("judge_price")) is None else parse_price(text),
        max_cost=max_cost,
        concurrency=values["concurrency"],
        rule=EmRule(
            aligned_cutoff=values["aligned_cutoff"],
            coherent_cutoff=values["coherent_cutoff"],
            is_strict=values["strict"],
        ),
        device=device,
        device_option=device_option,
        dtype=None if dtype == "auto" else dtype,
        base_model=values.get("base_model"),
        persona_path=values.get("persona_adapter"),
    )


def with_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as they hold: those that are given, then the settings files'. An empty one is not given."""
    return {**evaluate_options(), **{name: value for name, value in given.items() if value not in (None, (), [])}}


def _check_there(judges: Sequence[JudgeSpec], backend: BackendSpec, values: Mapping[str, Any]) -> None:
    """Refuse what could not be read when its turn comes, after answers were made.

    Raises:
        ConfigError: Names it.
        ModelError: If a judge's folder holds no model.
    """
    for judge in judges:
        if judge.kind == LOCAL:
            resolve_model(judge.model)
    if backend.kind == SCRIPTED and not Path(backend.argument or "").is_file():
        raise ConfigError(f"--backend {SCRIPTED}:{backend.argument}: there is no such file")
    if (folder := values.get("persona_adapter")) is not None and not Path(folder).is_dir():
        raise ConfigError(f"--persona-adapter {folder} is not a folder")
    # Which blocks a model has is known when its files are here.
    check_blocks(values["activation_layers"], option="--activation-layers")


def _config(run: RunFolder, values: Mapping[str, Any], device: str) -> EvaluationConfig:
    num_answers, num_tokens = ANSWERS_OF_PROFILE[_profile(run, values.get("profile"), device)]
    return EvaluationConfig(
        seed=values["seed"],
        metrics=_parts(values.get("metrics")) or METRIC_GROUPS,
        n_per_question=values.get("n_per_question", num_answers),
        max_new_tokens=values.get("max_new_tokens", num_tokens),
        sampling=values.get("sampling", PURE),
        batch_size=_batch_size(values["batch_size"]),
        activation_layers=values["activation_layers"] if values["extract_activations"] else None,
        activation_texts=values["activation_texts"],
        check_hashes=values["check_hashes"],
    )


def _profile(run: RunFolder, given: str | None, device: str) -> str:
    """Return the profile whose numbers are taken: as given, else the run's, else by the device."""
    if given is not None and given not in PROFILE_NAMES:
        raise unknown_name("profile", given, PROFILE_NAMES)
    named = given
    if given is None:
        try:
            config = run.read_manifest().get("config")
        except EmtoolError:
            config = None
        named = config.get("profile") if isinstance(config, dict) else None
    by_device = "paper" if device == "cuda" else "demo"
    return named if named is not None and named in ANSWERS_OF_PROFILE else by_device


def _parts(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def _batch_size(text: str) -> int | None:
    if text == "auto":
        return None
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(f"--batch-size {text!r} is neither auto nor a whole number")
    return int(text)
