"""Runs and sweeps as frames, from directories and CSV files."""

from __future__ import annotations

import csv
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from lightning_locality.results import (
    aggregate,
    find_column,
    history,
    last_metrics,
    ordered,
    read_runs,
    write_results,
)


def make_run(folder: Path, summary: dict[str, Any] | None, config: Any = None, metrics: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config or {}))
    if metrics:
        (folder / "metrics.csv").write_text(metrics)
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def summary(accuracy: float, **more: Any) -> dict[str, Any]:
    return {"metrics": {"test/accuracy": accuracy}, "epochs": 3, "seconds": 1.5, "steps": 9, **more}


def test_a_row_per_run_with_labels_counts_metrics_and_settings(tmp_path: Path) -> None:
    config = {"model": {"class_path": "M", "init_args": {"weight": 3, "sizes": [1, 2]}}, "labels": {"variant": "near"}}
    make_run(tmp_path / "b", None, config, "epoch,step,val/accuracy\n0,1,0.5\n1,2,\n")
    make_run(tmp_path / "a", summary(0.75, labels={"variant": "far", "distance": 80}, config=config))
    runs = read_runs([tmp_path])
    assert list(runs)[:8] == ["run", "folder", "finished", "variant", "distance", "epochs", "seconds", "test/accuracy"]
    assert runs.attrs["varied"] == ["variant", "distance"]
    assert runs["run"].tolist() == ["a", "b"]
    assert runs["finished"].tolist() == [True, False]
    assert runs["folder"].tolist() == [tmp_path / "a", tmp_path / "b"]
    assert runs["variant"].tolist() == ["far", "near"]
    assert runs["val/accuracy"].tolist()[1] == 0.5  # the last known of a run that has not finished
    assert runs["model.weight"].tolist() == [3, 3]
    assert runs["model.sizes"].tolist() == ["[1, 2]"] * 2
    # the same of one run
    assert read_runs([tmp_path / "a"]).iloc[0]["test/accuracy"] == 0.75


def test_runs_without_labels_take_them_from_the_table_or_from_their_settings(tmp_path: Path) -> None:
    for seed in (1, 0):
        config = {"seed_everything": seed, "data": {"init_args": {"distance": 8}}, "run_dir": f"runs/{seed}"}
        make_run(tmp_path / f"x-seed={seed}", summary(0.5 + seed), config)
    assert read_runs([tmp_path]).attrs["varied"] == ["seed_everything"]
    rows = [f"x-seed={seed},far,{seed},3,1.5,{0.5 + seed}" for seed in (1, 0)]
    (tmp_path / "results.csv").write_text("\n".join(["run,variant,seed,epochs,seconds,test/accuracy", *rows]))
    runs = read_runs([tmp_path])
    assert runs.attrs["varied"] == ["variant", "seed"]
    assert runs["seed"].tolist() == [1, 0]  # in the order of the sweep
    make_run(tmp_path / "y", None)
    assert read_runs([tmp_path])["finished"].tolist() == [True, True, False]
    table = read_runs([tmp_path / "results.csv"])
    assert table["folder"].tolist() == [tmp_path / "x-seed=1", tmp_path / "x-seed=0"]
    assert table["data.distance"].tolist() == [8, 8]


def test_known_labels_of_runs_that_have_not_started(tmp_path: Path) -> None:
    make_run(tmp_path / "a", summary(0.5))
    labels = {tmp_path / name: {"variant": name, "clip": None} for name in ("b", "a")}
    runs = read_runs(list(labels), labels)
    assert runs[["run", "variant", "finished"]].to_numpy().tolist() == [["b", "b", False], ["a", "a", True]]
    assert "input" not in runs


