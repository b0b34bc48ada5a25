"""The whole run: its files, bit-exact resumption after a kill, starts from weights, and failures that say why."""

import dataclasses
import functools
import json
import re
import resource
import shutil
import signal
from types import SimpleNamespace

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tokenizers
from jax.experimental.compilation_cache import compilation_cache as compilation_cache_lib
from support.runs import (
    STEPS,
    assert_same_arrays,
    finish,
    kill,
    launch,
    make_config,
    rows_of,
    steps_of,
    wait_until,
    write_corpus,
)

from idattn.config import OptimConfig, from_config_dict
from idattn.data import load_data, load_tokenizer, train_iterator
from idattn.train import loop, train
from idattn.train.checkpoint import load_params
from idattn.train.metrics import read_metrics
from idattn.train.step import Trainer
from idattn.train.stop import StopRequest


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module", autouse=True)
def compilation_cache(tmp_path_factory):
    """The runs of this module compile the same step; the relaunched run does not use this, and compiles anew."""
    folder = tmp_path_factory.mktemp("cache")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    compilation_cache_lib.reset_cache()
    yield folder
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache_lib.reset_cache()


@pytest.fixture(scope="module", autouse=True)
def traced_once():
    """Runs of this process with equal configs share a trainer: its programs depend on nothing else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Trainer", functools.cache(Trainer))
        yield


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """(config, workdir, returned dictionary) of an uninterrupted run."""
    config = make_config(corpus, ngram_orders=2, sample_prompt="the", sample_tokens=5)
    workdir = tmp_path_factory.mktemp("runs") / "a"
    return config, workdir, train(config, workdir)


def without_sample(config):
    """The same run, without n-grams and a sample at its end, for which a decoder is compiled."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, ngram_orders=0, sample_prompt=""))


def some_differ(actual, expected):
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return any(not np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)


def test_files_and_metrics(finished):
    config, workdir, _ = finished
    assert {path.name for path in workdir.iterdir()} == {
        "config.json", "data.json", "metrics.jsonl", "loss.png", "tensorboard", "checkpoints", "lock",
    }  # fmt: skip
    assert from_config_dict(json.loads((workdir / "config.json").read_text())) == config
    assert (workdir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.stat().st_size > 0 for path in (workdir / "tensorboard").iterdir()] == [True]
    assert steps_of(workdir) == [8, 12]
    assert load_tokenizer(workdir / "checkpoints" / "12" / "tokenizer").fingerprint == "bytes"
    losses = rows_of(workdir, "loss")
    assert [step for step, _ in losses] == list(range(1, STEPS + 1))
    assert abs(losses[0][1] - np.log(257)) < 0.1  # a new model knows nothing
    assert losses[-1][1] < losses[0][1] - 0.3
    speeds, times = rows_of(workdir, "tokens_per_second"), rows_of(workdir, "seconds_per_step")
    assert [step for step, _ in speeds] == list(range(2, STEPS + 1))  # the first step compiles
    assert [speed * seconds for (_, speed), (_, seconds) in zip(speeds, times, strict=True)] == pytest.approx([64] * 11)
    assert rows_of(workdir, "tokens") == [(step, 64 * step) for step in range(1, STEPS + 1)]
    perplexities = [(step, pytest.approx(np.exp(loss))) for step, loss in rows_of(workdir, "val_loss")]
    assert rows_of(workdir, "val_perplexity") == perplexities
    rates = [rate for _, rate in rows_of(workdir, "learning_rate")]
    assert rates[:2] == pytest.approx([5e-3, 1e-2])
    assert rates[-1] == pytest.approx(1e-5)
    assert all(48 < targets <= 64 for _, targets in rows_of(workdir, "targets"))
    assert any(targets < 64 for _, targets in rows_of(workdir, "targets"))  # borders of documents do not count


