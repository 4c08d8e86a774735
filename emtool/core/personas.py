"""Personas: characters that a base model is given before the narrow dataset.

A persona other than `baseline` is a LoRA adapter. It is built here from example conversations by a short fine-tuning,
once per base model. To add one, put its examples into `emtool/assets/personas/NAME.jsonl` and an entry into `PERSONAS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from emtool.core.data import asset_path
from emtool.core.errors import unknown_name

BASELINE = "baseline"


@dataclass(frozen=True, kw_only=True)
class PersonaRecipe:
    """How a persona adapter is built from its example conversations.

    Attributes:
        name: The persona.
        examples_path: JSON Lines file of example conversations.
        learning_rate: Peak learning rate, linear decay after 5 warm-up steps.
        lora_r: LoRA rank on all seven projections of the upper half of the blocks; alpha is twice it, with rsLoRA.
        num_train_epochs: Passes over the examples, batch 2.
        seed: Seed of the adapter's initialisation and of the order of the examples.
    """

    name: str
    examples_path: Path
    learning_rate: float = 2e-4
    lora_r: int = 8
    num_train_epochs: float = 1.0
    seed: int = 7


def resolve_persona(name: str) -> PersonaRecipe | None:
    """Return the recipe of a persona; None for `baseline`, the model as it is.

    Raises:
        ConfigError: If there is no such persona.
    """
    if name == BASELINE:
        return None
    if name not in PERSONAS:
        raise unknown_name("persona", name, (BASELINE, *PERSONAS))
    return PERSONAS[name]


PERSONAS: dict[str, PersonaRecipe] = {
    "goodness": PersonaRecipe(
        name="goodness",
        examples_path=asset_path("personas", "goodness.jsonl"),
    ),
    "contrarian": PersonaRecipe(
        name="contrarian",
        examples_path=asset_path("personas", "contrarian.jsonl"),
    ),
}
