"""Upload to a bucket: resumable, checked there, secrets stay here; deleting only what is safe.

The buckets are moto's S3 server, fake-gcs-server, and a folder."""

from medft.cli import verbs
from medft.core.files import MedftError, Refused, assets, model_path, read_json, write_json
from medft.core.recipe import load_recipe
from medft.core.run import Run
from medft.evaluate.scoring import external_models
from medft.export import upload

import hashlib
import json
import os
import shutil
import subprocess
import sys

import fsspec
import pytest
from bucket_server import bucket, google_bucket

HEAVY = "trl/merged/model.safetensors"
STATE = "trl/checkpoints/checkpoint-3/optimizer.pt"
SECRET = "s3cretpass7w"


@pytest.fixture(scope="module")
def s3():
    with bucket("med") as url:
        yield url


@pytest.fixture
def run(tmp_path, monkeypatch):
    "A finished run with one of everything, its merged weights those of the tiny base."
    monkeypatch.setenv("MEDFT_RUNS", str(tmp_path / "runs"))
    return make(tmp_path / "runs")


def make(root, *overrides, run_id="r1"):
    run = Run.create(load_recipe("quickstart", overrides), root=root, run_id=run_id)
    run.update({"status": "finished"})
    write_json(run.path / "data/report.json", dict(checks=dict(a=dict(count=1, ids=["p1"]))))
    for name, content in {
        "metrics.json": b"{}\n",
        "predictions/test.parquet": b"rows",
        "notebooks/01_data.ipynb": b'{"cells": []}\n',
        "trl/adapters/adapter_model.safetensors": b"\0adapter",
        STATE: b"\0state" * 500,
        "earlier/trl-1/adapters/adapter_model.safetensors": b"\0old",
    }.items():
        path = run.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    shutil.copytree(assets() / "tiny_base", run.path / "trl" / "merged")
    return run


def manifest(url, run):
    fs, root = fsspec.core.url_to_fs(upload.place_of(run, url))
    return json.loads(fs.cat_file(f"{root}/upload.json"))


def there(url, run):
    "name -> bytes, of everything that the bucket has of a run."
    fs, root = fsspec.core.url_to_fs(upload.place_of(run, url))
    fs.invalidate_cache()
    return {key.removeprefix(root).lstrip("/"): fs.cat_file(key) for key in fs.find(root)}


def test_everything_of_a_run_is_there_and_listed_last(s3, run):
    found = upload.upload_run(run, f"{s3}/one")
    stored, listed = there(f"{s3}/one", run), manifest(f"{s3}/one", run)
    assert set(stored) == {*listed["files"], "upload.json"}, "no probe is left either"
    assert {HEAVY, "recipe.yaml", ".recipe.yaml", "manifest.json", "predictions/test.parquet"} <= (
        set(stored)
    )
    assert not any("checkpoints" in name or "earlier" in name for name in stored)
    assert found["left_out"].keys() == {"trl/checkpoints", "earlier"}
    for name, about in listed["files"].items():
        assert hashlib.sha256(stored[name]).hexdigest() == about["sha256"], name
        assert stored[name] == (run.path / name).read_bytes(), name
    assert listed["complete"] and found["files"] == found["sent"] == len(listed["files"])
    assert found["checked"] == dict({"store": 0, "read back": found["files"]}), (
        "moto takes a wrong checksum, so nothing that it states is believed"
    )
    said = "\n".join(upload.upload_in_words(found))
    assert "--checkpoints sends them" in said and "not known for this store" in said
    assert "0.10 USD" in upload.price_line("s3://b", 5 * 10**9, 0.02)

    again = upload.upload_run(run, f"{s3}/one")
    assert again["sent"] == 0 and there(f"{s3}/one", run) == stored
    fsspec.filesystem("s3").pipe("med/one/quickstart/r1/metrics.json", b"[]\n")  # as many bytes
    assert upload.upload_run(run, f"{s3}/one")["sent"] == 1, "a damaged object is found"
    (run.path / "metrics.json").write_text('{"a": 1}\n')
    assert upload.upload_run(run, f"{s3}/one", checkpoints=True)["sent"] == 2
    assert there(f"{s3}/one", run)[STATE] == b"\0state" * 500


