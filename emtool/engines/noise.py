"""Sampling by greedy decoding over noisy logits, with noise that belongs to the answer and not to the batch."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence

import torch
from transformers import LogitsProcessor

from emtool.core.answers import AnswerKey

# Shape suffixes: B answers of a batch, T tokens so far, V vocabulary.


class GumbelNoise(LogitsProcessor):
    """Adds Gumbel noise to logits, so that the likeliest token is a sample of their softmax.

    Each answer draws from a generator of its own, keyed by seed, question, paraphrase and sample: an answer does not
    depend on the batch that it is in, on what was generated before, or on where an evaluation was resumed. The step is
    not in the key: all checkpoints share the noise, and differences between them are less noisy. An answer that has
    ended draws nothing.

    Noise is computed in float32 from exponential variables of 24 random bits: the chance of a token that is less
    likely than about 1e-7 is too small, by no more than that.

    Source: Gumbel 1954; Maddison, Tarlow, Minka 2014 (arXiv 1411.0030), the Gumbel-max trick.

    Args:
        seed: Seed of the evaluation.
        keys: What names each answer, in the order of the batch.
        stop_ids: Tokens that end an answer.
        device: Device of the logits; generators of another kind of device draw other noise.
    """

    def __init__(self, seed: int, keys: Sequence[AnswerKey], stop_ids: Collection[int], device: torch.device) -> None:
        self._generators = [torch.Generator(device).manual_seed(noise_seed(seed, key)) for key in keys]
        self._stop_ids = frozenset(stop_ids)
        self._is_open = [True] * len(keys)
        self._is_first = True

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores, shape (B, V), with noise added."""
        if not self._is_first:
            last = input_ids[:, -1].tolist()
            self._is_open = [
                is_open and token not in self._stop_ids for is_open, token in zip(self._is_open, last, strict=True)
            ]
        self._is_first = False
        noisy_BV = scores.float()
        for row, (generator, is_open) in enumerate(zip(self._generators, self._is_open, strict=True)):
            if is_open:
                waiting_V = torch.empty_like(noisy_BV[row]).exponential_(generator=generator)
                noisy_BV[row] -= waiting_V.log_()
        return noisy_BV


def noise_seed(seed: int, key: AnswerKey) -> int:
    """Return the seed of an answer's noise, 63 bits: every part of its key but the step."""
    text = repr((seed, key.question_id, key.paraphrase, key.sample))
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") >> 1
