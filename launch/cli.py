"""The `unmask` command: finds the room that an experiment names and starts its modules, in one process or several.

A configuration's `entry: llm.train` names the room's training module. Its siblings `llm.evaluate`, `llm.sample` and
`llm.export` serve the verbs of those names, so that launch/ imports no room. Rooms add verbs of their own through the
entry-point group `unmask.verbs`.
"""

import argparse
import difflib
import importlib
import json
import os
import shlex
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from launch import config as configs
from launch.errors import ConfigError, UserError
from launch.local import accelerate_command, run_local, torchrun_command
from launch.stop import EXIT_OK, EXIT_STOPPED, EXIT_USER_ERROR, MEANING

_VERBS = {
    "train": "train an experiment, or go on with it: unmask train CONFIG [key=value ...] [--nproc N]",
    "resume": "go on with a run: unmask resume RUN [key=value ...] [--nproc N]",
    "eval": "valid likelihood bounds, or zero-shot tasks: unmask eval RUN [RUN ...] [--tasks NAMES]",
    "sample": "text from a run's model: unmask sample RUN [--prompt TEXT]",
    "export": "a Hugging Face style folder from a run: unmask export RUN --to DIR",
    "submit": "the same as a SLURM job: unmask submit CONFIG [key=value ...] --cluster YAML [--nodes N]",
    "status": "where runs stand, in the queue and in training: unmask status [RUN]",
    "cancel": "end the SLURM job of a run: unmask cancel RUN",
    "logs": "what the job of a run has printed: unmask logs RUN [-f] [--rank N]",
    "plan": "memory, traffic and speed of every strategy, without data or devices: unmask plan CONFIG [--gpus N]",
    "doctor": "what this machine has, and what is missing: unmask doctor",
}
_MODULES = {"eval": "evaluate", "sample": "sample", "export": "export"}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    room_verbs = {e.name: e for e in metadata.entry_points(group="unmask.verbs")}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview(room_verbs))
        return EXIT_OK
    verb, rest = arguments[0], arguments[1:]
    try:
        if verb in ("train", "resume"):
            return _train(verb, rest)
        if verb in _MODULES:
            return _on_run(verb, rest)
        if verb == "plan":
            return _plan(rest)
        if verb in ("submit", "cancel"):
            from launch import slurm

            return slurm.submit(rest) if verb == "submit" else slurm.cancel(rest)
        if verb in ("status", "logs"):
            from launch import status

            return status.main(rest) if verb == "status" else status.logs(rest)
        if verb == "doctor":
            from launch.doctor import main as doctor

            return doctor(rest)
        if verb in room_verbs:
            return room_verbs[verb].load()(rest)
        verbs = [*_VERBS, *room_verbs]
        near = difflib.get_close_matches(verb, verbs, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"there is no verb {verb!r}{hint}; verbs: {', '.join(verbs)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except BrokenPipeError:  # `unmask data inspect DIR | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's last flush would complain
        return EXIT_OK


def _overview(room_verbs: dict[str, metadata.EntryPoint]) -> str:
    lines = [
        "usage: unmask VERB ...",
        "",
        "Train language models with partial masking, and tell their true likelihood.",
        "",
    ]
    lines += [f"  {verb:<8} {text}" for verb, text in _VERBS.items()]
    lines += [f"  {name:<8} verbs of {e.value.split('.')[0]}/: unmask {name} --help" for name, e in room_verbs.items()]
    return "\n".join([*lines, "", "Each verb explains itself: unmask VERB --help"])


def _train(verb: str, argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"unmask {verb}",
        description=_VERBS[verb],
        epilog=(
            "exit codes: 0 finished, 2 error of yours, 75 stopped by a signal with a checkpoint (resume it), 76 hung, "
            "77 diverged. The same command resumes a run; Ctrl-C once saves and stops, twice stops at once."
        ),
    )
    what = "YAML file of the experiment" if verb == "train" else "run folder"
    parser.add_argument("target", type=Path, metavar="CONFIG" if verb == "train" else "RUN", help=what)
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="dotted overrides, e.g. schedule.lr=1e-3"
    )
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="processes on this machine, one a GPU (1)")
    parser.add_argument(
        "--launcher",
        choices=("local", "torchrun", "accelerate"),
        default="local",
        help="local meets in a file and opens no port; the others are the stock launchers",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check the configuration and the data, print the plan, stop"
    )
    parser.add_argument(
        "--explain", nargs="?", const="", metavar="KEY", help="print values, their sources and meanings"
    )
    options = parser.parse_intermixed_args(argv)
    config_path = options.target if verb == "train" else _run_config(options.target)
    overrides = [*options.overrides, *([configs.override("run.dir", str(options.target))] if verb == "resume" else [])]
    module = configs.entry_module(config_path)
    arguments = [str(config_path), *overrides]
    if options.explain is not None:
        return _module_main(module, [*arguments, "--explain", options.explain])
    if options.dry_run:
        return _module_main(module, [*arguments, "--dry-run", "--gpus", str(options.nproc)])
    if options.nproc < 1:
        raise ConfigError(f"--nproc {options.nproc}; the smallest is 1")
    folder = configs.run_folder(config_path, overrides)
    if options.launcher == "torchrun":
        command = torchrun_command(module, arguments, processes=options.nproc)
    elif options.launcher == "accelerate":
        command = accelerate_command(module, arguments, processes=options.nproc)
    elif options.nproc == 1:
        return _module_main(module, arguments)
    else:
        command = [sys.executable, "-m", module, *arguments]
        return _closed(run_local(command, options.nproc, log_dir=folder / "logs"), folder)
    print("+", shlex.join(command), flush=True)
    return _closed(run_local(command, 1, as_ranks=False), folder)


