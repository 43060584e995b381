"""A pointer that moves changes the model without a pause; each answer is of one model; a bad one changes nothing."""

import asyncio
import concurrent.futures
import gc
import shutil
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest

from ctrsink import storage
from ctrsink.config.serve import ServeSpec
from ctrsink.errors import InputError
from ctrsink.serve.metrics import Metrics
from ctrsink.serve.models import Models
from ctrsink.serve.pointer import resolve
from tests.conftest import BUCKET
from tests.serve_fixtures import Exported, Serving


def point(pointer: Path, name: str) -> None:
    """As `mv` does: whoever reads sees the old or the new."""
    beside = pointer.with_name(".next")
    beside.write_text(name + "\n")
    beside.replace(pointer)


def wait_for(service: Serving, key: str, start: str, seconds: float = 120) -> dict[str, Any]:
    """What /health/ready tells once `key` begins with `start`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        state = service.get("/health/ready").json
        if str(state.get(key, "")).startswith(start):
            return state
        time.sleep(0.05)
    raise AssertionError((state, service.lines))


def test_20_swaps_under_load_lose_nothing_and_mix_nothing(served: Exported, tmp_path: Path) -> None:
    for name, model in zip("ab", served.models, strict=True):
        (tmp_path / name).symlink_to(model)
    pointer = tmp_path / "current"
    point(pointer, "a")
    ended = threading.Event()
    answers: list[tuple[int, int, Any]] = []

    def load(client: int) -> None:
        number = client
        while not ended.is_set():
            number += 3
            reply = service.score(served.requests[number % 5], X_Deadline_Ms="120000")
            answers.append((number % 5, reply.status, reply.json))

    with Serving("--model", pointer, "watch_seconds=0.05", "drain_seconds=0") as service:
        alone = {"a": [service.score(served.requests[number]).json for number in range(5)]}
        with concurrent.futures.ThreadPoolExecutor(3) as clients:
            running = [clients.submit(load, client) for client in range(3)]
            try:
                for swap in range(20):
                    name = "ba"[swap % 2]
                    if swap >= 16:  # a copy: another folder, so that it is loaded
                        name = f"{name}{swap}"
                        shutil.copytree(served.models["ab".index(name[0])], tmp_path / name)
                    point(pointer, name)
                    wait_for(service, "model", f"{name}@")
                    alone.setdefault(name, [service.score(served.requests[number]).json for number in range(5)])
            finally:
                ended.set()
            for task in running:
                task.result()
        counts = service.metric("swaps_total")
        # The first one, the way to b, and the four copies were loaded; the others were there still.
        assert counts == {'{outcome="swapped"}': 6, '{outcome="back"}': 15, '{outcome="failed"}': 0}
        assert len(service.metric("model")) == 2
        assert service.end() == 0
    assert {status for _, status, _ in answers} == {200}
    assert {answer["model"][0] for _, _, answer in answers} == {"a", "b"}
    digest = {found[0]["model"].partition("@")[2]: found for found in alone.values()}
    assert len(digest) == 2
    for number, _, answer in answers:
        expected = digest[answer["model"].partition("@")[2]][number]["probabilities"]
        assert answer["probabilities"] == pytest.approx(expected, abs=1e-6)
    a, b = ([row["probabilities"] for row in found] for found in digest.values())
    assert min(abs(x - y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True)) > 1e-5


def test_a_bad_model_leaves_the_old_one_and_says_so(served: Exported, tmp_path: Path) -> None:
    pointer = tmp_path / "current"
    point(pointer, served.models[0])
    shutil.copytree(served.models[1], tmp_path / "torn")
    weights = tmp_path / "torn/model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with Serving("--model", pointer, "watch_seconds=0.05", "drain_seconds=0") as service:
        before = service.score(served.requests[0]).json
        point(pointer, "nowhere")
        wait_for(service, "problem", f"{tmp_path}/nowhere holds no model")
        point(pointer, "torn")
        state = wait_for(service, "problem", f"the model {tmp_path}/torn is damaged")
        assert (state["ready"], state["model"]) == (True, before["model"])
        assert service.metric("model_wrong") == {"": 1.0}
        assert service.metric("swaps_total")['{outcome="failed"}'] >= 2
        assert service.score(served.requests[0]).json["probabilities"] == before["probabilities"]
        assert [line for line in service.lines if "torn is damaged" in line and line.endswith("goes on")]
        # It was being copied still: whole, it is taken by itself.
        weights.write_bytes(whole)
        state = wait_for(service, "model", "torn@")
        assert "problem" not in state
        assert service.metric("model_wrong") == {"": 0.0}


class Fake:
    """A model that loads at once."""

    fields: tuple[str, ...] = ()

    def __init__(self, folder: str) -> None:
        self.folder, self.version = folder, f"{Path(folder).name}@0"


def test_two_models_are_held_and_never_three(tmp_path: Path) -> None:
    made: list[weakref.ref[Fake]] = []
    held: list[int] = []

    def load(folder: str) -> Any:
        held.append(sum(model() is not None for model in made))
        model = Fake(folder)
        made.append(weakref.ref(model))
        return model

    async def act() -> None:
        pointer = tmp_path / "current"
        models = Models(ServeSpec(model=str(pointer), watch_seconds=0.01), Metrics(), load)
        for name in "abc":
            (tmp_path / name).mkdir()
            (tmp_path / name / "config.json").touch()
        point(pointer, "a")
        await models.start()
        watching = asyncio.create_task(models.watch())
        for name in "bcabca":
            point(pointer, name)
            while models.current is None or Path(models.current.folder).name != name:
                await asyncio.sleep(0.01)
        watching.cancel()
        models.close()

    asyncio.run(act())
    gc.unfreeze()
    assert len(made) == 7
    assert max(held) == 1  # beside the one that is being loaded


def test_what_a_pointer_may_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "models/v1"
    folder.mkdir(parents=True)
    (folder / "config.json").touch()
    pointer = tmp_path / "models/current"
    assert (resolve(str(folder)).folder, resolve(str(folder)).watched) == (str(folder), False)
    for text in ("v1", " v1\n", str(folder), "../models/v1"):
        pointer.write_text(text)
        target = resolve(str(pointer))
        assert (Path(target.folder).resolve(), target.watched) == (folder, True)
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert resolve(str(link)).folder == str(folder)
    assert resolve(str(link)).watched
    monkeypatch.chdir(folder.parent)
    monkeypatch.chdir(folder.parent)
    assert resolve("current").watched
    for content in (b"", b"\n", b"a\0b", b"\xff", b"v1\nv2", b"x" * 5000):
        pointer.write_bytes(content)
        with pytest.raises(InputError, match="does not name a model"):
            resolve(str(pointer))
    with pytest.raises(InputError, match="is no pointer"):
        resolve(str(tmp_path / "models"))


@pytest.mark.usefixtures("s3_server")
def test_a_pointer_on_s3() -> None:
    place = f"s3://{BUCKET}/served"
    storage.write_bytes(f"{place}/v1/config.json", b"{}")
    for text, folder in ((b"v1\n", f"{place}/v1"), (f"{place}/v1".encode(), f"{place}/v1")):
        storage.write_bytes(f"{place}/current", text)
        assert (resolve(f"{place}/current").folder, resolve(f"{place}/current").watched) == (folder, True)
    storage.write_bytes(f"{place}/current", b"/etc")
    with pytest.raises(InputError, match="names a folder relative to it"):
        resolve(f"{place}/current")
