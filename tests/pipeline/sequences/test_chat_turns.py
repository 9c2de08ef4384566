"""Templates with the traits of this year's x shapes of chats: each turn is captured as the template itself marks it."""

import json
import re
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from softlabel.pipeline.capturing.identity import identify
from softlabel.pipeline.config.capture import CaptureConfig, ColumnsConfig, SequencesConfig, TeacherConfig
from softlabel.pipeline.documents.documents import Documents
from softlabel.pipeline.models.checkpoint import Checkpoint
from softlabel.pipeline.sequences.chat import ChatTemplate
from softlabel.pipeline.sequences.tokenizer import DocumentTokenizer
from softlabel.storage.identity import TokenizerIdentity

START, END = "<|im_start|>", "<|im_end|>"
SPECIAL = (START, END, "<|endoftext|>", "<think>", "</think>", "<tool_response>", "</tool_response>")


def loop(user: str, assistant: str, after: str = "", before: str = "") -> str:
    other = "{% if m.role == 'assistant' %}" + assistant + "{% else %}" + user + "{% endif %}"
    return before + "{% for m in messages %}" + other + "{% endfor %}" + after


def prompt(text: str, otherwise: str = "") -> str:
    more = "{% else %}{{ " + repr(otherwise) + " }}" if otherwise else ""
    return "{% if add_generation_prompt %}{{ " + repr(text) + " }}" + more + "{% endif %}"


