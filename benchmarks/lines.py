"""Measurements kept as they are made, so that a run that was killed goes on where it was."""

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Lines:
    """One JSON object a line: what was measured (`key`, any JSON object) and what came out (`row`).

    A later line with the same key replaces the earlier one. A line cut short by a kill is passed over.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: dict[str, tuple[Row, Row]] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            self._entries[_text(entry["key"])] = (entry["key"], entry["row"])

    def __contains__(self, key: Row) -> bool:
        return _text(key) in self._entries

    def __getitem__(self, key: Row) -> Row:
        return self._entries[_text(key)][1]

    def add(self, key: Row, row: Row) -> None:
        """Keep it, in the file too."""
        self._entries[_text(key)] = (key, row)
        cut_short = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if cut_short else "") + json.dumps({"key": key, "row": row}) + "\n")

    def of(self, **wanted: Any) -> list[Row]:
        """The rows whose keys have these values, in the order in which they were measured first."""
        return [row for _, row in self.entries(**wanted)]

    def entries(self, **wanted: Any) -> list[tuple[Row, Row]]:
        """The same with their keys."""
        return [(key, row) for key, row in self._entries.values() if wanted.items() <= key.items()]


def _text(key: Row) -> str:
    return json.dumps(key, sort_keys=True)
