"""What a user sees: messages of ctrsink and nothing else; what its libraries say is in a file, or shown when asked for."""

import logging
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import yaml

from ctrsink import logs, terminal
from ctrsink.runtime import library_log
from tests.command_line import Result, call, good, refused
from tests.runs import prepared_data, run_tree
from tests.services.ray_cluster import RayCluster

OURS = re.compile(r"\d\d:\d\d:\d\d (INFO|WARNING|ERROR) ")
FOREIGN = re.compile(r"\((RayTrainWorker|TrainController) pid=\d+")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a run of two steps."""
    folder = tmp_path_factory.mktemp("quiet")
    tree = run_tree(prepared_data(str(folder / "data")), str(folder / "run"))
    for stage in tree["stages"]:
        stage["steps"] = 1
    (folder / "run.yaml").write_text(yaml.safe_dump(tree | {"evaluate": {"splits": ["valid"]}}))
    return folder / "run.yaml"


def train_on(cluster: RayCluster, config: Path, *more: str) -> Result:
    place = ["runtime.kind=ray", "runtime.workers=2", f"runtime.address={cluster.gcs_address}"]
    command = [sys.executable, "-m", "ctrsink", "train", "--config", str(config), *place, *more]
    environment = os.environ | cluster.env() | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    return Result(done.returncode, done.stdout, done.stderr)


def test_training_on_ray_shows_its_own_lines_alone(config: Path, tmp_path: Path, ray_cluster: RayCluster) -> None:
    run = tmp_path / "run"
    done = train_on(ray_cluster, config, f"run_dir={run}", "--json")
    assert done.code == 0, done.err
    assert done.json["steps"] == 2
    assert done.out.count("\n") == 1
    lines = done.err.splitlines()
    assert [line for line in lines if not OURS.match(line)] == []
    assert [line.partition(" INFO ")[2] for line in lines if "libraries" in line] == [
        f"what libraries say is in {run}/libraries.log; --verbose shows it here"
    ]
    # The workers' own messages have come through, each once.
    assert [sum(f"INFO step {step}/2 " in line for line in lines) for step in (1, 2)] == [1, 1]
    assert sum("WARNING the run makes 2 optimiser steps" in line for line in lines) == 1
    kept = (run / "libraries.log").read_text()
    assert FOREIGN.search(kept)
    assert terminal.MARK not in kept
    assert "INFO step 1/2 " not in kept

    verbose = train_on(ray_cluster, config, f"run_dir={tmp_path}/other", "--verbose")
    assert verbose.code == 0, verbose.err
    assert FOREIGN.search(verbose.err)
    assert "INFO step 1/2 " in verbose.err
    assert terminal.MARK not in verbose.err
    assert not (tmp_path / "other" / "libraries.log").exists()

    again = train_on(ray_cluster, config, f"run_dir={run}")
    refused(again, f"{run} ")
    assert len(again.err.splitlines()) == 1


def test_what_is_written_by_any_means_goes_into_the_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    told: list[str] = []
    with terminal.quiet(told.append) as held:
        print("print")
        print("error", file=sys.stderr)
        os.write(1, b"descriptor 1\n")
        subprocess.run([sys.executable, "-c", "import sys; sys.stderr.write('another process\\n')"], check=True)
        print(f"(Worker pid=1) {terminal.MARK}one\n(Worker pid=2) {terminal.MARK}two", file=sys.stderr)
        print("result", file=terminal.out())
        print("message", file=terminal.err())
        temporary = held.path
        with terminal.kept_in(tmp_path / "runs" / "a.log") as here:
            assert here
            assert not temporary.exists()
            print("in a")
        with terminal.kept_in(tmp_path / "b.log"):
            pass
        with terminal.quiet(told.append), terminal.kept_in(tmp_path / "a.log"):
            print("in the other")
    assert told == ["one", "two"]
    seen = capfd.readouterr()
    assert (seen.out, seen.err) == ("result\n", "message\n")
    kept = (tmp_path / "runs" / "a.log").read_text()
    assert [word for word in ("print\n", "error\n", "descriptor 1\n", "another process\n", "in a\n") if word not in kept] == []
    assert (tmp_path / "a.log").read_text() == "in the other\n"
    assert not (tmp_path / "b.log").exists()
    assert not held.path.exists()
    print("back")
    assert capfd.readouterr().out == "back\n"


def test_what_was_said_before_a_failure_is_kept_and_the_error_comes_last(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)

    def fails(*args: object) -> None:
        print("the library's last words")
        raise OSError("no such luck")

    monkeypatch.setattr("ctrsink.runtime.start._train", fails)
    run = tmp_path / "run"
    failed = call("train", "--config", config, f"run_dir={run}")
    assert failed.code == 1
    assert failed.err.splitlines()[-1] == "error: OSError: no such luck"
    (path,) = re.findall(r"what libraries said is in (\S+)", failed.err)
    assert Path(path).read_text() == "the library's last words\n"
    assert not run.exists()
    Path(path).unlink()
    assert "the library's last words" in call("--verbose", "train", "--config", config, f"run_dir={run}").out
    refused(call("train", "--config", config, f"run_dir={run}", "data.uri=/none"), "/none")
    assert not list(tmp_path.glob("ctrsink-*"))
    assert not run.exists()


def test_local_runs_and_prepared_data_leave_no_empty_file(config: Path, tmp_path: Path) -> None:
    good("train", "--config", config, f"run_dir={tmp_path}/run")
    path = tmp_path / "run" / "libraries.log"
    assert not path.exists() or path.stat().st_size


def test_the_real_error_comes_though_somebody_deleted_the_file(tmp_path: Path) -> None:
    before = sys.stdout, sys.stderr

    def fails() -> None:
        with terminal.quiet(print) as held:
            held.path.unlink()
            assert terminal.keep() is None
            with terminal.kept_in(tmp_path / "a.log"):
                (tmp_path / "a.log").unlink()
            held.path.unlink()
            raise RuntimeError("the real reason")

    with pytest.raises(RuntimeError, match="the real reason"):
        fails()
    assert (sys.stdout, sys.stderr) == before


def test_of_a_run_on_s3_that_made_no_step_it_is_kept_here(monkeypatch: pytest.MonkeyPatch) -> None:
    gone: list[str] = []
    monkeypatch.setattr("ctrsink.storage.read_bytes", lambda uri: uri.encode())
    monkeypatch.setattr("ctrsink.storage.delete", gone.append)
    with terminal.quiet(print):
        library_log.take_back("s3://b/run")
        path = terminal.keep()
    assert path is not None
    assert path.read_text() == gone[0] == "s3://b/run/libraries.log"
    path.unlink()


def test_the_terminal_stays_quiet_until_the_process_ends(tmp_path: Path) -> None:
    program = (
        "import atexit, os, sys; from ctrsink import cli, terminal\n"
        "atexit.register(lambda: (os.write(1, b'at the end'), print('at the end'), print('ours', file=terminal.err())))\n"
        "sys.exit(cli.main())\n"
    )
    command = [sys.executable, "-c", program, "score", "--model", tmp_path / "none", "--input", tmp_path / "none.jsonl"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[1:] == ["ours"]


BAR = """
import logging
from ctrsink import logs
logs.configure()
log = logging.getLogger("ctrsink.test")
for share in (0.25, 0.5):
    log.info("read %d rows", share * 100, extra={"progress": ("read", share)})
