from typing import Any

import pytest

from emtool.core.config import TrainConfig, check_can_start, resolve_train_config
from emtool.core.errors import BackendError, ConfigError


def resolve(profile: str = "demo", num_cuda_devices: int = 0, **overrides: Any) -> TrainConfig:
    return resolve_train_config(profile=profile, overrides=overrides, num_cuda_devices=num_cuda_devices)


def test_auto_takes_paper_with_cuda_and_demo_without_and_says_why() -> None:
    assert (resolve("auto").profile, resolve("auto").profile_reason) == ("demo", "auto, no CUDA device found")
    on_gpu = resolve("auto", num_cuda_devices=1)
    assert (on_gpu.profile, on_gpu.device, on_gpu.optim) == ("paper", "cuda", "adamw_8bit")
    assert on_gpu.profile_reason == "auto, 1 CUDA device(s) found"


def test_paper_profile_is_the_published_setting() -> None:
    config = resolve("paper")
    assert (config.lora_r, config.lora_alpha, config.use_rslora, config.lora_dropout) == (32, 64, True, 0.0)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (2, 8)
    assert (config.warmup_steps, config.learning_rate, config.lr_scheduler_type) == (5, 1e-5, "linear")
    assert (config.weight_decay, config.num_train_epochs, config.seed, config.max_length) == (0.01, 1.0, 0, 2048)
    assert config.layers_to_transform == "all"
    assert config.target_modules == "all-linear"
    assert config.template_compat == "clean", "the published quirk is asked for, never a default"


def test_save_dtype_follows_the_dtype_of_the_base() -> None:
    assert resolve("paper").save_dtype == "bfloat16"
    assert resolve("demo").save_dtype == "float32"
    assert resolve("demo", dtype="bfloat16").save_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"optim": "adamw_torhc"}, "did you mean 'adamw_torch'"),
        ({"learning_rate": 0.0}, "--learning-rate is 0.0; it must be above 0"),
        ({"learning_rate": float("nan")}, "must be above 0"),
        ({"max_steps": 0}, "--max-steps is 0"),
        ({"lora_dropout": 1.0}, "below 1"),
        ({"output_name": "../elsewhere"}, "not one folder name"),
        ({"output_name": ".hidden"}, "not one folder name"),
        ({"dtype": "float16"}, "unknown dtype"),
        (
            {"template_compat": "tuner"},
            "unknown template compatibility 'tuner'; did you mean 'turner'. choose from: clean",
        ),
    ],
)
def test_bad_values_are_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(**overrides)


def test_cuda_only_work_is_refused_with_the_alternative() -> None:
    with pytest.raises(BackendError, match="--profile demo"):
        check_can_start(resolve("paper"), num_cuda_devices=0)
    with pytest.raises(BackendError, match="--optim adamw_torch"):
        check_can_start(resolve("demo", optim="adamw_8bit"), num_cuda_devices=0)
    with pytest.raises(BackendError, match="--device cpu"):
        check_can_start(resolve("demo", device="cuda"), num_cuda_devices=0)
    check_can_start(resolve("demo"), num_cuda_devices=0)
