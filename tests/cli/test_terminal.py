"What a person sees in a terminal: live lines, plain lines, quiet, and the Tab key."

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from stages import environment, manifest, medft, write

OFF = "tracking.mlflow=false"
SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"
CONTROL = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])")


def screen(output):
    "The lines that a terminal shows after this output: enough of one for what rich sends."
    lines, row = [""], 0
    column = position = 0
    while position < len(output):
        if control := CONTROL.match(output, position):
            argument, kind = control.groups()
            if kind == "K":
                lines[row] = ""
            elif kind == "A":
                row -= int(argument or 1)
            position = control.end()
            continue
        sign = output[position]
        if sign == "\r":
            column = 0
        elif sign == "\n":
            row, column = row + 1, 0
            if row == len(lines):
                lines.append("")
        else:
            text = lines[row].ljust(column)
            lines[row] = text[:column] + sign + text[column + 1 :]
            column += 1
        position += 1
    return [line.rstrip() for line in lines if line.strip()]


def read_all(terminal, process, seconds, until=None, then=None):
    "What a process writes to a terminal; `then` is called once, when `until` has been shown."
    shown, deadline = b"", time.time() + seconds
    while time.time() < deadline:
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                shown += os.read(terminal, 65536)
            except OSError:  # the other end is closed
                break
        if then and until in shown:
            then()
            then = None
    assert process.wait(10) is not None
    os.close(terminal)
    return shown.decode("utf-8", "replace")


