"""The flags of the selection."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat

from bilevel.offline.choice import KEEP, Rule
from bilevel.study.weights import At
from bilevel.training.settings import Count, Quantile, Share, check_bounds, flag_of, part_of
from bilevel.types import UserError

Format = Literal["parquet", "documents", "weights", "attributes"]
Executor = Literal["local", "slurm", "ray"]


@dataclass(frozen=True)
class Slurm:
    """What the jobs of --executor slurm ask for."""

    partition: str | None = None
    """Partition; Slurm needs one."""
    time: str = "24:00:00"
    """Longest time of a task, as hours:minutes:seconds."""
    cpus_per_task: Count = 1
    """Processors of a task."""
    memory: Count = 4
    """GB of memory for each processor."""
    qos: str | None = None
    """Quality of service (default: that of the cluster)."""
    account: str | None = None
    """Account that is charged (default: that of the user)."""
    setup: str | None = None
    """Shell command that makes bilevel available to a job, such as "source venv/bin/activate"."""


@dataclass(frozen=True)
class Config:
    """Select the documents of a corpus that a trained weighting network prefers.

    Scores every document with the network of a finished run, and keeps a stated share or number of them. The score of a
    document is the mean of the network's logits over the rows that the run's task cuts it into, weighted by their bytes; blank
    documents are not scored and never kept.

    The same command continues a selection that was stopped or killed. One process does all, or many do with --executor, which
    needs the extra [datatrove].
    """

    weights: Path
    """Directory METHOD-seedN of a finished run, whose weighting network scores."""
    corpus: str
    """What to select from: files, globs or folders, comma-separated (plain text, JSON lines, Parquet, Arrow, ArrayRecord, .npy
    or .npz; compressed or not; also by URL), folders that Hugging Face datasets saved, tfds:NAME[:SPLIT[:FIELD]], or
    python:stdlib."""
    output: Path
    """Directory where everything is written."""
    at: At = "end"
    """The network at the run's end, or at the evaluation that was best on valid."""
    task: str | None = None
    """Name or file of the run's task, where it is your own (default: as the run says)."""
    field: str | None = None
    """Name of the field or column with the text (default: text); meta.text is a field inside another, title,text are joined by
    a blank line."""
    id_field: str | None = None
    """Name of the field or column that identifies a document: a column id of tables and attributes (default: in attributes,
    the number of the document in its file, from 0)."""
    documents: Literal["line", "file"] = "line"
    """Whether a line or a whole file of plain text is one document."""
    format: Format = "parquet"
    """parquet: a table of all documents with columns file, document (number in its file, from 0, blank ones counted), bytes,
    score, quantile and kept; documents: the kept documents, in the format that they were read in, with all their fields;
    weights: likewise, with one more field weight; attributes: id, score, quantile and kept of every document, in the order and
    the format of its file."""
    keep_fraction: Share | None = None
    """Share of the documents to keep, rounded to a whole number of at least 1. Give this, --keep-count or --keep-quantile; with
    --format weights all are kept without."""
    keep_count: Count | None = None
    """Number of documents to keep."""
    keep_quantile: Quantile | None = None
    """Keep the documents whose quantile is at least this: 0.9 keeps a tenth, and all that share its lowest score. The quantile of
    a document is the share of the documents of the corpus with a lower score."""
    max_copies: Count | None = None
    """Keep at most this many documents of the same text, the first ones of the corpus (default: all that are chosen)."""
    max_per_group: Count | None = None
    """Keep at most this many documents of the same group, those with the highest scores, or drawn first (default: all that are
    chosen)."""
    group_field: str | None = None
    """With --max-per-group: name of the field or column that says which group a document is of, such as its site or author."""
    rule: Literal["top", "gumbel"] = "top"
    """top: those with the highest scores (ties: the first in the corpus); gumbel: drawn without replacement, with
    probabilities proportional to exp(score / temperature), as training draws its batches."""
    temperature: PositiveFloat = 1.0
    """With --rule gumbel or --format weights: higher is closer to uniform."""
    weight_field: str = "weight"
    """With --format weights: name of the new field. It holds exp(score / temperature), divided by its mean over the kept
    documents."""
    seed: NonNegativeInt = 0
    """With --rule gumbel: decides the draw, together with the positions of a document's file and of the document in it."""
    scores: Path | None = None
    """Where scores are kept (default: OUTPUT/scores). Give those of an earlier selection to choose again without scoring."""
    batch_size: Count = 1024
    """Rows scored in one program call."""
    executor: Executor | None = None
    """Share the work among processes of this machine, jobs of Slurm or tasks of Ray (the cluster of RAY_ADDRESS), by datatrove;
    the files that are written are the same. All must see --weights, --corpus and --output under the same paths."""
    tasks: Count | None = None
    """With --executor: number of tasks, of which each takes every TASKS-th file (default: as --workers, or one for each file, at
    most 1000)."""
    workers: Count | None = None
    """With --executor: most tasks that run at the same time (default: with local, the processors of this machine; else
    no limit)."""
    slurm: Slurm = Slurm()
    """What the jobs of --executor slurm ask for."""
    progress: bool = True
    """Show the progress."""

    def check(self) -> None:
        """Refuse flags that contradict each other or are out of range, by a `UserError`."""
        given = [flag_of(name) for name in KEEP if getattr(self, name) is not None]
        if len(given) > 1 or not (given or self.format == "weights"):
            found = " and ".join(given) or "no flag that says how many documents to keep"
            raise UserError(f"Found {found}: give exactly one of {', '.join(map(flag_of, KEEP))}.")
        check_bounds(self)
        if self.rule == "gumbel" and (self.keep_quantile is not None or self.format == "weights"):
            other = "--format weights" if self.format == "weights" else "--keep-quantile"
            raise UserError(
                f"--rule gumbel draws by the weights already, so it does not go with {other}: leave one of them out."
            )
        if self.id_field is not None and self.format in ("documents", "weights"):
            raise UserError(
                f"--id-field is for --format parquet and attributes; --format {self.format} keeps all fields: leave --id-field "
                "out."
            )
        if (self.group_field is None) != (self.max_per_group is None):
            found, other = (
                ("--max-per-group", "--group-field")
                if self.group_field is None
                else ("--group-field", "--max-per-group")
            )
            raise UserError(f"{found} needs {other}: give both, or neither.")
        given = [flag_of(name) for name in ("tasks", "workers") if getattr(self, name) is not None]
        if given and self.executor is None:
            raise UserError(f"{given[0]} is for --executor: give local, slurm or ray, or leave {given[0]} out.")
        if self.executor != "slurm" and self.slurm != Slurm():
            raise UserError("Flags --slurm.… are for --executor slurm: give it, or leave them out.")
        if self.executor == "slurm" and self.slurm.partition is None:
            raise UserError("--executor slurm needs --slurm.partition: give the name of one (sinfo lists them).")

    @property
    def choice(self) -> Rule:
        """How documents are chosen by their scores."""
        return part_of(Rule, self)
