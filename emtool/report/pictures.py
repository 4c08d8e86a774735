"""The charts of a report as SVG, PNG and PDF."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emtool.core.errors import CheckpointError
from emtool.core.run_dir import FORMAT, read_json, replace_file, write_json
from emtool.report.charts import HEIGHT, QUESTIONS, Drawn, config_of
from emtool.report.curves import CHARTS

#: The pictures that a report wrote: what the next one may remove.
_LIST = ".pictures.json"

#: Kinds of picture; a PNG has twice the pixels.
KINDS = ("svg", "png", "pdf")

_WIDTH = 560
_PNG_SCALE = 2

#: Characters of a line of notes below a title, at the width of a picture.
_NOTE_CHARACTERS = 95


def draw_pictures(drawn: Sequence[Drawn], folder: Path) -> list[Path]:
    """Write each chart in every kind, each file whole or not at all.

    Pictures that an earlier report wrote and this one does not are removed; no other file is.

    Returns:
        The files.

    Raises:
        CheckpointError: If the folder is a link, which would lead the files elsewhere.
        OSError: If one cannot be written.
    """
    if folder.is_symlink():
        raise CheckpointError(f"{folder} is a link; pictures are written into a folder only")
    folder.mkdir(parents=True, exist_ok=True)
    listed = read_json(folder / _LIST)
    before = listed.get("pictures") if isinstance(listed, dict) else None
    names = [f"{chart.name}.{kind}" for chart in drawn for kind in KINDS]
    known = {name for name in before if _is_picture(name)} if isinstance(before, list) else set()
    # First, so that what is written is known to be a report's whatever comes between.
    write_json(folder / _LIST, {"format": FORMAT, "pictures": sorted(known | set(names))})
    for chart in drawn:
        for kind, content in _render(picture_spec(chart)).items():
            replace_file(folder / f"{chart.name}.{kind}", content)
    for name in known - set(names):
        (folder / name).unlink(missing_ok=True)
    write_json(folder / _LIST, {"format": FORMAT, "pictures": sorted(names)})
    return [folder / name for name in names]


def picture_spec(chart: Drawn) -> dict[str, Any]:
    """Return a chart as it stands alone: with its title and notes, of a fixed size, on white."""
    notes = textwrap.wrap("; ".join(chart.notes), _NOTE_CHARACTERS, break_on_hyphens=False)
    return {
        "height": HEIGHT,
        **chart.spec,
        "width": _WIDTH,
        "padding": 12,
        "title": {"text": chart.title, "subtitle": notes},
        "config": config_of(ink="#1a1a1a", background="white"),
    }


def _render(spec: dict[str, Any]) -> dict[str, bytes]:
    import vl_convert

    # Vega runs once: the other kinds are made of its SVG, as vl-convert would by itself each time.
    svg: str = vl_convert.vegalite_to_svg(spec, vl_version=vega_lite_version(), allowed_base_urls=[])
    return {
        "svg": svg.encode("utf-8"),
        "png": vl_convert.svg_to_png(svg, scale=_PNG_SCALE),
        "pdf": vl_convert.svg_to_pdf(svg),
    }


def vega_lite_version() -> str:
    """Return the version of Vega-Lite that Altair writes, as vl-convert names it."""
    import altair

    major, minor, *_ = altair.SCHEMA_VERSION.removeprefix("v").split(".")
    return f"{major}.{minor}"


def _is_picture(name: object) -> bool:
    """Return whether a file name is one that a report gives to a picture."""
    if not isinstance(name, str):
        return False
    stem, _, kind = name.rpartition(".")
    return kind in KINDS and (stem in CHARTS or re.fullmatch(rf"{QUESTIONS}_[\w.-]+", stem) is not None)
