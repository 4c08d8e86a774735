"""The replies that a judge is asked for, as a trie of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emtool.core.errors import ModelError

TokenPath = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class TokenTrie:
    """Texts as paths of tokens.

    Attributes:
        ends: The path of each text.
        children: For each path that some text goes on from, the tokens that it goes on with; the root is `()`.
    """

    ends: Mapping[str, TokenPath]
    children: Mapping[TokenPath, Sequence[int]]

    @property
    def runs(self) -> list[TokenPath]:
        """Return the longest paths that some text goes on from: along them, every other such path is met."""
        inner = [path for path in self.children if path]
        return [path for path in inner if not any(other[:-1][: len(path)] == path for other in inner)]

    def probabilities(self, after: Mapping[TokenPath, Mapping[int, float]]) -> dict[str, float]:
        """Return the probability that a reply is each text and does not go on as a longer one.

        So "5" does not count what goes on to "57", nor "10" what goes on to "100".

        Args:
            after: For each path of `children`, the probability of each of its next tokens.
        """
        reached: dict[TokenPath, float] = {(): 1.0}
        for path in sorted(self.children, key=len):
            for token in self.children[path]:
                reached[(*path, token)] = reached[path] * after[path][token]
        goes_on = {path: sum(after[path].values()) for path in self.children}
        # Rounding alone can bring what goes on a little above all there is.
        return {text: reached[path] * max(0.0, 1.0 - goes_on.get(path, 0.0)) for text, path in self.ends.items()}


def build_trie(texts: Sequence[str], tokenizer: Any) -> TokenTrie:
    """Return the trie of some texts, each tokenized by itself, as it would begin a reply.

    Raises:
        ModelError: If the tokenizer cannot write a text, or writes two of them alike.
    """
    ends: dict[str, TokenPath] = {}
    for text in texts:
        path = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        if not path or tokenizer.decode(path).strip() != text or path in ends.values():
            raise ModelError(f"the judge's tokenizer cannot write {text!r}; choose another judge model")
        ends[text] = path
    children: dict[TokenPath, dict[int, None]] = {(): {}}
    for path in ends.values():
        for length, token in enumerate(path):
            children.setdefault(path[:length], {})[token] = None
    return TokenTrie(ends=ends, children={path: list(tokens) for path, tokens in children.items()})
