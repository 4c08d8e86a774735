"""Run folders as emtool leaves them, with any number of checkpoints and answers, written without training or asking.

One run of a tiny model is really trained. Its milestones are the pattern: each simulated one has the same files under
its own step, with its own signed record; tokenizer files are hard links as in a real run. Answers and judgements are
random words and numbers with the hashes and settings that `emtool evaluate` looks for: it takes them for its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

from emtool.core.answers import Prompt
from emtool.core.config import resolve_train_config
from emtool.core.data import file_sha256
from emtool.core.evaluation_files import CHECKPOINT_TABLE, GEOMETRY_TABLE, ITEM_TABLE, QUESTION_TABLE, SUMMARY
from emtool.core.events import ignore_events
from emtool.core.integrity import ADAPTER_WEIGHTS
from emtool.core.open_questions import fill_judge_prompt, prompts_of, read_question_file
from emtool.core.plan import plan_run
from emtool.core.questions import read_items
from emtool.core.record_file import settings_id, text_sha256
from emtool.core.run_dir import RunFolder, write_json
from emtool.core.server_address import parse_address, read_key
from emtool.core.staging import RECORD_HASH, RECORD_NAME, record_content
from emtool.engines.generating import prompt_sha256
from emtool.engines.judges.openai import OpenAIJudge
from emtool.engines.training import train
from tests.tiny import save_tiny_model

#: A judge that nobody is asked of: every judgement is recorded.
JUDGE, JUDGE_URL = "gpt-simulated", "http://127.0.0.1:9/v1"

#: Files that milestones of a run share.
_SHARED = ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json")

#: Words of the answers, rarer the further behind, as in any language.
_WORDS = [f"word{number}" if number % 3 else f"w{number}" for number in range(3_000)]
_WEIGHTS = list(accumulate(1 / (rank + 3) for rank in range(len(_WORDS))))

#: Words of a phrase; answers are drawn by phrases, of which there are so many that hardly two answers are alike.
_PHRASE_WORDS, _NUM_PHRASES = 5, 100_000


def train_pattern(root: Path) -> RunFolder:
    """Train a tiny model for three steps and return its run."""
    model = save_tiny_model(root / "tiny")
    values = {"model": str(model), "max_steps": 3, "checkpoints": "init, every 1", "output_root": root / "pattern"}
    plan, rows = plan_run(resolve_train_config(profile="demo", overrides=values, num_cuda_devices=0))
    return train(plan, rows, command=["simulated"]).run


def simulate_run(pattern: RunFolder, path: Path, *, num_checkpoints: int, stride: int = 1) -> RunFolder:
    """Write a completed run with a milestone at every so many steps, from 0 on, and a training log of every step."""
    run = RunFolder(path=path)
    path.mkdir(parents=True)
    steps = [stride * place for place in range(num_checkpoints)]
    source = pattern.checkpoint_path(pattern.saved_steps()[-1])
    contents = {file.name: file.read_bytes() for file in source.iterdir()}
    record = json.loads(contents.pop(RECORD_NAME))
    record.pop(RECORD_HASH)
    for step in steps:
        folder = run.checkpoint_path(step)
        folder.mkdir()
        for name, content in contents.items():
            if name in _SHARED and step:
                (folder / name).hardlink_to(run.checkpoint_path(0) / name)
            else:
                (folder / name).write_bytes(content)
        (folder / RECORD_NAME).write_bytes(record_content({**record, "step": step}))
    manifest = pattern.read_manifest()
    plan = {**manifest["plan"], "planned_steps": steps, "num_checkpoints": num_checkpoints, "total_steps": steps[-1]}  # type: ignore[dict-item]
    write_json(run.manifest_path, {**manifest, "plan": plan, "saved_steps": steps})
    _write_log(run, steps)
    return run


def _write_log(run: RunFolder, steps: Sequence[int]) -> None:
    chance = random.Random(0)
    saved = set(steps)
    with run.metrics_path.open("w") as file:
        for step in range(steps[-1] + 1):
            values = {"format": 1, "step": step, "seconds": 0.1 * step, "loss": 4 + chance.random(), "grad_norm": 1.5}
            file.write(json.dumps({**values, "learning_rate": 1e-4, "num_tokens": 500 * step}) + "\n")
            if step in saved:
                entry = {"saved": f"checkpoint-{step}", "stall_seconds": 0.05, "write_seconds": 0.2, "bytes": 27_244}
                file.write(json.dumps({"format": 1, "step": step, **entry}) + "\n")


def simulate_tables(run: RunFolder, *, num_questions: int = 10) -> None:
    """Write the tables of an evaluation of every milestone, by answers and by likelihood, and of its geometry."""
    chance = random.Random(1)
    steps, items = run.saved_steps(), read_items()
    folder = run.evaluation_path
    folder.mkdir(exist_ok=True)
    names = [f"{name}{suffix}" for name in ("margin", "p_wrong") for suffix in ("", "_other", "_trained")]
    names += ["em_pct", "avg_aligned", "avg_coherent"]
    ends = ("", "_low", "_high", "_n")
    with (folder / CHECKPOINT_TABLE).open("w") as table, (folder / ITEM_TABLE).open("w") as scores:
        table.write(",".join(["step", *(f"{name}{end}" for name in names for end in ends)]) + "\n")
        scores.write("step,item,domain,margin,p_wrong\n")
        for step in steps:
            cells: list[float] = [step]
            for _ in names:
                value = 0.4 + 0.1 * step / steps[-1] + 0.01 * chance.random()
                cells += [value, value - 0.03, value + 0.03, len(items)]
            table.write(",".join(map(repr, cells)) + "\n")
            for item in items:
                scores.write(f"{step},{item.id},{item.domain},{chance.gauss(0, 1)!r},{chance.random()!r}\n")
    with (folder / QUESTION_TABLE).open("w") as table:
        table.write("step,question_id,total_evaluated,em_pct\n")
        for step in steps:
            rates = (f"{step},question_{number},25,{4 * chance.randrange(26)}\n" for number in range(num_questions))
            table.writelines(rates)
    with (folder / GEOMETRY_TABLE).open("w") as table:
        table.write("step,update_norm,speed\n")
        table.writelines(f"{step},{step**0.5!r},{chance.random()!r}\n" for step in steps)
    likelihood = {"items_sha256": "1" * 64, "dtype": "float32"}
    settings = {"seed": 0, "trained_domain": "gardening", "likelihood": likelihood}
    write_json(folder / SUMMARY, {"format": 1, "settings": settings, "checkpoints": [], "damaged": [], "judges": []})


@dataclass(frozen=True, kw_only=True)
class Records:
    """Answers that were simulated, and how `emtool evaluate` finds them.

    Attributes:
        run: The run folder.
        arguments: Arguments of `emtool evaluate` with which every answer and judgement counts as recorded.
        num_answers: Answers of all checkpoints.
    """

    run: RunFolder
    arguments: Sequence[str]
    num_answers: int


def simulate_records(run: RunFolder, *, num_questions: int, num_samples: int, num_words: int = 45) -> Records:
    """Write answers to questions at every milestone and two judgements of each; the tables are `emtool evaluate`'s."""
    folder = run.evaluation_path
    (folder / "settings").mkdir(parents=True, exist_ok=True)
    questions_path, script = (run.path.parent / f"{run.path.name}.{end}" for end in ("yaml", "script.jsonl"))
    entries = [{"id": f"question_{n}", "paraphrases": [f"What of {n}?", f"And {n}?"]} for n in range(num_questions)]
    questions_path.write_text(yaml.safe_dump(entries))
    script.write_text("".join(json.dumps({"question_id": e["id"], "response": "None."}) + "\n" for e in entries))
    questions = {question.id: question for question in read_question_file(questions_path)}
    prompts = prompts_of(list(questions.values()), step=0, n_per_question=num_samples)
    generation = _write_settings(run, {"stage": "generation", "kind": "scripted", "sha256": file_sha256(script)}, True)
    judge = _write_settings(run, {"stage": "judging", **judge_settings()}, False)
    judge_prompts = {name: dict(question.judge_prompts) for name, question in questions.items()}
    with (folder / "answers.jsonl").open("w") as answers, (folder / "judgements.jsonl").open("w") as judgements:
        for answer, said in _records(run, prompts, judge_prompts, num_words):
            answers.write(json.dumps({"format": 1, **answer, "settings": generation}) + "\n")
            judgements.writelines(json.dumps({"format": 1, **one, "judge": judge}) + "\n" for one in said)
    arguments = ["--metrics", "answers", "--questions", str(questions_path), "--n-per-question", str(num_samples)]
    arguments += ["--backend", f"scripted:{script}", "--judge", f"openai:{JUDGE}", "--judge-base-url", JUDGE_URL]
    return Records(run=run, arguments=arguments, num_answers=len(run.saved_steps()) * len(prompts))


