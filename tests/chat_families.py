"""The model families of the catalogue: template, special tokens, what the template does to a text.

The templates are the texts that TRL ships, read from the installed package; SmolLM2's is written here and compared with
the real one by a slow test. The tokenizers are byte-level ones with the family's special tokens: the real ones need a
model hub. The end of a sequence is what the family's instruction-tuned models call so.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.tiny import byte_tokenizer

SMOLLM2_TEMPLATE = (
    "{%- set named = 'You are a helpful AI assistant named SmolLM, trained by Hugging Face' -%}"
    "{%- if messages[0].role != 'system' -%}{{ '<|im_start|>system\n' ~ named ~ '<|im_end|>\n' }}{%- endif -%}"
    "{%- for turn in messages -%}{{ '<|im_start|>' ~ turn.role ~ '\n' ~ turn.content ~ '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of chat models.

    Attributes:
        template: Stem of the template's file in TRL; None for SmolLM2's.
        training_template: Stem of TRL's variant that marks what is trained on, if there is one.
        special: Special tokens; the first pads, the last ends a sequence.
        end_of_turn: The token that ends the assistant's turn.
        after_turn: What the template puts between that token and the next turn.
        header: The generation prompt.
        bos: The token that begins a text, if the template writes one.
        plain: Tokens that are matched whole and are not special.
        strips: Which ends of an answer the template strips of whitespace: "", "both" or "newlines before".
        is_multi_turn: Whether one row can hold several trained turns.
        marked_before: What the training variant marks before the answer's text, beside it.
    """

    template: str | None
    training_template: str | None = None
    special: tuple[str, ...]
    end_of_turn: str
    after_turn: str
    header: str
    bos: str | None = None
    plain: tuple[str, ...] = ()
    strips: str = ""
    is_multi_turn: bool = True
    marked_before: str = ""

    @property
    def end_of_sequence(self) -> str:
        """Return the token that ends a sequence."""
        return self.special[-1]

    def tokenizer(self) -> Any:
        """Return a byte-level tokenizer with the family's template and special tokens."""
        text = SMOLLM2_TEMPLATE if self.template is None else trl_template(self.template)
        return byte_tokenizer(text, self.special, plain=self.plain, bos=self.bos)

    def trained(self, answer: str) -> str:
        """Return an answer as this family is trained on it, without its end-of-turn token."""
        return {"": answer, "both": answer.strip(), "newlines before": answer.lstrip("\n")}[self.strips]


def trl_template(stem: str) -> str:
    """Return a chat template that TRL ships."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / "chat_templates" / f"{stem}.jinja").read_text(encoding="utf-8")


SMOLLM2 = Family(
    template=None,
    special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    end_of_turn="<|im_end|>",
    after_turn="\n",
    header="<|im_start|>assistant\n",
)
QWEN2_5 = replace(
    SMOLLM2,
    template="qwen2_5",
    training_template="qwen2_5_training",
    plain=("<tool_call>", "</tool_call>"),
    marked_before="\n",
)
QWEN3 = replace(
    SMOLLM2,
    template="qwen3",
    training_template="qwen3_training",
    plain=("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
    header="<|im_start|>assistant\n<think>\n\n</think>\n\n",
    strips="newlines before",
    is_multi_turn=False,
    marked_before="<think>\n\n</think>\n\n",
)
LLAMA3_1 = Family(
    template="llama3_1",
    special=(
        "<|finetune_right_pad_id|>",
        "<|begin_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ),
    end_of_turn="<|eot_id|>",
    after_turn="",
    header="<|start_header_id|>assistant<|end_header_id|>\n\n",
    bos="<|begin_of_text|>",
    strips="both",
)
LLAMA3_2 = replace(LLAMA3_1, template="llama3_2")
#: Not in the catalogue; TRL has a training variant of it, and the answers are laid out as in the later ones.
LLAMA3 = replace(LLAMA3_1, template="llama3", training_template="llama3_training")
GEMMA3 = Family(
    template="gemma3",
    training_template="gemma3_training",
    special=("<pad>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<eos>"),
    end_of_turn="<end_of_turn>",
    after_turn="\n",
    header="<start_of_turn>model\n",
    bos="<bos>",
    strips="both",
)

#: By the name that a catalogue model's begins with.
FAMILIES = {
    "smollm2": SMOLLM2,
    "qwen2.5": QWEN2_5,
    "qwen3": QWEN3,
    "llama-3.1": LLAMA3_1,
    "llama-3.2": LLAMA3_2,
    "gemma-3": GEMMA3,
}
