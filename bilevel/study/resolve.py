"""Defaults of a command: the task's presets, then the settings of a file; flags have the last word.

All three fill one dataclass, that of `flags_type`, whose fields lie as in config.yaml.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from bilevel.study.config import Config, Study
from bilevel.study.registry import METHODS
from bilevel.study.task import Task
from bilevel.training.settings import filled, part_of, read_file, values_of
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
    where = "" if settings is None else f"{settings[0]} {settings[1]}"
    given = {} if settings is None else _settings_of_file(*settings, task)
    preset = preset or str(given.get("preset", "default"))
    kind = flags_type(task, METHODS)
    methods = {name: spec.settings() for name, spec in METHODS.items()}
    config = Config(Study(), task.config(), methods, Path())
    for name in _layers(task, preset):
        config = config_of(filled(flags_of(kind, config), _preset(task, name), f"The preset {name}"), config)
    config = config if adapt is None else adapt(config)
    return config_of(filled(flags_of(kind, config), {**given, "preset": preset}, where), config)


def complete(config: Config) -> Config:
    """Return the same with the folder of what runs share below its run directory."""
    return dataclasses.replace(config, prepared=config.study.run_dir / PREPARED)


def flags_type(task: Task, methods: Collection[str], tool: type[Any] | None = None) -> type[Any]:
    """Return a dataclass with all flags: those of the study, of the task, of some methods, and of a tool."""
    own = typing.get_type_hints(task.config)
    kinds = {f.name: own[f.name] for f in dataclasses.fields(task.config)}
    kinds |= {name: METHODS[name].settings for name in methods if dataclasses.fields(METHODS[name].settings)}
    fields: list[Any] = [(name, kind, dataclasses.field(default=None)) for name, kind in kinds.items()]
    return dataclasses.make_dataclass("Flags", fields, bases=(Study,) if tool is None else (tool, Study), frozen=True)


def flags_of(kind: type[Any], config: Config) -> Any:
    """Return the flags with the values of a configuration."""
    names = {f.name for f in dataclasses.fields(kind)}
    methods = {name: settings for name, settings in config.methods.items() if name in names}
    return kind(**values_of(config.study), **values_of(config.task), **methods)


def config_of(flags: Any, before: Config) -> Config:
    """Return the configuration that flags say; methods without flags keep their settings."""
    methods = {name: getattr(flags, name, settings) for name, settings in before.methods.items()}
    return complete(Config(part_of(Study, flags), part_of(type(before.task), flags), methods, before.prepared))


def _layers(task: Task, preset: str) -> list[str]:
    """The presets that one lies on, the lowest first, and itself; a UserError says that there is no such preset."""
    known = {"default", "paper", *task.presets}
    if preset not in known:
        raise UserError(f"--preset {preset} does not exist: choose from {', '.join(sorted(known))}.")
    below = task.presets.get(preset, {}).get("extends", "default")
    return list(dict.fromkeys(("default", below, preset)))


def _preset(task: Task, name: str) -> dict[str, Any]:
    given = task.presets.get(name, {})
    papers = {method: spec.paper if name == "paper" else {} for method, spec in METHODS.items()}
    methods = {method: {**paper, **given.get(method, {})} for method, paper in papers.items()}
    return {**given.get("study", {}), **given.get("task", {}), **{m: values for m, values in methods.items() if values}}


def _settings_of_file(flag: str, file: Path, task: Task) -> dict[str, Any]:
    """The settings in a file, without what says of which run it is."""
    found = read_file(file, flag)
    if found.get("task", task.name) != task.name:
        raise UserError(
            f"{flag} {file} is of the task {found['task']}, not of {task.name}: give that task, or another file."
        )
    if "method" in found:
        found.setdefault("compare", found["method"])
    for name in METHODS.keys() & found.keys():
        if isinstance(found[name], Mapping):
            found[name] = {k: value for k, value in found[name].items() if not k.endswith("_digest")}
    return {name: value for name, value in found.items() if name not in _NOT_SETTINGS}
