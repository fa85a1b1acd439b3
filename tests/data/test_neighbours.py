"""Near-duplicates, groups and benchmark overlap: against brute force, and on planted copies."""

from medft.core.files import MedftError
from medft.data.quality import near_duplicates as nb

import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_data import LARGE, needs_large
from scipy.sparse import csr_array

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def word(rng):
    return "".join(rng.choices(LETTERS, k=rng.randrange(2, 11)))


def exam(n, seed=0, vocabulary=3000):
    "Distinct questions with four options, of the length of exam questions, words by Zipf's law."
    rng = random.Random(seed)
    words = [word(rng) for _ in range(vocabulary)]
    weights = [1 / (i + 3) for i in range(vocabulary)]

    def pick(k):
        return " ".join(rng.choices(words, weights, k=k))

    return [
        "\n".join(
            [pick(rng.randrange(8, 25)) + "?", *(pick(rng.randrange(1, 5)) for _ in range(4))]
        )
        for _ in range(n)
    ]


def cut(text, n):
    flat = " " + " ".join(nb.words_of(text)) + " "
    return {flat[i : i + n] for i in range(len(flat) - n + 1)}


def exact(texts, limit, n=3):
    "All pairs at or above a similarity, by comparing everything."
    sets = [cut(t, n) for t in texts]
    number = {}
    at = [(i, number.setdefault(s, len(number))) for i, mine in enumerate(sets) for s in mine]
    m = csr_array(
        (np.ones(len(at), np.int32), tuple(np.array(at).T)), shape=(len(sets), len(number))
    )
    shared = (m @ m.T).tocoo()
    size = np.array([len(s) for s in sets])
    x, y = shared.coords
    j = shared.data / (size[x] + size[y] - shared.data)
    return {
        (i, k): v
        for i, k, v in zip(x.tolist(), y.tolist(), j.tolist(), strict=False)
        if i < k and v >= limit
    }


def disturbed(texts, seed=1):
    "Variants at every distance: each text a few times with more and more of its words replaced."
    rng = random.Random(seed)
    out = []
    for t in texts:
        for k in range(6):
            w = t.split(" ")
            for _ in range(k):
                w[rng.randrange(len(w))] = word(rng)
            out.append(" ".join(w))
    return out


@pytest.mark.parametrize("limit", [0.6, 0.8, 0.9])
def test_agrees_with_brute_force(limit):
    texts = disturbed(exam(200))
    truth = exact(texts, limit)
    found = nb.near_duplicates(texts, limit)
    assert len(truth) > 100 and all(
        (i, k) in truth and abs(truth[i, k] - j) < 1e-6 for i, k, j in found
    ), "a pair that is not one"
    label = nb.label_groups([""] * len(texts), found)
    held = sum(label[i] == label[k] for i, k in truth) / len(truth)
    assert held >= 0.99, f"{held:.4f} of the true pairs are in one group"
    assert len(found) == len(texts) - len(set(label)), "more ties than a group needs"


def test_across_agrees_with_brute_force():
    texts = disturbed(exam(200))
    rng = random.Random(3)
    rng.shuffle(texts)
    a, b = texts[:700], texts[700:]
    truth = {(i, k - 700): j for (i, k), j in exact(texts, 0.8).items() if i < 700 <= k}
    found = nb.across(a, b, 0.8)
    assert all(abs(truth[i, k] - j) < 1e-6 for i, k, j in found) and len(found) <= len(texts)
    for side in (0, 1):
        want, got = {p[side] for p in truth}, {p[side] for p in found}
        assert got <= want and len(got) >= 0.995 * len(want)
    best = {}
    for (i, _), j in truth.items():
        best[i] = max(best.get(i, 0), j)
    closest = Counter(
        abs(max(j for i_, _, j in found if i_ == i) - best[i]) < 1e-6 for i in {p[0] for p in found}
    )
    assert closest[True] >= 0.99 * closest.total()


def test_planted_copies_are_found():
    found = nb.planted_recall(exam(500), 0.8)
    assert np.mean([f for f, _ in found.values()]) >= 0.95, found
    assert all(f >= 0.95 for name, (f, _) in found.items() if name != "sentence added"), found


