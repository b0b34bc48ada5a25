import dataclasses
import functools
import json
import logging
import re
import shutil
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from support.helpers import defined_flags, run_main
from support.models import export_model, run_of

from idattn.cli import export
from idattn.config import quickstart
from idattn.data import load_tokenizer, train_tokenizer
from idattn.data.stream import sha256_of
from idattn.inference import names as names_lib
from idattn.inference import save_weights
from idattn.nn import LanguageModel
from idattn.train import checkpoint as checkpoint_lib
from idattn.train import folders
from idattn.train.checkpoint import Checkpoints, check_same_run, checkpoint_tokenizer, load_params, save_aside
from idattn.train.folders import damage_of

CONFIG = run_of(quickstart().model)


@functools.cache
def make_state(seed=0, width=16):
    """A state as the trainer has it: two parameter groups, masked weight decay, bfloat16 moments and empty nodes."""
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {
        "embed": {"weight": jax.random.normal(keys[0], (32, width))},
        "layers": {
            0: {"ssm": {"log_delta": jax.random.normal(keys[1], (3,)), "scale": jax.random.normal(keys[2], ())}},
            1: {"weight": jax.random.normal(keys[3], (width, 7))},
        },
    }
    labels = {"embed": "matrices", "layers": {0: "ssm", 1: "matrices"}}
    adamw = optax.adamw(
        optax.cosine_decay_schedule(1e-3, 10),
        mu_dtype=jnp.bfloat16,
        mask=lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree),
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.multi_transform({"matrices": adamw, "ssm": optax.adam(1e-3)}, labels)
    )
    opt_state = optimizer.init(params)
    for _ in range(2):
        updates, opt_state = optimizer.update(jax.tree.map(lambda x: x * 0.3, params), opt_state, params)
        params = optax.apply_updates(params, updates)
    return {"step": jnp.int32(seed), "params": params, "opt_state": opt_state}


def make_data():
    batches = grain.MapDataset.range(100).seed(3).shuffle().repeat().batch(3)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert isinstance(a, jax.Array)
        assert a.dtype == b.dtype
        assert a.sharding == b.sharding
        assert np.array_equal(np.asarray(a), np.asarray(b))


def write_run(workdir, losses, **keep):
    """Saves state `make_state(step)` at each step of `losses`; returns the batch that follows each step."""
    data, following = make_data(), {}
    with Checkpoints(workdir, **{"keep_latest": 5, "keep_best": 1, **keep}) as checkpoints:
        for step, loss in losses.items():
            next(data)
            checkpoints.save(step, make_state(step), data, CONFIG, loss)
            following[step] = next(iter_like(data)).tolist()
    return following


def iter_like(data):
    """A second iterator at the position of `data`."""
    copy = make_data()
    copy.set_state(data.get_state())
    return copy


def resume(workdir):
    """(step, state, next batch) of a new process that opens `workdir`, or None."""
    data = make_data()
    with Checkpoints(workdir, keep_latest=5, keep_best=1) as checkpoints:
        restored = checkpoints.restore_latest(abstract(make_state()), data)
    return restored and (*restored, next(data).tolist())


def steps(workdir):
    return sorted(int(path.name) for path in (Path(workdir) / "checkpoints").iterdir())


def files(folder):
    return sorted(path.relative_to(folder) for path in Path(folder).rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("saved")
    return workdir, write_run(workdir, {10: 2.0, 20: 1.5})


@pytest.fixture
def run(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "run")
    return tmp_path / "run", saved[1]


def test_restores_state_and_data_exactly(run):
    workdir, following = run
    step, state, batch = resume(workdir)
    assert step == 20
    assert_same(state, make_state(20))
    assert batch == following[20] != following[10]


def test_new_run_has_nothing_to_restore(tmp_path):
    assert resume(tmp_path / "new") is None


def test_restores_onto_the_requested_sharding(run):
    mesh = jax.make_mesh((len(jax.devices()),), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), make_state())
    with Checkpoints(run[0], keep_latest=5, keep_best=1) as checkpoints:
        _, state = checkpoints.restore_latest(wanted, make_data())
    assert all(x.sharding == sharding for x in jax.tree.leaves(state))


