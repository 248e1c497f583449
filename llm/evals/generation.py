"""Texts that go on from prompts, for every family alike: what lm-evaluation-harness calls generate_until.

Masked models write in blocks from left to right, the surest tokens of a block first (LLaDA, arXiv 2502.09992; MDLM's
semi-autoregressive form); causal ones token by token. A text ends at its first EOS, before its earliest stop string, or
when its room is used, and is dropped from the batch after the block that shows it.

Noise is named by (seed, prompt, repeat, step): a text depends neither on the batch nor on the number of processes.
"""

import functools
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from launch import config as configs
from launch.errors import ConfigError
from llm.diffusion.sampler import Order, SamplerConfig
from llm.evals.encoding import Encoder
from llm.evals.filling import CausalFiller, MaskedFiller, Texts
from llm.evals.models import Scorable, ScoringTokenizer
from llm.generate import Language

logger = logging.getLogger(__name__)

_ANCHOR = 16  # tokens of the prompt that are decoded with a text, for tokenizers that treat a beginning differently
_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first given one counts
_CHECK_EVERY = 16  # tokens between looks for the end of texts of causal models, whose blocks change nothing else


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How texts are continued. The defaults suit every family; a request of the harness may overrule some of them."""

    length: int = 256  # tokens of a text at most; max_gen_toks of a request comes first
    block_length: int | None = 32  # tokens that a masked model writes before it goes on; null: the whole text at once
    steps: int | None = None  # of a masked model for each block; null: one for each unit (token or digit) of a block
    order: Order | None = None  # which units of a block first; null: confidence, or layers for models trained so
    group: Literal["token", "digit"] | None = None  # what partial masking reveals at once; null: digits in layers only
    temperature: float = 0.0  # 0 takes the likeliest tokens; do_sample and temperature of a request come first
    top_p: float = 1.0  # nucleus, as in sampling; top_p of a request comes first
    guidance: float = 0.0  # w of (1 + w) * logits - w * logits without the prompt; masked models only
    seed: int = 0  # of the noise
    batch_tokens: int | None = None  # of a batch, padding included; null: 4096, or 32768 on a GPU

    def check(self, path: str = "generation") -> None:
        limits = {"length": 1, "block_length": 1, "steps": 1, "batch_tokens": 1}
        for name, least in limits.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ConfigError(f"{path}.{name} = {value}; the smallest is {least}")
        self._check_sampler(self.sampler(), path)

    def check_for(self, scorable: Scorable) -> None:
        if scorable.is_causal and self.guidance != 0.0:
            raise ConfigError(
                f"generation.guidance = {self.guidance} needs a model that can hide its prompt, which a causal one "
                f"({scorable.family}) cannot; use 0"
            )
        self._check_sampler(self.sampler(language=scorable.language), "generation")

    def _check_sampler(self, sampler: SamplerConfig, path: str) -> None:
        try:
            sampler.check(path)
        except ValueError as error:
            raise ConfigError(str(error).replace("cfg_scale", "guidance")) from None

    def sampler(self, block: int = 1, language: Language | None = None) -> SamplerConfig:
        """What fills in a block of so many tokens of a masked model."""
        in_layers = language is not None and language.order == "layers"
        order = self.order or ("layers" if in_layers else "confidence")
        group = self.group or ("digit" if order == "layers" else "token")
        units = block * (language.codec.granularity if language is not None and group == "digit" else 1)
        return SamplerConfig(
            steps=self.steps or units,
            temperature=self.temperature,
            top_p=self.top_p,
            order=order,
            group=group,
            cfg_scale=self.guidance,
        )


@dataclass(frozen=True, kw_only=True)
class _Section:
    generation: GenerationConfig


def read_generation(values: Mapping[str, Any], *, source: str) -> GenerationConfig:
    """The configuration with these fields; `ConfigError` for one that there is not, as "generation.FIELD"."""
    return configs.from_dict(_Section, {"generation": dict(values)}, source=source).generation


def generate_until(
    scorable: Scorable,
    requests: Sequence[tuple[str, Mapping[str, Any]]],
    config: GenerationConfig,
    *,
    add_bos: bool | None = None,
    progress: Callable[[int], Any] = lambda _: None,
) -> list[str]:
    """The texts of the harness's (prompt, arguments) in their order. No collectives; add_bos as in `ScoringConfig`.

    Equal requests get different texts where something is drawn: they are repeats of one question.
    """
    kinds: dict[str, list[int]] = {}
    seen: dict[tuple[str, str], int] = {}
    repeats = []
    for i, (prompt, arguments) in enumerate(requests):
        kind = repr(sorted(arguments.items()))
        kinds.setdefault(kind, []).append(i)
        repeats.append(seen.get((kind, prompt), 0))
        seen[kind, prompt] = repeats[-1] + 1
    found: dict[int, str] = {}
    for members in kinds.values():
        asked, until = read_arguments(requests[members[0]][1], config)
        texts = continue_texts(
            scorable,
            [requests[i][0] for i in members],
            until,
            asked,
            add_bos=add_bos,
            repeats=[repeats[i] for i in members],
            progress=progress,
        )
        found |= dict(zip(members, texts, strict=True))
    return [found[i] for i in range(len(requests))]


def read_arguments(arguments: Mapping[str, Any], config: GenerationConfig) -> tuple[GenerationConfig, list[str]]:
    """(the configuration as the arguments of a request change it, its stop strings).

    do_sample = false is temperature 0 whatever else is said (the harness's rule); do_sample = true alone draws at the
    configured temperature, or at 1 where that is 0. Unknown arguments are passed over with one warning.
    """
    known = ("until", "do_sample", "temperature", "top_p", *_LENGTH_NAMES)
    for name in sorted(set(arguments) - set(known)):
        _warn_once(f"{name} of a generation request is unknown here and passed over; known are {', '.join(known)}")
    until = arguments.get("until") or []
    until = [until] if isinstance(until, str) else [str(stop) for stop in until]
    changes: dict[str, Any] = {}
    lengths = [arguments[name] for name in _LENGTH_NAMES if arguments.get(name) is not None]
    if lengths:
        changes["length"] = int(lengths[0])
    sample, temperature = arguments.get("do_sample"), arguments.get("temperature")
    if sample is False:
        changes["temperature"] = 0.0
    elif temperature is not None:
        changes["temperature"] = float(temperature)
    elif sample is True and config.temperature == 0.0:
        changes["temperature"] = 1.0
    if arguments.get("top_p") is not None:
        changes["top_p"] = float(arguments["top_p"])
    return replace(config, **changes), [stop for stop in until if stop]


def continue_texts(
    scorable: Scorable,
    prompts: Sequence[str],
    until: Sequence[str],
    config: GenerationConfig,
    *,
    add_bos: bool | None = None,
    repeats: Sequence[int] | None = None,
    progress: Callable[[int], Any] = lambda _: None,
) -> list[str]:
    """What follows each prompt, without the prompt, EOS and stop strings.

    A prompt that leaves too little room loses its beginning, but never more than to half of an input; then the text is
    shorter than asked. repeats: the number of each text among those of the same prompt. ConfigError, before anything is
    computed, if the configuration does not suit the model.
    """
    config.check()
    config.check_for(scorable)
    encoder = Encoder(
        tokenizer=scorable.tokenizer,
        prefix=scorable.first_token,
        add_bos=scorable.add_bos if add_bos is None else add_bos,
    )
    encoded = [ids or [scorable.first_token] for ids in encoder.texts(prompts)]
    capacity = scorable.max_length + (1 if scorable.is_causal else 0)  # the last token is never an input
    room = [min(config.length, capacity - min(len(ids), capacity // 2)) for ids in encoded]
    fitting = [ids[-(capacity - more) :] for ids, more in zip(encoded, room, strict=True)]
    cut = sum(len(before) > len(after) for before, after in zip(encoded, fitting, strict=True))
    short = sum(more < config.length for more in room)
    if cut or short:
        logger.warning(
            "an input has %d tokens: %d of %d prompts lost their beginning, and %d texts have less than %d tokens",
            *(capacity, cut, len(prompts), short, config.length),
        )
    numbers = [0] * len(prompts) if repeats is None else repeats
    noise = [_digest(prompt, number) for prompt, number in zip(prompts, numbers, strict=True)]
    batch_tokens = config.batch_tokens or (32768 if scorable.device.type == "cuda" else 4096)

    order = sorted(range(len(prompts)), key=lambda i: -len(fitting[i]) - room[i])  # what does not fit shows at once
    found: dict[int, str] = {}
    while order:
        rows = max(1, batch_tokens // (len(fitting[order[0]]) + room[order[0]]))
        batch, order = order[:rows], order[rows:]
        texts = Texts.of(
            [fitting[i] for i in batch], [room[i] for i in batch], [noise[i] for i in batch], scorable.device
        )
        found |= dict(zip(batch, _continue_batch(scorable, texts, until, config), strict=True))
        progress(len(batch))
    return [found[i] for i in range(len(prompts))]


@torch.no_grad()
def _continue_batch(scorable: Scorable, texts: Texts, until: Sequence[str], config: GenerationConfig) -> list[str]:
    longest = int(texts.room.max())
    block = config.block_length or config.length
    if scorable.is_causal:
        block, filler = _CHECK_EVERY, CausalFiller(scorable, config.sampler(), config.seed)
    else:
        filler = MaskedFiller(scorable, config.sampler(min(block, config.length), scorable.language), config.seed)
    found = [""] * len(texts.tokens)
    going = list(range(len(texts.tokens)))
    for begin in range(0, longest, block):
        tokens = filler.fill(texts, begin, begin + block)
        texts = replace(texts, tokens=tokens)
        kept = []
        for row, i in enumerate(going):
            prompt, room = int(texts.prompt[row]), int(texts.room[row])
            ids = tokens[row, : prompt + min(begin + block, room)].tolist()
            found[i], ended = finish(scorable.tokenizer, ids[:prompt], ids[prompt:], until)
            if not ended and begin + block < room:
                kept.append(row)
        if not kept:
            break
        if len(kept) < len(going):
            rows = torch.tensor(kept, device=tokens.device)
            texts, going = texts.select(rows), [going[row] for row in kept]
            filler.select(rows)
    return found


def finish(
    tokenizer: ScoringTokenizer, prompt: Sequence[int], written: Sequence[int], until: Sequence[str]
) -> tuple[str, bool]:
    """(the text up to its first EOS and its earliest stop string, whether there was one of them)."""
    ended = tokenizer.eos_id in written
    kept = list(written[: written.index(tokenizer.eos_id)] if ended else written)
    anchor = list(prompt[-_ANCHOR:])
    before, whole = tokenizer.decode(anchor), tokenizer.decode(anchor + kept)
    text = whole[len(before) :] if whole.startswith(before) else tokenizer.decode(kept)
    stop = min((place for end in until if (place := text.find(end)) >= 0), default=None)
    return (text, ended) if stop is None else (text[:stop], True)


def _digest(prompt: str, repeat: int) -> int:
    """63 bits that name the noise of a text: the same for every model, order and number of processes."""
    return int.from_bytes(hashlib.sha256(f"{repeat} {prompt}".encode()).digest()[:8], "little") % 2**63


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)
