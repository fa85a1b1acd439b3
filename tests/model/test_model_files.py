"""Models from a bucket (moto's S3 server): fetched once, whole, checked; and Git LFS pointers."""

from medft.core.files import MedftError, assets, is_pointer, model_path, read_json
from medft.core.recipe import load_recipe
from medft.data.chat_templates import load_tokenizer
from medft.data.reading import model_files, sources
from medft.evaluate.scoring import external_models
from medft.model import load, preflight
from medft.model.families import load_config

import hashlib
import json
import os
import shutil
import subprocess
import sys

import fsspec
import pytest
import torch
from bucket_server import bucket, google_bucket
from huggingface_hub import constants

TINY = assets() / "tiny_base"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4976698672\n"


@pytest.fixture(scope="module")
def s3():
    with bucket("models") as url:
        fs = fsspec.filesystem("s3")
        fs.put(f"{TINY}/", "models/tiny/", recursive=True)
        fs.pipe({"models/tiny/training.log": b"x", "models/tiny/optimizer.bin": b"x"})
        yield url


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    "No cache of an earlier test, and a process that has seen nothing yet."
    monkeypatch.setenv("MEDFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(model_files, "_seen", {})


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_model_from_a_bucket_is_the_model_of_the_folder(s3, tmp_path):
    recipe = load_recipe("quickstart", [f"model.name={s3}/tiny", "lora=null"])
    config = load_config(recipe)
    folder = tmp_path / "cache" / "models"
    (fetched,) = [path for path in folder.iterdir() if path.is_dir()]
    assert not list(fetched.glob("*.safetensors")), "a configuration needs no weights"
    own, shipped = load_tokenizer(recipe), load_tokenizer(load_recipe("quickstart"))
    assert own("What helps against scurvy?") == shipped("What helps against scurvy?")

    model = load.load_base(recipe)
    base = load.load_base(load_recipe("quickstart", ["lora=null"]))
    ids = torch.tensor([own("What helps against scurvy?")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, base(ids).logits)
    assert files(fetched) == files(TINY), "nothing else was fetched"
    load.check_origin(recipe, config, model)

    said = external_models.described(f"{s3}/tiny")
    assert said == dict(name=f"{s3}/tiny", adapter=False)
    assert external_models.fingerprint(f"{s3}/tiny") == external_models.fingerprint("tiny-base")
    evaluated, called = external_models.scoring_recipe(f"{s3}/tiny", "quickstart")
    assert evaluated.model.name == f"{s3}/tiny" and called == dict(base="tiny")


def test_a_cache_of_ones_own_keeps_every_version(s3, tmp_path):
    at = f"{s3}/changing"
    fs = fsspec.filesystem("s3")
    fs.put(f"{TINY}/", "models/changing/", recursive=True)
    place = tmp_path / "mine"
    first = model_path(at, str(place), weights=True)
    assert os.path.dirname(first) == str(place) and not (tmp_path / "cache/models").exists()
    fs.pipe("models/changing/generation_config.json", b'{"max_length": 7}')
    assert model_path(at, str(place)) == first, "a process keeps to what it saw"
    model_files._seen.clear()
    second = model_path(at, str(place), weights=True)
    assert second != first and read_json(f"{second}/generation_config.json") == {"max_length": 7}
    assert os.path.exists(f"{first}/model.safetensors"), "nothing is deleted unasked"


def test_the_hubs_cache_is_looked_up_where_the_recipe_says(tmp_path):
    "Offline, in a folder with the hub's own layout, for everything that reads a model."
    repo = tmp_path / "mine" / "models--clinic--tiny"
    commit = "a" * 40
    shutil.copytree(TINY, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    named = ["model.name=clinic/tiny", "lora=null"]
    recipe = load_recipe("quickstart", [*named, f"model.cache_dir={tmp_path / 'mine'}"])
    config = load_config(recipe)
    assert config._commit_hash == commit and load_tokenizer(recipe).eos_token
    model = load.load_base(recipe)
    load.check_origin(recipe, config, model)
    external_models.check_scored(recipe.model_copy(update=dict(engine=[])))
    cache_dir = recipe.model.cache_dir
    assert external_models.fingerprint("clinic/tiny", cache_dir) == commit
    assert preflight.keys_hash(recipe) == preflight.keys_hash(load_recipe("quickstart", named)), (
        "where a model is cached decides nothing"
    )
    with pytest.raises(MedftError, match="no model 'clinic/tiny'"):
        load_config(load_recipe("quickstart", named))


def test_a_fetch_that_is_killed_goes_on(s3, tmp_path):
    "kill -9 in the middle of a file: what had arrived is not asked for again."
    code = (
        "import os, sys, fsspec\n"
        "from medft.core.files import model_path\n"
        "from medft.data.reading import model_files\n"
        "model_files._PIECE = 50_000\n"
        "fs, cat, n = fsspec.filesystem('s3'), type(fsspec.filesystem('s3')).cat_file, []\n"
        "def counted(key, start=None, end=None):\n"
        "    n.append(key)\n"
        "    if int(sys.argv[1]) and sum('safetensors' in k for k in n) == int(sys.argv[1]):\n"
        "        os.kill(os.getpid(), 9)\n"
        "    return cat(fs, key, start=start, end=end)\n"
        "fs.cat_file = counted\n"
        f"print(model_path('{s3}/tiny', weights=True), len(n))\n"
    )

    def run(kill_at):
        arguments = [sys.executable, "-c", code, str(kill_at)]
        return subprocess.run(arguments, capture_output=True, text=True, timeout=120)

    killed = run(4)
    assert killed.returncode == -9, killed.stderr[-2000:]
    (part,) = (tmp_path / "cache").rglob("*.part")
    assert part.name == "model.safetensors.part" and part.stat().st_size == 150_000
    again = run(0)
    folder, asked = again.stdout.split()
    size = (TINY / "model.safetensors").stat().st_size
    assert int(asked) == -(-(size - 150_000) // 50_000), "only what was missing"
    assert files(tmp_path / "cache" / "models" / os.path.basename(folder)) == files(TINY)


def test_what_arrives_damaged_is_refused_by_name(s3, monkeypatch):
    fs = fsspec.filesystem("s3")
    whole = type(fs).cat_file
    monkeypatch.setattr(
        fs,
        "cat_file",
        lambda key, **more: whole(fs, key, **more)[::-1],
        raising=False,
    )
    with pytest.raises(MedftError) as e:
        model_path(f"{s3}/tiny")
    assert "arrived damaged" in str(e.value) and "s3://models/tiny/" in str(e.value)


def test_a_google_bucket_states_the_md5_of_what_it_holds(tmp_path):
    with google_bucket("models") as gs:
        fs, _ = fsspec.core.url_to_fs(gs)
        fs.put(f"{TINY}/", "models/tiny/", recursive=True)
        (info, *_) = fs.ls("models/tiny", detail=True)
        content = fs.cat_file(info["name"])
        assert model_files.stated_md5(info) == hashlib.md5(content).hexdigest()
        folder = model_path(f"{gs}/tiny", weights=True)
        assert files(tmp_path / "cache" / "models" / os.path.basename(folder)) == files(TINY)


REFUSED = {
    "pickles": ({"config.json": b"{}", "pytorch_model.bin": b"x"}, "are pickles"),
    "half": (
        {
            "config.json": b"{}",
            "model-00001-of-00002.safetensors": b"x",
            "model.safetensors.index.json": json.dumps(
                {"weight_map": {k: f"model-0000{k}-of-00002.safetensors" for k in "12"}}
            ).encode(),
        },
        "lacks model-00002-of-00002.safetensors",
    ),
    "pointers": (
        {"config.json": b"{}", "tokenizer.json": POINTER},
        "a Git LFS pointer was uploaded",
    ),
    "nothing": ({"notes.txt": b"x"}, "is no folder of a model"),
}


def test_what_is_no_model_is_refused_before_its_weights_are_fetched(s3, tmp_path):
    fs = fsspec.filesystem("s3")
    for name, (content, says) in REFUSED.items():
        fs.pipe({f"models/{name}/{file}": data for file, data in content.items()})
        with pytest.raises(MedftError) as e:
            model_path(f"{s3}/{name}", weights=True)
        assert says in str(e.value) and str(e.value).isprintable()
    assert not list(tmp_path.rglob("*.bin")) + list(tmp_path.rglob("*.safetensors"))
    for url, says in {
        f"{s3}/absent": "nothing there",
        f"{s3}-none/x": "nothing there",
        "https://example.org/model": "is a web address",
    }.items():
        with pytest.raises(MedftError, match=says):
            model_path(url)


def test_offline_a_copy_takes_the_place_of_a_bucket_that_is_away(s3, tmp_path, monkeypatch):
    fetched = model_path(f"{s3}/tiny", weights=True)

    def away(*args):
        raise OSError("Cannot connect to host")

    monkeypatch.setattr(model_files, "_listed", away)
    model_files._seen.clear()
    assert model_path(f"{s3}/tiny", weights=True) == fetched
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    model_files._seen.clear()
    with pytest.raises(MedftError, match="cannot be reached.*HF_HUB_OFFLINE=1 uses the copy"):
        model_path(f"{s3}/tiny")


def test_a_key_in_an_address_is_refused_and_not_shown(s3, tmp_path):
    with pytest.raises(MedftError) as e:
        model_path("s3://k:verysecretkey9@models/tiny")
    assert "set them in the environment" in str(e.value) and "verysecretkey9" not in str(e.value)
    assert not list((tmp_path / "cache").rglob("*.json"))


# Git LFS


def test_pointers_are_named_for_models_tokenizers_and_data(tmp_path):
    clone = tmp_path / "clone"
    shutil.copytree(TINY, clone)
    for name in ("tokenizer.json", "model.safetensors"):
        (clone / name).write_bytes(POINTER)
    assert is_pointer(clone / "tokenizer.json") and not is_pointer(clone / "config.json")
    recipe = load_recipe("quickstart", [f"model.name={clone}"])
    for call in (load_tokenizer, load_config, load.load_base):
        with pytest.raises(MedftError) as e:
            call(recipe)
        assert "model.safetensors, tokenizer.json are Git LFS pointers" in str(e.value)
        assert f"git -C {clone} lfs pull" in str(e.value)

    rows = tmp_path / "rows"
    rows.mkdir()
    for name in ("a.jsonl", "b.parquet", "c.zip", "d.csv.gz"):
        (rows / name).write_bytes(POINTER)
        with pytest.raises(MedftError, match=f"{name}: is a Git LFS pointer"):
            sources.source_parts(str(rows / name))
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "state.json").write_text("{}")
    (saved / "data-0.arrow").write_bytes(POINTER)
    for folder, says in {rows: "a.jsonl", saved: "data-0.arrow"}.items():
        with pytest.raises(MedftError, match=f"{says}:? is a Git LFS pointer"):
            sources.source_parts(str(folder))
