"""Give a chat to its template in the form that this template takes.

The same chat can be written in several ways: content as a string or in parts, arguments of a tool call as an object or
as JSON, no content beside a tool call as a missing key, null or "". Templates take some and fail on others, drop them,
or write Python's form of them. What a template takes is tried once, on small chats. What it takes is left as it is.
"""

import json
from collections.abc import Callable, Iterable
from typing import Any

from softlabel.pipeline.sequences.chat_places import Messages
from softlabel.pipeline.sequences.chat_rendering import ANSWER, STAND_IN, Renderer

_TOOL, _KEY = "tool_name", "argument_name"
_ABSENT = object()


class UnfitPartError(Exception):
    """A part of a message's content that a text model can't read."""


class ChatForms:
    """The forms of messages that a template takes.

    Args:
        render: the template.

    Raises:
        Exception: whatever the template raises, if it takes no chat of a question and an answer.
    """

    def __init__(self, render: Renderer) -> None:
        self._render = render
        self._in_parts: dict[str, bool] = {}
        """By role, whether strings have to become parts."""
        self._takes_parts: dict[str, bool] = {}
        """By role, whether the template writes parts as it writes their text."""
        self.question, self.answer = self._pair()
        self._system = self._find_system()
        self._arguments = self._find_arguments()
        self._no_content = self._find_no_content()
        beside = [self._calls(self._call_arguments(), content) for content in (STAND_IN, _parts([STAND_IN]))]
        self._takes_parts_beside_calls = beside[0] == beside[1]

    def adapted(self, messages: Messages) -> Messages:
        """The messages in a form that the template takes.

        Raises:
            UnfitPartError: if a message has content other than text.
        """
        return [self._message(i, message) for i, message in enumerate(messages)]

    def _message(self, i: int, message: dict[str, Any]) -> dict[str, Any]:
        message = dict(message)
        if message["role"] == "developer":
            message["role"] = self._system
        calls = message.get("tool_calls")
        if not calls:
            message.pop("tool_calls", None)  # templates ask only whether there is the key
        elif isinstance(calls, list):
            message["tool_calls"] = [self._call(call) for call in calls]
        content = message.get("content")
        if isinstance(content, str | list):
            message["content"] = self._content(i, message["role"], content, beside_calls=bool(calls))
        elif self._no_content is not _ABSENT:
            is_text = isinstance(self._no_content, str)
            message["content"] = self._content(i, message["role"], "") if is_text else self._no_content
        return message

    def _content(
        self, i: int, role: str, content: str | list[Any], beside_calls: bool = False
    ) -> str | list[dict[str, str]]:
        like = role if role in self._in_parts else "user"
        if isinstance(content, str):
            return _parts([content]) if self._in_parts[like] else content
        texts = [part if isinstance(part, str) else _text_of(i, part) for part in content]
        takes_parts = self._takes_parts.get(role) and (self._takes_parts_beside_calls or not beside_calls)
        texts = texts if takes_parts else ["".join(texts)]
        return _parts(texts) if self._in_parts[like] or takes_parts else texts[0]

    def _call(self, call: Any) -> Any:
        if not isinstance(call, dict):
            return call
        if isinstance(call.get("function"), dict):
            return {**call, "function": self._call(call["function"])}
        arguments = call.get("arguments")
        if isinstance(arguments, dict) and self._arguments is str:
            arguments = json.dumps(arguments, ensure_ascii=False)
        elif isinstance(arguments, str) and self._arguments is dict:
            try:
                parsed = json.loads(arguments)
            except ValueError:
                return call
            arguments = parsed if isinstance(parsed, dict) else arguments
        return {**call, "arguments": arguments} if "arguments" in call else call

    def _pair(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """A question and an answer in a form that the template takes."""
        first_error: Exception | None = None
        for user, assistant in ((False, False), (True, True), (True, False), (False, True)):
            pair = _said("user", _formed(STAND_IN, user)), _said("assistant", _formed(ANSWER, assistant))
            try:
                written = self._render(list(pair))
            except Exception as error:
                first_error = first_error or error
                continue
            if STAND_IN in written and ANSWER in written:
                break
        else:
            if first_error is not None:
                raise first_error
            user = assistant = False
            pair = _said("user", STAND_IN), _said("assistant", ANSWER)
            written = self._render(list(pair))
        self._in_parts = {"user": user, "assistant": assistant}
        for i, (role, text) in enumerate({"user": STAND_IN, "assistant": ANSWER}.items()):
            one, two = ([*pair[:i], _said(role, _parts([text] * n)), *pair[i + 1 :]] for n in (1, 2))
            takes_one = self._written(one) == written
            self._takes_parts[role] = takes_one and (self._written(two) or "").count(text) == 2 * written.count(text)
        return pair

    def _find_system(self) -> str:
        """The role that a developer's message gets; and how the template takes the content of a system message."""
        pair, parts = [self.question, self.answer], self._in_parts["user"]
        texts = 1 + (self._written(pair) or "").count(STAND_IN)
        forms = {kind: _said("system", _formed(STAND_IN, kind)) for kind in (False, True)}
        found = {kind: self._written([form, *pair], texts) for kind, form in forms.items()}
        self._in_parts["system"] = parts if found[parts] or not found[not parts] else not parts
        self._takes_parts["system"] = False
        developer, answer = (
            self._written([{**forms[parts], "role": role}, *pair], texts) for role in ("developer", "assistant")
        )
        return "developer" if developer not in (None, answer) or not any(found.values()) else "system"

    def _find_arguments(self) -> type[dict[str, Any]] | type[str] | None:
        """The form of arguments that the template can write; None if it takes either as it is, or neither."""
        text = json.dumps({_KEY: STAND_IN}, ensure_ascii=False)
        takes_dict, takes_str = (
            any(STAND_IN in written and whole in written for written in self._calls(arguments))
            for arguments, whole in (({_KEY: STAND_IN}, _KEY), (text, text))
        )
        return None if takes_dict == takes_str else dict if takes_dict else str

    def _find_no_content(self) -> Any:
        """What to give the template as the content of a message that has only tool calls."""
        arguments = self._call_arguments()
        empty = self._calls(arguments, "")
        # A template that writes no calls still may need content.
        for text, contents in ((STAND_IN, (_ABSENT, None, "")), ("", ("", _ABSENT, None))):
            for content in contents:
                for written, with_empty in zip(self._calls(arguments, content), empty, strict=True):
                    nulls = [(written.count(null), with_empty.count(null)) for null in ("None", "null")]
                    if written and text in written and all(found <= expected for found, expected in nulls):
                        return content
        return _ABSENT

    def _call_arguments(self) -> Any:
        """Arguments of a call in the form that the template takes."""
        return json.dumps({_KEY: STAND_IN}, ensure_ascii=False) if self._arguments is str else {_KEY: STAND_IN}

    def _calls(self, arguments: Any, content: Any = "") -> list[str]:
        """What the template writes for a tool call, at the end of a chat and before its result."""
        function = {"name": _TOOL, "arguments": arguments}
        call = {"role": "assistant", "tool_calls": [{"id": "call00000", "type": "function", "function": function}]}
        if content is not _ABSENT:
            call["content"] = self._content(0, "assistant", content) if isinstance(content, str) else content
        question = _said("user", self._content(0, "user", "Why?"))
        result = {"role": "tool", "tool_call_id": "call00000", "name": _TOOL, "content": "So."}
        answer = _said("assistant", self._content(0, "assistant", "Well."))
        chats: Iterable[Messages] = ([question, call], [question, call, result, answer])
        return [self._written(chat) or "" for chat in chats]

    def _written(self, messages: Messages, texts: int = 0) -> str | None:
        """The rendered messages; None if the template raises an error or leaves out some of the texts."""
        written = attempt(self._render, messages)
        return written if written is not None and written.count(STAND_IN) >= texts else None


def attempt(render: Callable[..., str], messages: Messages, prompt: bool = False) -> str | None:
    """The rendered messages, or None if the template raises an error; it is a program, and may raise anything."""
    try:
        return render(messages, prompt=prompt)
    except Exception:
        return None


def _said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _parts(texts: list[str]) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def _formed(text: str, in_parts: bool) -> Any:
    return _parts([text]) if in_parts else text


def _text_of(i: int, part: Any) -> str:
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise UnfitPartError(f"message {i} (counting from 0) has a part of type {kind!r}, and the teacher reads only text")
