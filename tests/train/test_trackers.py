"""Experiment trackers: what a run hands them, how it closes them, and names that are refused."""

import dataclasses
import sys
from types import SimpleNamespace

import pytest
from support.recorder import Recorder
from support.runs import make_config, write_corpus

from idattn.choices import find_tracker
from idattn.train import Tracker, train
from idattn.train.metrics import MetricsWriter, read_metrics


@pytest.fixture
def config(tmp_path):
    return make_config(write_corpus(tmp_path), mixer="softmax", steps=2, eval_every=2, checkpoint_every=1)


def test_a_tracker_gets_the_metrics_of_a_run(config, tmp_path):
    """All that metrics.jsonl has, of this start, in groups; a run that resumes makes it anew."""
    Recorder.made.clear()
    train(config, tmp_path / "run", trackers=["support.recorder:Recorder"])
    train(config, tmp_path / "run", trackers=["support.recorder:Recorder"])
    first, again = Recorder.made
    assert (first.config, first.workdir, first.start, first.closed) == (config, tmp_path / "run", 0, [False])
    assert (again.start, again.written, again.closed) == (2, [], [False])
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    stored = [(row["step"], name, value) for row in rows for name, value in row.items() if name != "step"]
    groups = [f"val/{name[4:]}" if name.startswith("val_") else f"train/{name}" for _, name, _ in stored]
    assert first.written == [(step, name, value) for (step, _, value), name in zip(stored, groups, strict=True)]
    assert {(1, "train/loss"), (2, "val/loss")} <= {written[:2] for written in first.written}


def test_every_tracker_is_closed(config, tmp_path):
    """After an error with that word, though one of them fails to close."""

    class Broken(Recorder):
        def close(self, failed):
            super().close(failed)
            raise OSError("no network")

    trackers = [kind(config, tmp_path, 0) for kind in (Recorder, Broken, Recorder)]
    with pytest.raises(OSError, match="no network"), MetricsWriter(tmp_path, -1) as writer:
        writer.trackers += trackers
        writer.write(1, {"loss": 2.5})
        raise FloatingPointError
    assert [tracker.closed for tracker in trackers] == [[True]] * 3
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.5}]


def test_weights_and_biases(config, tmp_path, monkeypatch):
    """One run there for all starts of a run; with a stand-in of the package."""
    calls = []

    def init(**arguments):
        calls.append(arguments)
        return SimpleNamespace(
            log=lambda scalars, step: calls.append((step, scalars)),
            finish=lambda exit_code: calls.append(exit_code),
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for start in (0, 1):
        tracker = find_tracker("wandb")(config, tmp_path, start)
        tracker.write(start + 1, {"train/loss": 2.5})
        tracker.close(failed=start == 0)
    first, *logged, failed = calls[:3]
    again = calls[3]
    assert first == again and len(first["id"]) == 32 and first["resume"] == "allow"
    assert first["config"] == dataclasses.asdict(config) and first["dir"] == str(tmp_path)
    assert logged == [(1, {"train/loss": 2.5})] and failed == 1 and calls[4:] == [(2, {"train/loss": 2.5}), 0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wandbb", "tracker='wandbb' is not known. Did you mean 'wandb'"),
        ("support.recorder:Other", r"must be one of wandb or module:Class \(module 'support.recorder' has no"),
        ("support.runs:Path", "must be a subclass of idattn.train.Tracker"),
        ("support.recorder:Unfinished", "must define __init__, close, write; see idattn.train.Tracker"),
    ],
)
def test_names_that_are_refused(config, tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        train(config, tmp_path / "run", trackers=[name])
    assert not (tmp_path / "run").exists()


def test_a_tracker_whose_package_is_missing(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"tracker='wandb' needs the package wandb: pip install idattn\[wandb\]"):
        find_tracker("wandb")(config, tmp_path, 0)
    assert issubclass(find_tracker("wandb"), Tracker)
