"""What a verdict rests on: clusters of rows, finite scores, and evidence files.

Today's code could have written each of these files."""

from medft.bench import (
    data as bench_data,
)
from medft.bench import (
    engines as bench,
)
from medft.bench import evidence_files, page
from medft.bench import (
    page as bench_page,
)
from medft.bench import (
    scoring as bench_scoring,
)
from medft.core import identity
from medft.core.files import MedftError, assets
from medft.core.recipe import load_recipe
from medft.core.sections import Recipe
from medft.data import splits
from medft.evaluate import metrics as evaluate
from medft.evaluate import plots
from medft.evaluate.measures import calibration
from medft.evaluate.measures import classification as classes
from medft.evaluate.measures import forgetting as retention
from medft.evaluate.measures import memorisation as exposure
from medft.evaluate.scoring import benchmarks
from medft.evaluate.scoring import generation as answers
from medft.evaluate.scoring import predict as scoring
from medft.evaluate.statistics import intervals as st
from medft.evaluate.statistics import simulation as trials
from medft.evaluate.statistics import verdicts

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from scipy.stats import norm

TOP = Path(__file__).resolve().parents[2]


# Rows that belong to several groups


def pairs(first, second):
    return [f"patient {a} & patient {b}" for a, b in zip(first, second, strict=True)]


@pytest.mark.parametrize(
    "groups, clusters",
    [
        (["a & b", "c & b", "d & e"], [0, 0, 1]),  # the second is shared
        (["a & b", "b & c", "c & d", "x"], [0, 0, 0, 1]),  # first of one, second of another
        ([["a", "b"], ("b",), ["c"]], [0, 0, 1]),  # lists of names
        (["d1 & f & p", "d2 & g & q", "d3 & h & q"], [0, 1, 1]),  # three identities
        (["", None, float("nan"), "a", "a"], [0, 1, 2, 3, 3]),  # without a group: each alone
        (["document Smith && Sons", "document Smith && Wesson", "document Smith"], [0, 1, 2]),
        ([7, "7", 8], [0, 0, 1]),
        (np.array([[1, 5], [2, 5], [3, 6]]), [0, 0, 1]),
        (np.array([4, 4, 2]), [0, 0, 1]),
        (pd.Series(["a & b", "b & c"]), [0, 0]),
        (range(3), [0, 1, 2]),
    ],
)
def test_rows_that_share_any_group_are_one_cluster(groups, clusters):
    code, k = st.owners(groups)
    assert code.tolist() == clusters and k == max(clusters) + 1


def test_a_name_that_holds_the_separator_stays_one_name():
    row = splits.staged_row(
        dict(group=["document Smith & Sons", "focus A&B"], question="q", answer="a"),
        dict(id="1", prompt="q", completion="a"),
        1,
    )
    assert identity.split_group_names(row["group"]) == ["document Smith & Sons", "focus A&B"]
    assert st.owners([row["group"], identity.join_group_names(["document Smith & Wesson"])])[1] == 2


def test_both_patients_of_a_pair_part_train_and_test():
    rng = np.random.default_rng(0)
    keys = [[f"patient {a}", f"patient {b}"] for a, b in rng.integers(0, 900, (600, 2))]
    sides = splits.split_groups(pa.array(keys, pa.list_(pa.string())), (), 1, 0.2)
    whose = {
        side: {name for names, s in zip(keys, sides, strict=True) if s == side for name in names}
        for side in ("train", "validation", "test")
    }
    assert (
        all(whose.values())
        and not whose["train"] & whose["test"]
        and not whose["train"] & whose["validation"]
        and not whose["test"] & whose["validation"]
    )


