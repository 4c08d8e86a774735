"""Messages stay short, whatever was typed."""

from pathlib import Path

import pytest

from emtool.core.errors import CheckpointError, ConfigError, shown, unknown_name
from emtool.core.steps import select_steps
from emtool.core.sweep import read_sweep


def test_of_many_names_all_are_listed_only_where_none_is_near() -> None:
    many = [f"option_{letter}" for letter in "abcdefghijklmnop"]
    near = str(unknown_name("option", "option_b_", many))
    assert near == "unknown option 'option_b_'; did you mean 'option_b'?"
    assert all(name in str(unknown_name("option", "zzz", many)) for name in many)
    assert str(unknown_name("option", "option_z", many[:2])).endswith("choose from: option_a, option_b")


def test_what_was_typed_is_cut_where_it_is_long_or_deep() -> None:
    deep: object = 1
    for _ in range(5_000):
        deep = {"a": deep}
    assert len(shown(deep)) < 200
    assert len(shown("x" * 10_000)) < 200
    assert shown("learning_rate") == "'learning_rate'"
    assert len(str(unknown_name("option", "x" * 10_000, ["a"]))) < 300


def test_missing_steps_are_named_to_a_point() -> None:
    with pytest.raises(CheckpointError) as caught:
        select_steps(",".join(map(str, range(1, 3_001))), list(range(5_000, 9_000)))
    assert len(str(caught.value)) < 500
    assert "(3,000 in all, the last 3000)" in str(caught.value)
    assert "(4,000 in all, the last 8999)" in str(caught.value)


def test_a_key_of_very_many_parts_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "deep.toml"
    file.write_text("[grid]\n" + ".".join("a" * 900) + " = 1\n")
    with pytest.raises(ConfigError) as caught:
        read_sweep(file)
    assert len(str(caught.value)) < 400
