"""`launch.evaluate` on a small random model: results that stay, the table next to the paper's, refusals."""

import json

import pytest
from support.helpers import defined_flags, run_main
from support.models import export_model

from configs import study_mqar
from configs.paper import get_config
from idattn.cli import evaluate
from idattn.config import from_config_dict, quickstart
from idattn.data import load_tokenizer
from idattn.evals import harness, recall
from idattn.evals.paper import paper_values, table
from idattn.train import train


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return export_model(tmp_path_factory.mktemp("exported"))


@pytest.fixture(scope="module", autouse=True)
def evaluate_flags():
    with defined_flags(evaluate):
        yield


def test_results(checkpoint, tmp_path, capsys):
    def run(*arguments):
        run_main(evaluate, f"--checkpoint={checkpoint}", f"--out={tmp_path / 'out'}", "--limit=3", *arguments)
        return json.loads((tmp_path / "out" / "results.json").read_text())

    (tmp_path / "a.jsonl").write_text('{"text": "one two three"}\n{"text": "four"}\n')
    (tmp_path / "b.txt").write_text("x" * 30)
    corpora = f"--corpora={tmp_path / 'a.jsonl'},pg19={tmp_path / 'b.txt'}"
    first = run("--tasks=length,mqar", corpora, "--lengths=9,17", "--entries=2")
    metrics = first["tasks"]["length"]["metrics"]
    assert [*metrics] == [f"{name} {n}" for name in ("a", "pg19", "mean") for n in (9, 17)]
    assert metrics["mean 9"] == pytest.approx((metrics["a 9"] + metrics["pg19 9"]) / 2)
    assert metrics["pg19 9"] == first["tasks"]["length"]["corpora"]["pg19"]["9"]["perplexity"]
    assert [*first["tasks"]["mqar"]["metrics"]] == ["2 pairs in 9", "2 pairs in 17"]
    assert (tmp_path / "out" / "length.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "rows.jsonl").write_text('{"task": "piqa", "query": "a", "choices": ["b", "c"], "gold": 0}\n' * 3)
    piqa = run("--tasks=piqa", f"--eval_data={tmp_path / 'rows.jsonl'}", "--max_rows=2")["tasks"]["piqa"]
    assert piqa["settings"]["window"] == piqa["window"] == 16, "the trained length"
    whole = run("--tasks=piqa", f"--eval_data={tmp_path / 'rows.jsonl'}", "--max_rows=2", "--window=0")["tasks"]["piqa"]
    assert whole["settings"]["window"] is whole["window"] is None
    assert piqa["settings"]["max_rows"] == 2 and piqa["local"] and {*piqa["metrics"]} == {"piqa acc", "piqa acc_norm"}
    # What is there stays, as it was.
    both = run("--tasks=passkey,phonebook", "--lengths=700", "--entries=3")
    assert {name: both["tasks"][name] for name in first["tasks"]} == first["tasks"]
    made = recall.passkey(load_tokenizer("bytes"), 700, 3), recall.phonebook(3, 3)
    for name, test, questions in (("passkey", "700", made[0]), ("phonebook", "3", made[1])):
        result = both["tasks"][name]
        assert result["sha256"] == {test: recall.fingerprint(questions)}
        assert [answer for answer, _ in result["answers"][test]] == [question.answer for question in questions]
        assert result["metrics"] == {test: 0.0} and all(text for _, text in result["answers"][test])
    error = piqa["errors"]["piqa acc"]
    table = (tmp_path / "out" / "results.md").read_text()
    assert table in capsys.readouterr().out
    assert (
        f"| length | pg19 9 | {metrics['pg19 9']:.4f} |  |" in table and "| passkey | 700 | 0.0000 ± 0.0000 |" in table
    )
    assert (
        f"| piqa | piqa acc | {piqa['metrics']['piqa acc']:.4f} ± {error:.4f} | other setting (1.3B): softmax 0.6942, "
        in table
    )


@pytest.mark.slow
def test_softmax_solves_mqar(tmp_path, optimised):
    """The command lines of the config's docstring (2 minutes): the questions are such that a model can answer them."""
    train(study_mqar.get_config(), tmp_path)
    run_main(evaluate, f"--checkpoint={tmp_path}", f"--out={tmp_path}", "--tasks=mqar", "--lengths=64", "--entries=8")
    assert json.loads((tmp_path / "results.json").read_text())["tasks"]["mqar"]["metrics"]["8 pairs in 64"] >= 0.9


def test_errors(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "task_names", lambda: ["boolq"])  # it reads all files of lm-eval for seven seconds
    arguments = [f"--checkpoint={checkpoint}", f"--out={tmp_path}"]
    with pytest.raises(ValueError, match="task='passkeys' is not known. Did you mean 'passkey'"):
        run_main(evaluate, *arguments, "--tasks=perplexity,passkeys")
    with pytest.raises(ValueError, match="--lengths=1k,9 must be whole numbers above 0"):
        run_main(evaluate, *arguments, "--lengths=1k,9")
    with pytest.raises(ValueError, match="'s3://bucket/x' must be a path of a disk, or the string gs:"):
        run_main(evaluate, f"--checkpoint={checkpoint}", "--out=s3://bucket/x")
    with pytest.raises(FileNotFoundError, match=r"tokenizer='none\.model' does not exist"):
        run_main(evaluate, *arguments, "--tokenizer=none.model", "--tasks=mqar")
    assert not [*tmp_path.iterdir()]
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match=r"results\.json has no results of an evaluation; name another folder"):
        run_main(evaluate, *arguments, "--tasks=mqar")
    (tmp_path / "results.json").write_text('{"checkpoint": "other", "step": 9, "tasks": {}}')
    with pytest.raises(ValueError, match="has the results of other, step 9, not those of .*, step 7; name another"):
        run_main(evaluate, *arguments, "--tasks=mqar")
    (tmp_path / "results.json").write_text('{"checkpoint": "oth')
    with pytest.raises(ValueError, match=r"results\.json is damaged \(not valid JSON.*\)\. Delete it to evaluate anew"):
        run_main(evaluate, *arguments, "--tasks=mqar")


