"""Every key has a range: a value outside it is refused in one line, before anything is written."""

from medft.core import sections
from medft.core.files import MedftError
from medft.core.recipe import (
    BASELINE_NAMES,
    UNSUPPORTED_LORA_KEYS,
    UNSUPPORTED_TRAINING_KEYS,
    load_recipe,
    non_finite,
)
from medft.core.run import Run
from medft.core.sections import SECTIONS, Recipe, library_fields

import math
import re
import typing
from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

BAD = [
    "0", "-1", "1", "0.5", "-0.5", "1.5", "1e400", "1e308", "1e-320", "10000000000000000000000",
    ".nan", ".inf", "-.inf", "abc", "''", "' '", "[]", "{}", "[0]", "[-1]", "[a]", "['']",
    "{a: 0}", "{a: -1}", "{a: .nan}", "{'': a}", "true", "null", "2020-01-01", "../../x",
    r'"a\0b"', "[[]]", "[null]", "{a: {b: [.inf]}}",
]  # fmt: skip
KEYS = [f"{section}.{key}" for section, model in SECTIONS.items() for key in model.model_fields]
TOP = [k for k in Recipe.model_fields if k not in SECTIONS]
ENGINE = "engine=[trl, fast]"


def read(*overrides):
    "A recipe, or the error's line."
    try:
        return load_recipe("quickstart", [ENGINE, *overrides])
    except MedftError as e:
        return str(e)


@lru_cache(maxsize=1)
def small_config():
    from medft.model import families

    return families.tiny_config("llama2")


def arguments_hold(recipe):
    "Build what a plan and a run first make of a recipe: the libraries' configurations, the steps."
    from medft.model import preflight
    from medft.model.adapters import lora_config

    preflight.training_arguments(recipe)
    lora_config(recipe, small_config())
    assert preflight.planned_steps(recipe, 1000) > 0


def fuzz(key, value):
    "One value of one key: refused in one line that names the key, or good for a plan."
    found = read(f"{key}={value}")
    if isinstance(found, str):
        assert "\n" not in found and len(found) < 1500, (key, value, found)
        named = [key, key.split(".")[0]] if key.startswith(("dataset", "model")) else [key]
        assert any(n in found for n in named), (key, value, found)
        return
    assert "nan" not in value and "inf" not in value and value != "1e400", (key, value)
    if key.startswith(("training", "lora")):
        try:
            arguments_hold(found)
        except MedftError as e:
            assert "\n" not in str(e), (key, value, e)


def keys_of(section):
    return TOP if section == "recipe" else [k for k in KEYS if k.startswith(f"{section}.")]


@pytest.mark.parametrize("section", [*SECTIONS, "recipe"])
def test_any_value_of_any_key_is_refused_by_name_or_can_be_planned(section):
    for i, key in enumerate(keys_of(section)):
        third = BAD[i % 3 :: 3]  # another third for each key; the long test has all values
        for value in third:
            fuzz(key, value)


@pytest.mark.long
@pytest.mark.parametrize("section", [*SECTIONS, "recipe"])
def test_all_values_of_all_keys(section):
    for key in keys_of(section):
        for value in BAD:
            fuzz(key, value)


def test_what_is_not_finite_is_found_at_any_depth():
    assert list(non_finite(dict(a=dict(b=[1.0, math.inf])))) == [(("a", "b", "1"), math.inf)]


NUMBERS = {
    k: t
    for k, t in (sections.TRAINING_RANGES | sections.LORA_RANGES).items()
    if sections.bounds(getattr(t, "__metadata__", ()))
}


@given(key=st.sampled_from(sorted(NUMBERS)), value=st.one_of(st.integers(), st.floats()))
@settings(max_examples=150, deadline=None, database=None)
def test_a_number_is_taken_exactly_within_its_range(key, value):
    section = "training" if key in sections.TRAINING_RANGES else "lora"
    bounds = re.findall(r"([<>≤≥]) (-?[\d.,e+]+)", sections.bounds(NUMBERS[key].__metadata__))
    within = {
        ">": lambda a, b: a > b,
        "≥": lambda a, b: a >= b,
        "<": lambda a, b: a < b,
        "≤": lambda a, b: a <= b,
    }
    inside = all(within[sign](value, float(limit.replace(",", ""))) for sign, limit in bounds)
    whole = NUMBERS[key].__origin__ is int
    taken = True
    try:
        SECTIONS[section](**{key: value})
    except ValueError:
        taken = False
    if not inside or not math.isfinite(value) or (whole and isinstance(value, float)):
        assert not taken
    elif abs(value) <= sections.LARGEST:
        assert taken


