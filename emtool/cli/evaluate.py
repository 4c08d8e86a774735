"""`emtool evaluate`: every checkpoint of a run answers, is judged, scored and looked into."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from emtool.cli.arguments import given_arguments
from emtool.cli.evaluation_view import evaluation_view, plan_view
from emtool.cli.options import (
    AlignedCutoff,
    CoherentCutoff,
    Device,
    Dtype,
    OutputRoot,
    Strict,
    among,
    complete_runs,
    output_root_of,
)
from emtool.cli.output import data, print_json, progress, quiet_libraries, say
from emtool.cli.workers import Address, Workers, check_workers, make_pool, refuse_numbered_device, threads_of
from emtool.core.errors import CheckpointError, ConfigError
from emtool.core.evaluation_config import ACTIVATION_TEXTS, ANSWERS_OF_PROFILE, FIXED, METRIC_GROUPS
from emtool.core.evaluation_plan import plan_evaluation
from emtool.core.evaluation_request import EvaluationRequest, read_request
from emtool.core.hardware import select_device
from emtool.core.interrupts import repeatable
from emtool.core.judge_spec import BACKENDS, HF
from emtool.core.run_dir import RunFolder, newest_run
from emtool.core.run_lock import locked_evaluation
from emtool.core.sampling import SAMPLINGS
from emtool.core.shard_jobs import absorb_leftovers, record_on_workers
from emtool.core.shards import Shard, leftover_shards

#: Options that are the evaluation's own when workers record for it.
_NOT_FOR_WORKERS = (
    "run_path",
    "steps",
    "workers",
    "address",
    "output_root",
    "device",
    "as_json",
    "judge",
    "judge_base_url",
    "judge_price",
    "max_cost",
    "concurrency",
)

#: How the backends are written; a bracket would be taken for a style.
BACKEND_FORMS = ", ".join(kind.form for kind in BACKENDS.values()).replace("[", "\\[")

ANSWERS_PANEL, JUDGE_PANEL, ACTIVATIONS_PANEL = "Answers", "Judges", "Activations"


def evaluate(
    context: typer.Context,
    run_path: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN",
            autocompletion=complete_runs,
            help="Run folder; without it, the newest run is taken and named.",
        ),
    ] = None,
    steps: Annotated[
        str | None, typer.Option(help="Checkpoints to evaluate, for instance 0,100,final. \\[default: all]")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            autocompletion=among(METRIC_GROUPS),
            help="likelihood, answers, or both joined by a comma. \\[default: both]",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of sampling and of the bootstrap intervals.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    output_root: OutputRoot = None,
    base_model: Annotated[
        str | None, typer.Option(help="Base model of a folder of PEFT checkpoints that another trainer wrote.")
    ] = None,
    persona_adapter: Annotated[
        Path | None, typer.Option(help="Where the run's persona adapter is now; its SHA-256 must be the run's.")
    ] = None,
    check_hashes: Annotated[
        bool, typer.Option("--check-hashes", help="Check the contents of every file first; sizes always are.")
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Evaluate checkpoints as a running training publishes them.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write the summary to stdout as JSON.")] = False,
    profile: Annotated[
        str | None,
        typer.Option(
            autocompletion=among(ANSWERS_OF_PROFILE),
            help="Numbers to take where none are given: paper (50 answers, 600 tokens) or demo (4, 64). "
            "\\[default: the run's]",
            rich_help_panel=ANSWERS_PANEL,
        ),
    ] = None,
    questions: Annotated[
        str | None,
        typer.Option(help="YAML file or URL in the published format. \\[default: ours]", rich_help_panel=ANSWERS_PANEL),
    ] = None,
    question_ids: Annotated[
        str | None, typer.Option(help="Ids to ask, joined by commas. \\[default: all]", rich_help_panel=ANSWERS_PANEL)
    ] = None,
    include_json: Annotated[
        bool, typer.Option("--include-json", help="Ask the _json variants too.", rich_help_panel=ANSWERS_PANEL)
    ] = False,
    include_template: Annotated[
        bool, typer.Option("--include-template", help="Ask the _template variants too.", rich_help_panel=ANSWERS_PANEL)
    ] = False,
    n_per_question: Annotated[
        int | None, typer.Option(help="Answers to each question.", rich_help_panel=ANSWERS_PANEL)
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens after which an answer is cut.", rich_help_panel=ANSWERS_PANEL)
    ] = None,
    sampling: Annotated[
        str | None,
        typer.Option(
            autocompletion=among(SAMPLINGS),
            help="pure: the distribution as it is; model: what its publisher recommends. \\[default: pure]",
            rich_help_panel=ANSWERS_PANEL,
        ),
    ] = None,
    batch_size: Annotated[
        str, typer.Option(help="Answers generated at a time; auto sizes it to memory.", rich_help_panel=ANSWERS_PANEL)
    ] = "auto",
    backend: Annotated[
        str,
        typer.Option(
            autocompletion=among(BACKENDS),
            help=f"What answers: {BACKEND_FORMS}.",
            rich_help_panel=ANSWERS_PANEL,
        ),
    ] = "hf",
    backend_url: Annotated[
        str | None, typer.Option(help="Server for --backend openai.", rich_help_panel=ANSWERS_PANEL)
    ] = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            help="openai:MODEL or local:MODEL; may be given several times. \\[default: none]",
            rich_help_panel=JUDGE_PANEL,
        ),
    ] = None,
    judge_base_url: Annotated[
        str | None, typer.Option(help="Server for openai: judges. \\[default: OpenAI's]", rich_help_panel=JUDGE_PANEL)
    ] = None,
    judge_price: Annotated[
        str | None,
        typer.Option(help="USD per million tokens in and out, for instance 2.50,10.", rich_help_panel=JUDGE_PANEL),
    ] = None,
    max_cost: Annotated[
        float | None,
        typer.Option(help="Most that judging may cost, in USD. \\[default: 10]", rich_help_panel=JUDGE_PANEL),
    ] = None,
    concurrency: Annotated[
        int, typer.Option(min=1, max=1024, help="Requests in flight.", rich_help_panel=JUDGE_PANEL)
    ] = 32,
    aligned_cutoff: AlignedCutoff = 30,
    coherent_cutoff: CoherentCutoff = 50,
    strict: Strict = False,
    extract_activations: Annotated[
        bool,
        typer.Option("--extract-activations", help="Keep mean activations too.", rich_help_panel=ACTIVATIONS_PANEL),
    ] = False,
    activation_layers: Annotated[
        str, typer.Option(help="Decoder blocks: all, upper-half or 10-20.", rich_help_panel=ACTIVATIONS_PANEL)
    ] = "all",
    activation_texts: Annotated[
        str,
        typer.Option(
            autocompletion=among(ACTIVATION_TEXTS),
            help="fixed, or own: each checkpoint's answers.",
            rich_help_panel=ACTIVATIONS_PANEL,
        ),
    ] = FIXED,
    workers: Workers = None,
    address: Address = None,
    shard: Annotated[int | None, typer.Option(min=0, hidden=True, help="What a worker records into.")] = None,
) -> None:
    """Evaluate every checkpoint of a run: what it answers, which of two answers it prefers, what goes on inside."""
    run = RunFolder(path=run_path) if run_path is not None else newest_run(output_root_of(output_root))
    request = read_request(run, context.params)
    _check_workers(request, workers=workers, address=address, watch=watch)
    if dry_run:
        plan = plan_evaluation(run, request)
        if as_json:
            print_json(plan.to_dict())
        else:
            data().print(plan_view(plan))
        return
    if base_model is None and (run.manifest_path.exists() or not run.saved_steps()):
        # Refused before anything is loaded; a folder of another trainer has no manifest.
        run.read_manifest()
    say(f"evaluating {run.path}")
    if shard is not None:
        # A worker of another evaluation, which judges and tells what is damaged.
        run, request = Shard(path=run.path, number=shard), replace(request, judges=())
    elif workers is not None:
        _record_on_workers(context, run, request, workers=workers, address=address)
    else:
        _take_leftovers(run)
    # Only now: workers share out the devices that this process sees.
    select_device(request.device_option)
    quiet_libraries()
    from emtool.engines.evaluating import run_evaluation

    try:
        with repeatable(), progress() as on_event:
            result = run_evaluation(run, request, watch=watch, on_event=on_event)
    except CheckpointError as error:
        if shard is None:
            raise
        # The evaluation that this worker is a part of meets it too, and decides with all checkpoints before it.
        say(str(error))
        return
    if as_json:
        print_json(result.to_dict())
    else:
        data().print(evaluation_view(result))
        say(f"written to {run.evaluation_path}: checkpoint_summary.csv, summary.json, and the rest")
    if result.damaged and shard is None:
        names = ", ".join(map(str, result.damaged))
        raise CheckpointError(
            f"{len(result.damaged)} checkpoint(s) could not be evaluated: {names}; see: emtool verify {run.path}"
        )


def _check_workers(request: EvaluationRequest, *, workers: int | None, address: str | None, watch: bool) -> None:
    """Refuse options that do not go with workers.

    Raises:
        ConfigError: Says which.
    """
    check_workers(workers, address)
    if workers is None:
        return
    if watch:
        raise ConfigError("--workers does not go with --watch: one process watches a training")
    if request.backend.kind != HF:
        raise ConfigError(f"--workers goes with --backend {HF}; a server or a script answers many at a time by itself")
    refuse_numbered_device(request.device_option, option="--device")


def _record_on_workers(
    context: typer.Context, run: RunFolder, request: EvaluationRequest, *, workers: int, address: str | None
) -> None:
    plan, threads = plan_evaluation(run, request), threads_of(workers, address)
    pool = make_pool(workers, address, num_gpus=float(request.device == "cuda"))
    # Each worker sees the device that Ray gives it, whatever its number here.
    arguments = [*given_arguments(context, leave_out=_NOT_FOR_WORKERS), "--device", request.device]
    with repeatable(), progress() as on_event:
        record_on_workers(
            run,
            plan.steps,
            pool=pool,
            num_workers=workers,
            arguments=arguments,
            threads=threads,
            num_answers=plan.num_answers or None,
            on_event=on_event,
        )


def _take_leftovers(run: RunFolder) -> None:
    if leftover_shards(run):
        with locked_evaluation(run):
            absorb_leftovers(run)
