"""Settings as frozen dataclasses: their bounds, how a file fills them, and which of them decide the outcome of a run.

    @dataclass(frozen=True)
    class Settings:
        steps: Count = 3000
        log_every: Count = free(50)

    settings = filled(Settings(), {"steps": 100}, "--config my.yaml")

Needs pydantic (the extra [experiments]); the rest of this room does not.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

import yaml
from pydantic import AfterValidator, Field, PositiveFloat, TypeAdapter, ValidationError

from bilevel.types import UserError

T = TypeVar("T")
Count: TypeAlias = Annotated[int, Field(ge=1)]
Rate: TypeAlias = Annotated[PositiveFloat, Field(allow_inf_nan=False)]


def _must(what: str, fits: Callable[[float], bool]) -> AfterValidator:
    def check(value: float) -> float:
        if not fits(value):
            raise ValueError(f"must {what}")
        return value

    return AfterValidator(check)


Share: TypeAlias = Annotated[float, _must("lie in (0, 1]", lambda value: 0 < value <= 1)]
Quantile: TypeAlias = Annotated[float, _must("lie in [0, 1)", lambda value: 0 <= value < 1)]
Portion: TypeAlias = Annotated[float, _must("lie in [0, 1]", lambda value: 0 <= value <= 1)]
Amount: TypeAlias = Annotated[
    float,
    _must("be a number of rows, or a share below 1", lambda value: 0 <= value < 1 or (value >= 1 and value % 1 == 0)),
]
"""A number of rows, or, below 1, their share."""
Some: TypeAlias = Annotated[Amount, Field(gt=0)]
"""Likewise, but not 0."""


def free(default: T) -> T:
    """A field that does not decide the outcome of a run: it may differ when the run continues."""
    return dataclasses.field(default=default, metadata={"decides": False})


def of_comparison(default: T) -> T:
    """A field that concerns the comparison of runs, and no run."""
    return dataclasses.field(default=default, metadata={"decides": False, "of_run": False})


def flag_of(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


def taken(arguments: Sequence[str], flag: str) -> tuple[str | None, list[str]]:
    """Return the value of a flag, and the other arguments."""
    rest, found = [], None
    given = iter(arguments)
    for argument in given:
        if argument == flag:
            found = next(given, None)
            if found is None:
                raise UserError(f"{flag} needs a value.")
        elif argument.startswith(f"{flag}="):
            found = argument.partition("=")[2]
        else:
            rest.append(argument)
    return found, rest


def value_of(arguments: Sequence[str], flag: str) -> str | None:
    """Return the value of a flag; None if it is not given."""
    return taken(arguments, flag)[0]


def check_bounds(settings: Any) -> None:
    """Refuse values of a dataclass that its types exclude, nested ones too; a UserError names the first such flag."""
    try:
        _validator(type(settings))(plain(settings))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][1:])
        raise UserError(f"{flag_of(name)} {first['input']} {_wrong(first['msg'])}.") from None


@functools.cache
def _validator(kind: Any) -> Callable[[Any], Any]:
    """Return what makes a dataclass of names and values; pydantic takes options for a tuple of dataclasses, not for one."""
    options: Any = {"extra": "forbid", "arbitrary_types_allowed": True}
    adapter = TypeAdapter(tuple[kind], config=options)  # pyright: ignore[reportInvalidTypeForm]
    return lambda values: adapter.validate_python((values,))[0]


def _wrong(message: str) -> str:
    """What a message of pydantic says about a value, as the end of a sentence: "must be at least 1"."""
    said = message.removeprefix("Input ").removeprefix("Value error, ")
    return said.replace("should", "must").replace("greater than or equal to", "at least")


def read_file(file: Path, flag: str = "--config") -> dict[str, Any]:
    """Read settings from YAML; a UserError with the flag says that the file is damaged, or holds no mapping."""
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{flag} {file} cannot be read ({first}): give a YAML file such as RUN/config.yaml.") from error
    if not isinstance(found, Mapping):
        raise UserError(f"{flag} {file} holds no settings: give a YAML file such as RUN/config.yaml.")
    return dict(found)


def filled(config: T, values: Mapping[str, Any], where: str) -> T:
    """Return a dataclass with other values, as YAML has them, of some fields, nested ones too.

    A UserError names what is no field, or a value that does not fit; it begins with `where`: who sets them.
    """
    try:
        return _validator(type(config))(_expanded(config, values))
    except ValidationError as error:
        first = error.errors()[0]
    path = [str(name) for name in first["loc"][1:]]
    if first["type"] != "unexpected_keyword_argument":
        raise UserError(f"{where} sets {'.'.join(path)} to {first['input']!r}, which {_wrong(first['msg'])}.")
    owner: Any = functools.reduce(getattr, path[:-1], config)
    known = ", ".join(sorted(f.name for f in dataclasses.fields(owner)))
    raise UserError(f"{where} sets {'.'.join(path)}, which does not exist: choose from {known}.")


def _expanded(config: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass by name, with other values of some; those that are dataclasses too where they change."""
    found = values_of(config)
    for name, value in values.items():
        nested = dataclasses.is_dataclass(found.get(name)) and isinstance(value, Mapping)
        found[name] = _expanded(found[name], value) if nested else value
    return found


def values_of(config: Any) -> dict[str, Any]:
    """Return the values of the fields of a dataclass by name, nested dataclasses as they are."""
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}


def part_of(kind: type[T], flags: Any) -> T:
    """Return a dataclass with the values that `flags`, which has at least its fields, has for them."""
    return kind(**{f.name: getattr(flags, f.name) for f in dataclasses.fields(kind)})  # pyright: ignore[reportArgumentType]


def plain(value: Any) -> Any:
    """A configuration as YAML and JSON have it: dataclasses as mappings, paths as text, tuples as lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(v) for name, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def of_run(config: Any) -> dict[str, Any]:
    """The settings of a dataclass that concern one run, as `plain` values."""
    found = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.metadata.get("of_run", True):
            found[f.name] = of_run(value) if dataclasses.is_dataclass(value) else plain(value)
    return {name: value for name, value in found.items() if value != {}}


def may_change(config: Any, prefix: str = "") -> list[str]:
    """Dotted names of the settings that may differ when a run continues."""
    found: list[str] = []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if not f.metadata.get("decides", True):
            found.append(prefix + f.name)
        elif dataclasses.is_dataclass(value):
            found += may_change(value, f"{prefix}{f.name}.")
    return found