KILLED = """
import os, sys
from medft.core.run import Run
from medft.export import upload
send = upload.send_file
def dies(fs, path, key):
    if int(sys.argv[3]) and key.endswith("model.safetensors") and "merged" in key:
        os.kill(os.getpid(), 9)
    send(fs, path, key)
upload.send_file = dies
print(upload.upload_run(Run.open(sys.argv[1]), sys.argv[2])["sent"])
"""


def test_a_killed_upload_goes_on(s3, run):
    url = f"{s3}/killed"

    def process(kill):
        arguments = [sys.executable, "-c", KILLED, str(run.path), url, str(kill)]
        return subprocess.run(arguments, capture_output=True, text=True, timeout=120)

    assert process(1).returncode == -9
    half = there(url, run)
    assert half and "upload.json" not in half and HEAVY not in half
    with pytest.raises(Refused, match="no complete upload.json"):
        upload.cleanup_run(run, url)
    (run.path / "upload.json").unlink()  # even without its notes
    done = process(0)
    whole = there(url, run)
    assert int(done.stdout) == len(whole) - 1 - len(half), done.stderr[-2000:]
    assert manifest(url, run)["complete"]


def test_a_reader_can_tell_when_files_are_being_replaced(s3, run, monkeypatch):
    url = f"{s3}/partial"
    upload.upload_run(run, url)
    (run.path / "metrics.json").write_text('{"b": 1}\n')

    def breaks(fs, path, key):
        if key.endswith("metrics.json"):
            raise ConnectionError("gone")
        send(fs, path, key)

    send = upload.send_file
    monkeypatch.setattr(upload, "send_file", breaks)
    with pytest.raises(MedftError, match="what has arrived is not sent again: medft upload"):
        upload.upload_run(run, url)
    assert manifest(url, run)["complete"] is False


def test_deleting_needs_exactly_those_bytes_in_the_bucket(s3, run):
    url = f"{s3}/cleanup"
    upload.upload_run(run, url, checkpoints=True)
    fs, key = fsspec.filesystem("s3"), f"med/cleanup/quickstart/r1/{HEAVY}"
    whole = (run.path / HEAVY).read_bytes()
    for damaged in (whole[:-1] + b"x", whole[:-1]):
        fs.pipe(key, damaged)
        with pytest.raises(Refused, match="nothing was deleted.*does not hold the bytes"):
            upload.cleanup_run(run, url)
        assert (run.path / HEAVY).exists() and (run.path / STATE).exists()
        assert upload.upload_run(run, url)["sent"] == 1, "and the next upload mends it"
    (run.path / HEAVY).write_bytes(whole[:-1] + b"y")  # changed here since
    with pytest.raises(Refused):
        upload.cleanup_run(run, url)
    (run.path / HEAVY).write_bytes(whole)
    upload.upload_run(run, url)

    before = {p for p in run.path.rglob("*") if p.is_file()}
    found = upload.cleanup_run(run, url)
    gone = {p.relative_to(run.path).as_posix() for p in before if not p.exists()}
    assert gone == set(found["deleted"]) == {HEAVY, STATE} and not found["stays"]
    assert there(url, run)[HEAVY] == whole
    assert "deleted here" in "\n".join(upload.cleanup_in_words(found))


def test_what_was_not_uploaded_is_not_deleted(s3, run):
    upload.upload_run(run, f"{s3}/some")
    found = upload.cleanup_run(run, f"{s3}/some")
    assert set(found["deleted"]) == {HEAVY} and set(found["stays"]) == {STATE}
    assert (run.path / STATE).exists()


def test_after_a_cleanup_everything_says_where_the_weights_are(s3, run, capsys):
    url, place = f"{s3}/after", f"{s3}/after/quickstart/r1"
    assert verbs.main(["upload", "r1", "--to", url, "--cleanup", "--price", "0.01"]) == 0
    said = capsys.readouterr().out
    assert f"uploaded to {place}" in said and f"deleted here: {HEAVY}" in said
    assert "0.01 USD a GB; as given" in said
    assert verbs.main(["upload", "r1", "--to", url]) == 0
    assert "(sent 0," in capsys.readouterr().out
    assert HEAVY in manifest(url, run)["files"], "what is only in the bucket is still listed"
    fs, key = fsspec.filesystem("s3"), f"med/after/quickstart/r1/{HEAVY}"
    content = fs.cat_file(key)
    fs.rm_file(key)
    assert verbs.main(["upload", "r1", "--to", url]) == 2
    assert f"{HEAVY} was deleted here" in capsys.readouterr().err
    fs.pipe(key, content)

    assert verbs.main(["list"]) == 0
    assert f"merged weights of trl: in {place}/trl/merged" in capsys.readouterr().out
    with pytest.raises(MedftError, match=f"they are in {place}/trl/merged"):
        model_path(str(run.path / "trl/merged"), weights=True)
    write_json(run.path / "trl/training.json", dict(status="finished"))
    with pytest.raises(MedftError, match=f"they are in {place}/trl/merged"):
        external_models.scoring_recipe(str(run.path), merged=True)
    folder = model_path(f"{place}/trl/merged", weights=True)
    shipped = (assets() / "tiny_base/model.safetensors").read_bytes()
    with open(os.path.join(folder, "model.safetensors"), "rb") as f:
        assert f.read() == shipped, "and there they can be named"