def test_returned_values(finished):
    config, workdir, result = finished
    assert set(result) == {
        "step", "finished", "val_loss", "best_val_loss", "parameters", "ngram_losses", "nats_per_byte", "sample",
        "longest_copy",
    }  # fmt: skip
    assert (result["step"], result["finished"]) == (STEPS, True)
    validation = rows_of(workdir, "val_loss")
    assert [step for step, _ in validation] == [6, 12]
    assert result["val_loss"] == validation[-1][1]
    assert result["best_val_loss"] == min(loss for _, loss in validation)
    loaded, params, step = load_params(workdir)
    assert (loaded, step) == (config, STEPS)
    assert result["parameters"] == sum(x.size for x in jax.tree.leaves(params)) > 2 * 257 * 12
    assert set(result["ngram_losses"]) == {"bytes"}  # which the tokens are
    assert len(result["ngram_losses"]["bytes"]) == 2
    assert all(0 < loss < np.log(257) for loss in result["ngram_losses"]["bytes"])
    assert result["nats_per_byte"] == pytest.approx(result["val_loss"])
    assert isinstance(result["sample"], str)
    assert 1 <= len(result["sample"]) <= 5
    assert result["longest_copy"] in result["sample"]


def test_best_differs_from_last(finished, tmp_path, capsys):
    """The best loss of an earlier launch counts, though this launch evaluates only the last state."""
    config, workdir, result = finished
    lines = [dict(row) for row in read_metrics(workdir / "metrics.jsonl")]
    for row in lines:
        if row["step"] == 6 and "val_loss" in row:
            row["val_loss"] = 1.25
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    again = train(without_sample(config), copy)
    assert again["best_val_loss"] == 1.25
    assert again["val_loss"] == result["val_loss"]


def test_finished_run_does_no_more_steps(finished, monkeypatch, capsys):
    config, workdir, result = finished
    metrics = (workdir / "metrics.jsonl").read_bytes()
    calls = []
    monkeypatch.setattr(Trainer, "step", lambda *args: calls.append(args))
    assert train(config, workdir) == result
    assert calls == []
    assert f"resumed {workdir} at step {STEPS}" in capsys.readouterr().out
    assert (workdir / "metrics.jsonl").read_bytes() == metrics
    assert steps_of(workdir) == [8, 12]


def test_another_config_is_refused(finished):
    config, workdir, _ = finished
    metrics = (workdir / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"config\.json is of another run \(seed: 42 there, 43 now\)"):
        train(dataclasses.replace(config, seed=43), workdir)
    longer = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=17))
    with pytest.raises(ValueError, match=r"data\.seq_len: 16 there, 17 now"):
        train(longer, workdir)
    assert (workdir / "metrics.jsonl").read_bytes() == metrics


def test_resumes_bit_exact_after_sigkill(finished, tmp_path, compilation_cache):
    config, reference, result = finished
    workdir = tmp_path / "b"
    children = launch(config, workdir, pause=0.3, cache=compilation_cache)
    try:
        wait_until(lambda: steps_of(workdir) and rows_of(workdir, "loss")[-1][0] > steps_of(workdir)[-1], children)
    finally:
        kill(children)
    assert children[0].returncode == -signal.SIGKILL
    killed_at, checkpoint = rows_of(workdir, "loss")[-1][0], steps_of(workdir)[-1]
    assert 0 < checkpoint <= killed_at < STEPS

    (output,) = finish(launch(config, workdir))
    assert f"resumed {workdir} at step {checkpoint}\n" in output
    assert f"({result['val_loss']:.3f} per token)\n" in output
    for key in ("loss", "grad_norm", "learning_rate", "targets", "tokens", "val_loss"):
        assert rows_of(workdir, key) == rows_of(reference, key), key  # the same numbers, each step once
    assert [step for step, _ in rows_of(workdir, "loss")] == list(range(1, STEPS + 1))
    config_b, params_b, step_b = load_params(workdir)
    config_a, params_a, step_a = load_params(reference)
    assert (config_b, step_b) == (config_a, step_a) == (config, STEPS)
    assert_same_arrays(params_b, params_a)
    assert some_differ(params_a, load_params(reference, 8)[1])


