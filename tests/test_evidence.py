"""What a verdict rests on: clusters of rows, finite scores, and evidence files that today's code could have written."""
import json
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from scipy.stats import norm

from medft import agreement, answers, calibration, classes, diagrams, evaluate, exposure, foreseen, forest, group_names, pictures, scored, scoring, staging
from medft import statistics as st, trials, verdicts
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


# Scores that are numbers


NAN, INF = float("nan"), float("inf")
WRONG = [[NAN]*4, [-9., NAN, -1., -2.], [NAN, -1., -2., -3.], [-1., INF, -2., -3.], [-INF]*4]
ITEMS = [dict(id=f"q{i}", group=f"q{i}", prompt="p", options=["a", "b", "c", "d"], answer=0) for i in range(3)]
RIGHT = [-1., -2., -3., -4.]


@pytest.mark.parametrize("scores", WRONG)
def test_nothing_is_chosen_from_scores_that_are_no_numbers(scores):
    with pytest.raises(MedftError, match="item q1"):
        scoring.as_chosen(ITEMS, [RIGHT, scores, RIGHT])
    with pytest.raises(MedftError, match="item q1 .*1 more"):
        scoring.as_chosen(ITEMS, [RIGHT, scores, scores])


def test_one_impossible_option_is_never_chosen_and_has_its_figures():
    frame = scoring.as_chosen(ITEMS, [RIGHT, [-INF, -2., -3., -4.], [-5., -INF, -1., -2.]])
    assert frame.choice.tolist() == [0, 1, 2]
    found = evaluate.measure(frame)
    assert found["accuracy"]["value"] == round(1/3, 6) and all(np.isfinite(found[m]["value"]) for m in ("brier", "log_loss", "ece"))
    assert calibration.fit_temperature(frame.assign(truth=[0, 0, 0])) > 0      # one truth was ruled out


def labelled(p):
    return pd.DataFrame(dict(id=["a", "b"], group=["a", "b"], subject="", prompt_sha256="", probabilities=[[.4, .6], p], truth=[1, 0]))


def chosen_frame(scores=RIGHT):
    frame = scoring.as_chosen(ITEMS, [RIGHT, RIGHT, RIGHT])
    return frame.assign(scores=[RIGHT, scores, RIGHT])


def text_frame(nll=3.):
    return pd.DataFrame(dict(id=["a", "b"], group=["a", "b"], subject="", prompt_sha256="", nll=[2., nll], tokens=[2, 3], bytes=[8, 12]))


REFUSED = dict(
    choose=lambda: scoring.choose(labelled([NAN, NAN])),
    threshold=lambda: classes.best_threshold([0, 1, 1], [.2, NAN, .4]),
    measure=lambda: evaluate.measure(chosen_frame([NAN]*4)),
    measure_labels=lambda: evaluate.measure(labelled([NAN, .5]).assign(choice=0, correct=True)),
    measure_text=lambda: evaluate.measure(text_frame(NAN)),
    infinite_loss=lambda: evaluate.measure(text_frame(INF)),
    compare=lambda: evaluate.compare(text_frame(), text_frame(NAN)),
    probabilities=lambda: calibration.probabilities(chosen_frame([-1., NAN, -2., -3.])),
    temperature=lambda: calibration.fit_temperature(chosen_frame([NAN]*4)),
    exposure=lambda: exposure.exposure([-1., NAN] + [-2.]*998),
    exposure_of_nan=lambda: exposure.exposure([NAN] + [-2.]*999),
    letters=lambda: evaluate.measure(chosen_frame().assign(letters_scores=[RIGHT, [NAN]*4, RIGHT])),
    answers=lambda: evaluate.measure(text_frame().assign(bertscore=[.5, NAN])),
)


@pytest.mark.parametrize("what", REFUSED)
def test_figures_of_scores_that_are_no_numbers_are_refused(what):
    with pytest.raises(MedftError, match="no finite numbers"):
        REFUSED[what]()


def test_a_refusal_names_the_model_the_set_and_the_item():
    frames = {("base", "test"): chosen_frame(), ("trl", "test"): chosen_frame([NAN]*4)}
    with pytest.raises(MedftError, match="trl on test: the scores of item q1"):
        evaluate.summarise(frames)
    frames[("trl", "test")] = chosen_frame()
    for who in ("trl@2", "rule"):
        more = frames | {(who, "test"): chosen_frame([NAN]*4)} if "@" in who else frames
        rules = {} if "@" in who else {(who, "test"): chosen_frame([NAN]*4)}
        with pytest.raises(MedftError, match=f"{who} on test"):
            evaluate.summarise(more, baselines=rules)


@pytest.fixture(scope="module")
def tiny():
    "The tiny base with its tokenizer, and the same with NaN in its last norm."
    from medft.core import load_recipe
    from medft.data import load_tokenizer
    from medft.model import load_base
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


ROW = dict(id="q7", group="q7", subject="", prompt="Antidote in opioid overdose?", reference="naloxone", options=[" naloxone", " iron"], answer=0)


