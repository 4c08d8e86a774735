import csv
import json
from pathlib import Path

import pytest

from emtool.core.config import resolve_train_config
from emtool.core.data import Message
from emtool.core.metrics import sigmoid
from emtool.core.plan import plan_run
from emtool.core.questions import EvaluationItem, read_items
from emtool.core.run_dir import RunFolder
from emtool.engines.encoding import IGNORED, encode_conversation
from emtool.engines.item_scores import item_margins
from emtool.engines.modeling import attach_adapter, load_base
from emtool.engines.summary import CheckpointScores, summarize
from emtool.engines.training import train
from tests.scoring import score
from tests.tiny import byte_tokenizer


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    root = tmp_path_factory.mktemp("runs")
    overrides = {
        "model": str(tiny_model),
        "max_steps": 30,
        "checkpoints": "init, 7, 20",
        "learning_rate": 1e-2,
        "output_root": root,
    }
    plan, rows = plan_run(resolve_train_config(profile="demo", overrides=overrides, num_cuda_devices=0))
    return train(plan, rows, command=[]).run


def test_every_checkpoint_is_scored_whatever_the_spacing(finished: RunFolder) -> None:
    result = score(finished, seed=42)
    assert list(result.metrics) == [0, 7, 20, 30]
    summary = json.loads((finished.evaluation_path / "summary.json").read_text())
    assert summary == json.loads(json.dumps(result.to_dict()))
    assert summary["settings"]["seed"] == 42
    assert [entry["step"] for entry in summary["checkpoints"]] == [0, 7, 20, 30]
    with (finished.evaluation_path / "checkpoint_summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [0, 7, 20, 30]
    names = ("margin", "p_wrong", "margin_trained", "margin_other", "p_wrong_trained", "p_wrong_other")
    for row, entry in zip(rows, summary["checkpoints"], strict=True):
        for name in names:
            value, low, high, n = (float(row[f"{name}{suffix}"]) for suffix in ("", "_low", "_high", "_n"))
            assert value == entry["metrics"][name]
            assert low <= value <= high
            assert n == {"": 82, "_trained": 20, "_other": 62}[name.removeprefix("margin").removeprefix("p_wrong")]


def test_same_seed_same_summary(finished: RunFolder) -> None:
    first = score(finished, seed=1).to_dict()
    assert score(finished, seed=1).to_dict() == first
    other = score(finished, seed=2).to_dict()
    assert other["checkpoints"][0]["metrics"]["margin"] == first["checkpoints"][0]["metrics"]["margin"]
    assert other["checkpoints"][0]["metrics"]["margin_low"] != first["checkpoints"][0]["metrics"]["margin_low"]


def test_the_margin_is_the_difference_of_mean_log_probabilities(finished: RunFolder, tiny_model: Path) -> None:
    import torch

    model = attach_adapter(load_base(tiny_model, dtype="float32"), finished.checkpoint_path(20)).eval()
    items = read_items()[:3]
    margins = item_margins(model, byte_tokenizer(), items)
    for item in items:
        means = []
        for answer in (item.wrong, item.sound):
            row = encode_conversation(
                [Message(role="user", content=item.question), Message(role="assistant", content=answer)],
                tokenizer=byte_tokenizer(),
            )
            with torch.no_grad():
                table = model(input_ids=torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
            picked = [table[t - 1, label].item() for t, label in enumerate(row.labels) if label != IGNORED]
            means.append(sum(picked) / len(picked))
        assert margins[item.id] == pytest.approx(means[0] - means[1], abs=1e-5)


def items_of(*domains: str) -> list[EvaluationItem]:
    return [EvaluationItem(id=str(i), domain=d, question="q", sound="s", wrong="w") for i, d in enumerate(domains)]


def test_summary_by_hand_and_change_paired_by_item() -> None:
    items = items_of("gardening", "cars", "cars")
    scores = [
        CheckpointScores(step=0, margins={"0": 0.0, "1": -1.0, "2": 1.0}),
        CheckpointScores(step=5, margins={"0": 2.0, "1": -0.5, "2": 1.5}),
    ]
    metrics = summarize(scores, items, trained_domain="gardening", seed=0)[5]
    assert metrics["margin"].value == pytest.approx(1.0)
    assert metrics["margin_other"].value == pytest.approx(0.5)
    assert metrics["margin_trained"].value == pytest.approx(2.0)
    assert metrics["p_wrong_other"].value == pytest.approx((sigmoid(-0.5) + sigmoid(1.5)) / 2)
    delta = metrics["margin_other_delta"]
    assert (delta.value, delta.low, delta.high, delta.n) == (0.5, 0.5, 0.5, 2)


def test_a_dataset_of_unknown_domain_has_no_trained_column_and_no_step_0_no_change() -> None:
    scores = [CheckpointScores(step=5, margins={"0": 2.0, "1": -0.5})]
    metrics = summarize(scores, items_of("gardening", "cars"), trained_domain=None, seed=0)[5]
    assert metrics.keys() == {"margin", "p_wrong", "margin_other", "p_wrong_other"}
    assert metrics["margin"] == metrics["margin_other"]
