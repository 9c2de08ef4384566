"""Check the values of a document's columns: its id, label and content, and the columns that are carried along.

Each function returns the checked value or says why it can't be used; then only that document is rejected. A carried
value is stored unchanged, or its document is rejected.
"""

import datetime
import json
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from typing import Any

import pyarrow as pa

_MISFIT = (pa.ArrowException, OverflowError, UnicodeError)


def carried_field(field: pa.Field) -> pa.Field:
    """The column with the type that tables store it as (see ``storage.schema.row_schema``), if that loses nothing.

    A type that no table can hold is kept, and ``row_schema`` refuses it; so is uint64, whose upper half does not fit
    into int64.
    """
    return pa.field(field.name, _stored(field.type))


def _stored(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return _stored(kind.value_type)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind) or pa.types.is_null(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_integer(kind) and not pa.types.is_uint64(kind):
        return pa.int64()
    if pa.types.is_floating(kind):
        return pa.float64()
    if pa.types.is_date(kind):
        return pa.date32()
    if pa.types.is_timestamp(kind):
        return pa.timestamp("us", kind.tz and "UTC")
    if pa.types.is_decimal(kind) and kind.precision <= 38:
        return pa.decimal128(kind.precision, kind.scale)
    if pa.types.is_struct(kind):
        return pa.struct([carried_field(field) for field in kind])
    if _is_list(kind):
        return pa.list_(_stored(kind.value_type))
    return kind


def _is_list(kind: pa.DataType) -> bool:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_list_view)
    return any(is_one(kind) for is_one in lists)


def carried(values: Sequence[Any], kind: pa.DataType) -> tuple[pa.Array, set[int]]:
    """Values as a column of this type, and the indices of values that do not fit it, which are null in the column.

    The type comes from the first values or the first file; later values may be of another type, and Arrow silently
    drops fractions and times of day.
    """
    try:
        converted = pa.array(values, kind).to_pylist()
    except _MISFIT:
        converted = [_converted(value, kind) for value in values]
    misfits = {i for i, pair in enumerate(zip(values, converted, strict=True)) if not _are_same(*pair)}
    return pa.array([None if i in misfits else value for i, value in enumerate(converted)], kind), misfits


def _converted(value: Any, kind: pa.DataType) -> Any:
    try:
        return pa.scalar(value, kind).as_py()
    except _MISFIT:
        return None


def _are_same(value: Any, converted: Any) -> bool:
    if isinstance(value, bytes) and not isinstance(converted, bytes):  # a Parquet string; None if not valid UTF-8
        return converted is not None and value == converted.encode()
    if isinstance(value, dict) and isinstance(converted, dict):  # a key that others have is null here
        return all(_are_same(value.get(key), converted.get(key)) for key in value.keys() | converted.keys())
    if isinstance(value, list) and isinstance(converted, list):
        return len(value) == len(converted) and all(map(_are_same, value, converted))
    if isinstance(value, datetime.datetime) and isinstance(converted, datetime.datetime):
        return bool(value == converted)
    if isinstance(value, bool | datetime.date) and type(value) is not type(converted):
        return False  # True equals 1
    return bool(value == converted) or (value != value and converted != converted)  # NaN does not equal itself


_DEEPEST = 100
"""Most levels of nested lists and objects in a chat; they are read recursively."""
_TOO_DEEP = f"the chat nests lists and objects more than {_DEEPEST} levels deep"


class UnfitError(Exception):
    """Why a document can't be used."""


def encoded(text: str, what: str) -> bytes:
    """The text as UTF-8; JSON can contain half of a surrogate pair, which can't be encoded."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise UnfitError(f"the {what} is not valid UTF-8") from None


def _string(value: Any, what: str) -> str:
    if value is None:
        raise UnfitError(f"the {what} is null")
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise UnfitError(f"the {what} is not valid UTF-8 at byte {error.start}") from None
    if not isinstance(value, str):
        raise UnfitError(f"the {what} must be a string, but is {type(value).__name__}")
    return value


def id_of(value: Any) -> str:
    """A document's id: a string, or an integer as a string."""
    if isinstance(value, bool | float):
        raise UnfitError(f"the id must be a string or an integer, but is {type(value).__name__}")
    text = str(value) if isinstance(value, int) else _string(value, "id")
    if not text:
        raise UnfitError("the id is empty")
    encoded(text, "id")
    return text


def content_id(content: str) -> str:
    """The id of a document without one: a 128-bit BLAKE2b of its content, in hexadecimal digits."""
    return blake2b(encoded(content, "text"), digest_size=16).hexdigest()


def _text(value: Any) -> str:
    text = _string(value, "text")
    if not text.strip():
        raise UnfitError("the text is empty")
    return text


def label_of(value: Any) -> str | None:
    """A document's label, if it has one: a string, or an integer or boolean as a string."""
    if value is None or type(value) in (int, bool):
        return None if value is None else str(value)
    return _string(value, "label")


