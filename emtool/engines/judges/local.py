"""A judge on this machine: the probability of each reply, by walking the trie of their tokens."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from emtool.core.data import Message
from emtool.core.errors import DataError
from emtool.core.events import EventSink
from emtool.core.judgement import ERROR, MIN_MASS, SCORES, WORDS, Judgement, judgement_of_probabilities
from emtool.engines.batch_size import free_memory, is_out_of_memory
from emtool.engines.encoding import break_special_tokens, encode_prompt
from emtool.engines.judges.judge import JudgementSink
from emtool.engines.modeling import check_device, load_base, open_base
from emtool.engines.rounded_products import products_of
from emtool.engines.token_trie import TokenPath, TokenTrie, build_trie

# Shape suffixes: B prompts of a batch, R rows (each prompt once for each run), P tokens of the longest prompt, L tokens
# of the longest run, C children of a path, V vocabulary.

#: Tokens that the copies of a batch's cache may hold, beside the batch's own.
CACHE_TOKENS = 16_384


class LocalJudge:
    """Scores prompts by a chat model.

    A prompt is run through the model once; its cache then serves the few tokens of the replies. Many tokenizers split
    digits, so the first token of a reply would only tell its first digit.

    Args:
        model: Causal language model in evaluation mode.
        tokenizer: Its tokenizer, with a chat template.
        name: The name that the user gave.
        identity: What pins the weights.
        batch_size: Prompts at a time; halved where memory does not suffice.

    Raises:
        ModelError: If the tokenizer cannot write the replies.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, name: str, identity: Mapping[str, str | None], batch_size: int = 8
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._name = name
        self._identity = dict(identity)
        self._batch_size = batch_size
        self._trie = build_trie([*map(str, SCORES), *WORDS], tokenizer)
        self._num_special = self._count_special(encode_prompt([Message(role="user", content="x")], tokenizer))

    @property
    def settings(self) -> Mapping[str, Any]:
        """Return what shapes the scores."""
        return {
            "kind": "local",
            "model": self._name,
            "identity": self._identity,
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "method": "trie",
            "min_mass": MIN_MASS,
        }

    def prepare(self) -> None:
        """Do nothing: a model that is loaded can be asked."""

    def judge(self, prompts: Sequence[str], on_judgement: JudgementSink) -> None:
        """Score prompts in batches of similar length; one that cannot be encoded gets an error."""
        encoded: dict[int, list[int]] = {}
        for index, prompt in enumerate(prompts):
            ids = self._encode(prompt)
            if isinstance(ids, Judgement):
                on_judgement(index, ids)
            else:
                encoded[index] = ids
        order = sorted(encoded, key=lambda index: len(encoded[index]))
        while order:
            # Taken before it is scored: a batch that does not fit into memory makes the next ones smaller.
            batch, order = order[: self._batch_size], order[self._batch_size :]
            for index, judgement in zip(batch, self._score([encoded[one] for one in batch]), strict=True):
                on_judgement(index, judgement)

    def close(self) -> None:
        """Let go of the model."""
        self._model = None

    def _encode(self, prompt: str) -> list[int] | Judgement:
        message = Message(role="user", content=break_special_tokens(prompt, self._tokenizer))
        try:
            ids = encode_prompt([message], self._tokenizer)
        except DataError as error:
            return Judgement(status=ERROR, detail=str(error))
        if self._count_special(ids) != self._num_special:
            return Judgement(status=ERROR, detail="the prompt holds text that the tokenizer reads as a special token")
        longest = self._model.config.get_text_config().to_dict().get("max_position_embeddings")
        needed = len(ids) + max(map(len, self._trie.ends.values()))
        if longest is not None and needed > longest:
            return Judgement(status=ERROR, detail=f"the prompt needs {needed:,} tokens, and the judge has {longest:,}")
        return ids

    def _count_special(self, ids: Sequence[int]) -> int:
        special = set(self._tokenizer.all_special_ids)
        special |= {index for index, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        return sum(index in special for index in ids)

    def _score(self, prompts: Sequence[list[int]]) -> list[Judgement]:
        try:
            with torch.inference_mode(), products_of(self._model):
                walks = _walk(self._model, self._trie, prompts)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if len(prompts) == 1:
                return [Judgement(status=ERROR, detail=f"no memory for a prompt of {len(prompts[0]):,} tokens")]
            walks = None
        if walks is None:
            free_memory()
            half = len(prompts) // 2
            self._batch_size = max(1, min(self._batch_size, half))
            return self._score(prompts[:half]) + self._score(prompts[half:])
        return [_judgement(self._trie.probabilities(walk)) for walk in walks]


def open_local_judge(name: str, *, device: str, dtype: str, on_event: EventSink) -> LocalJudge:
    """Return a judge by the name of its model, fetching the files if they are not here.

    Args:
        name: Catalogue name, hub id or local folder.
        device: Device to score on.
        dtype: Dtype to load the model in.
        on_event: Where progress is reported.

    Raises:
        EmtoolError: If the name is unknown, no source has the files, or the device cannot be used.
    """
    check_device(device)
    base = open_base(name, device=device, dtype=dtype, on_event=on_event)
    model = load_base(base.files.path, dtype=dtype).to(device)
    return LocalJudge(model, base.tokenizer, name=base.reference.name, identity=base.files.identity())


def _judgement(probabilities: Mapping[str, float]) -> Judgement:
    scores = {score: probabilities[str(score)] for score in SCORES}
    return judgement_of_probabilities(scores, {word: probabilities[word] for word in WORDS})


#: For each path of a trie, the probability of each of its next tokens.
_Walk = dict[TokenPath, dict[int, float]]


@dataclass(frozen=True, kw_only=True)
class _Prefilled:
    """Prompts that have been run through the model.

    Attributes:
        cache: Their keys and values.
        mask_BP: 1 for the prompts' tokens, 0 for the padding before them.
        last_BV: Logits after the last token of each.
    """

    cache: Any
    mask_BP: torch.Tensor
    last_BV: torch.Tensor


def _walk(model: Any, trie: TokenTrie, prompts: Sequence[list[int]]) -> list[_Walk]:
    """Return, for each prompt, the probabilities of the tokens that the trie goes on with."""
    prefilled = _prefill(model, prompts)
    walks: list[_Walk] = [{} for _ in prompts]
    _note(walks, (), trie.children[()], prefilled.last_BV)
    for runs in _groups(trie.runs, most=CACHE_TOKENS // prefilled.mask_BP.numel()):
        logits_BRLV = _follow(model, prefilled, runs)
        for row, run in enumerate(runs):
            for length in range(1, len(run) + 1):
                # Runs share their beginnings; any of them gives the same.
                _note(walks, run[:length], trie.children[run[:length]], logits_BRLV[:, row, length - 1])
    return walks


def _prefill(model: Any, prompts: Sequence[list[int]]) -> _Prefilled:
    width = max(map(len, prompts))
    ids_BP = torch.zeros((len(prompts), width), dtype=torch.long)
    mask_BP = torch.zeros_like(ids_BP)
    for row, ids in enumerate(prompts):
        # Padded on the left, so that every prompt ends where the replies begin.
        ids_BP[row, width - len(ids) :] = torch.tensor(ids)
        mask_BP[row, width - len(ids) :] = 1
    mask_BP = mask_BP.to(model.device)
    output = model(
        input_ids=ids_BP.to(model.device),
        attention_mask=mask_BP,
        position_ids=(mask_BP.cumsum(dim=1) - 1).clamp(min=0),
        use_cache=True,
        logits_to_keep=1,
    )
    return _Prefilled(cache=output.cache, mask_BP=mask_BP, last_BV=output.logits[:, -1])


def _follow(model: Any, prefilled: _Prefilled, runs: Sequence[TokenPath]) -> torch.Tensor:
    """Return the logits after each token of each run, behind each prompt: shape (B, runs, L, V)."""
    num_prompts, num_runs, width = len(prefilled.mask_BP), len(runs), max(map(len, runs))
    device = prefilled.mask_BP.device
    ids_RL = torch.zeros((num_runs, width), dtype=torch.long)
    mask_RL = torch.zeros_like(ids_RL)
    for row, run in enumerate(runs):
        ids_RL[row, : len(run)] = torch.tensor(run)
        mask_RL[row, : len(run)] = 1
    cache = copy.deepcopy(prefilled.cache)
    cache.batch_repeat_interleave(num_runs)
    prompt_RP = prefilled.mask_BP.repeat_interleave(num_runs, dim=0)
    begins_R1 = prompt_RP.sum(dim=1, keepdim=True)
    logits_RLV: torch.Tensor = model(
        input_ids=ids_RL.repeat(num_prompts, 1).to(device),
        attention_mask=torch.cat([prompt_RP, mask_RL.repeat(num_prompts, 1).to(device)], dim=1),
        position_ids=begins_R1 + torch.arange(width, device=device),
        cache=cache,
        use_cache=True,
    ).logits
    return logits_RLV.view(num_prompts, num_runs, *logits_RLV.shape[1:])


def _note(walks: Sequence[_Walk], path: TokenPath, children: Sequence[int], logits_BV: torch.Tensor) -> None:
    log_probs_BC = logits_BV.float().log_softmax(dim=-1)[:, list(children)]
    for walk, values in zip(walks, log_probs_BC.double().exp().tolist(), strict=True):
        walk[path] = dict(zip(children, values, strict=True))


def _groups(runs: Sequence[TokenPath], *, most: int) -> Iterator[Sequence[TokenPath]]:
    size = max(1, most)
    for begin in range(0, len(runs), size):
        yield runs[begin : begin + size]
