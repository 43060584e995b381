"""Where an exported model appears: whole, or not at all."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ctrsink import storage
from ctrsink.errors import InputError
from ctrsink.folder import new_folder

CONFIG_NAME = "config.json"


def require_free(to: str) -> None:
    """Raise InputError where something is at `to` already."""
    if not storage.is_remote(to) and ((path := storage.local_path(to)).is_symlink() or path.is_file()):
        raise InputError(f"{to} is a {'link' if path.is_symlink() else 'file'}: choose a new folder for the exported model")
    if storage.exists(to) and (storage.list_files(to) or storage.list_dirs(to)):
        raise InputError(f"{to} is not empty: choose a new folder for the exported model")


@contextmanager
def published(to: str) -> Iterator[Path]:
    """A local folder to fill; it is at `to` when the block ends, and nothing is there when the block fails.

    On S3 the configuration goes last: without it a folder is no model.
    """
    if not storage.is_remote(to):
        with new_folder(Path(to.removeprefix("file://"))) as folder:
            yield folder
        return
    with tempfile.TemporaryDirectory(prefix="ctrsink-export-") as scratch:
        folder = Path(scratch)
        yield folder
        config = (folder / CONFIG_NAME).read_bytes()
        (folder / CONFIG_NAME).unlink()
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        require_free(to)  # others may have written there meanwhile
        try:
            storage.upload_dir(folder, to)
            storage.write_bytes(storage.join(to, CONFIG_NAME), config)
        except BaseException:
            for name in (CONFIG_NAME, *names):
                storage.delete(storage.join(to, name))
            raise
