"""Cells of a column that is a signal become what a data set keeps of them: the same in a log, an item table and a request."""

import numpy as np
import pyarrow as pa

from ctrsink.dataset.arrow import pc
from ctrsink.dataset.cells import numbers, truth_as_numbers
from ctrsink.dataset.values import one_form
from ctrsink.features.columns import UNKNOWN, Column
from ctrsink.features.fields import hashed

_LARGEST = float(np.finfo(np.float32).max)


def stored(column: Column, texts: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """The values of cells, which are texts or null.

    Returns:
        Numbers, float32, or trimmed texts [N], null where the cell is blank; and bool [N], which cells are neither blank nor a
        number that float32 holds.
    """
    if column.kind != "number":
        trimmed = pc.utf8_trim_whitespace(one_form(texts))
        return pc.if_else(pc.equal(trimmed, ""), pa.scalar(None, pa.string()), trimmed), np.zeros(len(texts), np.bool_)
    values, wrong = numbers(truth_as_numbers(texts))
    beyond = np.abs(values) > _LARGEST
    values = np.where(beyond, np.nan, values).astype(np.float32)
    return pa.array(values, mask=np.isnan(values)), wrong | beyond


def known(column: Column, values: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Of what was stored, or of statistics, what signals are computed from, [N].

    Numbers, float64, NaN where there is none; or of a category a hash, int64, UNKNOWN there.
    """
    if column.kind != "hashed":
        return pc.fill_null(pc.cast(values, pa.float64()), np.nan).to_numpy(zero_copy_only=False)
    rows, distinct = numbered(values)
    return np.array([UNKNOWN, *(hashed(column.name, value) for value in distinct)], np.int64)[rows + 1]


def numbered(texts: pa.Array | pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """The number of each text among the distinct ones, int64 [N], -1 where it is null; and these."""
    encoded = (texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts).dictionary_encode()
    return pc.fill_null(encoded.indices, UNKNOWN).to_numpy().astype(np.int64), encoded.dictionary.to_pylist()
