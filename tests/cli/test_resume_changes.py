"What `medft resume --allow` accepts leaves the trained weights as they are, bit by bit."

from medft.cli.runner import HARMLESS, is_harmless, resumed
from medft.core.recipe import load_recipe
from medft.core.run import Run

import pytest

HARMLESS_CHANGES = [
    "training.logging_steps=1",
    "training.save_steps=2",
    "training.eval_steps=2",
    "training.save_total_limit=3",
    "training.dataloader_num_workers=2",
    "training.dataloader_prefetch_factor=4",
    "training.dataloader_persistent_workers=true",
    "training.logging_first_step=true",
    "output.keep_best=1",
    "evaluation.max_items=2",
    "dataset.cache=false",
    "export.merge=false",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    from medft.model import families
    from medft.plan.rehearsal import few_starter_rows

    with pytest.MonkeyPatch.context() as m:
        m.setenv("MEDFT_RUNS", str(tmp_path_factory.mktemp("runs")))
        model = families.build_tiny("llama2", tmp_path_factory.mktemp("model"))
        overrides = [
            f"model.name={model}",
            "engine=[trl]",
            "lora.lora_dropout=0.1",
            "dataset.sets={}",
            "tracking.mlflow=false",
            "training.max_steps=6",
            "training.per_device_train_batch_size=2",
            "training.save_strategy=steps",
            "training.save_steps=3",
            "training.eval_strategy=steps",
            "training.eval_steps=3",
        ]
        for split, path in few_starter_rows("generative").items():
            key = "path" if split == "train" else f"{split}_path"
            overrides.append(f"dataset.{key}={path}")
        yield overrides


def begun(overrides):
    from medft.data import pipeline as data

    run = Run.create(load_recipe("quickstart", overrides))
    data.prepare(run)
    return run


def weights(run):
    return (run.path / "trl/adapters/adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(base):
    from medft.train import baseline as train

    run = begun(base)
    train.train(run)
    return weights(run)


def test_harmless_changes_leave_a_resumed_run_as_it_would_have_been(base, whole, monkeypatch):
    from medft.train import baseline as train

    run = begun(base)

    def power_cut(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(train.Record, "on_step_end", power_cut, raising=False)
        with pytest.raises(KeyboardInterrupt):
            train.train(run)
    run = resumed(run, HARMLESS_CHANGES, [c.partition("=")[0] for c in HARMLESS_CHANGES])
    assert run.recipe.training.dataloader_num_workers == 2
    train.train(run)
    assert train.training_summary(run, "trl")["resumed"] and weights(run) == whole


def test_the_steps_that_choose_the_best_checkpoint_are_not_harmless(base):
    best = load_recipe("quickstart", [*base, "training.load_best_model_at_end=true"])
    for key in ("training.save_steps", "training.eval_steps", "training.eval_strategy"):
        assert not is_harmless(key, best) and is_harmless(key, load_recipe("quickstart", base))


def test_another_rate_is_another_model(base, whole):
    "What makes the equality above worth something."
    from medft.train import baseline as train

    run = begun([*base, "training.learning_rate=2.9e-3"])
    train.train(run)
    assert weights(run) != whole and not is_harmless("training.learning_rate", run.recipe)


def test_every_harmless_key_is_a_key_of_a_recipe():
    from medft.core.sections import SECTIONS, Recipe

    for key in HARMLESS:
        section, _, field = key.partition(".")
        if field in ("", "*"):
            assert section in Recipe.model_fields, key
        else:
            assert field in SECTIONS[section].model_fields, key
