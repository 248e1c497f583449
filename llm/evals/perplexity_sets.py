"""`unmask eval RUN ... --sets NAMES`: zero-shot perplexity on published texts, by the evaluators of held-out text.

The rows of a set become an ordinary data set in RUN/sets/NAME under the run's tokenizer, each row followed by EOS, and
are judged in blocks as long as those of training. No likelihood is computed here.
"""

import argparse
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from launch.errors import ConfigError, DataError
from launch.runtime import Runtime
from llm.data.shards import DatasetWriter, Source, TokenDataset, read_manifest
from llm.data.tokenizers import TextTokenizer
from llm.evals.published_texts import OTHER, SETS, Copy, Text, find_copies, measure, normalised
from llm.evaluate import record_estimates
from llm.heldout import Blocks, unigram_baseline
from llm.pretrained import Pretrained, load_pretrained, read_config

BOUNDS = ("nelbo_token", "nelbo_subtoken")  # without --bounds; each family has its own of them
ROOT = Path("data/sets")  # where copies are looked for without --data-root
_BATCH_CHARS = 4_000_000  # tokenised at a time
_SHARD_TOKENS = 100_000_000


def evaluate_sets(options: argparse.Namespace, runtime: Runtime) -> None:
    """Collective. Check every copy and every run, then judge each run on each set, record it, print the table."""
    if "loss_ce_joint" in (options.bounds or ()):
        raise ConfigError("--bounds loss_ce_joint is no likelihood and has no perplexity; leave it out with --sets")
    if options.data not in (None, "hub"):
        raise ConfigError(
            f"--data {options.data} is a data set of bounds; copies of --sets are looked for in --data-root"
        )
    names = list(dict.fromkeys(name for name in options.sets.split(",") if name))
    root = Path(options.data_root) if options.data_root else ROOT
    runs = [Path(run) for run in options.runs]
    for config in runtime.together(lambda: [read_config(run) for run in runs]):  # before texts are read for minutes
        if options.packing == "framed" and config.data.block_length < 3:
            raise ConfigError("--packing framed needs blocks of 3 tokens or more, see data.block_length of the runs")
    copies, texts = runtime.decide(partial(_read, names, root, options))
    rows = []
    for run in runs:
        loaded = runtime.together(lambda r=run: load_pretrained(r, runtime.device))
        for copy, text in zip(copies, texts, strict=True):
            folder = run / "sets" / copy.name
            runtime.decide(partial(tokenise, copy, text, loaded.tokenizer, folder))
            rows += evaluate_set(run, loaded, copy, text, folder, options, runtime)
    if runtime.is_main:
        print(f"\n{format_table(rows)}")


def _read(names: Sequence[str], root: Path, options: argparse.Namespace) -> tuple[list[Copy], list[Text]]:
    """The copies and what they hold, in the order of `names`; prints a line each."""
    copies = find_copies(names, root, hub=options.data == "hub")
    texts = []
    for copy in copies:
        text = measure(copy, allow_other=options.allow_other_text)
        print(
            f"{copy.name}: {text.rows:,} rows, {text.words:,} words, {text.num_bytes:,} bytes, SHA-256 {text.sha256} "
            f"({text.identity}), from {copy.origin}",
            flush=True,
        )
        texts.append(text)
    return copies, texts


