"""A settings model as arguments of the command line and as a YAML file, from its one definition.

Each field becomes a flag (``selection.top_k`` is ``--selection.top-k``) with the field's docstring as its help.
A value comes from its flag, else from the file, else from the model. Nothing here knows what a setting means.
"""

import difflib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from cyclopts import Group, Parameter
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from softlabel.storage.errors import UsageError
from softlabel.storage.location import located

_SHOWN_ERRORS = 4

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Setting:
    """One field of a settings model that is no model itself, and where it is in the tree."""

    path: tuple[str, ...]
    field: FieldInfo
    default: Any
    group: Group
    optional: bool = False
    """Whether it belongs to a group that may be left out."""

    @property
    def flag(self) -> str:
        """Its name on the command line."""
        return _flag(self.path)

    def parameter(self, positional: bool) -> inspect.Parameter:
        """What cyclopts makes a flag of, and an argument too if it is positional."""
        needed = self.default is inspect.Parameter.empty
        default = None if needed else self.default
        description = " ".join((self.field.description or "").split())
        when = f"needed with any --{'.'.join(self.path[:-1])}.*" if self.optional else "needed, here or in the file"
        described = Parameter(
            name=self.flag,
            group=self.group,
            help=f"{description} ({when})" if needed else description,
            show_default=False if default in (None, ()) else _shown,
            consume_multiple=True,
            negative_iterable=(),
        )
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if positional else inspect.Parameter.KEYWORD_ONLY
        annotation = Annotated[self.field.annotation | None, described]  # type: ignore[name-defined]
        return inspect.Parameter("__".join(self.path), kind, default=default, annotation=annotation)


def settings(model: type[BaseModel]) -> Iterator[Setting]:
    """Every setting of a model, in the order of its definition, those of its parts after its own."""
    return _settings(model, None, (), Group("Settings", sort_key=0))


def _settings(
    model: type[BaseModel], defaults: Any, path: tuple[str, ...], group: Group, optional: bool = False
) -> Iterator[Setting]:
    parts = []
    for name, field in model.model_fields.items():
        default = field.get_default() if defaults is None else getattr(defaults, name)
        if part := _model_of(field.annotation):
            may_miss = optional or (default is None and not field.is_required())
            parts.append((name, part, None if field.is_required() else default, may_miss))
        else:
            missing = defaults is None and field.is_required()
            yield Setting((*path, name), field, inspect.Parameter.empty if missing else default, group, optional)
    for order, (name, part, default, may_miss) in enumerate(parts, 1):
        section = Group(name.capitalize(), help=inspect.getdoc(part) or "", sort_key=order)
        yield from _settings(part, default, (*path, name), section, may_miss)


def read_file(path: Path) -> dict[str, Any]:
    """The settings that a YAML file gives.

    Raises:
        UsageError: if it can't be read, is not YAML, gives a setting twice, or holds something else than settings by
            name.
    """
    path = Path(located(str(path)))
    try:
        with path.open(encoding="utf-8") as file:
            content = yaml.load(file, _EachOnce)
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [other.name for other in path.parent.glob("*")], n=1)
        advice = f"did you mean {path.with_name(near[0])}?" if near else "check the path"
        raise UsageError("no such configuration file", where=path, do=advice) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("the configuration file can't be read", found=error, where=path) from None
    except yaml.YAMLError as error:
        raise UsageError("the configuration file is not YAML", found=" ".join(str(error).split()), where=path) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(
            "the configuration file holds no settings",
            expected="name: value, a line each",
            found=type(content).__name__,
            where=path,
        )
    return content


