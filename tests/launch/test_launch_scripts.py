"""The cluster scripts: what they would run, what they run where gcloud and SLURM are stubs, and local.sh for real."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.runs import ROOT, TINY

SCRIPTS = ["local", "slurm", "tpu"]
SLICE = ["--name=pod", "--zone=europe-west4-b"]
RUN = ["--config=configs/paper.py:1.3B,interdomain", "--workdir=gs://bucket/it's a run"]
SRUN = ["srun", "--cpus-per-task=8", "--gpu-bind=none", "--kill-on-bad-exit=1", "python", "-m", "launch.train"]
RECORD = 'printf "%s\\n" "$(basename "$0") $*" >>"$HOME/calls"\n'
STUBS = {
    "srun": RECORD
    + """
        trap 'exit $SRUN_STATUS' TERM
        echo $$ >"$HOME/step"
        while [ -e "$HOME/busy" ]; do sleep 0.05; done
        exit $SRUN_STATUS""",
    "scancel": RECORD + 'kill "$(cat "$HOME/step")"',
    "scontrol": RECORD,
    "sleep": "",
    "gcloud": RECORD
    + """
        for word; do
            case $word in
                describe) head -n 1 "$HOME/states" | grep . && sed -i 1d "$HOME/states"; exit ;;
                --command=*) cd "$HOME" && exec bash -c "${word#*=}" ;;
            esac
        done""",
}


@pytest.fixture
def execute():
    """A function that starts a script; what is left of them is killed in the end."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "PYTHON"))}
    started = []

    def start(name, *arguments, **environment):
        process = subprocess.Popen(
            [ROOT / "launch" / f"{name}.sh", *arguments], cwd=ROOT, env=inherited | environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what runs in the background ignores it
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def finish(process, status=0):
    """What a process wrote until its end."""
    out, err = process.communicate(timeout=90)
    assert process.returncode == status, err
    return out if status == 0 else err


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def stubs(home, *names):
    """The environment in which `names` are stubs that write their calls to `home`."""
    (home / "bin").mkdir()
    for name in names:
        file = home / "bin" / name
        file.write_text(f"#!/usr/bin/env bash\n{STUBS[name]}")
        file.chmod(0o755)
    return {"HOME": str(home), "PATH": f"{home / 'bin'}:{os.environ['PATH']}"}


def calls(home):
    return (home / "calls").read_text().splitlines()


def test_shellcheck():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, *(f"launch/{name}.sh" for name in SCRIPTS)], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stdout.decode()


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(execute, name):
    text = finish(execute(name, "--help"))
    assert f"launch/{name}.sh" in text and "--dry-run" in text and "#" not in text and "set -e" not in text


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("local --workdir=x", "--config is missing"),
        ("local --config=x --config.train.workdir=x", "--workdir is missing"),
        ("local --processes=0 --config=x --workdir=x", "--processes=0 and --devices=2 must be whole numbers from 1"),
        ("local --devices=many --config=x --workdir=x", "--devices=many must be"),
        ("slurm --dry-run --workdir=x", "--config is missing"),
        ("slurm --config=x --workdir=x", "no SLURM job; submit it with sbatch"),
        ("tpu", "'' is none of create, setup, train"),
        ("tpu crate --name=x --zone=y", "'crate' is none of create, setup, train"),
        ("tpu delete --zone=y", "--name=... is missing"),
        ("tpu setup --name=x", "--zone=... is missing"),
        ("tpu create --name=x --zone=y", "--type=... is missing"),
        ("tpu create --name=x --zone=y --type=tpu7x-8", "--type=tpu7x-8 needs a --runtime"),
        ("tpu create --name=x --zone=y --type=v6e-8 --slices=0", "--slices=0 must be a whole number from 1"),
        ("tpu train --name=x --zone=y --config=z --workdir=w --slices=2", "a run takes --config.mesh.slices=2"),
        ("tpu train --name=x --zone=y --config=z", "--workdir=... is missing"),
        ("tpu stop --name=x --zone=y --config=z", "stop does not take --config=z"),
    ],
)
def test_what_is_missing(execute, command, message):
    name, *arguments = command.split()
    assert message in finish(execute(name, *arguments), status=2)


