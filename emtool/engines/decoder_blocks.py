"""The decoder blocks of a language model, whatever its family calls them."""

from __future__ import annotations

from typing import Any

from torch import nn

from emtool.core.errors import ModelError


def decoder_blocks(model: Any) -> nn.ModuleList:
    """Return the blocks of a model's decoder, first to last.

    They are the one module list within the language model that is as long as its configuration has layers: a vision
    tower, which may have as many, lies outside.

    Args:
        model: Causal language model, with or without an adapter in it.

    Raises:
        ModelError: If there is not exactly one such list.
    """
    decoder = model.get_decoder()
    num_blocks = decoder.config.get_text_config(decoder=True).num_hidden_layers
    found = {
        name: module
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_blocks
    }
    if len(found) != 1:
        names = ", ".join(found) or "none"
        raise ModelError(
            f"the decoder blocks of {type(decoder).__name__} cannot be told: {len(found)} module lists have "
            f"{num_blocks} modules ({names}); activations need exactly one"
        )
    return next(iter(found.values()))
