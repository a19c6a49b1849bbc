"""The flags of the selection."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat

from bilevel.study.weights import At
from bilevel.training.settings import Count, Share, check_bounds
from bilevel.types import UserError


@dataclass(frozen=True)
class Config:
    """Select the documents of a corpus that a trained weighting network prefers.

    Scores every document with the network of a finished run, and keeps a stated share or number of them. The score of a
    document is the mean of the network's logits over the rows that the run's task cuts it into, weighted by their bytes; blank
    documents are not scored and never kept.

    The same command continues a selection that was stopped or killed. Several processes share the work: start the same
    command once for each, with --shards N and --shard 0 … N-1.
    """

    weights: Path
    """Directory METHOD-seedN of a finished run, whose weighting network scores."""
    corpus: str
    """What to select from: files, globs or folders, comma-separated (plain text or JSON lines, gzipped or not; arrays in
    .npy or .npz), tfds:NAME[:SPLIT[:FIELD]], or python:stdlib."""
    output: Path
    """Directory where everything is written."""
    at: At = "end"
    """The network at the run's end, or at the evaluation that was best on valid."""
    task: str | None = None
    """Name or file of the run's task, where it is your own (default: as the run says)."""
    field: str | None = None
    """Name of the text field of JSON lines (default: text)."""
    documents: Literal["line", "file"] = "line"
    """Whether a line or a whole file of plain text is one document."""
    format: Literal["parquet", "documents"] = "parquet"
    """parquet: a table of all documents with columns file, document (number in its file, from 0, blank ones counted), bytes,
    score and kept; documents: the kept documents, as the original lines, or as JSON lines where documents are not lines."""
    keep_fraction: Share | None = None
    """Share of the documents to keep, rounded to a whole number of at least 1. Give this or --keep-count."""
    keep_count: Count | None = None
    """Number of documents to keep."""
    rule: Literal["top", "gumbel"] = "top"
    """top: those with the highest scores (ties: the first in the corpus); gumbel: drawn without replacement, with
    probabilities proportional to exp(score / temperature), as training draws its batches."""
    temperature: PositiveFloat = 1.0
    """With --rule gumbel: higher is closer to uniform."""
    seed: NonNegativeInt = 0
    """With --rule gumbel: decides the draw, together with the positions of a document's file and of the document in it."""
    scores: Path | None = None
    """Where scores are kept (default: OUTPUT/scores). Give those of an earlier selection to choose again without scoring."""
    batch_size: Count = 1024
    """Rows scored in one program call."""
    shard: int = 0
    """Number of this process, from 0: it takes every SHARDS-th file."""
    shards: Count = 1
    """Number of processes that share the work."""
    wait: float = 0.0
    """Seconds to wait for the scores of other shards; without them the same command has to be given again later."""
    progress: bool = True
    """Show the progress."""

    def check(self) -> None:
        """Refuse flags that contradict each other or are out of range, by a `UserError`."""
        if (self.keep_fraction is None) == (self.keep_count is None):
            found = "neither" if self.keep_count is None else "both"
            raise UserError(f"Found {found} of --keep-fraction and --keep-count: give exactly one of them.")
        check_bounds(self)
        if not 0 <= self.shard < self.shards:
            raise UserError(
                f"--shard {self.shard} --shards {self.shards}: number the processes from 0 to one less than --shards."
            )
