"""Run every notebook in a process of its own, in reading order; it prints the failures."""

import medft.core.sections

import importlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from nbdev.test import nbdev_test

# tests/cli/test_run.py runs the stage notebooks, every cell (`medft run quickstart`).
STAGES = {f"{name}.ipynb" for name in medft.core.sections.STAGES.values()}
# Nearly every notebook needs these. Loaded once, before the processes are forked, they save seconds
# in each. transformers and trl load their parts on demand, so the parts are named.
SHARED = {
    "datasets": [],
    "matplotlib.pyplot": [],
    "pandas": [],
    "peft": [],
    "sklearn": [],
    "torch": [],
    "transformers": ["AutoModelForCausalLM", "AutoTokenizer", "Trainer"],
    "trl": ["SFTConfig", "SFTTrainer"],
}


def load_shared():
    "Import the shared libraries and their parts."
    for name, parts in SHARED.items():
        library = importlib.import_module(name)
        for part in parts:
            getattr(library, part)


def all_notebooks():
    "Every notebook but the stages, in reading order."
    found = sorted(Path("nbs").rglob("*.ipynb"))
    visible = [path for path in found if not any(part.startswith(".") for part in path.parts)]
    return [path for path in visible if path.name not in STAGES]


def cells_not_run(notebook):
    "How many cells a directive keeps from running, besides the one that installs medft on Colab."
    cells = json.loads(notebook.read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    directives = ("#| notest", "#| gpu", "#| eval: false")
    n_cells = 0
    for source in sources:
        has_directive = any(line.startswith(directives) for line in source.splitlines())
        n_cells += has_directive and "pip" not in source
    return n_cells


def run_here(notebook):
    "Run a notebook in this process; its exit code."
    try:
        nbdev_test(str(notebook), n_workers=0)
    except SystemExit as e:
        return 0 if e.code in (None, 0) else 1
    except BaseException as e:
        print(f"{type(e).__name__}: {e}")
        return 1
    return 0


def run(notebook):
    "Run a notebook in a fork of this process, and print its output if it fails; whether it passed."
    start = time.time()
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            for stream in (1, 2):
                os.dup2(output.fileno(), stream)
            code = run_here(notebook)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        passed = os.waitpid(child, 0)[1] == 0
        if not passed:
            output.seek(0)
            print(output.read().decode(errors="replace"))
    result = "ok    " if passed else "FAILED"
    print(f"notebook {result}  {time.time() - start:4.0f} s  {notebook}", flush=True)
    return passed


load_shared()
notebooks = [Path(arg) for arg in sys.argv[1:]] or all_notebooks()
passed = [run(notebook) for notebook in notebooks]
left_out = {notebook: cells_not_run(notebook) for notebook in notebooks}
texts = [f"{notebook} ({n} cells)" for notebook, n in left_out.items() if n]
if texts:
    print("not run, by a directive of their own: " + ", ".join(texts))
sys.exit(not all(passed))
