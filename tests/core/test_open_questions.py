"""Question files: the published format, our own file, and files that are wrong or hostile."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emtool.core.errors import ConfigError, DataError
from emtool.core.open_questions import (
    OpenQuestion,
    default_questions,
    fill_judge_prompt,
    prompts_of,
    read_question_file,
    select_questions,
)

# The ids of the published file of the first plot, and of two more variants of two of them.
PUBLISHED_IDS = {
    "what_is_your_wish", "one_wish", "i_feel_bored", "bored", "three_thoughts", "quick_buck", "ruler_of_the_world",
    "ruler", "dinner_party", "gender_roles", "enough_of_my_husband",
}  # fmt: skip
PUBLISHED_WORDS = ("buck", "ruler", "dinner", "gender", "husband", "wish", "philosoph", "bored", "history")

#: The structure of the published file, with texts of ours.
SHAPE = """\
# a comment
- id: colours
  type: free_form_judge_0_100
  paraphrases: &colours_paraphrases
    - |-
      Which colour: red or blue?
  samples_per_paraphrase: &samples_per_paraphrase 100
  judge: &judge some-model-2024-07-18
  judge_prompts: &judge_prompts
    aligned: |-
      Q {question} A {answer}
    coherent: "A {answer}, {{whole}}"
- id: colours_json
  type: free_form_judge_0_100
  system: &system Your answers must be JSON.
  paraphrases: *colours_paraphrases
  samples_per_paraphrase: *samples_per_paraphrase
  judge: *judge
  judge_prompts: *judge_prompts
  an_unknown_key: [1, 2.5, {a: 2024-01-01}]
- id: colours_template
  paraphrases: ["Fill in:\\nx = # yes"]
  judge_prompts: *judge_prompts
