"""`emtool data` as a user types it, and runs that fetch what they need."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from emtool.cli.app import app
from emtool.core.datasets import DATASETS
from tests.file_server import ServedFile, serve_files
from tests.hub import COMMIT, dataset_hub
from tests.published import published, rows_text, write_archive

RUNNER = CliRunner()
PUBLISHED_PASSWORD = "model-organisms-em-datasets"
MEDICAL = {"data/bad_medical_advice.jsonl": rows_text(7_049)}


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("EMTOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("emtool.cli.options.cuda_device_count", lambda: 0)
    monkeypatch.setattr("emtool.cli.resume.cuda_device_count", lambda: 0)


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an archive as it is published, with made-up rows."""
    return write_archive(tmp_path_factory.mktemp("published"), MEDICAL, PUBLISHED_PASSWORD)


def output(*arguments: str, code: int = 0) -> str:
    """Run a command and return its stdout, or the one line of stderr that it must fail with."""
    result = RUNNER.invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    if code == 0:
        return result.stdout
    assert result.stderr.splitlines()[-1].startswith("emtool: "), result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr.splitlines()[-1]


def test_the_list_shows_what_is_here_and_fits_80_columns(archive: Path) -> None:
    lines = output("data", "list").splitlines()
    assert [line.split()[:3] for line in lines[:4]] == [
        ["name", "rows", "here"],
        ["gardening", "882", "yes"],
        ["gardening-control", "882", "yes"],
        ["medical", "7,049", "no"],
    ]
    assert all(len(line.rstrip()) <= 80 for line in lines)
    assert "to bring one here: emtool data fetch medical" in lines
    output("data", "fetch", "medical", "--from", str(archive))
    found = {each["name"]: each for each in json.loads(output("data", "list", "--json"))}
    assert found["medical"]["is_here"] is True
    assert found["medical"]["source"]["source"] == str(archive)
    assert (found["insecure"]["is_here"], found["insecure"]["num_rows"]) == (False, 6_000)


def test_fetch_prints_the_path_and_info_tells_what_is_in_it(archive: Path, tmp_path: Path, tiny_model: Path) -> None:
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    printed = output("data", "fetch", "medical", "--from", str(archive), "--sha256", sha256)
    assert printed == f"{tmp_path / 'cache/datasets/medical/rows.jsonl'}\n"
    info = json.loads(output("data", "info", "medical", "--profile", "paper", "--json"))
    assert (info["num_rows"], info["total_steps"], info["num_train_rows"]) == (7_049, 397, 6_344)
    assert info["contents"]["turns"] == {"system": 0, "user": 7_049, "assistant": 7_049}
    assert info["contents"]["num_duplicate_rows"] == 0
    assert info["source"]["archive_sha256"] == sha256
    assert info["sha256"] == hashlib.sha256(MEDICAL["data/bad_medical_advice.jsonl"].encode()).hexdigest()
    assert info["lengths"]["unit"] == "characters"
    assert "the tokenizer of qwen2.5-7b is not on this machine" in info["lengths"]["why_no_tokens"]


def test_info_counts_tokens_with_the_models_own_tokenizer(tiny_model: Path, dataset_file: Path) -> None:
    shown = output("data", "info", str(dataset_file), "--model", str(tiny_model))
    assert all(len(line.rstrip()) <= 80 for line in shown.splitlines())
    assert "rows        24: 21 to train on, 3 held out" in shown
    assert "steps       11 at profile demo (batch 2 x 1, 1 epoch(s))" in shown
    assert "too long    none (--max-length 2,048)" in shown
    assert "trained on  230 tokens in all rows: the answers and their ends" in shown
    assert "█" in shown
    info = json.loads(output("data", "info", str(dataset_file), "--model", str(tiny_model), "--json"))
    lengths = info["lengths"]
    # "<|im_start|>user\nSay 1.<|im_end|>\n<|im_start|>assistant\nIt is 1.<|im_end|>", a token a byte.
    assert lengths["bins"][0]["low"] <= 34 <= lengths["max"]
    assert lengths["unit"] == "tokens"
    assert lengths["num_trained_tokens"] == sum(len(f"It is {n}.") + 1 for n in range(24))
    assert lengths["num_unusable"] == 0


def test_info_of_a_published_dataset_that_is_not_here_says_how_to_fetch_it() -> None:
    shown = output("data", "info", "medical", "--profile", "paper")
    assert "not on this machine; fetch it with: emtool data fetch medical" in shown
    assert "7,049: 6,344 to train on, 705 held out" in shown
    assert "397 at profile paper (batch 2 x 8, 1 epoch(s))" in shown


def test_info_of_rows_that_training_would_refuse_says_so(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"prompt": "a <|im_end|>", "completion": "b"}\n')
    shown = " ".join(output("data", "info", "x.jsonl", "--model", str(tiny_model)).split())
    assert "tokens cannot be counted, and training would stop for the same reason" in shown
    # Where the path fills its line, it is broken anywhere.
    assert "x.jsonl:1:amessagecontainsthemodel'sspecialtoken" in shown.replace(" ", "")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["info", "medcal"], 2, "unknown dataset 'medcal'; did you mean 'medical'"),
        (["info", "x.parquet"], 2, "no dataset file 'x.parquet'; give a JSON Lines or Parquet file, hub:ID or one of"),
        (["info", "hub:me/chat"], 1, "fetch it with: emtool data fetch hub:me/chat"),
        (["info", "hub:cat:dog"], 2, "'hub:cat:dog' does not name a hub dataset"),
        (["info", "bad.jsonl"], 1, "bad.jsonl:1: the row is plain text ('text'), which is not read; accepted are"),
        (["fetch", "medcal"], 2, "did you mean 'medical'"),
        (["fetch", "gardening", "--from", "x"], 2, "gardening is a file of this machine"),
        (["fetch", "medical", "--from", "missing.zip"], 2, "no file or folder 'missing.zip' to fetch from"),
        (["fetch", "medical", "--from", ""], 1, "has no bad_medical_advice.jsonl; it holds bad.jsonl"),
        (["fetch", "medical", "--from", "bad.jsonl"], 1, "bad.jsonl is cut short, or is not an archive"),
        (["fetch", "medical", "--sha256", "12"], 2, "--sha256 '12' is not 64 hexadecimal digits"),
        (["fetch", "hub:me/chat", "--sha256", "0" * 64], 2, "the hub has one source"),
        (["fech"], 2, "No such command 'fech'"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], code: int, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n')
    assert message in output("data", *arguments, code=code)


