"""Kill a training run at random moments, resume it each time with another number of processes, and compare its losses.

python -m launch.fault_loop --kills=20 --workdir=/tmp/faults --log=docs/faults.txt

Every loss must be that of a run that nothing happened to, bit for bit. The model is small; 1, 2 or 4 local processes
share --devices simulated CPU devices. Each life of the run ends by SIGKILL, to all processes or first to one of them,
or by SIGTERM to one process, which all processes must answer by saving and exiting with 0.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from absl import app, flags

FLAGS = flags.FLAGS
SETTINGS = [
    "--config=configs/quickstart.py", "--config.model.model_dim=16", "--config.model.vocab_size=260",
    "--config.model.num_layers=1", "--config.model.num_heads=2", "--config.model.mlp_dim=16",
    "--config.model.ssm.num_modes=4", "--config.data.seq_len=16", "--config.data.tokenizer=bytes",
    "--config.optim.name=adamw", "--config.optim.warmup_steps=1",
    "--config.train.batch_size=4", "--config.train.log_every=1", "--config.train.eval_batches=1",
    "--config.train.eval_every=50", "--config.train.ngram_orders=0", "--config.train.sample_prompt=",
    "--config.mesh.fsdp=2", "--config.mesh.tensor=2",
]  # fmt: skip


def define_flags() -> None:
    flags.DEFINE_integer("kills", 20, "How many times the run is killed or stopped.", lower_bound=1)
    flags.DEFINE_integer("steps", 600, "Steps of the run.", lower_bound=1)
    flags.DEFINE_integer("checkpoint_every", 5, "Steps between checkpoints; few, to kill many saves.")
    flags.DEFINE_integer("devices", 4, "Simulated devices of all processes together.")
    flags.DEFINE_list("processes", ["1", "2", "4"], "Numbers of processes to choose from.")
    flags.DEFINE_integer("seed", 0, "Seed of the moments, signals and numbers of processes.")
    flags.DEFINE_string("workdir", None, "Folder for the runs; what is there is deleted.", required=True)
    flags.DEFINE_string("log", None, "File for a line on each life.")


def start(workdir: Path, processes: int) -> list[subprocess.Popen]:
    """The processes of a run in `workdir`, whose output goes to files next to it."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(FLAGS.devices // processes),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "cache"),
    }
    run = [f"--config.train.steps={FLAGS.steps}", f"--config.train.checkpoint_every={FLAGS.checkpoint_every}"]
    command = [sys.executable, "-m", "launch.train", *SETTINGS, *run, f"--workdir={workdir}"]
    started = []
    for i in range(processes):
        several = [f"--distributed=localhost:{port},{processes},{i}"] if processes > 1 else []
        with open(workdir.with_suffix(f".{i}.log"), "a") as log:
            started.append(subprocess.Popen([*command, *several], env=environment, stdout=log, stderr=log))
    return started


def losses(workdir: Path) -> dict[tuple[int, str], float]:
    """(step, name) -> value of all losses in a run's metrics."""
    file = workdir / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []
    return {(row["step"], name): row[name] for row in rows for name in ("loss", "val_loss") if name in row}


def checkpoints(workdir: Path) -> tuple[int, bool]:
    """The newest complete checkpoint (0: none), and whether another one is half-written."""
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0), not all(name.isdigit() for name in names)


def wait(processes: list[subprocess.Popen], seconds: float | None = None) -> list[int | None]:
    """The exit codes of processes after at most `seconds`."""
    end = None if seconds is None else time.monotonic() + seconds
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(None if end is None else max(0, end - time.monotonic()))
    return [process.poll() for process in processes]


def end_a_life(workdir: Path, rng: random.Random) -> str:
    """Start the run, end it at a random moment, and say what happened.

    Raises:
      RuntimeError: it ended by itself, lost a checkpoint, or did not answer SIGTERM as it should.
    """
    count = rng.choice([int(n) for n in FLAGS.processes])
    kind = rng.choice(["SIGKILL", "SIGKILL to one, then all", "SIGTERM to one"])
    before, first = checkpoints(workdir)[0], len(losses(workdir))
    processes = start(workdir, count)
    begun = time.monotonic()
    delay = rng.uniform(0, 8)
    if rng.random() < 0.8:  # else it ends while it starts
        while len(losses(workdir)) <= first and None in wait(processes, 0.2):
            pass
    wait(processes, delay)
    if None not in (codes := [p.poll() for p in processes]):
        raise RuntimeError(f"the run ended by itself with {codes}; see {workdir}.*.log")
    newest, saving = checkpoints(workdir)
    step = max((step for step, _ in losses(workdir)), default=0)
    answer = ""
    if kind == "SIGTERM to one":
        # Before the processes are connected, SIGTERM ends them as it ends any program, and nothing is lost.
        began = time.monotonic() - begun > 20 or len(losses(workdir)) > first
        rng.choice(processes).send_signal(signal.SIGTERM)
        codes = wait(processes, 60 if began else 5)
        answer = f", exit {codes}"
        if began and codes != [0] * count:
            raise RuntimeError(f"SIGTERM to one of {count} processes after step {step}: exit {codes}, not all 0.")
    elif kind != "SIGKILL":
        rng.choice(processes).kill()
        wait(processes, rng.uniform(0, 2))
    for process in processes:
        process.kill()
    wait(processes)
    kept = checkpoints(workdir)[0]
    if kept < max(before, newest) or (step and kept < step - 2 * FLAGS.checkpoint_every):
        raise RuntimeError(f"after step {step} checkpoint {kept} is the newest, where {max(before, newest)} was.")
    state = "in a save" if saving else "between saves"
    return f"{count} processes, {kind} after step {step}, {state}{answer}: checkpoint {kept}"


def main(_):
    rng, workdir = random.Random(FLAGS.seed), Path(FLAGS.workdir)
    shutil.rmtree(workdir, ignore_errors=True)
    workdir.mkdir(parents=True)
    lines = []

    def say(line):
        print(line, flush=True)
        lines.append(line)

    every = f"a checkpoint every {FLAGS.checkpoint_every}"
    say(f"{FLAGS.steps} steps on {FLAGS.devices} devices, {every}, seed {FLAGS.seed}")
    for number in range(1, FLAGS.kills + 1):
        say(f"{number:>3}  {end_a_life(workdir / 'disturbed', rng)}")
    for name in ("disturbed", "undisturbed"):
        if any(codes := wait(start(workdir / name, 1))):
            raise SystemExit(f"the {name} run ended with {codes}; see {workdir / name}.0.log")
    disturbed, undisturbed = losses(workdir / "disturbed"), losses(workdir / "undisturbed")
    different = [key for key in undisturbed if disturbed.get(key) != undisturbed[key]]
    if different or len(disturbed) != len(undisturbed):
        raise SystemExit(f"{len(different)} of {len(undisturbed)} losses differ, the first at {different[:1]}.")
    say(f"{len(undisturbed)} losses are those of a run that nothing happened to, bit for bit")
    if FLAGS.log:
        Path(FLAGS.log).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    define_flags()
    app.run(main)
