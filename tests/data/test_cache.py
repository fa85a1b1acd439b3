"""The cache of prepared rows: what decides its key, where it lies, and what it never touches."""

from medft.core.files import assets
from medft.core.recipe import load_recipe
from medft.core.run import Run
from medft.data import pipeline as data
from medft.data import splits as storing
from medft.data.chat_templates import load_tokenizer

import http.server
import json
import os
import shutil
import threading

import pytest

CHECKS_OFF = (
    "dataset.checks={near_duplicates: off, near_overlap: off, untrainable: off, "
    "chat_markers: off, contradictions: off}"
)
SMALL = [
    "dataset.holdout=0.0",
    "training.max_length=128",
    "tracking.mlflow=false",
    "engine=[trl]",
    CHECKS_OFF,
]


def rows_about(word):
    lines = [
        json.dumps(dict(question=f"What is {word} {i:02d}?", answer=f"{word} answer {i:02d}"))
        for i in range(24)
    ]
    return "\n".join(lines) + "\n"


def prepared(root, path, *overrides, run_id=None):
    recipe = load_recipe("your_data", [f"dataset.path={path}", *SMALL, *overrides])
    run = Run.create(recipe, root=root, run_id=run_id)
    return run, data.prepare(run)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(rows_about("velorin"))
    return path


def test_a_run_placed_by_hand_never_prunes_beside_it(tmp_path, rows, monkeypatch):
    """`--run-dir HOME/work/run` once kept its rows in HOME/.data and deleted all but ten of the
    user's folders there.
    """
    home = tmp_path / "home"
    for number in range(14):
        (home / ".data" / f"my-study-{number:02d}").mkdir(parents=True)
    foreign_hash = home / ".data" / ("a" * 32)
    foreign_hash.mkdir()
    monkeypatch.setenv("MEDFT_RUNS", str(tmp_path / "runs"))
    before = sorted(p.name for p in (home / ".data").iterdir())
    run, _ = prepared(None, rows, run_id=home / "work" / "run")
    assert run.path == home / "work" / "run"
    assert sorted(p.name for p in (home / ".data").iterdir()) == before
    assert run.root == tmp_path / "runs" and len(list((run.root / ".data").iterdir())) == 1
    assert Run.open(run.path).root == run.root


def test_pruning_takes_only_what_the_cache_made(tmp_path, rows):
    cache = tmp_path / "runs" / ".data"
    (cache / "notes").mkdir(parents=True)
    (cache / ("b" * 32)).mkdir()  # a name like ours, but no data set of ours
    (cache / "plan.txt").write_text("keep me")
    dead = cache / f".{'c' * 32}.123"
    dead.mkdir()
    os.utime(dead, (0, 0))
    for number in range(storing.CACHED + 2):
        old = cache / f"{number:032x}"
        old.mkdir()
        (old / "report.json").write_text("{}")
        os.utime(old, (number + 1, number + 1))
    _, report = prepared(tmp_path / "runs", rows)
    left = {p.name for p in cache.iterdir()}
    assert {"notes", "b" * 32, "plan.txt"} <= left and dead.name not in left
    ours = [
        name
        for name in left
        if storing.CACHED_NAME.fullmatch(name) and (cache / name / "report.json").exists()
    ]
    assert len(ours) == storing.CACHED and f"{0:032x}" not in left
    assert prepared(tmp_path / "runs", rows)[1]["cached"]


@pytest.mark.parametrize("trouble", ["a file where the folder should be", "a disk that is full"])
def test_a_cache_that_cannot_be_written_ends_no_run(tmp_path, rows, monkeypatch, trouble):
    if trouble.startswith("a file"):
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs" / ".data").write_text("")
    else:
        full = OSError(28, "No space left on device")
        monkeypatch.setattr(storing, "link_folder", lambda old, new: (_ for _ in ()).throw(full))
    run, report = prepared(tmp_path / "runs", rows)
    assert report["rows_out"] == 24
    assert "not kept for the next run" in (run.path / "logs" / "finetune.log").read_text()


def test_a_kept_data_set_that_is_damaged_is_prepared_again(tmp_path, rows):
    first, _ = prepared(tmp_path / "runs", rows)
    (kept,) = [
        p for p in (tmp_path / "runs" / ".data").iterdir() if storing.CACHED_NAME.fullmatch(p.name)
    ]
    (kept / "report.json").write_text("{ broken")
    again, report = prepared(tmp_path / "runs", rows)
    assert (
        "cached" not in report
        and data.load_split(again, "train").to_list() == data.load_split(first, "train").to_list()
    )


def tokenizer_with(folder, **changes):
    "The shipped base's tokenizer with other special tokens over the same vocabulary."
    shutil.copytree(assets() / "tiny_base", folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | changes))
    return folder


def test_special_tokens_decide_the_key(tmp_path, rows):
    """Llama 3's base and instruct tokenizers have one vocabulary and two end tokens; one was given
    the other's rows.
    """
    recipe = load_recipe("your_data", [f"dataset.path={rows}", *SMALL])
    word = load_tokenizer(recipe).convert_ids_to_tokens(300)
    keys = set()
    for name, changes in dict(
        base={}, eos=dict(eos_token=word), bos=dict(bos_token=word), pad=dict(pad_token=word)
    ).items():
        folder = tokenizer_with(tmp_path / name, **changes)
        keys.add(
            storing.cache_key(
                recipe,
                {"rows": "1"},
                load_tokenizer(load_recipe("your_data", [f"model.name={folder}", *SMALL])),
            )
        )
    assert len(keys) == 4


def test_library_versions_decide_the_key(rows, monkeypatch):
    recipe = load_recipe("your_data", [f"dataset.path={rows}", *SMALL])
    tok = load_tokenizer(recipe)
    before = storing.cache_key(recipe, {}, tok)
    assert before == storing.cache_key(recipe, {}, tok)
    for name in storing.LIBRARIES:
        real = storing.importlib.metadata.version
        with monkeypatch.context() as m:

            def version(asked, name=name, real=real):
                return "0.0" if asked == name else real(asked)

            m.setattr(storing.importlib.metadata, "version", version)
            assert storing.cache_key(recipe, {}, tok) != before, name


class Bare(http.server.BaseHTTPRequestHandler):
    "A web server that tells a file's size and nothing else of its state."

    protocol_version = "HTTP/1.1"
    body = b""

    def do_HEAD(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        self.wfile.write(self.body)

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("streaming", [True, False])
def test_changed_content_of_the_same_size_is_read_anew(tmp_path, monkeypatch, streaming):
    monkeypatch.setenv("MEDFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bare)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/rows.jsonl"
    seen = {}
    for word in ("velorin", "tamquex", "velorin"):
        monkeypatch.setattr(Bare, "body", rows_about(word).encode())
        run, report = prepared(
            tmp_path / "runs", url, f"dataset.streaming={str(streaming).lower()}"
        )
        assert word in data.load_split(run, "train")[0]["completion"]
        seen.setdefault(word, []).append((list(report["hashes"].values()), report.get("cached")))
    server.shutdown()
    (first, _), (again, cached) = seen["velorin"]
    assert first == again != seen["tamquex"][0][0] and cached
