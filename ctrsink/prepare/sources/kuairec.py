"""KuaiRec 2.0: short videos with how much of each was watched, captions and categories in Chinese."""

import csv
import json
import logging
import re
from dataclasses import dataclass, replace

import pyarrow as pa

from ctrsink import storage
from ctrsink.config.data import ColumnSpec
from ctrsink.errors import InputError
from ctrsink.prepare.check_rows import RawRows
from ctrsink.prepare.sources.delimited import csv_blocks, read_csv, read_csv_block
from ctrsink.prepare.sources.files import decoded, read_whole, require_columns
from ctrsink.prepare.sources.raw_log import Block

log = logging.getLogger("ctrsink.data")

_MAPPING = ColumnSpec(user="user_id", item="video_id", timestamp="timestamp", feedback="watch_ratio")
_COLUMNS = ("user_id", "video_id", "timestamp", "watch_ratio")
_CAPTIONS, _CATEGORIES = "kuairec_caption_category.csv", "item_categories.csv"
_LEVELS = [f"{level}_level_category_name" for level in ("first", "second", "third")]
_ROW = re.compile(r"[\r\n]+(?=\d+,)")  # what begins with an id
_FIELDS = ("caption", "cover", "topics", "category", "tags")


@dataclass(frozen=True)
class KuaiRec:
    """The folder `data` of KuaiRec 2.0, of which the big matrix is read, or one of its matrix files."""

    path: str
    columns: ColumnSpec = _MAPPING

    def items(self) -> pa.Table:
        """The videos: `caption`, `cover` (its text), `topics`, `category` (names, coarse to fine), `tags` (ids of categories).

        A field that is not known (`UNKNOWN` in the files) is an empty text, as are all but `tags` where a video has no caption.
        """
        found: dict[str, dict[str, str]] = {}
        for name, read in ((_CATEGORIES, _tags), (_CAPTIONS, _captions)):
            uri = storage.join(self._folder, name)
            for video, fields in read(uri).items() if storage.exists(uri) else ():
                found.setdefault(video, {}).update(fields)
        if not found:
            raise InputError(f"{self._folder} holds neither {_CAPTIONS} nor {_CATEGORIES}: put the files of KuaiRec 2.0 there")
        ids = sorted(found, key=int)
        return pa.table({"item": ids, **{name: [found[video].get(name, "") for video in ids] for name in _FIELDS}})

    def blocks(self, block_bytes: int) -> list[Block]:
        """The matrix cut at lines."""
        blocks = csv_blocks(self._matrix, block_bytes, _COLUMNS, quoted=False)
        if not blocks:
            raise InputError(f"{self._matrix} holds no event: it has no row")
        return blocks

    def read(self, block: Block) -> RawRows:
        """Views. A row without a time, as the small matrix has some, is no part of the log: nothing says what came before it."""
        raw = read_csv_block(block, _COLUMNS, quoted=False)
        timed = raw.table.column("timestamp").is_valid()
        if raw.table.num_rows == (kept := raw.table.filter(timed)).num_rows:
            return raw
        log.warning("%s: left out %d rows without a time", raw.file, raw.table.num_rows - kept.num_rows)
        return replace(raw, table=kept, numbers=raw.numbers[timed.to_numpy()], taken=raw.file_rows)

    @property
    def _folder(self) -> str:
        return self.path.rpartition("/")[0] if self.path.endswith(".csv") else self.path

    @property
    def _matrix(self) -> str:
        return self.path if self.path.endswith(".csv") else storage.join(self.path, "big_matrix.csv")


def _captions(uri: str) -> dict[str, dict[str, str]]:
    """Fields by video. The file has captions that break their row; a row that cannot be mended leaves its video without them."""
    header, *rows = _ROW.split(decoded(read_whole(uri)).lstrip())
    names = header.splitlines()[0].split(",")
    require_columns(uri, names, ("video_id", "manual_cover_text", "caption", "topic_tag", *_LEVELS))
    found: dict[str, dict[str, str]] = {}
    lost = 0
    for row in rows:
        cells = _cells(row, len(names))
        if cells is None:
            lost += 1
            continue
        known = {name: "" if cell == "UNKNOWN" else cell for name, cell in zip(names, cells, strict=True)}
        fields = {
            "caption": known["caption"],
            "cover": known["manual_cover_text"],
            "topics": " ".join(re.split(r"[\[\],\s\"']+", known["topic_tag"])).strip(),
            "category": "/".join(known[name] for name in _LEVELS if known[name]),
        }
        found.setdefault(known["video_id"], fields)
    if lost:
        log.warning("%s: %d rows are broken; their videos have no caption", uri, lost)
    return found


def _cells(row: str, count: int) -> list[str] | None:
    """The cells of a row with quotes as quotes, or, where that does not give `count` of them, as letters."""
    line = " ".join(row.split())  # also where a caption goes on in the next line
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_NONE):
        cells = next(csv.reader([line], quoting=quoting))
        if len(cells) == count:
            return [cell.strip() for cell in cells]
    return None


def _tags(uri: str) -> dict[str, dict[str, str]]:
    raw = read_csv(uri)
    found: dict[str, dict[str, str]] = {}
    for video, feat in zip(raw.column("video_id").to_pylist(), raw.column("feat").to_pylist(), strict=True):
        try:
            found[str(int(video))] = {"tags": " ".join(str(int(tag)) for tag in json.loads(feat))}
        except (TypeError, ValueError):
            raise InputError(f"{uri}: video {video!r} has the categories {feat!r}, they must look like [8, 27]") from None
    return found
