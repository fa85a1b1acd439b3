"""A corpus comes out the same after any interruption: nothing is lost, nothing comes twice."""

from medft.core.files import MedftError
from medft.data.prepare import cleaning as texts
from medft.data.prepare import corpus, packing
from medft.data.prepare.corpus import load_corpus, prepare_corpus
from medft.data.prepare.packing import Packer

import contextlib
import gzip
import json
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_data import LARGE, ON_LARGE, SMALL, needs_large

SHARED = LARGE / "cpt_text"


def quiet(line):
    return None


WORDS = [f"{a}{b}{c}" for a in "dghklmnprst" for b in "aeiou" for c in ("n", "r", "st", "l")]


def page(seed, sentences):
    rng = random.Random(seed)
    return " ".join(" ".join(rng.choices(WORDS, k=12)).capitalize() + "." for _ in range(sentences))


def write(path, docs):
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=1) as f:
        for d in docs:
            f.write(json.dumps(d) + "\n")
    return str(path)


def some(n, seed=0):
    return [dict(id=f"{seed}-{i}", text=page(f"{seed} {i}", 1 + i * i % 97)) for i in range(n)]


@pytest.fixture(scope="module")
def tokens():
    return texts.tokens_of("tiny-base")


@pytest.fixture
def fast(tokens, monkeypatch):
    "Small steps, so that a small corpus has many; and the tokenizer at once."
    monkeypatch.setattr(corpus, "STEP", 20_000)
    monkeypatch.setattr(corpus, "tokenizer", lambda *a: tokens)


def make(paths, out, **how):
    return prepare_corpus(paths, out, **dict(max_length=512, workers=1, tell=quiet) | how)


SCRIPT = """import pickle, sys
from medft.data.prepare import corpus
how = pickle.loads(bytes.fromhex(sys.argv[1]))
tokens, corpus.STEP = how.pop("tokens"), how.pop("step")
corpus.tokenizer = lambda *a: tokens
try: made = corpus.prepare_corpus(tell=lambda line: None, **how)
except corpus.MedftError as e: print("error", e); sys.exit(2)
print(made["hash"], made["peak_memory_bytes"]["main"], made["peak_memory_bytes"]["worker"])"""


def start(tokens, paths, out, step=20_000, **how):
    how = dict(tokens=tokens, step=step, paths=paths, out=str(out), max_length=512, workers=2) | how

    def heard():
        return signal.signal(
            signal.SIGINT, signal.SIG_DFL
        )  # a shell's background jobs are born deaf to Ctrl-C, and so are their children

    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, pickle.dumps(how).hex()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heard,
    )


def lines(out):
    return [json.loads(line) for line in (Path(out) / "documents.jsonl").read_text().splitlines()]


# one result, whatever happens


def test_same_result_with_any_number_of_workers_in_small_steps_or_large(
    tmp_path, fast, monkeypatch
):
    paths = [
        write(tmp_path / "a.jsonl.gz", some(150)),
        write(tmp_path / "b.jsonl.gz", some(150, 1)),
    ]
    made = [make(paths, tmp_path / f"w{w}", workers=w) for w in (1, 2, 3)]
    assert len({m["hash"] for m in made}) == 1
    assert len({(tmp_path / f"w{w}" / "documents.jsonl").read_bytes() for w in (1, 2, 3)}) == 1
    assert len(list((tmp_path / "w1" / "train").glob("shard-*.arrow"))) > 5
    monkeypatch.setattr(corpus, "STEP", 10**9)
    make(paths, tmp_path / "one")
    assert load_corpus(tmp_path / "one")[:] == load_corpus(tmp_path / "w2")[:]
    assert make(paths, tmp_path / "other", seed=7)["hash"] != made[0]["hash"]


