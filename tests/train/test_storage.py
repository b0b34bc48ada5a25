"""Runs in a bucket: the libraries that speak to Google Cloud Storage speak to a server on this machine."""

import json
import os
import platform
import re
import sys
import threading
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects
from support.runs import assert_same_arrays, kill, launch, make_config, rows_of, steps_of, wait_until, write_corpus

from idattn.data import load_documents, load_tokenizer
from idattn.evals import harness
from idattn.files import read_json, read_json_lines, resolve_path, write_atomic
from idattn.inference import load_context, load_weights, save_weights
from idattn.train import train
from idattn.train.checkpoint import MANIFEST, Checkpoints, check_same_run, load_params, save_aside
from idattn.train.metrics import MetricsWriter
from idattn.train.storage import exclusive


def move(request, response, storage):
    """objects.moveTo, which the emulator lacks."""
    request.params["dest_bucket_name"] = request.params["bucket_name"]
    objects.copy(request, response, storage)
    if response.status == HTTPStatus.OK:
        storage.delete_file(request.params["bucket_name"], request.params["object_id"])


def conditional(handler):
    """Generations of objects in answers and as conditions of requests, which the emulator lacks too."""

    def handle(request, response, storage):
        name = request.params.get("object_id") or request.query.get("name", [""])[0]
        try:
            generation = storage.get_file_obj(request.params.get("bucket_name"), name)["generation"]
        except NotFound:
            generation = "0"
        if request.query.get("ifGenerationMatch", [generation]) != [generation]:
            assert request.data is not None  # the client sends it before it listens
            response.status = HTTPStatus.PRECONDITION_FAILED
        elif request.query.get("ifGenerationNotMatch") == [generation] != ["0"]:
            response.status = HTTPStatus.NOT_MODIFIED
        else:
            response["x-goog-generation"] = generation
            handler(request, response, storage)

    return handle


MOVE = r"/storage/v1/b/(?P<bucket_name>[^/]+)/o/(?P<object_id>[^/]+)/moveTo/o/(?P<dest_object_id>[^/]+)"
ROUTES = [
    (path, {method: conditional(handler) for method, handler in handlers.items()})
    for path, handlers in [(MOVE, {"POST": move}), *server.HANDLERS]
]


def one_at_a_time(router, method, lock=threading.Lock(), handle=server.Router.handle):
    with lock:
        handle(router, method)


@pytest.fixture(scope="module")
def bucket():
    with pytest.MonkeyPatch.context() as patch:
        # Clients hold connections open that they may need: a server of one thread would wait for them.
        patch.setattr(server.server, "HTTPServer", ThreadingHTTPServer)
        patch.setattr(server.Router, "handle", one_at_a_time)
        patch.setattr(server, "HANDLERS", ROUTES)
        with server.create_server("localhost", 0, in_memory=True, default_bucket="bucket") as running:
            address = f"http://localhost:{running._api._httpd.server_port}"
            patch.setenv("STORAGE_EMULATOR_HOST", address)  # gcsfs and google-cloud-storage
            patch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
            patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")  # TensorStore
            patch.setenv("NO_GCE_CHECK", "true")
            patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks of which kind a bucket is, by gRPC
            yield "gs://bucket"


