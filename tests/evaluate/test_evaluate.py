"""Evaluation: the same answers in every batch, and figures that follow from the files.

Nothing is scored that was trained on.
"""

from medft.core.files import MedftError, assets, read_json, write_json
from medft.core.recipe import load_recipe
from medft.core.run import Run
from medft.data import chat_templates
from medft.data import pipeline as data
from medft.data.prompts import encode
from medft.evaluate import metrics as ev
from medft.evaluate import plots
from medft.evaluate.measures import calibration
from medft.evaluate.measures import classification as classes
from medft.evaluate.scoring import generation as answers
from medft.evaluate.scoring import log_likelihood, shared_prefix
from medft.evaluate.scoring import predict as scoring
from medft.evaluate.statistics import intervals as st
from medft.evaluate.statistics import simulation as trials
from medft.evaluate.statistics import verdicts
from medft.model import adapters, families
from medft.model import load as model

import json
import shutil
import tracemalloc
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import metrics as sk
from transformers import AutoModelForCausalLM, Gemma2Config

GEMMA2 = Gemma2Config(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    pad_token_id=0,
    sliding_window=8,
    final_logit_softcapping=2.0,
)


def tiny(family, task="generative", **more):
    "A random model of a family, with weights large enough that its answers differ."
    config = GEMMA2 if family == "gemma2" else families.tiny_config(family, 128)
    for c in (config, config.get_text_config()):
        c.initializer_range = 0.3
        for k, v in more.items():
            setattr(c, k, v)
    torch.manual_seed(0)
    return families.model_class(config, task)(config).float().eval()


def questions(n=11, seed=0):
    rng = np.random.default_rng(seed)

    def ids(k):
        return rng.integers(3, 120, k).tolist()

    return [
        (ids(rng.integers(3, 60)), [ids(rng.integers(1, 6)) for _ in range(rng.integers(2, 5))])
        for _ in range(n)
    ]


@pytest.mark.parametrize("family", ["gemma2", *families.NAMES])
def test_every_family_answers_the_same_in_a_batch_alone_and_behind_a_shared_prompt(family):
    model = tiny(family)
    items = questions()
    rows = [(p + o, [0] * len(p) + [1] * len(o)) for p, options in items for o in options]

    def plain(ids, mask):
        logs = (
            model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)
        )
        return sum(logs[t - 1, ids[t]].item() for t in range(1, len(ids)) if mask[t])

    with torch.no_grad():
        reference = np.array([plain(*r) for r in rows])
    assert np.allclose(log_likelihood.score_rows(model, rows), reference, atol=1e-4)
    assert shared_prefix.shares_prompts(model) == (family != "nemotron_h")
    if family != "nemotron_h":
        assert np.allclose(shared_prefix.score_branches(model, items), reference, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma3", "medgemma", "nemotron_h"])
def test_written_answers_do_not_depend_on_the_batch(family):
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    config = families.tiny_config(family, 2048)
    config.get_text_config().initializer_range = 0.3
    model = families.model_class(config)(config).float().eval()
    tok = AutoTokenizer.from_pretrained(assets() / "tiny_base")
    rows = [dict(prompt="Zinc is a metal. " * n, reference="iron and zinc") for n in (1, 4, 2)]
    one_by_one = answers.write_answers(model, tok, rows, batch_size=1)
    assert answers.write_answers(model, tok, rows, batch_size=3) == one_by_one


@pytest.mark.parametrize("family", families.NAMES)
def test_a_classifier_reads_the_last_token_and_no_padding(family):
    model = tiny(family, "classification", pad_token_id=7, num_labels=2)
    prompts = [prompt for prompt, _ in questions()]
    # Zero is an ordinary token here.
    texts = [[t for t in ids if t != 7] + [0] for ids in prompts]
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([ids])).logits[0].tolist() for ids in texts]
    assert np.allclose(scoring.score_labels(model, texts), alone, atol=1e-4)
    assert np.ptp(alone) > 0.5
    rows = [
        dict(id=str(i), group=str(i), prompt="", label=0, input_ids=ids)
        for i, ids in enumerate(texts)
    ]
    assert np.allclose(
        scoring.predict_labels(model, None, rows, batch_size=4).scores.tolist(), alone, atol=1e-4
    )
    model.config.get_text_config().pad_token_id = None  # nothing to pad with: one by one
    assert np.allclose(
        scoring.predict_labels(model, None, rows, batch_size=4).scores.tolist(), alone, atol=1e-4
    )


def test_the_head_never_sees_more_than_the_scored_positions():
    model = tiny("mistral")
    seen = []
    hook = model.get_output_embeddings().register_forward_hook(
        lambda head, args, out: seen.append(out.shape[:-1].numel())
    )
    log_likelihood.score_rows(model, [([5] * 40, [0] * 37 + [1] * 3), ([6] * 30, [0] * 29 + [1])])
    hook.remove()
    assert seen == [1, 4]  # one for the model's own code, and what is asked for


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    from transformers import AutoConfig, AutoTokenizer

    out = tmp_path_factory.mktemp("base")
    config = AutoConfig.from_pretrained(assets() / "tiny_base")
    config.num_hidden_layers, config.initializer_range = 2, 0.1
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(out)
    AutoTokenizer.from_pretrained(assets() / "tiny_base").save_pretrained(out)
    return out


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def rows(n, seed, subject=("Anatomy", "Medicine")):
    rng = np.random.default_rng(seed)
    return [
        dict(
            id=f"{seed}-{i}",
            question=f"Question {seed} {i}?",
            opa="iron",
            opb="zinc" if i % 6 else "zinc sulphate",
            opc="lead",
            opd="gold",
            cop=int(rng.integers(0, 4)),
            subject_name=subject[i % len(subject)],
        )
        for i in range(n)
    ]