@pytest.mark.long
def test_kill_9_at_any_moment_and_resume(tmp_path, tokens):
    docs = some(700) + some(20)
    paths = [write(tmp_path / "a.jsonl.gz", docs[:400]), write(tmp_path / "b.jsonl.gz", docs[400:])]
    whole = start(tokens, paths, tmp_path / "whole")
    out, err = whole.communicate()
    assert whole.returncode == 0, err

    def shards(name):
        return len(list((tmp_path / name / "train").glob("shard-*.arrow")))

    rng, kills, total = random.Random(time.time_ns()), 0, shards("whole")
    for attempt in range(7):
        p = start(tokens, paths, tmp_path / "killed", workers=1 + attempt % 2)
        while p.poll() is None and shards("killed") < total * attempt / 9:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.2)
        crew = psutil.Process(p.pid).children() if p.poll() is None else []
        kills += p.poll() is None
        p.kill()
        p.communicate()
        assert not psutil.wait_procs(crew, timeout=15)[1], "a worker outlived its parent"
    assert kills >= 5 and not (tmp_path / "killed" / "corpus.json").exists()
    last = start(tokens, paths, tmp_path / "killed")
    again, err = last.communicate()
    assert last.returncode == 0 and again.split()[0] == out.split()[0], err
    assert (tmp_path / "killed" / "documents.jsonl").read_bytes() == (
        tmp_path / "whole" / "documents.jsonl"
    ).read_bytes()
    assert not list((tmp_path / "killed").rglob(".*"))


def test_killed_within_a_commit(tmp_path, fast, monkeypatch):
    "Shards are on disk, the state is not: the step is done again."
    paths = [write(tmp_path / "a.jsonl.gz", some(200))]
    whole = make(paths, tmp_path / "whole")
    real, calls = packing.write_shard, []

    def dies(path, windows):
        calls.append(path)
        made = real(path, windows)
        if len(calls) in (3, 8, 9):
            raise KeyboardInterrupt
        return made

    monkeypatch.setattr(corpus, "write_shard", dies)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            make(paths, tmp_path / "out")
        with pytest.raises(MedftError, match="not finished"):
            load_corpus(tmp_path / "out")
    assert make(paths, tmp_path / "out")["hash"] == whole["hash"]


def test_killed_after_the_last_step(tmp_path, fast, monkeypatch):
    paths = [write(tmp_path / "a.jsonl.gz", some(60))]
    whole = make(paths, tmp_path / "whole")
    with monkeypatch.context() as m:
        m.setattr(corpus, "write_json", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            make(paths, tmp_path / "out")
    with monkeypatch.context() as m:
        m.setattr(
            corpus.shutil, "rmtree", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt())
        )
        with pytest.raises(KeyboardInterrupt):
            make(paths, tmp_path / "out")
    assert (
        make(paths, tmp_path / "out")["hash"] == whole["hash"]
        and not (tmp_path / "out" / ".work").exists()
    )
    assert load_corpus(tmp_path / "out")[:] == load_corpus(tmp_path / "whole")[:]


def test_ctrl_c_leaves_no_process_and_a_folder_that_goes_on(tmp_path, tokens, fast):
    for n in (600, 3000, 12000):  # a quick machine may be done before the signal arrives
        paths, out = [write(tmp_path / f"{n}.jsonl.gz", some(n))], tmp_path / f"out{n}"
        p = start(tokens, paths, out)
        while p.poll() is None and not (
            out.is_dir() and any(out.iterdir()) and psutil.Process(p.pid).children()
        ):
            time.sleep(0.005)
        crew = psutil.Process(p.pid).children() if p.poll() is None else []
        p.send_signal(signal.SIGINT)
        p.communicate(timeout=30)
        if p.returncode:
            break
    assert p.returncode and not psutil.wait_procs(crew, timeout=10)[1]
    assert make(paths, out)["hash"] == make(paths, tmp_path / "whole")["hash"]