def in_terminal(tmp, *args, until=None, then=None, seconds=240, **env):
    "Run `medft ARGS` in a terminal of 100 columns: (exit code, all that it wrote)."
    (tmp / "home").mkdir(exist_ok=True)
    ours, theirs = pty.openpty()
    chosen = environment(tmp, TERM="xterm-256color", COLUMNS="100", LINES="30")
    for name in ("CI", "NO_COLOR"):
        chosen.pop(name, None)
    process = subprocess.Popen(
        [sys.executable, "-m", "medft.cli.verbs", *map(str, args)],
        cwd=tmp,
        env=chosen | env,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    shown = read_all(ours, process, seconds, until, then and (lambda: then(process)))
    return process.returncode, shown


def logging(*lines, wait=0.0):
    "A stage's cell that logs lines, as `Run.log` writes them."
    return f"""
import time
with open(run + "/logs/finetune.log", "a") as f:
    for line in {list(lines)!r}:
        f.write("12:00:00 " + line + "\\n")
        f.flush()
        time.sleep({wait})
"""


TRAINING = """
import json, pathlib
folder = pathlib.Path(run) / "trl"
folder.mkdir(exist_ok=True)
row = dict(step=20, seconds=15.0, loss=1.897, num_tokens=18180)
(folder / "log.jsonl").write_text(json.dumps(row) + "\\n")
summary = dict(status="finished", steps=198, tokens_per_second=1325.0, peak_memory_bytes=1.75e9)
(folder / "training.json").write_text(json.dumps(summary))
"""
STORY = dict(
    data=logging("data: 9 rows in, 9 out, 0 rejected", "data: not read: columns [exp]"),
    train=[TRAINING, logging("trl: step 20/198, loss 1.8970, 141 s left", wait=1.5)],
)


def recipe(tmp):
    "A recipe with stand-in stages, in a folder of its own."
    write(tmp / "nbs", **STORY)
    (tmp / "mine.yaml").write_text("engine: [trl]\ntracking:\n  mlflow: false\n")
    return ["run", "mine.yaml", "--run-dir", tmp / "one", "--stages", "data,train"]


def test_a_terminal_shows_a_line_for_each_stage_and_keeps_every_note(tmp_path):
    code, shown = in_terminal(tmp_path, *recipe(tmp_path))
    assert code == 0, shown
    lines = screen(shown)
    first, note, data, train, *rest = lines
    assert first == "mine: data, train -> one"
    assert note == "  data: not read: columns [exp]"
    assert re.fullmatch(r"✓ data         [\d.]+ s", data)
    figures = r"✓ train · trl  198 steps  loss 1\.9  1,325 tokens/s  peak 1\.75 GB  [\d.]+ s"
    assert re.fullmatch(figures, train)
    assert rest[-1] == "finished: one" and len(rest) == 2, lines
    assert "step 20/198  loss 1.8970  1,212 tokens/s  2 min 21 s left" in shown  # the live line
    assert shown.count(HIDE_CURSOR) == shown.count(SHOW_CURSOR) == 2
    assert shown.rindex(SHOW_CURSOR) > shown.rindex(HIDE_CURSOR)


def test_a_failed_stage_leaves_one_line_and_the_cursor(tmp_path):
    command = recipe(tmp_path)
    write(tmp_path / "nbs", data="1 / 0")
    code, shown = in_terminal(tmp_path, *command)
    assert code == 1
    lines = screen(shown)
    assert len(lines) == 3 and lines[1].startswith("✗ data         failed after"), lines
    assert lines[2].startswith("medft: stage data failed in cell") and "medft resume" in lines[2]
    assert shown.rindex(SHOW_CURSOR) > shown.rindex(HIDE_CURSOR)


def test_an_interrupted_stage_leaves_one_line_and_the_cursor(tmp_path):
    command = recipe(tmp_path)
    waiting = logging("trl: step 20/198, loss 1.8970, 141 s left") + "\ntime.sleep(60)"
    write(tmp_path / "nbs", train=waiting)

    def interrupt(process):
        process.send_signal(signal.SIGINT)

    code, shown = in_terminal(tmp_path, *command, until=b"step 20/198", then=interrupt)
    assert code == 130
    lines = screen(shown)
    assert lines[-2].startswith("✗ train · trl  interrupted at step 20/198 after"), lines
    assert lines[-1].startswith("medft: interrupted") and "medft resume" in lines[-1]
    assert shown.rindex(SHOW_CURSOR) > shown.rindex(HIDE_CURSOR)
    assert manifest(tmp_path / "one")["stages"]["train"]["status"] == "interrupted"


@pytest.mark.parametrize("setting", ["CI=true", "NO_COLOR=1", "TERM=dumb"])
def test_plain_lines_where_a_terminal_should_not_be_drawn_on(monkeypatch, setting):
    from medft.cli.terminal import shows_live

    for name in ("CI", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    terminal = SimpleNamespace(isatty=lambda: True, encoding="utf-8")
    assert shows_live(terminal)
    monkeypatch.setenv(*setting.split("="))
    assert not shows_live(terminal)


def test_plain_lines_are_those_of_a_pipe_and_quiet_prints_the_result_alone(tmp_path):
    command = recipe(tmp_path)
    code, shown = in_terminal(tmp_path, *command, NO_COLOR="1")
    lines = shown.replace("\r\n", "\n").splitlines()
    assert code == 0 and "\x1b" not in shown
    assert lines[1:4] == [
        "data ...",
        "  12:00:00 data: 9 rows in, 9 out, 0 rejected",
        "  12:00:00 data: not read: columns [exp]",
    ]
    assert re.fullmatch(r"data done in [\d.]+ s", lines[4])

    code, out, err = medft(tmp_path, *command[:2], "--run-dir", "two", *command[4:], "-q")
    assert (code, out, err) == (0, "finished: two\n", "")
    write(tmp_path / "nbs", data="1 / 0")
    code, out, err = medft(tmp_path, *command[:2], "--run-dir", "three", *command[4:], "--quiet")
    assert code == 1 and not out and err.count("\n") == 1 and "medft resume" in err


def test_a_narrow_terminal_keeps_the_live_line_on_one_line():
    from medft.cli.terminal import LiveProgress

    import io

    from rich.console import Console

    for width in (20, 40, 60):
        plain = dict(force_terminal=False, force_jupyter=False)
        console = Console(file=io.StringIO(), record=True, width=width, **plain)
        progress = LiveProgress(SimpleNamespace(path=Path("nowhere")), console)
        progress.begin("train")
        progress.line("12:00:00 trl: step 20/198, loss 1.8970, 141 s left")
        console.print(progress.bar.get_renderable())
        (line,) = [line for line in console.export_text().splitlines() if line.strip()]
        assert len(line) <= width
        progress.close()


def complete(tmp, *words, **env):
    "What the Tab key offers after these words."
    typed = dict(_MEDFT_COMPLETE="complete_bash", COMP_WORDS=" ".join(("medft", *words)))
    code, out, err = medft(tmp, COMP_CWORD=len(words), **typed, **env)
    assert code == 0 and not err, err
    return out.split()


def test_tab_offers_recipes_runs_and_keys(tmp_path):
    run = tmp_path / "runs" / "quickstart" / "20261130-1"
    run.mkdir(parents=True)
    (run / "manifest.json").write_text("{}")
    (tmp_path / ".env").write_text("NOT_READ=1\n")  # its warning must not reach the shell
    assert complete(tmp_path, "run", "quick")[0] == "quickstart"
    assert complete(tmp_path, "resume", "q") == ["quickstart/20261130-1"]
    assert complete(tmp_path, "run", "quickstart", "training.le") == ["training.learning_rate="]


def test_the_keys_that_tab_offers_are_those_of_a_recipe():
    from medft.cli.completion import recipe_keys
    from medft.core.recipe import HANDED_ON, UNSUPPORTED_LORA_KEYS
    from medft.core.sections import SECTIONS, Checks, Recipe

    names = recipe_keys("")
    assert {name.rstrip(".=") for name in names} == set(Recipe.model_fields) - {
        "name",
        "engine_chosen",
    }
    for section, kind in SECTIONS.items():
        offered = {name.split(".")[1].rstrip("=") for name in recipe_keys(f"{section}.")}
        expected = set(kind.model_fields)
        if section == "training":
            expected &= HANDED_ON
            offered &= expected | (set(kind.model_fields) - HANDED_ON)  # keys of other versions
        elif section == "lora":
            expected -= UNSUPPORTED_LORA_KEYS.keys()
        assert offered == expected, section
    checks = {name.removeprefix("dataset.checks.") for name in recipe_keys("dataset.checks.")}
    assert checks == {f"{name}=" for name in Checks.model_fields}


def test_a_completion_loads_nothing_heavy(tmp_path):
    typed = dict(_MEDFT_COMPLETE="complete_bash", COMP_CWORD="3")
    typed["COMP_WORDS"] = "medft run quickstart training.le"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "medft.cli.verbs"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | typed,
    )
    lines = done.stderr.split("\n")
    loaded = {line.split("|")[-1].strip().split(".")[0] for line in lines}
    # Typer itself uses pydantic to read arguments.
    heavy = set("torch transformers mlflow papermill numpy datasets psutil rich".split())
    assert done.stdout.strip() == "training.learning_rate=" and not loaded & heavy


@pytest.mark.skipif(not Path("/bin/bash").exists(), reason="no bash here")
def test_bash_puts_no_blank_after_a_key(tmp_path):
    from medft.cli.completion import keep_cursor_after_equals

    from typer._completion_shared import get_completion_script

    keep_cursor_after_equals()
    script = get_completion_script(prog_name="medft", complete_var="_MEDFT_COMPLETE", shell="bash")
    (tmp_path / "complete.sh").write_text(script)
    (tmp_path / "medft").write_text(f'#!/bin/sh\nexec {sys.executable} -m medft.cli.verbs "$@"\n')
    (tmp_path / "medft").chmod(0o755)
    ours, theirs = pty.openpty()
    paths = f"{tmp_path}:{os.environ['PATH']}"
    bash = subprocess.Popen(
        ["/bin/bash", "--norc", "-i"],
        cwd=tmp_path,
        env=environment(tmp_path, PATH=paths, PS1="$ ", TERM="dumb"),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    start_of_line = b"\x01"
    os.write(ours, b"source ./complete.sh\n")
    typed = b"medft run quickstart training.learning_r\t1e-4"
    os.write(ours, typed + start_of_line + b"echo \n")
    os.write(ours, b"exit\n")
    shown = read_all(ours, bash, 60)
    assert "\nmedft run quickstart training.learning_rate=1e-4\r" in shown, shown
