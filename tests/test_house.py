"""The rules of the repository hold: skips fail under CI, light imports stay light, one torch range, small files."""

import ast
import os
import statistics
import subprocess
import sys
import tomllib
from importlib.metadata import distributions, packages_distributions, requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as canonical

HERE = {canonical(distribution.name) for distribution in distributions()}

SUITE = {
    "test_skip.py": "import pytest\ndef test_skip(): pytest.skip('no server here')\n",
    "test_mark.py": "import pytest\n@pytest.mark.skipif(True, reason='not today')\ndef test_mark(): pass\n",
    "test_module.py": "import pytest\npytest.importorskip('no_such_module')\ndef test_module(): pass\n",
    "test_gpu.py": "import pytest\n@pytest.mark.gpu\ndef test_gpu(): assert False, 'ran'\n",
    "test_root.py": "import os, pytest\n@pytest.mark.root\ndef test_root(): assert os.geteuid() == 0\n",
    "test_slow.py": "import pytest\n@pytest.mark.slow\ndef test_slow(): pass\n",
    "test_xfail.py": "import pytest\n@pytest.mark.xfail(strict=True)\ndef test_xfail(): assert False\n",
    "test_good.py": "def test_good(): pass\n",
}


def run_suite(folder: Path, repository: Path, names: list[str], ci: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the named tests of SUITE under this project's conftest, on a machine without a visible GPU."""
    (folder / "conftest.py").write_bytes((repository / "tests/conftest.py").read_bytes())
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow\n    gpu\n    root\n")
    for name in names:
        (folder / name).write_text(SUITE[name])
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, *names],
        cwd=folder,
        env=os.environ | {"CI": ci, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )


def test_skip_is_a_failure_in_ci_alone(tmp_path: Path, repository: Path) -> None:
    names = ["test_skip.py", "test_mark.py", "test_module.py", "test_good.py"]
    at_home = run_suite(tmp_path, repository, names, "")
    assert at_home.returncode == 0, at_home.stdout
    assert "1 passed, 3 skipped" in at_home.stdout
    in_ci = run_suite(tmp_path, repository, names, "true", "--continue-on-collection-errors")
    assert in_ci.returncode != 0
    assert "1 failed, 1 passed, 2 errors" in in_ci.stdout
    for refused in ("test_skip.py::test_skip", "test_mark.py::test_mark", "test_module.py"):
        assert f"CI may not skip {refused}: " in in_ci.stdout


def test_ci_deselects_what_needs_a_gpu_or_minutes_and_accepts_an_expected_failure(tmp_path: Path, repository: Path) -> None:
    done = run_suite(tmp_path, repository, ["test_gpu.py", "test_slow.py", "test_xfail.py", "test_good.py"], "true")
    assert done.returncode == 0, done.stdout
    assert "1 passed, 2 deselected, 1 xfailed" in done.stdout


def test_what_needs_root_is_run_by_root_alone(tmp_path: Path, repository: Path) -> None:
    done = run_suite(tmp_path, repository, ["test_root.py", "test_good.py"], "true")
    assert done.returncode == 0, done.stdout
    root = sys.platform == "linux" and os.geteuid() == 0
    assert ("2 passed" if root else "1 passed, 1 deselected") in done.stdout


def test_slow_tests_run_when_asked_for(tmp_path: Path, repository: Path) -> None:
    done = run_suite(tmp_path, repository, ["test_slow.py", "test_good.py"], "true", "-m", "slow")
    assert done.returncode == 0, done.stdout
    assert "1 passed, 1 deselected" in done.stdout