def test_paper():
    config = from_config_dict(get_config("1.3B,interdomain"))
    assert paper_values("passkey", "1024", config, 49_592) == "softmax 0.995, interdomain 0.655, s4d 0"
    for other, step in ((config, 1000), (quickstart(), 49_592)):
        assert paper_values("passkey", "1024", other, step).startswith("other setting (1.3B): softmax 0.995")
    assert paper_values("mqar", "1024", config, 49_592) == ""


@pytest.mark.parametrize(("local", "note"), [(False, ""), (True, "other setting (1.3B): ")])
def test_local_rows_are_another_setting(local, note):
    """Next to a model of the paper's setting, for a task and for the mean of a list."""
    metrics = {"social_iqa acc": 0.4, "mean": 0.5}
    results = {"step": 49_592, "tasks": {"commonsense": {"metrics": metrics, "local": local}}}
    *_, task, mean = table(results, from_config_dict(get_config("1.3B,interdomain"))).split("\n")
    assert task == f"| commonsense | social_iqa acc | 0.4000 | {note}softmax 0.4028, interdomain 0.4145, s4d 0.411 |"
    assert mean == f"| commonsense | mean | 0.5000 | {note}softmax 0.5151, interdomain 0.5454, s4d 0.4944 |"


@pytest.mark.parametrize(
    ("version", "window", "note"),
    [
        (0, 4096, ""),
        (1, 4096, "other setting (1.3B): "),
        (None, 4096, "other setting (1.3B): "),
        (0, None, "other setting (1.3B): "),
        (0, 2048, "other setting (1.3B): "),
    ],
)
def test_tasks_of_another_version_or_window_are_another_setting(version, window, note):
    measured = {"metrics": {"fda contains": 0.25}, "errors": {"fda contains": 0.125}}
    measured |= {"versions": {"fda": version}, "window": window}
    wiki = {"metrics": {"wikitext word_perplexity": 20.0}, "versions": {"wikitext": 2}, "window": window}
    results = {"step": 49_592, "tasks": {"based_recall": measured, "wikitext": wiki}}
    *_, fda, wikitext = table(results, from_config_dict(get_config("1.3B,interdomain"))).split("\n")
    paper = "softmax 0.5045, interdomain 0.0953, s4d 0.0036"
    assert fda == f"| based_recall | fda contains | 0.2500 ± 0.1250 | {note}{paper} |"
    of_window = note if window != 4096 else ""
    paper = f"{of_window}softmax 20.55, interdomain 19.77, s4d 25.27"
    assert wikitext == f"| wikitext | wikitext word_perplexity | 20.0000 | {paper} |"
