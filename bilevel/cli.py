"""The command line: `bilevel compare TASK`, `diagnose TASK`, `analyse NAME TASK`, `select`, `export`."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bilevel.tasks import TASKS, load_task
from bilevel.types import UserError

ANALYSES = ("curriculum", "filters", "acceleration", "transfer", "multi_task")
USAGE = f"""usage: bilevel COMMAND …

  bilevel compare TASK [--compare uniform,soba] [--data.… --model.… --METHOD.…]
  bilevel diagnose TASK [--checkpoint RUN]
  bilevel analyse {{{",".join(ANALYSES)}}} TASK
  bilevel select --weights RUN --corpus FILES --output FOLDER
  bilevel export --run RUN --output FOLDER

TASK is one of {", ".join(TASKS)}, or a file my_task.py with an object TASK (see docs/own_task.md).
`bilevel COMMAND TASK --help` lists the flags.
"""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Command(NamedTuple):
    """A command line that was understood."""

    run: Callable[[], None]
    settings: Any
    """What it will run with."""
    run_dir: Path | None = None


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; a user's mistake ends in one sentence and exit code 2.

    A run that a signal stopped ends with exit code 3 and the sentence that says how to go on.

    Args:
      arguments: those of the command line, if None.
    """
    from bilevel.training.signals import STOPPED, Stopped

    command = None
    _print_anything()
    try:
        command = parse(sys.argv[1:] if arguments is None else arguments)
        _environment()
        command.run()
    except BrokenPipeError:  # what reads this output has ended, as in `… | head`
        sys.exit(1)
    except Stopped:
        folder = getattr(command, "run_dir", None) or "the run directory"
        with contextlib.suppress(OSError):  # Ctrl-C may have ended what reads this output
            print(f"Stopped and saved; the same command continues in {folder}.", file=sys.stderr, flush=True)
        sys.exit(STOPPED)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        print(f"error: A file cannot be written ({error}): make room, and run the same command again.", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nInterrupted; what was saved before is kept.", file=sys.stderr)
        sys.exit(130)
    finally:
        _print_the_rest()


def parse(arguments: Sequence[str]) -> Command:
    """Understand a command line, without running it.

    Raises:
      UserError: for a command or a task that there is not, or flags that do not go together.
      SystemExit: for --help, and for flags that do not exist.
    """
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(USAGE)
        sys.exit(0)
    parsers = {"compare": _compare, "diagnose": _diagnose, "analyse": _analyse, "select": _select, "export": _export}
    if name not in parsers:
        raise UserError(f"bilevel {name} does not exist: choose from {', '.join(parsers)}.")
    return parsers[name](rest)


def _compare(arguments: Sequence[str]) -> Command:
    from bilevel.study.flags import parse as flags
    from bilevel.study.suite import compare
    from bilevel.training.run_dir import check_path

    task, rest = _task(arguments, "compare")
    config = flags(task, rest, f"bilevel compare {arguments[0]}").config

    def run() -> None:
        check_path(config.study.run_dir)
        config.study.check()
        _join(config.study.hosts)
        compare(config, task)

    return Command(run, config, config.study.run_dir)


def _diagnose(arguments: Sequence[str]) -> Command:
    from bilevel.tools import diagnose

    task, rest = _task(arguments, "diagnose")
    return Command(*diagnose.command(task, rest, f"bilevel diagnose {arguments[0]}"))


def _analyse(arguments: Sequence[str]) -> Command:
    from bilevel.tools import analyses

    if not arguments or arguments[0] not in ANALYSES:
        raise UserError(f"bilevel analyse needs the name of an analysis: {', '.join(ANALYSES)}.")
    task, rest = _task(arguments[1:], f"analyse {arguments[0]}")
    return Command(*analyses.command(arguments[0], task, rest, f"bilevel analyse {arguments[0]} {arguments[1]}"))


def _select(arguments: Sequence[str]) -> Command:
    _check_installed("tyro", "The command line")
    _check_installed("pyarrow", "The selection")
    from bilevel.tools import select

    return Command(*select.command(arguments, "bilevel select", load_task, _open_executor))


def _open_executor(config: Any) -> Any:
    """Return what runs the phases of a selection by the executor of its flags."""
    _check_installed("datatrove", f"--executor {config.executor}", "datatrove")
    from bilevel.integrations import executors

    return executors.open_executor(config)


def _export(arguments: Sequence[str]) -> Command:
    _check_installed("tyro", "The command line")
    from bilevel.tools import export

    return Command(*export.command(arguments, "bilevel export", load_task))


def _task(arguments: Sequence[str], command: str) -> tuple[Any, Sequence[str]]:
    if not arguments or arguments[0].startswith("-"):
        raise UserError(f"bilevel {command} needs a task: one of {', '.join(TASKS)}, or a file my_task.py.")
    _check_installed("tyro", "The command line")
    return load_task(arguments[0]), arguments[1:]


def _check_installed(package: str, what: str, extra: str = "experiments") -> None:
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"{what} needs {package}: pip install 'bilevel[{extra}]'.") from error


def _join(hosts: Any) -> None:
    """Join this process to the others of a run on several hosts."""
    from bilevel.devices import sharding

    if hosts.coordinator == "auto":
        sharding.start_processes()
    elif hosts.coordinator is not None:
        sharding.start_processes(hosts.coordinator, hosts.processes, hosts.process)


def _print_anything() -> None:
    """Let what the output's encoding lacks (±, names of files) appear as a question mark."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _print_the_rest() -> None:
    """Print what is left, while a failure can still be told; without a reader, as in `… | head`, nobody is told."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python tries again at its end
        if not isinstance(error, BrokenPipeError):
            print(f"error: The output cannot be written ({error.strerror}): make room.", file=sys.stderr)
        sys.exit(1)


def _environment() -> None:
    from bilevel.devices.environment import keep_memory, keep_programs

    keep_memory()
    keep_programs()


if __name__ == "__main__":
    main()
