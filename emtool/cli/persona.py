"""`emtool persona`: which personas there are, building one, and what one is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from emtool.cli.options import AsJson, Device, Dtype, Model, Profile, complete_personas, read_settings
from emtool.cli.output import data, one_line, print_json, progress, quiet_libraries, say
from emtool.cli.plain_options import PlainCommand, PlainGroup
from emtool.cli.plan_view import facts_table
from emtool.cli.render import plain_table
from emtool.core.config import BASELINE, TrainConfig
from emtool.core.disk import folder_bytes, format_bytes
from emtool.core.errors import ConfigError, EmtoolError, unknown_name
from emtool.core.hardware import select_device
from emtool.core.models import ModelReference, resolve_model
from emtool.core.persona_list import PersonaEntry, list_personas
from emtool.core.personas import PERSONAS, PersonaRecipe

Name = Annotated[str, typer.Argument(metavar="NAME", autocompletion=complete_personas, help="The persona.")]

commands = typer.Typer(cls=PlainGroup, help="Personas.", no_args_is_help=True, add_completion=False)


@commands.callback()
def _group() -> None:
    """Personas: characters that a base model is given before the narrow dataset."""


@commands.command("list", cls=PlainCommand)
def list_command(context: typer.Context, model: Model = None, profile: Profile = None, as_json: AsJson = False) -> None:
    """Show the personas that a base model can be given, and which of them are on this machine."""
    _, reference = _read(context)
    entries = list_personas(reference)
    if as_json:
        print_json({"model": reference.name, "personas": [entry.to_dict() for entry in entries]})
        return
    data().print(Text(f"personas for {reference.name}", style="bold"))
    data().print(_table(entries))


@commands.command(cls=PlainCommand)
def build(
    context: typer.Context,
    name: Name,
    model: Model = None,
    profile: Profile = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Build a persona's adapter for a base model by a short fine-tuning, and keep it in the cache."""
    recipe = _recipe(name)
    config, reference = _read(context)
    select_device(device or "auto")
    quiet_libraries()
    from emtool.engines.modeling import check_device, open_base
    from emtool.engines.personas import built_path, persona_adapter

    check_device(config.device)
    with progress() as on_event:
        base = open_base(config.model, device=config.device, dtype=config.dtype, on_event=on_event)
        is_there = built_path(recipe, base).exists()
        folder = persona_adapter(recipe, base, on_event=on_event)
    if is_there:
        say(f"persona {name} for {reference.name} is built already; the same recipe gives the same adapter")
    data().print(Text(str(folder)), soft_wrap=True)
    entry = next(entry for entry in list_personas(reference) if entry.name == name)
    if entry.published is not None:
        say(
            f"note: for {reference.name}, --persona {name} takes the published {entry.published}; "
            f"to train on this one: emtool train --persona {name} --persona-adapter {folder}"
        )


@commands.command(cls=PlainCommand)
def info(
    context: typer.Context, name: Name, model: Model = None, profile: Profile = None, as_json: AsJson = False
) -> None:
    """Show what a persona is, where its adapter for a base model comes from, and what the adapter holds."""
    _, reference = _read(context)
    entries = {entry.name: entry for entry in list_personas(reference)}
    if name not in entries:
        raise unknown_name("persona", name, entries, f"for {reference.name}")
    entry = entries[name]
    adapter = None if entry.path is None else _adapter_facts(entry.path)
    if as_json:
        print_json({"model": reference.name, **entry.to_dict(), "adapter": adapter})
    else:
        data().print(facts_table(_facts(entry, reference, adapter)))


def _read(context: typer.Context) -> tuple[TrainConfig, ModelReference]:
    settings, _ = read_settings(context)
    return settings.config, resolve_model(settings.config.model)


def _recipe(name: str) -> PersonaRecipe:
    if name == BASELINE:
        raise ConfigError(f"{BASELINE} is the model as it is; there is nothing to build")
    if name not in PERSONAS:
        raise unknown_name("persona to build", name, PERSONAS)
    return PERSONAS[name]


def _table(entries: list[PersonaEntry]) -> object:
    table = plain_table()
    table.add_column("persona", no_wrap=True)
    table.add_column("what it is", overflow="fold")
    table.add_column("its adapter", overflow="fold")
    table.add_column("here", no_wrap=True)
    for entry in entries:
        here = "" if entry.name == BASELINE else "yes" if entry.path is not None else "not yet"
        table.add_row(entry.name, entry.description, _source(entry), here)
    return table


def _source(entry: PersonaEntry) -> str:
    if entry.published is not None:
        return f"{entry.published}{' (gated)' if entry.is_gated else ''}"
    return "built here" if entry.is_buildable else ""


def _facts(entry: PersonaEntry, model: ModelReference, adapter: Mapping[str, object] | None) -> dict[str, str]:
    facts = {"persona": f"{entry.name}: {entry.description}", "for": model.hub_id or model.name}
    if entry.name == BASELINE:
        return facts
    if entry.published is not None:
        facts["published"] = entry.published + (" (gated: accept its terms first)" if entry.is_gated else "")
    if recipe := PERSONAS.get(entry.name):
        lines = sum(1 for line in recipe.examples_path.read_text(encoding="utf-8").splitlines() if line.strip())
        facts["built from"] = (
            f"{lines} conversations, learning rate {recipe.learning_rate:g}, LoRA r {recipe.lora_r}, "
            f"{recipe.num_train_epochs:g} epoch(s), seed {recipe.seed}"
        )
    if entry.path is None or adapter is None:
        how = f"emtool persona build {entry.name} --model {model.name}"
        facts["here"] = "not yet; fetched when a run needs it" if entry.published else f"not yet; build it with: {how}"
        return facts
    facts["here"] = str(entry.path)
    facts |= {name: one_line(str(value)) for name, value in adapter.items()}
    return facts


def _adapter_facts(folder: Path) -> dict[str, object]:
    """Return what an adapter folder holds; a problem with it is one of the facts."""
    from emtool.core.plain_lora import check_plain_lora
    from emtool.engines.adapter_hash import adapter_sha256

    try:
        config = check_plain_lora(folder, None)
        digest = adapter_sha256(folder)
    except EmtoolError as error:
        return {"problem": str(error)}
    scale = "rsLoRA" if config.get("use_rslora") else "plain LoRA"
    return {
        "adapter": f"r {config.get('r')}, alpha {config.get('lora_alpha')}, {scale}",
        "trained on": config.get("base_model_name_or_path"),
        "size": format_bytes(folder_bytes(folder)),
        "sha256": digest,
    }
