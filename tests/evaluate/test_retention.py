"""Forgetting: a budget turns the verdict by non-inferiority, its error is what a 95 % interval promises, and the set may be of another kind."""

from medft.core.run import MedftError, Run, assets, load_recipe
from medft.data import pipeline as data
from medft.evaluate import metrics as ev
from medft.evaluate.measures import forgetting as rt
from medft.evaluate.scoring import predict as scoring
from medft.evaluate.statistics import simulation as trials
from medft.evaluate.statistics.verdicts import compare_choices, compare_text, sentence
from medft.model.load import load_base

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from real_data import SMALL, on_real_rows

SET = ["dataset.sets={general: x.jsonl}", "evaluation.retention=[general]"]


def gap(low, high, metric="accuracy", n=300):
    ends = (low, high) if metric == "loss" else (-high, -low)
    return dict(
        label="tie",
        metric=metric,
        effect=sum(ends) / 2,
        ci95=list(ends),
        p=0.5,
        n=n,
        detectable=0.03,
        test="McNemar",
    )


def verdict(label="better"):
    d = dict(
        label=label,
        metric="accuracy",
        effect=0.06,
        ci95=[0.03, 0.09],
        p=0.001,
        n=400,
        detectable=0.05,
        test="McNemar",
    )
    return d | dict(sentence=sentence(d, "trl"))


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
@pytest.mark.parametrize(
    "low, high, said",
    [
        (-0.05, -0.01, "shown"),
        (-0.01, 0.02, "shown"),
        (0, 0, "shown"),
        (-0.01, 0.0201, "unclear"),
        (0.01, 0.03, "unclear"),
        (0.02, 0.05, "unclear"),
        (0.0201, 0.05, "forgets"),
    ],
)
def test_the_whole_interval_counts_whichever_way_a_figure_runs(metric, low, high, said):
    assert rt.judge(*rt.decline(gap(low, high, metric)), 0.02) == said
    d = rt.retained(dict(general=gap(low, high, metric)), {}, 0.02)["general"]
    assert (
        d["judged"] == said
        and d["ci95"] == [low, high]
        and d["decline"] == pytest.approx((low + high) / 2)
        and json.dumps(d)
    )


def test_one_document_shows_nothing():
    assert (
        rt.judge(*rt.decline(dict(metric="loss", effect=-0.5, ci95=[None, None])), 0.02)
        == "unclear"
        and "[–, –]"
        in rt.turned(
            verdict(),
            rt.retained(dict(g=dict(gap(0, 0, "loss"), ci95=[None, None])), {}, 0.1),
            "trl",
        )["sentence"]
    )


@pytest.mark.parametrize(
    "before, sets, after",
    [
        ("better", [(-0.01, 0.01)], "better"),
        ("better", [(-0.01, 0.03)], "tie"),
        ("better", [(0.03, 0.05)], "worse"),
        ("tie", [(-0.01, 0.01)], "tie"),
        ("tie", [(-0.01, 0.03)], "tie"),
        ("tie", [(0.03, 0.05)], "worse"),
        ("worse", [(-0.01, 0.01)], "worse"),
        ("better", [(-0.01, 0.01), (-0.01, 0.03)], "tie"),
        ("better", [(-0.01, 0.03), (0.03, 0.05)], "worse"),
        ("better", [(-0.01, 0.01), (0.03, 0.05)], "worse"),
    ],
)
def test_every_set_must_pass(before, sets, after):
    d = rt.turned(
        verdict(before),
        rt.retained({f"set{i}": gap(*ends) for i, ends in enumerate(sets)}, {}, 0.02),
        "trl",
    )
    assert (
        (d["label"], d["label_before"]) == (after, before)
        and set(d["retention"]) == {f"set{i}" for i in range(len(sets))}
        and d["metric"] == "accuracy"
        and d["effect"] == 0.06
    )
    assert (
        d["sentence"].startswith(
            f"trl {dict(better='is better than', tie='ties with', worse='is worse than')[after]} the base"
        )
        and all(f"set{i}" in d["sentence"] for i in range(len(sets)))
        and "+6.0 points [3.0, 9.0]" in d["sentence"]
    )