def test_everything_but_training_is_imported_without_ray_and_deepspeed() -> None:
    program = """
import importlib, pkgutil, sys, ctrsink
heavy = ("ctrsink.train", "ctrsink.runtime", "ctrsink.__main__")
names = [m.name for m in pkgutil.walk_packages(ctrsink.__path__, "ctrsink.", onerror=None) if not m.name.startswith(heavy)]
for name in names:
    importlib.import_module(name)
print(len(names), sorted({"ray", "deepspeed"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, loaded = done.stdout.split(maxsplit=1)
    assert int(count) > 10
    assert loaded.strip() == "[]"


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make as from a shell, also where these tests were started by make with variables of its own."""
    inherited = {"MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "PIP_TORCH", "PYTHON", "MODEL"}
    environment = {name: value for name, value in os.environ.items() if name not in inherited}
    return subprocess.run(["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_makefile_installs_the_torch_range_of_the_package(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    declared = next(r for r in map(Requirement, project["dependencies"]) if r.name == "torch")
    shown = make(repository, "--dry-run", "--always-make", "demo")
    assert shown.returncode == 0, shown.stderr
    installed = next(line.split("'")[1] for line in shown.stdout.splitlines() if "'torch" in line)
    assert Requirement(installed).specifier == declared.specifier


def test_makefile_says_what_is_missing_without_a_python(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "Makefile").write_bytes((repository / "Makefile").read_bytes())
    (tmp_path / "pyproject.toml").touch()
    done = make(tmp_path, "PYTHON=", "demo")
    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stderr
    assert not (tmp_path / ".venv").exists()


def installed_with(extras: set[str]) -> set[str]:
    """Names of all that `pip install ctrsink[extras]` brings, by what the installed packages say that they need."""
    found: set[str] = set()
    todo = [("ctrsink", extras)]
    while todo:
        name, wanted = todo.pop()
        for line in (requires(name) if name == "ctrsink" or canonical(name) in HERE else None) or []:
            needed = Requirement(line)
            if canonical(needed.name) in found or not any(
                needed.marker is None or needed.marker.evaluate({"extra": extra}) for extra in {"", *wanted}
            ):
                continue
            found.add(canonical(needed.name))
            todo.append((needed.name, set(needed.extras)))
    return found


def imports_at_once(file: Path) -> set[str]:
    """The packages that a module imports when it is imported itself."""
    names: set[str] = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"ctrsink", "cluster", "launchers"}


# `make demo` installs what training needs; who prepares, or scores with, a model has a plain install.
PLAIN = (
    "attention", "config", "dataset", "families", "features", "prepare", "sequences", "serve", "storage", "stream",
)  # fmt: skip


# What only `ctrsink serve` imports, once it has been asked for; the extra `serve` brings what they need.
SERVING = {"app.py", "plain.py", "metrics.py", "serve.py", "serve_gauges.py"}


def is_served(file: Path) -> bool:
    return file.parent.name in ("serve", "runtime") and file.name in SERVING


@pytest.mark.parametrize(
    ("folders", "extras"),
    [(("ctrsink", "launchers"), {"train"}), (PLAIN, set()), (("ctrsink/serve", "ctrsink/runtime"), {"serve"})],
    ids=["train", "plain", "serve"],
)
def test_what_is_imported_is_what_is_installed(folders: tuple[str, ...], extras: set[str], repository: Path) -> None:
    brought, packages = installed_with(extras), packages_distributions()
    assert "numpy" in brought
    assert "pytest" not in brought
    top = repository if extras else repository / "ctrsink"
    files = [file for folder in folders for file in (top / folder).rglob("*.py") if is_served(file) == (extras == {"serve"})]
    assert len(files) == len(SERVING) if extras == {"serve"} else len(files) > 50
    missing = {
        f"{file.relative_to(repository)}: {name}"
        for file in files
        for name in imports_at_once(file)
        if not {canonical(distribution) for distribution in packages.get(name, [name])} & brought
    }
    assert missing == set()


@pytest.mark.parametrize("folder", ["ctrsink", "launchers"])
def test_files_stay_small_and_are_no_drawers(folder: str, repository: Path) -> None:
    files = list((repository / folder).rglob("*.py"))
    lines = {file: len(file.read_text().splitlines()) for file in files}
    assert files
    assert [str(file) for file, count in lines.items() if count > 400] == []
    assert statistics.median(lines.values()) < 150
    assert [str(file) for file in files if file.stem in {"utils", "helpers", "misc", "common"}] == []


def test_hooks_before_a_commit_use_tools_that_the_project_installs(repository: Path) -> None:
    (group,) = yaml.safe_load((repository / ".pre-commit-config.yaml").read_text())["repos"]
    assert group["repo"] == "local"
    programs = [hook["entry"].split()[0] for hook in group["hooks"] if hook["language"] == "system"]
    assert len(programs) >= 4
    for program in programs:
        assert (Path(sys.executable).parent / Path(program).name).is_file(), program
