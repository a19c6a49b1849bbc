"""Pairs that come with packages of the extra `translation`: messages of programs, and names of things.

`python:interface` holds messages of three words or more from the catalogues of Django, django-allauth, Django REST framework
and, where a language pack is installed, JupyterLab. `python:catalogues` holds four tenths of these messages, which are then not
in `python:interface`; the shorter messages; the names of languages, countries, currencies, units and time zones (CLDR, from
Babel); and the names of emoji. All are translated by people, under BSD, MIT and Unicode licences.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bilevel.data.digests import digest
from bilevel.data.pairs.catalogues import entries, without_marks
from bilevel.data.pairs.stream import Languages, Pair, PairSource, pair_hash
from bilevel.data.streams import one_line
from bilevel.types import UserError

NAMES = ("python:catalogues", "python:interface")
_MESSAGES = {"django": "Django", "allauth": "django-allauth", "rest_framework": "djangorestframework"}
_PACKAGES = {**_MESSAGES, "babel": "Babel", "emoji": "emoji"}
_FEWEST_WORDS = 3
_TENTHS = {"hidden": range(4), "train": range(4, 7), "valid": range(7, 8), "test": range(8, 10)}
_NAMED = (
    "territories",
    "languages",
    "scripts",
    "variants",
    "currencies",
    "time_zones",
    "meta_zones",
    "unit_display_names",
)
_ABBREVIATED = frozenset({"short", "narrow", "abbreviated"})
_OTHER = re.compile(r"[\W\d_]+")


def embedded_pairs(spec: str, languages: Languages) -> PairSource:
    """Open `python:catalogues`, labelled by domain, or all of `python:interface`.

    Raises:
        UserError: a package is not installed, or has not the languages.
    """
    languages = _coded(languages)
    if spec == "python:interface":
        parts = _parts(languages)
        return _source(spec, languages, [pair for part in ("train", "valid", "test") for pair in parts[part]])
    return _source(spec, languages, _generic(languages))


def embedded_parts(languages: Languages) -> dict[str, PairSource]:
    """Open `python:interface` as train, valid and test: 3, 1 and 2 tenths of the messages.

    Messages with the same letters, whatever is between them, are in one part.
    """
    languages = _coded(languages)
    parts = _parts(languages)
    return {part: _source(f"python:interface ({part})", languages, parts[part]) for part in ("train", "valid", "test")}


def _coded(languages: Languages) -> Languages:
    """Return the languages as the packages call them: `pt_BR`."""
    return Languages(*(code.replace("-", "_") for code in languages))


def _source(name: str, languages: Languages, pairs: list[Pair]) -> PairSource:
    def identify() -> str:
        used = [*_PACKAGES.values(), *(pack.name for pack in _language_packs(languages))]
        return digest([name, *(f"{package} {_version(package)}" for package in used)])

    if not pairs:
        raise UserError(
            f"The packages of {name} have no texts in {languages.source} and {languages.target}; choose other languages with "
            "--data.source-language and --data.target-language, such as en and fr."
        )
    return PairSource(name, languages, lambda: iter(pairs), identify, ("domain",))


def _generic(languages: Languages) -> list[Pair]:
    parts = _parts(languages)
    reserved = {_key(pair.source) for part in ("train", "valid", "test") for pair in parts[part]}
    labelled = {
        "messages": parts["hidden"],
        "short messages": [pair for pair in _messages(languages) if not _is_sentence(pair)],
        "names": _of_keys(_names(languages.source), _names(languages.target)),
        "emoji": _of_keys(_emoji(languages.source), _emoji(languages.target)),
    }
    return [
        pair._replace(labels=(label,))
        for label, pairs in labelled.items()
        for pair in dict.fromkeys(pairs)
        if _key(pair.source) not in reserved
    ]


def _parts(languages: Languages) -> dict[str, list[Pair]]:
    parts: dict[str, list[Pair]] = {part: [] for part in _TENTHS}
    for pair in filter(_is_sentence, _messages(languages)):
        tenth = pair_hash(_key(pair.source)) % 10
        part = next(part for part, tenths in _TENTHS.items() if tenth in tenths)
        parts[part].append(pair._replace(labels=("messages",)))
    return parts


def _is_sentence(pair: Pair) -> bool:
    return len(pair.source.split()) >= _FEWEST_WORDS


def _key(text: str) -> str:
    return _OTHER.sub("", text.casefold())


@functools.lru_cache(maxsize=4)
def _messages(languages: Languages) -> list[Pair]:
    """Return the messages, each English one once."""
    return _of_keys(_catalogues(languages.source, languages), _catalogues(languages.target, languages), once=True)


def _of_keys(source: Mapping[Any, str], target: Mapping[Any, str], *, once: bool = False) -> list[Pair]:
    pairs = [Pair(text, target[key]) for key, text in source.items() if key in target]
    pairs = [pair for pair in pairs if _key(pair.source) and _key(pair.target)]
    return list({pair.source: pair for pair in reversed(pairs)}.values())[::-1] if once else list(dict.fromkeys(pairs))


def _catalogues(language: str, languages: Languages) -> dict[tuple[str, str], str]:
    """Return the messages in a language; those in English are the keys of the catalogues of the other language."""
    roots = [(name, _folder(name)) for name in _MESSAGES]
    roots += [(pack.name, pack.folder) for pack in _language_packs(languages)]
    english = language == "en"
    listed = next(code for code in languages if code != "en") if english else language
    found: dict[tuple[str, str], str] = {}
    for root_name, root in roots:
        for path in sorted(root.rglob("LC_MESSAGES/*.mo")):
            if path.parent.parent.name in _locales(listed, root):
                for entry in entries(path):
                    text = without_marks(one_line(entry.source if english else entry.target))
                    found[(root_name.split("_pack_")[0], entry.key)] = text
    return found


def _locales(language: str, root: Path) -> frozenset[str]:
    """Return the names of the folders of a language: `fr`, or else its variants, such as `fr_FR`."""
    known = _locale_folders(root)
    return frozenset({language} if language in known else {name for name in known if name.split("_")[0] == language})


@functools.cache
def _locale_folders(root: Path) -> frozenset[str]:
    return frozenset(path.parent.name for path in root.rglob("LC_MESSAGES"))


class _LanguagePack:
    """A package with the translations of JupyterLab."""

    def __init__(self, module: str):
        self.name = module
        self.folder = _folder(module)


def _language_packs(languages: Languages) -> list[_LanguagePack]:
    """Return the installed language packs of JupyterLab for the two languages."""
    wanted = set(languages) - {"en"}
    found = {
        entry.module
        for entry in importlib.metadata.entry_points(group="jupyterlab.languagepack")
        if entry.name in wanted or (entry.name.split("_")[0] in wanted)
    }
    return [_LanguagePack(module) for module in sorted(found)]


def _folder(module: str) -> Path:
    """Find the folder of a package without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"python:catalogues and python:interface need {_PACKAGES.get(module, module)}, which is not installed: run "
            "`pip install 'bilevel[translation]'`, or name pairs of your own with --data.generic and --data.specific."
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _version(package: str) -> str:
    return importlib.metadata.version(package)


