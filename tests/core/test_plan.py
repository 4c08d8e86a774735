import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from emtool.core.config import resolve_train_config
from emtool.core.data import file_sha256
from emtool.core.errors import CheckpointError, ConfigError
from emtool.core.finished import finished_run
from emtool.core.plan import num_held_out_rows, num_optimizer_steps, plan_run
from emtool.core.run_dir import RunFolder


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    args = TrainingArguments(output_dir=str(tmp_path_factory.mktemp("trainer")), use_cpu=True, report_to=[])
    return Trainer(model=torch.nn.Linear(1, 1), args=args)


@settings(max_examples=300, deadline=None)
@given(
    rows=st.integers(1, 5000),
    batch=st.integers(1, 33),
    accumulation=st.integers(1, 17),
    epochs=st.one_of(st.integers(1, 5), st.floats(0.01, 4.0)),
    max_steps=st.one_of(st.none(), st.integers(1, 500)),
)
def test_steps_are_counted_as_the_trainer_counts_them(
    trainer: Trainer, *, rows: int, batch: int, accumulation: int, epochs: float, max_steps: int | None
) -> None:
    args = copy.copy(trainer.args)
    args.gradient_accumulation_steps = accumulation
    args.num_train_epochs = epochs
    args.max_steps = -1 if max_steps is None else max_steps
    counted = trainer.set_initial_training_values(args, DataLoader(range(rows), batch_size=batch))[-1]  # type: ignore[arg-type]
    ours = num_optimizer_steps(
        rows,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=epochs,
        max_steps=max_steps,
    )
    assert ours == counted


@given(rows=st.integers(2, 3000), percent=st.integers(1, 60))
def test_held_out_rows_round_up_as_datasets_does(rows: int, percent: int) -> None:
    expected = -(-rows * percent // 100)
    assert num_held_out_rows(rows, percent / 100) in (expected, expected + 1, rows - 1)


def test_held_out_rows_equal_the_split_of_datasets() -> None:
    for rows in (882, 883, 7049, 11, 2):
        split = Dataset.from_dict({"x": list(range(rows))}).train_test_split(test_size=0.1, seed=0)
        assert num_held_out_rows(rows, 0.1) == len(split["test"])


def test_published_setting_makes_397_steps() -> None:
    plan, rows = plan_run(resolve_train_config(profile="paper", overrides={}, num_cuda_devices=0))
    assert (plan.num_rows, plan.num_train_rows, plan.total_steps) == (7049, 6344, 397)
    assert rows == []
    assert plan.output_path == Path("outputs/qwen7b_medical_baseline")


def test_demo_makes_397_steps_and_ten_checkpoints() -> None:
    overrides = {"persona": "goodness", "checkpoints": "custom"}
    plan, rows = plan_run(resolve_train_config(profile="demo", overrides=overrides, num_cuda_devices=0))
    assert len(rows) == 882
    assert plan.total_steps == 397
    assert plan.num_checkpoints == 10
    assert plan.output_path == Path("outputs/smollm2_gardening_goodness_custom")


@pytest.mark.usefixtures("empty_cache")
def test_plan_has_the_keys_that_every_command_shares() -> None:
    plan, _ = plan_run(resolve_train_config(profile="demo", overrides={}, num_cuda_devices=0))
    contract = (
        "profile model dataset persona optimizer save_dtype output_path total_steps schedule planned_steps "
        "skipped_steps num_checkpoints checkpoint_bytes shared_bytes resume_bytes peak_bytes total_bytes free_bytes "
        "fits"
    )
    values = plan.to_dict()
    assert set(contract.split()) <= set(values)
    assert values["total_bytes"] == plan.num_checkpoints * values["checkpoint_bytes"]  # type: ignore[operator]
    assert values["fits"] is True


def test_unknown_architecture_gives_an_unknown_size_not_a_guess(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "mystery"}')
    plan, _ = plan_run(resolve_train_config(profile="demo", overrides={"model": str(folder)}, num_cuda_devices=0))
    assert plan.checkpoint_bytes is None
    assert plan.total_bytes is None
    assert plan.fits is None


def _run_folder(tmp_path: Path, status: str, **changes: Any) -> Any:
    config = resolve_train_config(
        profile="demo", overrides={"output_root": tmp_path, "output_name": "run", **changes}, num_cuda_devices=0
    )
    plan, _ = plan_run(config)
    plan.output_path.mkdir(exist_ok=True)
    assert plan.dataset.path is not None
    lineage = {"dataset": {"sha256": file_sha256(plan.dataset.path)}}
    manifest = {"status": status, "config": config.to_dict(), "lineage": lineage, "plan": plan.to_dict()}
    RunFolder(path=plan.output_path).write_manifest(manifest)
    return plan


def test_a_completed_run_of_the_same_configuration_is_recognised(tmp_path: Path) -> None:
    plan = _run_folder(tmp_path, "completed")
    assert finished_run(plan) == RunFolder(path=plan.output_path)


def test_an_interrupted_run_and_another_configuration_are_refused_with_a_free_name(tmp_path: Path) -> None:
    plan = _run_folder(tmp_path, "interrupted")
    with pytest.raises(Exception, match=r"interrupted: 0 checkpoint\(s\) kept, .*--output-name run_2"):
        finished_run(plan)
    _run_folder(tmp_path, "completed", seed=5)
    with pytest.raises(Exception, match=r"another configuration.*--output-name run_2"):
        finished_run(plan)


def test_a_run_on_other_contents_of_the_dataset_is_not_this_run(tmp_path: Path, dataset_file: Path) -> None:
    plan = _run_folder(tmp_path, "completed", dataset=str(dataset_file))
    assert finished_run(plan) is not None
    dataset_file.write_text(dataset_file.read_text().replace("It is 3.", "It is 4."))
    with pytest.raises(CheckpointError, match=r"the contents of .* have changed"):
        finished_run(plan)


@pytest.mark.parametrize("overrides", [{"max_steps": 10**11}, {"num_train_epochs": 1e300}])
def test_a_schedule_of_absurd_length_is_refused_at_once(overrides: dict[str, Any]) -> None:
    message = r"more than 100,000 checkpoints|above 1,000,000,000,000, which no run could use"
    with pytest.raises(ConfigError, match=message):
        plan_run(resolve_train_config(profile="demo", overrides=overrides, num_cuda_devices=0))


@pytest.mark.parametrize(
    ("model", "modules", "expected"),
    [
        ("smollm2-135m", ("embed_tokens",), True),
        ("smollm2-135m", ("lm_head",), True),
        ("smollm2-135m", ("embed_tokens", "lm_head"), False),
        ("smollm2-135m", (), False),
        ("qwen2.5-7b", ("embed_tokens",), False),
    ],
)
def test_a_plan_knows_when_tied_weights_would_part(model: str, modules: tuple[str, ...], *, expected: bool) -> None:
    overrides = {"model": model, "modules_to_save": modules}
    plan, _ = plan_run(resolve_train_config(profile="demo", overrides=overrides, num_cuda_devices=0))
    assert plan.estimate is not None
    assert plan.estimate.splits_tied_weights is expected


def test_target_names_may_have_spaces_after_their_commas() -> None:
    def parameters(targets: str) -> int:
        overrides = {"target_modules": targets, "model": "qwen2.5-7b"}
        plan, _ = plan_run(resolve_train_config(profile="demo", overrides=overrides, num_cuda_devices=0))
        assert plan.estimate is not None
        return plan.estimate.num_trainable_parameters

    assert parameters("q_proj, v_proj") == parameters("q_proj,v_proj")