@pytest.mark.parametrize(
    ("kind", "runtime"),
    [
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-32", "v2-alpha-tpuv5"),
        ("v6e-256", "v2-alpha-tpuv6e"),
        ("v4-8", "tpu-ubuntu2204-base"),
    ],
)
def test_tpu_create_dry_run(execute, kind, runtime):
    out = finish(execute("tpu", "create", *SLICE, f"--type={kind}", "--spot", "--project=mine", "--dry-run"))
    first, waiting, _ = out.splitlines()
    _, create = first.split(" || ")
    command = "gcloud compute tpus queued-resources create pod "
    assert create.startswith(command)
    assert set(create.removeprefix(command).split()) == {
        f"--accelerator-type={kind}", "--node-id=pod", "--project=mine", f"--runtime-version={runtime}", "--spot",
        "--zone=europe-west4-b",
    }  # fmt: skip
    assert "gcloud compute tpus queued-resources describe pod --zone=europe-west4-b --project=mine" in waiting


@pytest.mark.parametrize(("slices", "nodes"), [(1, "--node-id=pod"), (4, "--node-count=4")])
def test_tpu_create_of_slices(execute, tmp_path, slices, nodes):
    (tmp_path / "states").touch()
    process = execute(
        "tpu", "create", *SLICE, "--type=v6e-8", f"--slices={slices}", **stubs(tmp_path, "gcloud", "sleep")
    )
    wait_for(lambda: (tmp_path / "calls").exists() and len(calls(tmp_path)) > 1)
    (tmp_path / "states").write_text("ACTIVE\n")
    assert finish(process).split() == ["ACTIVE"]
    (create,) = (call for call in calls(tmp_path) if " create " in call)
    assert [word for word in create.split() if word.startswith("--node")] == [nodes]


def test_tpu_create_waits(execute, tmp_path):
    environment = stubs(tmp_path, "gcloud", "sleep")
    states = tmp_path / "states"
    states.touch()
    process = execute("tpu", "create", *SLICE, "--type=v6e-8", **environment)
    wait_for(lambda: (tmp_path / "calls").exists() and len(calls(tmp_path)) > 2)
    states.write_text("PROVISIONING\nACTIVE\n")
    assert finish(process).split() == ["PROVISIONING", "ACTIVE"]
    assert [call.split()[4] for call in calls(tmp_path)[:3]] == ["describe", "create", "describe"]
    (tmp_path / "calls").unlink()
    states.write_text("SUSPENDED\n" * 2)  # it is there, but was preempted
    again = execute("tpu", "create", *SLICE, "--type=v6e-8", **environment)
    assert "pod cannot be used: delete it" in finish(again, status=1)
    assert [call.split()[4] for call in calls(tmp_path)] == ["describe", "describe"]


def test_tpu_setup_and_delete_dry_run(execute):
    archive, copy, install = finish(execute("tpu", "setup", *SLICE, "--dry-run")).splitlines()
    assert shlex.split(archive)[:4] == ["git", "-C", str(ROOT), "archive"]
    assert copy.startswith("gcloud compute tpus queued-resources scp /tmp/idattn.tar.gz pod: ")
    assert "--node=all --worker=all" in copy
    (remote,) = (word for word in shlex.split(install) if word.startswith("--command="))
    assert "queued-resources ssh pod" in install and "--node=all --worker=all" in install
    assert "pip install --quiet --editable '.[tpu,gcs]'" in remote
    delete = finish(execute("tpu", "delete", *SLICE, "--dry-run"))
    assert delete == "gcloud compute tpus queued-resources delete pod --force --quiet --zone=europe-west4-b\n"


def test_tpu_train_and_stop(execute, tmp_path):
    environment = stubs(tmp_path, "gcloud")
    python = tmp_path / "idattn" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\ntrap "exit" TERM\nwhile :; do sleep 0.05; done\n')
    python.chmod(0o755)
    train = execute("tpu", "train", *SLICE, *RUN, "--config.model.mixers=('softmax', 'ideal')", **environment)
    log = tmp_path / "idattn" / "train.log"
    wait_for(lambda: log.exists() and len(log.read_text().splitlines()) == 6)
    assert "A run is under way." in finish(execute("tpu", "train", *SLICE, *RUN, **environment), status=1)
    finish(execute("tpu", "stop", *SLICE, **environment))
    assert finish(train).splitlines() == [
        "-m", "launch.train", "--distributed=auto", *RUN, "--config.model.mixers=('softmax', 'ideal')"
    ]  # fmt: skip
    assert [re.findall(r"--(?:node|worker)=(\w+)", call) for call in calls(tmp_path) if "ssh" in call] == [
        ["all", "all"], ["0", "0"], ["all", "all"], ["all", "all"]
    ]  # fmt: skip