def _closed(code: int, folder: Path) -> int:
    """The last line on the console, below what several ranks and their launcher had to say."""
    if code not in (EXIT_OK, EXIT_STOPPED) and (folder / "config.yaml").exists():
        meaning = MEANING.get(code, "see above")
        print(f"unmask: exit code {code}: {meaning}. Go on with: unmask resume {folder}", file=sys.stderr, flush=True)
    return code


def _on_run(verb: str, argv: Sequence[str]) -> int:
    """eval, sample, export: the room of the first folder named has the module and its own --help.

    The language room evaluates models that are no folder of ours, too, and says itself what it cannot open.
    """
    named = [a for a in argv if not a.startswith("-")]
    room = next((room for name in named if (room := _room(name)) is not None), None)
    if room is None:
        if verb == "eval" or "-h" in argv or "--help" in argv:
            room = "llm"
        elif not named:
            raise ConfigError(f"unmask {verb} needs a run folder; {_VERBS[verb]}")
        else:
            raise ConfigError(
                f"found no run folder (with a config.yaml) nor exported folder (with a config.json) among "
                f"{', '.join(map(repr, named))}; {_VERBS[verb]}"
            )
    module = f"{room}.{_MODULES[verb]}"
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ConfigError(
            f"there is no `unmask {verb}` for runs of {room}.train; if `unmask export` writes them as a Hugging Face "
            f"folder, `unmask {verb}` may take that"
        ) from None
    return _module_main(module, argv)


def _room(name: str) -> str | None:
    """The room that a run folder or an exported folder belongs to; None for anything else (a prompt, say)."""
    run, exported = os.path.join(name, "config.yaml"), os.path.join(name, "config.json")
    if os.path.exists(run):  # not Path.exists, which raises where a prompt is too long for a file name
        return configs.entry_module(Path(run)).removesuffix(".train")
    if os.path.exists(exported):
        described = json.loads(Path(exported).read_text()).get("unmask_config", {})
        return str(described.get("entry", "llm.train")).removesuffix(".train")
    return None


def _plan(argv: Sequence[str]) -> int:
    from launch.plan import add_options

    parser = argparse.ArgumentParser(prog="unmask plan", description=_VERBS["plan"])
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file of the experiment")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="dotted overrides, e.g. data.vocab_size=1024"
    )
    add_options(parser)
    options = parser.parse_intermixed_args(argv)
    return _module_main(configs.entry_module(options.config), [*argv, "--plan"])


def _run_config(run: Path) -> Path:
    path = run / "config.yaml"
    if not path.exists():
        raise ConfigError(f"{run} is not a run folder: it has no config.yaml. Start one with: unmask train CONFIG")
    return path


def _module_main(module: str, argv: Sequence[str]) -> int:
    return importlib.import_module(module).main(list(argv))


if __name__ == "__main__":
    sys.exit(main())
