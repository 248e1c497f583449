"""`unmask sample RUN`: text from the model of a run or of an exported folder, and what a judge makes of it."""

import argparse
import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from launch import config as configs
from launch.errors import ConfigError
from llm.config import SamplingConfig
from llm.diffusion.reveal import predicted_idle_ratio
from llm.diffusion.sampler import Samples
from llm.generate import generate
from llm.pretrained import Pretrained, load_pretrained

_OF_SAMPLER = ("steps", "temperature", "top_p", "order", "group", "cfg_scale")  # flags before the run's own section
_DESCRIPTION = """\
Draw text. Prompt and suffix stay as given; what lies between is filled in.

With --judge the texts go to RUN/samples, and a table says how well a causal model expects them (generative perplexity,
always beside the entropy of the texts), how much they repeat and how varied they are; with --reference the same of
held-out text, and MAUVE between the two. Needs `pip install 'unmask[eval]'`.
"""
_EXAMPLES = """\
examples:
  unmask sample runs/tiny-primev2 --prompt 'It was a' --steps 64 --group token
  unmask sample runs/tiny-primev2 --prompt 'Call me' --suffix 'the sea.' --length 48
  unmask sample runs/tiny-mdm --count 200 --judge smollm2 --reference data/prose-21-bpe288
"""


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    _check_judging(options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_pretrained(options.run, device)
    sampling, length = _sampling(options, loaded)
    prompt, suffix = loaded.tokenizer.encode_batch([options.prompt, options.suffix])
    if len(prompt) + len(suffix) >= length:
        raise ConfigError(
            f"prompt and suffix have {len(prompt)} + {len(suffix)} tokens, --length is {length}; raise --length"
        )
    if suffix and loaded.language.family == "ar":
        raise ConfigError("an autoregressive model cannot see a suffix; leave --suffix out")

    def draw() -> Samples:
        return generate(
            loaded.model,
            loaded.language,
            config=sampling.sampler,
            count=sampling.count,
            length=length,
            seed=sampling.seed,
            device=device,
            prompt=prompt,
            suffix=suffix,
            batch=options.batch,
        )

    samples = _show(loaded, draw) if options.judge is None else _judge(options, loaded, sampling, length, draw)
    line = f"step {loaded.step}, {loaded.weights} weights; {samples.evaluations} evaluations in {samples.steps} steps"
    if loaded.language.family != "ar" and sampling.sampler.order == "ancestral":
        per_token = loaded.language.codec.granularity if sampling.sampler.group == "digit" else 1
        predicted = predicted_idle_ratio(sampling.sampler.steps, (length - len(prompt) - len(suffix)) * per_token)
        line += f"; idle ratio {samples.idle_ratio:.4f}, predicted {predicted:.4f}"
    print(line)
    return 0


def _show(loaded: Pretrained, draw: Callable[[], Samples]) -> Samples:
    samples = draw()
    for row in samples.tokens.tolist():
        print(loaded.tokenizer.decode(row), end="\n---\n")
    return samples


def _judge(
    options: argparse.Namespace,
    loaded: Pretrained,
    sampling: SamplingConfig,
    length: int,
    draw: Callable[[], Samples],
) -> Samples:
    """Write and print what --judge finds; it and --reference are opened first, because drawing may take hours."""
    from llm.evals.judge import open_judge, reference_texts, text_of
    from llm.evals.text_report import format_table, judge_samples, write_judged

    judge = open_judge(options.judge, next(loaded.model.parameters()).device)
    reference = None
    if options.reference is not None:
        reference = reference_texts(options.reference, loaded.tokenizer, length=length, count=sampling.count)
    samples = draw()
    texts = [text_of(row, loaded.tokenizer) for row in samples.tokens.tolist()]
    judged, found = judge_samples(judge, texts, reference, seed=sampling.seed)
    origin = {
        "run": str(options.run),
        "step": loaded.step,
        "weights": loaded.weights,
        "sampling": configs.to_dict(dataclasses.replace(sampling, length=length)),
        "data": None if options.reference is None else str(options.reference),
    }
    path = write_judged(options.run / "samples", judged, origin | found)
    print(f"{format_table(found)}\n\n{path}, its texts beside it")
    return samples


def _check_judging(options: argparse.Namespace) -> None:
    if options.batch < 1:
        raise ConfigError(f"--batch {options.batch}; the smallest is 1")
    if options.judge is None:
        if options.reference is not None:
            raise ConfigError("--reference is judged beside the samples; name a judge, for example --judge smollm2")
        return
    if options.prompt or options.suffix:
        raise ConfigError("--judge reads texts that the model wrote alone; leave --prompt and --suffix out")
    for package in ("sacrebleu", "mauve"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"--judge needs the package {package}; install it with `pip install 'unmask[eval]'`")


def _sampling(options: argparse.Namespace, loaded: Pretrained) -> tuple[SamplingConfig, int]:
    """(the run's own section with the flags before it, tokens of a sequence)."""
    sampling = loaded.config.sampling
    changes = {name: value for name in _OF_SAMPLER if (value := getattr(options, name)) is not None}
    wanted = {name: value for name in ("count", "length", "seed") if (value := getattr(options, name)) is not None}
    sampler = loaded.language.sampler(dataclasses.replace(sampling.sampler, **changes))
    sampling = dataclasses.replace(sampling, sampler=sampler, **wanted)
    try:
        sampling.check("sampling")
        sampler.check("sampler")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return sampling, loaded.config.data.block_length if sampling.length is None else sampling.length


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unmask sample",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, or a folder written by `unmask export`")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="text at the beginning")
    parser.add_argument("--suffix", default="", metavar="TEXT", help="text at the end (masked families)")
    parser.add_argument("--count", type=int, metavar="N", help="sequences (of the run: 4)")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="sequences at a time (64)")
    parser.add_argument("--length", type=int, metavar="N", help="tokens of a sequence, prompt and suffix included")
    parser.add_argument("--seed", type=int, metavar="N", help="of the noise: the same seed gives the same text")
    parser.add_argument("--steps", type=int, metavar="N", help="sampling steps (of the run: 128; masked families)")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 takes the most likely token (1)")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="nucleus: draw from the likeliest tokens of this mass (1)"
    )
    parser.add_argument(
        "--order",
        choices=("ancestral", "layers", "random", "left_to_right", "confidence"),
        help="first: at random times, first digits before second ones, or so many a step (as in training)",
    )
    parser.add_argument(
        "--group",
        choices=("digit", "token", "schedule"),
        help="what is revealed at once: digits, whole tokens, or first tokens and then digits (digit)",
    )
    parser.add_argument("--cfg-scale", type=float, metavar="W", help="guidance towards the prompt, 0 for none (0)")
    parser.add_argument(
        "--judge", metavar="MODEL", help="causal model that reads the texts: a folder, a Hugging Face name, or smollm2"
    )
    parser.add_argument(
        "--reference", type=Path, metavar="DATA", help="prepared data set whose held-out texts are judged beside them"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
