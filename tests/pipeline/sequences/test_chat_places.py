"""Each captured turn has the whole answer and nothing of another message, or the chat is rejected."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from softlabel.pipeline.config.capture import SequencesConfig, TeacherConfig
from softlabel.pipeline.models.checkpoint import Checkpoint
from softlabel.pipeline.sequences.tokenizer import DocumentTokenizer

Chat = list[dict[str, object]]
END = "<|im_end|>"
SYSTEM = {"role": "system", "content": " Be brief. "}
WORDS = "Saturn is a planet. Yes Mars thanks, bye ASSISTANT: USER: [INST] [/INST] Name a planet. system user assistant "


def byte_level(trim: bool = False) -> Tokenizer:
    """A byte-level tokenizer; with ``trim``, its offsets leave out the space around tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=500, special_tokens=["<|im_start|>", END], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([WORDS] * 50, trainer)
    if trim:
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return backend


def underscored() -> Tokenizer:
    """A tokenizer in which a space belongs to the word after it, and one is added before each text."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<|im_start|>", END, *(f"<0x{i:02X}>" for i in range(256))]
    backend.train_from_iterator([WORDS] * 50, BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False))
    return backend


def greedy() -> Tokenizer:
    """A tokenizer whose special tokens include the space after or before them."""
    backend = byte_level()
    after, before = AddedToken("<|assistant|>", rstrip=True), AddedToken("<|user|>", lstrip=True)
    backend.add_special_tokens([after, before])
    return backend


BACKENDS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": byte_level,
    "trimmed": lambda: byte_level(trim=True),
    "underscored": underscored,
    "greedy": greedy,
}


@pytest.fixture(scope="module")
def checkpoints(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    found = {}
    for name, backend in BACKENDS.items():
        folder = shutil.copytree(tiny_teacher, tmp_path_factory.mktemp("teachers") / name)
        PreTrainedTokenizerFast(tokenizer_object=backend(), eos_token=END).save_pretrained(folder)
        (folder / "chat_template.jinja").write_text("")
        found[name] = Checkpoint.find(TeacherConfig(model=str(folder)))
    return found


def user(text: object) -> dict[str, object]:
    return {"role": "user", "content": text}


def says(text: object, **more: object) -> dict[str, object]:
    return {"role": "assistant", "content": text, **more}


def captured(checkpoint: Checkpoint, template: str, chat: Chat | dict[str, Chat], **how: str) -> tuple[str, str]:
    """The captured text of a chat, or why it is rejected."""
    checkpoint.tokenizer.chat_template = template
    tokenizer = DocumentTokenizer(checkpoint, SequencesConfig.model_validate(how), "chat")
    encoded, refused = tokenizer.encode([json.dumps(chat, ensure_ascii=False)])
    return checkpoint.tokenizer.decode(encoded.ids[encoded.wanted].tolist()), refused.get(0, "")


def loop(user: str, assistant: str, after: str = "") -> str:
    other = "{% if m.role == 'assistant' %}" + assistant + "{% else %}" + user + "{% endif %}"
    return "{% for m in messages %}" + other + "{% endfor %}" + after


INST = loop("{{ '[INST] ' + m.content + ' [/INST]' }}", "{{ ' ' + m.content + '<|im_end|>' }}")
SPACED = loop(
    "{{ 'USER: ' + m.content + ' ' }}",
    "{{ 'ASSISTANT: ' + m.content + '<|im_end|>' }}",
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}",
)
MARKED_AFTER_A_SPACE = loop(
    "{{ 'USER: ' + m.content + ' ' }}",
    "ASSISTANT: {% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}",
)
ROLES = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = loop(ROLES, ROLES, PROMPT)
ENDS_ONCE = loop(ROLES, ROLES, PROMPT.replace("{% endif %}", "{% else %}{{ '<|endoftext|>' }}{% endif %}"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("answer", ["Saturn is a planet.", "Yes", "é", "\N{RINGED PLANET}!", "Mars"])
@pytest.mark.parametrize("template", [INST, SPACED, MARKED_AFTER_A_SPACE], ids=["inst", "spaced", "marked"])
def test_the_first_token_is_captured_where_the_header_ends_in_a_space(
    template: str, answer: str, backend: str, checkpoints: dict[str, Checkpoint]
) -> None:
    """A tokenizer may merge the header's space and the answer's first word into one token."""
    for question in ("Name a planet.", answer, "Yes "):
        chat = [user(question), says(answer), user(question), says(answer)]
        words, refused = captured(checkpoints[backend], template, chat)
        assert not refused
        assert [part.strip() for part in words.split(END)] == [answer, answer, ""]


def test_the_space_before_an_answer_is_not_captured_if_it_is_a_separate_token(
    checkpoints: dict[str, Checkpoint],
) -> None:
    for name in ("bytes", "trimmed"):
        assert captured(checkpoints[name], SPACED, [user("Hi"), says("Qz")]) == ("Qz<|im_end|>", "")


@pytest.mark.parametrize(
    "chat",
    [
        [user("Name a planet."), says("Saturn."), user("thanks, bye")],
        [user("Name a planet."), says("Saturn."), user("Saturn.")],
        [user("Name a planet."), says("Saturn."), user("")],
        [SYSTEM, user("Name a planet."), says("Saturn."), user("bye"), user("really")],
        [user("Name a planet."), says("Saturn."), {"role": "tool", "content": "ok"}],
    ],
    ids=["last words", "repeated words", "no words", "more words", "a tool's words"],
)
@pytest.mark.parametrize("turns", ["all", "last"])
def test_a_turn_ends_where_it_ends_also_if_the_template_adds_a_mark_at_the_end_of_the_chat(
    turns: str, chat: Chat, checkpoints: dict[str, Checkpoint]
) -> None:
    assert captured(checkpoints["bytes"], ENDS_ONCE, chat, assistant_turns=turns) == ("Saturn.<|im_end|>", "")
    number = [message["role"] for message in chat].index("assistant") + 1
    words = "Saturn.<|im_end|>\n<|endoftext|>"
    assert captured(checkpoints["bytes"], ENDS_ONCE, chat[:number], assistant_turns=turns) == (words, "")
    assert captured(checkpoints["bytes"], CHATML, chat) == ("Saturn.<|im_end|>", "")


SPELLED = "{% for part in m.content %}{{ part.text }}{% endfor %}"


@pytest.mark.parametrize(
    "part",
    [
        SPELLED,
        SPELLED.replace("part.text", "part['text']"),
        SPELLED.replace("{{ part.text }}", "{% if part.type == 'text' %}{{ part.text }}{% endif %}"),
    ],
)
def test_a_template_that_wants_content_in_parts_gets_it_in_parts(part: str, checkpoints: dict[str, Checkpoint]) -> None:
    template = loop("Q: " + part, "A: {% generation %}" + part + "<|im_end|>{% endgeneration %}")
    for source in (template, template.replace("{% generation %}", "").replace("{% endgeneration %}", "")):
        chat = [user("Name a planet."), says("Saturn."), user("Another?"), says("Mars.")]
        words, refused = captured(checkpoints["bytes"], source, chat)
        assert (words.replace(" ", ""), refused) == ("Saturn.<|im_end|>Mars.<|im_end|>", "")
    parts = [says([{"type": "text", "text": "Saturn. "}, {"type": "text", "text": "Mars."}])]
    assert captured(checkpoints["bytes"], template, parts) == ("Saturn. Mars.<|im_end|>", "")


@pytest.mark.parametrize(
    ("assistant", "reason"),
    [
        ("A: {% generation %}{{ m.content[:4] }}<|im_end|>{% endgeneration %}", "does not contain all of message 1"),
        ("A: {% generation %}{{ m.content.split('.')[0] }}<|im_end|>{% endgeneration %}", "contain all of message 1"),
        ("A: {{ m.content[:4] }}{% generation %}{{ m.content[4:] }}<|im_end|>{% endgeneration %}", "message 1"),
        ("A: {{ m.content }}{% generation %}<|im_end|>{% endgeneration %}", "does not contain all of message 1"),
        ("A: {% generation %}{{ messages[0].content }}<|im_end|>{% endgeneration %}", "also contains message 0"),
        ("A: {% generation %}{{ m.content + loop.previtem.content }}!{% endgeneration %}", "also contains message 0"),
    ],
)
def test_a_turn_with_less_or_more_than_the_answer_is_rejected(
    assistant: str, reason: str, checkpoints: dict[str, Checkpoint]
) -> None:
    template = loop("Q: {{ m.content }}\n", assistant)
    words, refused = captured(checkpoints["bytes"], template, [user("Name a planet."), says("Saturn. It is.")])
    assert not words
    assert reason in refused


FORGETS = "{{ '<|im_start|>assistant\n' + m.content.split('</think>')[-1].lstrip('\n') + '<|im_end|>\n' }}"
SAYS_SO = "{{ '<|im_start|>assistant\n</think>' + m.content.split('</think>')[-1] + '<|im_end|>\n' }}"
OF_TOOLS = (
    "{% if m.content.startswith('<tool>') and m.content.endswith('</tool>') %}"
    "{{ '<|im_start|>tool\n' + m.content[6:-7] + '<|im_end|>\n' }}{% else %}" + ROLES + "{% endif %}"
)
CUT_SHORT = "{{ '<|im_start|>' + m.role + '\n' + m.content[:20] + '<|im_end|>\n' }}"
LENGTHY = "{% if m.content | length > 20 %}Long: {% endif %}" + ROLES
FOLDED = (
    "{% if m.role == 'system' %}{% else %}{{ '<|im_start|>user\n' }}{% if messages[0].role == 'system' and loop.index0 "
    "== 1 %}{{ messages[0].content | trim + '\n\n' }}{% endif %}{{ m.content | trim + '<|im_end|>\n' }}{% endif %}"
)
THOUGHT = "<think>\nrings\n</think>\n\nSaturn."


@pytest.mark.parametrize(
    ("others", "answers", "chat", "words"),
    [
        (ROLES, FORGETS, [user("Name."), says(THOUGHT), user("Bye"), says("Mars.")], ["Saturn.", "Mars."]),
        (ROLES, SAYS_SO, [user("Name."), says(THOUGHT), user("Bye"), says("Mars.")], ["</think>\n\nSaturn.", "Mars."]),
        (OF_TOOLS, ROLES, [user("<tool>7</tool>"), says("Saturn."), user("<tool>x y</tool>"), says("M")], None),
        (OF_TOOLS, FORGETS, [user("<tool>7</tool>"), says(THOUGHT), user("Name."), says(THOUGHT)], ["Saturn."] * 2),
        (CUT_SHORT, ROLES, [user("Name a planet. " * 9), says("Saturn.")], None),
        (LENGTHY, ROLES, [user("Name a planet. " * 9), says("Saturn."), user("short"), says("Mars")], None),
        (FOLDED, ROLES, [SYSTEM, user(" Name. "), says("Saturn.")], None),
        ("{% if m.role == 'user' %}" + ROLES + "{% endif %}", ROLES, [SYSTEM, user("Name."), says("Saturn.")], None),
        (ROLES + "{{ '(' + m.content | upper + ')' }}", ROLES, [user("Name."), says("Name.")], None),
        (ROLES, ROLES, [user("Same."), says("Same."), user("Same."), says("Same.")], None),
        (ROLES, ROLES, [user("Name."), says(""), user("Name."), says("  ")], None),
        (ROLES, ROLES, [user("<|im_start|>assistant\nNo"), says("<|im_end|><|im_start|>assistant\nNo")], None),
        (ROLES, ROLES, [user("Name."), says("Mars."), says("Saturn."), user("Bye.")], None),
    ],
)
def test_text_that_a_template_omits_trims_or_inspects_is_no_reason_to_reject(
    others: str, answers: str, chat: Chat, words: list[str] | None, checkpoints: dict[str, Checkpoint]
) -> None:
    expected = words or [str(message["content"]) for message in chat if message["role"] == "assistant"]
    found, refused = captured(checkpoints["bytes"], loop(others, answers, PROMPT), chat)
    assert not refused
    lead = "</think>" if answers == SAYS_SO else ""
    assert found == "".join(lead * (not w.startswith(lead)) + w + END for w in expected)


def test_an_answer_that_is_only_an_omitted_thought_is_rejected(
    checkpoints: dict[str, Checkpoint],
) -> None:
    chat = [user("Name."), says("<think>\nrings\n</think>")]
    _, refused = captured(checkpoints["bytes"], loop(ROLES, FORGETS, PROMPT), chat)
    assert "message 1" in refused


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (loop(ROLES, FORGETS, PROMPT), [END, "Mars." + END]),  # the thought's turn is written without it
        (
            loop("Q: {{ m.content }}", "A{% generation %}{{ m.content.split('>')[-1] }}!{% endgeneration %}"),
            ["!", "Mars.!"],
        ),
        ("{% set messages = messages[-2:] %}" + loop(ROLES, ROLES, PROMPT), ["Mars." + END]),  # older turns are not
    ],
    ids=["as nothing", "marked", "not at all"],
)
def test_an_answer_that_is_left_out_is_counted_and_the_others_are_captured(
    template: str, words: list[str], checkpoints: dict[str, Checkpoint]
) -> None:
    checkpoints["bytes"].tokenizer.chat_template = template
    chat = [user("Name."), says("<think>\nrings\n</think>"), user("Another?"), says("Mars.")]
    tokenizer = DocumentTokenizer(checkpoints["bytes"], SequencesConfig(), "chat")
    encoded, refused = tokenizer.encode([json.dumps(chat)])
    assert not refused
    assert checkpoints["bytes"].tokenizer.decode(encoded.ids[encoded.wanted]) == "".join(words)
    assert (tokenizer.answers, tokenizer.partial_answers) == (2, 1)


def test_what_a_template_marks_of_other_messages_is_not_captured(checkpoints: dict[str, Checkpoint]) -> None:
    template = (
        "{% for m in messages %}<{{ m.role }}>{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endfor %}"
    )
    chat = [SYSTEM, user("Name."), says("Saturn."), user(""), says(""), {"role": "tool", "content": "7"}, says("Mars.")]
    assert captured(checkpoints["bytes"], template, chat)[1] == ""
    assert captured(checkpoints["bytes"], template, chat[:4] + chat[5:]) == ("Saturn.<|im_end|>Mars.<|im_end|>", "")


@pytest.mark.parametrize("header", ["A: ", "A:", "A:\n"])
def test_space_that_belongs_to_an_answer_is_captured(header: str, checkpoints: dict[str, Checkpoint]) -> None:
    """Also where the generation prompt is not what the header is, and where nothing ends the chat's last turn."""
    prompt = "{% if add_generation_prompt %}{{ '<think>' }}{% endif %}"
    answer = "{{ " + repr(header) + " + m.content }}{% if not loop.last %}{{ '<|im_end|>' }}{% endif %}"
    chat = [user("Name."), says("\n  Qz \n"), user("Another?"), says("  Qy\n\n")]
    expected = ("\n  Qz \n<|im_end|>  Qy\n\n", "")
    assert captured(checkpoints["bytes"], loop("{{ '<|im_start|>' + m.content }}", answer, prompt), chat) == expected


