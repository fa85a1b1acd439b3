"""The benchmark: engines take turns, differences are found.

A speed without agreement does not count."""

from medft.bench import (
    engines as bench,
)
from medft.bench import page
from medft.bench import (
    page as bench_page,
)
from medft.bench import worker as measures
from medft.core.files import MedftError, read_json
from medft.core.recipe import load_recipe
from medft.model import families

import json
import os
import signal
import subprocess
import sys

import pytest

SMALL = ["training.per_device_train_batch_size=4", "training.learning_rate=1e-3"]


def shown(losses, drawn="a", rows=((400, 20, 7),), speeds=(100, 100)):
    "What a competitor shows, made up: one turn a speed."
    start = dict(
        drawn=drawn, notes=[], first_step_seconds=2.0, import_seconds=1.0, load_seconds=1.0, peak=9
    )
    return dict(
        starts=[start],
        turns=[
            dict(
                times=[sum(r[0] for r in rows) / s],
                rows=[list(r) for r in rows],
                peak=5 + i,
                joules=None,
            )
            for i, s in enumerate(speeds)
        ],
        losses=losses,
    )


TRL = dict(
    trl_default=shown([3.0, 2.5, 2.0], speeds=(50, 25)),
    trl_best=shown([3.001, 2.499, 2.001], speeds=(100, 50)),
)
SCORES = [[-1.0, -2.0, -3.0, -4.0], [-2.0, -2.01, -5.0, -5.0]]


@pytest.mark.parametrize(
    "spoiled, why",
    [
        (dict(losses=[3.0, 2.5, 2.01]), "its loss is"),
        (dict(losses=[3.0, float("nan"), 2.0]), "its loss is"),
        (dict(losses=[]), "its loss is"),
        (dict(drawn="b"), "did not start"),
        (dict(rows=((401, 20, 7),)), "did not train the rows"),
        (dict(rows=((400, 20, 8),)), "did not train the rows"),
    ],
)
def test_a_spoiled_engine_agrees_with_nobody_and_gets_no_ratio(spoiled, why):
    seen = TRL | dict(fast=shown(**dict(losses=[3.0, 2.5, 2.0], speeds=(900, 900)) | spoiled))
    found = page.training_agreement(seen, {n: SCORES for n in seen}, "bfloat16")
    assert found["trl_best"]["agree"] and not found["fast"]["agree"] and why in found["fast"]["why"]
    engines = {n: bench.engine_figures(s, (1, 1), 1.0) for n, s in seen.items()}
    assert set(bench.bench_ratios(engines, found, list(seen))[0].values()) == {None}


def test_choices_count_where_trl_is_sure():
    seen, good = TRL | dict(fast=shown([3.0, 2.5, 2.0])), {n: SCORES for n in TRL}
    near, wrong = [SCORES[0], [-2.02, -2.01, -5.0, -5.0]], [[-1.0, -0.5, -3.0, -4.0], SCORES[1]]

    def verdict(s):
        return page.training_agreement(seen, good | s, "bfloat16")["fast"]

    assert (
        verdict(dict(fast=near))["agree"] and verdict(dict(fast=near))["choices"]["near_ties"] == 1
    )
    assert (
        not verdict(dict(fast=wrong))["agree"]
        and "1 of 2 choices differ" in verdict(dict(fast=wrong))["why"]
    )
    assert not verdict({})["agree"] and "not compared" in verdict({})["why"]


def test_a_broken_trl_does_not_excuse_a_broken_rival():
    seen = dict(trl_default=shown([3.0, 2.5]), trl_best=shown([3.0, 9.0]), fast=shown([3.0, 6.0]))
    found = page.training_agreement(seen, {n: SCORES for n in seen}, "float32")
    assert not found["fast"]["agree"] and found["fast"]["loss_tolerance"] < 0.03


