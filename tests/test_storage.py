"""Storage on local disk and on a real S3 server: what is written is read, and what fails says why in one line."""

import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fsspec.asyn import sync

from cluster.local.seaweed import SeaweedServer
from ctrsink import storage
from ctrsink.errors import InputError, RunError
from ctrsink.storage.s3 import connect


@pytest.fixture(params=["plain", "file", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place of every kind."""
    if request.param == "s3":
        request.getfixturevalue("s3_server")
        return f"s3://ctrsink-test/{uuid.uuid4().hex}"
    return str(tmp_path / "data") if request.param == "plain" else f"file://{tmp_path}/data"


def test_what_is_written_is_read_listed_and_deleted(folder: str) -> None:
    uri = storage.join(folder, "a", "x.bin")
    assert not storage.exists(uri)
    assert storage.list_files(folder) == storage.list_dirs(folder) == []
    storage.write_bytes(uri, b"one")
    storage.write_bytes(uri, b"two")
    storage.write_bytes(storage.join(folder, "a", "c", "y"), b"")
    storage.write_bytes(storage.join(folder, "ab"), b"neighbour")
    assert storage.read_bytes(uri) == b"two"
    assert storage.exists(uri)
    assert storage.exists(storage.join(folder, "a"))
    assert storage.list_files(storage.join(folder, "a")) == ["x.bin"]
    assert storage.list_dirs(storage.join(folder, "a")) == ["c"]
    storage.delete(storage.join(folder, "a"))
    assert not storage.exists(uri)
    assert not storage.exists(storage.join(folder, "a"))
    assert storage.read_bytes(storage.join(folder, "ab")) == b"neighbour"
    storage.delete(storage.join(folder, "never"))


def test_a_file_is_created_once(folder: str) -> None:
    uri = storage.join(folder, "in", "x")
    assert storage.create(uri, b"first")
    assert not storage.create(uri, b"second")
    assert storage.read_bytes(uri) == b"first"
    assert storage.list_files(storage.join(folder, "in")) == ["x"]


def test_a_file_is_written_in_pieces_whole_or_not_at_all(folder: str) -> None:
    uri = f"{folder}/deep/in/pieces"
    with storage.writing(uri) as write:
        for piece in (b"one", memoryview(b"two"), b""):
            write(piece)
    assert storage.read_bytes(uri) == b"onetwo"
    with pytest.raises(TypeError), storage.writing(uri) as write:
        list(map(write, (b"half", None)))  # pyright: ignore[reportArgumentType]
    assert storage.read_bytes(uri) == b"onetwo"
    assert storage.list_files(f"{folder}/deep/in") == ["pieces"]


def test_a_file_is_copied_here(folder: str, tmp_path: Path) -> None:
    storage.write_bytes(storage.join(folder, "x"), b"content")
    storage.download(storage.join(folder, "x"), tmp_path / "new" / "y")
    assert (tmp_path / "new" / "y").read_bytes() == b"content"
    with pytest.raises(FileNotFoundError):
        storage.download(storage.join(folder, "z"), tmp_path / "z")
    assert not (tmp_path / "z").exists()


def test_files_are_found_with_size_and_version(folder: str) -> None:
    assert storage.find(folder) == []
    for name, content in {"b": b"123", "a/.hidden": b"", "a-b": b"1"}.items():
        storage.write_bytes(storage.join(folder, "in", name), content)
    storage.write_bytes(storage.join(folder, "into"), b"neighbour")
    found = storage.find(storage.join(folder, "in"))
    assert [(one.path, one.bytes) for one in found] == [("a-b", 1), ("a/.hidden", 0), ("b", 3)]
    assert storage.info(storage.join(folder, "in", "b")) == found[2]
    assert storage.info(storage.join(folder, "in", "a", ".hidden")).path == ".hidden"
    storage.write_bytes(storage.join(folder, "in", "b"), b"321")
    assert storage.info(storage.join(folder, "in", "b")).version != found[2].version


@pytest.mark.parametrize(("start", "end"), [(0, 0), (0, 3), (2, 5), (3, 99), (5, 9), (99, 100), (4, 2)])
def test_a_range_ends_with_the_file(folder: str, start: int, end: int) -> None:
    storage.write_bytes(storage.join(folder, "x"), b"01234")
    storage.write_bytes(storage.join(folder, "empty"), b"")
    assert storage.read_range(storage.join(folder, "x"), start, end) == b"01234"[start:end]
    assert storage.read_range(storage.join(folder, "empty"), start, end) == b""


def test_missing_file_is_file_not_found(folder: str) -> None:
    for name in ("nothing", ""):
        with pytest.raises(FileNotFoundError):
            storage.info(storage.join(folder, name))
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(folder, "nothing"))
    with pytest.raises(FileNotFoundError):
        storage.read_range(storage.join(folder, "nothing"), 0, 1)
    with pytest.raises(FileNotFoundError):
        storage.download_dir(storage.join(folder, "nothing"), "unused")


def test_folders_travel_both_ways(folder: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep" / "er").mkdir(parents=True)
    (source / "top").write_bytes(b"1")
    (source / "deep" / "er" / "leaf").write_bytes(b"2")
    storage.upload_dir(source, storage.join(folder, "copy"))
    storage.write_bytes(storage.join(folder, "copy-not-mine"), b"3")
    storage.download_dir(storage.join(folder, "copy"), tmp_path / "back")
    found = {p.relative_to(tmp_path / "back").as_posix(): p.read_bytes() for p in (tmp_path / "back").rglob("*") if p.is_file()}
    assert found == {"top": b"1", "deep/er/leaf": b"2"}


def test_threads_share_storage(folder: str) -> None:
    def there_and_back(number: int) -> bytes:
        uri = storage.join(folder, f"{number}")
        storage.write_bytes(uri, str(number).encode())
        return storage.read_bytes(uri)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(there_and_back, range(20))) == [str(n).encode() for n in range(20)]


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    uri = str(tmp_path / "x")
    storage.write_bytes(uri, b"old")
    with pytest.raises(TypeError):
        storage.write_bytes(uri, "not bytes")  # pyright: ignore[reportArgumentType]
    assert storage.read_bytes(uri) == b"old"
    assert storage.list_files(str(tmp_path)) == ["x"]


def test_local_mistakes_are_input_errors(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for uri in (str(tmp_path), "gs://bucket/key"):
        with pytest.raises(InputError, match=uri):
            storage.read_bytes(uri)
    with pytest.raises(InputError, match="choose another path"):
        storage.write_bytes(str(tmp_path / "file" / "below"), b"")


@pytest.fixture
def shared(tmp_path: Path) -> tuple[Path, Path]:
    """A folder with a file, and a place for its copy where the file's name leads to a device that is always full."""
    source, target = tmp_path / "source", tmp_path / "target"
    for place in (source, target):
        place.mkdir()
    (source / "x").write_bytes(b"1")
    (target / "x").symlink_to("/dev/full")
    return source, target


def test_a_full_disk_is_a_failure_of_one_line(shared: tuple[Path, Path]) -> None:
    source, target = shared
    with pytest.raises(RunError) as caught:
        storage.upload_dir(source, str(target))
    assert str(caught.value) == f"{target}/x: no space left on device: free some space, or choose another place"
    with pytest.raises(RunError, match=f"^{target}/x: no space left on device"):
        storage.download_dir(str(source), target)


def test_a_disk_that_fails_to_read_is_a_failure_of_one_line() -> None:
    with pytest.raises(RunError, match="/proc/self/mem: input/output error: check the disk"):
        storage.read_bytes("/proc/self/mem")  # its first page cannot be read


LIMITED = """
import resource, signal, sys
from ctrsink import storage
from ctrsink.errors import RunError
if sys.argv[1].startswith("s3"):
    storage.exists(sys.argv[1])  # makes the client
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))  # as on a full disk: the first write ends half-way, the next one fails
try:
    if sys.argv[1].startswith("s3"):
        storage.download_dir(sys.argv[1], sys.argv[2])
    else:
        storage.write_bytes(sys.argv[2] + "/x", bytes(9000))
except RunError as error:
    print(error)
"""


@pytest.mark.parametrize("remote", [False, True], ids=["write", "download"])
def test_what_a_disk_takes_in_part_is_not_left_there(s3_server: SeaweedServer, tmp_path: Path, remote: bool) -> None:
    place = f"s3://ctrsink-test/{uuid.uuid4().hex}"
    storage.write_bytes(f"{place}/x", bytes(9000))
    command = [sys.executable, "-c", LIMITED, place if remote else "local", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == f"{tmp_path}/x: file too large: raise the limit on the size of files, or choose another place\n", (
        done.stderr
    )
    assert list(tmp_path.iterdir()) == []


def attempt_everything(uri: str, tmp_path: Path, unavailable: bool = False) -> list[str]:
    """The messages with which every operation refuses `uri`: for a mistake, or because it is not to be had now."""
    (tmp_path / "one").touch()
    attempts = [
        lambda: storage.read_bytes(uri),
        lambda: storage.write_bytes(uri, b"1"),
        lambda: storage.exists(uri),
        lambda: storage.list_files(uri),
        lambda: storage.list_dirs(uri),
        lambda: storage.find(uri),
        lambda: storage.info(uri),
        lambda: storage.read_range(uri, 0, 1),
        lambda: storage.delete(uri),
        lambda: storage.upload_dir(tmp_path, uri),
        lambda: storage.download_dir(uri, tmp_path / "down"),
    ]
    messages = []
    for attempt in attempts:
        with pytest.raises(InputError) as caught:
            attempt()
        assert isinstance(caught.value, storage.StorageUnavailable) == unavailable
        messages.append(str(caught.value))
    return messages


def test_missing_bucket(s3_server: SeaweedServer, tmp_path: Path) -> None:
    for message in attempt_everything("s3://no-such-bucket/a/b", tmp_path):
        assert "s3://no-such-bucket/a/b" in message
        assert "the bucket no-such-bucket does not exist" in message


@pytest.mark.parametrize("wrong", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
def test_wrong_credentials(s3_server: SeaweedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    monkeypatch.setenv(wrong, "0123456789abcdef")
    for message in attempt_everything("s3://ctrsink-test/a/b", tmp_path, unavailable=True):
        assert message.startswith("s3://ctrsink-test/a/b: S3 refused access: check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        assert "\n" not in message
        for secret in (s3_server.access_key, s3_server.secret_key, "0123456789abcdef"):
            assert secret not in message


def test_no_credentials(s3_server: SeaweedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for message in attempt_everything("s3://ctrsink-test/a/b", tmp_path, unavailable=True):
        assert "s3://ctrsink-test/a/b: no S3 credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in message


def test_unreachable_or_malformed_endpoint(s3_server: SeaweedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTRSINK_STORAGE_DEADLINE_S", "0.2")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for message in attempt_everything("s3://ctrsink-test/a", tmp_path, unavailable=True):
        assert "cannot reach the S3 endpoint (EndpointConnectionError), tried for " in message
        assert "AWS_ENDPOINT_URL" in message
    monkeypatch.setenv("AWS_ENDPOINT_URL", "someone:secret@localhost")
    for message in attempt_everything("s3://ctrsink-test/a", tmp_path):
        assert message == "AWS_ENDPOINT_URL is no address: it must start with http:// or https://"


def test_malformed_bucket_name(s3_server: SeaweedServer, tmp_path: Path) -> None:
    for message in attempt_everything("s3://Not_a_bucket!/a", tmp_path):
        assert "s3://Not_a_bucket!/a: not a valid bucket and key" in message


@pytest.mark.parametrize(
    ("given", "region"),
    [
        ({"AWS_REGION": "eu-west-3"}, "eu-west-3"),
        ({"AWS_REGION": "eu-west-3", "AWS_DEFAULT_REGION": ""}, "eu-west-3"),
        ({"AWS_REGION": "eu-west-3", "AWS_DEFAULT_REGION": "us-west-2"}, "us-west-2"),
    ],
    ids=str,
)
def test_the_region_is_taken_from_either_variable(monkeypatch: pytest.MonkeyPatch, given: dict[str, str], region: str) -> None:
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    files = connect(attempts=1)
    client = sync(files.loop, files.set_session)
    assert client.meta.region_name == region  # pyright: ignore[reportOptionalMemberAccess]
