"""Where a model lies: in the folder that is named, or where a pointer leads to."""

from dataclasses import dataclass

from ctrsink import storage
from ctrsink.errors import InputError

CONFIG = "config.json"
_MOST_BYTES = 4096


@dataclass(frozen=True)
class Target:
    """What `--model` leads to now."""

    folder: str
    watched: bool
    """It may lead elsewhere later."""


def resolve(model: str) -> Target:
    """The folder that `model` names: a folder with a model, a link to one, or a file whose one line names it.

    A name in the file is relative to the file's folder; it may be a whole path or s3://, but a file on S3 names nothing local.

    Raises:
        InputError: it is neither, or the file does not name a folder.
    """
    if not storage.is_remote(model) and storage.local_path(model).is_symlink():
        path = storage.local_path(model).resolve()
        return Target(str(path) if path.is_dir() else resolve(str(path)).folder, True)
    if storage.exists(storage.join(model, CONFIG)):
        return Target(model, False)
    try:
        content = storage.read_bytes(model) if storage.info(model).bytes <= _MOST_BYTES else None
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"{model} holds no model, and is no pointer to one: `ctrsink export` writes a model") from None
    return Target(_named(model, content), True)


def _named(pointer: str, content: bytes | None) -> str:
    try:
        name = (content or b"").decode().strip()
    except UnicodeDecodeError:
        name = ""
    if not name or not name.isprintable():
        raise InputError(f"{pointer} does not name a model: its one line must be the model's folder")
    if storage.is_remote(name) or (name.startswith("/") and not storage.is_remote(pointer)):
        return name
    if name.startswith("/"):
        raise InputError(f"{pointer} names {name}: a pointer on S3 names a folder relative to it, or s3://")
    above = pointer.rstrip("/").rpartition("/")[0] or ("/" if pointer.startswith("/") else ".")
    return storage.join(above, name)
