"""Pieces of a self-contained HTML page."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

_NOTHING = "-"


def page(title: str, body: str) -> str:
    """Return the whole page; `body` is HTML."""
    return _PAGE.format(title=escape(title), style=_STYLE, body=body)


def figure(title: str, *, light: str, dark: str) -> str:
    """Return a figure of two SVG texts, one for light pages and one for dark ones."""
    dark, light = ("data:image/svg+xml;base64," + base64.b64encode(image.encode()).decode() for image in (dark, light))
    return (
        f'<figure><picture><source srcset="{dark}" media="(prefers-color-scheme: dark)">'
        f'<img src="{light}" alt="{escape(title)}"></picture>'
        f"<figcaption>{escape(title)}</figcaption></figure>"
    )


def section(title: str, content: str) -> str:
    """Return a section with a heading; `content` is HTML."""
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], *, wrap: bool = False) -> str:
    """Return a table; all cells are escaped. With `wrap`, long cells are broken, anywhere if need be; numbers must not be."""
    head = "".join(f"<th>{escape(str(name))}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
    kind = ' class="wrap"' if wrap else ""
    return f'<div class="table"><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def cell(value: Any) -> str:
    """Return the text of a value; numbers get four digits."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return _NOTHING
    if isinstance(value, float | np.floating):
        return f"{value:.4g}"
    return str(value)


def mean_cell(values: Sequence[Any]) -> str:
    """Return mean ± standard deviation of the values, and of how many where some are missing; other things than numbers are
    listed."""
    known = [value for value in values if value is not None and not (_number(value) and math.isnan(value))]
    if not known or not all(map(_number, known)):
        return ", ".join(dict.fromkeys(map(cell, known))) or _NOTHING
    some = "" if len(known) == len(values) else f" ({len(known)} of {len(values)})"
    if len(known) == 1 or len(set(known)) == 1:
        return cell(known[0]) + some
    return f"{float(np.mean(known)):.4g} ± {float(np.std(known, ddof=1)):.2g}{some}"


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --ink: #222; --dim: #666; --line: #ddd; --page: #fff; --card: #f6f6f6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ddd; --dim: #999; --line: #444; --page: #181818; --card: #222; }
}
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 56rem; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1, h2, h3 { line-height: 1.25; font-weight: 600; }
h2 { margin-top: 2.5rem; padding-bottom: 0.3rem; border-bottom: 1px solid var(--line); }
p, figcaption, summary { color: var(--dim); }
figure { margin: 1.5rem 0; }
figcaption { text-align: center; font-size: 0.9rem; }
img { display: block; width: 100%; height: auto; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.35rem 1.2rem 0.35rem 0; text-align: left; vertical-align: top; }
th { color: var(--dim); font-weight: 600; border-bottom: 1px solid var(--line); }
td { border-bottom: 1px solid var(--line); white-space: nowrap; }
.wrap td { white-space: normal; overflow-wrap: anywhere; }
article { margin: 1rem 0; padding: 0.7rem 1rem; background: var(--card); border-radius: 6px; }
article header { display: flex; gap: 1.5rem; color: var(--dim); font-size: 0.85rem; }
pre { margin: 0.4rem 0 0; font: 0.85rem/1.45 ui-monospace, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
"""
