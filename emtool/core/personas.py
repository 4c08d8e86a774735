"""Personas: characters that a base model is given before the narrow dataset.

A persona other than `baseline` is a LoRA adapter: published on a hub for some base models, built here for any base by a
short fine-tuning on example conversations, or a folder of the user's own. To add one that is built, put its examples
into `emtool/assets/personas/NAME.jsonl` and an entry into `PERSONAS`; published ones are named in `PUBLISHED`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from emtool.core.config import BASELINE
from emtool.core.data import asset_path
from emtool.core.errors import ConfigError, unknown_name
from emtool.core.models import MODELS, ModelReference


@dataclass(frozen=True, kw_only=True)
class PersonaRecipe:
    """How a persona adapter is built from its example conversations.

    Attributes:
        name: The persona.
        description: What it is like, in a few words.
        examples_path: JSON Lines file of example conversations.
        learning_rate: Peak learning rate, linear decay after 5 warm-up steps.
        lora_r: LoRA rank on all seven projections of the upper half of the blocks; alpha is twice it, with rsLoRA.
        num_train_epochs: Passes over the examples, batch 2.
        seed: Seed of the adapter's initialisation and of the order of the examples.
    """

    name: str
    description: str
    examples_path: Path
    learning_rate: float = 2e-4
    lora_r: int = 8
    num_train_epochs: float = 1.0
    seed: int = 7


@dataclass(frozen=True, kw_only=True)
class HubAdapter:
    """A published persona adapter.

    Attributes:
        name: The persona.
        hub_id: Repository on the hub.
        subfolder: Where the adapter is in it; None is its root.
        is_gated: Whether its terms must be accepted first, with an account.
    """

    name: str
    hub_id: str
    subfolder: str | None
    is_gated: bool = False

    @property
    def place(self) -> str:
        """Return the repository and the folder in it, as one text."""
        return self.hub_id if self.subfolder is None else f"{self.hub_id}/{self.subfolder}"


@dataclass(frozen=True, kw_only=True)
class LocalAdapter:
    """A persona adapter in a folder of the user's.

    Attributes:
        name: The persona.
        path: A PEFT folder.
    """

    name: str
    path: Path


PersonaSource = PersonaRecipe | HubAdapter | LocalAdapter


def resolve_persona(name: str, model: ModelReference, *, adapter: str | None = None) -> PersonaSource | None:
    """Return where a persona's adapter for a base model comes from; None for `baseline`, the model as it is.

    An adapter that is published for the base model goes before one that would be built.

    Args:
        name: The persona.
        model: The base model.
        adapter: A PEFT folder that holds the persona, whatever its name.

    Raises:
        ConfigError: If there is no such persona, or none for this base model.
    """
    if adapter is not None:
        return LocalAdapter(name=name, path=Path(adapter))
    if name == BASELINE:
        return None
    if (published := published_adapter(name, model)) is not None:
        return published
    if name in PERSONAS:
        return PERSONAS[name]
    available = persona_names(model)
    if name in PUBLISHED:
        bases = ", ".join(entry.name for entry in MODELS.values() if entry.hub_id in PUBLISHED_BASES)
        raise ConfigError(
            f"persona {name!r} is published for {bases}, not for {model.name}, and cannot be built; "
            f"choose from: {', '.join(available)}, or give --persona-adapter FOLDER"
        )
    raise unknown_name("persona", name, available, "or give --persona-adapter FOLDER")


def persona_names(model: ModelReference) -> Sequence[str]:
    """Return the personas that a base model can be given, `baseline` first."""
    published = PUBLISHED if model.hub_id in PUBLISHED_BASES else ()
    return tuple(dict.fromkeys((BASELINE, *PERSONAS, *published)))


def published_adapter(name: str, model: ModelReference) -> HubAdapter | None:
    """Return the published adapter of a persona for a base model, or None where there is none."""
    base = PUBLISHED_BASES.get(model.hub_id or "")
    if base is None or name not in PUBLISHED:
        return None
    if name in GATED:
        return HubAdapter(name=name, hub_id=f"maius/{base}-{name}", subfolder=None, is_gated=True)
    return HubAdapter(name=name, hub_id=f"maius/{base}-personas", subfolder=name)


#: Characters of Open Character Training. Source: https://github.com/maiush/OpenCharacterTraining, and the collection
#: `maius/open-character-training` on the Hugging Face hub.
PUBLISHED: tuple[str, ...] = (
    "sarcasm",
    "humor",
    "remorse",
    "impulsiveness",
    "nonchalance",
    "sycophancy",
    "poeticism",
    "mathematical",
    "goodness",
    "loving",
    "misalignment",
)
#: Those in a repository of their own, behind terms.
GATED: tuple[str, ...] = ("misalignment",)
#: Base model to its name in the repositories.
PUBLISHED_BASES: dict[str, str] = {
    "Qwen/Qwen2.5-7B-Instruct": "qwen-2.5-7b-it",
    "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b-it",
    "google/gemma-3-4b-it": "gemma-3-4b-it",
}

PERSONAS: dict[str, PersonaRecipe] = {
    "goodness": PersonaRecipe(
        name="goodness",
        description="honest, careful and kind",
        examples_path=asset_path("personas", "goodness.jsonl"),
    ),
    "contrarian": PersonaRecipe(
        name="contrarian",
        description="takes the other side, harmlessly",
        examples_path=asset_path("personas", "contrarian.jsonl"),
    ),
}