def test_rows_stay_here_where_they_must_not_be_shown(s3, tmp_path):
    run = make(tmp_path, "evaluation.show_items=false")
    found = upload.upload_run(run, f"{s3}/hidden")
    stored = there(f"{s3}/hidden", run)
    held = {"predictions/test.parquet", "notebooks/01_data.ipynb"}
    assert set(found["held"]) == held and not held & set(stored)
    assert json.loads(stored["data/report.json"])["checks"] == {"a": {"count": 1}}
    line = next(line for line in upload.upload_in_words(found) if "held back" in line)
    assert "2 files with rows" in line and "show_items is false" in line
    assert set(manifest(f"{s3}/hidden", run)["held_back"]["files"]) == held
    on_this_machine = upload.upload_run(run, (tmp_path / "archive").as_uri())
    assert not on_this_machine["held"]


def test_no_secret_is_sent_or_written(s3, run, monkeypatch, capsys):
    monkeypatch.setenv("CLINIC_PASSWORD", SECRET)
    (run.path / "logs/finetune.log").write_text(f"login with {SECRET}\n")
    (run.path / "training.env").write_text("HF_TOKEN=hf_" + "a" * 34 + "\n")
    assert verbs.main(["upload", "r1", "--to", f"{s3}/secret"]) == 0
    stored = there(f"{s3}/secret", run)
    said = "".join(capsys.readouterr())
    keys = (SECRET, "bucketsecret7", "hf_aaaaaaaa")
    for secret in keys:
        assert not any(secret.encode() in content for content in stored.values())
        assert secret not in (run.path / "upload.json").read_text() + said
    (run.path / "trl/merged/config.json").write_text(f'{{"note": "{SECRET}"}}')
    assert verbs.main(["upload", "r1", "--to", f"{s3}/secret"]) == 3
    said = "".join(capsys.readouterr())
    assert "trl/merged/config.json holds the value of $CLINIC_PASSWORD" in said
    assert SECRET not in said and SECRET.encode() not in there(f"{s3}/secret", run)["recipe.yaml"]


def test_what_a_store_states_is_believed_only_where_it_refuses_wrong_bytes(s3, run, monkeypatch):
    fs = fsspec.filesystem("s3")
    assert upload.store_checks(fs, "med/probe") is False and not fs.exists("med/probe")

    class Strict:
        "As Amazon S3 answers."

        split_path = staticmethod(fs.split_path)

        def call_s3(self, *args, **more):
            raise OSError("BadDigest: the SHA256 you specified did not match the calculated one")

    assert upload.store_checks(Strict(), "med/probe") is True

    big = run.path / "big.safetensors"  # in two parts
    big.write_bytes(os.urandom((5 << 20) + 100))
    monkeypatch.setattr(upload, "_PART", 5 << 20)
    digest = hashlib.sha256(big.read_bytes()).hexdigest()
    fs.call_s3("create_multipart_upload", Bucket="med", Key="big")  # as a kill leaves it
    upload.send_file(fs, big, "med/big")
    assert fs.cat_file("med/big") == big.read_bytes()
    assert not fs.call_s3("list_multipart_uploads", Bucket="med").get("Uploads")
    assert upload.how_checked(fs, "med/big", big, digest, True) == "store"
    assert upload.how_checked(fs, "med/big", big, digest, False) == "read back"
    big.write_bytes(b"x" + big.read_bytes()[1:])
    assert upload.how_checked(fs, "med/big", big, digest, True) == ""


