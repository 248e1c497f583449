"""Faults on demand, so that tests can end or hurt a process between any two operations of a protocol.

UNMASK_FAULT="checkpoint.after_rename:kill" kills the process the first time that point is reached. The full form is
POINT:ACTION[:RANK[:HIT]]; RANK is a number or `*` (default 0), HIT counts from 1. Actions: `kill` (SIGKILL to itself),
`hang` (for an hour), `enospc` (the OSError of a full disk), `error` (a RuntimeError). A process reads the variable at
the first point it reaches, not when it imports this file: a fork server has imported it long before its ranks have an
environment. Unset, as always outside tests, a point is one comparison with None.
"""

import errno
import functools
import os
import re
import signal
import time
from dataclasses import dataclass

ACTIONS = ("kill", "hang", "enospc", "error")


@dataclass(kw_only=True)
class _Plan:
    point: str
    action: str
    hits_left: int


def fault(point: str) -> None:
    """A named point of a protocol. Does nothing unless UNMASK_FAULT names it."""
    plan = _plan_of_this_process()
    if plan is not None and plan.point == point:
        _strike(plan)


@functools.cache
def _plan_of_this_process() -> _Plan | None:
    return _plan(os.environ.get("UNMASK_FAULT"), os.environ.get("RANK", "0"))


def _strike(plan: _Plan) -> None:
    plan.hits_left -= 1
    if plan.hits_left != 0:
        return
    if plan.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if plan.action == "hang":
        time.sleep(3600)
    if plan.action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), plan.point)
    raise RuntimeError(f"fault at {plan.point}")


def _plan(text: str | None, rank: str) -> _Plan | None:
    if not text:
        return None
    match = re.fullmatch(r"([\w.]+):(\w+)(?::(\d+|\*))?(?::(\d+))?", text)
    if not match or match[2] not in ACTIONS:
        raise ValueError(
            f"UNMASK_FAULT={text!r} is not POINT:ACTION[:RANK[:HIT]] with ACTION one of {', '.join(ACTIONS)}"
        )
    point, action, on_rank, hit = match.groups()
    if (on_rank or "0") not in ("*", rank):
        return None
    return _Plan(point=point, action=action, hits_left=int(hit or 1))
