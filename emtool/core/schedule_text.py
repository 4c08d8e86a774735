"""Reading schedules: from the one-line text, and from the values of a configuration file.

A new kind of term is an entry in `TERMS`: its word, and what reads a text that begins with it. A new preset is an entry
in `PRESETS`: its name, and the schedule that it stands for. `docs/extending.md` shows how.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from emtool.core.errors import ConfigError, PointedError
from emtool.core.schedule import CUSTOM_STEPS, PYTHIA_TEXT, CheckpointSchedule
from emtool.core.schedule_terms import (
    Even,
    Every,
    Log,
    Point,
    Powers,
    Preset,
    Range,
    Term,
)

MAX_TEXT = 10_000
MAX_DIGITS = 12
FORMS = "25, 10%, 0.5ep, init, final, 0-150:25, every 50, every 25 until 150 then every 50, log 10, even 8, pow2"

_NUMBER = rf"\d{{1,{MAX_DIGITS}}}"
_POINT = re.compile(rf"(?P<value>{_NUMBER}(?:\.{_NUMBER})?)(?P<unit>%|ep)?|(?P<word>init|final)")
_RANGE = re.compile(rf"(?P<first>{_NUMBER})-(?P<last>{_NUMBER})(?::(?P<stride>{_NUMBER}))?")


@dataclass(frozen=True, kw_only=True)
class Place:
    """A piece of the schedule's text and where it stands in it.

    Attributes:
        text: The piece; that of a term is in lower case.
        whole: The schedule.
        start: First character of the piece.
    """

    text: str
    whole: str
    start: int

    def error(self, problem: str) -> ConfigError:
        """Return an error that quotes the whole text and points at this piece."""
        return PointedError(
            f"{problem} in schedule {self.whole!r}; write for instance: {FORMS}",
            text=self.whole,
            start=self.start,
            length=max(1, len(self.text)),
        )

    def split(self, pattern: str) -> list[Place]:
        """Return the pieces between the matches of a pattern, without the space around them."""
        pieces, begin = [], 0
        ends = [*((m.start(), m.end()) for m in re.finditer(pattern, self.text)), (len(self.text), 0)]
        for stop, after in ends:
            raw = self.text[begin:stop]
            offset = begin + len(raw) - len(raw.lstrip())
            pieces.append(Place(text=raw.strip(), whole=self.whole, start=self.start + offset))
            begin = after
        return pieces


def parse_schedule(text: str) -> CheckpointSchedule:
    """Return the schedule that a text names; see `emtool.core.schedule` for the forms.

    Raises:
        ConfigError: If a term is unknown, negative, reversed or has a zero stride, or there is none.
    """
    if len(text) > MAX_TEXT:
        raise ConfigError(f"a schedule of {len(text):,} characters is too long; {MAX_TEXT:,} are allowed")
    return read_terms(text)


def read_terms(text: str) -> CheckpointSchedule:
    """Return the schedule of a text of any length, such as a normal form.

    Raises:
        ConfigError: As `parse_schedule`.
    """
    whole = Place(text=text, whole=text, start=0)
    kept: list[Term] = []
    removed: list[Term] = []
    for place in whole.split(","):
        if not place.text:
            raise place.error("empty checkpoint schedule" if not text.strip() else "empty term")
        if place.text.startswith("!"):
            body = place.text[1:]
            start = place.start + 1 + len(body) - len(body.lstrip())
            removed.append(_removed(Place(text=body.strip(), whole=text, start=start)))
        else:
            kept.append(_term(place))
    return CheckpointSchedule(kept=tuple(dict.fromkeys(kept)), removed=tuple(dict.fromkeys(removed)))


def schedule_from_value(value: object) -> CheckpointSchedule:
    """Return the schedule that a configuration file names.

    Args:
        value: A text, a step number, a mapping `{every, until}`, or a list of these. Mappings that follow one another
            are phases, as with "then"; everything else in a list forms a union.

    Raises:
        ConfigError: If it is none of these.
    """
    return parse_schedule(_text_of(value))


def _text_of(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, Mapping, Sequence)):
        raise ConfigError(
            f"checkpoints = {value!r} is not a schedule; give a text, a number, a list or {{every, until}}"
        )
    if isinstance(value, int):
        return str(value)
    if isinstance(value, Mapping):
        return _phase_of(value)
    parts: list[str] = []
    for before, item in zip([None, *value], value, strict=False):
        joins = isinstance(item, Mapping) and isinstance(before, Mapping)
        text = _text_of(item)
        if joins:
            parts[-1] += f" then {text}"
        else:
            parts.append(text)
    return ", ".join(parts)


def _phase_of(value: Mapping[object, object]) -> str:
    unknown = [str(key) for key in value if key not in ("every", "until")]
    if unknown or "every" not in value:
        raise ConfigError(f"checkpoints phase {dict(value)!r} needs 'every' and may have 'until', nothing else")
    until = value.get("until")
    return f"every {value['every']}" + (f" until {until}" if until is not None else "")


def _term(place: Place) -> Term:
    lower = Place(text=_lower(place.text), whole=place.whole, start=place.start)
    word = _word(place)
    if word in PRESETS:
        return _preset(lower, word)
    return TERMS.get(word, _point_or_range)(lower)


def _removed(place: Place) -> Term:
    if _word(place) in {*TERMS, *PRESETS}:
        raise place.error(f"{place.text!r} cannot be removed, only a step or a range can")
    return _point_or_range(place)


def _word(place: Place) -> str:
    """Return the word that a term begins with, which may be none."""
    match = re.match(r"[a-z0-9]*", _lower(place.text))
    return match[0] if match else ""


def _lower(text: str) -> str:
    """Return a text in lower case and of the same length, so that places in it stay where they are."""
    return "".join(c.lower() if c.isascii() else c for c in text)


def _point_or_range(place: Place) -> Term:
    if match := _RANGE.fullmatch(_lower(place.text)):
        first, last = int(match["first"]), int(match["last"])
        stride = 1 if match["stride"] is None else int(match["stride"])
        if stride == 0:
            raise place.error(f"zero stride {place.text!r}")
        if first > last:
            raise place.error(f"reversed range {place.text!r}")
        return Range(first=first, last=last, stride=stride)
    return _point(place)


def _point(place: Place) -> Point:
    match = _POINT.fullmatch(_lower(place.text))
    if match is None:
        raise place.error(_what_is_wrong(place.text))
    if match["word"]:
        return Point(Fraction(0)) if match["word"] == "init" else Point(Fraction(0), "final")
    value, unit = Fraction(match["value"]), match["unit"] or ""
    if not unit and value.denominator != 1:
        raise place.error(f"step {place.text!r} is not a whole number")
    if unit == "%" and value > 100:
        raise place.error(f"{place.text!r} is more than the whole run")
    return Point(value, unit)


def _what_is_wrong(text: str) -> str:
    if re.match(r"[-\u2212]\s*\d", text):
        return f"negative step {text!r}"
    if re.search(rf"\d{{{MAX_DIGITS + 1}}}", text):
        return f"number with more than {MAX_DIGITS} digits {text[:20]!r}..."
    import difflib

    word = text.split(maxsplit=1)[0] if text.split() else text
    near = difflib.get_close_matches(word.lower(), [*_WORDS, *TERMS, *PRESETS], n=1)
    return f"unknown term {text[:60]!r}" + (f" (did you mean {near[0]!r}?)" if near and near[0] != word.lower() else "")


def _every(place: Place) -> Every:
    phases: list[tuple[int, Point | None]] = []
    for phase in place.split(r"\bthen\b"):
        match = re.fullmatch(rf"every\s+({_NUMBER})(?:\s+until\s+(\S.*))?", phase.text)
        if match is None and re.search(rf"\d{{{MAX_DIGITS + 1}}}", phase.text):
            raise phase.error(_what_is_wrong(phase.text))
        if match is None:
            raise phase.error(f"{phase.text!r} is not 'every N' or 'every N until STEP'")
        if int(match[1]) == 0:
            raise phase.error(f"zero stride {phase.text!r}")
        if phases and phases[-1][1] is None:
            raise phase.error("nothing can follow 'every N' without 'until'")
        until = None if match[2] is None else _inner(phase, match.start(2), match[2])
        if until is not None and phases and not until.unit and _reversed(phases[-1][1], until):
            raise phase.error(f"phase {phase.text!r} ends before the one before it")
        phases.append((int(match[1]), until))
    return Every(tuple(phases))


def _reversed(before: Point | None, after: Point) -> bool:
    return before is not None and before.unit == after.unit and after.value <= before.value


def _inner(place: Place, offset: int, text: str) -> Point:
    return _point(Place(text=text.strip(), whole=place.whole, start=place.start + offset))


def _spread(kind: Callable[[int], Even | Log]) -> Callable[[Place], Term]:
    def parse(place: Place) -> Term:
        match = re.fullmatch(rf"[a-z]+\s+({_NUMBER})", place.text)
        if match is None or int(match[1]) < 2:
            raise place.error(f"{place.text!r} needs a number of checkpoints, at least 2")
        return kind(int(match[1]))

    return parse


def _powers(place: Place) -> Powers:
    match = re.fullmatch(r"pow2(?:\s+until\s+(\S.*))?", place.text)
    if match is None:
        raise place.error(f"{place.text!r} is not 'pow2' or 'pow2 until STEP'")
    return Powers(None if match[1] is None else _inner(place, match.start(1), match[1]))


def _preset(place: Place, name: str) -> Preset:
    if place.text != name:
        raise place.error(_what_is_wrong(place.text))
    named = parse_schedule(PRESETS[name])
    assert not named.removed, f"preset {name!r} removes steps; write only those that it saves"
    return Preset(name, named.kept)


#: Words that stand inside terms, or are one.
_WORDS = ("init", "final", "until", "then")

#: The word that a term begins with, and what reads it.
TERMS: dict[str, Callable[[Place], Term]] = {
    "every": _every,
    "even": _spread(Even),
    "log": _spread(Log),
    "pow2": _powers,
}

#: Schedules with a name, by that name. They name steps and remove none.
PRESETS: dict[str, str] = {
    "custom": ", ".join(map(str, CUSTOM_STEPS)),
    "pythia": PYTHIA_TEXT,
}
