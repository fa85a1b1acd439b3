"""Written answers: measures by their definitions, answers that depend on no other row, refusals."""

from medft.core.files import MedftError
from medft.core.recipe import load_recipe
from medft.core.run import Run
from medft.data import chat_templates
from medft.data import pipeline as data
from medft.evaluate import metrics as ev
from medft.evaluate.measures import answers as written
from medft.evaluate.scoring import generation as answers
from medft.evaluate.scoring import predict as scoring
from medft.model.load import load_base

import json

import numpy as np
import pandas as pd
import pytest
import torch
from real_data import LARGE, SMALL, needs_large, on_real_rows

ROWS = [
    dict(prompt=f"Question: {q}\nAnswer:", reference="word " * n)
    for q, n in (("Zinc?", 2), ("Scurvy: which vitamin is missing?", 12), ("Iron?", 1))
]


@pytest.fixture(scope="module")
def base():
    recipe = load_recipe("quickstart")
    return load_base(recipe), chat_templates.load_tokenizer(recipe)


def longest(a, b):
    "The longest common subsequence, by its definition."
    if not a or not b:
        return 0
    with_both = 1 + longest(a[1:], b[1:]) if a[0] == b[0] else 0
    return max(longest(a[1:], b), longest(a, b[1:]), with_both)


def test_overlap_is_what_its_definition_says():
    rng = np.random.default_rng(0)
    words = "zinc iron vitamin c lack of".split()
    for _ in range(30):
        a, b = (list(rng.choice(words, rng.integers(1, 7))) for _ in range(2))
        k = longest(a, b)
        assert answers.rouge_l(" ".join(a), " ".join(b)) == pytest.approx(2 * k / (len(a) + len(b)))
        same = sum(min(a.count(w), b.count(w)) for w in words)
        assert answers.token_f1(" ".join(a), " ".join(b)) == pytest.approx(
            2 * same / (len(a) + len(b))
        )
    assert (
        answers.exact("The Vitamin-C!", "vitaminc")
        and not answers.exact("vitamin d", "vitamin c")
        and answers.token_f1("", "") == 1
        and answers.token_f1("the", "zinc") == 0
    )


@pytest.mark.parametrize(
    "said, no",
    [
        ("I cannot provide medical advice.", True),
        ("Sorry, but I can’t help with that.", True),
        ("As an AI, I do not have a body.", True),
        ("I'm only a language model.", True),
        ("I am not a doctor, but zinc may help.", True),
        ("We are unable to answer this.", True),
        ("There is no cure; it cannot be treated.", False),
        ("The patient says: I cannot walk.", False),
        ("I can't tell the two apart without a biopsy; take one.", False),
        ("People who are unable to give blood", False),
        ("AI is short for aromatase inhibitor.", False),
        ("As an aid to walking, use a cane.", False),
        ("Sorry, the dose is 5 mg.", False),
    ],
)
def test_a_refusal_is_told_from_what_cannot_be_done(said, no):
    assert answers.refuses(said) == no


def test_an_endless_answer_repeats_its_end_and_not_its_beginning():
    assert (
        answers.ends_in_loop("a b c " * 3)
        and answers.ends_in_loop("Start. " + "and so on " * 20)
        and answers.ends_in_loop("x y " * 2 + "x y")
        and answers.ends_in_loop("! " * 6)
    )
    assert (
        not answers.ends_in_loop("a b c " * 3 + "and then it stops here")
        and not answers.ends_in_loop("a b a b")
        and not answers.ends_in_loop("no no no")
    )


@on_real_rows
def test_no_answer_of_the_nih_is_a_refusal_or_endless(folder):
    real = pd.read_csv(
        folder / "medquad/medDataset_processed.csv", usecols=["Answer"], nrows=2000
    ).Answer.dropna()
    assert (
        len(real) > (20 if folder == SMALL else 1900)
        and not real.map(answers.refuses).any()
        and not real.map(answers.ends_in_loop).any()
    )


def test_answers_do_not_depend_on_the_batch(base):
    model, tok = base
    steps = []
    hook = model.register_forward_pre_hook(lambda *a: steps.append(1))
    said = answers.write_answers(model, tok, ROWS)
    hook.remove()
    assert said == answers.write_answers(model, tok, ROWS, batch_size=1)
    bounds = [2 * len(tok(r["reference"])["input_ids"]) + 8 for r in ROWS]
    assert all(
        s["answer_tokens"] <= n and s["ended"] == (s["answer_tokens"] < n)
        for s, n in zip(said, bounds, strict=True)
    )
    assert [
        s["answer_tokens"] for s in answers.write_answers(model, tok, ROWS, max_new_tokens=2)
    ] == [min(2, s["answer_tokens"]) for s in said]
    before, steps[:] = model.generation_config.eos_token_id, []
    model.generation_config.eos_token_id = [
        tok.eos_token_id,
        *range(len(tok)),
    ]  # whatever is said ends the answer
    hook = model.register_forward_pre_hook(lambda *a: steps.append(1))
    none = answers.write_answers(model, tok, ROWS)
    hook.remove()
    model.generation_config.eos_token_id = before
    assert len(steps) == 1 and none == [dict(answer="", answer_tokens=0, ended=True)] * 3


