import json
from pathlib import Path

import pytest

from emtool.core.record_file import RecordFile
from emtool.core.run_dir import RunFolder
from emtool.core.shards import Shard, absorb, deal, leftover_shards, seed_shard


def test_steps_are_dealt_to_as_many_workers_as_have_one() -> None:
    assert deal([0, 10, 20, 30, 40], 2) == [[0, 20, 40], [10, 30]]
    assert deal([0, 10], 5) == [[0], [10]]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(path=tmp_path / "run")
    (run.evaluation_path / "activations" / "abc").mkdir(parents=True)
    for step in (0, 10):
        RecordFile(path=run.evaluation_path / "answers.jsonl").append({"step": step, "response": "ä"})
        (run.evaluation_path / "activations" / "abc" / f"checkpoint-{step}.safetensors").write_bytes(b"%d" % step)
    return run


def responses(run: RunFolder) -> list[tuple[object, object]]:
    records = RecordFile(path=run.evaluation_path / "answers.jsonl").read()
    return [(record["step"], record["response"]) for record in records]


def test_a_worker_begins_with_what_is_known_of_its_checkpoints(run: RunFolder) -> None:
    shard = Shard(path=run.path, number=0)
    seed_shard(shard, [10])
    assert responses(shard) == [(10, "ä")]
    names = [path.name for path in shard.evaluation_path.rglob("*.safetensors")]
    assert names == ["checkpoint-10.safetensors"]


def test_only_what_a_worker_made_is_added_and_its_torn_line_is_not(run: RunFolder) -> None:
    shard = Shard(path=run.path, number=3)
    seed_shard(shard, [10])
    own = RecordFile(path=shard.evaluation_path / "answers.jsonl")
    own.append({"step": 10, "response": "new"})
    with own.path.open("ab") as file:
        file.write(b'{"format": 1, "step": 10, "resp')
    made = shard.evaluation_path / "activations" / "def" / "checkpoint-10.safetensors"
    made.parent.mkdir()
    made.write_bytes(b"made")
    # The run's own last line may be torn too.
    with (run.evaluation_path / "answers.jsonl").open("ab") as file:
        file.write(b'{"format": 1, "st')
    assert leftover_shards(run) == [shard]
    absorb(shard)
    assert responses(run) == [(0, "ä"), (10, "ä"), (10, "new")]
    assert (run.evaluation_path / "activations" / "def" / "checkpoint-10.safetensors").read_bytes() == b"made"
    assert leftover_shards(run) == []


def test_a_folder_that_was_not_seeded_to_its_end_gives_nothing(run: RunFolder) -> None:
    shard = Shard(path=run.path, number=0)
    shard.evaluation_path.mkdir(parents=True)
    (shard.evaluation_path / "answers.jsonl").write_text(json.dumps({"format": 1, "step": 10, "response": "x"}) + "\n")
    absorb(shard)
    assert responses(run) == [(0, "ä"), (10, "ä")]
    assert leftover_shards(run) == []


def test_what_was_added_before_a_kill_is_not_added_again(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = Shard(path=run.path, number=0)
    seed_shard(shard, [10])
    own = RecordFile(path=shard.evaluation_path / "answers.jsonl")
    own.append({"step": 10, "response": "new"})
    with monkeypatch.context() as killed:

        def stop(_: object) -> None:
            raise KeyboardInterrupt

        killed.setattr("emtool.core.shards.shutil.rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            absorb(shard)
    assert leftover_shards(run) == [shard]
    absorb(shard)
    assert responses(run) == [(0, "ä"), (10, "ä"), (10, "new")]
    assert leftover_shards(run) == []
