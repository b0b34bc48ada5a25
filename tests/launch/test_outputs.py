"""Where programs write: a path of another kind of storage is refused before any work, and becomes no local folder."""

import importlib

import pytest
from support.helpers import defined_flags, run_main

from idattn.cli import schedule


@pytest.mark.parametrize("path", ["s3://bucket/x.json", "gs://bucket"])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("plan", ["--config=paper:125M,interdomain", "--json={}"]),
        ("schedule", ["--json={}"]),
        ("scaling", ["--out={}"]),
        ("verify", ["--out={}"]),
        ("bench_ops", ["--json={}"]),
        ("bench_decode", ["--out={}"]),
        ("plot_kernel", ["--out={}"]),
        ("plot_kernel", ["--checkpoint=none", "--out=x.png", "--json={}"]),
        ("plot_ideal", ["--out={}"]),
    ],
)
def test_other_storage_is_refused_at_the_start(name, arguments, path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    program, arguments = importlib.import_module(f"idattn.cli.{name}"), [x.format(path) for x in arguments]
    monkeypatch.setattr("sys.argv", [name, *arguments])  # where config flags look for the settings that they override
    with defined_flags(program), pytest.raises(ValueError, match=f"'{path}' must be a path of a disk, or the string"):
        run_main(program, *arguments)
    assert capsys.readouterr().out == ""
    assert not [*tmp_path.iterdir()]


def test_schedules_are_written_to_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(schedule, "load_compiler", lambda dump_to: None)
    monkeypatch.setattr(schedule, "show", lambda dump: [{"bundles": 7}])
    with defined_flags(schedule):
        run_main(schedule, f"--json={tmp_path / 'new' / 'schedules.json'}")
    assert (tmp_path / "new" / "schedules.json").read_text() == '[\n {\n  "bundles": 7\n }\n]'
