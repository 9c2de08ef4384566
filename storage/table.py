"""The soft-label table: a Delta Lake table of Parquet shards, with a vocabulary and a tokenizer next to them.

Opens, creates and describes tables; never reads a shard (``storage.reader``) or writes one (``storage.writer``).

    TABLE/_delta_log/                      the commits; a shard belongs to the table once it is in a commit
    TABLE/split=train/<hash>.parquet       the shards, named by a hash of their content
    TABLE/_softlabel/vocabulary-<hash>.parquet, tokenizer-<hash>/     (``storage.sidecars``)
    TABLE/_softlabel/tags/, pins/, vacuumed/, derived/    (``storage.records``)
"""

import hashlib
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import polars as pl
import pyarrow as pa
from deltalake import Schema as DeltaSchema
from deltalake.exceptions import DeltaError

from softlabel.storage.errors import IntegrityError, ProvenanceError, TableError, cause
from softlabel.storage.identity import Identity
from softlabel.storage.labels import SoftLabels
from softlabel.storage.location import located
from softlabel.storage.log.commit_message import COMMIT_MESSAGE, CommitMessage
from softlabel.storage.log.files import (
    FORMAT_PROPERTY,
    commit_file,
    commits,
    last_metadata_commit,
    matches_its_hash,
    metadata_line,
    read_bytes,
    require_no_remains,
    unreadable_commit,
    write_commit,
)
from softlabel.storage.log.snapshot import Snapshot, follow, load
from softlabel.storage.log.state import Shard, commit_info, state
from softlabel.storage.numbering import Numbering
from softlabel.storage.opening import exists, open_error
from softlabel.storage.places.open import place_of
from softlabel.storage.records.versions import parse, resolve
from softlabel.storage.schema import FORMAT, PARTITION, carried_schema, row_schema
from softlabel.storage.sidecars import read_tokenizer, read_vocabulary, require_names, store_tokenizer, store_vocabulary

_IDENTITY, _VOCABULARY = "softlabel.identity", "softlabel.vocabulary"


@dataclass(frozen=True)
class Change:
    """New properties of a table."""

    identity: Identity
    vocabulary: str | None = None
    """Name of its new vocabulary file, if it changes to the current format."""


