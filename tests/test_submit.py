"""What `ctrsink submit` sends, to whom, and whose fault it says a failure is; the job server is a small one of this test."""

import io
import json
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ray
import yaml

from tests.command_line import call, refused
from tests.runs import run_tree


class JobServer(BaseHTTPRequestHandler):
    """Takes a package and answers as it was told to."""

    answers: dict[str, tuple[int, str]] = {}  # noqa: RUF012 - shared by all requests on purpose
    sent: list[bytes] = []  # noqa: RUF012

    def do_GET(self) -> None:
        version = json.dumps({"version": "4", "ray_version": ray.__version__, "ray_commit": "x", "session_name": "s"})
        self._answer(*self.answers.get("version" if "version" in self.path else "package", (200, version)))

    def do_PUT(self) -> None:
        self.sent.append(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer(200, "")

    def do_POST(self) -> None:
        self.sent.append(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer(*self.answers["job"])

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        del format, args


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    listening = ThreadingHTTPServer(("127.0.0.1", 0), JobServer)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    JobServer.answers = {"package": (404, ""), "job": (500, "no room")}
    JobServer.sent = []
    yield f"http://127.0.0.1:{listening.server_port}"
    listening.shutdown()
    listening.server_close()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    path = tmp_path / "work" / "run.yaml"
    path.write_text(yaml.safe_dump(run_tree("s3://bucket/data", "s3://bucket/run")))
    return path


def submit(config: Path, address: str) -> list[object]:
    place = ["--working-dir", config.parent, "--address", address]
    return ["submit", "--config", config, *place, "--allow-unauthenticated"]


def test_neither_credentials_nor_what_is_behind_a_link_is_sent(config: Path, server: str, tmp_path: Path) -> None:
    work = config.parent
    secret = tmp_path / "elsewhere"
    secret.mkdir()
    (secret / "key").write_text("SECRET")
    for name in (".env", ".env.local", ".aws/credentials", "sub/.aws/config", "sub/.netrc", ".ssh/id", "id_rsa", "a/tls.pem"):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text("SECRET")
    (work / "odd [a]*!# name").symlink_to(secret / "key")
    (work / "sub" / "folder").symlink_to(secret)
    for name in ("sub/kept.txt", "odd a name", "environment.env.py"):
        (work / name).write_text("kept")
    result = call(*submit(config, server))
    assert result.code == 1
    assert "stays here (links): odd [a]*!# name, sub/folder" in result.err
    assert "stays here (credentials): .aws, .env, .env.local, .ssh, a/tls.pem, id_rsa, sub/.aws, sub/.netrc" in result.err
    with zipfile.ZipFile(io.BytesIO(JobServer.sent[0])) as package:
        files = {name: package.read(name) for name in package.namelist() if not name.endswith("/")}
    assert set(files) == {"run.yaml", "sub/kept.txt", "odd a name", "environment.env.py"}
    assert not any(b"SECRET" in content for content in files.values())


def test_the_address_that_is_given_is_the_one_that_is_asked(config: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    result = call(*submit(config, server))
    assert f"the job server at {server} did not take the job: " in result.err
    assert len(JobServer.sent) == 2


@pytest.mark.parametrize("which", ["version", "package", "job"])
@pytest.mark.parametrize(("status", "code"), [(500, 1), (503, 1), (400, 2), (403, 2)])
def test_a_failure_of_the_server_is_not_the_users(config: Path, server: str, which: str, status: int, code: int) -> None:
    JobServer.answers[which] = (status, "for a reason")
    result = call(*submit(config, server))
    assert result.code == code, result.err
    assert "Traceback" not in result.err
    assert result.err.splitlines()[-1].startswith(f"error: the job server at {server} did not take the job: ")


def test_a_server_that_is_no_job_server(config: Path, server: str) -> None:
    JobServer.answers["version"] = (200, "<html>")
    refused(call(*submit(config, server)), f"the job server at {server} did not take the job")


def test_a_job_that_cannot_be_followed_is_named(config: Path, server: str) -> None:
    JobServer.answers["job"] = (200, json.dumps({"job_id": "j1", "submission_id": "j1"}))
    result = call(*submit(config, server))
    assert result.code == 1
    assert "Traceback" not in result.err
    assert result.err.splitlines()[-1].startswith(f"error: job j1 on {server} can be followed no longer (")
    assert "`ray job logs j1`" in result.err


def test_a_server_that_takes_jobs_from_anybody_is_refused(config: Path, server: str) -> None:
    JobServer.answers["package"] = (200, "[]")  # what is neither of the version nor sent
    refused(call(*submit(config, server)[:-1]), f"the job server at {server} asks for no token", "--allow-unauthenticated")
    assert JobServer.sent == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("run_dir=runs/a", "run_dir runs/a is a path in the job's own folder"),
        ("data.uri=runs/data", "data.uri runs/data is a path in the job's own folder"),
    ],
)
def test_a_place_that_would_be_removed_with_the_job_is_refused(config: Path, server: str, change: str, said: str) -> None:
    refused(call(*submit(config, server), change), said, "give s3://BUCKET/KEY, or an absolute path")
    assert JobServer.sent == []


def test_a_password_in_the_address_is_refused_and_not_repeated(config: Path) -> None:
    assert "SECRET" not in refused(call(*submit(config, "http://me:SECRET@127.0.0.1:1")), "--address holds a user or a password")


@pytest.mark.parametrize(
    "address", ["127.0.0.1:8265", "ray://127.0.0.1:10001", "auto", "http://", "http://h:port", "http://[::1"]
)
def test_an_address_that_is_no_url_is_said_to_be_none(config: Path, address: str) -> None:
    refused(call(*submit(config, address)), f"--address '{address}' is no URL of a job server: give one such as http://HOST:8265")


def test_a_server_that_is_not_there_is_told_of_at_once(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    began = time.monotonic()
    refused(call(*submit(config, "http://127.0.0.1:9")), "the job server at http://127.0.0.1:9 cannot be reached: ")
    assert time.monotonic() - began < 5


def test_neither_git_nor_the_image_takes_credentials_up(repository: Path) -> None:
    ignored = (repository / ".gitignore").read_text().splitlines()
    assert {".env", ".env.*", ".aws/", ".netrc", ".ssh/", "*.key", "*.pem"} <= set(ignored)
    # The last pattern that fits decides, and these stand behind the folders that the image gets.
    hidden = (repository / ".dockerignore").read_text().splitlines()
    assert hidden.index("**/.env") > max(number for number, line in enumerate(hidden) if line.startswith("!"))
    assert {"**/.env", "**/.env.*", "**/.aws", "**/.netrc", "**/.ssh"} <= set(hidden)
