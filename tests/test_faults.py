"""The stream over a real S3 server behind a proxy of faults: the same content as without them, or one clear line."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.local.seaweed import SeaweedServer
from ctrsink import storage
from ctrsink.dataset.cache import Cache
from ctrsink.dataset.reader import Dataset
from ctrsink.errors import InputError, StorageUnavailable
from ctrsink.families.registry import source_of
from ctrsink.stream.stream import Step, TrainStream
from tests.builders import layout_of, make_dataset
from tests.padded import same
from tests.services.faulty_proxy import Fault, FaultyProxy


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("log"), users=20)


@pytest.fixture(scope="module")
def uri(local: str, s3_server: SeaweedServer) -> str:
    place = f"s3://ctrsink-test/{uuid.uuid4().hex}"
    storage.upload_dir(local, place)
    return place


@pytest.fixture(scope="module")
def between(s3_server: SeaweedServer) -> Iterator[FaultyProxy]:
    with FaultyProxy(s3_server.endpoint) as started:
        yield started


@pytest.fixture
def proxy(between: FaultyProxy, uri: str, monkeypatch: pytest.MonkeyPatch) -> FaultyProxy:
    """Before the server, without faults yet."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", between.endpoint)
    monkeypatch.setenv("CTRSINK_STORAGE_DEADLINE_S", "20")
    between.plant()
    return between


def steps_of(uri: str, cache: Cache | None = None) -> list[Step]:
    """Two epochs, with so few shards in memory that each is read several times."""
    dataset = Dataset(uri, keep_shards=3, cache=cache)
    source = source_of(dataset, "train", layout_of("per_user", 3, 2))
    stream = TrainStream(source, seed=3, shuffle_shards=2, batch_size=3, accumulation=1, rank=0, world=1)
    return list(stream.steps(0, 2 * sum(source.per_shard) // 3))


def same_batches(one: list[Step], other: list[Step]) -> bool:
    batches = [[b for step in steps for b in step.micro_batches] for steps in (one, other)]
    return len(batches[0]) == len(batches[1]) > 20 and all(same(a, b) for a, b in zip(*batches, strict=True))


@pytest.fixture(scope="module")
def truth(local: str) -> list[Step]:
    return steps_of(local)


# Holds about a third of the files, so that they are evicted and downloaded again.
SMALL = 9_000

PASSING = {
    "503 for every fifth request": [Fault("slow_down", share=0.2)],
    "reset connections": [Fault("refuse", share=0.2)],
    "cut in mid-body": [Fault("cut", share=0.2)],
    "truncated bodies": [Fault("truncated", share=0.2)],
    "shortened bodies": [Fault("shortened", path=".parquet", each=2)],
    "altered bodies": [Fault("altered", path=".parquet", each=2)],
    "one shortened manifest": [Fault("shortened", times=1, path="manifest.json")],
    "a body that takes a second": [Fault("slow", path="shards/00002.parquet", each=1, rate=3_000)],
    "all at once": [Fault(kind, share=0.05) for kind in ("slow_down", "refuse", "cut", "truncated")],
}


@pytest.mark.parametrize("cached", [False, True], ids=["direct", "cached"])
@pytest.mark.parametrize("faults", PASSING.values(), ids=PASSING)
def test_faults_that_pass_change_nothing(
    proxy: FaultyProxy,
    truth: list[Step],
    uri: str,
    faults: list[Fault],
    cached: bool,
    tmp_path: Path,
) -> None:
    proxy.plant(*faults)
    assert same_batches(steps_of(uri, Cache(tmp_path, SMALL) if cached else None), truth)
    assert sum(proxy.struck.values()) > 0


def ending_of(uri: str, cache: Cache | None) -> tuple[str, bool]:
    """The message with which reading the stream ends, one line without a secret, and whether storage was not to be had."""
    with pytest.raises(InputError) as caught:
        steps_of(uri, cache)
    message = str(caught.value)
    assert "\n" not in message
    assert not any(os.environ[name] in message for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"))
    return message, isinstance(caught.value, StorageUnavailable)


ENDING = {
    "expired": (Fault("expired", path="00002.parquet"), "the S3 credentials have expired (ExpiredToken): renew them"),
    "overloaded": (Fault("slow_down", path="00002.parquet"), "S3 answered SlowDown (HTTP 503), tried for "),
    "refused": (Fault("refuse", path="00002.parquet"), "tried for "),
    "silent": (Fault("hang", path="00002.parquet"), "cannot reach the S3 endpoint (ReadTimeoutError), tried for "),
    "cut": (Fault("cut", path="00002.parquet"), "tried for "),
    "altered": (Fault("altered", path="00002.parquet"), "does not match the sha256 in the manifest: it was altered"),
    "shortened": (Fault("shortened", path="00002.parquet"), "it is truncated"),
    "shortened manifest": (Fault("shortened", path="manifest.json"), "manifest.json is damaged"),
}


@pytest.mark.parametrize("cached", [False, True], ids=["direct", "cached"])
@pytest.mark.parametrize(("fault", "expected"), ENDING.values(), ids=ENDING)
def test_faults_that_stay_end_in_one_line(
    proxy: FaultyProxy, uri: str, fault: Fault, expected: str, cached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CTRSINK_STORAGE_DEADLINE_S", "1.5")
    proxy.plant(fault)
    message, unavailable = ending_of(uri, Cache(tmp_path, SMALL) if cached else None)
    assert unavailable == (fault.kind not in ("altered", "shortened"))
    assert message.startswith(f"{uri}/")
    assert fault.path in message
    assert expected in message


@pytest.mark.parametrize("cached", [False, True], ids=["direct", "cached"])
@pytest.mark.parametrize("how", ["removed", "replaced", "replaced by one of its size", "prepared anew"])
def test_a_file_changed_under_the_reader_ends_in_one_line(
    local: str, s3_server: SeaweedServer, how: str, cached: bool, tmp_path: Path
) -> None:
    place = f"s3://ctrsink-test/{uuid.uuid4().hex}"
    storage.upload_dir(local, place)
    dataset = Dataset(place, keep_shards=1, cache=Cache(tmp_path / "cache", SMALL) if cached else None)
    dataset.shard(0)
    name = f"{place}/shards/00001.parquet"
    if how == "removed":
        storage.delete(name)
    elif how == "prepared anew":
        storage.upload_dir(make_dataset(tmp_path, seed=5, users=20), place)
    else:
        entry = dataset.manifest.shards[1].events_file
        storage.write_bytes(name, b"x" * (entry.bytes if "size" in how else entry.bytes + 1))
    with pytest.raises(InputError) as caught:
        dataset.shard(1)
    assert str(caught.value).startswith(name)
    assert ("is missing, but the manifest lists it" if how == "removed" else "altered or replaced") in str(caught.value) or (
        how == "prepared anew" and "truncated" in str(caught.value)
    )
    assert "\n" not in str(caught.value)