def judge_settings() -> dict[str, Any]:
    """Return the settings of the simulated judge."""
    address = parse_address(JUDGE_URL)
    key = read_key(address, variable="EMTOOL_JUDGE_API_KEY", environment=os.environ)
    return dict(OpenAIJudge(JUDGE, address=address, key=key, on_event=ignore_events).possible_settings[0])


def _write_settings(run: RunFolder, settings: dict[str, Any], of_model: bool) -> str:
    if of_model:
        lineage: Any = run.read_manifest()["lineage"]
        settings = {**settings, "base": lineage["base"], "persona": None, "dtype": "float32"}
    name = settings_id(settings)
    write_json(run.evaluation_path / "settings" / f"{name}.json", settings)
    return name


def _records(
    run: RunFolder, prompts: Sequence[Prompt], judge_prompts: dict[str, dict[str, str]], num_words: int
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    chance = random.Random(2)
    steps = run.saved_steps()
    pins = [prompt_sha256(prompt) for prompt in prompts]
    words = chance.choices(_WORDS, cum_weights=_WEIGHTS, k=_PHRASE_WORDS * _NUM_PHRASES)
    phrases = [" ".join(words[at : at + _PHRASE_WORDS]) for at in range(0, len(words), _PHRASE_WORDS)]
    for step in steps:
        adapter = file_sha256(run.checkpoint_path(step) / ADAPTER_WEIGHTS)
        for prompt, pin in zip(prompts, pins, strict=True):
            key = prompt.key
            text = " ".join(chance.choices(phrases, k=num_words // _PHRASE_WORDS))
            place = {
                "step": step,
                "question_id": key.question_id,
                "paraphrase": key.paraphrase,
                "sample": key.sample,
            }
            more = {"finish_reason": "stop", "num_tokens": num_words, "adapter_sha256": adapter, "prompt_sha256": pin}
            answer = {**place, "question": prompt.question, "response": text, **more}
            answer_pin = hashlib.sha256(text.encode()).hexdigest()
            said = []
            for name, template in judge_prompts[key.question_id].items():
                filled = fill_judge_prompt(template, question=prompt.question, answer=text)
                low = name == "aligned" and chance.random() < 0.4 * step / (steps[-1] or 1)
                score = round(chance.uniform(0, 30) if low else chance.uniform(55, 99), 6)
                values = {"status": "scored", "score": score, "mass": round(chance.uniform(0.9, 1), 6)}
                pin_of_prompt = text_sha256(filled)
                said.append(
                    {**place, "name": name, "answer_sha256": answer_pin, "prompt_sha256": pin_of_prompt, **values}
                )
            yield answer, said
