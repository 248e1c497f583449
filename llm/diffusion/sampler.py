"""Samplers of a masked diffusion model over sub-tokens: ancestral, counted, confidence, corrected; and left to right.

B sequences, L tokens, l digits per token, U units per token (U = 1: whole tokens, U = l: single digits), P selected
positions, V tokens. A state is int64 digits [B, L, l] in which the mask symbol b marks what is hidden; l = 1 is the
plain masked diffusion model.

One step decides which digits to reveal, asks the network about those tokens only, draws each token once from its joint
distribution over the tokens that agree with its visible digits, and copies the digits to be revealed. Digits revealed
together therefore fit together and some token agrees with every state, so that the final state always decodes.

Because the decision comes before the network, a step that reveals nothing costs nothing: reusing the last probabilities
in an unchanged state (MDLM's cached sampler) and jumping to the next change (first-hitting) are the same thing here.

All categorical draws are in float64: noise and sums in float32 cut the tails of a large vocabulary, which acts like a
lower temperature and flatters generative perplexity (arXiv 2409.02908). There is no option for less.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from llm.diffusion import reveal
from llm.diffusion.codec import Codec
from llm.diffusion.groups import digit_log_probs, filtered_log_probs

Predict = Callable[[Tensor, Tensor], Tensor]
"""(digits [B, L, l], where bool [B, L]) -> logits [P, V] at the P positions of `where`, in row-major order."""

Draw = Callable[[int, int], Tensor]
"""(step, count) -> float64 uniforms [B, count] on [0, 1), a pure function: the same call gives the same numbers.

