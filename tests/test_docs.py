"""What the pages say is true: Python blocks run, commands parse, and flags, extras and links exist."""

import contextlib
import importlib
import importlib.util
import io
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from random_run import random_run

from bilevel import cli
from bilevel.training import prepare_run_dir

pytest.importorskip("tyro")
ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FENCE = re.compile(
    r"(?:<!-- (?P<mark>not run: .+?) -->\n+)?^```(?P<language>\w+)(?P<options>[^\n]*)\n(?P<text>.*?)^```$", re.S | re.M
)
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9.-]*[a-z0-9]")
TASKS = tuple(cli.TASKS)
SLOW = ("docs/own_pipeline.md", "docs/pairs.md")
"""Pages whose Python blocks take some ten seconds."""


class Block(NamedTuple):
    language: str
    title: str | None
    """Of a block that is a file."""
    not_run: bool
    text: str


def blocks(page: Path) -> list[Block]:
    found = []
    for match in FENCE.finditer(page.read_text(encoding="utf-8")):
        title = re.search(r'title="([^"]+)"', match["options"])
        found.append(Block(match["language"], title and title[1], match["mark"] is not None, match["text"]))
    return found


def commands(page: Path) -> list[list[str]]:
    """The commands of the shell blocks, and those in the text that are whole."""
    text = page.read_text(encoding="utf-8")
    lines = [line for b in blocks(page) if b.language == "sh" for line in b.text.replace("\\\n", " ").splitlines()]
    spans = [span for span in re.findall(r"`([^`\n]+)`", FENCE.sub("", text)) if "…" not in span]
    parts = [part for line in lines + spans for part in line.split("&&")]
    starts = (
        "bilevel compare ",
        "bilevel diagnose ",
        "bilevel analyse ",
        "bilevel select ",
        "bilevel export ",
        "python -m ",
    )
    return [shlex.split(part) for part in parts if part.strip().startswith(starts)]


def modules(page: Path) -> Iterator[str]:
    for command in commands(page):
        if command[0] == "python" and command[2].partition(".")[0] in ("experiments", "benchmarks", "bilevel"):
            yield command[2]


@cache
def known_flags() -> frozenset[str]:
    """All flags of all commands, from their --help."""
    every = "all,frozen,replayed,token_selection"
    asked = [["compare", task, "--compare", every] for task in TASKS] + [["compare", "my_task.py"]]
    asked += [["diagnose", TASKS[0]], *(["analyse", name, TASKS[0]] for name in cli.ANALYSES), ["select"], ["export"]]
    found: set[str] = set()
    for command in asked:
        with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
            cli.parse([*command, "--help"])
        found.update(FLAG.findall(out.getvalue()))
    return frozenset(found | {"--config", "--help"})


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the weighting network that pages score with, of random parameters."""
    return random_run(tmp_path_factory.mktemp("weights") / "soba-seed0", length=64, width=32)


@pytest.fixture
def folder(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files that pages show, and the runs that they measure or score with."""
    for page in PAGES:
        for block in blocks(page):
            if block.title is not None:
                (tmp_path / block.title).write_text(block.text, encoding="utf-8")
    prepare_run_dir(tmp_path / "runs/my_domain/uniform-seed0", {"task": TASKS[0], "method": "uniform", "seed": 0})
    (tmp_path / "runs/my_domain/soba-seed0").symlink_to(weights)
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(ImportError):  # executors of datatrove start processes, and jax's threads survive no fork
        importlib.import_module("multiprocess").set_start_method("forkserver", force=True)
    return tmp_path


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The arguments that entry points call the command line with, instead of its running."""
    found: list[list[str]] = []
    monkeypatch.setattr(cli, "main", lambda arguments: found.append(list(arguments)))
    return found


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else [])
        for n, page in zip(NAMES, PAGES, strict=True)
        if any(b.language == "python" for b in blocks(page))
    ],
)
def test_python_blocks_run(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for number, block in enumerate(b for b in blocks(ROOT / name) if b.language == "python" and b.title is None):
        code = compile(block.text, f"{name}, block {number}", "exec")
        if not block.not_run:
            exec(code, names)
    if name == "README.md":  # its last line says about 1, and about 7 for uniform
        assert float(capsys.readouterr().out) < 2


@pytest.mark.parametrize("name", [n for n, page in zip(NAMES, PAGES, strict=True) if commands(page)])
def test_commands_parse(name: str, folder: Path, given: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    for command in commands(ROOT / name):
        arguments = command[1:]
        if command[0] == "python":
            if not command[2].startswith("experiments."):
                continue  # test_modules_exist
            monkeypatch.setattr(sys, "argv", command[2:])
            runpy.run_module(command[2], run_name="__main__")
            arguments = given.pop()
        if "--help" in arguments:
            with pytest.raises(SystemExit, match=r"^0$"):
                cli.parse(arguments)
        else:
            assert callable(cli.parse(arguments).run), f"{name}: {shlex.join(command)}"


@pytest.mark.parametrize("name", [n for n, page in zip(NAMES, PAGES, strict=True) if list(modules(page))])
def test_modules_exist(name: str) -> None:
    assert [module for module in modules(ROOT / name) if importlib.util.find_spec(module) is None] == []


def test_flags_in_the_text_exist(folder: Path) -> None:
    unknown = {}
    for name, page in zip(NAMES, PAGES, strict=True):
        spans = re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text(encoding="utf-8")))
        ours = [span for span in spans if span.startswith(("--", "bilevel ")) and span != "--strict"]
        unknown[name] = [flag for span in ours for flag in FLAG.findall(span) if flag not in known_flags()]
    assert {name: flags for name, flags in unknown.items() if flags} == {}


def test_every_method_is_explained() -> None:
    from bilevel.study.registry import METHODS

    shown = (ROOT / "docs" / "choose.md").read_text(encoding="utf-8")
    assert [name for name in METHODS if f"`{name}`" not in shown] == []


def test_extras_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {
        e
        for page in PAGES
        for found in re.findall(r'(?:-e "\.|bilevel)\[([\w,]+)\]', page.read_text())
        for e in found.split(",")
    }
    assert {"experiments", "test"} <= named
    assert named <= extras.keys()


def test_links_of_the_front_page_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    files = [target for target in targets if "://" not in target]
    assert len(files) > 10
    assert [target for target in files if not (ROOT / target).exists()] == []


def test_front_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_results_of_the_front_page_are_measured() -> None:
    shown = re.findall(r"\d\.\d{3} ± \d\.\d{3}", (ROOT / "README.md").read_text(encoding="utf-8"))
    measured = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    assert len(shown) > 10
    assert [figure for figure in shown if figure not in measured] == []
