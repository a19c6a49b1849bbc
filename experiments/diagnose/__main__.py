"""Will learned data weights help? SAR and GAR of a short uniform training, after Grangier, Ablin and Hannun (2024), section 6.3.

    python -m experiments.diagnose
    python -m experiments.diagnose --data.generic heap.txt.gz --data.specific my_domain.txt
    python -m experiments.diagnose --checkpoint runs/language_modeling/uniform-seed0

Prints a table and a sentence, and writes them with a plot into --run-dir. With the flags as they are it takes some 50 processor
seconds; benchmarks/RESULTS.md has the rates of three specific sets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from bilevel.devices import sharding
from bilevel.state import TrainState
from bilevel.training import LoopConfig, hold_run_dir, train
from experiments import cli
from experiments.diagnose import report
from experiments.diagnose.config import DiagnoseConfig, Run, run_of
from experiments.diagnose.measure import Measurement, initial, measured_checkpoint
from experiments.language_modeling import build
from experiments.language_modeling.corpora import Corpora, load_corpora
from experiments.sources import open_source, steps_in_call


def main(options: DiagnoseConfig) -> None:
    """Trains or restores, measures, reports."""
    options.check()
    run = run_of(options)
    corpora = load_corpora(run.config)
    with hold_run_dir(options.run_dir):
        measure = Measurement(options, build.build_model(run.config), corpora)
        if options.checkpoint is None:
            rows = measured_while_training(options, run, corpora, measure)
        else:
            rows = [measured_checkpoint(options.checkpoint, run, measure)]
        print(report.write(options.run_dir, rows, _about(options, run, measure)))
    print(f"\nPlot: {options.run_dir / 'diagnose.svg'}")


def measured_while_training(
    options: DiagnoseConfig, run: Run, corpora: Corpora, measure: Measurement
) -> list[dict[str, float]]:
    """Trains the uniform model, and measures on the way."""
    mesh, rows = sharding.make_mesh(), []
    generic, specific = build.build_loaders(*run, corpora)
    sharding.check_divides(mesh, batch_size=run.config.batch_size, specific_batch_size=specific.batch_size)

    def evaluate(state: TrainState) -> Mapping[str, float]:
        found = measure(sharding.whole(mesh, state.params))
        rows.append({"step": int(jax.device_get(state.step)), **found})
        return found

    step, state = initial(run)
    source = open_source(run.config.residence, generic, specific, mesh)
    loop = LoopConfig(
        options.steps, log_every=min(50, options.every), evaluate_every=options.every, progress=options.progress,
        stop_signals=False, steps_per_call=steps_in_call(source, run.config.steps_per_call),
    )  # fmt: skip
    train(step, state, data=source, config=loop, evaluate=evaluate)
    return rows


def _about(options: DiagnoseConfig, run: Run, measure: Measurement) -> dict[str, Any]:
    specific, generic = measure.rows
    trained = f"{run.method}, seed {run.seed}, size {run.config.model.size}, b = {run.config.batch_size}"
    measured = (
        f"Model: {trained}, T = {run.config.length}. {specific} specific and {generic} generic rows, "
        f"{options.pairs} pairs of batches of {options.batch_rows} rows."
    )
    return {
        "specific": run.config.data.specific,
        "generic": run.config.data.generic,
        "measured": measured,
        "settings": dataclasses.asdict(options),
        "method": run.method,
    }


if __name__ == "__main__":
    cli.run(DiagnoseConfig, main)
