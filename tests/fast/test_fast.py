"""Our own engine: the baseline's losses step by step, its checkpoints and files,
and its notes where something is left to the library. One process."""

from medft.cli import runner
from medft.core import recipe, sections
from medft.core import run as core
from medft.core.files import MedftError, read_json, sha256, write_json
from medft.core.recipe import load_recipe
from medft.core.run import Run
from medft.data import pipeline as data
from medft.fast import engine as fast
from medft.fast import patching
from medft.model import load as model
from medft.train import baseline as train

import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_train import PAIRS, TEXTS, prepared

STEPS = [
    "engine=[trl, fast]",
    "training.max_steps=3",
    "training.per_device_train_batch_size=4",
    "training.gradient_accumulation_steps=2",
    "training.learning_rate=1e-4",
    "dataset.max_samples=24",
]
EVAL = [
    "training.eval_strategy=steps",
    "training.eval_steps=3",
    "training.per_device_eval_batch_size=16",
]
CASES = {
    "generative": EVAL,
    "grouped by length": ["training.train_sampling_strategy=group_by_length"],
    "packed": ["training.packing=true"],
    "whole": ["lora=null"],
    "classification": [*PAIRS, *EVAL, "dataset.holdout=0.2", "model.class_weights=balanced"],
    "pretraining": [*TEXTS, *EVAL, "dataset.holdout=0.2"],
}
SAME = (
    "loss",
    "eval_loss",
    "mean_token_accuracy",
    "eval_mean_token_accuracy",
    "num_tokens",
    "num_input_tokens_seen",
    "learning_rate",
)


def both(tmp_path, *more):
    "The logs of a run trained by the baseline and by us."
    run = prepared(tmp_path, *STEPS, *more)
    train.train(run)
    fast.train_fast(run)
    logs = []
    for engine in ("trl", "fast"):
        rows = train.read_log(run, engine)
        logs.append([row for row in rows if "loss" in row or "eval_loss" in row])
    return run, *logs


@pytest.mark.parametrize("case", CASES)
def test_losses_are_the_baselines_in_float32(tmp_path, case):
    run, theirs, ours = both(tmp_path, *CASES[case], "training.bf16=false")
    assert ("eval_loss" in theirs[-1]) == (EVAL[0] in CASES[case])
    assert len(theirs) == len(ours) == 3 + ("eval_loss" in theirs[-1])
    for a, b in zip(theirs, ours, strict=True):
        assert {k for k in a if "entropy" not in k} == set(b)
        for k in SAME:
            assert k not in a or a[k] == pytest.approx(b[k], abs=1e-5), (case, k)
        if "grad_norm" in a:
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    summary = train.training_summary(run, "fast")
    assert summary["first_loss_plain"] == pytest.approx(summary["first_loss_fast"], abs=1e-4)
    assert isinstance(summary["notes"], list)
    assert summary["allocator"]


@pytest.mark.skipif(not train.has_bfloat16(), reason="this machine has no bfloat16")
@pytest.mark.parametrize("case", ["generative", "whole", "classification", "pretraining"])
def test_in_bfloat16_the_error_is_no_larger_than_the_baselines(tmp_path, case):
    _, exact, _ = both(tmp_path / "exact", *CASES[case], "training.bf16=false")
    run, theirs, ours = both(tmp_path, *CASES[case], "training.bf16=true")
    errors = []
    for log in (theirs, ours):
        pairs = zip(exact, log, strict=True)
        errors.append(max(abs(e["loss"] - x["loss"]) for e, x in pairs if "loss" in x))
    assert errors[1] < 2 * errors[0] + 2e-3, errors
    saved = load_file(next((run.path / "fast").glob("*/*.safetensors")))
    assert {t.dtype for t in saved.values()} == {torch.float32}  # what is trained stays exact


def test_frozen_weights_are_narrow_only_where_they_may_be():
    quick = load_recipe("quickstart")
    for more, dtype in (
        ([], "bfloat16"),
        (["lora=null"], "auto"),
        (["lora.modules_to_save=[lm_head]"], "auto"),
        (["lora.bias=all"], "auto"),
        (["model.dtype=float32"], "float32"),
    ):
        assert fast.narrowed(load_recipe("quickstart", more), True).model.dtype == dtype, more
    assert fast.narrowed(quick, False) is quick