def test_a_special_token_is_not_captured_for_the_space_that_it_includes(
    checkpoints: dict[str, Checkpoint],
) -> None:
    template = loop("<|user|>{{ m.content }}", "<|assistant|>{% generation %}{{ m.content }}!\n{% endgeneration %}")
    chat = [user("Hi"), says("\n Saturn."), user("Bye"), says(" Mars.")]
    assert captured(checkpoints["greedy"], template, chat) == ("Saturn.!Mars.!\n", "")


def test_a_chat_with_a_token_across_two_messages_is_rejected(checkpoints: dict[str, Checkpoint]) -> None:
    template = loop("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")
    joined = captured(checkpoints["bytes"], template, [user("Sat"), says("urn.")])
    assert joined == ("", "a token covers text of both the assistant and another message")
    assert captured(checkpoints["bytes"], template, [user("Sat?"), says("Mars.")]) == ("Mars.", "")


def test_only_captured_turns_must_contain_their_answers(checkpoints: dict[str, Checkpoint]) -> None:
    short = "A: {% generation %}{{ m.content[:4] }}<|im_end|>{% endgeneration %}"
    template = loop("Q: {{ m.content }}\n", short)
    chat = [user("Name."), says("Saturn."), user("Name."), says("Mars")]
    assert "message 1" in captured(checkpoints["bytes"], template, chat)[1]
    assert captured(checkpoints["bytes"], template, chat, assistant_turns="last") == (" Mars<|im_end|>", "")
    pair = {"prompt": chat[:2], "completion": chat[2:]}
    assert captured(checkpoints["bytes"], template, pair) == (" Mars<|im_end|>", "")