def _chat(value: Any, tools: Any = None) -> str:
    """The messages of a chat, as JSON; if it has tools, {messages, tools}."""
    messages, tools = _messages(_parsed(value, "chat"), "chat"), _tools(tools)
    return _json({"messages": messages, "tools": tools} if tools else messages)


def _completion(prompt: Any, completion: Any, tools: Any = None) -> str:
    """A prompt (which may be empty) and its completion, as JSON: two texts, or two lists of messages of one chat, which
    may have tools."""
    parts, tools = {"prompt": prompt, "completion": completion}, _tools(tools)
    more = {"tools": tools} if tools else {}
    if isinstance(prompt, list) and isinstance(completion, list):
        return _json({what: _messages(value, what) for what, value in parts.items()} | more)
    for what, value in parts.items():
        parts[what] = _string(value, what)
    if tools:
        raise UnfitError("there are tools, but the prompt is a text; only the messages of a chat can have tools")
    if not parts["completion"].strip():
        raise UnfitError("the completion is empty")
    return _json(parts)


def _parsed(value: Any, what: str) -> Any:
    """The value of JSON, or a value that is none."""
    if not isinstance(value, str | bytes):
        return value
    try:
        return json.loads(value)
    except ValueError:
        kind = "a list of messages" if what == "chat" else "a list of objects"
        raise UnfitError(f"the {what} is neither {kind} in valid UTF-8 nor a string of valid JSON") from None
    except RecursionError:
        raise UnfitError(_TOO_DEEP) from None


def _tools(value: Any) -> list[Any]:
    """The tools of a chat, each an object; in a list, each may be JSON. A blank text stands for none."""
    tools = _parsed(value, "column of tools") if not isinstance(value, str | bytes) or value.strip() else None
    tools = [] if tools is None else tools
    tools = [_parsed(tool, "tool") for tool in tools] if isinstance(tools, list) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UnfitError("the tools must be a list of objects")
    return tools


CONTENTS: dict[str, Callable[..., str]] = {"text": _text, "chat": _chat, "completion": _completion}
"""For each kind of content, the function that makes it from the values of its columns."""


def without_nulls(values: Sequence[Any]) -> list[Any]:
    """Values without the keys of objects that are null: in Parquet, all objects of a column have all their keys."""
    return [_without_nulls(value) for value in values]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _json(value: Any) -> str:
    level, depth = [value], 0
    while level := [item for part in level for item in _items(part)]:
        depth += 1
        if depth > _DEEPEST:
            raise UnfitError(_TOO_DEEP)
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError as error:  # a Parquet struct may contain a date or bytes
        raise UnfitError(f"a message can't be written as JSON: {error}") from None


def _items(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _messages(value: Any, what: str) -> list[dict[str, Any]]:
    """Messages with a role and content each; null keys are left out, since Parquet adds them to its structs."""
    if value is None or not isinstance(value, list):
        raise UnfitError(
            f"the {what} must be a list of messages, but is {'null' if value is None else type(value).__name__}"
        )
    if not value:
        raise UnfitError(f"the {what} has no messages")
    messages = [_message(i, message) for i, message in enumerate(value)]
    if any(message.get("function_call") for message in value):  # results have the role that belongs to this name
        messages = [message | {"role": "tool"} if message["role"] == "function" else message for message in messages]
    return messages


_SHAREGPT = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
}
"""Names of roles in {from, value} messages that templates know under another name."""


def _calls(i: int, value: Any) -> list[dict[str, Any]]:
    """The tool calls of a function_call, in ShareGPT or beside content: {name, arguments}, or a list of these; it may
    be JSON."""
    calls = _parsed(value, f"function_call of message {i} (counting from 0)")
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise UnfitError(f"the function_call of message {i} (counting from 0) must be an object with a name")
    return [{"type": "function", "function": call} for call in calls]


def _message(i: int, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UnfitError(f"message {i} (counting from 0) is not an object")
    message = {key: field for key, field in value.items() if field is not None}
    if "role" not in message and isinstance(message.get("from"), str):
        sender = message.pop("from")
        value = message.pop("value", None)
        said = {"tool_calls": _calls(i, value)} if sender == "function_call" else {"content": value}
        message = {"role": _SHAREGPT.get(sender, sender), **said, **message}
    if message.get("function_call") and not message.get("tool_calls"):  # its older name
        message["tool_calls"] = _calls(i, message.pop("function_call"))
    if message.get("tool_calls"):
        message["tool_calls"] = _parsed(message["tool_calls"], f"tool_calls of message {i} (counting from 0)")
    if not isinstance(message.get("role"), str):
        raise UnfitError(f"message {i} (counting from 0) has no role")
    if not isinstance(message.get("content"), str | list) and not message.get("tool_calls"):
        raise UnfitError(f"message {i} (counting from 0) has neither text content nor tool calls")
    return message
