"""The callback in Trainers that are not emtool's: plain and SFT, whole models and adapters."""

import json
import logging
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import EarlyStoppingCallback, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from emtool import CheckpointSchedule, ScheduledCheckpointCallback
from emtool.core.errors import CheckpointError, ConfigError
from tests.tiny import byte_tokenizer, tiny_config

DOCS = Path(__file__).parents[2] / "docs" / "trainer.md"
FULL_SET = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"}


def tiny_model(*, with_adapter: bool = False) -> Any:
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(tiny_config(attention_dropout=0.1))
    if with_adapter:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1))
    return model


def rows(count: int = 24) -> Dataset:
    ids = [[3 + (row * 7 + column) % 250 for column in range(12)] for row in range(count)]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def plain_trainer(folder: Path, *, with_adapter: bool = False, **arguments: Any) -> Trainer:
    values = {"max_steps": 12, "per_device_train_batch_size": 2, "save_strategy": "no", "report_to": []}
    values |= {"use_cpu": True, "logging_steps": 1, "disable_tqdm": True, "seed": 3, **arguments}
    return Trainer(
        tiny_model(with_adapter=with_adapter),
        TrainingArguments(str(folder), **values),
        train_dataset=rows(),
        eval_dataset=rows(4),
    )


def steps_on_disk(folder: Path) -> list[int]:
    assert not list(folder.glob(".*")), "a staging folder was left behind"
    return sorted(int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*"))


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("with_adapter", [False, True], ids=["full", "lora"])
def test_a_killed_training_goes_on_bit_for_bit_from_any_scheduled_step(tmp_path: Path, with_adapter: bool) -> None:
    whole = plain_trainer(tmp_path / "whole", with_adapter=with_adapter)
    callback = ScheduledCheckpointCallback("init, 3, 7").attach(whole)
    whole.train()
    assert callback.saved_steps == steps_on_disk(tmp_path / "whole") == [0, 3, 7, 12]
    for step in (0, 3, 7):
        folder = tmp_path / "whole" / f"checkpoint-{step}"
        assert {path.name for path in folder.iterdir()} >= FULL_SET
        again = plain_trainer(tmp_path / f"from-{step}", with_adapter=with_adapter)
        again.train(resume_from_checkpoint=str(folder))
        assert losses(again)[-(12 - step) :] == losses(whole)[step:]
        states = zip(again.model.state_dict().items(), whole.model.state_dict().values(), strict=True)
        assert all(torch.equal(mine, theirs) for (_, mine), theirs in states)


def test_resume_from_the_newest_keeps_what_is_there_and_saves_what_follows(tmp_path: Path) -> None:
    class Killed(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 8:
                raise KeyboardInterrupt

    first = plain_trainer(tmp_path)
    ScheduledCheckpointCallback("init, 3, 7, 10").attach(first)
    first.add_callback(Killed())
    with pytest.raises(KeyboardInterrupt):
        first.train()
    assert steps_on_disk(tmp_path) == [0, 3, 7]
    second = plain_trainer(tmp_path)
    ScheduledCheckpointCallback("init, 3, 7, 10").attach(second)
    second.train(resume_from_checkpoint=True)
    assert steps_on_disk(tmp_path) == [0, 3, 7, 10, 12]


def test_arguments_are_saved_as_the_user_gave_them_and_given_back(tmp_path: Path) -> None:
    trainer = plain_trainer(tmp_path)
    ScheduledCheckpointCallback("5").attach(trainer)
    trainer.train()
    saved = torch.load(tmp_path / "checkpoint-5" / "training_args.bin", weights_only=False)
    assert saved.output_dir == trainer.args.output_dir == str(tmp_path)
    assert saved.save_only_model is trainer.args.save_only_model is False


def test_rotation_never_reaches_scheduled_checkpoints(tmp_path: Path) -> None:
    trainer = plain_trainer(tmp_path, save_total_limit=1)
    ScheduledCheckpointCallback("init, 2, 4, 6").attach(trainer)
    trainer.train()
    assert steps_on_disk(tmp_path) == [0, 2, 4, 6, 12]


def test_weights_only_cannot_be_resumed_by_mistake(tmp_path: Path) -> None:
    trainer = plain_trainer(tmp_path)
    ScheduledCheckpointCallback("6, !final", weights_only=True).attach(trainer)
    trainer.train()
    names = {path.name for path in (tmp_path / "checkpoint-6").iterdir()}
    assert "model.safetensors" in names
    assert not names & {"optimizer.pt", "trainer_state.json", "rng_state.pth", "scheduler.pt"}
    with pytest.raises(FileNotFoundError, match=r"trainer_state\.json"):
        plain_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_an_sft_trainer_with_epochs_in_the_schedule(tmp_path: Path) -> None:
    arguments = SFTConfig(
        str(tmp_path),
        num_train_epochs=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        tiny_model(),
        arguments,
        train_dataset=rows(),
        processing_class=byte_tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
    )
    callback = ScheduledCheckpointCallback(CheckpointSchedule.parse("init, 0.5ep, 1ep")).attach(trainer)
    trainer.train()
    assert callback.saved_steps == steps_on_disk(tmp_path) == [0, 2, 4, 8]
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").is_file()


def test_an_early_stop_is_saved_where_training_really_ended(tmp_path: Path) -> None:
    trainer = plain_trainer(
        tmp_path, eval_strategy="steps", eval_steps=2, metric_for_best_model="loss", learning_rate=0.0
    )
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=1))
    callback = ScheduledCheckpointCallback("init, 10").attach(trainer)
    trainer.train()
    assert trainer.state.global_step == 4
    assert callback.saved_steps == steps_on_disk(tmp_path) == [0, 4]