def test_a_prompt_without_room_loses_its_beginning(base):
    model, tok = base
    most = model.config.max_position_embeddings
    long = [dict(prompt="Zinc is a metal. " * most, reference="zinc")]
    (kept,) = answers.bound_answers([list(range(3 * most))], [[1]], positions=most)
    assert kept == (list(range(2 * most + 10, 3 * most)), 10)
    assert len(answers.write_answers(model, tok, long)) == 1


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    at = tmp_path_factory.mktemp("encoder")
    words = {
        w: i for i, w in enumerate("[PAD] [UNK] [CLS] [SEP] vitamin c zinc iron lack of is".split())
    }
    t = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    t.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=t,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(at)
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(words),
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=16,
        )
    ).save_pretrained(at)
    return at


def test_bertscore_is_its_formula_token_by_token(encoder):
    e = answers.Encoder(encoder)
    said, meant = (
        ["vitamin c", "zinc", "iron " * 30, ""],
        ["lack of vitamin c", "zinc", "iron is zinc", "zinc"],
    )
    found = answers.bert_scores(e, said, meant)
    a, b = (
        e.model(**e.tok(x, return_tensors="pt"), output_hidden_states=True)
        .hidden_states[3][0]
        .detach()
        for x in ("vitamin c", "lack of vitamin c")
    )
    cos = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=-1)
    p, r = cos.max(1).values[1:-1].mean(), cos.max(0).values[1:-1].mean()
    assert (
        e.layer == 3
        and found[0] == pytest.approx(float(2 * p * r / (p + r)), abs=1e-5)
        and found[1] == pytest.approx(1, abs=1e-5)
        and 0 < found[2] < 1
        and found[3] == 0
    )
    assert answers.bert_scores(e, said[:1], meant[:1])[0] == pytest.approx(
        found[0], abs=1e-5
    )  # whatever else is in the batch
    with pytest.raises(MedftError, match="evaluation.bertscore: nowhere is no folder of a model"):
        answers.Encoder("nowhere")
    (encoder / "empty").mkdir()
    (encoder / "empty" / "config.json").write_text("{}")
    with pytest.raises(MedftError, match="holds no encoder"):
        answers.Encoder(encoder / "empty")


@pytest.mark.parametrize(
    "keys, said",
    [
        (["evaluation.max_new_tokens=0", "evaluation.generate=true"], "greater than or equal to 1"),
        (["evaluation.max_new_tokens=9"], "no answer is written"),
        (["evaluation.bertscore=x"], "no answer is written"),
        (
            ["evaluation.generate=true", "model.task=classification", "engine=[trl]"],
            "a classifier writes nothing",
        ),
    ],
)
def test_keys_without_an_effect_are_refused(keys, said):
    with pytest.raises(MedftError, match=said):
        load_recipe("quickstart", keys)


def test_a_missing_encoder_is_refused_before_anything_starts():
    from medft.cli.arguments import check_files

    with pytest.raises(MedftError, match="evaluation.bertscore: nowhere"):
        check_files(
            load_recipe("quickstart", ["evaluation.generate=true", "evaluation.bertscore=nowhere"])
        )


