"""The data room on real files and on broken ones."""
import gzip, json
from pathlib import Path

import pytest

from medft import data
from medft.core import MedftError, Run, load_recipe, read_json

DATA = Path(__file__).resolve().parents[2]/"shared/data"
real = pytest.mark.skipif(not DATA.is_dir(), reason="the real data sets in ../shared/data are not on this machine")
OWN = ["dataset.test_path=null", "dataset.validation_path=null", "dataset.sets={}"]


def prepared(tmp_path, path, *more):
    run = Run.create(load_recipe("quickstart", [f"dataset.path={path}", *OWN, *more]), root=tmp_path/"runs")
    return run, data.prepare(run)


def balanced(report): return report["rows_in"] == report["rows_out"] + sum(report["rejected"].values()) + sum(report["filtered"].values())


@real
@pytest.mark.parametrize("name, rows, first", [("medmcqa/dev.json", 2683, 1), ("medmcqa/validation-00000-of-00001.parquet", 2683, 0), ("medmcqa/validation.csv", 500, 0)])
def test_medmcqa_in_every_shape(tmp_path, name, rows, first):
    lines = data.read_file(DATA/name)
    assert len(lines) == rows and data.first_option(r for _, r in lines) == first
    run, report = prepared(tmp_path, DATA/name, "training.max_length=512", "dataset.checks.truncated=warn", "dataset.checks.overlap=warn")
    assert balanced(report) and report["rows_in"] == rows
    assert not any("Ans." in p for p in data.load_split(run, "train")["prompt"]), "an explanation that tells the answer was read"


@real
def test_the_same_rows_give_the_same_answers_in_both_numberings():
    hub, raw = ({r["id"]: data.from_medmcqa(r, b)["answer"] for _, r in data.read_file(DATA/f"medmcqa/{f}") if r["cop"] is not None}
                for f, b in (("validation-00000-of-00001.parquet", 0), ("dev.json", 1)))
    assert hub == raw


@real
def test_unlabelled_rows_are_set_aside_and_named(tmp_path):
    with pytest.raises(MedftError, match="no usable training row"): prepared(tmp_path, DATA/"medmcqa/test_unlabelled.json")
    rejected = [json.loads(l) for l in next((tmp_path/"runs").rglob("rejected.jsonl")).open()] if list((tmp_path/"runs").rglob("rejected.jsonl")) else []
    assert all(r["reason"] and r["file"] == "test_unlabelled.json" for r in rejected)


@real
def test_medquad_csv(tmp_path):
    run, report = prepared(tmp_path, DATA/"medquad/medDataset_processed.csv", "training.max_length=512", "dataset.checks.truncated=warn")
    assert balanced(report) and report["shapes"]["train"] == "question/answer" and report["rows_out"] > 4000
    groups = {s: set(data.load_split(run, s)["group"]) for s in ("train", "validation", "test")}
    assert not groups["train"] & groups["test"] and not groups["train"] & groups["validation"]


MCQ = dict(question="q", opa="a", opb="b", opc="c", opd="d", cop=0)
BROKEN = {"half.jsonl": b'{"question": "a", "answer": "b"}\n{"question": "a", "ans', "array.json": b'[{"question": 1},', "list.jsonl": b'["a"]\n',
          "latin.csv": "Question,Answer\nÜber,b\n".encode("latin-1"), "shift.csv": b"Question,Answer\na,b,c\n", "cut.jsonl.gz": gzip.compress(b'{"text": "a"}\n'*999)[:40],
          "notgzip.jsonl.gz": b"plain", "strange.docx": b"PK", "noending": b"x", "columns.jsonl": b'{"foo": 1}\n', "bad.parquet": b"PAR1 no",
          "numbering.jsonl": "\n".join(json.dumps(MCQ | {"cop": c}) for c in (0, 4)).encode()}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_line_that_names_it(tmp_path, name):
    (tmp_path/name).write_bytes(BROKEN[name])
    with pytest.raises(MedftError) as e: prepared(tmp_path, tmp_path/name)
    assert "\n" not in str(e.value) and (name in str(e.value) or name == "numbering.jsonl"), str(e.value)


def test_bad_rows_are_counted_and_kept(tmp_path):
    rows = [MCQ | dict(question=f"question {i}", cop=i % 4) for i in range(50)] + [MCQ | dict(cop=9), MCQ | dict(opa=""), MCQ | dict(question=" "), MCQ | dict(cop=None)]
    (tmp_path/"r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run, report = prepared(tmp_path, tmp_path/"r.jsonl")
    assert balanced(report) and sum(report["rejected"].values()) == 4 and len(report["rejected"]) == 4
    assert [json.loads(l)["row"] for l in (run.path/"data/rejected.jsonl").open()] == [51, 52, 53, 54]


def test_a_scored_question_in_the_training_rows_is_refused(tmp_path):
    row = MCQ | dict(question="Which vitamin?")
    (tmp_path/"a.jsonl").write_text("\n".join(json.dumps(MCQ | dict(question=f"q {i}")) for i in range(9)) + "\n" + json.dumps(row))
    (tmp_path/"b.jsonl").write_text(json.dumps(row | dict(question="which  VITAMIN?")))
    with pytest.raises(MedftError, match="overlap"): prepared(tmp_path, tmp_path/"a.jsonl", f"dataset.test_path={tmp_path/'b.jsonl'}")
    assert prepared(tmp_path, tmp_path/"a.jsonl", f"dataset.test_path={tmp_path/'b.jsonl'}", "dataset.checks.overlap=warn")[1]["checks"]["overlap"]["count"] == 1


def test_max_samples_is_counted_as_filtered_and_repeatable(tmp_path):
    (tmp_path/"r.jsonl").write_text("\n".join(json.dumps(MCQ | dict(question=f"q {i}")) for i in range(100)))
    (a, ra), (b, rb) = (prepared(tmp_path, tmp_path/"r.jsonl", "dataset.max_samples=20") for _ in range(2))
    assert balanced(ra) and ra["filtered"]["max_samples"] > 50 and read_json(a.path/"data/split.json") == read_json(b.path/"data/split.json")


def test_more_rows_move_no_row_to_another_side():
    few, many = ({g: data.side(g, 1, .1) for g in map(str, range(n))} for n in (100, 1000))
    assert few.items() <= many.items()
