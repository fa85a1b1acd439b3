"""Every notebook in a process of its own, in reading order; the libraries that nearly all of them need are loaded once, before the processes part."""

import medft.core.run

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import datasets
import matplotlib.pyplot
import pandas
import peft
import sklearn
import torch
import transformers
import trl  # noqa: loaded here, each saves its seconds in every notebook
from nbdev.test import nbdev_test
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer  # noqa: transformers loads its parts when they are asked for
from trl import SFTConfig, SFTTrainer  # noqa

# The stage notebooks run whole, every cell, in tests/cli/test_run.py (`medft run quickstart`); the others run here.
STAGES = {f"{n}.ipynb" for n in medft.core.run.STAGES.values()}
given = [Path(a) for a in sys.argv[1:]]


def cells_not_run(nb):
    "How many cells a directive keeps from running, besides the one that installs medft on Colab."
    sources = [
        "".join(cell["source"])
        for cell in json.loads(nb.read_text())["cells"]
        if cell["cell_type"] == "code"
    ]
    never = "#| notest", "#| gpu", "#| eval: false"
    return sum(
        any(line.startswith(never) for line in s.splitlines()) and "pip" not in s for s in sources
    )


every = sorted(
    p
    for p in Path("nbs").rglob("*.ipynb")
    if not any(part.startswith(".") for part in p.parts) and p.name not in STAGES
)
bad, left_out = 0, []
for nb in given or every:
    start, said = time.time(), tempfile.TemporaryFile()
    child = os.fork()
    if child == 0:
        for stream in (1, 2):
            os.dup2(said.fileno(), stream)
        try:
            nbdev_test(str(nb), n_workers=0)
        except SystemExit as e:
            code = 0 if e.code in (None, 0) else 1
        except BaseException as e:
            print(f"{type(e).__name__}: {e}")
            code = 1
        else:
            code = 0
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    ok = os.waitpid(child, 0)[1] == 0
    bad |= not ok
    if not ok:
        said.seek(0)
        print(said.read().decode(errors="replace"))
    print(
        f"notebook {'ok    ' if ok else 'FAILED'}  {time.time() - start:4.0f} s  {nb}", flush=True
    )
    if n := cells_not_run(nb):
        left_out.append(f"{nb} ({n} cells)")
if left_out:
    print("not run, by a directive of their own: " + ", ".join(left_out))
sys.exit(bad)
