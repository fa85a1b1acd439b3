"Runs that are stopped from outside: nothing lives on, the folder says what happened, and resume finishes the work."

import json
import os
import signal
import sys
import time

import pytest
from stages import alive, manifest, medft, start, until, write

OFF = "tracking.mlflow=false"
COUNT = "open(run + '/count.txt', 'a').write('{}\\n')"
WAIT = """import os, time
open(run + '/pid', 'w').write(str(os.getpid()))
while not os.path.exists(run + '/go'): time.sleep(0.05)"""


def begin(tmp_path, **env):
    "A run that waits in its second stage: (process, run folder, the kernel's process id)."
    write(
        tmp_path / "nbs",
        data=COUNT.format("data"),
        model=["x = 1", WAIT, COUNT.format("model")],
        train=COUNT.format("train"),
    )
    p, run = (
        start(
            tmp_path,
            "run",
            "quickstart",
            OFF,
            "--run-dir",
            "run",
            "--stages",
            "data,model,train",
            **env,
        ),
        tmp_path / "run",
    )
    return p, run, int(until(lambda: (run / "pid").read_text()))


def status(tmp_path):
    return medft(tmp_path, "list", MEDFT_RUNS=tmp_path)[1]


def resumes(tmp_path, run):
    (run / "go").touch()
    code, out, err = medft(tmp_path, "resume", "run")
    assert code == 0 and not err, err
    m = manifest(run)
    assert (
        m["status"] == "finished"
        and [s["status"] for s in m["stages"].values()] == ["finished"] * 3
    )
    assert (run / "count.txt").read_text().split() == [
        "data",
        "model",
        "train",
    ]  # no finished stage was done again
    nb = json.loads((run / "notebooks" / "02_model.ipynb").read_text())
    assert "interrupted" not in json.dumps(nb) and all(
        c["execution_count"] for c in nb["cells"] if c["cell_type"] == "code"
    )


@pytest.mark.parametrize(
    "number, expected",
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.long)],
)
def test_a_signal_ends_the_run_and_resume_finishes_it(tmp_path, number, expected):
    p, run, kernel = begin(tmp_path)
    pressed = time.time()
    p.send_signal(number)
    if number == signal.SIGINT:
        p.send_signal(number)  # impatience does no harm
    out, err = p.communicate(timeout=30)
    assert p.returncode == expected and time.time() - pressed < 10
    assert err.strip() == "medft: interrupted; go on with: medft resume run"
    assert not alive(kernel)
    m = manifest(run)
    assert (
        m["status"] == "interrupted"
        and m["stages"]["data"]["status"] == "finished"
        and m["stages"]["model"]["status"] == "interrupted"
    )
    nb = json.loads((run / "notebooks" / "02_model.ipynb").read_text())
    assert "interrupted" in "".join(nb["cells"][0]["source"])
    assert [c["metadata"]["papermill"]["status"] for c in nb["cells"] if c["cell_type"] == "code"][
        -2:
    ] == ["failed", "pending"]
    resumes(tmp_path, run)


def refuses_a_second_process(tmp_path, run, kernel):
    before = (run / "manifest.json").read_text()
    code, out, err = medft(tmp_path, "resume", "run")
    assert code == 2 and err.count("\n") == 1 and "another process" in err
    assert (run / "manifest.json").read_text() == before and alive(kernel)


def test_kill_9_leaves_no_orphan_and_reads_as_interrupted(tmp_path):
    p, run, kernel = begin(tmp_path)
    refuses_a_second_process(tmp_path, run, kernel)
    p.kill()
    p.wait()
    until(lambda: not alive(kernel), 15)
    assert manifest(run)["status"] == "running"  # nobody could write it down ...
    code = "import sys; from medft.core.run import Run; print(Run.open(sys.argv[1]).status)"
    import subprocess

    assert (
        subprocess.run(
            [sys.executable, "-c", code, run], capture_output=True, text=True
        ).stdout.strip()
        == "interrupted"
    )  # ... and yet it is seen
    resumes(tmp_path, run)
