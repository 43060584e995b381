"""What of a folder is sent to a cluster: which files, how large, what stays here and why, and all of it as one archive."""

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

from pathspec import GitIgnoreSpec

from ctrsink.errors import InputError

SECRETS = (
    ".env", ".env.*", "*.env", "*.env.bak", "*.env.old", ".env~", ".envrc", ".aws", ".azure", ".boto", ".cache", ".config",
    ".databrickscfg",
    ".docker", ".dockercfg", ".git", ".git-credentials", ".gnupg", ".htpasswd", ".huggingface", ".kaggle", ".kube", ".my.cnf",
    ".netrc", ".npmrc", ".pgpass", ".pypirc", ".ray", ".s3cfg", ".ssh", ".streamlit", ".vault-token", "*.key", "*.pem", "*.p12",
    "*.pfx", "*.ppk", "*.jks", "*.keystore", "*.kdbx", "*.tfstate", "*.tfstate.*", "id_rsa*", "id_dsa*", "id_ecdsa*",
    "id_ed25519*", "kubeconfig*", "rclone.conf", "credentials", "service-account*.json",
    "credentials.json", "credentials.yaml", "credentials.yml", "credentials.toml", "credentials.ini",
    "secrets.json", "secrets.yaml", "secrets.yml", "secrets.toml", "secrets.ini",
)  # fmt: skip
"""Files and folders that programs keep credentials in, as .gitignore would name them; the cluster has its own."""
TOOLS = (
    ".hg", ".svn", ".venv", "venv", "node_modules", "__pycache__", "*.pyc", ".*_cache", ".hypothesis", ".tox",
    ".ipynb_checkpoints", ".idea", ".vscode", "*.egg-info", ".DS_Store",
)  # fmt: skip
"""What programs of a developer leave in a folder."""
DATA = (
    "runs/", "mlruns/", "wandb/", "checkpoints/", "*.csv", "*.tsv", "*.jsonl", "*.parquet", "*.arrow", "*.feather", "*.npy",
    "*.npz", "*.h5", "*.hdf5", "*.tfrecord", "*.safetensors", "*.pt", "*.pth", "*.ckpt", "*.bin", "*.gguf", "*.onnx", "*.zip",
    "*.tar", "*.tar.*", "*.tgz", "*.gz", "*.zst", "*.7z", "*.whl", "*.log",
)  # fmt: skip
"""Logs, data sets, weights, runs, checkpoints: they lie on s3:// or on a disk that every node has."""
IGNORED = (".gitignore", ".rayignore")
"""Files of patterns; `!pattern` in one of them sends what TOOLS or DATA would leave here, and nothing sends a secret."""
LIMIT_BYTES = 100 * 2**20
"""The most that Ray's job server takes."""

_SECRETS = GitIgnoreSpec.from_lines([pattern.lower() for pattern in SECRETS])
_TOOLS, _DATA = (GitIgnoreSpec.from_lines(patterns) for patterns in (TOOLS, DATA))


@dataclass(frozen=True)
class Package:
    """Files of a folder by their paths there, with their sizes in bytes, and what is left out, by the reason why."""

    root: Path
    files: dict[str, int]
    left_out: dict[str, list[str]]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())

    def largest(self) -> list[tuple[str, int]]:
        """Files and their bytes, the largest first."""
        return sorted(self.files.items(), key=lambda file: (-file[1], file[0]))


def survey(root: Path) -> Package:
    """Look what of the folder `root` would be sent.

    Raises:
        InputError: a folder or a file of patterns cannot be read, or a name is not UTF-8.
    """
    package = Package(root, {}, {})
    try:
        _walk(package, root, "", [])
    except OSError as error:
        raise InputError(
            f"{error.filename}: {error.strerror}: it cannot be sent: correct its rights or name it in .rayignore"
        ) from None
    return package


def require_fits(package: Package) -> None:
    """Raise InputError where the job server would not take so much."""
    if package.size > LIMIT_BYTES:
        largest = ", ".join(f"{readable(name)} ({mib(size)})" for name, size in package.largest()[:3])
        raise InputError(
            f"{package.root} has {len(package.files)} files with {mib(package.size)} to send, and the job server takes "
            f"{mib(LIMIT_BYTES)}: name the large ones in .rayignore, or give a smaller --working-dir; the largest: {largest}"
        )


def write_archive(package: Package, target: Path) -> None:
    """Write the files as a zip whose bytes depend on nothing but their paths, their contents and who may execute them."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(package.files):
            path = package.root / name
            entry = zipfile.ZipInfo(name)  # of 1980
            entry.external_attr = (0o755 if os.access(path, os.X_OK) else 0o644) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            try:
                archive.writestr(entry, path.read_bytes())
            except OSError as error:
                raise InputError(f"{path}: {error.strerror}: it cannot be sent: name it in .rayignore") from None


def mib(size: int) -> str:
    """A size as people read it."""
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"


def readable(name: str) -> str:
    """A file's name that cannot move a terminal's cursor."""
    return name if name.isprintable() else ascii(name)


def _walk(package: Package, folder: Path, prefix: str, above: list[tuple[str, GitIgnoreSpec]]) -> None:
    own = [line for name in IGNORED if (folder / name).is_file() for line in _lines(folder / name)]
    specs = [(prefix, GitIgnoreSpec.from_lines(own)), *above] if own else above
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        name = prefix + entry.name
        if not name.isascii():
            _require_utf8(name)
        if (why := _left_out(entry, name, specs)) is not None:
            package.left_out.setdefault(why, []).append(name)
        elif entry.is_dir():
            _walk(package, Path(entry.path), f"{name}/", specs)
        else:
            package.files[name] = entry.stat().st_size


def _left_out(entry: os.DirEntry[str], name: str, specs: list[tuple[str, GitIgnoreSpec]]) -> str | None:
    """Why it stays here; None where it is sent."""
    folder = entry.is_dir(follow_symlinks=False)
    path = f"{name}/" if folder else name
    if _SECRETS.match_file(path.lower()):
        return "credentials"
    if entry.is_symlink():
        return "links"
    if not folder and not entry.is_file():
        return "no files"
    for prefix, spec in specs:  # the innermost first, as git has it
        if (said := spec.check_file(path.removeprefix(prefix)).include) is not None:
            return "ignored" if said else None
    if _TOOLS.match_file(path):
        return "tools"
    return "data, weights and runs" if _DATA.match_file(path) else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path}: it is no UTF-8, so its patterns cannot be read: correct it") from None


def _require_utf8(name: str) -> None:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{name!a}: this name is no UTF-8 and cannot be sent: rename the file") from None
