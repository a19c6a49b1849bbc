"""Selected text compared: DSIR and a fastText classifier, as published, beside what `bilevel select` keeps.

    pip install -e ".[experiments,baselines]"
    python -m benchmarks.selection_baselines --data-dir DATA --run-dir runs/baselines \
      [--sets rct_abstracts] [--documents 300 100] [--seeds 0] [--selectors random dsir fasttext classifier soba] [--steps 3000]

DATA holds lm/generic and lm/specific. For each seed, specific set and number of target documents, each selector keeps a tenth
of the generic documents; `bilevel compare language_modeling --compare uniform` trains the same model on them, and fine-tunes
it on the target documents. Target documents are drawn from the set's train by the seed; valid and test are whole.

The same command continues where it stopped, finished parts are kept; `--no-run` prints the tables of what is there. Seconds
are those of the commands, processor and wall, the start of Python included: learning what scores, and scoring with selecting.

References: Xie, Santurkar, Ma, Liang, "Data Selection for Language Models via Importance Resampling", NeurIPS 2023 (DSIR, by
the authors' package). Li et al., "DataComp-LM: In search of the next generation of training sets for language models", 2024
(the fastText classifier: target documents against as many random ones, word bigrams, the highest scores).
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import os
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from bilevel.types import UserError

say = partial(print, file=sys.stderr, flush=True)
Selector = Literal[
    "random", "dsir", "fasttext", "fasttext_long", "classifier", "soba", "soba_gumbel", "warm_soba", "warm_soba_gumbel"
]  # fmt: skip
Name = Literal["rct_abstracts", "reuters", "kjv_bible"]
LEARNED = ("classifier", "soba", "warm_soba")
"""Methods whose weighting networks select."""
LONG_EXAMPLES, LONG_RATE = 100_000, 0.5
"""fasttext_long: examples seen in training, at least, and the learning rate; fastText's defaults are 5 epochs and 0.1."""
LOSSES = ("test_loss", "finetuned_test_loss")
SEED_OF_TARGETS, SEED_OF_RANDOM, SEED_OF_NEGATIVES = 1_000, 2_000, 3_000
"""Added to the seed, so that the draws differ."""


def _data_dir() -> Path:
    return Path(os.environ["BILEVEL_DATA"]) if "BILEVEL_DATA" in os.environ else tyro.MISSING


@dataclass(frozen=True)
class BaselinesConfig:
    """What to select from, by what, and for which targets."""

    data_dir: Path = dataclasses.field(default_factory=_data_dir)
    """Folder that holds lm/generic and lm/specific (default: the variable BILEVEL_DATA)."""
    run_dir: Path = Path("runs/baselines")
    """Where everything is kept."""
    sets: tuple[Name, ...] = ("rct_abstracts", "reuters", "kjv_bible")
    """Specific sets."""
    documents: tuple[int, ...] = (10_000, 1_000, 300, 100)
    """Numbers of target documents."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the target documents, of all draws and of training."""
    selectors: tuple[Selector, ...] = ("random", "dsir", "fasttext", "fasttext_long", "classifier", "soba", "warm_soba")
    """What selects. fasttext_long: fastText with a higher learning rate and more epochs; …_gumbel: drawn by the scores."""
    keep: float = 0.1
    """Share of the generic documents that is kept."""
    steps: int = 6000
    """θ-updates on a selection, and in the run that learns the weights of soba and warm_soba."""
    finetune_steps: int = 1000
    """Most updates on the target documents after it."""
    flags: str = "--resident always --steps-per-call 50"
    """More flags of all runs of bilevel compare language_modeling."""
    run: bool = True
    """Select and train what is missing; otherwise only print the tables."""


@dataclass(frozen=True)
class Case:
    """One seed, specific set and number of target documents."""

    config: BaselinesConfig
    name: str
    documents: int
    seed: int

    @property
    def folder(self) -> Path:
        """Where its selections and runs are kept."""
        return self.config.run_dir / f"{self.name}-{self.documents}-seed{self.seed}"

    @property
    def target(self) -> Path:
        """The specific set of the runs."""
        return self.folder / "target"

    @property
    def generic(self) -> Path:
        """The generic text."""
        return self.config.data_dir / "lm" / "generic" / "train.txt.gz"

    def rng(self, use: int) -> np.random.Generator:
        """Return the draws of a use."""
        return np.random.default_rng(self.seed + use)


