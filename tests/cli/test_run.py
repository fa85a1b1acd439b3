"""Whole runs through the command line, as a user starts them."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from real_data import LARGE, needs_large

TOP = Path(__file__).resolve().parents[2]
SMALL = [
    "engine=trl",
    "dataset.max_samples=128",
    "training.num_train_epochs=1",
    "evaluation.max_items=24",
    "tracking.mlflow=false",
    "export.merge=false",
]


def medft(*args, runs, **env):
    "Run the command; every connection that would leave the machine is refused and noted."
    blocked = dict(
        PYTHONPATH=str(TOP / "tests/blocked"), MEDFT_SOCKET_LOG=str(runs / "sockets.log")
    )
    return subprocess.run(
        [sys.executable, "-m", "medft.cli.verbs", *args],
        cwd=TOP,
        text=True,
        capture_output=True,
        env=os.environ | dict(MEDFT_RUNS=str(runs)) | blocked | env,
    )


def only_run(runs, recipe):
    (folder,) = [p.parent for p in (runs / recipe).glob("*/manifest.json")]
    return folder


def read(path):
    return json.loads(path.read_text())


def finished(tmp_path_factory, name, *changes):
    "A `medft run quickstart` that ended well: its folder, and the process."
    runs = tmp_path_factory.mktemp(name)
    # One thread: the other core has its own tests.
    done = medft("run", "quickstart", *changes, runs=runs, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return only_run(runs, "quickstart"), done


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    "Every stage and every engine, on a quarter of the rows."
    return finished(
        tmp_path_factory,
        "story",
        "dataset.max_samples=128",
        "evaluation.max_items=24",
        "training.warmup_steps=2",
        "training.logging_steps=1",
    )


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    "The whole quickstart, as it is shipped."
    return finished(tmp_path_factory, "quickstart")


def test_a_run_reaches_nothing_outside(story):
    log = story[0].parent.parent / "sockets.log"
    assert not log.exists(), log.read_text()


def test_engines_agree_step_by_step(story):
    losses = {}
    for engine in ("trl", "unsloth", "fast"):
        lines = map(json.loads, (story[0] / engine / "log.jsonl").open())
        losses[engine] = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert len(losses["trl"]) == 8
    for other in ("unsloth", "fast"):
        assert losses["trl"].keys() == losses[other].keys()
        first = [
            abs(losses["trl"][step] - losses[other][step]) for step in sorted(losses["trl"])[:5]
        ]
        assert max(first) < 0.01, (other, first)  # later steps drift apart by rounding alone


def test_run_folder_is_complete(story):
    run = story[0]
    assert read(run / "manifest.json")["status"] == "finished"
    stages = (
        "01_data",
        "02_model",
        "03_train",
        "03_unsloth",
        "04_fast",
        "05_evaluate",
        "06_export",
    )
    assert {p.stem for p in (run / "notebooks").glob("*.ipynb")} == set(stages)
    files = [
        "recipe.yaml",
        "README.md",
        "report.html",
        "metrics.json",
        "training.env",
        "logs/finetune.log",
        "data/report.json",
        "trl/merged/model.safetensors",
    ]
    files += [
        f"{engine}/adapters/adapter_model.safetensors" for engine in ("trl", "unsloth", "fast")
    ]
    for name in files:
        assert (run / name).stat().st_size > 0, name
    report = read(run / "data/report.json")
    left_out = sum(report["rejected"].values()) + sum(report["filtered"].values())
    assert report["rows_in"] == report["rows_out"] + left_out
    assert not [p for p in run.rglob("*") if p.suffix in (".pkl", ".bin", ".pt")], (
        "nothing that is read by unpickling is handed over"
    )
    metrics = read(run / "metrics.json")
    for engine in ("trl", "unsloth", "fast"):
        assert metrics["verdict"][engine]["sentence"] in story[1].stdout


def test_export_scored_the_reloaded_models(story):
    export = read(story[0] / "export.json")
    assert all(engine in json.dumps(export) for engine in ("trl", "unsloth", "fast"))


@pytest.mark.long
def test_quickstart_gives_the_verdict_that_the_page_promises(quickstart):
    run, done = quickstart
    metrics = read(run / "metrics.json")

    def score(who, name):
        return metrics["models"][who][name]["accuracy"]

    assert score("base", "test")["value"] <= 0.5
    for engine in ("trl", "unsloth", "fast"):
        assert metrics["verdict"][engine]["label"] == "better"
        assert score(engine, "test")["value"] >= 0.9
        assert score(engine, "test")["ci95"][0] > score("base", "test")["ci95"][1]
        assert score(engine, "new_wording")["value"] >= 0.8
        assert score(engine, "never_read")["value"] <= 0.45
    assert metrics["verdict"]["trl"]["sentence"] in done.stdout
    assert not (run.parent.parent / "sockets.log").exists()


@pytest.mark.long
def test_same_recipe_and_seed_give_the_same_bytes(tmp_path):
    found = []
    for name in ("a", "b"):
        done = medft(
            "run",
            "quickstart",
            *SMALL,
            "--stages",
            "data,train,evaluate",
            runs=tmp_path / name,
            OMP_NUM_THREADS="1",
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        run = only_run(tmp_path / name, "quickstart")
        predictions = {
            p.name: pd.read_parquet(p).to_json()
            for p in sorted((run / "predictions").glob("*.parquet"))
        }
        found.append(
            (
                hashlib.sha256(
                    (run / "trl/adapters/adapter_model.safetensors").read_bytes()
                ).hexdigest(),
                read(run / "metrics.json"),
                predictions,
            )
        )
    assert found[0] == found[1] and found[0][2]


@needs_large
def test_real_questions_end_in_a_tie(tmp_path):
    done = medft(
        "run",
        "medmcqa_tiny",
        f"dataset.path={LARGE / 'medmcqa/dev.json'}",
        "dataset.max_samples=256",
        "evaluation.max_items=150",
        "tracking.mlflow=false",
        "--stages",
        "data,train,evaluate",
        runs=tmp_path,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    verdict = read(only_run(tmp_path, "medmcqa_tiny") / "metrics.json")["verdict"]["trl"]
    assert verdict["label"] == "tie" and verdict["detectable"] > 0


def papermill(*args, runs):
    return subprocess.run(
        [sys.executable, "-m", "papermill", "--no-progress-bar", *args],
        cwd=TOP,
        text=True,
        capture_output=True,
        env=os.environ | dict(MEDFT_RUNS=str(runs)),
    )


def test_a_stage_runs_under_plain_papermill(tmp_path):
    done = papermill(
        "nbs/01_data.ipynb",
        str(tmp_path / "out.ipynb"),
        "-p",
        "recipe",
        "quickstart",
        runs=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert read(only_run(tmp_path, "quickstart") / "data/report.json")["rows_out"] > 0


def test_plain_papermill_with_an_unknown_parameter_is_refused(tmp_path):
    done = papermill(
        "nbs/01_data.ipynb",
        str(tmp_path / "out.ipynb"),
        "-p",
        "recpie",
        "quickstart",
        runs=tmp_path,
    )
    assert (
        done.returncode != 0
        and "unknown papermill parameter 'recpie' (did you mean 'recipe'?)" in done.stderr
    )
    assert not (tmp_path / "quickstart").exists()
