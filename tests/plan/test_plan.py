"""The plan: what is counted without memory is what real tensors take.

What it proposes fits; nothing is fetched."""

from medft.core.files import MedftError
from medft.core.recipe import load_recipe
from medft.model import adapters, families
from medft.plan import devices, footprint
from medft.plan import estimate as plan
from medft.plan import peak_memory as peak

import json
import subprocess
import sys

import pytest
import torch

QUICK = ["engine=[trl]", "dataset.max_samples=64"]
HERE = devices.Device("a machine", 64e9, 1e12, None, True)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # for children; and gone again afterwards


def recipe(*more):
    return load_recipe("quickstart", [*QUICK, *more])


def tiny(name, task="generative"):
    config = families.tiny_config(name)
    config.num_labels = 2
    return config


def real_step(r, config, rows, length):
    "The same step on real tensors, counted by the same eye."
    torch.manual_seed(0)
    model = footprint.model_on_meta(r, config, "trl", torch.float32)
    live = footprint.Live()
    model = model.to_empty(device="cpu").float().train()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02) if p.dim() > 1 else torch.nn.init.ones_(p)
    for m in model.modules():
        if hasattr(m, "inv_freq"):
            m.inv_freq.fill_(0.5)
    if footprint.checkpointed(r, "trl"):
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
        model.enable_input_require_grads()
    for t in [*model.parameters(), *model.buffers()]:
        live.count(t)
    held = live.now
    footprint.watch(model, live)
    live.phase = "body"
    ids = torch.ones(rows, length, dtype=torch.long)
    with footprint.as_on("cpu", config.vocab_size), live, torch.autocast("cpu", torch.bfloat16):
        footprint.plain_loss(model, r.task, ids, 1.0).backward()
    return {k: v - held for k, v in live.most.items() if k != "held"} | dict(kept=live.kept - held)


@pytest.mark.parametrize(
    "more",
    [[], ["training.gradient_checkpointing=true"], ["lora=null"]],
    ids=["LoRA", "checkpointing", "full"],
)
def test_fake_tensors_take_what_real_ones_take(more):
    r, config = recipe(*more), tiny("llama2")
    fake = footprint.one_step(r, config, "trl", 4, 48)
    real = real_step(r, config, 4, 48)
    assert fake["kept"] > 4 * 48 * 64 * 4 and fake["flops"] > 0 and fake["ops"] > 100
    assert {k: fake[k] for k in real} == pytest.approx(
        real, rel=0.05
    )  # on real numbers a mask of ones is seen to be none, and left out; padded batches have it


def test_few_layers_stand_for_many():
    config = tiny("gemma3")
    config.layer_types = (
        ["sliding_attention"] * 5
        + ["full_attention"]
        + ["sliding_attention"] * 5
        + ["full_attention"]
    )
    config.num_hidden_layers = 12
    r = recipe()
    whole, few = (
        footprint.step(r, config, "trl", 2, 32, whole=99),
        footprint.step(r, config, "trl", 2, 32, whole=1),
    )
    assert few == pytest.approx(whole, rel=0.02)


@pytest.mark.parametrize("task", ["generative", "classification", "pretraining"])
@pytest.mark.parametrize("family", ["llama3.1", "gemma3", "medgemma", "nemotron_h"])
def test_every_family_and_task_is_counted(family, task):
    r = recipe(f"model.task={task}")
    found = footprint.one_step(r, tiny(family), "trl", 2, 32)
    assert found["kept"] > 0 and {"body", "loss"} <= set(found)


def test_more_rows_and_longer_ones_take_more():
    config, r = families.load_config(recipe()), recipe()
    counts = adapters.sizes_of(r, config)

    def size(rows, length, *more):
        return peak.memory(recipe(*more), config, counts, "trl", rows, length, HERE)["peak"]

    assert size(2, 64) < size(4, 64) < size(8, 64) and size(4, 64) < size(4, 128)
    parts = {
        on: peak.memory(
            recipe(f"training.gradient_checkpointing={on}"), config, counts, "trl", 16, 128, HERE
        )
        for on in ("true", "false")
    }
    assert parts["true"]["activations"] < 0.5 * parts["false"]["activations"]


