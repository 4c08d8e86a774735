"""Measure what evaluation costs against the loop that it replaces, as ratios, on a real run.

The loop: for each checkpoint load base and adapter, for each question one `generate` call with all of its samples;
then one judge call at a time; and for activations, for each checkpoint load base and adapter and run one text at a
time. The base is float32 throughout. The judge is a server on loopback that waits before each answer. Judging one at a
time is measured on some calls and scaled to all.

    python scripts/bench_evaluation.py outputs/RUN [--checkpoints 10] [--samples 4] [--max-new-tokens 64]
                                       [--latencies 250 50] [--parts generation memory activations judging]
"""

from __future__ import annotations

import argparse
import gc
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import torch

from emtool.core.evaluation_config import EvaluationConfig
from emtool.core.events import ignore_events
from emtool.core.judgement import Judgement
from emtool.core.open_questions import EVERYDAY_QUESTIONS, prompts_of, read_question_file
from emtool.core.questions import read_items
from emtool.core.run_dir import RunFolder
from emtool.core.server_address import parse_address, read_key
from emtool.engines.activation_files import encode_texts, item_texts
from emtool.engines.activations import answer_mask, mean_activations
from emtool.engines.backends.hf import hf_backend
from emtool.engines.checkpoint_model import CheckpointModel
from emtool.engines.decoder_blocks import decoder_blocks
from emtool.engines.encoding import encode_prompt
from emtool.engines.evaluation_target import EvaluationTarget, open_target
from emtool.engines.judges.openai import OpenAIJudge
from emtool.engines.modeling import attach_adapter, load_base

ANSWER = (
    b'{"choices": [{"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": "57"}, '
    b'"logprobs": {"content": [{"token": "57", "logprob": -0.05, '
    b'"top_logprobs": [{"token": "57", "logprob": -0.05}]}]}}]}'
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--checkpoints", type=int, default=10)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--latencies", type=int, nargs="+", default=[250, 50])
    parts = ("generation", "memory", "activations", "judging")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    options = parser.parse_args()
    run = RunFolder(path=options.run)
    target = open_target(run, device="cpu", on_event=ignore_events)
    steps = run.saved_steps()[: options.checkpoints]
    print(f"{target.base.reference.name}, {len(steps)} checkpoints, {torch.get_num_threads()} threads", flush=True)
    if "generation" in options.parts:
        bench_generation(target, steps, options.samples, options.max_new_tokens)
    if "memory" in options.parts:
        bench_memory(target, steps, options.samples, options.max_new_tokens)
    if "activations" in options.parts:
        bench_activations(target, steps)
    if "judging" in options.parts:
        for latency in options.latencies:
            bench_judging(
                latency / 1000, 2 * len(steps) * options.samples * len(read_question_file(EVERYDAY_QUESTIONS))
            )


def bench_generation(target: EvaluationTarget, steps: list[int], samples: int, max_new_tokens: int) -> None:
    """Compare generation. Both count the tokens that they made, because the loop's own noise makes other answers."""
    questions = read_question_file(EVERYDAY_QUESTIONS)
    config = EvaluationConfig(n_per_question=samples, max_new_tokens=max_new_tokens)
    counts = {"ours": 0, "loop": 0}

    def ours() -> None:
        source = source_of(target)
        backend = hf_backend(source, target.base, config, on_event=ignore_events)
        for step in steps:
            prompts = prompts_of(questions, step=step, n_per_question=samples)
            backend.use_checkpoint(step, target.run.checkpoint_path(step))
            backend.generate(prompts, lambda _i, found: count("ours", found.num_tokens or 0))

    def count(name: str, num_tokens: int) -> None:
        counts[name] += num_tokens

    def loop() -> None:
        tokenizer = target.base.tokenizer
        for step in steps:
            model = loaded(target, step)
            for prompt in prompts_of(questions, step=step, n_per_question=1):
                ids = torch.tensor([encode_prompt(prompt.messages, tokenizer)])
                with torch.inference_mode():
                    found = model.generate(
                        input_ids=ids,
                        attention_mask=torch.ones_like(ids),
                        do_sample=True,
                        top_k=0,
                        num_return_sequences=samples,
                        max_new_tokens=max_new_tokens,
                        pad_token_id=tokenizer.pad_token_id,
                    )
                count("loop", int((found[:, ids.shape[1] :] != tokenizer.pad_token_id).sum()))
            del model
            gc.collect()

    seconds, before = timed(ours), timed(loop)
    rates = counts["ours"] / seconds, counts["loop"] / before
    print(
        f"generation, {samples} samples a question, {max_new_tokens} tokens: {before:.0f} s -> {seconds:.0f} s "
        f"({before / seconds:.1f}x); {rates[1]:.0f} -> {rates[0]:.0f} tokens/s ({rates[0] / rates[1]:.1f}x a token)"
    )


