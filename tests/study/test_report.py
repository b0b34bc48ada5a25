"""Reports on studies: numbers against numpy, what is refused, and what is said of cells that failed or are missing."""

import dataclasses
import json
import math
import runpy
from pathlib import Path

import numpy as np
import pytest

from configs import paper
from idattn.config import from_config_dict
from idattn.study import Cell, Study, grid, read_records, record_file, write_report
from idattn.study.report import holm, p_value, verdict

ROOT = Path(__file__).parents[2]
CELLS = grid(["125M"], ["softmax", "interdomain", "s4d"], [1, 2, 3])
CONFIGS = {
    cell: dataclasses.replace(from_config_dict(paper.get_config(f"{cell.scale},{cell.condition}")), seed=cell.seed)
    for cell in CELLS
}
RNG = np.random.default_rng(0)
LEVELS = {"softmax": 3.0, "interdomain": 2.9, "s4d": 3.001}
LOSSES = {cell: LEVELS[cell.condition] + 0.01 * RNG.normal() for cell in CELLS}


def make_record(cell):
    steps = CONFIGS[cell].train.steps
    windows = {"perplexity": math.exp(LOSSES[cell]), "positions": [1, 4095], "by_position": [5.0, 3.0]}
    return {
        "config": dataclasses.asdict(CONFIGS[cell]),
        "versions": {"python": "3.11.0", "jax": "0.10.0"},
        "device": "4 x TPU v5p",
        "date": "2026-11-01",
        "curve": [[steps // 2, LOSSES[cell]], [steps, LOSSES[cell] + 0.5]],
        "evaluations": {
            "length": {
                "metrics": {"mean 4096": windows["perplexity"], "mean 8192": 2 * windows["perplexity"]},
                "corpora": {"a": {"4096": windows, "8192": windows}},
                "settings": {"max_tokens": 9},
            },
            "passkey": {"metrics": {"1024": 0.5}, "settings": {"limit": 20}},
            "perplexity": {"metrics": {"loss": 2.8, "perplexity": 16.4}, "settings": {"max_tokens": 9}},
        },
    }


@pytest.fixture
def folder(tmp_path):
    """The records of all cells."""
    cells = tmp_path / "cells"
    cells.mkdir()
    for cell in CELLS:
        record_file(cells, cell).write_text(json.dumps(make_record(cell)))
    return cells


def test_numbers(folder, tmp_path):
    text = write_report(tmp_path, CONFIGS, read_records(folder, CONFIGS))
    results = json.loads((tmp_path / "report.json").read_text())
    assert (tmp_path / "report.md").read_text() == text + "\n"
    losses = {name: np.array([LOSSES[cell] for cell in CELLS if cell.condition == name]) for name in LEVELS}
    rows = {row["condition"]: row for row in results["validation"]}
    assert [row["condition"] for row in results["validation"]] == sorted(losses, key=lambda name: losses[name].mean())
    for name, values in losses.items():
        assert rows[name]["losses"] == {str(seed): value for seed, value in zip((1, 2, 3), values, strict=True)}
        assert rows[name]["loss"] == pytest.approx([values.mean(), values.std(ddof=1)], rel=1e-12)
        change = 100 * (np.exp(values - losses["softmax"]) - 1)
        against = None if name == "softmax" else pytest.approx([change.mean(), change.std(ddof=1)], rel=1e-9)
        assert rows[name]["percent against reference"] == against
    # The setting is the paper's here, so its numbers stand alone; those at 1.3B are noted as of another setting.
    assert rows["interdomain"]["paper"] == "16.48 (-1.0 %)" and rows["s4d"]["paper"] == "19.22 (+15.4 %)"
    assert rows["interdomain"]["parameters"] == 135_416_208 and rows["softmax"]["state"] == 2 * 768 * 4096
    assert "other setting (1.3B): 14.36 (mean 4096), 14.14 (mean 8192)" in text
    assert "other setting (1.3B): 0.655 (1024)" in text
    assert "| other setting (1.3B): 2.077 (loss); 16.48 (perplexity) |" in text

    orderings = {tuple(row["conditions"]): row for row in results["orderings"]}
    # All of the cells that are there, the better one of the paper's first.
    assert list(orderings) == [("interdomain", "softmax"), ("interdomain", "s4d"), ("softmax", "s4d")]
    differences = losses["interdomain"] - losses["s4d"]
    row = orderings["interdomain", "s4d"]
    assert row["difference"] == pytest.approx([differences.mean(), differences.std(ddof=1)], rel=1e-9)
    # The probability that Student's t of two degrees of freedom is as far from 0: 1 - |t| / sqrt(2 + t^2).
    t = differences.mean() / differences.std(ddof=1) * math.sqrt(3)
    assert row["p"] == pytest.approx(1 - abs(t) / math.sqrt(2 + t**2), rel=1e-9)
    assert row["paper"] == pytest.approx(math.log(16.48 / 19.22))
    smaller = [other["p"] < row["p"] for other in orderings.values()]
    assert row["corrected p"] >= row["p"] * (3 - sum(smaller))
    assert row["verdict"] == ("as the paper" if row["corrected p"] < 0.05 else "undecided")
    assert "`interdomain` < `s4d`: interdomain is better than s4d" in text and "| `softmax` < `s4d` |" in text
    for file in ("compute.png", "seeds.png", "length.png"):
        assert (tmp_path / file).stat().st_size > 10_000 and f"]({file})" in text


def test_a_study_may_compare_more(folder, tmp_path):
    """Its pairs are tested, and corrected for, together with those of the paper."""
    added = (("s4d", "softmax"), ("interdomain", "s4d_norope"))  # of the latter there is no cell
    text = write_report(tmp_path, CONFIGS, read_records(folder, CONFIGS), comparisons=added)
    *paper, row = json.loads((tmp_path / "report.json").read_text())["orderings"]
    assert [len(paper), row["conditions"], row["paper"]] == [3, ["s4d", "softmax"], None]
    assert row["difference"][0] == -paper[-1]["difference"][0] and row["p"] == pytest.approx(paper[-1]["p"])
    assert [one["corrected p"] for one in (*paper, row)] == holm([one["p"] for one in (*paper, row)])
    assert "| `s4d` < `softmax` | " in text


def test_what_is_no_text_is_not_compared_with_the_paper(folder, tmp_path):
    write_report(tmp_path, CONFIGS, read_records(folder, CONFIGS), is_text=False)
    results = json.loads((tmp_path / "report.json").read_text())
    assert results["orderings"] == [] and {row["paper"] for row in results["validation"]} == {""}


@pytest.mark.parametrize(
    ("differences", "p", "expected"),
    [
        ([-0.3, -0.2], 0.001, "2 of 3 seeds"),
        ([-0.3, -0.2, -0.25], 0.0499, "as the paper"),
        ([0.3, 0.2, 0.25], 0.0499, "reversed"),
        ([-0.3, -0.2, -0.25], 0.05, "undecided"),
    ],
)
def test_verdict(differences, p, expected):
    assert verdict(differences, p) == expected


def test_p_values():
    assert p_value([1.0]) == p_value([0.0, 0.0, 0.0]) == 1 and p_value([0.5, 0.5]) == 0
    # Textbook values of Student's t: 2.776 of 4 degrees of freedom, 12.706 of 1.
    for t, n in ((2.776445, 5), (12.706205, 2)):
        x = np.resize([1.0, -1.0], n) if n % 2 == 0 else np.array([1.0, -1.0, 0.0, 1.0, -1.0])
        assert p_value((x + t * x.std(ddof=1) / math.sqrt(n)).tolist()) == pytest.approx(0.05, rel=1e-5)
    # Holm's own way: the smallest times 4, the next times 3 and no less, and so on.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1] and holm([]) == []


def test_a_false_verdict_of_any_ordering_is_rare():
    """Seven conditions that do not differ, in 300 studies of 5 seeds: 21 orderings each."""
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(300):
        losses = rng.normal(size=(7, 5)) + rng.normal(size=5)
        differences = [losses[i] - losses[j] for i in range(7) for j in range(i)]
        wrong += min(holm([p_value(x) for x in differences])) < 0.05
    assert wrong <= 26  # 15 expected at most; three standard deviations of a binomial are 11


def test_failed_and_missing_cells_count_nowhere(folder, tmp_path):
    failed, missing = Cell("125M", "s4d", 2), Cell("125M", "softmax", 3)
    record_file(folder, failed).write_text(json.dumps({"error": "Traceback\nMemoryError: 17 GB"}))
    record_file(folder, missing).unlink()
    text = write_report(tmp_path, CONFIGS, read_records(folder, CONFIGS))
    results = json.loads((tmp_path / "report.json").read_text())
    assert results["cells"] == {
        "all": 9, "done": 7, "failed": {str(failed): "Traceback\nMemoryError: 17 GB"}, "missing": [str(missing)],
    }  # fmt: skip
    assert "7 of 9 cells." in text
    assert "* 125M,s4d,2: `MemoryError: 17 GB`" in text and "**Not done yet:** 125M,softmax,3." in text
    rows = {row["condition"]: row for row in results["validation"]}
    assert list(rows["s4d"]["losses"]) == ["1", "3"] and list(rows["softmax"]["losses"]) == ["1", "2"]
    both = [100 * math.expm1(LOSSES[CELLS[1]._replace(seed=n)] - LOSSES[CELLS[0]._replace(seed=n)]) for n in (1, 2)]
    assert rows["interdomain"]["percent against reference"][0] == pytest.approx(np.mean(both))
    assert {row["verdict"] for row in results["orderings"]} == {"2 of 3 seeds", "1 of 3 seeds"}


def change(key, value):
    return lambda record: record[key].update(value) if isinstance(value, dict) else record.update({key: value})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (change("versions", {"jax": "0.11.0"}), r"mixes versions \(jax 0\.10\.0 in 125M,softmax,1, 0\.11\.0 in"),
        (
            lambda record: record["evaluations"]["passkey"]["settings"].update(limit=7),
            r"mixes evaluations \(passkey limit 20 in 125M,softmax,1, 7 in 125M,s4d,3\)",
        ),
        (
            lambda record: record["evaluations"]["passkey"].update(versions={"lm_eval": "0.4.12"}),
            r"mixes evaluations \(passkey versions None in 125M,softmax,1, {'lm_eval': '0\.4\.12'} in 125M,s4d,3\)",
        ),
        (
            lambda record: record["evaluations"].pop("length"),
            r"mixes evaluations \(length max_tokens 9 in 125M,softmax,1, None in 125M,s4d,3\)",
        ),
        (
            lambda record: record["config"]["data"].update(source="mqar:pairs=4,rows=9"),
            r"s4d,3\.json is of another config than the study's \(data\.source: 'mqar:pairs=4,rows=9' there, '",
        ),
        (change("config", {"seed": 4}), r"s4d,3\.json is of another config than the study's \(seed: 4 there, 3 now\)"),
        (change("config", {"sed": 4}), r"125M,s4d,3\.json is no record \(key of config='sed' is not known"),
        (lambda record: record.pop("config"), r"125M,s4d,3\.json is no record \('config'\)"),
    ],
    ids=["versions", "evaluations", "task version", "another task", "source", "config", "unknown setting", "no config"],
)  # fmt: skip
def test_records_that_do_not_belong(folder, changed, message):
    record = make_record(CELLS[-1])
    changed(record)
    record_file(folder, CELLS[-1]).write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message):
        read_records(folder, CONFIGS)


