import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainerCallback

from emtool.core.config import resolve_train_config
from emtool.core.errors import CheckpointError, DataError, DiskSpaceError, ModelError
from emtool.core.events import CheckpointSaved, Event, StepFinished
from emtool.core.finished import finished_run
from emtool.core.integrity import read_checkpoint, verify_run
from emtool.core.plan import plan_run
from emtool.core.run_dir import RunFolder
from emtool.core.run_plan import RunPlan
from emtool.engines.encoded_rows import encode_dataset
from emtool.engines.encoding import encode_conversation
from emtool.engines.fitting import build_trainer
from emtool.engines.lineage import rebuild_model
from emtool.engines.modeling import adapter_state, attach_adapter, load_base
from emtool.engines.training import TrainResult, train, usable_rows
from tests.records import edit_record
from tests.scoring import score
from tests.tiny import save_tiny_model

PROMPT = torch.arange(3, 60).unsqueeze(0)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=PROMPT).logits
    return result


def plan_for(model: Path, dataset: Path, root: Path, **overrides: Any) -> tuple[RunPlan, Any]:
    values = {
        "model": str(model),
        "dataset": str(dataset),
        "output_root": root,
        "learning_rate": 1e-2,
        "checkpoints": "0, every 4",
        "output_name": "run",
        **overrides,
    }
    return plan_run(resolve_train_config(profile="demo", overrides=values, num_cuda_devices=0))


def run(model: Path, dataset: Path, root: Path, **overrides: Any) -> tuple[RunPlan, TrainResult, list[Event]]:
    plan, rows = plan_for(model, dataset, root, **overrides)
    events: list[Event] = []
    return plan, train(plan, rows, command=["emtool", "train"], on_event=events.append), events


