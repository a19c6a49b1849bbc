"""`bilevel select --executor`: what one process writes, whoever does the tasks."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from selections import KILL_AFTER_WRITES, code_of, everything, flags, select

from bilevel import cli

pytest.importorskip("datatrove")

MAIN = "import sys\nfrom bilevel.cli import main\nmain(['select', *sys.argv[1:]])"


def refused(capsys: pytest.CaptureFixture[str], *given: object, **more: object) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(["select", *flags(*given, **more)])  # pyright: ignore[reportArgumentType]
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_local_tasks_give_what_one_process_gives(
    run: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, object] = {"keep_count": 17, "rule": "gumbel", "format": "documents"}
    select(run, corpus, tmp_path / "one", **given)
    select(run, corpus, tmp_path / "many", executor="local", tasks=2, workers=1, **given)
    assert "Launching pipeline" not in capsys.readouterr().err, "--no-progress"
    assert "Launching pipeline" in (tmp_path / "many/executor/score/logs/task_00001.log").read_text()
    assert everything(tmp_path / "many") == everything(tmp_path / "one")
    assert json.loads((tmp_path / "many" / "summary.json").read_text())["kept"] == 17


def test_what_an_executor_needs(
    run: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, object] = {"keep_count": 17, "executor": "slurm", "slurm.partition": "cpu"}
    monkeypatch.setenv("PATH", "")
    assert "--executor slurm needs the program sbatch" in refused(capsys, run, corpus, tmp_path / "out", **given)
    monkeypatch.setitem(sys.modules, "ray", None)
    given = {"keep_count": 17, "executor": "ray"}
    assert "pip install 'ray[default]'" in refused(capsys, run, corpus, tmp_path / "out", **given)
    monkeypatch.setitem(sys.modules, "datatrove", None)
    given = {"keep_count": 17, "executor": "local"}
    assert "pip install 'bilevel[datatrove]'" in refused(capsys, run, corpus, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_a_task_that_fails_is_told(run: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (corpus / "b.txt").write_bytes(b"\xff\n" * 9)
    given: dict[str, object] = {"keep_count": 17, "executor": "local", "tasks": 3, "workers": 1}
    assert "b.txt" in refused(capsys, run, corpus, tmp_path / "out", **given)


@pytest.mark.slow
def test_killed_local_tasks_are_done_again(run: Path, corpus: Path, tmp_path: Path) -> None:
    """Killed while the second task scores, then while it writes; at last with two processes."""
    select(run, corpus, tmp_path / "one", keep_count=17)
    given: dict[str, object] = {"keep_count": 17, "executor": "local", "tasks": 3}
    for count in (2, 4):
        code = KILL_AFTER_WRITES.format(count=count) + MAIN
        command = [sys.executable, "-c", code, *flags(run, corpus, tmp_path / "many", workers=1, **given)]
        assert code_of(command, tmp_path / "log") == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert len(list((tmp_path / "many" / "scores").glob("*.parquet"))) == 3
    assert len(list((tmp_path / "many" / "selected").glob("*.parquet"))) == 1
    command = [sys.executable, "-c", MAIN, *flags(run, corpus, tmp_path / "many", workers=2, **given)]
    assert code_of(command, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert everything(tmp_path / "many") == everything(tmp_path / "one")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "many").rglob("*.parquet")}
    select(run, corpus, tmp_path / "many", workers=1, **given)
    assert times == {path: path.stat().st_mtime_ns for path in times}, "something was done again"


KILLED = """
import multiprocessing, os, pathlib, signal, time
from bilevel.tasks.language_modeling import LanguageModeling

if multiprocessing.parent_process() is not None and not pathlib.Path({mark!r}).exists():
    pathlib.Path({mark!r}).touch()
    os.kill({pid}, signal.SIGKILL)
    time.sleep(2)
    pathlib.Path({mark!r}).write_text("alive")
TASK = LanguageModeling()
"""


@pytest.mark.slow
def test_killed_workers_are_noticed(run: Path, corpus: Path, tmp_path: Path) -> None:
    """A worker that is killed ends the command, and a command that is killed ends its workers."""
    select(run, corpus, tmp_path / "one", keep_count=17)
    task, mark = tmp_path / "my_task.py", tmp_path / "mark"
    given = flags(run, corpus, tmp_path / "many", keep_count=17, task=task, executor="local", tasks=2, workers=2)
    for pid, wanted in (("os.getpid()", 2), ("os.getppid()", -signal.SIGKILL)):
        task.write_text(KILLED.format(mark=str(mark), pid=pid))
        mark.unlink(missing_ok=True)
        assert code_of([sys.executable, "-c", MAIN, *given], tmp_path / "log", grace=3) == wanted
        assert mark.read_text() == ""
        if wanted == 2:
            assert "A process of --executor local was killed" in (tmp_path / "log").read_text().splitlines()[-1]
    assert code_of([sys.executable, "-c", MAIN, *given], tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert everything(tmp_path / "many") == everything(tmp_path / "one")


SBATCH = """#!/bin/bash
# Runs the tasks of the array in turn, instead of Slurm.
echo "$@" >> "$CALLS"
cat "${!#}" >> "$CALLS"
for word in "$@"; do [[ $word == --export=ALL,* ]] && export "${word#--export=ALL,}"; done
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "${!#}")
for task in $(seq 0 "$last"); do SLURM_ARRAY_TASK_ID=$task SLURM_NODELIST=here bash "${!#}" >> "$CALLS" 2>&1 || exit 1; done
echo "Submitted batch job $RANDOM"
"""
SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do [[ $1 == -n ]] && shift; shift; done
exec "$@"
"""


@pytest.mark.slow
def test_slurm(run: Path, corpus: Path, tmp_path: Path) -> None:
    """With stand-ins for Slurm's programs, which run the scripts that are handed in."""
    select(run, corpus, tmp_path / "one", keep_count=17)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "scontrol": "#!/bin/bash\necho here\n"}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    given: dict[str, object] = {
        "keep_count": 17, "executor": "slurm", "tasks": 2, "workers": 1, "slurm.partition": "cpu", "slurm.account": "us",
        "slurm.time": "01:00:00", "slurm.setup": "export SETUP=done",
    }  # fmt: skip
    command = [sys.executable, "-c", MAIN, *flags(run, corpus, tmp_path / "many", **given)]
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    assert code_of(command, tmp_path / "log", PATH=path, CALLS=str(tmp_path / "calls")) == 0
    calls = (tmp_path / "calls").read_text()
    for asked in ("partition=cpu", "account=us", "time=01:00:00", "cpus-per-task=1", "mem-per-cpu=4G", "array=0-1%1"):
        assert f"#SBATCH --{asked}\n" in calls, asked
    assert "#SBATCH --qos" not in calls
    assert calls.count("RUN_OFFSET=0 --dependency=afterok:") == 3
    assert "export SETUP=done" in calls
    assert everything(tmp_path / "many") == everything(tmp_path / "one")


@pytest.mark.slow
def test_ray(run: Path, corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")  # no extra installs it
    select(run, corpus, tmp_path / "one", keep_count=17)
    command = [sys.executable, "-c", MAIN]
    command += flags(run, corpus, tmp_path / "many", keep_count=17, executor="ray", tasks=2)
    assert code_of(command, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert everything(tmp_path / "many") == everything(tmp_path / "one")