def _names(language: str) -> dict[tuple[str, ...], str]:
    """Return the names of CLDR in a language by what they name, and quantities with their unit."""
    _folder("babel")
    from babel import Locale, UnknownLocaleError
    from babel.units import format_unit

    try:
        locale = Locale.parse(language)
    except (UnknownLocaleError, ValueError):
        return {}
    found: dict[tuple[str, ...], str] = {
        (kind, *path): one_line(text)
        for kind in _NAMED
        for path, text in _flat(getattr(locale, kind))
        if not _ABBREVIATED.intersection(path)
    }
    for unit in map(str, locale.unit_display_names):
        found |= {(unit, str(count)): one_line(format_unit(count, unit, locale=locale)) for count in (1, 5)}
    return found


def _flat(tree: Mapping[Any, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    for key, value in tree.items():
        if isinstance(value, str):
            yield (str(key),), value
        elif isinstance(value, Mapping) or hasattr(value, "items"):
            yield from (((str(key), *path), text) for path, text in _flat(value))


def _emoji(language: str) -> dict[str, str]:
    """Return the names of emoji in a language."""
    folder = _folder("emoji") / "unicode_codes"
    names: Iterable[tuple[str, Any]] = ()
    path = folder / ("emoji.json" if language == "en" else f"emoji_{language}.json")
    if path.exists():
        names = json.loads(path.read_text("utf-8")).items()
    texts = ((sign, name.get("en", "") if isinstance(name, dict) else name) for sign, name in names)
    return {sign: one_line(text.strip(":").replace("_", " ")) for sign, text in texts}
