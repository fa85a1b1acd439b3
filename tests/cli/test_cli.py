"The command line: what it refuses, what it prints, what it writes."

import json
import subprocess
import sys
from pathlib import Path

import pytest
from stages import PARAMETERS, manifest, medft, write

OFF = "tracking.mlflow=false"


@pytest.fixture
def place(tmp_path, monkeypatch):
    "An empty current folder, with harmless stages."
    write(tmp_path / "nbs")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("MEDFT_NOTEBOOKS", str(tmp_path / "nbs"))
    for k in ("MEDFT_RUNS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(k, raising=False)
    return tmp_path / "here"


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


RECIPES = {  # file -> content, for the cases below
    "bad_yaml.yaml": "model:\n  name: [tiny-base\ntraining: {}\n",
    "tab.yaml": "model:\n\tname: tiny-base\n",
    "list.yaml": "- model\n- training\n",
    "empty.yaml": "",
    "word.yaml": "hello\n",
    "twice.yaml": "model:\n  name: a\nmodel:\n  name: b\n",
    "section.yaml": "modle:\n  name: tiny-base\n",
    "key.yaml": "model:\n  nmae: tiny-base\n",
    "training.yaml": "training:\n  lerning_rate: 0.001\n",
    "type.yaml": "training:\n  learning_rate: fast\n",
    "flat.yaml": "model: tiny-base\n",
    "task.yaml": "model:\n  task: regression\n",
    "classify.yaml": "engine: [trl, unsloth]\nmodel:\n  task: classification\n  num_labels: 2\n",
    "latin.yaml": "description: caf\xe9\n".encode("latin-1"),
    "engine.yaml": "engine: [axolotl]\n",
    "token.yaml": "training:\n  hub_token: hf_not_a_token\n",
}
BAD = {  # command line -> what the line must name
    "rum quickstart": ["rum", "run"],
    "run": ["recipe"],
    "run quickstart --dryrun": ["--dryrun"],
    "run quickstart --stages": ["--stages"],
    "run quikstart": ["quikstart", "quickstart"],
    "run nowhere.yaml": ["nowhere.yaml"],
    "run .": ["."],
    "run bad_yaml.yaml": ["bad_yaml.yaml:"],
    "run tab.yaml": ["tab.yaml:2"],
    "run list.yaml": ["list.yaml"],
    "run empty.yaml": ["empty.yaml"],
    "run word.yaml": ["word.yaml"],
    "run twice.yaml": ["twice.yaml:3", "model"],
    "run section.yaml": ["section.yaml:1", "modle", "model"],
    "run key.yaml": ["key.yaml:2", "nmae", "name"],
    "run training.yaml": ["training.yaml:2", "lerning_rate", "learning_rate"],
    "run type.yaml": ["type.yaml:2", "learning_rate", "fast"],
    "run flat.yaml": ["flat.yaml:1", "model"],
    "run task.yaml": ["task.yaml:2", "regression", "generative"],
    "run classify.yaml": ["unsloth", "classifier", "engine"],
    "run latin.yaml": ["latin.yaml"],
    "run engine.yaml": ["engine.yaml:1", "axolotl"],
    "run token.yaml": ["token.yaml:2", "hub_token", "HF_TOKEN"],
    "run quickstart training.learning_rate": ["training.learning_rate", "="],
    "run quickstart =3": ["=3"],
    "run quickstart learning_rate=1": ["learning_rate"],
    "run quickstart trainig.learning_rate=1": ["trainig", "training"],
    "run quickstart training.lerning_rate=1": ["lerning_rate", "learning_rate"],
    "run quickstart training.learning_rate=banana": ["learning_rate", "banana"],
    "run quickstart training.learning_rate=[1": ["learning_rate"],
    "run quickstart dataset.sets.more=nowhere.jsonl": ["nowhere.jsonl"],
    "run quickstart lora.r.x=3": ["lora"],
    "run quickstart dataset.path=tarin.jsonl": ["tarin.jsonl"],
    'run quickstart dataset.sets={"other":"nowhere.jsonl"}': ["nowhere.jsonl"],
    "run quickstart dataset.test_path=nowhere.jsonl": ["nowhere.jsonl"],
    "run quickstart model.name=./nowhere": ["./nowhere"],
    "run quickstart quantization.load_in_8bit=true": ["unsloth"],
    "run quickstart training.push_to_hub=true": ["push_to_hub"],
    "run quickstart --stages data,trian": ["trian", "train"],
    "run quickstart --stages ,": ["--stages"],
    "run quickstart --run-dir full": ["full"],
    "run quickstart --run-dir file.txt": ["file.txt"],
    "resume": ["run"],
    "resume nowhere": ["nowhere"],
    "resume full": ["full"],
    "track nowhere": ["nowhere"],
    "matrix lama2": ["lama2", "llama2"],
    "matrix --engine axolotl": ["axolotl", "unsloth"],
    "ui --port many": ["--port"],
    "doctor now": ["now"],
}


def test_bad_input_is_one_line_and_leaves_nothing(place, capfd):
    from medft.cli.verbs import main

    for name, text in RECIPES.items():
        (place / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    (place / "full").mkdir()
    (place / "full" / "x").write_text("x")
    (place / "file.txt").write_text("x")
    before, wrong = files(place), []
    for line, named in BAD.items():
        args = line.split()
        if args[0] == "run" and len(args) > 1 and args[-1] != "--stages":
            args.append(OFF)
        code = main(args)
        out, err = capfd.readouterr()
        is_one_line = len(err.strip().split("\n")) == 1 and "Traceback" not in err
        names_all = all(name in err for name in named)
        if code != 2 or out or not is_one_line or not names_all:
            wrong.append((line, code, out, err))
        if files(place) != before:
            wrong.append((line, "left", set(files(place)) - set(before)))
    assert not wrong, "\n".join(map(str, wrong))
    assert len(BAD) >= 20


@pytest.mark.parametrize(
    "parameters, named",
    [(PARAMETERS + "\nlr: float = 0.1", "lr"), ("recipe = 'quickstart'", "recipe"), ("x = 1", "x")],
)
def test_a_notebook_with_other_parameters_is_refused(place, capfd, parameters, named):
    from medft.cli.verbs import main

    write(place.parent / "nbs", parameters=parameters)
    assert main(["run", "quickstart", OFF]) == 2 and not files(place)
    err = capfd.readouterr().err
    assert named in err and "01_data.ipynb" in err and err.count("\n") == 1


def test_a_missing_notebook_is_refused(place, capfd):
    from medft.cli.verbs import main

    (place.parent / "nbs" / "05_evaluate.ipynb").unlink()
    assert main(["run", "quickstart", OFF]) == 2 and not files(place)
    assert "05_evaluate.ipynb" in capfd.readouterr().err
    # it is not needed for another stage
    assert main(["run", "quickstart", OFF, "--stages", "data", "--dry-run"]) == 0


def test_a_full_disk_is_refused(place, capfd, monkeypatch):
    from medft.cli.verbs import main

    import shutil

    monkeypatch.setattr(
        shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10**12, 10**12, 10**8)
    )
    assert main(["run", "quickstart", OFF]) == 2 and not files(place)
    assert "0.1 GB" in capfd.readouterr().err


def test_dry_run_shows_the_whole_recipe_and_makes_nothing(place, capfd):
    from medft.cli.verbs import main
    from medft.core.recipe import load_recipe

    assert main(["run", "quickstart", OFF, "training.learning_rate=1e-4", "--dry-run"]) == 0
    out, err = capfd.readouterr()
    assert not files(place) and not err and "0.0001" in out
    (place / "shown.yaml").write_text(out)
    assert load_recipe("shown.yaml").training.learning_rate == 1e-4


def test_ui_refuses_a_port_that_is_taken(place, capfd):
    from medft.cli.verbs import main

    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        assert main(["ui", "--port", str(s.getsockname()[1])]) == 2
    assert capfd.readouterr().err.count("\n") == 1 and not files(place)


def test_debug_shows_the_traceback(place):
    from medft.cli.verbs import main
    from medft.core.files import MedftError

    with pytest.raises(MedftError):
        main(["run", "quikstart", "--debug"])


def test_broken_run_folders_are_named(place, capfd):
    from medft.cli.verbs import main
    from medft.core.recipe import load_recipe
    from medft.core.run import Run

    run = Run.create(load_recipe("quickstart"), run_id="one")
    for name, text in (("recipe.yaml", "model: ["), ("manifest.json", "{")):
        whole = (run.path / name).read_text()
        (run.path / name).write_text(text)
        assert main(["resume", "one"]) == 2, name
        assert capfd.readouterr().err.count("\n") == 1
        assert main(["list"]) == 0  # one broken folder does not hide the others
        capfd.readouterr()
        (run.path / name).write_text(whole)


def test_help_is_light_and_the_parent_imports_no_torch(tmp_path):
    r = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "medft.cli.verbs", "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    lines = r.stderr.split("\n")
    loaded = {line.split("|")[-1].strip().split(".")[0] for line in lines}
    assert r.returncode == 0 and "resume" in r.stdout
    heavy = set("torch transformers mlflow papermill pydantic numpy datasets psutil".split())
    assert not loaded & heavy
    code = """
import sys, medft.cli.verbs, medft.cli.runner, medft.cli.tracking
print({"torch", "transformers", "mlflow", "trl", "datasets"} & set(sys.modules))
"""
    command = [sys.executable, "-c", code]
    r = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert r.stdout.strip() == "set()"


ENDS = {  # last cells of a stage -> exit code, what its line must name
    "fails": (
        ["1 / 0", "x"],
        1,
        ["failed in cell [4]", "ZeroDivisionError", "01_data.ipynb", "medft resume"],
    ),
    "syntax": (["def"], 1, ["failed in cell [4]", "SyntaxError"]),
    "exit0": (["import sys; sys.exit(0)", "x"], 1, ["killed in cell [4]", "never run"]),
    "exit0_last": (["import sys; sys.exit()"], 1, ["killed in cell [4]"]),
    "exit3": (["import sys; sys.exit(3)", "x"], 1, ["cell [4]", "SystemExit"]),
    "gone": (["import os; os._exit(0)", "x"], 1, ["killed in cell [4]", "code 0"]),
    "killed": (
        ["import os; os.kill(os.getpid(), 9)", "x"],
        1,
        ["killed in cell [4]", "memory", "01_data.ipynb", "medft resume"],
    ),
    "killed_last": (["import os; os.kill(os.getpid(), 9)"], 1, ["killed in cell [4]", "memory"]),
    "crashed": (["import os; os.kill(os.getpid(), 11)", "x"], 1, ["killed", "signal 11"]),
    "user_error": (
        [
            "from medft.core.files import MedftError; raise MedftError('rows.jsonl:3: no answer')",
            "x",
        ],
        2,
        ["data: rows.jsonl:3: no answer"],
    ),
    "refused": (
        ["from medft.core.files import Refused; raise Refused('half of the rows\\nare cut')", "x"],
        3,
        ["refused", "half of the rows are cut"],
    ),
}


@pytest.mark.parametrize("name", ENDS)
def test_every_ending_is_reported(place, capfd, name):
    from medft.cli.verbs import main

    cells, code, named = ENDS[name]
    write(place.parent / "nbs", data=["a = 1", *cells])
    run = place / "runs" / "quickstart" / name
    assert main(["run", "quickstart", OFF, "--stages", "data", "--run-dir", str(run)]) == code
    out, err = capfd.readouterr()
    assert err.count("\n") == 1 and "Traceback" not in err and all(n in err for n in named), err
    m = manifest(run)
    assert m["status"] == "failed"
    assert m["stages"]["data"]["status"] == ("killed" if "killed in" in err else "failed")
    nb = json.loads((run / "notebooks" / "01_data.ipynb").read_text())
    assert "color:red" in "".join(nb["cells"][0]["source"])
    assert nb["metadata"]["papermill"]["exception"] is True
    code_cells = [c for c in nb["cells"] if c["cell_type"] == "code"]
    notes = [c["metadata"]["papermill"] for c in code_cells if "papermill" in c["metadata"]]
    states = [note["status"] for note in notes]
    assert "failed" in states and (cells[-1] != "x" or states[-1] == "pending")


DATA = """
import json, os, sys
with open(run + "/logs/finetune.log", "a") as f:
    f.write("reading 12 rows\\n")
saw = dict(
    python=sys.executable,
    cwd=os.getcwd(),
    recipe=recipe,
    ipython=os.environ["IPYTHONDIR"],
    bars=os.environ.get("TQDM_DISABLE"),
)
with open(run + "/saw.json", "w") as f:
    json.dump(saw, f)
print(os.environ.get("HF_TOKEN"))
"""
EVALUATE = """
import json

def scores(value, low, high):
    return {"test": {"accuracy": {"value": value, "ci95": [low, high], "n": 423}}}

verdict = dict(label="better", sentence="trl is better than the base: +45.4 points.")
models = dict(base=scores(.475, .43, .52), trl=scores(.929, .9, .95))
with open(run + "/metrics.json", "w") as f:
    json.dump(dict(models=models, verdict=dict(trl=verdict)), f)
"""
STORY = dict(data=DATA, evaluate=EVALUATE, export="import time; time.sleep(0.5)")


def test_a_run_from_start_to_end(tmp_path):
    write(tmp_path / "nbs", **STORY)
    (tmp_path / "mine.yaml").write_text("tracking:\n  mlflow: false\n")
    (tmp_path / ".env").write_text("HF_TOKEN=hf_from_the_file_0123\nMEDFT_RUNS=elsewhere\n")
    code, out, err = medft(
        tmp_path, "run", "mine.yaml", "engine=[trl]", HF_TOKEN="hf_not_a_real_token_0123"
    )
    assert code == 0 and not err, err
    (run,) = (tmp_path / "elsewhere" / "mine").iterdir()  # .env is read ...
    m = manifest(run)
    assert m["status"] == "finished"
    assert list(m["stages"]) == ["data", "model", "train", "evaluate", "export"]
    saw = json.loads((run / "saw.json").read_text())
    assert saw["python"] == sys.executable
    assert saw["cwd"] == str(tmp_path)
    assert saw["recipe"] == str(run / "recipe.yaml")
    assert saw["bars"] == "1"  # no progress bars in the notebooks
    assert not Path(saw["ipython"]).exists()
    assert not list((tmp_path / "home").iterdir())  # nothing is written to the home folder
    for piece in (
        "reading 12 rows",
        "trl is better than the base",
        "92.9 % [90.0-95.0]",
        "423",
        f"elsewhere/mine/{run.name}",
    ):
        assert piece in out, out
    assert m["stages"]["export"]["cell_seconds"] >= 0.5 and 0 < m["overhead_seconds"] < 60
    kept = "".join(p.read_text(errors="replace") for p in run.rglob("*") if p.is_file())
    assert "***" in kept
    assert "hf_not_a_real_token" not in kept + out
    assert "hf_from_the_file" not in kept + out  # ... but the environment wins

    assert "trl better" in medft(tmp_path, "list")[1]
    code, out, err = medft(tmp_path, "resume", run.name)
    assert code == 0 and "nothing left to do" in out


def test_doctor_checks_everything(tmp_path):
    code, out, err = medft(
        tmp_path,
        "doctor",
        HF_TOKEN="hf_not_a_real_token_0123",
        HF_HUB_OFFLINE="1",
        MLFLOW_TRACKING_URI="http://me:hunter2@127.0.0.1:9",
    )
    assert code in (0, 1) and not err, err
    assert all(line.split()[0] in ("ok", "warn", "bad") for line in out.strip().split("\n"))
    for word in (
        "Python",
        "device",
        "memory",
        "disk",
        "unsloth",
        "quarto",
        "token: present",
        "HF_HUB_OFFLINE",
        "nothing answers",
    ):
        assert word in out, word
    assert "not_a_real" not in out and "hunter2" not in out


COUNT = "import os; p = run + '/{0}.count'; open(p, 'a').write('x')"


@pytest.fixture
def stopped(place, capfd):
    "A run that has failed in training, its stages counted."
    from medft.cli.verbs import main

    write(
        place.parent / "nbs",
        **{s: COUNT.format(s) for s in ("data", "train", "evaluate", "export")},
        model="1 / 0",
    )
    (place / "mine.yaml").write_text(
        "engine: [trl]\ntraining:\n  logging_steps: 10\n  save_steps: 5\n"
    )
    assert main(["run", "mine.yaml", OFF, "--run-dir", "one"]) == 1
    write(
        place.parent / "nbs",
        **{s: COUNT.format(s) for s in ("data", "train", "evaluate", "export")},
    )
    capfd.readouterr()
    return place / "one"


def counts(run):
    return {p.stem: len(p.read_text()) for p in sorted(run.glob("*.count"))}


def test_resume_refuses_another_recipe_and_changes_nothing(stopped, capfd):
    from medft.cli.verbs import main

    before = (stopped / "recipe.yaml").read_bytes(), manifest(stopped)
    refused = {
        ("training.learning_rate=1e-5", "training.logging_steps=3"): [
            "training.learning_rate: None -> 1e-05",
            "start a new run",
            "training.logging_steps: 10 -> 3",
            "--allow training.logging_steps",
        ],
        ("training.learning_rate=1e-5", "--allow", "training.learning_rate"): ["start a new run"],
        ("training.max_steps=7", "--allow", "training.max_steps"): ["start a new run"],
        ("training.logging_steps=3",): ["--allow training.logging_steps"],
        ("training.lerning_rate=1",): ["learning_rate"],
    }  # arguments -> what the line must name
    for args, named in refused.items():
        assert main(["resume", "one", *args]) == 2, args
        err = capfd.readouterr().err
        assert err.count("\n") == 1 and all(n in err for n in named), err
    assert before == ((stopped / "recipe.yaml").read_bytes(), manifest(stopped))
    assert counts(stopped) == {"data": 1}


def test_resume_accepts_what_is_harmless_and_allowed(stopped, capfd):
    from medft.cli.verbs import main
    from medft.core.run import Run

    allowed = [
        "--allow",
        "training.logging_steps,training.save_steps",
        "--allow",
        "evaluation.max_items",
    ]
    changes = ["training.logging_steps=3", "training.save_steps=2", "evaluation.max_items=9"]
    assert main(["resume", "one", *changes, *allowed]) == 0, capfd.readouterr().err
    run, m = Run.open(stopped), manifest(stopped)
    assert run.recipe.training.logging_steps == 3
    assert run.recipe.digest() == m["digest"]
    assert m["status"] == "finished"
    assert m["changes"][0]["keys"] == {
        "training.logging_steps": [10, 3],
        "training.save_steps": [5, 2],
        "evaluation.max_items": [None, 9],
    }
    assert counts(stopped) == {"data": 1, "train": 1, "evaluate": 1, "export": 1}
    assert main(["resume", "one"]) == 0
    assert counts(stopped)["train"] == 1
    assert len(manifest(stopped)["changes"]) == 1


def test_stages_that_a_change_concerns_are_done_again(stopped, capfd):
    from medft.cli.verbs import main

    assert main(["resume", "one"]) == 0
    export = ["export.max_shard_size=1GB", "--allow", "export.max_shard_size"]
    assert main(["resume", "one", *export]) == 0
    assert counts(stopped) == {"data": 1, "train": 1, "evaluate": 1, "export": 2}
    items = ["evaluation.max_items=3", "--allow", "evaluation.max_items"]
    assert main(["resume", "one", *items]) == 0
    assert counts(stopped) == {"data": 1, "train": 1, "evaluate": 2, "export": 3}


def test_an_edit_in_the_run_is_refused_and_an_edit_of_the_recipe_is_ignored(stopped, capfd):
    from medft.cli.verbs import main

    text = (stopped / "recipe.yaml").read_text()
    (stopped / "recipe.yaml").write_text(text.replace("logging_steps: 10", "logging_steps: 4"))
    assert main(["resume", "one"]) == 2
    assert "training.logging_steps: 10 -> 4" in capfd.readouterr().err
    (stopped / "recipe.yaml").write_text("# a comment\n" + text)  # changes nothing
    (stopped.parent / "mine.yaml").write_text("engine: [trl]\ntraining:\n  logging_steps: 1\n")
    assert main(["resume", "one"]) == 0, capfd.readouterr().err
    assert "changes" not in manifest(stopped)


@pytest.mark.parametrize("left", ["recipe", "manifest"])
def test_a_change_that_was_cut_off_is_taken_by_the_same_command(stopped, monkeypatch, capfd, left):
    "The power fails after the first or the second of the three files that a change writes."
    from medft.cli import runner
    from medft.cli.verbs import main
    from medft.core.run import Run

    def dies(*a, **k):
        raise KeyboardInterrupt

    command = ["resume", "one", "training.logging_steps=3", "--allow", "training.logging_steps"]
    with monkeypatch.context() as m:
        interrupted = (Run, "update") if left == "recipe" else (runner, "freeze")
        m.setattr(*interrupted, dies)
        assert main(command) == 130
    assert main(command) == 0, capfd.readouterr().err
    (change,) = manifest(stopped)["changes"]
    assert change["keys"] == {"training.logging_steps": [10, 3]}
