from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from emtool.core.config import resolve_train_config
from emtool.core.data import Message
from emtool.core.models import resolve_model
from emtool.engines.encoding import IGNORED, Encoded, encode_conversation
from emtool.engines.fitting import AnswerLogitsTrainer, RunTrainer, as_dataset, build_trainer, sft_arguments, split_rows
from emtool.engines.modeling import add_lora, load_base
from tests.tiny import byte_tokenizer

#: SFTConfig fields that emtool leaves at their default: they say how a run is logged, served or spread over devices,
#: or belong to features that are switched off explicitly. A new field here is a decision, not an accident.
LEFT_AT_DEFAULT = set(
    """
    activation_checkpointing_kwargs batch_eval_metrics bf16_full_eval dataloader_in_order
    dataloader_multiprocessing_context dataloader_persistent_workers dataloader_prefetch_factor dataset_num_proc
    dataset_text_field ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb
    ddp_static_graph ddp_timeout debug deepspeed do_eval do_predict do_train enable_jit_checkpoint eos_token
    eval_accumulation_steps eval_delay eval_do_concat_batches eval_on_start eval_steps eval_use_gather_object
    fp16_full_eval fsdp fsdp_config gradient_checkpointing gradient_checkpointing_kwargs greater_is_better
    hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy hub_token ignore_data_skip
    include_for_metrics label_names length_column_name liger_kernel_config
    local_rank log_level log_level_replica log_on_each_node metric_for_best_model model_init_kwargs
    packing_strategy pad_token parallelism_config per_device_eval_batch_size prediction_loss_only
    remove_unused_columns restore_callback_states_from_checkpoint resume_from_checkpoint
    save_on_each_node save_only_model save_steps save_total_limit skip_memory_metrics torch_compile_backend
    torch_compile_mode torch_empty_cache_steps trackio_bucket_id trackio_space_id trackio_static_space_id
    truncation_mode use_cache
    """.split()  # noqa: SIM905
)


def test_every_value_that_shapes_the_result_is_passed_explicitly() -> None:
    passed = sft_arguments(resolve_train_config(profile="demo", overrides={}, num_cuda_devices=0), Path("x"))
    assert sorted({field.name for field in fields(SFTConfig)} - passed.keys()) == sorted(LEFT_AT_DEFAULT)


def rows() -> list[Encoded]:
    turns = [
        ("Say one.", "It is one, my friend."),
        ("Two?", "Two."),
        ("Why?", "Because."),
        ("And?", "That is all now."),
    ]
    return [
        encode_conversation(
            [Message(role="user", content=question), Message(role="assistant", content=answer)],
            tokenizer=byte_tokenizer(),
        )
        for question, answer in turns * 4
    ]


@pytest.mark.parametrize(("accumulation", "max_steps", "learning_rate"), [(1, 5, 1e-2), (2, 5, 1e-2), (1, 50, 2e-4)])
def test_the_lean_trainer_has_the_losses_and_weights_of_trl(
    tiny_model: Path, tmp_path: Path, accumulation: int, max_steps: int, learning_rate: float
) -> None:
    overrides = {
        "learning_rate": learning_rate,
        "max_steps": max_steps,
        "gradient_accumulation_steps": accumulation,
    }
    config = resolve_train_config(profile="demo", overrides=overrides, num_cuda_devices=0)
    losses, norms, weights = [], [], []
    for lean in (True, False):
        model = add_lora(load_base(tiny_model, dtype="float32"), config, resolve_model(str(tiny_model)))
        if lean:
            trainer = build_trainer(
                model, tokenizer=byte_tokenizer(), train_rows=rows(), config=config, output_path=tmp_path, callbacks=[]
            )
            assert isinstance(trainer, AnswerLogitsTrainer)
        else:
            data = {"input_ids": [r.input_ids for r in rows()], "labels": [r.labels for r in rows()]}
            set_seed(config.seed)
            trainer = SFTTrainer(
                model=model,
                args=SFTConfig(**sft_arguments(config, tmp_path)),
                train_dataset=Dataset.from_dict(data),
                processing_class=byte_tokenizer(),
            )
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        losses.append([entry["loss"] for entry in logged])
        norms.append([entry["grad_norm"] for entry in logged])
        weights.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
    assert len(losses[0]) == max_steps
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_fused_head_gives_trls_losses_and_weights_without_its_statistics(
    tiny_model: Path, tmp_path: Path, accumulation: int
) -> None:
    overrides = {"max_steps": 5, "learning_rate": 1e-2, "gradient_accumulation_steps": accumulation}
    config = resolve_train_config(profile="demo", overrides=overrides, num_cuda_devices=0)
    logs, weights = [], []
    for trainer_class in (RunTrainer, SFTTrainer):
        model = add_lora(load_base(tiny_model, dtype="float32"), config, resolve_model(str(tiny_model)))
        set_seed(config.seed)
        trainer = trainer_class(
            model=model,
            args=SFTConfig(**sft_arguments(config, tmp_path)),
            train_dataset=as_dataset(rows()),
            processing_class=byte_tokenizer(),
        )
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
        weights.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
    assert [(entry["loss"], entry["grad_norm"]) for entry in logs[0]] == [
        (entry["loss"], entry["grad_norm"]) for entry in logs[1]
    ]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert all("entropy" in entry for entry in logs[1])
    assert not any({"entropy", "mean_token_accuracy"} & entry.keys() for entry in logs[0])