def test_saved_state_may_be_donated_at_once(tmp_path):
    state = jax.tree.map(jnp.copy, make_state(1))
    expected = jax.tree.map(np.array, state)
    with Checkpoints(tmp_path, keep_latest=1, keep_best=0) as checkpoints:
        checkpoints.save(1, state, make_data(), CONFIG)
        jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(state)
    _, restored, _ = resume(tmp_path)
    assert jax.tree.all(jax.tree.map(np.array_equal, restored, expected))


def test_keeps_the_latest_and_the_best(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: float("nan"), 6: None, 7: 1.5}
    write_run(tmp_path, losses, keep_latest=2, keep_best=2)
    assert steps(tmp_path) == [2, 6, 7]
    with Checkpoints(tmp_path, keep_latest=2, keep_best=2) as checkpoints:
        assert load_params(tmp_path, "best")[2] == 2
        checkpoints.save(8, make_state(8), make_data(), CONFIG, 0.5)
        checkpoints.save(9, make_state(9), make_data(), CONFIG)
        with pytest.raises(ValueError, match="already exists"):
            checkpoints.save(9, make_state(9), make_data(), CONFIG)
    assert steps(tmp_path) == [2, 8, 9]
    assert load_params(tmp_path, "best")[2] == 8


def test_without_losses_only_the_latest_stay(tmp_path):
    write_run(tmp_path, dict.fromkeys(range(1, 5)), keep_latest=2)
    assert steps(tmp_path) == [3, 4]


@pytest.mark.parametrize("stored", ["null", "NaN", "Infinity"])
def test_stored_losses_that_are_not_finite_never_rank(run, stored):
    """As in checkpoints of older versions: the run resumes, and the best is the one with a number."""
    workdir, _ = run
    write_run(workdir, {30: 1.8})
    for step in ("20", "30"):
        metrics = workdir / "checkpoints" / step / "metrics" / "metrics"
        metrics.write_text(f'{{"val_loss": {stored}}}')
        manifest = workdir / "checkpoints" / step / "manifest.json"
        digests = json.loads(manifest.read_text()) | {"metrics/metrics": sha256_of(metrics)}
        manifest.write_text(json.dumps(digests))
    assert load_params(workdir, "best")[2] == 10
    with Checkpoints(workdir, keep_latest=1, keep_best=1) as checkpoints:
        assert checkpoints.restore_latest(abstract(make_state()), make_data())[0] == 30
        checkpoints.save(40, make_state(40), make_data(), CONFIG)
    assert steps(workdir) == [10, 40]
    shutil.rmtree(workdir / "checkpoints" / "10")
    with pytest.raises(FileNotFoundError, match="No checkpoint in .* has a validation loss"):
        load_params(workdir, "best")


def test_other_names_next_to_the_checkpoints_are_ignored(run):
    workdir, following = run
    checkpoints = workdir / "checkpoints"
    names = {"30.old", "30 (copy)", "backup_30", "030", "٣", ".ipynb_checkpoints"}
    for name in names:
        shutil.copytree(checkpoints / "10", checkpoints / name)
    names |= {".DS_Store", "40"}
    for name in (".DS_Store", "40"):
        (checkpoints / name).write_text("a file")
    assert load_params(workdir)[2] == 20
    assert load_params(workdir, "best")[2] == 20
    with pytest.raises(ValueError, match=r"which=30 .* \[10, 20\]"):
        load_params(workdir, 30)
    step, _, batch = resume(workdir)
    assert (step, batch) == (20, following[20])
    write_run(workdir, {30: 1.0})
    assert {path.name for path in checkpoints.iterdir()} == {"10", "20", "30", *names}
    assert not (workdir / "broken").exists()
    assert resume(workdir)[0] == load_params(workdir, "best")[2] == 30


