"Tracking: everything arrives once, no server can stop a run, and no token leaves the machine."

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from stages import environment, manifest, medft, start, until, write

TOKEN = "hf_not_a_real_token_0123456789"
STEPS = """
import json, os, time

def step(engine, n):
    row = dict(step=n, loss=3 / n, learning_rate=1e-3, grad_norm=1.0)
    row |= dict(num_tokens=100 * n, seconds=n / 10)
    os.makedirs(f"{run}/{engine}", exist_ok=True)
    with open(f"{run}/{engine}/log.jsonl", "a") as f:
        f.write(json.dumps(row) + "\\n")

def done(engine):
    summary = dict(status="finished", tokens_per_second=512.0, peak_memory_bytes=10**9)
    with open(f"{run}/{engine}/training.json", "w") as f:
        json.dump(summary, f)
"""
DATA = """
os.makedirs(run + "/data/train")
with open(run + "/data/train/state.json", "w") as f:
    json.dump({"_fingerprint": "abc123"}, f)
with open(run + "/data/report.json", "w") as f:
    json.dump({"rows_in": 12}, f)
token = os.environ.get("HF_TOKEN")
print("the environment holds", token)
with open(run + "/logs/finetune.log", "a") as f:
    f.write(f"asked the hub with {token}\\n")
"""
EVALUATE = """
import json

def scores(value, low, high):
    return {"test": {"accuracy": {"value": value, "ci95": [low, high], "n": 423}}}

models = dict(base=scores(.475, .43, .52), trl=scores(.929, .9, .95), unsloth=scores(.93, .9, .95))
verdict = dict(label="better", sentence="better than the base: +45.4 points.")
with open(run + "/metrics.json", "w") as f:
    json.dump(dict(models=models, verdict=dict(trl=verdict, unsloth=verdict)), f)
"""
EXPORT = """
with open(run + "/report.html", "w") as f:
    f.write("<p>report</p>")
with open(run + "/README.md", "w") as f:
    f.write("# card")
"""
STORY = dict(
    data=["import json, os", DATA],
    train=[STEPS, "for n in range(5, 55, 5): step('trl', n)", "done('trl')"],
    unsloth=[STEPS, "for n in range(5, 55, 5): step('unsloth', n)", "done('unsloth')"],
    evaluate=EVALUATE,
    export=EXPORT,
)


def runs(uri, name="generative"):
    "A client, and all runs of an experiment: engine, or `run` for the parent -> run."
    from medft.cli.tracking import mlflow_client

    client = mlflow_client(str(uri))
    experiment = client.get_experiment_by_name(name)
    found = {}
    for run in client.search_runs([experiment.experiment_id]):
        is_child = "mlflow.parentRunId" in run.data.tags
        found[run.data.tags["engine"] if is_child else "run"] = run
    return client, found


def port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def check_all(client, found, run, engines=("trl", "unsloth")):
    "Parent, children, every step once, scores with intervals, files."
    assert set(found) == {"run", *engines}
    assert {r.info.status for r in found.values()} == {"FINISHED"}
    parent = found["run"]
    for e in engines:
        assert found[e].data.tags["mlflow.parentRunId"] == parent.info.run_id
        history = client.get_metric_history(found[e].info.run_id, "loss")
        losses = sorted((m.step, m.value) for m in history)
        assert losses == [(n, 3 / n) for n in range(5, 55, 5)]
        metrics = found[e].data.metrics
        assert metrics["tokens_per_second"] == pytest.approx(1000)
        assert metrics["training/tokens_per_second"] == 512
    m = found["trl"].data.metrics
    assert m["test/accuracy"] == 0.929
    assert (m["test/accuracy_ci_low"], m["test/accuracy_ci_high"]) == (0.9, 0.95)
    assert m["test/accuracy_n"] == 423
    assert parent.data.metrics["base/test/accuracy"] == 0.475
    assert [i.dataset.digest for i in parent.inputs.dataset_inputs] == ["abc123"]
    have, folders = set(), [None]
    while folders:
        for f in client.list_artifacts(parent.info.run_id, folders.pop()):
            if f.is_dir:
                folders.append(f.path)
            else:
                have.add(f.path)
    assert have >= {
        "recipe.yaml",
        "manifest.json",
        "metrics.json",
        "data/report.json",
        "logs/finetune.log",
        *(f"notebooks/{p.name}" for p in (run / "notebooks").iterdir()),
    }
    assert have >= {n for n in ("README.md", "report.html") if (run / n).exists()}


