"""The cache of remote files: one download per node, a limit that holds, and nothing that a kill or a full disk can break."""

import errno
import fcntl
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.local.seaweed import SeaweedServer
from ctrsink import storage
from ctrsink.config.data import CacheSpec
from ctrsink.dataset.cache import Cache
from ctrsink.dataset.manifest import FileEntry
from ctrsink.errors import InputError
from tests.services.faulty_proxy import Fault, FaultyProxy

SIZE = 10_000


def entry_of(name: str, content: bytes) -> FileEntry:
    return FileEntry(path=name, bytes=len(content), sha256=storage.sha256(content))


def content_of(number: int, size: int = SIZE) -> bytes:
    return random.Random(number).randbytes(size)


@pytest.fixture(scope="module")
def uri(s3_server: SeaweedServer) -> str:
    """A folder of eight files."""
    place = f"s3://ctrsink-test/cache-{uuid.uuid4().hex}"
    for number in range(8):
        storage.write_bytes(f"{place}/{number}", content_of(number))
    return place


ENTRIES = [entry_of(str(number), content_of(number)) for number in range(8)]


def files_in(folder: Path) -> set[str]:
    return {p.name for p in (folder / "files").iterdir()}


def sizes_in(folder: Path) -> dict[Path, int]:
    """Bytes of each file, half-written ones included, in the folder of a cache that others change meanwhile."""
    sizes = {}
    for parent, _, names in os.walk(folder):
        for path in (Path(parent) / name for name in names if len(name) == 64):
            with suppress(FileNotFoundError):
                sizes[path] = path.stat().st_size
    return sizes


def size_of(folder: Path) -> int:
    return sum(sizes_in(folder).values())


def test_a_file_is_downloaded_once_and_the_one_used_longest_ago_makes_room(proxy: FaultyProxy, uri: str, tmp_path: Path) -> None:
    cache = Cache(tmp_path, 3 * SIZE)
    for number in (0, 1, 2, 0, 3, 0):
        assert cache.read(uri, ENTRIES[number]) == content_of(number)
    assert [proxy.count("GET", f"/{n}") for n in range(4)] == [1, 1, 1, 1]
    assert files_in(tmp_path) == {ENTRIES[n].sha256 for n in (0, 2, 3)}
    assert Cache(tmp_path, 3 * SIZE).read(uri, ENTRIES[2]) == content_of(2)
    assert proxy.count("GET", "/2") == 1
    Cache(tmp_path, SIZE).read(uri, ENTRIES[4])
    assert files_in(tmp_path) == {ENTRIES[4].sha256}


def test_what_the_cache_is_not_for(proxy: FaultyProxy, uri: str, tmp_path: Path) -> None:
    for cache in (Cache(tmp_path, 0), Cache(tmp_path, SIZE - 1)):
        assert cache.read(uri, ENTRIES[0]) == content_of(0)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "0").write_bytes(content_of(0))
    assert Cache(tmp_path, 10 * SIZE).read(str(tmp_path / "here"), ENTRIES[0]) == content_of(0)
    assert [p.name for p in tmp_path.iterdir()] == ["here"]


def test_files_of_equal_content_are_one(proxy: FaultyProxy, uri: str, tmp_path: Path) -> None:
    cache = Cache(tmp_path, 10 * SIZE)
    cache.read(uri, ENTRIES[0])
    other = ENTRIES[0].model_copy(update={"path": "elsewhere"})
    assert cache.read("s3://ctrsink-test/other-data-set", other) == content_of(0)


