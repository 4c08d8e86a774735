"""The README says what is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def tree_paths(text: str) -> set[str]:
    """Return the paths of an indented tree, folders with a slash."""
    paths: set[str] = set()
    parents: list[str] = []
    for line in text.splitlines():
        if not line.strip():
            continue
        depth, name = (len(line) - len(line.lstrip()) - 4) // 2, line.split()[0]
        parents[depth:] = [name]
        paths.add("".join(parents))
    return paths


def test_the_file_tree_is_the_folder() -> None:
    match = re.search(r"<!-- tree -->\n(.*?)<!-- end of tree -->", README, re.DOTALL)
    assert match is not None
    named = {path for path in tree_paths(match[1]) if path.startswith("emtool/")}
    there = {"emtool/"}
    for path in (ROOT / "emtool").rglob("*"):
        relative = path.relative_to(ROOT).as_posix()
        if "__pycache__" in relative or (relative.startswith("emtool/assets/")):
            continue
        if path.is_dir():
            there.add(f"{relative}/")
        elif path.name != "__init__.py" or path.parent.name == "emtool":
            there.add(relative)
    assert named == there


def test_scripts_and_documents_that_are_named_exist() -> None:
    for name in re.findall(r"\((docs/[\w./-]+)\)", README):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"\./(scripts/[\w.]+)", README):
        assert (ROOT / name).is_file(), name


def test_the_python_example_prints_what_it_says() -> None:
    match = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert match is not None
    printed: list[str] = []
    exec(match[1], {"print": lambda value: printed.append(str(value))})
    assert printed == re.findall(r"# (\[.*\])", match[1])
