"""What evaluation costs beside the loop that it replaces, and with several workers.

    python scripts/bench_evaluation.py     prints a section of docs/benchmarks.md; 15 to 25 minutes on two cores

Whole processes on a run of SmolLM2-135M in float32. The loop is baseline_evaluation.py; for judging, one request at a
time against a server on loopback that waits before each answer, measured on some requests and scaled to all.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from paired import EMTOOL, ROOT, Run, in_turn, median, mib, ratio, run, say, table

from emtool.core.events import ignore_events
from emtool.core.judgement import Judgement
from emtool.core.questions import read_items
from emtool.core.run_dir import RunFolder
from emtool.core.server_address import parse_address, read_key

SAMPLES, TOKENS = 4, 24
#: Texts to judge, and those that the loop is measured on.
TEXTS, MEASURED = 400, 40
LOOP, OURS = "the loop", "emtool"
ANSWER = (
    b'{"choices": [{"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": "57"}, '
    b'"logprobs": {"content": [{"token": "57", "logprob": -0.05, '
    b'"top_logprobs": [{"token": "57", "logprob": -0.05}]}]}}]}'
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--take-activations", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--judge", help=argparse.SUPPRESS)
    parser.add_argument("--in-flight", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--texts", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.judge is not None:
        judge_texts(options.judge, in_flight=options.in_flight, num_texts=options.texts)
        return
    if options.take_activations is not None:
        take_activations(RunFolder(path=options.take_activations))
        return
    with tempfile.TemporaryDirectory(prefix="emtool-bench-", dir=".") as folder:
        made = Path(folder) / "run"
        say("training a run of two checkpoints")
        length = ["--max-steps", "2", "--checkpoints", "every 1", "--resume-every", "0"]
        run([*EMTOOL, "train", "--profile", "demo", *length, "--output-root", folder, "--output-name", "run"])
        parts = [generation(made, options.rounds), activations(made, options.rounds)]
    print("## What evaluation costs\n")
    print(
        "Two checkpoints of SmolLM2-135M in float32, against the loop that evaluation scripts of the field have: load "
        "base and adapter for each checkpoint, one `generate` call a question, one text at a time for activations, one "
        "judge call at a time. Whole processes, imports and loading included.\n"
    )
    rows = [row for part in parts for row in part] + [judging(wait, options.rounds) for wait in (0.25, 0.05)]
    print(table(("", LOOP, OURS, "emtool's share", "peak memory, the loop", "peak memory, emtool"), rows))
    print(
        "\nJudging has 32 requests in flight against one; its times are of the requests alone, the loop's of "
        f"{MEASURED}, scaled. Workers are processes on a Ray cluster of this machine, each with its share of the "
        "cores; the time holds the cluster's start and end."
    )


def generation(made: Path, rounds: int) -> list[tuple[str, ...]]:
    """Return the rows of generation: one process, and two workers."""
    loop = [sys.executable, str(ROOT / "scripts" / "baseline_evaluation.py"), "generation", str(made)]
    sizes = ["--samples", str(SAMPLES), "--max-new-tokens", str(TOKENS)]
    workers = f"{OURS}, 2 workers"
    variants: dict[str, Callable[[], Run]] = {
        LOOP: partial(run, [*loop, *sizes]),
        OURS: partial(evaluate, made),
        workers: partial(evaluate, made, "--workers", "2"),
    }
    found = in_turn(variants, rounds)
    name = f"generation, {SAMPLES} answers to each of 10 questions, {TOKENS} tokens"
    # What Ray starts is nobody's child here: its memory is not counted.
    alone, shared = row(name, found[LOOP], found[OURS]), row(f"{name}, two workers", found[LOOP], found[workers])
    return [alone, (*shared[:-1], "")]


def evaluate(made: Path, *more: str) -> Run:
    """Run `emtool evaluate` on a run that was not evaluated."""
    shutil.rmtree(made / "evaluation", ignore_errors=True)
    sizes = ["--n-per-question", str(SAMPLES), "--max-new-tokens", str(TOKENS)]
    return run([*EMTOOL, "evaluate", str(made), "--metrics", "answers", *sizes, *more])


def activations(made: Path, rounds: int) -> list[tuple[str, ...]]:
    """Return the row of activations."""
    loop = [sys.executable, str(ROOT / "scripts" / "baseline_evaluation.py"), "activations", str(made)]
    ours = [sys.executable, __file__, "--take-activations", str(made)]
    found = in_turn({LOOP: partial(run, loop), OURS: partial(run, ours)}, rounds)
    count = 2 * len(read_items())
    return [row(f"activations of 30 blocks over {count} texts", found[LOOP], found[OURS])]


def take_activations(made: RunFolder) -> None:
    """Take the activations as an evaluation does, and nothing else."""
    from emtool.engines.activation_files import item_texts
    from emtool.engines.activation_files import take_activations as take
    from emtool.engines.checkpoint_model import CheckpointModel
    from emtool.engines.evaluation_target import open_target

    target = open_target(made, device="cpu", on_event=ignore_events)
    source = CheckpointModel(
        lambda: target.compose(dtype="float32", on_event=ignore_events), tokenizer=target.base.tokenizer, device="cpu"
    )
    count = 0
    for step in made.saved_steps():
        ids, _ = take(
            source.at(made.checkpoint_path(step)),
            source.tokenizer,
            item_texts(read_items()),
            layers=range(target.base.num_blocks),
        )
        count += len(ids)
    print(json.dumps({"count": count}))


def row(name: str, loop: list[Run], ours: list[Run]) -> tuple[str, ...]:
    """Return one comparison as cells."""
    theirs, mine = [one.seconds for one in loop], [one.seconds for one in ours]
    peaks = [mib(median([one.peak_bytes for one in runs])) for runs in (loop, ours)]
    return name, f"{median(theirs):.0f} s", f"{median(mine):.0f} s", ratio(mine, theirs), *peaks


def judging(wait: float, rounds: int) -> tuple[str, ...]:
    """Compare judging by a server that waits, 32 requests in flight against one."""
    address = serve(wait)

    def ask(in_flight: int, num_texts: int) -> Run:
        asked = ["--judge", address.url, "--in-flight", str(in_flight), "--texts", str(num_texts)]
        return run([sys.executable, __file__, *asked])

    found = in_turn({LOOP: partial(ask, 1, MEASURED), OURS: partial(ask, 32, TEXTS)}, rounds)
    seconds = {name: [float(json.loads(one.stdout)["seconds"]) for one in runs] for name, runs in found.items()}
    ours, loop = seconds[OURS], [one / MEASURED * TEXTS for one in seconds[LOOP]]
    peaks = [mib(median([one.peak_bytes for one in found[name]])) for name in (LOOP, OURS)]
    name = f"judging {TEXTS} texts, the judge waits {wait * 1000:.0f} ms"
    return name, f"{median(loop):.0f} s", f"{median(ours):.1f} s", ratio(ours, loop, digits=3), *peaks


def judge_texts(url: str, *, in_flight: int, num_texts: int) -> None:
    """Judge texts as an evaluation does, and print how long the requests took."""
    from emtool.engines.judges.openai import OpenAIJudge

    address = parse_address(url)
    key = read_key(address, variable="EMTOOL_JUDGE_API_KEY", environment={})
    judge = OpenAIJudge("m", address=address, key=key, concurrency=in_flight, on_event=ignore_events)
    judge.prepare()
    found: list[Judgement] = []
    begun = time.perf_counter()
    judge.judge([f"Rate answer {n}." for n in range(num_texts)], lambda _index, judgement: found.append(judgement))
    seconds = time.perf_counter() - begun
    assert len(found) == num_texts
    print(json.dumps({"seconds": seconds}))


def serve(wait: float) -> Any:
    """Return the address of a judge on loopback that waits before each answer."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(wait)
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(ANSWER)))
            self.end_headers()
            self.wfile.write(ANSWER)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return parse_address(f"http://127.0.0.1:{server.server_port}/v1")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
