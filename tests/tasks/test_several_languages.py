"""Translation from several source languages: its data, and the methods that draw a language for each target."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from commands import compare, equal_after_a_kill, metrics_of, refused
from tiny_pairs import language_flags, write_languages

from bilevel.data import LanguageRows, PackedPairs
from bilevel.selection import filters
from bilevel.study.sampled import SEQUENCE
from bilevel.tasks.translation import TASK, DataConfig, ModelConfig, PairSplits, TranslationConfig
from bilevel.training import load_sequence

pytest.importorskip("sentencepiece")
METHODS = "uniform_pairs,uniform_languages,related,tcs,multilingual_dds,tcs_dds"
NAMES = ("aa", "bb", "zz")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_languages(tmp_path)


def splits_of(text: Path, network: Any = "lstm", **data: Any) -> PairSplits:
    given: dict[str, Any] = {
        "generic": str(text / "train.tsv"),
        "specific": str(text),
        "source_language": "aa,bb,zz",
        **data,
    }
    config = DataConfig(cache_dir=text / "cache", target_language="en", length=26, vocabulary=40, **given)
    return TASK.open(TranslationConfig(config, ModelConfig(network=network)), text)


def rows_of(splits: PairSplits) -> LanguageRows:
    assert isinstance(splits.train, LanguageRows)
    return splits.train


# -- data ------------------------------------------------------------------------------------------------------------


def test_rows_are_grouped_by_their_target(text: Path) -> None:
    splits = splits_of(text)
    train, languages = rows_of(splits), splits.languages
    assert languages is not None
    assert (languages.table.languages, languages.specific) == (NAMES, "aa")
    assert {name: len(part) for name, part in train.pairs.items()} == {"aa": 15, "bb": 60, "zz": 60}
    for row in languages.table.rows:
        targets = {train.text(int(i))[1] for i in row if i >= 0}
        assert len(targets) == 1, "one target sentence"
    domain = splits.known["language"]
    assert domain.names == NAMES
    np.testing.assert_array_equal(np.bincount(domain.values), [15, 60, 60])
    for i in (0, 20, 100):
        language = NAMES[domain.values[i]]
        assert train.text(i)[0] in languages.sentences(language)
        assert TASK.show(TranslationConfig(), splits, np.asarray([i]))[0].label == language


def test_dev_is_cut_in_two_and_test_is_the_specific_language(text: Path) -> None:
    splits = splits_of(text)
    parts = {"specific": splits.specific, **splits.valid, **splits.test}
    texts = {}
    for name, part in (("g_S", splits.specific), ("valid", splits.valid["specific"]), ("test", splits.test["test"])):
        assert isinstance(part, PackedPairs)
        texts[name] = {part.text(i)[0] for i in range(len(part))}
    assert not texts["g_S"] & texts["valid"]
    assert len(texts["g_S"]) > 5 < len(texts["valid"])
    assert len(splits.test["test"]) == 24
    assert parts.keys() == {"specific", "test"}
    assert list(splits.valid) == ["specific"]
    assert splits_of(text, specific_language="bb").languages.specific == "bb"  # pyright: ignore[reportOptionalMemberAccess]


def test_specific_pairs_are_those_of_one_language(text: Path) -> None:
    """Valid and test pairs of the others need not exist."""
    (text / "own").mkdir()
    for part in ("train", "dev", "test"):
        lines = [line.split("\t")[:2] for line in (text / f"{part}.tsv").read_text().splitlines()]
        (text / "own" / f"{part}.tsv").write_text("".join("\t".join(line) + "\n" for line in lines))
    own = splits_of(text, specific=str(text / "own"))
    assert own.test["test"].content_hash == splits_of(text).test["test"].content_hash


def test_pieces_of_kin_are_the_same(text: Path) -> None:
    """The vocabularies of the languages are merged by the strings of their pieces; the target has its own, or is among them."""
    own, shared = splits_of(text), splits_of(text, "xs")
    assert own.target.size < own.source.size
    assert shared.target.size == shared.source.size > own.source.size
    ids = [{*np.unique(part.rows(np.arange(len(part)))["source"]).tolist()} for part in rows_of(own).pairs.values()]
    assert len(ids[0] & ids[1]) > len(ids[0] & ids[2])
    english = splits_of(text).test["test"].rows(np.arange(1))
    assert own.target.decode(english["target"])[0] == own.test["test"].text(0)[1]  # pyright: ignore[reportAttributeAccessIssue]


# -- methods ---------------------------------------------------------------------------------------------------------


def drawn_by(run_dir: Path, method: str) -> np.ndarray:
    return load_sequence(run_dir / f"{method}-seed0" / SEQUENCE, content_hash=None, num_rows=135)


@pytest.mark.parametrize("methods", ["multilingual_dds", pytest.param(METHODS, marks=pytest.mark.slow)])
def test_the_methods_draw_languages(methods: str, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = language_flags(text, compare=methods, steps=12, multilingual_dds__targets_per_round=20)
    found = {row["method"]: row for row in compare("translation", text / "run", **given)}
    assert [*found] == methods.split(",")
    assert ("related: trained on aa, bb." in capsys.readouterr().out) == ("related" in methods)
    for method in found:
        assert np.isfinite(found[method]["test_loss"]), method
        assert 0 <= found[method]["test_chrf"] <= 100, method
        drawn = drawn_by(text / "run", method)
        assert drawn.shape == (12, 4)
        assert (drawn >= 0).any(axis=1).all(), method
        language = np.where(drawn < 0, -1, np.searchsorted([15, 75], drawn, side="right"))
        assert all(len({*row} - {-1}) == 1 for row in language.tolist()), "a minibatch is of one language"
        if method == "related":
            assert {*language.ravel().tolist()} <= {-1, 0, 1}
    last = [row for row in metrics_of(text / "run" / "multilingual_dds-seed0") if row.get("reward/aa") is not None]
    assert all(-1e-3 <= row[f"reward/{name}"] <= 1e-3 for row in last for name in NAMES)
    report = (text / "run" / "report.html").read_text()
    assert "Mean chances of the languages: multilingual_dds" in report


def test_the_sparse_step_draws_one_language_of_each_target(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 8 targets with all their pairs, 4 are trained on, each from one language; cells without a pair never are."""
    given = language_flags(text, compare="dds", steps=6, dds__filter="one_of_group", log_every=1, no_judge=True)
    drawn, picked = [], filters.one_of_group("group").select

    def watched(key: Any, logits: Any, k: int, groups: Any) -> Any:
        found = picked(key, logits, k, groups)
        jax.debug.callback(lambda *x: drawn.append(x), logits, groups, found, ordered=True)
        return found

    monkeypatch.setattr(filters, "one_of_group", lambda *a, **k: filters.gumbel_top_k()._replace(
        name="one_of_group", caps=False, select=watched, groups=lambda batch: batch["group"]
    ))  # fmt: skip
    (row,) = compare("translation", text / "run", **given, big_batch_size=26)
    assert row["epochs"] == pytest.approx(6 * 8 / 90), "targets, not cells"
    assert "training_rows" not in row
    jax.effects_barrier()
    assert len(drawn) == 6
    for logits, groups, positions in drawn:
        assert logits.shape == (24,), "8 targets in 3 languages"
        np.testing.assert_array_equal(np.isfinite(logits), groups >= 0)
        assert (groups < 0).any()
        assert len({*groups[positions].tolist()} - {-1}) == 4
    for last in metrics_of(text / "run" / "dds-seed0"):
        assert sum(last[f"share/{name}"] for name in NAMES) == pytest.approx(1)
    for more, said in (
        (
            {"big_batch_size": 11},
            "each with 3 places, and big batches have 11: give --big-batch-size 12 or more",
        ),
        ({"dds__specific_candidates": 2}, "leave out specific-candidates, and mode dense"),
        ({"max_uses": 1}, "--max-uses 1 does not fit dds, whose filter (one_of_group)"),
    ):
        assert said in refused("translation", text / "no", capsys, **{**given, **more})


