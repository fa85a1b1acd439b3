"""Several processes train as one does, and nothing is left of them when one fails or is killed."""

from medft.core.files import MedftError, read_json
from medft.core.recipe import accumulation_per_rank, load_recipe
from medft.core.run import Run
from medft.data.pipeline import ensure_data

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

SMALL = [  # 45 rows do not divide among two ranks; no dropout, whose masks differ by rank
    "dataset.max_samples=45",
    "training.per_device_train_batch_size=4",
    "training.gradient_accumulation_steps=4",
    "training.max_steps=7",
    "training.logging_steps=1",
    "training.eval_strategy=steps",
    "training.eval_steps=3",
    "training.bf16=false",
    "engine=[trl, fast]",
    "tracking.mlflow=false",
]
TASKS = {
    "generative": ("quickstart",),
    "classification": ("starter_pairs",),
    "pretraining": (
        "starter_base",
        "training.lr_scheduler_type=linear",
        "training.lr_scheduler_kwargs=null",
        "dataset.holdout=0.1",
    ),
    "length groups": ("quickstart", "training.train_sampling_strategy=group_by_length"),
}
TRAIN = """import sys
from medft.core.run import Run
from medft.scale.worker import train_engine
from medft.train.launch import ranks_of, train_in_ranks
run = Run.open(sys.argv[1])
if ranks_of(run.recipe) > 1:
    train_in_ranks(run, sys.argv[2])
else:
    train_engine(run, sys.argv[2])"""


def prepared(folder, recipe, *overrides):
    run = Run.create(load_recipe(recipe, [*SMALL, *overrides]), run_id=str(folder))
    ensure_data(run)
    return run


def started(run, engine):
    env = os.environ | dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    command = [sys.executable, "-c", TRAIN, str(run.path), engine]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True)


def trained(run, engine):
    out, err = (process := started(run, engine)).communicate(timeout=900)
    assert process.returncode == 0, out[-2000:] + err[-3000:]
    return out


def logged(run, engine, key):
    lines = (run.path / engine / "log.jsonl").read_text().splitlines()
    return {row["step"]: row[key] for row in map(json.loads, lines) if key in row}


def assert_same_training(one, two, engine, limit=1e-5):
    for key in ("loss", "eval_loss"):
        alone, together = logged(one, engine, key), logged(two, engine, key)
        assert alone.keys() == together.keys() and alone
        assert max(abs(alone[step] - together[step]) for step in alone) < limit, key


def compare(folder, engine, task):
    one = prepared(folder / "one", *TASKS[task])
    two = prepared(folder / "two", *TASKS[task], "scale.processes=2")
    trained(one, engine)
    trained(two, engine)
    assert_same_training(one, two, engine)
    assert read_json(two.path / engine / "training.json")["ranks"] == 2


def test_two_ranks_train_as_one_process(tmp_path):
    compare(tmp_path, "fast", "generative")


@pytest.mark.long
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("engine", ["trl", "fast"])
def test_two_ranks_train_every_task_as_one_process(tmp_path, engine, task):
    compare(tmp_path, engine, task)


def ranks_below(process):
    found = psutil.Process(process.pid).children(recursive=True)
    living = [p for p in found if p.status() != psutil.STATUS_ZOMBIE]
    return [p for p in living if "medft.scale.worker" in " ".join(p.cmdline()[2:4])]


def until(condition, seconds):
    deadline = time.time() + seconds
    while not condition() and time.time() < deadline:
        time.sleep(0.05)
    assert condition()


@pytest.mark.long
@pytest.mark.parametrize("whom", ["a rank", "the one that started them", "SIGTERM"])
def test_killed_ranks_leave_nothing_and_go_on_to_the_same_weights(tmp_path, whom):
    keys = ["lora.lora_dropout=0.1", "training.save_strategy=steps", "training.save_steps=2"]
    whole = prepared(
        tmp_path / "whole", "quickstart", *keys, "scale.processes=2", "training.max_steps=12"
    )
    cut = prepared(
        tmp_path / "cut", "quickstart", *keys, "scale.processes=2", "training.max_steps=12"
    )
    trained(whole, "trl")
    process = started(cut, "trl")
    log = cut.path / "trl" / "log.jsonl"
    until(lambda: log.exists() and len(log.read_text().splitlines()) >= 6, 300)
    ranks = ranks_below(process)
    assert len(ranks) == 2
    if whom == "a rank":
        ranks[1].kill()
    elif whom == "SIGTERM":
        process.send_signal(signal.SIGTERM)
    else:
        process.kill()
    _, err = process.communicate(timeout=120)
    until(lambda: not any(p.is_running() and p.status() != "zombie" for p in ranks), 30)
    if whom == "a rank":
        assert "was killed (signal 9" in err.splitlines()[-1]
    if whom == "SIGTERM":
        assert "checkpoint saved at step" in (cut.path / "logs" / "finetune.log").read_text()
    assert "going on from checkpoint-" in trained(cut, "trl")
    weights = "trl/adapters/adapter_model.safetensors"
    assert (cut.path / weights).read_bytes() == (whole.path / weights).read_bytes()
    assert logged(cut, "trl", "loss") == logged(whole, "trl", "loss")


@pytest.mark.long
def test_a_killed_rank_is_started_again(tmp_path):
    keys = ["lora.lora_dropout=0.1", "training.save_strategy=steps", "training.save_steps=2"]
    keys += ["scale.processes=2", "training.max_steps=12", "scale.max_failures=1"]
    whole = prepared(tmp_path / "whole", "quickstart", *keys)
    cut = prepared(tmp_path / "cut", "quickstart", *keys)
    trained(whole, "trl")
    process = started(cut, "trl")
    log = cut.path / "trl" / "log.jsonl"
    until(lambda: log.exists() and len(log.read_text().splitlines()) >= 6, 300)
    ranks_below(process)[1].kill()
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0 and "going on from checkpoint-" in out, out[-1000:] + err[-2000:]
    weights = "trl/adapters/adapter_model.safetensors"
    assert (cut.path / weights).read_bytes() == (whole.path / weights).read_bytes()


@pytest.mark.parametrize(
    "keys, ranks, words",
    [
        (["4", "4"], 2, None),
        (["4", "1"], 2, "training.per_device_train_batch_size=2 training.gradient_accumulation"),
        (["8", "3"], 2, "training.per_device_train_batch_size=6 training.gradient_accumulation"),
        (
            ["3", "1"],
            2,
            "for 6 rows a step: training.per_device_train_batch_size=3 training.gradient",
        ),
    ],
)
def test_the_batch_of_a_recipe_is_kept_or_the_ranks_are_refused(keys, ranks, words):
    rows, accumulation = keys
    overrides = [
        f"training.per_device_train_batch_size={rows}",
        f"training.gradient_accumulation_steps={accumulation}",
        "engine=[trl, fast]",
    ]
    recipe = load_recipe("quickstart", overrides)
    if words is None:
        assert accumulation_per_rank(recipe, ranks) == int(accumulation) // ranks
        return
    with pytest.raises(MedftError, match=words):
        load_recipe("quickstart", [*overrides, f"scale.processes={ranks}"])


def test_an_engine_that_several_processes_cannot_use_is_left_out_or_refused(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("training: {gradient_accumulation_steps: 2}\nscale: {processes: 2}\n")
    assert load_recipe(mine).engine == ["trl", "fast"]
    with pytest.raises(MedftError, match="use engine: .trl, fast."):
        load_recipe(mine, ["engine=[trl, unsloth]"])
