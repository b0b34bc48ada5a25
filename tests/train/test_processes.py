"""Runs over several processes: the batches and losses of one, stopped and killed, and continued by other numbers."""

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from support.helpers import assert_close
from support.runs import STEPS, finish, kill, launch, make_config, rows_of, steps_of, wait_until, write_corpus

from idattn.config import MeshConfig
from idattn.train.checkpoint import MANIFEST, load_params

DEVICES = 4  # of all processes together
MESH = MeshConfig(data=1, fsdp=2, sequence=2)  # of two processes each has whole rows, of four each a piece of one


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A function that starts the run in a folder; compiled programs and digests of rows are shared and stay."""
    folder = tmp_path_factory.mktemp("processes")
    source = write_corpus(folder)

    def run(workdir, processes, changes=(), **options):
        config = make_config(source, mesh=MESH, **dict(changes))
        workdir.parent.mkdir(exist_ok=True)
        options |= dict(cache=folder / f"cache-{processes}", rows_log=f"{workdir}-{processes}-")
        return launch(config, workdir, processes=processes, devices=DEVICES // processes, **options)

    return run


@pytest.fixture(scope="module")
def reference(start, tmp_path_factory):
    """The folder of a run of two processes that nothing happened to."""
    workdir = tmp_path_factory.mktemp("reference") / "run"
    finish(start(workdir, 2))
    return workdir


@pytest.fixture(scope="module")
def short(start, tmp_path_factory):
    """(outputs, folder) of a run of two processes and two steps, of a model that compiles fast."""
    workdir = tmp_path_factory.mktemp("short") / "run"
    changes = dict(mixer="softmax", steps=2, eval_every=2, checkpoint_every=2)
    return finish(start(workdir, 2, changes)), workdir


def rows_read(workdir, processes, index):
    """The digests of the rows of every batch that a process read, by row."""
    return [json.loads(line) for line in Path(f"{workdir}-{processes}-{index}").read_text().splitlines()]


def batches(workdir, processes):
    """The digests of all rows of every batch, whoever read them."""
    read = [rows_read(workdir, processes, i) for i in range(processes)]
    merged = [{row: digest for part in parts for row, digest in part.items()} for parts in zip(*read, strict=True)]
    return [sorted(batch.items()) for batch in merged]


def test_every_process_reads_its_share(short):
    """Two processes read half of each batch each; the tests below find one and four reading the same batches."""
    outputs, workdir = short
    assert all(text in outputs[0] and text not in outputs[1] for text in ("new run in", "loss curves:"))  # one speaks
    shares = [[set(batch) for batch in rows_read(workdir, 2, i)] for i in range(2)]
    assert len(shares[0]) == 2 + 3  # of the steps and of the evaluation
    assert all(mine == {"0", "1"} and theirs == {"2", "3"} for mine, theirs in zip(*shares, strict=True))


def assert_same_run(workdir, reference, other_from):
    """Losses and parameters of two runs; bit for bit until the step from which the number of processes differs."""
    for key in ("loss", "grad_norm", "val_loss"):
        ours, theirs = rows_of(workdir, key), rows_of(reference, key)
        assert [step for step, _ in ours] == [step for step, _ in theirs]
        for (step, value), (_, expected) in zip(ours, theirs, strict=True):
            if step <= other_from:
                assert value == expected, (key, step)
            assert_close(value, expected, "float32", reduction=64, gradient=True, name=f"{key} of step {step}")
    params, expected = load_params(workdir), load_params(reference)
    assert params[2] == expected[2] == STEPS
    for ours, theirs in zip(jax.tree.leaves(params[1]), jax.tree.leaves(expected[1]), strict=True):
        # Adam divides by gradients: where one is rounding alone, the parameter moves by as much as anywhere.
        assert np.median(np.abs(ours - theirs)) <= 1e-6 * np.max(np.abs(theirs))
        assert np.max(np.abs(ours - theirs)) <= 1e-3 * np.max(np.abs(theirs))


@pytest.mark.slow
def test_one_is_told_to_stop_and_both_save(start, reference, tmp_path):
    """SIGTERM to the process that does not write; one process resumes what two saved."""
    workdir = tmp_path / "run"
    children = start(workdir, 2, pause=0.3)
    try:
        wait_until(lambda: len(rows_of(workdir, "loss")) >= 2, children)
        children[1].send_signal(signal.SIGTERM)
        outputs = finish(children)
    finally:
        kill(children)
    (done,) = (int(word) for word in outputs[0].split("stopped by a preemption notice with step ")[1].split()[:1])
    assert 2 < done < STEPS and steps_of(workdir)[-1] == done
    (output,) = finish(start(workdir, 1))
    assert f"resumed {workdir} at step {done}\n" in output
    assert_same_run(workdir, reference, done)
    evaluated = 3 * (done >= 6)  # batches of the evaluation after step 6
    assert batches(workdir, 1) == batches(reference, 2)[done + evaluated :]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 4])
def test_killed_in_a_save(start, reference, tmp_path, processes):
    """SIGKILL to two processes while the second checkpoint is written; another number resumes from the first."""
    workdir = tmp_path / "run"
    children = start(workdir, 2, pause=0.2, pause_in_save=3.0)

    def saving():
        return steps_of(workdir) and any("tmp" in path.name for path in (workdir / "checkpoints").iterdir())

    try:
        wait_until(saving, children)
        children[random.Random(processes).randrange(2)].kill()
    finally:
        kill(children)
    assert steps_of(workdir) == [4] and saving()
    outputs = finish(start(workdir, processes))
    assert f"resumed {workdir} at step 4\n" in outputs[0]
    assert steps_of(workdir) == [8, 12]
    assert_same_run(workdir, reference, 4)
    # A resume that began elsewhere would read other batches.
    assert batches(workdir, processes) == batches(reference, 2)[4:]


def test_a_manifest_names_the_files_of_all_processes(short):
    digests = json.loads((short[1] / "checkpoints" / "2" / MANIFEST).read_text())
    assert {f"state/ocdbt.process_{i}" for i in range(2)} <= {"/".join(name.split("/")[:2]) for name in digests}


@pytest.mark.slow
def test_twenty_kills_at_random_moments(tmp_path):
    """`launch.fault_loop`, which compares with a run that nothing happened to; its log of a longer one is in docs."""
    command = [sys.executable, "-m", "launch.fault_loop", "--kills=20", "--steps=700", "--seed=2"]
    log = tmp_path / "log"
    done = subprocess.run([*command, f"--workdir={tmp_path / 'runs'}", f"--log={log}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = log.read_text().splitlines()
    assert len(lines) == 22 and lines[-1].endswith("bit for bit")