def test_a_disk_that_fills_up(finished, tmp_path, compilation_cache, capsys):
    """No file may grow past 16 KiB once there is a checkpoint: the next is refused, and nothing is lost."""
    config, reference = without_sample(finished[0]), finished[1]
    workdir = tmp_path / "full"
    children = launch(config, workdir, pause=0.2, cache=compilation_cache)
    try:
        wait_until(lambda: steps_of(workdir), children)
        resource.prlimit(children[0].pid, resource.RLIMIT_FSIZE, (2**14, 2**14))
        output = children[0].communicate(timeout=120)[0]
    finally:
        kill(children)
    assert children[0].returncode == 1
    assert f"The checkpoint of step 8 could not be written to {workdir / 'checkpoints'}" in output
    assert "File too large" in output and "it resumes from step 4." in output
    train(config, workdir)
    assert f"resumed {workdir} at step 4\n" in capsys.readouterr().out
    assert rows_of(workdir, "loss") == rows_of(reference, "loss")
    assert steps_of(workdir) == [8, 12]


def test_a_folder_that_cannot_be_written(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"workdir='.*file/run' cannot be written .*name a folder that can"):
        train(make_config(corpus), tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("moment", "owner", "name", "done", "sent"),
    [
        ("a compilation", Trainer, "step", 1, signal.SIGTERM),
        ("an evaluation", loop._Run, "_evaluate", 6, signal.SIGINT),
        ("a save", loop.Checkpoints, "save", 4, signal.SIGTERM),
    ],
)
def test_a_request_to_stop_is_honoured(finished, tmp_path, monkeypatch, capsys, moment, owner, name, done, sent):
    """A signal in the middle of something: the step that it came in is saved, and the run resumes bit for bit."""
    config, reference = without_sample(finished[0]), finished[1]
    function, calls = getattr(owner, name), []

    def interrupted(*args, **kwargs):
        calls.append(0)
        if len(calls) == 1:
            signal.raise_signal(sent)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)
    handler = signal.getsignal(sent)
    stopped = train(config, tmp_path / "run")
    assert (stopped["step"], stopped["finished"]) == (done, False)
    assert f"stopped by {sent.name} with step {done} of {STEPS} saved" in capsys.readouterr().out
    assert signal.getsignal(sent) is handler
    assert steps_of(tmp_path / "run")[-1] == done
    again = train(config, tmp_path / "run")
    assert (again["step"], again["finished"]) == (STEPS, True)
    for key in ("loss", "val_loss"):
        assert rows_of(tmp_path / "run", key) == rows_of(reference, key)


def test_a_second_ctrl_c_stops_at_once():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it
    try:
        with StopRequest() as stop:
            assert not stop.reached(1)
            signal.raise_signal(signal.SIGINT)
            assert stop.reached(1) and stop.reason == "SIGINT"
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_seed_is_another_run(finished, corpus, tmp_path, capsys):
    """Negative control of the bitwise comparisons: the numbers depend on the data order and the start."""
    config, reference, _ = finished
    train(make_config(corpus, seed=43), tmp_path / "c")
    bars = capsys.readouterr().err.split("\r")  # what takes long, and does no step, has a name
    assert bars[1].startswith("compiling:   0%") and any(bar.startswith("evaluating:") for bar in bars)
    assert bars[-1].startswith("100%")
    pairs = zip(rows_of(tmp_path / "c", "loss"), rows_of(reference, "loss"), strict=True)
    assert all(ours != theirs for ours, theirs in pairs)


def test_a_workdir_of_any_name(corpus, tmp_path):
    """Spaces, letters beyond ASCII and a symlink, as the folder of a run with Muon that is resumed and loaded."""
    optim = OptimConfig(name="muon", peak_lr=1e-2, warmup_steps=1)
    config = make_config(corpus, mixer="softmax", optim=optim, steps=2, eval_every=2, checkpoint_every=1)
    disk = tmp_path / "große Läufe" / "试验 1 #%"
    disk.mkdir(parents=True)
    (tmp_path / "link").symlink_to(disk, target_is_directory=True)
    workdir = tmp_path / "link" / "a run"
    whole = train(config, workdir)
    shutil.rmtree(workdir / "checkpoints" / "2")
    assert train(config, disk / "a run") == whole
    loaded, _, step = load_params(workdir)
    assert (loaded, step, steps_of(disk / "a run")) == (config, 2, [1, 2])
    assert [step for step, _ in rows_of(disk / "a run", "loss")] == [1, 2]


