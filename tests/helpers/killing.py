"""Runs that are killed with SIGKILL during training, and resumed: are the results bit-identical?

The libraries are imported once; every training is a fork of that process, and really killed.
"""

import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

SMALL = [
    "engine=trl",
    "training.per_device_train_batch_size=4",
    "training.num_train_epochs=2",
    "training.logging_steps=3",
    "training.warmup_steps=2",
    "training.max_length=160",
    "training.eval_strategy=steps",
    "training.eval_steps=3",
    "training.save_strategy=steps",
    "training.save_steps=2",
    "training.save_total_limit=1",
    "training.train_sampling_strategy=group_by_length",
    "dataset.test_path=null",
    "dataset.sets={}",
    "dataset.holdout=0",
    "tracking.mlflow=false",
    "dataset.cache=false",
    "dataset.checks.near_duplicates=off",
    "dataset.checks.near_overlap=off",
    "dataset.checks.identifiers=off",
    "dataset.checks.truncated=off",
    "dataset.checks.duplicates=off",
    "dataset.checks.overlap=off",
    "dataset.checks.group_overlap=off",
    "dataset.checks.contradictions=off",
    "dataset.checks.label_balance=off",
]
LORA = ["lora.lora_dropout=0.1", "lora.r=4"]
WHOLE = ["lora=null", "training.learning_rate=1e-3", "training.neftune_noise_alpha=5"]
TASKS = {
    "lora": LORA,
    "qlora": [*LORA, "quantization.load_in_4bit=true"],
    "full": [*WHOLE, "training.gradient_accumulation_steps=2"],
    "classification": [
        *LORA,
        "model.task=classification",
        "model.class_weights=balanced",
        "output.keep_best=1",
    ],
    "fast": ["lora.r=4", "engine=fast"],
    "fast-full": [
        "lora=null",
        "engine=fast",
        "training.learning_rate=1e-3",
        "training.gradient_accumulation_steps=2",
    ],
    "fast-classification": [
        *LORA,
        "engine=fast",
        "model.task=classification",
        "model.class_weights=balanced",
        "output.keep_best=1",
    ],
    "pretraining": [
        *WHOLE,
        "model.task=pretraining",
        "training.load_best_model_at_end=true",
        "training.save_steps=3",
        "training.gradient_accumulation_steps=2",
    ],
}


def rows(task, n, seed):
    "Small rows: a question, a labelled sentence, or a text."
    draw = random.Random(seed)
    words = "the a drug fever lowers helps treats kidney pain dose daily child heart of in".split()

    def text():
        return " ".join(draw.choices(words, k=draw.randint(2, 6)))

    def labelled(i):
        return dict(text=text(), label="yes" if draw.random() < 0.3 or i == 0 else "no")

    def question():
        return dict(
            question=text() + "?",
            options=[text() for _ in range(4)],
            answer=draw.randrange(4),
        )

    if "classification" in task:
        return [labelled(i) for i in range(n)]
    if task == "pretraining":
        return [
            dict(text=" ".join(text() for _ in range(draw.randint(1, 20)))) for _ in range(4 * n)
        ]
    return [question() for _ in range(n)]


def prepare(home, task, more=()):
    "A run whose data are prepared; no model has been loaded yet."
    from medft.core.recipe import load_recipe
    from medft.core.run import Run
    from medft.data import pipeline as data

    home.mkdir(parents=True, exist_ok=True)
    for name, n in (("train", 26), ("validation", 6)):
        lines = [json.dumps(row) + "\n" for row in rows(task, n, name)]
        (home / f"{name}.jsonl").write_text("".join(lines))
    files = [
        f"dataset.path={home}/train.jsonl",
        f"dataset.validation_path={home}/validation.jsonl",
    ]
    recipe = load_recipe("quickstart", [*SMALL, *files, *TASKS[task], *more])
    run = Run.create(recipe, root=home / "runs", run_id="first")
    data.prepare(run)
    return run.path


def engine(path):
    return "fast" if "- fast\n" in (Path(path) / "recipe.yaml").read_text() else "trl"


def child(path):
    "Train a run in a process of its own."
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        with open(Path(path) / "logs" / "child.log", "a") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        from medft.core.run import Run
        from medft.fast import engine as fast
        from medft.train import baseline as train

        (fast.train_fast if engine(path) == "fast" else train.train)(Run.open(path))
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(pid):
    return os.waitpid(pid, os.WNOHANG)[0] != 0


def being_saved(path, first_step=0):
    "The step of a checkpoint that is being written now, from `first_step` on; None: there is none."
    for folder in (Path(path) / engine(path) / "checkpoints").glob("checkpoint-*"):
        step = int(folder.name.removeprefix("checkpoint-"))
        is_open = any(folder.iterdir()) and not (folder / "seal.json").exists()
        if step >= first_step and is_open:
            return step
    return None


def kill_after(path, seconds):
    "Start training and kill it after some seconds. None: it had finished before."
    pid, start = child(path), time.time()
    while not ended(pid):
        if time.time() - start > seconds:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return f"{time.time() - start:.2f} s"
        time.sleep(0.002)


