"""What the files of a folder with tasks for lm-eval would run: such files can name Python code, in several ways.

Reads the files without lm-eval, and runs nothing of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from softlabel.storage.errors import UsageError

_SKIPPED = {"__pycache__", ".ipynb_checkpoints"}
_PLAIN = {"arrow", "csv", "json", "parquet", "text"}
"""Builders of data sets that only read data: others unpickle it, or open connections."""
_BUILDERS = _PLAIN | {"cache", "generator", "iceberg", "pandas", "spark", "sql", "webdataset"}
"""Builders that a task can name in place of a data set."""


@dataclass(frozen=True)
class _Code:
    """A value with one of YAML's tags that stands for code, such as ``!function``."""

    text: str


class _Loader(yaml.SafeLoader):
    """Reads every tag that it does not know as code that the file asks for."""


def _code(loader: _Loader, suffix: str, node: yaml.Node) -> _Code:
    value = node.value if isinstance(node, yaml.ScalarNode) else "..."
    return _Code(f"!{suffix} {value}")


_Loader.add_multi_constructor("!", _code)


def require_tasks(folder: Path) -> None:
    """Refuse a folder without files of tasks.

    Raises:
        UsageError: if it does not exist, or has none.
    """
    if not any(True for _ in _files(folder)):
        raise UsageError(
            "there are no tasks in this folder",
            expected="a folder with tasks of lm-eval, as files that end in .yaml",
            found="a folder without such files" if folder.is_dir() else "no such folder",
            where=folder,
            do="check the path in tasks.include",
        )


def require_no_code(folder: Path, metrics: frozenset[str]) -> None:
    """Refuse a folder with a task that would run code.

    Args:
        folder: folder with tasks.
        metrics: names of the metrics that lm-eval itself computes.

    Raises:
        UsageError: with the first file that names code; or that can't be read.
    """
    for file in _files(folder):
        for path in _with_included(file, set()):
            found = next(_code_in(_read(path), metrics), None)
            if found is not None:
                raise UsageError(
                    "this task would run Python code, which softlabel is not allowed to do",
                    expected="a task without code: prompts as templates, data in csv, json, parquet or arrow files, and"
                    " the metrics of lm-eval",
                    found=found,
                    where=path,
                    do="read that code and, if you trust it, set tasks.trust_code; or take the file out of the folder",
                )


def _files(folder: Path) -> Iterator[Path]:
    """The files that lm-eval reads, in a fixed order."""
    yield from sorted(path for path in folder.glob("**/*.yaml") if not _SKIPPED & set(path.parts))


def _with_included(path: Path, seen: set[Path]) -> Iterator[Path]:
    """A file, and those that it includes."""
    if path in seen:
        return
    seen.add(path)
    yield path
    included = _read(path).get("include") or ()
    for name in [included] if isinstance(included, str) else included:
        if isinstance(name, _Code):
            return  # found in the file itself
        yield from _with_included((path.parent / name).resolve(), seen)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(
            "the file of a task can't be read",
            expected="YAML in UTF-8",
            found=" ".join(str(error).split()),
            where=path,
            do="correct the file, or take it out of the folder",
        ) from None
    if not isinstance(content, dict):
        raise UsageError(
            "the file of a task has no settings", expected="settings as name: value", found=content, where=path
        )
    return content


def _code_in(tree: Any, metrics: frozenset[str], name: str = "") -> Iterator[str]:
    """What a part of a task's settings would run, in words."""
    if isinstance(tree, _Code):
        yield f"{name}: {tree.text}" if name else tree.text
    elif isinstance(tree, dict):
        for key, value in tree.items():
            if key in ("class", "custom_generate") or (key in ("trust_remote_code", "unsafe_code") and value):
                yield f"{key}: {value.text if isinstance(value, _Code) else value}"
            if key == "hf_evaluate" and value:
                yield "hf_evaluate, which loads a metric with its code"
            if key == "metric" and isinstance(value, str) and value not in metrics:
                yield f"metric: {value}, which lm-eval would look for elsewhere, with its code"
            if key == "dataset_path" and value in _BUILDERS - _PLAIN:
                yield f"dataset_path: {value}, which does more than read data"
            yield from _code_in(value, metrics, str(key))
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _code_in(value, metrics, name)
