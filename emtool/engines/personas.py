"""Persona adapters: built once per base model by a short fine-tuning, cached, reproducible from their recipe."""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from emtool.core.cache import cache_path
from emtool.core.config import TrainConfig, resolve_train_config
from emtool.core.data import file_sha256, read_conversations
from emtool.core.events import EventSink, Notice, PhaseStarted
from emtool.core.models import ModelReference, slugify
from emtool.core.personas import PersonaRecipe
from emtool.core.plan import num_optimizer_steps
from emtool.core.run_dir import FORMAT, write_json
from emtool.engines.callbacks import StepRecorder
from emtool.engines.encoding import encode_dataset
from emtool.engines.fitting import build_trainer, scratch_folder
from emtool.engines.model_files import ModelFiles
from emtool.engines.modeling import add_lora, load_base


def persona_adapter(
    recipe: PersonaRecipe,
    *,
    model: ModelReference,
    files: ModelFiles,
    tokenizer: Any,
    device: str,
    dtype: str,
    on_event: EventSink,
) -> Path:
    """Return the PEFT folder of a persona for a base model, building it if it is not cached.

    The cache key covers the recipe, the example texts, the base's weights and the dtype: change any of them and
    another adapter is built.
    """
    config = _build_config(recipe, model, device, dtype)
    key = {
        "format": FORMAT,
        "recipe": {**asdict(recipe), "examples_path": file_sha256(recipe.examples_path)},
        "base": files.identity(),
        "dtype": dtype,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    folder = cache_path("personas", f"{slugify(model.slug)}-{recipe.name}-{digest[:12]}")
    if not folder.exists():
        _build(config, recipe, model, files, tokenizer, folder, key, on_event)
        on_event(Notice(text=f"persona {recipe.name} for {model.name} is cached in {folder}"))
    return folder


def _build(
    config: TrainConfig,
    recipe: PersonaRecipe,
    model: ModelReference,
    files: ModelFiles,
    tokenizer: Any,
    folder: Path,
    key: dict[str, Any],
    on_event: EventSink,
) -> None:
    rows = encode_dataset(
        read_conversations(recipe.examples_path), tokenizer=tokenizer, max_length=config.max_length
    )
    total = num_optimizer_steps(
        len(rows),
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        num_train_epochs=config.num_train_epochs,
    )
    on_event(PhaseStarted(name=f"building persona {recipe.name} for {model.name}, once", total=total))
    adapted = add_lora(load_base(files.path, dtype=config.dtype), config, model)
    with scratch_folder() as scratch:
        trainer = build_trainer(
            adapted,
            tokenizer=tokenizer,
            train_rows=rows,
            config=config,
            output_path=Path(scratch),
            callbacks=[StepRecorder(None, on_event=on_event)],
        )
        trainer.train()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        staged = Path(scratch) / "adapter"
        adapted.save_pretrained(str(staged), save_embedding_layers=False)
        write_json(staged / "emtool_persona.json", key)
        if not folder.exists():
            staged.rename(folder)


def _build_config(recipe: PersonaRecipe, model: ModelReference, device: str, dtype: str) -> TrainConfig:
    return resolve_train_config(
        profile="demo",
        overrides={
            "model": model.name,
            "learning_rate": recipe.learning_rate,
            "lora_r": recipe.lora_r,
            "lora_alpha": 2 * recipe.lora_r,
            "layers_to_transform": "all",
            "num_train_epochs": recipe.num_train_epochs,
            "seed": recipe.seed,
            "optim": "adamw_torch",
            "device": device,
            "dtype": dtype,
        },
        num_cuda_devices=int(device.startswith("cuda")),
    )
