"""After `import ctrsink`, in either order, transformers' auto classes load what was exported; else they say what is missing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from ctrsink.dataset.reader import Dataset
from ctrsink.export.package import export_run
from ctrsink.serve import Scorer, request_of
from tests.serving_fixtures import prepared, run_spec, write_run


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("auto")
    spec = run_spec(prepared(folder), str(folder / "run"))
    write_run(spec)
    export_run(spec.run_dir, str(folder / "out"))
    return folder / "out"


@pytest.mark.parametrize("first", ["import ctrsink", "from transformers import AutoModel", ""])
def test_import_ctrsink_is_enough(exported: Path, first: str, repository: Path) -> None:
    """`AutoModel` is imported before it, after it, or without it."""
    then = "" if not first else "import ctrsink\n"
    program = f"{first}\nfrom transformers import AutoConfig, AutoModel, AutoTokenizer\n{then}folder = {str(exported)!r}\n"
    program += "AutoTokenizer.from_pretrained(folder)\nAutoConfig.from_pretrained(folder)\n"
    program += "print(type(AutoModel.from_pretrained(folder)).__name__)"
    environment = os.environ | {"PYTHONPATH": str(repository), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    if first:
        assert (done.returncode, done.stdout.split()) == (0, ["CTRSinkModel"]), done.stderr
    else:
        assert done.returncode != 0
        assert "has model type `ctrsink (import ctrsink first)` but Transformers does not recognize" in done.stderr


def test_importing_it_imports_nothing_heavy(repository: Path) -> None:
    program = (
        "import ctrsink, sys\nprint([name for name in ('torch', 'transformers', 'numpy', 'pydantic') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=repository)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_folder_from_when_the_type_said_less_is_loaded_as_before(exported: Path) -> None:
    path = exported / "config.json"
    now = path.read_bytes()
    path.write_text(json.dumps(json.loads(now) | {"model_type": "ctrsink"}))
    try:
        assert type(AutoConfig.from_pretrained(exported)).__name__ == "CTRSinkConfig"
        dataset = Dataset(str(exported.parent / "data"))
        assert len(Scorer.load(str(exported)).score(request_of(dataset, 0, 5, [0, 1]))) == 2
    finally:
        path.write_bytes(now)


def test_asking_for_the_spec_of_the_auto_classes_loses_nothing(exported: Path, repository: Path) -> None:
    program = "import ctrsink, importlib.util\nimportlib.util.find_spec('transformers.models.auto.modeling_auto')\n"
    program += f"from transformers import AutoModel\nprint(type(AutoModel.from_pretrained({str(exported)!r})).__name__)"
    environment = os.environ | {"PYTHONPATH": str(repository), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout.split()) == (0, ["CTRSinkModel"]), done.stderr
