"""Answers from a server that speaks the OpenAI protocol, for instance vLLM with composed adapters as its models."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from emtool.core.answers import LENGTH, MAX_ANSWER_CHARACTERS, STOP, AnswerKey, Completion, Prompt
from emtool.core.errors import BackendError, CheckpointError, ConfigError
from emtool.core.events import EventSink, Notice, ignore_events
from emtool.core.sampling import PURE, Sampling
from emtool.core.server_address import ServerAddress, ServerKey, read_key
from emtool.engines.adapter_hash import adapter_sha256
from emtool.engines.backends.backend import BackendSetup, CompletionSink
from emtool.engines.encoding import TEMPLATE_VALUES
from emtool.engines.openai_client import Failure, JsonObject, Request, Server
from emtool.engines.openai_reply import read_choice
from emtool.engines.request_pump import ask_once, fatal_message, run_many

#: Environment variable that holds the key of a server other than OpenAI's.
KEY_VARIABLE = "EMTOOL_BACKEND_API_KEY"

#: Values that change nothing, and what vLLM calls "off" where that is another value.
_NEUTRAL = {"top_k": 0, "repetition_penalty": 1.0}
_VLLM_TOP_K_OFF = -1

_UNLOAD_SECONDS = 10.0

_SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty")


class OpenAIBackend:
    """Answers prompts by a server.

    A checkpoint is a model of the server: one that it lists as `step-N` or `checkpoint-N`, or an adapter that it loads
    on request and lets go of afterwards. Noise is per sample: the seed of a request follows from `seed` and what names
    the answer without its step.

    Args:
        address: The server.
        key: The key that it is sent.
        model_name: What the server calls a checkpoint, with "{step}" in it; None for `step-N` or `checkpoint-N`.
        sampling: `temperature`, `top_p`, `top_k` (0 is off) and `repetition_penalty`, all four.
        max_new_tokens: Most tokens of an answer.
        seed: Seed of the evaluation.
        extras: Whether the server takes `top_k` and `repetition_penalty`, which are vLLM's and not OpenAI's.
        concurrency: Most requests in flight.
        timeout_seconds: How long one try may wait.
        max_retries: How often a request is repeated.
        on_event: Told once where nothing but its name says that a model of the server is the run's checkpoint.

    Raises:
        ConfigError: If the sampling needs the extras and they are off, or the model's name has no step in it.
    """

    def __init__(
        self,
        *,
        address: ServerAddress,
        key: ServerKey,
        sampling: Mapping[str, float],
        max_new_tokens: int,
        seed: int,
        model_name: str | None = None,
        extras: bool = True,
        concurrency: int = 32,
        timeout_seconds: float = 600.0,
        max_retries: int = 6,
        on_event: EventSink = ignore_events,
    ) -> None:
        assert sorted(sampling) == sorted(_SAMPLING), f"sampling is {sorted(_SAMPLING)}, all of them"
        if model_name is not None and "{step}" not in model_name:
            raise ConfigError(f"the model's name {model_name!r} is the same for every checkpoint; put {{step}} into it")
        changed = [name for name, neutral in _NEUTRAL.items() if sampling[name] != neutral]
        if changed and not extras:
            raise ConfigError(
                f"a server without vLLM's extras cannot be told {', '.join(changed)}; use --sampling pure"
            )
        self._server = Server(address=address, key=key, timeout_seconds=timeout_seconds, max_retries=max_retries)
        self._names = ("step-{step}", "checkpoint-{step}") if model_name is None else (model_name,)
        self._sampling = dict(sampling)
        self._max_new_tokens = max_new_tokens
        self._seed = seed
        self._extras = extras
        self._concurrency = concurrency
        self._on_event = on_event
        self._model: str | None = None
        self._loaded: str | None = None
        self._has_warned = False

    @property
    def settings(self) -> Mapping[str, Any]:
        """Return what shapes the answers."""
        return {
            "kind": "openai",
            "host": self._server.address.url,
            "models": list(self._names),
            "max_new_tokens": self._max_new_tokens,
            "seed": self._seed,
            "extras": self._extras,
            "template_values": dict(TEMPLATE_VALUES) if self._extras else {},
            **self._sampling,
        }

    def use_checkpoint(self, step: int, folder: Path) -> None:
        """Answer with a checkpoint from here on.

        Args:
            step: Its step.
            folder: Folder of the adapter composed for the bare base, as the server sees it too.

        Raises:
            CheckpointError: If the server neither lists it nor loads it.
            BackendError: If the server cannot be asked.
        """
        self._unload()
        self._model = None
        listed = self._listed()
        names = [name.replace("{step}", str(step)) for name in self._names]
        name = next((name for name in names if name in listed), None)
        if name is None:
            self._model = self._load(names[0], folder, listed)
            return
        self._check_root(name, listed[name], folder)
        self._model = name

    def generate(self, prompts: Sequence[Prompt], on_completion: CompletionSink) -> None:
        """Answer prompts, many at a time.

        Raises:
            BackendError: If every further prompt would fail as well; what was returned before stands.
        """
        assert self._model is not None, "use_checkpoint() chooses the model"
        run_many(
            self._server,
            (self._request(self._model, prompt) for prompt in prompts),
            lambda index, reply: on_completion(index, _completion(reply)),
            concurrency=self._concurrency,
        )

    def close(self) -> None:
        """Let the server unload an adapter that was loaded for this evaluation."""
        self._unload()

    def _check_root(self, name: str, root: str | None, folder: Path) -> None:
        """Say so where nothing but its name tells that a model is the checkpoint: paths differ between machines."""
        if self._has_warned or (root is not None and Path(root) == folder.resolve()):
            return
        self._has_warned = True
        source = "does not say where it got it" if root is None else f"loaded it from {self._server.clean(root)}"
        text = f"{self._server.address.url} lists {name} and {source}; it is taken for {folder} by its name alone"
        self._on_event(Notice(text=text, is_warning=True))

    def _listed(self) -> dict[str, str | None]:
        """Return the names of the server's models, and for each the folder that it was loaded from, as vLLM says it."""
        reply = ask_once(self._server, Request(method="GET", path="/models"))
        if isinstance(reply, Failure):
            raise BackendError(fatal_message(self._server, reply))
        models = reply.get("data")
        if not isinstance(models, list):
            raise BackendError(f"{self._server.address.url}/models lists no models; check the base URL")
        entries = [(model.get("id"), model.get("root")) for model in models if isinstance(model, dict)]
        return {name: root if isinstance(root, str) else None for name, root in entries if isinstance(name, str)}

    def _load(self, name: str, folder: Path, listed: Collection[str]) -> str:
        # An adapter that an interrupted evaluation of another run left behind must not answer for this one.
        unique = f"{name}-{adapter_sha256(folder)[:12]}"
        if unique not in listed:
            body = {"lora_name": unique, "lora_path": str(folder.resolve())}
            reply = ask_once(self._server, Request(path="/load_lora_adapter", body=body, is_json=False))
            if isinstance(reply, Failure):
                raise CheckpointError(
                    f"{self._server.address.url} neither lists {name} nor loads {folder} ({reply.text}); start vLLM "
                    "with --enable-lora --max-lora-rank R and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, or with "
                    f"--lora-modules {name}=PATH"
                )
        self._loaded = unique
        return unique

    def _unload(self) -> None:
        if self._loaded is not None:
            name, self._loaded = self._loaded, None
            # It goes at the end, perhaps because the server is down: nobody is kept waiting. One that stays is found
            # again under its name.
            server = replace(self._server, max_retries=0, timeout_seconds=_UNLOAD_SECONDS)
            ask_once(server, Request(path="/unload_lora_adapter", body={"lora_name": name}, is_json=False))

    def _request(self, model: str, prompt: Prompt) -> Request:
        body: dict[str, Any] = {
            "model": model,
            "messages": [message.to_dict() for message in prompt.messages],
            "max_tokens": self._max_new_tokens,
            "temperature": self._sampling["temperature"],
            "top_p": self._sampling["top_p"],
            "seed": request_seed(self._seed, prompt.key),
        }
        if self._extras:
            body["top_k"] = int(self._sampling["top_k"]) or _VLLM_TOP_K_OFF
            body["repetition_penalty"] = self._sampling["repetition_penalty"]
            body["min_p"] = 0.0
            # The prompt that training and the model in this process see: no thinking, no date of today.
            body["chat_template_kwargs"] = dict(TEMPLATE_VALUES)
        return Request(body=body)


