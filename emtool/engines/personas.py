"""Persona adapters: built once per base model by a short fine-tuning, cached, reproducible from their recipe."""

from __future__ import annotations

import gc
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from emtool.core.cache import cache_path, publish_cached
from emtool.core.config import HOUSEKEEPING, TrainConfig, resolve_train_config
from emtool.core.data import file_sha256, read_conversations
from emtool.core.events import EventSink, Notice, PhaseStarted
from emtool.core.integrity import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from emtool.core.persona_list import BUILD_RECORD, built_folder_name
from emtool.core.personas import PersonaRecipe
from emtool.core.plan import num_optimizer_steps
from emtool.core.run_dir import FORMAT, write_json
from emtool.core.staging import remove_folder
from emtool.engines.encoded_rows import encode_dataset
from emtool.engines.fitting import build_trainer, scratch_folder
from emtool.engines.modeling import BaseModel, add_lora, load_base
from emtool.engines.step_recorder import StepRecorder

#: Fields that do not shape the adapter, or have one value in every recipe.
_NOT_IN_KEY = ("model", "device", "keep_optimizer", "persona_adapter", "persona_mode", "template_compat")


def persona_adapter(recipe: PersonaRecipe, base: BaseModel, *, on_event: EventSink) -> Path:
    """Return the PEFT folder of a persona for a base model, building it if it is not cached."""
    folder, key = _place(recipe, base)
    if folder.exists() and not all((folder / name).is_file() for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)):
        on_event(Notice(text=f"the cached persona {folder} is not whole; it is built again", is_warning=True))
        remove_folder(folder)
    if not folder.exists():
        adapted = _build(recipe, base, on_event)
        _publish(adapted, folder, key, base.reference.name)
        on_event(Notice(text=f"persona {recipe.name} for {base.reference.name} is cached in {folder}"))
    return folder


def built_path(recipe: PersonaRecipe, base: BaseModel) -> Path:
    """Return the folder that a persona's adapter for a base model is cached in, whether it is there or not."""
    return _place(recipe, base)[0]


def _place(recipe: PersonaRecipe, base: BaseModel) -> tuple[Path, dict[str, Any]]:
    """Return the cache folder of a persona, and the key that it is named after.

    The key covers the example texts, the base's weights and every hyper-parameter: change any of them and another
    adapter is built.
    """
    hyper_parameters = _build_config(recipe, base).to_dict()
    for name in (*_NOT_IN_KEY, *HOUSEKEEPING):
        hyper_parameters.pop(name, None)
    key = {
        "format": FORMAT,
        "persona": recipe.name,
        "examples_sha256": file_sha256(recipe.examples_path),
        "base": base.files.identity(),
        "hyper_parameters": hyper_parameters,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_path("personas", built_folder_name(recipe, base.reference, digest[:12])), key


def _build(recipe: PersonaRecipe, base: BaseModel, on_event: EventSink) -> Any:
    config = _build_config(recipe, base)
    rows = encode_dataset(
        read_conversations(recipe.examples_path), tokenizer=base.tokenizer, max_length=config.max_length
    )
    total = num_optimizer_steps(
        len(rows),
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        num_train_epochs=config.num_train_epochs,
    )
    on_event(PhaseStarted(name=f"building persona {recipe.name} for {base.reference.name}, once", total=total))
    adapted = add_lora(load_base(base.files.path, dtype=config.dtype), config, base.reference)
    with scratch_folder() as scratch:
        trainer = build_trainer(
            adapted,
            tokenizer=base.tokenizer,
            train_rows=rows,
            config=config,
            output_path=Path(scratch),
            callbacks=[StepRecorder(None, on_event=on_event)],
        )
        trainer.train()
        # The optimizer's state and, on CUDA, the model's memory are needed again at once.
        del trainer
        gc.collect()
    return adapted


def _publish(adapted: Any, folder: Path, key: dict[str, Any], base_name: str) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        staged = Path(scratch) / "adapter"
        adapted.save_pretrained(str(staged), save_embedding_layers=False)
        write_json(staged / BUILD_RECORD, {**key, "base_name": base_name})
        publish_cached(staged, folder)


def _build_config(recipe: PersonaRecipe, base: BaseModel) -> TrainConfig:
    return resolve_train_config(
        profile="demo",
        overrides={
            "model": base.reference.name,
            "learning_rate": recipe.learning_rate,
            "lora_r": recipe.lora_r,
            "lora_alpha": 2 * recipe.lora_r,
            "num_train_epochs": recipe.num_train_epochs,
            "seed": recipe.seed,
            "optim": "adamw_torch",
            "device": base.device,
            "dtype": base.dtype,
        },
        num_cuda_devices=int(base.device == "cuda"),
    )
