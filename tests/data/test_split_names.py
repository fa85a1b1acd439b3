"""Rows held out by a name are never trained on, be it of a file, a folder, a column or a key."""

from medft.core.files import MedftError, read_json
from medft.core.recipe import load_recipe
from medft.core.run import Run
from medft.data import pipeline as data
from medft.data.reading import formats, recipe_sources
from medft.data.reading.formats import UNCLEAR, split_of_path, splits_in

import gzip
import io
import json
import zipfile
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def question(i, **more):
    return (
        dict(
            question=f"Which sign belongs to finding number {i}, seen on day {i * i}?",
            answer=f"Sign {i} of day {i * i}.",
        )
        | more
    )


def lines(numbers, **more):
    return "".join(json.dumps(question(i, **more)) + "\n" for i in numbers)


def put(name, content):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


def zipped(files):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def opened(*keys):
    return recipe_sources.open_sources(load_recipe("your_data", list(keys)))


def entry_names(found):
    return {entry: [p.name for p in parts] for entry, (parts, _) in found.entries.items()}


def read(found, entry):
    return [row for p in found.entries[entry][0] for _, row in formats.rows(p)]


def refusal(*keys):
    with pytest.raises(MedftError) as e:
        opened(*keys)
    assert str(e.value).isprintable() and "\n" not in str(e.value)
    return str(e.value)


def prepared(*keys):
    quick = [
        "training.max_length=512",
        "dataset.cache=false",
        "dataset.checks={near_duplicates: 'off', near_overlap: 'off'}",
    ]
    run = Run.create(load_recipe("your_data", [*quick, *keys]), root="runs")
    return run, data.prepare(run)


# ---- names ----
NAMES = {
    "train": (
        "train.jsonl training.csv MyTrainData.csv TRAIN.CSV train-00000-of-00002.parquet"
        " trainset.json train_v2.jsonl.gz train_from_devsplit.jsonl trn.tsv 01_train.csv"
    ),
    "validation": (
        "eval.jsonl my_eval_v2.jsonl pubmedqa.dev.parquet val.csv VALID.tsv"
        " validation-00000-of-00001.arrow evaluation.json DevSet.csv evalset.json"
        " dev2.csv qa-eval.json"
    ),
    "test": (
        "test.jsonl test_2024.csv.gz testing.csv holdout.csv held_out.jsonl"
        " hold-out.json held-out.csv heldout1.csv HeldOut.csv QATest.csv MRItest.csv"
        " tests.csv phrases_test.jsonl"
    ),
}
NO_NAMES = (
    "latest.csv contest.csv trainer_notes.csv devices.csv protest.csv restraint.csv"
    " invalid.csv evaluator.csv strain.csv greatest.json cross_validation.csv"
    " attest.csv a.csv rows.jsonl medieval.csv"
)


@pytest.mark.parametrize("split", NAMES)
def test_names_that_speak_of_a_split(split):
    assert {name: splits_in(name) for name in NAMES[split].split()} == {
        name: {split} for name in NAMES[split].split()
    }


def test_words_inside_words_say_nothing():
    assert [name for name in NO_NAMES.split() if splits_in(name)] == []


def test_the_nearest_name_of_a_path_counts():
    assert (
        split_of_path("train/part1.jsonl") == "train"
        and split_of_path("data/Held-Out/a.csv") == "test"
    )
    assert (
        split_of_path("train/eval.jsonl") == "validation"
        and split_of_path("train_test_split/a.csv") is None
    )
    assert split_of_path("train_eval.csv") == split_of_path("test/train.csv") == UNCLEAR


