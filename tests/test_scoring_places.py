"""Where a job of scoring reads and writes: absolute places on a cluster, folders that a failed write leaves."""

from dataclasses import replace
from pathlib import Path

import pytest

from ctrsink import storage
from ctrsink.errors import InputError
from ctrsink.prepare.execute import in_process
from ctrsink.runtime.ray_data import require_place
from ctrsink.runtime.score import score_on_ray
from ctrsink.scoring.job import ScoreJob
from ctrsink.scoring.parts import Parts


def test_an_absolute_place_may_go_over_a_link_on_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "shared")
    (tmp_path / "shared" / "in.jsonl").write_text("{}")
    here = f"{tmp_path}/link"
    monkeypatch.setattr("ctrsink.runtime.ray_data.ray_data_actors", lambda *of: in_process)
    monkeypatch.setattr(ScoreJob, "run", lambda job, execute: {"to": job.to})
    job = ScoreJob(f"file://{here}/model/", f"{here}/./in.jsonl", f"{here}/out")
    assert score_on_ray(job, "auto", 1, 1) == {"to": f"{tmp_path}/shared/out"}
    with pytest.raises(InputError, match="--base base is relative"):
        score_on_ray(replace(job, base="base"), "auto", 1, 1)


def test_a_write_that_failed_does_not_lock_the_folder(tmp_path: Path) -> None:
    parts = Parts(str(tmp_path / "out"), "jsonl")
    assert parts.claim({"a": 1})
    storage.write_bytes(f"{parts.to}/_counts/part-000000.json", b"{}")
    (tmp_path / "out" / "_scores.json").unlink()
    assert parts.claim({"a": 1})
    parts.forget()
    assert not (tmp_path / "out").exists()


def test_a_worker_that_has_no_place_anywhere_is_told(monkeypatch: pytest.MonkeyPatch, heard: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
    require_place(2, 0, joined=False)
    with pytest.raises(InputError, match=r"a worker needs 1 GPU \(0\) of what the cluster has"):
        require_place(1, 1, joined=False)
    require_place(4, 1, joined=True)
    assert "a worker needs 4 CPU (2) and 1 GPU (0) of what the cluster has (in brackets): waiting" in heard.text