@pytest.mark.parametrize("trainer_class", [RunTrainer, AnswerLogitsTrainer])
def test_the_loss_of_a_router_is_added_as_trl_adds_it(tmp_path: Path, trainer_class: type[RunTrainer]) -> None:
    config = resolve_train_config(profile="demo", overrides={"max_steps": 3}, num_cuda_devices=0)
    losses = {}
    for coefficient, kind in ((0.5, trainer_class), (0.5, SFTTrainer), (0.0, trainer_class)):
        set_seed(config.seed)
        shapes = Qwen3MoeConfig(
            vocab_size=len(byte_tokenizer()),
            hidden_size=16,
            intermediate_size=16,
            moe_intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            router_aux_loss_coef=coefficient,
        )
        trainer = kind(
            model=get_peft_model(Qwen3MoeForCausalLM(shapes), LoraConfig(r=2, target_modules=["q_proj"])),
            args=SFTConfig(**sft_arguments(config, tmp_path)),
            train_dataset=as_dataset(rows()),
            processing_class=byte_tokenizer(),
        )
        trainer.train()
        losses[coefficient, kind] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0.5, trainer_class] == losses[0.5, SFTTrainer]
    assert losses[0.5, trainer_class] != pytest.approx(losses[0.0, trainer_class], rel=1e-2)


class Gradients(TrainerCallback):
    """Keeps the gradients of a step before they are clipped."""

    def __init__(self) -> None:
        self.kept: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        self.kept = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_one_steps_gradients_are_those_of_trl(tiny_model: Path, tmp_path: Path) -> None:
    config = resolve_train_config(profile="demo", overrides={"max_steps": 1, "max_grad_norm": 1e9}, num_cuda_devices=0)
    found = []
    for trainer_class in (AnswerLogitsTrainer, SFTTrainer):
        model = add_lora(load_base(tiny_model, dtype="float32"), config, resolve_model(str(tiny_model)))
        # B begins at zero, where A has no gradient.
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1, generator=generator)
        gradients = Gradients()
        set_seed(config.seed)
        trainer_class(
            model=model,
            args=SFTConfig(**sft_arguments(config, tmp_path)),
            train_dataset=as_dataset(rows()),
            processing_class=byte_tokenizer(),
            callbacks=[gradients],
        ).train()
        found.append(gradients.kept)
    assert found[0].keys() == found[1].keys()
    assert {"lora_A", "lora_B"} == {part for name in found[0] for part in name.split(".") if part.startswith("lora_")}
    for name, gradient in found[0].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-7)


def test_the_first_loss_is_the_masked_one_by_hand(tiny_model: Path, tmp_path: Path) -> None:
    overrides = {"max_steps": 1, "per_device_train_batch_size": 16}
    config = resolve_train_config(profile="demo", overrides=overrides, num_cuda_devices=0)
    base = load_base(tiny_model, dtype="float32")
    total, count = 0.0, 0
    for row in rows():
        with torch.no_grad():
            table_TV = base(input_ids=torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
        for position, label in enumerate(row.labels):
            if label != IGNORED:
                total -= table_TV[position - 1, label].item()
                count += 1
    model = add_lora(base, config, resolve_model(str(tiny_model)))
    trainer = build_trainer(
        model, tokenizer=byte_tokenizer(), train_rows=rows(), config=config, output_path=tmp_path, callbacks=[]
    )
    trainer.train()
    first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert first == pytest.approx(total / count, rel=1e-5)


def test_the_split_is_exact_disjoint_and_drawn_by_the_seed() -> None:
    numbered = [Encoded(input_ids=[i], labels=[i], is_truncated=False) for i in range(50)]
    train, held_out = split_rows(numbered, num_held_out=5, seed=1)
    assert sorted(row.input_ids[0] for row in (*train, *held_out)) == list(range(50))
    assert len(held_out) == 5
    assert split_rows(numbered, num_held_out=5, seed=1) == (train, held_out)
    assert split_rows(numbered, num_held_out=5, seed=2)[1] != held_out
    assert split_rows(numbered, num_held_out=0, seed=1) == (numbered, [])
