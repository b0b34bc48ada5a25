"""Exports on the Hugging Face hub: its own client, against a server of this test that answers as the hub does."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jax
import numpy as np
import pytest
from support.models import export_model
from support.programs import Finished
from support.runs import ROOT

from idattn.inference import load_weights, pull, push

TOKEN = "a token of the owner"


class Hub(BaseHTTPRequestHandler):
    """Repositories of one owner in memory: name -> {"private", "commits": [{file: content}]}, newest commit last."""

    protocol_version = "HTTP/1.1"
    repositories: dict

    def log_message(self, *arguments):
        pass

    def answer(self, body=b"", status=200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        headers = {"Content-Length": len(body), "Content-Type": "application/json"} | headers
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def commit(self, name, revision):
        """(sha, files) of a commit; the sha of number n is n in 40 digits."""
        commits = self.repositories[name]["commits"]
        number = len(commits) - 1 if revision == "main" else int(revision)
        return f"{number:040}", commits[number]

    def do_GET(self):
        if match := re.fullmatch(r"/api/models/(\w+/\w+)(?:/(revision|tree)/(\w+))?(?:\?.*)?", self.path):
            name, what, revision = match.groups()
            if name not in self.repositories:
                return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            sha, files = self.commit(name, revision or "main")
            if what == "tree":
                return self.answer([
                    {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for path, data in files.items()
                ])  # fmt: skip
            siblings = [{"rfilename": path} for path in files]
            return self.answer({"id": name, "sha": sha, "siblings": siblings, "private": False, "tags": []})
        if match := re.fullmatch(r"/(\w+/\w+)/resolve/(\w+)/([\w.]+)", self.path):
            name, revision, path = match.groups()
            sha, files = self.commit(name, revision)
            if path not in files:
                return self.answer(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
            etag = f'"{hashlib.sha1(files[path]).hexdigest()}"'
            return self.answer(files[path], X_Repo_Commit=sha, ETag=etag, Content_Type="application/octet-stream")
        return self.answer({"error": self.path}, 404)

    do_HEAD = do_GET

    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            asked = json.loads(content)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.repositories:
                return self.answer({"url": f"http://{self.headers['Host']}/{name}"}, 409)
            private = asked.get("private") or asked.get("visibility") == "private"  # older clients, newer ones
            self.repositories[name] = {"private": private, "commits": [{}]}
            return self.answer({"url": f"http://{self.headers['Host']}/{name}"})
        name, what = re.fullmatch(r"/api/models/(\w+/\w+)/(preupload|commit)/main(?:\?.*)?", self.path).groups()
        if what == "preupload":
            files = json.loads(content)["files"]
            return self.answer({"files": [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files
            ]})  # fmt: skip
        lines = [json.loads(line) for line in content.splitlines()]
        files = {x["value"]["path"]: base64.b64decode(x["value"]["content"]) for x in lines if x["key"] == "file"}
        commits = self.repositories[name]["commits"]
        commits.append(commits[-1] | files)
        address = f"http://{self.headers['Host']}/{name}/commit/{len(commits) - 1:040}"
        return self.answer({"commitUrl": address, "commitOid": f"{len(commits) - 1:040}", "success": True})


# Does what it reads: programs with their arguments, or Python if the name is empty; changes its environment.
CHILD = """
import contextlib, io, json, os, sys
from support.programs import run_program

def run(code):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {})
    return [0, out.getvalue(), ""]