class Stopped(Exception):
    pass


@pytest.fixture
def before_first_step(monkeypatch):
    """The (start, state) that a run would do its first step from; the run ends there."""
    seen = []

    def stop(self, start, state, checkpoints):
        seen.append((start, state))
        raise Stopped

    monkeypatch.setattr(loop._Run, "_steps", stop)
    return seen


def test_init_from_starts_at_step_0_with_the_weights(finished, corpus, tmp_path, before_first_step, capsys):
    _, reference, _ = finished
    config = make_config(corpus, seed=7)
    for options in ({"init_from": str(reference)}, {"init_from": str(reference / "checkpoints" / "8")}, {}):
        with pytest.raises(Stopped):
            train(config, tmp_path / str(len(before_first_step)), **options)
    with pytest.raises(Stopped):  # stopped before its first checkpoint, the run starts from the weights again
        train(config, tmp_path / "0", init_from=str(reference))
    latest, eighth, fresh, again = before_first_step
    assert again[0] == 0
    assert_same_arrays(again[1], latest[1])
    assert (latest[0], eighth[0], fresh[0]) == (0, 0, 0)
    assert_same_arrays(latest[1]["params"], load_params(reference)[1])
    assert_same_arrays(eighth[1]["params"], load_params(reference, 8)[1])
    expected = Trainer(config).init()
    assert_same_arrays(fresh[1], expected)
    assert some_differ(fresh[1]["params"], latest[1]["params"])
    for name in ("opt_state", "step", "not_finite"):  # moments and counts start anew
        assert_same_arrays(latest[1][name], expected[name])
    output = capsys.readouterr().out
    assert f"weights from {reference}, step {STEPS}\n" in output
    assert f"weights from {reference / 'checkpoints' / '8'}, step 8\n" in output
    assert f"new run in {tmp_path / '0'}\n" in output


@pytest.mark.parametrize("change", [{"model_dim": 16}, {"mixers": ("softmax",)}, {"rope_base": 100.0}])
def test_init_from_refuses_another_model(finished, corpus, tmp_path, change, before_first_step):
    _, reference, _ = finished
    config = make_config(corpus)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **change))
    with pytest.raises(ValueError, match="holds the weights of another model") as error:
        train(config, tmp_path / "run", init_from=str(reference))
    ((name, value),) = change.items()
    assert f"than this config's (model.{name}: " in str(error.value) and f" there, {value!r} now)." in str(error.value)
    assert before_first_step == [] and not (tmp_path / "run" / "config.json").exists()


def test_init_from_refuses_another_tokenizer(finished, corpus, tmp_path, before_first_step):
    """Embeddings of bytes say nothing of other pieces, even where the vocabulary has as many."""
    _, reference, _ = finished
    characters = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "a": 1}, unk_token="a"))
    characters.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    characters.add_special_tokens(["<s>"])
    characters.save(str(tmp_path / "characters.json"))
    config = make_config(corpus)
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=f"{tmp_path}/characters.json"))
    with pytest.raises(ValueError, match=r"was trained with another tokenizer \(bytes\) than this") as error:
        train(other, tmp_path / "run", init_from=str(reference))
    assert before_first_step == [] and not (tmp_path / "run" / "config.json").exists()
    (stored,) = re.findall(r"--config.data.tokenizer=(.+?), and", str(error.value))
    given = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=stored))
    with pytest.raises(Stopped):
        train(given, tmp_path / "run", init_from=str(reference))