class Seconds(dict[str, float]):
    """Processor and wall seconds of what runs in a `with` block, processes that it starts and waits for included."""

    def __enter__(self) -> Seconds:
        self._began = self._now()
        return self

    def __exit__(self, *error: object) -> None:
        self.update({name: now - self._began[name] for name, now in self._now().items()})

    @staticmethod
    def _now() -> dict[str, float]:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return {"processor": sum(use.ru_utime + use.ru_stime for use in used), "wall": time.perf_counter()}


def main(config: BaselinesConfig) -> None:
    """Select, train and print the tables."""
    cases = [
        Case(config, name, documents, seed)
        for seed in config.seeds for name in config.sets for documents in config.documents
    ]  # fmt: skip
    if config.run:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        check_settings(config)
        for case in cases:
            write_target(case)
            for selector in config.selectors:
                train(case, selector, select(case, selector))
    print("\n\n".join(tables(config)))


def check_settings(config: BaselinesConfig) -> None:
    """Refuse a run directory that was begun with other settings."""
    file, names = config.run_dir / "settings.json", ("keep", "steps", "finetune_steps", "flags")
    settings = {name: getattr(config, name) for name in names}
    if not file.exists():
        write_json(file, settings)
    elif (found := json.loads(file.read_text())) != settings:
        raise UserError(f"{file} was written with {found}, not {settings}: give another --run-dir.")


def write_json(file: Path, content: Any) -> None:
    """Write a file in one piece."""
    beside = file.with_suffix(".part")
    beside.write_text(json.dumps(content, indent=2) + "\n")
    beside.replace(file)


def lines(file: Path) -> list[str]:
    """Return the documents of a text file, compressed or not."""
    data = file.read_bytes()
    text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode()
    return text.removesuffix("\n").split("\n")  # splitlines would also split within documents


def write_lines(file: Path, documents: Sequence[str]) -> None:
    """Write documents to a text file."""
    file.write_text("".join(f"{document}\n" for document in documents), encoding="utf-8", newline="\n")


def write_target(case: Case) -> None:
    """Write the specific set: the target documents, drawn from train, and valid and test as they are."""
    source, train = case.config.data_dir / "lm" / "specific" / case.name, case.target / "train.txt"
    if train.exists():
        return
    case.target.mkdir(parents=True, exist_ok=True)
    found = lines(source / "train.txt.gz")
    if case.documents > len(found):
        say(f"note: {case.name} has {len(found):,} training documents, not {case.documents:,}: all are taken.")
    order = case.rng(SEED_OF_TARGETS).permutation(len(found))[: case.documents]
    for part in ("valid", "test"):
        shutil.copyfile(source / f"{part}.txt.gz", case.target / f"{part}.txt.gz")
    write_lines(train, [found[i] for i in sorted(order)])


def select(case: Case, selector: Selector) -> Path:
    """Return the file with what a selector keeps; it is written once."""
    folder = case.folder / selector
    file, note = folder / "selected.txt", folder / "selected.json"
    if note.exists():
        return file
    shutil.rmtree(folder, ignore_errors=True)  # a part of a selection that was stopped
    folder.mkdir(parents=True)
    say(f"{case.folder.name}: {selector} selects")
    if selector.removesuffix("_gumbel") in LEARNED:
        kept, seconds = by_network(case, selector, folder)
    else:
        kept, seconds = SELECTING[selector](case, folder)
    write_lines(file, kept)
    write_json(note, {"kept": len(kept), "seconds": seconds})
    return file


def to_keep(case: Case, generic: Sequence[str]) -> int:
    """Return how many documents are kept."""
    return max(1, round(case.config.keep * len(generic)))


def by_chance(case: Case, folder: Path) -> tuple[list[str], dict[str, Any]]:
    """Keep random documents."""
    with Seconds() as scoring:
        generic = lines(case.generic)
        places = case.rng(SEED_OF_RANDOM).permutation(len(generic))[: to_keep(case, generic)]
    return [generic[i] for i in sorted(places)], {"learning": {}, "scoring": scoring}


