"""Simple rules for pairs of records, learned from nothing but the training rows; aligned pairs."""

from medft.core.files import MedftError
from medft.core.recipe import load_recipe
from medft.core.run import Run
from medft.data import chat_templates, prompts
from medft.data import pipeline as data
from medft.data.prepare import linkage
from medft.data.reading.documents import ALIGNED, aligned_text, compared_fields, plain
from medft.data.reading.free_text import from_entity_pair
from medft.evaluate.measures import comparisons as pair_baselines
from medft.starter.records import STARTER_FOLDER

import json

import numpy as np
import pytest

ROWS = [
    json.loads(line)
    for line in (STARTER_FOLDER / "er_pairs.jsonl").read_text(encoding="utf-8").splitlines()
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    r = Run.create(
        load_recipe("starter_pairs", ["dataset.max_samples=500", "dataset.cache=false"]),
        root=tmp_path_factory.mktemp("pairs"),
    )
    data.prepare(r)
    return r


def test_rows_meet_their_records_in_order(run):
    by_id = {x["pair_id"]: x for x in ROWS}
    for split in ("train", "validation", "test"):
        ds = data.load_split(run, split)
        pairs = pair_baselines.pairs_of_split(run, split)
        assert len(pairs) == len(ds)
        for row, (left, right, label) in zip(ds, pairs, strict=True):
            source = by_id[row["id"]]
            assert label == row["label"] == source["label"]
            assert left == source["left"]
            assert right == source["right"]


def test_rules_are_those_of_record_linkage(run):
    pairs = pair_baselines.pairs_of_split(run, "test")
    for name, rule in pair_baselines.FIXED.items():
        p, choice = pair_baselines.PAIR_BASELINES[name](run, name)["test"]
        expected = [int(linkage.BASELINE_RULES[rule](left, right)) for left, right, _ in pairs]
        assert choice.tolist() == expected
        assert p.tolist() == expected


def test_logistic_regression_learns_from_training_rows_only(run, monkeypatch):
    p, choice = pair_baselines.logistic_regression(run)["test"]
    truth = np.array(data.load_split(run, "test")["label"])
    assert (choice == truth).mean() > 0.9
    assert len(p) == len(truth)
    assert ((p >= 0) & (p <= 1)).all()
    pairs_of = pair_baselines.pairs_of_split

    def with_labels_flipped(flipped_split):
        def flipped(run, split, *args):
            pairs = pairs_of(run, split)
            if split != flipped_split:
                return pairs
            return [(left, right, 1 - label) for left, right, label in pairs]

        monkeypatch.setattr(pair_baselines, "pairs_of_split", flipped)
        return pair_baselines.logistic_regression(run)["test"][0]

    assert np.array_equal(with_labels_flipped("test"), p), "the test's labels do not reach it"
    assert not np.allclose(with_labels_flipped("train"), p)


def test_rows_without_records_are_refused(tmp_path):
    with pytest.raises(MedftError, match="fields of two records"):
        pair_baselines.read_pairs(Run.create(load_recipe("quickstart"), root=tmp_path), "train")


def test_names_are_registered():
    from medft.evaluate.measures.classification import BASELINES

    assert set(pair_baselines.PAIR_BASELINES) <= set(BASELINES)
    assert set(pair_baselines.PAIR_BASELINES) == {
        "all_positive",
        "equal_ssn",
        "equal_name_and_birth_date",
        "exact_rule",
        "logistic_regression",
    }


# aligned pairs
@pytest.mark.parametrize(
    "value, kept",
    [
        ("Zoë-Ann O'Hara", "zoeannohar"),
        (None, ""),
        (0, "0"),
        ("999-11-2222", "999112222"),
        ("Ли", "ли"),
    ],
)
def test_a_field_is_cut_to_what_is_compared(value, kept):
    assert plain("first", value) == kept
    assert plain("ssn", "999-11-2222") == "112222"


def test_aligned_rows_serve_every_task(run):
    row = ROWS[0]
    ex = from_entity_pair(row, "aligned")
    assert ex["text"] == ex["question"] == aligned_text(row["left"], row["right"])
    assert ex["options"] == ["no", "yes"]
    assert [f for f, *_ in compared_fields(row["left"], row["right"])] == list(ALIGNED)
    prepared = data.load_split(run, "test")[0]
    source = next(x for x in ROWS if x["pair_id"] == prepared["id"])
    assert prepared["prompt"] == aligned_text(source["left"], source["right"])
    generative = load_recipe(
        "quickstart", ["engine=trl", "dataset={path: starter/er_pairs.jsonl, pairs: aligned}"]
    )
    tok = chat_templates.load_tokenizer(generative)
    (made,) = prompts.render_prompts(tok, [dict(id="1", **ex)], generative)
    assert made["prompt"].endswith("same:\nAnswer:")
    assert made["completion"].strip().startswith(("yes", "no"))


def test_other_fields_are_compared_when_the_usual_ones_are_missing():
    assert compared_fields(dict(phone=12, seen=[1]), dict(mail="a@b")) == [
        ("phone", "12", ""),
        ("mail", "", "ab"),
    ]
    ex = from_entity_pair(dict(left="Ida Stone", right="I. Stone", label=1))
    assert "Record A" in ex["text"]
