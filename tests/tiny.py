"""A tiny chat model with a byte-level tokenizer, built in a second, in the Hugging Face layout."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>")


def byte_tokenizer(
    chat_template: str | None = CHATML,
    special: tuple[str, ...] = SPECIAL,
    *,
    plain: tuple[str, ...] = (),
    merges: tuple[tuple[str, str], ...] = (),
    bos: str | None = None,
) -> Any:
    """Return a tokenizer with one token a byte, after the special tokens.

    Args:
        chat_template: The chat template.
        special: Special tokens, the first for padding, the last the end of a sequence.
        plain: Tokens that are matched whole and are not special.
        merges: Pairs of byte tokens, as the byte-level alphabet writes them, that are one token together.
        bos: The special token that begins a text, for templates that write it.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    joined = ["".join(pair) for pair in merges]
    vocabulary = {token: index for index, token in enumerate((*special, *alphabet, *joined))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges), unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    tokenizer.add_tokens(list(plain))
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        pad_token=special[0],
        eos_token=special[-1],
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = chat_template
    return wrapped


def tiny_config(**changes: Any) -> LlamaConfig:
    """Return the configuration of a two-block Llama of about 40,000 parameters."""
    values = {
        "vocab_size": 256 + len(SPECIAL),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
        **changes,
    }
    return LlamaConfig(**values)


def save_tiny_model(folder: Path, *, seed: int = 0) -> Path:
    """Save the tiny model and its tokenizer."""
    torch.manual_seed(seed)
    LlamaForCausalLM(tiny_config()).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def tiny_model(dtype: torch.dtype = torch.float32, seed: int = 0) -> LlamaForCausalLM:
    """Return the tiny model in memory."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny_config()).to(dtype).eval()


def save_adapter(folder: Path, model: LlamaForCausalLM, *, seed: int, **changes: object) -> Path:
    """Save an adapter with random A and B: a fresh B is zero and would change nothing."""
    values = {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": list(SEVEN), **changes}
    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM", **values))
    torch.manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Return the logits of 37 fixed tokens, shape (1, 37, vocabulary)."""
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=torch.arange(3, 40).unsqueeze(0)).logits
    return result
