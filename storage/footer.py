"""Sizes of the columns of a Parquet file, from its footer.

A footer has no checksum, and pyarrow ends the process if it is asked for the columns of some damaged ones. So their
descriptions are read here, as Thrift's compact protocol writes them, and have to cover the file without a gap.
"""

from io import BytesIO
from typing import Any, BinaryIO

_MAGIC = b"PAR1"
_ROW_GROUPS, _COLUMNS, _DESCRIPTION = 4, 1, 3
_PATH, _BYTES, _FIRST_PAGE, _DICTIONARY = 3, 7, 9, 11
"""Numbers of the fields of Parquet's FileMetaData, RowGroup, ColumnChunk and ColumnMetaData that are used here."""


def column_bytes(file: BinaryIO, size: int) -> dict[str, int]:
    """Compressed bytes of each column of a Parquet file of this size, over all row groups.

    Raises:
        ValueError: if the footer is damaged.
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
        for group in _Thrift(file.read(length)).struct()[_ROW_GROUPS]:
            for column in group[_COLUMNS]:
                about = column[_DESCRIPTION]
                if about.get(_DICTIONARY, about[_FIRST_PAGE]) != place:
                    raise ValueError("a footer with a column that does not begin where the one before it ends")
                name = about[_PATH][0].decode()
                sizes[name] = sizes.get(name, 0) + about[_BYTES]
                place += about[_BYTES]
    except (LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("a footer that is no description of columns") from error
    if place != size - 8 - length:
        raise ValueError("a footer with columns that do not fill the file")
    return sizes


class _Thrift:
    """Reads Thrift's compact protocol: a struct becomes its values by the numbers of their fields."""

    def __init__(self, content: bytes) -> None:
        self._content = BytesIO(content)
        self._readers = {3: self._byte, 4: self._integer, 5: self._integer, 6: self._integer, 7: self._double}
        self._readers |= {8: self._text, 9: self._list, 10: self._list, 12: self.struct}

    def struct(self) -> dict[int, Any]:
        """The next struct."""
        found: dict[int, Any] = {}
        field = 0
        while (head := self._byte()) != 0:
            field = field + (head >> 4) if head >> 4 else self._integer()
            kind = head & 15
            found[field] = kind == 1 if kind in (1, 2) else self._readers[kind]()
        return found

    def _byte(self) -> int:
        return self._content.read(1)[0]

    def _unsigned(self) -> int:
        number = shift = 0
        while True:
            byte = self._byte()
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return number

    def _integer(self) -> int:
        number = self._unsigned()
        return -(number & 1) ^ number >> 1

    def _double(self) -> bytes:
        return self._content.read(8)

    def _text(self) -> bytes:
        return self._content.read(self._unsigned())

    def _list(self) -> list[Any]:
        head = self._byte()
        count = head >> 4 if head >> 4 < 15 else self._unsigned()
        read = self._byte if head & 15 in (1, 2) else self._readers[head & 15]
        return [read() for _ in range(count)]
