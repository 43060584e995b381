"""The index of users: one copy for all processes of a host, the same as in memory, and never a damaged one."""

import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ctrsink import storage
from ctrsink.dataset import cache as caches
from ctrsink.dataset.arrow import to_parquet
from ctrsink.dataset.cache import Cache
from ctrsink.dataset.index import read_index
from ctrsink.dataset.manifest import INDEX_SCHEMA
from ctrsink.dataset.reader import Dataset
from ctrsink.families.registry import source_of
from tests.builders import make_dataset
from tests.test_stream import LAYOUTS

LIMIT = 2**30


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def every_index_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "MAPPED_BYTES", 1)


def is_mapped(column: Any) -> bool:
    while isinstance(column, np.ndarray):
        if isinstance(column, np.memmap):
            return True
        column = column.base
    return False


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return list(found) == list(expected) and all(np.array_equal(found[name], expected[name]) for name in expected)


def test_a_mapped_index_is_the_one_in_memory_and_made_once(uri: str, tmp_path: Path) -> None:
    plain = Dataset(uri)
    assert not any(map(is_mapped, plain.index.values()))
    first = Dataset(uri, cache=Cache(tmp_path, LIMIT))
    (file,) = (tmp_path / "files").iterdir()
    made = file.stat().st_ino
    second = Dataset(uri, cache=Cache(tmp_path, LIMIT))
    assert file.stat().st_ino == made
    for dataset in (first, second):
        assert same(dataset.index, plain.index)
        assert all(map(is_mapped, dataset.index.values()))
        assert not any(column.flags.writeable for column in dataset.index.values())


@pytest.mark.parametrize("examples", sorted(LAYOUTS))
def test_another_process_maps_it_too_and_finds_the_same_sequences(uri: str, tmp_path: Path, examples: str) -> None:
    """What is sent there grows with the shards, not with the users."""
    dataset = Dataset(uri, cache=Cache(tmp_path, LIMIT))
    source = source_of(dataset, "train", LAYOUTS[examples])
    ids = np.random.default_rng(0).permutation(sum(source.per_shard))
    sent = pickle.dumps(source)
    assert dataset.index["train_events"].tobytes() not in sent
    again = pickle.loads(sent)  # noqa: S301
    assert all(map(is_mapped, again.dataset.index.values()))
    for found, expected in zip(again.owners(ids), source.owners(ids), strict=True):
        assert np.array_equal(found, expected)
    pieces = -(-dataset.index["train_impressions"].astype(np.int64) // LAYOUTS[examples].targets)
    users = np.arange(len(pieces)).repeat(pieces)
    assert np.array_equal(source.owners(ids)[0], users[ids])
    assert np.array_equal(source.owners(ids)[1], (np.arange(len(users)) - (np.cumsum(pieces) - pieces)[users])[ids])


@pytest.mark.parametrize("damage", ["altered", "truncated", "empty"])
def test_a_damaged_file_is_made_again(uri: str, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    expected = Dataset(uri, cache=Cache(tmp_path, LIMIT)).index
    (file,) = (tmp_path / "files").iterdir()
    content = file.read_bytes()
    file.unlink()  # those who have mapped it keep it
    file.write_bytes({"altered": content[:9] + b"?" + content[10:], "truncated": content[:-1], "empty": b""}[damage])
    assert same(Dataset(uri, cache=Cache(tmp_path, LIMIT)).index, expected)
    assert "is damaged: making it again" in caplog.text
    assert file.read_bytes() == content


@pytest.mark.parametrize("why", ["off", "small", "no folder"])
def test_without_a_cache_that_serves_it_lies_in_memory(uri: str, tmp_path: Path, why: str) -> None:
    (tmp_path / "file").write_text("")
    cache = {"off": Cache(tmp_path, 0), "small": Cache(tmp_path, 100), "no folder": Cache(tmp_path / "file", LIMIT)}[why]
    dataset = Dataset(uri, cache=cache)
    assert same(dataset.index, Dataset(uri).index)
    assert not any(map(is_mapped, dataset.index.values()))


USERS = 1_000_000
OPENED = """
import sys
from types import SimpleNamespace
import psutil
from ctrsink.dataset.cache import Cache
from ctrsink.dataset.index import read_index

def never():
    raise AssertionError("it was made already")

manifest = SimpleNamespace(shards=[SimpleNamespace(users=int(sys.argv[2]))], index=SimpleNamespace(sha256=sys.argv[3]))
before = psutil.Process().memory_full_info().uss
index = read_index(manifest, never, Cache(sys.argv[1], 2**30))
total = sum(int(column.sum()) for column in index.values())
print(total, psutil.Process().memory_full_info().uss - before)
"""


def test_a_process_holds_no_copy_of_what_another_one_has_mapped(tmp_path: Path) -> None:
    """A million users, 36 MB: what a second process has for itself is the libraries that it loads on the way."""
    columns = [np.arange(USERS, dtype=np.int32) % 7 + number for number in range(len(INDEX_SCHEMA))]
    content = to_parquet(pa.Table.from_arrays([pa.array(column) for column in columns], schema=INDEX_SCHEMA))
    digest = storage.sha256(content)
    manifest: Any = SimpleNamespace(shards=[SimpleNamespace(users=USERS)], index=SimpleNamespace(sha256=digest))
    reads: list[int] = []

    def read() -> bytes:
        reads.append(1)
        return content

    index = read_index(manifest, read, Cache(tmp_path, LIMIT))
    command = [sys.executable, "-c", OPENED, str(tmp_path), str(USERS), digest]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    total, held = map(int, done.stdout.split())
    assert total == sum(int(column.sum()) for column in index.values()) == sum(int(column.sum()) for column in columns)
    assert held < 12 * USERS
    assert reads == [1]


def test_a_maker_that_fails_leaves_nothing_half_made(tmp_path: Path) -> None:
    cache, key = Cache(tmp_path, LIMIT), "a" * 64

    def broken() -> Iterator[bytes]:
        yield b"half"
        raise RuntimeError("the file ended")

    with pytest.raises(RuntimeError, match="the file ended"):
        cache.mapped(key, 8, broken)
    assert not (tmp_path / "files" / key).exists()
    found = cache.mapped(key, 8, lambda: [b"half", b"more"])
    assert found is not None
    assert found.tobytes() == b"halfmore"
