"""Reads rows from the pages of an SQLite file without SQLite, for files that are too damaged for it.

Looks at every page on its own, so damage to the header, to the schema or to inner pages of the tree loses no row. It
finds rows of all tables; the checksums of the rows say which of them are intact. The format is described at
https://www.sqlite.org/fileformat2.html.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import BinaryIO

__all__ = ["PAGE_BYTES", "FoundRow", "Value", "application_id", "read_rows"]

PAGE_BYTES: Final = 4096
"""Size of a page. `StateFile` sets it, because the header of a damaged file cannot be trusted."""

Value: TypeAlias = bytes | int | None
"""A text or blob, an integer, or NULL. A value that reaches into a lost page is cut off."""

_FILE_HEADER: Final = 100
_LEAF: Final = 0x0D
_LARGEST_VALUE: Final = 2**30
_INTEGER_BYTES: Final = (0, 1, 2, 3, 4, 6, 8)
_LOG_HEADER: Final = 32
_FRAME_HEADER: Final = 24


def application_id(path: Path) -> bytes:
    """Returns the application id in the header: 4 bytes, or fewer if the file is too short."""
    with path.open("rb") as file:
        return file.read(_FILE_HEADER)[68:72]


@dataclass(frozen=True, slots=True)
class FoundRow:
    """A row of any table.

    Attributes:
        number: Its rowid.
        columns: Its values.
        is_in_leaf: Whether its page is marked as a leaf. Otherwise the page contains something else, or its mark is
            damaged, and the row may be random bytes.
    """

    number: int
    columns: list[Value]
    is_in_leaf: bool


def read_rows(path: Path) -> Iterator[FoundRow]:
    """Yields every row that can be found in the file and its write-ahead log."""
    with path.open("rb") as file:
        pages = _Pages(file, _committed(path.with_name(path.name + "-wal")))
        for number in range(1, pages.count + 1):
            page = pages.read(number)
            start = _FILE_HEADER if number == 1 else 0
            is_leaf = page[start] == _LEAF
            count = int.from_bytes(page[start + 3 : start + 5])
            first = start + 8
            for place in range(first, min(first + 2 * count, PAGE_BYTES - 1), 2):
                cell = int.from_bytes(page[place : place + 2])
                if first <= cell < PAGE_BYTES:
                    rowid, payload = _cell(pages, page, cell)
                    if (columns := _columns(payload)) is not None:
                        yield FoundRow(rowid, columns, is_leaf)


def _committed(log: Path) -> dict[int, bytes]:
    """Returns the pages of all committed transactions in a write-ahead log, by page number."""
    committed: dict[int, bytes] = {}
    pending: dict[int, bytes] = {}
    if not log.exists():
        return committed
    with log.open("rb") as file:
        salt = file.read(_LOG_HEADER)[16:24]
        while len(frame := file.read(_FRAME_HEADER + PAGE_BYTES)) == _FRAME_HEADER + PAGE_BYTES:
            if frame[8:16] != salt:
                # The rest of the file is from before the last checkpoint.
                break
            pending[int.from_bytes(frame[:4])] = frame[_FRAME_HEADER:]
            if frame[4:8] != bytes(4):
                committed |= pending
                pending = {}
    return committed


class _Pages:
    """The pages of a file, numbered from 1. A page in `newer` replaces the one in the file."""

    def __init__(self, file: BinaryIO, newer: dict[int, bytes]) -> None:
        self._file = file
        self._newer = newer
        self.count = max([file.seek(0, 2) // PAGE_BYTES, *newer])

    def read(self, number: int) -> bytes:
        """Returns a page; zeros if it does not exist."""
        if number in self._newer:
            return self._newer[number]
        self._file.seek((number - 1) * PAGE_BYTES)
        return self._file.read(PAGE_BYTES).ljust(PAGE_BYTES, b"\0")


def _cell(pages: _Pages, page: bytes, start: int) -> tuple[int, bytes]:
    """Returns the rowid and the content of a cell. The content is cut off where a page of its chain is missing."""
    size, place = _varint(page, start)
    rowid, place = _varint(page, place)
    if not 0 < size < _LARGEST_VALUE:
        return rowid, b""
    local = size
    if size > PAGE_BYTES - 35:
        least = (PAGE_BYTES - 12) * 32 // 255 - 23
        local = least + (size - least) % (PAGE_BYTES - 4)
        if local > PAGE_BYTES - 35:
            local = least
    parts = [page[place : place + local]]
    missing = size - local
    number = int.from_bytes(page[place + local : place + local + 4])
    seen: set[int] = set()
    while missing > 0 and 0 < number <= pages.count and number not in seen:
        seen.add(number)
        overflow = pages.read(number)
        parts.append(overflow[4 : 4 + missing])
        missing -= PAGE_BYTES - 4
        number = int.from_bytes(overflow[:4])
    return rowid, b"".join(parts)


def _columns(payload: bytes) -> list[Value] | None:
    """Returns the values of a row, or None if its header makes no sense."""
    end, place = _varint(payload, 0)
    if not 0 < end <= min(len(payload), PAGE_BYTES):
        return None
    values: list[Value] = []
    start = end
    while place < end:
        kind, place = _varint(payload, place)
        if kind >= 12:
            size = (kind - 12) // 2
            values.append(payload[start : start + size])
        elif kind in (8, 9):
            size = 0
            values.append(kind - 8)
        elif kind < len(_INTEGER_BYTES):
            size = _INTEGER_BYTES[kind]
            values.append(int.from_bytes(payload[start : start + size], signed=True) if size else None)
        else:
            return None
        start += size
    return values


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """Returns the number at `place`, of 1 to 9 bytes, and the place after it. Missing bytes count as zeros."""
    number = 0
    for index in range(9):
        byte = data[place + index] if place + index < len(data) else 0
        if index == 8:
            return number << 8 | byte, place + 9
        number = number << 7 | byte & 0x7F
        if byte < 0x80:
            break
    return number, place + index + 1
