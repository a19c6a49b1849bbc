"""What every experiment's command line shares: typed flags, and errors in one sentence."""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, TypeVar

from bilevel.types import UserError
from experiments.memory import keep_memory
from experiments.programs import keep_programs
from experiments.runs import STOPPED, Stopped

Config = TypeVar("Config")
Residence: TypeAlias = Literal["auto", "always", "never"]
"""Whether all data lie on the device; see `sources.open_source`."""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run(
    config_type: type[Config],
    main: Callable[[Config], None],
    arguments: Sequence[str] | None = None,
    *,
    default: Config | None = None,
    description: str | None = None,
) -> None:
    """Parses the flags into `config_type` and calls `main`; a user's mistake ends in one sentence and exit code 2.

    A run that a signal stopped ends with exit code 3 and the sentence that says how to go on.

    Args:
        config_type: a dataclass.
        main: what is run.
        arguments: those of the command line, if None.
        default: what flags that are not given are taken from; None: the type's own defaults.
        description: for --help; None: the docstring of the type.
    """
    try:
        import tyro
    except ImportError:
        sys.exit("error: the experiments need tyro: pip install 'bilevel[experiments]'")
    keep_memory()
    keep_programs()
    given: dict[str, Any] = {} if default is None else {"default": default}
    config = None
    try:
        config = tyro.cli(config_type, args=arguments, description=description, **given)
        main(config)
    except Stopped:
        folder = getattr(config, "run_dir", "the run directory")
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


def flag_of(name: str) -> str:
    """The flag of a field of a configuration."""
    return "--" + name.replace("_", "-")


def chosen_methods(method: str | None, compare: str, known: Sequence[str], everything: Sequence[str]) -> list[str]:
    """The methods that --method or --compare name, each once.

    Args:
      method: the only one, or None.
      compare: names, comma-separated; "all" stands for several.
      known: all names that there are.
      everything: what "all" means.

    Raises:
      UserError: if one is unknown, or none is named.
    """
    given = [method] if method else [name.strip() for name in compare.split(",") if name.strip()]
    names = [name for one in given for name in (everything if one == "all" else [one])]
    for name in names:
        if name not in known:
            raise UserError(
                f'--compare names the method "{name}", which does not exist: choose from all, {", ".join(known)}.'
            )
    if not names:
        raise UserError(f"--compare is empty: name at least one of {', '.join(known)}.")
    return list(dict.fromkeys(names))