def test_a_damaged_file_is_downloaded_again(
    proxy: FaultyProxy, uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = Cache(tmp_path, 10 * SIZE)
    cache.read(uri, ENTRIES[0])
    path = tmp_path / "files" / ENTRIES[0].sha256
    for damage in (b"", b"x" * SIZE, content_of(0)[:-1]):
        path.write_bytes(damage)
        caplog.clear()
        assert cache.read(uri, ENTRIES[0]) == content_of(0)
        assert path.read_bytes() == content_of(0)
        assert [r.getMessage() for r in caplog.records] == [f"a file in the cache {tmp_path} is damaged: downloading 0 again"]


def test_a_wrong_remote_file_never_enters(proxy: FaultyProxy, uri: str, tmp_path: Path) -> None:
    cache = Cache(tmp_path, 10 * SIZE)
    with pytest.raises(InputError, match="altered"):
        cache.read(uri, ENTRIES[0].model_copy(update={"sha256": "0" * 64}))
    with pytest.raises(InputError, match="missing"):
        cache.read(uri, ENTRIES[0].model_copy(update={"path": "none", "sha256": "1" * 64}))
    assert not (tmp_path / "files").exists()


def test_a_folder_that_cannot_be_used_is_done_without(
    proxy: FaultyProxy, uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    cache = Cache(tmp_path / "file" / "below", 10 * SIZE)
    for number in (0, 1, 0):
        assert cache.read(uri, ENTRIES[number]) == content_of(number)
    (record,) = caplog.records
    assert record.getMessage() == f"the cache {tmp_path}/file/below cannot be used (Not a directory): reading without it"


FULL = """
import resource, signal, sys
from ctrsink.dataset.cache import Cache
from ctrsink.dataset.manifest import FileEntry
import logging
logging.basicConfig(format="%(message)s")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))  # as on a full disk: a write fails half-way
cache = Cache(sys.argv[1], 10**6)
for line in sys.argv[3:]:
    entry = FileEntry.model_validate_json(line)
    print(len(cache.read(sys.argv[2], entry)))
"""


def test_a_full_disk_is_done_without(proxy: FaultyProxy, uri: str, tmp_path: Path) -> None:
    lines = [entry.model_dump_json() for entry in ENTRIES[:3]]
    done = subprocess.run([sys.executable, "-c", FULL, tmp_path, uri, *lines], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(SIZE)] * 3
    assert done.stderr == f"the cache {tmp_path} cannot be used (File too large): reading without it\n"
    assert size_of(tmp_path) == 0


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_done_without(
    proxy: FaultyProxy, uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(handle: int, operation: int) -> None:  # as some network disks do, of which there is none here
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    cache = Cache(tmp_path, 10 * SIZE)
    for file in (0, 1, 0):
        assert cache.read(uri, ENTRIES[file]) == content_of(file)
    (record,) = caplog.records
    assert record.getMessage() == f"the cache {tmp_path} cannot be used ({os.strerror(number)}): reading without it"
    assert size_of(tmp_path) == 0


def test_a_lost_note_of_the_size_is_made_good(proxy: FaultyProxy, uri: str, tmp_path: Path) -> None:
    for damage in (b"", b"x", b"999999999"):
        for number in range(4):
            Cache(tmp_path, 2 * SIZE).read(uri, ENTRIES[number])
            (tmp_path / "bytes").write_bytes(damage)
        assert files_in(tmp_path) == {ENTRIES[n].sha256 for n in (2, 3)}


def test_many_files_make_room_for_several(proxy: FaultyProxy, uri: str, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    for number in range(100):
        (tmp_path / "files" / f"{number:064x}").write_bytes(bytes(SIZE // 10))
        os.utime(tmp_path / "files" / f"{number:064x}", (number, number))
    Cache(tmp_path, 10 * SIZE).read(uri, ENTRIES[0])
    assert files_in(tmp_path) == {f"{number:064x}" for number in range(10, 100)} | {ENTRIES[0].sha256}
    Cache(tmp_path, 10 * SIZE).read(uri, ENTRIES[1].model_copy(update={"bytes": SIZE}))
    assert size_of(tmp_path) <= 10 * SIZE


def test_files_of_others_in_the_folder_are_left_alone(proxy: FaultyProxy, uri: str, tmp_path: Path) -> None:
    kept = [tmp_path / folder / "notes.txt" for folder in ("files", "partial", "locks", "")]
    for path in kept:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"mine")
    cache = Cache(tmp_path, SIZE)
    for number in range(3):
        cache.read(uri, ENTRIES[number])
    assert all(path.read_bytes() == b"mine" for path in kept)


READER = """
import sys
from ctrsink.dataset.cache import Cache
from ctrsink.dataset.manifest import FileEntry
cache = Cache(sys.argv[1], int(sys.argv[2]))
print("ready", flush=True)
sys.stdin.readline()
for line in sys.argv[4:]:
    entry = FileEntry.model_validate_json(line)
    cache.read(sys.argv[3], entry)
print("done", flush=True)
"""


def reader(folder: Path, limit: int, uri: str, entries: list[FileEntry]) -> subprocess.Popen[str]:
    """A process that has imported everything and reads the files once it is sent a line."""
    command = [sys.executable, "-c", READER, str(folder), str(limit), uri, *(e.model_dump_json() for e in entries)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def begin(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def test_processes_that_read_the_same_files_download_each_once(proxy: FaultyProxy, uri: str, tmp_path: Path) -> None:
    proxy.plant(Fault("slow", rate=100_000))  # a tenth of a second for each: long enough to meet
    processes = [reader(tmp_path, 8 * SIZE, uri, ENTRIES if n % 2 else ENTRIES[::-1]) for n in range(4)]
    for process in processes:
        begin(process)
    assert [process.wait(60) for process in processes] == [0] * 4
    assert [proxy.count("GET", f"/{n}") for n in range(8)] == [1] * 8
    assert files_in(tmp_path) == {entry.sha256 for entry in ENTRIES}


def test_a_process_killed_while_it_downloads_is_in_nobodys_way(proxy: FaultyProxy, uri: str, tmp_path: Path) -> None:
    proxy.plant(Fault("slow", rate=500, times=1))
    process = reader(tmp_path, 8 * SIZE, uri, ENTRIES[:1])
    begin(process)
    while proxy.count("GET", "/0") == 0:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # What one leaves that was killed while it wrote, which is too short a moment to hit.
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / ENTRIES[0].sha256).write_bytes(content_of(0)[:77])
    cache = Cache(tmp_path, 8 * SIZE)
    assert cache.read(uri, ENTRIES[0]) == content_of(0)
    assert files_in(tmp_path) == {ENTRIES[0].sha256}
    assert list((tmp_path / "partial").iterdir()) == []


def test_a_cache_travels_to_another_process_as_its_place_and_limit(proxy: FaultyProxy, uri: str, tmp_path: Path) -> None:
    cache = Cache(tmp_path, 8 * SIZE)
    assert cache.read(uri, ENTRIES[0]) == content_of(0)
    copy = pickle.loads(pickle.dumps(cache))  # noqa: S301
    assert copy.read(uri, ENTRIES[0]) == content_of(0)
    assert proxy.count("GET", "/0") == 1


def test_the_default_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, proxy: FaultyProxy, uri: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    Cache.of(CacheSpec()).read(uri, ENTRIES[0])
    assert files_in(tmp_path / "xdg" / "ctrsink") == {ENTRIES[0].sha256}
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    Cache.of(CacheSpec(limit_mib=1)).read(uri, ENTRIES[1])
    assert files_in(tmp_path / "home" / ".cache" / "ctrsink") == {ENTRIES[1].sha256}
    Cache.of(CacheSpec(dir=str(tmp_path / "own"))).read(uri, ENTRIES[2])
    assert files_in(tmp_path / "own") == {ENTRIES[2].sha256}


@given(order=st.lists(st.integers(0, 7), max_size=12), limit=st.integers(0, 9 * SIZE))
def test_any_order_of_reads_gives_the_content_within_the_limit(
    uri: str, tmp_path_factory: pytest.TempPathFactory, order: list[int], limit: int
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    cache = Cache(folder, limit)
    for number in order:
        assert cache.read(uri, ENTRIES[number]) == content_of(number)
        assert size_of(folder) <= limit


def peak_while(processes: list[subprocess.Popen[str]], folder: Path) -> int:
    """Largest size of the folder in bytes, sampled until all processes have ended well."""
    peak = 0
    for process in processes:
        begin(process)
    while any(process.poll() is None for process in processes):
        before, after = sizes_in(folder), sizes_in(folder)
        if before == after:  # or else a file that moved may have been counted twice, and one that was removed still
            peak = max(peak, sum(after.values()))
        time.sleep(0.002)
    assert [process.returncode for process in processes] == [0] * len(processes)
    return peak


def test_the_limit_holds_while_several_processes_read_more(proxy: FaultyProxy, uri: str, tmp_path: Path) -> None:
    processes = [reader(tmp_path, 3 * SIZE, uri, random.Random(n).choices(ENTRIES, k=40)) for n in range(2)]
    limit = 3 * SIZE
    assert limit - SIZE <= peak_while(processes, tmp_path) <= limit + SIZE


@pytest.mark.slow
def test_64_mib_hold_while_a_gib_is_read(s3_server: SeaweedServer, tmp_path: Path) -> None:
    place, size, entries = f"s3://ctrsink-test/cache-{uuid.uuid4().hex}", 8 * 2**20, []
    for number in range(128):
        content = os.urandom(size)
        entries.append(entry_of(str(number), content))
        storage.write_bytes(f"{place}/{number}", content)
    processes = [reader(tmp_path, 64 * 2**20, place, entries[n:] + entries[:n]) for n in (0, 3)]
    peak = peak_while(processes, tmp_path)
    storage.delete(place)
    print(f"peak {peak / 2**20:.1f} MiB")
    assert 56 * 2**20 <= peak <= 72 * 2**20