def kill_while_saving(path, first_step):
    "Start training and kill it while it saves a checkpoint. None: it had finished before."
    pid = child(path)
    while not ended(pid):
        step = being_saved(path, first_step)
        if step is not None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return f"{step} being saved"
        time.sleep(0.002)


def terminate(path, seconds):
    """Start training and send SIGTERM some seconds after its first checkpoint.

    It must save another checkpoint, and end by the signal. None: it had finished before.
    """
    pid, start = child(path), None
    checkpoints = Path(path) / engine(path) / "checkpoints"
    while not ended(pid):
        if start is None and list(checkpoints.glob("checkpoint-*/seal.json")):
            start = time.time()
        if start and time.time() - start > seconds:
            os.kill(pid, signal.SIGTERM)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            log = (Path(path) / "logs" / "finetune.log").read_text()
            if code == -signal.SIGTERM and "checkpoint saved at step" in log:
                return f"SIGTERM {seconds:.2f} s after a checkpoint"
            return None
        time.sleep(0.002)


LOGGED = (
    "step",
    "loss",
    "eval_loss",
    "grad_norm",
    "learning_rate",
    "mean_token_accuracy",
    "num_tokens",
)


def result(path):
    "What must be the same: the trained weights, and what is logged and counted."
    out = Path(path) / engine(path)
    files = sorted(p for n in ("adapters", "model") for p in (out / n).glob("*.safetensors"))
    log = []
    for row in map(json.loads, (out / "log.jsonl").read_text().splitlines()):
        if "loss" in row or "eval_loss" in row:
            log.append({key: value for key, value in row.items() if key in LOGGED})
    summary = json.loads((out / "training.json").read_text())
    counted = ("steps", "tokens", "train_loss", "trainable_parameters")
    return dict(
        weights=[hashlib.sha256(p.read_bytes()).hexdigest() for p in files],
        log=log,
        summary={key: summary[key] for key in counted},
    )


def whole_run(path):
    start = time.time()
    pid = child(path)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == 0, (Path(path) / "logs" / "child.log").read_text()[-3000:]
    return time.time() - start


def copy(path, name):
    to = Path(path).with_name(name)
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(path, to)
    return to


def compare(a, b):
    "Where two results differ; empty: nowhere."
    return [k for k in a if a[k] != b[k]]


def import_once():
    "Load what every training needs, before it is forked."
    for name in ("fast.engine", "train.baseline"):
        importlib.import_module(f"medft.{name}")
    for name in ("bitsandbytes", "peft", "sklearn", "trl"):
        importlib.import_module(name)


def interrupted(first, i, is_last, seconds, draw):
    "A copy of a run that was interrupted in the i-th way, and how."
    while True:
        victim = copy(first, f"victim-{i}")
        if is_last:
            how = terminate(victim, draw.uniform(0, 0.5) * seconds)
        elif i % 3 == 2:
            how = kill_while_saving(victim, draw.randint(2, 7))
        else:
            how = kill_after(victim, draw.uniform(0.25, 0.95) * seconds)
        if how is not None:
            return victim, how
        seconds *= 0.7  # it had ended by then: the run that was timed met a busier machine


def main(home, tasks, kills, seed=0, table=None):
    import_once()
    found = []
    for task in tasks:
        # A task's moments do not depend on the tasks before it.
        draw = random.Random(f"{seed} {task}")
        first = prepare(Path(home) / task, task)
        plain = copy(first, "plain")
        seconds = whole_run(plain)
        expected = result(plain)
        for i in range(kills + 1):
            is_last = i == kills
            victim, how = interrupted(first, i, is_last, seconds, draw)
            twice = i % 3 == 1 and not is_last
            if twice:
                kill_after(victim, draw.uniform(0.3, 0.7) * seconds)
            whole_run(victim)
            log = (victim / "logs" / "finetune.log").read_text()
            resumed = re.findall(r"going on from (.*)", log)
            row = dict(
                task=task,
                killed=how,
                twice=twice,
                resumed=resumed[-1] if resumed else "the beginning",
                differs=compare(result(victim), expected),
            )
            found.append(row)
            print(json.dumps(row), flush=True)
    if table:
        Path(table).write_text(as_table(found))
    return found


def as_table(found):
    "The rows as Markdown, in the words of kills.json."
    from medft.bench.evidence_files import kill_row

    heads = ["| task | killed | resumed from | equal to the bit |", "|---|---|---|---|"]
    lines = [f"| {' | '.join(kill_row(row).values())} |" for row in found]
    return "\n".join([*heads, *lines]) + "\n"


if __name__ == "__main__":
    home, kills = sys.argv[1], int(sys.argv[2])
    tasks = sys.argv[3].split(",") if len(sys.argv) > 3 else list(TASKS)
    found = main(home, tasks, kills, table=Path(home) / "table.md")
    sys.exit(any(row["differs"] for row in found))
