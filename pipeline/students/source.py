"""The files that a student is made from: those of a model or a configuration, named by the settings or the table.

A student's record identifies them by hash, because the content of a folder may change. Loads no weights.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

from softlabel.pipeline.config.train import StudentConfig
from softlabel.pipeline.models.files import locate, require_no_revision, sha256, weight_files
from softlabel.pipeline.models.student_loading import load_or_raise
from softlabel.pipeline.students.origin import KnownTeacher, Origin
from softlabel.pipeline.students.record import SourceRecord
from softlabel.storage.errors import StudentError, UsageError


@dataclass(frozen=True)
class StudentSource:
    """The files that a student is made from."""

    name: str
    """Name of the model or configuration, as in the settings or the table's history."""
    path: Path
    """Its folder; for a configuration, a folder or a JSON file."""
    commit: str | None
    """Commit of a hub model; None for a folder or file."""
    weights: bool
    """Whether the student takes its weights or only its configuration."""
    origin: Origin
    """The soft labels that the student has to fit."""
    teacher: KnownTeacher | None = None
    """The table's teacher, if these files have to be the ones that it had."""

    @classmethod
    def find(cls, config: StudentConfig, origin: Origin) -> Self:
        """The files that the settings name; those of a hub model are downloaded if necessary.

        Raises:
            UsageError: unless exactly one source is set; or if a revision is given for a folder.
            StudentError: if the files can't be found.
        """
        _require_one_source(config)
        name = config.model or config.config or config.teacher
        if name is None:
            teacher = _teacher_of(origin)
            what = "teacher that the table names (student.teacher says where it is now)"
            revision = None if Path(teacher.name).is_dir() else teacher.commit  # its files are compared later
            path, commit = locate(teacher.name, what, revision, error=StudentError)
            return cls(teacher.name, path, commit, weights=True, origin=origin, teacher=teacher)
        if config.config is None:
            path, commit = locate(name, "model for the student", config.revision, error=StudentError)
            return cls(name, path, commit, weights=True, origin=origin)
        if Path(name).is_file():
            require_no_revision(Path(name), config.revision)
            return cls(name, Path(name), None, weights=False, origin=origin)
        path, commit = locate(name, "configuration", config.revision, files=["config.json"], error=StudentError)
        return cls(name, path, commit, weights=False, origin=origin)

    @cached_property
    def files(self) -> dict[str, str]:
        """SHA-256 of the configuration and of the weights, by file name; missing files are left out.

        Raises:
            StudentError: if a file can't be read.
        """
        return load_or_raise(self.path, "files", self._hashes)

    def _hashes(self) -> dict[str, str]:
        files = [self.path] if self.path.is_file() else [self.path / "config.json"]
        files += weight_files(self.path) if self.weights else []
        return {file.name: sha256(file) for file in files if file.is_file()}

    @property
    def record(self) -> SourceRecord:
        """Entry for these files in a student's record."""
        return SourceRecord(name=self.name, commit=self.commit, files=self.files)

    def require_unchanged(self) -> None:
        """Refuse to take layers of the table's teacher from files that have changed since the capture.

        Raises:
            StudentError: with the files that differ.
        """
        if self.teacher is None:
            return
        paths = {name: self.path / name for name in self.teacher.files}
        hashes = {name: sha256(file) for name, file in paths.items() if file.is_file()}
        found = [f"{name} has changed" for name, hash in self.teacher.files.items() if hashes.get(name) != hash]
        if self.teacher.adapter is not None:
            found.append("a model without the adapter that the teacher had")
        if found:
            raise StudentError(
                "this model is no longer the table's teacher, so the student can't take its layers",
                expected="the files that the teacher had when the table was captured",
                found="; ".join(found),
                where=self.path,
                do="restore these files (if the teacher had an adapter, merge it and save the merged model); or set "
                "student.teacher to take layers from a model that is not the table's teacher",
            )


def _teacher_of(origin: Origin) -> KnownTeacher:
    teachers = origin.teachers()
    if len(teachers) == 1:
        return teachers[0]
    raise UsageError(
        "the table has several teachers, and student.teacher does not choose one"
        if teachers
        else "the table does not say where its teacher is",
        expected="student.teacher, as well as student.layers or student.depth",
        found=", ".join(sorted(teacher.name for teacher in teachers))
        or "no student.teacher, and no teacher in the table's history",
        where=origin.location,
        do="set student.teacher to the teacher's folder",
    )


def _require_one_source(config: StudentConfig) -> None:
    if len(config.given) != 1:
        raise UsageError(
            "exactly one setting has to say what the student starts from",
            expected="one of student.model, student.layers, student.depth and student.config",
            found=", ".join(config.given) or "none of them",
            do="set a model to continue from, layers to keep of the teacher, or a configuration for a new model",
        )
