"""Estimated bytes against what real runs write: emtool's own, and a Trainer's full checkpoints."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from emtool.core.architecture import shapes_from_config
from emtool.core.config import resolve_train_config
from emtool.core.disk import folder_bytes
from emtool.core.estimate import ADAPTER_FILE, MODEL_FILE, OPTIMIZER_FILE
from emtool.core.plan import DiskOptions, plan_run
from emtool.engines.callbacks import ScheduledCheckpointCallback
from emtool.engines.training import train
from tests.scoring import score
from tests.tiny import byte_tokenizer

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
#: Family, changes to its sizes, options of the run. Every adapter has at least 4 MB.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama, half the blocks, DoRA": (
        "llama",
        {"num_hidden_layers": 6},
        {"lora_r": 128, "layers_to_transform": "upper-half", "use_dora": True, "optim": "adamw_torch"},
    ),
    "qwen2, tied, embeddings saved, bfloat16": (
        "qwen2",
        {"tie_word_embeddings": True, "vocab_size": 4096},
        {"lora_r": 64, "modules_to_save": ("embed_tokens",), "dtype": "bfloat16", "optim": "adamw_torch_fused"},
    ),
    "gemma3, tied, adafactor": ("gemma3_text", {"head_dim": 64}, {"lora_r": 64, "optim": "adafactor"}),
    "mistral, two targets, head saved, sgd": (
        "mistral",
        {"vocab_size": 2048},
        {"lora_r": 256, "target_modules": "q_proj,down_proj", "modules_to_save": ("lm_head",), "optim": "sgd"},
    ),
    "phi3, regular expression": ("phi3", {}, {"lora_r": 256, "target_modules": r".*\.(qkv_proj|gate_up_proj)"}),
    "gpt_neox, all biases, saved in bfloat16": (
        "gpt_neox",
        {"num_key_value_heads": 4},
        {"lora_r": 96, "lora_bias": "all", "save_dtype": "bfloat16"},
    ),
    "qwen2, biases of the adapted layers": ("qwen2", {}, {"lora_r": 64, "lora_bias": "lora_only"}),
}


@pytest.fixture
def model_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    family, changes, _ = CASES[request.param]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **changes})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def planned(folder: Path, dataset: Path, case: str, tmp_path: Path, **options: Any) -> Any:
    overrides = {
        "model": str(folder),
        "dataset": str(dataset),
        "max_steps": 4,
        "checkpoints": "0, 2",
        "layers_to_transform": "all",
        "keep_resume": True,
        "keep_optimizer": options.get("full_finetuning", False),
        "output_root": tmp_path / "outputs",
        **CASES[case][2],
    }
    config = resolve_train_config(profile="demo", overrides=overrides, num_cuda_devices=0)
    return plan_run(config, options=DiskOptions(**options))


def within(share: float, actual: int, estimated: int) -> bool:
    return abs(actual - estimated) <= share * actual


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    ("model_folder", "case"), [(case, case) for case in CASES], indirect=["model_folder"], ids=CASES
)
def test_bytes_are_those_of_a_real_run(model_folder: Path, case: str, dataset_file: Path, tmp_path: Path) -> None:
    plan, rows = planned(model_folder, dataset_file, case, tmp_path)
    assert plan.estimate.shapes_source == "config.json"
    result = train(plan, rows, command=["test"])
    first = result.run.checkpoint_path(0)
    assert (first / ADAPTER_FILE).stat().st_size == plan.estimate.checkpoint[ADAPTER_FILE] >= 2_000_000
    written = sum_of_distinct_inodes(result.run.path)
    assert within(0.01, written, plan.total_bytes), (written, plan.total_bytes)
    assert score(result.run, steps="final").metrics.keys() == {4}
    state = {path.name: path.stat().st_size for path in result.run.resume_state_path(4).iterdir()}
    tokenizer = {path.name for path in model_folder.iterdir()} & state.keys()
    check_files({name: size for name, size in state.items() if name not in tokenizer}, plan, ADAPTER_FILE)


def test_bytes_of_full_finetuning_are_those_of_a_trainer(dataset_file: Path, tmp_path: Path) -> None:
    config = AutoConfig.for_model("llama", **SIZES)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    case = "qwen2, biases of the adapted layers"
    plan, _ = planned(tmp_path / "model", dataset_file, case, tmp_path, full_finetuning=True)
    assert plan.estimate.num_trainable_parameters == sum(p.numel() for p in model.parameters())
    check_files(trained_by_a_trainer(model, plan, tmp_path / "full"), plan, MODEL_FILE)
    assert {OPTIMIZER_FILE, "rng_state.pth"} <= plan.estimate.checkpoint.keys()


def trained_by_a_trainer(model: Any, plan: Any, folder: Path) -> dict[str, int]:
    """Train with a plain Trainer and return the sizes of its last checkpoint's files."""
    ids = [[3 + (row + column) % 250 for column in range(8)] for row in range(16)]
    arguments = TrainingArguments(
        str(folder),
        max_steps=plan.total_steps,
        per_device_train_batch_size=2,
        optim=plan.config.optim,
        bf16=plan.config.dtype == "bfloat16",
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}))
    ScheduledCheckpointCallback(plan.schedule).attach(trainer)
    trainer.train()
    last = folder / f"checkpoint-{plan.total_steps}"
    return {path.name: path.stat().st_size for path in last.iterdir()}


def check_files(actual: dict[str, int], plan: Any, weights: str) -> None:
    """Compare the state that training resumes from with its estimate, file by file."""
    estimated = plan.estimate.resume
    assert set(actual) == set(estimated)
    assert actual[weights] == estimated[weights] >= 4_000_000
    assert within(0.01, actual[OPTIMIZER_FILE], estimated[OPTIMIZER_FILE]), (actual, estimated)
    assert within(0.01, sum(actual.values()), sum(estimated.values())), (actual, estimated)
    small = {name for name in actual if name not in (weights, OPTIMIZER_FILE)}
    assert all(actual[name] <= 1.5 * estimated[name] + 2000 for name in small), (actual, estimated)


def sum_of_distinct_inodes(run: Path) -> int:
    return folder_bytes(run) - sum(path.stat().st_size for path in run.iterdir() if path.is_file())


def test_a_multimodal_model_adapts_its_language_part_only() -> None:
    config = resolve_train_config(
        profile="paper", overrides={"model": "gemma-3-4b", "dataset": "medical"}, num_cuda_devices=0
    )
    plan, _ = plan_run(config)
    shapes = shapes_from_config(plan.model.config or {})
    assert plan.estimate is not None
    assert shapes is not None
    assert len(shapes.linear_weights) == 34 * 7
    assert all(name.startswith("model.language_model.layers.") for name in shapes.linear_weights)
    doubled, _ = plan_run(replace(config, lora_r=64))
    assert doubled.estimate is not None
    assert doubled.estimate.num_trainable_parameters == 2 * plan.estimate.num_trainable_parameters