def test_a_run_is_tracked_in_sqlite_without_a_token(tmp_path, monkeypatch):
    write(tmp_path / "nbs", **STORY)
    secret = dict(HF_TOKEN=TOKEN, WANDB_API_KEY=TOKEN + "w", MY_PASSWORD=TOKEN + "p")
    code, out, err = medft(tmp_path, "run", "quickstart", "--run-dir", "run", **secret)
    assert code == 0 and not err, err
    assert TOKEN not in out
    for k in ("MLFLOW_TRACKING_URI", "MEDFT_RUNS"):
        monkeypatch.delenv(k, raising=False)
    for k, v in secret.items():
        monkeypatch.setenv(k, v)
    run, store = tmp_path / "run", tmp_path / "runs" / "mlflow.db"
    client, found = runs(f"sqlite:///{store}")
    check_all(client, found, run)
    tags, params = found["run"].data.tags, found["run"].data.params
    m = manifest(run)
    assert (tags["model"], tags["task"], tags["run"]) == ("tiny-base", "generative", "run")
    assert tags["digest"] == m["digest"]
    assert tags.get("git.commit") == m["git"]["commit"]
    assert tags["verdict.trl"] == "better"
    assert params["lora.r"] == "16"
    assert not [k for k in params if "hub_token" in k]

    from medft.cli.tracking import upload

    monkeypatch.chdir(tmp_path)

    def known_runs():
        (notes,) = json.loads((run / "mlflow.json").read_text()).values()
        return notes["runs"]

    before = known_runs()
    upload(run)  # a second time sends nothing twice
    (run / "mlflow.json").unlink()
    upload(run)  # nor when its notes are lost
    assert known_runs() == before
    check_all(*runs(f"sqlite:///{store}"), run)

    everywhere = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert any("mlartifacts" in str(p) for p in everywhere)
    assert not [p for p in everywhere if TOKEN.encode() in p.read_bytes()]


def test_failed_and_interrupted_runs_are_marked(tmp_path, monkeypatch):
    from medft.cli.tracking import upload
    from medft.core.files import write_json
    from medft.core.recipe import load_recipe
    from medft.core.run import Run

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    # running without a lock: it was killed
    for status, expected in (("failed", "FAILED"), ("running", "KILLED")):
        run = Run.create(
            load_recipe("quickstart", ["tracking.experiment=ends"]), root=tmp_path, run_id=status
        )
        (run.path / "trl").mkdir()
        (run.path / "trl" / "log.jsonl").write_text(
            '{"step": 5, "loss": 2.0, "seconds": 1}\n{"step": 10, "lo'
        )
        write_json(run.path / "unsloth" / "training.json", dict(status="skipped", reason="no GPU"))
        run.update(dict(status=status))
        mirror = upload(run.path)
        parent, child = (mirror.client.get_run(mirror.notes["runs"][k]) for k in ("run", "trl"))
        assert (parent.info.status, child.info.status) == (expected, expected)
        assert child.data.metrics["loss"] == 2.0
        assert parent.data.tags["skipped.unsloth"] == "no GPU"
        assert "unsloth" not in mirror.notes["runs"]
    run.update(dict(status="finished"))  # resumed: the log was started again, and went further
    (run.path / "trl" / "log.jsonl").write_text(
        '{"step": 5, "loss": 2.0, "seconds": 2}\n{"step": 10, "loss": 1.0, "seconds": 4}\n'
    )
    mirror = upload(run.path)
    assert mirror.client.get_run(mirror.notes["runs"]["run"]).info.status == "FINISHED"
    history = mirror.client.get_metric_history(mirror.notes["runs"]["trl"], "loss")
    assert sorted((m.step, m.value) for m in history) == [(5, 2.0), (10, 1.0)]


