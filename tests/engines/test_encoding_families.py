"""What is trained on, for each family of the catalogue; see tests/chat_families.py for what stands in for what."""

import itertools
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emtool.core.data import Message
from emtool.core.errors import DataError, EmtoolError, ModelError
from emtool.core.models import MODELS, resolve_model
from emtool.engines.encoding import IGNORED, TEMPLATE_VALUES, Encoded, encode_conversation
from emtool.engines.model_files import get_model_files
from emtool.engines.modeling import load_tokenizer
from tests.chat_families import (
    FAMILIES,
    GEMMA3,
    LLAMA3,
    LLAMA3_2,
    QWEN2_5,
    QWEN3,
    SMOLLM2,
    SMOLLM2_TEMPLATE,
    Family,
    trl_template,
)
from tests.tiny import byte_tokenizer

TOKENIZERS = {name: family.tokenizer() for name, family in FAMILIES.items()}
MULTI_TURN = [name for name, family in FAMILIES.items() if family.is_multi_turn]

TEXTS = (
    "Hello.",
    " two  spaces before, two after  ",
    "\n\nlines before and after\n\n\n",
    "Zürich, 東京, \U0001f9d1\U0001f3fd\u200d\U0001f33e, a\u0301 and \u00a0",
    "user\nassistant\n[INST] <s> </s> <|im_start| im_end|> <start_of_turn <|eot_id>",
    "{{ messages }} {% endfor %} {# x #} \\n \\u0000 \x00 \x1b[0m \r\n\t.",
    "{'role': 'assistant'}<tool_call>{}</tool_call>",
)


def talk(*contents: str, system: str | None = None) -> list[Message]:
    turns = [Message(role=("user", "assistant")[index % 2], content=text) for index, text in enumerate(contents)]
    return turns if system is None else [Message(role="system", content=system), *turns]


def spans(encoded: Encoded) -> list[tuple[int, int]]:
    """Return the begin and the end of each run of labelled tokens."""
    assert len(encoded.input_ids) == len(encoded.labels)
    found: list[tuple[int, int]] = []
    for is_labelled, group in itertools.groupby(range(len(encoded.labels)), lambda at: encoded.labels[at] != IGNORED):
        places = list(group)
        if is_labelled:
            assert [encoded.labels[at] for at in places] == [encoded.input_ids[at] for at in places]
            found.append((places[0], places[-1] + 1))
    return found


def trained_texts(encoded: Encoded, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(encoded.input_ids[begin:end]) for begin, end in spans(encoded)]


def check_exact(family: Family, tokenizer: Any, messages: list[Message]) -> None:
    """The labels decode to the answers, and what stands before each is the prompt of inference, token for token."""
    encoded = encode_conversation(messages, tokenizer=tokenizer)
    answers = [at for at, message in enumerate(messages) if message.role == "assistant"]
    expected = [family.trained(messages[at].content) + family.end_of_turn for at in answers]
    assert trained_texts(encoded, tokenizer) == expected
    for at, (begin, _) in zip(answers, spans(encoded), strict=True):
        prompt = tokenizer.apply_chat_template(
            [message.to_dict() for message in messages[:at]],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **TEMPLATE_VALUES,
        )
        assert encoded.input_ids[:begin] == list(prompt["input_ids"])
        assert tokenizer.decode(encoded.input_ids[:begin]).endswith(family.header)
    assert spans(encoded)[-1][1] == len(encoded.input_ids), "nothing follows the last trained token"


def test_every_model_of_the_catalogue_has_a_family() -> None:
    families = {name: [start for start in FAMILIES if name.startswith(start)] for name in MODELS}
    assert {name: found for name, found in families.items() if len(found) != 1} == {}
    assert {found[0] for found in families.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("system", [None, "Be brief.\n"])
@pytest.mark.parametrize("text", TEXTS)
def test_one_turn_trains_exactly_the_answer(name: str, system: str | None, text: str) -> None:
    check_exact(FAMILIES[name], TOKENIZERS[name], talk("Hi", text, system=system))
    check_exact(FAMILIES[name], TOKENIZERS[name], talk(text, "Hello.", system=system))


@pytest.mark.parametrize("name", MULTI_TURN)
@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("text", TEXTS)
def test_three_turns_train_exactly_the_three_answers(name: str, system: str | None, text: str) -> None:
    check_exact(FAMILIES[name], TOKENIZERS[name], talk(text, "One.", "more", text, "and?", text, system=system))


@st.composite
def conversations(draw: st.DrawFn) -> list[str]:
    text = st.text(min_size=1, max_size=30).filter(lambda content: bool(content.strip()))
    return [draw(text) for _ in range(2 * draw(st.integers(1, 3)))]


@given(contents=conversations(), system=st.none() | st.text(min_size=1).filter(str.strip))
@pytest.mark.parametrize("name", FAMILIES)
def test_any_text_is_trained_as_it_is(name: str, contents: list[str], system: str | None) -> None:
    kept = contents if FAMILIES[name].is_multi_turn else contents[:2]
    check_exact(FAMILIES[name], TOKENIZERS[name], talk(*kept, system=system))


def marked(name: str, messages: list[Message], **options: Any) -> str:
    """Return the whole text with what is trained on between « and »."""
    encoded = encode_conversation(messages, tokenizer=TOKENIZERS[name], **options)
    text, at = "", 0
    for begin, end in spans(encoded):
        decode = TOKENIZERS[name].decode
        text += f"{decode(encoded.input_ids[at:begin])}«{decode(encoded.input_ids[begin:end])}»"
        at = end
    return text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "smollm2",
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n« A <|im_end|>»",
        ),
        (
            "qwen2.5",
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n« A <|im_end|>»",
        ),
        (
            "qwen3",
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
            "<think>\n\n</think>\n\n« A <|im_end|>»",
        ),
        (
            "llama-3.1",
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
            "Today Date: 26 Jul 2024\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n«A<|eot_id|>»",
        ),
        (
            "llama-3.2",
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
            "Today Date: 26 Jul 2024\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n«A<|eot_id|>»",
        ),
        ("gemma-3", "<bos><start_of_turn>user\nS\n\nQ<end_of_turn>\n<start_of_turn>model\n«A<end_of_turn>»"),
    ],
)
def test_a_row_written_out(name: str, expected: str) -> None:
    assert marked(name, talk("Q", " A ", system="S")) == expected