for line in sys.stdin:
    name, *arguments, changes = json.loads(line)
    os.environ.update(changes)
    done = run_program(name, *arguments) if name else None
    answer = [done.returncode, done.stdout, done.stderr] if done else run(*arguments)
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """(repositories, function that runs a program with this hub as the Hugging Face hub, in one other process)."""
    repositories = {}
    server = ThreadingHTTPServer(("localhost", 0), type("OneHub", (Hub,), {"repositories": repositories}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = os.environ | {
        "HF_ENDPOINT": f"http://localhost:{server.server_port}",
        "HF_HOME": str(tmp_path_factory.mktemp("cache")),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }

    command = [sys.executable, "-c", CHILD]
    settings["PYTHONPATH"] = f"{ROOT / 'tests'}{os.pathsep}{ROOT}"
    with subprocess.Popen(
        command, cwd=ROOT, env=settings, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:

        def run(*command, **changes):
            child.stdin.write(json.dumps([*command, {"HF_TOKEN": TOKEN} | changes]) + "\n")
            child.stdin.flush()
            return Finished(*json.loads(child.stdout.readline()))

        yield repositories, run
        child.stdin.close()
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export_model(tmp_path_factory.mktemp("exported"))


def test_an_export_goes_to_the_hub_and_comes_back(hub, exported):
    repositories, run = hub
    command = ["export", f"--checkpoint={exported}", "--out=hf:me/small", "--private"]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(rf"http://localhost:\d+/me/small: the weights of {exported}, step 7\n", done.stdout)
    assert repositories["me/small"]["private"] is True
    files = {path.name: path.read_bytes() for path in exported.iterdir()}
    assert repositories["me/small"]["commits"][-1] == files and len(files) == 4

    # A card that people have completed stays; the weights are replaced.
    repositories["me/small"]["commits"].append(files | {"README.md": b"ours", "config.json": b"{}", "notes": b"more"})
    assert run(*command).returncode == 0
    assert repositories["me/small"]["commits"][-1] == files | {"README.md": b"ours", "notes": b"more"}

    code = (
        "import idattn, json, sys; from idattn.inference import pull\n"
        "for name in ('hf:me/small', 'hf:me/small@1'):\n"
        "    model, folder = idattn.load(name), pull(name)\n"
        "    print(json.dumps([model.step, str(folder), sorted(path.name for path in folder.iterdir())]))"
    )
    done = run("", code)
    for line in done.stdout.splitlines():
        step, folder, names = json.loads(line)
        assert step == 7 and names == ["config.json", "model.safetensors", "tokenizer.bytes"]
        config, params, _ = load_weights(folder)
        assert config == load_weights(exported)[0]
        jax.tree.map(np.testing.assert_array_equal, params, load_weights(exported)[1])
    assert len(done.stdout.splitlines()) == 2


@pytest.mark.parametrize(
    ("command", "changes", "message"),
    [
        (["generate", "--checkpoint=hf:me/none"], {}, "hf:me/none cannot be read or written on the .* hub: .*404"),
        (["generate", "--checkpoint=hf:me/other"], {}, "hf:me/other has no model.safetensors; give a repository that"),
        (["export", "--out=hf:me/new"], {"HF_TOKEN": "another"}, "hf:me/new cannot be read or written .*: .*401"),
    ],
)
def test_refusals(hub, exported, command, changes, message):
    repositories, run = hub
    repositories["me/other"] = {"commits": [{"README.md": b"a data set"}]}
    given = [] if command[0] == "generate" else [f"--checkpoint={exported}"]
    done = run(*command, *given, **changes)
    assert done.returncode == 2 and re.search(rf"^idattn {command[0]}: {message}", done.stderr, re.M)
    assert "Traceback" not in done.stderr


def test_no_hub(exported):
    settings = os.environ | {"HF_ENDPOINT": "http://localhost:1", "HF_TOKEN": TOKEN}
    command = [sys.executable, "-m", "idattn", "export", "--out=hf:me/new", f"--checkpoint={exported}"]
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.startswith("idattn export: hf:me/new cannot be read or written")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["hf:me", "hf:a/b/c", "hf:a b/c", "hf:me/small@", "hf:me/sm--all", "me/small"])
def test_names(name, exported):
    for use in (pull, lambda name: push(exported, name)):
        with pytest.raises(ValueError, match=f"'{name}' (must be hf:OWNER/NAME or hf|is no name of a repository)"):
            use(name)
    with pytest.raises(ValueError, match="exports go to the main branch"):
        push(exported, "hf:me/small@v1")
