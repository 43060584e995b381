"""Hosts made of network namespaces that one bridge joins; nothing of them is in the machine's own network."""

import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ctrsink.errors import InputError, RunError

INTERFACE = "eth0"
"""A host's only interface beside loopback."""
_CLONE_NEWNET = 0x40000000


class Network:
    """The namespaces `PREFIX-HOST`, and `PREFIX-switch` with the bridge, whose ports bear the hosts' names.

    The bridge lies in a namespace of its own and has no address, so hosts reach each other and nobody else, and all of it is
    gone with the namespaces.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def create(self) -> None:
        """Make the switch.

        Raises:
            InputError: this is not root on Linux with iproute2.
        """
        require_root()
        _ip("netns", "add", self._space("switch"))
        _ip("-n", self._space("switch"), "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._space("switch"), "link", "set", "bridge", "up")

    def add(self, host: str, address: str) -> None:
        """Make a host with an address such as 10.77.0.1/24."""
        switch, space = self._space("switch"), self._space(host)
        _ip("netns", "add", space)
        _ip("link", "add", host, "netns", switch, "type", "veth", "peer", "name", INTERFACE, "netns", space)
        _ip("-n", switch, "link", "set", host, "master", "bridge", "up")
        _ip("-n", space, "address", "add", address, "dev", INTERFACE)
        for interface in ("lo", INTERFACE):
            _ip("-n", space, "link", "set", interface, "up")

    def hosts(self) -> list[str]:
        """Names of all hosts, killed ones too."""
        return [name for name in self._parts() if name != "switch"]

    def cut(self, host: str) -> None:
        """No packet reaches or leaves the host until its link is mended; its processes live on."""
        _ip("-n", self._space("switch"), "link", "set", host, "down")

    def mend(self, host: str) -> None:
        """Undo a cut."""
        _ip("-n", self._space("switch"), "link", "set", host, "up")

    def kill(self, host: str) -> None:
        """As if its power failed: the link first, so that no process says goodbye to another host."""
        self.cut(host)
        self._end_processes(host)

    def alive(self, host: str) -> bool:
        """Whether any process runs there."""
        return bool(self._pids(host))

    def remove(self) -> None:
        """End every process in the namespaces, by its own pid, and remove them."""
        for name in self._parts():
            self._end_processes(name)
            _ip("netns", "delete", self._space(name))

    @contextmanager
    def inside(self, host: str) -> Iterator[None]:
        """This thread, and what it starts, is on the host: sockets are opened and processes started there."""
        with Path("/proc/thread-self/ns/net").open("rb") as home, Path("/run/netns", self._space(host)).open("rb") as there:
            _enter(there.fileno())
            try:
                yield
            finally:
                _enter(home.fileno())

    def _space(self, host: str) -> str:
        return f"{self.prefix}-{host}"

    def _parts(self) -> list[str]:
        names = [line.split()[0] for line in _ip("netns", "list").splitlines()]
        return [name.removeprefix(f"{self.prefix}-") for name in names if name.startswith(f"{self.prefix}-")]

    def _pids(self, host: str) -> list[int]:
        return [int(pid) for pid in _ip("netns", "pids", self._space(host)).split() if int(pid) != os.getpid()]

    def _end_processes(self, host: str) -> None:
        """What was started while others were ended is found in the next round."""
        while pids := self._pids(host):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)


def require_root() -> None:
    """Raise InputError where namespaces cannot be made."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        raise InputError("hosts are network namespaces, which only root can make: run this as root on Linux")
    if shutil.which("ip") is None:
        raise InputError("hosts are network namespaces: install iproute2, which has the `ip` command")


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise RunError(f"`ip {' '.join(arguments)}` failed: {done.stderr.strip()}")
    return done.stdout


def _enter(descriptor: int) -> None:
    """`os.setns`, which Python has from 3.12 on."""
    library = ctypes.CDLL(None, use_errno=True)
    if library.setns(descriptor, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns failed")
