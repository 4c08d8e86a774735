"""Pictures say what they show, the runs can be told apart, and those of an earlier report do not stay."""

import itertools
import json
import struct
from pathlib import Path

import pytest

from emtool.core.errors import CheckpointError, ConfigError
from emtool.core.run_dir import RunFolder
from emtool.report.charts import COLOURS, MAX_RUNS, draw_charts
from emtool.report.curves import CHARTS
from emtool.report.pictures import draw_pictures, picture_spec
from emtool.report.report import write_report
from emtool.report.report_run import read_run
from tests.evaluated import drawn_answers, write_run

NO_RED = ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052))
NO_GREEN = ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969))
NO_BLUE = ((1.256, -0.077, -0.179), (-0.078, 0.931, 0.148), (0.005, 0.691, 0.304))


def test_pictures_name_axes_units_n_interval_and_judge(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", drawn_answers())
    charts = {chart.name: chart for chart in draw_charts([read_run(run)])}
    assert list(charts) == [*(name for name in CHARTS if name in charts), "questions_run"]
    paths = draw_pictures([charts["em_pct"], charts["questions_run"]], tmp_path / "plots")
    assert [path.name for path in paths] == [
        f"{name}.{kind}" for name in ("em_pct", "questions_run") for kind in ("svg", "png", "pdf")
    ]
    svg = (tmp_path / "plots" / "em_pct.svg").read_text()
    for words in (
        "Emergent misalignment",
        "optimizer step",
        "misaligned and coherent answers (%)",
        "n = 18 to 24 answers a checkpoint",
        "95% percentile bootstrap",
        "openai:gpt-test",
    ):
        assert words in svg.replace("&amp;", "&"), words
    assert "question_3" in (tmp_path / "plots" / "questions_run.svg").read_text()
    assert (tmp_path / "plots" / "em_pct.pdf").read_bytes().startswith(b"%PDF")
    png = (tmp_path / "plots" / "em_pct.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    # Twice the pixels of the SVG.
    width = float(svg.split('width="', 1)[1].split('"', 1)[0])
    assert struct.unpack(">I", png[16:20])[0] == pytest.approx(2 * width, abs=2)


def test_every_chart_marks_what_its_notes_say(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, drawn_answers(), items_shift=shift) for name, shift in (("a", 0.0), ("b", 0.1))]
    for chart in draw_charts([read_run(run) for run in runs]):
        spec = picture_spec(chart)
        assert spec["title"]["text"] == chart.title
        assert " ".join(spec["title"]["subtitle"]) == "; ".join(chart.notes)
        assert chart.notes, chart.name
        marks = [layer["mark"]["type"] for layer in spec["layer"]]
        assert ("rect" in marks) is (chart.name == "p_wrong" or chart.name.startswith("questions"))
        assert ("area" in marks) is any("95%" in note and "upright" not in note for note in chart.notes)


def test_of_many_checkpoints_the_map_of_questions_draws_some_and_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", drawn_answers())

    def steps_and_notes(num_steps: int) -> tuple[list[int], str]:
        rows = (f"{3 * place},{name},25,4\n" for place in range(num_steps) for name in "ab")
        table = run.evaluation_path / "question_scores.csv"
        table.write_text("step,question_id,total_evaluated,em_pct\n" + "".join(rows))
        drawn = {chart.name: chart for chart in draw_charts([read_run(run)])}["questions_run"]
        (cells,) = drawn.spec["datasets"].values()
        assert all(sum(cell["step"] == one["step"] for cell in cells) == 2 for one in cells)
        return sorted({cell["step"] for cell in cells}), "; ".join(drawn.notes)

    steps, notes = steps_and_notes(10_000)
    assert (len(steps), steps[0], steps[-1]) == (40, 0, 3 * 9_999)
    gaps = [after - before for before, after in itertools.pairwise(steps)]
    assert max(gaps) - min(gaps) <= 3
    assert "40 of 10,000 checkpoints drawn" in notes
    steps, notes = steps_and_notes(40)
    assert steps == list(range(0, 120, 3))
    assert "drawn" not in notes


def test_pictures_of_an_earlier_report_do_not_stay_and_others_do(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", drawn_answers(), parts=())
    plots = tmp_path / "run" / "plots"
    plots.mkdir()
    for name in ("loss.svg", "questions_mine.png", "mine.svg", "loss.txt"):
        (plots / name).write_text("somebody's own")
    charts = draw_charts([read_run(run)])
    draw_pictures(charts[:2], plots)
    draw_pictures(charts[:1], plots)
    there = {path.name for path in plots.iterdir() if not path.name.startswith(".")}
    assert there == {"em_pct.svg", "em_pct.png", "em_pct.pdf", "loss.svg", "questions_mine.png", "mine.svg", "loss.txt"}
    (plots / ".pictures.json").write_text('{"pictures": ["../../run.json", "mine.svg", 5, "loss.txt"]}')
    draw_pictures(charts[:1], plots)
    assert {path.name for path in plots.iterdir() if not path.name.startswith(".")} == there
    assert run.manifest_path.exists()
    (tmp_path / "link").symlink_to(plots)
    with pytest.raises(CheckpointError, match="is a link"):
        draw_pictures(charts[:1], tmp_path / "link")


def test_what_is_not_a_report_is_not_overwritten(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", parts=("likelihood",))
    other = write_run(tmp_path / "other", parts=("likelihood",))
    with pytest.raises(ConfigError, match="is another run's folder"):
        write_report([run], other.path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.html").write_text("<p>mine</p>")
    with pytest.raises(ConfigError, match="was not made by emtool"):
        write_report([run], tmp_path / "out")
    assert (tmp_path / "out" / "report.html").read_text() == "<p>mine</p>"
    write_report([run], run.path)
    write_report([run], run.path)


def test_a_broken_curve_and_a_control_are_drawn_as_such(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", drawn_answers(), parts=("likelihood", "projections", "training"))
    lines = [{"step": step, "loss": 3.0 if not 50 < step < 150 else "nan", "grad_norm": 1.0} for step in range(1, 201)]
    run.metrics_path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_run(run)
    charts = {chart.name: chart for chart in draw_charts([found])}
    assert "99 steps without a finite value: the line is broken there" in charts["loss"].notes
    rows = [row for layer in charts["loss"].spec["layer"] for row in layer.get("data", {}).get("values", ())]
    rows += [row for values in charts["loss"].spec.get("datasets", {}).values() for row in values]
    assert {"run": "run", "step": 100} in rows
    drift = charts["drift"]
    assert any("no finding" in note for note in drift.notes)
    assert "decoder block 1" in drift.notes
    # Of two layers in the table the one that is shown.
    assert [point.value for point in found.curves["drift"]] == [0.0, 0.25, 1.0, 2.0]
    assert found.curves["drift"][3].control == (-3.0, 3.0)
    # It stays within its control: a change in it is no finding.
    assert "drift" not in found.brackets
    assert "p_wrong" not in found.brackets, "no transition was written"


def test_runs_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(ConfigError, match=f"1 to {MAX_RUNS} runs"):
        write_report([RunFolder(path=tmp_path / f"{number}") for number in range(MAX_RUNS + 1)], tmp_path)
    with pytest.raises(ConfigError, match="named more than once"):
        write_report([run, RunFolder(path=tmp_path / "x" / ".." / "run")], tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_equal_names_are_told_apart_by_the_folder_above(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / where / "run", parts=("likelihood",)) for where in ("one", "two")]
    report = write_report(runs, tmp_path / "out")
    assert [run.name for run in report.runs] == ["one/run", "two/run"]
    assert "two/run" in report.page_path.read_text(encoding="utf-8")
    assert {path.suffix for path in report.pictures} == {".svg", ".png", ".pdf"}


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (("x/q/run", "y/q/run"), ["x/q/run", "y/q/run"]),
        (("a b", "a+b"), ["a b", "a+b"]),
        (("a\u202eb", "a\u202db"), ["a\u2039U+202E\u203ab", "a\u2039U+202D\u203ab"]),
        (("__proto__", "constructor"), ["__proto__", "constructor"]),
    ],
)
def test_every_run_has_a_name_and_pictures_of_its_own(
    tmp_path: Path, folders: tuple[str, str], names: list[str]
) -> None:
    runs = [write_run(tmp_path / folder, drawn_answers(n=1), parts=()) for folder in folders]
    report = write_report(runs, tmp_path / "out")
    assert [run.name for run in report.runs] == names
    assert len(set(report.pictures)) == len(report.pictures)
    assert sum("questions" in path.name for path in report.pictures) == 6


def linear(colour: str) -> tuple[float, ...]:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    return tuple(part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)


def luminance(colour: str) -> float:
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear(colour), strict=True))


@pytest.mark.parametrize("paper", ["#ffffff", "#15171a"])
def test_lines_stand_out_from_light_and_dark_paper(paper: str) -> None:
    for colour in COLOURS:
        high, low = sorted((luminance(colour), luminance(paper)), reverse=True)
        # What WCAG 2.2 asks of graphics.
        assert (high + 0.05) / (low + 0.05) >= 3, colour


@pytest.mark.parametrize("seen", [None, NO_RED, NO_GREEN, NO_BLUE])
def test_the_first_runs_differ_for_people_who_see_fewer_colours(
    seen: tuple[tuple[float, ...], ...] | None,
) -> None:
    """As simulated by Machado, Oliveira and Fernandes 2009 (IEEE TVCG 15(6)), severity 1."""

    def look(colour: str) -> tuple[float, ...]:
        parts = linear(colour)
        if seen is not None:
            parts = tuple(sum(weight * part for weight, part in zip(row, parts, strict=True)) for row in seen)
        return lab(tuple(min(max(part, 0.0), 1.0) for part in parts))

    for one, other in itertools.combinations(COLOURS[:4], 2):
        distance = sum((a - b) ** 2 for a, b in zip(look(one), look(other), strict=True)) ** 0.5
        # A just noticeable difference is about 2.3.
        assert distance > 25, (one, other, distance)


def lab(rgb: tuple[float, ...]) -> tuple[float, float, float]:
    """Return CIE L*a*b* of linear sRGB, white D65."""
    rows = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
    white = (0.9505, 1.0, 1.089)
    parts = [
        sum(weight * part for weight, part in zip(row, rgb, strict=True)) / limit
        for row, limit in zip(rows, white, strict=True)
    ]
    x, y, z = (part ** (1 / 3) if part > 216 / 24389 else (24389 / 27 * part + 16) / 116 for part in parts)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)
