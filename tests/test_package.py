"""What of a folder is sent to a cluster: no secret, no data, nothing behind a link, the same bytes for the same files."""

import os
import zipfile
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctrsink.errors import InputError
from ctrsink.runtime.package import DATA, LIMIT_BYTES, SECRETS, TOOLS, require_fits, survey, write_archive
from tests.command_line import call, refused
from tests.runs import run_tree


def fill(root: Path, *names: str, **texts: str) -> None:
    for name in (*names, *texts):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(texts.get(name, "x"))


def test_each_reason_is_told_with_the_names(tmp_path: Path) -> None:
    fill(
        tmp_path,
        "run.yaml",
        "code/a.py",
        ".hg/hgrc",
        ".git/config",
        "code/__pycache__/a.pyc",
        "runs/a/metrics.jsonl",
        "w.safetensors",
    )
    fill(tmp_path, ".netrc", "storage.env", "KEYS/ID_RSA", "draft.py", **{".gitignore": "draft*\n"})
    (tmp_path / "elsewhere").symlink_to("/etc")
    package = survey(tmp_path)
    assert list(package.files) == [".gitignore", "code/a.py", "run.yaml"]
    assert package.left_out == {
        "tools": [".hg", "code/__pycache__"],
        "credentials": [".git", ".netrc", "KEYS/ID_RSA", "storage.env"],
        "ignored": ["draft.py"],
        "links": ["elsewhere"],
        "data, weights and runs": ["runs", "w.safetensors"],
    }
    assert package.size == sum(package.files.values()) == 9


def test_a_rule_of_the_user_brings_data_back_and_no_secret(tmp_path: Path) -> None:
    fill(tmp_path, "a.csv", "b.csv", "sub/c.csv", "sub/d.txt", ".env", **{".rayignore": "!*.csv\n!.env\nb.csv\n"})
    (tmp_path / "sub/.rayignore").write_text("/d.txt\n")
    assert list(survey(tmp_path).files) == [".rayignore", "a.csv", "sub/.rayignore", "sub/c.csv"]


def test_what_programs_keep_credentials_in_is_not_sent(tmp_path: Path) -> None:
    names = [".envrc", ".env~", "prod.env.bak", ".vault-token", ".cache/huggingface/token", ".dockercfg", ".htpasswd", ".my.cnf"]
    names += [".kaggle/kaggle.json", ".streamlit/secrets.toml", "secrets.toml", "credentials.yaml", "kubeconfig.yaml", "a.ppk"]
    code = ["credentials.py", "environment.env.py", "secrets.py"]
    fill(tmp_path, *names, ".git/config", "sub/kubeconfig", *code)
    assert list(survey(tmp_path).files) == code


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    secret=st.sampled_from(SECRETS),
    middle=st.text("abz09", max_size=5),
    where=st.sampled_from(["", "sub/", "a/b/c/", ".hidden/", "runs/"]),
    below=st.sampled_from(["", "/config", "/deep/er"]),
    rules=st.sampled_from(["", "!*\n", "!**\n!.*\n", "*\n!**/\n!*\n"]),
)
def test_no_secret_is_sent_from_anywhere(tmp_path: Path, secret: str, middle: str, where: str, below: str, rules: str) -> None:
    root = tmp_path / str(len(list(tmp_path.iterdir())))
    name = where + secret.replace("*", middle) + below
    fill(root, name, "kept.py", **{".rayignore": rules})
    assert set(survey(root).files) <= {".rayignore", "kept.py"}


def test_the_same_files_are_the_same_bytes(tmp_path: Path) -> None:
    for number, order in enumerate((("b.py", "a/c.py"), ("a/c.py", "b.py"))):
        fill(tmp_path / f"root{number}", *order)
        os.utime(tmp_path / f"root{number}" / "b.py", (number, 10**9 * number))
        write_archive(survey(tmp_path / f"root{number}"), tmp_path / f"{number}.zip")
    assert (tmp_path / "0.zip").read_bytes() == (tmp_path / "1.zip").read_bytes()
    (tmp_path / "root0/b.py").chmod(0o755)
    write_archive(survey(tmp_path / "root0"), tmp_path / "2.zip")
    assert (tmp_path / "2.zip").read_bytes() != (tmp_path / "0.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "2.zip") as archive:
        assert archive.namelist() == ["a/c.py", "b.py"]


def test_too_much_is_refused_with_the_largest(tmp_path: Path) -> None:
    fill(tmp_path, "small.py", "big", "bigger")
    os.truncate(tmp_path / "big", LIMIT_BYTES // 2)
    os.truncate(tmp_path / "bigger", LIMIT_BYTES // 2 + 2**20)
    with pytest.raises(InputError, match=r"3 files with 101\.0 MiB.*takes 100\.0 MiB.*bigger \(51\.0 MiB\), big \(50\.0 MiB\)"):
        require_fits(survey(tmp_path))


def test_a_dry_run_shows_every_file_and_needs_no_cluster(tmp_path: Path) -> None:
    fill(tmp_path, *(f"f{number}" for number in range(9)), **{"big.py": "x" * 5000, "odd\x1b[2J": "y"})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_tree("s3://b/data", "s3://b/run")))
    result = call("submit", "--config", tmp_path / "run.yaml", "--working-dir", tmp_path, "--dry-run", "--json")
    assert result.code == 0, result.err
    assert result.json == {"files": 12, "bytes": survey(tmp_path).size, "left_out": {}}
    lines = result.err.splitlines()
    assert lines[1].split() == ["4.9", "KiB", "big.py"]
    assert len(lines) == 13
    assert "\x1b" not in result.err


def test_a_configuration_that_stays_here_is_refused(tmp_path: Path) -> None:
    tree = run_tree("s3://b/data", "s3://b/run")
    fill(tmp_path, **{".gitignore": "own/\n", "run.yaml": "include: [own/base.yaml]\n", "own/base.yaml": yaml.safe_dump(tree)})
    submit = ["submit", "--working-dir", tmp_path, "--dry-run", "--config"]
    refused(call(*submit, tmp_path / "run.yaml"), "own/base.yaml configures the run but is not sent")
    fill(tmp_path.parent, **{"base.yaml": yaml.safe_dump(tree)})
    (tmp_path / "run.yaml").write_text("include: [../base.yaml]\n")
    refused(call(*submit, tmp_path / "run.yaml"), "base.yaml lies outside", "give --working-dir")


def test_plain_ray_leaves_the_same_here(repository: Path) -> None:
    patterns = [line for line in (repository / ".rayignore").read_text().splitlines() if not line.startswith("#")]
    assert patterns[: -len(("benchmarks", "docs", "tests"))] == [*SECRETS, *TOOLS, *DATA]