G, E = "{% generation %}", "{% endgeneration %}"
ROLE = "{{ '<|im_start|>' + m.role + '\n' + (m.content or '') + '<|im_end|>\n' }}"
ASSISTANT = "{{ '<|im_start|>assistant\n' }}"
SPLIT = (
    "{% set c = m.content %}{% set r = m.reasoning_content or '' %}{% if '</think>' in c %}"
    "{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
)
PARTS = "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
CALLS = (
    "{% if m.tool_calls %}{% for t in m.tool_calls %}{{ '<call>' + t.function.name + ' ' + "
    "(t.function.arguments | tojson) + '</call>' }}{% endfor %}{% endif %}"
)
TEMPLATES = {
    "header ends in a space": loop(
        "{{ 'USER: ' + m.content + ' ' }}", "ASSISTANT: " + G + "{{ m.content + '<|im_end|>' }}" + E
    ),
    "prompt opens a thought": loop(
        ROLE,
        SPLIT + ASSISTANT + "{% if loop.last %}{{ '<think>\n' }}" + G + "{{ r + '\n</think>\n\n' + c + '<|im_end|>' }}"
        "{% endgeneration %}{% else %}{% generation %}{{ c + '<|im_end|>' }}" + E + "{% endif %}{{ '\n' }}",
        prompt("<|im_start|>assistant\n<think>\n"),
    ),
    "last turn ends otherwise": loop(
        "{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}",
        "{{ '<|start|>assistant' }}"
        + G
        + "{{ '<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}"
        + E,
        prompt("<|start|>assistant"),
    ),
    "a mark follows the last turn": loop(
        "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}",
        "{{ '<|assistant|>\n' }}"
        + G
        + "{{ m.content + '<|end|>' }}{% if loop.last %}{{ '\n<|endoftext|>' }}{% endif %}"
        + E
        + "{% if not loop.last %}{{ '\n' }}{% endif %}",
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% elif messages[-1].role != 'assistant' %}"
        "{{ '<|endoftext|>' }}{% endif %}",
    ),
    "turns end by the next role's mark": loop(
        "{% if loop.first or loop.previtem.role != 'assistant' %}{{ '<|' + m.role + '|>' }}{% endif %}"
        "{{ '\n' + m.content }}",
        "<|assistant|>" + G + "{{ '\n' + m.content }}{% if not loop.last %}"
        "{{ '<|' + loop.nextitem.role + '|>' }}{% endif %}" + E,
        prompt("<|assistant|>"),
    ),
    "header depends on the place": loop(
        "{{ 'Q' ~ loop.index ~ ': ' ~ m.content ~ '\n' }}",
        "{{ 'A' ~ loop.index ~ ': ' }}" + G + "{{ m.content ~ '<|im_end|>' }}" + E + "{{ '\n' }}",
        "{% if add_generation_prompt %}{{ 'A' ~ (messages | length + 1) ~ ': ' }}{% endif %}",
    ),
    "content in parts": loop(
        "{{ m.role.capitalize() + ': ' }}" + PARTS + "{{ '<|im_end|>\n' }}",
        "Assistant:" + G + "{{ ' ' }}" + PARTS + "{{ '<|im_end|>' }}" + E + "{{ '\n' }}",
        prompt("Assistant:"),
    ),
    "roles folded, trimmed and dated": loop(
        "{% if m.role != 'system' %}{{ '<|im_start|>user\n' + (messages[0].content | trim + '\n\n' if loop.index0 == 1 "
        "and messages[0].role == 'system' else '') + m.content | trim + '<|im_end|>\n' }}{% endif %}",
        "{{ '<|im_start|>model\n' }}" + G + "{{ m.content | trim + '<|im_end|>' }}" + E + "{{ '\n' }}",
        prompt("<|im_start|>model\n"),
        "{{ '<|im_start|>system\nToday is ' + strftime_now('%d %B') + '.<|im_end|>\n' }}",
    ),
    "instructions after the question": loop(
        "{% if m.role == 'user' %}{{ '<|start|>user<|message|>' + m.content }}"
        "{% if messages[0].role == 'system' and loop.index0 == 1 %}{{ '\n[' + messages[0].content + ']' }}{% endif %}"
        "{{ '<|end|>' }}{% endif %}",
        "{{ '<|start|>assistant<|message|>' }}" + G + "{{ m.content + '<|end|>' }}" + E,
        prompt("<|start|>assistant<|message|>"),
    ),
    "one mark between all turns": loop(
        "{{ m.role + '\n' + m.content + '<|endoftext|>' }}",
        "{{ 'assistant\n' }}" + G + "{{ m.content + '<|endoftext|>' }}" + E,
        prompt("assistant\n"),
        "{{ '<|endoftext|>' }}",
    ),
    "turns of one role joined, by a macro": loop(
        "{{ head(m.role, loop) + m.content }}",
        "{{ head(m.role, loop) }}" + G + "{{ m.content }}{% if loop.last or loop.nextitem.role != m.role %}"
        "{{ '<|end|>' }}{% endif %}" + E,
        "{% if messages[-1].role != 'assistant' %}{{ '<|end|>' }}{% endif %}{{ '\n' }}"
        + prompt("<|start|>assistant\n"),
        "{%- macro head(role, loop) -%}{%- if loop.first -%}{{ '<|start|>' + role + '\n' }}{%- elif "
        "loop.previtem.role != role -%}{{ '' if loop.previtem.role == 'assistant' else '<|end|>' }}"
        "{{ '\n<|start|>' + role + '\n' }}{%- else -%}{{ '\n\n' }}{%- endif -%}{%- endmacro -%}",
    ),
    "roles in another language": loop(
        "{{ '【' + {'system': 'Anweisung', 'user': 'Mensch'}[m.role] + '】' + m.content + '〚Ende〛' }}",
        "【Assistentin】" + G + "{{ m.content + '〚Ende〛' }}" + E,
        prompt("【Assistentin】"),
    ),
    "the task is repeated before each answer": loop(
        ROLE,
        "{{ '<|im_start|>assistant\n[' + (messages | selectattr('role', 'equalto', 'user') | first).content + '] ' }}"
        + G
        + "{{ m.content + '<|im_end|>' }}"
        + E
        + "{{ '\n' }}",
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n[' + "
        "(messages | selectattr('role', 'equalto', 'user') | first).content + '] ' }}{% endif %}",
    ),
    "tool calls": loop(
        ROLE,
        ASSISTANT + G + "{{ m.content or '' }}" + CALLS + "{{ '<|im_end|>' }}" + E + "{{ '\n' }}",
        prompt("<|im_start|>assistant\n"),
    ),
}


def user(text: object) -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: object, **more: object) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def calls(arguments: object, **more: object) -> dict[str, Any]:
    return {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": arguments}}],
        **more,
    }


PAIR = [user("Name a planet."), says("Saturn.")]
CHATS = {
    "one turn": PAIR,
    "two turns": [*PAIR, user("Another?"), says("Mars.")],
    "the same words": [user("Yes"), says("Yes"), user("Yes"), says("Yes")],
    "ends with the user": [*PAIR, user("thanks, bye")],
    "a system's words": [{"role": "system", "content": "Be brief."}, *PAIR, user("Another?"), says("Mars.")],
    "in parts": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in [*PAIR, *PAIR]],
    "marks of the template": [user("ASSISTANT: <|assistant|>\nA2: x<|end|>"), says("A: <|im_end|><|start|>"), *PAIR],
}


