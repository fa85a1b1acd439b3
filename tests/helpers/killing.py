"""Runs that are killed with SIGKILL while they train, and resumed: are the results the same to the bit?

One process pays for the imports; every training is a fork of it, a process of its own that is really killed."""

import hashlib
import json
import os
import random
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
    *(
        f"dataset.checks.{c}=off"
        for c in (
            "near_duplicates",
            "near_overlap",
            "identifiers",
            "truncated",
            "duplicates",
            "overlap",
            "group_overlap",
            "contradictions",
            "label_balance",
        )
    ),
]
LORA, WHOLE = (
    ["lora.lora_dropout=0.1", "lora.r=4"],
    ["lora=null", "training.learning_rate=1e-3", "training.neftune_noise_alpha=5"],
)
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
    draw, words = (
        random.Random(seed),
        "the a drug fever lowers helps treats kidney pain dose daily child heart of in".split(),
    )

    def text():
        return " ".join(draw.choices(words, k=draw.randint(2, 6)))

    if "classification" in task:
        return [
            dict(text=text(), label="yes" if draw.random() < 0.3 or i == 0 else "no")
            for i in range(n)
        ]
    if task == "pretraining":
        return [
            dict(text=" ".join(text() for _ in range(draw.randint(1, 20)))) for _ in range(4 * n)
        ]
    return [
        dict(question=text() + "?", options=[text() for _ in range(4)], answer=draw.randrange(4))
        for _ in range(n)
    ]


def prepare(home, task, more=()):
    "A run whose data are prepared; no model has been loaded yet."
    from medft.core.run import Run, load_recipe
    from medft.data import pipeline as data

    home.mkdir(parents=True, exist_ok=True)
    for name, n in (("train", 26), ("validation", 6)):
        (home / f"{name}.jsonl").write_text(
            "".join(json.dumps(r) + "\n" for r in rows(task, n, name))
        )
    run = Run.create(
        load_recipe(
            "quickstart",
            [
                *SMALL,
                f"dataset.path={home}/train.jsonl",
                f"dataset.validation_path={home}/validation.jsonl",
                *TASKS[task],
                *more,
            ],
        ),
        root=home / "runs",
        run_id="first",
    )
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


def saving(path, least=0):
    "The checkpoint that is being written, of this step at least."
    return [
        p
        for p in (Path(path) / engine(path) / "checkpoints").glob("checkpoint-*")
        if int(p.name[11:]) >= least and any(p.iterdir()) and not (p / "seal.json").exists()
    ]


def kill(path, moment=None, least=0):
    "Start training and kill it: after so many seconds, or in the middle of saving a checkpoint, of this step at least. None: it was done before."
    pid, start = child(path), time.time()
    while not ended(pid):
        there = saving(path, least) if moment is None else time.time() - start > moment
        if there:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return (
                f"{there[0].name.split('-')[1]} being saved"
                if moment is None
                else f"{time.time() - start:.2f} s"
            )
        time.sleep(0.002)


def leave(path, moment):
    "Start training and send it SIGTERM so long after its first checkpoint: it must save another one, and end by the signal. None: it was done before."
    pid, start = child(path), None
    while not ended(pid):
        if start is None and list(
            (Path(path) / engine(path) / "checkpoints").glob("checkpoint-*/seal.json")
        ):
            start = time.time()
        if start and time.time() - start > moment:
            os.kill(pid, signal.SIGTERM)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            said = (Path(path) / "logs" / "finetune.log").read_text()
            return (
                f"SIGTERM {moment:.2f} s after a checkpoint"
                if code == -signal.SIGTERM and "checkpoint saved at step" in said
                else None
            )
        time.sleep(0.002)


def result(path):
    "What must be the same: the trained weights, and what is logged and counted."
    out, log = Path(path) / engine(path), []
    files = sorted(p for n in ("adapters", "model") for p in (out / n).glob("*.safetensors"))
    for row in map(json.loads, (out / "log.jsonl").read_text().splitlines()):
        if "loss" in row or "eval_loss" in row:
            log.append(
                {
                    k: v
                    for k, v in row.items()
                    if k
                    in (
                        "step",
                        "loss",
                        "eval_loss",
                        "grad_norm",
                        "learning_rate",
                        "mean_token_accuracy",
                        "num_tokens",
                    )
                }
            )
    told = json.loads((out / "training.json").read_text())
    return dict(
        weights=[hashlib.sha256(p.read_bytes()).hexdigest() for p in files],
        log=log,
        told={k: told[k] for k in ("steps", "tokens", "train_loss", "trainable_parameters")},
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


def main(home, tasks, kills, seed=0, table=None):
    import medft.fast.engine
    import medft.train.baseline

    import bitsandbytes
    import peft
    import sklearn  # paid for once
    import trl

    found = []
    for task in tasks:
        draw = random.Random(
            f"{seed} {task}"
        )  # a task's moments do not depend on what was tried before it
        first = prepare(Path(home) / task, task)
        plain = copy(first, "plain")
        seconds = whole_run(plain)
        expected = result(plain)
        for i in range(kills + 1):
            how = None
            while how is None:
                victim = copy(first, f"victim-{i}")
                how = (
                    leave(victim, draw.uniform(0, 0.5) * seconds)
                    if i == kills
                    else kill(victim, least=draw.randint(2, 7))
                    if i % 3 == 2
                    else kill(victim, draw.uniform(0.25, 0.95) * seconds)
                )
            log = victim / "logs" / "finetune.log"
            if i % 3 == 1 and i < kills:
                kill(victim, draw.uniform(0.3, 0.7) * seconds)  # and once more, while it goes on
            whole_run(victim)
            went = [
                l.split("going on from ")[1]
                for l in log.read_text().splitlines()
                if "going on from" in l
            ]
            found.append(
                dict(
                    task=task,
                    killed=how,
                    twice=i % 3 == 1 and i < kills,
                    resumed=went[-1] if went else "the beginning",
                    differs=compare(result(victim), expected),
                )
            )
            print(json.dumps(found[-1]), flush=True)
    if table:
        Path(table).write_text(as_table(found))
    return found


def as_table(found):
    "The rows as Markdown, in the words of kills.json."
    from medft.bench.evidence_files import kill_row

    lines = [f"| {' | '.join(kill_row(r).values())} |" for r in found]
    return (
        "\n".join(
            ["| task | killed | resumed from | equal to the bit |", "|---|---|---|---|", *lines]
        )
        + "\n"
    )


if __name__ == "__main__":
    home, kills, tasks = (
        sys.argv[1],
        int(sys.argv[2]),
        sys.argv[3].split(",") if len(sys.argv) > 3 else list(TASKS),
    )
    found = main(home, tasks, kills, table=Path(home) / "table.md")
    sys.exit(any(r["differs"] for r in found))