class Shape(NamedTuple):
    """A template built from known parts."""

    question: tuple[str, str]
    answer: tuple[str, str]
    marked: bool
    prompt: bool
    trimmed: bool
    ends_once: bool

    @property
    def template(self) -> str:
        content = "m.content | trim" if self.trimmed else "m.content"
        marks = ("{% generation %}", "{% endgeneration %}") if self.marked else ("", "")
        end = self.answer[1] if not self.ends_once else ""
        prompt = f"{{% if add_generation_prompt %}}{{{{ {self.answer[0]!r} }}}}{{% endif %}}" if self.prompt else ""
        ending = f"{{% if not add_generation_prompt %}}{{{{ {self.answer[1]!r} }}}}{{% endif %}}"
        return loop(
            f"{{{{ {self.question[0]!r} + ({content}) + {self.question[1]!r} }}}}",
            f"{{{{ {self.answer[0]!r} }}}}{marks[0]}{{{{ ({content}) + {end!r} }}}}{marks[1]}",
            prompt + (ending if self.ends_once else ""),
        )

    def write(self, chat: Chat) -> tuple[str, list[tuple[int, int]], set[int]]:
        """The text, the assistant's turns, and the positions of the user's characters without surrounding space."""
        text, turns, others = "", [], set()
        for message in chat:
            is_answer, words = message["role"] == "assistant", str(message["content"])
            words = words.strip() if self.trimmed else words
            header, end = self.answer if is_answer else self.question
            if is_answer and self.ends_once and (self.marked or message is not chat[-1]):
                end = ""
            text += header
            if is_answer:
                turns.append((len(text), len(text) + len(words) + len(end if self.marked else end.rstrip())))
            else:
                lead = len(text) + len(words) - len(words.lstrip())
                others |= set(range(lead, lead + len(words.strip())))
            text += words + end
        if self.ends_once and (self.marked or chat[-1]["role"] != "assistant"):
            text += self.answer[1]
        return text, turns, others


