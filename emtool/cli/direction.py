"""`emtool direction`: a direction from sound to wrong, and how far checkpoints move along it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from emtool.cli.inside_view import direction_view, projection_view
from emtool.cli.options import AlignedCutoff, AsJson, CoherentCutoff, Strict, complete_runs
from emtool.cli.output import data, print_json, quiet_libraries, say
from emtool.cli.plain_options import PlainCommand, PlainGroup
from emtool.core.config import MAX_SEED
from emtool.core.em_metrics import EmRule
from emtool.core.evaluation_files import PROJECTION_TABLE
from emtool.core.run_dir import RunFolder

commands = typer.Typer(
    cls=PlainGroup,
    help="A direction from sound to wrong in the activations.",
    no_args_is_help=True,
    add_completion=False,
)


@commands.callback()
def _group() -> None:
    """A direction from sound to wrong in the activations, and how far checkpoints move along it."""


@commands.command(cls=PlainCommand)
def fit(
    run_path: Annotated[
        Path,
        typer.Argument(metavar="RUN", autocompletion=complete_runs, help="Run evaluated with --extract-activations."),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write. \\[default: RUN/evaluation/direction.safetensors]"),
    ] = None,
    source: Annotated[
        str, typer.Option("--from", help="items: wrong and sound texts; judged: the checkpoint's own answers.")
    ] = "items",
    step: Annotated[str, typer.Option(help="Checkpoint to fit on: a step, init or final.")] = "init",
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the halves and of the shuffled labels.")] = 0,
    aligned_cutoff: AlignedCutoff = 30,
    coherent_cutoff: CoherentCutoff = 50,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Fit a direction on one half of the items, the difference of means between wrong and sound, and save it."""
    run = RunFolder(path=run_path)
    rule = EmRule(aligned_cutoff=aligned_cutoff, coherent_cutoff=coherent_cutoff, is_strict=strict)
    path = output or run.evaluation_path / "direction.safetensors"
    quiet_libraries()
    from emtool.engines.direction_files import save_direction
    from emtool.engines.run_direction import fit_on_run

    direction = fit_on_run(run, source=source, step=step, seed=seed, rule=rule)
    save_direction(path, direction)
    if as_json:
        print_json({"path": str(path), **direction.to_dict()})
        return
    data().print(direction_view(direction))
    say(f"written to {path}; project a run on it with: emtool direction apply {path} RUN")


@commands.command(cls=PlainCommand)
def apply(
    path: Annotated[Path, typer.Argument(metavar="DIRECTION", help="File that `emtool direction fit` wrote.")],
    run_paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", autocompletion=complete_runs, help="Runs evaluated with --extract-activations."
        ),
    ],
    layer: Annotated[int | None, typer.Option(help="Decoder block to show. \\[default: the direction's best]")] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Seed of the bootstrap and of the random directions.")
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Project every checkpoint of runs on a direction, over the items that it was not fitted on."""
    quiet_libraries()
    from emtool.engines.run_direction import apply_to_run

    found = []
    for run in run_paths:
        result = apply_to_run(RunFolder(path=run), path, layer=layer, seed=seed)
        found.append(result.to_dict())
        if not as_json:
            data().print(projection_view(result))
            say(f"written to {result.run.evaluation_path}: {PROJECTION_TABLE} (every layer), and the rest")
    if as_json:
        print_json(found if len(found) > 1 else found[0])
