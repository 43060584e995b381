"""MIND: news that were shown together and which of them were clicked, after what each user clicked before."""

import base64
import json
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from ctrsink import storage
from ctrsink.config.data import ColumnSpec
from ctrsink.dataset.arrow import pc
from ctrsink.errors import InputError
from ctrsink.prepare.check_rows import RawRows, check_items
from ctrsink.prepare.sources.cut import cut_lines
from ctrsink.prepare.sources.delimited import read_delimited
from ctrsink.prepare.sources.files import read_part, read_whole, size_of
from ctrsink.prepare.sources.raw_log import Block

_MAPPING = ColumnSpec(feedback="feedback", label="label", request="request")
_BEHAVIORS = "behaviors.tsv"
_ROW = ("id", "user", "time", "history", "shown")
_NEWS = ("item", "category", "subcategory", "title", "abstract", "url", "title_entities", "abstract_entities")
_TIME = "%m/%d/%Y %I:%M:%S %p"
_GROWTH = 4  # a row repeats its user, time and request in each of its events
_SHOWN = r"^\S+-[01](\s+\S+-[01])*$"


@dataclass(frozen=True)
class Mind:
    """A folder with `behaviors.tsv` and `news.tsv`, or a folder of such folders (`MINDsmall_train`, `MINDsmall_dev`).

    An impression is a news that was shown: `feedback` and `label` say whether it was clicked. Those of one row share its time
    (taken as UTC) and its `request`: the row's id, with the folder's name before it where there are several.

    Each row repeats what its user clicked before the log begins. Of that only the history of the user's earliest row in all
    folders is taken: as events without a label and with feedback 1, a second apart, the last a second before that row. A shown
    or clicked news that no `news.tsv` has is a bad row, as in every source.
    """

    path: str
    columns: ColumnSpec = _MAPPING

    def items(self) -> pa.Table:
        """The news of all folders, each once: `title`, `abstract`, `category`, `subcategory`."""
        tables: list[pa.Table] = []
        for folder in self._folders():
            uri = storage.join(folder, "news.tsv")
            raw = read_delimited(uri, read_whole(uri), "\t", _NEWS, keep=_NEWS[:5])
            tables.append(check_items(raw))
        news = pa.concat_tables(tables)
        _, first = np.unique(_codes(news.column("item")), return_index=True)
        return news.take(pa.array(np.sort(first))).combine_chunks()

    def blocks(self, block_bytes: int) -> list[Block]:
        """The behaviours cut at lines; reads them once, to find each user's earliest row."""
        folders = self._folders()
        pieces: list[Block] = []
        for folder in folders:
            uri = storage.join(folder, _BEHAVIORS)
            request = f"{folder.rstrip('/').rpartition('/')[2]}-" if len(folders) > 1 else ""
            bytes_of_text = max(block_bytes // _GROWTH, 1)
            pieces += [Block(uri, start, end, request) for start, end in cut_lines(uri, 0, size_of(uri), bytes_of_text)]
        rows = [_rows(block).table.select(["user", "time"]) for block in pieces]
        earliest = _earliest(pa.concat_tables(rows))
        blocks: list[Block] = []
        for block, table in zip(pieces, rows, strict=True):
            bits, earliest = np.packbits(earliest[: table.num_rows]), earliest[table.num_rows :]
            form = json.dumps({"request": block.form, "earliest": base64.b64encode(bits.tobytes()).decode()})
            blocks.append(replace(block, form=form))
        return blocks

    def read(self, block: Block) -> RawRows:
        """Impressions, and before them the histories of the users whose earliest row is here."""
        form = json.loads(block.form)
        raw = _rows(block)
        rows = raw.table.append_column("request", pc.binary_join_element_wise(form["request"], raw.table.column("id"), ""))
        bits = np.frombuffer(base64.b64decode(form["earliest"]), np.uint8)
        earliest = np.flatnonzero(np.unpackbits(bits, count=rows.num_rows))
        past, past_row = _history(rows.take(pa.array(earliest)))
        shown, shown_row = _impressions(rows)
        row = np.concatenate([earliest[past_row], shown_row])
        order = np.argsort(row, kind="stable")
        events = pa.concat_tables([past, shown]).take(pa.array(order))
        return replace(raw, table=events, numbers=raw.numbers[row[order]])

    def _folders(self) -> list[str]:
        if storage.exists(storage.join(self.path, _BEHAVIORS)):
            return [self.path]
        below = [storage.join(self.path, name) for name in storage.list_dirs(self.path)]
        found = [folder for folder in below if storage.exists(storage.join(folder, _BEHAVIORS))]
        if not found:
            raise InputError(f"{self.path} holds no {_BEHAVIORS}, nor does a folder in it: unpack MIND there")
        return found


def _rows(block: Block) -> RawRows:
    """The rows of a block that can be used, with `time` in seconds; the others are broken."""
    raw = read_delimited(block.file, read_part(block.file, block.start, block.end), "\t", _ROW)
    cells = raw.table.column("time")
    time = pc.cast(pc.strptime(cells, format=_TIME, unit="s", error_is_null=True), pa.int64())
    shown = pc.utf8_trim_whitespace(pc.fill_null(raw.table.column("shown"), ""))
    checks = (
        (pc.is_valid(raw.table.column("user")), "user", "column user: a value is missing"),
        (pc.is_valid(time), "time", "column time: {} is no time like 11/15/2019 8:55:22 AM"),
        (pc.match_substring_regex(shown, _SHOWN), "shown", "column impressions: {} does not say which news were clicked"),
    )
    good = np.ones(raw.table.num_rows, bool)
    broken = list(raw.broken)
    for mask, column, why in checks:
        bad = good & ~np.asarray(mask)
        good &= ~bad
        for index in np.flatnonzero(bad):
            value = str(raw.table.column(column)[int(index)].as_py() or "")
            broken.append((int(raw.numbers[index]), why.format(repr(value[:40]))))
    table = raw.table.set_column(2, "time", time).set_column(4, "shown", shown)
    return replace(raw, table=table.filter(pa.array(good)), numbers=raw.numbers[good], broken=sorted(broken), taken=raw.file_rows)


def _earliest(rows: pa.Table) -> np.ndarray:
    """Which rows are the first of their user, by time and then by place: bool per row."""
    user, time = _codes(rows.column("user")), rows.column("time").to_numpy()
    order = np.lexsort((time, user))
    first = np.ones(len(order), bool)
    first[1:] = np.diff(user[order]) != 0
    found = np.zeros(len(order), bool)
    found[order[first]] = True
    return found


def _history(rows: pa.Table) -> tuple[pa.Table, np.ndarray]:
    """The clicks before each of `rows` as events, and the row of each."""
    news, row = _split(pc.fill_null(rows.column("history"), ""))
    end = np.searchsorted(row, row, side="right")
    time = rows.column("time").to_numpy()[row] - (end - np.arange(len(row)))
    nothing = pa.nulls(len(row))
    return _events(rows, row, news, time, pa.array(np.ones(len(row), np.int8)), nothing, nothing), row


def _impressions(rows: pa.Table) -> tuple[pa.Table, np.ndarray]:
    """What was shown in each of `rows` as events, and the row of each."""
    shown, row = _split(rows.column("shown"))
    clicked = pc.cast(pc.ends_with(shown, "-1"), pa.int8())
    request = rows.column("request").combine_chunks().take(pa.array(row))
    time = rows.column("time").to_numpy()[row]
    return _events(rows, row, pc.utf8_slice_codeunits(shown, 0, -2), time, clicked, clicked, request), row


def _events(
    rows: pa.Table, row: np.ndarray, item: pa.Array, time: np.ndarray, feedback: pa.Array, label: pa.Array, request: pa.Array
) -> pa.Table:
    user = rows.column("user").combine_chunks().take(pa.array(row))
    columns = {"user": user, "item": item, "timestamp": pa.array(time), "feedback": feedback}
    return pa.table({**columns, "label": pc.cast(label, pa.int8()), "request": pc.cast(request, pa.string())})


def _split(cells: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray]:
    """The words of all cells, and the cell of each."""
    words = pc.ascii_split_whitespace(cells).combine_chunks()
    flat, row = words.flatten(), pc.list_parent_indices(words)
    some = pc.not_equal(flat, "")
    return flat.filter(some), row.filter(some).to_numpy()


def _codes(values: pa.ChunkedArray) -> np.ndarray:
    """A number for each distinct value, in the order of appearance."""
    return values.combine_chunks().dictionary_encode().indices.to_numpy()