def test_a_full_disk_is_one_line_and_the_work_goes_on_later(tmp_path, fast):
    paths = [write(tmp_path / "a.jsonl.gz", some(300))]
    whole, before = make(paths, tmp_path / "whole"), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (90_000, before[1]))
        with pytest.raises(MedftError, match="the disk is full") as e:
            make(paths, tmp_path / "out")
        assert "\n" not in str(e.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert make(paths, tmp_path / "out")["hash"] == whole["hash"]


def test_a_worker_that_dies_is_one_line(tmp_path, fast, monkeypatch):
    paths, real = [write(tmp_path / "a.jsonl.gz", some(300))], corpus.Builder.add

    def add(self, *a):
        for c in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                c.kill()
        return real(self, *a)

    with monkeypatch.context() as m:
        m.setattr(corpus.Builder, "add", add)
        with pytest.raises(MedftError, match="a worker process ended by itself"):
            make(paths, tmp_path / "out")
    assert make(paths, tmp_path / "out")["documents"]["read"] == 300


@pytest.mark.long
def test_memory_does_not_grow_with_the_corpus(tmp_path, tokens):
    def peak(n):
        p = start(
            tokens,
            [write(tmp_path / f"{n}.jsonl.gz", ({"text": page(i, 60)} for i in range(n)))],
            tmp_path / f"out{n}",
            step=500_000,
            workers=1,
        )
        out, err = p.communicate()
        assert p.returncode == 0, err
        return [int(x) for x in out.split()[1:]]

    small, large = peak(700), peak(5600)
    assert all(b - a < 25e6 for a, b in zip(small, large, strict=False)), (small, large)


# nothing is lost, nothing comes twice


def test_every_token_is_in_the_windows_once_and_in_order(tmp_path, fast, tokens):
    from medft.core.recipe import load_recipe
    from medft.data.chat_templates import load_tokenizer

    docs = some(120) + [
        dict(id="long", text=page("long", 900)),
        dict(id="exact", text="a"),
        dict(id="twice", text="a"),
    ]
    made = make([write(tmp_path / "a.jsonl.gz", docs)], tmp_path / "out", holdout=0.1)
    tok, found = load_tokenizer(load_recipe("quickstart")), {}
    for split in ("train", "validation", "test"):
        for row in load_corpus(tmp_path / "out", split):
            assert sum(row["seq_lengths"]) == len(row["input_ids"]) <= 512 and len(
                row["seq_lengths"]
            ) == len(row["documents"])
            at = 0
            for n, k in zip(row["documents"], row["seq_lengths"], strict=False):
                found.setdefault(n, []).extend(row["input_ids"][at : at + k])
                at += k
    fates = lines(tmp_path / "out")
    assert len(fates) == len(docs) and set(found) == {
        line["n"] for line in fates if "split" in line
    } == set(range(122))
    for n, ids in found.items():
        assert (
            ids
            == tok(
                (tok.bos_token or "") + docs[n]["text"] + tok.eos_token, add_special_tokens=False
            )["input_ids"]
        )
        assert len(ids) == fates[n]["tokens"]
    assert made["documents"]["cut"] == sum(len(i) > 512 for i in found.values()) > 0
    assert sum(made["tokens"].values()) == sum(map(len, found.values()))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), max_size=60), st.integers(4, 20), st.integers(1, 8))
