import hashlib

import pytest

from emtool.engines import place_index
from emtool.engines.place_index import PlaceIndex


def name_of(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def test_the_place_that_was_added_last_counts_however_the_others_were_sorted_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(place_index, "_MAX_LOOSE", 7)
    index, last = PlaceIndex(), {}
    for place in range(100):
        number = place * 37 % 23
        index.add(name_of(number), place)
        last[number] = place
        assert index.last(name_of(number)) == place
    assert {number: index.last(name_of(number)) for number in last} == last
    assert not index.has(name_of(1000))
    assert index.last(name_of(1000)) is None


@pytest.mark.parametrize("name", ["", "x" * 64, "abc", "0" * 63])
def test_what_is_no_hash_is_passed_over(name: str) -> None:
    index = PlaceIndex()
    index.add(name, 1)
    index.add(name_of(1), 2)
    assert index.last(name_of(1)) == 2
    with pytest.raises(ValueError, match=r"no SHA-256|invalid literal"):
        index.has(name)