@pytest.mark.parametrize(
    "keys, said",
    [
        (["evaluation.retention=[genral]"], "did you mean 'general'"),
        (["evaluation.forgetting=-0.1"], "greater than or equal to 0, found -0.1"),
        (["evaluation.retention=[]", "evaluation.forgetting=0.1"], "say on which sets"),
        (["dataset.test_path=null", "dataset.holdout=0"], "a set of its own"),
        (["dataset.sets={}"], "none of dataset.sets"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_recipe(keys, said):
    with pytest.raises(MedftError, match=said):
        load_recipe("quickstart", SET + keys)
    assert load_recipe("quickstart", SET + ["evaluation.forgetting=0"]).evaluation.forgetting == 0


def test_it_is_refused_before_a_run_has_a_folder(tmp_path):
    from medft.cli.arguments import planned

    with pytest.raises(MedftError, match="evaluation.retention"):
        planned(
            "quickstart",
            ["evaluation.retention=[nowhere]", f"output.dir={tmp_path}/runs"],
            None,
            None,
        )
    assert not list(tmp_path.iterdir())


def test_the_verdict_over_seeds_is_held_against_retention_over_seeds():
    run = SimpleNamespace(recipe=load_recipe("quickstart", SET + ["evaluation.forgetting=0.02"]))
    frames = {("base", "general"): None}
    metrics = dict(
        main="test",
        names={},
        verdict=dict(trl=verdict(), fast=verdict()),
        differences=dict(trl=dict(general=gap(-0.01, 0.01)), fast=dict(general=gap(-0.01, 0.01))),
        over_seeds=dict(trl=dict(general=gap(0.03, 0.05))),
    )
    found = rt.judged(run, frames, metrics)
    assert [found["verdict"][w]["label"] for w in ("trl", "fast")] == ["worse", "better"]
    with pytest.raises(MedftError, match="is the only set"):
        rt.judged(run, frames, metrics | dict(main="general"))
    with pytest.raises(MedftError, match="no predictions"):
        rt.judged(run, {}, metrics)


def test_at_the_edge_of_the_budget_retention_is_seldom_shown():
    found = rt.errors(trials.accuracy_world, 400, 0.04, times=600)
    assert 0.005 <= found["shown"] <= 0.05 and 0.005 <= found["forgets"] <= 0.05  # 2.5 %, of 600


@pytest.mark.long
@pytest.mark.parametrize(
    "world, n, budget, size, times",
    [
        (trials.accuracy_world, 500, 0.05, 1, 4000),
        (trials.accuracy_world, 1273, 0.02, 1, 4000),
        (trials.accuracy_world, 600, 0.05, 4, 4000),
        (trials.loss_world, 500, 0.05, 1, 1000),
        (trials.loss_world, 600, 0.05, 4, 1000),
    ],
)
def test_non_inferiority_keeps_its_error(world, n, budget, size, times):
    found = rt.errors(world, n, budget, times=times, size=size)
    room = 3 * np.sqrt(0.025 * 0.975 / times)
    print(found)
    assert (
        found["shown"] <= 0.025 + room + 0.004
        and found["shown"] >= 0.025 - room - 0.01
        and found["forgets"] <= 0.025 + room + 0.006
    )


def scored(run, model, tok, noise=0.05):
    "Predictions of the base, and of the base with noise as an engine."
    (run.path / "predictions").mkdir(exist_ok=True)
    torch.manual_seed(0)
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    for who in ("base", "trl"):
        for name in data.scored_sets(run):
            scoring.predict(
                model, tok, data.load_split(run, name).to_list(), run.recipe
            ).to_parquet(run.path / "predictions" / f"{who}.{name}.parquet")
        with torch.no_grad():
            [
                p.add_(noise * torch.randn_like(p) * p.std())
                for p in model.parameters()
                if p.ndim > 1
            ]
    with torch.no_grad():
        [p.copy_(kept[n]) for n, p in model.named_parameters()]
    return ev.figures(run)


@pytest.fixture(scope="module")
def base():
    recipe = load_recipe("quickstart")
    return load_base(recipe), data.load_tokenizer(recipe)


def few(path, n, to):
    to.write_text(
        "".join(
            (assets() / "starter" / path).read_text(encoding="utf-8").splitlines(keepends=True)[:n]
        ),
        encoding="utf-8",
    )
    return to


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    "Running text of two sources."
    at = tmp_path_factory.mktemp("texts") / "text.jsonl"
    words = "zinc iron vitamin deficiency dose of the a and in patients is found".split()
    rng = np.random.default_rng(0)
    at.write_text(
        "".join(
            json.dumps(
                dict(
                    id=f"t{i}",
                    text=" ".join(rng.choice(words, 60)) + ".",
                    source=["journal", "textbook"][i % 2],
                )
            )
            + "\n"
            for i in range(24)
        )
    )
    return at


def tuned_on_questions(tmp_path, *keys):
    train, test = (
        few(f"{n}.jsonl", k, tmp_path / f"{n}.jsonl") for n, k in (("train", 60), ("test", 40))
    )
    r = load_recipe(
        "quickstart",
        [
            f"dataset.path={train}",
            f"dataset.test_path={test}",
            "dataset.validation_path=null",
            "evaluation.shuffles=0",
            "tracking.mlflow=false",
            *keys,
        ],
    )
    run = Run.create(r, root=tmp_path / "runs")
    data.prepare(run)
    return run


def test_running_text_may_be_what_questions_must_not_unlearn(tmp_path, base, texts):
    run = tuned_on_questions(
        tmp_path,
        f"dataset.sets={{a_general: {texts}}}",
        "dataset.schema=medmcqa",
        "evaluation.retention=[a_general]",
        "evaluation.forgetting=0.01",
    )
    m = scored(run, *base)
    d = m["verdict"]["trl"]
    assert (
        m["main"] == "test"
        and d["metric"] == "accuracy"
        and d["retention"]["a_general"]["metric"] == "loss"
        and d["retention"]["a_general"]["judged"] in rt.JUDGED
        and d["label_before"]
    )
    assert (
        {"loss", "perplexity", "bits_per_byte"} <= set(m["models"]["trl"]["a_general"])
        and "accuracy" in m["models"]["trl"]["test"]
        and set(m["subjects"]["a_general"]) == {"journal", "textbook"}
    )
    assert (
        m["subjects"]["a_general"]["journal"]["trl"]["loss"]["n"] == 12
        and "a_general" in d["sentence"]
        and json.dumps(m["retention"])
        and m["retention"]["budget"] == 0.01
    )
    strict = ev.figures(
        Run(
            run.path,
            load_recipe(
                "quickstart",
                [f"dataset.sets={{a_general: {texts}}}", "evaluation.retention=[a_general]"],
            ),
        )
    )
    assert (
        "label_before" not in strict["verdict"]["trl"]
        and "judged" not in strict["retention"]["models"]["trl"]["a_general"]
    )  # shown, not judged


def test_questions_may_be_what_a_text_must_not_unlearn(tmp_path, base, texts):
    questions = few("never_read.jsonl", 20, tmp_path / "questions.jsonl")
    r = load_recipe(
        "quickstart",
        [
            "model.task=pretraining",
            f"dataset.path={texts}",
            "dataset.test_path=null",
            "dataset.validation_path=null",
            "dataset.holdout=0.3",
            f"dataset.sets={{asked: {questions}}}",
            "dataset.checks.near_overlap=off",
            "evaluation.retention=[asked]",
            "evaluation.forgetting=0.5",
            "evaluation.shuffles=0",
            "tracking.mlflow=false",
        ],
    )
    run = Run.create(r, root=tmp_path / "runs")
    data.prepare(run)
    m = scored(run, *base)
    assert (
        m["main"] == "test"
        and m["verdict"]["trl"]["metric"] == "loss"
        and m["retention"]["models"]["trl"]["asked"]["metric"] == "accuracy"
        and m["verdict"]["trl"]["retention"]["asked"]["judged"]
    )


def test_a_retention_set_has_its_own_labels(tmp_path, base):
    at = tmp_path / "labelled.jsonl"
    at.write_text(
        "".join(
            json.dumps(
                dict(
                    text=f"note {i} says {'fine' if i % 2 else 'ill'}",
                    label=["well", "sick"][i % 2],
                )
            )
            + "\n"
            for i in range(12)
        )
    )
    run = tuned_on_questions(
        tmp_path, f"dataset.sets={{moods: {at}}}", "evaluation.retention=[moods]"
    )
    rows = data.load_split(run, "moods").to_list()
    assert (
        len(rows) == 12
        and {tuple(o.strip() for o in r["options"]) for r in rows}
        and all(len(r["options"]) == 2 for r in rows)
    )


def test_a_packed_corpus_takes_a_retention_set_beside_it(tmp_path, base, texts):
    from medft.data.prepare.corpus import prepare_corpus

    prepare_corpus(
        [str(texts)],
        tmp_path / "corpus",
        tell=lambda line: None,
        model="tiny-base",
        max_length=64,
        holdout=0.2,
        similarity=0.0,
    )
    questions = few("never_read.jsonl", 20, tmp_path / "questions.jsonl")
    r = load_recipe(
        "quickstart",
        [
            "model.task=pretraining",
            f"dataset.path={tmp_path}/corpus",
            "training.max_length=64",
            "dataset.test_path=null",
            "dataset.validation_path=null",
            f"dataset.sets={{asked: {questions}}}",
            "evaluation.retention=[asked]",
            "evaluation.shuffles=0",
            "tracking.mlflow=false",
        ],
    )
    run = Run.create(r, root=tmp_path / "runs")
    report = data.prepare(run)
    assert (
        report["splits"]["asked"] == 20 == len(data.load_split(run, "asked"))
        and report["splits"]["train"]
        and {"asked", "test"} == set(data.scored_sets(run))
        and report["rows_out"] == sum(report["splits"].values())
    )
    m = scored(run, *base)
    assert m["main"] == "test" and m["retention"]["models"]["trl"]["asked"]["metric"] == "accuracy"


@on_real_rows
def test_real_articles_and_chapters_are_told_apart_by_source(tmp_path, base, folder):
    import gzip

    at = tmp_path / "cpt.jsonl"
    n = 9 if folder == SMALL else 10  # four articles are shipped
    with at.open("w") as out:
        for name in ("plos_articles", "openstax_ap2e"):
            with gzip.open(folder / f"cpt_text/{name}.jsonl.gz", "rt") as f:
                for line, _ in zip(f, range(5)):
                    d = json.loads(line)
                    out.write(
                        json.dumps(dict(id=d["id"], text=d["text"][:1500], source=d["source"]))
                        + "\n"
                    )
    run = tuned_on_questions(
        tmp_path,
        f"dataset.sets={{books: {at}}}",
        "evaluation.retention=[books]",
        "evaluation.forgetting=0.2",
    )
    m = scored(run, *base)
    assert (
        len(m["subjects"]["books"]) == 2
        and sum(s["base"]["loss"]["n"] for s in m["subjects"]["books"].values()) == n
        and m["verdict"]["trl"]["retention"]["books"]["n"] == n
    )
    whole = m["models"]["base"]["books"]["loss"]["value"]
    assert (
        min(p := [s["base"]["loss"]["value"] for s in m["subjects"]["books"].values()])
        <= whole
        <= max(p)
    )
