"""Arrow tables as bytes, the same bytes for the same table, and columns as numpy arrays."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

pc: Any = pyarrow.compute  # its functions are made when it is imported: no type checker sees them

PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
"""Steps of a second, by the unit of a type of moments."""


def column_numpy(table: pa.Table, column: str, absent: float) -> np.ndarray:
    """A column of numbers, with `absent` where it is null."""
    return pc.fill_null(table.column(column), absent).combine_chunks().to_numpy(zero_copy_only=False)


def to_parquet(table: pa.Table) -> bytes:
    """Deterministic bytes: one row group, no dictionary whose size would decide on the encoding."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", use_dictionary=False, row_group_size=max(table.num_rows, 1))
    return sink.getvalue().to_pybytes()


def from_parquet(content: bytes, columns: list[str] | None = None, threads: bool = True) -> pa.Table:
    """The table of a Parquet file, or just some `columns` of it.

    Raises:
        pa.ArrowException: the content is no such file.
    """
    return pq.read_table(pa.BufferReader(content), columns=columns, use_threads=threads)


def to_ipc(table: pa.Table) -> bytes:
    """A packed Arrow stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        writer.write_table(table.combine_chunks())
    return sink.getvalue().to_pybytes()


def write_ipc(table: pa.Table, write: Callable[[memoryview], object]) -> None:
    """Hand the pieces of an Arrow stream that can be mapped to `write`, one behind another."""
    with pa.ipc.new_stream(_Sink(write), table.schema, options=pa.ipc.IpcWriteOptions(compression=None)) as writer:
        writer.write_table(table.combine_chunks())


class _Sink(io.RawIOBase):
    """What Arrow takes for a file, in pieces that are soon written."""

    def __init__(self, write: Callable[[memoryview], object]) -> None:
        super().__init__()
        self._write = write

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        self._write(memoryview(content))
        return len(content)


def pack(vectors: np.ndarray) -> pa.Array:
    """float16 [N, width] as a column of fixed-size binaries, little-endian, which Parquet reads at once."""
    content = np.ascontiguousarray(vectors, "<f2")
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(2 * content.shape[1]), len(content), [None, pa.py_buffer(content.tobytes())]
    )


def unpack(column: pa.ChunkedArray) -> np.ndarray:
    """What `pack` packed; read-only."""
    array = column.combine_chunks()
    width = array.type.byte_width // 2
    found = (
        np.frombuffer(array.buffers()[1], "<f2", width * len(array), 2 * width * array.offset)
        if len(array)
        else np.empty(0, "<f2")
    )
    return found.reshape(-1, width)


def from_ipc(content: bytes) -> pa.Table:
    """The table of an Arrow stream."""
    return pa.ipc.open_stream(pa.py_buffer(content)).read_all()
