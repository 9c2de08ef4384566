"""Sizes of the columns of a Parquet file, from its footer.

A footer has no checksum, and pyarrow ends the process if it is asked for the columns of some damaged ones. So their
descriptions are read here, as Thrift's compact protocol writes them, and have to cover the file without a gap.
"""

from collections.abc import Callable
from typing import Any, BinaryIO

_MAGIC = b"PAR1"
_ROW_GROUPS, _COLUMNS, _DESCRIPTION = 4, 1, 3
_PATH, _BYTES, _FIRST_PAGE, _DICTIONARY = 3, 7, 9, 11
"""Numbers of the fields of Parquet's FileMetaData, RowGroup, ColumnChunk and ColumnMetaData that are used here."""


def column_bytes(file: BinaryIO, size: int, *, gaps: bool = False) -> dict[str, int]:
    """Compressed bytes of each column of a Parquet file of this size, over all row groups.

    Args:
        file: the file.
        size: its bytes.
        gaps: whether something else, such as an index, may be between the columns and after them.

    Raises:
        ValueError: if the footer is damaged, as far as that shows.
    """
    file.seek(max(size - 8, 0))
    end = file.read(8)
    length = int.from_bytes(end[:4], "little")
    if end[4:] != _MAGIC or not 0 < length <= size - 12:
        raise ValueError("no Parquet footer")
    file.seek(size - 8 - length)
    sizes: dict[str, int] = {}
    place = len(_MAGIC)
    try:
        for group in _struct(file.read(length), 0)[0][_ROW_GROUPS]:
            for column in group[_COLUMNS]:
                about = column[_DESCRIPTION]
                if not gaps and about.get(_DICTIONARY, about[_FIRST_PAGE]) != place:
                    raise ValueError("a footer with a column that does not begin where the one before it ends")
                name = about[_PATH][0].decode()
                sizes[name] = sizes.get(name, 0) + about[_BYTES]
                place += about[_BYTES]
    except (LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("a footer that is no description of columns") from error
    if not gaps and place != size - 8 - length:
        raise ValueError("a footer with columns that do not fill the file")
    return sizes


def _struct(content: bytes, at: int) -> tuple[dict[int, Any], int]:
    """The struct that begins at a place, as its values by the numbers of their fields; and the place after it."""
    found: dict[int, Any] = {}
    field = 0
    while head := content[at]:
        at += 1
        if head >> 4:
            field += head >> 4
        else:
            field, at = _integer(content, at)
        kind = head & 15
        if kind <= 2:
            found[field] = kind == 1
        else:
            found[field], at = _READERS[kind](content, at)
    return found, at + 1


def _byte(content: bytes, at: int) -> tuple[int, int]:
    return content[at], at + 1


def _unsigned(content: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while (byte := content[at]) >= 128:
        number |= (byte & 127) << shift
        shift += 7
        at += 1
    return number | byte << shift, at + 1


def _integer(content: bytes, at: int) -> tuple[int, int]:
    number, at = _unsigned(content, at)
    return -(number & 1) ^ number >> 1, at


def _text(content: bytes, at: int) -> tuple[bytes, int]:
    length, at = _unsigned(content, at)
    return content[at : at + length], at + length


def _list(content: bytes, at: int) -> tuple[list[Any], int]:
    head = content[at]
    count, at = _unsigned(content, at + 1) if head >> 4 == 15 else (head >> 4, at + 1)
    read = _READERS[head & 15]
    values = []
    for _ in range(count):
        value, at = read(content, at)
        values.append(value)
    return values, at


_READERS: dict[int, Callable[[bytes, int], tuple[Any, int]]] = {
    **dict.fromkeys((1, 2, 3), _byte),
    **dict.fromkeys((4, 5, 6), _integer),
    8: _text,
    **dict.fromkeys((9, 10), _list),
    12: _struct,
}
"""Readers of Thrift's compact protocol, by the number of the type; a footer has no other types."""
