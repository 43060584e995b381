"""The image, as far as it can be checked without an engine: instructions, pins, files, user, shell syntax."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

Instruction = tuple[str, str]


def instructions(path: Path) -> list[Instruction]:
    """Pairs of keyword and argument; comments are dropped and continued lines joined, as the format defines it."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", "", "\n".join(lines))
    pairs = [line.strip().split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(keyword.upper(), argument) for keyword, argument in pairs]


@pytest.fixture(scope="module")
def image(repository: Path) -> list[Instruction]:
    return instructions(repository / "Dockerfile")


def arguments(image: list[Instruction], keyword: str) -> list[str]:
    return [argument for found, argument in image if found == keyword]


def test_base_is_a_cuda_image_pinned_to_one_release(image: list[Instruction]) -> None:
    assert image[0][0] == "FROM"
    bases = arguments(image, "FROM")
    assert all(re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-devel-ubuntu\d\d\.\d\d", base) for base in bases), bases


def test_runs_as_a_numbered_user_that_is_not_root(image: list[Instruction]) -> None:
    user = arguments(image, "USER")[-1]
    assert int(user) > 0  # a number, so that Kubernetes can check runAsNonRoot
    assert f"--uid {user} " in " ".join(arguments(image, "RUN"))
    last_change = max(i for i, (keyword, _) in enumerate(image) if keyword in {"RUN", "COPY", "ADD"})
    assert last_change < max(i for i, (keyword, _) in enumerate(image) if keyword == "USER")


def test_every_copied_file_exists_and_is_let_through(image: list[Instruction], repository: Path) -> None:
    allowed = {line[1:] for line in (repository / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    sources = [source for argument in arguments(image, "COPY") for source in argument.split()[:-1]]
    assert {"pyproject.toml", "ctrsink", "launchers", "configs"} <= set(sources)
    for source in sources:
        assert (repository / source).exists(), source
        assert source in allowed, f".dockerignore hides {source}"


def test_pins_agree_with_pyproject(image: list[Instruction], repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    ranges = {r.name: r.specifier for r in map(Requirement, project["dependencies"])}
    quoted = [word for argument in arguments(image, "RUN") for word in re.findall(r'pip install [^&]*"([^"]+)"', argument)]
    pins = [Requirement(word) for word in quoted if not word.startswith(".")]
    assert [pin.name for pin in pins] == ["torch"]
    for pin in pins:
        (only,) = pin.specifier
        assert only.operator == "=="
        assert only.version in ranges[pin.name]
    assert ".[train,serve]" in quoted
    assert {"train", "serve"} <= project["optional-dependencies"].keys()


def test_commands_are_valid_shell(image: list[Instruction]) -> None:
    for command in arguments(image, "RUN"):
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr}"


def test_linter_finds_nothing(repository: Path) -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, "--no-color", repository / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_holds_no_secret(image: list[Instruction]) -> None:
    for keyword, argument in image:
        if keyword in {"ENV", "ARG"}:
            assert not re.search(r"(?i)secret|password|token|access_key", argument), argument


def test_dependencies_are_installed_from_pyproject_alone(tmp_path: Path, repository: Path) -> None:
    """The layer with the dependencies is built before any code is copied: the project's metadata must be enough."""
    (tmp_path / "pyproject.toml").write_bytes((repository / "pyproject.toml").read_bytes())
    (tmp_path / "ctrsink").mkdir()
    for name in ("README.md", "LICENSE", "ctrsink/__init__.py"):
        (tmp_path / name).touch()
    build = "from setuptools import build_meta; print(build_meta.prepare_metadata_for_build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    metadata = next(tmp_path.glob("*.dist-info/METADATA")).read_text()
    assert "Provides-Extra: train" in metadata
