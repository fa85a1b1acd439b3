"""Multiple choice beyond accuracy: figures by other formulas, and a bound on memory.

Questions in another order are what `data.prompts` would have written.
"""

from medft.core.files import MedftError, assets
from medft.core.recipe import load_recipe
from medft.data.prompts import render_prompts
from medft.data.reading.schemas import read_examples
from medft.evaluate.measures import answers as options
from medft.evaluate.scoring import predict as scoring

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk
from statsmodels.stats.contingency_tables import SquareTable
from transformers import AutoModelForCausalLM, AutoTokenizer

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ eos_token ~ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def made_up(n=400, seed=0, likes=None, how_much=0.5, k=4):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, k, n)
    z = rng.normal(-9, 1, (n, k))
    z[np.arange(n), truth] += 1.5
    if likes is not None:
        z[rng.random(n) < how_much, likes] = 0
    f = pd.DataFrame(
        dict(
            id=range(n),
            group=[f"q{i}" for i in range(n)],
            subject="",
            scores=z.tolist(),
            choice=z.argmax(1),
            choice_norm=z.argmin(1),
            truth=truth,
        )
    )
    return f.assign(
        correct=f.choice == f.truth,
        shuffled_choice=[list(map(int, rng.integers(0, k, i % 4))) for i in range(n)],
    )


def test_figures_by_other_formulas():
    f = made_up()
    found = options.measure_choices(f)
    assert list(found)[0] == "accuracy"
    assert found["accuracy"]["value"] == round(sk.accuracy_score(f.truth, f.choice), 6)
    assert found["acc_norm"]["value"] == round((f.choice_norm == f.truth).mean(), 6)
    macro_f1 = sk.f1_score(f.truth, f.choice, average="macro")
    assert np.isclose(found["macro_f1"]["value"], macro_f1, atol=1e-6)
    assert found["majority"]["value"] == max(np.bincount(f.truth)) / 400
    assert found["chance"]["value"] == 0.25
    several = f[f.shuffled_choice.str.len() > 0]
    consistent = 0
    right = 0
    for choice, others, truth in zip(
        several.choice, several.shuffled_choice, several.truth, strict=True
    ):
        choices = [choice, *others]
        consistent += len(set(choices)) == 1
        right += choices.count(truth) / len(choices)
    assert found["shuffle_consistency"]["n"] == len(several) == 300
    assert found["shuffle_consistency"]["value"] == round(consistent / 300, 6)
    assert np.isclose(found["shuffle_accuracy"]["value"], right / 300, atol=1e-6)
    assert all(x["ci95"][0] <= x["value"] <= x["ci95"][1] for x in found.values())


def test_what_is_not_there_is_left_out_and_a_file_gives_the_same(tmp_path):
    f = made_up(60)
    bare = f.drop(columns="shuffled_choice")
    assert not [m for m in options.measure_choices(bare) if "shuffle" in m]
    assert "letters_acc" not in options.measure_choices(bare)
    may_lose_the_last = (f.index % 2 == 0) & (f.truth < 3) & (f.choice < 3)
    scores = [
        s[:3] if shorter else s for s, shorter in zip(f.scores, may_lose_the_last, strict=True)
    ]
    f = f.assign(letters_acc=f.correct, scores=scores)
    f.to_parquet(tmp_path / "f.parquet")
    found = options.measure_choices(f)
    assert options.measure_choices(pd.read_parquet(tmp_path / "f.parquet")) == found
    assert found["letters_acc"] == found["accuracy"]
    assert 0.25 < found["chance"]["value"] < 1 / 3
    one_group = options.measure_choices(f.assign(group="one article"))
    assert one_group["macro_f1"]["ci95"] == [None, None]


def test_positions_by_other_formulas():
    f = made_up(likes=1)
    found = options.position_figures(f)
    by = sk.recall_score(f.truth, f.choice, average=None)
    assert np.allclose(found["recall"], by, atol=1e-6)
    assert np.isclose(found["recall_spread"], np.std(by), atol=1e-6)
    assert np.allclose(found["chosen"], np.bincount(f.choice) / 400, atol=1e-6)
    assert np.allclose(found["truth"], np.bincount(f.truth) / 400, atol=1e-6)
    for seed in range(4):
        f = made_up(seed=seed, likes=2, how_much=0.03)
        p = (
            SquareTable(pd.crosstab(f.truth, f.choice).to_numpy())
            .homogeneity(method="stuart_maxwell")
            .pvalue
        )
        assert abs(options.position_figures(f)["p"] - p) < 0.06
    no_d = made_up()
    no_d = no_d[no_d.truth < 3].reset_index(drop=True)
    found = options.position_figures(no_d)
    assert found["recall"][3] is None
    assert found["recall_spread"] is not None
    json.dumps(found, allow_nan=False)