def test_ratios_are_paired_by_round():
    """The machine halves its speed in the second round: no ratio moves.

    Medians of the speeds alone would be misled."""
    seen = TRL | dict(fast=shown([3.0, 2.5, 2.0], speeds=(400, 200)))
    engines = {n: bench.engine_figures(s, (2, 10), 1000.0) for n, s in seen.items()}
    ratios, memory = bench.bench_ratios(
        engines, {n: dict(agree=True) for n in seen}, [*seen, "unsloth"]
    )
    assert ratios == {"fast/trl_default": 8.0, "fast/trl_best": 4.0, "fast/unsloth": None} and set(
        engines
    ) == set(seen)
    assert (
        engines["fast"]["tokens_per_second"] == 300
        and engines["fast"]["spread"] == [200, 400]
        and engines["fast"]["supervised_tokens_per_second"] == 15
    )
    assert (
        engines["fast"]["peak_memory_bytes"] == 6
        and engines["fast"]["peak_memory_process_bytes"] == 9
        and memory["fast/trl_best"] == 1
    )
    assert engines["fast"]["ceiling_share"] == pytest.approx(
        (400 * 2 + 20 * 10) * (1 + 0.5) / 2 / 1000
    )


@pytest.mark.parametrize(
    "given, says",
    [
        (dict(engines="trl,unslot"), "did you mean 'unsloth'"),
        (dict(shape="llama-160"), "did you mean 'llama-160m'"),
        (dict(recipe="quikstart"), "did you mean 'quickstart'"),
        (dict(steps=0), "at least 1"),
        (dict(recipe="starter_pairs"), "classifies"),
        (dict(recipe="your_data"), "nothing to train on"),
        (dict(overrides=["training.lerning_rate=1"]), "learning_rate"),
    ],
)
def test_refused_before_anything_is_made(given, says, tmp_path, monkeypatch):
    monkeypatch.setenv("MEDFT_RUNS", str(tmp_path / "runs"))
    with pytest.raises(MedftError, match=says):
        bench.run_engine_bench(**dict(recipe="quickstart", say=lambda line: None) | given)
    assert not (tmp_path / "runs").exists()


def test_work_is_counted_on_the_modules():
    full, lora = (measures.useful_flops(load_recipe("quickstart", o)) for o in (["lora=null"], []))
    assert (
        full[1] == lora[1] * 6 // 4 and full[0] > lora[0]
    )  # all trained: three products a weight instead of two; a head on top of an adapter is frozen
    for name in ("llama-160m", "gemma-3-270m"):
        assert families.shape_config(name).get_text_config().num_hidden_layers in (12, 18)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    "TRL on the tiny base, and an engine that does not even start."
    out, said = tmp_path_factory.mktemp("bench"), []

    class Broken(bench.Process):
        def __init__(self, args, log):
            super().__init__(
                [args[0], "no such engine", *args[2:]] if args[1] == "fast" else args, log
            )

    whole, ceiling = bench.Process, bench.matmul_ceiling
    bench.Process, bench.matmul_ceiling = (
        Broken,
        lambda dtype: measures.matmul_ceiling(dtype, 256, 0.05),
    )
    try:
        return (
            bench.run_engine_bench(
                "quickstart",
                SMALL,
                "trl_best,fast",
                warm=1,
                steps=2,
                rounds=2,
                out=out,
                say=said.append,
            ),
            out,
            said,
        )
    finally:
        bench.Process, bench.matmul_ceiling = whole, ceiling


def test_bench_json_has_its_keys_and_the_dead_engine_its_reason(measured):
    found, out, said = measured
    assert found == json.loads((out / "bench.json").read_text())
    assert {
        "shape",
        "machine",
        "engines",
        "ratios",
        "memory_ratios",
        "agree",
        "ceiling",
        "agreement",
        "failed",
    } <= set(found)
    assert {
        "tokens_per_second",
        "peak_memory_bytes",
        "ceiling_share",
        "losses",
        "supervised_tokens_per_second",
        "spread",
        "first_step_seconds",
        "import_seconds",
        "load_seconds",
        "joules_per_token",
    } <= set(found["engines"]["trl_best"])
    assert (
        "no such engine" in found["failed"]["fast"]
        and found["agree"] is False
        and found["ratios"] == {"fast/trl_best": None}
    )
    assert len(found["engines"]["trl_best"]["by_round"]) == 2 and set(found["engines"]) == {
        "trl_best"
    }  # the other went on
    assert (
        len(found["engines"]["trl_best"]["losses"]) == 5 and found["agreement"]["trl_best"]["agree"]
    )
    assert (
        0
        < found["engines"]["trl_best"]["supervised_tokens_per_second"]
        < found["engines"]["trl_best"]["tokens_per_second"]
    )
    assert (out / "fast.log").exists() and any("failed" in line for line in said)