def made(good, n=80, seed=0):
    rng = np.random.default_rng(seed)
    wrong = ["", "I cannot help with that.", "and zinc " * 8, "iron, of course"]
    meant = [f"vitamin {'abcde'[i % 5]} and zinc" for i in range(n)]
    said = [m if rng.random() < good else wrong[rng.integers(4)] for m in meant]
    k = np.array([len(s.split()) for s in said])
    return pd.DataFrame(
        dict(
            id=range(n),
            group=[f"document {i // 2}" for i in range(n)],
            subject=["a", "b"] * (n // 2),
            prompt_sha256="",
            nll=k + 5.0,
            tokens=5,
            bytes=20,
            **answers.judged_answers(said, meant),
            answer_tokens=k,
            reference_tokens=4,
            ended=k < 12,
        )
    )


def test_every_figure_follows_from_the_file_alone(tmp_path):
    frame = made(0.5)
    frame.to_parquet(tmp_path / "f.parquet")
    found = written.measure_text(pd.read_parquet(tmp_path / "f.parquet"))
    own = dict(
        exact_match=frame.exact,
        token_f1=frame.f1,
        rouge_l=frame.rouge_l,
        answer_tokens=frame.answer_tokens,
        empty=frame.answer == "",
        truncated=~frame.ended,
        refusal=frame.answer.str.startswith("I cannot"),
        endless=frame.answer.str.startswith("and zinc"),
    )
    assert (
        {m: found[m]["value"] for m in own}
        == {m: round(float(x.mean()), 6) for m, x in own.items()}
        and list(found)[0] == "loss"
        and json.dumps(found)
    )
    assert found["length_ratio"]["value"] == pytest.approx(
        frame.answer_tokens.sum() / 320, abs=1e-6
    ) and all(f["ci95"][0] <= f["value"] <= f["ci95"][1] and f["n"] == 80 for f in found.values())
    assert (
        written.measure_answers(made(1.0))["refusal"]["ci95"][1] > 0.01
        and "bertscore" not in found
        and written.measure_answers(frame.assign(bertscore=0.5))["bertscore"]["value"] == 0.5
    )
    old = frame.drop(
        columns=["rouge_l", "refusal", "endless", "answer_tokens", "reference_tokens", "ended"]
    )
    assert {"exact_match", "token_f1", "empty"} == set(written.measure_answers(old))


def test_better_answers_are_found_and_equal_ones_are_not():
    about = dict(main="test", names={}, confidence=0.95, verdict=dict(trl={}, fast={}))
    frames = {
        ("base", "test"): made(0.4),
        ("trl", "test"): made(0.8),
        ("fast", "test"): made(0.4, seed=3),
    }
    found = written.compare_answers(None, frames, about)["answers"]
    assert (
        {d["label"] for d in found["trl"].values()} == {"better"}
        and {d["label"] for d in found["fast"].values()} == {"tie"}
        and set(found["trl"]) == {"token_f1", "rouge_l", "exact_match"}
    )
    assert (
        {d["tests"] for w in found.values() for d in w.values()} == {6}
        and found["trl"]["rouge_l"]["test"] == "permutation"
        and "ROUGE-L" in found["trl"]["rouge_l"]["sentence"]
    )
    assert found["trl"]["token_f1"]["effect"] == pytest.approx(
        (frames["trl", "test"].f1 - frames["base", "test"].f1).mean(), abs=1e-6
    )
    assert (
        written.compare_answers(
            None, {k: f.drop(columns="exact") for k, f in frames.items()}, about
        )
        == {}
    )


@pytest.mark.long
def test_equal_models_rarely_differ():
    rng = np.random.default_rng(0)
    spoke = []
    for _ in range(300):
        both = [
            pd.DataFrame(
                dict(
                    group=range(500), exact=(x := rng.beta(0.5, 0.5, 500)) > 0.9, f1=x, rouge_l=x**2
                )
            )
            for _ in range(2)
        ]
        spoke.append([d["label"] != "tie" for d in written.answer_comparisons(*both).values()])
    rates = np.mean(spoke, 0)
    assert (rates <= 0.085).all() and (rates >= 0.01).all(), (
        rates
    )  # of 300: within three standard errors of 2.5 to 6.5 %


@needs_large
def test_medquads_questions_are_answered_and_judged(tmp_path, base, encoder):
    "From the file to metrics.json, with a second model that is the base with noise."
    rows = pd.read_csv(LARGE / "medquad/medDataset_processed.csv")
    some = rows[rows.Answer.astype(str).str.len() < 300].drop_duplicates("Question").iloc[:60]
    some.to_csv(tmp_path / "medquad.csv", index=False)
    r = load_recipe(
        "quickstart",
        [
            f"dataset.path={tmp_path}/medquad.csv",
            "dataset.test_path=null",
            "dataset.validation_path=null",
            "dataset.sets={}",
            "dataset.holdout=0.3",
            "dataset.truncated_share=1.0",
            "evaluation.generate=true",
            "evaluation.max_new_tokens=24",
            f"evaluation.bertscore={encoder}",
            "tracking.mlflow=false",
        ],
    )
    run = Run.create(r, root=tmp_path / "runs")
    data.prepare(run)
    test = data.load_split(run, "test").to_list()
    model, tok = load_base(r), base[1]
    assert len(test) > 5 and all(x["reference"] for x in test)
    for who in ("base", "trl"):
        frame = scoring.predict(model, tok, test, r)
        (run.path / "predictions").mkdir(exist_ok=True)
        frame.to_parquet(run.path / "predictions" / f"{who}.test.parquet")
        with torch.no_grad():
            [p.add_(0.02 * torch.randn_like(p) * p.std()) for p in model.parameters() if p.ndim > 1]
    m = ev.figures(run)
    found = m["models"]["base"]["test"]
    assert list(found)[0] == "loss" and {
        "exact_match",
        "token_f1",
        "rouge_l",
        "bertscore",
        "answer_tokens",
        "length_ratio",
        "empty",
        "truncated",
        "refusal",
        "endless",
    } <= set(found)
    assert (
        found["answer_tokens"]["value"] <= 24
        and set(m["answers"]["trl"]) == {"token_f1", "rouge_l", "bertscore", "exact_match"}
        and m["verdict"]["trl"]["metric"] == "loss"
    )
    assert set(m["subjects"]["test"]) and {
        x["n"] for s in m["subjects"]["test"].values() for x in s["base"].values()
    }
