"""Retries of storage against a real S3 server behind a proxy of faults: one loop, one warning, one line at the end."""

import logging
import os
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.local.seaweed import SeaweedServer
from ctrsink import storage
from ctrsink.errors import InputError
from ctrsink.storage import s3
from ctrsink.storage.faults import explained
from ctrsink.storage.retry import deadline_s
from tests.services.faulty_proxy import Fault, FaultyProxy


@pytest.fixture
def place() -> str:
    return f"s3://ctrsink-test/{uuid.uuid4().hex}"


def test_every_operation_gets_through_a_bad_network(proxy: FaultyProxy, place: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    contents = {f"{n % 3}/{n}.bin": os.urandom(1000 * n) for n in range(12)}
    for name, content in contents.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content)
    proxy.plant(*(Fault(kind, share=0.1) for kind in ("slow_down", "refuse", "cut", "truncated")))
    storage.upload_dir(source, place)
    storage.write_bytes(f"{place}/more", b"1")
    assert [one.path for one in storage.find(place)] == sorted([*contents, "more"])
    assert storage.list_files(place) == ["more"]
    assert storage.list_dirs(place) == ["0", "1", "2"]
    assert storage.info(f"{place}/2/11.bin").bytes == 11_000
    assert storage.read_range(f"{place}/2/11.bin", 500, 900) == contents["2/11.bin"][500:900]
    storage.download_dir(place, tmp_path / "back")
    back = {p.relative_to(tmp_path / "back").as_posix(): p.read_bytes() for p in (tmp_path / "back").rglob("*") if p.is_file()}
    assert back == contents | {"more": b"1"}
    storage.delete(place)
    assert not storage.exists(place)
    assert len(proxy.struck) == 4