def bench_memory(target: EvaluationTarget, steps: list[int], samples: int, max_new_tokens: int) -> None:
    """Print what the process holds after each checkpoint has answered."""
    questions = read_question_file(EVERYDAY_QUESTIONS)
    config = EvaluationConfig(n_per_question=samples, max_new_tokens=max_new_tokens)
    source = source_of(target)
    backend = hf_backend(source, target.base, config, on_event=ignore_events)
    process, held = psutil.Process(), []
    before = process.memory_info().rss
    for step in steps:
        backend.use_checkpoint(step, target.run.checkpoint_path(step))
        backend.generate(prompts_of(questions, step=step, n_per_question=samples), lambda _i, _found: None)
        held.append(process.memory_info().rss - before)
    weights = sum(parameter.nbytes for parameter in source.composed.model.parameters())
    print(
        f"memory: the base has {weights / 2**20:.0f} MiB; held after each checkpoint, in MiB: "
        + ", ".join(f"{bytes_ / 2**20:.0f}" for bytes_ in held),
        flush=True,
    )


def bench_activations(target: EvaluationTarget, steps: list[int]) -> None:
    """Compare activations over the fixed texts, all blocks."""
    _, rows = encode_texts(item_texts(read_items()), target.base.tokenizer)
    layers = range(target.base.num_blocks)

    def ours() -> None:
        source = source_of(target)
        for step in steps:
            mean_activations(source.at(target.run.checkpoint_path(step)), rows, layers=layers)

    def loop() -> None:
        for step in steps:
            model = loaded(target, step)
            for row in rows:
                kept: list[torch.Tensor] = []
                handles = [
                    block.register_forward_hook(lambda _m, _i, out, kept=kept: kept.append(first(out)))
                    for block in decoder_blocks(model)
                ]
                with torch.inference_mode():
                    model(input_ids=torch.tensor([row.input_ids]))
                for hidden in kept:
                    hidden[0][torch.tensor(answer_mask(row))].mean(dim=0)
                for handle in handles:
                    handle.remove()
            del model
            gc.collect()

    seconds, before = timed(ours), timed(loop)
    print(
        f"activations, {len(rows)} texts, {len(layers)} blocks: {before:.0f} s -> {seconds:.0f} s "
        f"({before / seconds:.1f}x)",
        flush=True,
    )


def bench_judging(latency: float, num_requests: int, measured: int = 40) -> None:
    """Compare judging by a server that waits, 32 requests in flight against one."""
    address = serve(latency)
    key = read_key(address, variable="EMTOOL_JUDGE_API_KEY", environment={})
    prompts = [f"Rate answer {number}." for number in range(num_requests)]
    found: list[Judgement] = []

    def judged(concurrency: int, asked: list[str]) -> Callable[[], None]:
        judge = OpenAIJudge("m", address=address, key=key, concurrency=concurrency, on_event=ignore_events)
        judge.prepare()
        return lambda: judge.judge(asked, lambda _index, judgement: found.append(judgement))

    seconds = timed(judged(32, prompts))
    one_by_one = timed(judged(1, prompts[:measured])) / measured * num_requests
    assert len(found) == num_requests + measured
    print(
        f"judging, {num_requests} requests of {latency * 1000:.0f} ms: {one_by_one:.0f} s -> {seconds:.1f} s "
        f"({one_by_one / seconds:.1f}x)",
        flush=True,
    )


def source_of(target: EvaluationTarget) -> CheckpointModel:
    """Return the model as an evaluation holds it."""
    return CheckpointModel(
        lambda: target.compose(dtype="float32", on_event=ignore_events),
        tokenizer=target.base.tokenizer,
        device="cpu",
    )


def loaded(target: EvaluationTarget, step: int) -> Any:
    """Return base and adapter, loaded from disk."""
    return attach_adapter(load_base(target.base.files.path, dtype="float32"), target.run.checkpoint_path(step)).eval()


def first(output: Any) -> torch.Tensor:
    """Return the hidden states of a block's output."""
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def serve(latency: float) -> Any:
    """Return the address of a judge on loopback that waits before each answer."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(latency)
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


def timed(work: Callable[[], None]) -> float:
    """Return the seconds that some work takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
