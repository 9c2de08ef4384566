"""Turns a settings model into command-line flags and reads it from a YAML file.

Each field becomes a flag (``selection.top_k`` is ``--selection.top-k``), with the field's docstring as its help.
A flag wins over the file, and the file wins over the model's default. This module does not know what a setting means.

cyclopts reads pydantic models itself, but (tried with 5.4) it shows pydantic's own errors, with the refused value even
where that holds credentials, takes the second value of a list (``--columns.carry a b``) for another setting, and knows
neither sections that may be empty nor settings that a file sets twice.
"""

import difflib
import inspect
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import yaml
from cyclopts import Group, Parameter
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from softlabel.pipeline.config.flags import flag_of
from softlabel.storage.credentials import masked
from softlabel.storage.errors import UsageError, printable
from softlabel.storage.location import located

_SHOWN_ERRORS = 4
_SHOWN_CHARACTERS = 80

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Setting:
    """A single setting (a field that is not itself a settings model) and its path in the settings tree."""

    path: tuple[str, ...]
    field: FieldInfo
    type: Any
    """Type without constraints: cyclopts only converts the text; ``resolve`` checks the value, and explains errors."""
    default: Any
    group: Group
    optional: bool = False
    """Whether the setting belongs to a section that may be left out."""

    @property
    def flag(self) -> str:
        """Name of the setting on the command line."""
        return _flag(self.path)

    @property
    def takes_several(self) -> bool:
        """Whether the setting is one value or several."""
        return {str, tuple[str, ...]} <= set(get_args(self.type))

    def parameter(self, positional: bool) -> inspect.Parameter:
        """The setting as a parameter from which cyclopts makes a flag, and an argument as well if it is positional."""
        required = self.default is inspect.Parameter.empty
        default = None if required else self.default
        description = " ".join((self.field.description or "").split())
        section = ".".join(self.path[:-1])
        when = f"required with any --{section}.* flag" if self.optional else "required, here or in the --config file"
        described = Parameter(
            name=self.flag,
            group=self.group,
            help=f"{description} ({when})" if required else description,
            show_default=False if default in (None, ()) else _shown,
            consume_multiple=True,
            negative_iterable=(),
        )
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if positional else inspect.Parameter.KEYWORD_ONLY
        read_as = tuple[str, ...] if self.takes_several else self.type  # of a union, cyclopts would read only one
        annotation = Annotated[read_as | None, described]  # type: ignore[valid-type]
        return inspect.Parameter("__".join(self.path), kind, default=default, annotation=annotation)


def settings(model: type[BaseModel]) -> Iterator[Setting]:
    """Every setting of a model in the order of definition; the settings of its sections come last."""
    return _settings(model, None, (), Group("Settings", sort_key=0))


def _settings(
    model: type[BaseModel], defaults: Any, path: tuple[str, ...], group: Group, optional: bool = False
) -> Iterator[Setting]:
    sections = []
    types = get_type_hints(model)
    for name, field in model.model_fields.items():
        default = field.get_default() if defaults is None else getattr(defaults, name)
        if section := _model_of(field.annotation):
            section_optional = optional or (default is None and not field.is_required())
            sections.append((name, section, None if field.is_required() else default, section_optional))
        else:
            required = defaults is None and field.is_required()
            initial = inspect.Parameter.empty if required else default
            yield Setting((*path, name), field, types[name], initial, group, optional)
    for order, (name, section, default, section_optional) in enumerate(sections, 1):
        section_group = Group(name.capitalize(), help=inspect.getdoc(section) or "", sort_key=order)
        yield from _settings(section, default, (*path, name), section_group, section_optional)


def placed(arguments: Sequence[str], given: Set[str], several: str, last: str) -> dict[str, Any]:
    """Settings from positional arguments like those of ``cp``: several values of one setting, then one of another.

    Args:
        arguments: the positional arguments. If there is only one, or the last setting has a flag, they are all values
            of the first.
        given: settings that have flags.
        several: name of the setting that takes several values.
        last: name of the setting that takes the last argument.

    Raises:
        UsageError: if the first setting has both arguments and a flag, or the last argument is a file, or a folder with
            files of others.
    """
    *values, end = (*arguments, None) if last in given or len(arguments) < 2 else arguments
    if values and several in given:
        raise UsageError(
            f"{several} are given twice",
            expected=f"{several} either as arguments or with {_flag((several,))}",
            found=" ".join(arguments),
            do=f"leave one of them out; to give the {last} as well, use {_flag((last,))}",
        )
    if end is not None and (other := _something_else(end)):
        raise UsageError(
            f"the last of several arguments is the {last}, but it is {other}",
            expected=f"{several.upper()}... {last.upper()}, or {_flag((several,))} and {_flag((last,))}",
            found=end,
            do=f"give the {last} after the {several}; put a glob in quotes, so that the shell does not expand it; if"
            f" these are all {several}, write {_flag((several,))} before them",
        )
    found = {several: tuple(values) or None, last: end}
    return {name: value for name, value in found.items() if value is not None}


def _something_else(table: str) -> str | None:
    """What is at the place of a table, if that is neither a table nor a place for one."""
    from softlabel.storage.opening import exists  # imported here: it takes half a second, and help has to be quick

    path = Path(table)
    if path.is_file():
        return "a file"
    if not path.is_dir() or exists(table):
        return None
    others = [each.name for each in path.iterdir() if not each.name.startswith((".", "_", "split=", "README"))]
    return f"a folder with other files, such as {printable(min(others))}" if others else None