def test_parts_add_up_and_use_the_one_arithmetic():
    r, config = recipe("lora=null"), families.load_config(recipe())
    counts = adapters.sizes_of(r, config)
    m = peak.memory(r, config, counts, "trl", 8, 64, HERE)
    assert sum(v for k, v in m.items() if k not in ("peak", "step")) == pytest.approx(
        m["peak"], rel=1e-6
    )
    fixed = adapters.memory_estimate(r, counts)
    assert m["weights"] == fixed["weights"] and m["optimizer"] == fixed["optimizer"]
    eight = peak.memory(r, config, counts, "trl", 8, 64, HERE, gpus=8, stage=3)
    assert eight["weights"] == -(-m["weights"] // 8) and eight["activations"] == m["activations"]


def test_what_is_proposed_fits_the_smallest_sacrifice_first():
    r, config = recipe("training.per_device_train_batch_size=64"), families.load_config(recipe())
    whole = plan.peaks(r, config, adapters.sizes_of(r, config), None, HERE)["trl"]["peak"]
    ways = plan.ways_to_fit(
        r,
        config,
        None,
        HERE,
        1,
        int(peak.process_overhead(False)[0] + 0.35 * (whole - peak.process_overhead(False)[0])),
    )
    assert ways and ways[0]["costs"].startswith("the same model")
    for w in ways:
        again = plan.with_overrides(r, w["set"])
        assert plan.batch_of(again)["effective"] == 64 and w["fits"]
        assert (
            plan.peaks(again, config, adapters.sizes_of(again, config), None, HERE)["trl"]["peak"]
            == w["peak"]
            < whole
        )


def test_quantisation_and_experts_are_counted_as_they_are():
    nano, r = families.published("nemotron_h"), recipe("quantization.load_in_4bit=true")
    n = adapters.sizes_of(r, nano)
    assert n["active"] < 0.2 * n["total"] and n["quantised"] < 0.1 * n["total"]
    llama = families.published("llama3.1")
    n = adapters.sizes_of(r, llama)
    assert (
        n["active"] == n["total"]
        and adapters.memory_estimate(r, n, torch.bfloat16)["weights"] < 0.45 * 2 * n["total"]
    )


def test_devices_are_known_or_the_nearest_is_named():
    with pytest.raises(MedftError, match="did you mean 'H200'"):
        devices.device_named("H20O")
    with pytest.raises(MedftError, match="A100 40GB, A100 80GB: say which"):
        devices.device_named("A100")
    assert (
        devices.device_named("NVIDIA H100 80GB").flops > 9e14
        and devices.device_named("t4").bf16 is False
    )


def test_a_plan_has_the_keys_that_programs_read():
    p = json.loads(
        json.dumps(plan.plan(recipe(), price=2.0, tokens_per_second=1000.0), default=str)
    )
    assert {
        "parameters",
        "memory_bytes",
        "fits",
        "changes",
        "steps",
        "tokens",
        "seconds",
        "cost",
    } <= set(p)
    assert (
        p["steps"] == -(-p["data"]["rows"] // 16)
        and p["seconds"] == pytest.approx(p["tokens"] / 1000)
        and p["cost"] == pytest.approx(p["seconds"] / 3600 * 2)
    )
    assert (
        p["fits"]
        and p["changes"] == []
        and p["memory_bytes"]["peak"] > 5e8
        and p["batch"]["effective"] == 16
    )
    assert any("1,000 tokens/s" in line for line in plan.plan_in_words(p))


def test_auto_is_settled_seeds_are_paid_for_and_both_ways_of_keeping_activations_are_told(
    monkeypatch,
):
    monkeypatch.setattr(
        plan,
        "at_hand",
        lambda recipe, run=None: (
            dict(
                rows=64,
                tokens=4000,
                longest=90,
                mean=62.5,
                trainable_tokens=400,
                truncated=0,
                learned=0.1,
                basis="",
                sets=dict(test=dict(n=448, groups=448, size=1.0, counted=True)),
            ),
            "",
        ),
    )
    p = plan.plan(
        recipe("engine=auto", "evaluation.seeds=3", "training.save_strategy=steps"),
        price=2.0,
        tokens_per_second=100.0,
    )
    one = plan.plan(
        recipe("engine=[fast]", "training.save_strategy=steps"),
        price=2.0,
        tokens_per_second=100.0,
        advise=False,
    )
    assert (
        list(p["engines"]) == ["fast"]
        and any(n.startswith("engine fast: ") for n in p["notes"])
        and one["checkpointing"] is None
    )
    assert (
        p["seconds"] == pytest.approx(3 * one["seconds"])
        and p["cost"] == pytest.approx(3 * one["cost"])
        and p["seconds_by_engine"] == one["seconds_by_engine"]
        and p["tokens"] == one["tokens"]
    )
    assert {k: p["disk_bytes"][k] / one["disk_bytes"][k] for k in p["disk_bytes"]} == dict(
        checkpoints=3, final=3, merged=1
    )
    with_, without = (
        p["checkpointing"][f"{way}_checkpointing"]["fast"] for way in ("with", "without")
    )
    assert with_["activations"] < without["activations"] and without == {
        k: p["memory_bytes"][k] for k in ("activations", "peak")
    }
    assert (
        p["evaluation"]["test"]["n"] == 448
        and p["evaluation"]["test"]["tests"] == 1
        and p["evaluation"]["test"]["detectable"] == pytest.approx(0.0590, abs=2e-3)
    )
    said = "\n".join(plan.plan_in_words(p))
    assert (
        "with checkpointing: fast" in said
        and "smallest difference it could show: 5.9 points" in said
        and "3 seeds" in said
    )


@pytest.mark.long  # the hub is asked several times before it is given up
def test_a_gpu_that_is_not_here_and_a_model_that_cannot_be_fetched(tmp_path):
    r = load_recipe(
        "llama31_8b_qlora",
        [
            "model.name=nobody/llama-3.1-8b",
            "quantization=null",
            "training.gradient_checkpointing=false",
            "training.per_device_train_batch_size=4",
        ],
    )
    p = plan.plan(r, "RTX 4090", price=0.5)
    assert (
        not p["fits"]
        and p["changes"]
        and all(c["peak"] <= p["room_bytes"] for c in p["changes"])
        and p["seconds"] is None
    )
    assert any("stands for it" in n for n in p["notes"]) and any(
        "rows are taken to be" in n for n in p["notes"]
    )
    with pytest.raises(MedftError, match="no model"):
        plan.plan(load_recipe("quickstart", ["model.name=nobody/nothing"]))


def test_nothing_heavy_is_imported_for_help():
    out = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from medft.cli.verbs import main; main(['plan', '--help']);"
            " assert 'torch' not in sys.modules",
        ],
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0 and "--gpu" in out.stdout


@pytest.mark.long
@pytest.mark.parametrize("engine", ["trl", "fast"])
def test_the_measured_peak_is_within_a_tenth(engine, tmp_path):
    if devices.this_machine().bandwidth:
        pytest.skip("of a processor's memory")
    (row,) = peak.measure_rows(
        {
            "tiny": (
                load_recipe(
                    "quickstart",
                    [
                        f"engine=[{engine}]",
                        "training.max_steps=2",
                        "training.warmup_steps=0",
                        "dataset.max_samples=64",
                        "tracking.mlflow=false",
                    ],
                ),
                engine,
            )
        }
    )
    said = peak.peak_of_row(row)
    assert abs(said / row["measured"] - 1) < 0.1


# What was measured, and rows that have changed


def test_a_measured_speed_is_used():
    "Of the shipped evidence, for every model, engine and kind of adapter that it holds."
    from medft.core.files import assets
    from medft.model.families import shape_config

    import json

    runs = json.loads((assets() / "evidence" / "bench.json").read_text())["runs"]
    assert len(runs) >= 3
    for one in runs:
        text = shape_config(one["shape"]).get_text_config()
        assert one["shape_config"] == dict(
            num_hidden_layers=text.num_hidden_layers, hidden_size=text.hidden_size
        )
        for engine in ("trl", "unsloth", "fast"):
            found = devices.recorded(
                engine, one["machine"]["cpu"], text.num_hidden_layers, text.hidden_size, "lora"
            )
            measured = {e["tokens_per_second"] for r in runs for e in r["engines"].values()}
            assert (
                found["tokens_per_second"] in measured
                and "measured by medft bench" in found["basis"]
            )
        for other in (("trl", "another machine", 12, 768), ("trl", one["machine"]["cpu"], 13, 768)):
            assert devices.recorded(*other) is None
        assert (
            devices.recorded(
                "fast", one["machine"]["cpu"], text.num_hidden_layers, text.hidden_size, "full"
            )
            is None
        )


def test_a_measurement_of_ones_own_is_used_first(tmp_path, monkeypatch):
    from medft.core.files import write_json

    monkeypatch.setenv("MEDFT_RUNS", str(tmp_path))
    own = dict(
        shape=None,
        shape_config=dict(num_hidden_layers=12, hidden_size=768),
        model="mine",
        recipe="my_recipe",
        machine=dict(gpus=["NVIDIA L4, 23034 MiB"], cpu="x"),
        settings=dict(adapter="QLoRA r=8"),
        engines=dict(
            trl_default=dict(tokens_per_second=None), trl_best=dict(tokens_per_second=123.0)
        ),
    )
    write_json(tmp_path / ".bench" / "my_recipe-mine" / "bench.json", own)
    found = devices.recorded("trl", "NVIDIA L4", 12, 768, "qlora")
    assert found["tokens_per_second"] == 123 and "my_recipe-mine" in found["basis"]
    assert (
        devices.recorded("trl", "NVIDIA L4", 12, 768, "lora") is None
        and devices.recorded("fast", "NVIDIA L4", 12, 768) is None
    )


@pytest.fixture
def changing(tmp_path, monkeypatch):
    "A function that writes so many rows, and the recipe that reads them; the runs folder is empty."
    monkeypatch.setenv("MEDFT_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)

    def write(n, word="item"):
        (tmp_path / "mine.jsonl").write_text(
            "".join(
                json.dumps(dict(question=f"What is {word} {i * 7}?", answer=f"thing {i * i}"))
                + "\n"
                for i in range(n)
            )
        )

    r = load_recipe(
        "your_data",
        [
            "dataset.path=mine.jsonl",
            "dataset.holdout=0.1",
            "model.name=tiny-base",
            "training.max_length=128",
            "tracking.mlflow=false",
            "engine=[trl]",
            "dataset.checks={near_duplicates: 'off', near_overlap: 'off'}",
        ],
    )
    return write, r


def test_rows_of_an_older_state_of_a_file_do_not_count(changing):
    from medft.core.run import Run
    from medft.data import pipeline as data

    write, r = changing
    write(40)
    run = Run.create(r)
    data.prepare(run)
    few, why = plan.at_hand(r)
    assert plan.known_before(r).path == run.path and not why and 30 <= few["rows"] <= 40
    write(200)
    assert plan.known_before(r) is None
    many, why = plan.at_hand(r)
    assert (
        not why and many["rows"] > 150 and f"{many['rows']} training rows at hand" in many["basis"]
    )
    assert plan.at_hand(r, run)[0]["rows"] == few["rows"]  # the plan of that run itself
    write(40)
    assert plan.known_before(r).path == run.path  # the same content again
    write(40, "thing")
    assert plan.known_before(r) is None  # as many rows, others


def test_rows_that_cannot_be_compared_say_so(changing, monkeypatch):
    from medft.core.run import Run
    from medft.data import pipeline as data

    write, r = changing
    write(40)
    run = Run.create(r)
    data.prepare(run)
    monkeypatch.setattr(plan, "is_here", lambda path: False)
    rows, _ = plan.at_hand(r)
    assert "has changed since is not known" in rows["basis"] and run.path.name in rows["basis"]