def test_resumed_equals_uninterrupted_and_the_adapter_is_one_like_others(tmp_path):
    run = prepared(
        tmp_path,
        "engine=[trl, fast]",
        "training.save_strategy=steps",
        "training.save_steps=2",
        "training.max_steps=4",
        "lora.lora_dropout=0.1",
    )
    whole = fast.train_fast(run)
    files = sorted(p.name for p in (run.path / "fast" / "checkpoints" / "checkpoint-2").iterdir())
    before = sha256(run.path / "fast/adapters/adapter_model.safetensors")
    for gone in ("adapters", "checkpoints/checkpoint-4"):
        shutil.rmtree(run.path / "fast" / gone)
    again = fast.train_fast(run)
    assert again["resumed"] and not whole["resumed"]
    assert sha256(run.path / "fast/adapters/adapter_model.safetensors") == before
    train.train(run)
    trl, ours = (
        load_file(run.path / engine / "adapters/adapter_model.safetensors")
        for engine in ("trl", "fast")
    )
    assert {k: v.shape for k, v in trl.items()} == {k: v.shape for k, v in ours.items()}
    checkpoint = run.path / "trl" / "checkpoints" / "checkpoint-2"
    assert files == sorted(p.name for p in checkpoint.iterdir())
    configs = [
        read_json(run.path / engine / "adapters/adapter_config.json") for engine in ("trl", "fast")
    ]
    assert configs[0].keys() == configs[1].keys()


def test_a_saved_adapter_gives_the_trained_models_logits(tmp_path):
    run = prepared(tmp_path, "engine=fast", "training.max_steps=3", "training.bf16=false")
    trainer = fast.fast_step_trainer(run)
    train.fit(trainer)
    trainer.quick.restore()
    trained, loaded = trainer.model.eval(), model.load_tuned(run, "fast")
    ids = torch.tensor([data.load_split(run, "train")[0]["input_ids"]])
    with torch.no_grad():
        a, b = trained(input_ids=ids).logits, loaded(input_ids=ids).logits
    assert torch.allclose(a.float(), b.float(), atol=1e-5)


def test_what_the_step_does_not_know_is_left_to_the_library_and_said(tmp_path):
    run, theirs, ours = both(tmp_path, "training.neftune_noise_alpha=5", "training.bf16=false")
    assert [r["loss"] for r in theirs] == [r["loss"] for r in ours]
    (note,) = train.training_summary(run, "fast")["notes"]
    assert "neftune_noise_alpha" in note
    assert note in (run.path / "logs" / "finetune.log").read_text()


def test_every_module_knows_that_it_trains(tmp_path):
    "Dropout is on in the step, off in the check before it and in evaluations."
    run = prepared(
        tmp_path,
        "engine=fast",
        *EVAL,
        "training.max_steps=4",
        "lora.lora_dropout=0.5",
        "training.eval_steps=2",
        "dataset.max_samples=32",
    )
    trainer = fast.fast_step_trainer(run)
    compute = trainer.fast_loss
    modes = []

    def noted(*args):
        modes.append({m.training for m in trainer.model.modules()})
        return compute(*args)

    trainer.fast_loss = noted
    trainer.go()
    assert modes[:4] == [{False}, {False}, {True}, {True}]
    assert {False} in modes[4:] and {True} in modes[4:]
    assert {True, False} not in modes
    assert any("dropout" in note for note in trainer.engine_report["notes"])


def test_a_step_that_computes_something_else_does_not_train(tmp_path, monkeypatch):
    "A forgotten border shows in the loss at once, a forgotten adapter only if it is not zero."
    run = prepared(tmp_path, *STEPS)
    exact = fast.unpadded

    def without_borders(batch):
        rows = exact(batch)
        return rows._replace(positions=torch.arange(rows.ids.shape[1])[None])

    with monkeypatch.context() as m:
        m.setattr(fast, "unpadded", without_borders)
        with pytest.raises(MedftError, match="first batch.*engine: .trl."):
            fast.train_fast(run)

    def without(net, dtype=None):
        quick = patching.quicken(net, dtype)
        hidden = quick.hidden

        def bare(*a, **k):
            with net.disable_adapter():
                return hidden(*a, **k)

        quick.hidden = bare
        quick.restore()
        return quick

    with monkeypatch.context() as m:
        m.setattr(fast, "quicken", without)
        with pytest.raises(MedftError, match="first batch"):
            fast.train_fast(run)
    assert not (run.path / "fast" / "adapters").exists()