def test_without_attach_it_saves_later_steps_and_says_what_it_cannot_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = plain_trainer(tmp_path / "later")
    trainer.add_callback(ScheduledCheckpointCallback("custom, !init, 5"))
    trainer.train()
    assert steps_on_disk(tmp_path / "later") == [5, 12]

    trainer = plain_trainer(tmp_path / "zero")
    trainer.add_callback(ScheduledCheckpointCallback("custom"))
    with pytest.raises(ConfigError, match=r"saves step 0, .* call callback\.attach\(trainer\)"):
        trainer.train()

    trainer = plain_trainer(tmp_path / "sharded")
    trainer.add_callback(ScheduledCheckpointCallback("5"))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match=r"sharded .* call callback\.attach\(trainer\)"):
        trainer.callback_handler.on_train_begin(trainer.args, _state(trainer, 12), trainer.control)
    monkeypatch.delenv("ACCELERATE_USE_FSDP")

    class Stop(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 6

    trainer = plain_trainer(tmp_path / "early")
    trainer.add_callback(ScheduledCheckpointCallback("5"))
    trainer.add_callback(Stop())
    with caplog.at_level(logging.WARNING, logger="emtool.engines.callbacks"):
        trainer.train()
    assert "training ended at step 6, which is not saved" in caplog.text


def _state(trainer: Trainer, max_steps: int) -> Any:
    trainer.state.max_steps = max_steps
    return trainer.state


def test_another_training_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    for message in (None, "of an earlier training"):
        trainer = plain_trainer(tmp_path)
        ScheduledCheckpointCallback("init, 3").attach(trainer)
        if message is None:
            trainer.train()
        else:
            with pytest.raises(CheckpointError, match=message):
                trainer.train()


def test_what_would_lose_scheduled_checkpoints_is_refused(tmp_path: Path) -> None:
    trainer = plain_trainer(
        tmp_path, save_strategy="steps", eval_strategy="steps", load_best_model_at_end=True, save_steps=6, eval_steps=6
    )
    ScheduledCheckpointCallback("3").attach(trainer)
    with pytest.raises(ConfigError, match="load_best_model_at_end"):
        trainer.train()
    trainer = plain_trainer(tmp_path, save_strategy="steps", save_steps=5, save_total_limit=2)
    ScheduledCheckpointCallback("3").attach(trainer)
    with pytest.raises(ConfigError, match="save_total_limit makes the Trainer delete"):
        trainer.train()
    trainer = plain_trainer(tmp_path)
    ScheduledCheckpointCallback(CheckpointSchedule.parse("3").compile(50)).attach(trainer)
    with pytest.raises(ConfigError, match="compiled for 50 steps and the Trainer will run 12"):
        trainer.train()


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
def test_the_example_in_the_docs_prints_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        assert len([line for line in example.splitlines() if line.strip()]) <= 10
        printed: list[str] = []
        names = {"model": tiny_model(), "dataset": rows(), "print": lambda value, to=printed: to.append(str(value))}
        exec(example, names)
        assert printed == re.findall(r"print\(.*\)  # (.*)", example)


DISTRIBUTED = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.engines.test_callbacks import plain_trainer
from emtool import ScheduledCheckpointCallback
trainer = plain_trainer(Path({folder!r}), max_steps=4)
ScheduledCheckpointCallback("init, 2").attach(trainer)
trainer.train()
"""


@pytest.mark.slow
def test_two_processes_write_one_checkpoint_together(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    script = tmp_path / "train.py"
    script.write_text(DISTRIBUTED.format(root=root, folder=str(tmp_path / "out")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert steps_on_disk(tmp_path / "out") == [0, 2, 4]
    for step in (0, 2, 4):
        names = {path.name for path in (tmp_path / "out" / f"checkpoint-{step}").iterdir()}
        assert names >= {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt", "model.safetensors"}
        state = json.loads((tmp_path / "out" / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["global_step"] == step
        assert math.isclose(state["epoch"], step / 6)