def test_files_that_are_no_records(folder, tmp_path):
    with pytest.raises(ValueError, match="has no records of cells; run the study, without --report"):
        read_records(tmp_path / "empty", CONFIGS)
    (folder / "125M,s4d,3.json").rename(folder / "1B,s4d,3.json")
    with pytest.raises(ValueError, match=r"1B,s4d,3\.json is of no cell of this study"):
        read_records(folder, CONFIGS)


@pytest.mark.parametrize("name", ["paper", "small", "cpu", "choices", "mqar"])
def test_studies_that_ship(name):
    """Every cell has a different config, which is the one that its name says."""
    values = runpy.run_path(str(ROOT / "configs" / f"study_{name}.py"))
    study = values["STUDY"]
    assert isinstance(study, Study)
    configs = {cell: from_config_dict(values["get_config"](str(cell))) for cell in study.cells}
    assert len({str(config.identity()) for config in configs.values()}) == len(study.cells)
    for cell, config in configs.items():
        assert config.seed == cell.seed and config.model.mixers == (cell.condition.partition("+")[0],)
    # Nothing but seed, mixer and the choices of a condition differs within a scale: the budget is the same for all.
    for scale in {cell.scale for cell in study.cells}:
        shared = [
            dataclasses.replace(config, seed=0, model=dataclasses.replace(config.model, mixers=("s4d",), ssm=SSM))
            for cell, config in configs.items()
            if cell.scale == scale
        ]
        assert all(config == shared[0] for config in shared)
    with pytest.raises(ValueError, match=r"cell='125M,softmx,42' is not known"):
        study.cell("125M,softmx,42")


SSM = CONFIGS[CELLS[0]].model.ssm


@pytest.mark.parametrize("text", ["", '{"config": ', "[]"])
def test_a_damaged_record_is_named(folder, text):
    file = record_file(folder, CELLS[0])
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"{file.name} is damaged \(.*\)\. Remove it to have the cell done again"):
        read_records(folder, CONFIGS)