def make_run(tmp_path, base, *more, train_rows=None, test_rows=None, engines=("trl",)):
    "A run with adapters that were never trained: random ones, each engine's its own."

    from peft import get_peft_model

    for name, part in (
        ("train", train_rows or rows(6, 1)),
        ("validation", rows(4, 2)),
        ("test", test_rows or rows(24, 3)),
        ("other", rows(8, 4)),
    ):
        write_rows(tmp_path / f"{name}.jsonl", part)
    run = Run.create(
        load_recipe(
            "quickstart",
            [
                f"model.name={base}",
                f"dataset.path={tmp_path}/train.jsonl",
                f"dataset.validation_path={tmp_path}/validation.jsonl",
                f"dataset.test_path={tmp_path}/test.jsonl",
                f"dataset.sets={{other: {tmp_path}/other.jsonl}}",
                "dataset.max_samples=null",
                *more,
            ],
        ),
        root=tmp_path,
    )
    data.prepare(run)
    for i, engine in enumerate(engines):
        torch.manual_seed(i)
        config = adapters.lora_config(run.recipe)
        config.init_lora_weights = False
        get_peft_model(model.load_base(run.recipe), config).save_pretrained(
            run.path / engine / "adapters"
        )
        write_json(
            run.path / engine / "training.json",
            dict(status="finished", engine=engine, seconds=1.0, steps=3),
        )
    return run


def test_a_run_is_scored_and_every_figure_follows_from_its_files(tmp_path, base):
    run = make_run(tmp_path, base, engines=("trl", "unsloth"))
    metrics = ev.evaluate(run)
    assert list(metrics["models"]) == ["base", "trl", "unsloth"]
    assert list(metrics["verdict"]) == ["trl", "unsloth"]
    assert "unsloth - trl" in metrics["between"]
    files = {path.name for path in (run.path / "predictions").glob("*.parquet")}
    models = ("base", "trl", "unsloth")
    assert files == {f"{m}.{s}.parquet" for m in models for s in ("test", "other")}
    frame = pd.read_parquet(run.path / "predictions/trl.test.parquet")
    assert set(frame) >= {
        "id",
        "group",
        "subject",
        "prompt_sha256",
        "scores",
        "choice",
        "choice_norm",
        "truth",
        "correct",
    }
    for who in metrics["models"]:
        f = pd.read_parquet(run.path / f"predictions/{who}.test.parquet")
        accuracy = metrics["models"][who]["test"]["accuracy"]
        assert accuracy["value"] == round(f.correct.mean(), 6)
        assert accuracy["n"] == 24
        assert accuracy["ci95"][0] <= accuracy["value"] <= accuracy["ci95"][1]
        assert [int(np.argmax(s)) for s in f.scores] == f.choice.tolist()
    assert set(metrics["verdict"]["trl"]) >= {
        "label",
        "metric",
        "effect",
        "ci95",
        "p",
        "n",
        "detectable",
        "sentence",
    }
    assert read_json(run.path / "metrics.json") == json.loads(json.dumps(metrics))


def test_neither_batch_size_nor_what_was_scored_before_changes_a_choice(tmp_path, base):
    run = make_run(tmp_path, base, engines=("trl", "unsloth"))
    ev.evaluate(run)
    before = ev.read_predictions(run)
    tok = chat_templates.load_tokenizer(run.recipe)
    items = data.load_split(run, "test").to_list()
    of_unsloth = before["unsloth", "test"]
    for size in (1, 7):
        tuned = model.load_tuned(run, "unsloth")
        fresh = scoring.predict_choices(tuned, tok, items, batch_size=size)
        assert fresh.choice.tolist() == of_unsloth.choice.tolist()
        assert np.allclose(fresh.scores.tolist(), of_unsloth.scores.tolist(), atol=1e-3)
    scores = [np.array(before[who, "test"].scores.tolist()) for who in ("base", "trl", "unsloth")]
    for a, b in combinations(scores, 2):
        assert not np.allclose(a, b, atol=0.01)


def test_scoring_twice_writes_the_same_bytes(tmp_path, base):
    run = make_run(tmp_path, base)

    def files():
        paths = [p for p in (run.path / "predictions").rglob("*") if p.is_file()]
        return {p.name: p.read_bytes() for p in [*paths, run.path / "metrics.json"]}

    ev.evaluate(run)
    first = files()
    ev.evaluate(run)  # what is there is not made again
    assert files() == first
    shutil.rmtree(run.path / "predictions")
    ev.evaluate(run)
    assert files() == first


def test_a_row_that_was_trained_on_is_not_scored(tmp_path, base):
    run = make_run(
        tmp_path, base, "dataset.checks={overlap: off}", test_rows=[*rows(5, 3), *rows(1, 1)]
    )
    with pytest.raises(MedftError, match="1-0.*measure memory"):
        ev.evaluate(run)
    assert not (run.path / "predictions").exists()
    assert not (run.path / "metrics.json").exists()


def test_predictions_about_other_items_are_not_compared(tmp_path, base):
    frame = pd.DataFrame(dict(id=["a"], prompt_sha256=["x"], correct=[True]))
    with pytest.raises(MedftError, match="different items"):
        ev.compare_predictions(frame, frame.assign(prompt_sha256="y"))


def test_options_are_scored_without_the_end_token_and_chosen_by_their_sum(tmp_path, base):
    run = make_run(tmp_path, base)
    items = data.load_split(run, "test").to_list()
    tok = chat_templates.load_tokenizer(run.recipe)
    assert not any(o.endswith(tok.eos_token) for r in items for o in r["options"])
    frame = scoring.predict_choices(model.load_base(run.recipe), tok, items)
    assert any(len(set(map(len, r["options"]))) > 1 for r in items)
    for scores, choice, row in zip(frame.scores, frame.choice_norm, items, strict=True):
        lengths = [len(option.strip()) for option in row["options"]]
        assert choice == np.argmax(np.array(scores) / lengths)