log.warning("look here")
log.info("read 75 rows", extra={"progress": ("read", 0.75)})
log.info("read 100 rows in 1 s", extra={"progress": ("read", 1.0)})
log.info("bye")
"""


def test_progress_stays_in_its_place_on_a_terminal_alone() -> None:
    piped = subprocess.run([sys.executable, "-c", BAR], capture_output=True, text=True, check=True).stderr
    whole = "INFO read 100 rows in 1 s"
    assert [line[9:] for line in piped.splitlines()] == [
        "INFO read 25 rows", "INFO read 50 rows", "WARNING look here", "INFO read 75 rows", whole, "INFO bye",
    ]  # fmt: skip
    user, process = pty.openpty()
    termios.tcsetwinsize(process, (24, 100))
    subprocess.run([sys.executable, "-c", BAR], stderr=process, check=True)
    os.close(process)
    shown = b""
    try:
        while piece := os.read(user, 65536):
            shown += piece
    except OSError:  # the end of a terminal
        os.close(user)
    text = shown.decode()
    for share in (25, 50, 75):
        assert re.search(rf"\rread {share} rows \|.+\| +{share} %", text)
    lines = [re.sub(r".*\r(?=.)", "", line).strip() for line in re.sub(r"\x1b\[[A-Z]", "", text).split("\n")]
    assert [line[9:] for line in lines if OURS.match(line)] == ["WARNING look here", whole, "INFO bye"]


def test_a_workers_message_is_the_same_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(logs.FORMAT_VARIABLE, logs.RELAYED)
    logs.configure(rank=2)
    log = logging.getLogger("ctrsink.train")
    log.warning("100 %% of\n%s", "it", extra={"fields": {"loss": 0.5}})
    try:
        raise ValueError("why")
    except ValueError:
        log.exception("that")
    sent = capsys.readouterr().err.splitlines()
    assert all(line.startswith(terminal.MARK) for line in sent)
    monkeypatch.delenv(logs.FORMAT_VARIABLE)
    logs.configure()
    for line in sent:
        logs.relay(line.removeprefix(terminal.MARK) + " [repeated 2x across cluster]")
    shown = capsys.readouterr().err
    assert re.match(r"\d\d:\d\d:\d\d WARNING 100 % of\nit \(rank 2\)\n", shown)
    assert "ERROR that\nTraceback" in shown
    assert "ValueError: why" in shown