class _EachOnce(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML's own loaders take the last."""

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        """The mapping as it is written, before anything is merged into it."""
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.value in lines:
                raise UsageError(
                    f"{key.value} is given twice",
                    expected="each setting once",
                    found=f"lines {lines[key.value]} and {line}",
                    where=self.name,
                    do="leave one of them out",
                )
            lines[key.value] = line
        return node


def resolve(
    model: type[Model], flags: Mapping[tuple[str, ...], Any], file: Path | None, positional: Sequence[str] = ()
) -> Model:
    """The settings from a file and flags; flags win.

    Args:
        model: which settings.
        flags: values by path, such as ``("selection", "top_k")``: those that were given, no others.
        file: YAML file with more of them; a section without settings is as if it were left out.
        positional: settings that may be given without their flags.

    Raises:
        UsageError: if a setting is unknown, missing or contradicts another; says where it was given.
    """
    values = _without_empty_sections(model, read_file(file)) if file else {}
    for path, value in flags.items():
        _put(values, path, value)
    try:
        return model.model_validate(values)
    except ValidationError as invalid:
        errors = invalid.errors()
        shown = [str(_explain(model, error, flags, file, positional)) for error in errors[:_SHOWN_ERRORS]]
        if len(errors) > _SHOWN_ERRORS:
            shown.append(f"... and {len(errors) - _SHOWN_ERRORS} more")
        raise UsageError("\n".join(shown)) from None


def _without_empty_sections(model: type[BaseModel], values: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for name, value in values.items():
        part = _model_of(model.model_fields[name].annotation) if name in model.model_fields else None
        if part is None or value is not None:
            kept[name] = _without_empty_sections(part, value) if part and isinstance(value, dict) else value
    return kept


def _put(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    *parents, last = path
    for name in parents:
        below = values.setdefault(name, {})
        if not isinstance(below, dict):
            return  # the file gives no group here; validation says so
        values = below
    values[last] = value


def _explain(
    model: type[BaseModel],
    error: ErrorDetails,
    flags: Mapping[tuple[str, ...], Any],
    file: Path | None,
    positional: Sequence[str],
) -> UsageError:
    path = tuple(part for part in error["loc"] if isinstance(part, str))
    name = ".".join(map(str, error["loc"]))
    given = [_flag(flag) for flag in flags if flag[: len(path)] == path]
    where = ", ".join(given) if given or not file else f"{file}, {name}"
    match error["type"]:
        case "extra_forbidden":
            siblings = list(_part(model, path[:-1]).model_fields)
            near = difflib.get_close_matches(path[-1].replace("-", "_"), siblings, n=1)
            advice = f"did you mean {near[0]}?" if near else "leave it out"
            return UsageError(f"unknown setting {name}", expected=", ".join(siblings), where=where, do=advice)
        case "missing":
            needed = _first_needed(model, path)
            by_place = f"it by its place ({' '.join(positional).upper()}), or " if needed[0] in positional else ""
            advice = f"give {by_place}{_flag(needed)}, or set it in a file"
            return UsageError(f"{'.'.join(needed)} is needed", where=file, do=advice)
        case "value_error":
            message = error["msg"].removeprefix("Value error, ")
            return UsageError(f"{name or 'these settings'} can't be used: {message}", where=where)
        case _:
            expected = error["msg"].removeprefix("Input should be ")
            return UsageError(f"{name} can't be used", expected=expected, found=repr(error["input"]), where=where)


def _part(model: type[BaseModel], path: Sequence[str]) -> type[BaseModel]:
    for name in path:
        part = _model_of(model.model_fields[name].annotation)
        assert part is not None
        model = part
    return model


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The settings model that a field holds, or may hold."""
    kinds = [kind for kind in get_args(annotation) or (annotation,) if isinstance(kind, type)]
    return next((kind for kind in kinds if issubclass(kind, BaseModel)), None)


def _first_needed(model: type[BaseModel], path: tuple[str, ...]) -> tuple[str, ...]:
    return next(
        (s.path for s in settings(model) if s.path[: len(path)] == path and s.default is inspect.Parameter.empty), path
    )


def _shown(default: Any) -> str:
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _flag(path: Sequence[str]) -> str:
    return "--" + ".".join(path).replace("_", "-")