def test_the_page_says_why_there_is_no_ratio(measured):
    found, out, _ = measured
    page = (out / "bench.md").read_text()
    assert (
        "no ratio: medft fast: KeyError" in page
        and "NOT AGREED" in page
        and (out / "bench.svg").stat().st_size > 5000
    )
    assert "no ratio" in "\n".join(bench_page.bench_text(found))


def test_an_earlier_result_is_kept(measured, tmp_path):
    (tmp_path / "bench.json").write_text('{"old": 1}')
    said = []
    bench.place(load_recipe("quickstart"), None, tmp_path, said.append)
    assert (
        not (tmp_path / "bench.json").exists()
        and read_json(next(tmp_path.glob("bench-*.json"))) == dict(old=1)
        and "kept as" in said[0]
    )


@pytest.mark.long
def test_an_engine_killed_between_turns_keeps_its_first(tmp_path, monkeypatch):
    before = bench.Competitor.turn

    def turn(self):
        if self.name == "fast" and self.seen["turns"]:
            self.process.process.kill()
        before(self)

    monkeypatch.setattr(bench.Competitor, "turn", turn)
    found = bench.run_engine_bench(
        "quickstart",
        SMALL,
        "trl_best,fast",
        warm=1,
        steps=2,
        rounds=2,
        out=tmp_path,
        say=lambda line: None,
    )
    assert (
        "code -9" in found["failed"]["fast"]
        and len(found["engines"]["fast"]["by_round"]) == 1
        and found["ratios"] == {"fast/trl_best": None}
    )


@pytest.mark.long
def test_ctrl_c_leaves_what_was_measured(tmp_path):
    out = tmp_path / "out"
    p = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "medft.cli.verbs",
            "bench",
            "quickstart",
            *SMALL,
            "--engines",
            "trl",
            "--steps",
            "2",
            "--rounds",
            "50",
            "--warm",
            "1",
            "--out",
            str(out),
        ],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | dict(MEDFT_RUNS=str(tmp_path / "runs")),
    )
    for line in p.stdout:
        if line.startswith("round 2/"):
            p.send_signal(signal.SIGINT)
            break
    rest = p.stdout.read()
    assert p.wait(60) == 130 and "interrupted" in rest
    found = read_json(out / "bench.json")
    assert (
        found["interrupted"]
        and found["agree"] is False
        and found["engines"]["trl_default"]["by_round"]
        and "not compared" in found["agreement"]["trl_default"]["why"]
    )


@pytest.mark.long
def test_all_engines_agree_on_a_random_model_of_a_real_shape(tmp_path, monkeypatch):
    "The tiny base's shape with random weights, through every engine that is installed."
    monkeypatch.setenv("MEDFT_RUNS", str(tmp_path / "runs"))
    from medft.core.files import assets

    found = bench.run_engine_bench(
        "quickstart",
        ["training.per_device_train_batch_size=8", "training.learning_rate=2e-4"],
        shape=str(assets() / "tiny_base"),
        warm=2,
        steps=3,
        rounds=2,
        out=tmp_path / "out",
        say=lambda line: None,
    )
    assert (
        set(found["engines"]) | set(found["failed"])
        == {"trl_default", "trl_best", "unsloth", "fast"}
        and found["random_weights"]
    )
    assert found["agreement"]["fast"]["agree"], found["agreement"]["fast"]
