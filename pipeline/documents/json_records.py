"""Reads JSON: one object per line, or one array of objects. The file's first bytes tell which.

Both are cut into records as bytes, and each record is parsed alone, so that a bad one costs one document. No file is in
memory as a whole.
"""

import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from typing import Any

import pyarrow as pa

from softlabel.pipeline.documents.paths import File
from softlabel.pipeline.documents.reading import (
    BOM,
    READ_AHEAD,
    RECORD_BYTES,
    ZERO_BYTES,
    Piece,
    Record,
    pieces,
    reading,
    stream,
)
from softlabel.storage.errors import DocumentsError, printable

SAMPLE_ROWS = 1000
SAMPLE_BYTES = 16 << 20
"""Records, or bytes of them if that is less, from which columns and their types are inferred."""

_MARK = re.compile(rb'["\[\]{},]')
"""Bytes that can begin or end something outside of a string."""
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)


class Json:
    """Files with one JSON object per line, or with one array of objects; each object is a record."""

    kind = "JSON"

    def __init__(self, files: list[File]) -> None:
        self._files = files

    def schema(self) -> pa.Schema:
        """Keys of the first objects and the types of their values; the most common type if they differ."""
        sample, held, reason = list[dict[str, Any]](), 0, "no records"
        for place, size, record in self._records():
            if isinstance(record, str):
                reason = f"{place}: {record}" if reason == "no records" else reason
                continue
            sample.append(record)
            held += size
            if len(sample) == SAMPLE_ROWS or held >= SAMPLE_BYTES:
                break
        if not sample:
            raise DocumentsError(
                "there are no documents",
                expected="one JSON object per line, or one array of objects, in UTF-8",
                found=printable(reason),
                where=printable(", ".join(file.address for file in self._files[:3])),
                do="check that these are the right files and that they are complete",
            )
        keys = dict.fromkeys(chain.from_iterable(sample))
        named = [key for key in keys if key.encode(errors="ignore").decode() == key]  # without half a surrogate pair
        return pa.schema([(key, _type_of([record.get(key) for record in sample])) for key in named])

    def read(self, columns: list[str]) -> Iterator[Piece]:
        """The objects of all files, file by file."""
        return pieces(self._records(), columns)

    def _records(self) -> Iterator[Record]:
        for file in self._files:
            with reading(file, self.kind), stream(file) as content:
                buffered = io.BufferedReader(content, READ_AHEAD)
                cut, what = (_elements, "element") if _is_array(buffered.peek(READ_AHEAD)) else (_lines, "line")
                for number, record in cut(buffered):
                    yield Record(f"{file.name}:{number}", len(record), _object(record, what))


def _is_array(start: bytes) -> bool:
    """Whether a file that starts like this holds one array, and not one array per line."""
    start = start.removeprefix(BOM).lstrip()
    first, _, rest = start.partition(b"\n")
    if not rest.strip():
        return start.startswith(b"[")
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return start.startswith(b"[")
    return False


def _lines(content: io.BufferedReader) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each line that is not blank."""
    number = 0
    while line := content.readline(RECORD_BYTES):
        number += 1
        if len(line) == RECORD_BYTES:
            raise ValueError(f"line {number} is longer than {RECORD_BYTES >> 20} MB")
        if line.strip():
            yield number, line


def _elements(content: io.BufferedReader) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each element of an array."""
    held, place, depth, start, number = b"", 0, 0, 0, 0
    while True:
        mark = _MARK.search(held, place)
        string = _STRING.match(held, mark.start()) if mark and mark[0] == b'"' else None
        if mark is None or (mark[0] == b'"' and string is None):  # the rest of it is not here yet
            held, place, start = held[start:], (mark.start() if mark else len(held)) - start, 0
            if len(held) > RECORD_BYTES:
                raise ValueError(f"element {number + 1} is longer than {RECORD_BYTES >> 20} MB")
            more = content.read(max(READ_AHEAD, len(held)))
            if not more:
                raise EOFError(f"the array ends in the middle of element {number + 1}")
            held += more
            continue
        place = string.end() if string else mark.end()
        depth += (mark[0] in b"[{") - (mark[0] in b"]}")
        if depth == 1 and mark[0] == b"[":
            start = place
        elif (depth == 1 and mark[0] == b",") or depth == 0:
            element, start = held[start : mark.start()], place
            if depth or number or element.strip():  # an empty array has no element
                number += 1
                yield number, element
            if not depth:
                break
    if (held[place:] + content.read(READ_AHEAD)).strip():
        raise ValueError("something follows the end of the array")


def _object(record: bytes, what: str) -> dict[str, Any] | str:
    if b"\0" in record:
        return f"the {what} {ZERO_BYTES}"
    try:
        found = json.loads(record.decode("utf-8-sig"))  # given bytes, json would guess the encoding
    except UnicodeDecodeError as error:
        return f"the {what} is not valid UTF-8 at byte {error.start}"
    except json.JSONDecodeError as error:
        return f"the {what} is not valid JSON: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:
        return f"the {what} is not valid JSON: {error}"
    return found if isinstance(found, dict) else f"the {what} must be a JSON object, but is {type(found).__name__}"


def _type_of(values: list[Any]) -> pa.DataType:
    try:
        return pa.array(values).type
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        kinds = Counter(type(value) for value in values if value is not None)
        if kinds[float]:
            kinds[float] += kinds.pop(int, 0)  # a column of floats can hold these, too
        [(most, _)] = kinds.most_common(1)
        return {bool: pa.bool_(), int: pa.int64(), float: pa.float64()}.get(most, pa.string())
