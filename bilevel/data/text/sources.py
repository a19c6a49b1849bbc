"""Sources of text: files, TensorFlow Datasets, and text that comes with Python."""

from __future__ import annotations

from typing import Literal

from bilevel.data.digests import DOCUMENTS, Document, Options, Source
from bilevel.data.text.files import files_source, options_of_files
from bilevel.data.text.prompts import prompted
from bilevel.data.text.python import stdlib_source, topics_source
from bilevel.data.tfds import parse_spec, tfds_source
from bilevel.types import UserError

__all__ = ["Document", "Options", "Source", "open_source", "options_of"]


def open_source(
    spec: str,
    *,
    field: str | None = None,
    documents: Literal["line", "file"] = "line",
    blank_files: bool = False,
    prompt: str | None = None,
) -> Source:
    """Open a source of text.

    Args:
        spec: one of
            - a file, a folder, a glob, or several of these separated by commas; also by URL (`s3://`, `https://`, …: with
              fsspec and its package for that store). Files are plain text or JSON lines, under any name: the content says which.
              They may be compressed with gzip, bzip2, xz or zstd. Parquet, Arrow (.arrow, .feather) and ArrayRecord files hold
              a document a row. .npy and .npz files hold strings, or rows of bytes (uint8 `[n, T]`, zeros after the end). A
              folder gives all files directly in it whose suffix is in `FOLDER_SUFFIXES` (compressed or not), sorted by name;
              what else is in it is named on stderr, as are copies of a file;
            - a folder that Hugging Face `datasets` saved: its Arrow files;
            - `tfds:NAME[:SPLIT[:FIELD]]`, read through `tfds.data_source`; SPLIT is `train` by default. The
              environment variable TFDS_DATA_DIR says where the data are;
            - `python:stdlib`, the source code of the running Python's standard library, labelled by module;
            - `python:topics`, the Python language reference, labelled by topic.
        field: the field, column or array of a .npz file that holds the text, `text` by default; "meta.text" is a field inside
            another, and several separated by commas are joined by blank lines.
        documents: in plain text, whether a document is a line or a file.
        blank_files: take files without text as such, even where no file has text. (With documents="file", blank files among
            others always are blank documents.)
        prompt: the field that holds a prompt; the text field is then the answer behind it.

    Returns:
        The source. Plain text and JSON lines keep their blank lines as `b""`; packing skips and counts them.

    Raises:
        UserError: something is missing or of the wrong kind; the message names it and says what to do.
    """
    if prompt is not None:
        return prompted(
            open_source(spec, field=field, documents=documents, blank_files=blank_files),
            open_source(spec, field=prompt, documents=documents, blank_files=True),
        )
    if documents not in ("line", "file"):
        raise UserError(f"documents={documents!r} is not known; it must be 'line' or 'file'.")
    if not spec.strip():
        raise UserError(
            "The data specification (--data.generic, --data.specific) is empty; give a file, a folder, tfds:NAME or "
            "python:stdlib."
        )
    if spec.startswith("python:"):
        if field is not None or documents != "line":
            raise UserError(
                f"{spec} has no fields and its own documents; leave out field and documents (--data.field, --data.documents)."
            )
        if spec == "python:stdlib":
            return stdlib_source()
        if spec == "python:topics":
            return topics_source()
        raise UserError(f"{spec!r} is not known; the sources of this kind are python:stdlib and python:topics.")
    if spec.startswith("tfds:"):
        if documents != "line":
            raise UserError(
                f"{spec}: a TFDS record is a document; documents='file' ({DOCUMENTS}) is for plain text files only."
            )
        return tfds_source(spec, field)
    return files_source(spec, field, documents, blank_files)


def options_of(spec: str) -> Options:
    """Which options of `open_source` a source has a use for: a field where rows have fields, documents where text is plain.

    Args:
        spec: as for `open_source`.

    Raises:
        UserError: a file does not exist.
    """
    if spec.startswith("python:") or not spec.strip():
        return Options(field=False, documents=False)
    if spec.startswith("tfds:"):
        return Options(field=parse_spec(spec)[2] is None, documents=False)
    return options_of_files(spec)