def test_secrets_are_known_by_their_names(monkeypatch):
    from medft.cli.tracking import recipe_parameters
    from medft.core.recipe import load_recipe
    from medft.core.secrets import is_secret_name, redact

    for name in (
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "WANDB_API_KEY",
        "MLFLOW_TRACKING_PASSWORD",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_ACCESS_KEY_ID",
        "hub_token",
        "OPENAI_API_KEY",
        "CLIENT_SECRET",
    ):
        assert is_secret_name(name), name
    for name in (
        "TOKENIZERS_PARALLELISM",
        "max_new_tokens",
        "num_tokens",
        "PATH",
        "MONKEY",
        "KEYBOARD",
        "include_num_input_tokens_seen",
    ):
        assert not is_secret_name(name), name
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    overrides = ["description=a " + TOKEN, "model.name=https://me:hunter2@example.org/x"]
    got = str(recipe_parameters(load_recipe("quickstart", overrides)))
    assert TOKEN not in got and "hunter2" not in got
    assert redact("") == ""


@pytest.mark.parametrize("kind", ["dead", pytest.param("slow", marks=pytest.mark.long)])
def test_a_dead_or_slow_server_warns_once_and_costs_little(tmp_path, kind, monkeypatch, capfd):
    write(tmp_path / "nbs", **STORY)
    options = ["--stages", "data,train,evaluate", "--run-dir", "run"]
    run = ["run", "quickstart", "engine=[trl]", *options]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        if kind == "slow":
            s.listen(64)  # takes every connection, and never answers
        begun = time.time()
        uri = f"http://me:hunter2@127.0.0.1:{s.getsockname()[1]}"
        code, out, err = medft(tmp_path, *run, MLFLOW_TRACKING_URI=uri)
        wall = time.time() - begun
    m = manifest(tmp_path / "run")
    assert code == 0 and m["status"] == "finished"
    assert err.count("\n") == 1 and "medft track run" in err and "hunter2" not in err + out, err
    assert wall - sum(s["seconds"] for s in m["stages"].values()) < 45
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert not [p for p in files if "hunter2" in p.read_text(errors="replace")]
    if kind == "slow":
        return
    from medft.cli.verbs import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEDFT_RUNS", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:hunter2@127.0.0.1:{port()}")
    assert main(["track", "run"]) == 1  # still no answer: one line
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "hunter2" not in err, err
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert main(["track", "run"]) == 0  # to the local store: nothing was lost
    check_all(*runs(f"sqlite:///{tmp_path}/runs/mlflow.db"), tmp_path / "run", ["trl"])


def server(tmp_path, number):
    "A real MLflow server on this machine."
    options = {
        "--backend-store-uri": f"sqlite:///{tmp_path}/server.db",
        "--artifacts-destination": str(tmp_path / "store"),
        "--host": "127.0.0.1",
        "--port": str(number),
        "--workers": "1",
    }
    command = [sys.executable, "-m", "mlflow", "server"]
    for option, value in options.items():
        command += [option, value]
    env = environment(
        tmp_path, MLFLOW_DISABLE_TELEMETRY="true", MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false"
    )
    with open(tmp_path / "server.log", "ab") as out:
        p = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )

    def answers():
        import urllib.request

        return urllib.request.urlopen(f"http://127.0.0.1:{number}/health", timeout=2).status == 200

    until(answers, 90, 0.3)
    return p


@pytest.mark.long
def test_a_server_that_dies_midway_loses_nothing(tmp_path, monkeypatch):
    "The address comes from .env."
    half = [
        STEPS,
        "for n in range(5, 30, 5): step('trl', n)",
        "while not os.path.exists(run + '/go'): time.sleep(0.05)",
        "for n in range(30, 55, 5): step('trl', n)",
        "done('trl')",
    ]
    write(tmp_path / "nbs", **(STORY | dict(train=half)))
    number, run = port(), tmp_path / "run"
    (tmp_path / ".env").write_text(f"MLFLOW_TRACKING_URI=http://127.0.0.1:{number}\n")
    first = server(tmp_path, number)
    try:
        options = ["--run-dir", "run", "--stages", "data,train,evaluate"]
        p = start(tmp_path, "run", "quickstart", "engine=[trl]", *options)

        def has_sent_steps():
            notes = json.loads((run / "mlflow.json").read_text())
            return any(note["sent"].get("trl/steps") for note in notes.values())

        until(has_sent_steps, 90)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    (run / "go").touch()
    out, err = p.communicate(timeout=120)
    assert p.returncode == 0 and err.count("\n") == 1 and "medft track run" in err, err
    from medft.cli.tracking import upload

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{number}")
    again = server(tmp_path, number)
    try:
        upload(run)
        check_all(*runs(f"http://127.0.0.1:{number}"), run, ["trl"])
    finally:
        os.killpg(again.pid, signal.SIGKILL)
        again.wait()
