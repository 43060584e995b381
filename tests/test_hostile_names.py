"""Names that others chose (keys on S3, paths in a manifest) never lead out of the folder that they are to lie in."""

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit
from xml.sax.saxutils import escape

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ctrsink import storage
from ctrsink.dataset.manifest import read_manifest
from ctrsink.errors import InputError
from ctrsink.prepare.encoder import write_files
from ctrsink.serve import Scorer
from tests.builders import make_dataset

PARTS = st.sampled_from(["", ".", "..", "a", "b.json", "...", " ", "~", "..a"])
NAMES = st.lists(PARTS, min_size=1, max_size=5).map("/".join)
HOSTILE = NAMES.filter(storage.leads_out)
OF_FILES = HOSTILE.filter(lambda name: name and not name.endswith("/"))
"""On S3 a key that ends with a slash stands for a folder, and no file is made of it."""


class Listing(BaseHTTPRequestHandler):
    """An S3 server that lists the keys it was told to, and holds four bytes under each."""

    keys: tuple[str, ...] = ()
    asked: list[str] = []  # noqa: RUF012 - shared by all requests on purpose

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        if "list-type=2" in parts.query:
            entry = '<Contents><Key>{}</Key><Size>4</Size><ETag>"x"</ETag></Contents>'
            found = "".join(entry.format(escape(key)) for key in self.keys)
            self._answer(f"<ListBucketResult><IsTruncated>false</IsTruncated>{found}</ListBucketResult>".encode())
        else:
            self.asked.append(parts.path)
            self._answer(b"evil")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append(f"POST {self.path}")
        self._answer(b"<DeleteResult></DeleteResult>")

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"x"')
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        del format, args


@pytest.fixture(scope="module")
def listing() -> Iterator[type[Listing]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Listing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        environment.delenv("AWS_ENDPOINT_URL_S3", raising=False)
        environment.setenv("AWS_ACCESS_KEY_ID", "test")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "test")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield Listing
    server.shutdown()
    server.server_close()


@given(NAMES)
def test_a_name_is_taken_exactly_where_it_is_a_place_below(name: str) -> None:
    below = os.path.normpath(os.path.join("/base", name)) == f"/base/{name}"  # noqa: PTH118 - as an attacker's name would act
    assert storage.leads_out(name) == (not below)
    assert storage.leads_out(f"a\0{name}")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(hostile=OF_FILES, good=st.sampled_from(["config.json", "a/b"]))
@example(hostile="../../etc/passwd", good="config.json")
@example(hostile="/etc/passwd", good="config.json")
def test_what_a_bucket_lists_is_neither_fetched_nor_deleted_elsewhere(
    listing: type[Listing], tmp_path: Path, hostile: str, good: str
) -> None:
    listing.keys = (f"models/a/{good}", f"models/a/{hostile}")
    listing.asked.clear()
    before = sorted(tmp_path.parent.rglob("*"))
    with pytest.raises(InputError, match="no file below it"):
        storage.download_dir("s3://bucket/models/a", tmp_path / "here")
    with pytest.raises(InputError, match="no file below it"):
        storage.find("s3://bucket/models/a")
    with pytest.raises(InputError, match="no file below it"):
        storage.delete("s3://bucket/models/a")
    with pytest.raises(InputError, match="no file below it"):
        Scorer.load("s3://bucket/models/a")
    assert listing.asked == []
    assert sorted(tmp_path.parent.rglob("*")) == before


def test_what_lies_below_is_fetched_and_deleted(listing: type[Listing], tmp_path: Path) -> None:
    listing.keys = ("models/a/b/..c", "models/a/folder/")
    listing.asked.clear()
    storage.download_dir("s3://bucket/models/a", tmp_path)
    assert (tmp_path / "b" / "..c").read_bytes() == b"evil"
    storage.delete("s3://bucket/models/a")
    assert [asked.partition("?")[0] for asked in listing.asked] == ["/bucket/models/a/b/..c", "POST /bucket"]


@given(OF_FILES)
def test_an_address_has_no_such_part(hostile: str) -> None:
    for act in (storage.read_bytes, storage.delete, storage.exists, storage.find, storage.list_files):
        with pytest.raises(InputError, match="no part that is empty"):
            act(f"s3://bucket/{hostile}")


@pytest.mark.parametrize("uri", ["s3://bucket", "s3://bucket/", "/", "/./", "//", "file:///", "", "file://"])
def test_a_whole_bucket_or_disk_is_never_deleted(uri: str, listing: type[Listing]) -> None:
    listing.keys = ("precious",)
    listing.asked.clear()
    with pytest.raises(InputError, match=r"never deleted|is no path"):
        storage.delete(uri)
    assert listing.asked == []


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of a small data set."""
    return Path(make_dataset(tmp_path_factory.mktemp("hostile"), users=5)) / "manifest.json"


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(hostile=HOSTILE, which=st.sampled_from(["index", "items", "tokenizer", "shards"]))
@example(hostile="../../etc/passwd", which="index")
@example(hostile="/etc/passwd", which="tokenizer")
@example(hostile="", which="shards")
def test_a_manifest_names_nothing_elsewhere(manifest: Path, tmp_path: Path, hostile: str, which: str) -> None:
    tree = json.loads(manifest.read_text())
    entry = {"tokenizer": lambda: tree["tokenizer"][0], "shards": lambda: tree["shards"][0]["events_file"]}.get(
        which, lambda: tree[which]
    )()
    entry["path"] = hostile
    (tmp_path / "manifest.json").write_text(json.dumps(tree))
    with pytest.raises(InputError, match=rf"manifest\.json is damaged \({which}.*is no path below the data set"):
        read_manifest(str(tmp_path))


@given(HOSTILE)
def test_an_encoder_writes_nothing_elsewhere(hostile: str) -> None:
    with pytest.raises(InputError, match="no file below it"):
        write_files(Path("/nowhere"), {hostile: b"evil"})
