"""Backends that need no model here: a server that speaks the OpenAI protocol, and a script."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from emtool.core.answers import AnswerKey, Completion, Prompt
from emtool.core.data import Message
from emtool.core.errors import BackendError, CheckpointError, ConfigError, DataError
from emtool.core.events import Event, Notice
from emtool.core.server_address import ServerKey, parse_address
from emtool.engines.backends.openai import OpenAIBackend, request_seed
from emtool.engines.backends.scripted import ScriptedBackend
from tests.openai_server import Fault, OpenAIServer, reply, retry, serve_openai

KEY = "sk-backend-0123456789"
PURE = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}


def backend_at(url: str, **changes: Any) -> OpenAIBackend:
    given = {"sampling": PURE, "max_new_tokens": 64, "seed": 42, "max_retries": 2, **changes}
    return OpenAIBackend(address=parse_address(url), key=ServerKey(variable="EMTOOL_KEY", value=KEY), **given)


def prompt(question_id: str = "q", *, step: int = 25, paraphrase: int = 0, sample: int = 0) -> Prompt:
    key = AnswerKey(step=step, question_id=question_id, paraphrase=paraphrase, sample=sample)
    return Prompt(key=key, messages=(Message(role="system", content="s"), Message(role="user", content=question_id)))


def answers(backend: OpenAIBackend | ScriptedBackend, prompts: list[Prompt]) -> list[Completion]:
    completions: dict[int, Completion] = {}
    backend.generate(prompts, completions.__setitem__)
    assert sorted(completions) == list(range(len(prompts)))
    return [completions[index] for index in range(len(prompts))]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint-25"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


@pytest.mark.parametrize("name", ["step-25", "checkpoint-25"])
def test_a_listed_model_answers_with_explicit_sampling(name: str, tmp_path: Path) -> None:
    with serve_openai(lambda _body: reply("Hi", finish="length", tokens=64), models=("base", name)) as served:
        backend = backend_at(served.url)
        backend.use_checkpoint(25, tmp_path)
        assert answers(backend, [prompt()]) == [Completion(text="Hi", finish_reason="length", num_tokens=64)]
        backend.close()
        body = served.chats[-1]
    assert body == {
        "model": name,
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
        "max_tokens": 64,
        "temperature": 1.0,
        "top_p": 1.0,
        "seed": request_seed(42, prompt().key),
        "top_k": -1,
        "repetition_penalty": 1.0,
        "min_p": 0.0,
        "chat_template_kwargs": {"enable_thinking": False, "date_string": "26 Jul 2024"},
    }
    assert backend.settings["temperature"] == 1.0
    assert KEY not in repr(backend.settings)


def test_a_server_without_extras_is_sent_none(tmp_path: Path) -> None:
    with serve_openai(lambda _body: reply("Hi"), models=("step-0",)) as served:
        backend = backend_at(served.url, extras=False)
        backend.use_checkpoint(0, tmp_path)
        answers(backend, [prompt()])
        assert not {"top_k", "repetition_penalty", "min_p", "chat_template_kwargs"} & set(served.chats[-1])
    with pytest.raises(ConfigError, match="cannot be told top_k"):
        backend_at("http://localhost/v1", extras=False, sampling={**PURE, "top_k": 20})


def test_names_of_ones_own_need_the_step(tmp_path: Path) -> None:
    with serve_openai(lambda _body: reply("Hi"), models=("run7-at-25", "step-25")) as served:
        backend = backend_at(served.url, model_name="run7-at-{step}")
        backend.use_checkpoint(25, tmp_path)
        answers(backend, [prompt()])
        assert served.chats[-1]["model"] == "run7-at-25"
    with pytest.raises(ConfigError, match="same for every checkpoint"):
        backend_at("http://localhost/v1", model_name="run7")


def test_an_adapter_is_loaded_on_request_and_let_go(adapter: Path) -> None:
    with serve_openai(lambda _body: reply("Hi"), models=("base",), can_load=True) as served:
        backend = backend_at(served.url)
        backend.use_checkpoint(25, adapter)
        (name,) = set(served.models) - {"base"}
        assert name.startswith("step-25-")
        answers(backend, [prompt()])
        assert served.chats[-1]["model"] == name
        (adapter / "adapter_model.safetensors").write_bytes(b"others")
        backend.use_checkpoint(25, adapter)
        assert name not in served.models
        assert len(served.models) == 2
        backend.close()
        backend.close()
        assert served.models == ["base"]
    loads = [asked.body for asked in served.requests if asked.path == "/v1/load_lora_adapter"]
    assert loads[0] == {"lora_name": name, "lora_path": str(adapter.resolve())}


def test_a_server_that_neither_lists_nor_loads_is_an_error_and_stays_usable(adapter: Path) -> None:
    with serve_openai(lambda _body: reply("Hi"), models=("step-50",)) as served:
        backend = backend_at(served.url)
        with pytest.raises(CheckpointError, match=r"404: Not Found.*VLLM_ALLOW_RUNTIME_LORA_UPDATING.*step-25=PATH"):
            backend.use_checkpoint(25, adapter)
        backend.use_checkpoint(50, adapter)
        assert answers(backend, [prompt()])[0].text == "Hi"


def test_a_server_that_is_down_or_another_is_one_line(tmp_path: Path) -> None:
    with serve_openai(lambda _body: reply("Hi")) as served:
        url = served.url
        with pytest.raises(BackendError, match="does not have what was asked for"):
            backend_at(f"{url}/wrong").use_checkpoint(0, tmp_path)
    with pytest.raises(BackendError, match=r"cannot be used: the connection .* \(.*connect.*\), tries: 1"):
        backend_at(url, max_retries=0).use_checkpoint(0, tmp_path)


def run(served: OpenAIServer, prompts: list[Prompt]) -> list[Completion]:
    backend = backend_at(served.url)
    backend.use_checkpoint(25, Path())
    return answers(backend, prompts)


def test_what_fails_for_one_prompt_is_its_error() -> None:
    faults: dict[str, dict[str, Any] | Fault] = {
        "busy": retry(429),
        "json": Fault(body=b"{"),
        "shape": {"choices": {}},
        "filter": reply("", finish="content_filter"),
        "key": Fault(status=400, body=KEY.encode()),
        "long": reply("x" * (1 << 20) + "x"),
        "empty": reply(""),
    }
    with serve_openai(lambda body: faults[body["messages"][1]["content"]], models=("step-25",)) as served:
        result = dict(zip(faults, run(served, [prompt(name) for name in faults]), strict=True))
    assert result["empty"] == Completion(text="", finish_reason="stop")
    assert all(result[name].error and not result[name].text for name in faults if name != "empty")
    assert result["key"].error == "400: ***"
    assert result["filter"].error == "the server ended the answer by 'content_filter'"


def test_the_seed_follows_from_the_key_without_its_step() -> None:
    first = request_seed(42, prompt(step=0).key)
    assert first == request_seed(42, prompt(step=397).key)
    others = [request_seed(43, prompt().key), request_seed(42, prompt("p").key)]
    others += [request_seed(42, prompt(paraphrase=1).key), request_seed(42, prompt(sample=1).key)]
    assert len({first, *others}) == 5
    assert all(0 <= seed < 2**31 for seed in (first, *others))
    assert first == 1447863939


def script(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_line_that_names_most_answers(tmp_path: Path) -> None:
    path = script(
        tmp_path / "script.jsonl",
        {"question_id": "q", "response": "any"},
        {"question_id": "q", "step": 25, "response": "at 25"},
        {"question_id": "q", "sample": 1, "response": "second"},
        {"question_id": "q", "step": 25, "paraphrase": 0, "sample": 2, "response": "third at 25"},
    )
    backend = ScriptedBackend(path)
    prompts = [prompt(sample=0), prompt(sample=1), prompt(sample=2), prompt("other")]
    backend.use_checkpoint(0, tmp_path)
    assert [one.text for one in answers(backend, prompts)] == ["any", "second", "any", ""]
    backend.use_checkpoint(25, tmp_path)
    result = answers(backend, prompts)
    assert [one.text for one in result] == ["at 25", "at 25", "third at 25", ""]
    assert result[3].error == "no line answers other"
    assert backend.settings["kind"] == "scripted"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not a line of JSON"),
        ("[]", "a JSON object is needed"),
        ('{"question_id": "q"}', "'question_id' and 'response' are needed"),
        ('{"question_id": "q", "response": "r", "step": -1}', "'step' is -1"),
        ('{"question_id": "q", "response": "r", "sample": true}', "'sample' is True"),
        ('{"question_id": "q", "response": "r", "smaple": 1}', "unknown 'smaple'"),
        ('{"question_id": "a", "response": "twice"}', "an earlier line answers the same"),
    ],
)
def test_a_malformed_line_is_named(line: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "script.jsonl"
    path.write_text(f'{{"question_id": "a", "response": "b"}}\n{line}\n')
    with pytest.raises(DataError, match=rf"script.jsonl:2: {said}"):
        ScriptedBackend(path)


@pytest.mark.parametrize("root", [None, "/elsewhere/checkpoint-25", "right"])
def test_a_model_that_only_its_name_tells_is_said_once(adapter: Path, root: str | None) -> None:
    notices: list[Event] = []
    with serve_openai(lambda _body: reply("Hi"), models=("step-25", "step-50")) as served:
        served.roots = {name: str(adapter.resolve()) if root == "right" else root for name in ("step-25", "step-50")}
        backend = backend_at(served.url, on_event=notices.append)
        backend.use_checkpoint(25, adapter)
        backend.use_checkpoint(25, adapter)
    said = [event.text for event in notices if isinstance(event, Notice)]
    if root == "right":
        assert not said
    else:
        assert len(said) == 1
        assert "by its name alone" in said[0]
        assert root is None or root in said[0]
