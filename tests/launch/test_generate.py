"""`launch.generate` and `launch.export` on a small random model: prompts from everywhere, contexts, JSONL, refusals."""

import functools
import io
import json
import sys

import pytest
from absl import flags
from support.helpers import defined_flags, run_main
from support.models import export_model

from idattn.cli import generate
from idattn.data.tokenizer import ByteTokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return export_model(tmp_path_factory.mktemp("exported"))


@pytest.fixture(scope="module", autouse=True)
def generate_flags():
    with defined_flags(generate), pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "load", functools.cache(generate.load))  # one checkpoint, compiled once
        yield


@pytest.fixture
def run(checkpoint, capsys):
    def run(*arguments):
        run_main(generate, f"--checkpoint={checkpoint}", "--num_tokens=40", *arguments)
        return capsys.readouterr()

    return run


def test_prompts(run, checkpoint, monkeypatch, tmp_path):
    shown = run("--prompt=ab", "--num_samples=2")
    head, first, second = shown.out.split("\n\nab")
    assert head == f"{checkpoint}, step 7" and first != second
    assert "80 tokens, " in shown.err and "a second after the first block" in shown.err
    # A row's text does not depend on the other rows; where the prompt is from does not matter either.
    assert run("--prompt=ab", "--seed=1").out == f"{head}\n\nab{second}"
    monkeypatch.setattr(sys, "stdin", io.StringIO("ab"))
    assert run("--prompt_file=-").out.removesuffix("\n") == f"{head}\n\nab{first}"
    stop = first[4:6]
    stopped = run("--prompt=ab", f"--stop={stop}").out
    assert stopped == f"{head}\n\nab{first[: first.index(stop)]}\n"
    # A context on disk stands for the text that it was made of.
    whole = run("--prompt=ab", f"--save_context={tmp_path / 'ab'}").out
    assert whole.removesuffix("\n") == f"{head}\n\nab{first}"
    restored = run(f"--load_context={tmp_path / 'ab'}").out
    assert restored.removesuffix("\n") == f"{head}\n\n{first}"


def test_settings_of_sampling_count(run):
    best = run("--prompt=ab", "--temperature=0").out
    assert run("--prompt=ab", "--temperature=5", "--min_p=1").out == best
    assert run("--prompt=ab", "--temperature=0", "--repetition_penalty=9").out != best


def test_jsonl(run, tmp_path):
    rows = [{"prompt": "ab", "id": 3}, {"prompt": "", "temperature": 0, "seed": 5}, {"prompt": "xyz"}]
    (tmp_path / "in").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    arguments = (f"--jsonl={tmp_path / 'in'}", "--num_samples=2", "--batch_size=2")
    run(*arguments, f"--out={tmp_path / 'out'}")
    answers = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [{name: x for name, x in row.items() if name != "completions"} for row in answers] == rows
    assert all(len(row["completions"]) == 2 and row["completions"][0]["finish"] == "length" for row in answers)
    assert run("--prompt=ab").out.split("\n\nab", 1)[1] == answers[0]["completions"][0]["text"] + "\n"
    greedy = answers[1]["completions"]
    assert greedy[0] == greedy[1] and answers[0]["completions"][0] != answers[0]["completions"][1]
    printed = run(*arguments).out
    assert [json.loads(line) for line in printed.splitlines()] == answers


def test_jsonl_rows_end_at_newlines_alone(run, tmp_path):
    prompts = ["a\u2028b", "a\u0085b", "a\rb\x1c"]
    rows = "\n".join(json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts)
    (tmp_path / "in").write_text(rows, "utf-8", newline="")
    run(f"--jsonl={tmp_path / 'in'}", f"--out={tmp_path / 'out'}", "--num_tokens=1")
    lines = (tmp_path / "out").read_bytes().decode().removesuffix("\n").split("\n")
    assert [json.loads(line)["prompt"] for line in lines] == prompts


@pytest.mark.parametrize("character", ["", "\ufffd"], ids=["nothing", "only at the end"])
def test_tokens_that_show_no_text(run, monkeypatch, character):
    """More than a block of them; the speed is that of the tokens."""

    class Silent(ByteTokenizer):
        def decode(self, ids):
            return character * len(ids)

    load = generate.load
    monkeypatch.setattr(generate, "load", lambda *given, **names: load(*given, **names)._replace(tokenizer=Silent()))
    shown = run("--prompt=ab")
    assert shown.out.split("\n\nab")[1] == 40 * character + "\n"
    assert "40 tokens, " in shown.err and "a second after the first block" in shown.err


def test_errors(run, tmp_path):
    (tmp_path / "out").touch()
    for row, message in (
        (r'{"prompt": "\ud83d"}', r"in, line 2: not valid JSON in UTF-8: .*surrogates not allowed"),
        ('{"prompt": "a", "top_k": [1, 2]}', r"in, line 2: top_k=\[1, 2\] must be one number"),
        ('{"prompt": "a", "seed": null}', r"in, line 2: seed=None must be a number in"),
    ):
        (tmp_path / "in").write_text('{"prompt": "ok"}\n' + row)
        with pytest.raises(ValueError, match=message):
            run(f"--jsonl={tmp_path / 'in'}", f"--out={tmp_path / 'out'}", "--batch_size=1")
        assert not (tmp_path / "out").read_bytes()
    for flag in ("--jsonl=s3://x/y", "--prompt_file=s3://x/y", "--load_context=s3://x/y", "--save_context=s3://x/y"):
        with pytest.raises(ValueError, match="'s3://x/y' must be a path of a disk, or the string gs:"):
            run(flag)
    (tmp_path / "in").write_text('{"prompt": "a"}')
    with pytest.raises(ValueError, match="'gs://x/y' must be a path of a disk; a bucket does not serve here"):
        run(f"--jsonl={tmp_path / 'in'}", "--out=gs://x/y")
    (tmp_path / "in").write_text('{"text": 1}')
    with pytest.raises(ValueError, match=r"line 1: \{'text': 1\} must be an object with a text under 'prompt'"):
        run(f"--jsonl={tmp_path / 'in'}")
    (tmp_path / "in").write_text('{"prompt": "a", "top_p": 2}')
    with pytest.raises(ValueError, match="top_p=2 must be greater than 0 and at most 1"):
        run(f"--jsonl={tmp_path / 'in'}")
    with pytest.raises(ValueError, match=r"temperature=-1\.0"):
        run("--temperature=-1")
    with pytest.raises(ValueError, match="give one of"):
        run("--prompt=a", "--prompt_file=b")
    with pytest.raises(flags.IllegalFlagValueError):
        run("--num_tokens=0")
    with pytest.raises(FileNotFoundError, match=r"tokenizer='none\.model' does not exist"):
        run("--tokenizer=none.model")
