"""The commands on the linear task, in this process and on one device."""

from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from tiny_text import shrink

from bilevel.cli import main
from bilevel.devices import sharding

LINEAR = str(Path(__file__).parents[1] / "toys" / "linear_task.py")


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """And on networks of one block."""
    mesh = sharding.make_mesh(jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda: mesh)
    shrink(monkeypatch)


@pytest.fixture
def call(tmp_path: Path) -> Callable[..., None]:
    """A command line on the linear task: names of the command, flags as keywords."""

    def called(*command: str, more: tuple[object, ...] = (), run_dir: str = "run", **given: object) -> None:
        flags = [x for name, value in given.items() for x in (f"--{name.replace('__', '.').replace('_', '-')}", value)]
        main([*command, LINEAR, "--run-dir", str(tmp_path / run_dir), *map(str, flags), *map(str, more)])

    return called


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Flags of a few steps on generic lines, half of them in capitals as the specific ones are."""
    lines = [f"{word} {i} the cat sat on a mat" for i in range(120) for word in ("one", "ANOTHER")]
    (tmp_path / "generic.txt").write_text("\n".join(x.upper() if "ANOTHER" in x else x for x in lines) + "\n")
    (tmp_path / "specific").mkdir()
    for start, part in enumerate(("train", "valid", "test")):
        rows = "\n".join(f"LINE {3 * i + start} OF SHOUTED TEXT" for i in range(40))
        (tmp_path / "specific" / f"{part}.txt").write_text(rows + "\n")
    return [
        "--steps", "4", "--batch-size", "4", "--no-progress", "--data.length", "16",
        "--data.generic", str(tmp_path / "generic.txt"), "--data.specific", str(tmp_path / "specific"),
        "--data.cache-dir", str(tmp_path / "cache"), "--run-dir", str(tmp_path / "run"),
    ]  # fmt: skip


@pytest.fixture
def digits(tmp_path: Path) -> list[str]:
    """Flags of a few steps on the digits."""
    return [
        "--steps", "4", "--batch-size", "4", "--no-progress", "--model.network", "mlp-small",
        "--data.limit", "400", "--run-dir", str(tmp_path / "run"),
    ]  # fmt: skip
