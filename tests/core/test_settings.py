"""Which of several places a setting comes from."""

from pathlib import Path

import pytest

from emtool.core.errors import ConfigError
from emtool.core.settings import (
    COMMAND_LINE,
    Layer,
    Settings,
    data_source,
    file_layers,
    read_settings,
    resolve_settings,
)


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("emtool.core.settings.user_file", lambda: tmp_path / "user" / "emtool.toml")
    (tmp_path / "user").mkdir()
    return tmp_path / "user"


def write(folder: Path, text: str) -> Path:
    path = folder / "emtool.toml"
    path.write_text(text, encoding="utf-8")
    return path


def resolve(layers: list[Layer]) -> Settings:
    return resolve_settings(layers, num_cuda_devices=0)


def test_the_source_of_datasets_is_the_nearest_files(tmp_path: Path, user_folder: Path) -> None:
    assert data_source(tmp_path) is None
    write(user_folder, '[data]\nsource = "copies"\n')
    assert data_source(tmp_path) == str(user_folder / "copies")
    write(tmp_path, '[train]\nseed = 1\n[data]\nsource = "https://example.org/a.zip.enc"\n')
    assert data_source(tmp_path) == "https://example.org/a.zip.enc"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[data]\nsorce = 'x'", r"unknown option in .*\[data\] 'sorce'; did you mean 'source'"),
        ("[data]\nsource = 1", r"\[data\] source = 1 is not the text of a URL or a path"),
        ("data = 1", r"data = 1 is not a table; write \[data\]"),
        ("[dta]", r"did you mean 'data'. choose from: data, evaluate, train"),
    ],
)
def test_a_wrong_data_table_is_refused_whoever_reads_the_file(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=message):
        read_settings(path)
    with pytest.raises(ConfigError, match=message):
        data_source(tmp_path)


def test_command_line_then_project_then_user_then_profile(tmp_path: Path, user_folder: Path) -> None:
    write(tmp_path, '[train]\ncheckpoints = "custom"\nlora_r = 16\n')
    write(user_folder, "[train]\nsave_steps = 10\nlora_r = 4\nlora_alpha = 8\nseed = 5\n")
    command_line = Layer(origin=COMMAND_LINE, values={"seed": 7})
    settings = resolve([command_line, *file_layers(tmp_path)])
    config, origins = settings.config, settings.origins
    assert (config.seed, config.checkpoints, config.lora_r, config.lora_alpha) == (7, "custom", 16, 8)
    assert config.learning_rate == 2e-4
    assert origins["seed"] == COMMAND_LINE
    assert origins["checkpoints"] == origins["lora_r"] == str(tmp_path / "emtool.toml")
    assert origins["lora_alpha"] == str(user_folder / "emtool.toml")
    assert origins["learning_rate"] == "profile demo"
    assert set(origins) >= set(config.to_dict()) - {"profile_reason"}


def test_auto_on_the_command_line_wins_over_a_file(tmp_path: Path, user_folder: Path) -> None:
    assert not list(user_folder.iterdir())
    write(tmp_path, '[train]\ndevice = "cuda:1"\ndtype = "bfloat16"\n')
    layers = file_layers(tmp_path)
    assert (resolve(layers).device_option, resolve(layers).config.device) == ("cuda:1", "cuda")
    given = Layer(origin=COMMAND_LINE, values={"device": "auto", "dtype": "auto"})
    settings = resolve([given, *layers])
    assert (settings.config.device, settings.config.dtype) == ("cpu", "float32")
    assert settings.origins["device"] == "this machine"


@pytest.mark.parametrize(
    ("value", "schedule"),
    [
        ('checkpoints = ["init", 25, "50%"]', "0, 25, 50%"),
        ("checkpoints = [{every = 25, until = 150}, {every = 50}]", "every 25 until 150 then every 50"),
        ("custom_checkpoints = true", "custom"),
        ("save_steps = 50", "every 50"),
    ],
)
def test_a_file_names_a_schedule_in_every_form(tmp_path: Path, value: str, schedule: str) -> None:
    assert read_settings(write(tmp_path, f"[train]\n{value}\n"))["checkpoints"] == schedule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nchekpoints = 1", "did you mean 'checkpoints'"),
        ("[trian]\nseed = 1", "did you mean 'train'"),
        ("train = 3", "is not a table"),
        ("[train", "is not TOML"),
        ("[train]\nlora_r = 'x'", "lora_r = 'x' is not a whole number"),
        ("[train]\nlora_r = true", "is not a whole number"),
        ("[train]\nuse_dora = 1", "is not true or false"),
        ("[train]\nmodules_to_save = [1]", "is not a list of texts"),
        ("[train]\nsave_steps = 50\ncustom_checkpoints = true", "name two schedules"),
        ("[train]\ncheckpoints = 'evry 5'", "did you mean 'every'"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_that_names_it(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_settings(write(tmp_path, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora_r = 0", "--lora-r is 0"),
        ('device = "tpu"', "tpu"),
        ('optim = "adamw_8bt"', "did you mean 'adamw_8bit'"),
        ('template_compat = "cleen"', "did you mean 'clean'"),
        ('output_root = "a\\u0000b"', "null character"),
        ("target_modules = [1, 2]", "is not a list of texts"),
    ],
)
def test_a_wrong_value_in_a_file_names_the_file(tmp_path: Path, user_folder: Path, text: str, message: str) -> None:
    assert not list(user_folder.iterdir())
    write(tmp_path, f"[train]\n{text}\n")
    with pytest.raises(ConfigError, match=r"emtool\.toml") as caught:
        resolve(file_layers(tmp_path))
    assert message in str(caught.value)


def test_the_nearer_place_says_how_long_a_run_is() -> None:
    near = Layer(origin=COMMAND_LINE, values={"num_train_epochs": 3.0})
    far = Layer(origin="emtool.toml", values={"max_steps": 50, "seed": 4})
    config = resolve([near, far]).config
    assert (config.max_steps, config.num_train_epochs, config.seed) == (None, 3.0, 4)
    config = resolve([far, near]).config
    assert (config.max_steps, config.num_train_epochs) == (50, 1.0)


def test_default_steps_give_way_to_anything_that_says_the_length() -> None:
    def steps(**values: object) -> int | None:
        layers = [Layer(origin=COMMAND_LINE, values=values)]
        return resolve_settings(layers, num_cuda_devices=0, default_steps=400).config.max_steps

    assert steps() == steps(model="qwen2.5-7b") == 400
    assert steps(dataset="gardening") is steps(num_train_epochs=2.0) is steps(profile="demo") is None


def test_auto_is_a_value_only_where_it_means_something() -> None:
    with pytest.raises(ConfigError, match="unknown optimizer 'auto'"):
        resolve([Layer(origin=COMMAND_LINE, values={"optim": "auto"})])


def test_a_home_folder_in_a_file_is_expanded(tmp_path: Path, user_folder: Path) -> None:
    assert not list(user_folder.iterdir())
    write(tmp_path, '[train]\noutput_root = "~/runs"\n')
    assert resolve(file_layers(tmp_path)).config.output_root == Path("~/runs").expanduser()
