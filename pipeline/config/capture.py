"""Settings of a capture: documents, teacher, sequences, selection and shards."""

import json
from datetime import date
from pkgutil import resolve_name
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, PositiveInt, field_validator, model_validator

from softlabel.pipeline.config.base import Location, Locations, Settings

Content = Literal["text", "chat", "completion"]
"""What a document is: a text, a chat, or a prompt and its completion."""

CONTENT_COLUMNS = ("text", "messages", "prompt", "completion")
"""Settings for the columns of the documents' content; which of them are set tells what a document is."""


HEAD_AND_TAIL = ("top_p", "min_k", "max_k", "draws")
"""Settings of the selection that top_k is short for."""


class ColumnsConfig(Settings):
    """Which columns hold the documents' ids, texts and labels."""

    id: str | None = "id"
    """Column with the document's id, a unique string or integer. The id of a plain text file is its path. If the
    documents have no ids, give none: the hash of its content is then a document's id, and documents with equal content
    count as one."""
    text: str = "text"
    """Column with plain text."""
    messages: str | None = None
    """Column with a chat, as a list of {role, content} or {from, value} messages; replaces the text column."""
    tools: str | None = None
    """Column with the tools that the assistant can call in a chat, as a list of objects or as JSON."""
    prompt: str | None = None
    """Column with a prompt, as text or as messages of a chat; needs completion. The two replace the text column."""
    completion: str | None = None
    """Column with the completion of the prompt. Only the completion is captured; the prompt is its context."""
    label: str | None = None
    """Column with a class label, stored in addition to the soft labels."""
    carry: tuple[str, ...] = ()
    """Further columns to store with every row, such as source or language, so that rows can be filtered by them."""

    @field_validator("id")
    @classmethod
    def _none_is_no_column(cls, name: str | None) -> str | None:
        return None if name == "none" else name

    @model_validator(mode="after")
    def _one_kind_of_content(self) -> Self:
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("prompt and completion must be given together")
        if self.prompt is not None and self.messages is not None:
            raise ValueError("messages can't be combined with prompt and completion; give one or the other")
        if self.tools is not None and self.content == "text" and self.gives_content:
            raise ValueError("tools belong to chats; give messages, or prompt and completion, or leave tools out")
        if repeated := [name for i, name in enumerate(self.carry) if name in self.carry[:i]]:
            raise ValueError(f"carry lists a column more than once: {', '.join(dict.fromkeys(repeated))}")
        return self

    @property
    def gives_content(self) -> bool:
        """Whether the columns of the documents' content are given."""
        return not self.model_fields_set.isdisjoint(CONTENT_COLUMNS)

    @property
    def content(self) -> Content:
        """What kind of documents these columns hold."""
        return "chat" if self.messages else "completion" if self.prompt else "text"

    @property
    def contents(self) -> dict[str, str]:
        """Names of the columns with the documents' content, by setting."""
        names = {"text": ("text",), "chat": ("messages",), "completion": ("prompt", "completion")}[self.content]
        names += ("tools",) if self.tools else ()
        return {name: getattr(self, name) for name in names}