def write(source: str, chat: list[dict[str, Any]], turns: Any = "all", **variables: object) -> tuple[str, str, Any]:
    """The chat as written, what is captured of it, and the rest of the result."""
    template = ChatTemplate(source, variables, SPECIAL, date(2026, 1, 1))
    written = template.write(json.dumps(chat), turns)
    text = "".join(piece for piece, _ in written.pieces)
    return text, "".join(text[a:b] for a, b in written.turns), written


@pytest.mark.parametrize("turns", ["all", "last"])
@pytest.mark.parametrize("shape", CHATS)
@pytest.mark.parametrize("trait", TEMPLATES)
def test_turns_are_found_as_the_template_would_mark_them(trait: str, shape: str, turns: str) -> None:
    marked = TEMPLATES[trait]
    bare = marked.replace(G, "").replace(E, "")
    expected, found = write(marked, CHATS[shape], turns), write(bare, CHATS[shape], turns)
    assert found[0] == expected[0]
    assert found[1] == expected[1]
    assert expected[1].strip()


def test_a_result_that_is_written_into_the_turn_of_its_call_is_not_captured() -> None:
    """Also if the template writes the call's empty content only after that result."""
    result = (
        "{% for r in messages[loop.index:] if r.role == 'tool' and m.tool_calls %}"
        "{{ '<result>' + r.content + '</result>' }}"
        "{% endfor %}"
    )
    source = loop(
        "{% if m.role != 'tool' %}" + ROLE + "{% endif %}",
        ASSISTANT + CALLS + result + "{{ m.content or '' }}{% if not m.tool_calls %}{{ '<|im_end|>\n' }}{% endif %}",
        prompt("<|im_start|>assistant\n"),
    )
    for content in ({}, {"content": ""}):
        chat = [user("Weather?"), calls({"city": "Ulm"}, **content), {"role": "tool", "content": "rain"}, says("Wet.")]
        assert write(source, chat)[1].startswith('<call>look {"city": "Ulm"}</call>')
        assert write(source, chat)[1].endswith("Wet.<|im_end|>")
        assert "rain" not in write(source, chat)[1]


def test_names_of_special_tokens_that_a_template_reads_are_marks_and_others_stay_text() -> None:
    source = TEMPLATES["prompt opens a thought"].replace(G, "").replace(E, "")
    thought = "<think>\nrings</think>\n\nSaturn."
    for text in (thought, thought.replace("Saturn.", "The <tool_response> begins a result.")):
        chat = [user("What does </think> do?"), says(text), user("And <|im_end|>?"), says(text)]
        written, captured, rest = write(source, chat)
        answer = text.partition("</think>")[2].strip()
        assert captured == f"{answer}<|im_end|>rings\n</think>\n\n{answer}<|im_end|>"
        quoted = [piece for piece, is_text in rest.pieces if is_text]
        expected = ["</think>", "<|im_end|>"] + ["<tool_response>"] * 2 * ("result" in text)
        assert sorted(quoted) == sorted(expected), "those that the messages bring and the template copies"
        assert "".join(piece for piece, _ in rest.pieces) == written


@pytest.mark.parametrize(
    ("trait", "chat", "whole"),
    [
        (
            "prompt opens a thought",
            [user("A"), says("<think>x</think>B"), user("C"), says("<think>y</think>D")],
            [False, True],
        ),
        ("prompt opens a thought", [user("A"), says("<think>x</think>"), user("C"), says("D")], [False, True]),
        ("prompt opens a thought", [user("A"), says("B", reasoning_content="x")], [True]),
        ("header ends in a space", [user("A"), says("B", reasoning_content="x"), user("C"), says("D")], [False, True]),
        ("header ends in a space", [user("A"), says("B", tool_calls=calls({})["tool_calls"])], [False]),
        ("tool calls", [user("A"), says("B", tool_calls=calls({"city": "Ulm"})["tool_calls"])], [True]),
        ("tool calls", [user("A"), says("B", thinking="x", reasoning="x")], [False]),
    ],
)
def test_answers_that_are_not_written_whole_are_counted(
    trait: str, chat: list[dict[str, Any]], whole: list[bool]
) -> None:
    assert write(TEMPLATES[trait], chat)[2].whole == whole
    assert write(TEMPLATES[trait].replace(G, "").replace(E, ""), chat)[2].whole == whole