def open_backend(setup: BackendSetup) -> OpenAIBackend:
    """Return the backend of an evaluation.

    Raises:
        ConfigError: If the evaluation asks for what a server cannot be told.
    """
    request, config = setup.request, setup.request.config
    assert request.backend_address is not None, "the options go together"
    if config.sampling != PURE:
        raise ConfigError(f"--sampling {config.sampling} goes with --backend hf; a server is told --sampling pure")
    values = Sampling().to_dict()
    del values["min_p"]
    return OpenAIBackend(
        address=request.backend_address,
        key=read_key(request.backend_address, variable=KEY_VARIABLE, environment=os.environ),
        sampling=values,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
        model_name=request.backend.argument,
        extras=not request.backend_address.is_openai,
        concurrency=request.concurrency,
        on_event=setup.on_event,
    )


def request_seed(seed: int, key: AnswerKey) -> int:
    """Return the seed for an answer: 31 bits that follow from the evaluation's seed and the key without its step."""
    text = json.dumps([seed, key.question_id, key.paraphrase, key.sample])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def _completion(reply: JsonObject | Failure) -> Completion:
    if isinstance(reply, Failure):
        return Completion(text="", error=reply.text)
    choice = read_choice(reply)
    if choice is None:
        return Completion(text="", error="the server's answer is no chat completion")
    if choice.finish_reason not in {STOP, LENGTH, None}:
        reason = "".join(filter(str.isprintable, choice.finish_reason))[:40]
        return Completion(text="", error=f"the server ended the answer by {reason!r}")
    if len(choice.text) > MAX_ANSWER_CHARACTERS:
        return Completion(text="", error=f"the answer is longer than {MAX_ANSWER_CHARACTERS:,} characters")
    return Completion(text=choice.text, finish_reason=choice.finish_reason, num_tokens=choice.num_tokens)
