"""The entry points as users start them: `python -m launch.NAME` with values changed on the command line.

The first run has a process of its own; the others are in this one.
"""

import json
import math
import os
import re
import subprocess
import sys

import pytest
from support.programs import run_program
from support.runs import ROOT, TINY

from idattn.cli.train import profile_window
from idattn.train.metrics import read_metrics


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"id": name, "text": f"{name} says it again; " * 20}) + "\n" for name in "ab"))
    return path


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """(finished process, workdir) of a run of three steps, which stores the programs that it compiles."""
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    command = [sys.executable, "-m", "launch.train", *TINY, f"--config.data.source={corpus}", f"--workdir={workdir}"]
    settings = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    settings |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    settings["XDG_CACHE_HOME"] = str(workdir.parent / "cache")
    return subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=180), workdir


def test_train(trained):
    done, workdir = trained
    assert done.returncode == 0, done.stderr
    assert f"3 steps of 32 tokens on 1 x cpu; new run in {workdir}\n" in done.stdout
    assert "validation loss on b, nats per byte\n  n-grams of order" in done.stdout
    assert re.search(r"\n  bytes +\d\.\d{3}\n  this model +(\d\.\d{3})  \(\1 per token\)\n", done.stdout)
    assert "\nsample\n  ab|" in done.stdout
    cache = workdir.parent / "cache" / "idattn"
    assert f"compiled programs are stored in {cache}\n" in done.stdout and list(cache.glob("jit__step-*"))
    assert f"loss curves: {workdir / 'loss.png'}\n" in done.stdout
    config = json.loads((workdir / "config.json").read_text())
    assert (config["model"]["mixers"], config["train"]["steps"], config["optim"]["peak_lr"]) == (["softmax"], 3, 5e-3)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["3"]


@pytest.mark.parametrize("values", [["1"], ["1", "2", "3"], ["a", "b"], ["1", "-2"], [""], []])
def test_profile_windows(values):
    with pytest.raises(
        ValueError, match=f"--profile={','.join(values)} must be FIRST,LAST, .* such as --profile=10,15"
    ):
        profile_window(values)
    assert profile_window(["10", " 15"]) == (10, 15)


def test_train_again_and_from_weights(trained, corpus, tmp_path):
    _, workdir = trained
    arguments = [*TINY, f"--config.data.source={corpus}"]
    again = run_program("train", *arguments, f"--workdir={workdir}", "--config.train.sample_prompt=")
    assert again.returncode == 0, again.stderr
    assert f"resumed {workdir} at step 3\n" in again.stdout
    other = run_program("train", *arguments, f"--workdir={workdir}", "--config.optim.peak_lr=0.5")
    assert other.returncode == 2
    assert other.stderr.count("\n") == 1 and "optim.peak_lr: 0.005 there, 0.5 now" in other.stderr
    fresh = run_program(
        "train", *arguments, f"--workdir={tmp_path / 'new'}", f"--init_from={workdir}", "--profile=2,3",
        "--config.train.sample_prompt=",
    )  # fmt: skip
    assert fresh.returncode == 0, fresh.stderr
    assert f"weights from {workdir}, step 3\n" in fresh.stdout
    assert f"new run in {tmp_path / 'new'}\n" in fresh.stdout
    assert "sample" not in fresh.stdout
    assert len(list((tmp_path / "new" / "profile").rglob("*.xplane.pb"))) == 1