def test_distinct_texts_are_left_alone():
    texts = exam(8000, seed=5)
    assert nb.near_duplicates(texts) == [] and nb.across(texts[:4000], texts[4000:]) == []


def test_templates_that_differ_in_one_name_are_not_called_copies():
    rng = random.Random(2)
    names = sorted(
        {word(rng) + word(rng) + rng.choice(["itis", "oma", "emia", "pathy"]) for _ in range(1500)}
    )
    for template in (
        "What are the symptoms of {} syndrome ?",
        "What are the treatments for {} ?",
        "Is {} inherited ?",
        "How many people are affected by {} disease ?",
    ):
        texts = [template.format(n) for n in names]
        ties = nb.near_duplicates(texts)
        assert sum(not nb.variant(texts[i], texts[k]) for i, k, _ in ties) <= 0.02 * len(texts), (
            template
        )


@pytest.mark.parametrize(
    "a, b",
    [
        (
            "Serum potassium is 3.5 mEq/L in this patient, who has had diarrhoea for four days",
            "Serum potassium is 5.5 mEq/L in this patient, who has had diarrhoea for four days",
        ),
        ("What is hepatitis A?", "What is hepatitis B?"),
        (
            "Do I need to see a doctor for hepatitis A?",
            "Do I need to see a doctor for hepatitis C?",
        ),
        (
            "What are the treatments for glycogen storage disease type I ?",
            "What are the treatments for glycogen storage disease type IV ?",
        ),
        ("Treatment of absence seizures?", "Treatment of focal seizures?"),
        ("Rh +ve mother", "Rh -ve mother"),
        ("Is albinism inherited?", "Is ocular albinism inherited?"),
        ("Hypertension is caused by", "Hypotension is caused by"),
    ],
)
def test_variants(a, b):
    assert nb.variant(a, b) and nb.variant(b, a)


@pytest.mark.parametrize(
    "a, b",
    [
        (
            "Which drug is the antidote in opioid overdose?",
            "which drug is the antidote in opiod overdose",
        ),
        ("Sjögren’s syndrome is", "SJOGREN'S SYNDROME IS:"),
        (
            "The drug of choice for treatment of status epilepticus in a child is which one",
            "Drug of choice for the treatment of status epilepticus in a child is which one "
            "(asked twice)",
        ),
        ("A beta-blocker", "a beta blocker"),
        ("given without food", "given with out food"),
    ],
)
def test_copies(a, b):
    assert not nb.variant(a, b) and not nb.variant(b, a)


def test_equal_texts_in_thousands_are_quick():
    began = time.perf_counter()
    ties = nb.near_duplicates(["The same question?"] * 5000 + exam(10))
    assert len(ties) == 4999 and {t[0] for t in ties} == {0} and {t[2] for t in ties} == {1.0}
    assert time.perf_counter() - began < 2


def test_big_clusters_of_variants_stay_linear():
    rng = random.Random(0)
    base = exam(3, seed=4)
    texts = []
    for i in range(3000):
        w = base[i % 3].split(" ")
        for _ in range(rng.choice([1, 1, 2, 3])):
            w[rng.randrange(len(w))] = word(rng)
        texts.append(" ".join(w))
    truth = exact(texts, 0.8)
    began = time.perf_counter()
    ties = nb.near_duplicates(texts)
    seconds = time.perf_counter() - began
    label = nb.label_groups([""] * len(texts), ties)
    assert len(truth) > 100_000 and len(ties) < len(texts) and seconds < 15
    assert np.mean([label[i] == label[k] for i, k in truth]) >= 0.995


