"""What a verdict rests on: clusters of rows, finite scores, and evidence files that today's code could have written."""
import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from scipy.stats import norm

from medft import foreseen, group_names, staging, statistics as st, trials, verdicts
from medft.core import MedftError


# Rows that belong to several groups


def pairs(first, second):
    return [f"patient {a} & patient {b}" for a, b in zip(first, second)]


@pytest.mark.parametrize("groups, clusters", [
    (["a & b", "c & b", "d & e"], [0, 0, 1]),                       # the second is shared
    (["a & b", "b & c", "c & d", "x"], [0, 0, 0, 1]),               # first of one, second of another
    ([["a", "b"], ("b",), ["c"]], [0, 0, 1]),                       # lists of names
    (["d1 & f & p", "d2 & g & q", "d3 & h & q"], [0, 1, 1]),        # three identities
    (["", None, float("nan"), "a", "a"], [0, 1, 2, 3, 3]),          # without a group: each alone
    (["document Smith && Sons", "document Smith && Wesson", "document Smith"], [0, 1, 2]),
    ([7, "7", 8], [0, 0, 1]),
    (np.array([[1, 5], [2, 5], [3, 6]]), [0, 0, 1]),
    (np.array([4, 4, 2]), [0, 0, 1]),
    (pd.Series(["a & b", "b & c"]), [0, 0]),
    (range(3), [0, 1, 2]),
])
def test_rows_that_share_any_group_are_one_cluster(groups, clusters):
    code, k = st.owners(groups)
    assert code.tolist() == clusters and k == max(clusters) + 1


def test_a_name_that_holds_the_separator_stays_one_name():
    row = staging.staged(dict(group=["document Smith & Sons", "focus A&B"], question="q", answer="a"), dict(id="1", prompt="q", completion="a"), 1)
    assert group_names.split_group_names(row["group"]) == ["document Smith & Sons", "focus A&B"]
    assert st.owners([row["group"], group_names.join_group_names(["document Smith & Wesson"])])[1] == 2


def test_both_patients_of_a_pair_part_train_and_test():
    rng = np.random.default_rng(0)
    keys = [[f"patient {a}", f"patient {b}"] for a, b in rng.integers(0, 900, (600, 2))]
    sides = staging.sides_of(pa.array(keys, pa.list_(pa.string())), (), 1, .2)
    whose = {side: {name for names, s in zip(keys, sides) if s == side for name in names} for side in ("train", "validation", "test")}
    assert all(whose.values()) and not whose["train"] & whose["test"] and not whose["train"] & whose["validation"] and not whose["test"] & whose["validation"]


def false_alarms(groups_of, times=300, n=500, size=10):
    "How often two models without a difference are told apart; rows of ten resemble each other."
    rng, found = np.random.default_rng(0), 0
    second = np.repeat(np.arange(n//size), size)
    for _ in range(times):
        u, coin = norm.cdf(trials.alike(second, rng)), rng.random(n) < .5
        up, down = u < .1, u > .9
        a, b = np.where(up, False, down | coin), np.where(down, False, up | coin)
        found += verdicts.compare_choices(a, b, groups=groups_of(second))["label"] != "tie"
    return found/times


def test_a_shared_second_patient_raises_no_false_alarms():
    assert false_alarms(lambda second: pairs((f"a{i}" for i in range(500)), second)) <= .065
    assert false_alarms(lambda second: [f"patient a{i}" for i in range(500)]) > .15    # the control: without the second


@pytest.mark.parametrize("world", [trials.accuracy_world, trials.loss_world, trials.seeds_world])
def test_trials_of_pairs(world):
    line = trials.tried(world, 480, times=150, pairs=(10, 1))
    assert line["verdicts"] <= .09 and line["covered"] >= .9    # of so few: the page shows a thousand each


BOTH = dict(
    choices=lambda a, b, g: verdicts.compare_choices(a, b, groups=g),
    sums=lambda a, b, g: verdicts.compare_sums("f1", lambda s: s[..., 0]/s[..., 1], *(np.stack([x, np.ones(len(x))], 1).astype(float) for x in (a, b)), g),
    seeds=lambda a, b, g: verdicts.over_seeds("accuracy", lambda s: s[..., 0]/s[..., 1], *(x for x in (np.stack([a, np.ones(len(a))], 1).astype(float), np.stack([np.stack([np.roll(b, i), np.ones(len(b))], 1) for i in range(3)]).astype(float))), g),
)


@pytest.mark.parametrize("kind", BOTH)
def test_clusters_are_the_same_by_name_and_by_number(kind):
    rng = np.random.default_rng(1)
    a, b, second = rng.random(200) < .5, rng.random(200) < .6, np.repeat(np.arange(20), 10)
    assert BOTH[kind](a, b, pairs(range(1000, 1200), second)) == BOTH[kind](a, b, second)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("groups", [
    np.zeros(400, int), np.arange(400)//134, np.maximum(np.arange(400) - 250, 0), pairs(range(400), range(1, 401)),
], ids=["one", "three", "one of most rows", "a chain"])
def test_few_clusters_are_too_few_to_tell(kind, groups):
    "Every row right after tuning and none before: whoever takes these rows as free is certain."
    rng = np.random.default_rng(0)
    free = BOTH[kind](rng.random(400) < .3, rng.random(400) < .45, np.arange(400))
    rng = np.random.default_rng(0)
    d = BOTH[kind](rng.random(400) < .3, rng.random(400) < .45, groups)
    low, high = d["ci95"]
    assert free["label"] == "better" and "few_groups" not in free and "too few" not in verdicts.sentence(free, "trl")
    assert d["label"] == "tie" and d["few_groups"] < 10 and "too few groups to tell" in verdicts.sentence(d, "trl")
    assert low is None or high - low > 2*(free["ci95"][1] - free["ci95"][0])


def test_few_clusters_make_single_figures_wide():
    hits = np.arange(400) % 5 > 0
    giant = np.maximum(np.arange(400) - 250, 0)
    width = lambda f: f["ci95"][1] - f["ci95"][0]
    assert width(st.share(hits, groups=giant)) > 5*width(st.share(hits))
    mean = dict(accuracy=st.ratio(hits.astype(float), np.ones(400)))
    wide, narrow = (st.valued(mean, g)["accuracy"] for g in (giant, np.arange(400)))
    assert width(wide) > 3*width(narrow) and 0 <= wide["ci95"][0] and wide["ci95"][1] <= 1


def test_a_plan_knows_few_groups():
    code, k = st.owners(pairs(range(40), range(1, 41)))
    few = foreseen.foreseen_of(dict(n=40, groups=k, size=40.0, counted=True))
    assert k == 1 and few["few_groups"] == 1.0 and few["detectable"] == 1.0 and "too few groups to tell" in foreseen.power_in_words("test", few)
    many = foreseen.foreseen_of(dict(n=400, groups=100, size=4.0, counted=True))
    assert "few_groups" not in many and "too few" not in foreseen.power_in_words("test", many)


def test_the_sentence_gives_every_difference_its_unit():
    a, b = np.arange(100) % 2 == 0, np.arange(100) % 3 > 0
    d = verdicts.compare_choices(a, b)
    assert verdicts.sentence(d, "trl").endswith(f"could have shown is {100*d['detectable']:.1f} points")
    assert verdicts.sentence(d | dict(metric="loss"), "trl").endswith("nats per token")
    assert verdicts.sentence(d | dict(detectable=None), "trl").endswith("could have shown is not known")