@pytest.mark.parametrize("rows, left", [([5, 3, 9], [4, 2, 8]), ([1, 4], [3])])
def test_only_what_the_loss_depends_on_is_left(rows, left):
    width = max(rows)
    mask = torch.arange(width) < torch.tensor(rows)[:, None]
    ids = torch.arange(1, 1 + len(rows) * width).view(len(rows), width)
    r = fast.unpadded(
        dict(input_ids=ids, attention_mask=mask.long(), labels=torch.where(mask, ids, -100))
    )
    assert r.positions.tolist() == [[i for n in left for i in range(n)]]
    lists = list(zip(ids.tolist(), rows, strict=True))
    assert r.targets.tolist() == [i for row, n in lists for i in row[1:n]]
    assert r.ids[0, r.predicting].tolist() == [i for row, n in lists for i in row[: n - 1]]


def test_auto_chooses_by_machine_and_task_and_says_why(tmp_path, monkeypatch):
    auto = load_recipe("quickstart", ["engine=auto"])
    labels = load_recipe("quickstart", ["engine=[auto]", "model.task=classification"])
    for r, device, unsloth, expected in (
        (auto, "cpu", True, "fast"),
        (auto, "cuda", True, "unsloth"),
        (auto, "cuda", False, "fast"),
        (labels, "cuda", True, "fast"),
        (auto, "mps", False, "trl"),
    ):
        chosen = recipe.choose_engine(r, device, unsloth)
        assert chosen.engine == [expected] and chosen.engine_chosen.startswith(f"{expected}: ")
    with pytest.raises(MedftError, match="auto chooses by itself"):
        load_recipe("quickstart", ["engine=[auto, trl]"])
    run = Run.create(auto, root=tmp_path)
    assert run.manifest["engine_chosen"]
    assert len(run.recipe.engine) == 1
    assert Run.open(run.path).recipe.engine_chosen == run.manifest["engine_chosen"]
    assert core.settle(run.recipe) is run.recipe


def test_a_run_of_an_earlier_medft_goes_on(tmp_path):
    "Before Unsloth had a stage of its own, it trained in the one called fast."
    run = Run.create(load_recipe("quickstart", ["engine=[trl, unsloth]"]), root=tmp_path)
    run.update(dict(wanted=["data", "model", "train", "fast", "evaluate", "export"]))
    assert runner.stages_begun(run) == ["data", "model", "train", "unsloth", "evaluate", "export"]
    run.update({"stages": {"fast": dict(status="finished")}})
    assert runner.stages_begun(run)[3] == "fast"
    old = run.path / "recipe.yaml"
    lines = old.read_text().splitlines(True)
    old.write_text("".join(line for line in lines if not line.startswith("engine_chosen")))
    assert Run.open(run.path).recipe.engine == ["trl", "unsloth"]


def test_an_engine_that_is_left_out_is_not_started_and_says_so(tmp_path):
    recipe = load_recipe("quickstart", ["engine=[fast]"])
    assert runner.stages_of(recipe) == ["data", "model", "fast", "evaluate", "export"]
    with pytest.raises(MedftError, match="leaves out train"):
        runner.stages_of(recipe, ["train"])
    run = Run.create(recipe, root=tmp_path)
    runner.note_left_out(run)
    assert {e: train.training_summary(run, e).get("reason") for e in sections.ENGINES} == dict(
        trl="the recipe's engine list leaves it out",
        unsloth="the recipe's engine list leaves it out",
        fast=None,
    )
    assert train.trained(run) == []
    for e in sections.ENGINES:
        write_json(run.path / e / "training.json", dict(status="finished"))
    assert train.trained(run) == ["trl", "unsloth", "fast"]