def test_running_text_is_scored_token_for_token(tmp_path, base):
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    text = [
        dict(
            id=str(i),
            group=str(i),
            prompt="",
            **{k: v[0] for k, v in encode(tok, [""], [t]).items()},
        )
        for i, t in enumerate(["Zinc heals wounds. " * 9, "Iron."])
    ]
    frame = scoring.predict_text(model, tok, text, length=512)
    with torch.no_grad():
        ids = torch.tensor([text[0]["input_ids"]])
        loss = model(ids, labels=ids).loss.item()
    assert frame.nll[0] / frame.tokens[0] == pytest.approx(loss, rel=1e-4)
    assert frame.tokens.tolist() == [len(t["input_ids"]) - 1 for t in text]
    in_windows = scoring.predict_text(model, tok, text, length=10)
    assert in_windows.tokens.tolist() == frame.tokens.tolist()
    worse = ev.compare_predictions(frame, frame.assign(nll=frame.nll * 1.5))
    assert worse["metric"] == "loss"
    assert worse["effect"] > 0
    assert set(ev.measure_predictions(frame)) == {"loss", "perplexity", "bits_per_byte"}


def test_losses_get_a_verdict_too():
    rng = np.random.default_rng(0)
    tokens = rng.integers(50, 150, 80)
    base = pd.DataFrame(
        dict(
            id=range(80),
            group=range(80),
            prompt_sha256="",
            nll=tokens * rng.normal(2.3, 0.3, 80),
            tokens=tokens,
            bytes=tokens * 3,
        )
    )
    lower = base.assign(nll=base.nll * rng.normal(0.9, 0.02, 80))
    higher = base.assign(nll=base.nll * rng.normal(1.1, 0.02, 80))
    assert ev.compare_predictions(base, lower)["label"] == "better"
    assert ev.compare_predictions(base, higher)["label"] == "worse"
    same = ev.compare_predictions(base, base.assign(nll=base.nll + rng.normal(0, 5, 80)))
    assert same["label"] == "tie"
    assert same["detectable"] > 0
    assert ev.compare_predictions(base, base)["label"] == "tie"


def test_mcnemar_counts_what_happened_by_half():
    from scipy.stats import binom

    few = verdicts.compare_choices(
        np.repeat([True, False, True], [80, 9, 2]), np.repeat([True, True, False], [80, 9, 2])
    )
    assert few["p"] == pytest.approx(2 * binom.cdf(1, 11, 0.5) + binom.pmf(2, 11, 0.5))
    assert (few["gained"], few["lost"]) == (9, 2)
    assert (few["groups"], few["test"]) == (91, "McNemar")
    alike = verdicts.compare_choices([True] * 50, [True] * 50)
    assert alike["p"] == 1
    assert alike["label"] == "tie"
    assert alike["ci95"][0] < 0 < alike["ci95"][1]
    assert alike["detectable"] > 0


@pytest.mark.parametrize("gained,lost,n", [(9, 2, 91), (0, 4, 50), (60, 31, 400)])
def test_tangos_interval_holds_what_the_score_test_does_not_reject(gained, lost, n):
    from scipy.optimize import minimize_scalar

    counts = np.array([gained, lost, n - gained - lost])

    def beyond(d):  # the restricted estimate by searching the likelihood instead of by formula
        def minus_log_likelihood(q):
            chances = np.array([q + d, q, 1 - 2 * q - d])
            return -(counts * np.log(np.maximum(chances, 1e-300))).sum()

        q = minimize_scalar(
            minus_log_likelihood,
            bounds=(max(0, -d), (1 - d) / 2),
            method="bounded",
            options=dict(xatol=1e-10),
        ).x
        return abs(gained - lost - n * d) / np.sqrt(n * (2 * q + d - d * d))

    low, high = verdicts.tango_interval(gained, lost, n)
    assert low < (gained - lost) / n < high
    assert beyond(low) == pytest.approx(1.96, abs=1e-3)
    assert beyond(high) == pytest.approx(1.96, abs=1e-3)


def test_questions_that_were_asked_five_times_prove_no_more():
    a = np.repeat([True, True, False, False], [40, 5, 13, 27])
    b = np.repeat([True, False, True, False], [40, 5, 13, 27])
    once = verdicts.compare_choices(a, b)
    groups = np.repeat(np.arange(85), 5)
    often = verdicts.compare_choices(np.repeat(a, 5), np.repeat(b, 5), groups=groups)
    assert often["p"] == pytest.approx(once["p"], abs=0.01)
    assert often["ci95"] == pytest.approx(once["ci95"], abs=0.005)
    assert (often["n"], often["groups"], often["test"]) == (425, 85, "permutation")
    assert verdicts.compare_choices(np.repeat(a, 5), np.repeat(b, 5))["p"] < 0.001
    share_once = st.share(a, groups=np.arange(85))
    share_often = st.share(np.repeat(a, 5), groups=groups)
    assert share_often["ci95"] == pytest.approx(share_once["ci95"], abs=0.005)
    assert once["detectable"] == pytest.approx(st.detectable(85, 18 / 85), abs=1e-6)
    assert often["detectable"] == pytest.approx(once["detectable"], abs=0.005)


def test_the_interval_is_scipys_bca_where_rows_are_independent():
    from scipy.stats import bootstrap

    x = np.random.default_rng(0).lognormal(0, 1, 400)

    def mean(w):
        return (w @ x) / w.sum(1)

    low, high, se = st.bootstrap_intervals(dict(mean=mean), range(400))["mean"]
    other = bootstrap((x,), np.mean, n_resamples=20_000, rng=1)
    ends = other.confidence_interval
    assert (low, high) == pytest.approx((ends.low, ends.high), abs=0.15 * other.standard_error)
    assert se == pytest.approx(other.standard_error, rel=0.05)
    assert high - x.mean() > 1.05 * (x.mean() - low)  # a skewed figure has a skewed interval
    code = np.random.default_rng(1).integers(0, 4, 400)
    assert np.isnan(st.bootstrap_intervals(dict(mean=mean), ["one"] * 400)["mean"]).all()
    assert st.bootstrap_intervals(dict(mean=mean), code)["mean"][2] > 0


