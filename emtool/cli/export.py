"""`emtool export`: each milestone as one adapter for the unmodified base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emtool.cli.options import AsJson, complete_runs
from emtool.cli.output import data, print_json, progress, quiet_libraries, say
from emtool.cli.render import plain_table
from emtool.core.disk import format_bytes
from emtool.core.errors import CheckpointError, unknown_name
from emtool.core.file_sizes import DTYPE_BYTES
from emtool.core.run_dir import RunFolder
from emtool.core.steps import select_steps

if TYPE_CHECKING:
    from emtool.engines.export import ExportResult


def export(
    run_path: Annotated[Path, typer.Argument(metavar="RUN", autocompletion=complete_runs, help="Run folder.")],
    steps: Annotated[
        str | None, typer.Option(help="Milestones to export, for instance 0,100,final. \\[default: all]")
    ] = None,
    output_path: Annotated[Path | None, typer.Option(help="Folder to write into. \\[default: RUN/composed]")] = None,
    dtype: Annotated[str, typer.Option(help=f"Storage dtype: {', '.join(DTYPE_BYTES)}.")] = "float32",
    as_json: AsJson = False,
) -> None:
    """Write persona and trained adapter as one PEFT adapter a milestone, for vLLM and others on the unmodified base."""
    if dtype not in DTYPE_BYTES:
        raise unknown_name("dtype", dtype, DTYPE_BYTES)
    run = RunFolder(path=run_path)
    run.read_manifest()
    saved = run.saved_steps()
    if not saved:
        raise CheckpointError(f"{run.path} has no checkpoint-* folders; train it first")
    chosen = select_steps(steps, saved)
    target = output_path or run.path / "composed"
    quiet_libraries()
    from emtool.engines.export import export_run

    with progress() as on_event:
        result = export_run(run, chosen, output_path=target, dtype=dtype, on_event=on_event)
    if as_json:
        print_json(result.to_dict())
    else:
        data().print(_table(result, dtype))
        _explain(result, target)
    if result.damaged:
        names = ", ".join(map(str, result.damaged))
        raise CheckpointError(
            f"{len(result.damaged)} checkpoint(s) could not be exported: {names}; see: emtool verify {run.path}"
        )


def _table(result: ExportResult, dtype: str) -> object:
    table = plain_table()
    table.add_column("adapter", no_wrap=True)
    for heading in ("rank", "size", *(() if dtype == "float32" else (f"error of {dtype}",))):
        table.add_column(heading, justify="right", no_wrap=True)
    for adapter in result.adapters:
        error = () if dtype == "float32" else (f"{adapter.rounding_error:.1e}",)
        table.add_row(adapter.path.name, str(adapter.rank), format_bytes(adapter.num_bytes), *error)
    return table


def _explain(result: ExportResult, target: Path) -> None:
    if (rounding := result.merge_rounding) is not None:
        say(
            f"the run trained on the persona merged and rounded to {rounding.dtype}; these adapters add it exactly: a "
            f"weight differs by at most {rounding.largest:.1e}, a layer's update by at most {rounding.relative:.1e} "
            "of its norm"
        )
    rank = result.adapters[0].rank
    allowed = next((size for size in VLLM_RANKS if size >= rank), rank)
    first = result.adapters[0]
    say(
        f"written to {target}; for instance: vllm serve {result.base} --enable-lora --max-lora-rank {allowed} "
        f"--lora-modules step-{first.step}={first.path}"
    )


#: Values that vLLM's --max-lora-rank takes. Source: vllm, config/lora.py, MaxLoRARanks.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