class Table:
    """One version of a table; it stays the same when others commit.

    Attributes:
        location: the table's folder, or its URL.
        place: folder or bucket that its files are in.
        format: version of the layout of its rows; those of an older one are converted when they are read.
        vocabulary_name: name of the file that numbers the token ids; see ``numbering``.
        tokenizer_name: name of the folder with the teacher's tokenizer; see ``tokenizer``.
    """

    def __init__(self, location: str, snapshot: Snapshot, latest: list[Snapshot] | None = None) -> None:
        self.location = location
        self.place = place_of(location)
        self._snapshot = snapshot
        self._checks = True
        self._latest = [snapshot] if latest is None else latest  # shared by all versions that come from one another
        settings = snapshot.metadata.get("configuration", {})
        if settings.get(FORMAT_PROPERTY) not in map(str, range(1, FORMAT + 1)):
            if snapshot.damaged is not None:
                snapshot.require_sound(self.place)
            raise TableError(
                "this is not a soft-label table that this version of softlabel can read",
                expected=f"softlabel.format 1 to {FORMAT} in the Delta table's properties",
                found=settings.get(FORMAT_PROPERTY, "no such property"),
                where=location,
                do="check the path, or read it with the version of softlabel that made it",
            )
        self.format = int(settings[FORMAT_PROPERTY])
        try:
            self._identity = Identity.model_validate_json(settings[_IDENTITY])
            self.vocabulary_name: str = settings[_VOCABULARY]
            self.tokenizer_name: str = settings["softlabel.tokenizer"]
            require_names(self.vocabulary_name, self.tokenizer_name)
            self._schema = pa.schema(DeltaSchema.from_json(snapshot.schema))
        except (KeyError, ValueError, DeltaError) as error:
            raise IntegrityError(
                "the table's log is damaged: the table's properties are not valid",
                found=" ".join(str(error).split()),
                where=self.place.where(commit_file(last_metadata_commit(self.place, snapshot.version))),
                do="restore this file from a copy of the table",
            ) from error

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as a location, so that another process, such as a data loader's worker, opens the same version."""
        return type(self).open, (f"{self.location}@{self.version}",)

    @staticmethod
    def exists(location: str) -> bool:
        """Whether a location has a view or a Delta table, made by softlabel or another program."""
        return exists(location)

    @classmethod
    def open(cls, location: str) -> Self:
        """The newest version of a table, or the one that ``PATH@12`` or ``PATH@tag`` names.

        Raises:
            UsageError: if it is a view; ``storage.views.view.open_table`` opens both tables and views.
            TableNotFoundError: if there is no table, no such version or tag, or the version was vacuumed.
            IntegrityError: if its log is damaged.
            AccessError: if it can't be read at the moment.
            TableError: if it is not a soft-label table, or has an unsupported format.
        """
        path, wanted = parse(location)
        version = resolve(path, wanted) if cls.exists(path) else None
        snapshot = load(place_of(path), version)
        if snapshot is None:
            raise open_error(location, version)
        return cls(path, snapshot)

    @classmethod
    def create(
        cls, location: str, identity: Identity, carried: pa.Schema, sample: SoftLabels | Numbering, tokenizer: Path
    ) -> Self:
        """Create a table, or open the one that another process has created meanwhile.

        Args:
            location: a folder, which is created if necessary; or s3://BUCKET/PREFIX.
            identity: identity of the rows that will be added.
            carried: carried columns of the documents.
            sample: soft labels like those that will be added; they determine the table's numbering of token ids, which
                never changes. Or another table's numbering, to use the same.
            tokenizer: folder with the teacher's tokenizer, copied into the table.

        Raises:
            ProvenanceError: if there is a table with a different identity already.
            IntegrityError: if there are shards of a table whose log is missing.
        """
        location = located(location)
        schema, place = row_schema(carried), place_of(location)
        require_no_remains(place)
        try:
            settings = {
                "delta.enableExpiredLogCleanup": "false",  # would destroy old versions at a checkpoint
                FORMAT_PROPERTY: str(FORMAT),
                _IDENTITY: identity.model_dump_json(),
                _VOCABULARY: store_vocabulary(place, sample, identity.vocabulary),
                "softlabel.tokenizer": store_tokenizer(place, tokenizer),
            }
            columns = DeltaSchema.from_arrow(schema).to_json()
            lines = [
                {"protocol": {"minReaderVersion": 1, "minWriterVersion": 2}},
                metadata_line(str(uuid.uuid4()), int(time.time() * 1000), columns, settings),
            ]
            if not exists(location):  # if another process makes the table now, one of the two commits is refused
                write_commit(place, 0, "CREATE TABLE", {"state": state(0, settings, columns, [])}, lines)
        except OSError as error:
            if not cls.exists(location):
                raise TableError(
                    "the table can't be created",
                    expected="write permission for the folder, and free disk space",
                    found=cause(error),
                    where=location,
                    do="check the path, the permissions and the free disk space, then run the same command again",
                ) from error
        table = cls.open(location)
        table.identity.require(identity, location)
        return table

    @property
    def version(self) -> int:
        """Number of this version."""
        return self._snapshot.version

    def unchecked(self) -> Self:
        """The same version as the log has it, even if the log is damaged; for looking for damage."""
        found = type(self)(self.location, self._snapshot, self._latest)
        found._checks = False
        return found

    def _require_sound(self) -> None:
        if self._checks:
            self._snapshot.require_sound(self.place)

    @property
    def identity(self) -> Identity:
        """Everything that determines the table's numbers.

        Raises:
            IntegrityError: if the log is damaged.
        """
        self._require_sound()
        return self._identity

    @property
    def schema(self) -> pa.Schema:
        """The row's schema, carried columns included.

        Raises:
            IntegrityError: if the log is damaged.
        """
        self._require_sound()
        return self._schema

    @property
    def tables(self) -> tuple[Self, ...]:
        """The table itself; a view has several."""
        return (self,)

    @property
    def content(self) -> str:
        """A hash of this version's content: of the names of its shards, which are hashes of their content."""
        return hashlib.sha256("\n".join(shard.path for shard in self.shards()).encode()).hexdigest()

    @property
    def draws(self) -> bool:
        """Whether the tail is sampled."""
        return self.identity.selection.draws > 0

    @cached_property
    def carried(self) -> pa.Schema:
        """Names and types of the carried columns."""
        return carried_schema(self.schema)

    def require_carried(self, carried: pa.Schema) -> None:
        """Refuse documents whose carried columns differ from the table's.

        Raises:
            ProvenanceError: if they differ.
        """
        if not carried.equals(self.carried):
            described = [
                ", ".join(f"{f.name} ({f.type})" for f in columns) or "none" for columns in (self.carried, carried)
            ]
            raise ProvenanceError(
                "the carried columns of the documents differ from those of the table",
                expected=described[0],
                found=described[1],
                where=self.location,
                do="list the same columns in columns.carry, or make a new table in another folder",
            )

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Temperatures whose tail masses are stored, in order."""
        return self.identity.temperatures

    @cached_property
    def numbering(self) -> Numbering:
        """How rows write token ids.

        Raises:
            IntegrityError: if the file is missing or damaged.
        """
        return read_vocabulary(self.place, self.vocabulary_name)

    @cached_property
    def tokenizer(self) -> Path:
        """Local folder with the teacher's tokenizer.

        Raises:
            IntegrityError: if its files are missing or damaged.
        """
        return read_tokenizer(self.place, self.tokenizer_name)

    def shards(self, split: str | None = None) -> list[Shard]:
        """The version's shards, in the order of their names.

        Raises:
            IntegrityError: if the log is damaged.
        """
        self._require_sound()
        return [shard for shard in self.listed if split in (None, shard.split)]

    @property
    def by_path(self) -> Mapping[str, Shard]:
        """The version's shards by their paths.

        Raises:
            IntegrityError: if the log is damaged.
        """
        self._require_sound()
        return self._snapshot.shards

    @cached_property
    def listed(self) -> list[Shard]:
        """The shards in the log, in the order of their names, without checking the log."""
        return [self._snapshot.shards[path] for path in sorted(self._snapshot.shards)]

    def next_commit(
        self, added: Iterable[Shard], removed: Iterable[str], change: Change | None
    ) -> tuple[dict[str, str], list[dict[str, Any]]]:
        """The hashes in a commit on top of this version, and the line that changes the table's properties, if any.

        Args:
            added: new shards.
            removed: paths of shards to remove.
            change: new properties of the table, if they change.

        Raises:
            IntegrityError: if the log is damaged.
        """
        self._snapshot.require_sound(self.place)
        properties, known, columns = self._snapshot.properties, self._snapshot.metadata, self._snapshot.schema
        lines = []
        if change is not None:
            properties[_IDENTITY] = change.identity.model_dump_json()
            if change.vocabulary is not None:
                properties |= {FORMAT_PROPERTY: str(FORMAT), _VOCABULARY: change.vocabulary}
                columns = DeltaSchema.from_arrow(row_schema(self.carried)).to_json()
            lines = [metadata_line(known["id"], known["createdTime"], columns, properties)]
        after = self._snapshot.state_after(added, removed, properties, columns)
        return {"state": after, "previous": self._snapshot.digest}, lines

    def scan(self) -> pl.LazyFrame:
        """Rows of this version as a polars LazyFrame.

        Raises:
            IntegrityError: if the log is damaged.
        """
        paths = [self.place.where(shard.path) for shard in self.shards()]
        if not paths:
            return pl.DataFrame(pl.from_arrow(self.schema.empty_table())).lazy()
        return pl.scan_parquet(paths, glob=False, hive_partitioning=True, hive_schema={PARTITION: pl.String}).select(
            self.schema.names
        )

    def history(self) -> list[dict[str, Any]]:
        """Metadata of each commit up to this version, newest first.

        Raises:
            IntegrityError: if a commit is missing or damaged.
        """
        return list(self.commits())

    def commits(self) -> Iterator[dict[str, Any]]:
        """Metadata of each commit up to this version, newest first; each is read when it is asked for.

        Raises:
            IntegrityError: if a commit is missing or damaged.
        """
        for version in sorted(commits(self.place), reverse=True):
            if version > self.version:
                continue
            try:
                content = read_bytes(self.place, version)
                info = {**commit_info(content), "version": version}
                CommitMessage.of(info, self.location)  # names the field, if one is wrong
                if not matches_its_hash(content, info.get(COMMIT_MESSAGE, {}), {}):
                    raise ValueError("the commit does not match the hash in it")
            except (OSError, ValueError, TypeError) as error:
                raise unreadable_commit(self.place, version, error) from error
            yield info

    def newest(self) -> Self:
        """The same table at its newest version; reads only the commits since the newest that it has seen."""
        found = follow(self.place, self._latest[0])
        if found is None:
            raise open_error(self.location, None)
        self._latest[0] = found
        return type(self)(self.location, found, self._latest)
