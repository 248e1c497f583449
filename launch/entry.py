"""From a command line to an exit code: what every room's `python -m ROOM.train CONFIG key=value ...` runs.

The same command starts a run and resumes it: whatever whole checkpoint the run folder holds is taken up, at any number
of processes and under any strategy.
"""

import argparse
import dataclasses
import errno
import json
import logging
import os
import platform
import secrets
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from launch import config as configs
from launch import runtime as runtimes
from launch.agreement import check_same_data, check_same_everywhere
from launch.checkpoint import CheckpointStore
from launch.checkpoint.commit import remedy
from launch.engine import Engine, build_engine
from launch.engine.base import load_weights
from launch.errors import ConfigError, UserError
from launch.experiment import Experiment, Task
from launch.local import check_accelerate_environment
from launch.metrics import MetricsWriter, read_metrics
from launch.plan import add_options, facts, micro_steps_of, options_from, plan, plan_as_json, table
from launch.report import write_report
from launch.runtime import Runtime
from launch.stop import EXIT_OK, EXIT_USER_ERROR, StopFlag, record_exit, tell_launcher
from launch.trainer import Trainer
from launch.watch import Watchdog

logger = logging.getLogger(__name__)

# What a resumed run may change: how it runs, not what it computes. Rooms name further sections in `may_change`.
_MAY_CHANGE = (
    *("run.name", "run.dir", "train.steps", "train.micro_batch", "train.log_every", "train.evaluate_every"),
    *("train.sample_every", "engine.", "checkpoint.", "guard.", "watch.", "metrics."),
)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # a run writes nowhere but in its folder

MakeTask = Callable[[Any, torch.device, bool], Task]  # (config, device, open_data)


def main(schema: type[Experiment], make_task: MakeTask, argv: Sequence[str] | None = None) -> int:
    """Run one process of an experiment. Errors of the user end in one sentence and `EXIT_USER_ERROR`."""
    arguments = _parser(schema).parse_intermixed_args(argv)
    try:
        os.environ.update(runtimes.ranks_of_srun(os.environ))  # before anybody asks for RANK
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    rank = int(os.environ.get("RANK", "0"))
    config = None
    level = logging.INFO if rank == 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(message)s" if rank == 0 else f"[rank {rank}] %(message)s")
    try:
        config, sources = configs.load(schema, arguments.config, arguments.overrides)
        if arguments.explain is not None:
            print(configs.explain(config, sources, arguments.explain or None))
            return EXIT_OK
        if arguments.plan or arguments.dry_run:
            options = options_from(arguments, gpus=os.environ.get("WORLD_SIZE", "1"))
            if arguments.dry_run:
                _check_same_experiment(config, config.run.folder)
            task = make_task(config, torch.device("cpu"), arguments.dry_run)
            if arguments.dry_run:
                print(table(facts(config, task, options.gpus)), flush=True)
                print(rehearse(config, task, world_size=options.gpus))
            else:
                print((plan_as_json if arguments.json else plan)(config, task, options))
            return EXIT_OK
        return run(config, make_task)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        tell_launcher(f"error: {error}")
        if config is not None:
            record_exit(config.run.folder, rank, EXIT_USER_ERROR)
        return EXIT_USER_ERROR
    except Exception as error:
        code = 1
        if config is not None and isinstance(error, OSError) and error.errno in _FULL:
            # Metrics, samples and the report need space too.
            folder, code = config.run.folder, EXIT_USER_ERROR
            print(f"error: cannot write to {folder}: {error}; {remedy(str(error), folder)}", file=sys.stderr)
            record_exit(folder, rank, code)
        else:
            traceback.print_exc()
        sys.stderr.flush()
        tell_launcher(traceback.format_exc())
        # Not a clean shutdown: with a peer dead, destroying the process group may wait for ever.
        os._exit(code)


