import json
import math
import struct
import time

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from idattn.train.metrics import MetricsWriter, plot_losses


def read(workdir):
    return [
        json.loads(line, parse_constant=pytest.fail) for line in (workdir / "metrics.jsonl").read_text().splitlines()
    ]


def read_tensorboard(workdir):
    """(tag, step) -> value, as TensorBoard shows it: files by name, each purges the steps that it repeats."""
    scalars = {}
    for file in sorted((workdir / "tensorboard").iterdir()):
        data, start = file.read_bytes(), 0
        while start < len(data):
            (length,) = struct.unpack_from("<Q", data, start)
            event = Event.FromString(data[start + 12 : start + 12 + length])
            start += 16 + length
            if event.session_log.status == event.session_log.START:
                scalars = {key: value for key, value in scalars.items() if key[1] < event.step}
            for value in event.summary.value:
                assert (value.tag, event.step) not in scalars, "a step is there twice"
                scalars[value.tag, event.step] = value.simple_value
    return scalars


def test_writes_each_line_at_once_and_to_tensorboard(tmp_path):
    with MetricsWriter(tmp_path / "run", -1) as writer:
        writer.write(1, {"loss": jnp.float32(2.5), "tokens": np.int64(7)})
        assert read(tmp_path / "run") == [{"step": 1, "loss": 2.5, "tokens": 7.0}]
        writer.write(np.int32(2), {"loss": math.nan, "val_loss": math.inf})
    assert read(tmp_path / "run")[1] == {"step": 2, "loss": None, "val_loss": None}
    events = read_tensorboard(tmp_path / "run")
    assert events["train/loss", 1] == 2.5
    assert math.isnan(events["train/loss", 2])
    assert events["val/loss", 2] == math.inf


@pytest.mark.parametrize("half", ["", '{"step": 4, "lo', '{"step": 4, "loss": 9.0}'])
def test_resume_drops_later_steps(tmp_path, half):
    with MetricsWriter(tmp_path, -1) as writer:
        for step in range(4):
            writer.write(step, {"loss": step})
        writer.write(2, {"val_loss": 0.5})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(half)
    with MetricsWriter(tmp_path, 2) as writer:
        writer.write(3, {"loss": 30})
    assert read(tmp_path) == [
        {"step": 0, "loss": 0},
        {"step": 1, "loss": 1},
        {"step": 2, "loss": 2},
        {"step": 2, "val_loss": 0.5},
        {"step": 3, "loss": 30},
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_resumes_within_a_second_purge_tensorboard(tmp_path, monkeypatch):
    """tensorboardX names a file by the second in which it is opened: ten resumes have ten files, in order."""
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    with MetricsWriter(tmp_path, -1) as writer:
        for step in range(4):
            writer.write(step, {"loss": step})
    for start in range(10):
        with MetricsWriter(tmp_path, 1) as writer:
            writer.write(2, {"loss": 20 + start})
            writer.write(2, {"val_loss": start})
    train = {("train/loss", 0): 0, ("train/loss", 1): 1, ("train/loss", 2): 29}
    assert read_tensorboard(tmp_path) == train | {("val/loss", 2): 9}


def test_new_run_drops_everything(tmp_path):
    for value in (1, 2):
        with MetricsWriter(tmp_path, -1) as writer:
            writer.write(0, {"loss": value})
    assert read(tmp_path) == [{"step": 0, "loss": 2}]


@pytest.mark.parametrize("line", ['{"step": 1, "l', '{"loss": 1}', "7"])
def test_malformed_line_is_an_error_and_stays(tmp_path, line):
    text = f'{{"step": 0}}\n{line}\n{{"step": 2}}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is no JSON object with a step"):
        MetricsWriter(tmp_path, 5)
    assert (tmp_path / "metrics.jsonl").read_text() == text


def write_losses(workdir):
    rng = np.random.default_rng(0)
    with MetricsWriter(workdir, -1) as writer:
        for step in range(10, 401, 10):
            loss = 1.4 + 4 * math.exp(-step / 60) + 0.03 * rng.standard_normal()
            writer.write(step, {"loss": loss if step != 50 else math.nan, "tokens_per_second": 1e4})
            if step % 100 == 0:
                writer.write(step, {"val_loss": loss + 0.1})


def test_plot_is_an_image_of_readable_size(tmp_path):
    write_losses(tmp_path)
    baselines = {"1-gram": 2.8, "3-gram": 2.0, "5-gram": 1.65}
    path = plot_losses(tmp_path, baselines)
    assert path == tmp_path / "loss.png"
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert 600 <= width <= 2000
    assert 400 <= height <= 1500
    assert plot_losses(tmp_path).read_bytes() != data  # the baselines are drawn


def test_plot_of_validation_alone(tmp_path):
    with MetricsWriter(tmp_path, -1) as writer:
        writer.write(1, {"val_loss": 2.0})
    assert plot_losses(str(tmp_path)).exists()


def test_plot_errors(tmp_path):
    with pytest.raises(FileNotFoundError):
        plot_losses(tmp_path)
    with MetricsWriter(tmp_path, -1) as writer:
        writer.write(1, {"tokens_per_second": 2.0})
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_losses(tmp_path)