def test_data(tmp_path):
    """Text to a prepared folder, its inspection, training on it, and the perplexity of what was held out."""
    rows = [{"text": f"document {number} says it again; " * 20} for number in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder, workdir = tmp_path / "folder", tmp_path / "run"
    command = [f"--source={tmp_path / 'rows.jsonl'}", "--tokenizer=bytes", f"--out={folder}", "--validation=0.4"]
    first, second = (run_program("prepare_data", *command, "--unit_mb=1", f"--part={number}/2") for number in (1, 0))
    assert first.stdout == f"part 1/2 is done; {folder} misses units of other parts\n", first.stderr
    assert second.stdout.startswith(f"{folder} is complete: "), second.stderr
    settings = second.stdout.splitlines()[1].removeprefix("to train on it: ").replace("'", "").split()

    seen = run_program("inspect_data", folder, "--sample_tokens=40")
    assert seen.returncode == 0, seen.stderr
    assert "2 shards verified" in seen.stdout and "--- document of the split number 0 ---\ndocument " in seen.stdout
    shard = folder / "train-00000.arrayrecord"
    data = shard.read_bytes()

    tiny = [flag for flag in TINY if not any(name in flag for name in ("holdout", "eval_batches", "sample"))]
    tiny.append("--config.train.sample_prompt=")  # `test_train` shows one
    done = run_program("train", *tiny, *settings, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    # TINY asks for n-grams, but a folder may be larger than the memory.
    assert f"validation loss on the validation documents of {folder}: " in done.stdout and "n-grams" not in done.stdout
    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    windows = -(-sum(len(row["text"]) for row in rows) // 16)
    assert all(0 < 2 * row["step"] / windows < row["epoch"] for row in metrics if "epoch" in row)
    assert [row["step"] for row in metrics if "epoch" in row] == [1, 2, 3]

    done = run_program("evaluate", f"--checkpoint={workdir}", "--tasks=perplexity", f"--out={tmp_path / 'evals'}")
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "evals" / "results.json").read_text())["tasks"]["perplexity"]
    held_out = [
        n for n in range(12) if any(f"document {n} says" in document["text"] for document in measured["documents"])
    ]
    assert [document["tokens"] for document in measured["documents"]] == [len(rows[n]["text"]) for n in held_out]
    # A token is a byte here.
    assert [x["bits_per_byte"] for x in measured["documents"]] == pytest.approx(
        [x["loss"] / math.log(2) for x in measured["documents"]], rel=1e-12
    )
    loss = measured["metrics"]["loss"]
    assert f"{loss:.4f}" == f"{metrics[-1]['val_loss']:.4f}"
    assert measured["metrics"] == pytest.approx(
        {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": loss / math.log(2)}, rel=1e-12
    )
    assert f"| perplexity | loss | {loss:.4f} | other setting (1.3B): softmax 2.155, " in done.stdout

    shard.write_bytes(data.replace(b"s\0a\0y\0s\0", b"s\0a\0i\0d\0", 1))
    seen = run_program("inspect_data", folder)
    assert seen.returncode == 1
    assert "train-00000.arrayrecord is damaged: " in seen.stdout and "at byte" in seen.stdout


def test_generate_and_export(trained, tmp_path):
    """`test_generate.py` runs them inside its process; here they start from a run's checkpoint, and from its export."""
    _, workdir = trained
    assert run_program("export", f"--checkpoint={workdir}", f"--out={tmp_path}").returncode == 0
    (loss,) = (row["val_loss"] for row in read_metrics(workdir / "metrics.jsonl") if "val_loss" in row)
    assert f"| validation loss | {loss:.4f} nats per token |\n" in (tmp_path / "README.md").read_text()
    texts = []
    for checkpoint in (workdir / "checkpoints" / "3", tmp_path):
        done = run_program("generate", f"--checkpoint={checkpoint}", "--num_tokens=12", "--prompt=ab says", "--seed=5")
        assert done.returncode == 0, done.stderr
        head, text = done.stdout.split("\n\n", 1)
        assert head == f"{checkpoint}, step 3" and text.startswith("ab says") and len(text) > len("ab says\n")
        texts.append(text)
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("name", "arguments", "messages"),
    [
        (
            "train",
            [*TINY, "--workdir=x", "--config.train.step=3"],
            ["key of config.train='step' is not known. Did you mean 'steps'?"],
        ),
        ("train", ["--workdir=x"], ["--config"]),
        ("train", TINY, ["--workdir"]),
        ("describe", ["--config=paper:1.3b,interdomain"], ["scale='1.3b'", "Did you mean '1.3B'?"]),
        ("describe", ["--config=configs/paper.py:125M,softmx"], ["mixer='softmx'", "Did you mean 'softmax'?"]),
        ("describe", ["--config=paprika:125M"], ["config='paprika' is not known. Did you mean 'paper'?"]),
        ("describe", ["--config=configs/paper.py:125M"], ["'125M' must be SCALE,MIXER"]),
        ("describe", [*TINY, "--config.model.num_heads=5"], ["num_heads=5 must divide model_dim=12."]),
        ("generate", ["--checkpoint=/no/such/run"], ["/no/such/run does not exist"]),
    ],
)
def test_errors(name, arguments, messages):
    done = run_program(name, *arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    for message in messages:
        assert message in done.stderr
    assert not (ROOT / "x").exists()


def test_describe():
    done = run_program("describe", "--config=configs/paper.py:1.3B,interdomain")
    assert done.returncode == 0, done.stderr
    costs = json.loads(done.stdout)
    assert costs["parameters"] == 1352406784 == sum(costs["parameters_by_part"].values())
    assert costs["state_size_per_layer"] == {"interdomain": 524288}
    assert costs["context"] == 4096
    assert costs["training_flops_per_token"] == 3 * costs["forward_flops_per_token"] == 3 * 2673606656
    assert costs["bytes"]["parameters"] == 4 * 1352406784
    shorter = run_program("describe", "--config=configs/paper.py:1.3B,interdomain", "--config.data.seq_len=2048")
    assert json.loads(shorter.stdout)["context"] == 2048