Step 0 is the plan of what is revealed when, 1..T the token draws of the T steps, -1, -2, ... those of the correctors.
"""

Order = Literal["ancestral", "layers", "random", "left_to_right", "confidence"]

_ROWS = 256  # positions whose float64 probabilities are alive at once: 100 MB each array at V = 50,257


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How sequences are generated. `check` names what does not fit together."""

    steps: int = 128  # steps of the schedule; with block_length, steps for each block
    temperature: float = 1.0  # of the token distribution; 0 takes the most likely token
    top_p: float = 1.0  # nucleus: keep the tokens whose cumulative probability is at most this, and the likeliest one
    order: Order | None = None  # which come first; null: as in training, layers for such models, else ancestral
    group: Literal["digit", "token", "schedule"] = "digit"  # what is revealed at once; schedule: tokens, then digits
    chunk_point: float = 0.5  # group = schedule: whole tokens while time (1 at the start, 0 at the end) is above this
    block_length: int | None = None  # tokens per semi-autoregressive block, counting hidden tokens; none: one block
    skip_idle: bool = True  # false evaluates the network in idle steps too, as published samplers do; same samples
    cfg_scale: float = 0.0  # guidance w: (1 + w) * logits given the prompt - w * logits with the prompt masked
    corrector_steps: int = 0  # passes after the last step that hide some of the generated units and draw them again
    corrector_fraction: float = 0.1  # probability that a corrector pass hides a unit

    def check(self, path: str = "sampler") -> None:
        """Raise ValueError, with the dotted `path` of the field, for a value that cannot be used."""
        limits = [
            ("steps", self.steps >= 1, "is below 1. Use at least one step"),
            ("temperature", 0 <= self.temperature < math.inf, "is not finite and >= 0. Use 1, or 0 for greedy"),
            ("top_p", 0 < self.top_p <= 1, "is outside (0, 1]. Use 1 to keep every token"),
            ("chunk_point", 0 <= self.chunk_point <= 1, "is outside [0, 1]. Use a time, 0 for whole tokens throughout"),
            ("block_length", self.block_length is None or self.block_length >= 1, "is below 1. Leave it out"),
            ("cfg_scale", 0 <= self.cfg_scale < math.inf, "is not finite and >= 0. Use 0 for no guidance"),
            ("corrector_steps", self.corrector_steps >= 0, "is below 0. Use 0 for no corrector"),
            ("corrector_fraction", 0 < self.corrector_fraction <= 1, "is outside (0, 1]. Use 0.1"),
        ]
        for name, fits, rule in limits:
            if not fits:
                raise ValueError(f"{path}.{name} = {getattr(self, name)} {rule}.")
        if self.order == "layers" and (self.group != "digit" or self.corrector_steps):
            raise ValueError(
                f"{path}.order = layers reveals first digits before second ones, which {path}.group = {self.group} and "
                f"{path}.corrector_steps = {self.corrector_steps} do not allow. Use group digit and no correctors."
            )
        if self.group == "schedule" and self.order not in ("ancestral", None):
            raise ValueError(
                f"{path}.group = schedule changes units with time, but {path}.order = {self.order} spreads a fixed "
                "number of units over the steps. Use group token or digit, or order ancestral."
            )


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Generated sequences and what they cost. Idle steps reveal nothing; correctors are not counted among the steps."""

    tokens: Tensor  # int64 [B, L]
    evaluations: int  # passes of the whole batch through the network
    steps: int  # T
    idle_steps: Tensor  # int64 [B], steps in which one sequence did not change
    batch_idle_steps: int  # steps in which no sequence changed

    @property
    def idle_ratio(self) -> float:
        """Idle steps over steps, averaged over the sequences; compare `reveal.predicted_idle_ratio`."""
        return float(self.idle_steps.double().mean()) / self.steps


def start(tokens: Tensor, frozen: Tensor, codec: Codec) -> Tensor:
    """int64 [B, L, l]: the digits of `tokens` [B, L] where `frozen` (bool [B, L]), all hidden elsewhere.

    Prefixes, suffixes and infilling differ only in `frozen`; token ids at the other positions are ignored.
    """
    digits = codec.encode(torch.where(frozen, tokens, 0))
    return digits.masked_fill(~frozen.unsqueeze(-1), codec.mask_symbol)


@torch.no_grad()
def sample(
    digits: Tensor, frozen: Tensor, *, codec: Codec, predict: Predict, draw: Draw, config: SamplerConfig
) -> Samples:
    """Fill in every hidden digit of `digits` int64 [B, L, l]; visible digits stay, frozen tokens in correctors too.

    frozen: bool [B, L], tokens given from outside: fully visible, never re-masked, the prompt of the guidance.
    Each sequence depends on its own digits and noise only, as far as `predict` keeps sequences apart. An order that is
    left open is ancestral. Raises ValueError for a configuration or a start that does not fit, and when a distribution
    is not finite.
    """
    config = replace(config, order=config.order or "ancestral")
    config.check()
    _check_start(digits, frozen, codec, config)
    batch, length, granularity = digits.shape
    network = _Network(predict=predict, codec=codec, config=config, prompt=frozen)

    hidden = digits == codec.mask_symbol
    block = reveal.blocks(hidden.any(-1), config.block_length)
    num_blocks = max(1, int(block.max()) + 1)
    steps = config.steps * num_blocks
    counts = reveal.units_per_block(_units(hidden, config), block, num_blocks)
    plan, visits = None, range(steps)
    if config.order != "confidence":
        plan = _plan(hidden, block, _noise(draw, 0, batch, length * (granularity + 1)), config)
        if config.skip_idle:
            visits = plan[hidden].unique().tolist()  # increasing

    changed_steps = torch.zeros(batch, dtype=torch.int64, device=digits.device)
    batch_changed_steps = 0
    for step in visits:
        if plan is not None:
            due = plan == step
        else:
            current, within = divmod(step, config.steps)
            count = reveal.reveal_count(counts[:, current], within, config.steps)
            due = hidden & ((block == current) & (count > 0).unsqueeze(-1)).unsqueeze(-1)  # to be narrowed below
        where = (due if config.skip_idle else hidden).any(-1)
        if not bool(where.any()):
            continue
        tokens, score = network.draw(digits, where, _noise(draw, step + 1, batch, length))
        if plan is None:
            due = due & reveal.top_units(score.masked_fill(~_units(due, config), -torch.inf), count)
        digits = torch.where(due, codec.encode(tokens), digits)
        hidden = hidden & ~due
        changed = due.flatten(1).any(1)
        changed_steps += changed
        batch_changed_steps += int(changed.any())

    for index in range(config.corrector_steps):
        noise = _noise(draw, -1 - index, batch, length * (granularity + 1))
        again = _remask(noise[:, length:].view(digits.shape), frozen, config)
        if bool(again.any()):
            digits = digits.masked_fill(again, codec.mask_symbol)
            tokens, _ = network.draw(digits, again.any(-1), noise[:, :length])
            digits = torch.where(again, codec.encode(tokens), digits)

    return Samples(
        tokens=codec.decode(digits),
        evaluations=network.evaluations,
        steps=steps,
        idle_steps=steps - changed_steps,
        batch_idle_steps=steps - batch_changed_steps,
    )


@torch.no_grad()
def sample_left_to_right(
    tokens: Tensor, frozen: Tensor, *, predict: Predict, draw: Draw, temperature: float = 1.0, top_p: float = 1.0
) -> Samples:
    """Autoregressive sampling with a causal network: replace the tokens [B, L] that are not `frozen`, in order.

    predict: (tokens int64 [B, i], where bool [B, i]) -> logits [P, V] of token i, given at the last position, i - 1,
    and recomputed from the whole prefix each time. draw(i, 1) is the noise of token i. Token 0 has no context and must
    be frozen (a document separator will do); frozen tokens further on are kept but not foreseen.
    """
    SamplerConfig(temperature=temperature, top_p=top_p).check()
    batch, length = tokens.shape
    if not bool(frozen[:, 0].all()):
        raise ValueError(
            "Position 0 is to be generated, but a causal model predicts from position 1 on. Give a first token."
        )
    tokens, evaluations = tokens.clone(), 0
    for position in range(1, length):
        rows = ~frozen[:, position]
        if not bool(rows.any()):
            continue
        where = torch.zeros_like(frozen[:, :position])
        where[:, -1] = rows
        logits = predict(tokens[:, :position], where).double()
        evaluations += 1
        uniforms = _noise(draw, position, batch, 1)[rows, 0]
        tokens[rows, position] = categorical(tempered(logits.log_softmax(-1), temperature, top_p), uniforms)
    idle_steps = frozen[:, 1:].sum(1)
    return Samples(
        tokens=tokens,
        evaluations=evaluations,
        steps=length - 1,
        idle_steps=idle_steps,
        batch_idle_steps=length - 1 - evaluations,
    )


def tempered(log_probs: Tensor, temperature: float, top_p: float) -> Tensor:
    """float64 [P, V]: the distribution that a token is drawn from, given the model's log-probabilities [P, V].

    Temperature 0 puts everything on the likeliest token. The nucleus is MDLM's: tokens whose cumulative probability,
    from the likeliest down, is at most top_p, and always the likeliest. The token that crosses top_p is left out,
    unlike in Hugging Face's rule.
    """
    top, likeliest = log_probs.double().max(-1, keepdim=True)
    if not bool(top.isfinite().all()):
        raise ValueError(
            "A token distribution is not finite: the network returned NaN or infinite logits, or the visible digits of "
            "a token fit no token. Check the weights, and that the start holds digits of real tokens."
        )
    if temperature == 0:
        return torch.zeros_like(log_probs, dtype=torch.float64).scatter_(1, likeliest, 1.0)
    probs = ((log_probs - top) / temperature).softmax(-1)  # the likeliest at 0, so that no temperature overflows
    if top_p < 1:
        ranked, order = probs.sort(dim=-1, descending=True, stable=True)
        keep = ranked.cumsum(-1) <= top_p
        keep[:, 0] = True
        probs = torch.zeros_like(probs).scatter_(1, order, ranked * keep)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def categorical(probs: Tensor, uniforms: Tensor) -> Tensor:
    """int64 [P]: one draw from each row of float64 probs [P, V] by inverting its cumulative sum at uniforms [P]."""
    cumulative = probs.cumsum(-1)
    target = uniforms.unsqueeze(-1) * cumulative[:, -1:]
    pick = torch.searchsorted(cumulative, target, right=True).clamp_(max=probs.shape[-1] - 1)
    # A parallel cumulative sum may wobble by one ulp where probabilities are zero; an excluded token must never win.
    possible = probs.gather(1, pick) > 0
    return torch.where(possible, pick, probs.argmax(-1, keepdim=True)).squeeze(-1)


@dataclass(kw_only=True)
class _Network:
    """Draws tokens from the network's distributions and counts its passes."""

    predict: Predict
    codec: Codec
    config: SamplerConfig
    prompt: Tensor  # bool [B, L], hidden from the unconditional pass of guidance
    evaluations: int = 0

    def draw(self, digits: Tensor, where: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, L] drawn at `where`, and the log-probabilities [B, L, U] of their units; 0 and -inf elsewhere.

        The log-probabilities are the model's own, before temperature and nucleus (as in LLaDA), and computed for the
        confidence order only.
        """
        logits = self._logits(digits, where)
        tokens = torch.zeros_like(where, dtype=torch.int64)
        width = 1 if self.config.group == "token" else self.codec.granularity
        score = torch.full((*where.shape, width), -torch.inf, dtype=torch.float64, device=digits.device)
        drawn, scored = [], []
        for some_logits, revealed, noise in zip(
            logits.split(_ROWS), digits[where].split(_ROWS), uniforms[where].split(_ROWS), strict=True
        ):
            log_probs = filtered_log_probs(some_logits.double(), revealed, self.codec)
            drawn.append(categorical(tempered(log_probs, self.config.temperature, self.config.top_p), noise))
            if self.config.order == "confidence":
                scored.append(self._score(log_probs, revealed, drawn[-1]))
        tokens[where] = torch.cat(drawn)
        if scored:
            score[where] = torch.cat(scored).clamp(min=torch.finfo(torch.float64).min)
        return tokens, score

    def _logits(self, digits: Tensor, where: Tensor) -> Tensor:
        """[P, V], guided if asked for (unsupervised classifier-free guidance, SMDM, arXiv 2410.18514)."""
        self.evaluations += 1
        logits = self.predict(digits, where)
        scale = self.config.cfg_scale
        if scale == 0:
            return logits
        self.evaluations += 1
        blind = self.predict(digits.masked_fill(self.prompt.unsqueeze(-1), self.codec.mask_symbol), where)
        return (1 + scale) * logits - scale * blind

    def _score(self, log_probs: Tensor, revealed: Tensor, tokens: Tensor) -> Tensor:
        """float64 [P, U]: log-probability of the drawn token, or of each of its digits."""
        if self.config.group == "token":
            return log_probs.gather(1, tokens.unsqueeze(-1))
        by_digit = digit_log_probs(log_probs, revealed, self.codec)  # [P, l, b]
        return by_digit.gather(2, self.codec.encode(tokens).unsqueeze(-1)).squeeze(-1)


def _plan(hidden: Tensor, block: Tensor, noise: Tensor, config: SamplerConfig) -> Tensor:
    """int64 [B, L, l]: the step that reveals each hidden digit, -1 for visible ones. noise: float64 [B, L + L * l]."""
    length = hidden.shape[1]
    token, digit = noise[:, :length], noise[:, length:].view(hidden.shape)
    if config.order == "ancestral":
        chunk_point = {"digit": 1.0, "token": 0.0, "schedule": config.chunk_point}[config.group]
        step = reveal.ancestral_plan(token, digit, config.steps, reveal.token_steps(config.steps, chunk_point))
    elif config.order == "layers":
        step = reveal.layered_plan(digit, config.steps)
    else:
        units = _units(hidden, config)
        key = digit if config.group == "digit" else token.unsqueeze(-1)
        if config.order == "left_to_right":
            number = key[0].numel()
            key = (torch.arange(number, dtype=key.dtype, device=key.device) / number).view(key[:1].shape)
        step = reveal.counted_plan(units, key, block, config.steps)
    return torch.where(hidden, block.unsqueeze(-1) * config.steps + step, -1)


def _units(digits: Tensor, config: SamplerConfig) -> Tensor:
    """bool [B, L, U] of bool digits [B, L, l]: whole tokens count when any of their digits does."""
    return digits.any(-1, keepdim=True) if config.group == "token" else digits


def _remask(uniforms: Tensor, frozen: Tensor, config: SamplerConfig) -> Tensor:
    """bool [B, L, l]: what a corrector pass hides, never a frozen token. uniforms: float64 [B, L, l]."""
    if config.group == "token":
        uniforms = uniforms[..., :1].expand_as(uniforms)
    return (uniforms < config.corrector_fraction) & ~frozen.unsqueeze(-1)


def _noise(draw: Draw, step: int, batch: int, count: int) -> Tensor:
    uniforms = draw(step, count)
    if uniforms.dtype != torch.float64 or uniforms.shape != (batch, count):
        raise ValueError(
            f"draw({step}, {count}) returned {uniforms.dtype} {list(uniforms.shape)}; it must return "
            f"torch.float64 [{batch}, {count}], because float32 noise lowers the effective temperature."
        )
    return uniforms


def _check_start(digits: Tensor, frozen: Tensor, codec: Codec, config: SamplerConfig) -> None:
    if digits.dim() != 3 or digits.shape[-1] != codec.granularity or frozen.shape != digits.shape[:2]:
        raise ValueError(
            f"The digits {list(digits.shape)} and frozen {list(frozen.shape)} must have the shapes "
            f"[B, L, {codec.granularity}] and [B, L]."
        )
    if bool(((digits < 0) | (digits > codec.mask_symbol)).any()):
        raise ValueError(f"Some digits are outside 0..{codec.mask_symbol}, of which the last is the mask symbol.")
    if bool((frozen.unsqueeze(-1) & (digits == codec.mask_symbol)).any()):
        raise ValueError(
            "A frozen token has hidden digits, which nothing would reveal. Freeze fully visible tokens only."
        )
    if config.cfg_scale > 0 and not bool(frozen.any()):
        raise ValueError(
            f"cfg_scale = {config.cfg_scale} guides towards the prompt, but no token is frozen. "
            "Use 0, or give a prompt."
        )
