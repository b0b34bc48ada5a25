"""Tiny training runs for the tests, in this process or in others that can be stopped and killed."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from idattn.config import (
    ComputeConfig,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    SSMConfig,
    TrainConfig,
)
from idattn.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
STEPS = 12
# Flags of `idattn train`: a run of three steps, without text.
TINY = [
    "--config=configs/quickstart.py",
    "--config.model.vocab_size=257",
    "--config.model.model_dim=12",
    "--config.model.num_layers=1",
    "--config.model.num_heads=2",
    "--config.model.mlp_dim=16",
    "--config.model.mixers=('softmax',)",
    "--config.data.tokenizer=bytes",
    "--config.data.seq_len=16",
    "--config.data.holdout=('b',)",
    "--config.optim.name=adamw",
    "--config.optim.warmup_steps=1",
    "--config.train.steps=3",
    "--config.train.batch_size=2",
    "--config.train.log_every=1",
    "--config.train.eval_batches=1",
    "--config.train.ngram_orders=1",
    "--config.train.sample_prompt=ab",
    "--config.train.sample_tokens=4",
]
# Pauses after every step, and before a checkpoint is complete; logs a digest of every row of the batches it reads.
CHILD = """
import hashlib, json, pathlib, sys, time
from idattn.config import from_config_dict
from idattn.train import checkpoint, loop, train
from idattn.cli.train import connect

config, workdir, distributed, settings = sys.argv[1:]
settings = json.loads(settings)
connect(distributed)
write, place, manifest = loop.MetricsWriter.write, loop.place, checkpoint.Checkpoints._write_manifest
rows_log = settings["rows_log"] and open(settings["rows_log"], "a")

def slow_write(self, step, scalars):
    write(self, step, scalars)
    time.sleep(settings["pause"])

def logged_place(mesh, batch, rows, count):
    if rows_log:
        digests = {row: hashlib.sha256(b"".join(x[i].tobytes() for x in batch.values())).hexdigest()
                   for i, row in enumerate(rows)}
        rows_log.write(json.dumps(digests) + "\\n")
        rows_log.flush()
    return place(mesh, batch, rows, count)

def slow_manifest(self):
    time.sleep(settings["pause_in_save"])
    manifest(self)

loop.MetricsWriter.write, loop.place = slow_write, logged_place
checkpoint.Checkpoints._write_manifest = slow_manifest
train(from_config_dict(json.loads(config)), workdir)
"""


def make_config(source, *, mixer="interdomain", seed=42, vocab_size=257, seq_len=16, optim=None, mesh=None, **changes):
    model = ModelConfig(
        vocab_size=vocab_size,
        model_dim=12,
        num_layers=1,
        num_heads=2,
        mlp_dim=16,
        mixers=(mixer,),
        ssm=SSMConfig(num_modes=4),
    )
    values = dict(
        steps=STEPS, batch_size=4, log_every=1, eval_every=6, eval_batches=3, checkpoint_every=4, keep_latest=2
    )
    return Config(
        seed=seed,
        model=model,
        data=DataConfig(source=str(source), holdout=("held out",), seq_len=seq_len),
        optim=optim or OptimConfig(peak_lr=1e-2, warmup_steps=2),
        train=TrainConfig(**(values | changes)),
        compute=ComputeConfig(dtype="float32", chunk_size=8),
        mesh=mesh or MeshConfig(),
    )


def write_corpus(folder):
    """Seven documents of random words, so that windows differ and some hold a border."""
    rng = np.random.default_rng(0)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "then", "sleeps"]
    rows = [{"id": f"d{i}", "text": " ".join(rng.choice(words, 30 + i))} for i in range(6)]
    rows.append({"id": "held out", "text": " ".join(rng.choice(words, 50))})
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def launch(config, workdir, *, processes=1, devices=1, pause=0.0, pause_in_save=0.0, cache=None, rows_log=""):
    """Starts a run over some processes of some devices each.

    Args:
      pause: seconds after every step.
      pause_in_save: seconds before a checkpoint is complete.
      cache: folder of compiled programs, or None.
      rows_log: process i appends the digests of its rows to the file `rows_log` + i, a line a batch; empty: nowhere.
    """
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(jax.config.read("jax_disable_most_optimizations")))
    environment["JAX_NUM_CPU_DEVICES"] = str(devices)
    if cache:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    settings = dict(pause=pause, pause_in_save=pause_in_save)
    return [
        subprocess.Popen(
            [
                sys.executable, "-c", CHILD, json.dumps(dataclasses.asdict(config)), str(workdir),
                f"localhost:{port},{processes},{i}" if processes > 1 else "",
                json.dumps(settings | {"rows_log": rows_log and f"{rows_log}{i}"}),
            ],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(processes)
    ]  # fmt: skip


def wait_until(condition, children, seconds=180):
    """Waits for a condition while all of the processes run."""
    deadline = time.monotonic() + seconds
    while not condition():
        for child in children:
            assert child.poll() is None, child.communicate()[0]
        assert time.monotonic() < deadline, f"not within {seconds} seconds"
        time.sleep(0.02)


def kill(children):
    for child in children:
        child.kill()
    return [child.communicate()[0] for child in children]


def finish(children, seconds=300):
    """The outputs of processes that end well."""
    try:
        outputs = [child.communicate(timeout=seconds)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0] * len(children), "\n\n".join(outputs)
    return outputs


def rows_of(workdir, key):
    """[(step, value)] of the lines of metrics.jsonl that have `key`, in their order."""
    file = workdir / "metrics.jsonl"
    return [(row["step"], row[key]) for row in read_metrics(file) if key in row] if file.exists() else []


def steps_of(workdir):
    """The steps of the complete checkpoints."""
    folder = workdir / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []


def assert_same_arrays(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert np.array_equal(np.asarray(a), np.asarray(b))
