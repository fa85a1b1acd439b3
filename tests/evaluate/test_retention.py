"""Forgetting: a budget changes the verdict by non-inferiority.

Its error is what a 95 % interval promises, and the retention set may be of another kind.
"""

from medft.core.files import MedftError, assets
from medft.core.recipe import load_recipe
from medft.core.run import Run
from medft.data import chat_templates
from medft.data import pipeline as data
from medft.evaluate import metrics as ev
from medft.evaluate.measures import forgetting as rt
from medft.evaluate.scoring import predict as scoring
from medft.evaluate.statistics import simulation as trials
from medft.evaluate.statistics.verdicts import sentence
from medft.model.load import load_base

import gzip
import json
from itertools import islice
from types import SimpleNamespace

import numpy as np
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
def test_the_whole_interval_counts_whether_more_or_less_is_better(metric, low, high, said):
    assert rt.judge_retention(*rt.decline(gap(low, high, metric)), 0.02) == said
    d = rt.retained(dict(general=gap(low, high, metric)), {}, 0.02)["general"]
    assert d["judged"] == said
    assert d["ci95"] == [low, high]
    assert d["decline"] == pytest.approx((low + high) / 2)
    assert json.dumps(d)


def test_one_document_shows_nothing():
    no_interval = dict(metric="loss", effect=-0.5, ci95=[None, None])
    assert rt.judge_retention(*rt.decline(no_interval), 0.02) == "unclear"
    one_document = dict(gap(0, 0, "loss"), ci95=[None, None])
    retention = rt.retained(dict(general=one_document), {}, 0.1)
    assert "[–, –]" in rt.with_retention(verdict(), retention, "trl")["sentence"]


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
    gaps = {f"set{i}": gap(*ends) for i, ends in enumerate(sets)}
    d = rt.with_retention(verdict(before), rt.retained(gaps, {}, 0.02), "trl")
    assert (d["label"], d["label_before"]) == (after, before)
    assert set(d["retention"]) == set(gaps)
    assert d["metric"] == "accuracy"
    assert d["effect"] == 0.06
    words = dict(better="is better than", tie="ties with", worse="is worse than")
    assert d["sentence"].startswith(f"trl {words[after]} the base")
    assert all(name in d["sentence"] for name in gaps)
    assert "+6.0 points [3.0, 9.0]" in d["sentence"]


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
    found = rt.retention_figures(run, frames, metrics)
    assert [found["verdict"][w]["label"] for w in ("trl", "fast")] == ["worse", "better"]
    with pytest.raises(MedftError, match="is the only set"):
        rt.retention_figures(run, frames, metrics | dict(main="general"))
    with pytest.raises(MedftError, match="no predictions"):
        rt.retention_figures(run, {}, metrics)


def test_at_the_edge_of_the_budget_retention_is_seldom_shown():
    found = rt.errors(trials.accuracy_world, 400, 0.04, times=600)
    # 2.5 % are expected, of 600
    assert 0.005 <= found["shown"] <= 0.05
    assert 0.005 <= found["forgets"] <= 0.05


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
    tolerance = 3 * np.sqrt(0.025 * 0.975 / times)
    print(found)
    assert found["shown"] <= 0.025 + tolerance + 0.004
    assert found["shown"] >= 0.025 - tolerance - 0.01
    assert found["forgets"] <= 0.025 + tolerance + 0.006


def scored(run, model, tok, noise=0.05):
    "Predictions of the base, and of the base with noise as an engine."
    (run.path / "predictions").mkdir(exist_ok=True)
    torch.manual_seed(0)
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    for who in ("base", "trl"):
        for name in data.scored_sets(run):
            rows = data.load_split(run, name).to_list()
            frame = scoring.predict(model, tok, rows, run.recipe)
            frame.to_parquet(run.path / "predictions" / f"{who}.{name}.parquet")
        with torch.no_grad():
            for p in model.parameters():
                if p.ndim > 1:
                    p.add_(noise * torch.randn_like(p) * p.std())
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(kept[n])
    return ev.figures(run)


@pytest.fixture(scope="module")
def base():
    recipe = load_recipe("quickstart")
    return load_base(recipe), chat_templates.load_tokenizer(recipe)