def evaluate_set(
    run: Path, loaded: Pretrained, copy: Copy, text: Text, folder: Path, options: argparse.Namespace, runtime: Runtime
) -> list[dict[str, Any]]:
    """Collective. The estimates of one model on the tokens in `folder`, also added to the run's record."""
    length, split = loaded.config.data.block_length, SETS[copy.name].split
    packing = options.packing or "contiguous"
    blocks: Blocks
    if packing == "contiguous":
        stream = blocks = TokenDataset.open(folder, split, length)
        per_stream_token = 1.0
    else:
        language = loaded.language
        stream = TokenDataset.open(folder, split, length - 2)
        blocks = FramedBlocks(stream=stream, first=language.first_token, is_causal=language.family == "ar")
        per_stream_token = blocks.tokens_per_stream_token
    about = {
        "set": copy.name,
        "data": str(folder),
        "split": split,
        "text": {**dataclasses.asdict(text), "origin": copy.origin},
        "packing": packing,
        "block_length": length,
        "unigram_nats_per_token": unigram_baseline(Path(loaded.config.data.sources[0].path), stream, options.sequences),
    }
    words_per_token = text.words / stream.num_tokens / per_stream_token
    return record_estimates(
        run, loaded, blocks, options.bounds or BOUNDS, options, runtime, about, words_per_token=words_per_token
    )


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: one line an estimate."""
    lines = [
        "| set | run | estimate | nats/token (s.e.) | ppl (s.e.) | ppl/word | bits/byte | unigram | blocks | draws |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = row["estimate"]
        title = row["set"] + (" (other text)" if row["text"]["identity"] == OTHER else "")
        unigram, bits = row["unigram_nats_per_token"], row[f"{name}_bits_per_byte"]
        lines.append(
            f"| {title} | {row['run']} | {name} | {row[name]:.4f} ({row[f'{name}_se']:.4f}) "
            f"| {row['ppl']:.2f} ({row['ppl_se']:.2f}) | {row['ppl_per_word']:.4g} | {bits:.4f} "
            f"| {'-' if unigram is None else f'{unigram:.4f}'} | {row['blocks']} x {row['block_length']} tokens, "
            f"{row['packing']} | {row['draws']} |"
        )
    return "\n".join(
        [*lines, "", "The perplexity of an estimate called nelbo_... is an upper bound, that of nll_... exact."]
    )


# --- tokens ----------------------------------------------------------------------------------------------------------


def tokenise(copy: Copy, text: Text, tokenizer: TextTokenizer, folder: Path) -> None:
    """The rows of `copy` as documents of a data set in `folder`, unless they are there already."""
    split = SETS[copy.name].split
    if folder.exists():
        manifest = read_manifest(folder)
        if (manifest.tokenizer_sha256, manifest.text_sha256[split]) != (tokenizer.sha256, text.sha256):
            raise DataError(f"{folder} holds the tokens of another text or tokenizer; remove it")
        return
    with DatasetWriter(folder, tokenizer, shard_tokens=_SHARD_TOKENS) as writer:
        for batch in _batches(normalised(copy)):
            writer.add(split, copy.name, batch)
        writer.publish([Source(name=copy.name, origin=copy.origin)])


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, num_chars = [], 0
    for text in texts:
        batch.append(text)
        num_chars += len(text)
        if num_chars >= _BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    yield batch


@dataclass(frozen=True, kw_only=True)
class FramedBlocks:
    """The blocks of MDLM: BOS, L - 2 tokens of the stream, EOS. A causal model is given BOS and predicts the rest.

    The delimiters are scored, though no text stands behind them.
    """

    stream: TokenDataset  # its blocks have L - 2 tokens
    first: int  # BOS, or EOS where the tokenizer has no BOS
    is_causal: bool

    def __len__(self) -> int:
        return len(self.stream)

    @property
    def tokens_per_stream_token(self) -> float:
        return (self.stream.block_length + (1 if self.is_causal else 2)) / self.stream.block_length

    @property
    def bytes_per_token(self) -> float:
        return self.stream.bytes_per_token / self.tokens_per_stream_token

    def blocks(self, indices: np.ndarray) -> Tensor:
        """int64 [n, L]; [n, L - 1], without BOS, for a causal model."""
        inner = self.stream.blocks(indices)
        column = torch.ones(len(inner), 1, dtype=inner.dtype)
        framed = torch.cat([column * self.first, inner, column * self.stream.manifest.eos_id], dim=1)
        return framed[:, 1:] if self.is_causal else framed