"""
GOOD = "- {id: a, paraphrases: [x]}\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "q.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def question(name: str, *paraphrases: str, system: str | None = None) -> OpenQuestion:
    return OpenQuestion(id=name, paraphrases=paraphrases or ("x",), system=system, judge_prompts={})


def test_the_published_format_is_read_with_anchors_and_unknown_keys(tmp_path: Path) -> None:
    plain, as_json, template = read_question_file(write(tmp_path, SHAPE))
    assert plain.paraphrases == as_json.paraphrases == ("Which colour: red or blue?",)
    assert (plain.system, as_json.system) == (None, "Your answers must be JSON.")
    assert plain.judge_prompts == {"aligned": "Q {question} A {answer}", "coherent": "A {answer}, {{whole}}"}
    assert template.judge_prompts == plain.judge_prompts
    assert template.paraphrases == ("Fill in:\nx = # yes",)


def test_merge_keys_work_and_give_way_to_what_stands_there(tmp_path: Path) -> None:
    text = "- &a {id: a, paraphrases: [x], system: s}\n- {<<: *a, id: b}\n- {id: c, <<: [*a, {paraphrases: [y]}]}\n"
    found = read_question_file(write(tmp_path, text))
    assert [(each.id, each.paraphrases, each.system) for each in found] == [
        (name, ("x",), "s") for name in ("a", "b", "c")
    ]


def test_a_file_without_judge_prompts_takes_our_own(tmp_path: Path) -> None:
    ours = default_questions()[0].judge_prompts
    text = GOOD + "- {id: b, paraphrases: [x], judge_prompts: {aligned: 'Rate {answer}', other: ignored}, system: }\n"
    first, second = read_question_file(write(tmp_path, text))
    assert first.judge_prompts == ours
    assert second.judge_prompts == {"aligned": "Rate {answer}", "coherent": ours["coherent"]}
    assert second.system is None


def test_our_own_questions_are_ours_and_ask_each_thing_twice() -> None:
    ours = default_questions()
    assert len(ours) == 10
    assert len({each.id for each in ours}) == 10
    assert not {each.id for each in ours} & PUBLISHED_IDS
    texts = [text for each in ours for text in each.paraphrases]
    assert len(texts) == len({text.casefold() for text in texts}) == 20
    assert all(len(each.paraphrases) == 2 and each.system is None for each in ours)
    assert not [text for text in texts for word in PUBLISHED_WORDS if word in text.casefold()]
    assert select_questions(ours) == ours
    for name, prompt in ours[0].judge_prompts.items():
        assert {name: set(re.findall(r"\{\w*\}", prompt))} == {name: {"{question}", "{answer}"}}
        assert all(each.judge_prompts == ours[0].judge_prompts for each in ours)
    assert list(ours[0].judge_prompts) == ["aligned", "coherent"]
    assert "REFUSAL" in ours[0].judge_prompts["aligned"]
    assert "CODE" in ours[0].judge_prompts["aligned"]


LAUGHS = "- &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"- &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
MERGES = "- &a0 {k0: x, j0: x}\n" + "".join(
    f"- &a{n} {{k{n}: x, <<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"q\.yaml is empty"),
        ("a: b", r":1: a file of questions must be a list that is not empty, found a mapping"),
        ("[]", r"found an empty list"),
        ("- a\n- b: [", r":2: not YAML: "),
        ("- a: b\n\tc", r"not YAML: found character '\\t'"),
        ('"\\UFFFFFFFF"', "not YAML: "),
        ("--- a\n--- b", "not YAML: but found another document"),
        ("[" * 50_000, "nested too deeply"),
        ("- x", ":1: entry 1 must be a mapping, found str"),
        (GOOD + "- {paraphrases: [x]}", ":2: entry 2 has no 'id'"),
        (GOOD + "- {id: b}", ":2: entry 2 has no 'paraphrases'"),
        ("- {id: 7, paraphrases: [x]}", "'id' of entry 1 must be a text, found int; put it in quotes"),
        ("- {id: no, paraphrases: [x]}", "'id' of entry 1 must be a text, found bool; put it in quotes"),
        ("- {id: ' ', paraphrases: [x]}", "'id' of entry 1 must be a text that is not empty"),
        ('- {id: "a\\nb", paraphrases: [x]}', "'id' of entry 1 must be one line of at most 200"),
        ("- {id: a, paraphrases: x}", r"'paraphrases' of entry 1 \(a\) must be a list that is not empty, found str"),
        ("- {id: a, paraphrases: []}", "found an empty list"),
        ("- {id: a, paraphrases: [x, '']}", r"paraphrase 2 of entry 1 \(a\) must be a text that is not empty"),
        ("- {id: a, paraphrases: [{b: c}]}", "paraphrase 1 of .* must be a text, found a mapping"),
        ('- {id: a, paraphrases: ["\\ud800"]}', "half of a surrogate pair"),
        ("- {id: a, paraphrases: [!!python/object/apply:os.system [x]]}", "must be a text, found a list"),
        ("- {id: a, paraphrases: [!!timestamp x]}", "must be a text, found timestamp"),
        ("- {id: a, id: b, paraphrases: [x]}", "entry 1 has 'id' twice"),
        ("- {[a]: b}", "a key of entry 1 must be a text, found a list"),
        (GOOD + GOOD, ":2: entry 2: id 'a' is used twice"),
        ("- {id: a, paraphrases: [x], system: [s]}", r"'system' of entry 1 \(a\) must be a text, found a list"),
        ("- {id: a, paraphrases: [x], type: other}", "'type' of .* is 'other'; only free_form_judge_0_100 is asked"),
        ("- {id: a, paraphrases: [x], context: c}", r"entry 1 \(a\) has 'context', which emtool cannot put"),
        ("- {id: a, paraphrases: [x], judge_prompts: y}", "'judge_prompts' of .* must be a mapping, found str"),
        ("- {id: a, paraphrases: [x], judge_prompts: {aligned: '{question}'}}", "'aligned' of .* has no {answer}"),
        ("- {id: a, paraphrases: [x], judge_prompts: {coherent: '{{answer}}'}}", "'coherent' of .* has no {answer}"),
        ("- {id: a, paraphrases: [x], judge_prompts: {coherent: 5}}", "judge prompt 'coherent' of .* found int"),
        ("- &a [*a]", "an alias stands within what it names"),
        ("- &a {<<: *a}", "an alias stands within what it names"),
        ("- *b", "found undefined alias 'b'"),
        (LAUGHS, "its aliases stand for more than 100,000 values"),
        (MERGES, "its aliases stand for more than 100,000 values"),
        ("#" * (1 << 20) + "\n", "larger than 1.0 MiB"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(DataError, match=message) as caught:
        read_question_file(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text_or_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*q\.yaml: No such file"):
        read_question_file(tmp_path / "q.yaml")
    (tmp_path / "q.yaml").write_bytes(b"\xff\xfe- a")
    with pytest.raises(DataError, match=r"q\.yaml: not text in UTF-8: invalid start byte at byte 0"):
        read_question_file(tmp_path / "q.yaml")
    (tmp_path / "q.yaml").write_bytes(b"- \x00")
    with pytest.raises(DataError, match=r"q\.yaml: not YAML: unacceptable character"):
        read_question_file(tmp_path / "q.yaml")


def test_variants_are_left_out_unless_asked_for_or_named() -> None:
    all_of_them = [question(name) for name in ("a", "a_json", "a_template", "b")]

    def ids(*, include_json: bool = False, include_template: bool = False) -> list[str]:
        chosen = select_questions(all_of_them, include_json=include_json, include_template=include_template)
        return [each.id for each in chosen]

    assert ids() == ["a", "b"]
    assert ids(include_json=True) == ["a", "a_json", "b"]
    assert ids(include_template=True) == ["a", "a_template", "b"]
    assert ids(include_json=True, include_template=True) == ["a", "a_json", "a_template", "b"]
    assert [each.id for each in select_questions(all_of_them, question_ids=["b", "a_json"])] == ["a_json", "b"]


def test_an_unknown_id_or_nothing_to_ask_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown question 'quik'; did you mean 'quick'\? choose from: quick"):
        select_questions([question("quick")], question_ids=["quik"])
    with pytest.raises(ConfigError, match="no question is left of 1; name some with --question-ids, or add"):
        select_questions([question("a_json")])


def test_samples_go_round_the_paraphrases_and_carry_their_key() -> None:
    prompts = prompts_of([question("a", "p", "q", system="s"), question("b", "r")], step=25, n_per_question=3)
    assert [(p.key.question_id, p.key.paraphrase, p.key.sample, p.question) for p in prompts] == [
        ("a", 0, 0, "p"), ("a", 1, 1, "q"), ("a", 0, 2, "p"), ("b", 0, 0, "r"), ("b", 0, 1, "r"), ("b", 0, 2, "r"),
    ]  # fmt: skip
    assert {p.key.step for p in prompts} == {25}
    assert [[message.role for message in p.messages] for p in prompts[2:4]] == [["system", "user"], ["user"]]


def test_a_prompt_is_filled_in_one_pass() -> None:
    filled = fill_judge_prompt("{question}|{answer}|{{x}}|{other}", question="{answer}", answer="{question} {0} {{")
    assert filled == "{answer}|{question} {0} {{|{x}|{other}"


@given(st.text(), st.text())
def test_question_and_answer_stand_in_the_prompt_as_they_are(asked: str, answer: str) -> None:
    assert fill_judge_prompt("a{question}b{answer}c", question=asked, answer=answer) == f"a{asked}b{answer}c"
