"The shipped recipes of real models: as published, and through all stages in rehearsal."

from medft.core.files import read_json, shipped_recipes
from medft.core.recipe import contradictions, load_recipe, read_yaml
from medft.core.run import Run

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
SEEDS = TOP.parent / "shared/seeds"
SHIPPED = {p.stem: p for p in sorted(shipped_recipes().glob("*.yaml"))}
REAL = [n for n, p in SHIPPED.items() if load_recipe(p).model.name != "tiny-base"]
SMALL = {
    "model.name",
    "model.revision",
    "training.max_steps",
    "training.per_device_train_batch_size",
    "training.per_device_eval_batch_size",
    "training.gradient_accumulation_steps",
    "training.max_length",
    "training.warmup_steps",
    "training.save_steps",
    "training.eval_steps",
    "training.logging_steps",
    "training.dataloader_num_workers",
    "evaluation.max_items",
    "evaluation.batch_size",
    "tracking.experiment",
    "name",
    "description",
}  # what a rehearsal makes small, besides the data
MACHINE = {
    "model.attn_implementation",
    "training.tf32",
    "training.torch_compile",
    "training.fp16",
    "training.bf16",
    "training.optim",
}  # what a machine may lack


def test_the_nine_recipes_are_there():
    assert set(REAL) == {
        "medgemma_4b_classifier",
        "gemma3_1b_lora",
        "llama31_8b_qlora",
        "llama2_7b_qlora",
        "mistral_7b_qlora",
        "gemma_7b_qlora",
        "tinyllama_medquad_lora",
        "nemotron_30b_medmcqa_lora",
        "gemma3_4b_cpt",
    }


@pytest.mark.parametrize("name", REAL)
def test_a_recipe_names_hardware_and_licence(name):
    text, r = SHIPPED[name].read_text(), load_recipe(name)
    head = text[: text.index("\ndescription:")]
    for word in ("hardware:", "licence:", f"medft run {name} --rehearse", f"medft run {name}\n"):
        assert word in head + "\n", word
    assert r.description and r.name == name and not list(contradictions(r)) and r.engine == ["trl"]
    assert r.model.revision is None and "null: today's, recorded in the manifest" in text


@pytest.mark.skipif(
    not SEEDS.is_dir(), reason="the published workflows in ../shared/seeds are not on this machine"
)
@pytest.mark.parametrize(
    "name, theirs",
    [("medgemma_4b_classifier", "medgemma_4b_qlora"), ("gemma3_1b_lora", "gemma_1b_lora")],
)
def test_hyper_parameters_are_those_of_the_published_files(tmp_path, name, theirs):
    text = next(SEEDS.glob("000*")).read_text()
    body = text.split(f"# configs/{theirs}.yaml\n")[1].split("```")[0]
    (tmp_path / "theirs.yaml").write_text(body)
    given, ours = read_yaml(tmp_path / "theirs.yaml")[0], load_recipe(name)
    given["training"]["max_length"] = given["training"].pop("max_seq_length")
    for section in ("model", "quantization", "lora", "training", "dataset"):
        for key, value in given.get(section, {}).items():
            assert getattr(getattr(ours, section), key) == value, (section, key)


@pytest.mark.skipif(
    not SEEDS.is_dir(), reason="the published workflows in ../shared/seeds are not on this machine"
)
@pytest.mark.parametrize(
    "name", ["llama31_8b_qlora", "llama2_7b_qlora", "mistral_7b_qlora", "gemma_7b_qlora"]
)
def test_hyper_parameters_are_those_of_the_published_table(name):
    text, r = next(SEEDS.glob("001*")).read_text(), load_recipe(name)

    def row(key):
        return re.search(rf"\| `{key}` \| \w+ \| `(.*?)` \|", text)[1]

    published = {
        "num_epochs": r.training.num_train_epochs,
        "learning_rate": r.training.learning_rate,
        "micro_batch_size": r.training.per_device_train_batch_size,
        "gradient_accumulation": r.training.gradient_accumulation_steps,
        "max_seq_length": r.training.max_length,
        "lora_r": r.lora.r,
        "lora_alpha": r.lora.lora_alpha,
        "lora_dropout": r.lora.lora_dropout,
    }  # name in the table -> value in our recipe
    assert published == {name: float(row(name)) for name in published}
    for key in ("bf16", "packing", "gradient_checkpointing"):
        assert str(getattr(r.training, key)).lower() == row(key), key
    assert r.quantization.load_in_4bit and row("quantization") == "4bit"
    assert str(r.export.merge).lower() == row("merge_full_weights")
    assert r.model.name in text and r.dataset.name in text


def set_values(section, keys):
    "Key -> value of these keys of a section."
    return {key: getattr(section, key) for key in keys}


def test_nemotron_is_trained_as_published():
    r = load_recipe("nemotron_30b_medmcqa_lora")
    expected = dict(
        optim="adamw_8bit",
        learning_rate=2e-4,
        num_train_epochs=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
    )
    assert set_values(r.training, expected) == expected
    assert r.model.name == "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-Base-BF16"
    assert r.dataset.name == "openlifescienceai/medmcqa"
    assert "out_proj" not in r.lora.target_modules
    assert r.quantization is None


def test_gemma_is_pretrained_as_published():
    r = load_recipe("gemma3_4b_cpt")
    expected = dict(
        learning_rate=2e-5,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        num_train_epochs=8,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        max_length=8192,
        weight_decay=0.01,
        max_grad_norm=1.0,
        torch_compile=True,
        tf32=True,
        bf16=True,
        gradient_checkpointing=True,
        dataloader_num_workers=8,
        eval_steps=50,
        save_steps=50,
    )
    assert set_values(r.training, expected) == expected
    assert r.output.keep_best == 5
    assert r.model.attn_implementation == "flash_attention_2"
    assert r.lora is None


