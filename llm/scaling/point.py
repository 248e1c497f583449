"""One model of a scaling study, and what was measured of it: `result.json` in the point's run folder.

A study is a folder of run folders, STUDY/<family>/<size>-<budget>-s<seed>. A point that is done has a result.json,
written last and by rename, so its presence is the proof. Estimates of the negative log-likelihood stand under
`estimates`, by their valid names only; the joint loss, which bounds nothing, has a field of its own.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from launch import config as configs
from launch.errors import ConfigError, DataError
from llm.diffusion.likelihood import ValidName

FACTS = "point.json"  # beside the result: which point it is, and what decides its result
RESULT = "result.json"
COSTLY = ("nll_chain", "nelbo_steps")  # bounds of a forward for every token or sampler step: on fewer sequences
HASH = "config_hash"  # in result.json, beside the result: of the configuration that made it


@dataclass(frozen=True, kw_only=True)
class Point:
    """What a model was, before anything is known of its loss."""

    name: str  # unique in its study: <family>/<size>-<budget>-s<seed>
    family: str  # of the ladder: the recipe, not only the kind of model
    size: str  # of the ladder
    seed: int
    budget: float  # nominal training FLOPs; points of one IsoFLOP curve have the same
    parameters: int  # N, non-embedding
    tokens: int  # D, whole tokens read in training; never sub-tokens
    flops: float  # attained, by the ladder's rule, after rounding to whole steps
    flops_6nd: float  # 6 * parameters * tokens


@dataclass(frozen=True, kw_only=True)
class Estimated:
    """Nats per token of held-out text."""

    nats_per_token: float
    standard_error: float  # of nats_per_token, over sequences and draws
    estimator: str  # for example E2, or exact
    draws: int  # for each sequence


@dataclass(frozen=True, kw_only=True)
class Result:
    """A point and its measurements. TypeError if an estimate bears a name that is not a likelihood's."""

    point: Point
    estimates: dict[str, Estimated]  # by valid name: nll_ar, nelbo_token, nelbo_subtoken, nelbo_steps, nll_chain
    joint: Estimated | None = None  # loss_ce_joint: no bound, no perplexity; for comparison with published losses
    bytes_per_token: float  # of the held-out text, to turn nats per token into bits per byte
    seconds: float  # wall time of training, over all restarts
    steps: int  # of training

    def __post_init__(self) -> None:
        for name in self.estimates:
            if name not in get_args(ValidName):
                raise TypeError(
                    f"{self.point.name}: {name} is not a likelihood; estimates are {', '.join(get_args(ValidName))}"
                )


def write_result(folder: Path, result: Result, *, config_hash: str) -> None:
    """FOLDER/result.json, whole or not at all."""
    write_json(folder / RESULT, {HASH: config_hash, **configs.to_dict(result)})


def read_result(path: Path) -> Result:
    """The result in `path`; `DataError` if it is damaged or claims a likelihood that is none."""
    tree = _read(path)
    tree.pop(HASH, None)
    if "steps" not in tree and (path.parent / FACTS).exists():  # results did not always hold it
        tree["steps"] = read_facts(path.parent)["identity"]["train.steps"]
    try:
        return configs.from_dict(Result, tree, source=str(path))
    except (ConfigError, TypeError) as error:
        raise DataError(
            f"{path} is not a result of `unmask scaling run`: {error}; move it away and run again"
        ) from None


def read_hash(path: Path) -> str | None:
    """Hash of the configuration behind a result; None where there is no result."""
    return _read(path).get(HASH) if path.exists() else None


def read_results(study: Path) -> list[Result]:
    """Every finished point under `study`, by name. `DataError` if there is none."""
    if not (results := [read_result(path) for path in sorted(study.glob(f"*/*/{RESULT}"))]):
        raise DataError(f"{study} holds no {RESULT}; make some with `unmask scaling run LADDER --out {study}`")
    return results


def read_facts(folder: Path) -> dict[str, Any]:
    """FOLDER/point.json, as `llm.scaling.study.prepare` writes it."""
    path = folder / FACTS
    if not path.exists():
        raise DataError(f"{folder} is no point of a study: it has no {FACTS}; start points with `unmask scaling run`")
    return _read(path)


def write_json(path: Path, tree: dict[str, Any]) -> None:
    """By rename, so that a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.tmp")
    partial.write_text(json.dumps(tree, indent=2, allow_nan=False) + "\n")
    partial.replace(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}; move it away and run the point again") from None
    if not isinstance(tree, dict):
        raise DataError(f"{path} holds {type(tree).__name__}, expected a mapping; move it away and run the point again")
    return tree
