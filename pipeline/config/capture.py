"""The settings of capture, train and evaluate, and of their parts, each defined once.

Further parts are in ``pipeline.config.train``, further jobs in ``pipeline.config.distill`` and
``pipeline.config.tables``.
"""

from datetime import date
from pkgutil import resolve_name
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from softlabel.pipeline.config.base import Location, Settings

Content = Literal["text", "chat", "completion"]
"""What a document is: a text, a chat, or a prompt and its completion."""


class ColumnsConfig(Settings):
    """Which columns of the documents hold what."""

    id: str = "id"
    """Column with the document's id (a string or an integer, unique). Plain text files are named by their path."""
    text: str = "text"
    """Column with plain text."""
    messages: str | None = None
    """Column with a chat, a list of {role, content}; read instead of the text."""
    prompt: str | None = None
    """Column with a prompt, read with its completion instead of the text; both are text, or messages of one chat."""
    completion: str | None = None
    """Column with what follows the prompt. Only the completion is captured; the prompt is its context."""
    label: str | None = None
    """Column with a class label, kept beside the soft labels."""
    carry: tuple[str, ...] = ()
    """Further columns (source, language, ...) that every row of the table keeps, so that it can be filtered by them."""

    @model_validator(mode="after")
    def _one_content(self) -> Self:
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("prompt and completion go together; give both")
        if self.prompt is not None and self.messages is not None:
            raise ValueError("messages are a whole chat; leave out prompt and completion")
        if twice := [name for i, name in enumerate(self.carry) if name in self.carry[:i]]:
            raise ValueError(f"carry names each column once; found twice: {', '.join(dict.fromkeys(twice))}")
        return self

    @property
    def content(self) -> Content:
        """What the documents are."""
        return "chat" if self.messages else "completion" if self.prompt else "text"

    @property
    def contents(self) -> dict[str, str]:
        """The columns that are read for it, by setting."""
        names = {"text": ("text",), "chat": ("messages",), "completion": ("prompt", "completion")}[self.content]
        return {name: getattr(self, name) for name in names}


class TeacherConfig(Settings):
    """The model whose distributions are stored: of the next token, or of a document's class."""

    model: Location
    """Folder or hub name of a causal language model, or of a sequence classifier: its config.json says which."""
    labels: tuple[str, ...] = ()
    """Run no model: take the documents' own labels, which are these, for what a classifier that is always right and
    always sure would say. A teacher can be trained from such a table; the model gives the tokenizer alone."""
    revision: str | None = None
    """Commit, tag or branch of a hub model."""
    adapter: Location | None = None
    """Folder or hub name of a peft adapter, which is merged into the model; the package peft is needed for it."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Precision of the teacher's forward pass."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes every GPU of the machine, a worker process each, or else the CPU."""
    workers: PositiveInt = 1
    """Worker processes on each device, each with the teacher loaded; on a CPU they share its cores."""
    device_map: Literal["auto"] | None = None
    """auto spreads one teacher that does not fit a card over all GPUs, and over the machine's memory what they have no
    room for. There is one worker then, and one GPU computes at a time."""
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention implementation; auto is sdpa where the architecture has it (Gemma 2 has only eager)."""
    engine: str | None = None
    """Your own class that runs the model in the place of transformers, as module:Class; see
    ``pipeline.teachers.teacher.Teacher``."""
    batch_tokens: PositiveInt = 8192
    """Tokens of one forward pass, padding included."""
    trust_remote_code: bool = False
    """Run Python code that the model's repository ships."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if self.device_map is not None and (self.device != "auto" or self.workers > 1):
            raise ValueError("device_map auto takes the whole machine: leave out device and workers")
        return self

    @field_validator("engine")
    @classmethod
    def _engine_is_there(cls, engine: str | None) -> str | None:
        try:
            if engine is not None:
                resolve_name(engine)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"engine must be module:Class, of a module that Python can import; {error}") from None
        return engine

    @model_validator(mode="after")
    def _labels_tell_apart(self) -> Self:
        if self.labels and (len(self.labels) < 2 or len(set(self.labels)) < len(self.labels)):
            raise ValueError(f"labels must be at least two, each once; found {' '.join(self.labels)}")
        return self


