"""Flags of a command: those of the study, of the task, of some methods, and of a tool."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bilevel.study import registry, resolve
from bilevel.study.config import Config
from bilevel.study.task import Task
from bilevel.training.run_dir import flatten
from bilevel.training.settings import check_bounds, flag_of, part_of, plain, taken, value_of
from bilevel.types import UserError


class Parsed(NamedTuple):
    """What a command line says."""

    config: Config
    own: Any
    """The flags of the tool; None if it has none."""
    before: Config
    """The same without flags."""

    def changed(self) -> list[str]:
        """Dotted names of the settings of study, task and methods that the flags changed."""
        both = ({**plain(c.study), **plain(c.task), **plain(c.methods)} for c in (self.before, self.config))
        old, new = map(flatten, both)
        return [name for name in new if old.get(name) != new[name]]

    def refuse(self, names: Collection[str], why: str) -> None:
        """Refuse flags that were given though they have no use, by a UserError whose end is `why`.

        The names are those of settings, or what they begin with: "hosts".
        """
        for name in self.changed():
            if name in names or name.split(".")[0] in names:
                raise UserError(f"{flag_of(name)} {why}")


def compared(before: Config, arguments: Sequence[str]) -> list[str]:
    """Return the methods that --compare names."""
    return registry.chosen(value_of(arguments, "--compare") or before.study.compare, None)


def parse(
    task: Task,
    arguments: Sequence[str],
    prog: str,
    methods: Callable[[Config, Sequence[str]], Sequence[str]] = compared,
    *,
    own: type[Any] | None = None,
    adapt: Callable[[Config], Config] | None = None,
    settings: tuple[str, Path] | None = None,
) -> Parsed:
    """Parse the flags of a task, of some methods, and of a tool.

    Args:
      task: its data and model become flags.
      arguments: after the task's name.
      prog: for --help.
      methods: the configuration without flags, and the arguments -> the methods whose settings become flags.
      own: dataclass of the tool's flags.
      adapt: makes the tool's defaults of the task's; a file of settings and flags have the last word.
      settings: a flag and the file of settings that it names, instead of --config.

    Raises:
      UserError: for names that there are not, and numbers out of range.
      SystemExit: for --help, and for flags that do not exist.
    """
    import tyro

    file, rest = taken(arguments, "--config")
    if settings is not None and file:
        raise UserError(f"--config {file} does not go with {settings[0]}, which brings settings: omit it.")
    where = settings or (("--config", Path(file)) if file else None)
    before = resolve.default_config(task, value_of(rest, "--preset"), where, adapt)
    named = registry.with_first(methods(before, rest))
    kind = resolve.flags_type(task, named, own)
    about = f"Flags of methods are those of {', '.join(named)}." if named else ""
    text = f"{(own and own.__doc__) or task.__doc__ or task.title}\n\n{about}"
    flags = tyro.cli(kind, args=rest, default=resolve.flags_of(kind, before), description=text, prog=prog)
    check_bounds(flags)
    return Parsed(resolve.config_of(flags, before), own and part_of(own, flags), before)