def by_dsir(case: Case, folder: Path) -> tuple[list[str], dict[str, Any]]:
    """Keep what DSIR draws: hashed n-grams by the package's defaults, and documents of any length.

    By default the package leaves out documents of fewer than 100 tokens, four fifths of these.
    """
    with needs("data_selection"):
        from data_selection import HashedNgramDSIR  # pyright: ignore[reportMissingImports]

    def load(path: str) -> Iterator[str]:
        yield from lines(Path(path))

    with Seconds() as learning:
        dsir = HashedNgramDSIR(
            [str(case.generic)], [str(case.target / "train.txt")], cache_dir=str(folder / "cache"),
            raw_load_dataset_fn=load, raw_parse_example_fn=str, target_load_dataset_fn=load,
            target_parse_example_fn=str, num_proc=1, min_example_length=0,
        )  # fmt: skip
        dsir.fit_importance_estimator()
    with Seconds() as scoring:
        dsir.compute_importance_weights()
        np.random.seed(case.seed)  # noqa: NPY002 (the package draws by numpy's global state)
        dsir.resample(str(folder / "drawn"), to_keep(case, lines(case.generic)), cache_dir=str(folder / "resampled"))
    files = sorted((folder / "drawn").rglob("*.jsonl"))
    kept = [json.loads(line) for file in files for line in lines(file)]
    return kept, {"learning": learning, "scoring": scoring}