def test_several_inputs_are_told_apart_and_read_once(tmp_path: Path) -> None:
    for name in ("one", "weight_0.5"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.csv").write_text("variant,epochs,y\nv,1,2\n")
    paths = [tmp_path / "one", tmp_path / "one" / "results.csv", tmp_path / "weight_0.5"]
    runs = read_runs(paths)
    assert runs["input"].tolist() == ["one", "weight_0.5"]
    assert runs.attrs["varied"] == ["input", "variant"]


def test_results_of_a_sweep_hold_the_texts_that_csv_writes(tmp_path: Path) -> None:
    metrics = {"iteration": 800, "train/loss": 1e-05, "test/loss": math.nan, "norm": 3.697e106, "time": math.inf}
    make_run(tmp_path / "a", {"metrics": metrics, "iterations": 800, "epochs": 1, "seconds": 0.3})
    make_run(tmp_path / "b", {"metrics": {"extra": 1.0, "norm": 2.0}, "epochs": 2, "seconds": 7})
    make_run(tmp_path / "c", None)
    labels = {
        tmp_path / name: {"variant": f"v, {name}", "clip": clip} for name, clip in zip("abc", (5, None, 1), strict=True)
    }
    write_results(tmp_path / "results.csv", labels)
    assert (tmp_path / "results.csv").read_bytes().decode().split("\r\n") == [
        "run,variant,clip,epochs,iterations,seconds,iteration,train/loss,test/loss,norm,time,extra",
        'a,"v, a",5,1,800,0.3,800,1e-05,nan,3.697e+106,inf,',
        'b,"v, b",,2,,7,,,,2.0,,1.0',
        "",
    ]
    runs = read_runs([tmp_path / "results.csv"])
    assert runs.attrs["varied"] == ["variant", "clip"]
    assert runs["norm"].tolist() == [3.697e106, 2.0]


def test_tables_of_others(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("x,loß,b,name\n1,2,True,None\n", encoding="utf-8-sig")
    runs = read_runs([tmp_path / "r.csv"])
    assert runs[["x", "loß", "b", "name"]].iloc[0].tolist() == [1, 2, True, "None"]
    assert runs.attrs["varied"] == []
    (tmp_path / "empty.csv").write_text("x,y\n")
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("empty.csv", "empty.csv has no rows: no run has finished"),
        ("nothing", "there is no file or folder .*nothing"),
        ("folder", "folder has neither a results.csv nor run directories"),
    ):
        with pytest.raises(ValueError, match=message):
            read_runs([tmp_path / name])


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may read everything")
def test_a_neighbour_that_may_not_be_read_does_no_harm(tmp_path: Path) -> None:
    make_run(tmp_path / "a", summary(0.5))
    (tmp_path / "private").mkdir(mode=0)
    assert len(read_runs([tmp_path])) == 1


def test_columns_by_their_last_part() -> None:
    names = ["variant", "data.distance", "weight", "train/accuracy", "test/accuracy", "model.weight", "model.depth"]
    frame = pd.DataFrame(columns=[*names, "data.seed", "model.seed"])
    frame.attrs["settings"] = [name for name in frame if "." in name and name != "data.distance"]
    assert find_column(frame, "distance") == find_column(frame, "data.distance") == "data.distance"
    assert find_column(frame, "weight") == "weight"  # the label, not the setting
    assert find_column(frame, "depth") == "model.depth"
    for name, message in (
        ("accuracy", "--y: 'accuracy' may be train/accuracy or test/accuracy; give the full name"),
        ("seed", "'seed' may be data.seed or model.seed"),
        ("distnce", r"no column 'distnce' \(did you mean 'distance'\?\); there are variant, data.distance"),
    ):
        with pytest.raises(ValueError, match=message):
            find_column(frame, name, "--y")


def test_values_sort_by_size_and_texts_as_in_the_sweep() -> None:
    assert ordered([10, "z", 9.5, "a", None, 9.5, "z", -1, math.nan]) == [-1, 9.5, 10, "z", "a", None]
    assert ordered([True, False, True]) == [False, True]


def test_aggregates_are_those_of_pandas() -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "g": np.tile(["b", "a", "c"], 40),
            "x": rng.integers(0, 5, 120) / 2,
            "y": rng.normal(size=120),
            "finished": rng.random(120) < 0.9,
        }
    )
    frame.loc[3, "y"], frame.loc[4, "x"] = math.inf, math.nan
    found = aggregate(frame, ["g", "x"], "y")
    assert list(found) == ["g", "x", "mean", "std", "sem", "median", "least", "greatest", "n", "runs"]
    assert list(dict.fromkeys(found["g"])) == ["b", "a", "c"]
    assert found["x"].tolist()[:5] == [0, 0.5, 1, 1.5, 2]
    finite = frame[frame["finished"] & np.isfinite(frame["y"])]
    wanted = finite.groupby(["g", "x"])["y"]
    found = found.set_index(["g", "x"]).sort_index()
    for name, value in {
        "mean": wanted.mean(),
        "std": wanted.std(ddof=0),
        "sem": wanted.sem(),
        "median": wanted.median(),
        "least": wanted.min(),
        "greatest": wanted.max(),
        "n": wanted.count(),
    }.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-12, err_msg=name)
    assert set(found["runs"]) == {frame.groupby(["g", "x"]).size().max()}


