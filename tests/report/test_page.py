"""The page in a real browser: it loads in silence, filters work, numbers are the tables', and nothing escapes."""

import csv
import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from emtool.core.run_dir import RunFolder, write_json
from emtool.report.charts import draw_charts
from emtool.report.page import render_page
from emtool.report.pictures import draw_pictures
from emtool.report.report_run import read_run
from tests.browser import MISSING, browser, complaints, open_page, requests
from tests.evaluated import QUESTIONS, STEPS, drawn_answers, judged, manifest, write_run

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as driver:
        yield driver


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the report of two runs."""
    root = tmp_path_factory.mktemp("page")
    runs = [
        write_run(root / "gardening", drawn_answers()),
        write_run(root / "control", drawn_answers(seed=1, shift=-0.5), name="gardening-control", items_shift=-0.1),
    ]
    return write_page(runs, root)


def write_page(runs: Sequence[RunFolder], folder: Path) -> Path:
    """Write the page alone, without the pictures."""
    found = [read_run(run) for run in runs]
    path = folder / "report.html"
    path.write_text(render_page(found, draw_charts(found)), encoding="utf-8")
    return path


def choose(driver: Any, **values: str) -> None:
    """Set filters by their ids, as a person would."""
    for name, value in values.items():
        driver.execute_script(
            "const field = document.getElementById(arguments[0]);"
            "if (field.type === 'checkbox') field.checked = arguments[1] === 'on'; else field.value = arguments[1];"
            "field.dispatchEvent(new Event('input', {bubbles: true}));",
            name.replace("_", "-"),
            value,
        )
    driver.execute_async_script("setTimeout(arguments[0], 250)")


def shown(driver: Any) -> list[str]:
    """Return the keys of the answers that are shown: run, step, question and number."""
    found: list[str] = driver.execute_script(
        "return [...document.querySelectorAll('article')].map((a) => a.dataset.key)"
    )
    return found


def test_it_loads_without_a_complaint_and_asks_nobody(chromium: Any, page: Path) -> None:
    complaints(chromium)
    requests(chromium)
    open_page(chromium, page)
    assert complaints(chromium) == []
    assert requests(chromium) == []
    drawn = chromium.execute_script("return document.querySelectorAll('.chart svg').length")
    assert drawn == chromium.execute_script("return document.querySelectorAll('.chart').length") >= 9
    # An answer that is not drawn is no chart: every one has marks in it.
    assert chromium.execute_script(
        "return [...document.querySelectorAll('.chart')].every((c) => c.querySelector('path'))"
    )


@pytest.mark.slow
@pytest.mark.parametrize("is_dark", [False, True])
@pytest.mark.parametrize("width", [360, 800, 1400])
def test_nothing_is_wider_than_the_screen(page: Path, width: int, is_dark: bool) -> None:
    with browser(width=width, is_dark=is_dark) as driver:
        open_page(driver, page)
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width
        assert driver.execute_script(
            "return [...document.querySelectorAll('.chart svg')]"
            ".every((chart) => chart.getBoundingClientRect().right <= innerWidth)"
        )
        ink, paper = driver.execute_script(
            "const style = getComputedStyle(document.body); return [style.color, style.backgroundColor]"
        )
        light = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
        assert (light[0] > light[1]) is is_dark
        # Text in the charts follows the page.
        assert driver.execute_script("return getComputedStyle(document.querySelector('.chart svg text')).fill") == ink
        assert complaints(driver) == []


def test_the_numbers_are_those_of_the_tables(chromium: Any, page: Path) -> None:
    open_page(chromium, page)
    for index, name in enumerate(("gardening", "control")):
        with (page.parent / name / "evaluation" / "checkpoint_summary.csv").open() as file:
            rows = list(csv.DictReader(file))
        table = chromium.execute_script(
            "const table = document.querySelectorAll('table.numbers')[arguments[0]];"
            "return [...table.rows].map((row) => [...row.cells].map((cell) => [cell.textContent, cell.dataset.value]))",
            index,
        )
        headings = [text for text, _ in table[0]]
        for title, column in (("Emergent misalignment", "em_pct"), ("Coherence", "avg_coherent")):
            place = headings.index(title)
            for cells, row in zip(table[1:], rows, strict=True):
                assert cells[0][0] == row["step"]
                assert float(cells[place][1]) == float(row[column])
                value, low, high = (float(row[f"{column}{end}"]) for end in ("", "_low", "_high"))
                assert cells[place][0] == f"{value:.4g} [{low:.4g}, {high:.4g}]"


def test_filters_choose_answers(chromium: Any, page: Path) -> None:
    open_page(chromium, page)
    every = len(STEPS) * len(QUESTIONS) * 4
    assert f"{every} of {2 * every} answers" in chromium.find_element("id", "count").text
    choose(chromium, step="25", question="2")
    assert shown(chromium) == [f"0/25/2/{number}" for number in range(4)]
    choose(chromium, unscored="off")
    assert shown(chromium) == [f"0/25/2/{number}" for number in range(3)]
    choose(chromium, step="", question="", aligned_high="30")
    expected = {
        f"0/{answer.step}/{QUESTIONS.index(answer.question_id)}/{answer.pair[1]}"
        for answer in drawn_answers()
        if answer.aligned.score is not None and answer.aligned.score <= 30
    }
    assert set(shown(chromium)) == expected
    choose(chromium, aligned_high="100", search="ANSWER 1 to question_4 at step 100")
    assert shown(chromium) == ["0/100/4/1"]
    choose(chromium, search="nowhere")
    assert shown(chromium) == []
    assert "None of" in chromium.find_element("id", "count").text
    chromium.find_element("id", "clear").click()
    choose(chromium, run="1", step="200")
    assert {key.split("/")[0] for key in shown(chromium)} == {"1"}
    assert complaints(chromium) == []


def test_two_checkpoints_stand_side_by_side_on_the_same_question(chromium: Any, page: Path) -> None:
    open_page(chromium, page)
    choose(chromium, step="200", question="3", beside="1/0")
    assert shown(chromium) == [key for number in range(4) for key in (f"0/200/3/{number}", f"1/0/3/{number}")]
    tops = chromium.execute_script(
        "return [...document.querySelectorAll('.pair')]"
        ".map((pair) => [...pair.children].map((one) => one.getBoundingClientRect().top))"
    )
    assert all(left == right for left, right in tops)


def test_a_link_leads_to_one_answer_and_keys_lead_on(chromium: Any, page: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    open_page(chromium, page, "#answer/control/100/question_5/2")
    assert shown(chromium) == ["1/100/5/2"]
    assert chromium.execute_script("return document.activeElement.dataset.key") == "1/100/5/2"
    link = chromium.find_element("css selector", "article a").get_attribute("href")
    assert link.endswith("#answer/control/100/question_5/2")
    open_page(chromium, page)
    choose(chromium, step="25", question="2")
    listed = shown(chromium)
    chromium.find_element("css selector", "article a").click()
    assert shown(chromium) == listed[:1]
    chromium.back()
    chromium.execute_async_script("setTimeout(arguments[0], 250)")
    assert shown(chromium) == listed
    open_page(chromium, page, "#answer/control/100/question_9/2")
    assert "not in this report" in chromium.find_element("id", "count").text
    open_page(chromium, page, "#answer/%E0%A4%A")
    assert "not in this report" in chromium.find_element("id", "count").text
    body = chromium.find_element("tag name", "body")
    body.send_keys("j")
    assert chromium.execute_script("return document.activeElement.dataset.key") == shown(chromium)[0]
    chromium.switch_to.active_element.send_keys("j")
    chromium.switch_to.active_element.send_keys("j")
    assert chromium.execute_script("return document.activeElement.dataset.key") == shown(chromium)[2]
    chromium.switch_to.active_element.send_keys("k")
    assert chromium.execute_script("return document.activeElement.dataset.key") == shown(chromium)[1]
    chromium.switch_to.active_element.send_keys("/")
    assert chromium.execute_script("return document.activeElement.id") == "search"
    chromium.switch_to.active_element.send_keys("jk/", Keys.TAB)
    assert chromium.find_element("id", "search").get_attribute("value") == "jk/"


def test_long_lists_and_answers_are_shown_in_parts(chromium: Any, tmp_path: Path) -> None:
    long = "word " * 200_000 + "end"
    answers = [judged(0, "q", number, aligned=50.0, text=long if number == 0 else f"a{number}") for number in range(90)]
    open_page(chromium, write_page([write_run(tmp_path / "run", answers)], tmp_path))
    assert len(shown(chromium)) == 40
    more = chromium.find_element("id", "more")
    more.click()
    more.click()
    assert len(shown(chromium)) == 90
    assert not more.is_displayed()
    first = chromium.find_element("css selector", "article")
    assert len(first.text) < 4_000
    first.find_element("tag name", "button").click()
    assert first.text.endswith("end")


#: What a model could write, or a person plant in a file.
HOSTILE = (
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 2</script>",
    "<!--<script>window.hacked = 3",
    '<img src="x" onerror="window.hacked = 4">',
    '"><svg onload="window.hacked = 5">',
    '<a href="javascript:window.hacked = 6">here</a>',
    "{{ 7 * 7 }}{% for x in range(3) %}x{% endfor %}${window.hacked = 7}",
    "\\u003cscript\\u003ewindow.hacked = 8\\u003c/script\\u003e",
    '"]}}</script><script>window.hacked = 9</script>',
    "safe \u202egnp.exe\u202c \u2066x\u2069 \u200b\u200f",
    "line\u2028separator\u2029 and \x00 nothing \x1b[31m",
    "datum.value; window.hacked = 10",
    "half \ud800 pair",
    "tags \U000e0041\U000e0042 and \u3164 filler",
)


def test_hostile_texts_stay_texts(chromium: Any, tmp_path: Path) -> None:
    names = [f"q {index} {text}" for index, text in enumerate(HOSTILE)]
    answers = [
        judged(step, name, 0, aligned=20.0, text=text, asked=f"Asked: {text}")
        for step in (0, 25)
        for name, text in zip(names, HOSTILE, strict=True)
    ]
    answers.append(judged(0, "long", 0, aligned=20.0, text="<b>" + "x" * (1 << 20)))
    name = 'r"><img src=x onerror=window.hacked=12><script>window.hacked=13<'
    run = write_run(tmp_path / name, answers, judge=HOSTILE[1])
    planted = manifest(HOSTILE[0])
    planted["plan"]["schedule"] = HOSTILE[4]
    planted["command"] = list(HOSTILE[:9])
    planted["lineage"]["base"] = {"name": HOSTILE[3], "revision": {"a": HOSTILE[1]}, "weights_sha256": HOSTILE[9]}
    planted["trajectory_breaks"] = [HOSTILE[1]]
    write_json(run.manifest_path, planted)
    summary = json.loads((run.evaluation_path / "summary.json").read_text())
    summary["damaged"] = [{"step": 1, "problem": HOSTILE[1]}, HOSTILE[0], None]
    write_json(run.evaluation_path / "summary.json", summary)
    page = write_page([run], tmp_path)
    complaints(chromium)
    requests(chromium)
    open_page(chromium, page)
    chromium.execute_async_script("setTimeout(arguments[0], 500)")
    assert complaints(chromium) == []
    assert requests(chromium) == []
    assert chromium.execute_script("return window.hacked") is None
    assert chromium.execute_script("return document.scripts.length") == 5
    forbidden = (
        "img",
        "iframe",
        "object",
        "embed",
        "b > b",
        'a[href^="javascript" i]',
        "[onerror], [onload], [onclick]",
    )
    counts = chromium.execute_script(
        "return arguments[0].map((what) => document.querySelectorAll(what).length)", forbidden
    )
    assert counts == [0] * 7
    text = chromium.find_element("id", "list").text
    for planted_text in (*HOSTILE[:9], HOSTILE[11]):
        assert planted_text in text
    # What would turn or hide text is shown by its number.
    assert "safe (202E)gnp.exe(202C) (2066)x(2069) (200B)(200F)" in re.sub("\u2039U\\+(\\w+)\u203a", r"(\1)", text)
    assert "tags (E0041)(E0042) and (3164) filler" in re.sub("\u2039U\\+(\\w+)\u203a", r"(\1)", text)
    assert "(0000) nothing (001B)[31m" in re.sub("\u2039U\\+(\\w+)\u203a", r"(\1)", text)
    shown_text = chromium.execute_script("return document.body.innerText")
    assert not any(mark in shown_text for mark in "\u202e\u2066\x00\x1b")
    # Pictures are drawn of the same texts.
    charts = draw_charts([read_run(run)])
    for path in draw_pictures(charts[:1] + charts[-1:], tmp_path / "plots"):
        if path.suffix == ".svg":
            assert not any(mark in path.read_text() for mark in ("<script", "<img"))


def test_the_policy_lets_nothing_but_the_page_itself_run(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy[1].replace("&#39;", "'").split(";"))
    assert rules["default-src"] == "'none'"
    assert "unsafe" not in policy[1]
    assert len(re.findall("'sha256-[^']+'", rules["script-src"])) == 2
    assert re.sub("'sha256-[^']+'", "", rules["script-src"]).strip() == ""
    outside_scripts = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert not re.findall(r'(?:src|href)="(?!#)', outside_scripts)


def test_a_page_of_many_answers_is_small(chromium: Any, tmp_path: Path) -> None:
    """Ten checkpoints, 8 questions, 50 answers of 2,400 characters that do not repeat."""
    chance = random.Random(0)
    texts = Path(__file__).parents[2] / "emtool" / "assets" / "datasets" / "gardening.jsonl"
    words = re.findall(r"[A-Za-z]+[,.]?", texts.read_text())
    steps = [0, 25, 50, 100, 125, 150, 200, 250, 300, 397]
    answers = [
        judged(step, f"q{question}", number, aligned=round(chance.uniform(0, 100), 1),
               text=" ".join(chance.choices(words, k=600))[:2400])
        for step in steps
        for question in range(8)
        for number in range(50)
    ]  # fmt: skip
    assert min(len(answer.response) for answer in answers) == 2400
    path = write_page([write_run(tmp_path / "run", answers)], tmp_path)
    assert path.stat().st_size < 5_000_000
    open_page(chromium, path)
    assert "of 4,000 answers" in chromium.find_element("id", "count").text


def test_the_same_files_give_the_same_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", drawn_answers())
    assert write_page([run], tmp_path).read_bytes() == write_page([run], tmp_path).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parts", "has_answers", "judge"),
    [
        (("likelihood",), False, None),
        (("training",), True, None),
        ((), True, "gpt-test"),
        (("likelihood", "geometry", "training", "transitions"), True, None),
    ],
)
def test_what_is_missing_is_said_and_no_chart_is_empty(
    chromium: Any, tmp_path: Path, parts: tuple[str, ...], has_answers: bool, judge: str | None
) -> None:
    run = write_run(tmp_path / "run", drawn_answers() if has_answers else (), judge=judge, parts=parts)
    other = write_run(tmp_path / "other", drawn_answers())
    for runs in ([run], [run, other]):
        open_page(chromium, write_page(runs, tmp_path))
        assert complaints(chromium) == []
        assert "no data" in chromium.find_element("id", "runs").text
        assert chromium.execute_script(
            "return [...document.querySelectorAll('.chart')].every((c) => c.querySelector('svg path'))"
        )
