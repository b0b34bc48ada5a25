"""Config files by name and by path, and what is said of those that are not there."""

import re

import pytest

from idattn.config import from_config_dict, quickstart
from idattn.config_files import config_names, load_config, load_module


def test_names_and_paths(tmp_path, monkeypatch):
    assert config_names() == [
        "paper", "quickstart", "study_choices", "study_cpu", "study_cpu_tuning", "study_mqar",
        "study_paper", "study_recall", "study_recall_long", "study_small",
    ]  # fmt: skip
    assert load_config("paper:760M,s4d") == load_config("configs/paper.py:760M,s4d") != load_config("paper")
    (tmp_path / "mine.py").write_text("def get_config(number='1'):\n    return {'seed': int(number)}\n")
    monkeypatch.chdir(tmp_path)  # a name does not depend on the folder
    assert from_config_dict(load_config("quickstart")) == quickstart()
    assert load_module("study_cpu").STUDY.cells
    assert [load_config(f"mine.py{argument}")["seed"] for argument in ("", ":7")] == [1, 7]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (
            "quikstart",
            ValueError,
            "config='quikstart' is not known. Did you mean 'quickstart'?",
        ),
        ("configs/papr", ValueError, "Did you mean 'paper'?"),
        ("there/paper.py", FileNotFoundError, "there/paper.py does not exist; the one that comes with the package is"),
        ("there/mine.py", FileNotFoundError, "there/mine.py does not exist."),
        ("quickstart:3", ValueError, "quickstart:3: the config is get_config(), which does not take ['3']."),
        ("idattn/choices.py", ValueError, "idattn/choices.py has no get_config"),
        ("paper:1.3b,softmax", ValueError, "scale='1.3b' is not known. Did you mean '1.3B'?"),
    ],
)
def test_errors(text, error, message):
    with pytest.raises(error, match=re.escape(message)):
        load_config(text)
