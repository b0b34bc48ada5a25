"""A long run needs no more memory than a short one."""

import ctypes
import gc
import os
from pathlib import Path

import jax
import pytest
from support.runs import make_config, write_corpus

from idattn.train import loop, train


@pytest.mark.slow
def test_memory_does_not_grow_with_the_steps(tmp_path, monkeypatch):
    """2,000 steps with ten evaluations and checkpoints: no arrays or objects stay, nor 4 kB of anything a step."""
    seen, evaluate = [], loop._Run._evaluate

    def measured(self, state):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what compilation took, and what the allocator keeps for later
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        seen.append((len(jax.live_arrays()), len(gc.get_objects()), resident))
        return evaluate(self, state)

    monkeypatch.setattr(loop._Run, "_evaluate", measured)
    every = dict(eval_every=200, checkpoint_every=200, log_every=10)
    train(make_config(write_corpus(tmp_path), steps=2000, **every), tmp_path / "run")
    assert len(seen) == 10
    # From step 800 on: the first evaluations and checkpoints leave something behind.
    arrays, objects, resident = (last - first for first, last in zip(seen[3], seen[-1], strict=True))
    assert arrays <= 0
    assert objects < 1200
    assert resident < 1200 * 4096
