"""A service in a process of its own, as `ctrsink serve` starts it, and a small client of it."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ctrsink.dataset.reader import Dataset
from ctrsink.export.package import export_run
from ctrsink.serve.requests import request_of
from tests.serving_fixtures import Prepared, prepared, run_spec, write_run

TOKEN = "CTRSINK_SERVE_TOKEN"
PATIENT = "queue.deadline_ms=120000"  # the machine may be busy with other tests


@dataclass(frozen=True)
class Exported:
    """Two models of one data set, and requests that both take."""

    folder: Path
    data: Prepared

    @property
    def models(self) -> tuple[str, str]:
        return str(self.folder / "a"), str(self.folder / "b")

    @property
    def requests(self) -> list[dict[str, Any]]:
        dataset = Dataset(self.data.uri)
        return [request_of(dataset, user, event, [0, 1, 2, 3]) for user in range(4) for event in range(3, 8)]


def exported(folder: Path) -> Exported:
    """Models with sinks and bias; their weights differ."""
    made = Exported(folder, prepared(folder))
    for step, model in enumerate(made.models, 5):
        spec = run_spec(made.data, f"{model}-run")
        write_run(spec, step)
        export_run(spec.run_dir, model)
    return made


@dataclass(frozen=True)
class Reply:
    """What came back over HTTP."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(port: int, path: str, tree: Any = None, headers: dict[str, str] | None = None, timeout: float = 60) -> Reply:
    """POST of `tree`, as JSON unless it is bytes; without one GET."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        body = tree if tree is None or isinstance(tree, bytes) else json.dumps(tree).encode()
        connection.request("GET" if tree is None else "POST", path, body, headers or {})
        answer = connection.getresponse()
        return Reply(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
    finally:
        connection.close()


class Serving:
    """`ctrsink serve ARGS --plain` on a free port, ready when the block begins and gone when it ends."""

    def __init__(self, *args: object, **environment: str) -> None:
        command = [sys.executable, "-m", "ctrsink", "serve", "--plain", "--port", "0", *map(str, args), PATIENT]
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.port = 0

    def __enter__(self) -> "Serving":
        try:
            self.port = int(self.told("listening on").rpartition(":")[2])
            self.told(" ready")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()

    def told(self, words: str, seconds: float = 500) -> str:
        """The first line of its log with these words, which is waited for."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for line in list(self.lines):
                if words in line:
                    return line
            if not self._reader.is_alive():
                break
            time.sleep(0.02)
        raise AssertionError(f"no line with {words!r}:\n" + "\n".join(self.lines))

    def score(self, tree: Any, timeout: float = 60, **headers: str) -> Reply:
        return ask(self.port, "/v1/score", tree, {name.replace("_", "-"): value for name, value in headers.items()}, timeout)

    def get(self, path: str, **headers: str) -> Reply:
        return ask(self.port, path, headers=headers)

    def metric(self, name: str) -> dict[str, float]:
        """Values of a metric by their labels as they stand on the page."""
        lines = self.get("/metrics").body.decode().splitlines()
        found = [line.removeprefix(f"ctrsink_serve_{name}") for line in lines if line.startswith(f"ctrsink_serve_{name}")]
        return {labels: float(value) for labels, _, value in (line.rpartition(" ") for line in found) if labels[:1] in ("", "{")}

    def end(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