class TeacherConfig(Settings):
    """The model whose predictions are stored: of the next token, or of a document's class."""

    model: Location | None = None
    """Folder or hub name of a causal language model or of a sequence classifier; its config.json tells which it is.
    If left out, it is the teacher of the table's newest capture; a new table needs one."""
    labels: tuple[str, ...] = ()
    """Class labels that the documents have. If given, no model is run: the table stores each document's own label
    with probability 1, so that a teacher can be trained from it. The model provides only the tokenizer."""
    revision: str | None = None
    """Commit, tag or branch of a hub model; if left out, the commit that the table was captured with."""
    adapter: Location | None = None
    """Folder or hub name of a PEFT adapter to merge into the model; needs the package peft."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Precision of the teacher's forward pass."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto uses every GPU of the machine, with one worker process each, or the CPU if there
    is no GPU."""
    workers: PositiveInt = 1
    """Worker processes per device, each with its own copy of the teacher; on the CPU they share its cores."""
    device_map: Literal["auto"] | None = None
    """auto splits one teacher that is too large for a GPU across all GPUs and, if they have too little memory, the
    machine's memory. There is then only one worker, and only one GPU computes at a time."""
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention implementation; auto uses sdpa if the architecture supports it (Gemma 2 supports only eager)."""
    engine: str | None = None
    """Your own class that runs the model instead of transformers, as module:Class; it implements
    softlabel.pipeline.teachers.teacher.Teacher."""
    batch_tokens: PositiveInt = 8192
    """Tokens per forward pass, padding included."""
    trust_remote_code: bool = False
    """Run Python code from the model's repository."""

    @model_validator(mode="after")
    def _device_map_excludes_device(self) -> Self:
        if self.device_map is not None and (self.device != "auto" or self.workers > 1):
            raise ValueError("device_map auto uses the whole machine; leave out device and workers")
        return self

    @field_validator("engine")
    @classmethod
    def _engine_can_be_imported(cls, engine: str | None) -> str | None:
        try:
            if engine is not None:
                resolve_name(engine)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"engine must be module:Class, and Python must be able to import it; {error}") from None
        return engine

    @model_validator(mode="after")
    def _labels_are_distinct(self) -> Self:
        if self.labels and (len(self.labels) < 2 or len(set(self.labels)) < len(self.labels)):
            raise ValueError(f"labels must be two or more names, each given once; found {' '.join(self.labels)}")
        return self


class SequencesConfig(Settings):
    """How documents become token sequences."""

    max_tokens: int = Field(default=1024, ge=2)
    """Longest sequence, in tokens. A longer document is cut into several chunks; for a classifier it is truncated
    instead, and the classifier's own limit applies too."""
    context: PositiveInt = 1
    """Tokens that each chunk repeats from the previous one, as context; they are predicted only once."""
    assistant_turns: Literal["all", "last"] = "all"
    """Which of the assistant's turns in a chat to capture: all of them, or only the last."""
    special_tokens: Literal["text", "parse"] = "text"
    """How to read the name of a special token inside a document, such as <|im_end|>: as ordinary text, or parsed as
    the token itself."""
    chat_template_date: date = date(2026, 1, 1)
    """Date that chat templates use as today's. It is fixed so that the same chat gives the same tokens every
    day."""
    chat_template_kwargs: str | None = None
    """Further values for the chat template, as a JSON object, such as {"enable_thinking": false}."""

    @field_validator("chat_template_kwargs", mode="before")
    @classmethod
    def _kwargs_are_an_object(cls, given: Any) -> Any:
        try:
            kwargs = json.loads(given) if isinstance(given, str) else given
            text = json.dumps(kwargs, sort_keys=True, ensure_ascii=False)
        except (ValueError, TypeError):
            kwargs, text = "", ""
        if kwargs is None:
            return None
        if not isinstance(kwargs, dict):
            raise ValueError('chat_template_kwargs must be a JSON object, such as {"enable_thinking": false}')
        if taken := {"messages", "tools", "add_generation_prompt"}.intersection(kwargs):
            raise ValueError(
                f"chat_template_kwargs can't set {', '.join(sorted(taken))}, which come from the documents"
            )
        return text if kwargs else None

    @model_validator(mode="after")
    def _chunks_advance(self) -> Self:
        if self.gives("context", "max_tokens") and self.context >= self.max_tokens:
            raise ValueError(f"context ({self.context}) must be less than max_tokens ({self.max_tokens})")
        return self