def test_copies_of_a_question_are_no_evidence():
    def alarm(f):
        return options.position_figures(f)["p"] < 0.05

    def twice(f):
        return pd.concat([f] * 4, ignore_index=True)

    assert sum(alarm(twice(made_up(100, seed))) for seed in range(30)) <= 5
    assert alarm(twice(made_up(100, likes=0)))


@pytest.mark.long
def test_a_fair_model_is_said_to_like_a_place_in_one_of_twenty():
    assert (
        0.02
        <= np.mean(
            [options.position_figures(made_up(200, seed))["p"] < 0.05 for seed in range(400)]
        )
        <= 0.08
    )


def test_kinds_of_questions():
    run = SimpleNamespace(recipe=SimpleNamespace(evaluation=SimpleNamespace(confidence=0.95)))
    f = made_up(90).assign(choice_type=["single", "multi", ""] * 30)
    found = options.types(
        run,
        {
            ("base", "test"): f,
            ("trl", "test"): f,
            ("base", "other"): f.assign(choice_type="single"),
            ("base", "texts"): pd.DataFrame(dict(nll=[1.0])),
        },
        {},
    )["types"]
    assert list(found) == ["test"]
    assert set(found["test"]) == {"single", "multi"}
    assert found["test"]["single"]["trl"]["accuracy"]["n"] == 30
    assert found["test"]["multi"]["base"]["accuracy"]["value"] == round(f.correct[1::3].mean(), 6)
    assert options.positions(run, {("base", "labels"): f.assign(probabilities=1)}, {}) == {}


def test_the_kind_of_a_medmcqa_question_comes_from_its_file():
    row = dict(
        id="q",
        question="Which is right?",
        opa="a",
        opb="b",
        opc="c",
        opd="d",
        cop=2,
        subject_name="Surgery",
    )
    kinds = [
        ex.get("choice_type")
        for _, _, ex, _ in read_examples(
            [
                (1, row | dict(choice_type="multi")),
                (2, row | dict(cop=0)),
                (3, row | dict(choice_type=None)),
            ],
            "f.jsonl",
        )
    ]
    assert kinds == ["multi", None, None]


@pytest.fixture(scope="module")
def base():
    return AutoModelForCausalLM.from_pretrained(
        assets() / "tiny_base"
    ).eval(), AutoTokenizer.from_pretrained(assets() / "tiny_base")


def examples():
    return [
        dict(
            id="1",
            group="1",
            question="Scurvy?\nA. is this a trap",
            options=["vitamin A", "vitamin C, or\nascorbic acid", "zinc", "B. of all"],
            answer=1,
            choice_type="multi",
        ),
        dict(id="2", group="2", question="Does it?", options=["yes", "no"], answer=0, listed=False),
        dict(id="3", group="3", question="Zinc?", options=["yes", "no"], answer=1),
    ]


def moved(ex, order):
    return ex | dict(options=[ex["options"][o] for o in order], answer=order.index(ex["answer"]))


@pytest.mark.parametrize("answer", ["letter", "text"])
@pytest.mark.parametrize("chat", [None, CHATML])
def test_a_turned_row_is_what_the_prompts_room_would_have_written(answer, chat):
    tok = AutoTokenizer.from_pretrained(assets() / "tiny_base")
    tok.chat_template = chat
    recipe = load_recipe("quickstart", [f"dataset.answer={answer}", "dataset.system=Answer."])
    rows = render_prompts(tok, examples(), recipe)
    found = scoring.turned(tok, rows, 3)
    assert [i for i, *_ in found] == [0, 0, 0, 2]
    for i, order, row in found:
        fresh = render_prompts(tok, [moved(examples()[i], order)], recipe)[0]
        for key in ("id", "prompt", "options", "answer"):
            assert row[key] == fresh[key]
        assert all(place != option for place, option in enumerate(order))
        assert fresh["answer"] != rows[i]["answer"]


def test_orders_are_the_same_everywhere_and_put_every_option_everywhere():
    for n in (2, 3, 4, 5, 10):
        whole = scoring.orders("q1", n, 99)
        assert len(whole) == n - 1
        assert all(sorted(o) == list(range(n)) for o in whole)
        assert all(len({o[place] for o in whole} | {place}) == n for place in range(n))
        assert whole == scoring.orders("q1", n, 99)
    assert len({tuple(scoring.orders(f"q{i}", 4, 1)[0]) for i in range(50)}) == 3