def test_large_objects_travel_in_parts_that_are_repeated_one_by_one(
    proxy: FaultyProxy, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", part := 5 * 2**20)  # the least that S3 takes
    content = os.urandom(4 * part + 12_345)
    proxy.plant(Fault("slow_down", share=0.3), Fault("cut", share=0.3))
    storage.write_bytes(f"{place}/large", content)
    assert storage.read_bytes(f"{place}/large") == content
    assert storage.read_range(f"{place}/large", part - 10, 2 * part) == content[part - 10 : 2 * part]
    storage.download_dir(place, tmp_path / "back")
    assert (tmp_path / "back" / "large").read_bytes() == content
    assert [p.name for p in (tmp_path / "back").iterdir()] == ["large"]
    assert proxy.count("PUT", "partNumber=5") >= 1
    assert min(proxy.struck["slow_down"], proxy.struck["cut"]) > 0


@pytest.fixture
def parted(place: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where an object in two parts is to be put; the parts are small."""
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)
    return f"{place}/parted"


LOST = Fault("cut", method="POST", path="uploadId=", times=1)


def test_an_upload_whose_last_answer_was_lost_has_succeeded(proxy: FaultyProxy, parted: str) -> None:
    content = os.urandom(s3.PART_BYTES + 1)
    proxy.plant(LOST, Fault("ended", method="POST", path="uploadId="))
    storage.write_bytes(parted, content)
    assert (proxy.struck["cut"], proxy.struck["ended"]) == (1, 1)
    assert proxy.count("DELETE") == 0
    assert storage.read_bytes(parted) == content
    proxy.plant(LOST)  # and where the server itself says what it knows of the upload
    storage.write_bytes(parted, content[::-1])
    assert storage.read_bytes(parted) == content[::-1]


def test_an_upload_that_is_gone_without_an_object_has_failed(proxy: FaultyProxy, parted: str) -> None:
    storage.write_bytes(parted, b"older")
    proxy.plant(Fault("ended", method="POST", path="uploadId="))
    with pytest.raises(InputError, match="S3 answered NoSuchUpload"):
        storage.write_bytes(parted, bytes(s3.PART_BYTES + 1))
    assert storage.read_bytes(parted) == b"older"


def test_a_key_that_may_not_be_deleted_is_not_tried_again(proxy: FaultyProxy, place: str) -> None:
    storage.write_bytes(f"{place}/x", b"1")
    proxy.plant(Fault("kept", method="POST", path="delete"))
    with pytest.raises(storage.StorageUnavailable, match=f"^{place}: S3 refused access: check AWS_ACCESS_KEY_ID"):
        storage.delete(place)
    assert proxy.count("POST") == 1


def test_a_key_that_cannot_be_deleted_for_now_is_tried_again(proxy: FaultyProxy, place: str) -> None:
    storage.write_bytes(f"{place}/x", b"1")
    proxy.plant(Fault("kept_for_now", method="POST", path="delete", times=2))
    storage.delete(place)
    assert not storage.exists(place)
    assert proxy.count("POST") == 3


def test_a_range_shortened_with_its_length_is_noticed(proxy: FaultyProxy, place: str) -> None:
    storage.write_bytes(f"{place}/x", bytes(range(100)))
    proxy.plant(Fault("shortened", method="GET", times=2))
    assert storage.read_range(f"{place}/x", 10, 90) == bytes(range(10, 90))
    assert proxy.struck["shortened"] == 2


def test_an_object_replaced_while_it_is_read_in_parts_is_refused(s3_server: SeaweedServer, place: str) -> None:
    uri = f"{place}/x"
    storage.write_bytes(uri, b"old content")
    version = storage.info(uri).version
    storage.write_bytes(uri, b"new content")
    operation = s3.Operation(uri)
    with pytest.raises(InputError, match=f"{uri}: it was replaced while it was being read"), explained(uri):
        operation.run(operation.piece(operation.key, 0, 5, f'"{version}"'))


def test_one_loop_and_one_warning(proxy: FaultyProxy, place: str, caplog: pytest.LogCaptureFixture) -> None:
    storage.write_bytes(f"{place}/x", b"1")
    proxy.plant(Fault("slow_down", times=3))
    with caplog.at_level(logging.WARNING):
        assert storage.read_bytes(f"{place}/x") == b"1"
    assert proxy.count("GET") == 4
    (record,) = [r for r in caplog.records if r.name.startswith("ctrsink")]
    assert record.getMessage() == f"{place}/x: S3 answered SlowDown (HTTP 503); trying again for up to 20 s"


def test_no_second_attempt_where_none_can_help(proxy: FaultyProxy, place: str) -> None:
    storage.write_bytes(f"{place}/x", b"1")
    proxy.plant(Fault("expired"))
    with pytest.raises(InputError, match="credentials have expired"):
        storage.read_bytes(f"{place}/x")
    assert proxy.count("GET") == 1
    proxy.plant()
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{place}/y")
    with pytest.raises(InputError, match="the bucket no-such-bucket does not exist"):
        storage.read_bytes("s3://no-such-bucket/x")
    assert proxy.count("GET") == 2


OPERATIONS: dict[str, Callable[[str, Path], object]] = {
    "read_bytes": lambda uri, _: storage.read_bytes(uri),
    "write_bytes": lambda uri, _: storage.write_bytes(uri, b"1"),
    "exists": lambda uri, _: storage.exists(uri),
    "info": lambda uri, _: storage.info(uri),
    "find": lambda uri, _: storage.find(uri),
    "list_files": lambda uri, _: storage.list_files(uri),
    "read_range": lambda uri, _: storage.read_range(uri, 0, 1),
    "delete": lambda uri, _: storage.delete(uri),
    "upload_dir": lambda uri, folder: storage.upload_dir(folder, uri),
    "download_dir": lambda uri, folder: storage.download_dir(uri, folder),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_every_operation_ends_at_the_deadline_in_one_line(
    proxy: FaultyProxy, place: str, operation: Callable[[str, Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CTRSINK_STORAGE_DEADLINE_S", "0.4")
    storage.exists(place)  # makes the client, which takes a while of its own
    proxy.plant(Fault("slow_down"))
    with pytest.raises(storage.StorageUnavailable) as caught:
        operation(place, tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{place}: S3 answered SlowDown (HTTP 503), tried for 0.")
    assert "\n" not in message
    assert proxy.struck["slow_down"] >= 2


@pytest.mark.parametrize("given", ["soon", "-1", "nan", "inf"])
def test_a_deadline_must_be_a_number_of_seconds(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTRSINK_STORAGE_DEADLINE_S", given)
    with pytest.raises(InputError, match="CTRSINK_STORAGE_DEADLINE_S"):
        deadline_s()
