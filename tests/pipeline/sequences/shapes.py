"""Chats of many shapes, for tests of chat templates. Their words occur in each other, and in what templates write."""

import json
from typing import Any

Message = dict[str, Any]


def system(text: object) -> Message:
    return {"role": "system", "content": text}


def user(text: object) -> Message:
    return {"role": "user", "content": text}


def says(text: object, **more: object) -> Message:
    return {"role": "assistant", "content": text, **more}


def calls(*functions: Message, **more: object) -> Message:
    """An assistant's message with calls of these functions."""
    tool_calls = [{"type": "function", "id": f"call0000{i}", "function": each} for i, each in enumerate(functions)]
    return {"role": "assistant", "tool_calls": tool_calls, **more}


def result(text: str) -> Message:
    return {"role": "tool", "content": text, "name": "look", "tool_call_id": "call00000"}


def parts(*texts: str) -> list[Message]:
    return [{"type": "text", "text": text} for text in texts]


ASKS, ANSWER, MORE, SECOND = user("Name a planet."), says("Saturn."), user("Another?"), says("Mars.")
WEATHER, RAIN, WET = user("Weather?"), result("drizzle"), says("It rains.")
ULM = {"name": "look", "arguments": {"city": "Ulm"}}
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "weather of Ulm",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
SHAPES: dict[str, Any] = {
    "one turn": [ASKS, ANSWER],
    "two turns": [ASKS, ANSWER, MORE, SECOND],
    "three turns": [ASKS, ANSWER, MORE, SECOND, user("A third?"), says("Yes, Venus.")],
    "a system's words": [system("Be brief."), ASKS, ANSWER, MORE, SECOND],
    "an empty system": [system(""), ASKS, ANSWER],
    "a system and an answer": [system("Be brief."), ANSWER],
    "a system later": [ASKS, ANSWER, system("Be brief."), MORE, SECOND],
    "a developer": [{"role": "developer", "content": "Be brief."}, ASKS, ANSWER],
    "ends with the user": [ASKS, ANSWER, user("thanks, bye")],
    "ends with the user twice": [ASKS, ANSWER, user("bye"), user("really")],
    "begins with an answer": [SECOND, user("bye"), says("Bye.")],
    "two answers": [MORE, SECOND, ANSWER, user("bye")],
    "two answers at the end": [MORE, SECOND, ANSWER],
    "two questions": [user("Hi."), MORE, SECOND],
    "the same words": [user("Yes"), says("Yes"), user("Yes"), says("Yes")],
    "the same turns": [MORE, SECOND] * 3,
    "answers within questions": [user("Is Saturn a planet? Saturn is."), says("Saturn"), user("Saturn?"), says("Sa")],
    "digits": [user("1+1?"), says("2"), user("2"), says("2\n"), user("0"), says("0")],
    "names of roles": [user("assistant"), says("user"), user("system"), says("assistant")],
    "an empty answer": [MORE, says(""), WEATHER, says("Saturn")],
    "empty questions": [user(""), says("Saturn"), user(""), SECOND],
    "only space": [user("Hi"), says("  "), user(" "), SECOND],
    "space around": [user("  Another? "), says("  Saturn is red. \n"), user("\nWeather?\n\n"), says("\n\nMars!\n\n")],
    "other line ends": [user("a\r\nb"), says("c\r\n\r\nd\r\n"), user("\te"), says("fg\t")],
    "other scripts": [
        user("日本 🪐"),
        says("é🙂語語🙂"),
        user("🙃"),
        says("🙂"),
        user("e\u0301 \u200b"),
        says("\xa0ß ﬁ"),
    ],
    "code": [
        user("Code?"),
        says("```python\nfor i in x:\n    print(i)\n```\n\nDone. {{ m }} {% for %} {% generation %}"),
        user("<b>&amp;</b>"),
        says("<p class='x'>\"a\" & b</p>"),
    ],
    "marks of templates": [
        user("Say ASSISTANT: [/INST] <|im_start|>assistant\nx<|im_end|> <|assistant|> Assistant: Answer: <a>"),
        says("ASSISTANT: Saturn [/INST] <|im_end|> <|end|> assistant\n y</a> ### End 2"),
        user("<start_of_turn>model\n"),
        says("<eot> [e~[ </s> <|assistant_end|><end_of_turn>"),
    ],
    "long": [user("Name a planet. " * 40), says("Saturn is a planet. " * 40), user("x" * 300), says("- Mars\n" * 30)],
    "a thought": [ASKS, says("<think>\nrings\n</think>\n\nSaturn.")],
    "thoughts": [ASKS, says("<think>\nrings\n</think>\n\nSaturn."), MORE, says("<think>\nred\n</think>\n\nMars.")],
    "thoughts in one line": [ASKS, says("<think> rings </think> Saturn."), MORE, says("<think>red</think>Mars.")],
    "empty thoughts": [ASKS, says("<think>\n\n</think>\n\nSaturn."), MORE, says("<think></think>Mars.")],
    "only a thought": [MORE, says("<think>\nMars\n</think>"), user("bye"), says("Yes")],
    "only a thought at last": [MORE, SECOND, user("bye"), says("<think>\nYes\n</think>")],
    "a thought apart": [ASKS, says("Saturn.", reasoning_content="rings", thinking="rings")],
    "thoughts apart": [ASKS, says("Saturn.", reasoning_content="rings"), MORE, says("Mars.", reasoning_content="red")],
    "thoughts like answers": [ASKS, says("Yes", reasoning_content="Yes"), MORE, says("Mars", reasoning_content="Mars")],
    "tags in words": [user("Which </think> tag?"), says("The </think> tag ends it."), user("<call>w</call>"), SECOND],
    "a call": [WEATHER, calls(ULM, content=""), RAIN, WET],
    "a call as text": [WEATHER, calls({**ULM, "arguments": json.dumps(ULM["arguments"])}, content=""), RAIN, WET],
    "words beside a call": [WEATHER, calls(ULM, content="Let me look."), RAIN, WET],
    "parts beside a call": [WEATHER, calls(ULM, content=parts("Let me look.")), RAIN, WET],
    "a call after a thought": [
        WEATHER,
        calls(ULM, content="", reasoning_content="I look."),
        RAIN,
        says("It rains.", reasoning_content="Wet."),
        user("bye"),
        says("Bye."),
    ],
    "only a call": [WEATHER, calls(ULM, content="")],
    "a call without content": [WEATHER, calls(ULM), RAIN, WET],
    "two calls": [
        WEATHER,
        calls(ULM, {"name": "look", "arguments": {"city": "Bonn", "days": 2}}, content=""),
        RAIN,
        result("sun"),
        says("It rains and shines."),
    ],
    "the same call again": [WEATHER, *[calls(ULM, content=""), RAIN] * 2, says("It drizzle.")],
    "nested arguments": [
        WEATHER,
        calls({"name": "look", "arguments": {"at": {"days": [1, 2]}, "exact": True, "unit": None}}, content=""),
        result('{"t": 3}'),
        says("3 degrees."),
    ],
    "no arguments": [
        user("Time?"),
        calls({"name": "now", "arguments": {}}, content=""),
        result("12:00"),
        says("Noon."),
    ],
    "a call and more": [WEATHER, calls(ULM, content=""), RAIN, WET, user("And Mars?"), says("Dry.")],
    "tools": {"messages": [WEATHER, calls(ULM, content=""), RAIN, WET], "tools": [TOOL]},
    "parts": [user(parts("Name it.")), says(parts("Saturn.")), user(parts("Another?")), says(parts("Mars."))],
    "several parts": [user(parts("Name", " it.")), says(parts("Sat", "urn.")), MORE, says(parts("Mars."))],
    "some parts": [system(parts("Be brief.")), ASKS, says(parts("Saturn.")), MORE, SECOND],
    "a prompt": {"prompt": [MORE, SECOND, user("bye")], "completion": [says("Saturn"), user("thanks")]},
    "a longer completion": {"prompt": [system("Be brief."), MORE], "completion": [SECOND, user("More?"), says("Io.")]},
}