def test_slurm_dry_run(execute):
    command, then = finish(execute("slurm", "--dry-run", *RUN)).splitlines()
    assert shlex.split(command) == [*SRUN, "--distributed=auto", *RUN]
    assert "scancel --signal=TERM" in then and "scontrol requeue" in then
    directives = [line for line in (ROOT / "launch/slurm.sh").read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"#SBATCH --signal=B:USR1@300", "#SBATCH --requeue", "#SBATCH --ntasks-per-node=8"} < set(directives)


@pytest.mark.parametrize("status", [0, 3])
@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGTERM, None])
def test_slurm_requeues_and_resumes(execute, tmp_path, sent, status):
    """A run that saves because its time is over returns to the queue; one that ends or is cancelled is not."""
    environment = stubs(tmp_path, "srun", "scancel", "scontrol") | {"SLURM_JOB_ID": "12", "SRUN_STATUS": str(status)}
    (tmp_path / "busy").touch()
    process = execute("slurm", *RUN, **environment)
    wait_for((tmp_path / "step").exists)
    if sent:
        process.send_signal(sent)
    if sent != signal.SIGUSR1:
        (tmp_path / "busy").unlink()
    finish(process, -sent if sent == signal.SIGTERM else status)
    told = ["scancel --signal=TERM 12"] if sent == signal.SIGUSR1 else []
    requeued = ["scontrol requeue 12"] if told and status == 0 else []
    assert calls(tmp_path) == [" ".join([*SRUN, "--distributed=auto", *RUN]), *told, *requeued]


def test_local_dry_run(execute):
    out = finish(execute("local", "--processes=3", "--devices=4", "--dry-run", *RUN, PYTHON=sys.executable))
    *commands, last = (shlex.split(line) for line in out.splitlines())
    assert last == ["wait"]
    port = commands[0][6].split(",")[0]
    assert port.startswith("--distributed=localhost:")
    start = ["env", "JAX_PLATFORMS=cpu", "JAX_NUM_CPU_DEVICES=4", sys.executable, "-m", "launch.train"]
    assert commands == [[*start, f"{port},3,{i}", *RUN, "&"] for i in range(3)]


def test_local_passes_signals_on(execute, tmp_path):
    """The first signal lets the processes end as they like, the second kills them, and the worst status is returned."""
    python = tmp_path / "python"
    python.write_text(
        f"""#!/usr/bin/env bash
        [ "$1" != -c ] || exec {sys.executable} "$@"
        case $3 in
            *,0) trap "touch {tmp_path}/first; exit" TERM ;;
            *) trap "echo no; touch {tmp_path}/second" TERM ;;
        esac
        touch "{tmp_path}/ready${{3##*,}}"
        while :; do sleep 0.05; done"""
    )
    python.chmod(0o755)
    process = execute("local", *RUN, PYTHON=str(python))
    wait_for(lambda: all((tmp_path / f"ready{i}").exists() for i in range(2)))
    process.send_signal(signal.SIGINT)
    wait_for(lambda: (tmp_path / "first").exists() and (tmp_path / "second").exists())
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == (128 + signal.SIGKILL, "1: no\n")


@pytest.mark.slow
def test_local_trains(execute, tmp_path):
    arguments = [argument for argument in TINY if "holdout" not in argument and "batch_size" not in argument]
    settings = {"PYTHON": sys.executable, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    out = finish(execute("local", *arguments, "--config.train.batch_size=4", f"--workdir={tmp_path}", **settings))
    assert f"3 steps of 64 tokens on 4 x cpu (data 4); new run in {tmp_path}\n" in out
    assert f"loss curves: {tmp_path / 'loss.png'}\n" in out
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]
