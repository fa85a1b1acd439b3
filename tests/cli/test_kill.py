"Runs that are stopped: no process is left, the folder says what happened, resume finishes them."

import json
import signal
import subprocess
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
    options = ["--run-dir", "run", "--stages", "data,model,train"]
    p = start(tmp_path, "run", "quickstart", OFF, *options, **env)
    run = tmp_path / "run"
    return p, run, int(until(lambda: (run / "pid").read_text()))


def resumes(tmp_path, run):
    (run / "go").touch()
    code, out, err = medft(tmp_path, "resume", "run")
    assert code == 0 and not err, err
    m = manifest(run)
    assert m["status"] == "finished"
    assert [s["status"] for s in m["stages"].values()] == ["finished"] * 3
    # no finished stage was run again
    assert (run / "count.txt").read_text().split() == ["data", "model", "train"]
    nb = json.loads((run / "notebooks" / "02_model.ipynb").read_text())
    assert "interrupted" not in json.dumps(nb)
    assert all(c["execution_count"] for c in nb["cells"] if c["cell_type"] == "code")


@pytest.mark.parametrize(
    "number, expected",
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.long)],
)
def test_a_signal_ends_the_run_and_resume_finishes_it(tmp_path, number, expected):
    p, run, kernel = begin(tmp_path)
    pressed = time.time()
    p.send_signal(number)
    if number == signal.SIGINT:
        p.send_signal(number)  # a second Ctrl-C does no harm
    out, err = p.communicate(timeout=30)
    assert p.returncode == expected and time.time() - pressed < 10
    assert err.strip() == "medft: interrupted; go on with: medft resume run"
    assert not alive(kernel)
    m = manifest(run)
    assert m["status"] == "interrupted"
    assert m["stages"]["data"]["status"] == "finished"
    assert m["stages"]["model"]["status"] == "interrupted"
    nb = json.loads((run / "notebooks" / "02_model.ipynb").read_text())
    assert "interrupted" in "".join(nb["cells"][0]["source"])
    code_cells = [c for c in nb["cells"] if c["cell_type"] == "code"]
    states = [c["metadata"]["papermill"]["status"] for c in code_cells]
    assert states[-2:] == ["failed", "pending"]
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
    assert manifest(run)["status"] == "running"  # no process could record the end
    code = "import sys; from medft.core.run import Run; print(Run.open(sys.argv[1]).status)"
    done = subprocess.run([sys.executable, "-c", code, run], capture_output=True, text=True)
    assert done.stdout.strip() == "interrupted"
    resumes(tmp_path, run)