def test_missing_values_are_a_group_and_grids_stay_as_written() -> None:
    frame = pd.DataFrame({"clip": [0.5, None, None], "x": [0, 1.0, 0.3], "y": [1.0, 2.0, None]})
    found = aggregate(frame, ["clip", "x"], "y")
    assert found["x"].tolist() == [0, 0.3, 1]
    assert [str(value) for value in found["x"]] == ["0", "0.3", "1"]
    assert found["n"].tolist() == [1, 0, 1]
    assert found["std"].isna().all()  # of one run


def test_history_merges_the_rows_of_an_epoch_and_takes_the_last_value(tmp_path: Path) -> None:
    assert history(tmp_path).empty
    path = tmp_path / "metrics.csv"
    path.write_text("")
    assert history(tmp_path).empty
    path.write_text("epoch,step,a,b\n1,3,0.25,\n0,1,0.5,\n0,1,,2.0\n1,3,0.125,\n,4,9,9\n")
    rows = history(tmp_path)
    assert rows.index.tolist() == [0, 1]
    assert rows["a"].tolist() == [0.5, 0.125]
    assert rows["b"].dropna().tolist() == [2]
    assert history(tmp_path, "iteration").empty
    path.write_text("iteration,a,b\n25,1,\n0,5,6\n25,,2\n25,3,\n,9,9\n50,1e-")  # cut off while it is written
    rows = history(tmp_path, "iteration")
    assert rows.index.tolist() == [0, 25, 50]
    assert rows.loc[25].tolist() == [3, 2]


def test_numbers_are_read_exactly(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=200) * 10.0 ** np.random.default_rng(1).integers(-30, 30, 200)
    with (tmp_path / "metrics.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["iteration", "a"], *enumerate(values.tolist())])
    assert history(tmp_path, "iteration")["a"].tolist() == values.tolist()


def test_the_last_metrics_are_kept_even_if_they_are_not_numbers(tmp_path: Path) -> None:
    assert last_metrics(tmp_path) == {}
    (tmp_path / "metrics.csv").write_text("epoch,step,a,b\n0,1,1.5,2\n1,2,nan,\n")
    found = last_metrics(tmp_path)
    assert math.isnan(found["a"])
    assert found["b"] == 2


def test_an_empty_table_of_a_sweep_hides_no_run(tmp_path: Path) -> None:
    make_run(tmp_path / "a", summary(0.5))
    (tmp_path / "results.csv").write_text("\r\n")
    assert list(read_runs([tmp_path])["run"]) == ["a"]
    with pytest.raises(ValueError, match=r"results\.csv has no rows"):
        read_runs([tmp_path / "results.csv"])


def test_rows_that_no_table_holds_are_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss\n1,2.0\n" + "x" * 200_000 + "\n")
    with pytest.raises(ValueError, match=r"metrics.csv is damaged: field larger than .* remove the damaged rows"):
        last_metrics(tmp_path)
    path.write_text("step,loss\n1,2.0\n2,")  # half a row
    assert last_metrics(tmp_path) == {"loss": 2.0}