def test_packing_by_any_lengths(lengths, size, open):
    p = Packer(size, open)
    windows = [w for n, k in enumerate(lengths) for w in p.put(n, np.arange(k))]
    assert len(p.windows) <= open and p.room == sorted(p.room) and all(0 < r < size for r in p.room)
    windows += list(p.rest())
    for n, k in enumerate(lengths):
        assert np.concatenate([t for w in windows for m, t in w if m == n]).tolist() == list(
            range(k)
        )
    assert all(sum(len(t) for _, t in w) <= size for w in windows)
    assert all(
        len([1 for w in windows for m, _ in w if m == n]) == -(-k // size)
        for n, k in enumerate(lengths)
    )  # cut only where it must be


def test_a_tokenizer_with_a_begin_token_gets_one_per_document(tmp_path, monkeypatch):
    core = json.loads(texts.tokens_of("tiny-base")[0].json)
    tokens = texts.Tokens(json.dumps(core), (0,), (1,), ("<pad>", "<eos>"))
    monkeypatch.setattr(corpus, "tokenizer", lambda *a: (tokens, "x"))
    make(
        [write(tmp_path / "a.jsonl.gz", [dict(text="<pad>one<eos>"), dict(text="two")])],
        tmp_path / "out",
        holdout=0,
    )
    ids = [i for r in load_corpus(tmp_path / "out") for i in r["input_ids"]]
    assert ids.count(0) == ids.count(1) == 2 and ids[0] == 0 and ids[-1] == 1


# cleaning and copies


@settings(max_examples=300, deadline=None)
@given(
    st.text(
        st.sampled_from(
            "ab1 \t\n\r\x0c\x85\u2028\xa0\u3000\xad\ufeff\u200b\u200d\ufb01e\u0301\u0344"
            "血ก\x00\x1c\ud800ÃÂ©"
        )
    )
    | st.text()
)
def test_cleaning_twice_changes_nothing_more(text):
    once, steps = texts.clean(text)
    again, more = texts.clean(once)
    assert again == once and set(more) <= {"decoded wrongly (left as it is)"}
    once.encode()
    assert "  " not in once and "\r" not in once and "\n\n\n" not in once and "\xad" not in once
    texts.sign(once)


@pytest.mark.parametrize(
    "text",
    [
        "Persian می\u200cخواهم",
        "Hindi क्\u200dष",
        "a - b",
        "1.5 mg/kg [3,4]",
        "x\ty\tz",
        "Größe naïve Ångström",
        "«CAFÉ»",
        "血圧が高い。",
        "ÁÉ",
    ],
)
def test_sound_text_is_left_alone(text):
    assert texts.clean(text) == (text, [])


def test_planted_copies_are_found_and_nothing_else(tmp_path, fast):
    rng, base = random.Random(3), [page(f"p{i}", 12 + i % 80) for i in range(400)]

    def retyped(t):
        return "\n".join(t.upper().split(". ")) + "\n"

    def edited(t):
        w = t.split()
        [w.__setitem__(rng.randrange(len(w)), "changed") for _ in range(max(1, len(w) // 150))]
        return " ".join(w)

    def longer(t):
        return t + " " + page(t[:40], max(1, t.count(".") // 20))

    copies = [f(t) for f in (str, retyped, edited, longer) for t in base]
    made = make(
        [
            write(tmp_path / "a.jsonl.gz", ({"text": t} for t in base)),
            write(tmp_path / "b.jsonl.gz", ({"text": t} for t in copies)),
        ],
        tmp_path / "out",
    )
    fates = lines(tmp_path / "out")
    assert all("split" in f for f in fates[:400])
    for k in range(4):
        right = sum(
            f.get("duplicate_of") == i for i, f in enumerate(fates[400 * (k + 1) : 400 * (k + 2)])
        )
        assert right >= (400 if k < 2 else 380), (k, right)
    assert all(f.get("duplicate_of") in (None, i % 400) for i, f in enumerate(fates))
    assert made["documents"]["duplicates"]["same text"] == 400
    plain = make(
        [str(tmp_path / "a.jsonl.gz"), str(tmp_path / "b.jsonl.gz")],
        tmp_path / "plain",
        similarity=0,
    )
    assert plain["documents"]["duplicates"] == {"same text": 400}


def test_near_copies_of_unspaced_scripts(tmp_path, fast):
    rng = random.Random(1)
    han = ["".join(chr(rng.randrange(0x4E00, 0x5E00)) for _ in range(600)) for _ in range(30)]
    make(
        [
            write(
                tmp_path / "a.jsonl.gz",
                [dict(text=t) for t in han + [t[:300] + "血" + t[301:] for t in han]],
            )
        ],
        tmp_path / "out",
    )
    assert [f.get("duplicate_of") for f in lines(tmp_path / "out")] == [None] * 30 + list(range(30))


def test_groups_are_not_split_and_counts_add_up(tmp_path, fast):
    docs = [dict(id=i, group=f"g{i // 10}", text=page(f"g {i}", 5)) for i in range(400)] + [
        dict(text=""),
        dict(text=None),
        dict(text=[1]),
        dict(text="a" * (texts.LONGEST + 1)),
    ]
    made = make([write(tmp_path / "a.jsonl.gz", docs)], tmp_path / "out", holdout=0.1)
    d, sides = made["documents"], {}
    for f in lines(tmp_path / "out")[:400]:
        sides.setdefault(int(f["id"]) // 10, set()).add(f["split"])
    assert all(len(s) == 1 for s in sides.values()) and set.union(*sides.values()) == {
        "train",
        "validation",
        "test",
    }
    assert (
        d["read"] == 404 == d["kept"] + sum(d["rejected"].values()) + sum(d["duplicates"].values())
        and len(d["rejected"]) == 3
    ), d
    assert [f["rejected"][:10] for f in lines(tmp_path / "out")[400:]] == [
        "empty text",
        "empty text",
        "a list or ",
        "longer tha",
    ]


# what is refused

JATS = (
    "<article><front><article-meta><article-id "
    'pub-id-type="doi">10.1/x.{0}</article-id><title-group><article-title>T{0}</article-title></title-group></article-meta></front>'
    "<body><p>{1}</p></body></article>"
)
QA = (
    '<Document id="1"><QAPairs><QAPair pid="1"><Question qid="1-1" '
    'qtype="causes">Why?</Question><Answer>So.</Answer></QAPair></QAPairs></Document>'
)


def test_xml_folders_text_files_and_a_chosen_column(tmp_path, fast):
    (tmp_path / "xml" / "deep").mkdir(parents=True)
    (tmp_path / "txt").mkdir()
    for i in range(5):
        (tmp_path / "xml" / ("deep" if i % 2 else ".") / f"{i}.xml").write_text(
            JATS.format(i, page(i, 20))
        )
    for i in range(3):
        (tmp_path / "txt" / f"{i}.txt").write_text(page(f"t{i}", 20))
    rows = write(
        tmp_path / "c.jsonl.gz", [dict(abstract=page(f"c{i}", 20), label=1) for i in range(4)]
    )
    made = make([str(tmp_path / "xml"), str(tmp_path / "txt")], tmp_path / "out", workers=2)
    assert made["documents"]["kept"] == 8
    assert [line["id"] for line in lines(tmp_path / "out")][:2] == ["x.0", "x.2"]
    assert make([rows], tmp_path / "out2", column="abstract")["documents"]["kept"] == 4
    with pytest.raises(
        MedftError, match="no column 'text'.* it has abstract: name the one to train on with --text"
    ):
        make([rows], tmp_path / "out3")
    (tmp_path / "xml" / "5.xml").write_text(JATS.format(5, "more"))
    with pytest.raises(MedftError, match="xml has changed"):
        make([str(tmp_path / "xml"), str(tmp_path / "txt")], tmp_path / "out")


BROKEN = {
    "half.jsonl": b'{"text": "a"}\n{"text": ',
    "cut.jsonl.gz": gzip.compress(b'{"text": "abc"}\n' * 5000)[:60],
    "latin.jsonl": b'{"text": "\xfc"}\n',
    "empty.jsonl": b"",
    "list.jsonl": b"[1, 2]",
    "qa.jsonl": b'{"question": "Why?", "answer": "So."}\n',
    "x.xml": b"<article><front>",
    "laughs.xml": b'<!DOCTYPE a [<!ENTITY a "ha">]><article>&a;</article>',
    "qa.xml": QA.encode(),
    "a.zip": b"PK\x03\x04nonsense",
    "what.bin": b"123",
    "none.jsonl": b'{"text": ""}\n',
    "lfs.jsonl": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_input_is_one_line(tmp_path, fast, name):
    (tmp_path / name).write_bytes(BROKEN[name])
    good = write(tmp_path / "good.jsonl.gz", some(3))
    with pytest.raises(MedftError) as e:
        make(
            [str(tmp_path / name)] if name == "none.jsonl" else [good, str(tmp_path / name)],
            tmp_path / "out",
        )
    assert "\n" not in str(e.value) and (
        name in str(e.value) or name == "none.jsonl" and "no document is left" in str(e.value)
    ), e.value
    assert not (tmp_path / "out" / "corpus.json").exists()
    assert not psutil.Process().children()


@pytest.mark.parametrize(
    "how",
    [
        dict(max_length=3),
        dict(similarity=1.2),
        dict(similarity=-1),
        dict(holdout=0.5),
        dict(holdout=-0.1),
        dict(workers=0),
    ],
)
def test_impossible_options(tmp_path, fast, how):
    with pytest.raises(MedftError, match="not possible"):
        make([write(tmp_path / "a.jsonl.gz", some(3))], tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()


def test_no_such_input_and_no_such_model(tmp_path, monkeypatch):
    with pytest.raises(MedftError, match="no file"):
        make([str(tmp_path / "nowhere")], tmp_path / "out")
    with pytest.raises(MedftError, match="model.name: no tokenizer"):
        make(
            [write(tmp_path / "a.jsonl.gz", some(3))],
            tmp_path / "out",
            model=str(tmp_path / "nomodel"),
        )
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_ours_is_never_touched(tmp_path, fast):
    paths = [write(tmp_path / "a.jsonl.gz", some(3))]
    for name, inside in (
        ("mine", "notes.txt"),
        ("hidden", ".git/config"),
        ("like ours", "corpus.json"),
        ("their work", ".work/notes"),
        ("train", "train/data.arrow"),
    ):
        file = tmp_path / name / inside
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{" if name == "like ours" else "{}")
        with pytest.raises(MedftError, match="holds something else already"):
            make(paths, tmp_path / name)
        assert [p for p in (tmp_path / name).rglob("*") if p.is_file()] == [
            file
        ] and file.read_text()[0] == "{"
    (tmp_path / "file").write_text("x")
    with pytest.raises(MedftError, match="holds something else already"):
        make(paths, tmp_path / "file")
    (tmp_path / "txt").mkdir()
    (tmp_path / "txt" / "a.txt").write_text("some text")
    (tmp_path / "txt" / "b.txt").write_text("other text")
    with pytest.raises(MedftError, match="lies inside its own input"):
        make([str(tmp_path / "txt")], tmp_path / "txt" / "out")
    (tmp_path / "empty").mkdir()
    assert make(paths, tmp_path / "empty")["documents"]["kept"] == 3


def test_what_differs_is_named(tmp_path, fast, monkeypatch):
    a, b = write(tmp_path / "a.jsonl.gz", some(40)), write(tmp_path / "b.jsonl.gz", some(40, 1))

    def stop(*x):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(corpus, "finish_corpus", stop)
        with pytest.raises(KeyboardInterrupt):
            make([a, b], tmp_path / "out")
    for finished in (False, True):
        if finished:
            first = make([a, b], tmp_path / "out")
        for paths, how, said in (
            ([a, b], dict(max_length=256), "max_length was 512, now 256"),
            ([a], {}, "b.jsonl.gz is gone"),
            ([b, a], {}, "another order"),
            ([a, b], dict(seed=1), "seed was 42, now 1"),
        ):
            with pytest.raises(MedftError, match=said):
                make(paths, tmp_path / "out", **how)
        old = Path(b).read_bytes()
        write(Path(b), some(41, 1))
        with pytest.raises(MedftError, match="b.jsonl.gz has changed"):
            make([a, b], tmp_path / "out")
        Path(b).write_bytes(old)
    assert (
        make([a, b], tmp_path / "out", workers=2) == first
    )  # done already: the same again, at once


def test_a_corpus_is_no_input_and_a_damaged_shard_is_seen(tmp_path, fast, monkeypatch):
    paths = [write(tmp_path / "a.jsonl.gz", some(200))]
    make(paths, tmp_path / "out")
    with pytest.raises(MedftError, match="a packed corpus already"):
        make([str(tmp_path / "out")], tmp_path / "again")
    with pytest.raises(MedftError, match="no split 'tset'"):
        load_corpus(tmp_path / "out", "tset")
    with pytest.raises(MedftError, match="no corpus"):
        load_corpus(tmp_path / "nowhere")

    def stop(*x):
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus, "finish_corpus", stop)
    with pytest.raises(KeyboardInterrupt):
        make(paths, tmp_path / "half")
    next((tmp_path / "half" / "train").glob("*.arrow")).write_bytes(b"short")
    with pytest.raises(MedftError, match="missing or damaged"):
        make(paths, tmp_path / "half")


def test_two_processes_do_not_share_a_folder(tmp_path, tokens, fast):
    paths = [write(tmp_path / "a.jsonl.gz", some(600))]
    p = start(tokens, paths, tmp_path / "out")
    try:
        while p.poll() is None and not (tmp_path / "out" / "train").is_dir():
            time.sleep(0.01)
        with pytest.raises(MedftError, match="another process"):
            make(paths, tmp_path / "out", workers=2)
    finally:
        p.kill()
        p.communicate()


def test_the_data_folder_is_what_datasets_reads(tmp_path, fast):
    from datasets import load_from_disk

    make([write(tmp_path / "a.jsonl.gz", some(100))], tmp_path / "out")
    ds = load_from_disk(str(tmp_path / "out" / "train"))
    assert ds.column_names == ["input_ids", "seq_lengths", "documents"] and str(ds.split) == "train"
    ds.select(range(2)).save_to_disk(tmp_path / "copy")
    from medft.data.reading.sources import source_parts

    assert source_parts(str(tmp_path / "out"))[0].kind == "corpus"


def test_progress_says_documents_a_second(tmp_path, fast):
    said = []
    make([write(tmp_path / "a.jsonl.gz", some(300))], tmp_path / "out", tell=said.append)
    assert "300 documents" in said[-1] and "a second" in said[-1] and "100% read" in said[-1]


# real text


@pytest.mark.parametrize(
    "folder, n_rows, n_xml, fill",
    [
        pytest.param(SMALL / "cpt_text", 4 + 5, 4 + 5, 0.7, id="few"),
        pytest.param(SHARED, 81 + 136, 40 + 136, 0.9, id="all", marks=ON_LARGE),
    ],
)
def test_articles_as_rows_and_as_xml_are_the_same_articles(tmp_path, folder, n_rows, n_xml, fill):
    names = (
        "plos_articles.jsonl.gz",
        "plos_jats_xml",
        "openstax_ap2e.jsonl.gz",
        "openstax_ap2e_cnxml",
    )
    made = prepare_corpus(
        [str(folder / name) for name in names], tmp_path / "out", workers=2, tell=quiet
    )
    d = made["documents"]
    assert d["read"] == n_rows + n_xml and not d["rejected"]
    assert (
        sum(d["duplicates"].values()) >= 0.9 * n_xml
    )  # each XML file is in the rows too, as read by another program
    assert made["fill"]["train"] > fill  # a few texts leave the last windows emptier


@pytest.mark.long
@needs_large
def test_side_by_side_with_map_and_trl_packing(tmp_path, capsys):
    """Documents a second of both routes and of the tokenizer alone, on the same texts: printed,
    not asserted (other work on the machine decides too).
    """
    rows = []
    for name in ("plos_articles", "openstax_ap2e"):
        with gzip.open(SHARED / f"{name}.jsonl.gz", "rt") as f:
            rows += map(json.loads, f)
    sentences = [s for r in rows for s in r["text"].split(". ") if s]
    rng = random.Random(0)
    path = write(
        tmp_path / "a.jsonl.gz",
        (
            {"text": ". ".join(rng.choices(sentences, k=rng.randrange(20, 300)))}
            for _ in range(1500)
        ),
    )
    plain = f"""
import gzip, json, os, sys, time
from datasets import load_dataset
from trl import pack_dataset
from medft.core.files import assets
from transformers import AutoTokenizer
os.environ["TOKENIZERS_PARALLELISM"] = "true"
tok = AutoTokenizer.from_pretrained(str(assets() / "tiny_base"))
texts = [json.loads(line)["text"] for line in gzip.open({path!r}, "rt")]
start = time.time()
tok.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
print(time.time() - start)
start = time.time()
ds = load_dataset("json", data_files={path!r}, split="train", cache_dir=sys.argv[1] + "/cache")
def tokenised(batch):
    return dict(input_ids=tok([text + tok.eos_token for text in batch["text"]])["input_ids"])
ds = ds.map(tokenised, batched=True, remove_columns=["text"])
pack_dataset(ds, 8192, "bfd_split").save_to_disk(sys.argv[1] + "/packed")
print(time.time() - start)"""
    for attempt in range(3):
        made = prepare_corpus([path], tmp_path / f"ours{attempt}", workers=2, tell=quiet)
        theirs = tmp_path / f"theirs{attempt}"  # or the cache of the first attempt answers
        command = [sys.executable, "-c", plain, str(theirs)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        alone, other = map(float, printed.split())
        with capsys.disabled():
            print(
                f"\n1500 documents: ours {made['seconds']:.1f} s, map + pack {other:.1f} s "
                f"({other / made['seconds']:.1f}x), tokenizer alone {alone:.1f} s "
                f"({alone / made['seconds']:.0%})"
            )
    assert made["documents"]["kept"] == 1500
