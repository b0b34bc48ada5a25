"""configs/study_recall.py: states of equal size, equal numbers of trials, and the study at a tiny size."""

import dataclasses
import json
from collections import Counter

import pytest
from support.programs import run_program
from support.runs import ROOT

from configs import study_recall, study_recall_long
from idattn.config import from_config_dict
from idattn.costs import state_size
from idattn.files import read_json
from idattn.study import figures
from idattn.study.grid import best_loss, read_records
from idattn.study.runner import Runner

CELLS = ROOT / "results/study_recall/cells"
TINY = """
import dataclasses

from configs import study_recall
from idattn.config import from_config_dict, to_config_dict

STUDY = dataclasses.replace(
    study_recall.STUDY,
    cells=tuple(study_recall.STUDY.cell(name) for name in ("tune,gla+2,0", "M=8,clock+damped,1")),
    evaluate=("--tasks=mqar", "--lengths=66", "--entries=2", "--limit=4"),
)


def get_config(argument):
    config = from_config_dict(study_recall.get_config(argument))
    return to_config_dict(dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, model_dim=8, mlp_dim=8),
        data=dataclasses.replace(config.data, source="mqar:pairs=2,rows=64", seq_len=66),
        optim=dataclasses.replace(config.optim, warmup_steps=1),
        train=dataclasses.replace(config.train, steps=2, batch_size=4, eval_every=2, checkpoint_every=1),
    ))
"""


def test_every_condition_has_the_same_state_and_as_many_trials():
    configs = {cell: from_config_dict(study_recall.get_config(str(cell))) for cell in study_recall.STUDY.cells}
    trials = Counter(cell.condition.rpartition("+")[0] for cell in configs if cell.scale == "tune")
    assert trials == dict.fromkeys(study_recall.CONDITIONS, 5)
    for cell, config in configs.items():
        (mixer,), modes = config.model.mixers, config.model.ssm.num_modes
        if mixer != "softmax":
            assert state_size(config.model, mixer, config.data.seq_len) == 4 * modes * 64
        assert cell.scale in ("tune", f"M={modes}")
    rest = [cell for cell in configs if cell.scale != "tune"]
    conditions = len(study_recall.CONDITIONS) + len(study_recall.AGAIN)
    assert len(rest) == len(study_recall.SIZES) * conditions * len(study_recall.SEEDS)


def test_the_best_trials_are_taken():
    """By the stored records."""
    best = {}
    for name in study_recall.CONDITIONS:
        trials = {x: trial for x, (condition, trial) in study_recall.TRIALS.items() if condition == name}
        losses = {x: best_loss(read_json(CELLS / f"tune,{x},0.json", "")) for x in trials}
        first, second, *_ = sorted(trials, key=losses.__getitem__)
        best[name] = trials[first]
        assert study_recall.AGAIN.get(f"{name} at 5e-3", second) == second
    assert best == {name: study_recall.TUNED.get(name, study_recall.RATES[0]) for name in study_recall.CONDITIONS}


def test_what_was_tuned_is_taken(monkeypatch):
    monkeypatch.setitem(study_recall.TUNED, "damped", study_recall.Trial(1e-2, 1.0))
    config = study_recall.get_config("M=8,damped,3")
    assert (config.optim.peak_lr, config.model.ssm.c_init_scale, config.seed) == (1e-2, 1.0, 3)
    with pytest.raises(ValueError, match="cell='M=8,dampd,3' is not known. Did you mean"):
        study_recall.get_config("M=8,dampd,3")


def test_more_pairs():
    """In rows as much longer; nothing else differs from the runs at the largest state."""
    config = from_config_dict(study_recall_long.get_config("32 pairs,gated_deltanet at 5e-3,3"))
    assert (config.data.source, config.data.seq_len) == ("mqar:pairs=32,rows=51200", 256)
    largest = from_config_dict(study_recall.get_config("M=16,gated_deltanet at 5e-3,3"))
    data = dataclasses.replace(largest.data, source=config.data.source, seq_len=256)
    assert dataclasses.replace(largest, data=data) == config


def test_the_study_at_a_tiny_size(tmp_path, monkeypatch):
    """Both stages, in this process; a second call finds nothing left to do."""
    (tmp_path / "tiny.py").write_text(TINY)
    runner = Runner(str(tmp_path / "tiny.py"), tmp_path)

    def call(name, arguments, log, lock):
        done = run_program(name, *arguments)
        log.write_text(done.stderr)
        return done.returncode

    monkeypatch.setattr(runner, "_call", call)
    for cell in runner.study.cells:
        assert runner.finish(cell).startswith("done, validation loss ")
        record = json.loads((tmp_path / "cells" / f"{cell}.json").read_text())
        assert 0 <= record["evaluations"]["mqar"]["metrics"]["2 pairs in 66"] <= 1
    command = [f"--config={tmp_path / 'tiny.py'}", f"--workdir={tmp_path}"]
    again, report = (run_program("study", *command, flag) for flag in ("--dry_run", "--report"))
    assert (again.returncode, again.stdout) == (0, "")
    assert report.returncode == 0 and "2 of 2 cells." in report.stdout, report.stderr


def test_the_figure(monkeypatch, tmp_path):
    """Of the stored records: a line through the means for each condition that has several sizes."""
    drawn = {}
    monkeypatch.setattr(figures, "write_figure", lambda file, figure: drawn.update({file.name: figure}))
    configs = {cell: from_config_dict(study_recall.get_config(str(cell))) for cell in study_recall.STUDY.cells}
    done = read_records(CELLS, configs)
    figures.draw(tmp_path, configs, done)
    (axes,) = drawn["recall.png"].axes
    lines = {line.get_label(): line.get_xydata() for line in axes.lines if not line.get_label().startswith("_")}
    assert list(lines) == [*study_recall.CONDITIONS, *study_recall.AGAIN]
    assert [len(points) for points in lines.values()] == [1, *[len(study_recall.MODES)] * (len(lines) - 1)]
    for modes, point in zip(reversed(study_recall.MODES), lines["gla"], strict=True):
        shares = [
            done[study_recall.STUDY.cell(f"M={modes},gla,{seed}")]["evaluations"]["mqar"]["metrics"]["8 pairs in 64"]
            for seed in study_recall.SEEDS
        ]
        assert tuple(point) == pytest.approx((4 * modes * 64, sum(shares) / len(shares)))
    drawn.clear()
    figures.draw(tmp_path, configs, {cell: record for cell, record in done.items() if cell.scale == "M=16"})
    assert drawn.keys() == {"compute.png", "seeds.png"}, "a single size has no curve"