@pytest.mark.parametrize(
    "texts",
    [
        [],
        [""],
        ["", "", "?", "!"],
        ["a"],
        ["a", "b"],
        ["ab", "AB."],
        ["β", "β"],
        ["\x00", "\ud800 x", "x"],
    ],
)
def test_empty_and_very_short_texts(texts):
    same = {
        (i, k)
        for i, k in itertools.combinations(range(len(texts)), 2)
        if nb.words_of(texts[i]) and nb.words_of(texts[i]) == nb.words_of(texts[k])
    }
    assert {t[:2] for t in nb.near_duplicates(texts)} == same
    met = nb.across(texts, texts)
    known = {i for i, t in enumerate(texts) if nb.words_of(t)}
    assert {i for i, *_ in met} == {k for _, k, _ in met} == known and all(
        nb.words_of(texts[i]) == nb.words_of(texts[k]) for i, k, _ in met
    )
    (
        nb.contaminated(texts, texts),
        nb.contaminated(texts, []),
        nb.contaminated([], texts),
        nb.across(texts, []),
        nb.across([], texts),
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=30), max_size=12), st.floats(0.3, 1))
def test_any_text_at_all(texts, limit):
    ties = nb.near_duplicates(texts, limit)
    assert all(0 <= i < k < len(texts) and limit - 1e-6 <= j <= 1 for i, k, j in ties)
    assert all(
        0 <= i < len(texts) and 0 <= k < len(texts)
        for i, k, _ in nb.across(texts, texts[::-1], limit) + nb.contaminated(texts, texts)
    )


def test_long_texts():
    rng = random.Random(0)
    words = [word(rng) for _ in range(2000)]

    def article():
        return " ".join(rng.choices(words, [1 / (i + 3) for i in range(2000)], k=4000))

    articles = [article() for _ in range(30)]
    edited = " ".join(w if rng.random() > 0.02 else word(rng) for w in articles[4].split())
    between = [
        articles[7][:1900].rsplit(" ", 1)[0],
        articles[7][:2150].rsplit(" ", 1)[0],
    ]  # one on either side of what counts as long
    assert {t[:2] for t in nb.near_duplicates(articles + [edited] + between)} == {(4, 30), (31, 32)}


def test_long_texts_across():
    a = exam(5, seed=9)
    long = [" ".join(exam(30, seed=s)) for s in range(4)]
    assert [(i, k) for i, k, _ in nb.across(a + long, [long[2] + " An added sentence."])] == [
        (7, 0)
    ]


def test_same_in_every_process():
    code = (
        "import json, sys; from medft.data.quality import near_duplicates as nb; t = "
        "json.load(sys.stdin); "
        "print(json.dumps([nb.near_duplicates(t), nb.across(t[::2], t[1::2]), "
        "nb.contaminated(t[::2], t[1::2]), nb.label_groups(t, [(0, 1)]).tolist()]))"
    )
    texts = json.dumps(disturbed(exam(60)))
    out = {
        subprocess.run(
            [sys.executable, "-c", code],
            input=texts,
            text=True,
            capture_output=True,
            check=True,
            env=os.environ | {"PYTHONHASHSEED": seed},
        ).stdout
        for seed in "17"
    }
    assert len(out) == 1


def test_groups():
    assert nb.label_groups([]).tolist() == [] and nb.label_groups(["", "", None]).tolist() == [
        0,
        1,
        2,
    ]
    assert nb.label_groups(["a", "b", "c", "d"], [(0, 1), (1, 2, 0.8)]).tolist() == [0, 0, 0, 1], (
        "not transitive"
    )
    assert nb.label_groups([["p1", "p2"], ["p3"], ["p2", "p3"], "p4"]).tolist() == [0, 0, 0, 1], (
        "a row of two patients ties both"
    )
    big = nb.label_groups([f"k{i % 1000}" for i in range(100_000)])
    assert big.max() == 999 and big[:1000].tolist() == list(range(1000))


@pytest.mark.parametrize("limit", [0, -1, 1.5, 80])
def test_impossible_similarity(limit):
    for call in (
        lambda: nb.near_duplicates(["a"], limit),
        lambda: nb.across(["a"], ["b"], limit),
        lambda: nb.contaminated(["a"], ["b"], limit),
    ):
        with pytest.raises(MedftError, match="similarity"):
            call()