def test_a_set_of_one_document_gets_figures_without_intervals_and_no_verdict():
    frame = pd.DataFrame(
        dict(id=range(6), group="one", prompt_sha256="", nll=[50.0] * 6, tokens=25, bytes=75)
    )
    assert ev.measure_predictions(frame)["loss"] == dict(value=2.0, ci95=[None, None], n=6)
    assert plots.written(ev.measure_predictions(frame)["loss"], False) == "2.000"
    d = ev.compare_predictions(frame, frame.assign(nll=10.0))
    assert d["label"] == "tie"
    assert d["ci95"] == [None, None]
    assert d["groups"] == 1
    assert "in 1 group" in verdicts.sentence(d, "trl")
    assert np.isnan(plots.whiskers([ev.measure_predictions(frame)["loss"]])[1]).all()
    assert json.dumps(d)


def test_holm_is_statsmodels_and_turns_a_lucky_one_of_three_into_a_tie():
    made = [
        verdicts.compare_choices(
            np.repeat([True, True, False, False], [200, 20, x, 200]),
            np.repeat([True, False, True, False], [200, 20, x, 200]),
        )
        for x in (60, 36, 21)
    ]
    corrected = verdicts.holm(made)
    assert [d["label"] for d in made] == ["better", "better", "tie"]
    assert [d["label"] for d in corrected] == ["better", "tie", "tie"]
    expected = [3 * made[0]["p"], 2 * made[1]["p"], made[2]["p"]]
    assert [d["p_holm"] for d in corrected] == pytest.approx(expected)
    assert "after Holm over 3 tests" in verdicts.sentence(corrected[1], "trl")
    (alone,) = verdicts.holm(made[1:2])
    assert alone["label"] == "better"
    assert alone["p_holm"] == made[1]["p"]
    assert verdicts.holm([]) == []
    detectable = st.detectable(480, 80 / 480, tests=3)
    assert corrected[0]["detectable"] == pytest.approx(detectable, rel=0.02)
    assert corrected[0]["detectable"] > made[0]["detectable"]


def test_three_engines_two_sets_and_a_rule_are_three_families():
    rng = np.random.default_rng(0)
    ids = [str(i) for i in range(60)]

    def frame():
        c = rng.integers(0, 4, 60)
        return pd.DataFrame(
            dict(
                id=ids,
                group=ids,
                subject="",
                prompt_sha256="",
                scores=[[0.0] * 4] * 60,
                choice=c,
                choice_norm=c,
                truth=0,
                correct=c == 0,
            )
        )

    frames = {
        (m, s): frame() for m in ("base", "trl", "unsloth", "fast") for s in ("test", "other")
    }
    m = ev.summarise(frames, baselines={("majority", "test"): frames["base", "test"]})
    assert {d["tests"] for d in m["verdict"].values()} == {3}
    assert {m["differences"][e]["other"]["tests"] for e in m["verdict"]} == {3}
    assert {d["tests"] for d in m["between"].values()} == {6}
    assert set(m["between"]) == {
        "trl - fast",
        "unsloth - fast",
        "unsloth - trl",
        "fast - majority",
        "trl - majority",
        "unsloth - majority",
    }
    assert all(d["p_holm"] >= d["p"] for d in m["verdict"].values())
    assert m["differences"]["fast"]["test"] == m["verdict"]["fast"]
    assert plots.table(m).loc["test", "fast - base"]


def test_words_say_what_the_figures_say():
    d = dict(
        label="better",
        metric="accuracy",
        effect=0.452,
        ci95=[0.41, 0.493],
        p=1e-9,
        n=423,
        groups=423,
        detectable=0.06,
        test="McNemar",
    )
    assert verdicts.sentence(d, "trl") == (
        "trl is better than the base: +45.2 points [41.0, 49.3] on test"
        " (n = 423, McNemar p < 0.001);"
        " the smallest difference this set could have shown is 6.0 points"
    )
    grouped = d | dict(label="tie", p=0.5, groups=200)
    assert "n = 423 in 200 groups" in verdicts.sentence(grouped, "trl")


def test_a_recipe_is_better_only_if_its_seeds_agree():
    rng = np.random.default_rng(0)
    base = (rng.random((500, 1)) < 0.5).astype(float)

    def mean(s):
        return s[..., 0] / 500

    def up(k):
        return np.where(np.arange(500)[:, None] < k, 1.0, base)

    def down(k):
        return np.where(np.arange(500)[:, None] < k, 0.0, base)

    def over_seeds(*seeds):
        return verdicts.over_seeds("accuracy", mean, base, np.array(seeds), range(500))

    agree = over_seeds(up(90), up(100), up(110))
    differ = over_seeds(up(140), down(80), up(150))
    assert agree["label"] == "better"
    assert differ["label"] == "tie"
    assert differ["spread"] > 5 * agree["spread"]
    assert agree["effect"] == pytest.approx(np.mean(agree["effects"]), abs=1e-6)
    assert differ["effect"] > 0
    assert "3 seeds" in verdicts.sentence(agree, "trl")


