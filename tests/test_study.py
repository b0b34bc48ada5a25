"""`launch.study` as users start it: cells in processes of their own, failures, a stop in the middle, a second call."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STUDY = """
from idattn.config import ComputeConfig, Config, DataConfig, ModelConfig, OptimConfig, TrainConfig, to_config_dict
from idattn.study import Study, grid

STUDY = Study(
    cells=grid(["tiny"], {conditions}, [1]),
    evaluate=("--tasks=length", "--lengths=8", "--max_tokens=64", "--chunk_size=8"),
    prepare=("--source={folder}/text.jsonl", "--tokenizer=bytes", "--validation=0.4", "--out={folder}/data"),
)


def get_config(argument):
    cell = STUDY.cell(argument)
    return to_config_dict(
        Config(
            seed=cell.seed,
            model=ModelConfig.tiny("softmax", vocab_size=37 if cell.condition == "broken" else 257),
            data=DataConfig(source="{folder}/data", holdout=(), seq_len=8),
            optim=OptimConfig(peak_lr=1e-2, warmup_steps=1),
            train=TrainConfig(steps={steps}, batch_size=2, eval_every=2, eval_batches=2, checkpoint_every=2),
            compute=ComputeConfig(dtype="float32"),
        )
    )
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_COMPILATION_CACHE_DIR": str(cache)}


def write_study(folder, conditions, steps):
    rows = [{"text": f"document {number} says it again; " * 20} for number in range(12)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = folder / "study.py"
    file.write_text(STUDY.format(folder=folder, conditions=conditions, steps=steps))
    return [sys.executable, "-m", "launch.study", f"--config={file}", f"--workdir={folder / 'study'}"]