def flip_bit(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "flipped": flip_bit,
    "deleted": lambda file: file.unlink(),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_no_damage_to_a_file_passes_silently(saved, tmp_path, kind):
    """Every file in turn: restored exactly if the file does not matter, else the older checkpoint."""
    workdir, following = saved
    unimportant = set()
    for count, file in enumerate(files(workdir / "checkpoints" / "20")):
        copy = tmp_path / str(count)
        shutil.copytree(workdir, copy)
        DAMAGES[kind](copy / "checkpoints" / "20" / file)
        step, state, batch = resume(copy)
        assert_same(state, make_state(step))
        assert batch == following[step]
        if step == 20:
            unimportant.add(str(file))
        assert (copy / "broken" / "20").is_dir() == (step == 10)
        assert steps(copy) == ([10] if step == 10 else [10, 20])
    assert unimportant == {"_CHECKPOINT_METADATA", "commit_success.txt"}  # Orbax's notes on the checkpoint as a whole


@pytest.mark.parametrize("item", ["state", "data", "config", "metrics", "state/ocdbt.process_0", "state/d"])
def test_missing_folder(run, item, caplog):
    workdir, following = run
    shutil.rmtree(workdir / "checkpoints" / "20" / item)
    with caplog.at_level(logging.WARNING, logger="idattn.train.checkpoint"):
        step, state, batch = resume(workdir)
    assert step == 10
    assert batch == following[10]
    assert_same(state, make_state(10))
    (warning,) = caplog.messages
    assert f"20/{item}/" in warning
    assert f"moved to {workdir / 'broken' / '20'}: " in warning
    assert warning.endswith(" is missing.")


@pytest.mark.parametrize("name", ["manifest.json", "metrics/metrics"])
def test_a_file_that_cannot_be_read_is_no_damage(run, name):
    """As of a server of files that is out of reach; here by a link to itself."""
    workdir, _ = run
    file = workdir / "checkpoints" / "20" / name
    data = file.read_bytes()
    file.unlink()
    file.symlink_to(file)
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        resume(workdir)
    file.unlink()
    file.write_bytes(data)
    assert resume(workdir)[0] == 20
    assert not (workdir / "broken").exists()


def test_a_large_checkpoint_is_announced(run, tmp_path, capsys, monkeypatch):
    """Before it is read, by a run that resumes and by what loads weights; a small one is not."""
    newest, older = (run[0] / "checkpoints" / step for step in ("20", "10"))
    exported = export_model(tmp_path / "exported")
    load_params(older)
    assert not capsys.readouterr().err
    monkeypatch.setattr(folders, "_LARGE", 1)
    resume(run[0])
    for folder in (older, exported):
        load_params(folder)
    assert [re.sub(r", 0\.0 GB$", "", line) for line in capsys.readouterr().err.splitlines()] == [
        f"checking and loading {folder}" for folder in (newest, older, exported)
    ]


def test_orbax_alone_does_not_notice_a_flipped_bit(tmp_path):
    """The reason for the manifest: when this fails, Orbax verifies arrays itself and the manifest may go."""
    state = {"weight": jax.random.normal(jax.random.key(0), (64, 64))}
    save_aside(tmp_path, "state", state)
    flip_bit(max((tmp_path / "state" / file for file in files(tmp_path / "state")), key=lambda f: f.stat().st_size))
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "state", abstract(state))
    assert not np.array_equal(restored["weight"], state["weight"])


def test_training_continues_after_damage(run):
    """The damaged step is saved anew, damaged again, and both broken versions are kept."""
    workdir, _ = run
    for name in ("20", "20-1"):
        (workdir / "checkpoints" / "20" / "manifest.json").unlink()
        data = make_data()
        with Checkpoints(workdir, keep_latest=5, keep_best=1) as checkpoints:
            assert checkpoints.restore_latest(abstract(make_state()), data)[0] == 10
            checkpoints.save(20, make_state(20), data, CONFIG, 1.0)
        assert (workdir / "broken" / name / "state").is_dir()
    assert resume(workdir)[0] == 20


def test_damaged_loss_of_an_older_checkpoint(run):
    workdir, _ = run
    (workdir / "checkpoints" / "10" / "metrics" / "metrics").write_text('{"val_l')
    assert resume(workdir)[0] == 20
    assert steps(workdir) == [20]
    assert (workdir / "broken" / "10").is_dir()


