"""Items found by their ids in a table on disk that no process holds."""

import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.local.seaweed import SeaweedServer
from ctrsink import storage
from ctrsink.config.data import TextSpec
from ctrsink.dataset import cache as caches
from ctrsink.prepare import lookup as lookups
from ctrsink.prepare.items import Items
from ctrsink.prepare.lookup import Lookup
from ctrsink.prepare.results import read_named, write_named

IDS = st.lists(st.text(max_size=3), unique=True, max_size=30)


def expected(ids: list[str], asked: list[str | None]) -> list[int]:
    return [ids.index(name) if name in ids else -1 for name in asked]


@given(IDS, st.lists(st.none() | st.text(max_size=3), max_size=30), st.data())
def test_every_id_is_found_and_no_other(ids: list[str], others: list[str | None], data: st.DataObject) -> None:
    asked = data.draw(st.permutations([*ids, *others]))
    lookup = Lookup.of(pa.array(ids, pa.string()))
    for again in (lookup, Lookup.from_table(lookup.table())):
        assert again.find(pa.array(asked, pa.string())).tolist() == expected(ids, asked)
        assert again.find(pa.chunked_array([asked[:3], asked[3:]], pa.string())).tolist() == expected(ids, asked)


@given(IDS, st.lists(st.text(max_size=3), max_size=30), st.integers(1, 4))
def test_ids_that_share_a_hash_are_told_apart(ids: list[str], others: list[str], kinds: int) -> None:
    """Of 64 bits two ids of ten millions share them once in 300,000 catalogues; here nearly all do."""

    def few(names: pa.Array) -> np.ndarray:
        return np.array([len(name) % kinds for name in names.to_pylist()], np.uint64)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(lookups, "_hashes", few)
        lookup = Lookup.of(pa.array(ids, pa.string()))
        assert lookup.find(pa.array([*ids, *others], pa.string())).tolist() == expected(ids, [*ids, *others])


def test_a_table_on_s3_is_mapped_from_the_cache_and_fetched_once(
    s3_server: SeaweedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(caches, "MAPPED_BYTES", 1)
    table = Lookup.of(pa.array(["tea", "mug", "pot"])).table()
    path = write_named(f"s3://ctrsink-test/tables-{uuid.uuid4().hex}", "ids", table)
    fetched: list[str] = []
    read_bytes = storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda uri: fetched.append(uri) or read_bytes(uri))
    for _ in range(2):
        read_named.cache_clear()  # as another process would
        assert read_named(path).equals(table)
    assert fetched == [path]
    (file,) = (tmp_path / "ctrsink" / "files").iterdir()
    assert file.stat().st_size > table.nbytes


ITEMS = 400_000
TASK = """
import sys
import pyarrow as pa
from ctrsink.prepare.partition import read_lookup
from ctrsink.prepare.results import column_of

def held():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Anonymous:"))

asked = pa.array([f"item number {n}" for n in range(0, int(sys.argv[3]), 101)])
before = held()
found = read_lookup(sys.argv[1]).find(asked)
tokens = column_of(sys.argv[2], "tokens").take(pa.array(found))
print(found.tolist() == list(range(0, int(sys.argv[3]), 101)), tokens[1].as_py(), held() - before)
"""


def test_a_task_holds_what_its_shard_mentions_and_not_the_catalogue(tmp_path: Path) -> None:
    """400 thousand items, 30 MB of ids and tokens, of which it asks for 4 thousand."""
    lookup = write_named(str(tmp_path), "ids", Lookup.of(pa.array([f"item number {n}" for n in range(ITEMS)])).table())
    offsets = np.arange(ITEMS + 1, dtype=np.int32) * 10
    lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.arange(10 * ITEMS, dtype=np.int32)))
    tokens = write_named(str(tmp_path), "tokens", pa.table({"tokens": lists}))
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size > 25 * 2**20
    done = subprocess.run([sys.executable, "-c", TASK, lookup, tokens, str(ITEMS)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found, of_second, held = done.stdout.rsplit(maxsplit=1)[0].split(" ", 1) + done.stdout.split()[-1:]
    assert found == "True"
    assert of_second == str(list(range(1010, 1020)))
    assert int(held) < size / 5
    assert read_named(tokens).column("tokens").chunk(0).equals(lists)


def test_the_process_that_starts_the_tasks_holds_no_item(tmp_path: Path) -> None:
    """The item table lies in a file that is mapped, and its bytes are never in memory at once."""
    before = pa.total_allocated_bytes()
    names = [f"item number {n}" for n in range(ITEMS // 4)]
    items = Items.of(pa.table({"item": names, "title": [f"A thing called {name}" for name in names]}), TextSpec(item="{title}"))
    expected = items.table.slice(70_000, 2).to_pylist()  # beyond the texts that are rendered at a time
    assert expected[0] == {
        "id": names[70_000],
        "title": f"A thing called {names[70_000]}",
        "text": f"A thing called {names[70_000]}",
    }
    items = items.mapped(str(tmp_path))
    assert pa.total_allocated_bytes() - before < 2**20 < items.table.nbytes
    assert items.table.slice(70_000, 2).to_pylist() == expected
    assert next(items.vocabulary_texts()) == expected[0]["text"].replace(names[70_000], names[0])
    (file,) = tmp_path.iterdir()
    assert file.stem == f"items-{storage.sha256(file.read_bytes())[:16]}"
