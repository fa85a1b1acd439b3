"The matrix of combinations: rules, a diagonal of facts, and the evidence that ships."

from medft.core.files import MedftError
from medft.core.recipe import load_recipe
from medft.core.sections import ENGINES
from medft.model import families
from medft.plan import support_matrix as matrix

import itertools
import subprocess
import sys

import pytest

DIAGONAL = [
    matrix.Combination(f, t, a, "trl")
    for f, t, a in zip(
        families.NAMES, itertools.cycle(reversed(matrix.TASKS)), itertools.cycle(families.ADAPTERS)
    )
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        folder = tmp_path_factory.mktemp("matrix")
        m.setenv("MEDFT_RUNS", str(folder))
        yield folder


def test_the_diagonal_leaves_nothing_out():
    families_, tasks, adapters, _ = map(set, zip(*DIAGONAL, strict=True))
    assert (
        families_ == set(families.NAMES)
        and tasks == set(matrix.TASKS)
        and adapters == set(families.ADAPTERS)
    )
    assert len(matrix.rules(matrix.chosen_combinations())) == 8 * 3 * 6 * len(ENGINES)


@pytest.mark.parametrize("c", DIAGONAL, ids=lambda c: "-".join(c[:3]))
def test_what_the_rule_says_is_what_happens(place, c):
    found = matrix.attempt(c, place)
    assert not matrix.rule_against_fact([found]), matrix.rule_against_fact([found])


@pytest.mark.parametrize("task, adapter", [("classification", "lora"), ("generative", "8bit")])
def test_what_unsloth_would_do_wrong_is_refused_before_anything_loads(place, task, adapter):
    c = matrix.Combination("llama2", task, adapter, "unsloth")
    rule = families.refusal(*c)
    with pytest.raises(MedftError, match="unsloth"):
        load_recipe("quickstart", matrix.overrides(c, place / "none"))
    found = matrix.attempt(c, place)
    assert (
        rule
        and not found["works"]
        and "unsloth" in found["why"]
        and not matrix.rule_against_fact([found])
    )


def test_a_rule_that_is_wrong_is_found_out(place, monkeypatch):
    "Both ways: refused but working, and allowed but failing."
    works = dict(DIAGONAL[0]._asdict(), works=True, why=None, seconds=1.0)
    monkeypatch.setattr(families, "refusal", lambda *c: "because")
    assert "in fact it works" in matrix.rule_against_fact([works])[0]
    monkeypatch.setattr(families, "refusal", lambda *c: None)
    assert (
        "it does not: ValueError"
        in matrix.rule_against_fact([works | dict(works=False, why="ValueError: x")])[0]
    )


def test_a_process_that_dies_is_told(place, monkeypatch):
    "Nothing is lost silently: what was not tried does not count as working."
    monkeypatch.setattr(sys, "executable", "/bin/false")
    found = list(matrix.child_results("trl", ["llama2"], place))
    assert (
        len(found) == 18
        and not any(f["works"] for f in found)
        and "ended with code 1" in found[0]["why"]
    )


def test_the_shipped_evidence_is_whole_and_agrees_with_the_rules():
    kept = matrix.matrix_evidence()
    assert {
        matrix.Combination(*(f[k] for k in matrix.Combination._fields)) for f in kept["found"]
    } == set(matrix.chosen_combinations())
    assert not matrix.rule_against_fact(kept["found"]) and all(
        f["why"] for f in kept["found"] if not f["works"]
    )
    assert {"torch", "transformers", "trl", "peft", "bitsandbytes", "unsloth"} <= kept[
        "packages"
    ].keys() and kept["when"]


@pytest.mark.long
def test_the_whole_of_it():
    done = subprocess.run(
        [sys.executable, "-m", "medft.cli.verbs", "matrix", "--try"], text=True, capture_output=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert f"{8 * 3 * 6 * len(ENGINES)} tried" in done.stdout
