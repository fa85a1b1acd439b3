"""Recipes and run folders: the cases that are not on the page."""

from medft.core.files import MedftError, atomic_write, read_json, write_json
from medft.core.recipe import load_recipe
from medft.core.run import Run

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

SEEDS = Path(__file__).resolve().parents[3] / "shared/seeds"


@pytest.mark.skipif(
    not SEEDS.is_dir(), reason="the published workflows in ../shared/seeds are not on this machine"
)
@pytest.mark.parametrize("name", ["medgemma_4b_qlora", "gemma_1b_lora"])
def test_published_recipes_load_as_they_stand(tmp_path, name):
    text = next(SEEDS.glob("000*")).read_text()
    body = text.split(f"# configs/{name}.yaml\n")[1].split("```")[0]
    (tmp_path / f"{name}.yaml").write_text(body)
    r = load_recipe(tmp_path / f"{name}.yaml", ["engine=trl"])
    assert r.training.max_length == 2048
    assert r.dataset.revision is None
    assert r.dataset.name == "abicyclerider/entity-resolution-pairs"
    assert r.output.hub_model_id.startswith("abicyclerider/")
    assert r.lora.target_modules[0] == "q_proj"
    assert r.task == ("classification" if "medgemma" in name else "generative")


BAD = {
    "unknown section": "trainig: {seed: 1}",
    "unknown key": "training: {learning_rat: 1}",
    "wrong type": "training: {seed: many}",
    "wrong word": "model: {task: chatting}",
    "twice": "model: {name: a}\nmodel: {name: b}",
    "not YAML": "model: [",
    "a list": "- a",
    "empty": "",
    "tabs": "model:\n\tname: x",
    "secret": "training: {hub_token: hf_x}",
    "remote code": "training: {trust_remote_code: true}",
    "both sources": "dataset: {name: a, path: b}",
    "4 and 8": "quantization: {load_in_4bit: true, load_in_8bit: true}",
    "full 4-bit": "lora: null\nquantization: {load_in_4bit: true}",
    "number as text": "lora: {r: '16'}",
    "yes for true": "export: {merge: yes please}",
    "not UTF-8": b"model: {name: \xff}",
    "check": "dataset: {checks: {truncatd: warn}}",
    "engine": "engine: deepspeed",
}


@pytest.mark.parametrize("case", BAD)
def test_bad_recipe_is_one_line_that_names_the_place(tmp_path, case):
    text = BAD[case]
    (tmp_path / "r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(MedftError) as e:
        load_recipe(tmp_path / "r.yaml")
    assert "\n" not in str(e.value) and "r.yaml" in str(e.value), str(e.value)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_a_recipe_or_an_error_of_ours(text):
    import tempfile

    with tempfile.TemporaryDirectory() as d:
        p = Path(d) / "r.yaml"
        p.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            load_recipe(p)
        except MedftError as e:
            assert "\n" not in str(e)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60))
def test_any_override_is_understood_or_an_error_of_ours(text):
    try:
        load_recipe("quickstart", [text])
    except MedftError as e:
        assert "\n" not in str(e)


def test_readers_see_whole_files_only(tmp_path):
    path = tmp_path / "f.json"
    stop = threading.Event()
    seen = set()
    write_json(path, {"n": 0, "pad": "x" * 100_000})

    def look():
        while not stop.is_set():
            seen.add(read_json(path)["n"])

    t = threading.Thread(target=look)
    t.start()
    for n in range(60):
        write_json(path, {"n": n, "pad": "x" * 100_000})
    stop.set()
    t.join()
    assert seen and [p.name for p in tmp_path.iterdir()] == ["f.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    atomic_write(tmp_path / "f", "old")
    with pytest.raises(TypeError):
        atomic_write(tmp_path / "f", 3)
    assert (tmp_path / "f").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_killed_run_reads_interrupted(tmp_path):
    run = Run.create(load_recipe("quickstart"), root=tmp_path)
    code = f"""
import time
from medft.core.run import Run
with Run.open({str(run.path)!r}).hold():
    print('held', flush=True)
    time.sleep(60)
"""
    p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == "held\n" and run.status == "running"
    with pytest.raises(MedftError, match="another process"), run.hold():
        pass
    p.kill()
    p.wait()
    assert run.status == "interrupted"


def test_runs_never_overwrite_each_other(tmp_path):
    r = load_recipe("quickstart")
    assert len({Run.create(r, root=tmp_path).path for _ in range(8)}) == 8
    with pytest.raises(MedftError):
        Run.create(r, root=tmp_path, run_id=next((tmp_path / "quickstart").iterdir()).name)


def test_importing_core_loads_nothing_heavy():
    code = """
import sys, medft.core.run
heavy = {"torch", "transformers", "trl", "datasets", "mlflow", "pandas", "matplotlib"}
print(heavy & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()"