def rehearse(config: Experiment, task: Task, *, world_size: int) -> str:
    """One step of the engine on its mesh of `world_size`, on tensors without values; the row that says so."""
    if config.engine.strategy not in ("ddp", "fsdp2"):
        return table({"dry run": "checks only: DeepSpeed cannot take a step without values"})
    from launch.engine.dry import dry_run  # torch's fake process group lies among its tests: seconds to import

    found = dry_run(
        task.build_model,
        lambda model: task.loss(model, task.example_batch(config.train.micro_batch))[0],
        config.engine,
        config.optimizer,
        world_size=world_size,
    )
    return table({"dry run": f"one step of {found.engine}: {found.state_elements:,} numbers of state on a rank"})


def run(config: Experiment, make_task: MakeTask) -> int:
    """Collective. Train, or go on training, in the run folder; returns the exit code."""
    check_accelerate_environment(config.engine.strategy, config.engine.precision, os.environ)
    place = runtimes.place_from_environment(os.environ)
    with Watchdog(config.run.folder, config.watch, rank=place.rank, world_size=place.world_size) as watchdog:
        try:
            return _run(config, make_task, watchdog)
        except Exception as error:
            if (words := runtimes.lost_peer(error)) is not None:
                watchdog.lose_peer(error, words)
            raise


def _run(config: Experiment, make_task: MakeTask, watchdog: Watchdog) -> int:
    if config.run.deterministic:
        torch.use_deterministic_algorithms(True)
    runtime = runtimes.start(device=config.engine.device, timeout_seconds=config.engine.timeout)
    hosts = check_same_everywhere(config, runtime)
    folder = config.run.folder
    watchdog.meet(runtime.decide(lambda: secrets.token_hex(4)))
    micro_steps_of(config, runtime.world_size)
    runtime.decide(lambda: _check_same_experiment(config, folder))
    task = runtime.together(lambda: make_task(config, runtime.device, True))
    check_same_data(task.identity(), runtime, hosts)
    watchdog.starting("build")
    engine = build_engine(task.build_model, config.engine, config.optimizer, runtime, seed=config.run.seed)
    store = CheckpointStore(
        folder / "checkpoints",
        runtime,
        keep_last=config.checkpoint.keep_last,
        keep_every=config.checkpoint.keep_every,
        verify=config.checkpoint.verify,
        asynchronous=config.checkpoint.asynchronous,
    )
    watchdog.starting("restore")
    latest = store.latest_valid()
    if latest is None:
        _load_initial_weights(engine, task, runtime)
    store.preflight(engine.state())
    metrics = MetricsWriter(folder, config.metrics, total_steps=config.train.steps, enabled=runtime.is_main)
    with StopFlag(grace_seconds=config.watch.stop_grace) as stop:
        trainer = Trainer(config, task, engine, runtime, store, metrics, watchdog, stop, hosts)
        if latest is not None:
            trainer.restore(latest)
            if trainer.progress.step > config.train.steps:
                raise ConfigError(
                    f"train.steps = {config.train.steps}, but {folder} stands at step {trainer.progress.step} already; "
                    f"use train.steps={trainer.progress.step} or more, or start a new run in another run.dir"
                )
        # Only now: a resume that is refused must leave the configuration that its checkpoints belong to.
        runtime.decide(lambda: _write_run_folder(config, task, folder, runtime.world_size))
        metrics.rewind(trainer.progress.step)  # also to 0: an earlier start may have died before its first checkpoint
        if runtime.is_main:
            rows = facts(config, task, runtime.world_size) | {
                "engine": engine.describe(),
                "starts at": "step 0" if latest is None else f"step {trainer.progress.step}, from its checkpoint",
            }
            print(table(rows), flush=True)
        # A run that was killed between its last step and its last evaluation is not finished: `fit` does the rest.
        if trainer.progress.step >= config.train.steps and runtime.decide(lambda: _was_judged(folder, latest)):
            if runtime.is_main:
                print(f"{folder} is finished: step {latest} of {config.train.steps}. Raise train.steps to go on.")
            code = EXIT_OK
        else:
            code = trainer.fit()
    with watchdog.phase(trainer.progress.step, "report"):
        metrics.close()
        if code == EXIT_OK and runtime.is_main and config.metrics.report:
            print(f"report: {write_report(folder, task.report_sections(folder))}", flush=True)
        # before the barrier: what a launcher does to the last ranks is its business
        record_exit(folder, runtime.rank, code)
        runtime.barrier()
        runtime.close()
    return code


