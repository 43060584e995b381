"""What libraries say while a run trains, as a file in the run's folder."""

import logging
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from ctrsink import storage, terminal
from ctrsink.errors import InputError, RunError

NAME = "libraries.log"
log = logging.getLogger("ctrsink")


@contextmanager
def kept(run_dir: str) -> Generator[None, None, None]:
    """Keep there what is kept off the terminal meanwhile, and say so once; nothing appends to S3: there it comes at the end."""
    place = storage.join(run_dir, NAME)
    if not storage.is_remote(run_dir):
        with terminal.kept_in(storage.local_path(place)) as here:
            if here:
                log.info("what libraries say is in %s; --verbose shows it here", place)
            yield
        return
    with tempfile.TemporaryDirectory(prefix="ctrsink-libraries-") as folder:
        path = Path(folder, NAME)
        try:
            with terminal.kept_in(path) as here:
                if here:
                    log.info("what libraries say will be in %s at the end; --verbose shows it here", place)
                yield
        finally:
            if path.exists():
                with suppress(InputError, RunError, OSError):  # the run's own end is told
                    storage.upload(path, place)


def take_back(run_dir: str) -> None:
    """Take the file out of the folder of a run that never made a step: whoever reads why it failed finds it elsewhere."""
    place = storage.join(run_dir, NAME)
    if storage.is_remote(run_dir):
        with suppress(FileNotFoundError), tempfile.TemporaryDirectory(prefix="ctrsink-libraries-") as folder:
            path = Path(folder, NAME)
            path.write_bytes(storage.read_bytes(place))
            terminal.take_back(path)
        storage.delete(place)
    else:
        terminal.take_back(storage.local_path(place))
