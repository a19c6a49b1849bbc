"""Prompts before documents: read of their own field, and given instead of predicted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from bilevel.data.digests import Document, Source, digest


def prompted(answers: Source, prompts: Source) -> Source:
    """Return a source of prompts with their answers behind them.

    Args:
        answers: the documents; one whose answer is blank is blank.
        prompts: the same records, read of another field.
    """

    def read() -> Iterator[Document]:
        for answer, prompt in zip(answers.read(), prompts.read(), strict=True):
            both = Document(prompt.text + answer.text, answer.label, len(prompt.text))
            yield both if answer.text else Document(b"")

    return dataclasses.replace(
        answers, read=read, identify=lambda: digest(["prompted", answers.fingerprint(), prompts.fingerprint()])
    )