def _load_initial_weights(engine: Engine, task: Task, runtime: Runtime) -> None:
    """Collective. Start from the weights that the configuration names, if it names any."""
    weights = runtime.together(task.initial_weights)
    if weights is not None:
        state = engine.state()
        runtime.together(lambda: load_weights(state, weights))
        engine.adopt(state)


def _was_judged(folder: Path, step: int | None) -> bool:
    """Whether the evaluation at the end of a run has been recorded."""
    rows = read_metrics(folder / "metrics.jsonl")
    return any(row["step"] == step and any(name.startswith("val/") for name in row) for row in rows)


def _parser(schema: type[Experiment]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {schema.__module__.split('.')[0]}.train",
        description=(
            "Train the experiment in CONFIG. Start one process with python, several with `unmask train --nproc N`, "
            "torchrun or `accelerate launch`. The same command resumes: it goes on from the newest whole checkpoint."
        ),
        epilog="example: python -m llm.train configs/llm/tiny/primev2.yaml train.steps=200 run.dir=runs/try",
    )
    parser.add_argument("config", type=Path, help="YAML file of the experiment")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="dotted overrides, e.g. schedule.lr=1e-3"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything that can be checked, print the plan, stop"
    )
    parser.add_argument("--plan", action="store_true", help="print what every strategy would need; reads no data")
    parser.add_argument(
        "--explain", nargs="?", const="", metavar="KEY", help="print each value, where it came from and what it means"
    )
    add_options(parser)
    return parser


def _check_same_experiment(config: Experiment, folder: Path) -> None:
    """A run folder holds one experiment; refuse to go on in it with another."""
    path = folder / "config.yaml"
    if not path.exists() or not any((folder / "checkpoints").glob("step_*")):
        return
    changed = configs.difference(yaml.safe_load(path.read_text()), configs.to_dict(config))
    free = (*_MAY_CHANGE, *getattr(config, "may_change", ()))
    for key, (old, new) in changed.items():
        is_switched = key == "engine.ema_decay" and None in (old, new)  # the checkpoint has an average, or has none
        if is_switched or not key.startswith(free):
            raise ConfigError(
                f"{folder} was started with {key} = {old!r}, this command says {new!r}; go on with "
                f"`unmask resume {folder}`, or start a new run with run.dir=ANOTHER_FOLDER"
            )
        logger.info("resuming with %s = %r (was %r)", key, new, old)


def _write_run_folder(config: Experiment, task: Task, folder: Path, world_size: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    task.keep_files(folder)
    partial = folder / "config.yaml.tmp"
    partial.write_text(configs.dump(config))
    partial.replace(folder / "config.yaml")  # a kill here must not leave a run that cannot be resumed
    defaults_differ = {
        key: new for key, (_, new) in configs.difference(_defaults(type(config)), configs.to_dict(config)).items()
    }
    (folder / "config.diff.yaml").write_text(yaml.safe_dump(defaults_differ, sort_keys=True))
    environment = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": sys.argv,
        "host": platform.node(),
        "world_size": world_size,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "versions": {name: metadata.version(name) for name in ("torch", "numpy", "transformers", "tokenizers")},
        "commit": _git("rev-parse", "HEAD"),
        "modified_files": _git("status", "--porcelain", "--untracked-files=no").splitlines(),
    }
    (folder / "env.json").write_text(json.dumps(environment, indent=2))


def _defaults(schema: type[Experiment]) -> dict[str, Any]:
    """The values of every field that has a default, as plain data."""
    return {
        f.name: configs.to_dict(f.default_factory())
        for f in dataclasses.fields(schema)
        if f.default_factory is not dataclasses.MISSING
    }


def _git(*arguments: str) -> str:
    """Output of git in the project's checkout; empty where there is no git or no checkout."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=False
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