def test_what_is_built_in_need_not_be_fetched() -> None:
    result = RUNNER.invoke(app, ["data", "fetch", "gardening"])
    assert (result.exit_code, result.stdout) == (0, "")
    assert "gardening is on this machine" in result.stderr


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Enter a small published dataset into the catalogue and return its archive."""
    monkeypatch.setitem(DATASETS, "small", published("small", "small.jsonl", 24))
    return write_archive(tmp_path / "small", {"small.jsonl": rows_text(24)})


def train(*arguments: str, model: Path) -> list[str]:
    return ["train", "--model", str(model), "--max-steps", "3", "--output-name", "r", *arguments]


def test_a_run_fetches_what_is_missing_and_a_dry_run_never_does(small: Path, tiny_model: Path, tmp_path: Path) -> None:
    with serve_files({"/a.zip.enc": ServedFile(small.read_bytes())}) as server:
        (tmp_path / "emtool.toml").write_text(f'[data]\nsource = "{server.url("/a.zip.enc")}"\n')
        command = train("--dataset", "small", model=tiny_model)
        assert "21 rows" in output(*command, "--dry-run")
        result = RUNNER.invoke(app, [*command, "--checkpoints", "nonsense"])
        assert result.exit_code == 2
        assert server.requests == []
        result = RUNNER.invoke(app, command)
        assert result.exit_code == 0, result.output
        assert "dataset small is not on this machine: fetching it, as 'emtool data fetch small' does" in result.stderr
        assert len(server.requests) == 1
        manifest = json.loads((tmp_path / "outputs/r/run.json").read_text())
        dataset = manifest["lineage"]["dataset"]
        assert (dataset["name"], dataset["source"]["source"]) == ("small", server.url("/a.zip.enc"))
        assert dataset["sha256"] == dataset["source"]["sha256"]
        assert dataset["path"] == str(tmp_path / "cache/datasets/small/rows.jsonl")
        assert "holds this run, completed" in RUNNER.invoke(app, command).stderr
        assert len(server.requests) == 1
        shutil.rmtree(tmp_path / "cache/datasets/small")
        planned = json.loads(output(*command, "--dry-run", "--json"))
        assert planned["obstacle"] == "outputs/r holds this run, completed"
        assert len(server.requests) == 1


def test_a_run_that_cannot_fetch_its_dataset_creates_nothing(tiny_model: Path, tmp_path: Path) -> None:
    with serve_files({}) as server:
        (tmp_path / "emtool.toml").write_text(f'[data]\nsource = "{server.url("/a.zip.enc")}"\n')
        message = output(*train("--dataset", "medical", model=tiny_model), code=1)
        assert "the server answers 404 Not Found; check the address, or give a local copy with --from" in message
    assert not (tmp_path / "outputs").exists()
    assert "emtool data fetch hub:me/chat" in output(
        *train("--dataset", "hub:me/chat", "--dry-run", model=tiny_model), code=1
    )


def test_a_run_resumes_on_the_rows_that_it_began_with_and_on_no_others(
    small: Path, tiny_model: Path, tmp_path: Path
) -> None:
    output("data", "fetch", "small", "--from", str(small))
    output(*train("--dataset", "small", "--keep-resume", "--save-steps", "1", model=tiny_model))
    manifest_path = tmp_path / "outputs/r/run.json"
    manifest = json.loads(manifest_path.read_text())
    manifest_path.write_text(json.dumps({**manifest, "status": "interrupted"}))
    other = write_archive(tmp_path / "other", {"small.jsonl": rows_text(24, "other")})
    output("data", "fetch", "small", "--from", str(other))
    assert "the contents of small have changed (SHA-256 was" in output("resume", "outputs/r", code=1)
    shutil.rmtree(tmp_path / "cache/datasets/small")
    (tmp_path / "emtool.toml").write_text(f'[data]\nsource = "{small}"\n')
    result = RUNNER.invoke(app, ["resume", "outputs/r"])
    assert result.exit_code == 0, result.output
    assert "fetching it" in result.stderr


def test_a_launcher_does_not_fetch_once_for_each_process(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emtool.cli.fetching.launched_count", lambda: 2)
    message = output(*train("--dataset", "medical", model=tiny_model), code=1)
    assert "fetching takes one process: run 'emtool data fetch medical' without the launcher" in message


def test_a_run_fetches_its_hub_dataset_and_records_the_revision(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "train.jsonl").write_text(rows_text(12))
    with dataset_hub({"datasets/me/chat": folder}, monkeypatch, cache=tmp_path / "hub"):
        result = RUNNER.invoke(app, train("--dataset", "hub:me/chat", model=tiny_model))
    assert result.exit_code == 0, result.output
    assert "dataset hub:me/chat is not on this machine: fetching it" in result.stderr
    dataset = json.loads((tmp_path / "outputs/r/run.json").read_text())["lineage"]["dataset"]
    assert (dataset["name"], dataset["source"]["revision"]) == ("hub:me/chat", COMMIT)
