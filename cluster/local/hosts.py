"""A Ray head, Ray hosts and an S3 server, each in a namespace of its own; a state file lets a later command find them."""

import contextlib
import json
import os
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from cluster.local import ray_node
from cluster.local.network import INTERFACE, Network, require_root
from cluster.local.seaweed import SeaweedServer
from ctrsink.errors import InputError, RunError

BUCKET = "ctrsink"
HEAD = "10.77.0.1"
STORE = "10.77.0.2"
JOBS = f"http://{HEAD}:8265"
GCS = f"{HEAD}:6379"
# A host that cannot be reached is dead for Ray after about 9 s, and ends its own part after 10 s without the head.
DETECTION = {
    "RAY_health_check_initial_delay_ms": "5000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
}
# An init system would start a node's Ray again: without that a host whose link is mended would stay away. Each start has
# a folder of its own, or Ray would send the old logs once more.
_AGAIN = ["sh", "-c", 'n=0; while n=$((n+1)); do mkdir $n; "$@" --temp-dir=$PWD/$n; sleep 1; done', "sh"]


@dataclass(frozen=True)
class Hosts:
    """The hosts `head` (no CPU for work), `s3`, and `host1`, `host2`, ... of `cpus` CPUs each."""

    name: str
    prefix: str
    """Of the namespaces; a random end keeps two of them apart."""
    cpus: int
    store: dict[str, str] = field(default_factory=dict)
    """Environment that leads to the S3 server."""
    sockets: tuple[str, ...] = ()
    """Files of the S3 server outside `folder`."""

    @classmethod
    def up(cls, name: str, hosts: int, cpus: int) -> "Hosts":
        """Start everything and return once Ray knows all hosts; where that fails, nothing is left.

        Raises:
            InputError: this is not root, a program is missing, or the name is taken.
            RunError: a part did not start.
        """
        require_root()
        if not re.fullmatch("[a-z][a-z0-9]{0,11}", name):
            raise InputError(f"--name {name}: a name has up to 12 small letters and digits and begins with a letter")
        made = cls(name, f"{name}-{secrets.token_hex(3)}", cpus)
        made._claim()
        try:
            made.folder.mkdir(mode=0o700)
            ray_node.write_token(made.token_file, secrets.token_hex(32))
            made.network.create()
            made = made._with_store()
            made._start_head()
            for _ in range(hosts):
                made._boot()
            made._until(lambda: len(made.ray_nodes()) == hosts + 1, "not all hosts joined the cluster", "head")
        except BaseException:
            made.down()
            raise
        return made

    @classmethod
    def of(cls, name: str) -> "Hosts":
        """The hosts that were started under this name. Raises InputError where there are none."""
        require_root()
        try:
            return cls(**json.loads(_state(name).read_text()))
        except FileNotFoundError:
            raise InputError(f"no hosts named {name}: start them with `python -m cluster.local up --name {name}`") from None

    @property
    def network(self) -> Network:
        return Network(self.prefix)

    @property
    def folder(self) -> Path:
        """Logs, the token, and Ray's own files; short, see ray_node.command."""
        return Path("/tmp", self.prefix)

    @property
    def token_file(self) -> Path:
        return self.folder / "token"

    def environment(self) -> dict[str, str]:
        """For nodes, and for clients inside the namespaces, where no proxy and no other store can be reached."""
        foreign = ("AWS_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        base = {name: value for name, value in os.environ.items() if not name.upper().startswith(foreign)}
        interface = {"GLOO_SOCKET_IFNAME": INTERFACE, "NCCL_SOCKET_IFNAME": INTERFACE}
        return ray_node.environment(self.token_file, base) | DETECTION | interface | self.exports()

    def exports(self) -> dict[str, str]:
        """What leads a client to the cluster and to the store."""
        return {"RAY_API_SERVER_ADDRESS": JOBS, **ray_node.credentials(self.token_file), **self.store}

    def addresses(self) -> dict[str, str]:
        """Address by host, killed ones too."""
        return {host: self._address(host) for host in self.network.hosts()}

    def add(self) -> str:
        """Start one more host; returns its name once Ray knows it."""
        host = self._boot()
        self._until(lambda: self._address(host) in self.ray_nodes().values(), f"{host} did not join the cluster", host)
        return host

    def cut(self, host: str) -> None:
        """Cut the host's link; Ray takes it for dead after about 9 s."""
        self.network.cut(self._known(host))

    def mend(self, host: str) -> None:
        """Mend the link. A node that Ray has given up by then starts anew by itself, within about 10 s."""
        if not self.network.alive(self._known(host)):
            raise InputError(f"{host} was killed, so its link is not all that it lacks: add another host")
        self.network.mend(host)

    def kill(self, host: str) -> None:
        """End all processes of the host at once, after its link was cut."""
        self.network.kill(self._known(host))

    def announce(self, host: str, seconds: int) -> None:
        """Tell Ray that the host will be taken away in so many seconds, as a cloud does with a spot instance; it is not.

        Raises:
            RunError: Ray does not know the host, or refuses.
        """
        address = self._address(self._known(host))
        try:
            nodes = self.ray_nodes()
        except OSError as error:
            raise RunError(f"the head does not answer: {error}") from None
        node = next((node for node, place in nodes.items() if place == address), None)
        if node is None:
            raise RunError(f"{host} is no living node of the cluster")
        why = ["--reason=DRAIN_NODE_REASON_PREEMPTION", f"--reason-message={host} is taken away"]
        command = [*ray_node.RAY, "drain-node", f"--address={GCS}", f"--node-id={node}", *why]
        command.append(f"--deadline-remaining-seconds={seconds}")
        try:
            with self.inside("head"):
                done = subprocess.run(command, env=self.environment(), capture_output=True, text=True, timeout=60)
        except subprocess.TimeoutExpired:
            raise RunError(f"{host} cannot be announced to go: the head does not answer") from None
        if done.returncode != 0:
            raise RunError(f"{host} cannot be announced to go: {(done.stdout + done.stderr).strip()[-1000:]}")

    @contextlib.contextmanager
    def inside(self, host: str) -> Iterator[None]:
        """What this thread connects to or starts meanwhile is on the host."""
        with self.network.inside(self._known(host)):
            yield

    def ray_nodes(self) -> dict[str, str]:
        """Address by id of the nodes that Ray takes for alive, the head among them."""
        with self.inside("head"):
            answer = ray_node.ask(f"{JOBS}/api/v0/nodes?detail=true", self.token_file.read_text())
        return {node["node_id"]: node["node_ip"] for node in answer["data"]["result"]["result"] if node["state"] == "ALIVE"}

    def down(self) -> None:
        """End and remove everything; also what a crash has left."""
        self.network.remove()
        shutil.rmtree(self.folder, ignore_errors=True)
        for socket in self.sockets:
            Path(socket).unlink(missing_ok=True)
        _state(self.name).unlink(missing_ok=True)

    def _known(self, host: str) -> str:
        known = self.network.hosts()
        if host not in known:
            raise InputError(f"no host {host}: there are {', '.join(sorted(known))}")
        return host

    def _claim(self) -> None:
        """Write the state file before anything is made: what it names can be removed, whatever happens."""
        try:
            with _state(self.name).open("x") as stream:
                os.fchmod(stream.fileno(), 0o600)
                json.dump(asdict(self), stream)
        except FileExistsError:
            end = f"python -m cluster.local down --name {self.name}"
            raise InputError(f"the name {self.name} is taken: end its hosts with `{end}`, or give another --name") from None

    def _with_store(self) -> "Hosts":
        self.network.add("s3", f"{STORE}/24")
        with self.inside("s3"):
            server = SeaweedServer(STORE, self.folder)
            try:
                server.start()
            except RuntimeError as error:
                raise RunError(str(error)) from None
            server.create_bucket(BUCKET)
        store = server.env() | {"AWS_EC2_METADATA_DISABLED": "true"}
        complete = replace(self, store=store, sockets=tuple(server.sockets))
        _state(self.name).write_text(json.dumps(asdict(complete)))
        return complete

    def _start_head(self) -> None:
        self.network.add("head", f"{HEAD}/24")
        role = ["--head", "--port=6379", f"--dashboard-host={HEAD}", "--dashboard-port=8265", "--include-dashboard=true"]
        role.append(f"--temp-dir={self.folder / 'head'}")
        self._start("head", [], 0, *role)
        token = self.token_file.read_text()
        with self.inside("head"):
            self._until(lambda: ray_node.answers(JOBS, token), "the Ray head did not start", "head")

    def _boot(self) -> str:
        numbers = [int(host.removeprefix("host")) for host in self.network.hosts() if host.startswith("host")]
        host = f"host{max(numbers, default=0) + 1}"
        self.network.add(host, f"{self._address(host)}/24")
        self._start(host, _AGAIN, self.cpus, f"--address={GCS}")
        return host

    def _start(self, host: str, before: list[str], cpus: int, *role: str) -> None:
        folder = self.folder / host
        folder.mkdir()
        # /dev/shm is shared by all hosts.
        command = ray_node.command(self._address(host), cpus, *role, f"--object-store-memory={100 * 2**20}")
        with self._log(host).open("ab") as stream, self.inside(host):
            subprocess.Popen(
                [*before, *command],
                env=self.environment(),
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _until(self, ready: Callable[[], bool], what: str, host: str, timeout: float = 90) -> None:
        """Wait until `ready`; RunError with the end of the host's log where its processes ended or the time is over."""
        deadline = time.monotonic() + timeout
        while True:
            with contextlib.suppress(OSError):  # the job server does not answer yet
                if ready():
                    return
            if time.monotonic() > deadline or not self.network.alive(host):
                raise RunError(f"{what}: {self._log(host).read_text(errors='replace').strip()[-3000:]}")
            time.sleep(0.5)

    def _log(self, host: str) -> Path:
        return self.folder / f"{host}.log"

    def _address(self, host: str) -> str:
        if host.startswith("host"):
            return f"10.77.0.{10 + int(host.removeprefix('host'))}"
        return {"head": HEAD, "s3": STORE}[host]


def _state(name: str) -> Path:
    return Path("/run", f"ctrsink-{name}.json")