def test_every_numeric_key_of_the_libraries_has_a_range():
    for section, table in sections.LIBRARY_RANGES.items():
        fields = library_fields(section)
        assert set(table) <= set(fields), set(table) - set(fields)
        open_ = {
            k for k, a in fields.items() if re.search(r"\b(int|float)\b", a) and k not in table
        }
        assert not open_ - set(UNSUPPORTED_LORA_KEYS) - set(UNSUPPORTED_TRAINING_KEYS), open_


def test_every_numeric_key_of_ours_has_a_range():
    for name, model in SECTIONS.items():
        if name in sections.LIBRARY_RANGES:
            continue
        for key, field in model.model_fields.items():
            kinds = typing.get_args(field.annotation) or (field.annotation,)
            numeric = any(
                k in (int, float) or getattr(k, "__origin__", None) in (int, float) for k in kinds
            )
            if numeric:
                assert sections.range_of(field.annotation, field.metadata), f"{name}.{key}"


REFUSED = [
    "evaluation.confidence=95", "evaluation.max_items=0", "evaluation.max_items=-1",
    "evaluation.batch_size=0", "dataset.truncated_share=5",
    "training.per_device_train_batch_size=0", "training.num_train_epochs=0",
    "training.max_length=-1", "lora.r=0", "lora.lora_dropout=5", "training.learning_rate=-1",
    "training.warmup_steps=-5", "training.warmup_steps=1.5", "training.adam_beta2=1",
    "training.seed=-1", "training.max_steps=-2", "training.max_steps=0",
    "training.save_steps=0", "training.logging_steps=2.5", "training.label_smoothing_factor=1",
    "training.packing_strategy=best", "training.log_level=loud",
    "training.gradient_accumulation_steps=0", "training.save_total_limit=0",
    "training.fsdp=full", "training.optim_args=fast", "training.dataloader_prefetch_factor=2",
    "training.dataloader_persistent_workers=true", "training.use_cpu=true",
    "training.eval_on_start=true", "training.optim=apollo_adamw", "lora.lora_alpha=0",
    "lora.rank_pattern={q_proj: 0}", "lora.alpha_pattern={q_proj: -1}",
    "lora.layers_to_transform=[-1]", "lora.target_modules=[]", "lora.target_modules=(",
    "lora.modules_to_save=[]", "lora.bias=some", "lora.init_lora_weights=pisa",
    "lora.init_lora_weights=pissa_niter_", "lora.init_lora_weights=loftq",
    "lora.init_lora_weights=eva", "lora.loftq_config={loftq_bits: 4}",
    "lora.layer_replication=[[0, 1]]", "dataset.holdout=0.5", "dataset.similarity=0",
    "dataset.max_samples=-1", "dataset.canaries=1001", "dataset.labels=[]",
    "dataset.labels=[a, a]", "dataset.path=''", "evaluation.threshold=1",
    "evaluation.shuffles=-1", "evaluation.seeds=0", "evaluation.max_new_tokens=0",
    "evaluation.early_stopping_patience=0", "export.max_shard_size=5",
    "export.max_shard_size=0GB", "output.hub_model_id=model", "output.dir=''",
    "output.keep_best=0", "tracking.experiment=' '", "training.metric_for_best_model=accuracy",
    "training.metric_for_best_model=eval_f1", "training.greater_is_better=true",
    "model.revision=''",
]  # fmt: skip


@pytest.mark.parametrize("override", REFUSED)
def test_refused_when_the_recipe_is_read(override):
    key = override.split("=")[0]
    found = read(override)
    assert isinstance(found, str)
    assert found.startswith(f"command line: {key}: ") and "\n" not in found


