"A checkpoint is complete or it is not used: every kind of damage is seen and named."

from medft.core.files import MedftError
from medft.train.checkpoints import (
    SEAL,
    STATE,
    cut_log,
    damage_of,
    delete_unwanted,
    log_lines,
    newest_whole,
    seal,
    seal_notes,
    writing,
)

import errno
import json
import os
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest


def made(at, *steps, **kw):
    for s in steps:
        folder = at / f"checkpoint-{s}"
        folder.mkdir(parents=True)
        for name in (*STATE, "adapter_model.safetensors"):
            (folder / name).write_bytes(os.urandom(256))
        seal(folder, step=s, **kw)
    return at / f"checkpoint-{steps[-1]}"


DAMAGE = dict(
    truncated=lambda p: os.truncate(p / "adapter_model.safetensors", 100),
    empty=lambda p: (p / "optimizer.pt").write_bytes(b""),
    no_optimizer=lambda p: (p / "optimizer.pt").unlink(),
    no_scheduler=lambda p: (p / "scheduler.pt").unlink(),
    no_random_state=lambda p: (p / "rng_state.pth").unlink(),
    no_weights=lambda p: (p / "adapter_model.safetensors").unlink(),
    changed_byte=lambda p: flip(p / "optimizer.pt"),
    changed_weights=lambda p: flip(p / "adapter_model.safetensors"),
    unsealed=lambda p: (p / SEAL).unlink(),
    broken_seal=lambda p: os.truncate(p / SEAL, 20),
    empty_folder=lambda p: [f.unlink() for f in p.iterdir()],
)


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[77] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("harm", DAMAGE)
def test_damage_is_named_and_the_one_before_is_used(tmp_path, harm):
    newest = made(tmp_path, 2, 10)
    assert damage_of(newest) == [] and newest_whole(tmp_path) == newest
    DAMAGE[harm](newest)
    lines = []
    assert newest_whole(tmp_path, lines.append).name == "checkpoint-2"
    assert len(lines) == 1
    assert lines[0].startswith("checkpoint-10 is damaged")
    named = {
        "no_optimizer": "optimizer.pt is missing",
        "no_scheduler": "scheduler.pt is missing",
        "no_random_state": "rng_state.pth is missing",
        "truncated": "has 100 of 256 bytes",
        "empty": "has 0 of 256 bytes",
        "changed_byte": "optimizer.pt has changed",
        "unsealed": "no seal",
    }
    assert named.get(harm, "") in lines[0]


@pytest.mark.parametrize("name", [*STATE, "adapter_model.safetensors"])
def test_a_seal_over_too_little_does_not_count(tmp_path, name):
    "Saved without an optimizer (save_only_model), or by an older version: it cannot be resumed."
    folder = made(tmp_path, 1)
    (folder / name).unlink()
    seal(folder, step=1)
    assert any("never there" in problem for problem in damage_of(folder))


def test_rotation_keeps_what_it_must(tmp_path):
    for s, loss in ((1, 0.9), (2, 0.4), (3, 0.5), (4, 0.7), (5, 0.8)):
        made(tmp_path, s, score=loss)
    assert delete_unwanted(tmp_path, best=2) == ["checkpoint-1", "checkpoint-4"]
    assert newest_whole(tmp_path).name == "checkpoint-5"
    also = tmp_path / "checkpoint-2"
    assert delete_unwanted(tmp_path, newest=1, also=also) == ["checkpoint-3"]
    assert delete_unwanted(tmp_path) == []
    assert seal_notes(also)["score"] == 0.4


def test_a_log_holds_no_step_twice_and_no_half_line(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text(
        "".join(json.dumps(dict(step=s)) + "\n" for s in (1, 2, 3, 4)) + '{"step": 5, "lo'
    )
    assert [r["step"] for r in log_lines(log)] == [1, 2, 3, 4]
    cut_log(log, 2)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n'
    cut_log(tmp_path / "none.jsonl", 2)


def test_other_errors_are_raised_as_they_are(tmp_path):
    for error in (
        ValueError("No space left on device"),
        RuntimeError("CUDA out of memory"),
        FileNotFoundError(errno.ENOENT, "x"),
        MedftError("y"),
    ):
        with pytest.raises(type(error)), writing(tmp_path):
            raise error


WRITE = """import resource
import signal
import sys
from pathlib import Path

import torch
from medft.train.checkpoints import writing
from safetensors.torch import save_file

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
home = Path(sys.argv[1])
for write in (
    lambda: save_file(dict(x=torch.zeros(1 << 16)), home / "w.safetensors"),
    lambda: torch.save(torch.zeros(1 << 16), home / "o.pt"),
    lambda: (home / "log").write_bytes(bytes(1 << 17)),
):
    try:
        with writing(home, "a file"):
            write()
    except Exception as e:
        print(type(e).__name__, "|", e)
"""


def test_every_library_s_error_for_a_full_disk_becomes_one_line(tmp_path):
    "A real limit on file size, in a process of its own: safetensors, torch and Python differ."
    out = subprocess.run(
        [sys.executable, "-c", WRITE, tmp_path],
        capture_output=True,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    )
    lines = out.stdout.strip().splitlines()
    assert len(lines) == 3, out.stdout + out.stderr
    for line in lines:
        assert line.startswith("MedftError | cannot write") and "medft resume" in line, line


def test_a_folder_that_may_not_be_written_to_is_one_line(tmp_path):
    with pytest.raises(MedftError, match="cannot write .*read-only"), writing(tmp_path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "x")


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL"],)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt"])
def test_no_code_is_run_from_a_checkpoint(tmp_path, name, monkeypatch):
    "A file exchanged after the seal is noticed; even one that was sealed again is never run."
    import torch
    from transformers import Trainer

    monkeypatch.setenv("EVIL", str(tmp_path / "ran"))
    folder = made(tmp_path, 1)
    with open(folder / name, "wb") as f:
        pickle.dump(Evil(), f)
    assert name == "scaler.pt" or damage_of(folder)
    seal(folder, step=1)
    assert not damage_of(folder)

    class Bare(Trainer):
        def __init__(self):
            pass

    t = Bare()
    t.args = SimpleNamespace(
        world_size=1, device=torch.device("cpu"), process_index=0, parallel_mode=None
    )
    t.is_deepspeed_enabled = t.is_fsdp_enabled = t.is_fsdp_xla_v1_enabled = False
    good = torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD([torch.zeros(1)]))
    t.optimizer = good.optimizer
    t.lr_scheduler = good
    t.accelerator = SimpleNamespace(scaler=torch.amp.GradScaler("cpu"))
    if name == "scheduler.pt":
        torch.save(good.optimizer.state_dict(), folder / "optimizer.pt")
    load = {
        "optimizer.pt": t._load_optimizer_and_scheduler,
        "scheduler.pt": t._load_optimizer_and_scheduler,
        "rng_state.pth": t._load_rng_state,
        "scaler.pt": t._load_scaler,
    }[name]
    with pytest.raises(pickle.UnpicklingError):
        load(str(folder))
    assert not (tmp_path / "ran").exists()
    with open(folder / name, "rb") as f:
        pickle.load(f)
    assert (tmp_path / "ran").exists()  # the pickle is a loaded one