def test_bands_follow_the_formula():
    for s in (0.3, 0.5, 0.7, 0.8, 0.9, 0.99):
        r, b = nb.bands(s)
        assert r * b <= nb.PERMUTATIONS and 1 - (1 - s**r) ** b >= 0.995
        assert (
            1 - (1 - s ** (r + 1)) ** (nb.PERMUTATIONS // (r + 1)) < 0.995
            or r == nb.PERMUTATIONS
            or nb.PERMUTATIONS // (r + 1) == nb.PERMUTATIONS // r
        )


def test_signatures_estimate_the_similarity():
    texts = disturbed(exam(150))
    signed = nb.signatures(*nb.normalised(texts), np.arange(len(texts)), 3)
    truth = exact(texts, 0.3)
    error = np.array([(signed[i] == signed[k]).mean() - j for (i, k), j in truth.items()])
    assert abs(error.mean()) < 0.01 and error.std() < 0.045, (
        "classical MinHash of 128 entries has at most 0.044"
    )


WORDS = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron "
    "pi rho sigma tau upsilon phi chi psi omega"
).split()


def test_a_benchmark_in_running_text():
    rng = random.Random(0)

    def fill(k):
        return " ".join(word(rng) for _ in range(k))

    bench = [" ".join(WORDS[:20]), " ".join(WORDS[3:12]), "Of which?", fill(30)]
    train = [
        fill(200) + " " + bench[0].upper() + ". " + fill(50),
        fill(20) + " " + bench[1] + " " + fill(20),
        "of which",
        fill(300),
        " ".join(WORDS[:19]) + " other words",
    ]
    assert nb.contaminated(train, bench) == [
        (0, 0, "13-gram"),
        (0, 1, "9-gram"),
        (1, 1, "9-gram"),
        (2, 2, "equal"),
        (4, 0, "near-duplicate"),
        (4, 1, "9-gram"),
    ]


def test_part_of_a_question_counts_and_the_examiners_formula_does_not():
    rng = random.Random(0)

    def fill(k):
        return " ".join(word(rng) for _ in range(k))

    formula = (
        "which of the following is the most appropriate next step in the management of this patient"
    )
    bench = [f"{fill(60)} {formula}" for _ in range(30)]
    half = " ".join(bench[3].split()[:40]) + " " + fill(100)
    assert nb.contaminated([f"{fill(60)} {formula}", half], bench) == [(1, 3, "13-gram")]
    assert nb.contaminated([f"{fill(60)} {formula}"], bench[:5]) == [], (
        "a shared ending is no share of 30 %"
    )


def test_copied_many_times_is_still_found():
    question = " ".join(WORDS)
    rows = [question + " " + " ".join(WORDS[::-1]) + f" {i}" for i in range(50)]
    assert len({i for i, *_ in nb.contaminated(rows, [question])}) == 50


def test_benchmarks_are_named_fully():
    assert {"medmcqa", "medqa", "pubmedqa", "mmlu"} <= set(nb.BENCHMARKS)
    assert all(
        "/" in hub and split and (config is None or config)
        for parts in nb.BENCHMARKS.values()
        for hub, config, split in parts
    )


def questions(path):
    return [json.loads(line) for line in (LARGE / path).open()]


def whole(r):
    return "\n".join(
        [
            r["question"],
            *(
                r["options"].values()
                if "options" in r
                else (str(r[k]) for k in ("opa", "opb", "opc", "opd"))
            ),
        ]
    )


@needs_large
def test_real_medmcqa():
    rows = questions("medmcqa/dev.json")
    texts = [whole(r) for r in rows]
    ties = nb.near_duplicates(texts)
    truth = exact(texts, 0.8)
    label = nb.label_groups([""] * len(texts), ties)
    assert (
        10 <= len(ties) <= 60
        and all(label[i] == label[k] for i, k in truth)
        and all(t[:2] in truth for t in ties)
    )
    found = nb.planted_recall(texts[::4], 0.8)
    assert np.mean([f for f, _ in found.values()]) >= 0.95, found


@needs_large
def test_real_medqa_is_clean_across_and_has_many_shared_formulas():
    train, test = (
        questions("medqa/train_from_devsplit.jsonl"),
        questions("medqa/phrases_no_exclude_test.jsonl"),
    )
    assert len(
        nb.contaminated([r["question"] for r in train], [r["question"] for r in test])
    ) <= 0.01 * len(test)
    leaked = [r["question"] for r in test[::10]]
    told = nb.contaminated(
        [r["question"] for r in train] + [f"Case review. {q} The answer follows." for q in leaked],
        [r["question"] for r in test],
    )
    assert len({i for i, *_ in told if i >= len(train)}) >= 0.95 * len(leaked)
