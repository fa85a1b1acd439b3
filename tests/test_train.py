"""Training: what stops it, what resumes it, what it must never do. One process, because imports are slow."""
import json, shutil

import pytest
import torch
from datasets import Dataset

from medft import data, model, train
from medft.core import MedftError, Run, load_recipe, sha256

QUICK = ["engine=trl", "dataset.max_samples=64", "training.per_device_train_batch_size=8", "training.logging_steps=1", "training.warmup_steps=0"]


def prepared(tmp_path, *more):
    run = Run.create(load_recipe("quickstart", [*QUICK, *more]), root=tmp_path)
    data.prepare(run)
    return run


def test_resumed_equals_uninterrupted_to_the_bit(tmp_path):
    run = prepared(tmp_path, "training.save_strategy=steps", "training.save_steps=4", "training.max_steps=8", "lora.lora_dropout=0.1")
    whole = train.train(run)
    before = sha256(run.path/"trl/adapters/adapter_model.safetensors")
    for gone in ("trl/adapters", "trl/checkpoints/checkpoint-8"): shutil.rmtree(run.path/gone)
    again = train.train(run)
    assert not whole["resumed"] and again["resumed"] and again["steps"] == 8
    assert sha256(run.path/"trl/adapters/adapter_model.safetensors") == before


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    run = prepared(tmp_path, "training.learning_rate=1e30", "training.max_grad_norm=1e30", "training.max_steps=8")
    with pytest.raises(MedftError, match="step .*learning_rate"): train.train(run)
    assert not (run.path/"trl/adapters").exists() and train.trained(run) == []


def test_only_the_completion_is_trained_on(tmp_path):
    run = prepared(tmp_path, "training.max_steps=1")
    trainer = train.make_trainer(run, "trl", model.load_base(run.recipe), data.load_tokenizer(run.recipe), model.lora_config(run.recipe))
    batch = next(iter(trainer.get_train_dataloader()))
    tok = data.load_tokenizer(run.recipe)
    for ids, labels in zip(batch["input_ids"], batch["labels"]):
        trained = tok.decode(ids[labels != -100])
        assert trained.endswith(tok.eos_token) and "Question" not in trained and trained.startswith(" ")
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}


def test_a_4bit_base_keeps_float32_adapters_and_frozen_weights(tmp_path):
    run = prepared(tmp_path, "training.max_steps=3", "quantization.load_in_4bit=true")
    base = model.load_base(run.recipe)
    layers = [m for m in base.modules() if type(m).__name__ == "Linear4bit"]
    assert layers and not any(m.support_avx512bf16_for_cpu for m in layers)
    train.train(run)
    from safetensors.torch import load_file
    assert {t.dtype for t in load_file(run.path/"trl/adapters/adapter_model.safetensors").values()} == {torch.float32}


def test_both_runs_of_a_seed_meet_the_same_rows(tmp_path):
    order = []
    for name in "ab":
        run = prepared(tmp_path/name, "training.max_steps=2")
        trainer = train.make_trainer(run, "trl", model.load_base(run.recipe), data.load_tokenizer(run.recipe), model.lora_config(run.recipe))
        order.append([b["input_ids"].tolist() for b in trainer.get_train_dataloader()])
    assert order[0] == order[1]


def test_packing_loses_no_token_and_keeps_the_mask():
    rows = [dict(input_ids=list(range(10*i, 10*i + n)), completion_mask=[0]*k + [1]*(n - k)) for i, (n, k) in enumerate([(7, 3), (9, 0), (4, 4), (8, 2)])]
    packed = train.packed(Dataset.from_list(rows), 5)
    ids, labels = (sum(packed[c], []) for c in ("input_ids", "labels"))
    assert ids == sum((r["input_ids"] for r in rows), []) and all(len(w) <= 5 for w in packed["input_ids"])
    assert labels == [i if m else -100 for r in rows for i, m in zip(r["input_ids"], r["completion_mask"])]


def test_accumulated_gradients_equal_one_large_batch(tmp_path):
    losses = []
    for name, batch, steps in (("a", 8, 1), ("b", 1, 8)):
        run = prepared(tmp_path/name, f"training.per_device_train_batch_size={batch}", f"training.gradient_accumulation_steps={steps}", "training.max_steps=3", "training.bf16=false")
        train.train(run)
        losses.append([r["loss"] for r in train.read_log(run, "trl") if "loss" in r])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_what_cannot_work_is_refused_before_weights_are_loaded():
    tok, config = data.load_tokenizer(load_recipe("quickstart")), model.load_config(load_recipe("quickstart"))
    for override, says in ((["training.max_length=4096"], "512 positions"), (["lora.target_modules=[nothing]"], "this model has|This model has"), (["lora.target_modules=[q_proj, nothing]"], "nothing")):
        with pytest.raises(MedftError, match=says): model.preflight(load_recipe("quickstart", override), tok, config)
    gemma = type(config).from_dict(config.to_dict()); gemma.model_type = "gemma3_text"
    with pytest.raises(MedftError, match="float16"): model.preflight(load_recipe("quickstart", ["model.dtype=float16"]), tok, gemma)
