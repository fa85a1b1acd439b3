"Real kills of real processes: what goes on from a checkpoint ends where it would have ended."

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from stages import alive, environment, manifest, until

HERE = Path(__file__).parents[1]


def killing(home, kills, tasks):
    out = subprocess.run(
        [sys.executable, HERE / "helpers" / "killing.py", home, str(kills), ",".join(tasks)],
        capture_output=True,
        text=True,
        cwd=HERE,
        env=dict(os.environ, OMP_NUM_THREADS="1", MEDFT_RUNS=str(home)),
    )
    lines = out.stdout.splitlines()
    found = [json.loads(line) for line in lines if line.startswith('{"task"')]
    assert out.returncode in (0, 1) and found, out.stdout[-2000:] + out.stderr[-3000:]
    return found, (home / "table.md").read_text()


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    "One kill and one SIGTERM; all tasks and more moments in the long one."
    found, table = killing(tmp_path, 1, ["full"])
    assert len(found) == 2 and not any(r["differs"] for r in found), table
    assert "SIGTERM" in found[-1]["killed"] and found[-1]["resumed"].startswith("checkpoint-")


@pytest.mark.long
def test_many_moments_over_all_tasks(tmp_path):
    found, table = killing(
        tmp_path,
        3,
        [
            "lora",
            "qlora",
            "full",
            "classification",
            "pretraining",
            "fast",
            "fast-full",
            "fast-classification",
        ],
    )
    print(table)
    assert len(found) == 32 and not any(r["differs"] for r in found), table
    assert sum(r["resumed"].startswith("checkpoint-") for r in found) >= 12 and any(
        "being saved" in r["killed"] for r in found
    )


SMALL = [
    "engine=trl",
    "training.per_device_train_batch_size=4",
    "training.max_steps=40",
    "training.logging_steps=1",
    "training.save_strategy=steps",
    "training.save_steps=5",
    "training.save_total_limit=2",
    "training.warmup_steps=0",
    "lora.lora_dropout=0.1",
    "dataset.max_samples=64",
    "tracking.mlflow=false",
]


def cli(home, *args):
    (home / "home").mkdir(exist_ok=True)
    env = {k: v for k, v in environment(home).items() if k != "MEDFT_NOTEBOOKS"}
    return subprocess.Popen(
        [sys.executable, "-m", "medft.cli.verbs", *args],
        cwd=home,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def begin(home, name):
    "A whole `medft run` in the middle of its training: the process, its folder."
    p = cli(home, "run", "quickstart", *SMALL, "--run-dir", name, "--stages", "data,model,train")
    until(
        lambda: (
            len((home / name / "trl" / "log.jsonl").read_text().splitlines()) >= 7
            or p.poll() is not None
        ),
        300,
        0.02,
    )
    return p, home / name


def kernel_of(process):
    "The process id of the kernel that a `medft run` has started last."
    children = psutil.Process(process.pid).children(recursive=True)
    living = [c for c in children if c.status() != psutil.STATUS_ZOMBIE]
    return next(c.pid for c in living if "ipykernel_launcher" in " ".join(c.cmdline()))


def adapter(run):
    return (run / "trl" / "adapters" / "adapter_model.safetensors").read_bytes()


def losses(run):
    return [
        (r["step"], r["loss"])
        for r in map(json.loads, (run / "trl" / "log.jsonl").read_text().splitlines())
        if "loss" in r
    ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    home = tmp_path_factory.mktemp("whole")
    p = cli(home, "run", "quickstart", *SMALL, "--run-dir", "run", "--stages", "data,model,train")
    out, err = p.communicate(timeout=900)
    assert p.returncode == 0, err
    return home / "run"


@pytest.mark.long
@pytest.mark.parametrize("how", ["kill -9", "SIGTERM", "SIGTERM to the kernel"])
def test_the_whole_command(tmp_path, uninterrupted, how):
    p, run = begin(tmp_path, "run")
    kernel = kernel_of(p)
    pressed = time.time()
    if how == "kill -9":
        p.kill()
    else:
        os.kill(kernel if "kernel" in how else p.pid, signal.SIGTERM)
    out, err = p.communicate(timeout=60)
    until(lambda: not alive(kernel), 30)
    if how != "kill -9":
        assert p.returncode == 143 and time.time() - pressed < 30, err
        assert (
            err.strip().endswith("interrupted; go on with: medft resume run")
            and "Traceback" not in err
        )
        assert (
            manifest(run)["status"] == manifest(run)["stages"]["train"]["status"] == "interrupted"
        )
        assert (
            "asked to end (SIGTERM); checkpoint saved at step"
            in (run / "logs" / "finetune.log").read_text()
        )
    p = cli(tmp_path, "resume", "run")
    out, err = p.communicate(timeout=900)
    assert p.returncode == 0, err
    assert (
        "going on from checkpoint-" in out
        and adapter(run) == adapter(uninterrupted)
        and losses(run) == losses(uninterrupted)
    )


@pytest.mark.long
@pytest.mark.parametrize("largest", [50_000, 600_000], ids=["the rows", "the first checkpoint"])
def test_a_full_disk_ends_in_one_line_and_the_run_goes_on_later(tmp_path, uninterrupted, largest):
    "A real limit on file sizes stands for the full disk: the rows, or a checkpoint, do not fit."
    limit = f"""import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({largest}, {largest}))
sys.argv = ['medft', *sys.argv[1:]]
runpy.run_module('medft.cli.verbs', run_name='__main__')"""
    env = {k: v for k, v in environment(tmp_path).items() if k != "MEDFT_NOTEBOOKS"}
    (tmp_path / "home").mkdir()
    out = subprocess.run(
        [
            sys.executable,
            "-c",
            limit,
            "run",
            "quickstart",
            *SMALL,
            "--run-dir",
            "run",
            "--stages",
            "data,model,train",
        ],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (
        out.returncode == 2
        and "cannot write" in out.stderr
        and "Traceback" not in out.stderr
        and out.stderr.strip().count("\n") == 0
    ), out.stderr
    assert not list((tmp_path / "run" / "trl" / "checkpoints").glob("checkpoint-*/seal.json"))
    p = cli(tmp_path, "resume", "run")
    out, err = p.communicate(timeout=900)
    assert p.returncode == 0 and adapter(tmp_path / "run") == adapter(uninterrupted), err
