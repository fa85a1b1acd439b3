"""The report, the card and the record in MLflow give the figures of metrics.json.

For runs that measured much, and for runs that measured little."""

from medft.core.files import read_json, write_json
from medft.core.recipe import load_recipe
from medft.core.run import Run
from medft.evaluate import metrics as ev
from medft.evaluate import plots
from medft.export import model_card as card
from medft.export import report as rp

import json
import re

import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from datasets import Dataset

NASTY = "<script>alert(1)</script> ما هو " + "w" * 300 + " <b>bold</b>"


def F(v, n=80, gap=0.05):
    return dict(value=v, ci95=[v - gap, v + gap], n=n)


def made_run(
    root,
    engines=("trl", "unsloth"),
    others=(),
    subjects=("Anatomy", "Genetics"),
    n=80,
    prompt="Which of these is it?",
    run_id="made",
    **more,
):
    "A scored run without a model: predictions, data, training records."
    run = Run.create(
        load_recipe("quickstart", [f"engine=[{','.join(engines)}]"]), root=root, run_id=run_id
    )
    rng, truth = np.random.default_rng(1), np.arange(n) % 4
    rows = [
        dict(
            id=f"q{i}",
            group=f"q{i}",
            subject=subjects[i % len(subjects)] if subjects else "",
            prompt=f"{prompt} {i}",
            completion="",
            options=[f" option {j}" for j in range(4)],
            answer=int(truth[i]),
        )
        for i in range(n)
    ]
    Dataset.from_list(rows).save_to_disk(run.path / "data" / "test")
    write_json(run.path / "data" / "split.json", dict(test=[r["id"] for r in rows]))
    write_json(
        run.path / "data" / "report.json",
        dict(
            splits=dict(train=640, test=n),
            rows_in=720,
            rows_out=720,
            checks=dict(duplicates=dict(action="warn", count=3, ids=[])),
            hashes={},
        ),
    )
    for who, skill in [("base", 0.5), *((w, 2.5) for w in (*engines, *others))]:
        for part, name in (("", "test"), ("validation", "validation")):
            scores = rng.normal(0, 1, (n, 4)) - 3
            scores[np.arange(n), truth] += skill
            choice = scores.argmax(1)
            frame = pd.DataFrame(
                dict(
                    id=[r["id"] for r in rows],
                    group=[r["group"] for r in rows],
                    subject=[r["subject"] for r in rows],
                    prompt_sha256="x",
                    scores=scores.tolist(),
                    choice=choice,
                    choice_norm=choice,
                    truth=truth,
                    correct=choice == truth,
                )
            )
            path = run.path / "predictions" / part / f"{who}.{name}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            frame.to_parquet(path)
    for e in engines:
        (run.path / e / "adapters").mkdir(parents=True)
        (run.path / e / "log.jsonl").write_text(
            "".join(json.dumps(dict(step=s, loss=3 / s, seconds=s)) + "\n" for s in (1, 2, 3))
        )
        write_json(
            run.path / e / "training.json",
            dict(
                status="finished",
                seconds=12.3,
                steps=3,
                tokens=512,
                tokens_per_second=41.0,
                peak_memory_bytes=10**9,
                trainable_parameters=10,
                total_parameters=100,
                train_loss=1.5,
            ),
        )
    run.update(dict(status="finished"))
    write_json(run.path / "metrics.json", ev.figures(run) | more)
    return run, read_json(run.path / "metrics.json")


