"""Two hosts on one machine: two network namespaces, joined by a virtual cable that can be pulled out and put back.

    with Cable() as cable:
        ranks = Ranks(config, 2, run, hosts=cable.hosts)
        cable.pull()

Needs root and the command `ip` of iproute2. A namespace that a killed test has left behind shows in
`ip netns list` and goes with `ip netns delete NAME`.
"""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

INTERFACE = "cable"  # the name of both ends; each namespace sees one
_CLONE_NEWNET = 0x40000000


def enter(host: str) -> None:
    """Move this process, which must not have threads yet, to `host`, and have gloo speak through the cable."""
    namespace = os.open(Path("/run/netns") / host, os.O_RDONLY)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {host}")
    os.close(namespace)
    os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE


class Cable:
    """Two hosts and the cable between them, for the length of a context."""

    def __init__(self) -> None:
        self.hosts = tuple(f"unmask-{os.getpid()}-{end}" for end in (0, 1))

    def __enter__(self) -> "Cable":
        first, second = self.hosts
        try:
            _ip("netns", "add", first)
            _ip("netns", "add", second)
            _ip("link", "add", INTERFACE, "netns", first, "type", "veth", "peer", "name", INTERFACE, "netns", second)
            for end, host in enumerate(self.hosts):
                _ip("-n", host, "address", "add", f"10.0.0.{end + 1}/24", "dev", INTERFACE)
                _ip("-n", host, "link", "set", "lo", "up")
            self.plug()
        except subprocess.CalledProcessError:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def pull(self) -> None:
        """From now on nothing arrives, and nobody is told."""
        for host in self.hosts:
            _ip("-n", host, "link", "set", INTERFACE, "down")

    def plug(self) -> None:
        for host in self.hosts:
            _ip("-n", host, "link", "set", INTERFACE, "up")

    def _remove(self) -> None:
        for host in self.hosts:
            if (Path("/run/netns") / host).exists():
                _ip("netns", "delete", host)


def _ip(*arguments: str) -> None:
    program = shutil.which("ip")
    if program is None:
        raise FileNotFoundError("the command `ip` (Debian: iproute2) is not installed")
    subprocess.run([program, *arguments], check=True, capture_output=True, text=True)
