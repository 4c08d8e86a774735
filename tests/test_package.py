"""What is published: a wheel and an archive of the sources, installed where nothing else is."""

import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from emtool import __version__

ROOT = Path(__file__).parents[1]
PROJECT: Any = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = sorted(set(PROJECT["optional-dependencies"]) - {"dev"})


def test_every_reporter_and_judge_that_a_message_names_is_an_extra() -> None:
    from emtool.core.reporters import REPORTERS

    assert {"judge", "ray", "cuda", "data", *REPORTERS[1:]} == set(EXTRAS)


def python(*arguments: str, program: Path | str = sys.executable, cwd: Path = ROOT) -> str:
    """Run a Python with nothing of this process's own around it, and return what it prints."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_", "EMTOOL_C"))}
    done = subprocess.run([str(program), *arguments], cwd=cwd, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def contents(wheel: Path) -> dict[str, str]:
    """Return the files of a wheel and the hash of each."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the sources' archive and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    python("-m", "build", "--outdir", str(folder), str(ROOT))
    assert len(list(folder.iterdir())) == 2
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    return built / f"emtool-{__version__}-py3-none-any.whl"


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(contents(wheel))
    package = {name for name in names if name.startswith("emtool/")}
    tree = {path.relative_to(ROOT).as_posix() for path in (ROOT / "emtool").rglob("*") if path.is_file()}
    assert package == {name for name in tree if "__pycache__" not in name}
    assert {"emtool/py.typed", "emtool/assets/report/page.html", "emtool/assets/personas/goodness.jsonl"} <= package
    info = f"emtool-{__version__}.dist-info"
    files = ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")
    assert names - package == {f"{info}/{name}" for name in files}
    assert not [name for name in names if any(part.startswith(".") for part in name.split("/"))]


@pytest.mark.slow
def test_the_sources_make_the_same_wheel_and_can_be_tested(built: Path, wheel: Path, tmp_path: Path) -> None:
    python("-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT))
    assert contents(tmp_path / wheel.name) == contents(wheel)
    with tarfile.open(built / f"emtool-{__version__}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "tests/conftest.py", "docs/extending.md", "scripts/test.sh"} <= names
    kept = (
        "emtool/",
        "tests/",
        "docs/",
        "scripts/",
        "README.md",
        "LICENSE",
        "pyproject.toml",
        "PKG-INFO",
        ".gitignore",
    )
    assert not [name for name in names if not name.startswith(kept) or "__pycache__" in name]


@pytest.fixture(scope="module")
def empty(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return the folder of the programs of an environment into which nothing but the wheel was installed."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    programs = folder / "bin"
    torch = f"torch=={version('torch').partition('+')[0]}"
    pip = ("-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-compile")
    if index := os.environ.get("EMTOOL_TORCH_INDEX"):
        python(*pip, "--index-url", index, torch, program=programs / "python")
    python(*pip, str(wheel), torch, program=programs / "python")
    yield programs
    # It takes more than a gigabyte, which pytest would keep for three sessions.
    import shutil

    shutil.rmtree(folder)


@pytest.mark.slow
def test_an_empty_environment_plans_trains_evaluates_and_reports(
    empty: Path, tiny_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    def emtool(*arguments: str) -> str:
        return python(*arguments, program=empty / "emtool", cwd=tmp_path)

    assert emtool("--version") == f"emtool {__version__}\n"
    steps = [0, 25, 50, 100, 125, 150, 200, 250, 300, 397]
    plan = json.loads(emtool("schedule", "preview", "--total-steps", "397", "--json"))
    assert plan["planned_steps"] == steps
    assert "custom              10  1.50 GiB" in emtool("disk-estimate")
    assert "882" in emtool("data", "list")
    options = ["--model", str(tiny_model), "--dataset", str(rows_file), "--max-steps", "4", "--checkpoints", "0"]
    emtool("train", *options, "--output-name", "run")
    summary = json.loads(emtool("evaluate", "outputs/run", "--metrics", "likelihood", "--json"))
    assert [entry["step"] for entry in summary["checkpoints"]] == [0, 4]
    emtool("report", "outputs/run")
    assert "<svg" in (tmp_path / "outputs" / "run" / "plots" / "p_wrong.svg").read_text(encoding="utf-8")
    assert str(empty.parent) in python(
        "-c", "import emtool; print(emtool.__file__)", program=empty / "python", cwd=tmp_path
    )


@pytest.mark.slow
def test_an_extra_that_is_missing_is_named_with_its_command(empty: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [str(empty / "emtool"), "train", "--profile", "demo", "--report-to", "wandb"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "emtool: --report-to wandb needs the package wandb: pip install 'emtool[wandb]', or use --report-to none\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_all_extras_can_be_installed_together(empty: Path, wheel: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    python("-m", "pip", "check", program=empty / "python")
    chosen = f"{wheel}[{','.join(EXTRAS)}]"
    pip = ("-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--dry-run", "--report", str(report))
    python(*pip, chosen, program=empty / "python")
    found = {entry["metadata"]["name"].lower() for entry in json.loads(report.read_text())["install"]}
    assert {"bitsandbytes", "openai", "ray", "easy-dataset-share", "tensorboard", "trackio", "wandb"} <= found
    assert "torch" not in found, "an extra asks for another torch"