OBJECT = '<call>look {"city": "Ulm"}</call><|im_end|>'
NEEDS_NULL = ROLE.replace("(m.content or '')", "('' if m.content is none else m.content)")


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}, {"content": []}], ids=str)
@pytest.mark.parametrize("arguments", [{"city": "Ulm"}, '{"city": "Ulm"}'], ids=type)
@pytest.mark.parametrize(
    "written", ["{{ a | tojson }}", "{{ a if a is string else a | tojson }}", "{{ '' + a }}", "{{ a }}"]
)
def test_arguments_are_written_as_json_once(written: str, arguments: object, content: dict[str, object]) -> None:
    content = {key: value for key, value in content.items() if value is not None}  # as documents bring it
    each = "{% set a = t.function.arguments %}<call>{{ t.function.name }} " + written + "</call>"
    for body in ("{{ m.content or '' }}", "{{ '' if m.content is none else m.content + '' }}"):
        answer = ASSISTANT + body + "{% for t in m.tool_calls or [] %}" + each + "{% endfor %}{{ '<|im_end|>\n' }}"
        chat = [user("Weather?"), calls(arguments, **content), {"role": "tool", "content": "rain"}, says("It rains.")]
        captured = write(loop(ROLE, answer, prompt("<|im_start|>assistant\n")), chat)[1]
        assert captured == OBJECT + "It rains.<|im_end|>"


def test_tools_are_given_to_the_template_as_objects_without_the_nulls_of_other_tools(tmp_path: Path) -> None:
    def tool(name: str, **properties: object) -> dict[str, object]:
        return {"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}

    tools = [tool("look", city={"type": "string"}), tool("open", path={"type": "string"})]
    rows = [
        {"id": "a", "tools": tools, "messages": [user("Hi"), calls({"city": "Ulm"})]},
        {"id": "b", "tools": [tools[1]], "messages": [user("Hi"), calls({"path": "/x"})]},
        {"id": "c", "tools": None, "messages": PAIR},
    ]
    blank = {"id": "d", "tools": " ", "messages": PAIR}
    source = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}" + TEMPLATES["tool calls"]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    for row in rows:
        row["tools"] = row["tools"] and json.dumps(row["tools"])
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, blank]))
    for name in ("x.parquet", "x.jsonl"):
        columns = ColumnsConfig(messages="messages", tools="tools")
        [batch] = Documents(str(tmp_path / name), columns).batches()
        assert not batch.rejects
        texts = [write(source, json.loads(chat)) for chat in batch.documents.column("content").to_pylist()]
        assert texts[0][0].startswith(json.dumps(tools[0]) + json.dumps(tools[1]) + START)
        assert texts[1][0].startswith(json.dumps(tools[1]) + START)
        assert all(text.startswith(START) for text, *_ in texts[2:])
        assert texts[1][1] == '<call>look {"path": "/x"}</call><|im_end|>'


def test_messages_of_from_and_value_are_read(tmp_path: Path) -> None:
    call = {"name": "look", "arguments": {"city": "Ulm"}}
    chat = [("system", "Be brief."), ("human", "Hi"), ("gpt", "Hello."), ("function_call", json.dumps(call))]
    chat += [("observation", "7"), ("gpt", "Seven.")]
    rows = [{"id": "x", "conversations": [{"from": sender, "value": text} for sender, text in chat]}]
    rows += [{"id": "y", "conversations": [{"from": "function_call", "value": text}]} for text in ("look", "[]", "7")]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    [batch] = Documents(str(tmp_path / "x.jsonl"), ColumnsConfig(messages="conversations")).batches()
    messages = json.loads(batch.documents.column("content")[0].as_py())
    roles = ["system", "user", "assistant", "assistant", "tool", "assistant"]
    assert [message["role"] for message in messages] == roles
    assert [message.get("content") for message in messages] == ["Be brief.", "Hi", "Hello.", None, "7", "Seven."]
    assert messages[3]["tool_calls"] == [{"type": "function", "function": call}]
    assert all("function_call of message 0" in reject.reason for reject in batch.rejects)
    assert len(batch.rejects) == 3


@pytest.mark.parametrize("content", [None, "", "Let me look."])
@pytest.mark.parametrize("form", [json.dumps, lambda call: call, lambda call: {**call, "arguments": '{"city": "Ulm"}'}])
def test_a_function_call_is_a_tool_call(content: str | None, form: Any, tmp_path: Path) -> None:
    call = form({"name": "look", "arguments": {"city": "Ulm"}})
    chat = [user("Hi"), {"role": "assistant", "content": content, "function_call": call}]
    chat += [{"role": "function", "name": "look", "content": "rain"}]
    (tmp_path / "x.jsonl").write_text(json.dumps({"id": "x", "messages": chat}))
    [batch] = Documents(str(tmp_path / "x.jsonl"), ColumnsConfig(messages="messages")).batches()
    [content_of] = batch.documents.column("content").to_pylist()
    text, captured, *_ = write(TEMPLATES["tool calls"], json.loads(content_of))
    assert captured == (content or "") + OBJECT
    assert "<|im_start|>tool\nrain" in text


