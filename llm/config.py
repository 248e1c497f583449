"""The configuration of a language-model experiment: `Experiment`'s sections and this room's own.

The library of llm/diffusion speaks numpy and tensors and raises ValueError; this module translates between it and the
keys of a YAML file, so that a wrong number is answered with the key that holds it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal, cast, get_args

from launch.config import Count, unknown_key
from launch.errors import ConfigError
from launch.experiment import Experiment
from llm.backbones import InputKind, InputSpec, ModelConfig, check_tensor_parallel, resolve_input_kind
from llm.data.codes import COPY, read_code
from llm.data.stream import DataConfig
from llm.diffusion.codec import Codec, build_codec
from llm.diffusion.likelihood import Order
from llm.diffusion.objective import MaskedObjective, Name
from llm.diffusion.sampler import SamplerConfig

Bound = Literal["nelbo_token", "nelbo_subtoken", "nelbo_layered", "nelbo_steps", "nll_chain"]


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """How tokens are written as digits, masked, and paid for."""

    family: Literal["ar", "mdm", "prime"] = "prime"  # ar: left to right; mdm: whole tokens; prime: sub-tokens
    granularity: int = 1  # l, digits per token (prime); binary codes need ceil(log2 V)
    code: str | None = None  # file of codes by similarity or frequency (unmask data code); null: token ids, or shuffled
    shuffle: bool = False  # give the tokens random codes (MDM-Prime-v2)
    shuffle_seed: int = 0  # of that permutation; kept with its hash in every checkpoint
    shuffle_scope: Literal["tokens", "all_codes"] = "tokens"  # permute the codes in use, or spread over all b**l codes
    order: Literal["uniform", "layers"] = "uniform"  # digits in any order, or all first digits before any second one
    embedding: Literal["auto", InputKind] = "auto"  # how the digits of a token become one vector
    objective: str = (
        "nelbo_subtoken"  # ar, mdm, ce_joint, nelbo_subtoken, nelbo_token, nelbo_layered, or 0.5*ce_joint+...
    )
    carry_over_train: bool = True  # give no probability to tokens that contradict the visible digits
    p_group: float = 0.0  # share of sequences whose tokens are masked as a whole
    p_group_final: float | None = None  # that share at the last step, to which it moves evenly; null: it stays
    chunk_point: float | None = None  # mask whole tokens at times above this; the released v2 recipe, no bound claimed
    t_min: float = 1e-3  # training weight is 1 / max(t, t_min); evaluation has no such limit
    time_sampling: Literal["stratified", "uniform"] = "stratified"  # one time per stratum of the global batch, or iid
    random_length_probability: float = 0.0  # share of steps cut to a random length
    paper_compat: bool = False  # the published loss: all positions, no filter

    def check(self, path: str) -> None:
        if (self.family == "prime") != (self.granularity > 1):
            raise ConfigError(
                f"{path}.granularity = {self.granularity} does not go with {path}.family = {self.family}: prime has 2 "
                "or more digits per token, ar and mdm have 1"
            )
        for name in ("p_group", "p_group_final", "random_length_probability"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"{path}.{name} = {value}; a probability lies in [0, 1]")
        if self.chunk_point is not None and not 0 <= self.chunk_point <= 1:
            raise ConfigError(f"{path}.chunk_point = {self.chunk_point}; a time lies in [0, 1], or null")
        if self.code is not None and (self.shuffle or self.family != "prime"):
            raise ConfigError(
                f"{path}.code = {self.code} does not go with {path}.shuffle = {self.shuffle} and {path}.family = "
                f"{self.family}: only prime has digits, and they come from a file or from a shuffle; leave one out"
            )
        if self.order == "layers" and self.chunk_point is not None:
            raise ConfigError(
                f"{path}.order = layers and {path}.chunk_point = {self.chunk_point} both say what is masked when; "
                "leave one out"
            )
        if not 0 < self.t_min < 1:
            raise ConfigError(f"{path}.t_min = {self.t_min}; need 0 < t_min < 1, for example 1e-3")
        if (self.family == "ar") != ("ar" in self.terms) or (self.family == "ar" and len(self.terms) > 1):
            raise ConfigError(f"{path}.objective = {self.objective!r} does not train {path}.family = {self.family}")

    @cached_property
    def terms(self) -> dict[str, float]:
        """The objective's terms and factors: "ce_joint", or "0.5*ce_joint+0.5*nelbo_token"."""
        terms: dict[str, float] = {}
        for term in self.objective.replace(" ", "").split("+"):
            factor, _, name = term.rpartition("*")
            if name not in get_args(Name):
                raise unknown_key(name, get_args(Name), f"diffusion.objective = {self.objective!r}")
            try:
                terms[name] = terms.get(name, 0.0) + float(factor or 1.0)
            except ValueError:
                raise ConfigError(
                    f"diffusion.objective = {self.objective!r}: {factor!r} is not a number; write it like "
                    "0.5*ce_joint+0.5*nelbo_token"
                ) from None
        return terms

    @property
    def draws_whole_tokens(self) -> bool:
        """Whether some sequence, at some step, is masked by whole tokens because of `p_group`."""
        return self.p_group > 0 or bool(self.p_group_final)

    def group_share(self, progress: float) -> float:
        """Share of sequences masked by whole tokens when this share of the steps is done."""
        final = self.p_group if self.p_group_final is None else self.p_group_final
        return self.p_group + (final - self.p_group) * progress

    def objective_for(self, codec: Codec) -> MaskedObjective:
        """The library's objective; `ConfigError` if its terms do not suit the masks that this section draws."""
        objective = MaskedObjective(
            terms=cast(Mapping[Name, float], self.terms),
            t_min=self.t_min,
            carry_over=self.carry_over_train and not self.paper_compat,
            positions="all" if self.paper_compat else "masked",
        )
        whole_tokens_at_times = self.chunk_point is not None
        try:
            objective.check(
                codec,
                can_group=self.draws_whole_tokens or whole_tokens_at_times,
                can_split=self.group_share(0.0) < 1 or self.group_share(1.0) < 1 or whole_tokens_at_times,
                in_layers=self.order == "layers",
            )
        except ValueError as error:
            raise ConfigError(f"diffusion: {error}") from None
        return objective

    def codec(self, vocab_size: int) -> Codec:
        """The codec of `vocab_size` tokens; `ConfigError` if they do not fit together."""
        try:
            return build_codec(
                vocab_size,
                self.granularity,
                shuffle_seed=self.shuffle_seed if self.shuffle else None,
                scope=self.shuffle_scope,
                permutation=None if self.code is None else read_code(Path(self.code)),
            )
        except ValueError as error:
            raise ConfigError(f"diffusion.granularity = {self.granularity} for {vocab_size} tokens: {error}") from None

    def input_spec(self, model: ModelConfig, codec: Codec) -> InputSpec:
        """What the backbone reads: ids (for mdm with a row for the mask), or digits with a mask symbol."""
        kind = resolve_input_kind(self.embedding, granularity=codec.granularity, width=model.width)
        num_symbols = codec.vocab_size if self.family == "ar" else codec.base + 1
        return InputSpec(kind=kind, num_symbols=num_symbols, granularity=codec.granularity)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Valid bounds on held-out text, while training and by `unmask eval`."""

    bounds: tuple[Bound, ...] = ("nelbo_token", "nelbo_subtoken")  # of prime models; others have one exact or one bound
    draws: int = 1  # Monte-Carlo draws per sequence and bound
    steps: Count = 64  # nelbo_steps: of the sampler that it bounds
    order: Order = "left_to_right"  # nll_chain: in which tokens are revealed one by one
    sequences: Count | None = 512  # validation blocks while training, spread over the split; null for all
    batch: int = 32  # sequences per rank and forward
    seed: int = 0  # of the evaluation's own noise: the same masks at every evaluation
    tasks: tuple[str, ...] = ()  # zero-shot tasks to score as well; names as in `unmask eval --list-tasks`
    task_limit: Count | None = 100  # documents of each task, the first ones; null for all
    tasks_every: Count | None = None  # steps between them, at evaluations that fall on it; null for every evaluation
    task_draws: int = 32  # masks of an answer (masked families)

    def check(self, path: str) -> None:
        for name in ("draws", "steps", "sequences", "batch", "task_limit", "tasks_every", "task_draws"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{path}.{name} = {value}; the smallest is 1")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Samples written while training and by `unmask sample`."""

    count: int = 4  # sequences
    length: int | None = None  # tokens; null for data.block_length
    seed: int = 0  # of the samples' own random numbers
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def check(self, path: str) -> None:
        if self.count < 1 or (self.length is not None and self.length < 1):
            raise ConfigError(f"{path}: count = {self.count}, length = {self.length}; both must be at least 1")


@dataclass(frozen=True, kw_only=True)
class LanguageConfig(Experiment):
    model: ModelConfig
    diffusion: DiffusionConfig
    data: DataConfig
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    initial_weights: str | None = None  # start from the weights of this exported folder instead of random ones

    may_change: ClassVar[tuple[str, ...]] = ("evaluation.", "sampling.", "data.verify", "initial_weights")

    def check(self, path: str) -> None:
        del path  # the root
        check_tensor_parallel(self.model, self.engine.tensor_parallel)
        sampler = self.sampling.sampler
        if self.diffusion.order == "layers" and sampler.order is None and sampler.group != "digit":
            raise ConfigError(
                f"sampling.sampler.group = {sampler.group} reveals no digits, and diffusion.order = layers draws first "
                "digits before second ones; use group digit, or name another sampling.sampler.order"
            )

    def with_code_of(self, folder: Path) -> "LanguageConfig":
        """The same with the copy of the table of codes that is in `folder`, if there is one: the original may move."""
        if self.diffusion.code is None or not (folder / COPY).exists():
            return self
        return replace(self, diffusion=replace(self.diffusion, code=str(folder / COPY)))