@pytest.mark.slow
def test_a_run_killed_in_the_middle_of_a_round_ends_like_one_left_alone(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds of 30 targets take some 9 steps of 4; checkpoints are every 4."""
    given = language_flags(text, compare="multilingual_dds", multilingual_dds__targets_per_round=30)
    killed, whole = equal_after_a_kill("translation", text, monkeypatch, **given)
    np.testing.assert_array_equal(drawn_by(killed, "multilingual_dds"), drawn_by(whole, "multilingual_dds"))


BAD_INPUT: dict[str, tuple[dict[str, Any], str]] = {
    "a language that is not there": ({"data__source_language": "aa,qq"}, "qq"),
    "specific language is none of them": ({"data__specific_language": "cc"}, "cc"),
    "labels": ({"data__generic_labels": "labels.tsv"}, "go with one --data.source-language: omit them"),
    "unknown kin": ({"compare": "related", "related__kin": "cc"}, "--related.kin cc names cc: choose among bb, zz"),
    "data that travel": ({"resident": "never"}, "--resident never does not fit tcs"),
    "more blocks than there are": (
        {"compare": "multilingual_dds", "model__network": "xs", "multilingual_dds__gradient_blocks": 9},
        "--multilingual-dds.gradient-blocks 9: the last 9 blocks of a decoder that has 1",
    ),
    "no rounds": (
        {"compare": "multilingual_dds", "multilingual_dds__scorer_steps": 0},
        "scorer-steps 0 must be at least 1",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_one_sentence(case: str, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, message = BAD_INPUT[case]
    assert message in refused(
        "translation", text / "run", capsys, **language_flags(text, **{"compare": "tcs", **given})
    )