def by_fasttext(case: Case, folder: Path, long: bool = False) -> tuple[list[str], dict[str, Any]]:
    """Keep the highest scores of a fastText classifier of target documents against as many random generic ones."""
    with needs("fasttext"):
        import fasttext  # pyright: ignore[reportMissingImports]

    with Seconds() as learning:
        generic, target = lines(case.generic), lines(case.target / "train.txt")
        count = min(len(target), len(generic))
        negatives = case.rng(SEED_OF_NEGATIVES).permutation(len(generic))[:count]
        examples = [f"__label__target {text}" for text in target]
        examples += [f"__label__generic {generic[i]}" for i in negatives]
        write_lines(folder / "examples.txt", [examples[i] for i in case.rng(0).permutation(len(examples))])
        epochs = max(5, -(-LONG_EXAMPLES // len(examples)))
        more = {"epoch": epochs, "lr": LONG_RATE} if long else {}
        model = fasttext.train_supervised(str(folder / "examples.txt"), wordNgrams=2, thread=1, verbose=0, **more)
    with Seconds() as scoring:
        labels, chances = model.predict(generic, k=2)
        scores = [dict(zip(*pair, strict=True))["__label__target"] for pair in zip(labels, chances, strict=True)]
        places = np.argsort(-np.asarray(scores), kind="stable")[: to_keep(case, generic)]
    return [generic[i] for i in sorted(places)], {"learning": learning, "scoring": scoring}


def by_network(case: Case, selector: str, folder: Path) -> tuple[list[str], dict[str, Any]]:
    """Keep what `bilevel select` keeps by a weighting network, which is learned once for all selectors of a method."""
    method = selector.removesuffix("_gumbel")
    learned, note = case.folder / "learned" / method, case.folder / "learned" / f"{method}.json"
    if not note.exists():
        shutil.rmtree(learned, ignore_errors=True)  # its seconds would be those of a part
        steps = (
            1 if method == "classifier" else case.config.steps
        )  # it is trained before the model, which is not needed
        with Seconds() as learning:
            compare(case, method, case.generic, learned, "--steps", str(steps))
        write_json(note, learning)
    with Seconds() as scoring:
        command(
            "select", "--weights", f"{learned / method}-seed{case.seed}", "--corpus", str(case.generic),
            "--output", str(folder / "select"), "--keep-fraction", str(case.config.keep), "--format", "documents",
            "--seed", str(case.seed), "--no-progress", "--rule", "gumbel" if selector.endswith("_gumbel") else "top",
        )  # fmt: skip
    (file,) = (folder / "select" / "selected").glob("*.txt.gz")
    return lines(file), {"learning": json.loads(note.read_text()), "scoring": scoring}


SELECTING: dict[str, Callable[[Case, Path], tuple[list[str], dict[str, Any]]]] = {
    "random": by_chance,
    "dsir": by_dsir,
    "fasttext": by_fasttext,
    "fasttext_long": lambda case, folder: by_fasttext(case, folder, long=True),
}
"""Selectors that are no weighting networks."""


@contextlib.contextmanager
def needs(module: str) -> Iterator[None]:
    """Say which extra brings a module that is missing."""
    try:
        yield
    except ImportError as error:
        raise UserError(f'{module} cannot be imported ({error}): pip install -e ".[baselines]".') from error


def train(case: Case, selector: str, selected: Path) -> None:
    """Train on a selection, drawn uniformly, and fine-tune on the target documents."""
    run = case.folder / selector / "model"
    if result(case, selector) is None:
        say(f"{case.folder.name}: training on what {selector} kept")
        config = case.config
        steps = ("--steps", str(config.steps), "--finetune.steps", str(config.finetune_steps))
        compare(case, "uniform", selected, run, *steps)


def compare(case: Case, method: str, generic: Path, run: Path, *flags: str) -> None:
    """Run `bilevel compare language_modeling` with one method."""
    command(
        "compare", "language_modeling", "--compare", method, "--seed", str(case.seed), "--seeds", "1",
        "--data.generic", str(generic), "--data.specific", str(case.target), "--run-dir", str(run),
        "--data.cache-dir", str(case.config.run_dir / "packed"), "--no-progress",
        *shlex.split(case.config.flags), *flags,
    )  # fmt: skip


def command(*arguments: str) -> None:
    """Run a command of bilevel; its output goes to stderr."""
    done = subprocess.run([sys.executable, "-m", "bilevel.cli", *arguments], stdout=sys.stderr)
    if done.returncode:
        raise UserError(
            f"bilevel {shlex.join(arguments)} ended with exit code {done.returncode}: see what it said above."
        )


def result(case: Case, selector: str) -> dict[str, float] | None:
    """Return the losses of a finished training, before and after fine-tuning; None before its end."""
    run = case.folder / selector / "model" / f"uniform-seed{case.seed}"
    files = [run / "result.json", run / "finetuned.json"]
    if not all(file.exists() for file in files):
        return None
    trained, finetuned = (json.loads(file.read_text()) for file in files)
    found = trained | finetuned["results"]
    return {name: found[name] for name in LOSSES}


def tables(config: BaselinesConfig) -> Iterator[str]:
    """Yield a table of losses for each number of documents, and one of seconds."""
    heads = [cell for name in config.sets for cell in (name, "fine-tuned")]
    for documents in config.documents:
        rows = []
        for selector in config.selectors:
            cells = []
            for name in config.sets:
                cases = [Case(config, name, documents, seed) for seed in config.seeds]
                found = [each for case in cases if (each := result(case, selector))]
                for measure in LOSSES:
                    cells.append(summary([each[measure] for each in found], len(config.seeds), 3))
            rows.append([selector, *cells])
        yield table([f"{documents:,} documents", *heads], rows)
    heads = ["learning, processor seconds", "wall", "scoring and selecting, processor seconds", "wall"]
    rows = []
    for selector in config.selectors:
        notes = sorted(config.run_dir.glob(f"*-seed*/{selector}/selected.json"))
        found = [json.loads(note.read_text())["seconds"] for note in notes]
        parts = [
            [each[part].get(kind, 0.0) for each in found]
            for part in ("learning", "scoring")
            for kind in ("processor", "wall")
        ]
        rows.append([selector, *(summary(part, len(part), 0) for part in parts)])
    yield table(["all selections", *heads], rows)


def summary(values: Sequence[float], wanted: int, digits: int) -> str:
    """Return mean ± standard deviation, and in brackets the number of values where it is not the wanted one."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}{'' if len(values) == wanted else f' ({len(values)})'}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows))


if __name__ == "__main__":
    try:
        main(tyro.cli(BaselinesConfig))
    except UserError as error:
        sys.exit(f"error: {error}")