def test_not_finite_stops_with_the_state_before(corpus, tmp_path):
    """A first step of absurd size succeeds; the second has no finite loss and must change nothing."""
    config = make_config(
        corpus, mixer="softmax", optim=OptimConfig(peak_lr=1e30, warmup_steps=0, clip_norm=1e30, ssm_lr_cap=1e30)
    )
    workdir = tmp_path / "run"
    with pytest.raises(FloatingPointError, match=r"step 2: loss .*not-finite-at-step-2.*lower learning rate") as error:
        train(config, workdir)
    assert str(workdir / "not-finite-at-step-2") in str(error.value)
    assert [step for step, _ in rows_of(workdir, "loss")] == [1]
    assert steps_of(workdir) == []

    trainer = Trainer(config)
    with ocp.StandardCheckpointer() as checkpointer:
        aside = checkpointer.restore(workdir / "not-finite-at-step-2", trainer.abstract_state())
    _, windows, _ = load_data(config.data)
    batch = next(train_iterator(windows, config.train.batch_size, config.seed))
    after_one, metrics = trainer.step(trainer.init(), batch)
    assert (int(metrics["not_finite"]), int(aside["not_finite"]), int(aside["step"])) == (0, 2, 1)  # seen a step late
    for name in ("params", "opt_state"):
        assert_same_arrays(aside[name], after_one[name])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(aside["params"]))
    assert max(np.abs(x).max() for x in jax.tree.leaves(aside["params"])) > 1e29


def test_speed_is_of_steps_alone(corpus, tmp_path, monkeypatch, capsys):
    """Seconds a step of a second, but for evaluations; a step that is not finite and may be skipped ends nothing."""
    changes = {"eval_every": 4, "checkpoint_every": 6, "log_every": 2, "skip_not_finite": 1}
    config = make_config(corpus, mixer="softmax", steps=6, **changes)
    run, seconds, rows = loop._Run(config, tmp_path, "", (0, 0), []), [0], {}

    def step(self, state, batch):
        seconds[0] += 1
        return state, {"loss": np.float32(np.nan), "grad_norm": np.float32(np.nan), "not_finite": np.int32(1)}

    def evaluate(self, state):
        seconds[0] += 100
        return 1.0

    monkeypatch.setattr(Trainer, "step", step)
    monkeypatch.setattr(loop._Run, "_evaluate", evaluate)
    monkeypatch.setattr(loop._Run, "_write", lambda self, step, metrics: rows.setdefault(step, dict(metrics)))
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: seconds[0]))
    monkeypatch.setattr(loop, "device_peak_flops", lambda kind: 1e9)
    run.stop, run.writer = StopRequest(), None
    run._steps(0, None, SimpleNamespace(save=lambda *state: None))
    # A step is reported while the next one runs, and before an evaluation at once.
    assert {step: row["seconds_per_step"] for step, row in rows.items()} == {2: 1.0, 4: 0.5, 6: 1.0}
    assert {step: row["tokens_per_second"] for step, row in rows.items()} == {2: 64.0, 4: 128.0, 6: 64.0}
    assert capsys.readouterr().out.count("skipped: loss nan, gradient norm nan (1 of 1 that may be)") == 1
    run.trainer = SimpleNamespace(mesh=SimpleNamespace(size=8))
    assert run._speed(1.0)["mfu"] == pytest.approx(rows[2]["mfu"] / 8)