TAKEN = [
    "training.max_steps=-1", "training.max_steps=1", "training.save_steps=0.5",
    "training.warmup_steps=0.1", "training.warmup_steps=0", "training.pad_to_multiple_of=auto",
    "training.max_grad_norm=0", "lora.init_lora_weights=pissa_niter_4",
    "lora.init_lora_weights=true", "lora.init_lora_weights=gaussian",
    "lora.layers_to_transform=0 lora.target_modules=[q_proj]", "dataset.max_samples=0",
    "dataset.holdout=0", "dataset.labels=[0, 1]", "export.max_shard_size=500 mb",
    "output.hub_model_id=my-clinic/model.v2", "training.metric_for_best_model=eval_loss",
    "training=", "engine=[trl, trl]", "training.eval_delay=0", "lora.rank_pattern={}",
    "evaluation.shuffles=0", "name=2026", "training.learning_rate=1e-4",
]  # fmt: skip


@pytest.mark.parametrize("overrides", TAKEN)
def test_read(overrides):
    found = read(*re.split(r" (?=\w+\.)", overrides))
    assert not isinstance(found, str), found


BEST = "training.load_best_model_at_end=true"
BEST_BY_STEPS = [BEST, "training.eval_strategy=steps", "training.save_strategy=steps"]
COMBINATIONS = {
    "training.save_strategy": [
        [BEST, "training.eval_strategy=steps", "training.save_strategy=epoch"],
        [BEST, "training.eval_strategy=steps", "training.save_strategy=no"],
        ["training.save_strategy=best"],
    ],
    "training.save_steps": [
        [*BEST_BY_STEPS, "training.eval_steps=3", "training.save_steps=10"],
        [*BEST_BY_STEPS, "training.eval_steps=0.1", "training.save_steps=10"],
    ],
    "training.load_best_model_at_end": [[BEST]],
    "training.lr_scheduler_type": [["training.lr_scheduler_type=reduce_lr_on_plateau"]],
    "training.bf16": [["training.fp16=true", "training.bf16=true"]],
    "training.bf16_full_eval": [["training.fp16_full_eval=true", "training.bf16_full_eval=true"]],
    "lora.layers_pattern": [["lora.layers_pattern=layers", "lora.target_modules=[q_proj]"]],
    "lora.lora_bias": [["lora.lora_bias=true", "lora.use_dora=true"]],
    "lora.r": [["lora.init_lora_weights=orthogonal", "lora.r=3"]],
    "lora.init_lora_weights": [
        ["lora.init_lora_weights=pissa", "lora.use_dora=true"],
        ["lora.init_lora_weights=olora", "quantization.load_in_4bit=true"],
    ],
    "engine": [["lora.init_lora_weights=pissa", "engine=[trl, unsloth]"]],
    "evaluation.baselines": [["evaluation.baselines=[majorty]", "model.task=classification"]],
    "quantization.load_in_8bit": [["quantization.load_in_8bit=true", "lora=null"]],
}  # the key that the error names -> combinations of overrides


@pytest.mark.parametrize("key", COMBINATIONS)
def test_combinations_that_the_libraries_refuse_later(key):
    for overrides in COMBINATIONS[key]:
        found = read(*overrides)
        assert isinstance(found, str) and f" {key}: " in found and "\n" not in found, found