class SequencesConfig(Settings):
    """How a document becomes sequences."""

    max_tokens: int = Field(default=1024, ge=2)
    """Longest sequence, in tokens; a longer document is cut into chunks. For a classifier it is cut short instead, and
    counted; the classifier's own limit holds too."""
    context: PositiveInt = 1
    """Tokens that a chunk repeats from the one before it, as context; they are predicted only once."""
    assistant_turns: Literal["all", "last"] = "all"
    """The turns of the assistant that are captured of a chat: each, or the last alone."""
    special_tokens: Literal["text", "parse"] = "text"
    """What a special token's name inside a document, such as <|im_end|>, is: text like any other, or the token."""
    chat_template_date: date = date(2026, 1, 1)
    """The date that a chat template is told is today's; fixed, or every key would change each day."""

    @model_validator(mode="after")
    def _chunks_advance(self) -> Self:
        if self.context >= self.max_tokens:
            raise ValueError(f"context ({self.context}) must be below max_tokens ({self.max_tokens})")
        return self


class SelectionConfig(Settings):
    """What is kept of the teacher's distribution at each captured position: an exact head and a sampled tail."""

    top_k: int | None = Field(default=None, ge=1, le=32767)
    """Plain top-k: keep exactly so many ids and no tail. Short for top_p 1, min_k = max_k = top_k, draws 0."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """The head is the smallest set of ids whose mass reaches this ..."""
    min_k: int = Field(default=1, ge=0)
    """... with at least so many ids ..."""
    max_k: int = Field(default=16, ge=0, le=32767)
    """... and at most so many. 0 keeps no head: pure sampling."""
    draws: int = Field(default=48, ge=0, le=32767)
    """Draws from what the head leaves, were all mass left; ceil(draws x mass left) are made. 0 keeps no tail."""
    temperatures: tuple[Annotated[float, Field(ge=1e-3, le=1e3)], ...] = (1.0,)
    """Temperatures that students may train at, 1 first; each costs about 3 bytes a position."""
    seed: int = 0
    """Seed of the tail's draws."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_k is not None:
            # By value, not by what was set: a dumped model names every field, and has to be read back.
            fields = type(self).model_fields
            clash = [
                name for name in ("top_p", "min_k", "max_k", "draws") if getattr(self, name) != fields[name].default
            ]
            if clash:
                raise ValueError(f"top_k says the whole selection; leave out {', '.join(clash)}")
        elif self.min_k > self.max_k:
            raise ValueError(f"min_k ({self.min_k}) must not exceed max_k ({self.max_k})")
        elif self.max_k == 0 and self.draws == 0:
            raise ValueError("max_k 0 and draws 0 keep nothing")
        if self.temperatures[:1] != (1.0,) or len(set(self.temperatures)) != len(self.temperatures):
            raise ValueError(f"temperatures must be distinct, 1 first; found {self.temperatures}")
        return self


class ShardsConfig(Settings):
    """How rows are laid into files."""

    positions: PositiveInt = 1 << 20
    """Captured positions of a shard, the unit that is committed, and lost at most when a worker dies."""
    row_group_sequences: PositiveInt = 256
    """Sequences of a row group, the unit that is read."""
    eval_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of the documents, chosen by a hash of their ids, that goes to the eval split."""


class CaptureConfig(Settings):
    """Run a teacher once over documents and keep what it knows in a table."""

    documents: Location
    """File, folder or glob of documents, here or in s3://BUCKET/: Parquet, JSON lines or plain text."""
    table: Location
    """Folder of the table, or s3://BUCKET/PREFIX; made if it is not there, added to if it is."""
    teacher: TeacherConfig
    columns: ColumnsConfig = ColumnsConfig()
    sequences: SequencesConfig = SequencesConfig()
    selection: SelectionConfig = SelectionConfig()
    shards: ShardsConfig = ShardsConfig()
    strict: bool = False
    """Stop at the first document that can't be used, instead of counting it and writing it to the rejects file."""

    @model_validator(mode="after")
    def _turns_are_of_chats(self) -> Self:
        if self.sequences.assistant_turns == "last" and self.columns.content != "chat":
            raise ValueError("sequences.assistant_turns is about chats; give columns.messages, or leave it out")
        return self