@pytest.mark.slow
def test_a_run_in_a_bucket(bucket, tmp_path, capsys):
    """Killed in a save, resumed and damaged; its losses are those of a run on a disk, bit for bit."""
    config = make_config(write_corpus(tmp_path), steps=8, eval_every=4, checkpoint_every=2)
    train(config, tmp_path / "run")
    name = f"{bucket}/runs/one"
    workdir = resolve_path(name)
    half, last = workdir / "checkpoints" / "4", workdir / "checkpoints" / "8"
    children = launch(config, name, pause_in_save=4.0)
    try:
        wait_until(lambda: (half / "state" / "commit_success.txt").exists(), children)
    finally:
        kill(children)
    # It has its name, and all but what makes it a checkpoint.
    assert not (half / MANIFEST).exists() and not (half / "commit_success.txt").exists()
    assert load_params(name)[2] == 2
    capsys.readouterr()
    result = train(config, name, profile=(5, 6))
    assert f"resumed {name} at step 2\n" in capsys.readouterr().out
    for key in ("loss", "grad_norm", "val_loss"):
        assert rows_of(workdir, key) == rows_of(tmp_path / "run", key)
    assert steps_of(workdir) == [6, 8] and result["step"] == 8
    loaded, expected = load_params(name), load_params(tmp_path / "run")
    assert loaded[0] == expected[0] == config and loaded[2] == 8
    assert_same_arrays(loaded[1], expected[1])
    assert {path.name for path in workdir.iterdir()} == {
        "config.json", "data.json", "metrics.jsonl", "loss.png", "tensorboard", "checkpoints", "profile",
    }  # fmt: skip
    assert (workdir / "loss.png").read_bytes().startswith(b"\x89PNG")
    events = [file.read_bytes() for file in sorted((workdir / "tensorboard").iterdir())]
    assert len(events) == 2 and all(b"grad_norm" in data for data in events)
    assert [*workdir.glob("profile/plugins/profile/*/*.xplane.pb")]

    written = {f"state/{kind}" for kind in ("_METADATA", "manifest.ocdbt", "ocdbt.process_0/manifest.ocdbt")}
    digests = json.loads((last / MANIFEST).read_text())
    assert written <= set(digests)  # TensorStore's files too, which gcsfs does not see being written
    array = max((last / name for name in digests if "/d/" in name), key=lambda file: file.stat().length)
    data = bytearray(array.read_bytes())
    data[len(data) // 2] ^= 1
    array.write_bytes(data)
    with pytest.raises(ValueError, match="does not match its checksum"):
        load_params(name)
    with Checkpoints(name, keep_latest=2, keep_best=1) as checkpoints:
        assert checkpoints.latest_step() == 6
    broken = workdir / "broken"
    assert (broken / "8" / array.relative_to(last)).read_bytes() == data
    assert array.name in (broken / "8.txt").read_text()
    assert not last.exists() and load_params(name)[2] == 6


@pytest.mark.slow
def test_files_that_others_write_are_listed(bucket):
    """A manifest must name the files of TensorStore, in folders that gcsfs has listed before."""
    folder = resolve_path(f"{bucket}/listed")
    (folder / "ours").write_text("1")
    assert [path.name for path in folder.iterdir()] == ["ours"]
    ts.KvStore.open(f"{folder}/").result().write("theirs", b"2").result()
    assert {path.name for path in folder.iterdir()} == {"ours", "theirs"} and (folder / "theirs").read_text() == "2"


@pytest.mark.slow
def test_save_aside_in_a_bucket(bucket):
    workdir = resolve_path(f"{bucket}/runs/aside")
    for value in (1.0, 2.0):
        save_aside(workdir, "state", {"weight": jnp.full(5, value)})
    with ocp.StandardCheckpointer() as checkpointer:
        assert_same_arrays(checkpointer.restore(workdir / "state"), {"weight": jnp.full(5, 2.0)})


@pytest.mark.slow
def test_no_bucket_is_made(bucket):
    with pytest.raises(OSError, match="gs://another/run.* cannot be written .*name a folder that can"):
        check_same_run("gs://another/run", make_config("corpus"))
    assert not resolve_path("gs://another/run").exists()


def test_a_second_run_in_a_folder_is_refused(tmp_path, monkeypatch):
    """It changes nothing there; several processes of one run share the folder, of which the first has the lock."""
    workdir = tmp_path / "run"
    with exclusive(workdir):
        here = rf"process {os.getpid()} on {re.escape(platform.node())} since 20.* UTC"
        with pytest.raises(ValueError, match=rf"{workdir} is in use by another run: {here}\. Wait until it ends"):
            train(make_config(write_corpus(tmp_path)), workdir)
        assert [path.name for path in workdir.iterdir()] == ["lock"]
        monkeypatch.setattr(jax, "process_index", lambda: 1)
        with exclusive(workdir):
            pass
        monkeypatch.undo()
    with exclusive(workdir), pytest.raises(ValueError, match="in use"), exclusive(workdir):
        pass


@pytest.mark.parametrize("path", ["s3://bucket/run", "gs://bucket", "gs:/bucket/run", Path("gs://bucket/run")])
def test_other_storage_is_an_error(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="must be a path of a disk, or the string gs://BUCKET/PATH"):
        train(make_config("corpus"), path)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("path", ["s3://bucket/x", "gs://bucket", "file://x/y", "hdfs:/x/y"])
def test_no_other_path_becomes_a_local_folder(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for use in (
        lambda: save_weights(path, make_config("corpus"), {}, 1),
        lambda: load_weights(path),
        lambda: load_context(path, None),
        lambda: write_atomic(path, "text"),
        lambda: read_json(path, ""),
        lambda: load_params(path),
        lambda: load_tokenizer(path),
        lambda: [*read_json_lines(path)],
        lambda: harness.local_task("piqa", path),
    ):
        with pytest.raises(ValueError, match=rf"{path}.* must be a path of a disk, or the string gs://BUCKET/PATH"):
            use()
    with pytest.raises(ValueError, match=rf"{path}.* must be a path of a disk"):  # and no bucket serves either
        load_documents(path)
    assert not [*tmp_path.iterdir()]


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ImportError, match=r"gs://bucket/run needs the package gcsfs: pip install idattn\[gcs\]"):
        load_params("gs://bucket/run")


def test_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    with MetricsWriter("~/run", -1):
        assert (tmp_path / "run" / "metrics.jsonl").exists()