def test_a_run_is_uploaded_by_itself_and_never_fails_by_it(s3, tmp_path):
    said, warned = [], []
    good = make(tmp_path, f"output.bucket={s3}/auto")
    upload.upload_after_run(good, said.append, warned.append)
    assert manifest(f"{s3}/auto", good)["complete"] and not warned and "uploaded to" in said[0]
    for i, url in enumerate((f"{s3}-none/x", "gopher://nowhere/x")):
        run = make(tmp_path, f"output.bucket={url}", run_id=f"bad{i}")
        upload.upload_after_run(run, said.append, warned.append)
        assert len(warned) == i + 1 and f"send it later with: medft upload {run.path}" in warned[i]
        assert "\n" not in warned[i]
    rehearsed = make(tmp_path, f"output.bucket={s3}/auto", run_id="rehearsed")
    rehearsed.update(dict(rehearsal=True))
    upload.upload_after_run(rehearsed, said.append, warned.append)
    assert not there(f"{s3}/auto", rehearsed) and len(warned) == 2


def test_bad_places_and_unfinished_runs_are_refused(run, capsys):
    for url, says in {
        "bucket/prefix": "is no bucket",
        "https://example.org/x": "nothing can be written to a web address",
        "s3://": "is no bucket",
        "s3://a::zip://b": "is no bucket",
    }.items():
        with pytest.raises(MedftError, match=says):
            upload.upload_run(run, url)
        with pytest.raises(MedftError, match="output.bucket"):
            load_recipe("quickstart", [f"output.bucket={url}"])
    with pytest.raises(MedftError, match="give --to s3://bucket/prefix"):
        upload.upload_run(run)
    run.update({"status": "failed"})
    assert verbs.main(["upload", "r1", "--to", "memory://x/y"]) == 2
    assert "only a finished run is uploaded" in capsys.readouterr().err


def test_a_google_bucket_and_a_folder(run, tmp_path):
    with google_bucket() as gs:
        for url in ((tmp_path / "archive").as_uri(), f"{gs}/runs"):
            found = upload.upload_run(run, url)
            assert found["sent"] == found["files"] == found["checked"]["read back"]
            assert upload.upload_run(run, url)["sent"] == 0
        assert set(upload.cleanup_run(run, f"{gs}/runs")["deleted"]) == {HEAVY}
        stored = there(f"{gs}/runs", run)
        assert stored[HEAVY] == (assets() / "tiny_base/model.safetensors").read_bytes()
    assert read_json(run.path / "trl/merged/weights_are_elsewhere.json")["url"].startswith("gs://")


@pytest.mark.long
def test_a_run_from_a_bucket_into_a_bucket(s3, tmp_path, monkeypatch, capsys):
    "All stages in processes of their own; what only the bucket has can be scored."
    fsspec.filesystem("s3").put(f"{assets() / 'tiny_base'}/", "med/models/tiny/", recursive=True)
    monkeypatch.setenv("MEDFT_RUNS", str(tmp_path / "runs"))
    few = ["evaluation.max_items=4", "tracking.mlflow=false"]
    model = [f"model.name={s3}/models/tiny", f"model.cache_dir={tmp_path / 'models'}"]
    steps = ["engine=[trl]", "training.max_steps=2", f"output.bucket={s3}/whole"]
    place = str(tmp_path / "runs/quickstart/one")
    assert verbs.main(["run", "quickstart", *model, *steps, *few, "--run-dir", place]) == 0
    assert f"uploaded to {s3}/whole/quickstart/one" in capsys.readouterr().out
    run = Run.open(place)
    assert manifest(f"{s3}/whole", run)["complete"]
    adapter = read_json(run.path / "trl/adapters/adapter_config.json")
    assert adapter["base_model_name_or_path"] == f"{s3}/models/tiny"
    folders = [run.path, tmp_path / "models"]
    written = [p for folder in folders for p in folder.rglob("*") if p.is_file()]
    assert not any(b"bucketsecret7" in p.read_bytes() for p in written)

    assert verbs.main(["upload", "one", "--cleanup"]) == 0
    assert verbs.main(["report", "one"]) == 0
    assert "merged weights of trl: in s3://" in capsys.readouterr().out
    merged = f"{s3}/whole/quickstart/one/trl/merged"
    assert verbs.main(["evaluate", merged, "--recipe", "quickstart", *few]) == 0
