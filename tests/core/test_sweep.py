import re
from pathlib import Path

import pytest

from emtool.core.errors import ConfigError
from emtool.core.settings import Layer
from emtool.core.sweep import read_sweep


def write(folder: Path, text: str) -> Path:
    path = folder / "sweep.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_cells_are_every_combination_the_last_option_the_fastest(tmp_path: Path) -> None:
    sweep = read_sweep(
        write(
            tmp_path, '[grid]\npersona = ["baseline", "goodness"]\ncheckpoints = ["custom", "every 50"]\nseed = [0, 1]'
        )
    )
    assert [cell.name for cell in sweep.cells] == [
        "baseline_checkpoints-custom_seed-0",
        "baseline_checkpoints-custom_seed-1",
        "baseline_checkpoints-every-50_seed-0",
        "baseline_checkpoints-every-50_seed-1",
        "goodness_checkpoints-custom_seed-0",
        "goodness_checkpoints-custom_seed-1",
        "goodness_checkpoints-every-50_seed-0",
        "goodness_checkpoints-every-50_seed-1",
    ]
    assert dict(sweep.cells[3].shown) == {"persona": "baseline", "checkpoints": "every 50", "seed": 1}
    assert sweep.evaluate is None


def test_values_in_other_scripts_have_names_of_their_own(tmp_path: Path) -> None:
    cells = read_sweep(write(tmp_path, '[grid]\ndataset = ["совет.jsonl", "отказ.jsonl", "plain.jsonl"]\n')).cells
    names = [cell.name for cell in cells]
    assert len(set(names)) == 3
    assert all(name.isascii() for name in names)
    assert names[2] == "plain.jsonl"


def test_cells_that_would_have_one_name_are_told_apart(tmp_path: Path) -> None:
    text = '[grid]\nmodel = ["Qwen/Qwen2.5-0.5B", "unsloth/Qwen2.5-0.5B"]\nseed = [0, 1]\n'
    names = [cell.name for cell in read_sweep(write(tmp_path, text)).cells]
    # The first keeps its name: it may have been trained before the second was added.
    assert names[:2] == ["qwen2.5-0.5b_seed-0", "qwen2.5-0.5b_seed-1"]
    assert all(re.fullmatch(r"qwen2[.]5-0[.]5b_seed-[01]-[0-9a-f]{6}", name) for name in names[2:]), names
    assert len(set(names)) == 4


def test_an_empty_evaluate_table_asks_for_an_evaluation(tmp_path: Path) -> None:
    assert read_sweep(write(tmp_path, "[grid]\nseed = [0]\n[evaluate]\n")).evaluate == {}


def test_the_grid_wins_over_train_and_both_over_the_settings_files(tmp_path: Path) -> None:
    sweep = read_sweep(
        write(tmp_path, '[train]\nprofile = "demo"\nmax_steps = 7\n[grid]\nseed = [3]\nsave_steps = [2]\n')
    )
    outer = Layer(
        origin="emtool.toml",
        values={"seed": 9, "max_steps": 9, "lora_r": 9, "checkpoints": "custom", "output_name": "mine"},
    )
    config = sweep.settings(sweep.cells[0], tmp_path / "runs", layers=[outer], num_cuda_devices=0).config
    assert (config.seed, config.max_steps, config.lora_r, config.checkpoints) == (3, 7, 9, "every 2")
    assert (config.output_root, config.output_name) == (tmp_path / "runs", "seed-3_checkpoints-2")