def false_alarms(groups_of, times=300, n=500, size=10):
    "How often two models without a difference are told apart; rows of ten resemble each other."
    rng, found = np.random.default_rng(0), 0
    second = np.repeat(np.arange(n // size), size)
    for _ in range(times):
        u, coin = norm.cdf(trials.alike(second, rng)), rng.random(n) < 0.5
        up, down = u < 0.1, u > 0.9
        a, b = np.where(up, False, down | coin), np.where(down, False, up | coin)
        found += verdicts.compare_choices(a, b, groups=groups_of(second))["label"] != "tie"
    return found / times


def test_a_shared_second_patient_raises_no_false_alarms():
    assert false_alarms(lambda second: pairs((f"a{i}" for i in range(500)), second)) <= 0.065
    assert (
        false_alarms(lambda second: [f"patient a{i}" for i in range(500)]) > 0.15
    )  # the control: without the second


@pytest.mark.parametrize("world", [trials.accuracy_world, trials.loss_world, trials.seeds_world])
def test_trials_of_pairs(world):
    line = trials.simulated_rates(world, 480, times=150, pairs=(10, 1))
    assert (
        line["verdicts"] <= 0.09 and line["covered"] >= 0.9
    )  # of so few: the page shows a thousand each


BOTH = dict(
    choices=lambda a, b, g: verdicts.compare_choices(a, b, groups=g),
    sums=lambda a, b, g: verdicts.compare_sums(
        "f1",
        lambda s: s[..., 0] / s[..., 1],
        *(np.stack([x, np.ones(len(x))], 1).astype(float) for x in (a, b)),
        g,
    ),
    seeds=lambda a, b, g: verdicts.over_seeds(
        "accuracy",
        lambda s: s[..., 0] / s[..., 1],
        *(
            x
            for x in (
                np.stack([a, np.ones(len(a))], 1).astype(float),
                np.stack([np.stack([np.roll(b, i), np.ones(len(b))], 1) for i in range(3)]).astype(
                    float
                ),
            )
        ),
        g,
    ),
)


@pytest.mark.parametrize("kind", BOTH)
def test_clusters_are_the_same_by_name_and_by_number(kind):
    rng = np.random.default_rng(1)
    a, b, second = rng.random(200) < 0.5, rng.random(200) < 0.6, np.repeat(np.arange(20), 10)
    assert BOTH[kind](a, b, pairs(range(1000, 1200), second)) == BOTH[kind](a, b, second)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize(
    "groups",
    [
        np.zeros(400, int),
        np.arange(400) // 134,
        np.maximum(np.arange(400) - 250, 0),
        pairs(range(400), range(1, 401)),
    ],
    ids=["one", "three", "one of most rows", "a chain"],
)
def test_few_clusters_are_too_few_to_tell(kind, groups):
    "Every row right after tuning and none before: whoever takes these rows as free is certain."
    rng = np.random.default_rng(0)
    free = BOTH[kind](rng.random(400) < 0.3, rng.random(400) < 0.45, np.arange(400))
    rng = np.random.default_rng(0)
    d = BOTH[kind](rng.random(400) < 0.3, rng.random(400) < 0.45, groups)
    low, high = d["ci95"]
    assert (
        free["label"] == "better"
        and "few_groups" not in free
        and "too few" not in verdicts.sentence(free, "trl")
    )
    assert (
        d["label"] == "tie"
        and d["few_groups"] < 10
        and "too few groups to tell" in verdicts.sentence(d, "trl")
    )
    assert low is None or high - low > 2 * (free["ci95"][1] - free["ci95"][0])


def test_few_clusters_make_single_figures_wide():
    hits = np.arange(400) % 5 > 0
    giant = np.maximum(np.arange(400) - 250, 0)

    def width(f):
        return f["ci95"][1] - f["ci95"][0]

    assert width(st.share(hits, groups=giant)) > 5 * width(st.share(hits))
    mean = dict(accuracy=st.ratio(hits.astype(float), np.ones(400)))
    wide, narrow = (st.valued(mean, g)["accuracy"] for g in (giant, np.arange(400)))
    assert width(wide) > 3 * width(narrow) and wide["ci95"][0] >= 0 and wide["ci95"][1] <= 1


def test_a_plan_knows_few_groups():
    code, k = st.owners(pairs(range(40), range(1, 41)))
    few = verdicts.foreseen_of(dict(n=40, groups=k, size=40.0, counted=True))
    assert (
        k == 1
        and few["few_groups"] == 1.0
        and few["detectable"] == 1.0
        and "too few groups to tell" in verdicts.power_in_words("test", few)
    )
    many = verdicts.foreseen_of(dict(n=400, groups=100, size=4.0, counted=True))
    assert "few_groups" not in many and "too few" not in verdicts.power_in_words("test", many)


def test_the_sentence_gives_every_difference_its_unit():
    a, b = np.arange(100) % 2 == 0, np.arange(100) % 3 > 0
    d = verdicts.compare_choices(a, b)
    assert verdicts.sentence(d, "trl").endswith(
        f"could have shown is {100 * d['detectable']:.1f} points"
    )
    assert verdicts.sentence(d | dict(metric="loss"), "trl").endswith("nats per token")
    assert verdicts.sentence(d | dict(detectable=None), "trl").endswith(
        "could have shown is not known"
    )


# Scores that are numbers


NAN, INF = float("nan"), float("inf")
WRONG = [
    [NAN] * 4,
    [-9.0, NAN, -1.0, -2.0],
    [NAN, -1.0, -2.0, -3.0],
    [-1.0, INF, -2.0, -3.0],
    [-INF] * 4,
]
ITEMS = [
    dict(id=f"q{i}", group=f"q{i}", prompt="p", options=["a", "b", "c", "d"], answer=0)
    for i in range(3)
]
RIGHT = [-1.0, -2.0, -3.0, -4.0]


@pytest.mark.parametrize("scores", WRONG)
def test_nothing_is_chosen_from_scores_that_are_no_numbers(scores):
    with pytest.raises(MedftError, match="item q1"):
        scoring.as_chosen(ITEMS, [RIGHT, scores, RIGHT])
    with pytest.raises(MedftError, match="item q1 .*1 more"):
        scoring.as_chosen(ITEMS, [RIGHT, scores, scores])


def test_one_impossible_option_is_never_chosen_and_has_its_figures():
    frame = scoring.as_chosen(ITEMS, [RIGHT, [-INF, -2.0, -3.0, -4.0], [-5.0, -INF, -1.0, -2.0]])
    assert frame.choice.tolist() == [0, 1, 2]
    found = evaluate.measure_predictions(frame)
    assert found["accuracy"]["value"] == round(1 / 3, 6) and all(
        np.isfinite(found[m]["value"]) for m in ("brier", "log_loss", "ece")
    )
    assert calibration.fit_temperature(frame.assign(truth=[0, 0, 0])) > 0  # one truth was ruled out


def labelled(p):
    return pd.DataFrame(
        dict(
            id=["a", "b"],
            group=["a", "b"],
            subject="",
            prompt_sha256="",
            probabilities=[[0.4, 0.6], p],
            truth=[1, 0],
        )
    )


def chosen_frame(scores=RIGHT):
    frame = scoring.as_chosen(ITEMS, [RIGHT, RIGHT, RIGHT])
    return frame.assign(scores=[RIGHT, scores, RIGHT])


def text_frame(nll=3.0):
    return pd.DataFrame(
        dict(
            id=["a", "b"],
            group=["a", "b"],
            subject="",
            prompt_sha256="",
            nll=[2.0, nll],
            tokens=[2, 3],
            bytes=[8, 12],
        )
    )


REFUSED = dict(
    choose=lambda: scoring.choose(labelled([NAN, NAN])),
    threshold=lambda: classes.best_threshold([0, 1, 1], [0.2, NAN, 0.4]),
    measure=lambda: evaluate.measure_predictions(chosen_frame([NAN] * 4)),
    measure_labels=lambda: evaluate.measure_predictions(
        labelled([NAN, 0.5]).assign(choice=0, correct=True)
    ),
    measure_text=lambda: evaluate.measure_predictions(text_frame(NAN)),
    infinite_loss=lambda: evaluate.measure_predictions(text_frame(INF)),
    compare=lambda: evaluate.compare_predictions(text_frame(), text_frame(NAN)),
    probabilities=lambda: calibration.probabilities(chosen_frame([-1.0, NAN, -2.0, -3.0])),
    temperature=lambda: calibration.fit_temperature(chosen_frame([NAN] * 4)),
    exposure=lambda: exposure.exposure([-1.0, NAN] + [-2.0] * 998),
    exposure_of_nan=lambda: exposure.exposure([NAN] + [-2.0] * 999),
    letters=lambda: evaluate.measure_predictions(
        chosen_frame().assign(letters_scores=[RIGHT, [NAN] * 4, RIGHT])
    ),
    answers=lambda: evaluate.measure_predictions(text_frame().assign(bertscore=[0.5, NAN])),
)


@pytest.mark.parametrize("what", REFUSED)
def test_figures_of_scores_that_are_no_numbers_are_refused(what):
    with pytest.raises(MedftError, match="no finite numbers"):
        REFUSED[what]()


def test_a_refusal_names_the_model_the_set_and_the_item():
    frames = {("base", "test"): chosen_frame(), ("trl", "test"): chosen_frame([NAN] * 4)}
    with pytest.raises(MedftError, match="trl on test: the scores of item q1"):
        evaluate.summarise(frames)
    frames[("trl", "test")] = chosen_frame()
    for who in ("trl@2", "rule"):
        more = frames | {(who, "test"): chosen_frame([NAN] * 4)} if "@" in who else frames
        rules = {} if "@" in who else {(who, "test"): chosen_frame([NAN] * 4)}
        with pytest.raises(MedftError, match=f"{who} on test"):
            evaluate.summarise(more, baselines=rules)


@pytest.fixture(scope="module")
def tiny():
    "The tiny base with its tokenizer, and the same with NaN in its last norm."
    from medft.core.recipe import load_recipe
    from medft.data.chat_templates import load_tokenizer
    from medft.model.load import load_base

    recipe = load_recipe("quickstart", ["engine=[trl]"])
    model = load_base(recipe)
    return recipe, load_tokenizer(recipe), model


@pytest.fixture
def broken(tiny):
    import torch

    recipe, tok, model = tiny
    weight = model.model.norm.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0] = NAN
    yield recipe, tok, model
    with torch.no_grad():
        weight.copy_(kept)


ROW = dict(
    id="q7",
    group="q7",
    subject="",
    prompt="Antidote in opioid overdose?",
    reference="naloxone",
    options=[" naloxone", " iron"],
    answer=0,
)


def test_a_model_that_gives_nan_is_stopped_at_choices_text_and_answers(broken, tmp_path):
    recipe, tok, model = broken
    text = ROW | dict(
        input_ids=tok("Iron is lacking.")["input_ids"],
        completion_mask=[0] + [1] * (len(tok("Iron is lacking.")["input_ids"]) - 1),
    )
    del text["options"]
    for predict in (
        lambda: scoring.predict_choices(model, tok, [ROW]),
        lambda: scoring.predict_forms(model, tok, [ROW], shuffles=1),
        lambda: scoring.predict_text(model, tok, [text]),
        lambda: answers.write_answers(model, tok, [text]),
    ):
        with pytest.raises(MedftError, match="item q7"):
            predict()
    run = SimpleNamespace(recipe=recipe, path=tmp_path, log=lambda line: None)
    with pytest.raises(MedftError, match="trl on test: .*item q7"):
        evaluate.score_model(run, "trl", model, tok, dict(test=[ROW]), dict(test="key"))
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_sound_model_still_answers(tiny):
    _, tok, model = tiny
    assert answers.write_answers(model, tok, [ROW])[0]["answer_tokens"] > 0
    assert np.isfinite(scoring.predict_choices(model, tok, [ROW]).scores[0]).all()


def test_engines_whose_likelihoods_are_nan_do_not_agree():
    turn = dict(rows=[[1]], times=[1.0])
    seen = {
        n: dict(turns=[turn], starts=[dict(drawn=1)], losses=[1.0, 0.9])
        for n in ("trl_default", "fast")
    }
    losses = {n: [1.0, 0.9] for n in seen}
    sound = page.disagreement(
        "fast",
        seen,
        losses,
        dict(fast=[[-1.0, -2.0]], trl_default=[[-1.0, -2.0]]),
        ["trl_default"],
        "float32",
    )
    wrong = page.disagreement(
        "fast",
        seen,
        losses,
        dict(fast=[[NAN, -2.0]], trl_default=[[-1.0, -2.0]]),
        ["trl_default"],
        "float32",
    )
    assert not sound["why"] and "no finite numbers" in wrong["why"][-1]


# Names in plots


NAMES = [
    "Costs: $5_ to $9",
    "Anatomy $\\frac$",
    "50% of $a%$",
    "a\\$b $ c",
    "_hidden",
    "__",
    "two\nlines\tand a tab",
    "x" * 300,
    "",
    " ",
    "\x1b[31mred\x00",
    "\ud800",
    "{x}^2_i",
    "&<b>\"'",
    "心臓",
    "العربية",
    "$",
    "$$",
    "\\",
]


@pytest.mark.parametrize("name", NAMES)
def test_every_plot_takes_any_name(name):
    def figure(v):
        return dict(
            accuracy=dict(value=v, ci95=[v - 0.05, v + 0.05], n=40),
            chance=dict(value=0.25, ci95=[0.25, 0.25], n=40),
        )

    def gap(v):
        return dict(label="better", metric="accuracy", effect=v, ci95=[v - 0.1, v + 0.1], n=40)

    bins = [dict(n=20, accuracy=0.5, ci95=[0.4, 0.6], confidence=0.6)] * 2
    models = {"base": {name: figure(0.4)}, name + "m": {name: figure(0.8)}}
    metrics = dict(
        main=name,
        models=models,
        names={name + "m": name},
        baselines={},
        differences={name + "m": {name: gap(0.4)}},
        subjects={
            name: {
                name: dict.fromkeys(models, figure(0.4)),
                "Other": dict.fromkeys(models, figure(0.3)),
            }
        },
        subject_differences={name: {name: {name + "m": gap(0.4)}, "Other": {name + "m": gap(0.2)}}},
        calibration={w: {name: dict(bins=bins, bins_scaled=bins)} for w in models},
        positions={w: {name: dict(truth=[0.5, 0.5], chosen=[0.4, 0.6])} for w in models},
    )
    ruled = metrics | dict(baselines={name + "r": {name: figure(0.5)}})
    drawn = [
        plots.plot_scores(metrics),
        plots.plot_rules(ruled),
        plots.plot_subjects(metrics),
        plots.plot_forest(metrics),
        plots.plot_reliability(metrics),
        plots.plot_positions(metrics),
    ]
    for plot in drawn:
        svg = plots.inline(plot, name if name.isprintable() else "")
        ElementTree.fromstring(svg.replace('role="img"', ""))
    legends = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert len(legends) == 3  # the base, the model of that name, chance


@pytest.mark.parametrize(
    "name, shown",
    [
        ("a $1 b $2", "a $1 b $2"),
        ("a\\$b", "a\\$b"),
        ("_x", " _x"),
        ("two\nlines", "two lines"),
        ("y" * 40, "y" * 25 + "…"),
        ("", "(no name)"),
    ],
)
def test_a_name_is_shown_as_it_is(name, shown):
    from matplotlib.text import Text

    assert Text(0, 0, plots.plot_text(name))._preprocess_math(plots.plot_text(name)) == (
        shown,
        False,
    )


def test_two_models_of_one_name_both_stand_in_the_legend():
    def figure(v):
        return dict(accuracy=dict(value=v, ci95=[v - 0.05, v + 0.05], n=40))

    metrics = dict(
        main="test",
        models=dict(
            base=dict(test=figure(0.4)), a=dict(test=figure(0.5)), b=dict(test=figure(0.6))
        ),
        names=dict(a="n" * 30 + "1", b="n" * 30 + "2"),
        baselines={},
    )
    assert len(plots.plot_scores(metrics).legends[0].get_texts()) == 3


# Files of evidence


EVIDENCE = assets() / "evidence"


def kept(name):
    return json.loads((EVIDENCE / name).read_text())


def same_row(made, shipped):
    assert json.loads(json.dumps(made)) == shipped


def test_every_file_of_evidence_has_its_command():
    assert {p.name for p in EVIDENCE.glob("*.json")} == set(evidence_files.EVIDENCE)
    commands = {
        file: f"python -m medft.bench.evidence_files {file.removesuffix('.json')}"
        for file in evidence_files.EVIDENCE
    }
    assert all(
        one.command.startswith(commands[file]) for file, one in evidence_files.EVIDENCE.items()
    )
    assert {f"{name}.json" for name in evidence_files.MAKERS} == set(evidence_files.EVIDENCE)
    with pytest.raises(MedftError, match="no such evidence"):
        evidence_files.make_again("nothing")


def test_a_small_try_never_replaces_what_ships():
    for name in evidence_files.MAKERS:
        with pytest.raises(MedftError, match="--out|name the folder"):
            evidence_files.make_again(name, small=True)


def test_an_interrupted_measurement_goes_on(tmp_path, monkeypatch, capsys):
    "The plan's command: what was measured is kept in a file beside, and not measured again."
    shipped = kept("plan.json")
    rows = {f"{row['name']}, {row['engine']}": row for row in shipped["rows"]}
    measured, stop = [], ["llama 30M, LoRA, 32 rows, trl"]

    def plan_row(row):
        if row.key in stop:
            stop.clear()
            raise KeyboardInterrupt
        measured.append(row.key)
        return rows[row.key]

    monkeypatch.setattr(evidence_files, "check_plan_machine", lambda: None)
    monkeypatch.setattr(evidence_files, "plan_row", plan_row)
    monkeypatch.setattr(
        evidence_files, "kernel_row", lambda path, small: dict(bytes=shipped["process"]["notebook"])
    )
    command = ["plan", "--out", str(tmp_path / "plan.json")]
    assert (
        evidence_files.evidence_main(command) == 130
        and "goes on from here" in capsys.readouterr().err
    )
    assert (
        not (tmp_path / "plan.json").exists()
        and len(json.loads((tmp_path / "plan.json.part").read_text())) == 7
    )
    assert evidence_files.evidence_main(command) == 0 and measured == list(rows)
    made = json.loads((tmp_path / "plan.json").read_text())
    assert list(tmp_path.iterdir()) == [tmp_path / "plan.json"]
    assert list(made) == list(shipped) and all(
        made[key] == shipped[key] for key in ("threads", "process", "heap", "rows")
    )


def test_kills_are_written_as_they_were(tmp_path, monkeypatch):
    "From what tests/helpers/killing.py prints, task by task."
    line = dict(task="full", killed="4.36 s", twice=True, resumed="checkpoint-8", differs=[])
    assert list(evidence_files.kill_row(line)) == list(kept("kills.json")["rows"][0])
    assert evidence_files.kill_row(line)["killed"] == "4.36 s, then once more"
    script = tmp_path / "killing.py"
    script.write_text(
        f"import sys\nfor _ in range(int(sys.argv[2]) + 1): print({json.dumps(json.dumps(line))})"
    )
    monkeypatch.setattr(evidence_files, "KILLING", script)
    evidence_files.make_again("kills", out=tmp_path / "kills.json", small=True)
    made = json.loads((tmp_path / "kills.json").read_text())
    assert (
        list(made) == list(kept("kills.json"))
        and made["rows"] == [evidence_files.kill_row(line)] * 2
    )
    script.write_text("raise SystemExit('no checkpoints')")
    with pytest.raises(MedftError, match="full ended early: no checkpoints"):
        evidence_files.make_again("kills", out=tmp_path / "other.json", small=True)
    monkeypatch.setattr(evidence_files, "KILLING", tmp_path / "nowhere.py")
    with pytest.raises(MedftError, match="in a checkout"):
        evidence_files.make_again("kills", out=tmp_path / "other.json", small=True)


def test_the_speeds_are_measured_as_they_were(tmp_path, monkeypatch):
    "Every result of bench.json is asked for with its own settings, scoring and data too."
    shipped = kept("bench.json")
    for file in evidence_files.BENCH_DATA.values():
        (tmp_path / "data" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / file).touch()
    asked = []

    def engines(recipe, overrides, engines, shape, warm, steps, rounds, fresh, say):
        asked.append((recipe, overrides, engines, shape, warm, steps, rounds))
        return next(
            one for one in shipped["runs"] if (one["recipe"], one["shape"]) == (recipe, shape)
        )

    def scoring(recipe, say, overrides, shape, n, dtypes):
        asked.append((recipe, overrides, shape, n, dtypes))
        return shipped["scoring"]

    def data(recipe, overrides, say, rounds):
        asked.append((recipe, overrides, rounds))
        return shipped["data"]

    monkeypatch.setattr(evidence_files, "run_engine_bench", engines)
    monkeypatch.setattr(evidence_files.bench_scoring, "run_scoring_bench", scoring)
    monkeypatch.setattr(evidence_files.bench_data, "run_data_bench", data)
    evidence_files.make_again("bench", tmp_path / "data", tmp_path / "bench.json")
    same_row(json.loads((tmp_path / "bench.json").read_text()), shipped)
    questions = [f"dataset.path={tmp_path / 'data' / 'medmcqa' / 'dev.json'}"]
    assert asked[0] == (
        "medmcqa_tiny",
        questions,
        "trl_default,trl_best,unsloth,fast",
        "llama-160m",
        2,
        4,
        3,
    )
    assert asked[3:] == [
        ("medmcqa_tiny", questions, "llama-160m", 24, ("float32", "bfloat16")),
        ("medmcqa_tiny", questions, 3),
    ]


def test_rows_of_the_trials_are_made_again():
    found = kept("verdicts.json")
    assert set(found) == set(trials.TABLES) and all(found.values())
    same_row(
        trials.simulated_rates(trials.accuracy_world, 200, 1, 2000, disagree=0.2), found["nulls"][0]
    )
    same_row(
        trials.simulated_rates(trials.accuracy_world, 480, times=1000, pairs=trials.BLOCKS[0]),
        found["pairs"][0],
    )
    same_row(trials.coins(10_000)[0], found["coins"][0])


def test_a_row_of_retention_is_made_again():
    world, n, budget, size = retention.WORLDS[0]
    same_row(
        retention.errors(world, n, budget, 2000, size) | dict(group_size=size),
        kept("retention.json")[0],
    )


def test_every_measurement_can_be_printed():
    found = kept("bench.json")
    assert set(found) == {"runs", "scoring", "data"}
    assert (
        len(bench_scoring.scoring_table(found["scoring"])) == len(found["scoring"]["cells"])
        and not bench_data.jobs_table(found["data"]).empty
    )
    for one in found["runs"]:
        assert set(evidence_files.BENCH_DATA) >= {one["data"]} and any(
            "tokens" in line for line in bench_page.bench_text(one)
        )
        assert set(one["settings"]) == set(
            bench.settings_of(load_recipe("quickstart"), 1, 1, 1, False)
        ) and set(one["engines"]) <= set(bench_page.LABELS)


def test_rows_of_the_plan_have_the_parts_that_are_predicted_now():
    from medft.model import families
    from medft.plan import peak_memory as peak

    r, config = load_recipe("quickstart", ["engine=[trl]"]), families.tiny_config("llama2")
    found = kept("plan.json")
    now = peak.predicted(r, config, dict(rows=2, length=16, learned=0.5), "trl")
    assert set(found["process"]) == {"trl", "fast", "notebook"} and 0 < found["heap"] < 1
    for row in found["rows"]:
        assert set(row) - {"use"} == {
            "measured",
            "rows",
            "length",
            "learned",
            "engine",
            "parts",
            "name",
        } and set(row["parts"]) == set(now)
        assert (
            all(type(v) is int for v in row["parts"].values())
            and 0.5 < peak.peak_of_row(row) / row["measured"] < 2
        )


def test_every_row_of_the_plan_has_its_recipe(tmp_path):
    """The recorded recipes give the predicted parts of the kept rows.

    Here of the small ones, in the long test of all."""
    assert_predicted(
        tmp_path, [row for row in evidence_files.ROWS if row.shape in (None, "llama-30m")]
    )


@pytest.mark.long
def test_all_rows_of_the_plan_have_their_recipes(tmp_path):
    assert_predicted(tmp_path, evidence_files.ROWS)


def assert_predicted(folder, rows):
    from medft.model import families
    from medft.model.families import load_config
    from medft.plan import peak_memory as peak

    stored = {f"{row['name']}, {row['engine']}": row for row in kept("plan.json")["rows"]}
    assert [row.key for row in evidence_files.ROWS] == list(stored)
    for row in rows:
        model = None
        if row.shape:
            model = folder / row.shape
            families.shape_config(row.shape).save_pretrained(
                model
            )  # its configuration is enough to predict
        recipe = evidence_files.recipe_of(row, model)
        found = stored[row.key]
        assert found.get("use") == row.use and recipe.training.max_steps == 2
        assert peak.predicted(recipe, load_config(recipe), found, row.engine) == found["parts"], (
            row.key
        )


def test_the_shape_of_a_row_is_that_of_its_recipes_batches(tmp_path):
    """Rows, tokens and the share trained on are those of the batches of the recorded recipe."""
    from medft.core.run import Run
    from medft.data.pipeline import prepare
    from medft.train import baseline as train

    run = Run.create(evidence_files.recipe_of(evidence_files.ROWS[0]), root=tmp_path)
    prepare(run)
    batches = iter(train.trl_trainer(run).get_train_dataloader())
    seen = [
        (*b["input_ids"].shape, float((b["labels"] != -100).float().mean()))
        for b in (next(batches), next(batches))
    ]
    rows, length, _ = max(seen, key=lambda s: s[0] * s[1])
    row = kept("plan.json")["rows"][0]
    assert (rows, length, max(s[2] for s in seen)) == (row["rows"], row["length"], row["learned"])


def test_the_calibration_of_the_plan_is_computed_again():
    found = kept("plan.json")
    again = evidence_files.plan_file(found["rows"], found["process"]["notebook"])
    assert (
        list(again) == list(found)
        and again["process"] == found["process"]
        and again["heap"] == found["heap"]
    )


def test_rows_of_kills_and_benchmarks_have_their_keys():
    found = kept("kills.json")["rows"]
    assert len(found) >= 20 and all(
        set(r) == {"task", "killed", "resumed_from", "equal"} and r["equal"] == "yes" for r in found
    )
    tasks = kept("benchmarks.json")["tasks"]
    assert {t["benchmark"] for t in tasks} == set(benchmarks.FILES) and all(
        t["acc_medft"] == t["acc_lm_eval"] and not t["items_that_differ"] for t in tasks
    )


# The machinery of the tests itself


def test_the_block_on_the_network_blocks(tmp_path):
    "The control of every test that says that nothing left this machine."
    log = tmp_path / "sockets"
    code = """
import socket
for host in ("192.0.2.1", "example.com"):
    try:
        socket.create_connection((host, 9), timeout=1)
        print("open")
    except OSError as e:
        print("blocked" if "blocked" in str(e) else f"not by us: {e}")
server = socket.create_server(("127.0.0.1", 0))
socket.create_connection(server.getsockname(), timeout=5).close()
print("loopback works")
"""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | dict(
        PYTHONPATH=str(TOP / "tests" / "blocked"), MEDFT_SOCKET_LOG=str(log)
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60
    )
    assert done.stdout.split("\n")[:3] == ["blocked", "blocked", "loopback works"], (
        done.stdout + done.stderr
    )
    assert "192.0.2.1" in log.read_text() and "example.com" in log.read_text()


def notebooks():
    return sorted(p for p in (TOP / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in str(p))


def test_no_import_cell_shows_what_another_cell_printed():
    wrong = []
    for path in notebooks():
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] != "code" or not cell.get("outputs"):
                continue
            try:
                body = ast.parse("".join(cell["source"])).body
            except SyntaxError:
                continue
            if body and all(isinstance(line, (ast.Import, ast.ImportFrom)) for line in body):
                wrong.append((path.name, cell["id"]))
    assert not wrong


def test_recipes_and_verbs_that_pages_name_exist():
    from medft.cli.verbs import app
    from medft.core.files import shipped_recipes

    verbs = {c.name or c.callback.__name__.strip("_") for c in app.registered_commands}
    verbs |= {g.name for g in app.registered_groups}
    keys = {
        name: set(field.annotation.model_fields)
        for name, field in Recipe.model_fields.items()
        if hasattr(field.annotation, "model_fields")
    }
    keys.pop("training", None)  # the libraries' own keys stand there too
    recipes = {p.stem for p in shipped_recipes().glob("*.yaml")} | {
        p.stem for p in (TOP / "runs").glob("*.yaml")
    }
    wrong = []
    for path in notebooks():
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] != "markdown":
                continue
            text = "".join(cell["source"])
            shell = "\n".join(re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S))
            for said in re.findall(r"`medft ([a-z][a-z-]+)", text) + re.findall(
                r"^medft ([a-z][a-z-]+)", shell, re.M
            ):
                wrong += [(path.name, cell["id"], f"medft {said}")] * (said not in verbs)
            for said in re.findall(
                r"\bmedft (?:run|plan|bench) ([a-z0-9]+_[a-z0-9_]+)(?![\w./*-])", text
            ):
                wrong += [(path.name, cell["id"], said)] * (said not in recipes)
            for section, key in re.findall(r"`([a-z]+)\.([a-z_0-9]+)(?:[=:.][^`]*)?`", text):
                known = keys.get(section)
                wrong += [(path.name, cell["id"], f"{section}.{key}")] * (
                    known is not None and key not in {*known, "json", "safetensors"}
                )  # export.json and model.safetensors are files
    assert not wrong


def test_on_the_front_page_a_table_follows_its_colon():
    lines = [line for line in (TOP / "README.md").read_text().splitlines() if line.strip()]
    at = next(i for i, line in enumerate(lines) if line.startswith("## Which engine"))
    assert lines[at + 1].endswith(":") and lines[at + 2].startswith("| shape |")
