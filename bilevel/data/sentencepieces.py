"""Opening sentencepiece models."""

from __future__ import annotations

from typing import Any

from bilevel.types import UserError


def sentencepiece(extra: str = "translation") -> Any:
    """Return the package; a UserError says how to install it, by which of our extras."""
    try:
        import sentencepiece
    except ImportError as error:
        raise UserError(f"Tokenizers need sentencepiece: run `pip install 'bilevel[{extra}]'`.") from error
    return sentencepiece


def processor_of(model: bytes, name: str, instead: str, extra: str = "translation") -> Any:
    """Return the processor of a sentencepiece model.

    Args:
        model: the bytes of a `.model` file.
        name: for messages.
        instead: what `--data.tokenizer` takes beside such a file, for messages.
        extra: as for `sentencepiece`.

    Raises:
        UserError: it is no such model.
    """
    try:
        return sentencepiece(extra).SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise UserError(
            f"{name} is not a sentencepiece model ({str(error)[:100]}); give a .model file as --data.tokenizer, or "
            f"{instead}."
        ) from error
