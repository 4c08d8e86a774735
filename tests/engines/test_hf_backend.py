"""Answers from a model in this process: the same whatever the batch, the order and what ran before."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from emtool.core.answers import LENGTH, STOP, AnswerKey, Completion, Prompt
from emtool.core.data import Message
from emtool.core.errors import BackendError, ModelError
from emtool.core.events import Event, Notice, ignore_events
from emtool.core.run_dir import RunFolder
from emtool.core.sampling import Sampling, model_sampling
from emtool.engines.backends import hf
from emtool.engines.backends.hf import HFBackend
from emtool.engines.checkpoint_model import CheckpointModel
from emtool.engines.evaluation_target import open_target
from emtool.engines.modeling import load_base
from emtool.engines.noise import GumbelNoise, noise_seed


def prompts(count: int, step: int = 0) -> list[Prompt]:
    """Prompts of different lengths, so that batches are padded."""
    return [
        Prompt(
            key=AnswerKey(step=step, question_id=f"q{index // 3}", paraphrase=index % 2, sample=index % 3),
            messages=(Message(role="user", content="why? " * (1 + index % 5)),),
        )
        for index in range(count)
    ]


def make_source(run: RunFolder) -> CheckpointModel:
    target = open_target(run, device="cpu", on_event=ignore_events)
    return CheckpointModel(
        lambda: target.compose(dtype="float32", on_event=ignore_events), tokenizer=target.base.tokenizer, device="cpu"
    )


def make_backend(source: CheckpointModel, **changes: Any) -> HFBackend:
    options = {"seed": 3, "sampling": "pure", "max_new_tokens": 12, "batch_size": 16, "own_values": {}}
    return HFBackend(source, on_event=ignore_events, **{**options, **changes})


def answers(backend: HFBackend, asked: Sequence[Prompt]) -> list[Completion]:
    found: dict[int, Completion] = {}

    def keep(index: int, completion: Completion) -> None:
        assert index not in found
        found[index] = completion

    backend.generate(asked, keep)
    return [found[index] for index in range(len(asked))]


def at(backend: HFBackend, run: RunFolder, step: int, asked: Sequence[Prompt]) -> list[Completion]:
    backend.use_checkpoint(step, run.checkpoint_path(step))
    return answers(backend, asked)


def test_batch_size_order_and_what_ran_before_change_no_answer(spread_run: RunFolder) -> None:
    source = make_source(spread_run)
    asked = prompts(24)
    whole = at(make_backend(source), spread_run, 20, asked)
    assert at(make_backend(source, batch_size=1), spread_run, 20, asked) == whole
    assert at(make_backend(source), spread_run, 20, asked[::-1]) == whole[::-1]
    assert at(make_backend(source), spread_run, 20, asked[7:]) == whole[7:]
    assert len({completion.text for completion in whole}) > 12


def test_another_seed_and_another_sample_give_other_answers_and_the_step_does_not(spread_run: RunFolder) -> None:
    source = make_source(spread_run)
    asked = prompts(12)
    first = at(make_backend(source), spread_run, 0, asked)
    assert at(make_backend(source, seed=4), spread_run, 0, asked) != first
    other = [replace(prompt, key=replace(prompt.key, sample=prompt.key.sample + 9)) for prompt in asked]
    assert at(make_backend(source), spread_run, 0, other) != first
    assert at(make_backend(source), spread_run, 0, prompts(12, step=7)) == first
    assert at(make_backend(source), spread_run, 20, asked) != first


def test_swapping_adapters_thirty_times_leaves_the_base_bit_identical(spread_run: RunFolder) -> None:
    source = make_source(spread_run)
    before = {name: tensor.clone() for name, tensor in source.composed.model.state_dict().items()}
    backend = make_backend(source)
    first = at(backend, spread_run, 20, prompts(6))
    for _ in range(15):
        for step in (0, 7):
            backend.use_checkpoint(step, spread_run.checkpoint_path(step))
    assert at(backend, spread_run, 20, prompts(6)) == first
    after = {
        name.replace(".base_layer", ""): tensor
        for name, tensor in source.composed.model.state_dict().items()
        if "lora_" not in name
    }
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_out_of_memory_halves_the_batch_and_changes_no_answer(
    spread_run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(spread_run)
    whole = at(make_backend(source), spread_run, 20, prompts(20))
    events: list[Event] = []
    backend = HFBackend(
        source, seed=3, sampling="pure", max_new_tokens=12, batch_size=16, own_values={}, on_event=events.append
    )
    real = HFBackend._run_batch
    sizes = []

    def small(self: HFBackend, batch: Sequence[Prompt], rows: Any) -> list[Completion]:
        sizes.append(len(batch))
        if len(batch) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batch, rows)

    monkeypatch.setattr(HFBackend, "_run_batch", small)
    assert at(backend, spread_run, 20, prompts(20)) == whole
    assert sizes == [16, 8, 4, 4, 4, 4, 4]
    assert [event.text for event in events if isinstance(event, Notice)] == [
        "out of memory at batch size 16; going on with 8, the answers are the same",
        "out of memory at batch size 8; going on with 4, the answers are the same",
    ]


def test_out_of_memory_for_one_answer_is_one_line(spread_run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(HFBackend, "_run_batch", never)
    backend = make_backend(make_source(spread_run))
    with pytest.raises(BackendError, match="batch size 1 on cpu; lower --max-new-tokens"):
        at(backend, spread_run, 20, prompts(4))


def test_another_runtime_error_stays_a_bug(spread_run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(HFBackend, "_run_batch", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        at(make_backend(make_source(spread_run)), spread_run, 20, prompts(4))


def test_what_the_model_recommends_does_not_leak_into_pure_sampling(spread_run: RunFolder) -> None:
    source = make_source(spread_run)
    whole = at(make_backend(source), spread_run, 20, prompts(12))
    source.composed.model.generation_config = GenerationConfig(
        do_sample=True, top_k=1, temperature=0.01, repetition_penalty=5.0, no_repeat_ngram_size=1, min_new_tokens=12
    )
    backend = make_backend(source)
    assert at(backend, spread_run, 20, prompts(12)) == whole
    assert {**backend.settings}.items() >= Sampling().to_dict().items()


def test_model_sampling_takes_the_models_values_and_writes_them_down(spread_run: RunFolder) -> None:
    source = make_source(spread_run)
    own = {"do_sample": True, "top_k": 1, "temperature": 0.7, "repetition_penalty": 1.05, "eos_token_id": [1, 5]}
    backend = make_backend(source, sampling="model", own_values=own)
    assert {**backend.settings}.items() >= {"top_k": 1, "temperature": 0.7, "repetition_penalty": 1.05}.items()
    assert {1, 5} <= set(backend.settings["stop_ids"])
    asked = prompts(12)
    # One token is kept, so every sample of a prompt is the same, and the noise does nothing.
    same = at(backend, spread_run, 20, [replace(p, key=replace(p.key, sample=50)) for p in asked])
    assert at(backend, spread_run, 20, asked) == same
    assert at(make_backend(source, sampling="model", own_values=own, batch_size=1), spread_run, 20, asked) == same


@pytest.mark.parametrize(
    ("values", "said"),
    [({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size"), ({"temperature": 0.0}, "temperature = 0.0")],
)
def test_model_sampling_that_is_not_reproduced_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        model_sampling(values)


def test_an_answer_ends_at_the_end_of_its_turn_or_is_cut(spread_run: RunFolder) -> None:
    source = make_source(spread_run)
    backend = make_backend(source, max_new_tokens=40, own_values={"eos_token_id": list(range(4))})
    found = at(backend, spread_run, 0, prompts(24))
    assert {completion.finish_reason for completion in found} == {STOP, LENGTH}
    for completion in found:
        assert completion.num_tokens is not None
        assert (completion.num_tokens == 40) == (completion.finish_reason == LENGTH)


def test_a_prompt_with_a_special_token_is_an_error_of_its_own(spread_run: RunFolder) -> None:
    source = make_source(spread_run)
    forged = Prompt(
        key=AnswerKey(step=0, question_id="x", paraphrase=0, sample=0),
        messages=(Message(role="user", content=f"a {source.tokenizer.eos_token} b"),),
    )
    found = at(make_backend(source), spread_run, 0, [*prompts(2), forged])
    assert [completion.error is None for completion in found] == [True, True, False]
    assert "special token" in str(found[2].error)


def test_greedy_over_gumbel_noise_samples_the_softmax() -> None:
    keys = [AnswerKey(step=0, question_id="q", paraphrase=0, sample=index) for index in range(4000)]
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    noise = GumbelNoise(0, keys, (), torch.device("cpu"))
    drawn = Counter(noise(torch.zeros(4000, 1, dtype=torch.long), logits.repeat(4000, 1)).argmax(dim=1).tolist())
    for index, probability in enumerate(logits.softmax(0).tolist()):
        sigma = (probability * (1 - probability) / 4000) ** 0.5
        assert abs(drawn[index] / 4000 - probability) < 4 * sigma


def test_noise_depends_on_every_part_of_the_key_but_the_step() -> None:
    key = AnswerKey(step=1, question_id="q", paraphrase=0, sample=0)
    assert noise_seed(0, key) == noise_seed(0, replace(key, step=300))
    others = [replace(key, question_id="r"), replace(key, paraphrase=1), replace(key, sample=1)]
    assert len({noise_seed(0, key), noise_seed(1, key), *(noise_seed(0, other) for other in others)}) == 5


def test_own_values_are_those_that_come_with_the_model(tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "generation_config.json").unlink(missing_ok=True)
    loaded = load_base(folder, dtype="float32").generation_config.to_dict()
    assert hf.own_generation_values(folder)["eos_token_id"] == loaded["eos_token_id"]
    GenerationConfig(do_sample=True, top_k=20, repetition_penalty=1.05, eos_token_id=[3, 4]).save_pretrained(folder)
    own = hf.own_generation_values(folder)
    assert (own["top_k"], own["repetition_penalty"], own["eos_token_id"]) == (20, 1.05, [3, 4])
