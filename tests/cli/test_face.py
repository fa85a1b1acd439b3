"`import medft`: what it loads, its names, and one small run from nothing to an answer."

import medft
from medft.core.files import MedftError, Refused

import inspect
import json
import math
import shutil
import subprocess
import sys

import pytest

NAMES = ["Run", "compare", "evaluate", "load", "plan", "recipes", "resume", "run"]
HEAVY = """
    torch transformers trl peft unsloth datasets accelerate bitsandbytes pandas numpy scipy sklearn
    matplotlib pydantic papermill mlflow rich typer IPython
""".split()
SMALL = dict(
    engine="trl",
    dataset={"max_samples": 64, "sets": {}},
    training={"max_steps": 4, "warmup_steps": 1},
    evaluation={"max_items": 12},
    tracking={"mlflow": False},
)


def in_new_process(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_import_loads_nothing_heavy_and_sets_the_switches():
    code = f"""
import sys
import medft
print([name for name in {HEAVY} if name in sys.modules])
import os
print(os.environ["HF_HUB_DISABLE_TELEMETRY"], os.environ["USE_HUB_KERNELS"])
"""
    assert in_new_process(code).split("\n")[:2] == ["[]", "1 NO"]


def test_the_face_loads_no_library_that_unsloth_patches():
    code = "import sys, medft; medft.Run, medft.run\n"
    code += f"print([n for n in {HEAVY[:4]} if n in sys.modules])"
    assert in_new_process(code).strip() == "[]"


def test_names():
    assert medft.__all__ == NAMES
    assert [name for name in dir(medft) if not name.startswith("_")] == NAMES
    for name in NAMES:
        assert callable(getattr(medft, name)), name
        assert getattr(medft, name).__doc__, name
    with pytest.raises(AttributeError, match="'medft' has no attribute 'runn'"):
        medft.runn  # noqa: B018
    assert "changes" in inspect.signature(medft.run).parameters


def test_editors_are_shown_the_same_names():
    "The imports for editors in medft/__init__.py are never run."
    lines = inspect.getsource(medft).split("TYPE_CHECKING:")[1].split("__all__")[0].splitlines()
    shown = {}
    for line in lines:
        if line.strip().startswith("from medft.cli.face import "):
            full, _, short = line.partition("import ")[2].partition(" as ")
            shown[short or full] = full
    assert shown == medft._IN_FACE and sorted(shown) == NAMES


@pytest.mark.parametrize("package", ["plan", "evaluate"])
def test_a_wing_is_a_package_and_a_function(package):
    module = dict(plan="devices", evaluate="statistics.intervals")[package]
    orders = (
        "import medft",
        f"import medft.{package}.{module}",
        f"from medft import {package}",
        f"from medft.{package}.{module} import __all__",
    )
    if package == "plan":
        orders = orders[1:2]  # its modules load torch: one of them is enough
    code = f"""
import inspect, medft, sys
import medft.{package}.{module} as module
assert inspect.ismodule(medft.{package}) and sys.modules["medft.{package}"] is medft.{package}
assert medft.{package}.{module} is module
assert "changes" in inspect.signature(medft.{package}).parameters
assert "`medft.{package}`" in medft.{package}.__doc__
try: medft.{package}(*"many arguments, more than it takes")
except TypeError as e: print(e)
"""
    for first in orders:
        assert f"{package}_" in in_new_process(f"{first}\n{code}"), first


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "An empty current folder; runs go below it."
    folder = tmp_path_factory.mktemp("face")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("MEDFT_RUNS", "MEDFT_NOTEBOOKS"):
            patch.delenv(name, raising=False)
        yield folder


@pytest.fixture(scope="module")
def run(place):
    stages = ["data", "train", "evaluate"]
    return medft.run("quickstart", stages=stages, quiet=True, **SMALL)


def test_a_run_holds_its_figures(run, place):
    assert isinstance(run, medft.Run) and run.status == "finished"
    assert run.path.parent == place / "runs/quickstart"
    assert run.metrics == json.loads((run.path / "metrics.json").read_text())
    assert run.verdict["trl"]["label"] in ("better", "tie", "worse")
    command = run.manifest["command"]
    assert command.startswith("medft run quickstart ") and "training.max_steps=4" in command
    assert run.recipe.training.max_steps == 4 and run.recipe.training.per_device_train_batch_size


def test_a_notebook_shows_the_verdict(run):
    shown = run._repr_html_()
    assert run.verdict["trl"]["sentence"].split(":")[0] in shown
    assert "<td>accuracy</td>" in shown and f"runs/quickstart/{run.path.name}" in shown
    assert "Run(quickstart/" in repr(run)


def test_the_report(run):
    with pytest.raises(MedftError, match="has no report.html yet: medft.resume"):
        run.report()
    page = run.report(again=True)
    assert str(page) == str(run.path / "report.html")
    with open(page) as f:
        assert "<html" in f.read()
    assert page._repr_html_().startswith('<iframe srcdoc="&lt;!doctype html')


def questions(run):
    "The scored test items, as a person would ask them, and the tuned model's choices."
    from medft.core.files import assets

    import pandas as pd

    lines = (assets() / "starter/test.jsonl").read_text().splitlines()
    rows = {row["id"]: row for row in map(json.loads, lines)}
    predicted = pd.read_parquet(next((run.path / "predictions").glob("*trl*test*.parquet")))
    for id, choice in zip(predicted.id, predicted.choice, strict=True):
        row = rows[id]
        yield row["question"], [row[key] for key in ("opa", "opb", "opc", "opd")], choice


def test_ask_chooses_as_the_evaluation_did(run):
    for question, options, choice in list(questions(run))[:6]:
        answer = run.ask(question, options)
        assert answer.answer == options[choice], question
        assert 0.25 <= answer.probability <= 1
    assert repr(answer) == f"{answer.answer} ({answer.probability:.1%})"
    base = run.ask(question, options, engine="base")
    assert base.probability != answer.probability


def test_ask_answers_in_words_and_loads_once(run):
    words = run.ask("Which drug class includes verapamil?", max_new_tokens=5)
    assert isinstance(words, str) and words
    first = run.loaded["trl"]
    run.ask("Which drug class includes alprazolam?", max_new_tokens=2)
    assert run.loaded["trl"] is first


def test_load_gives_model_and_tokenizer(run):
    model, tokenizer = medft.load(str(run.path))
    assert model.peft_config and not model.training
    ids = tokenizer("Question: What?", return_tensors="pt")["input_ids"]
    assert model(ids).logits.shape[:2] == ids.shape
    base, _ = medft.load(run, "base")
    assert not hasattr(base, "peft_config")


def test_compare_finds_no_difference_between_a_run_and_its_copy(run):
    copy = run.path.with_name("copy")
    shutil.copytree(run.path, copy, dirs_exist_ok=True)
    found = medft.compare(run, "quickstart/copy")
    tuned = [d for d in found["comparisons"] if (d["a"], d["b"]) == ("trl", "trl")]
    assert tuned[0]["label"] == "tie" and tuned[0]["effect"] == 0
    assert repr(found).startswith("A: ") and tuned[0]["sentence"] in repr(found)
    assert json.loads(json.dumps(found))["main"] == "test"


def test_resume_has_nothing_to_do(run):
    assert medft.resume(run, quiet=True) is run
    with pytest.raises(MedftError, match="start a new run"):
        medft.resume(run, training={"max_steps": 5})


def test_plan_in_words_and_as_a_dict():
    found = medft.plan("llama31_8b_qlora", gpu="A100 40GB", training={"max_steps": 10})
    assert found["steps"] == 10 and found["memory_bytes"]["peak"] > 4e9
    assert "A100" in repr(found) and repr(found) == "\n".join(found.lines)


def test_recipes_is_a_table_of_all(place):
    (place / "runs").mkdir(exist_ok=True)
    (place / "runs/mine.yaml").write_text("description: Mine.\nmodel:\n  nmae: x\n")
    table = medft.recipes()
    (place / "runs/mine.yaml").unlink()
    assert table.loc["quickstart", "model"] == "tiny-base"
    assert table.loc["medgemma_4b_classifier", "task"] == "classification"
    assert "nmae" in table.loc["mine", "what it is"]
    longest = max(table["what it is"], key=len)
    assert longest in repr(table) and longest[-30:] in table._repr_html_()


def test_values_reach_the_recipe_as_they_are():
    from medft.cli.face import _overrides
    from medft.core.recipe import load_recipe

    import numpy as np

    changes = dict(
        engine=["trl"],
        lora=None,
        training={"learning_rate": np.float32(0.5), "max_steps": np.int64(3)},
        evaluation={"max_items": 5},
        description='naïve: [x] 😀 "quoted" # no remark',
    )
    recipe = load_recipe("quickstart", _overrides(changes))
    assert recipe.description == changes["description"] and recipe.lora is None
    assert recipe.training.max_steps == 3 and recipe.evaluation.max_items == 5
    assert math.isclose(recipe.training.learning_rate, 0.5)
    assert recipe.training.per_device_train_batch_size == 16, "a section keeps its other keys"


BAD = {
    "no recipe 'quikstart' .did you mean 'quickstart'": lambda run: medft.run("quikstart"),
    "lerning_rate.*learning_rate": lambda run: medft.run(training={"lerning_rate": 1}),
    "no stage 'trian'": lambda run: medft.run(stages=["trian"]),
    "no run 'nowhere'": lambda run: medft.load("nowhere"),
    "no model of engine 'fats'.*trl, base": lambda run: medft.load(run, "fats"),
    "no merged weights of trl": lambda run: medft.load(run, merged=True),
    "the question is empty": lambda run: run.ask(" "),
    "for a classifier": lambda run: run.ask({"left": {}, "right": {}}),
    "the same run twice": lambda run: medft.compare(run, run),
    "neither a run, nor a folder": lambda run: medft.evaluate("nowhere", recipe="quickstart"),
    "no recipe 'nothing'": lambda run: medft.plan("nothing"),
}


@pytest.mark.parametrize("message", BAD)
def test_errors_say_what_is_wrong(run, message):
    before = sorted(run.path.parent.iterdir())
    with pytest.raises(MedftError, match=message) as caught:
        BAD[message](run)
    assert "\n" not in str(caught.value)
    assert sorted(run.path.parent.iterdir()) == before, "nothing was started"


def test_a_run_without_a_tuned_model(place):
    from medft.core.recipe import load_recipe

    run = medft.Run.create(load_recipe("quickstart", ["engine=trl"]))
    with pytest.raises(MedftError, match="no tuned model, only engine='base' answers"):
        run.ask("What?")
    with pytest.raises(MedftError, match="no metrics.json: nothing was scored"):
        run.metrics  # noqa: B018
    assert run.path.name in run._repr_html_()
    assert run.ask("What?", ["a fever", "a cough"], engine="base").answer


def test_an_adapter_that_is_gone(run):
    copy = run.path.with_name("without")
    shutil.copytree(run.path, copy)
    shutil.rmtree(copy / "trl/adapters")
    with pytest.raises(MedftError, match="no trl adapter"):
        medft.load("quickstart/without")


def test_a_classifier_gives_a_label_and_its_probability(place):
    from medft.core.files import assets, write_json
    from medft.core.recipe import load_recipe

    run = medft.Run.create(load_recipe("starter_pairs"))
    write_json(run.path / "data/report.json", dict(labels=["no", "yes"]))
    pair = json.loads((assets() / "starter/er_pairs.jsonl").open().readline())
    found = run.ask({"left": pair["left"], "right": pair["right"]}, engine="base")
    assert found.answer in ("no", "yes") and 0.5 <= found.probability <= 1
    write_json(run.path / "metrics.json", dict(thresholds=dict(base=dict(value=1.0))))
    assert run.ask(pair, engine="base").answer == "no", "the threshold of the evaluation counts"
    with pytest.raises(MedftError, match="leave options out"):
        run.ask(pair, ["yes", "no"], engine="base")
    with pytest.raises(MedftError, match="give left and right"):
        run.ask({"left": "x"}, engine="base")


def test_a_stage_that_fails(place, monkeypatch):
    from stages import write

    ends = {
        "from medft.core.files import MedftError; raise MedftError('rows: none')": MedftError,
        "from medft.core.files import Refused; raise Refused('too far')": Refused,
        "1 / 0": Exception,
    }
    monkeypatch.setenv("MEDFT_NOTEBOOKS", str(place / "stages"))
    for cell, kind in ends.items():
        write(place / "stages", data=cell)
        with pytest.raises(kind) as caught:
            medft.run("quickstart", stages="data", quiet=True, tracking={"mlflow": False})
        assert str(caught.value).startswith(("data: ", "stage data failed"))
    assert "ZeroDivisionError" in str(caught.value) and "medft.resume('" in str(caught.value)


def test_evaluate_is_the_verb(place, monkeypatch):
    from stages import write

    write(place / "stages")
    monkeypatch.setenv("MEDFT_NOTEBOOKS", str(place / "stages"))
    scored = medft.evaluate(
        "tiny-base",
        recipe="quickstart",
        models={"twin": "tiny-base"},
        quiet=True,
        tracking={"mlflow": False},
        evaluation={"max_items": 5},
    )
    assert scored.status == "finished" and list(scored.manifest["stages"]) == ["data", "evaluate"]
    assert scored.recipe.engine == [] and scored.recipe.evaluation.max_items == 5
    assert scored.recipe.evaluation.models == {"twin": "tiny-base"}
    command = scored.manifest["command"]
    assert command.startswith("medft evaluate tiny-base") and command.endswith(
        "--with twin=tiny-base"
    )