def test_all_damaged_is_an_error_that_moves_nothing(run):
    workdir, _ = run
    for step in ("10", "20"):
        (workdir / "checkpoints" / step / "data" / "metadata").unlink()
    for _ in range(2):  # a scheduler that restarts the job must not get further
        with pytest.raises(RuntimeError, match=r"No checkpoint in .* is valid: .*20.*missing; .*10.*missing"):
            resume(workdir)
    assert steps(workdir) == [10, 20]


def test_interrupted_save_is_ignored(run):
    workdir, following = run
    half = workdir / "checkpoints" / "30.orbax-checkpoint-tmp"
    shutil.copytree(workdir / "checkpoints" / "20", half)
    (half / "manifest.json").unlink()
    assert load_params(workdir)[2] == 20
    data = make_data()
    with Checkpoints(workdir, keep_latest=5, keep_best=1) as checkpoints:
        assert checkpoints.restore_latest(abstract(make_state()), data)[0] == 20
        assert next(data).tolist() == following[20]
        checkpoints.save(30, make_state(30), data, CONFIG)
    assert steps(workdir) == [10, 20, 30]
    assert_same(resume(workdir)[1], make_state(30))


def test_failed_save_is_an_error_and_leaves_the_older(run, monkeypatch):
    workdir, _ = run

    def full(file):
        raise OSError("No space left on device")

    checkpoints = Checkpoints(workdir, keep_latest=1, keep_best=0)
    monkeypatch.setattr(checkpoint_lib, "sha256_of", full)
    checkpoints.save(30, make_state(30), make_data(), CONFIG)
    with pytest.raises(RuntimeError, match="step 30 could not be written .*No space left.* it resumes from step 20"):
        checkpoints.__exit__()
    monkeypatch.undo()
    assert resume(workdir)[0] == 20


@pytest.mark.parametrize(
    "change",
    [
        lambda state: make_state(width=8),
        lambda state: {**state, "extra": jnp.zeros(3)},
        lambda state: {key: value for key, value in state.items() if key != "step"},
        lambda state: {**state, "step": jnp.float32(0)},
    ],
)
def test_another_structure_is_the_callers_error(run, change):
    workdir, _ = run
    with (
        Checkpoints(workdir, keep_latest=5, keep_best=1) as checkpoints,
        pytest.raises(ValueError, match=r"another structure.*(embed.weight|extra|step): .* stored, .* wanted"),
    ):
        checkpoints.restore_latest(abstract(change(make_state())), make_data())
    assert steps(workdir) == [10, 20]
    assert not (workdir / "broken").exists()


def renamed(tree, names):
    """The tree with other keys in its dictionaries."""

    def rename(node):
        return {names.get(key, key): renamed(x, names) for key, x in node.items()} if isinstance(node, dict) else node

    return jax.tree.map(rename, tree, is_leaf=lambda node: isinstance(node, dict))


def test_names_of_older_versions_are_read(tmp_path):
    """A state saved as `mixer.first`, `core.second_conv`, ... resumes in a model that says key, value_conv, ..."""
    keys = iter(jax.random.split(jax.random.key(0), 20))

    def draw(*names):
        return {name: {"weight": jax.random.normal(next(keys), (3, 2))} for name in names}

    core = draw("first_conv", "second_conv", "query_conv", "first_norm", "second_norm")
    params = {"block": {"mixer": draw("first", "second", "query") | {"core": core}}, "softmax": draw("key", "query")}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    updates, opt_state = optimizer.update(params, optimizer.init(params), params)
    old = {"step": jnp.int32(1), "params": optax.apply_updates(params, updates), "opt_state": opt_state}
    names = {
        name: name.replace("first", "key").replace("second", "value") for name in (*params["block"]["mixer"], *core)
    }
    with Checkpoints(tmp_path, keep_latest=1, keep_best=0) as checkpoints:
        checkpoints.save(1, old, make_data(), CONFIG)
    with Checkpoints(tmp_path, keep_latest=1, keep_best=0) as checkpoints:
        assert_same(checkpoints.restore_latest(abstract(old), make_data())[1], old)  # a model that has the old names
        new = renamed(old, names)
        assert "value_norm" in new["opt_state"][1][0].nu["block"]["mixer"]["core"]
        assert_same(checkpoints.restore_latest(abstract(new), make_data())[1], new)
        del new["params"]["block"]["mixer"]["key"]
        with pytest.raises(ValueError, match=r"params\.block\.mixer\.first\.weight: float32\[3, 2\] stored, nothing"):
            checkpoints.restore_latest(abstract(new), make_data())


