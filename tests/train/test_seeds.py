"""Several seeds: each is trained as if it were alone, a killed one goes on,
and the verdict is about the recipe."""

from medft.cli import runner
from medft.core.files import MedftError, write_json
from medft.core.recipe import load_recipe
from medft.core.run import Run
from medft.data.pipeline import prepare
from medft.evaluate import metrics as ev
from medft.evaluate.measures import comparisons
from medft.evaluate.statistics import (
    intervals as st,
)
from medft.evaluate.statistics import (
    simulation as trials,
)
from medft.evaluate.statistics import (
    verdicts,
)
from medft.train import trainer as repeats

import importlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from killing import SMALL, rows


def run_of(folder, *more):
    "A prepared run of small rows."
    folder.mkdir(parents=True, exist_ok=True)
    for name, n in (("train", 16), ("validation", 4)):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(r) + "\n" for r in rows("lora", n, name))
        )
    keys = [
        "lora.r=4",
        f"dataset.path={folder}/train.jsonl",
        f"dataset.validation_path={folder}/validation.jsonl",
        "training.num_train_epochs=1",
        "training.eval_strategy=no",
        "training.save_strategy=no",
    ]
    run = Run.create(
        load_recipe("quickstart", [*SMALL, *keys, *more]), root=folder / "runs", run_id="run"
    )
    prepare(run)
    return run


def weights(run, engine="trl"):
    return (run.path / engine / "adapters" / "adapter_model.safetensors").read_bytes()


def trainer_of(engine):
    "The engine's own function; Unsloth changes libraries, so it is imported only where it trains."
    module, name = dict(
        trl=("train.baseline", "train"),
        fast=("fast.engine", "train_fast"),
        unsloth=("train.unsloth_engine", "train_unsloth"),
    )[engine]
    return getattr(importlib.import_module(f"medft.{module}"), name)


ALONE = """import sys
sys.path[:0] = ["tests/helpers", "tests/train"]
engine, folder, seed = sys.argv[1:]
if engine == "unsloth":
    import medft.train.unsloth_engine
from test_seeds import trainer_of
from medft.core.run import Run
from medft.train.trainer import repeats
(one,) = [r for r in repeats(Run.open(folder)) if str(r.recipe.seed) == seed]
one.lay_out()
trainer_of(engine)(one)"""

TOGETHER = """import sys
sys.path[:0] = ["tests/helpers", "tests/train"]
engine, folder = sys.argv[1:]
if engine == "unsloth":
    import medft.train.unsloth_engine
from test_seeds import trainer_of
from medft.core.run import Run
from medft.train.trainer import each_seed
each_seed(Run.open(folder), engine, trainer_of(engine))"""