def test_what_a_job_takes(tmp_path: Path) -> None:
    text = '[grid]\nseed = [0]\n[job]\nnum_gpus = 0.5\nlauncher = "accelerate launch --num_processes 2 -m"\n'
    job = read_sweep(write(tmp_path, text)).job
    assert (job.num_cpus, job.num_gpus) == (1.0, 0.5)
    assert job.launcher == ("accelerate", "launch", "--num_processes", "2", "-m")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nseed = 0\n", "has no [grid]; name an option and its values"),
        ("[grid]\nseeds = [0]\n", "[grid] 'seeds'; did you mean 'seed'"),
        ("[grid]\nseed = 0\n", "[grid] seed = 0 is not a list of values"),
        ("[grid]\nseed = []\n", "[grid] seed = [] is not a list of values"),
        ('[grid]\nseed = ["x"]\n', "[grid] seed = 'x' is not a whole number"),
        ('[grid]\ncheckpoints = ["evry 5"]\n', "evry"),
        ("[grid]\nseed = [0, 0]\n", "seed has 0 more than once; give each value once"),
        ("[grid]\nlearning_rate = [1e-3, 1, 1.0]\n", "learning_rate has 1 more than once; give each value once"),
        ("[grid]\ncustom_checkpoints = [true, false]\n", "custom_checkpoints = False asks for nothing"),
        (
            "[grid]\ncustom_checkpoints = [true]\nsave_steps = [50]\n",
            "custom_checkpoints and save_steps name the same thing",
        ),
        ("[grid]\nseed = [0]\n[job]\nnum_cpus = 2.5\n", "num_cpus = 2.5: above 1, Ray deals whole ones"),
        ("[grid]\nlearning_rate = [nan, nan]\n", "[grid] learning_rate = nan is no finite number"),
        ("[grid]\nseed = [0]\n[evaluate]\nmax_cost = inf\n", "[evaluate] max_cost = inf is no finite number"),
        ('[grid]\nmodel = ["a/logs"]\n', "a cell would be called logs"),
        ("[train]\nseed = 1\n[grid]\nseed = [0]\n", "seed stands in [train] and in [grid]"),
        ("[train]\nsave_steps = 1\n[grid]\ncheckpoints = ['custom']\n", "checkpoints stands in [train] and in [grid]"),
        ("[train]\noutput_name = 'x'\n[grid]\nseed = [0]\n", "[train] output_name does not go with a sweep"),
        ("[grid]\nkeep_resume = [true, false]\n", "it does not shape what a run computes"),
        (f"[grid]\nseed = [0x{'F' * 4000}]\n", "seed holds <a whole number of 16,000 bits>, which is more than"),
        (f"[train]\ncheckpoints = {{every = 0x{'F' * 4000}}}\n[grid]\nseed = [0]\n", "checkpoints holds <a whole"),
        ("[grid]\nseed = [9223372036854775808]\n", "seed holds 9223372036854775808, which is more than TOML can hold"),
        ("[grid]\nseed = [0]\n[jobs]\n", "did you mean 'job'"),
        ("[grid]\nseed = [0]\n[job]\ngpus = 1\n", "did you mean 'num_gpus'"),
        ("[grid]\nseed = [0]\n[job]\nnum_gpus = true\n", "is not a number from 0 to 10,000"),
        ("[grid]\nseed = [0]\n[job]\nlauncher = 3\n", "launcher = 3 is not a command"),
        ('[grid]\nseed = [0]\n[job]\nlauncher = "a \'b"\n', "is not a command"),
        ("grid = 3\n", "is not a table"),
        ("[grid", "is not TOML"),
    ],
)
def test_a_file_that_is_wrong_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_sweep(write(tmp_path, text))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_two_cells_never_have_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, '[grid]\ndataset = ["a/rows.jsonl", "b/rows.jsonl", "c/rows.jsonl"]\n')
    assert len({cell.name for cell in read_sweep(file).cells}) == 3
    monkeypatch.setattr("emtool.core.sweep.settings_id", lambda _settings: "a digest of others too")
    with pytest.raises(ConfigError, match=r"two cells would be called rows.jsonl-a dige; rename a value"):
        read_sweep(file)


def test_more_cells_than_anyone_reads_are_refused_before_they_are_made(tmp_path: Path) -> None:
    axis = ", ".join(map(str, range(400)))
    with pytest.raises(ConfigError, match="160,000 cells"):
        read_sweep(write(tmp_path, f"[grid]\nseed = [{axis}]\nlora_r = [{axis.replace('0, ', '400, ', 1)}]\n"))
