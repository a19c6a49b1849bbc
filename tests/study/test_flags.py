"""Flags: what they build, what is refused in one sentence, and how a command ends."""

import dataclasses
import errno
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_task import TASK as LINEAR
from linear_task import LinearConfig
from study_calls import CLASSES, TASK, fails

from bilevel import cli, study
from bilevel.data import PairsByTarget
from bilevel.study import resolve, suite
from bilevel.study.config import Study
from bilevel.study.methods.learning import Dds, MetaWeightNet, Soba, WarmSoba, _probe_every, _weight_optimizer
from bilevel.study.registry import METHODS, chosen, with_first
from bilevel.study.task import SourceLanguages
from bilevel.training import optimizers, settings
from bilevel.training.run_dir import flatten
from bilevel.training.settings import filled, flag_of
from bilevel.types import UserError

pytestmark = pytest.mark.usefixtures("one_device")

BAD: dict[str, tuple[str, tuple[str, ...], str]] = {
    "unknown method": ("uniform,magic", (), 'names the method "magic", which does not exist: choose from all, uniform, mixing'),
    "no method": (",", (), "--compare is empty"),
    "labels": ("svp", (), "--compare names svp, which needs rows with a label"),
    "unknown preset": ("uniform", ("--preset", "best"), "--preset best does not exist: choose from default, paper"),
    "task's own": ("uniform", ("--data.specific", "third"), "--data.specific third does not exist"),
    "b > B": ("soba", ("--big-batch-size", "2"), "--big-batch-size 2 is smaller than --batch-size 4"),
    "b > B, frozen": ("rho_loss", ("--big-batch-size", "2"), "--big-batch-size 2 is smaller than --batch-size 4"),
    "more than all rows": ("uniform", ("--batch-size", "300"), "300"),
    "parts": ("uniform", ("--micro-batches", "3"), "--batch-size 4 cannot be divided into 3 equal parts"),
    "one row": ("soba", ("--batch-size", "1"), "one row"),
    "blocks": ("soba", ("--soba.probe-blocks", "9"), "--soba.probe-blocks 9: this network has no blocks"),
    "blocks, dense": ("learning_to_reweight", ("--learning-to-reweight.probe-blocks", "2"), "probe-blocks 2: this network"),
    "candidates": ("soba", ("--soba.specific-candidates", "16"), "--soba.specific-candidates 16 of --big-batch-size 16"),
    "candidates, dense": ("soba", ("--soba.specific-candidates", "2", "--soba.mode", "dense"), "needs --soba.mode sparse"),
    "warm-up": ("soba", ("--soba.weight-warmup", "-1"), "--soba.weight-warmup -1 must be at least 0"),
    "update-every": ("soba", ("--soba.update-every", "0"), "--soba.update-every 0 must be at least 1"),
    "probe-every": ("soba", ("--soba.update-every", "2", "--soba.probe-every", "3"), "--soba.probe-every 3 must be a"),
    "nothing kept": ("dds", ("--dds.average-specific", "0", "--dds.probe-every", "2"), "give --dds.average-specific above 0"),
    "classifier": ("classifier", ("--classifier.steps", "0"), "--classifier.steps 0 must be at least 1"),
    "warm start": ("warm_soba", ("--warm-soba.classifier-rows", "0"), "--warm-soba.classifier-rows 0 must be"),
    "warm start of a loss": ("meta_weight_net", ("--meta-weight-net.warm-start",), "--meta-weight-net.warm-start: its"),
    "fraction": ("mixing", ("--mixing.fraction", "1.0"), "--mixing.fraction 1.0 of --batch-size 4"),
    "no rows before": ("contrastive", ("--contrastive.start", "0.01"), "--contrastive.start 0.01 leaves 0 of 8 steps"),
    "too few after": ("contrastive", ("--contrastive.rows", "10"), "of 10 scored rows keeps fewer than the --batch-size 4"),
    "too many after": ("contrastive", ("--contrastive.fraction", "1.5"), "--contrastive.fraction 1.5 must lie in (0, 1]"),
    "no fine-tuning": ("contrastive", ("--contrastive.finetune-steps", "0"), "--contrastive.finetune-steps 0 must be at least 1"),
    "svp": ("svp", (*CLASSES, "--svp.fraction", "0"), "--svp.fraction 0.0 must lie in (0, 1]"),
    "burn-in": ("mentornet", (*CLASSES, "--mentornet.burn-in", "2"), "--mentornet.burn-in 2.0 must lie in [0, 1]"),
    "held-out steps": ("rho_loss", ("--rho-loss.held-out-steps", "0"), "--rho-loss.held-out-steps 0 must be at least 1"),
    "no table": ("irreducible_loss", ("--irreducible-loss.table", "no"), "There is no table of losses at no"),
    "fixed": ("rl_sampler", (*CLASSES, "--rl-sampler.fixed"), "say where by --rl-sampler.start-from"),
    "rewards": ("rl_sampler", (*CLASSES, "--rl-sampler.policy-every", "30"), "20 must divide --rl-sampler.policy-every 30"),
    "reward parts": ("rl_sampler", (*CLASSES, "--rl-sampler.reward-parts", "7"), "reward-parts 7 does not divide the 60"),
    "nothing to replay": ("replayed", (), "needs --replayed.sequence RUN_DIR/rl_sampler-seed0"),
    "steps": ("uniform", ("--steps", "0"), "--steps 0 must be at least 1"),
    "seed": ("uniform", ("--seed", "-1"), "--seed -1 must be at least 0"),
    "seeds": ("uniform", ("--seeds", "0"), "--seeds 0 must be at least 1"),
    "trials": ("uniform", ("--trials", "-1"), "--trials -1 must be at least 0"),
    "seconds": ("uniform", ("--budget-seconds", "nan"), "--budget-seconds nan must be at least 0"),
    "rate": ("uniform", ("--optimizer.learning-rate", "nan"), "--optimizer.learning-rate nan must be a finite number"),
    "average": ("uniform", ("--optimizer.average", "2"), "--optimizer.average 2.0 must be less than 1"),
    "warmup": ("uniform", ("--optimizer.warmup", "-1"), "--optimizer.warmup -1 must be at least 0"),
    "no milestones": ("uniform", ("--optimizer.schedule", "step"), "No --optimizer.milestones with --optimizer.schedule step"),
    "milestones": ("uniform", ("--optimizer.milestones", "5"), "milestones 5 with --optimizer.schedule constant"),
    "milestone 0": ("uniform", ("--optimizer.schedule", "step", "--optimizer.milestones", "0"), "milestones 0 must be"),
    "decay": (
        "uniform", ("--optimizer.schedule", "step", "--optimizer.milestones", "5", "--optimizer.decay", "0"),
        "--optimizer.decay 0.0 must be greater than 0",
    ),
    "fine-tuning": ("uniform", ("--finetune.steps", "-1"), "--finetune.steps -1 must be at least 0"),
    "schedule": ("uniform", ("--schedule-steps", "6"), "--schedule-steps 6 ends the learning rate before --steps 8"),
    "seconds and schedule": (
        "uniform", ("--same-seconds", "--schedule-steps", "16"), "--schedule-steps 16 after --steps 8: omit one",
    ),
    "unknown seconds": ("soba", ("--same-seconds",), "--same-seconds takes uniform's seconds"),
    "seconds for nothing": ("uniform", ("--budget-seconds", "5"), "--budget-seconds 5.0 counts only with --same-seconds"),
    "trial steps": ("uniform", ("--trial-steps", "7"), "--trial-steps 7 counts only with --trials"),
    "processes": ("uniform", ("--hosts.processes", "2"), "--hosts.processes needs --hosts.coordinator HOST:PORT"),
    "address": ("uniform", ("--hosts.coordinator", "h:1"), "--hosts.coordinator h:1 needs --hosts.processes and --hosts.process"),
    "resident, split": ("uniform", ("--resident", "always", "--shard-state"), "omit it or --shard-state"),
    "two sets of one name": ("uniform", ("--specific-sets", "first", "x/first"), '--specific-sets has two sets named "first"'),
    "second set": ("uniform", ("--specific-sets", "first", "third"), "--data.specific third does not exist"),
    "file": ("uniform", ("--config", "none.yaml"), "--config none.yaml cannot be read"),
    "no value": ("uniform", ("--config",), "--config needs a value"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_flags_get_one_sentence(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is trained, and naming flags that exist."""
    compare, given, words = BAD[case]
    fails(tmp_path / "run", compare, *given) if case != "no value" else _ends(tmp_path, given)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
    known = all_flags()
    for flag in re.findall(r"--[a-z][\w.-]*[a-z]", error):
        assert flag in known, flag


def _ends(folder: Path, given: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", str(TASK), "--run-dir", str(folder / "run"), *given])
    assert stop.value.code == 2


def all_flags() -> set[str]:
    """The flags of the linear task with all methods."""
    config = resolve.default_config(LINEAR)
    kind = resolve.flags_type(LINEAR, METHODS)
    return {flag_of(name) for name in flatten(study_plain(resolve.flags_of(kind, config)))} | {
        "--config",
        "--eval-only",
    }


def study_plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: study_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return value


@pytest.mark.parametrize(("path", "names"), [("bilevel/study", None)])
def test_messages_name_flags_that_exist(path: str, names: None) -> None:
    """In the texts of the study layer and of its settings; {name} and {flag} stand for the name of a method."""
    known = all_flags() | {"--help", "--METHOD.NAME", "--data.held-out", "--data.generic-faults", "--hosts"}
    known |= {"--data.source-language", "--data.generic-labels"}
    fields = {flag.rpartition(".")[2] for flag in known}
    root = Path(study.__file__).parent
    for file in [*sorted(root.rglob("*.py")), *(Path(str(module.__file__)) for module in (optimizers, settings))]:
        for flag in re.findall(r"--[a-z][\w.-]*[a-z]", file.read_text()):
            assert flag in known or flag[2:].replace("-", "_") in METHODS, f"{file}: {flag}"
        for field in re.findall(r"--\{(?:name|flag)\}\.([a-z-]+[a-z])", file.read_text()):
            assert field in fields, f"{file}: {field}"


ALLOWED: dict[str, set[str]] = {
    "registry.py": set(METHODS),
    "budget.py": {"uniform"},
    "comparison.py": {"uniform"},
    "suite.py": {"uniform"},
    "config.py": {"uniform", "soba"},
    "contrastive.py": {"contrastive"},
    "known_rows.py": {"svp"},
    "spec.py": {"uniform"},
}
"""Uniform sets the seconds and the loss that others are measured by; --compare has a default; contrastive.py and known_rows.py
hold the long parts of the plans of `contrastive` and `svp`, with their folders; spec.py means a uniform draw of rows."""


def test_the_study_layer_knows_no_task_and_no_method() -> None:
    root = Path(study.__file__).parent
    for file in sorted(root.rglob("*.py")):
        text = file.read_text()
        for task in (*cli.TASKS, "bilevel.tasks", "language_modelling", "classification of"):
            assert task not in text, f"{file}: {task}"
        if file.parent.name == "methods":
            continue
        found = {name for name in METHODS if re.search(rf"""["']{name}["']""", text)}
        assert found <= ALLOWED.get(file.name, set()), f"{file}: {sorted(found)}"


def test_methods_by_name(tmp_path: Path) -> None:
    plain = LINEAR.open(LinearConfig(), tmp_path)
    table = PairsByTarget(np.zeros((1, 2), np.int32), ("aa", "bb"))
    full = dataclasses.replace(plain, classes=2, languages=SourceLanguages(table, "aa", lambda name: []))
    faults = dataclasses.replace(plain, known={"noisy": plain.known["noisy"]._replace(taught=True)})
    assert chosen("soba, uniform,soba", plain) == ["soba", "uniform"]
    everything = chosen("all", full)
    assert set(METHODS) - set(everything) == {"frozen", "replayed", "token_selection"}
    assert everything == chosen("all", None)
    missing = {"svp", "mentornet", "gradient_norm", "gradient_norm_is", "rl_sampler"}
    missing |= {"uniform_pairs", "uniform_languages", "related", "tcs", "multilingual_dds", "tcs_dds"}
    assert set(everything) - set(chosen("all", plain)) == missing
    assert set(everything) - set(chosen("all", faults)) == missing - {"mentornet"}
    assert chosen("soba,all", plain) == ["soba", *(name for name in chosen("all", plain) if name != "soba")]
    with pytest.raises(
        UserError, match=r"names mentornet, which needs rows with a label, or some .*--data.generic-faults"
    ):
        chosen("mentornet", plain)
    with pytest.raises(UserError, match="names svp, which needs rows with a label, and these have none: omit it"):
        chosen("svp", faults)
    assert with_first(["uniform", "retrained_dds"]) == ["uniform", "dds", "retrained_dds"]


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_every_method_can_be_planned(preset: str, tmp_path: Path) -> None:
    """All with one set of flags."""
    given = resolve.default_config(LINEAR, preset).with_study(run_dir=tmp_path)
    own = filled(given.task, {"data": {"classes": 2}, "model": {"network": "classes"}}, "the test")
    setting = suite.opened(resolve.complete(dataclasses.replace(given, task=own)), LINEAR)
    for name in chosen("all", setting.splits):
        suite.check_run(setting.context(name, 0))


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/metrics.jsonl"), 2, ["a/metrics.jsonl", "make room"]),
        (UserError("This is wrong: change it."), 2, ["error: This is wrong: change it."]),
        (KeyboardInterrupt(), 130, ["Interrupted"]),
    ],
)
def test_what_ends_a_command(
    raised: BaseException,
    code: int,
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def compare(config: Any, task: Any) -> None:
        raise raised

    monkeypatch.setattr(suite, "compare", compare)
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", str(TASK)])
    assert stop.value.code == code
    error = capsys.readouterr().err
    assert all(word in error for word in words)


def test_an_error_of_the_system_is_no_mistake_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(config: Any, task: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(suite, "compare", compare)
    with pytest.raises(OSError, match="Input/output error"):
        cli.main(["compare", str(TASK)])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compete"], "bilevel compete does not exist: choose from compare, diagnose, analyse, select, export."),
        (["compare"], "bilevel compare needs a task: one of language_modeling"),
        (["compare", "--steps", "3"], "bilevel compare needs a task"),
        (["compare", "chess"], "There is no task chess: choose from language_modeling"),
        (["compare", "chess.py"], "The file chess.py does not exist"),
        (["compare", "EMPTY"], "defines no TASK: end it with TASK = MyTask()."),
        (["compare", "PARTS"], "lacks config, measures, presets, open, model, weighting, evaluate, show: implement"),
        (["analyse", "nothing"], "bilevel analyse needs the name of an analysis: curriculum"),
    ],
)  # fmt: skip
def test_commands_and_tasks_that_there_are_not(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "EMPTY.py").write_text("")
    (tmp_path / "PARTS.py").write_text("class Half:\n    name = title = 'half'\n\nTASK = Half()\n")
    found = [str(tmp_path / f"{a}.py") if a.isupper() else a for a in arguments]
    with pytest.raises(SystemExit) as stop:
        cli.main(found)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 0
        assert "bilevel compare TASK" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", str(TASK), "--compare", "soba,dds", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for words in ("Fit a line", "--soba.damping", "--dds.reward", "--data.specific", "--optimizer.schedule"):
        assert words in text
    assert "--penalty.strength" not in text


def test_a_flag_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", str(TASK), "--compare", "soba", "--soba.dampin", "1"])
    assert stop.value.code == 2
    assert "--soba.damping" in capsys.readouterr().err, "it suggests what is meant"


def test_values_of_flags() -> None:
    assert settings.taken(["a", "--x", "1", "b"], "--x") == ("1", ["a", "b"])
    assert settings.taken(["--x=1", "b"], "--x") == ("1", ["b"])
    assert settings.value_of(["--xy", "1"], "--x") is None


def moves(optimizer: Any, steps: int) -> list[float]:
    x = jnp.zeros(1)
    state, found = optimizer.init(x), []
    for _ in range(steps):
        move, state = optimizer.update(jnp.ones(1), state, x)
        found.append(float(np.asarray(move)[0]))
    return found


def test_the_rate_of_the_weights_grows_over_theta_updates() -> None:
    s = Soba(weight_learning_rate=0.01, weight_warmup=40, update_every=4)
    wanted = [0.01 * min(i / 10, 1) for i in range(15)]  # Adam moves by its rate where the gradient never changes
    np.testing.assert_allclose(moves(_weight_optimizer(s), 15), -np.asarray(wanted), rtol=1e-3, atol=1e-9)


def test_what_is_not_given_fits_what_is() -> None:
    """An estimator brings its rate, and the rows that are kept between updates their interval."""
    assert (Soba().chosen_estimator, Soba().chosen_rate) == ("score", 1e-2)
    assert (Soba(estimator="softmax").chosen_rate, Soba(filter="top_k").chosen_rate) == (1e-3, 1e-3)
    assert (Soba(alpha_batch="uniform").chosen_estimator, Soba(mode="dense").chosen_estimator) == ("softmax", "softmax")
    assert Soba(estimator="softmax", weight_learning_rate=0.5).chosen_rate == 0.5
    assert (WarmSoba().chosen_rate, MetaWeightNet().chosen_rate) == (3e-3, 1e-2)
    assert [_probe_every("dds", Dds(update_every=k), True) for k in (1, 2, 3, 4)] == [2, 2, None, None]
    assert _probe_every("dds", Dds(), False) is None
    assert (_probe_every("dds", Dds(probe_every=0), True), _probe_every("dds", Dds(probe_every=6), True)) == (None, 6)


def test_defaults_are_within_their_own_bounds() -> None:
    Study().check()
    for method, spec in METHODS.items():
        for name in spec.paper:
            assert name in {f.name for f in dataclasses.fields(spec.settings)}, (method, name)
        for name in spec.search:
            assert name == "learning_rate" or name in {f.name for f in dataclasses.fields(spec.settings)}, (
                method,
                name,
            )
    assert jax.process_count() == 1
