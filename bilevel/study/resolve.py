"""Defaults of a command: the task's preset, then the settings of a file; flags have the last word."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from bilevel.study.config import Config, Study
from bilevel.study.registry import METHODS, defaults
from bilevel.study.task import Task
from bilevel.types import UserError

PREPARED = "prepared"
_NOT_SETTINGS = ("format", "task", "method", "content_hash", "variant")


def default_config(
    task: Task,
    preset: str | None = None,
    settings: tuple[str, Path] | None = None,
    adapt: Callable[[Config], Config] | None = None,
) -> Config:
    """Return the settings of a command without flags.

    Args:
      task: its presets count.
      preset: name of one; None: that of the file, or "default".
      settings: a flag and the YAML file that it names, such as a run directory's config.yaml; None: none.
      adapt: changes the presets before the file is read; None: nothing.

    Raises:
      UserError: for a preset or a file that there is not, or a setting that does not exist.
    """
    if preset is None:
        preset = "default" if settings is None else str(read_file(settings[1], settings[0]).get("preset", "default"))
    methods = defaults(preset, task.presets)
    study, own = Study(preset=preset), task.config()
    for name in dict.fromkeys(("default", preset)):
        values = task.presets.get(name, {})
        study = filled(study, values.get("study", {}), f"The preset {name}")
        own = filled(own, values.get("task", {}), f"The preset {name}")
    config = Config(study, own, methods, study.run_dir / PREPARED)
    config = config if adapt is None else adapt(config)
    return complete(config if settings is None else _from_file(*settings, task, config).with_study(preset=preset))


def complete(config: Config) -> Config:
    """Return the same with the folder of what runs share below its run directory."""
    return dataclasses.replace(config, prepared=config.study.run_dir / PREPARED)


def read_file(file: Path, flag: str = "--config") -> dict[str, Any]:
    """Read settings from YAML.

    Args:
      file: path of it.
      flag: that named it.

    Raises:
      UserError: the file cannot be read, or holds no mapping.
    """
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{flag} {file} cannot be read ({first}): give a YAML file such as RUN/config.yaml.") from error
    if not isinstance(found, Mapping):
        raise UserError(f"{flag} {file} holds no settings: give a YAML file such as RUN/config.yaml.")
    return dict(found)


def _from_file(flag: str, file: Path, task: Task, config: Config) -> Config:
    found, where = read_file(file, flag), f"{flag} {file}"
    study, own, methods = config.study, config.task, config.methods
    if found.get("task", task.name) != task.name:
        raise UserError(f"{where} is of the task {found['task']}, not of {task.name}: give that task, or another file.")
    if "method" in found:
        found.setdefault("compare", found["method"])
    values = {name: value for name, value in found.items() if name not in _NOT_SETTINGS}
    names = {f.name for f in dataclasses.fields(own)}
    for_study = {name: value for name, value in values.items() if name not in names and name not in METHODS}
    study = filled(study, for_study, where)
    own = filled(own, {name: value for name, value in values.items() if name in names}, where)
    for name in METHODS.keys() & values.keys():
        if not isinstance(values[name], Mapping):
            raise UserError(f"{where} sets {name} to {values[name]!r}, which is not one of: settings by name.")
        kept = {k: v for k, v in values[name].items() if not k.endswith("_digest")}
        methods = {**methods, name: filled(methods[name], kept, f"{where}, {name}")}
    return dataclasses.replace(config, study=study, task=own, methods=methods)


def filled(config: Any, values: Mapping[str, Any], where: str) -> Any:
    """Return a dataclass with other values of some fields, nested ones too.

    Raises:
      UserError: for a name that is no field, or a value of another type.
    """
    hints, known = typing.get_type_hints(type(config)), {f.name for f in dataclasses.fields(config)}
    changes = {}
    for name, value in values.items():
        if name not in known:
            raise UserError(f"{where} sets {name}, which does not exist: choose from {', '.join(sorted(known))}.")
        before = getattr(config, name)
        if dataclasses.is_dataclass(before) and isinstance(value, Mapping):
            changes[name] = filled(before, value, f"{where}, {name}")
        else:
            changes[name] = _converted(hints[name], value, f"{where} sets {name} to {value!r}")
    return dataclasses.replace(config, **changes)


def _converted(hint: Any, value: Any, what: str) -> Any:
    """A value of YAML as the type of a field."""
    kinds = _kinds(hint)
    if isinstance(value, list):
        value = tuple(value)
    if isinstance(value, str) and Path in kinds:
        return Path(value)
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds and int not in kinds:
        return float(value)
    if isinstance(value, str) and float in kinds and str not in kinds:  # YAML reads 1e-3 as text
        try:
            return float(value)
        except ValueError:
            pass
    literals = [x for x in kinds if not isinstance(x, type)]
    classes = tuple(x for x in kinds if isinstance(x, type))
    if value not in literals and not (classes and isinstance(value, classes)):
        shown = ", ".join(str(getattr(x, "__name__", x)) for x in kinds)
        raise UserError(f"{what}, which is not one of: {shown}.")
    return value


def _kinds(hint: Any) -> list[Any]:
    """The classes, and the literal values, that a type allows."""
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        return _kinds(typing.get_args(hint)[0])
    if origin is typing.Literal:
        return list(typing.get_args(hint))
    if origin in (typing.Union, types.UnionType):
        return [kind for part in typing.get_args(hint) for kind in _kinds(part)]
    return [origin or hint]


def flags_type(task: Task, methods: Iterable[str], tool: type[Any] | None = None) -> type[Any]:
    """Return a dataclass with all flags: those of the study, of the task, of some methods, and of a tool."""
    own = typing.get_type_hints(task.config)
    fields: list[Any] = [(f.name, own[f.name], dataclasses.MISSING) for f in dataclasses.fields(task.config)]
    fields += [(name, METHODS[name].settings, dataclasses.MISSING) for name in methods if _has_fields(name)]
    made = [(name, kind, dataclasses.field(default=None)) for name, kind, _ in fields]
    return dataclasses.make_dataclass("Flags", made, bases=(Study,) if tool is None else (tool, Study), frozen=True)


def flags_of(kind: type[Any], config: Config) -> Any:
    """Return the flags with the values of a configuration."""
    values = {f.name: getattr(config.study, f.name) for f in dataclasses.fields(Study)}
    values |= {f.name: getattr(config.task, f.name) for f in dataclasses.fields(config.task)}
    names = {f.name for f in dataclasses.fields(kind)}
    return kind(**values, **{name: s for name, s in config.methods.items() if name in names})


def config_of(flags: Any, before: Config) -> Config:
    """Return the configuration that flags say; methods without flags keep their settings."""
    study = Study(**{f.name: getattr(flags, f.name) for f in dataclasses.fields(Study)})
    own = type(before.task)(**{f.name: getattr(flags, f.name) for f in dataclasses.fields(before.task)})
    methods = {name: getattr(flags, name, settings) for name, settings in before.methods.items()}
    return complete(Config(study, own, methods, before.prepared))


def _has_fields(name: str) -> bool:
    return bool(dataclasses.fields(METHODS[name].settings))