def test_figures_of_ten_thousand_rows_are_made_piece_by_piece():
    "The weights of all resamples are never in memory at once: at most 200 x rows numbers are."
    rng = np.random.default_rng(0)
    n = 10_000
    frame = pd.DataFrame(
        dict(
            id=range(n),
            group=[str(i // 3) for i in range(n)],
            prompt_sha256="",
            nll=rng.normal(200, 9, n),
            tokens=100,
            bytes=300,
        )
    )
    tracemalloc.start()
    ev.measure_predictions(frame)
    ev.compare_predictions(frame, frame.assign(nll=frame.nll + rng.normal(0, 1, n)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150e6


def test_the_verdict_was_tried_and_the_tables_are_kept():
    kept = trials.simulation_tables()
    assert all(x["times"] >= 1000 and x["verdicts"] <= 0.065 for x in kept["nulls"])
    assert all(x["verdicts"] >= 0.025 for x in kept["nulls"] if x["rows"] >= 500)
    assert all(0.935 <= x["covered"] <= 0.965 for x in kept["nulls"] + kept["covers"])
    assert {x["group_size"] > 1 for x in kept["nulls"]} == {True, False}
    assert all(abs(x["found"] - x["promised"]) < 0.03 for x in kept["powers"])
    assert kept["families"]["holm"] <= 0.065
    line = next(x for x in kept["nulls"] if x["world"] == "accuracy" and x["group_size"] == 1)
    settings = dict(times=line["times"], disagree=line["disagree"])
    again = trials.simulated_rates(trials.accuracy_world, line["rows"], **settings)
    assert again == line  # today's code makes the stored line


@pytest.mark.long
def test_the_tables_of_the_trials_come_out_the_same(tmp_path):
    found = trials.remake_tables(tmp_path / "verdicts.json")
    assert read_json(tmp_path / "verdicts.json") == trials.simulation_tables()
    assert json.loads(json.dumps(found)) == trials.simulation_tables()


# Labels


def made_up(n=300, k=2, seed=0, skill=2.0, per_group=1):
    "Predictions of a classifier that knows something."
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, k, n)
    logits = rng.normal(0, 1, (n, k)).round(1)
    logits[np.arange(n), truth] += skill  # rounded: with ties
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return scoring.choose(
        pd.DataFrame(
            dict(
                id=[f"{seed}-{i}" for i in range(n)],
                group=[f"p{i // per_group}" for i in range(n)],
                subject="",
                prompt_sha256="",
                scores=logits.tolist(),
                probabilities=p.tolist(),
                truth=truth,
            )
        )
    )


def by_sklearn(t, c, p):
    "What scikit-learn computes from truth, choice and (rows, labels) probabilities."
    num_labels = p.shape[1]
    average = "binary" if num_labels == 2 else "macro"
    if num_labels == 2:
        auroc = sk.roc_auc_score(t, p[:, 1])
        auprc = sk.average_precision_score(t, p[:, 1])
        brier = sk.brier_score_loss(t, p[:, 1])
    else:
        auroc = sk.roc_auc_score(t, p, multi_class="ovr")
        auprc = sk.average_precision_score(np.eye(num_labels)[t], p, average="macro")
        brier = sk.brier_score_loss(t, p, labels=range(num_labels))
    return dict(
        accuracy=sk.accuracy_score(t, c),
        precision=sk.precision_score(t, c, average=average),
        recall=sk.recall_score(t, c, average=average),
        f1=sk.f1_score(t, c, average=average),
        macro_f1=sk.f1_score(t, c, average="macro"),
        mcc=sk.matthews_corrcoef(t, c),
        auroc=auroc,
        auprc=auprc,
        brier=brier,
        log_loss=sk.log_loss(t, p),
    )


@pytest.mark.parametrize("k", [2, 4])
def test_figures_of_labels_are_those_of_scikit_learn(k):
    f = made_up(k=k)
    t = f.truth.to_numpy()
    c = f.choice.to_numpy()
    p = np.stack(f.probabilities)
    found = classes.measure_labels(f)
    error = found.pop("ece")["value"]
    stated = calibration.stated_probabilities(f, p)
    expected = float(calibration.ece(*stated)(np.ones((1, len(f))))[0])
    assert error == pytest.approx(expected, abs=2e-6)  # test_calibration compares with scikit-learn
    assert {m: v["value"] for m, v in found.items()} == pytest.approx(by_sklearn(t, c, p), abs=2e-6)
    assert plots.main_metric(found) == ("f1" if k == 2 else "accuracy")
    assert all(v["ci95"][0] <= v["value"] <= v["ci95"][1] for v in found.values())
    assert classes.confusion(f) == sk.confusion_matrix(t, c).tolist()


@pytest.mark.parametrize("k", [2, 4])
def test_a_weight_counts_a_row_as_often_as_it_was_drawn(k):
    f = made_up(80, k)
    t = f.truth.to_numpy()
    c = f.choice.to_numpy()
    p = np.stack(f.probabilities)
    w = np.random.default_rng(1).integers(0, 4, (3, 80))
    again = [np.repeat(np.arange(80), x) for x in w]
    expected = [by_sklearn(t[i], c[i], p[i]) for i in again]
    statistics = classes.choice_statistics(t, c, k) | classes.probability_statistics(t, p)
    for m, statistic in statistics.items():
        values = [figures[m] for figures in expected]
        assert statistic(w.astype(float)) == pytest.approx(values, abs=1e-9), m


def test_a_threshold_is_the_best_of_all_and_a_half_when_that_is_as_good():
    rng = np.random.default_rng(0)
    for n in (5, 40, 200):
        t = rng.integers(0, 2, n)
        p = rng.random(n).round(2)
        t[0] = 1
        at, f1 = classes.best_threshold(t, p)
        tries = {x: sk.f1_score(t, p >= x) for x in np.append(np.linspace(0, 1, 201), at)}
        assert f1 == pytest.approx(max(tries.values())) == tries[at]
        # It is in the middle between two rows, so up to half their distance further from a half.
        between = np.diff(np.unique([0, *p])).max() / 2
        best = [x for x, v in tries.items() if v > f1 - 1e-12]
        assert abs(at - 0.5) <= min(abs(x - 0.5) for x in best) + between
    assert classes.best_threshold([0, 1], [0.2, 0.9]) == (0.5, 1.0)
    assert classes.best_threshold([0, 0], [0.2, 0.9]) == (0.5, 0.0)
    tiny_gap = np.nextafter(0.7, 1)
    at, _ = classes.best_threshold([0, 1], [0.7, tiny_gap])
    assert 0.7 < at <= tiny_gap


def test_a_set_of_one_label_has_no_figure_that_needs_two():
    for label in (0, 1):
        f = made_up()
        f = f[f.truth == label].reset_index(drop=True)
        found = classes.measure_labels(f)
        expected = {"mcc", "auroc", "auprc"} | ({"f1", "recall"} if label == 0 else set())
        assert {m for m, v in found.items() if v["value"] is None} == expected
        assert all(v["reason"] for v in found.values() if v["value"] is None)
        assert plots.main_metric(found) == ("accuracy" if label == 0 else "f1")
        assert classes.compare_labels(f, f)["label"] == "tie"
        assert plots.written(found["auroc"], False) == "–"
    never = scoring.choose(made_up(), 1.1)
    assert classes.measure_labels(never)["precision"]["value"] is None
    assert classes.measure_labels(never)["f1"]["value"] == 0


def test_rows_of_one_patient_are_drawn_together():
    rng = np.random.default_rng(0)
    hit = dict(patients=0, rows=0)
    for _ in range(120):
        x = np.repeat(rng.normal(0, 1, 30), 8)
        patients = [f"patient {i // 8} & patient {rng.integers(10**6)}" for i in range(240)]
        mean = dict(mean=st.ratio(x, np.ones(240)))
        for name, groups in dict(patients=patients, rows=range(240)).items():
            low, high, _ = st.bootstrap_intervals(mean, groups)["mean"]
            hit[name] += low <= 0 <= high
    assert hit["patients"] >= 0.88 * 120
    assert hit["rows"] <= 0.7 * 120
    assert st.owners(["", ""])[1] == 2


def test_classifiers_get_a_verdict_in_f1_and_more_labels_one_in_accuracy():
    a = made_up(skill=0.5, per_group=3)
    b = made_up(skill=2.5, per_group=3)
    d = classes.compare_labels(a, b)
    assert (d["label"], d["metric"], d["test"], d["groups"]) == ("better", "f1", "permutation", 100)
    difference = sk.f1_score(b.truth, b.choice) - sk.f1_score(a.truth, a.choice)
    assert d["effect"] == pytest.approx(difference, abs=1e-6)
    assert d["ci95"][0] < d["effect"] < d["ci95"][1]
    assert " F1 [" in verdicts.sentence(d, "trl")
    assert classes.compare_labels(b, a)["label"] == "worse"
    assert classes.compare_labels(a, a)["p"] == 1
    assert classes.compare_labels(made_up(k=3, skill=0.5), made_up(k=3))["test"] == "McNemar"


@pytest.mark.long
def test_equal_classifiers_are_seldom_told_apart():
    "Equally good ones that err on different patients: a verdict in at most 6.5 % of 1,000 trials."
    patient = np.repeat(np.arange(200), 2)

    def frame(truth, rng):
        errs = rng.random(200)[patient] * 0.7 + rng.random(400) * 0.3 < 0.2
        return pd.DataFrame(
            dict(
                group=[f"p{i}" for i in patient],
                truth=truth,
                choice=np.where(errs, 1 - truth, truth),
                probabilities=[[0.5, 0.5]] * 400,
            )
        )

    found = []
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        truth = rng.integers(0, 2, 400)
        d = classes.compare_labels(frame(truth, rng), frame(truth, rng))
        found.append(d["label"] != "tie")
    assert 0.025 <= np.mean(found) <= 0.065


def test_baselines_are_looked_up_by_name_and_shown_the_best_first(tmp_path):
    from datasets import Dataset

    evaluation = SimpleNamespace(baselines=["majority", "prior", "by_ear"])
    run = SimpleNamespace(path=tmp_path, recipe=SimpleNamespace(evaluation=evaluation))

    def row(i, label):
        return dict(id=str(i), group=str(i), subject="", prompt=f"record {i}", label=label)

    for name, labels in dict(train=[1, 1, 1, 0], test=[0, 1, 1, 0, 1]).items():
        dataset = Dataset.from_list([row(i, label) for i, label in enumerate(labels)])
        dataset.save_to_disk(tmp_path / "data" / name)
    write_json(tmp_path / "data/split.json", dict(train=[], test=[]))
    with pytest.raises(MedftError, match="by_ear.*known: majority, prior"):
        classes.baseline(run, "by_ear")

    @classes.register("by_ear")
    def by_ear(run, name):
        return dict(test=(np.array([0, 1, 1, 0, 0]), np.array([0, 1, 1, 0, 0])))

    scored = dict(test=data.load_split(run, "test").to_list()[:4])  # evaluation.max_items=4
    try:
        frames = classes.baseline_frames(run, scored)
    finally:
        del classes.BASELINES["by_ear"]
    assert {n: f.choice.tolist() for (n, _), f in frames.items()} == dict(
        majority=[1] * 4, prior=[1] * 4, by_ear=[0, 1, 1, 0]
    )
    assert frames["prior", "test"].probabilities[0] == [0.25, 0.75]
    assert frames["by_ear", "test"].correct.all()
    found = ev.simple_figures(frames, "test")
    assert list(found)[0] == "by_ear"
    assert found["majority"]["test"]["auroc"]["value"] == 0.5
    assert found["majority"]["test"]["mcc"]["value"] == 0


# Text, by source


@pytest.fixture(scope="module")
def reader(base, tmp_path_factory):
    "A finished pretraining run with texts of two sources; the tuned model is another random one."
    out = tmp_path_factory.mktemp("reader")
    rng = np.random.default_rng(0)
    words = "zinc iron heals wounds metal vitamin bone and of the naïve über".split()

    def text(n):
        return " ".join(rng.choice(words, n)) + "."

    for name, n in dict(train=12, validation=4, test=10).items():
        texts = [
            dict(
                id=f"{name}{i}",
                source="PLOS" if i % 3 else "OpenStax",
                text=text(400 if i == 0 else 30),
            )
            for i in range(n)
        ]
        write_rows(out / f"{name}.jsonl", texts)
    run = Run.create(
        load_recipe(
            "quickstart",
            [
                f"model.name={base}",
                "model.task=pretraining",
                "lora=null",
                "training.max_length=64",
                "training.packing=true",
                f"dataset.path={out}/train.jsonl",
                f"dataset.validation_path={out}/validation.jsonl",
                f"dataset.test_path={out}/test.jsonl",
                "dataset.sets={}",
                "dataset.max_samples=null",
                "dataset.checks={truncated: off, near_duplicates: off, near_overlap: off}",
            ],
        ),
        root=out,
    )
    data.prepare(run)
    other = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(1)
    for p in other.parameters():
        p.data += 0.05 * torch.randn_like(p)
    other.save_pretrained(run.path / "trl" / "model")
    write_json(
        run.path / "trl" / "training.json",
        dict(status="finished", engine="trl", seconds=1.0, steps=3),
    )
    return run, ev.evaluate(run)


def test_bits_per_byte_of_every_source_are_those_counted_by_hand(reader):
    run, metrics = reader
    tok = chat_templates.load_tokenizer(run.recipe)
    rows = data.load_split(run, "test").to_list()
    for who, one in (("base", model.load_base(run.recipe)), ("trl", model.load_tuned(run, "trl"))):
        for source in ("PLOS", "OpenStax"):
            size = nats = tokens = 0
            for ids in (r["input_ids"] for r in rows if r["subject"] == source):
                for at in range(0, len(ids) - 1, 63):  # windows of 64 tokens that overlap by one
                    piece = torch.tensor([ids[at : at + 64]])
                    with torch.no_grad():
                        logs = one(piece).logits[0].float().log_softmax(-1)
                    nats -= logs[:-1].gather(1, piece[0, 1:, None]).sum().item()
                    tokens += piece.shape[1] - 1
                size += len(tok.decode(ids[1:], skip_special_tokens=True).encode())
            found = metrics["subjects"]["test"][source][who]
            bits_per_byte = nats / np.log(2) / size
            assert found["bits_per_byte"]["value"] == pytest.approx(bits_per_byte, rel=1e-4)
            assert found["loss"]["value"] == pytest.approx(nats / tokens, rel=1e-4)
            assert found["loss"]["n"] == sum(r["subject"] == source for r in rows)


def test_every_model_is_measured_on_the_same_tokens_and_sources_are_drawn(reader):
    run, metrics = reader
    frames = ev.read_predictions(run)
    assert frames["base", "test"].tokens.tolist() == frames["trl", "test"].tokens.tolist()
    assert frames["base", "test"].tokens.max() > 64 * 3
    assert metrics["verdict"]["trl"]["metric"] == "loss"
    assert ev.figures(run) == metrics
    axes = plots.plot_subjects(metrics).axes[0]
    assert axes.get_xlabel() == "bits per byte"
    assert {t.get_text() for t in axes.get_yticklabels()} == {"OpenStax (4)", "PLOS (6)"}


def test_a_packed_corpus_is_scored_by_document_and_source(tmp_path, base):
    from medft.data.prepare.corpus import load_corpus, prepare_corpus

    rng = np.random.default_rng(0)
    words = np.array(
        "zinc iron heals wounds metal vitamin bone marrow of the heart and liver".split()
    )
    for name, n in dict(plos=60, openstax=50).items():
        texts = [" ".join(rng.choice(words, 60 if i % 5 else 150)) for i in range(n)]
        rows = [dict(text=f"{name} {i}: {text}") for i, text in enumerate(texts)]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    prepare_corpus(
        [tmp_path / "plos.jsonl", tmp_path / "openstax.jsonl"],
        tmp_path / "corpus",
        workers=1,
        tell=lambda line: None,
        model=str(base),
        max_length=128,
        holdout=0.2,
        similarity=0,
    )
    run = Run.create(
        load_recipe(
            "quickstart",
            [
                f"model.name={base}",
                "model.task=pretraining",
                "lora=null",
                "training.max_length=128",
                "training.packing=true",
                f"dataset.path={tmp_path}/corpus",
                "dataset.sets={}",
                "dataset.test_path=null",
                "dataset.validation_path=null",
                "dataset.max_samples=null",
            ],
        ),
        root=tmp_path,
    )
    data.prepare(run)
    windows = load_corpus(tmp_path / "corpus", "test")
    rows = data.load_split(run, "test").to_list()
    tok = chat_templates.load_tokenizer(run.recipe)
    tokens_of_rows = sorted(i for r in rows for i in r["input_ids"])
    tokens_of_windows = sorted(i for w in windows for i in w["input_ids"])
    assert tokens_of_rows == tokens_of_windows
    assert len({r["id"] for r in rows}) == len(rows)
    assert {r["subject"] for r in rows} == {"plos.jsonl", "openstax.jsonl"}
    assert len({r["group"] for r in rows}) < len(rows)
    starts = [r for r in rows if ": " in tok.decode(r["input_ids"])[:14]]
    assert len(starts) == len({r["group"] for r in rows})
    for r in starts:
        source = r["subject"].split(".")[0]
        assert tok.decode(r["input_ids"]).lstrip().startswith(source)


# A classifier, from its files to the verdict


@pytest.fixture(scope="module")
def classifier(base, tmp_path_factory):
    "A run of task classification, with an adapter and a head that know the word."

    from peft import get_peft_model

    out = tmp_path_factory.mktemp("classifier")
    words = "zinc iron heals wounds metal vitamin bone marrow of the heart and liver".split()

    def made(n, seed):
        rng = np.random.default_rng(seed)
        is_ill = rng.integers(0, 2, n)
        return [
            dict(
                id=f"{seed}-{i}",
                patient_id=f"{seed}/{i // 2}",
                text=" ".join(rng.choice(words, 12)) + (" ill" if ill else " well"),
                label="ill" if ill else "healthy",
            )
            for i, ill in enumerate(is_ill)
        ]

    for seed, (name, n) in enumerate(dict(train=12, validation=40, test=60).items()):
        write_rows(out / f"{name}.jsonl", made(n, seed))
    run = Run.create(
        load_recipe(
            "quickstart",
            [
                f"model.name={base}",
                "model.task=classification",
                "engine=[trl]",
                f"dataset.path={out}/train.jsonl",
                f"dataset.validation_path={out}/validation.jsonl",
                f"dataset.test_path={out}/test.jsonl",
                "dataset.sets={}",
                "dataset.max_samples=null",
                "dataset.labels=[healthy, ill]",
                "evaluation.baselines=[majority, prior]",
                "dataset.checks={near_duplicates: off, near_overlap: off}",
            ],
        ),
        root=out,
    )
    data.prepare(run)
    config = adapters.lora_config(run.recipe)
    config.task_type = "SEQ_CLS"
    config.modules_to_save = ["score"]
    torch.manual_seed(0)
    tuned = get_peft_model(model.load_base(run.recipe, model.labels_of(run)), config)
    head = next(p for n, p in tuned.named_parameters() if "modules_to_save" in n)
    rows = data.load_split(run, "train").to_list()
    states = []
    hook = tuned.base_model.model.score.register_forward_pre_hook(
        lambda m, args: states.append(args[0][0, -1].detach())
    )
    for r in rows:
        tuned(input_ids=torch.tensor([r["input_ids"]]))
    hook.remove()
    y = np.array([r["label"] for r in rows])
    x = torch.stack(states).float()
    with torch.no_grad():
        head.copy_(torch.stack([0 * x[0], 3 * (x[y == 1].mean(0) - x[y == 0].mean(0))]))
    tuned.save_pretrained(run.path / "trl" / "adapters")
    write_json(
        run.path / "trl" / "training.json",
        dict(status="finished", engine="trl", seconds=1.0, steps=3),
    )
    return run, ev.evaluate(run)


def relabelled(run, split, change):
    "Replace the labels of a prepared split; returns the old ones."
    ds = data.load_split(run, split)
    old = ds["label"][:]
    new = ds.remove_columns("label").add_column("label", np.array(change(np.array(old))))
    new.save_to_disk(run.path / "data/new")
    del ds
    shutil.rmtree(run.path / "data" / split)
    (run.path / "data/new").rename(run.path / "data" / split)
    return old


def test_a_classifier_gets_threshold_figures_rules_and_verdict(classifier):
    run, m = classifier
    rows = data.load_split(run, "test").to_list()
    assert list(m["models"]) == ["base", "trl"]
    assert plots.main_metric(m["models"]["trl"]["test"]) == "f1"
    assert set(m["baselines"]) == {"majority", "prior"}
    assert "the base (untrained head)" in m["verdict"]["trl"]["sentence"]
    assert "trl - " + next(iter(m["baselines"])) in m["between"]
    for who in ("base", "trl"):
        f = pd.read_parquet(run.path / f"predictions/{who}.test.parquet")
        v = pd.read_parquet(run.path / f"predictions/validation/{who}.validation.parquet")
        at = m["thresholds"][who]
        p = np.stack(f.probabilities)[:, 1]
        assert at["source"] == "validation"
        assert at["n"] == 40
        best, _ = classes.best_threshold(v.truth, np.stack(v.probabilities)[:, 1])
        assert at["value"] == best
        assert m["models"][who]["test"]["threshold"]["value"] == best
        assert f.choice.tolist() == (p >= at["value"]).astype(int).tolist()
        assert f.truth.tolist() == [r["label"] for r in rows]
        f1 = sk.f1_score(f.truth, f.choice)
        assert m["models"][who]["test"]["f1"]["value"] == pytest.approx(f1, abs=1e-6)
    tuned = model.load_tuned(run, "trl")
    one_by_one = scoring.predict_labels(tuned, None, rows, batch_size=1)
    stored = pd.read_parquet(run.path / "predictions/trl.test.parquet")
    assert np.allclose(one_by_one.scores.tolist(), stored.scores.tolist(), atol=1e-4)
    assert ev.figures(run) == m
    assert read_json(run.path / "metrics.json") == json.loads(json.dumps(m))
    assert {"majority", "base (untrained head)"} <= {*plots.table(m), *plots.class_table(m).index}
    assert plots.class_table(m).loc["trl", "threshold"] != "–"
    assert plots.plot_scores(m)
    assert plots.plot_labels(ev.read_predictions(run), ev.read_predictions(run, "validation"), m)


def test_the_test_set_has_no_part_in_the_threshold(classifier):
    run, m = classifier
    rng = np.random.default_rng(0)
    old = relabelled(run, "test", rng.permutation)
    try:
        permuted = ev.evaluate(run)
    finally:
        relabelled(run, "test", lambda _: old)
    assert permuted["thresholds"] == m["thresholds"]
    auroc_permuted = permuted["models"]["trl"]["test"]["auroc"]["value"]
    assert auroc_permuted < m["models"]["trl"]["test"]["auroc"]["value"]
    old = relabelled(run, "validation", lambda y: np.ones_like(y))
    try:
        assert ev.evaluate(run)["thresholds"]["trl"]["value"] != m["thresholds"]["trl"]["value"]
    finally:
        relabelled(run, "validation", lambda _: old)


def test_a_recipe_may_set_the_threshold_and_without_validation_it_is_a_half(classifier):
    run, m = classifier

    def recipe(t):
        evaluation = run.recipe.evaluation.model_copy(update=dict(threshold=t))
        return run.recipe.model_copy(update=dict(evaluation=evaluation))

    frame = ev.read_predictions(run, "validation")["trl", "validation"]
    assert classes.threshold_of(recipe(0.25), frame) == dict(value=0.25, source="recipe")
    assert classes.threshold_of(recipe(None)) == dict(
        value=0.5, source="a half, for want of a validation set"
    )