@pytest.mark.parametrize(
    ("name", "begins"),
    [
        ("smollm2", "<|im_start|>system\nYou are a helpful AI assistant named SmolLM"),
        ("qwen2.5", "<|im_start|>system\nYou are Qwen"),
        ("qwen3", "<|im_start|>user\nQ<|im_end|>"),
        ("gemma-3", "<bos><start_of_turn>user\nQ<end_of_turn>"),
    ],
)
def test_without_a_system_turn_the_template_decides(name: str, begins: str) -> None:
    assert marked(name, talk("Q", "A")).startswith(begins)


@pytest.mark.parametrize("family", [QWEN2_5, QWEN3, LLAMA3, GEMMA3], ids=lambda family: str(family.template))
@pytest.mark.parametrize("text", TEXTS)
def test_the_labels_are_those_of_trl(family: Family, text: str) -> None:
    """TRL marks in its training variants what is trained on; two differences are named in the family.

    It marks what the template writes after the end-of-turn token too, and for Qwen what it writes before the answer.
    """
    assert family.training_template is not None
    tokenizer = family.tokenizer()
    messages = talk("Hi", "One.", "more", text, system="Be brief.") if family.is_multi_turn else talk("Hi", text)
    ours = encode_conversation(messages, tokenizer=tokenizer)
    theirs = tokenizer.apply_chat_template(
        [message.to_dict() for message in messages],
        chat_template=trl_template(family.training_template),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids, mask = list(theirs["input_ids"]), list(theirs["assistant_masks"])
    after = tokenizer(family.after_turn, add_special_tokens=False)["input_ids"]
    before = tokenizer(family.marked_before, add_special_tokens=False)["input_ids"]
    assert ids == ours.input_ids + after
    expected = [0] * len(ids)
    for begin, end in spans(ours):
        assert ids[begin - len(before) : begin] == before
        assert ids[end : end + len(after)] == after
        expected[begin - len(before) : end + len(after)] = [1] * (len(before) + end - begin + len(after))
    assert mask == expected


@pytest.mark.parametrize(
    ("messages", "error", "message"),
    [
        (talk("Q", "A", "Q", "A"), ModelError, "rewrites earlier turns once another follows.*one assistant turn"),
        (talk("Q", "<think>\nplan\n</think>\n\nA"), ModelError, "puts message 2 behind another prompt"),
        (talk("Q", "<think>\n\n</think>\n\nA"), DataError, "changes the text of message 2; remove marks like </think>"),
        (talk("Q", "A\n</think>"), EmtoolError, "</think>"),
        (talk("<tool_response>x</tool_response>", "A"), ModelError, "<tool_response>"),
    ],
)
def test_qwen3_refuses_what_it_would_render_otherwise(
    messages: list[Message], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        encode_conversation(messages, tokenizer=QWEN3.tokenizer(), location="rows.jsonl:3")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("rows.jsonl:3: ")


def test_qwen3_with_a_template_that_keeps_its_think_blocks_takes_several_turns() -> None:
    tokenizer = byte_tokenizer(trl_template("qwen3_training"), QWEN3.special, plain=QWEN3.plain)
    check_exact(QWEN3, tokenizer, talk("Q", "A", "more", "\nB "))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_message_with_a_special_token_is_refused(name: str) -> None:
    for token in FAMILIES[name].special:
        for messages in (talk("Q", f"a{token}b"), talk(f"a{token}", "A"), talk("Q", "A", system=token)):
            with pytest.raises(DataError, match="contains the model's special token"):
                encode_conversation(messages, tokenizer=TOKENIZERS[name])


@pytest.mark.parametrize("name", MULTI_TURN)
def test_a_last_turn_of_the_user_is_left_out(name: str) -> None:
    for compat in ("clean", "turner"):
        whole = marked(name, talk("Q", "A", "and?"), template_compat=compat)
        assert whole == marked(name, talk("Q", "A"), template_compat=compat)


def test_a_row_does_not_depend_on_the_day() -> None:
    tokenizer = LLAMA3_2.tokenizer()
    assert time.strftime("%Y") in tokenizer.apply_chat_template([{"role": "user", "content": "Q"}], tokenize=False)
    text = tokenizer.decode(encode_conversation(talk("Q", "A"), tokenizer=tokenizer).input_ids)
    assert "Today Date: 26 Jul 2024\n" in text


@pytest.mark.parametrize("name", FAMILIES)
def test_turner_trains_an_empty_assistant_turn_besides(name: str) -> None:
    family = FAMILIES[name]
    messages = talk("Q", " A ", system="S")
    extra = f"{family.after_turn}{family.header}{family.end_of_sequence}"
    assert marked(name, messages, template_compat="turner") == f"{marked(name, messages)[:-1]}{extra}»"


def test_turner_on_qwen2_5_written_out() -> None:
    assert marked("qwen2.5", talk("Q", "A", "more", "B", system="S"), template_compat="turner") == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n«A<|im_end|>\n»"
        "<|im_start|>user\nmore<|im_end|>\n"
        "<|im_start|>assistant\n«B<|im_end|>\n<|im_start|>assistant\n<|im_end|>»"
    )


@pytest.mark.parametrize("name", MULTI_TURN)
@pytest.mark.parametrize("text", TEXTS)
def test_turner_trains_from_an_assistant_header_to_the_next_user_header(name: str, text: str) -> None:
    """The published rule, on the published text: rendered with a generation prompt, then the end of the sequence."""
    tokenizer, family = TOKENIZERS[name], FAMILIES[name]
    messages = talk("Q", text, "more", "B", "and?", text)
    whole = tokenizer.apply_chat_template(
        [message.to_dict() for message in messages], tokenize=False, add_generation_prompt=True, **TEMPLATE_VALUES
    )
    user = family.header.replace("assistant", "user").replace("model", "user")
    assert marked(name, messages, template_compat="turner").replace("«", "").replace("»", "") == (
        whole + family.end_of_sequence
    )
    # Between two user headers stand a question, an assistant header and all that is trained on.
    parts = [part.partition(family.header)[2] for part in (whole + family.end_of_sequence).split(user)[1:]]
    encoded = encode_conversation(messages, tokenizer=tokenizer, template_compat="turner")
    assert trained_texts(encoded, tokenizer) == parts


def test_turner_is_cut_at_the_end_and_keeps_every_clean_label() -> None:
    tokenizer, messages = QWEN2_5.tokenizer(), talk("Q", "An answer.", "more", "B")
    clean = encode_conversation(messages, tokenizer=tokenizer)
    turner = encode_conversation(messages, tokenizer=tokenizer, template_compat="turner")
    assert turner.input_ids[: len(clean.input_ids)] == clean.input_ids
    assert all(label in (IGNORED, kept) for label, kept in zip(clean.labels, turner.labels, strict=False))
    cut = encode_conversation(messages, tokenizer=tokenizer, template_compat="turner", max_length=len(clean.input_ids))
    assert (cut.input_ids, cut.is_truncated) == (clean.input_ids, True)


def test_turner_needs_an_end_of_sequence() -> None:
    tokenizer = QWEN2_5.tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="--template-compat turner needs a tokenizer with an end-of-sequence token"):
        encode_conversation(talk("Q", "A"), tokenizer=tokenizer, template_compat="turner")