def read_file(path: Path) -> dict[str, Any]:
    """Read the settings in a YAML file.

    Raises:
        UsageError: if the file can't be read, is not valid YAML, sets something twice, or is not a mapping of settings.
    """
    path = Path(located(str(path)))
    try:
        with path.open(encoding="utf-8") as file:
            content = yaml.load(file, _UniqueKeyLoader)
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [neighbor.name for neighbor in path.parent.glob("*")], n=1)
        advice = f"did you mean {path.with_name(near[0])}?" if near else "check the path"
        raise UsageError("the configuration file does not exist", where=path, do=advice) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("the configuration file can't be read", found=error, where=path) from None
    except yaml.YAMLError as error:
        raise UsageError(
            "the configuration file is not valid YAML",
            found=" ".join(str(error).split()),
            where=path,
            do="check the indentation, the colons and the quotes there",
        ) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(
            "the configuration file contains no settings",
            expected="one setting per line, as name: value",
            found=masked(repr(content))[:_SHOWN_CHARACTERS],
            where=path,
        )
    return content


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that appears twice in one mapping; PyYAML's own loaders silently take the last one."""

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        """Check the keys as they are written, before a YAML merge (``<<``) adds others."""
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.value in lines:
                raise UsageError(
                    f"{key.value} is set twice",
                    expected="each setting once",
                    found=f"lines {lines[key.value]} and {line}",
                    where=self.name,
                    do="delete one of them",
                )
            lines[key.value] = line
        return node


def resolve(
    model: type[Model], flags: Mapping[tuple[str, ...], Any], file: Path | None, positional: Sequence[str] = ()
) -> Model:
    """Combine the settings from flags and a file; flags win.

    Args:
        model: settings model to fill.
        flags: values that were given on the command line, by path, such as ``("selection", "top_k")``.
        file: YAML file with further settings; an empty section counts as absent.
        positional: settings that may also be given as positional arguments.

    Raises:
        UsageError: if a setting is unknown, missing, invalid or contradicts another; the error says where it was set.
    """
    values = _without_empty_sections(model, read_file(file)) if file else {}
    for path, value in flags.items():
        _put(values, path, value)
    try:
        return model.model_validate(values)
    except ValidationError as invalid:
        errors = sorted(invalid.errors(), key=lambda error: error["type"] != "extra_forbidden")  # typos first
        shown = [str(_explain(model, error, flags, file, positional)) for error in errors[:_SHOWN_ERRORS]]
        if len(errors) > _SHOWN_ERRORS:
            shown.append(f"... and {len(errors) - _SHOWN_ERRORS} more")
        raise UsageError("\n".join(shown)) from None


def _without_empty_sections(model: type[BaseModel], values: dict[str, Any]) -> dict[str, Any]:
    result = {}
    for name, value in values.items():
        section = _model_of(model.model_fields[name].annotation) if name in model.model_fields else None
        if section is None or value is not None:
            result[name] = _without_empty_sections(section, value) if section and isinstance(value, dict) else value
    return result


def _put(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    *parents, last = path
    for name in parents:
        section = values.setdefault(name, {})
        if not isinstance(section, dict):
            return  # the file has a plain value where a section belongs; validation reports it
        values = section
    values[last] = value


def _explain(
    model: type[BaseModel],
    error: ErrorDetails,
    flags: Mapping[tuple[str, ...], Any],
    file: Path | None,
    positional: Sequence[str],
) -> UsageError:
    path = tuple(part for part in error["loc"] if isinstance(part, str))
    name = ".".join(path)
    given = [_flag(flag) for flag in flags if flag[: len(path)] == path] if path else []
    where = ", ".join(given) or (f"{file}, {name}" if file and path else file)
    match error["type"]:
        case "extra_forbidden":
            siblings = list(_section(model, path[:-1]).model_fields)
            near = difflib.get_close_matches(path[-1].replace("-", "_"), siblings, n=1)
            advice = f"did you mean {near[0]}?" if near else "remove it"
            return UsageError(
                f"unknown setting {name}", expected=f"one of {', '.join(siblings)}", where=where, do=advice
            )
        case "missing":
            required = _first_required(model, path)
            order = "in this order: " if len(positional) > 1 else ""
            names = f"{order}{' '.join(positional).upper()}"
            argument = f"give it as an argument ({names}), " if required[0] in positional else ""
            advice = f"{argument}pass {_flag(required)}, or set it in a --config file"
            return UsageError(f"the setting {'.'.join(required)} is missing", where=file, do=advice)
        case "value_error":
            message = error["msg"].removeprefix("Value error, ")
            return UsageError(f"invalid {name or 'settings'}: {message}", where=where)
        case "too_short":
            expected = f"at least {error['ctx']['min_length']} values"
            return UsageError(f"invalid value for {name}", expected=expected, found=repr(error["input"]), where=where)
        case "model_type":
            expected = "settings of its own, indented below it, as name: value"
            return UsageError(f"invalid value for {name}", expected=expected, found=repr(error["input"]), where=where)
        case _:
            expected = error["msg"].removeprefix("Input should be ")
            return UsageError(f"invalid value for {name}", expected=expected, found=repr(error["input"]), where=where)


def _section(model: type[BaseModel], path: Sequence[str]) -> type[BaseModel]:
    for name in path:
        section = _model_of(model.model_fields[name].annotation)
        assert section is not None
        model = section
    return model


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The settings model in a field's annotation, or None for a single setting."""
    types = [each for each in get_args(annotation) or (annotation,) if isinstance(each, type)]
    return next((each for each in types if issubclass(each, BaseModel)), None)


def _first_required(model: type[BaseModel], path: tuple[str, ...]) -> tuple[str, ...]:
    return next(
        (s.path for s in settings(model) if s.path[: len(path)] == path and s.default is inspect.Parameter.empty), path
    )


def _shown(default: Any) -> str:
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _flag(path: Sequence[str]) -> str:
    return flag_of(".".join(path))