def test_tinyllama_is_trained_as_published():
    r = load_recipe("tinyllama_medquad_lora")
    assert r.training.fp16
    assert r.training.gradient_accumulation_steps == 4
    assert r.lora


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "Where rehearsals go; the hub is not asked, so that every machine rehearses the same."
    with pytest.MonkeyPatch.context() as m:
        m.setenv("MEDFT_RUNS", str(tmp_path_factory.mktemp("rehearsals")))
        from huggingface_hub import constants

        m.setattr(constants, "HF_HUB_OFFLINE", True)
        yield Path(os.environ["MEDFT_RUNS"])


def walk(run):
    "A run's stages, one after the other, in this process."
    from medft.data import pipeline as data
    from medft.evaluate import metrics as evaluate
    from medft.export import parity
    from medft.export import publish as export
    from medft.model import preflight
    from medft.train import baseline as train

    # A process for each run's artefacts costs ten seconds of imports; the command starts them.
    with pytest.MonkeyPatch.context() as m:
        m.setattr(parity, "in_fresh_process", parity.score_all)
        data.prepare(run)
        preflight.inspect(run)
        train.train(run)
        evaluate.evaluate(run)
        export.export(run)


# One of each task here; each of the others by the command in `make test-long`.
EACH_TASK = ["nemotron_30b_medmcqa_lora", "medgemma_4b_classifier", "gemma3_4b_cpt"]


@pytest.mark.parametrize("name", EACH_TASK)
def test_a_recipe_is_rehearsed_through_all_stages(place, name):
    from medft.cli.runner import recipe_differences
    from medft.plan.rehearsal import rehearsal

    recipe = load_recipe(name, ["tracking.mlflow=false"])
    small, lines = rehearsal(recipe)
    changed = {k for k in recipe_differences(recipe, small) if not k.startswith("dataset.")}
    assert changed <= SMALL | MACHINE, changed - SMALL - MACHINE
    explained = [line for line in lines if " -> " in line and ", because " in line]
    for k in changed - {"name", "description"}:
        assert any(f"{k} " in line for line in explained), (k, lines)
    run = Run.create(small)
    walk(run)
    folder = run.path / "trl" / ("adapters" if recipe.lora else "model")
    assert folder.is_dir()
    assert read_json(run.path / "metrics.json")["models"].keys() == {"base", "trl"}
    summary = read_json(run.path / "trl" / "training.json")
    assert summary["steps"] == 4 and summary["status"] == "finished"
    assert (run.path / "README.md").exists()
    assert (run.path / "trl" / "merged").is_dir() == bool(recipe.lora and recipe.export.merge)


def cli(*args, runs):
    return subprocess.run(
        [sys.executable, "-m", "medft.cli.verbs", *args],
        cwd=TOP,
        text=True,
        capture_output=True,
        env=os.environ | dict(MEDFT_RUNS=str(runs), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1"),
    )


def rehearsed(name, runs, *more):
    done = cli("run", name, "--rehearse", "tracking.mlflow=false", *more, runs=runs)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "rehearsal: model.name" in done.stdout
    assert "rehearsal: random weights, the figures mean nothing" in done.stdout
    (run,) = [p.parent for p in (runs / f"{name}-rehearsal").glob("*/manifest.json")]
    m = read_json(run / "manifest.json")
    assert m["status"] == "finished" and m["rehearsal"] is True and m["replaced"]
    return done, run


@pytest.mark.long
def test_the_command_rehearses(tmp_path):
    "Two stages show that the command and the notebooks work together; the next test runs all."
    _, run = rehearsed("mistral_7b_qlora", tmp_path, "--stages", "data,train")
    assert read_json(run / "trl" / "training.json")["steps"] == 4
    assert "model.name" in (run / "logs" / "finetune.log").read_text()


@pytest.mark.long
@pytest.mark.parametrize("name", [n for n in SHIPPED if n != "your_data"])
def test_the_command_rehearses_each(tmp_path, name):
    done, run = rehearsed(name, tmp_path)
    assert "than the base" not in done.stdout and "mean nothing" in (run / "README.md").read_text()
    n_notebooks = len(list((run / "notebooks").glob("*.ipynb")))
    assert n_notebooks == 4 + len(load_recipe(name).engine)
    assert read_json(run / "export.json")["artefacts"]


def test_a_dry_rehearsal_makes_nothing(place, tmp_path, monkeypatch, capfd):
    from medft.cli.verbs import main

    monkeypatch.setenv("MEDFT_RUNS", str(tmp_path / "runs"))
    assert main(["run", "gemma3_4b_cpt", "--rehearse", "--dry-run"]) == 0
    shown = capfd.readouterr().out
    assert "flash_attention_2 -> sdpa" in shown
    assert "keep_best: 5" in shown
    assert not (tmp_path / "runs").exists()
    (tmp_path / "shown.yaml").write_text(shown)
    assert load_recipe(str(tmp_path / "shown.yaml")).training.max_steps == 4


def test_a_rehearsal_of_an_unknown_architecture_is_refused(place, tmp_path, monkeypatch, capfd):
    from medft.cli.verbs import main

    monkeypatch.setenv("MEDFT_RUNS", str(tmp_path / "runs"))
    assert main(["run", "your_data", "model.name=nobody/unheard-of", "--rehearse"]) == 2
    assert "tells no family" in capfd.readouterr().err and not (tmp_path / "runs").exists()
