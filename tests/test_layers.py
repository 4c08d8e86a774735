"""Imports point down only, planning loads no torch, and nobody below the command line prints."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "emtool"
BELOW = {"core": {"core"}, "engines": {"core", "engines"}, "report": {"core", "report"}, "cli": {"core", "cli"}}
HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "pydantic")


def imports(path: Path, *, module_level_only: bool) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if module_level_only else list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("layer", sorted(BELOW))
def test_a_layer_imports_only_what_lies_below(layer: str) -> None:
    for path in (ROOT / layer).rglob("*.py"):
        for name in imports(path, module_level_only=layer == "cli"):
            if name.startswith("emtool."):
                assert name.split(".")[1] in BELOW[layer], f"{path} imports {name}"


@pytest.mark.parametrize("layer", ["core", "engines", "report"])
def test_only_the_command_line_knows_typer_and_rich(layer: str) -> None:
    for path in (ROOT / layer).rglob("*.py"):
        assert not imports(path, module_level_only=False) & {"typer", "rich"}, path


@pytest.mark.parametrize(
    "arguments",
    [
        ["--version"],
        ["train", "--custom-checkpoints", "--dry-run"],
        ["train", "--dry-run", "--profile", "paper"],
        ["schedule", "preview", "--total-steps", "397"],
        ["disk-estimate"],
        ["data", "list"],
        ["data", "info", "medical", "--profile", "paper"],
    ],
)
def test_planning_loads_no_part_of_the_torch_stack(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom emtool.cli.app import app\n"
        f"try:\n    app({arguments!r})\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\nassert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_loads_nothing_but_offers_its_names() -> None:
    code = (
        "import sys, emtool\nassert 'torch' not in sys.modules\n"
        "assert emtool.default_checkpoint_steps(60) == [0, 25, 50, 60]\nassert 'torch' not in sys.modules\n"
        "emtool.ScheduledCheckpointCallback\nassert 'torch' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
