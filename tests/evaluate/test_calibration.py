"""Calibration: figures as in scikit-learn, and a temperature from validation rows alone.

The test rejects a calibrated model no more often than its level allows.
"""

from medft.evaluate.measures import calibration as cal
from medft.evaluate.measures.classification import measure_labels
from medft.evaluate.scoring.predict import choose

import json
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy.special import softmax
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve


def options(n=500, seed=0, brag=2.0, twins=1, k=4):
    "A model that knows its probabilities and states them sharpened; `twins`: copies of each row."
    rng = np.random.default_rng(seed)
    z = np.repeat(rng.normal(0, 1.5, (n // twins, k)), twins, 0)
    cumulative = softmax(z[::twins], 1).cumsum(1)
    truth = np.repeat((rng.random(n // twins)[:, None] > cumulative).sum(1), twins)
    f = pd.DataFrame(
        dict(
            id=range(n),
            group=[f"g{i // twins}" for i in range(n)],
            scores=(brag * z - 9).tolist(),
            truth=truth,
            choice=z.argmax(1),
        )
    )
    return f.assign(correct=f.choice == f.truth)


def labels(n=500, seed=0, k=2):
    f = options(n, seed, k=k)
    return choose(
        f.assign(
            subject="", prompt_sha256="", probabilities=softmax(np.stack(f.scores), 1).tolist()
        )
    )


ONES = np.ones((1, 500))


@pytest.mark.parametrize("k", [2, 4])
def test_figures_are_those_of_scikit_learn(k):
    f = options(k=k)
    p = cal.probabilities(f)
    made = cal.proper_scores(f.truth.to_numpy(), p)
    all_labels = dict(labels=range(k))
    if k == 2:
        brier = sk.brier_score_loss(f.truth, p[:, 1])
    else:
        brier = sk.brier_score_loss(f.truth, p, **all_labels)
    assert np.isclose(made["brier"](ONES)[0], brier)
    assert np.isclose(made["log_loss"](ONES)[0], sk.log_loss(f.truth, p, **all_labels))
    w = np.random.default_rng(0).integers(0, 3, (1, 500)).astype(float)
    weighted = sk.log_loss(f.truth, p, sample_weight=w[0], **all_labels)
    assert np.isclose(made["log_loss"](w)[0], weighted)
    assert np.isclose(made["brier"](np.ones((3, 500)))[2], made["brier"](ONES)[0])


def by_hand(stated, came_true, bins):
    "The textbook's loop: equally many rows a bin, by the quantiles of what was stated."
    cuts = np.quantile(stated, np.linspace(0, 1, bins + 1))
    cuts[0], cuts[-1] = -np.inf, np.inf
    total = 0
    for low, high in pairwise(cuts):
        rows = [i for i, s in enumerate(stated) if low < s <= high]
        total += abs(sum(stated[i] for i in rows) - sum(came_true[i] for i in rows))
    return total / len(stated)


@pytest.mark.parametrize("n, bins", [(500, 12), (2000, 15), (90, 2), (30, 2)])
def test_error_and_bins_by_another_way(n, bins):
    f = options(n)
    s, h = cal.stated_probabilities(f, cal.probabilities(f))
    found = cal.reliability(s, h, f.group.to_numpy())
    assert np.isclose(cal.ece(s, h)(np.ones((1, n)))[0], by_hand(s, h, bins))
    assert len(found) == bins
    true, mean = calibration_curve(h, s, n_bins=bins, strategy="quantile")
    assert np.allclose([b["accuracy"] for b in found], true, atol=1e-6)
    assert np.allclose([b["confidence"] for b in found], mean, atol=1e-6)
    assert sum(b["n"] for b in found) == n
    for b in found:
        assert b["low"] <= b["confidence"] <= b["high"]
        assert b["ci95"][0] <= b["accuracy"] <= b["ci95"][1]
    assert all(a["high"] < b["low"] for a, b in pairwise(found))


def test_rows_that_state_the_same_are_never_parted():
    assert len(set(cal.assign_bins(np.full(300, 0.5)))) == 1
    s = np.repeat([0.3, 0.6, 0.9], 200)
    assert [len(set(cal.assign_bins(s)[s == x])) for x in (0.3, 0.6, 0.9)] == [1, 1, 1]


def test_what_is_stated_is_the_second_label_or_the_choice():
    two = labels()
    p = cal.probabilities(two)
    s, h = cal.stated_probabilities(two, p)
    assert np.allclose(p, np.stack(two.probabilities))
    assert (s == p[:, 1]).all()
    assert (h == (two.truth == 1)).all()
    moved = choose(two, 0.9)
    assert (cal.stated_probabilities(moved, p)[1] == h).all()  # whatever the threshold
    many = labels(k=3)
    p = cal.probabilities(many)
    assert (cal.stated_probabilities(many, p)[1] == many.correct).all()
    pair = options(k=2)
    p = cal.probabilities(pair)
    assert (cal.stated_probabilities(pair, p)[0] >= 0.5).all()
    assert (cal.stated_probabilities(pair, p)[1] == pair.correct).all()
    rule = pd.DataFrame(dict(probabilities=[[1.0, 0.0]] * 60, truth=[0, 1] * 30, group=range(60)))
    assert np.isclose(cal.calibration_figures(rule)["ece"]["value"], 0.5)
    assert cal.calibration_figures(rule)["log_loss"]["value"] > 10


def test_questions_with_fewer_options():
    f = pd.DataFrame(
        dict(
            scores=[[-1.0, -2.0], [-1.0, -2.0, -3.0, -4.0], [-5.0, -1.0, -1.0]],
            truth=[0, 3, 1],
            group=list("abc"),
        )
    )
    p = cal.probabilities(f)
    assert np.allclose(p.sum(1), 1)
    assert (p[0, 2:] == 0).all()
    assert np.allclose(p[0, :2], softmax([-1, -2]))
    assert np.isfinite(cal.fit_temperature(f))
    assert all(np.isfinite(x["value"]) for x in cal.calibration_figures(f).values())


def log_loss_at(frame, temperature):
    return sk.log_loss(frame.truth, cal.probabilities(frame, temperature), labels=range(4))


def test_temperature_is_the_minimum_of_the_log_loss_and_changes_no_choice():
    for brag in (0.5, 1.0, 3.0):
        f = options(brag=brag)
        t = cal.fit_temperature(f)
        assert abs(t - brag) < 0.35 * brag
        for x in (0.9, 0.99, 1.01, 1.1):
            assert log_loss_at(f, t) <= log_loss_at(f, t * x) + 1e-9
        assert (cal.probabilities(f, t).argmax(1) == f.choice).all()
    assert cal.fit_temperature(f.assign(truth=f.choice)) is None  # lower is always better
    lost = f.assign(truth=(f.choice + 1) % 4)
    assert 3 < cal.fit_temperature(lost) < 100.1


def run_of(path, **validation):
    (path / "predictions" / "validation").mkdir(parents=True)
    for who, f in validation.items():
        f.to_parquet(path / "predictions" / "validation" / f"{who}.validation.parquet")
    return SimpleNamespace(
        path=path, recipe=SimpleNamespace(evaluation=SimpleNamespace(confidence=0.95))
    )


def test_a_run_takes_its_temperature_from_validation_alone(tmp_path):
    run = run_of(tmp_path, trl=options(300, seed=7))
    other = options(seed=1, brag=1.0)
    made = cal.calibration_part(
        run,
        {
            ("trl", "test"): options(),
            ("trl", "never_read"): other,
            ("base", "test"): other,
            ("trl", "texts"): pd.DataFrame(dict(nll=[1.0])),
        },
        {},
    )["calibration"]
    json.dumps(made, allow_nan=False)
    assert set(made["trl"]) == {"test", "never_read"}
    assert (
        made["trl"]["test"]["temperature"]
        == made["trl"]["never_read"]["temperature"]
        == round(cal.fit_temperature(options(300, seed=7)), 6)
    )
    assert made["base"]["test"]["temperature"] is None
    assert not [k for k in made["base"]["test"] if "scaled" in k]
    one = made["trl"]["test"]
    stated = cal.stated_probabilities(options(), cal.probabilities(options()))
    assert one["ece"]["value"] == round(cal.ece(*stated)(ONES)[0], 6)
    cool = cal.probabilities(options(), one["temperature"])
    brier = sk.brier_score_loss(options().truth, cool, labels=range(4))
    assert np.isclose(one["brier_scaled"]["value"], brier, atol=1e-5)
    assert one["brier_scaled"]["value"] < one["brier"]["value"]
    assert one["ece"]["p"] < 0.01 < one["ece_scaled"]["p"]
    assert one["ece_scaled"]["ci95"][0] == 0 < one["ece"]["ci95"][0]
    assert "labels" not in one
    assert cal.calibration_part(run, {("trl", "texts"): pd.DataFrame(dict(nll=[1.0]))}, {}) == {}


def test_labels_have_their_error_among_their_figures():
    two = labels()
    four = labels(k=4)
    for f in (two, four):
        found = measure_labels(f)
        alone = cal.calibration_figures(f)
        assert all(found[m] == alone[m] for m in ("brier", "log_loss", "ece"))
    each = cal.measure_calibration(four)["labels"]
    p = np.stack(four.probabilities)
    expected = [by_hand(p[:, j], (four.truth == j).to_numpy(float), 12) for j in range(4)]
    assert np.allclose(each, expected, atol=1e-6)
    assert "labels" not in cal.measure_calibration(two)


def test_an_interval_holds_its_value_and_one_group_has_none():
    for f in (options(), options(brag=1.0), options(40), options(400, twins=4)):
        e = cal.calibration_figures(f)["ece"]
        assert e["ci95"][0] <= e["value"] <= e["ci95"][1]
    for f in (options(300, brag=9.0), labels(300, k=2)):
        b = cal.calibration_figures(f.assign(truth=(f.truth + 1) % 2))["brier"]
        assert b["ci95"][0] <= b["value"] <= b["ci95"][1]
    alone = cal.calibration_figures(options(8).assign(group="one patient"))
    assert all(f["ci95"] == [None, None] for f in alone.values())


def alarms(times, twins, brag=1.0):
    "The rate of p < 0.05."
    found = 0
    for seed in range(times):
        f = options(400, seed, brag, twins)
        stated = cal.stated_probabilities(f, cal.probabilities(f))
        found += cal.calibration_p(*stated, f.group) < 0.05
    return found / times


def test_copies_of_a_row_are_no_evidence():
    assert alarms(25, 4) <= 0.2
    assert alarms(5, 4, brag=3.0) == 1


@pytest.mark.long
def test_a_calibrated_model_is_rejected_in_one_of_twenty():
    assert 0.02 <= alarms(400, 1) <= 0.08
    assert 0.015 <= alarms(400, 4) <= 0.085


@pytest.mark.long
@pytest.mark.parametrize("brag", [1.0, 1.3, 2.0])
def test_intervals_of_the_error_cover_it(brag):
    whole = options(400_000, 99, brag)
    stated = cal.stated_probabilities(whole, cal.probabilities(whole))
    real = cal.ece(*stated)(np.ones((1, len(whole))))[0]
    covered = 0
    for seed in range(200):
        low, high = cal.calibration_figures(options(400, seed, brag))["ece"]["ci95"]
        covered += low - 0.002 <= real <= high
    # 0.87 to 0.94 in 300 tries each: a figure that is never below 0 is skewed
    assert covered / 200 >= 0.85