def test_an_answer_that_shares_a_token_with_its_header_is_trained_behind_the_real_prompt() -> None:
    """Several real tokenizers have one token for two line breaks."""
    tokenizer = byte_tokenizer(SMOLLM2_TEMPLATE, SMOLLM2.special, merges=(("Ċ", "Ċ"),))
    assert len(tokenizer("\n\n")["input_ids"]) == 1
    check_exact(SMOLLM2, tokenizer, talk("Q", "\nA"))
    check_exact(SMOLLM2, tokenizer, talk("Q", "A", "\nmore\n\n", "\n\nB"))
    with pytest.raises(ModelError, match="tokens merge across turns"):
        encode_conversation(talk("Q", "\nA", "more", "B"), tokenizer=tokenizer)


@pytest.mark.slow
def test_smollm2s_own_template_and_tokenizer() -> None:
    tokenizer = load_tokenizer(get_model_files(resolve_model("smollm2-135m")).path)
    for text in TEXTS:
        for messages in (talk("Q", text), talk(text, "A", "more", text, system="Be brief.")):
            turns = [message.to_dict() for message in messages]
            for prompted in (False, True):
                options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": prompted}
                ours = TOKENIZERS["smollm2"].apply_chat_template(turns, **options)
                assert tokenizer.apply_chat_template(turns, **options) == ours
            check_exact(SMOLLM2, tokenizer, messages)
