"""Where the results of tasks lie: a file per task and kind of result, and files that are named by what they hold."""

from ctrsink import storage


def path_of(folder: str, number: int, kind: str) -> str:
    """The file of one kind of result of task `number`."""
    return storage.join(folder, f"{number:06d}.{kind}")


def numbers_of(folder: str, kind: str) -> set[int]:
    """Tasks that have a result of that kind."""
    return {int(name.removesuffix(f".{kind}")) for name in storage.list_files(folder) if name.endswith(f".{kind}")}


def write_named(folder: str, name: str, content: bytes) -> str:
    """Write an Arrow stream that all tasks read; returns the file, whose name depends on the content."""
    path = storage.join(folder, f"{name}-{storage.sha256(content)[:16]}.arrow")
    storage.write_bytes(path, content)
    return path
