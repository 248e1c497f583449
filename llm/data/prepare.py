"""Text to token shards: read documents, hold some out by hash, tokenise in batches, write, publish."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from launch.errors import DataError
from llm.data import fetch, tokenizers
from llm.data.documents import Document, Input, open_corpus, open_input, split_of
from llm.data.packages import CORPORA, TOKENIZERS
from llm.data.shards import DatasetWriter, Manifest, Split
from llm.data.tokenizers import TextTokenizer

_BATCH_CHARS = 4_000_000  # tokenised at a time: enough to feed every thread, little next to a process's memory


def prepare(
    inputs: Sequence[str],
    out: str | Path,
    *,
    tokenizer: str = "gpt2",
    format: str | None = None,
    text_field: str = "text",
    shard_tokens: int = 100_000_000,
    limit_documents: int | None = None,
    cache: Path | None = None,
) -> Manifest:
    """Tokenise `inputs` into a new data set in folder `out`; nothing is left there if it fails.

    An input is a packaged corpus ("prose-21"), a file or a folder, or (format "datasets") the name of a data set.
    `tokenizer` is a fetched one ("gpt2"), a tokenizer.json or a folder with one, or "bpe:N" to learn N entries from the
    training documents.
    """
    opened = [open_named(name, format=format, text_field=text_field, cache=cache) for name in inputs]
    sources = [source for item in opened for source in item.sources]
    for source in sources:
        if sum(other.name == source.name for other in sources) > 1:
            raise DataError(f"two inputs are called {source.name!r}; rename one, the name decides what is held out")
    resolved = _tokenizer(tokenizer, opened, limit_documents, cache)
    with DatasetWriter(out, resolved, shard_tokens=shard_tokens) as writer:
        waiting: dict[tuple[Split, str], list[str]] = {}
        waiting_chars = num_documents = num_tokens = 0

        def flush() -> None:
            nonlocal waiting_chars, num_tokens
            for (split, source), texts in waiting.items():
                num_tokens += writer.add(split, source, texts)
            waiting.clear()
            waiting_chars = 0

        with _progress("tokenise", opened) as bar:
            for document in _documents(opened, limit_documents, bar):
                waiting.setdefault((split_of(document.source, document.key), document.source), []).append(document.text)
                waiting_chars += len(document.text)
                num_documents += 1
                if waiting_chars >= _BATCH_CHARS:
                    flush()
                    bar.set_postfix(documents=num_documents, tokens=num_tokens)
            flush()
            bar.set_postfix(documents=num_documents, tokens=num_tokens)
        manifest = writer.publish(sources) if num_documents else None
    if manifest is None:
        raise DataError(f"{', '.join(inputs)}: no document with text in it")
    return manifest


def open_named(name: str, *, format: str | None, text_field: str, cache: Path | None = None) -> Input:
    """A fetched corpus by its name, or a file or folder (`open_input`)."""
    if name in CORPORA:
        return open_corpus(fetch.corpus_folder(name, cache))
    return open_input(name, format=format, text_field=text_field)


def _tokenizer(name: str, inputs: Sequence[Input], limit_documents: int | None, cache: Path | None) -> TextTokenizer:
    if name in TOKENIZERS:
        return tokenizers.load(fetch.tokenizer_folder(name, cache))
    kind, _, size = name.partition(":")
    if kind == "bpe" and size.isdecimal():
        with _progress("learn vocabulary", inputs) as bar:
            texts = (d.text for d in _documents(inputs, limit_documents, bar) if split_of(d.source, d.key) == "train")
            return tokenizers.train_bpe(texts, int(size))
    if not Path(name).expanduser().exists():
        known = ", ".join(TOKENIZERS)
        raise DataError(
            f"there is no tokenizer {name!r}: give {known}, bpe:N (bpe:4096), a tokenizer.json or its folder"
        )
    return tokenizers.load(Path(name).expanduser())


def _documents(inputs: Sequence[Input], limit: int | None, bar: tqdm) -> Iterator[Document]:
    """The documents of all inputs that hold text, `limit` of them at most."""
    count = 0
    for item in inputs:
        for document in item.read(bar.update):
            if limit is not None and count >= limit:
                return
            if document.text.strip():
                count += 1
                yield document


def _progress(title: str, inputs: Sequence[Input]) -> tqdm:
    """A bar with a time to go where the size of the input is known; silent where the output is no terminal."""
    sizes = [item.num_bytes for item in inputs]
    total = None if None in sizes else sum(size for size in sizes if size is not None)
    return tqdm(desc=title, total=total, unit="B", unit_scale=True, disable=None)