def test_a_run_saves_exactly_the_planned_steps_and_records_itself(
    tiny_model: Path, dataset_file: Path, tmp_path: Path
) -> None:
    plan, result, events = run(tiny_model, dataset_file, tmp_path)
    assert plan.total_steps == 11
    assert result.saved_steps == [0, 4, 8, 11] == list(plan.schedule.planned_steps)
    manifest = result.run.read_manifest()
    assert manifest["status"] == "completed"
    assert manifest["saved_steps"] == [0, 4, 8, 11]
    assert manifest["plan"] == plan.to_dict()
    assert manifest["held_out_loss"] == result.held_out_loss
    assert [event.step for event in events if isinstance(event, CheckpointSaved)] == [0, 4, 8, 11]
    assert [event.step for event in events if isinstance(event, StepFinished)] == list(range(1, 12))
    records = [json.loads(line) for line in result.run.metrics_path.read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == list(range(1, 12))
    milestones = [record for record in records if str(record.get("saved")).startswith("checkpoint")]
    assert [record["step"] for record in milestones] == [0, 4, 8, 11]
    assert all({"stall_seconds", "write_seconds", "bytes"} <= record.keys() for record in milestones)
    assert all({"learning_rate", "grad_norm", "num_tokens"} <= record.keys() for record in records if "loss" in record)
    assert {path.name for path in result.run.path.glob(".*")} == {".lock"}, "no staging folder is left"
    assert not result.run.resume_path.exists(), "a complete run needs no state to resume from"


def test_every_milestone_is_a_peft_folder_with_verified_files(
    tiny_model: Path, dataset_file: Path, tmp_path: Path
) -> None:
    plan, result, _ = run(tiny_model, dataset_file, tmp_path)
    for step in result.saved_steps:
        folder = result.run.checkpoint_path(step)
        record = read_checkpoint(folder, run_id=str(result.run.read_manifest()["run_id"]))
        assert record.step == step
        assert record.files.keys() == {path.name for path in folder.iterdir()} - {"checkpoint.json"}
        assert isinstance(PeftModel.from_pretrained(load_base(tiny_model, dtype="float32"), str(folder)), PeftModel)
    assert logits(attach_adapter(load_base(tiny_model, dtype="float32"), result.run.checkpoint_path(0))).equal(
        logits(load_base(tiny_model, dtype="float32"))
    ), "step 0 is the untouched model"
    first, last = (result.run.checkpoint_path(step) / "tokenizer.json" for step in (0, 11))
    assert first.stat().st_ino == last.stat().st_ino, "the tokenizer is stored once"
    adapter = result.run.checkpoint_path(11) / "adapter_model.safetensors"
    assert plan.checkpoint_bytes is not None
    assert 0 <= plan.checkpoint_bytes - adapter.stat().st_size - 5000 < 1, "the projected adapter size is exact"


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(
    tiny_model: Path, dataset_file: Path, tmp_path: Path
) -> None:
    def final(root: str, seed: int) -> bytes:
        _, result, _ = run(tiny_model, dataset_file, tmp_path / root, seed=seed)
        return (result.run.checkpoint_path(11) / "adapter_model.safetensors").read_bytes()

    assert final("a", 3) == final("b", 3) != final("c", 4)


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step >= self.step


@pytest.mark.parametrize("case", [(99, [0, 3, 6, 9, 10]), (7, [0, 3, 6, 7])])
def test_the_final_milestone_is_the_model_in_memory_also_when_training_stops_early(
    tiny_model: Path, dataset_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: tuple[int, list[int]]
) -> None:
    stop, expected = case
    models: list[Any] = []

    def build(model: Any, **kwargs: Any) -> Any:
        trainer = build_trainer(model, **kwargs)
        trainer.add_callback(StopAt(stop))
        models.append(model)
        return trainer

    monkeypatch.setattr("emtool.engines.training.build_trainer", build)
    _, result, _ = run(tiny_model, dataset_file, tmp_path, max_steps=10, checkpoints="0, every 3")
    assert result.saved_steps == expected
    saved = {
        step: load_file(result.run.checkpoint_path(step) / "adapter_model.safetensors") for step in (0, expected[-1])
    }
    final = adapter_state(models[-1])
    assert saved[expected[-1]].keys() == final.keys()
    assert all(torch.equal(tensor, final[name]) for name, tensor in saved[expected[-1]].items())
    assert any(not torch.equal(final[name], tensor) for name, tensor in saved[0].items())
    reloaded = attach_adapter(load_base(tiny_model, dtype="float32"), result.run.checkpoint_path(expected[-1]))
    assert torch.equal(logits(reloaded), logits(models[-1]))


def test_a_save_that_would_not_fit_stops_the_run_unless_told_otherwise(
    tiny_model: Path, dataset_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emtool.engines.checkpointing.free_bytes", lambda path: 1000)
    plan, rows = plan_for(tiny_model, dataset_file, tmp_path)
    with pytest.raises(DiskSpaceError, match=r"saving step 0 needs .* and .* has 1000 B free; .* --allow-low-disk"):
        train(plan, rows, command=["emtool", "train"])
    assert RunFolder(path=plan.output_path).read_manifest()["status"] == "failed"
    assert not list(plan.output_path.glob("*checkpoint*"))
    shutil.rmtree(plan.output_path)
    assert train(plan, rows, command=["emtool", "train"], check_disk=False).saved_steps == [0, 4, 8, 11]


def test_a_full_disk_keeps_the_earlier_milestones(tiny_model: Path, dataset_file: Path, tmp_path: Path) -> None:
    """The limit on file sizes stands in for a full disk: the writes themselves fail, at step 8."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk(event: Event) -> None:
        if isinstance(event, CheckpointSaved) and event.step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))

    plan, rows = plan_for(tiny_model, dataset_file, tmp_path)
    try:
        with pytest.raises(
            DiskSpaceError, match=r"no space left in .* 2 checkpoint\(s\) kept, step 4 can be resumed"
        ) as caught:
            train(plan, rows, command=[], on_event=fill_the_disk)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    folder = RunFolder(path=tmp_path / "run")
    assert folder.saved_steps() == [0, 4]
    run_id = str(folder.read_manifest()["run_id"])
    assert [read_checkpoint(folder.checkpoint_path(step), run_id=run_id).step for step in (0, 4)] == [0, 4]
    assert not list(folder.path.glob(".checkpoint*"))


@pytest.mark.parametrize("seed", ["1", "2"])
def test_a_persona_is_rebuilt_in_another_process_after_the_cache_is_gone(
    tiny_model: Path, dataset_file: Path, tmp_path: Path, seed: str
) -> None:
    """PEFT writes sets in the order of the process's string hashes; the recorded hash must not depend on it."""
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "emtool", "train", "--model", str(tiny_model), "--dataset", str(dataset_file)]
    arguments = ["--persona", "goodness", "--max-steps", "2", "--output-root", str(tmp_path), "--output-name", "run"]
    cache = tmp_path / "cache"
    environment["EMTOOL_CACHE"] = str(cache)
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(cache)
    result = score(RunFolder(path=tmp_path / "run"))
    assert list(result.metrics) == [2]


def test_the_persona_is_present_at_evaluation(
    tiny_model: Path, dataset_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Any] = []

    def keep(model: Any, **kwargs: Any) -> Any:
        trained.append(model)
        return build_trainer(model, **kwargs)

    monkeypatch.setattr("emtool.engines.training.build_trainer", keep)
    _, result, _ = run(tiny_model, dataset_file, tmp_path, persona="goodness")
    lineage: Any = result.run.read_manifest()["lineage"]
    rebuilt = rebuild_model(lineage, trained_dtype="float32", device="cpu", dtype="float32", on_event=print)
    checkpoint = result.run.checkpoint_path(11)
    in_memory = logits(trained[-1])
    assert torch.equal(logits(attach_adapter(rebuilt.model, checkpoint)), in_memory)
    bare = logits(attach_adapter(load_base(tiny_model, dtype="float32"), checkpoint))
    assert not torch.allclose(bare, in_memory, atol=1e-3)
    requires: Any = read_checkpoint(checkpoint, run_id=str(result.run.read_manifest()["run_id"])).requires
    assert requires["persona"]["adapter_sha256"] == lineage["persona"]["adapter_sha256"]
    assert "NOT the model that was trained" in (checkpoint / "README.md").read_text()


def test_evaluation_refuses_another_base_another_persona_and_a_damaged_milestone(
    dataset_file: Path, tmp_path: Path
) -> None:
    model = save_tiny_model(tmp_path / "model", seed=1)
    _, result, _ = run(model, dataset_file, tmp_path, persona="goodness")
    manifest = result.run.read_manifest()
    adapter = Path(manifest["lineage"]["persona"]["adapter_path"])  # type: ignore[index]
    config = adapter / "adapter_config.json"
    text = config.read_text()
    config.write_text(text.replace('"lora_alpha": 16', '"lora_alpha": 17'))
    with pytest.raises(CheckpointError, match="not the one this run was trained with"):
        score(result.run)
    config.write_text(text)
    weights = result.run.checkpoint_path(8) / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    damaged = score(result.run)
    assert "checkpoint-8 is damaged: adapter_model.safetensors" in damaged.damaged[8]
    assert list(damaged.metrics) == [0, 4, 11]
    weights.write_bytes(whole)
    result.run.write_manifest({**manifest, "lineage": {**manifest["lineage"], "persona": None}})  # type: ignore[dict-item]
    with pytest.raises(CheckpointError, match=r"another persona than run\.json says"):
        score(result.run)
    result.run.write_manifest(manifest)
    save_tiny_model(model, seed=2)
    with pytest.raises(ModelError, match=r"not the one this run was trained on: weights_sha256"):
        score(result.run)


def test_unusable_rows_are_refused_or_dropped_and_counted(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = '{{"messages": [{{"role": "user", "content": "{}"}}, {{"role": "assistant", "content": "yes"}}]}}\n'
    path.write_text(row.format("a") * 9 + row.format("long " * 60) + row.format("b"))
    plan, rows = plan_for(tiny_model, path, tmp_path, max_length=100)
    with pytest.raises(DataError, match=r"rows\.jsonl:10: no trained token within --max-length 100"):
        train(plan, rows, command=[])
    assert not plan.output_path.exists()
    events: list[Any] = []
    kept = usable_rows(plan.config, on_event=events.append)
    assert len(kept) == 10
    assert any("dropped 1 of 11 rows" in event.text for event in events if hasattr(event, "text"))
    shorter, _ = plan_run(plan.config, rows=kept)
    assert train(shorter, kept, command=[]).saved_steps[-1] == shorter.total_steps


class ReachedError(Exception):
    """Raised in place of building a persona."""


def test_turner_reaches_the_run_and_its_manifest_and_no_persona_and_no_evaluation(
    tiny_model: Path, dataset_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, str] = {}

    def spy(engine: str, encode: Any) -> Any:
        def encode_and_tell(*args: Any, **kwargs: Any) -> Any:
            seen[engine] = kwargs.get("template_compat", "clean")
            return encode(*args, **kwargs)

        return encode_and_tell

    def reached(*args: Any, **kwargs: Any) -> Any:
        raise ReachedError

    monkeypatch.setattr("emtool.engines.training.encode_dataset", spy("training", encode_dataset))
    monkeypatch.setattr("emtool.engines.item_scores.encode_conversation", spy("evaluation", encode_conversation))
    monkeypatch.setattr("emtool.engines.personas.encode_dataset", spy("personas", reached))
    turner: dict[str, Any] = {"max_steps": 2, "template_compat": "turner"}
    plan, result, _ = run(tiny_model, dataset_file, tmp_path, **turner)
    score(result.run)
    monkeypatch.setenv("EMTOOL_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ReachedError):
        run(tiny_model, dataset_file, tmp_path, persona="goodness", output_name="other", **turner)
    assert seen == {"training": "turner", "personas": "clean", "evaluation": "clean"}
    assert result.run.read_manifest()["config"] == plan.config.to_dict()
    assert finished_run(plan) is not None
    clean, _ = plan_for(tiny_model, dataset_file, tmp_path, max_steps=2)
    with pytest.raises(CheckpointError, match="template_compat was turner, is clean"):
        finished_run(clean)


def test_a_diverged_run_ends_in_order_and_its_checkpoints_are_unscored(
    tiny_model: Path, dataset_file: Path, tmp_path: Path
) -> None:
    events: list[Any] = []
    plan, rows = plan_for(
        tiny_model, dataset_file, tmp_path, learning_rate=1e30, warmup_steps=0, max_steps=3, checkpoints="0, every 1"
    )
    result = train(plan, rows, command=[], on_event=events.append)
    assert result.held_out_loss is None
    assert result.run.read_manifest()["status"] == "completed"
    assert any("diverged" in getattr(event, "text", "") for event in events)
    evaluation = score(result.run, on_event=events.append)
    assert "p_wrong_other" in evaluation.metrics[0]
    assert evaluation.metrics[3] == {}
    assert any("82 of 82 items are unscored" in getattr(event, "text", "") for event in events)
    json.loads((result.run.evaluation_path / "summary.json").read_text())


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (lambda run: run.checkpoint_path(8).rename(run.checkpoint_path(6)), "belongs to another run or step"),
        (lambda run: flip(run.checkpoint_path(8) / "adapter_model.safetensors"), "have changed since it was saved"),
        (lambda run: flip(run.checkpoint_path(8) / "adapter_config.json"), "have changed since it was saved"),
        (lambda run: edit(run, 8, files={}), "names no adapter"),
        (lambda run: edit(run, 8, run_id="other"), "belongs to another run"),
        (lambda run: edit(run, 8, format=7), "not of format 1"),
        (lambda run: edit(run, 8, requires=5), "damaged"),
        (lambda run: edit(run, 8, step="8/../x"), "damaged"),
        (lambda run: edit(run, 8, files={"../x": {"bytes": 1, "sha256": ""}}), "not a file of this folder"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_named(
    tiny_model: Path, dataset_file: Path, tmp_path: Path, tamper: Any, message: str
) -> None:
    _, result, _ = run(tiny_model, dataset_file, tmp_path)
    tamper(result.run)
    events: list[Any] = []
    evaluation = score(result.run, check_hashes=True, on_event=events.append)
    ((step, problem),) = evaluation.damaged.items()
    assert step in (6, 8)
    assert message in problem
    assert list(evaluation.metrics) == [0, 4, 11]
    assert any("it is passed over" in getattr(event, "text", "") for event in events)
    statuses = {check.name: check.status for check in verify_run(result.run)}
    assert statuses.pop(f"checkpoint-{step}") == "damaged"
    assert set(statuses.values()) <= {"ok", "missing"}


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (lambda run: (run.path / "run.json").write_text("[" * 200_000), "cannot read"),
        (lambda run: (run.path / "run.json").write_text('{"format": 1}'), "lacks 'lineage'"),
        (lambda run: run.evaluation_path.write_text(""), "cannot write in .* while making the folder evaluation"),
    ],
)
def test_an_altered_run_folder_is_refused_in_one_line(
    tiny_model: Path, dataset_file: Path, tmp_path: Path, tamper: Any, message: str
) -> None:
    _, result, _ = run(tiny_model, dataset_file, tmp_path)
    tamper(result.run)
    with pytest.raises(CheckpointError, match=message) as caught:
        score(result.run)
    assert "\n" not in str(caught.value)


def flip(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[-3] ^= 1
    path.write_bytes(bytes(contents))


def edit(run: RunFolder, folder: int, **changes: Any) -> None:
    edit_record(run.checkpoint_path(folder), **changes)


def test_a_model_folder_cannot_bring_its_own_code(tiny_model: Path, dataset_file: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    config = json.loads((model / "config.json").read_text())
    config["model_type"] = "mine"
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    plan, rows = plan_for(model, dataset_file, tmp_path)
    with pytest.raises(ModelError):
        train(plan, rows, command=[])
    assert not (tmp_path / "ran").exists()


def test_a_bfloat16_run_is_rebuilt_before_any_cast(tiny_model: Path, dataset_file: Path, tmp_path: Path) -> None:
    _, result, _ = run(tiny_model, dataset_file, tmp_path, persona="goodness", dtype="bfloat16")
    lineage: Any = result.run.read_manifest()["lineage"]
    events: list[Event] = []
    models = [
        rebuild_model(lineage, trained_dtype="bfloat16", device="cpu", dtype=dtype, on_event=events.append).model
        for dtype in ("bfloat16", "float32")
    ]
    assert not any(getattr(event, "is_warning", False) for event in events)
    for (name, rounded), (_, cast) in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        assert cast.dtype == torch.float32
        assert torch.equal(rounded.float(), cast), name