NAMES = [
    "../../x", "/tmp/x", "a/b", "", ".", "..", "-x", "a b", "x.", "a\\b", "~", "ü", "x" * 101,
    "$HOME", "a:b",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_never_a_path(tmp_path, name, monkeypatch):
    monkeypatch.setenv("MEDFT_RUNS", str(tmp_path / "runs"))
    file = tmp_path / "mine.yaml"
    file.write_text(f"engine: [trl]\nname: '{name}'\n", encoding="utf-8")
    with pytest.raises(MedftError, match=r"mine\.yaml:2: name: "):
        load_recipe(str(file))
    for key in ("dataset.sets", "evaluation.models", "evaluation.benchmarks", "dataset.benchmarks"):
        found = read(f"{key}={{'{name}': FILE}}")
        assert isinstance(found, str) and key in found and "\n" not in found
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("stem", ["my recipe (2)", "-x", "..x", "été", "x" * 150])
def test_a_file_that_is_no_name_gives_one(tmp_path, stem, monkeypatch):
    monkeypatch.setenv("MEDFT_RUNS", str(tmp_path / "runs"))
    (tmp_path / f"{stem}.yaml").write_text("engine: [trl]\n")
    run = Run.create(load_recipe(str(tmp_path / f"{stem}.yaml")), run_id="1")
    assert run.path.parent.parent == (tmp_path / "runs").resolve() and run.recipe.name[0].isalnum()
    assert Run.open(run.path).recipe == run.recipe


def test_bad_input_makes_no_folder(tmp_path, monkeypatch, capfd):
    from medft.cli.verbs import main

    monkeypatch.setenv("MEDFT_RUNS", str(tmp_path / "runs"))
    for override in ("lora.r=0", "name=../x", "training.learning_rate=.nan"):
        assert main(["run", "quickstart", override]) == 2
        message = capfd.readouterr().err
        assert message.count("\n") == 1 and override.split("=")[0] in message
    assert not (tmp_path / "runs").exists()


CLASSIFIER = """\
# configs/medgemma_4b_qlora.yaml
model:
  name: google/medgemma-4b-it
  task: classification
  num_labels: 2

quantization:
  load_in_4bit: true
  bnb_4bit_quant_type: nf4
  bnb_4bit_use_double_quant: true
  bnb_4bit_compute_dtype: bfloat16

lora:
  r: 16
  lora_alpha: 32
  lora_dropout: 0.05
  target_modules: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]
  modules_to_save: [score]
  bias: none

training:
  learning_rate: 1.0e-4
  num_train_epochs: 3
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 8
  max_seq_length: 2048
  warmup_steps: 50
  lr_scheduler_type: cosine
  gradient_checkpointing: true
  seed: 42

dataset:
  name: abicyclerider/entity-resolution-pairs
  revision: null  # set to HF Hub commit hash to pin exact version

output:
  dir: /workspace/output
  hub_model_id: abicyclerider/medgemma-4b-entity-resolution-classifier
"""
GENERATIVE = """\
# configs/gemma_1b_lora.yaml
model:
  name: google/gemma-3-1b-it
  task: generative

lora:
  r: 8
  lora_alpha: 16
  lora_dropout: 0.05
  target_modules: [q_proj, k_proj, v_proj, o_proj]
  bias: none

training:
  learning_rate: 2.0e-4
  num_train_epochs: 3
  per_device_train_batch_size: 1
  gradient_accumulation_steps: 16
  max_seq_length: 2048
  warmup_steps: 25
  lr_scheduler_type: cosine
  gradient_checkpointing: true
  seed: 42

dataset:
  name: abicyclerider/entity-resolution-pairs
  revision: null  # set to HF Hub commit hash to pin exact version

output:
  hub_model_id: abicyclerider/gemma-1b-entity-resolution-lora
"""
PUBLISHED = dict(medgemma_4b_qlora=CLASSIFIER, gemma_1b_lora=GENERATIVE)


@pytest.fixture
def published(tmp_path, monkeypatch):
    "The two recipe files of a published article, as printed there."
    monkeypatch.setenv("MEDFT_RUNS", str(tmp_path / "runs"))
    for name, text in PUBLISHED.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


def test_published_files_load_as_printed(published):
    classifier = load_recipe(published / "medgemma_4b_qlora.yaml")
    assert classifier.engine == ["trl", "fast"] and classifier.model.num_labels == 2
    assert classifier.training.max_length == 2048 and classifier.output.dir == "/workspace/output"
    generative = load_recipe(published / "gemma_1b_lora.yaml")
    assert generative.engine == ["trl", "unsloth", "fast"] and generative.dataset.sets == {}


@pytest.mark.long
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_rehearse_as_printed(published, name):
    from medft.cli.verbs import main

    file = str(published / f"{name}.yaml")
    assert main(["run", file, "--rehearse", "tracking.mlflow=false"]) == 0
    assert list((published / "runs" / f"{name}-rehearsal").glob("*/README.md"))


UNWRITTEN = {
    "model: {task: classification}": lambda r: (
        r.engine == ["trl", "fast"] and r.dataset.path == "starter/er_pairs.jsonl"
    ),
    "task: classification": lambda r: r.engine == ["trl", "fast"] and not r.dataset.sets,
    "model: {task: pretraining}": lambda r: r.dataset.path == "starter/pretrain.jsonl.gz",
    "model: {from_config: true, task: pretraining}": lambda r: (
        r.lora is None and r.engine == ["trl", "fast"]
    ),
    "quantization: {load_in_8bit: true}": lambda r: r.engine == ["trl", "fast"] and r.lora,
    "quantization: {load_in_4bit: true}": lambda r: r.engine == ["trl", "fast"],
    "training: {fsdp: full_shard}": lambda r: "unsloth" not in r.engine,
    "lora: {init_lora_weights: pissa}": lambda r: r.engine == ["trl", "fast"],
    "training: {load_best_model_at_end: true, eval_strategy: epoch}": lambda r: (
        r.training.save_strategy == "epoch"
    ),
    "training: {load_best_model_at_end: true, eval_strategy: steps, eval_steps: 30}": lambda r: (
        r.training.save_steps == 30
    ),
    "training: {load_best_model_at_end: true, eval_strategy: steps, logging_steps: 7}": lambda r: (
        r.training.save_steps == 7
    ),
    "training: {eval_strategy: epoch, save_strategy: best}": lambda r: (
        r.training.metric_for_best_model == "loss"
    ),
    "training:\ndataset:\n": lambda r: not r.training.given(),
    "{}": lambda r: r.engine == ["trl", "unsloth", "fast"] and r.dataset.sets,
}  # a recipe's file -> whether the keys that it leaves out were adapted to it


@pytest.mark.parametrize("text", UNWRITTEN)
def test_what_was_not_written_never_refuses(tmp_path, text):
    (tmp_path / "mine.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert UNWRITTEN[text](recipe)
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_what_was_written_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "engine: [trl, unsloth, fast]\nmodel: {task: classification}\n"
    )
    with pytest.raises(
        MedftError, match=r"mine\.yaml:1: engine: unsloth has no sequence classifier"
    ):
        load_recipe(tmp_path / "mine.yaml")
    (tmp_path / "mine.yaml").write_text("lora: {r: 8}\nmodel: {from_config: true}\n")
    with pytest.raises(MedftError, match="an adapter on random weights"):
        load_recipe(tmp_path / "mine.yaml")


def test_a_file_on_the_command_line_leaves_the_starter_out(tmp_path):
    (tmp_path / "mine.yaml").write_text("training: {max_length: 99}\n")
    found = load_recipe(tmp_path / "mine.yaml", ["dataset.path=rows.csv"]).dataset
    assert found.path == "rows.csv" and not found.sets and found.test_path is None


def test_a_plan_without_an_engine_is_refused():
    from medft.plan.estimate import plan

    with pytest.raises(MedftError, match="engine: none is named"):
        plan(load_recipe("quickstart", ["engine=[]"]))


def test_names_of_baselines_are_those_registered():
    import medft.evaluate.metrics  # registers the baselines for pairs of records
    from medft.evaluate.measures import classification

    assert medft.evaluate.metrics and set(BASELINE_NAMES) == set(classification.BASELINES)


def tied_models():
    from medft.model.families import NAMES, tiny_config

    return [(n, tiny_config(n).get_text_config().tie_word_embeddings) for n in NAMES]


ENDS = [
    "lora.target_modules=[q_proj, lm_head]", "lora.target_modules=[q_proj, embed_tokens]",
    "lora.target_modules=.*(q_proj|lm_head)", "lora.modules_to_save=[lm_head]",
    "lora.modules_to_save=[embed_tokens]", "lora.modules_to_save=[embed_tokens, lm_head]",
    "lora.trainable_token_indices=[1]", "lora.target_parameters=[lm_head.weight]",
]  # fmt: skip


@pytest.mark.parametrize("override", ENDS)
def test_the_ends_of_a_tied_model_are_not_adapted(override):
    from medft.model import adapters, families

    for name, is_tied in tied_models():
        config = families.tiny_config(name)
        for task in ("generative", "pretraining") if is_tied else ():
            recipe = load_recipe("quickstart", [ENGINE, f"model.task={task}", override])
            with pytest.raises(MedftError, match="tie_word_embeddings") as e:
                adapters.sizes_of(recipe, config)
            assert str(e.value).startswith(override.split("=")[0]) and "\n" not in str(e.value)
    untied = families.tiny_config("llama2")
    adapters.sizes_of(
        load_recipe("quickstart", [ENGINE, "model.task=pretraining", override]), untied
    )


def test_an_adapter_that_trl_would_never_train_is_refused():
    from medft.model import adapters, families

    recipe = load_recipe("quickstart", [ENGINE, "lora.target_modules=[q_proj, lm_head]"])
    with pytest.raises(
        MedftError, match="lora.target_modules: lm_head is the output layer.*never be trained"
    ):
        adapters.sizes_of(recipe, families.tiny_config("llama2"))


def test_names_and_numbers_that_a_model_lacks():
    from medft.model import adapters, families

    some_modules = "lora.target_modules=[q_proj]"
    missing = {
        "lora.modules_to_save=[scor]": some_modules,
        "lora.layers_to_transform=[9]": some_modules,
        "lora.trainable_token_indices=[99999]": some_modules,
        "lora.target_parameters=[nothing.weight]": some_modules,
        "lora.r=65": "lora.init_lora_weights=pissa",
    }  # what the model lacks -> the override that it comes with
    for override, other in missing.items():
        recipe = load_recipe("quickstart", [ENGINE, other, override])
        with pytest.raises(MedftError, match=override.split("=")[0]):
            adapters.sizes_of(recipe, families.tiny_config("llama2"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    "A function that trains the tiny base on a few rows under further keys."
    from medft.data import pipeline as data
    from medft.train import baseline as train

    with pytest.MonkeyPatch.context() as m:
        m.setenv("MEDFT_RUNS", str(tmp_path_factory.mktemp("runs")))

        def trained(*more):
            small = [
                "dataset.path=starter/train.jsonl",
                "dataset.max_samples=32",
                "dataset.sets={}",
                "training.max_steps=2",
            ]
            run = Run.create(load_recipe("quickstart", ["engine=[trl]", *small, *more]))
            data.prepare(run)
            trainer = train.trl_trainer(run)
            train.fit(trainer)
            return run, trainer.accelerator.unwrap_model(trainer.model)

        yield trained


@pytest.mark.parametrize(
    "more", [["pissa"], ["pissa_niter_4", "lora.use_rslora=true"], ["olora"]], ids=" ".join
)
def test_an_adapter_that_moved_the_base_is_saved_as_a_plain_one(prepared, more):
    from medft.core.files import read_json
    from medft.export import merging
    from medft.model.load import load_base

    import torch
    from safetensors.torch import load_file

    run, tuned = prepared(f"lora.init_lora_weights={more[0]}", *more[1:])
    folder = run.path / "trl" / "adapters"
    config = read_json(folder / "adapter_config.json")
    weights = load_file(folder / "adapter_model.safetensors")
    assert config["init_lora_weights"] is True and config["r"] == 2 * run.recipe.lora.r
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    base = {n: p.detach() for n, p in load_base(run.recipe).named_parameters()}
    merging.merge(run, "trl")
    merged = load_file(run.path / "trl" / "merged" / "model.safetensors")
    for name, module in tuned.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        key = f"{name}.lora_A.weight"
        by_hand = base[f"{name.removeprefix('base_model.model.')}.weight"].clone()
        by_hand += scale * weights[key.replace("lora_A", "lora_B")] @ weights[key]
        trained = module.get_base_layer().weight + module.get_delta_weight("default")
        torch.testing.assert_close(by_hand, trained, atol=1e-5, rtol=1e-5)
        served = merged[f"{name.removeprefix('base_model.model.')}.weight"].float()
        torch.testing.assert_close(served, by_hand, atol=0.02, rtol=0.02)
    assert "adapter" in merging.serve_lines(run, "trl")
    assert not (run.path / "trl" / "first_weights").exists()


def test_no_line_is_offered_for_an_adapter_on_a_changed_base():
    from medft.export.merging import not_as_adapter

    for init in ("pissa", "pissa_niter_4", "olora", "corda", "loftq"):
        assert init in not_as_adapter(dict(r=8, init_lora_weights=init))
    assert not_as_adapter(dict(r=8, init_lora_weights=True)) is None
    assert "rows" in not_as_adapter(dict(r=8, trainable_token_indices=[1]))