def test_weights_with_names_of_older_versions_are_read(tmp_path, monkeypatch):
    model = nnx.state(LanguageModel(CONFIG.model, CONFIG.compute, rngs=nnx.Rngs(0)), nnx.Param)
    params = nnx.to_pure_dict(model)
    old = renamed(params, {"mixer_norm": "old_norm", "head": "old_head"})
    with Checkpoints(tmp_path, keep_latest=1, keep_best=0) as checkpoints:
        checkpoints.save(1, {"params": old}, make_data(), CONFIG)
    save_weights(tmp_path / "exported", CONFIG, old, 1)
    assert_same(load_params(tmp_path)[1], old)
    monkeypatch.setattr(names_lib, "_RENAMED", {"old_norm": "mixer_norm", "old_head": "head"})
    for folder in (tmp_path, tmp_path / "exported"):
        assert_same(load_params(folder)[1], params)


def bpe(path, text):
    train_tokenizer([text * 200], 290, path)
    return load_tokenizer(path)


def test_an_export_has_the_loss_of_its_step(run, tmp_path, monkeypatch):
    """Though the run saves another one meanwhile."""
    losses = []
    monkeypatch.setattr(export, "load_params", lambda checkpoint: (CONFIG, None, 10))
    monkeypatch.setattr(export, "save_weights", lambda *arguments: losses.append(arguments[-1]))
    with defined_flags(export):
        run_main(export, f"--checkpoint={run[0]}", f"--out={tmp_path / 'exported'}", "--tokenizer=bytes")
    assert losses == [2.0]


def test_checkpoints_and_exports_contain_their_tokenizer(tmp_path):
    """Another file at the path that the run was trained with is never used, nor one that is named."""
    path = tmp_path / "t.model"
    tokenizer = bpe(path, "the cat sat on the mat. a dog ran.\n")
    config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, tokenizer=str(path)))
    run, exported = tmp_path / "run", tmp_path / "exported"
    with Checkpoints(run, keep_latest=1, keep_best=0, tokenizer=tokenizer) as checkpoints:
        checkpoints.save(1, make_state(), make_data(), config)
    save_weights(exported, config, make_state()["params"], 1)
    shutil.copy(path, tmp_path / "same.model")
    other = bpe(path, "zwei hunde jagen quer durch bonn. xylophon!\n")
    assert other.fingerprint != tokenizer.fingerprint
    for folder in (run, run / "checkpoints" / "1", exported):
        for name in ("", str(tmp_path / "same.model")):
            assert checkpoint_tokenizer(folder, config, name=name).fingerprint == tokenizer.fingerprint
        with pytest.raises(ValueError, match=r"t\.model'.* is another than that of .*Leave it out"):
            checkpoint_tokenizer(folder, config, name=str(path))
    arguments = [f"--checkpoint={run}", f"--out={tmp_path / 'again'}"]
    with defined_flags(export):
        run_main(export, *arguments)
        with pytest.raises(ValueError, match="is another than that of"):
            run_main(export, *arguments, f"--tokenizer={path}")
    path.unlink()
    for folder in (exported, tmp_path / "again"):
        assert checkpoint_tokenizer(folder, config).fingerprint == tokenizer.fingerprint
    flip_bit(run / "checkpoints" / "1" / "tokenizer" / "tokenizer.model")
    with pytest.raises(ValueError, match=r"damaged: .*tokenizer\.model does not match its checksum"):
        load_params(run)


def test_older_checkpoints_use_the_tokenizer_of_their_config(run):
    config = load_params(run[0])[0]
    assert checkpoint_tokenizer(run[0], config).fingerprint == "bytes"
    elsewhere = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer="missing.model"))
    with pytest.raises(FileNotFoundError, match="missing.model"):
        checkpoint_tokenizer(run[0], elsewhere)


