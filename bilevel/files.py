"""Files that appear in one piece."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from bilevel.types import UserError


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A temporary path next to `path`, to be written to; it replaces `path` at the end, or is removed if something is raised.

    A reader, or a crash, sees the old file or the new, never a part.

    Raises:
        UserError: in place of an OSError, in writing too.
    """
    # Not the process's number: two containers that share a disk may have the same one.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"Cannot write {path} ({error.strerror or error}): check the permissions and the free space there."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
