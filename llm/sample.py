"""`unmask sample RUN`: text from the model of a run or of an exported folder."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from launch.errors import ConfigError
from llm.diffusion.reveal import predicted_idle_ratio
from llm.generate import generate
from llm.pretrained import load_pretrained


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="unmask sample",
        description="Draw text. Prompt and suffix stay as given; what lies between is filled in.",
        epilog=(
            "examples: unmask sample runs/tiny-primev2 --prompt 'It was a' --steps 64 --group token;  "
            "unmask sample runs/tiny-primev2 --prompt 'Call me' --suffix 'the sea.' --length 48"
        ),
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, or a folder written by `unmask export`")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="text at the beginning")
    parser.add_argument("--suffix", default="", metavar="TEXT", help="text at the end (masked families)")
    parser.add_argument("--count", type=int, metavar="N", help="sequences (of the run: 4)")
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
        help="first: at random times, first digits before second ones, or so many a step in this order (ancestral)",
    )
    parser.add_argument(
        "--group",
        choices=("digit", "token", "schedule"),
        help="what is revealed at once: digits, whole tokens, or first tokens and then digits (digit)",
    )
    parser.add_argument("--cfg-scale", type=float, metavar="W", help="guidance towards the prompt, 0 for none (0)")
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_pretrained(options.run, device)
    sampling = loaded.config.sampling
    fields = ("steps", "temperature", "top_p", "order", "group", "cfg_scale")
    changes = {name: value for name in fields if (value := getattr(options, name)) is not None}
    sampler = dataclasses.replace(sampling.sampler, **changes)
    wanted = {name: value for name in ("count", "length", "seed") if (value := getattr(options, name)) is not None}
    sampling = dataclasses.replace(sampling, **wanted)
    length = loaded.config.data.block_length if sampling.length is None else sampling.length
    prompt, suffix = loaded.tokenizer.encode_batch([options.prompt, options.suffix])
    try:
        sampling.check("sampling")
        sampler.check("sampler")
        if len(prompt) + len(suffix) >= length:
            raise ValueError(
                f"prompt and suffix have {len(prompt)} + {len(suffix)} tokens, --length is {length}; raise --length"
            )
        if suffix and loaded.language.family == "ar":
            raise ValueError("an autoregressive model cannot see a suffix; leave --suffix out")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    samples = generate(
        loaded.model,
        loaded.language,
        config=sampler,
        count=sampling.count,
        length=length,
        seed=sampling.seed,
        device=device,
        prompt=prompt,
        suffix=suffix,
    )
    for text in (loaded.tokenizer.decode(row) for row in samples.tokens.tolist()):
        print(text, end="\n---\n")
    line = f"step {loaded.step}, {loaded.weights} weights; {samples.evaluations} evaluations in {samples.steps} steps"
    if loaded.language.family != "ar" and sampler.order == "ancestral":
        units = (length - len(prompt) - len(suffix)) * (
            loaded.language.codec.granularity if sampler.group == "digit" else 1
        )
        line += f"; idle ratio {samples.idle_ratio:.4f}, predicted {predicted_idle_ratio(sampler.steps, units):.4f}"
    print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