class SelectionConfig(Settings):
    """What is stored of the teacher's distribution at each position: an exact head and a sampled tail."""

    top_k: int | None = Field(default=None, ge=1, le=32767)
    """Plain top-k: store exactly this many ids and no tail. Short for top_p 1, min_k = max_k = top_k, draws 0."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """The head takes the most likely ids until their total probability reaches this, within min_k and max_k."""
    min_k: int = Field(default=1, ge=0)
    """Fewest ids in the head."""
    max_k: int = Field(default=16, ge=0, le=32767)
    """Most ids in the head. 0 stores no head: pure sampling."""
    draws: int = Field(default=48, ge=0, le=32767)
    """Samples of the tail: at each position, ceil(draws x the probability outside the head) are drawn. 0 stores no
    tail."""
    temperatures: tuple[Annotated[float, Field(ge=1e-3, le=1e3)], ...] = (1.0,)
    """Temperatures that students can be trained at, 1 first; each takes about 3 bytes per position."""
    tail_logprobs: Literal["eval", "all"] = "eval"
    """Splits whose rows also store the log-probabilities of the sampled ids: eval, or all. Training never uses them;
    in an evaluation, they help to estimate other divergences than forward_kl."""
    seed: int = 0
    """Seed for sampling the tail."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_k is not None:
            # Compare values, not what is given: completed settings give everything.
            fields = type(self).model_fields
            clash = [name for name in HEAD_AND_TAIL if getattr(self, name) != fields[name].default]
            if clash:
                raise ValueError(f"top_k can't be combined with {', '.join(clash)}; give one or the other")
        elif self.gives("min_k", "max_k") and self.min_k > self.max_k:
            raise ValueError(f"min_k ({self.min_k}) must not exceed max_k ({self.max_k})")
        elif self.gives("max_k", "draws") and self.max_k == self.draws == 0:
            raise ValueError("max_k 0 and draws 0 would store nothing; set one of them above 0")
        if self.temperatures[:1] != (1.0,) or len(set(self.temperatures)) != len(self.temperatures):
            raise ValueError(f"temperatures must be distinct and start with 1; found {self.temperatures}")
        return self


class ShardsConfig(Settings):
    """How rows are written to files."""

    positions: PositiveInt = 1 << 20
    """Captured positions per shard. A shard is committed as a whole, and is the most that is lost if a worker
    dies."""
    row_group_sequences: PositiveInt = 256
    """Sequences per row group, which is the unit of reading."""
    eval_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of the documents, chosen by a hash of their ids, that goes to the eval split."""


def _one_or_several(locations: str | tuple[str, ...]) -> str | tuple[str, ...]:
    if not locations:
        raise ValueError("give at least one file, folder or glob")
    return locations[0] if isinstance(locations, tuple) and len(locations) == 1 else locations


class CaptureConfig(Settings):
    """Run a teacher once over documents and store its predictions in a table.

    If the table exists, a setting that you leave out has the table's value, not the default shown here.

    This applies to teacher, columns, sequences, selection and shards.eval_fraction; softlabel inspect shows them.
    """

    documents: Annotated[Locations, AfterValidator(_one_or_several)]
    """One or several files, folders or globs of documents: Parquet, Arrow, CSV, JSON (lines or an array) or plain text,
    on this machine or at s3://, gs://, abfss:// or hf://."""
    table: Location
    """Folder of the table, or s3://BUCKET/PREFIX. It is created if it does not exist; otherwise new rows are added
    to it."""
    teacher: TeacherConfig = TeacherConfig()
    columns: ColumnsConfig = ColumnsConfig()
    sequences: SequencesConfig = SequencesConfig()
    selection: SelectionConfig = SelectionConfig()
    shards: ShardsConfig = ShardsConfig()
    strict: bool = False
    """Stop at the first document that can't be used, instead of counting it and listing it in the table's
    _softlabel/rejects.jsonl."""

    @property
    def sources(self) -> str:
        """Where the documents are, as text."""
        return self.documents if isinstance(self.documents, str) else ", ".join(self.documents)

    @model_validator(mode="after")
    def _settings_of_chats_need_chats(self) -> Self:
        of_chats = self.columns.content == "chat" or not self.columns.gives_content
        if self.sequences.assistant_turns == "last" and not of_chats:
            raise ValueError(
                "sequences.assistant_turns applies only to chats; give columns.messages, or leave assistant_turns out"
            )
        if self.sequences.chat_template_kwargs and self.columns.content == "text" and self.columns.gives_content:
            raise ValueError(
                "sequences.chat_template_kwargs applies only to chats; give columns.messages, or columns.prompt and"
                " columns.completion, or leave it out"
            )
        return self