def everything(metrics):
    "The keys that only some runs have."
    d = metrics["differences"]["trl"]["test"]
    main = {
        w: dict(test=dict(accuracy=x["test"]["accuracy"])) for w, x in metrics["models"].items()
    }
    return metrics | dict(
        clean=dict(
            flagged=dict(test=7),
            sentence="7 of test are flagged",
            models=main,
            verdict=dict(trl=d | dict(sentence="without 7 near-duplicates, trl is still better")),
        ),
        memorisation=dict(models=dict(trl=dict(exposure=F(4.2), sentence="trl shows no exposure"))),
        retention=dict(
            sets=["old"],
            budget=0.02,
            models=dict(
                trl=dict(
                    old=dict(
                        metric="accuracy",
                        decline=0.01,
                        ci95=[-0.01, 0.03],
                        n=60,
                        groups=60,
                        detectable=0.1,
                        budget=0.02,
                        judged="unclear",
                    )
                )
            ),
        ),
        seeds=dict(
            trl={"42": dict(test=dict(accuracy=F(0.9))), "43": dict(test=dict(accuracy=F(0.88)))}
        ),
        over_seeds=dict(trl=dict(test=d | dict(effects=[0.41, 0.39]))),
        types=dict(test=dict(single={"base": dict(accuracy=F(0.4)), "trl": dict(accuracy=F(0.9))})),
        comparisons=dict(trl=dict(unsloth=d | dict(sentence="trl ties with a further model"))),
        benchmarks=dict(
            medqa=dict(
                task="medqa_4options",
                task_hash="0123abcd",
                lm_eval="0.4.9",
                n=500,
                figures=dict(trl=dict(acc=0.4312)),
            )
        ),
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    run, metrics = made_run(tmp_path_factory.mktemp("made"))
    return run, everything(metrics)


@pytest.fixture(scope="module")
def page(made):
    return rp.report(*made, {})


def said(page):
    return BeautifulSoup(page, "html.parser").get_text(" ")


def titles(page):
    return [h.text for h in BeautifulSoup(page, "html.parser").select("h2")]


def test_everything_that_was_measured_has_its_section(made, page):
    soup = BeautifulSoup(page, "html.parser")
    text = soup.get_text(" ")
    assert titles(page) == [
        "Scores",
        "By subject",
        "Seeds",
        "Calibration",
        "Positions",
        "Retention",
        "Near-duplicates",
        "Memorisation",
        "Further comparisons",
        "Benchmarks",
        "Answers, worst and changed",
        "Training",
        "Data",
        "What ran",
    ]
    for words in (
        "without 7 near-duplicates",
        "no exposure",
        "not ruled out",
        "+41.0, +39.0",
        "further model",
        "0123abcd",
        "0.4312",
        "ECE",
        "duplicates",
    ):
        assert words in text, words
    assert [a["href"] for a in soup.select("nav a")] == [
        f"#{s['id']}" for s in soup.select("section")
    ] and soup.html["lang"] == "en"
    assert (
        all(s["role"] == "img" and s["aria-label"] for s in soup.select("svg"))
        and len(soup.select("svg")) >= 5
    )
    assert (
        len({e["id"] for e in soup.select("section")}) == len(soup.select("section"))
        and [h.name for h in soup.select("h1, h2")].count("h1") == 1
    )


def test_every_figure_of_the_page_is_one_of_metrics_json(made, page):
    _, m = made
    cells = [c.text for c in BeautifulSoup(page, "html.parser").select("#scores td, #subjects td")]
    for who, sets in m["models"].items():
        assert plots.written(sets["test"]["accuracy"], True) in cells, who
        for f in sets["test"].values():
            assert plots.written(f, False) in cells
    for d in m["verdict"].values():
        assert d["sentence"] in said(page)
    for x, gaps in m["subject_differences"]["test"].items():
        for d in gaps.values():
            assert any(
                c.startswith(plots.written(dict(d, value=d["effect"]), True)) for c in cells
            ), x


def test_a_subject_is_compared_as_a_set_of_its_own(made):
    run, m = made
    frames = ev.read_predictions(run)

    def part(w):
        return plots.of_subject(frames[w, "test"], "Anatomy")

    alone, found = (
        ev.compare_predictions(part("base"), part("trl")),
        m["subject_differences"]["test"]["Anatomy"]["trl"],
    )
    assert (
        (alone["effect"], alone["ci95"], alone["n"]) == (found["effect"], found["ci95"], found["n"])
        and found["tests"] == 4
        and found["p_holm"] >= found["p"]
    )


def test_worst_and_changed_answers_are_what_they_are_called(made, page):
    run, m = made
    frames = ev.read_predictions(run)
    base, trl = (frames[w, "test"] for w in ("base", "trl"))
    worst, changed = [
        s.select("article") for s in BeautifulSoup(page, "html.parser").select("#items .answers")
    ]
    assert len(changed) == 10 and len(worst) == min(10, int((~trl.correct).sum()))
    for a in worst:
        assert [
            d.select_one("span")["class"] for d in a.select("dt:-soup-contains('trl') + dd")
        ] == [["wrong"]]
    marks = [
        [a.select(f"dt:-soup-contains('{w}') + dd span")[0]["class"][0] for w in ("base", "trl")]
        for a in changed
    ]
    assert (
        all(x != y for x, y in marks)
        and [m for m in marks if m == ["right", "wrong"]]
        == marks[: sum(m == ["right", "wrong"] for m in marks)]
    )


def test_a_model_that_was_only_evaluated_has_a_page(tmp_path):
    run, m = made_run(tmp_path, engines=(), subjects=())
    page = rp.report(run, m, {})
    assert titles(page) == [
        "Scores",
        "Calibration",
        "Positions",
        "Near-duplicates",
        "Answers, worst and changed",
        "Data",
        "What ran",
    ]
    assert (
        "No model was compared" in page
        and "smallest difference" in page
        and plots.written(m["models"]["base"]["test"]["accuracy"], True) in page
    )


def test_many_models_many_subjects_and_whatever_questions_hold(tmp_path):
    run, m = made_run(
        tmp_path,
        others=[f"other_model_with_a_long_name_{i}" for i in range(8)],
        subjects=[f"Subject {i} <i>{'long ' * 9}" for i in range(60)],
        n=240,
        prompt=NASTY,
    )
    page = rp.report(run, m, {})
    assert (
        not re.search(r"<script|<i>|<b>bold", page)
        and "&lt;script&gt;" in page
        and 'dir="auto"' in page
    )
    soup = BeautifulSoup(page, "html.parser")
    rows = soup.select("#subjects tbody tr")
    assert (
        len(rows) == 60
        and len(soup.select("#subjects svg")) == 1
        and len(soup.select(".verdict")) == 10
    )


def test_benchmarks_show_their_items_without_data_on_disk(made):
    run, m = made
    frame = ev.read_predictions(run)["trl", "test"]
    assert rp.rows_as_scored(run, frame, "medqa") == [] and rp.rows_as_scored(
        run, frame.assign(prompt="P", options=[["a", "b", "c", "d"]] * len(frame)), "medqa"
    )[0] == dict(prompt="P", options=["a", "b", "c", "d"])
    assert rp.rows_as_scored(run, frame.iloc[::-1], "test") == [], (
        "rows in another order are not shown as if they were these"
    )


# the card, and MLflow


def test_card_report_and_metrics_tell_the_same(made, page):
    from huggingface_hub import ModelCard

    run, m = made
    text = card.model_card(run, m, {})
    told = {
        (r.dataset_split, r.metric_name): r.metric_value for r in ModelCard(text).data.eval_results
    }
    cells = [c.text for c in BeautifulSoup(page, "html.parser").select("td")]
    for who in ("trl", "unsloth"):
        f = m["models"][who]["test"]["accuracy"]
        assert (
            told["test", f"accuracy ({who})"] == f["value"]
            and plots.written(f, True) in text
            and plots.written(f, True) in cells
        )
        assert m["verdict"][who]["sentence"] in text and m["verdict"][who]["sentence"] in said(page)
    for words in ("Calibration", "Retention", "Near-duplicates", "Memorisation", "Seeds"):
        assert f"**{words}.**" in text, words
    ece = m["calibration"]["trl"]["test"]["ece"]
    assert plots.written(ece, False) in text and plots.written(ece, False) in cells


def test_a_card_without_them_says_nothing_of_them(tmp_path):
    run, m = made_run(tmp_path, engines=("trl",))
    text = card.model_card(
        run, {k: v for k, v in m.items() if k not in ("calibration", "positions", "clean")}, {}
    )
    assert not re.search(r"\*\*(Calibration|Retention|Near-duplicates|Memorisation|Seeds)", text)


def test_mlflow_has_the_same_figures_and_verdicts(made, monkeypatch, tmp_path):
    from medft.cli.tracking import upload

    run, m = made
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    write_json(run.path / "metrics.json", m)
    mirror = upload(run.path)
    parent = mirror.client.get_run(mirror.notes["runs"]["run"])
    child = mirror.client.get_run(mirror.notes["runs"]["trl"])
    for who, sets in m["models"].items():
        for name, f in sets["test"].items():
            if f["value"] is not None:
                assert parent.data.metrics[f"{who}/test/{name}"] == f["value"], (who, name)
    for e, d in m["verdict"].items():
        assert parent.data.tags[f"verdict.{e}"] == d["label"]
        told = [
            parent.data.metrics.get(f"verdict/{e}/{k}")
            for k in ("effect", "effect_ci_low", "effect_ci_high", "p", "detectable", "n")
        ]
        assert told == [d["effect"], *d["ci95"], d["p"], d["detectable"], d["n"]]
    assert (
        child.data.metrics["verdict/effect"] == m["verdict"]["trl"]["effect"]
        and child.data.metrics["test/ece"] == m["models"]["trl"]["test"]["ece"]["value"]
    )
