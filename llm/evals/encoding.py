"""From pairs of texts to pairs of token ids: where the context ends and the continuation begins.

The rules are those of lm-evaluation-harness, so that numbers compare: trailing white space of the context belongs to
the continuation, both are tokenised together, and the tokens after those of the context alone are the continuation. If
a token straddles the boundary the context's own tokens are no beginning of the whole; such events are counted, and
"longest_prefix" (MDM-Prime-v2's rule) cuts where the two part. Each distinct text is tokenised once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

from llm.evals.models import ScoringTokenizer

Boundary = Literal["harness", "longest_prefix"]


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """prefix: stands for an empty context. add_bos: whether texts that are not empty begin with it, too."""

    tokenizer: ScoringTokenizer
    prefix: int
    add_bos: bool
    boundary: Boundary = "harness"

    def texts(self, texts: Sequence[str], *, special: bool | None = None) -> list[list[int]]:
        """Ids of each text, behind the prefix if `special` (None: if `add_bos`) and unless it stands there already."""
        wants = self.add_bos if special is None else special
        encoded = self.tokenizer.encode_batch(texts)
        return [[self.prefix, *ids] if wants and ids[:1] != [self.prefix] else list(ids) for ids in encoded]

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> tuple[list[tuple[list[int], list[int]]], int]:
        """(ids of the context, ids of the continuation) of each pair, and at how many a token straddles the boundary.

        An empty context becomes the prefix, or the first token of the continuation where that is the prefix.
        """
        moved = [_move_space(*pair) for pair in pairs]
        with_context = [pair for pair in moved if pair[0]]
        contexts = self._distinct([context for context, _ in with_context])
        wholes = self._distinct([context + continuation for context, continuation in with_context])
        alone = self._distinct([continuation for context, continuation in moved if not context], special=False)
        encoded, straddled = [], 0
        for context, continuation in moved:
            if not context:
                encoded.append(self._without_context(alone[continuation]))
                continue
            before, whole = contexts[context], wholes[context + continuation]
            common = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(before, whole, strict=False)))
            cut = len(before) if self.boundary == "harness" else common
            straddled += common < len(before)
            if continuation and not whole[cut:]:  # swallowed by the context's last token
                encoded.append((before, self.texts([continuation], special=False)[0]))
            else:
                encoded.append((whole[:cut] if self.boundary == "longest_prefix" else before, whole[cut:]))
        return encoded, straddled

    def _without_context(self, ids: list[int]) -> tuple[list[int], list[int]]:
        return (ids[:1], ids[1:]) if ids[:1] == [self.prefix] else ([self.prefix], ids)

    def _distinct(self, texts: Sequence[str], *, special: bool | None = None) -> dict[str, list[int]]:
        distinct = list(dict.fromkeys(texts))
        return dict(zip(distinct, self.texts(distinct, special=special), strict=True))


def _move_space(context: str, continuation: str) -> tuple[str, str]:
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation
