"""Selecting documents for another framework, as a user calls it."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from selections import KILL_AFTER_WRITES, WORDS, everything
from tiny_text import shrink

from bilevel import cli
from bilevel.data import Document, document_blocks, open_source
from bilevel.data.text import parts
from bilevel.data.text.parts import Part
from bilevel.devices import sharding
from bilevel.devices.sharding import make_mesh
from bilevel.files import load_tree, save_tree
from bilevel.nn.weighting import ConvWeighting, NGramWeighting
from bilevel.offline import documents as offline
from bilevel.study import ModelOptions
from bilevel.study.resolve import default_config
from bilevel.tasks.language_modeling import TASK
from bilevel.tools.select.network import load_network
from bilevel.tools.select.scores import ScoreFiles

T = 24
MODULES = {"ngram": NGramWeighting(width=4, hidden=4), "conv": ConvWeighting(layers=2, width=4)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the smallest kind."""
    path = tmp_path_factory.mktemp("trained")
    (path / "generic.txt").write_text("\n".join(texts(200, 1)), "utf-8")
    (path / "specific.txt").write_text("\n".join(texts(200, 2)), "utf-8")
    train_tiny(path)
    return path / "run" / "soba-seed0"


def train_tiny(path: Path, **own: object) -> None:
    given = {
        "compare": "soba", "steps": 2, "batch-size": 2, "big-batch-size": 4, "log-every": 1, "evaluate-rows": 8,
        "run-dir": path / "run", "data.generic": path / "generic.txt", "data.specific": path / "specific.txt",
        "data.cache-dir": path / "cache", "data.length": T, "model.weighting-width": 4, "model.weighting-layers": 2,
        "optimizer.warmup": 0, **own,
    }  # fmt: skip
    mesh = make_mesh(jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda *devices: mesh)
        shrink(patch)
        more = [x for name, value in given.items() for x in (f"--{name}", str(value))]
        cli.main(["compare", "language_modeling", *more, "--no-progress"])


def make_run(path: Path, like: Path, *, weighting: str = "ngram", seed: int = 0, **settings: object) -> Path:
    """A finished run with random weights, which tell texts apart better than those of two steps."""
    path.mkdir(parents=True)
    found = yaml.safe_load((like / "config.yaml").read_text())
    found["model"]["weighting"] = weighting
    (path / "config.yaml").write_text(yaml.safe_dump({**found, **settings}))
    shape = jnp.zeros((1, T), jnp.uint8), jnp.zeros((1,), jnp.int32)
    shapes = jax.eval_shape(MODULES[weighting].init, jax.random.key(0), *shape)["params"]
    rng = np.random.default_rng(seed)
    save_tree(path / "weights.safetensors", jax.tree.map(lambda x: rng.normal(size=x.shape).astype("f4"), shapes))
    return path


@pytest.fixture(scope="module")
def run(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run") / "soba-seed0", trained)


def texts(count: int, seed: int) -> list[str]:
    """Lines of 1 to 40 words."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 40))) for _ in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Plain text with blank lines and no last line end, gzipped text, and gzipped JSON lines."""
    path = tmp_path / "corpus"
    path.mkdir()
    plain = texts(40, 1)
    plain[3] = plain[17] = ""
    (path / "a.txt").write_text("\n".join(plain), "utf-8")
    (path / "b.txt.gz").write_bytes(gzip.compress("\r\n".join([*texts(30, 2), ""]).encode()))
    records = "".join(json.dumps({"id": i, "body": text}) + "\n" for i, text in enumerate(texts(50, 3)))
    (path / "c.jsonl.gz").write_bytes(gzip.compress(records.encode()))
    return path


def flags(run: Path, corpus: object, output: Path, **given: object) -> list[str]:
    chosen = {"weights": run, "corpus": corpus, "output": output, "batch-size": 64, **given}
    if not {"keep_fraction", "keep_count"} & set(given):
        chosen["keep-count"] = 10
    return [x for name, value in chosen.items() for x in (f"--{name.replace('_', '-')}", str(value))] + [
        "--no-progress"
    ]


def call(run: Path, corpus: object, output: Path, **given: object) -> None:
    cli.main(["select", *flags(run, corpus, output, **given)])


def rows_in(output: Path) -> list[dict[str, Any]]:
    return [row for file in sorted((output / "selected").iterdir()) for row in pq.read_table(file).to_pylist()]


def lines_in(output: Path) -> list[str]:
    files = sorted((output / "selected").iterdir())
    plain = (gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes() for file in files)
    return [line for text in plain for line in text.decode().split("\n")[:-1]]


def direct_scores(run: Path, documents: list[str]) -> list[float]:
    """The network applied to the rows of each document, cut by hand."""
    settings = yaml.safe_load((run / "config.yaml").read_text())["model"]
    module, bound = MODULES[settings["weighting"]], settings["weighting_bound"]
    params, _ = load_tree(run / "weights.safetensors")
    cut: list[list[bytes]] = []
    for text in (document.encode() for document in documents):
        pieces = [text[i : i + T] for i in range(0, len(text), T)]
        if len(pieces) > 1 and len(pieces[-1]) < 16:
            pieces.pop()
        cut.append(pieces)
    rows = [piece for pieces in cut for piece in pieces]
    rows += [b"x"] * (-len(rows) % 512)  # one shape compiles for all tests
    tokens = jnp.array([list(row.ljust(T, b"\0")) for row in rows], jnp.uint8)
    apply = jax.jit(module.apply)
    raw = np.asarray(apply({"params": params}, tokens, jnp.array([len(row) for row in rows])))
    logits = iter(bound * np.tanh(raw / bound))
    return [sum(len(x) * float(next(logits)) for x in pieces) / sum(map(len, pieces)) for pieces in cut]


@pytest.mark.parametrize("weighting", ["trained", "ngram", "conv"])
def test_scores_are_those_of_the_network(trained: Path, tmp_path: Path, weighting: str) -> None:
    run = trained if weighting == "trained" else make_run(tmp_path / "soba-seed0", trained, weighting=weighting)
    documents = [*texts(12, 5), "x", "y" * (T + 15), "z" * (T + 16), "long " * 800]
    (tmp_path / "text.txt").write_text("\n".join(documents) + "\n")
    call(run, tmp_path / "text.txt", tmp_path / "out", keep_fraction=0.25, batch_size=3)
    rows = rows_in(tmp_path / "out")
    wanted = direct_scores(run, documents)
    np.testing.assert_allclose([row["score"] for row in rows], wanted, rtol=1e-4, atol=1e-4)
    assert [row["bytes"] for row in rows] == [len(x.encode()) for x in documents]
    assert np.ptp(wanted) > (1e-6 if weighting == "trained" else 1e-2)
    best = sorted(range(len(wanted)), key=lambda i: -wanted[i])[:4]
    assert {row["document"] for row in rows if row["kept"]} == set(best)


@pytest.mark.parametrize("method", ["rho_loss", "irreducible_loss"])
def test_reducible_losses(method: str, trained: Path, tmp_path: Path) -> None:
    """Those of the run's two models, or the negative irreducible ones."""
    own = {"compare": method, f"{method.replace('_', '-')}.held-out-steps": 2, "run-dir": tmp_path / "run"}
    documents = [*texts(6, 5), "long " * 80]
    (tmp_path / "text.txt").write_text("\n".join(documents) + "\n")
    train_tiny(trained.parents[1], **own)
    run = tmp_path / "run" / f"{method}-seed0"
    call(run, tmp_path / "text.txt", tmp_path / "out", batch_size=3, keep_count=2)
    config = default_config(TASK, settings=("--weights", run / "config.yaml")).task
    model = TASK.model(config, None, ModelOptions())
    kept = load_tree(run / "losses.safetensors")[0]
    assert set(kept) == ({"held_out", "target"} if method == "rho_loss" else {"held_out"})
    for row, document in zip(rows_in(tmp_path / "out"), documents, strict=True):
        (rows,) = TASK.pack(config)([document.encode()], 99)
        losses = {
            name: model.evaluation(found["0"], {}, rows.batch, jax.random.key(0))[0] for name, found in kept.items()
        }
        wanted = losses.get("target", 0) - losses["held_out"]
        weights = rows.size / rows.size.sum()
        assert row["score"] == pytest.approx(float((wanted[: len(weights)] * weights).sum()), rel=1e-4, abs=1e-5)


def test_scores_do_not_depend_on_how_the_stream_is_cut(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_network(run, None, cli.load_task)
    documents = [Document(x.encode()) for x in [*texts(50, 6), "", "huge " * 4000, "", *texts(20, 7)]]
    whole = list(offline.score_documents(*loaded[:2], documents, 16))
    monkeypatch.setattr(offline, "document_blocks", lambda stream, _: document_blocks(stream, 700))
    pieces = list(offline.score_documents(*loaded[:2], documents, 16))
    assert len(whole) == 1 < 5 < len(pieces)
    for column, name in enumerate(offline.Scored._fields):
        joined = np.concatenate([piece[column] for piece in pieces])
        np.testing.assert_array_equal(joined, whole[0][column], err_msg=name)


def test_table_of_several_files(run: Path, folder: Path, tmp_path: Path) -> None:
    """Blank lines count in the numbers and have no row; the count is exact; the best are kept."""
    call(run, f"{folder}/a.txt,{folder}/*.txt.gz", tmp_path / "out", keep_count=17)
    rows = rows_in(tmp_path / "out")
    assert [(Path(row["file"]).name, row["document"]) for row in rows] == [
        *(("a.txt", i) for i in range(40) if i not in (3, 17)),
        *(("b.txt.gz", i) for i in range(30)),
    ]
    kept, others = ([row["score"] for row in rows if row["kept"] is kept] for kept in (True, False))
    assert len(kept) == 17
    assert min(kept) > max(others)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["documents"], summary["kept"], summary["threshold"]) == (68, 17, min(kept))
    scores = np.asarray(kept + others)
    for quantile, value in summary["score_quantiles"].items():
        assert value == pytest.approx(np.quantile(scores, float(quantile)), rel=1e-5), quantile
    assert sum(file["kept"] for file in summary["files"]) == 17


def test_documents_are_the_original_lines(run: Path, folder: Path, tmp_path: Path) -> None:
    call(run, f"{folder}/c.jsonl.gz", tmp_path / "json", format="documents", field="body", keep_fraction=0.5)
    lines = [json.loads(line) for line in lines_in(tmp_path / "json")]
    wanted = direct_scores(run, texts(50, 3))
    best = sorted(sorted(range(50), key=lambda i: -wanted[i])[:25])
    assert [line["id"] for line in lines] == best
    call(run, f"{folder}/a.txt,{folder}/b.txt.gz", tmp_path / "text", format="documents", keep_fraction=1)
    names = sorted(path.name for path in (tmp_path / "text" / "selected").iterdir())
    assert names == ["00000-a.txt", "00001-b.txt.gz"]
    plain = [line for line in (folder / "a.txt").read_text().split("\n") if line]
    assert lines_in(tmp_path / "text") == [*plain, *(f"{line}\r" for line in texts(30, 2))]


def test_large_file_in_both_formats(run: Path, tmp_path: Path) -> None:
    """Over several blocks of lines, both formats keep the same documents; ties are cut exactly."""
    made = [f"{i % 7:040d}" if i % 3 else "" for i in range(60_000)]
    (tmp_path / "big.txt").write_text("\n".join(made) + "\n")
    call(run, tmp_path / "big.txt", tmp_path / "table", keep_count=12_345, batch_size=2048)
    given: dict[str, object] = {"scores": tmp_path / "table" / "scores", "format": "documents"}
    before = everything(tmp_path / "table")
    call(run, tmp_path / "big.txt", tmp_path / "lines", keep_count=12_345, **given)
    assert everything(tmp_path / "table") == before
    kept = [row["document"] for row in rows_in(tmp_path / "table") if row["kept"]]
    assert len(kept) == 12_345
    assert [made[i] for i in kept] == lines_in(tmp_path / "lines")
    assert any(0 < sum(made[i] == text for i in kept) < made.count(text) for text in set(made)), "no tie was cut"


def test_whole_files_arrays_and_other_sources(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "FILES_IN_PART", 2)
    (tmp_path / "files").mkdir()
    for i, text in enumerate(texts(5, 8)):
        (tmp_path / "files" / f"{i}.txt").write_text(f"{text}\nend")
    given: dict[str, object] = {"documents": "file", "keep_count": 3}
    call(run, tmp_path / "files", tmp_path / "a", **given)
    rows = rows_in(tmp_path / "a")
    assert [Path(row["file"]).name for row in rows] == [f"{i}.txt" for i in range(5)]
    np.testing.assert_allclose(
        [row["score"] for row in rows], direct_scores(run, [f"{x}\nend" for x in texts(5, 8)]), rtol=1e-4, atol=1e-4
    )
    (tmp_path / "blanks").mkdir()
    for name, text in (("0", ""), ("1", texts(1, 8)[0]), ("2", " \n"), ("3", "\n")):
        (tmp_path / "blanks" / f"{name}.txt").write_text(text)
    call(run, tmp_path / "blanks", tmp_path / "e", documents="file", keep_count=1)
    assert [Path(row["file"]).name for row in rows_in(tmp_path / "e")] == ["1.txt"]
    call(run, tmp_path / "files", tmp_path / "b", format="documents", **given)
    records = [json.loads(line) for line in lines_in(tmp_path / "b")]
    assert [record["file"] for record in records] == [row["file"] for row in rows if row["kept"]]
    assert all(record["text"] == Path(record["file"]).read_text() for record in records)
    np.save(tmp_path / "x.npy", np.array(texts(6, 9)))
    call(run, tmp_path / "x.npy", tmp_path / "c", format="documents", keep_fraction=1)
    assert [json.loads(line)["text"] for line in lines_in(tmp_path / "c")] == texts(6, 9)
    call(run, "python:topics", tmp_path / "d", format="documents", keep_count=5)
    topics = [document.text.decode() for document in open_source("python:topics").read()]
    records = [json.loads(line) for line in lines_in(tmp_path / "d")]
    assert [topics[record["document"]] for record in records] == [record["text"] for record in records]


def test_drawn_selection(run: Path, folder: Path, tmp_path: Path) -> None:
    kept = {}
    for name, given in {"a": {}, "again": {}, "seed": {"seed": 1}, "cold": {"temperature": 1e-4}}.items():
        more: dict[str, object] = {"rule": "gumbel", "scores": tmp_path / "scores", "keep_count": 20, **given}
        call(run, folder / "a.txt", tmp_path / name, **more)
        kept[name] = [row["document"] for row in rows_in(tmp_path / name) if row["kept"]]
    call(run, folder / "a.txt", tmp_path / "top", scores=tmp_path / "scores", keep_count=20)
    top = [row["document"] for row in rows_in(tmp_path / "top") if row["kept"]]
    assert all(len(x) == 20 for x in kept.values())
    assert kept["a"] == kept["again"] != kept["seed"]
    assert kept["cold"] == top != kept["a"]


def command(*arguments: str, before: str = "") -> subprocess.Popen[str]:
    code = f"{before}\nimport sys\nfrom bilevel.cli import main\nmain(['select', *sys.argv[1:]])"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_killed_and_continued(run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while the second file is scored, then while it is written: in the end, the same bytes; nothing done twice."""
    more = [folder / name for name in ("a.txt", "b.txt.gz", "d.txt")]
    more[2].write_text("\n".join(texts(25, 4)) + "\n")
    given = ",".join(map(str, more)), tmp_path / "out"
    call(run, given[0], tmp_path / "whole")
    times: dict[Path, int] = {}
    for count, finished in ((2, ["scores/00000-a.txt.parquet"]), (4, ["selected/00000-a.txt.parquet"])):
        process = command(*flags(run, *given), before=KILL_AFTER_WRITES.format(count=count))
        _, error = process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL, error
        assert list((tmp_path / "out").rglob(".*.tmp"))
        for name in finished:
            times[tmp_path / "out" / name] = (tmp_path / "out" / name).stat().st_mtime_ns
        assert not (tmp_path / "out" / "selected" / "00001-b.txt.gz.parquet").exists()
    scored = sorted((tmp_path / "out" / "scores").glob("*.parquet"))
    assert len(scored) == 3
    monkeypatch.setattr(ScoreFiles, "score", None)  # all scores are there
    call(run, *given)
    assert all(path.stat().st_mtime_ns == before for path, before in times.items())
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")


def test_a_changed_file_is_scored_again(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = f"{folder}/a.txt,{folder}/b.txt.gz"
    call(run, spec, tmp_path / "out")
    first = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "scores").glob("*.parquet")}
    (folder / "a.txt").write_text("\n".join(texts(9, 11)))
    call(run, spec, tmp_path / "out")
    assert "a.txt changed after it was scored" in capsys.readouterr().err
    second = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "scores").glob("*.parquet")}
    assert {name for name in first if first[name] != second[name]} == {"00000-a.txt.parquet"}
    rows = rows_in(tmp_path / "out")
    assert len(rows) == 39
    assert sum(row["kept"] for row in rows) == 10


def large(folder: Path, seconds: int, text: str = "ab") -> Path:
    """A folder with a file of over 1 MiB and a small one; its first bytes and its times say which copy it is."""
    folder.mkdir()
    lines = [" ".join([text[i % 2]] * 500) + "\n" for i in range(1200)]
    (folder / "a.txt").write_text("".join(lines))
    (folder / "b.txt").write_text("the cat\non a mat\n")
    for path in folder.iterdir():
        os.utime(path, (seconds, seconds))
    return folder


@pytest.mark.slow
def test_a_change_that_samples_do_not_show_is_noticed(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = large(tmp_path / "corpus", 1_000_000)
    call(run, folder, tmp_path / "out", format="documents", keep_fraction=1.0)
    text = bytearray((folder / "a.txt").read_bytes())
    place = len(text) // 4
    text[place : place + 1] = b"x"
    (folder / "a.txt").write_bytes(text)
    call(run, folder, tmp_path / "out", format="documents", keep_fraction=1.0)
    assert "a.txt changed after it was scored" in capsys.readouterr().err
    found = next((tmp_path / "out" / "selected").glob("*a.txt"))
    assert found.read_bytes() == text


def test_a_file_that_is_gone_is_not_a_full_disk(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = large(tmp_path / "corpus", 1_000_000)

    def gone(part: Part) -> str:
        (folder / "a.txt").unlink(missing_ok=True)
        return ""

    monkeypatch.setattr(Part, "content", gone)
    with pytest.raises(SystemExit):
        call(run, folder / "a.txt", tmp_path / "out")
    error = capsys.readouterr().err
    assert f"Cannot read {folder / 'a.txt'} (No such file or directory)" in error
    assert not list((tmp_path / "out" / "scores").glob("*.parquet"))


def test_blank_files_of_lines_are_nothing(run: Path, folder: Path, tmp_path: Path) -> None:
    for name in ("d.txt", "e.txt.gz", "f.txt"):
        (folder / name).write_bytes(b"")
    (folder / "f.txt").write_text(" \n\n")
    (folder / "c.jsonl.gz").unlink()
    call(run, folder, tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [file["documents"] for file in summary["files"]] == [38, 30, 0, 0, 0]


def test_too_high_a_count_is_told_and_can_be_lowered(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(capsys, run, folder / "a.txt", tmp_path / "out", keep_count=39)
    call(run, folder / "a.txt", tmp_path / "out", keep_count=38)
    assert all(row["kept"] for row in rows_in(tmp_path / "out"))


def refused(capsys: pytest.CaptureFixture[str], run: Path, corpus: object, output: Path, **given: object) -> str:
    """What the user is told."""
    with pytest.raises(SystemExit) as stop:
        call(run, corpus, output, **given)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert "\n" not in error
    return error


BAD_FLAGS: dict[str, tuple[dict[str, object], str]] = {
    "both": (
        {"keep_fraction": 0.1, "keep_count": 3},
        "Found --keep-fraction and --keep-count: give exactly one of --keep-fraction, --keep-count, --keep-quantile",
    ),
    "fraction": ({"keep_fraction": 1.5}, "--keep-fraction 1.5 must lie in (0, 1]"),
    "count": ({"keep_count": 0}, "--keep-count 0 must be at least 1"),
    "tasks": ({"tasks": 2}, "--tasks is for --executor"),
    "no partition": ({"executor": "slurm", "slurm.time": "1:00:00"}, "--executor slurm needs --slurm.partition"),
    "slurm": ({"executor": "ray", "slurm.partition": "cpu"}, "Flags --slurm.… are for --executor slurm"),
    "processors": ({"executor": "slurm", "slurm.cpus-per-task": 0}, "--slurm.cpus-per-task 0 must be at least 1"),
    "batch": ({"batch_size": 0}, "--batch-size 0"),
    "temperature": ({"temperature": 0}, "--temperature 0.0 must be greater than 0"),
    "more than there are": ({"keep_count": 39}, "--keep-count 39 is more than the 38 documents"),
    "no such file": ({"corpus": "nowhere.txt"}, "--corpus: The file nowhere.txt does not exist"),
    "no match": ({"corpus": "nowhere/*.txt"}, "No file matches nowhere/*.txt"),
    "blank": ({"corpus": "BLANK"}, "blank.txt holds no text"),
    "blank files": ({"corpus": "BLANK", "documents": "file"}, "blank.txt holds no text"),
    "output": ({"output": "BELOW"}, "give another --output"),
    "scores": ({"scores": "BELOW"}, "give another --scores"),
}


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags(name: str, run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "blank.txt").write_text("\n \n\n")
    places = {"BLANK": tmp_path / "blank.txt", "BELOW": folder / "a.txt" / "below"}
    given = {flag: places.get(str(value), value) for flag, value in BAD_FLAGS[name][0].items()}
    chosen: dict[str, Any] = {"corpus": folder / "a.txt", "output": tmp_path / "out", **given}
    assert BAD_FLAGS[name][1] in refused(capsys, run, **chosen)


def test_neither_flag(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["select", "--weights", str(run), "--corpus", "x", "--output", str(tmp_path)])
    assert "Found no flag that says how many documents to keep" in capsys.readouterr().err


def test_bad_weights(trained: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told(run: Path, **given: object) -> str:
        return refused(capsys, run, folder / "a.txt", tmp_path / "out", **given)

    assert "is not the directory of a run" in told(tmp_path / "nothing")
    good = make_run(tmp_path / "runs" / "soba-seed0", trained)
    weights = good / "weights.safetensors"
    assert "give one of the runs in it, soba-seed0" in told(tmp_path / "runs")
    other = make_run(tmp_path / "other", trained, weighting="conv")
    (other / "config.yaml").write_text((good / "config.yaml").read_text())
    assert "weights.safetensors does not fit" in told(other)
    (other / "config.yaml").write_text(json.dumps({"format": 1, "method": "soba"}))
    assert "names no task" in told(other)
    tree, _ = load_tree(weights)
    save_tree(weights, jax.tree.map(lambda x: np.full_like(x, np.nan), tree))
    assert "gives nan for document 0" in told(good)
    weights.write_bytes(b"cut off")
    assert "cannot be read as a safetensors file" in told(good)
    weights.unlink()
    assert "it is not finished: continue it" in told(good)
    shutil.copy(trained / "result.json", good)
    (good / "config.yaml").write_text((good / "config.yaml").read_text().replace("method: soba", "method: uniform"))
    assert "uniform leaves nothing that scores rows" in told(good)


def test_the_network_of_the_best_evaluation(
    trained: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "soba-seed0", trained)
    assert "give --at end" in refused(capsys, run, folder / "a.txt", tmp_path / "out", at="best")
    better = make_run(tmp_path / "other", trained, seed=1) / "weights.safetensors"
    shutil.copy(better, run / "weights_best.safetensors")
    for at in ("end", "best"):
        call(run, folder / "a.txt", tmp_path / at, at=at)
    call(better.parent, folder / "a.txt", tmp_path / "alone")
    last, best, alone = (rows_in(tmp_path / name) for name in ("end", "best", "alone"))
    assert [row["score"] for row in best] == [row["score"] for row in alone] != [row["score"] for row in last]


OWN = """
import dataclasses
from bilevel.tasks.language_modeling import LanguageModeling
class Own(LanguageModeling):
    name = "own"
    config = dataclasses.make_dataclass("Settings", [], bases=(LanguageModeling.config,), frozen=True)
TASK = Own()
"""


def test_other_tasks(trained: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A task of one's own is named by its file; one whose rows are not documents is refused."""
    (tmp_path / "own_task.py").write_text(OWN)
    own = make_run(tmp_path / "own", trained, task="own")
    given = own, folder / "a.txt", tmp_path / "out"
    assert "run of the task own, which does not come with bilevel: name its file" in refused(capsys, *given)
    assert "is of the task own, not of language_modeling: give that task" in refused(
        capsys, *given, task="language_modeling"
    )
    call(*given, task=tmp_path / "own_task.py")
    call(make_run(tmp_path / "same", trained), folder / "a.txt", tmp_path / "same_out")
    assert rows_in(tmp_path / "out") == rows_in(tmp_path / "same_out")
    rows = make_run(tmp_path / "rows", trained, task="tabular")
    assert "whose rows are not documents" in refused(capsys, rows, folder / "a.txt", tmp_path / "new")


def test_other_settings_are_refused(
    trained: Path, run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    call(run, folder / "a.txt", out)
    before = everything(out)
    error = refused(capsys, run, folder / "a.txt", out, keep_count=11)
    assert "other settings (choice.keep_count was 10, now 11): give another --output" in error
    assert "network.parameters was" in refused(capsys, make_run(tmp_path / "b", trained, seed=1), folder / "a.txt", out)
    assert "files.count was 1, now 2" in refused(capsys, run, f"{folder}/a.txt,{folder}/b.txt.gz", out)
    given: dict[str, object] = {"scores": out / "scores", "documents": "file"}
    assert 'documents was "line", now "file"' in refused(capsys, run, folder / "a.txt", tmp_path / "new", **given)
    assert everything(out) == before


def test_settings_with_which_nothing_was_scored_do_not_bind(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "latin.txt"
    bad.write_bytes(b"caf\xe9\n")
    assert "is not UTF-8" in refused(capsys, run, bad, tmp_path / "out")
    call(run, folder / "a.txt", tmp_path / "out")
    assert (tmp_path / "out" / "scores" / "config.yaml").exists()


def test_damaged_scores_are_made_again(run: Path, folder: Path, tmp_path: Path) -> None:
    call(run, folder / "a.txt", tmp_path / "out")
    before = everything(tmp_path / "out")
    file = tmp_path / "out" / "scores" / "00000-a.txt.parquet"
    for content in (b"", file.read_bytes()[:-20]):
        file.write_bytes(content)
        call(run, folder / "a.txt", tmp_path / "out")
        assert everything(tmp_path / "out") == before


def test_temporary_files_are_removed(run: Path, folder: Path, tmp_path: Path) -> None:
    """All of this process; of others, only those that nobody has written to for a day."""
    names = [".00000-a.txt.parquet.1.tmp", ".00000-a.txt.parquet.2.tmp", ".mine.tmp"]
    (tmp_path / "out" / "scores").mkdir(parents=True)
    for name in names:
        (tmp_path / "out" / "scores" / name).touch()
    for name in names[1:]:
        os.utime(tmp_path / "out" / "scores" / name, (0, 0))
    call(run, folder / "a.txt", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").rglob(".*")} == {names[0], names[2], ".lock"}
