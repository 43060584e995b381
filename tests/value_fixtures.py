"""A small shop: its item table as JSON, a log over it, and how both are prepared."""

import json
from pathlib import Path
from typing import Any

from ctrsink.config.data import ColumnSpec, PrepareSpec, SourceSpec, SplitSpec, TextSpec, TokenizerSpec

SHOP = [("Tea, loose", "6.50"), ("Large mug", "9.00"), ("Tea pot", "24.00"), ("Spoon", "1e1"), ("Tray", "7"), ("Bowl", "0.30")]


def shop_items(path: Path) -> list[dict[str, Any]]:
    """Writes an item table and returns what a client has of each item: the values of its JSON."""
    lines = [
        f'{{"item": "i{n}", "title": "{title}", "price": {price}, "tags": [{price}, true, null], "vegan": true}}'
        for n, (title, price) in enumerate(SHOP)
    ]
    path.write_text("\n".join(lines))
    return [{name: value for name, value in json.loads(line).items() if name != "item"} for line in lines]


def log_rows(users: list[Any], count: int = 60) -> dict[str, list[Any]]:
    return {
        "user": [users[n % len(users)] for n in range(count)],
        "item": [f"i{(n + n // 7) % len(SHOP)}" for n in range(count)],
        "timestamp": [1_700_000_000 + 3600 * n for n in range(count)],
        "click": [int(n % 3 > 0) for n in range(count)],
    }


def spec_for(path: Path, items: Path | None = None, **text: Any) -> PrepareSpec:
    source = SourceSpec(
        kind="table", path=str(path), items=items and str(items), columns=ColumnSpec(feedback="click", label="click")
    )
    return PrepareSpec(
        source=source,
        text=TextSpec.model_validate({"item": "{title}" if items else "{item}"} | text),
        tokenizer=TokenizerSpec(train_vocabulary=320),
        split=SplitSpec(train=0.6, valid=0.2),
    )


def write_jsonl(path: Path, table: dict[str, list[Any]]) -> Path:
    rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