@pytest.mark.long
@pytest.mark.parametrize("engine", ["trl", "fast", "unsloth"])
def test_a_seed_after_another_is_what_a_fresh_process_makes_of_it(tmp_path, engine):
    "To the bit: what one training leaves behind in a process does not reach the next."
    together, alone = (
        run_of(
            tmp_path / name,
            f"engine=[{engine}]",
            "evaluation.seeds=3",
            "lora.lora_dropout=0.1" if engine == "trl" else "lora.lora_dropout=0.0",
        )
        for name in ("together", "alone")
    )

    def python(*args):
        subprocess.run(
            [sys.executable, "-c", *map(str, args)],
            check=True,
            env=dict(os.environ, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1"),
            stdout=subprocess.DEVNULL,
        )

    python(TOGETHER, engine, together.path)
    if repeats.training_record(together, engine)["status"] == "skipped":
        pytest.skip(repeats.training_record(together, engine)["reason"])
    found = []
    pairs = zip(repeats.repeats(together), repeats.repeats(alone), strict=True)
    for r, s in pairs:
        python(ALONE, engine, alone.path, s.recipe.seed)
        found.append(weights(r, engine))
        assert weights(r, engine) == weights(s, engine)
    assert len({weights(together, engine), *found}) == 3


@pytest.mark.long
def test_killed_in_the_second_seed_it_goes_on_there(tmp_path):
    "SIGKILL while the second seed trains: the first is not touched again, both end as usual."
    keep = [
        "engine=[trl]",
        "evaluation.seeds=2",
        "training.save_strategy=steps",
        "training.save_steps=1",
        "training.save_total_limit=2",
    ]
    whole, cut = (run_of(tmp_path / name, *keep) for name in ("whole", "cut"))
    repeats.each_seed(whole, "trl", trainer_of("trl"))
    pid = os.fork()
    if not pid:
        try:
            repeats.each_seed(cut, "trl", trainer_of("trl"))
        finally:
            os._exit(0)
    second, until = cut.path / "seeds" / "43" / "trl" / "checkpoints", time.time() + 300
    while not list(second.glob("checkpoint-*/seal.json")) and time.time() < until:
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert repeats.training_record(repeats.repeats(cut)[0], "trl").get("status") != "finished"
    repeats.each_seed(cut, "trl", trainer_of("trl"))
    log = (cut.path / "logs" / "finetune.log").read_text()
    assert "trl: trained already" in log and "seed 43: trl: going on from checkpoint-" in log
    whole_runs = [whole, *repeats.repeats(whole)]
    cut_runs = [cut, *repeats.repeats(cut)]
    assert [weights(run) for run in whole_runs] == [weights(run) for run in cut_runs]


def test_a_further_seed_shares_the_data_and_nothing_else(tmp_path):
    run = run_of(tmp_path, "engine=[trl]", "evaluation.seeds=3", "training.data_seed=7")
    assert repeats.seeds_of(run.recipe) == [42, 43, 44] and run.recipe.seed == 42
    moved = Run.open(run.path.rename(tmp_path / "elsewhere"))
    for r in repeats.repeats(moved):
        r.lay_out()
        own = load_recipe(r.path / "recipe.yaml")
        assert (
            own == r.recipe
            and own.seed == r.recipe.seed
            and own.training.data_seed == 7
            and own.evaluation.seeds == 1
            and own.dataset == moved.recipe.dataset
        )
        assert (
            (r.path / "data").is_symlink()
            and (r.path / "data" / "train").samefile(moved.path / "data" / "train")
            and not (r.path / "manifest.json").exists()
        )
    assert [x.recipe.name for x in [Run.open(moved.path)]] == ["quickstart"]


def test_finished_seeds_stay_and_left_out_engines_are_left_out_of_all(tmp_path):
    run, made = (
        Run.create(
            load_recipe("quickstart", ["evaluation.seeds=3", "engine=[trl]"]), root=tmp_path
        ),
        [],
    )
    (run.path / "data").mkdir()

    def train(r):
        made.append(r.recipe.seed)
        (r.path / "trl").mkdir(exist_ok=True)
        write_json(r.path / "trl" / "training.json", dict(status="finished"))

    def skipped(r):
        made.append("no")
        write_json(r.path / "fast" / "training.json", dict(status="skipped"))

    repeats.each_seed(run, "trl", train)
    (run.path / "seeds" / "43" / "trl" / "training.json").unlink()
    repeats.each_seed(run, "trl", train)
    assert (
        made == [42, 43, 44, 43]
        and repeats.each_seed(run, "fast", skipped)["status"] == "skipped"
        and made[4:] == ["no"]
    )
    one = Run.create(load_recipe("quickstart", ["engine=[trl]"]), root=tmp_path, run_id="one")
    made.clear()
    repeats.each_seed(one, "trl", train)
    repeats.each_seed(one, "trl", train)
    assert (
        made == [42, 42] and not (one.path / "seeds").exists()
    )  # as before: a stage run again by hand trains again


def test_a_disk_that_is_full_is_told_of_the_run_that_can_be_resumed(tmp_path):
    run = Run.create(
        load_recipe("quickstart", ["evaluation.seeds=2", "engine=[trl]"]), root=tmp_path
    )
    (run.path / "data").mkdir()

    def train(r):
        if r is not run:
            raise MedftError(f"cannot write in {r.path}: the disk is full; medft resume {r.path}")

    with pytest.raises(MedftError) as e:
        repeats.each_seed(run, "trl", train)
    assert str(e.value).endswith(f"medft resume {run.path}") and "/seeds/" not in str(e.value)


def test_no_seed_at_all_is_refused_and_more_seeds_are_trained_on_resuming():
    with pytest.raises(
        MedftError, match="evaluation.seeds: input should be greater than or equal to 1, found 0"
    ):
        load_recipe("quickstart", ["evaluation.seeds=0"])
    assert runner.outdated({"evaluation.seeds": (1, 3)}) == [
        "train",
        "unsloth",
        "fast",
        "evaluate",
        "export",
    ] and runner.outdated({"evaluation.seeds": (3, 1)}) == ["evaluate", "export"]


# The verdict


def choices(gain, seed, n=300, per=2):
    rng, right = np.random.default_rng(seed), np.random.default_rng(1).random(n) < 0.5
    correct = np.where(rng.random(n) < 0.25, rng.random(n) < 0.5 + 2 * gain, right)
    truth = np.random.default_rng(2).integers(0, 4, n)
    choice = np.where(correct, truth, (truth + 1) % 4)
    scores = rng.normal(size=(n, 4)) + 3 * np.eye(4)[choice]
    return pd.DataFrame(
        dict(
            id=[str(i) for i in range(n)],
            group=[f"p{i // per}" for i in range(n)],
            subject="",
            prompt_sha256="",
            scores=scores.tolist(),
            choice=choice,
            choice_norm=choice,
            truth=truth,
            correct=correct,
        )
    )


def texts(factor, seed, n=60):
    tokens = np.random.default_rng(3).integers(50, 90, n)
    return pd.DataFrame(
        dict(
            id=range(n),
            group=range(n),
            subject="",
            prompt_sha256="",
            nll=tokens * factor * (2 + 0.02 * np.random.default_rng(seed).normal(size=n)),
            tokens=tokens,
            bytes=tokens * 3,
        )
    )


def labels(skill, seed, n=300):
    truth = np.random.default_rng(4).integers(0, 2, n)
    p = 1 / (
        1 + np.exp(-(skill * (2 * truth - 1) + 1.5 * np.random.default_rng(seed).normal(size=n)))
    )
    return pd.DataFrame(
        dict(
            id=range(n),
            group=[f"p{i // 2}" for i in range(n)],
            subject="",
            prompt_sha256="",
            truth=truth,
            choice=(p > 0.5).astype(int),
            correct=(p > 0.5) == truth,
            probabilities=np.stack([1 - p, p], 1).tolist(),
        )
    )


RUN = type("Run", (), dict(recipe=type("Recipe", (), dict(seed=42))))()
MADE = dict(
    accuracy=(lambda x, s: choices(x, s), 0, 0.2),
    f1=(lambda x, s: labels(x, s), 0.5, 1.5),
    loss=(lambda x, s: texts(x, s), 1, 0.9),
)


@pytest.mark.parametrize("metric", MADE)
def test_the_verdict_is_over_seeds_in_every_main_metric(metric):
    make, none, much = MADE[metric]
    frames = {("base", "test"): make(none, 0), ("base", "other"): make(none, 10)} | {
        (w, s): make(x, 20 + i + 5 * (s == "other"))
        for i, (w, x) in enumerate(
            (("trl", much), ("trl@43", much), ("trl@44", much), ("fast", none))
        )
        for s in ("test", "other")
    }
    m = ev.summarise(frames)
    assert (
        set(m["models"]) == {"base", "trl", "fast"}
        and set(m["verdict"]) == {"trl", "fast"}
        and not any("@" in k for k in m["between"])
    )
    out = comparisons.several(RUN, frames, m)
    d = out["verdict"]["trl"]
    assert (
        d["metric"] == metric
        and d["label"] == "better"
        and d["seeds"] == 3
        and d["tests"] == 2
        and out["first_seed"] == 42
        and "over 3 seeds" in d["sentence"]
    )
    assert out["verdict_first_seed"] == m["verdict"] and {
        k: out["verdict"]["fast"][k] for k in ("p", "effect", "detectable", "test")
    } == {k: m["verdict"]["fast"][k] for k in ("p", "effect", "detectable", "test")}
    assert (
        list(out["seeds"]) == ["trl"]
        and list(out["seeds"]["trl"]) == ["42", "43", "44"]
        and list(out["over_seeds"]["trl"]) == ["test", "other"]
    )
    first = out["seeds"]["trl"]["42"]["test"][metric]
    assert first == m["models"]["trl"]["test"][metric]
    values = [out["seeds"]["trl"][s]["test"][metric]["value"] for s in ("42", "43", "44")]
    base = m["models"]["base"]["test"][metric]["value"]
    assert (
        d["effects"] == pytest.approx(np.array(values) - base, abs=2e-6)
        and d["spread"] == pytest.approx(np.std(values, ddof=1), abs=2e-6)
        and json.dumps(out)
    )


def test_without_further_seeds_nothing_is_said_of_them():
    frames = {("base", "test"): choices(0, 0), ("trl", "test"): choices(0.2, 5)}
    assert (
        comparisons.several(RUN, frames, ev.summarise(frames)) == {}
        and comparisons.several in ev.FIGURE_PARTS
    )


def test_seeds_that_answered_other_questions_are_not_compared():
    with pytest.raises(MedftError, match="different items"):
        comparisons.compare_seeds(
            choices(0, 0), [choices(0.2, 1), choices(0.2, 2).assign(id="x")], "accuracy"
        )


def test_two_lucks_are_those_of_items_and_of_seeds():
    "Without luck of seeds the interval is that of items; without that of items, Student's."
    rng = np.random.default_rng(0)
    few = np.array([0.1, 0.13, 0.16])
    alone = verdicts.two_lucks(few, np.tile(few[:, None], (1, 50)), 50)
    assert verdicts.reach(0.05, alone) == pytest.approx(
        verdicts.np.std(few, ddof=1) / 3**0.5 * 4.3027, rel=0.01
    ) and verdicts.p_of_effect(verdicts.reach(0.05, alone), alone) == pytest.approx(0.05, abs=1e-6)
    apart = rng.normal(size=400)
    gaps = np.tile((0.1 - apart / 400)[None], (3, 1))
    same = verdicts.two_lucks(np.full(3, 0.1), gaps, 400)
    assert verdicts.reach(0.05, same) == pytest.approx(1.966 * apart.std() / 20, rel=0.02)
    both = verdicts.two_lucks(few, gaps, 400)
    assert verdicts.reach(0.05, both) > max(verdicts.reach(0.05, alone), verdicts.reach(0.05, same))


# The other figures


def test_other_figures_are_compared_and_corrected_together():
    frames = {
        ("base", "test"): choices(0, 0),
        ("trl", "test"): choices(0.2, 5),
        ("fast", "test"): choices(0, 6),
    }
    found = comparisons.compared_figures(RUN, frames, ev.summarise(frames))["comparisons"]
    assert {w: list(x) for w, x in found.items()} == {
        w: ["macro_f1", "brier", "log_loss"] for w in ("trl", "fast")
    } and all(
        d["tests"] == 6 and d["p_holm"] >= d["p"] and d["sentence"]
        for x in found.values()
        for d in x.values()
    )
    assert (
        found["trl"]["macro_f1"]["label"] == "better"
        and found["trl"]["macro_f1"]["effect"] > 0
        and found["fast"]["macro_f1"]["label"] == "tie"
    )
    text = {("base", "test"): texts(1, 0), ("trl", "test"): texts(0.9, 1)}
    assert (
        comparisons.compared_figures(RUN, text, ev.summarise(text)) == {}
        and comparisons.compared_figures in ev.FIGURE_PARTS
    )


def test_they_say_what_the_single_figures_say():
    a, b = labels(0.5, 0), labels(1.5, 1)
    found = comparisons.other_figures(a, dict(trl=b))
    first, second = (ev.measure_predictions(f) for f in (a, b))
    for (_, m), d in found.items():
        assert (
            d["effect"] == pytest.approx(second[m]["value"] - first[m]["value"], abs=2e-6)
            and d["label"] == "better"
            and d["groups"] == 150
        )
    assert {m for _, m in found} == {"macro_f1", "auroc", "brier", "log_loss"}
    one = labels(0.5, 0).assign(truth=1)
    assert "auroc" not in {
        m for _, m in comparisons.other_figures(one, dict(trl=one))
    }  # where there is but one class there is no order to compare


@pytest.mark.long
def test_they_raise_false_alarms_as_seldom_as_promised():
    "500 pairs of classifiers without a difference: one of twenty is called better or worse."

    def classifier(rng, truth, common):
        p = 1 / (1 + np.exp(-((2 * truth - 1) + common + rng.normal(size=300))))
        return pd.DataFrame(
            dict(
                group=range(300),
                truth=truth,
                choice=(p > 0.5).astype(int),
                probabilities=np.stack([1 - p, p], 1).tolist(),
            )
        )

    alarms = {}
    for i in range(500):
        rng = np.random.default_rng(i)
        truth = rng.integers(0, 2, 300)
        common = rng.normal(size=300)
        base = classifier(rng, truth, common)
        tuned = classifier(rng, truth, common)
        for (_, metric), found in comparisons.other_figures(base, dict(trl=tuned)).items():
            alarms.setdefault(metric, []).append(found["label"] != "tie")
    rates = {metric: np.mean(called) for metric, called in alarms.items()}
    assert all(0.02 <= rate <= 0.08 for rate in rates.values()), rates


# Power before the run, and the trials


def test_power_is_told_before_the_run(tmp_path):
    run = run_of(tmp_path, "engine=[trl]", "evaluation.max_items=3")
    assert verdicts.sets_of(run) == {}
    one = dict(n=500, groups=500, size=1.0, counted=True)
    quick = load_recipe("quickstart", ["engine=[trl]"])
    said = verdicts.foreseen(
        quick,
        dict(test=one, grouped=one | dict(groups=100, size=6.0), text=one | dict(counted=False)),
    )
    assert (
        said["test"]["detectable"] == pytest.approx(st.detectable(500), abs=1e-4)
        and said["grouped"]["detectable"] == pytest.approx(st.detectable(500, design=2.0), abs=1e-4)
        and said["text"]["detectable"] is None
    )
    more = verdicts.foreseen(
        load_recipe("quickstart", ["engine=[trl, fast]", "evaluation.models={other: tiny-base}"]),
        dict(test=one),
    )["test"]
    assert more["tests"] == 3 and more["detectable"] == pytest.approx(
        st.detectable(500, tests=3), abs=1e-4
    )
    lines = verdicts.foreseen_in_words(said, seeds=3)
    assert (
        "20% of the rows" in lines[0]
        and "in 100 groups" in lines[1]
        and "first run" in lines[2]
        and "3 seeds" in lines[3]
    )
    assert (
        "known when their rows are" in verdicts.foreseen_in_words(None)[0]
        and verdicts.foreseen(quick, None) is None
    )


def test_the_trials_of_seeds_and_further_figures_are_kept():
    kept = trials.simulation_tables()
    assert (
        all(x["verdicts"] <= 0.065 for x in kept["seeds"] if x["truth"] == 0)
        and all(x["covered"] >= 0.935 and x["times"] >= 1000 for x in kept["seeds"])
        and {x["world"] for x in kept["seeds"]} == {"seeds", "loss_seeds", "f1_seeds"}
    )
    assert (
        all(
            x["times"] >= 1000
            and (0.935 <= x["covered"] <= 0.965 if x["group_size"] == 1 else x["covered"] >= 0.92)
            for x in kept["gaps"]
        )
        and kept["loss_families"]["holm"] <= 0.065
    )
    assert (
        all(x["mid_p"] <= 0.055 for x in kept["coins"])
        and min(x["exact"] for x in kept["coins"] if x["rows"] >= 500) < 0.025
    )
    again = next(x for x in kept["coins"] if x["rows"] == 200)
    assert next(x for x in trials.coins(again["times"]) if x["rows"] == 200) == again


@pytest.mark.long
def test_a_smaller_trial_of_verdicts_over_seeds():
    "300 of each world without a gain: false alarms are rare, however much seeds differ."
    for world, how in (
        (trials.seeds_world, dict(luck=0.05)),
        (trials.seeds_world, dict(luck=0.02, seeds=5)),
        (trials.loss_seeds_world, {}),
        (trials.f1_seeds_world, {}),
    ):
        assert trials.simulated_rates(world, 500, 1, 300, seed=1, **how)["verdicts"] <= 0.085, (
            world,
            how,
        )