def test_same_run(tmp_path):
    workdir = tmp_path / "run"
    check_same_run(workdir, CONFIG)
    check_same_run(workdir, CONFIG)
    check_same_run(workdir, dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, log_every=3)))
    assert [path.name for path in workdir.iterdir()] == ["config.json"]
    other = dataclasses.replace(CONFIG, seed=7, model=dataclasses.replace(CONFIG.model, mixers=("softmax",)))
    with pytest.raises(ValueError, match="--init_from") as error:
        check_same_run(workdir, other)
    assert f"seed: {CONFIG.seed} there, 7 now" in str(error.value)
    assert "model.mixers: ('interdomain',) there, ('softmax',) now" in str(error.value)
    assert "model_dim" not in str(error.value)
    (workdir / "config.json").write_text("")
    with pytest.raises(ValueError, match=r"config\.json is damaged \(empty.*Start the run in another workdir"):
        check_same_run(workdir, CONFIG)


def test_same_run_by_the_content_of_its_data(tmp_path):
    """Paths may change from start to start, content may not; a run of an older version has no digests."""
    digests = {"tokenizer": "t", "train": "a", "validation": "b"}
    moved = dataclasses.replace(CONFIG.data, source="~/elsewhere/", tokenizer="/other/t.model")
    moved = dataclasses.replace(CONFIG, data=moved)
    check_same_run(tmp_path, CONFIG, digests)
    check_same_run(tmp_path, moved, digests)
    for name, path in (("tokenizer", "tokenizer"), ("train", "source"), ("validation", "source")):
        with pytest.raises(ValueError, match=rf"of another run \(the content of data\.{path} \({name}\): '.*' there"):
            check_same_run(tmp_path, moved, digests | {name: "c"})
    (tmp_path / "data.json").write_text("")
    with pytest.raises(ValueError, match=r"data\.json is damaged \(empty"):
        check_same_run(tmp_path, CONFIG, digests)
    (tmp_path / "data.json").unlink()
    check_same_run(tmp_path, CONFIG, digests)


def string_keys(tree):
    return {str(k): string_keys(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def test_load_params(run):
    workdir, _ = run
    write_run(workdir, {30: 1.8})
    for path, which, step in [
        (workdir, "latest", 30),
        (workdir, "best", 20),
        (str(workdir), 10, 10),
        (workdir / "checkpoints" / "10", "latest", 10),
    ]:
        config, params, loaded = load_params(path, which)
        assert loaded == step
        assert config == CONFIG
        assert_same(params, string_keys(make_state(step)["params"]))


def test_load_params_does_not_read_the_optimiser(run, monkeypatch):
    seen = []
    original = ocp.PyTreeCheckpointer.restore

    def restore(self, directory, *, args):
        seen.append(original(self, directory, args=args))
        return seen[-1]

    monkeypatch.setattr(ocp.PyTreeCheckpointer, "restore", restore)
    load_params(run[0])
    assert set(seen[0]) == {"params"}


def test_load_params_errors(run, tmp_path):
    workdir, _ = run
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_params(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="neither a checkpoint nor"):
        load_params(tmp_path)
    for which in (15, "worst"):
        with pytest.raises(ValueError, match=rf"which={which!r} .* \[10, 20\]"):
            load_params(workdir, which)
    for step in steps(workdir):
        shutil.rmtree(workdir / "checkpoints" / str(step) / "metrics")
    with pytest.raises(FileNotFoundError, match="validation loss"):
        load_params(workdir, "best")
    with pytest.raises(ValueError, match=r"damaged: .*metrics.* missing"):
        load_params(workdir)


def test_save_aside(tmp_path):
    for seed in (1, 2):
        save_aside(tmp_path, "nan_state", make_state(seed))
    with ocp.StandardCheckpointer() as checkpointer:
        assert_same(checkpointer.restore(tmp_path / "nan_state", abstract(make_state())), make_state(2))


@pytest.mark.parametrize(("text", "damage"), [("", "empty"), ('{"a": ', "not valid JSON"), ("[]", "a list, not a")])
def test_a_damaged_manifest_is_named(tmp_path, text, damage):
    (tmp_path / "manifest.json").write_text(text)
    assert re.search(rf"manifest\.json is damaged \(.*{damage}.*\)$", damage_of(tmp_path))
