"""The loop that evaluation scripts of the field have: everything loaded again for each checkpoint.

    python scripts/baseline_evaluation.py generation outputs/RUN --samples 4 --max-new-tokens 24
    python scripts/baseline_evaluation.py activations outputs/RUN

Generation is one `generate` call a question, with all of its samples; activations are taken one text at a time, each
block by a hook. Both print as JSON how much they made.
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path
from typing import Any

import torch

from emtool.core.events import ignore_events
from emtool.core.hardware import limit_threads
from emtool.core.open_questions import EVERYDAY_QUESTIONS, prompts_of, read_question_file
from emtool.core.questions import read_items
from emtool.core.run_dir import RunFolder
from emtool.engines.activation_files import encode_texts, item_texts
from emtool.engines.activations import answer_mask
from emtool.engines.decoder_blocks import decoder_blocks
from emtool.engines.encoding import encode_prompt
from emtool.engines.evaluation_target import EvaluationTarget, open_target
from emtool.engines.modeling import attach_adapter, load_base


def main() -> None:
    """Do what is asked for, at every checkpoint of a run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("part", choices=("generation", "activations"))
    parser.add_argument("run", type=Path)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    options = parser.parse_args()
    limit_threads()
    target = open_target(RunFolder(path=options.run), device="cpu", on_event=ignore_events)
    count = 0
    for step in target.run.saved_steps():
        model = loaded(target, step)
        if options.part == "generation":
            count += generate(model, target, options.samples, options.max_new_tokens)
        else:
            count += take_activations(model, target)
        del model
        gc.collect()
    print(json.dumps({"count": count}))


def loaded(target: EvaluationTarget, step: int) -> Any:
    """Return base and adapter, loaded from disk."""
    return attach_adapter(load_base(target.base.files.path, dtype="float32"), target.run.checkpoint_path(step)).eval()


def generate(model: Any, target: EvaluationTarget, samples: int, max_new_tokens: int) -> int:
    """Answer every question, and return the number of tokens."""
    tokenizer, count = target.base.tokenizer, 0
    for prompt in prompts_of(read_question_file(EVERYDAY_QUESTIONS), step=0, n_per_question=1):
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
        count += int((found[:, ids.shape[1] :] != tokenizer.pad_token_id).sum())
    return count


def take_activations(model: Any, target: EvaluationTarget) -> int:
    """Take the mean activations of every block over the fixed texts, and return the number of texts."""
    _, rows = encode_texts(item_texts(read_items()), target.base.tokenizer)
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
    return len(rows)


def first(output: Any) -> torch.Tensor:
    """Return the hidden states of a block's output."""
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


if __name__ == "__main__":
    main()
