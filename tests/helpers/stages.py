"Example stage notebooks, and the command line as a process, for several test files."

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import nbformat

STAGES = dict(
    data="01_data",
    model="02_model",
    train="03_train",
    unsloth="03_unsloth",
    fast="04_fast",
    evaluate="05_evaluate",
    export="06_export",
)
PARAMETERS = 'recipe: str = "quickstart"\nrun: str = ""'


def write(folder, parameters=PARAMETERS, default="assert run", **cells):
    "Write the stages' notebooks: one cell of parameters, then the given cell (or a list of cells)."
    Path(folder).mkdir(parents=True, exist_ok=True)
    for stage, stem in STAGES.items():
        given = cells.get(stage, default)
        sources = [given] if isinstance(given, str) else given
        code = [nbformat.v4.new_code_cell(source) for source in (parameters, *sources)]
        code[0].metadata["tags"] = ["parameters"]
        nbformat.write(nbformat.v4.new_notebook(cells=code), Path(folder) / f"{stem}.ipynb")


def environment(tmp, **more):
    "An environment that writes to tmp alone."
    ours = ("MLFLOW_", "MEDFT_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(ours) and k != "DO_NOT_TRACK"}
    env |= dict(MEDFT_NOTEBOOKS=str(tmp / "nbs"), HOME=str(tmp / "home"), OMP_NUM_THREADS="1")
    return env | {k: str(v) for k, v in more.items()}


def start(tmp, *args, **env):
    "Start `medft ARGS` in tmp."
    (tmp / "home").mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "medft.cli.verbs", *map(str, args)],
        cwd=tmp,
        env=environment(tmp, **env),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def medft(tmp, *args, timeout=120, **env):
    "Run `medft ARGS` in tmp: (exit code, stdout, stderr)."
    p = start(tmp, *args, **env)
    out, err = p.communicate(timeout=timeout)
    return p.returncode, out, err


def manifest(run):
    return json.loads((run / "manifest.json").read_text())


def until(what, seconds=60, pause=0.1):
    "Wait until what() is true, and return it; what it reads may not exist yet."
    deadline = time.time() + seconds
    while time.time() < deadline:
        with suppress(OSError, ValueError, KeyError):
            if got := what():
                return got
        time.sleep(pause)
    raise AssertionError(f"waited {seconds} s in vain")


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    if not Path("/proc").exists():
        return True
    state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    return state != "Z"  # a zombie is dead
