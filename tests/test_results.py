"""What `results` promises: every figure of the table follows from what train.py wrote, by hand where that is short."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

import run
from config import Config
from machine import hardware
from metrics import bootstrap, bootstrap_ci
from report import results
from report.statistics import bootstrap_p, holm, paired_t_test

TARGETS = ("activation", "valence")
SPEAKERS = [f"s{number // 5}" for number in range(40)]
LABELS = np.random.default_rng(0).uniform(1, 7, (40, 2)).round(3)


def fabricate(out: Path, method: str, seed: int, ccc: float = 0.5, noise: float = 1.0, **keys) -> Path:
    """A run's directory as train.py would leave it: `ccc` on both targets, and `keys` of the result and the config."""
    directory = results.Job(out, method, seed).directory
    directory.mkdir(parents=True)
    known = {key: keys.pop(key) for key in list(keys) if key in Config.__dataclass_fields__}
    given = {"total": keys.pop("total", 100.0), "cache_build": keys.pop("own_build", 0.0)}
    config = run.plain(Config(name=directory.name, seed=seed, output_dir=str(out), **known))
    result = {
        "test": {target: {"ccc": ccc, "ci95": None, "utterances": 40} for target in TARGETS},
        "seconds": {**given, "per_epoch": keys.pop("epoch", 10.0)},
        **{
            "epochs": 10,
            "best_epoch": 8,
            "trainable_parameters": 1_000_000,
            "peak_memory_bytes": 2_000_000_000,
            "cache_bytes": 0,
        },
        **{
            "device": keys.pop("machine", "a CPU"),
            "precision": "fp32",
            "backbone": {"source": "tiny (random weights)", "sha256": ""},
        },
        **{"versions": {"python": "3.12", "torch": "2.13"}, "config": config, **keys},
    }
    if config["corpus"] == "demo":
        result["note"] = run.DEMO_NOTE
    if sizes := result.pop("sizes", None):
        result["corpus"] = {"name": config["corpus"], "train": sizes, "dev": sizes, "test": sizes}
    (directory / "result.json").write_text(json.dumps(result))
    log = [{"epoch": e, "seconds": 10.0 * e, "dev_ccc_activation": e / 10, "dev_ccc_valence": 0.1} for e in (1, 2)]
    (directory / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    hardware.write_yaml(directory / "config.yaml", config)
    predictions = LABELS + noise * np.random.default_rng([7, seed, int(100 * noise)]).standard_normal(LABELS.shape)
    with open(directory / "predictions_test.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "speaker", *TARGETS, "activation_label", "valence_label"])
        for number, speaker in enumerate(SPEAKERS):
            writer.writerow([f"{number}.wav", speaker, *predictions[number], *LABELS[number]])
    return directory


def read(out: Path, *methods: str, seeds: int = 3) -> results.Runs:
    return results.read_runs(results.Job(out, name, seed) for name in methods for seed in range(seeds))


def analyse(out: Path, *methods: str, builds: dict | None = None) -> list[dict]:
    return results.analyse(read(out, *methods), TARGETS, builds or {})


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


# ---------------------------------------------------------------- scores


def test_a_score_is_mean_and_deviation_over_seeds_and_its_interval_that_of_all_runs(tmp_path):
    """0.5 and 0.7: 0.6 and 0.1 * sqrt(2); one bootstrap over speakers of the mean over runs."""
    for seed, ccc in enumerate((0.5, 0.7)):
        fabricate(tmp_path, "full", seed, ccc)
    (record,) = analyse(tmp_path, "full")
    assert record["activation_ccc"] == pytest.approx(0.6)
    assert record["activation_sd"] == pytest.approx(0.1 * 2**0.5)
    runs = read(tmp_path, "full")["full"].values()
    for k, target in enumerate(TARGETS):
        expected = bootstrap_ci(np.stack([each.predictions[:, k] for each in runs]), LABELS[:, k], SPEAKERS)
        assert [record[f"{target}_low"], record[f"{target}_high"]] == pytest.approx(expected, abs=1e-12)
    assert results.score_row(record, "activation", 0)["CCC of activation"] == "0.600 ± 0.141"


def test_a_difference_is_over_the_seeds_that_both_methods_have(tmp_path):
    """Seed 2 of the first method is missing: 0.9 must not count. Three equal differences have no t-test."""
    for seed, ccc in enumerate((0.5, 0.6)):
        fabricate(tmp_path, "full", seed, ccc)
    for seed, ccc in enumerate((0.4, 0.7, 0.9)):
        fabricate(tmp_path, "lora", seed, ccc, noise=1.2)
    first, other = analyse(tmp_path, "full", "lora")
    assert "activation_difference" not in first
    assert other["activation_difference"] == pytest.approx(0.0)
    assert other["activation_ccc"] == pytest.approx(2 / 3)
    raw = paired_t_test([0.4, 0.7], [0.5, 0.6])
    assert other["activation_p_seeds"] == pytest.approx(min(1.0, 2 * raw))  # two targets, the same pairs
    assert other["activation_difference_low"] < other["activation_difference_high"]
    runs = read(tmp_path, "full", "lora")
    raw = []
    for k in range(2):
        columns = np.stack([runs[name][seed].predictions[:, k] for name in ("lora", "full") for seed in (0, 1)])
        draws = bootstrap(columns, LABELS[:, k], range(40))  # single utterances
        raw.append(bootstrap_p(draws[:, :2].mean(1) - draws[:, 2:].mean(1), 40))
    assert [other[f"{target}_p_utterances"] for target in TARGETS] == pytest.approx(holm(raw), rel=1e-6)
    assert 0.001 < min(raw) < 0.4


def test_p_values_are_corrected_over_methods_and_targets(tmp_path):
    """Two methods beside the first and two targets are a family of four."""
    pairs = {"full": (0.5, 0.5, 0.5), "a": (0.6, 0.61, 0.62), "b": (0.51, 0.49, 0.53)}
    for name, scores in pairs.items():
        for seed, ccc in enumerate(scores):
            fabricate(tmp_path, name, seed, ccc)
    _, a, b = analyse(tmp_path, *pairs)
    raw = [paired_t_test(pairs[name], pairs["full"]) for name in ("a", "a", "b", "b")]
    found = [record[f"{target}_p_seeds"] for record in (a, b) for target in TARGETS]
    assert found == pytest.approx(holm(raw))
    assert found[0] == pytest.approx(4 * raw[0])
    assert a["activation_p_utterances"] == 1  # its predictions are those of the first


def test_one_seed_has_neither_deviation_nor_t_test(tmp_path):
    """The cells say so by being shorter or empty."""
    fabricate(tmp_path, "full", 0, 0.5)
    fabricate(tmp_path, "lora", 0, 0.625, noise=0.5)
    _, lora = analyse(tmp_path, "full", "lora")
    shown = results.score_row(lora, "activation", 0)
    assert (shown["CCC of activation"], shown["p over seeds"]) == ("0.625", "")
    assert shown["difference [95% over speakers]"].startswith("+0.125 [+0.")


def test_runs_that_were_tested_on_different_utterances_are_refused(tmp_path):
    """Their scores are of different things, and nothing in them is paired."""
    fabricate(tmp_path, "full", 0)
    path = fabricate(tmp_path, "lora", 0) / "predictions_test.csv"
    path.write_text(path.read_text().replace("s3", "s9"))
    with pytest.raises(ValueError, match="lora-seed0: was tested on other utterances or labels"):
        analyse(tmp_path, "full", "lora")


# ---------------------------------------------------------------- costs


def test_costs_are_medians_and_the_total_has_one_build_whoever_paid_for_it(tmp_path):
    """The first run filled the cache itself, 20 s of its 120 s; a report of the build counts instead."""
    for seed, (total, own) in enumerate([(120.0, 20.0), (90.0, 0.0), (110.0, 0.0)]):
        fabricate(tmp_path, "a", seed, total=total, own_build=own, cache=True, epoch=4.0 + seed, cache_bytes=3 * 10**9)
    (record,) = analyse(tmp_path, "a")
    assert (record["build_seconds"], record["total_seconds"]) == (20, 100 + 20)
    assert record["epoch_seconds"] == 5
    (record,) = analyse(tmp_path, "a", builds={"a": {"seconds": 35.0}})
    assert (record["build_seconds"], record["total_seconds"]) == (35, 135)
    shown = results.cost_row(record)
    columns = ("best epoch / epochs", "s an epoch", "cache build", "total", "peak memory", "cache size")
    assert [shown[column] for column in columns] == ["8 / 10", "5 s", "35 s", "135 s", "2.00 GB", "3.00 GB"]


def test_a_cache_of_unknown_cost_is_said_to_be_one(tmp_path):
    """It was complete before the first run: the total is without it."""
    fabricate(tmp_path, "a", 0, cache=True, cache_bytes=10**7)
    fabricate(tmp_path, "b", 0)
    records = analyse(tmp_path, "a", "b", builds={"a": {"seconds": None}})
    assert [record["build_seconds"] for record in records] == [None, None]
    notes = "\n".join(results.cautions(read(tmp_path, "a", "b"), records, 0))
    assert "what it cost is in no total: a." in notes
    assert [results.cost_row(record)["cache size"] for record in records] == ["10 MB", ""]


def test_factors_are_against_the_first_and_read_both_ways(tmp_path):
    """10 s against 4 s is 2.5 times as fast and takes 60% less; against 12.4 s, 24% more."""
    fabricate(tmp_path, "full", 0, epoch=10.0, total=200.0)
    fabricate(tmp_path, "fast", 0, epoch=4.0, total=50.0, trainable_parameters=250_000)
    fabricate(tmp_path, "slow", 0, epoch=12.4, total=200.0, trainable_parameters=3_000_000)
    shown = [results.cost_row(record) for record in analyse(tmp_path, "full", "fast", "slow")]
    assert [row["fewer"] for row in shown] == ["", "75.0%", "3 times as many"]
    assert [row["an epoch against the first"] for row in shown] == ["", "2.50x, 60% less", "0.81x, 24% more"]
    assert [row["total against the first"] for row in shown] == ["", "4.00x, 75% less", "1.00x, 0% less"]
    assert results.saved(304.35) == "304.35x, 99.7% less"  # and not all of it


@pytest.mark.parametrize("fast", ["full", "heads", "both"])
def test_times_below_the_steps_of_a_coarse_clock_give_a_table(tmp_path, fast):
    """An epoch of cached heads takes 10 ms, where a clock may advance by 24: both ways a factor, and no 0/0."""
    for name in ("full", "heads"):
        zero = {"epoch": 0.0, "total": 0.0} if fast in (name, "both") else {}
        fabricate(tmp_path, name, 0, 0.5, **zero)
    _, other = records = analyse(tmp_path, "full", "heads")
    assert other["epoch_factor"] > 0 and other["total_factor"] > 0
    assert (other["epoch_factor"] == 1) == (fast == "both")
    assert all(results.cost_row(record)["s an epoch"] for record in records)


def test_an_epoch_at_equal_precision_is_against_the_first_methods_twin(tmp_path):
    """full_amp differs from full in precision alone; what ran in a precision that no twin ran in has no factor."""
    fabricate(tmp_path, "full", 0, epoch=12.0, trainable_layers="all")
    fabricate(tmp_path, "full_amp", 0, epoch=6.0, trainable_layers="all")
    for name, precision in (("partial", "fp32"), ("partial_amp", "bf16"), ("partial_half", "fp16")):
        fabricate(tmp_path, name, 0, epoch=3.0, trainable_layers=3)
        rewrite(tmp_path / f"{name}-seed0" / "result.json", precision=precision)
    rewrite(tmp_path / "full_amp-seed0" / "result.json", precision="bf16")
    config = json.loads((tmp_path / "full-seed0" / "result.json").read_text())["config"]
    rewrite(tmp_path / "full-seed0" / "result.json", config={**config, "precision": "fp32"})
    records = analyse(tmp_path, "full", "full_amp", "partial", "partial_amp", "partial_half")
    factors = [record.get("epoch_factor_at_equal_precision") for record in records]
    assert factors == [None, 1, 4, 2, None]
    assert [record.get("epoch_factor") for record in records] == [None, 2, 4, 4, 4]


def rewrite(path: Path, **keys) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


# ---------------------------------------------------------------- the table


def test_the_table_says_where_its_figures_come_from(tmp_path):
    """Machine, precision, corpus, backbone, versions, seeds; the first line of a demo table is that it is one."""
    split = {"utterances": 1200, "speakers": 8, "hours": 0.0333}
    fabricate(tmp_path, "full", 0, sizes=split)
    runs = read(tmp_path, "full")
    text = results.markdown(runs, results.analyse(runs, TARGETS, {}), TARGETS, ["a note"], 0, {})
    lines = text.splitlines()
    assert lines[0] == run.DEMO_NOTE
    for part in ("a CPU", "fp32", "train 1,200 utterances 8 speakers 0.0333 h", "random weights", "torch 2.13"):
        assert any(part in line for line in lines[1:8]), part
    assert "- a note" in lines
    assert "predict the mean always scores 0 by construction" in text
    assert "over the 8 speakers" in text


def test_rows_are_padded_and_a_method_without_runs_has_one(tmp_path):
    """Every line of a table is as long as its first; nothing is compared with a first method that has no run."""
    fabricate(tmp_path, "b", 0)
    runs = read(tmp_path, "a_method", "b")
    lines = results.markdown(runs, results.analyse(runs, TARGETS, {}), TARGETS, [], 0, {}).splitlines()
    tables = [line for line in lines if line.startswith("|")]
    assert len(tables) == 3 * 4
    assert all(len({len(line) for line in tables[start : start + 4]}) == 1 for start in (0, 4, 8))
    assert cells(tables[2]) == ["a_method", "", "", "", "", ""]
    assert cells(tables[3])[3:] == ["", "", ""]
    assert cells(tables[11])[8:11] == ["", "", ""]


def test_no_finished_run_is_a_table_too(tmp_path):
    """Its notes say why."""
    runs = read(tmp_path, "a", "b")
    text = results.markdown(runs, results.analyse(runs, TARGETS, {}), TARGETS, ["a seed 0 failed"], 0, {})
    assert text.startswith("No run is finished.")
    assert text.endswith("- a seed 0 failed")


def test_runs_of_different_machines_are_pointed_out(tmp_path):
    """Each place with its runs; with one place there is no such note."""
    for seed, machine in enumerate(("a CPU", "a GPU")):
        fabricate(tmp_path, "full", seed, machine=machine)
    runs = read(tmp_path, "full")
    notes = "\n".join(results.cautions(runs, results.analyse(runs, TARGETS, {}), 0))
    assert "  - a CPU, python 3.12, torch 2.13: full seed 0\n  - a GPU, python 3.12, torch 2.13: full seed 1" in notes
    runs["full"].pop(1)
    assert "mixed" not in "\n".join(results.cautions(runs, results.analyse(runs, TARGETS, {}), 0))


@pytest.mark.parametrize(
    ("value", "text"), [(0.00412, "0.00412 s"), (7.64, "7.64 s"), (99.96, "100 s"), (4442.4, "4,442 s")]
)
def test_seconds(value, text):
    """Three digits, and no exponent."""
    assert results.seconds(value) == text


# ---------------------------------------------------------------- bad input


def test_a_damaged_result_is_named(tmp_path):
    """By its path."""
    path = fabricate(tmp_path, "full", 0) / "result.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"result\.json: is not JSON"):
        read(tmp_path, "full")


def test_predictions_of_other_targets_are_named(tmp_path):
    """As the columns are read by place."""
    path = fabricate(tmp_path, "full", 0) / "predictions_test.csv"
    path.write_text(path.read_text().replace("valence,activation_label", "dominance,activation_label"))
    with pytest.raises(ValueError, match=r"predictions_test\.csv: has columns .*dominance.*, expected file, speaker"):
        read(tmp_path, "full")