SHAPES = st.builds(
    Shape,
    st.sampled_from([("USER: ", " "), ("[INST] ", " [/INST]"), ("Q", "\n"), ("<|im_start|>user\n", "<|im_end|>\n")]),
    st.sampled_from(
        [("ASSISTANT: ", "<|im_end|>"), (" A: ", " ###\n"), ("A", "."), ("<|im_start|>assistant\n", "<|im_end|>\n")]
    ),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([False, False, False, True]),
)
TEXTS = st.lists(
    st.sampled_from(["Saturn", " ", "Yes", "é", "🪐", ".", "\n", "A", "ASSISTANT: ", "[/INST]", "###", "Q", "s"]),
    max_size=6,
).map("".join)


@pytest.mark.parametrize("backend", ["bytes", "trimmed", "underscored"])
@settings(max_examples=150)
@example(
    Shape(("USER: ", " "), ("ASSISTANT: ", END), marked=True, prompt=False, trimmed=False, ends_once=True), [""] * 3
)
@given(shape=SHAPES, texts=st.lists(TEXTS, min_size=2, max_size=7))
def test_exactly_the_tokens_of_the_assistants_turns_are_captured(
    backend: str, checkpoints: dict[str, Checkpoint], shape: Shape, texts: list[str]
) -> None:
    """Compared with a text that this test builds itself, token by token and character by character."""
    chat = [(says if i % 2 else user)(text) for i, text in enumerate(texts)]
    text, turns, others = shape.write(chat)
    plain = Tokenizer.from_str(checkpoints[backend].tokenizer.backend_tokenizer.to_str())
    plain.post_processor = processors.Sequence([])
    encoding = plain.encode(text, add_special_tokens=False)
    places = [set(range(*span)) for span in encoding.offsets]
    inside = {place for turn in turns for place in range(*turn)}
    checkpoints[backend].tokenizer.chat_template = shape.template
    tokenizer = DocumentTokenizer(checkpoints[backend], SequencesConfig(), "chat")
    encoded, refused = tokenizer.encode([json.dumps(chat)])
    if refused:
        joined = any(place & inside and place & others for place in places)
        assert shape.ends_once or joined, refused
        return
    assert encoded.ids.tolist() == encoding.ids
    assert encoded.wanted.tolist() == [bool(place & inside) for place in places]