# ---- files of a folder ----
FOLDERS = {  # files -> what each entry reads
    "plain": (
        ["train.jsonl", "eval.jsonl"],
        {"train": ["train.jsonl"], "validation": ["eval.jsonl"]},
    ),
    "three": (
        ["my_train.jsonl", "my_dev.jsonl", "my_heldout_v2.jsonl"],
        {
            "train": ["my_train.jsonl"],
            "validation": ["my_dev.jsonl"],
            "test": ["my_heldout_v2.jsonl"],
        },
    ),
    "folders": (
        ["train/part1.jsonl", "train/part2.jsonl", "Testing/a.jsonl"],
        {"train": ["train/part1.jsonl", "train/part2.jsonl"], "test": ["Testing/a.jsonl"]},
    ),
    "shards": (
        ["part-00000.jsonl", "part-00001.jsonl"],
        {"train": ["part-00000.jsonl", "part-00001.jsonl"]},
    ),
    "of": (
        ["x-00001-of-00002.jsonl", "x-00002-of-00002.jsonl", "eval.jsonl"],
        {
            "train": ["x-00001-of-00002.jsonl", "x-00002-of-00002.jsonl"],
            "validation": ["eval.jsonl"],
        },
    ),
    "data": (["data.jsonl", "test.jsonl"], {"train": ["data.jsonl"], "test": ["test.jsonl"]}),
    "lone": (["contest.jsonl"], {"train": ["contest.jsonl"]}),
    "words": (
        ["latest_1.jsonl", "latest_2.jsonl"],
        {"train": ["latest_1.jsonl", "latest_2.jsonl"]},
    ),
    "zipped": (
        ["in/train.jsonl", "in/holdout.jsonl"],
        {"train": ["in/train.jsonl"], "test": ["in/holdout.jsonl"]},
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("form", ["folder", "zip", "pattern"])
def test_files_of_several_splits(name, form):
    files, right = FOLDERS[name]
    if form == "zip":
        put("rows.zip", zipped({f: lines([i]) for i, f in enumerate(files)}))
    else:
        for i, f in enumerate(files):
            put(f"rows/{f}", lines([i]))
    found = opened(
        f"dataset.path={dict(folder='rows', zip='rows.zip', pattern='rows/**/*.jsonl')[form]}"
    )
    asked = {entry: [r["question"] for r in read(found, entry)] for entry in found.entries}
    assert asked == {
        entry: [question(files.index(f))["question"] for f in named]
        for entry, named in right.items()
    }
    assert found.not_read == []


def test_a_folder_in_a_folder_keeps_its_split():
    put("rows/eval/a.jsonl", lines([1]))
    assert "held out by their name (validation)" in refusal(
        "dataset.path=rows"
    ) and "dataset.split=validation" in refusal("dataset.path=rows")
    assert (
        read(opened("dataset.path=rows", "dataset.split=eval"), "train")
        == read(opened("dataset.path=rows/eval"), "train")
        == [question(1)]
    )


@pytest.mark.parametrize(
    "files, named",
    [
        (["a.jsonl", "b.jsonl"], "a.jsonl, b.jsonl"),
        (["train.jsonl", "extra.jsonl"], "extra.jsonl"),
        (["train.jsonl", "test.jsonl", "more.jsonl"], "more.jsonl"),
        (["rows_v1.jsonl", "rows_v2.jsonl"], "rows_v1.jsonl, rows_v2.jsonl"),
        (["x/0.csv", "y/0.csv"], "x/0.csv, y/0.csv"),
        (["train_eval.jsonl", "test.jsonl"], "train_eval.jsonl: the name mentions several splits"),
        (["train.jsonl", "train.jsonl.gz"], "the same rows twice"),
        (["train.csv", "train.jsonl", "test.csv"], "several kinds (1 csv, 1 json)"),
        (["dev.csv", "test.csv"], "no split to train on; there are validation, test"),
    ],
)
def test_names_that_leave_it_open_are_refused(files, named):
    for i, f in enumerate(files):
        content = (
            gzip.compress(lines([i]).encode())
            if f.endswith(".gz")
            else f"question,answer\na {i},b\n"
            if f.endswith(".csv")
            else lines([i])
        )
        put(f"rows/{f}", content)
    assert named in refusal("dataset.path=rows")
    if all(f.endswith("jsonl") for f in files):
        listed = [f"rows/{f}" for f in files]
        assert entry_names(opened(f"dataset.path={json.dumps(listed)}")) == {"train": listed}


def test_listed_files_are_read_and_a_held_out_name_among_them_is_said():
    put("rows/train.jsonl", lines(range(3)))
    put("rows/eval.jsonl", lines(range(3, 5)))
    found = opened("dataset.path=[rows/train.jsonl, rows/eval.jsonl]")
    assert len(read(found, "train")) == 5 and any(
        "rows/eval.jsonl is trained on" in n for n in found.notes
    )


def test_what_the_recipe_names_itself_comes_first():
    put("rows/train.jsonl", lines(range(3)))
    put("rows/eval.jsonl", lines(range(3, 5)))
    put("rows/exam.jsonl", lines(range(5, 7)))
    put("mine.jsonl", lines(range(7, 9)))
    found = opened(
        "dataset.path=rows",
        "dataset.validation_path=mine.jsonl",
        "dataset.test_path=rows/exam.jsonl",
    )
    assert entry_names(found) == {
        "train": ["rows/train.jsonl"],
        "validation": ["mine.jsonl"],
        "test": ["rows/exam.jsonl"],
    } and found.not_read == ["rows/eval.jsonl"]
    found = opened("dataset.path=rows", "dataset.sets={exam: rows/exam.jsonl}")
    assert entry_names(found) == {
        "train": ["rows/train.jsonl"],
        "validation": ["rows/eval.jsonl"],
        "exam": ["rows/exam.jsonl"],
    }
    found = opened(
        "dataset.path=rows",
        "dataset.test_path=rows/exam.jsonl",
        "dataset.split=train",
        "dataset.validation_split=dev",
    )
    assert entry_names(found)["validation"] == ["rows/eval.jsonl"]
    assert "there are train, validation" in refusal(
        "dataset.path=rows", "dataset.sets={exam: rows/exam.jsonl}", "dataset.test_split=test"
    )


def test_no_row_of_an_eval_file_is_trained_on():
    put("rows/train.jsonl", lines(range(30)))
    put("rows/eval.jsonl", lines(range(30, 40)))
    put("rows/notes.pdf", "")
    run, report = prepared("dataset.path=rows")
    held_out = {question(i)["answer"] for i in range(30, 40)}
    trained = {r["completion"].strip() for r in data.load_split(run, "train").to_list()}
    assert (
        not any(answer in text for answer in held_out for text in trained)
        and report["splits"]["validation"] == 10
        and "test" in report["splits"]
    )
    assert read_json(run.path / "data/report.json")["not_read"]["files"] == ["rows/notes.pdf"]
    log = "".join(p.read_text() for p in run.path.rglob("*.log"))
    assert (
        log.count("notes.pdf") == 1
        and "not read: file rows/notes.pdf" in log
        and "validation from eval.jsonl" in log
    )


def test_saved_data_sets_with_several_splits():
    from datasets import Dataset, DatasetDict

    rows = {
        s: Dataset.from_list([question(i)])
        for i, s in enumerate(("train", "dev", "Test", "unsupervised"))
    }
    DatasetDict(rows).save_to_disk("saved")
    found = opened("dataset.path=saved")
    assert {e: read(found, e) for e in found.entries} == {
        "train": [question(0)],
        "validation": [question(1)],
        "test": [question(2)],
    }
    assert found.not_read == ["saved/unsupervised"]
    rows["train"].save_to_disk("apart/train")
    rows["dev"].save_to_disk("apart/eval")
    found = opened("dataset.path=apart")
    assert {e: read(found, e) for e in found.entries} == {
        "train": [question(0)],
        "validation": [question(1)],
    }


def test_a_bucket_is_divided_like_a_folder():
    import fsspec

    files = {
        "/test-bucket/set/train.jsonl": lines([0]),
        "/test-bucket/set/dev.jsonl": lines([1]),
        "/test-bucket/set/scan.pdf": "x",
        "/test-bucket/set/README.md": "x",
    }
    fsspec.filesystem("memory").pipe({k: v.encode() for k, v in files.items()})
    for path in ("memory://test-bucket/set", "memory://test-bucket/set/*"):
        for streaming in ("true", "false"):
            found = opened(f"dataset.path={path}", f"dataset.streaming={streaming}")
            assert {e: read(found, e) for e in found.entries} == {
                "train": [question(0)],
                "validation": [question(1)],
            }
            assert [n.rpartition("/")[2] for n in found.not_read] == ["scan.pdf"]


# ---- documents and rows, and what nothing reads ----
def notes(n, folder="notes"):
    for i in range(n):
        put(f"{folder}/n{i:02}.txt", f"Seen for a dry cough since {i} days.")


PRETRAINING = "model.task=pretraining"


@pytest.mark.parametrize(
    "beside", ["metadata.json", "index.json", "about.csv", "scan.pdf", "a.xml"]
)
def test_many_documents_and_a_file_beside_them(beside):
    notes(30)
    put(f"notes/{beside}", '[{"text": "Collected on ward 0."}]')
    found = opened("dataset.path=notes", PRETRAINING)
    assert len(read(found, "train")) == 30 and all(
        "cough" in r["text"] for r in read(found, "train")
    )
    assert found.not_read == [f"notes/{beside}"] * (beside != "metadata.json")


def test_documents_have_names_of_their_own():
    for name in ("stress_test.txt", "training_guide.txt", "asthma.txt", "ward/eval_form.txt"):
        put(f"texts/{name}", name)
    assert len(read(opened("dataset.path=texts", PRETRAINING), "train")) == 4
    for name in ("train/a.txt", "train/b.txt", "test/c.txt"):
        put(f"divided/{name}", name)
    found = opened("dataset.path=divided", PRETRAINING)
    assert len(read(found, "train")) == 2 and [r["text"] for r in read(found, "test")] == [
        "test/c.txt"
    ]
    for name in ("wiki.train.txt", "wiki.valid.txt", "wiki.test.txt"):
        put(f"wiki/{name}", name)
    assert list(opened("dataset.path=wiki", PRETRAINING).entries) == ["train", "validation", "test"]
    for name in ("PMC1.xml", "PMC22_test.xml", "9_CDC/a.xml"):
        put(f"articles/{name}", "<article/>")
    assert entry_names(opened("dataset.path=articles", PRETRAINING)) == {"train": ["articles"]}
    for name in ("asthma", "gout", "stress_test", "zoster"):
        put(f"json/{name}.json", json.dumps({"title": name, "text": f"About {name}."}))
    assert len(read(opened("dataset.path=json", PRETRAINING), "train")) == 4


def test_rows_beside_texts():
    notes(3, "mixed")
    put("mixed/rows.jsonl", lines(range(3)))
    found = opened("dataset.path=mixed")
    assert read(found, "train") == [question(i) for i in range(3)] and found.not_read == [
        f"mixed/n{i:02}.txt" for i in range(3)
    ]
    put("mixed/more.jsonl", lines(range(3)))
    assert "files of several kinds (3 txt, 2 json)" in refusal("dataset.path=mixed", PRETRAINING)
    put("tables/a.csv", "question,answer\nx,y\n")
    put("tables/a.json", "[]")
    assert "files of several kinds (1 csv, 1 json)" in refusal("dataset.path=tables")


def test_every_file_that_nothing_reads_is_listed():
    files = {
        "rows.jsonl": lines(range(3)),
        "scan.pdf": "x",
        "letters/b.docx": "x",
        "deep/er/c.sav": "x",
        "noending": "x",
        "d.zip": "x",
        "README.md": "x",
        "LICENSE": "x",
        "LICENSES/MedQA-LICENSE": "x",
        ".DS_Store": "x",
        "dataset_info.json": "{}",
        "licence_texts.csv.bak": "x",
    }
    for name, content in files.items():
        put(f"all/{name}", content)
    right = [
        "d.zip",
        "deep/er/c.sav",
        "letters/b.docx",
        "licence_texts.csv.bak",
        "noending",
        "scan.pdf",
    ]
    assert opened("dataset.path=all").not_read == [f"all/{n}" for n in right]
    put("all.zip", zipped({f"in/{n}": c for n, c in files.items() if n != "d.zip"}))
    assert sorted(opened("dataset.path=all.zip").not_read) == [f"all.zip!{n}" for n in right[1:]]
    line = recipe_sources.files_in_words([f"all/{n}" for n in right])
    assert (
        line
        == "6 files in all (d.zip, deep/er/c.sav, letters/b.docx, licence_texts.csv.bak and 2 more)"
    )


def test_tables_of_an_export_that_are_not_read():
    for name in ("patients", "encounters", "claims", "payers"):
        put(f"synthea/csv/{name}.csv", "Id\n1\n")
    found = opened("dataset.path=synthea")
    assert [n.rpartition("/")[2] for n in found.not_read] == ["claims.csv", "payers.csv"]


# ---- names of splits in the recipe, and of rows ----
def test_split_names_are_set_aside_for_a_plain_file():
    put("plain.jsonl", lines(range(60)))
    keys = [
        "dataset.path=plain.jsonl",
        "dataset.validation_split=eval",
        "dataset.test_split=test",
        "dataset.holdout=0.2",
    ]
    run, report = prepared(*keys)
    assert report["rows_in"] == 60 and set(report["splits"]) == {"train", "validation", "test"}
    log = "".join(p.read_text() for p in run.path.rglob("*.log"))
    assert (
        "plain.jsonl has no splits: dataset.validation_split and dataset.test_split are"
        " set aside; rows are held out by dataset.holdout"
    ) in log


SPELLINGS = [
    ("split", "train", "test", "val"),
    ("Split", "TRAIN", "Test", "DEV"),
    ("data_split", "training", "held-out", "validation"),
    ("subset", "Training", "testing", "eval"),
    ("set", "train set", "test set", "dev set"),
]


@pytest.mark.parametrize("column, train, test, dev", SPELLINGS)
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_rows_that_tell_their_split(column, train, test, dev, kind):
    import pandas as pd

    rows = [question(i, **{column: [train, train, test, dev][i % 4]}) for i in range(12)]
    df = pd.DataFrame(rows)
    if kind == "parquet":
        df.to_parquet("all.parquet")
    else:
        put(
            f"all.{kind}",
            df.to_csv(index=False) if kind == "csv" else df.to_json(orient="records", lines=True),
        )
    found = opened(f"dataset.path=all.{kind}", "dataset.split=train", "dataset.test_split=test")
    wanted = dict(train=[0, 1, 4, 5, 8, 9], test=[2, 6, 10], validation=[3, 7, 11])
    assert {e: read(found, e) for e in found.entries} == {
        e: [question(i) for i in wanted[e]] for e in ("train", "validation", "test")
    }


def test_rows_of_several_splits_end_up_in_theirs():
    put(
        "all.jsonl",
        lines(range(30), split="train")
        + lines(range(30, 36), split="Dev")
        + lines(range(36, 42), split="TEST"),
    )
    run, report = prepared("dataset.path=all.jsonl")
    assert report["splits"] == {"train": 30, "validation": 6, "test": 6} and report["rows_in"] == 42
    assert {r["id"] for r in data.load_split(run, "test").to_list()} == {
        f"all.jsonl:{n}" for n in range(37, 43)
    }
    put("mine.jsonl", lines(range(50, 55)))
    run, report = prepared("dataset.path=all.jsonl", "dataset.validation_path=mine.jsonl")
    assert report["splits"] == {"train": 30, "validation": 5, "test": 6}
    assert "not read: rows whose split is Dev" in "".join(
        p.read_text() for p in run.path.rglob("*.log")
    )


def test_values_that_nobody_knows():
    put("odd.jsonl", lines(range(5), split="train") + lines(range(5, 7), split="holdback"))
    assert refusal("dataset.path=odd.jsonl").startswith(
        "odd.jsonl:6: split 'holdback' is no split that is known"
    )
    found = opened("dataset.path=odd.jsonl", "dataset.test_split=holdback")
    assert [len(read(found, e)) for e in found.entries] == [5, 2] and list(found.entries) == [
        "train",
        "test",
    ]
    assert [len(read(opened("dataset.path=odd.jsonl", "dataset.split=holdback"), "train"))] == [2]
    put("half.jsonl", lines(range(5), split="train") + lines(range(5, 7)))
    assert refusal("dataset.path=half.jsonl").startswith(
        "half.jsonl:6: no split in this row, while others have one"
    )
    put("only.jsonl", lines(range(5), split="test"))
    assert "held out by their name (test)" in refusal("dataset.path=only.jsonl")
    put("train.jsonl", lines(range(9, 12)))
    assert (
        len(read(opened("dataset.path=train.jsonl", "dataset.test_path=only.jsonl"), "test")) == 5
    )
    put("blank.jsonl", lines(range(5), split=None))
    assert list(opened("dataset.path=blank.jsonl").entries) == ["train"]
    put("folds.jsonl", lines(range(5), fold=1) + lines(range(5, 7), fold=2))
    assert len(read(opened("dataset.path=folds.jsonl"), "train")) == 7


def test_one_file_for_everything_reads_each_row_once():
    put("all.jsonl", lines(range(5), split="train") + lines(range(5, 7), split="test"))
    found = opened("dataset.path=all.jsonl", "dataset.test_path=all.jsonl")
    assert [len(read(found, e)) for e in found.entries] == [5, 2]


def test_a_json_document_divided_by_its_keys():
    rows = {"train": [question(i) for i in range(3)], "Dev": [question(3)], "test": []}
    keyed = {"train": {"101": question(0)}, "test": {"102": question(1)}}
    for content in (rows, {"version": 1, "data": rows}):
        put("doc.json", json.dumps(content))
        found = opened("dataset.path=doc.json")
        assert {e: read(found, e) for e in found.entries} == {
            "train": rows["train"],
            "validation": rows["Dev"],
        }
    put("doc.json", json.dumps(keyed))
    found = opened("dataset.path=doc.json")
    assert read(found, "test") == [question(1) | {"_key": "102"}] and len(read(found, "train")) == 1
    put("doc.json", json.dumps({"train": rows["train"], "extra": rows["Dev"]}))
    with pytest.raises(MedftError, match="holds 2 lists of rows .train, extra."):
        opened("dataset.path=doc.json")
