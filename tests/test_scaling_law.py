"""The curve of AUC by FLOPs that `benchmarks.scaling` fits and draws."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.scaling import fit, main
from ctrsink.errors import InputError


@given(st.floats(0.6, 0.95), st.floats(0.005, 0.1), st.floats(0.1, 1.5))
def test_a_planted_law_is_found(limit: float, scale: float, exponent: float) -> None:
    x = np.geomspace(0.01, 10, 8)
    law = fit(x.tolist(), (limit - scale * x**-exponent).tolist())
    assert law.at(x) == pytest.approx(limit - scale * x**-exponent, abs=2e-4)
    assert law.r_squared > 0.99


def test_too_few_sizes_are_refused() -> None:
    with pytest.raises(InputError, match="3 sizes: a curve of three unknowns needs at least four"):
        fit([1.0, 2.0, 3.0, 3.0], [0.7, 0.71, 0.72, 0.72])


def test_it_draws_what_a_study_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def variant(flops: float, runs: list[float]) -> dict[str, object]:
        return {"trained": {"flops": flops}, "metrics": {"auc": {"runs": runs}}}

    variants: dict[str, object] = {f"v{n}": variant(10.0**n, [0.9 - 10.0 ** (-n / 4 + 2)] * 2) for n in range(10, 15)}
    study = {
        "split": "test",
        "variants": {"item_mean": {"trained": {"flops": None}, "metrics": {"auc": {"runs": [0.6]}}}, **variants},
    }
    (tmp_path / "study.json").write_text(json.dumps(study), "utf-8")
    monkeypatch.setattr("sys.argv", ["scaling", str(tmp_path), "--json"])
    assert main() == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["variant"] for row in report["points"]] == sorted(variants)
    assert report["law"]["exponent"] == pytest.approx(0.25, abs=0.01)
    assert (tmp_path / "scaling.png").stat().st_size > 5000
