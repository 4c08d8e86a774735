"""`emtool data`: which datasets there are, fetching them, and what is in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.text import Text

from emtool.cli.data_view import DatasetFacts, Lengths, dataset_dict, dataset_view, datasets_table
from emtool.cli.fetching import fetch_here, source_for
from emtool.cli.options import AsJson, Model, Profile, among, read_settings
from emtool.cli.output import data, print_json, progress, quiet_libraries, say
from emtool.cli.plain_options import PlainCommand, PlainGroup
from emtool.core.cache import find_model_path
from emtool.core.data import Conversation, file_sha256
from emtool.core.data_stats import LengthStats, RowStats, num_characters
from emtool.core.datasets import DATASETS, known_datasets, resolve_dataset
from emtool.core.errors import DataError, ModelError
from emtool.core.plan import plan_run
from emtool.core.run_plan import RunPlan

commands = typer.Typer(cls=PlainGroup, help="Training data.", no_args_is_help=True, add_completion=False)


@commands.callback()
def _group() -> None:
    """Training data."""


@commands.command("list", cls=PlainCommand)
def list_datasets(as_json: AsJson = False) -> None:
    """Show the datasets, where each comes from, and which are on this machine."""
    found = list(known_datasets())
    if as_json:
        print_json([dataset_dict(dataset) for dataset in found])
    else:
        data().print(datasets_table(found))


@commands.command(cls=PlainCommand)
def fetch(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", autocompletion=among(DATASETS), help="A published dataset, or hub:OWNER/NAME[:SPLIT]."
        ),
    ],
    source: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="SOURCE", help="A URL, an archive or a folder to take it from, and do it again."
        ),
    ] = None,
    sha256: Annotated[
        str | None, typer.Option("--sha256", metavar="HEX", help="What the archive's SHA-256 must be.")
    ] = None,
    password: Annotated[
        str | None, typer.Option("--password", help="Password of the archive, if not the published one.")
    ] = None,
) -> None:
    """Bring a dataset to this machine: download, decrypt, check, and keep it in the cache."""
    dataset = resolve_dataset(name)
    is_again = (source, sha256, password) != (None, None, None)
    if dataset.cache_folder is None and not is_again:
        say(f"{name} is on this machine: {dataset.path}")
        return
    from emtool.engines.data_files import FetchOptions

    options = FetchOptions(
        source=source_for(dataset) if source is None else source,
        sha256=sha256,
        password=password,
        is_again=is_again,
    )
    data().print(Text(str(fetch_here(dataset, options).path)), soft_wrap=True)


@commands.command(cls=PlainCommand)
def info(
    context: typer.Context,
    dataset: Annotated[
        str,
        typer.Argument(
            metavar="NAME|FILE", autocompletion=among(DATASETS), help="A dataset, or a JSON Lines or Parquet file."
        ),
    ],
    model: Model = None,
    profile: Profile = None,
    as_json: AsJson = False,
) -> None:
    """Show what is in a dataset: rows, turns, duplicates, lengths, and the steps of a run on it."""
    settings, _ = read_settings(context)
    plan, rows = plan_run(settings.config)
    facts = DatasetFacts(
        dataset=plan.dataset,
        plan=plan,
        sha256=None if plan.dataset.path is None else file_sha256(plan.dataset.path),
        rows=RowStats.of(rows) if rows else None,
        lengths=_lengths(plan, rows) if rows else None,
    )
    if as_json:
        print_json(facts.to_dict())
    else:
        data().print(dataset_view(facts))


def _lengths(plan: RunPlan, rows: Sequence[Conversation]) -> Lengths:
    """Return the rows' lengths in tokens, or in characters where the model's tokenizer is not here."""
    folder = find_model_path(plan.model)
    if folder is None:
        why = (
            f"the tokenizer of {plan.model.name} is not on this machine; to count tokens, run 'hf download "
            f"{plan.model.hub_id}', train on it once, or give a model folder with --model"
        )
    else:
        quiet_libraries()
        from emtool.engines.row_lengths import row_lengths

        try:
            with progress() as on_event:
                found = row_lengths(rows, folder, max_length=plan.config.max_length, on_event=on_event)
        except (DataError, ModelError) as error:
            why = f"tokens cannot be counted, and training would stop for the same reason: {error}"
        else:
            return Lengths(
                stats=LengthStats.of(found.lengths, unit="tokens"),
                num_over=found.num_over,
                num_unusable=found.num_unusable,
                num_trained_tokens=found.num_trained_tokens,
            )
    return Lengths(stats=LengthStats.of(map(num_characters, rows), unit="characters"), why_no_tokens=why)
