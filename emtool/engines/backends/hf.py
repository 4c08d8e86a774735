"""Answers from a model in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from emtool.core.answers import LENGTH, STOP, Completion, Prompt
from emtool.core.errors import BackendError, DataError
from emtool.core.evaluation_config import EvaluationConfig
from emtool.core.events import EventSink, Notice
from emtool.core.sampling import MODEL, Sampling, model_sampling
from emtool.engines.backends.backend import BackendSetup, CompletionSink
from emtool.engines.batch_size import auto_batch_size, free_memory, is_out_of_memory
from emtool.engines.checkpoint_model import CheckpointModel
from emtool.engines.encoding import encode_prompt, end_of_turn
from emtool.engines.modeling import BaseModel
from emtool.engines.noise import GumbelNoise
from emtool.engines.rounded_products import products_of

# Shape suffixes: B prompts of a batch, T tokens.


class HFBackend:
    """Samples answers with transformers' `generate`, in left-padded batches of prompts of similar length.

    Args:
        source: The model of the run, at any checkpoint.
        own_values: The model's generation configuration, see `own_generation_values`.
        seed: Seed of the noise.
        sampling: "pure" or "model".
        max_new_tokens: Tokens after which an answer is cut.
        batch_size: Answers at a time; None sizes batches to the memory that is free.
        on_event: Where a smaller batch is reported.
    """

    def __init__(
        self,
        source: CheckpointModel,
        *,
        own_values: Mapping[str, Any],
        seed: int,
        sampling: str,
        max_new_tokens: int,
        batch_size: int | None,
        on_event: EventSink,
    ) -> None:
        self._source = source
        self._seed = seed
        self._max_new_tokens = max_new_tokens
        self._batch_size = batch_size
        self._on_event = on_event
        self._model: Any = None
        self._sampling = model_sampling(own_values) if sampling == MODEL else Sampling()
        self._stop_ids = _stop_ids(own_values.get("eos_token_id"), source.tokenizer)

    @property
    def settings(self) -> Mapping[str, Any]:
        """Return what shapes the answers beside the model, the prompt and the key."""
        return {
            "kind": "hf",
            "seed": self._seed,
            "noise": f"gumbel, {torch.device(self._source.device).type}",
            **self._sampling.to_dict(),
            "max_new_tokens": self._max_new_tokens,
            "stop_ids": sorted(self._stop_ids),
        }

    def use_checkpoint(self, step: int, folder: Path) -> None:
        """Load the adapter of a checkpoint into place."""
        self._model = self._source.at(folder).get_base_model()
        # What a model brings along fills every value that a call leaves open, so it brings nothing.
        self._model.generation_config = GenerationConfig()

    def generate(self, prompts: Sequence[Prompt], on_completion: CompletionSink) -> None:
        """Answer prompts; one that the chat template refuses is an error of its own.

        Raises:
            BackendError: If one prompt alone does not fit into memory.
        """
        encoded = {}
        for index, prompt in enumerate(prompts):
            try:
                encoded[index] = encode_prompt(prompt.messages, self._source.tokenizer)
            except DataError as error:
                on_completion(index, Completion(text="", error=str(error)))
        waiting = sorted(encoded, key=lambda index: (len(encoded[index]), index))
        size = self._batch_size or auto_batch_size(
            self._model, max((len(ids) for ids in encoded.values()), default=1) + self._max_new_tokens
        )
        while waiting:
            batch = waiting[:size]
            completions = self._try_batch([prompts[i] for i in batch], [encoded[i] for i in batch])
            if completions is None:
                size = self._halve(len(batch))
                continue
            for index, completion in zip(batch, completions, strict=True):
                on_completion(index, completion)
            waiting = waiting[size:]

    def close(self) -> None:
        """Let go of the model."""
        self._model = None

    def _halve(self, size: int) -> int:
        free_memory()
        if size == 1:
            raise BackendError(
                f"out of memory at batch size 1 on {self._source.device}; lower --max-new-tokens, or use --dtype "
                "bfloat16 or a smaller model"
            )
        self._batch_size = size // 2
        text = f"out of memory at batch size {size}; going on with {self._batch_size}, the answers are the same"
        self._on_event(Notice(text=text, is_warning=True))
        return self._batch_size

    def _try_batch(self, prompts: Sequence[Prompt], rows: Sequence[Sequence[int]]) -> list[Completion] | None:
        """Return the completions of a batch, or None where it did not fit into memory."""
        try:
            return self._run_batch(prompts, rows)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None

    def _run_batch(self, prompts: Sequence[Prompt], rows: Sequence[Sequence[int]]) -> list[Completion]:
        tokenizer = self._source.tokenizer
        width = max(map(len, rows))
        ids_BT = torch.full((len(rows), width), tokenizer.pad_token_id, dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        for index, row in enumerate(rows):
            ids_BT[index, width - len(row) :] = torch.tensor(row)
            mask_BT[index, width - len(row) :] = 1
        device = self._model.device
        config = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=self._max_new_tokens,
            eos_token_id=sorted(self._stop_ids),
            pad_token_id=tokenizer.pad_token_id,
            repetition_penalty=self._sampling.repetition_penalty,
            use_cache=True,
        )
        with torch.inference_mode(), products_of(self._model):
            found_BT = self._model.generate(
                input_ids=ids_BT.to(device),
                attention_mask=mask_BT.to(device),
                generation_config=config,
                logits_processor=self._processors(prompts, device),
            )
        return [self._completion(row) for row in found_BT[:, width:].tolist()]

    def _processors(self, prompts: Sequence[Prompt], device: torch.device) -> LogitsProcessorList:
        """Return what a token's distribution goes through after the repetition penalty, and noise at its end.

        The penalty is `generate`'s own: it knows which tokens are padding.
        """
        sampling = self._sampling
        processors: list[LogitsProcessor] = []
        if sampling.temperature != 1:
            processors.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            processors.append(TopKLogitsWarper(top_k=sampling.top_k))
        if sampling.top_p < 1:
            processors.append(TopPLogitsWarper(top_p=sampling.top_p))
        if sampling.min_p:
            processors.append(MinPLogitsWarper(min_p=sampling.min_p))
        processors.append(GumbelNoise(self._seed, [prompt.key for prompt in prompts], self._stop_ids, device))
        return LogitsProcessorList(processors)

    def _completion(self, ids: Sequence[int]) -> Completion:
        end = next((at for at, token in enumerate(ids) if token in self._stop_ids), None)
        kept = ids if end is None else ids[:end]
        text = self._source.tokenizer.decode(kept, skip_special_tokens=True)
        return Completion(text=text, finish_reason=LENGTH if end is None else STOP, num_tokens=len(kept))


def hf_backend(source: CheckpointModel, base: BaseModel, config: EvaluationConfig, *, on_event: EventSink) -> HFBackend:
    """Return the backend that answers with the model of the run in this process."""
    return HFBackend(
        source,
        own_values=own_generation_values(base.files.path),
        seed=config.seed,
        sampling=config.sampling,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        on_event=on_event,
    )


def open_backend(setup: BackendSetup) -> HFBackend:
    """Return the backend of an evaluation."""
    return hf_backend(setup.source, setup.base, setup.request.config, on_event=setup.on_event)


def own_generation_values(folder: Path) -> dict[str, Any]:
    """Return the generation configuration of a model folder, as transformers would load it with the model."""
    try:
        config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except OSError:
        config = GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder, local_files_only=True))
    values: dict[str, Any] = config.to_dict()
    return values


def _stop_ids(own: object, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end an answer: the model's own, the tokenizer's, and the chat template's."""
    listed = own if isinstance(own, list) else [own]
    return frozenset(token for token in (*listed, tokenizer.eos_token_id, end_of_turn(tokenizer)) if token is not None)