def few(name, n, to):
    "The first n rows of a starter file."
    lines = (assets() / "starter" / name).read_text(encoding="utf-8").splitlines(keepends=True)
    to.write_text("".join(lines[:n]), encoding="utf-8")
    return to


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    "Running text of two sources."
    words = "zinc iron vitamin deficiency dose of the a and in patients is found".split()
    rng = np.random.default_rng(0)
    rows = [
        dict(
            id=f"t{i}",
            text=" ".join(rng.choice(words, 60)) + ".",
            source=["journal", "textbook"][i % 2],
        )
        for i in range(24)
    ]
    return write_rows(tmp_path_factory.mktemp("texts") / "text.jsonl", rows)


def tuned_on_questions(tmp_path, *keys):
    train = few("train.jsonl", 60, tmp_path / "train.jsonl")
    test = few("test.jsonl", 40, tmp_path / "test.jsonl")
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
    assert m["main"] == "test"
    assert d["metric"] == "accuracy"
    assert d["retention"]["a_general"]["metric"] == "loss"
    assert d["retention"]["a_general"]["judged"] in rt.JUDGED
    assert d["label_before"]
    assert {"loss", "perplexity", "bits_per_byte"} <= set(m["models"]["trl"]["a_general"])
    assert "accuracy" in m["models"]["trl"]["test"]
    assert set(m["subjects"]["a_general"]) == {"journal", "textbook"}
    assert m["subjects"]["a_general"]["journal"]["trl"]["loss"]["n"] == 12
    assert "a_general" in d["sentence"]
    assert json.dumps(m["retention"])
    assert m["retention"]["budget"] == 0.01
    keys = [f"dataset.sets={{a_general: {texts}}}", "evaluation.retention=[a_general]"]
    without_budget = ev.figures(Run(run.path, load_recipe("quickstart", keys)))
    assert "label_before" not in without_budget["verdict"]["trl"]
    assert "judged" not in without_budget["retention"]["models"]["trl"]["a_general"]


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
    assert m["main"] == "test"
    assert m["verdict"]["trl"]["metric"] == "loss"
    assert m["retention"]["models"]["trl"]["asked"]["metric"] == "accuracy"
    assert m["verdict"]["trl"]["retention"]["asked"]["judged"]


def test_a_retention_set_has_its_own_labels(tmp_path, base):
    notes = [
        dict(text=f"note {i} says {'fine' if i % 2 else 'ill'}", label=["well", "sick"][i % 2])
        for i in range(12)
    ]
    path = write_rows(tmp_path / "labelled.jsonl", notes)
    run = tuned_on_questions(
        tmp_path, f"dataset.sets={{moods: {path}}}", "evaluation.retention=[moods]"
    )
    rows = data.load_split(run, "moods").to_list()
    assert len(rows) == 12
    assert {tuple(o.strip() for o in r["options"]) for r in rows}
    assert all(len(r["options"]) == 2 for r in rows)


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
    assert report["splits"]["asked"] == 20 == len(data.load_split(run, "asked"))
    assert report["splits"]["train"]
    assert {"asked", "test"} == set(data.scored_sets(run))
    assert report["rows_out"] == sum(report["splits"].values())
    m = scored(run, *base)
    assert m["main"] == "test"
    assert m["retention"]["models"]["trl"]["asked"]["metric"] == "accuracy"


@on_real_rows
def test_real_articles_and_chapters_are_told_apart_by_source(tmp_path, base, folder):
    n = 9 if folder == SMALL else 10  # four articles are shipped
    rows = []
    for name in ("plos_articles", "openstax_ap2e"):
        with gzip.open(folder / f"cpt_text/{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            for row in map(json.loads, islice(lines, 5)):
                rows.append(dict(id=row["id"], text=row["text"][:1500], source=row["source"]))
    path = write_rows(tmp_path / "cpt.jsonl", rows)
    run = tuned_on_questions(
        tmp_path,
        f"dataset.sets={{books: {path}}}",
        "evaluation.retention=[books]",
        "evaluation.forgetting=0.2",
    )
    m = scored(run, *base)
    assert len(m["subjects"]["books"]) == 2
    assert sum(s["base"]["loss"]["n"] for s in m["subjects"]["books"].values()) == n
    assert m["verdict"]["trl"]["retention"]["books"]["n"] == n
    whole = m["models"]["base"]["books"]["loss"]["value"]
    by_source = [s["base"]["loss"]["value"] for s in m["subjects"]["books"].values()]
    assert min(by_source) <= whole <= max(by_source)
