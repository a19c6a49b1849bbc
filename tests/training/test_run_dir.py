"""Run directories: settings, lock."""

from __future__ import annotations

import errno
import fcntl
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from training_toy import toy_train

from bilevel.training import Checkpoints, hold_run_dir, prepare_run_dir
from bilevel.training.run_dir import read_settings, write_atomically
from bilevel.types import UserError

CONFIG = {
    "seed": 1,
    "model": {"width": 8, "layers": 2},
    "steps": 10,
    "data": Path("some/where"),
    "names": ("a",),
}


def test_creates_and_accepts_the_same_again(tmp_path: Path):
    path = prepare_run_dir(tmp_path / "a" / "run", CONFIG)
    assert path == tmp_path / "a" / "run"
    written = read_settings(path)
    assert written == CONFIG | {"data": "some/where", "names": ["a"]}
    prepare_run_dir(path, CONFIG)
    assert sorted(file.name for file in path.iterdir()) == [".lock", "config.yaml"]


def begun(path: Path, config: dict[str, object] = CONFIG) -> Path:
    """A run directory in which something is saved."""
    prepare_run_dir(path, config)
    (path / "metrics.jsonl").write_text("{}\n")
    return path


def test_settings_without_a_run_are_replaced(tmp_path: Path):
    prepare_run_dir(tmp_path, CONFIG | {"steps": -1})
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.jsonl").write_text("")
    prepare_run_dir(tmp_path, CONFIG)
    assert read_settings(tmp_path)["steps"] == 10


def test_other_settings_are_named(tmp_path: Path):
    begun(tmp_path)
    other = {**CONFIG, "model": {"width": 16, "layers": 2}, "extra": "x"}
    del other["seed"]
    with pytest.raises(UserError) as caught:
        prepare_run_dir(tmp_path, other)
    message = str(caught.value)
    for part in (
        "model.width was 8, now 16",
        'extra was absent, now "x"',
        "seed was 1, now absent",
        "--run-dir",
    ):
        assert part in message
    assert "layers" not in message
    assert read_settings(tmp_path)["seed"] == 1


def test_only_the_first_differences_are_shown(tmp_path: Path):
    begun(tmp_path, {str(i): i for i in range(10)})
    with pytest.raises(UserError, match="2 was 2, now 3; and 7 more"):
        prepare_run_dir(tmp_path, {str(i): i + 1 for i in range(10)})


def test_settings_that_may_change(tmp_path: Path):
    begun(tmp_path)
    changed = {**CONFIG, "steps": 20, "model": {"width": 9, "layers": 3}}
    prepare_run_dir(tmp_path, changed, may_change={"steps", "model"})
    assert read_settings(tmp_path)["steps"] == 20


def test_every_value_comes_back(tmp_path: Path):
    values = {
        "rate": 1e-05,
        "text": "1e-5",
        "none": None,
        "words": "é: {no} #1\n",
        "yes": "no",
        "half": "\udce2",
        "long": "a " * 99,
    }
    prepare_run_dir(tmp_path, {"weights": {"b": 1, "a": values}})
    assert read_settings(tmp_path) == {"weights": {"b": 1, "a": values}}
    text = (tmp_path / "config.yaml").read_text()
    assert text.startswith("format: 1\nweights:\n  b: 1\n  a:\n    rate: 1.0e-05\n")
    begun(tmp_path, {"weights": {"b": 1, "a": values}})


@pytest.mark.parametrize("version", ["format: 2\n", ""])
def test_another_format(tmp_path: Path, version: str):
    path = begun(tmp_path) / "config.yaml"
    path.write_text(path.read_text().replace("format: 1\n", version))
    for use in (lambda: prepare_run_dir(tmp_path, CONFIG), lambda: read_settings(tmp_path)):
        with pytest.raises(
            UserError, match=r"holds a run of the format (2|None), and this version .* the format 1: give"
        ):
            use()
    with pytest.raises(UserError, match="hold 'format'"):
        prepare_run_dir(tmp_path, {"format": 3})


@pytest.mark.parametrize("content", ["{", "[1]", "", "a: b: c", "\x00", "!!python/object:os.system {}"])
def test_unreadable_settings(tmp_path: Path, content: str):
    (begun(tmp_path) / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=r"Cannot read the settings in .*config\.yaml"):
        prepare_run_dir(tmp_path, CONFIG)


def test_unwritable(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Cannot write to the run directory .*file/run \(Not a directory\)"):
        prepare_run_dir(tmp_path / "file" / "run", CONFIG)
    with pytest.raises(UserError, match="Cannot write to the run directory"):
        toy_train(tmp_path / "file" / "run")


def test_lock(tmp_path: Path):
    with hold_run_dir(tmp_path):
        with pytest.raises(UserError, match=f"Another process is running in {tmp_path}"):
            prepare_run_dir(tmp_path, CONFIG)
        with pytest.raises(UserError, match="Another process is running"):
            toy_train(tmp_path)
    prepare_run_dir(tmp_path, CONFIG)


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert prepare_run_dir(tmp_path, CONFIG) == tmp_path
    assert f"warning: {tmp_path} cannot be locked (Function not implemented)" in capsys.readouterr().err


def test_lock_is_released_by_death(tmp_path: Path):
    code = (
        "from pathlib import Path; from bilevel.training import hold_run_dir\n"
        f"with hold_run_dir(Path({str(tmp_path)!r})): print(1, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "1\n"
        with pytest.raises(UserError, match="Another process"), hold_run_dir(tmp_path):
            pass
        holder.kill()
        holder.wait()
        with hold_run_dir(tmp_path):
            pass


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Threads have one process number, as processes of two containers may."""
    target = tmp_path / "a.json"

    def write(text: str) -> None:
        for _ in range(50):
            write_atomically(target, text)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(write, str(i) * 1000) for i in range(4)]:
            done.result()
    assert len(set(target.read_text())) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("name", ["lr=[0.1]", "a]", "all*", "why?", "back\\slash", "caf\udce9"])
def test_paths_that_checkpoints_cannot_have(tmp_path: Path, name: str):
    """Orbax would save there, and read nothing back."""
    for refuse in (lambda path: prepare_run_dir(path, CONFIG), lambda path: Checkpoints(path)):
        with pytest.raises(UserError, match=r"could not be read again: give a --run-dir in UTF-8 without any of \[ \]"):
            refuse(tmp_path / name / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["{a,b}", "100% $HOME ~ #1", "ünï", "a b;c'd", "new\nline", "é" * 100])
def test_paths_that_checkpoints_can_have(tmp_path: Path, name: str):
    with Checkpoints(prepare_run_dir(tmp_path / name, CONFIG) / "checkpoints") as checkpoints:
        checkpoints.save(1, {"w": np.ones(3)}, wait=True)
    with Checkpoints(tmp_path / name / "checkpoints") as checkpoints:
        restored = checkpoints.restore_latest({"w": np.zeros(3)})
    assert restored is not None
    np.testing.assert_array_equal(restored[1]["w"], np.ones(3))


def test_a_python_without_fcntl(tmp_path: Path):
    """Nothing is locked, which is said; a second run is not taken for one that runs."""
    code = (
        "import sys, pathlib; sys.modules['fcntl'] = None\n"
        "from bilevel.training import hold_run_dir\n"
        "for _ in range(2):\n"
        f"    with hold_run_dir(pathlib.Path({str(tmp_path)!r})): pass\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert len(lines) == 2, done.stderr
    assert all(line.startswith(f"warning: {tmp_path} cannot be locked (") for line in lines)