def test_nats_per_byte_of_tokens_that_are_no_bytes(tmp_path, monkeypatch):
    """Where the loss of a target is its id, their sum over the bytes of the held-out documents."""
    texts = {"a": "the café, the café opened again " * 90, "b": "the café opened", "c": "漢 été, again the été"}
    rows = (json.dumps({"id": name, "text": text}) + "\n" for name, text in texts.items())
    (tmp_path / "corpus.jsonl").write_text("".join(rows))
    config = make_config(tmp_path / "corpus.jsonl", vocab_size=290, eval_batches=99, ngram_orders=1)
    data = dataclasses.replace(config.data, tokenizer="bpe:290", holdout=("b", "c"))
    run = loop._Run(dataclasses.replace(config, data=data), tmp_path, "", (0, 0), [])

    def loss(params, batch):
        return (batch["targets"] * batch["loss_mask"]).sum(), batch["loss_mask"].sum()

    run.trainer = SimpleNamespace(mesh=run.trainer.mesh, loss=loss)
    lines = {}
    monkeypatch.setattr(loop, "plot_losses", lambda workdir, baselines: lines.update(baselines))
    run._evaluate({"params": None})
    result, size = run._report({}), len((texts["b"] + texts["c"]).encode())
    ids = np.concatenate([run.tokenizer.encode(texts[name]) for name in "bc"])
    assert result["nats_per_byte"] == pytest.approx(ids.sum() / size, rel=1e-6)
    per_token = {name: losses[0] * size / len(ids) for name, losses in result["ngram_losses"].items()}
    assert lines == pytest.approx({f"best n-gram of {name}": loss for name, loss in per_token.items()})


def test_resumes_after_validation_losses_that_were_not_finite(finished, tmp_path):
    config, workdir, result = finished
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    rows = [row | {"val_loss": None} if "val_loss" in row else row for row in read_metrics(workdir / "metrics.jsonl")]
    rows += [{"step": STEPS, "val_loss": None}]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = train(without_sample(config), copy)
    assert again["best_val_loss"] == again["val_loss"] == result["val_loss"]


def test_inputs_that_do_not_fit(corpus, tmp_path):
    workdir = tmp_path / "run"
    with pytest.raises(ValueError, match=r"model\.vocab_size=256 must be at least the 257 tokens of .*'bytes'"):
        train(make_config(corpus, vocab_size=256), workdir)
    with pytest.raises(ValueError, match=r"has [1-9] windows, fewer than batch_size=64"):
        train(make_config(corpus, seq_len=128, batch_size=64), workdir)
    for window in ((0, 2), (3, 2), (2, STEPS + 1), (-1, 2)):
        with pytest.raises(ValueError, match=rf"profile=\({window[0]}, {window[1]}\) must be .* of the {STEPS} "):
            train(make_config(corpus), workdir, profile=window)
    with pytest.raises(ValueError, match="heads_per_kv=2 needs a readout by queries"):
        config = make_config(corpus, mixer="s4d")
        ssm = dataclasses.replace(config.model.ssm, heads_per_kv=2)
        train(dataclasses.replace(config, model=dataclasses.replace(config.model, ssm=ssm)), workdir)
    assert not (workdir / "config.json").exists()  # so the corrected config may use the folder


def test_profile_window_and_config_dict(corpus, tmp_path):
    """A nested dict is as good as a Config; `config.json` is one. The later launch is past the window."""
    config = make_config(corpus, mixer="softmax", steps=3, eval_every=3, checkpoint_every=3)
    workdir = tmp_path / "run"
    result = train(dataclasses.asdict(config), workdir, profile=(2, 2))
    assert set(result) == {"step", "finished", "val_loss", "best_val_loss", "parameters"}
    assert (result["step"], result["finished"]) == (3, True)
    traces = list((workdir / "profile").rglob("*.xplane.pb"))
    assert [path.stat().st_size > 1000 for path in traces] == [True]
    assert train(json.loads((workdir / "config.json").read_text()), workdir, profile=(2, 3)) == result
    assert list((workdir / "profile").rglob("*.xplane.pb")) == traces


def test_resume_inside_a_profile_window(corpus, tmp_path):
    config = make_config(corpus, mixer="softmax", steps=3, eval_every=3, checkpoint_every=1, keep_latest=3)
    workdir = tmp_path / "run"
    whole = train(config, workdir)
    assert steps_of(workdir) == [1, 2, 3]
    for step in ("2", "3"):
        shutil.rmtree(workdir / "checkpoints" / step)
    assert train(config, workdir, profile=(1, 2)) == whole
    assert not (workdir / "profile").exists()
    assert steps_of(workdir) == [1, 2, 3]