def test_a_model_that_gives_nan_is_stopped_at_choices_text_and_answers(broken, tmp_path):
    recipe, tok, model = broken
    text = ROW | dict(input_ids=tok("Iron is lacking.")["input_ids"], completion_mask=[0] + [1]*(len(tok("Iron is lacking.")["input_ids"]) - 1))
    del text["options"]
    for predict in (
        lambda: scoring.predict_choices(model, tok, [ROW]), lambda: scoring.predict_forms(model, tok, [ROW], shuffles=1),
        lambda: scoring.predict_text(model, tok, [text]), lambda: answers.write_answers(model, tok, [text]),
    ):
        with pytest.raises(MedftError, match="item q7"):
            predict()
    run = SimpleNamespace(recipe=recipe, path=tmp_path, log=lambda line: None)
    with pytest.raises(MedftError, match="trl on test: .*item q7"):
        scored.score_model(run, "trl", model, tok, dict(test=[ROW]), dict(test="key"))
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_sound_model_still_answers(tiny):
    _, tok, model = tiny
    assert answers.write_answers(model, tok, [ROW])[0]["answer_tokens"] > 0
    assert np.isfinite(scoring.predict_choices(model, tok, [ROW]).scores[0]).all()


def test_engines_whose_likelihoods_are_nan_do_not_agree():
    turn = dict(rows=[[1]], times=[1.])
    seen = {n: dict(turns=[turn], starts=[dict(drawn=1)], losses=[1., .9]) for n in ("trl_default", "fast")}
    losses = {n: [1., .9] for n in seen}
    sound = agreement.disagreement("fast", seen, losses, dict(fast=[[-1., -2.]], trl_default=[[-1., -2.]]), ["trl_default"], "float32")
    wrong = agreement.disagreement("fast", seen, losses, dict(fast=[[NAN, -2.]], trl_default=[[-1., -2.]]), ["trl_default"], "float32")
    assert not sound["why"] and "no finite numbers" in wrong["why"][-1]


# Names in plots


NAMES = ["Costs: $5_ to $9", "Anatomy $\\frac$", "50% of $a%$", "a\\$b $ c", "_hidden", "__", "two\nlines\tand a tab", "x"*300, "", " ", "\x1b[31mred\x00", "\ud800",
         "{x}^2_i", "&<b>\"'", "心臓", "العربية", "$", "$$", "\\"]


@pytest.mark.parametrize("name", NAMES)
def test_every_plot_takes_any_name(name):
    figure = lambda v: dict(accuracy=dict(value=v, ci95=[v - .05, v + .05], n=40), chance=dict(value=.25, ci95=[.25, .25], n=40))
    gap = lambda v: dict(label="better", metric="accuracy", effect=v, ci95=[v - .1, v + .1], n=40)
    bins = [dict(n=20, accuracy=.5, ci95=[.4, .6], confidence=.6)]*2
    models = {"base": {name: figure(.4)}, name + "m": {name: figure(.8)}}
    metrics = dict(
        main=name, models=models, names={name + "m": name}, baselines={}, differences={name + "m": {name: gap(.4)}},
        subjects={name: {name: dict.fromkeys(models, figure(.4)), "Other": dict.fromkeys(models, figure(.3))}},
        subject_differences={name: {name: {name + "m": gap(.4)}, "Other": {name + "m": gap(.2)}}},
        calibration={w: {name: dict(bins=bins, bins_scaled=bins)} for w in models}, positions={w: {name: dict(truth=[.5, .5], chosen=[.4, .6])} for w in models},
    )
    ruled = metrics | dict(baselines={name + "r": {name: figure(.5)}})
    plots = [pictures.plot_scores(metrics), pictures.plot_rules(ruled), pictures.plot_subjects(metrics), forest.plot_forest(metrics), diagrams.plot_reliability(metrics),
             diagrams.plot_positions(metrics)]
    for plot in plots:
        svg = pictures.inline(plot, name if name.isprintable() else "")
        ElementTree.fromstring(svg.replace('role="img"', ""))
    legends = [text.get_text() for text in plots[0].legends[0].get_texts()]
    assert len(legends) == 3      # the base, the model of that name, chance


@pytest.mark.parametrize("name, shown", [("a $1 b $2", "a $1 b $2"), ("a\\$b", "a\\$b"), ("_x", " _x"), ("two\nlines", "two lines"), ("y"*40, "y"*25 + "…"), ("", "(no name)")])
def test_a_name_is_shown_as_it_is(name, shown):
    from matplotlib.text import Text
    assert Text(0, 0, pictures.plot_text(name))._preprocess_math(pictures.plot_text(name)) == (shown, False)


def test_two_models_of_one_name_both_stand_in_the_legend():
    figure = lambda v: dict(accuracy=dict(value=v, ci95=[v - .05, v + .05], n=40))
    metrics = dict(main="test", models=dict(base=dict(test=figure(.4)), a=dict(test=figure(.5)), b=dict(test=figure(.6))), names=dict(a="n"*30 + "1", b="n"*30 + "2"), baselines={})
    assert len(pictures.plot_scores(metrics).legends[0].get_texts()) == 3