def test_a_model_that_likes_a_letter_is_found_out(base, monkeypatch):
    recipe = load_recipe("quickstart", ["dataset.answer=letter", "evaluation.shuffles=3"])
    rows = render_prompts(base[1], examples(), recipe)

    def likes_b(model, tok, rows, *_):
        return [
            [-1.0 if o.strip() == "B" else -5.0 - i for i, o in enumerate(r["options"])]
            for r in rows
        ]

    monkeypatch.setattr(scoring, "score_choices", likes_b)
    frame = scoring.predict(*base, rows, recipe, beside=True)
    assert frame.choice.tolist() == [1, 0, 1]
    at_b = [order[1] for order in scoring.orders("1", 4, 3)]
    assert frame.shuffled_choice.tolist() == [at_b, [], [0]]
    assert options.in_other_orders(frame)["shuffle_consistency"]["value"] == 0
    assert frame.choice_type.tolist() == ["multi", "", ""]

    def knows(model, tok, rows, *_):
        return [
            [
                -1.0 if f"{o.strip()}. zinc" in r["prompt"].split("\n") else -5.0
                for o in r["options"]
            ]
            for r in rows
        ]

    monkeypatch.setattr(scoring, "score_choices", knows)
    frame = scoring.predict(*base, rows, recipe, beside=True)
    assert frame.choice[0] == 2
    assert frame.shuffled_choice[0] == [2, 2, 2]


def test_other_forms_and_orders_change_nothing_of_the_first(base):
    for answer in ("letter", "text"):
        recipe = load_recipe("quickstart", [f"dataset.answer={answer}"])
        rows = render_prompts(base[1], examples(), recipe)
        plain = scoring.predict(*base, rows, recipe)
        more = scoring.predict(*base, rows, recipe, beside=True)
        for a, b in zip(plain.scores, more.scores, strict=True):
            assert np.allclose(a, b, atol=1e-4)
        assert plain.drop(columns="scores").equals(more[[c for c in plain if c != "scores"]])
        assert {"letters_acc", "texts_acc_norm", "shuffled_choice"} <= set(more)
        assert "shuffled_choice" not in plain
        for i, order, row in scoring.turned(base[1], rows, 1):
            scores = scoring.score_choices(*base, [row])[0]
            assert more.shuffled_choice[i] == [order[int(np.argmax(scores))]]
    none = scoring.predict(*base, rows[1:2], recipe, beside=True)
    # The options are not listed, so there are no other orders.
    assert set(none) - {"choice_type"} == set(plain) - {"choice_type"}


def test_a_template_in_one_piece_is_scored_as_trained_and_says_so(base, monkeypatch):
    recipe = load_recipe("quickstart")
    rows = render_prompts(base[1], examples(), recipe)
    heard = []
    monkeypatch.setattr(scoring, "template", lambda tok: SimpleNamespace(frame=lambda: None))
    frame = scoring.predict(*base, rows, recipe, heard.append, beside=True)
    assert not [c for c in frame if "_acc" in c or "shuffled" in c]
    assert "cannot be taken apart" in heard[0]
    with pytest.raises(MedftError, match="evaluation.score"):
        scoring.predict_forms(*base, rows, "both")


def test_a_negative_number_of_orders_is_refused():
    with pytest.raises(MedftError, match="evaluation.shuffles"):
        load_recipe("quickstart", ["evaluation.shuffles=-1"])


MEMORY = """
import resource
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd

from medft.evaluate import metrics as evaluate
from medft.evaluate.measures import answers as options, calibration


def frame(seed, n=10_000):
    rng = np.random.default_rng(seed)
    truth = np.random.default_rng(0).integers(0, 4, n)
    z = rng.normal(0, 1.5, (n, 4))
    z[np.arange(n), truth] += 1 + seed / 10
    choice = z.argmax(1)
    other_choice = np.where(rng.random(n) < 0.8, choice, rng.integers(0, 4, n))
    f = pd.DataFrame(
        dict(
            id=[f"q{i}" for i in range(n)],
            group=[f"article {i // 2}" for i in range(n)],
            subject=[f"s{i % 20}" for i in range(n)],
            prompt_sha256="x",
            scores=(2 * z - 5).tolist(),
            choice=choice,
            choice_norm=choice,
            truth=truth,
            choice_type=np.where(np.arange(n) % 3, "single", "multi"),
            shuffled_choice=[[int(x)] for x in other_choice],
        )
    )
    forms = ("letters_acc", "texts_acc", "texts_acc_norm", "texts_acc_bytes")
    correct = f.choice == f.truth
    return f.assign(correct=correct, **{form: correct for form in forms})


frames = {(who, "test"): frame(i) for i, who in enumerate(("base", "trl", "unsloth", "fast"))}
evaluation = SimpleNamespace(confidence=0.95)
run = SimpleNamespace(
    path=Path(tempfile.mkdtemp()), recipe=SimpleNamespace(evaluation=evaluation)
)
predictions = run.path / "predictions" / "validation"
predictions.mkdir(parents=True)
for (who, _), f in frames.items():
    f[:1000].to_parquet(predictions / f"{who}.validation.parquet")
made = evaluate.summarise(frames)
for part in (calibration.calibration_part, options.positions, options.types):
    made |= part(run, frames, made)
assert len(made["verdict"]) == 3
assert made["calibration"]["fast"]["test"]["ece_scaled"]
assert len(made["types"]["test"]) == 2
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.long
def test_statistics_of_10_000_questions_take_less_than_2_gb():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 2e9
