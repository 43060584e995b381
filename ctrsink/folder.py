"""A local folder that appears whole or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` to fill; it takes that name when the block ends, and is gone when the block fails.

    Raises:
        OSError: `target` exists and is not an empty folder.
    """
    made = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield beside
        # mkdtemp and safetensors keep others out; what is finished may be shared.
        beside.chmod(0o755)
        for path in beside.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        beside.replace(target)  # an empty folder of that name gives way
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        with suppress(OSError):  # others may have put something there
            for parent in made:
                parent.rmdir()
        raise