def test_tool_calls_may_be_json(tmp_path: Path) -> None:
    message = calls({"city": "Ulm"})
    rows = [[user("Hi"), {**message, "tool_calls": text}] for text in (json.dumps(message["tool_calls"]), "[{", "")]
    lines = [json.dumps({"id": i, "messages": row}) for i, row in enumerate(rows)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    [batch] = Documents(str(tmp_path / "x.jsonl"), ColumnsConfig(messages="messages")).batches()
    [chat] = batch.documents.column("content").to_pylist()
    assert write(TEMPLATES["tool calls"], json.loads(chat))[1] == OBJECT
    assert ["tool_calls of message 1" in reject.reason for reject in batch.rejects] == [True, False]


@pytest.mark.parametrize(
    ("chat", "reason"),
    [
        ([user([{"type": "image", "url": "x"}, {"type": "text", "text": "What?"}]), says("A cat.")], "of type 'image'"),
        ([user("Hi"), says([{"type": "audio"}])], "message 1 (counting from 0) has a part of type 'audio'"),
    ],
)
def test_parts_that_are_not_text_are_rejected(chat: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(Exception, match=re.escape(reason)):
        write(TEMPLATES["tool calls"], chat)


def test_a_developers_message_is_a_system_message_where_the_template_knows_only_that() -> None:
    known = (
        "{% for m in messages if m.role not in ['system', 'user', 'assistant'] %}"
        "{{ raise_exception('role') }}{% endfor %}"
    )
    chat = [{"role": "developer", "content": "Be brief."}, *PAIR]
    source = TEMPLATES["tool calls"]
    assert write(source, chat)[0].startswith("<|im_start|>developer\nBe brief.")
    assert write(known + source, chat)[0].startswith("<|im_start|>system\nBe brief.")


def test_values_for_the_template_change_what_is_written_and_the_identity(tiny_teacher: Path) -> None:
    checkpoint = Checkpoint.find(TeacherConfig(model=str(tiny_teacher)))
    checkpoint.tokenizer.chat_template = TEMPLATES["tool calls"].replace(
        ASSISTANT, ASSISTANT + "{% if thinks is defined and not thinks %}{{ '<think></think>' }}{% endif %}"
    )
    plain, told = SequencesConfig(), SequencesConfig.model_validate({"chat_template_kwargs": '{"thinks":  false}'})
    assert SequencesConfig.model_validate(told.model_dump()) == told
    tokenizers = [DocumentTokenizer(checkpoint, settings, "chat") for settings in (plain, told)]
    texts = [checkpoint.tokenizer.decode(each.encode([json.dumps(PAIR)])[0].ids) for each in tokenizers]
    assert ["<think></think>Saturn" in text for text in texts] == [False, True]
    base = {"documents": "x", "table": "t", "teacher": {"model": str(tiny_teacher)}, "columns": {"messages": "m"}}
    configs = [CaptureConfig.model_validate({**base, "sequences": each.model_dump()}) for each in (plain, told)]
    before, after = (identify(config, checkpoint).tokenizer for config in configs)
    assert before != after
    stored = before.model_dump_json()
    assert "kwargs" not in stored, "the identities of older tables keep their bytes"
    assert TokenizerIdentity.model_validate_json(stored) == before
    assert TokenizerIdentity.model_validate_json(after.model_dump_json()) == after


@pytest.mark.parametrize("given", ["[1]", "{", '{"messages": []}', '"x"'])
def test_values_for_the_template_must_be_an_object_of_other_names(given: str) -> None:
    with pytest.raises(ValueError, match="chat_template_kwargs"):
        SequencesConfig.model_validate({"chat_template_kwargs": given})
    with pytest.raises(ValueError, match="applies only to chats"):
        CaptureConfig.model_validate(
            {
                "documents": "x",
                "table": "t",
                "teacher": {"model": "m"},
                "columns": {"text": "text"},
                "sequences": {"chat_template_kwargs": '{"a": 1}'},
            }
        )
