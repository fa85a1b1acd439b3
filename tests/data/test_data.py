"""The data stage whole: real files, splits that hold groups together, checks, the cache."""

from medft.core.files import MedftError, read_json
from medft.core.recipe import load_recipe
from medft.core.run import Run
from medft.data import chat_templates, splits
from medft.data import pipeline as data
from medft.data import splits as storing

import json

import numpy as np
import pytest
from real_data import SMALL, on_real_files, on_real_rows

LOOSE = [
    "training.max_length=8192",
    "dataset.checks={truncated: warn, overlap: warn, chat_markers: warn}",
    "dataset.cache=false",
]


def prepared(tmp_path, path, *more):
    run = Run.create(
        load_recipe(
            "your_data",
            [f"dataset.path={path}", "training.max_length=512", "dataset.cache=false", *more],
        ),
        root=tmp_path / "runs",
    )
    return run, data.prepare(run)


def balanced(report):
    return report["rows_in"] == report["rows_out"] + sum(report["rejected"].values()) + sum(
        report["filtered"].values()
    )


def flagged(run):
    return [json.loads(line) for line in (run.path / "data/flagged.jsonl").open()]


def split(run, name):
    return data.load_split(run, name).to_list()


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


# ---- everything real, by recipe ----
REAL = {
    "medmcqa/dev.json": (2683, "medmcqa"),
    "medmcqa/validation-00000-of-00001.parquet": (2683, "medmcqa"),
    "medmcqa/validation.csv": (500, "medmcqa"),
    "medqa/phrases_no_exclude_test.jsonl": (773, "medqa"),
    "medqa/train_from_devsplit.jsonl": (1269, "medqa"),
    "pubmedqa/ori_pqal.json": (500, "pubmedqa"),
    "pubmedqa/train-00000-of-00001.parquet": (500, "pubmedqa"),
    "medquad/medDataset_processed.csv": (5000, None),
    "medquad/medquad.parquet": (6435, "medquad"),
    "medquad/xml": (None, "medquad"),
    "cpt_text/plos_articles.jsonl.gz": (81, "text"),
    "cpt_text/openstax_ap2e.jsonl.gz": (136, "text"),
    "cpt_text/plos_jats_xml": (40, "text"),
    "cpt_text/openstax_ap2e_cnxml": (136, "text"),
    "synthea/csv": (622, "patient"),
    "synthea/csv_full_record": (27, "patient"),
    "synthea/fhir": (10, "patient"),
    "synthea/er_pairs.jsonl": (2000, "entity-pairs"),
}
FEW_ROWS = {
    "medmcqa/dev.json": 20,
    "medmcqa/validation-00000-of-00001.parquet": 20,
    "medmcqa/validation.csv": 20,
    "medqa/phrases_no_exclude_test.jsonl": 10,
    "medqa/train_from_devsplit.jsonl": 10,
    "pubmedqa/ori_pqal.json": 10,
    "pubmedqa/train-00000-of-00001.parquet": 10,
    "medquad/medDataset_processed.csv": 25,
    "medquad/medquad.parquet": 34,
    "medquad/xml": 34,
    "cpt_text/plos_articles.jsonl.gz": 4,
    "cpt_text/openstax_ap2e.jsonl.gz": 5,
    "cpt_text/plos_jats_xml": 4,
    "cpt_text/openstax_ap2e_cnxml": 5,
    "synthea/csv": 8,
    "synthea/csv_full_record": 8,
    "synthea/fhir": 8,
    "synthea/er_pairs.jsonl": 16,
}


@on_real_files(
    "name, rows, schema",
    [(name, rows, REAL[name][1]) for name, rows in FEW_ROWS.items()],
    [(name, rows, schema) for name, (rows, schema) in REAL.items()],
)
def test_every_real_file_goes_in(tmp_path, folder, name, rows, schema):
    run, report = prepared(tmp_path, folder / name, *LOOSE)
    assert (
        balanced(report)
        and (rows is None or report["rows_in"] == rows)
        and report["shapes"]["train"] == (schema or report["shapes"]["train"])
    ), report
    assert report["rows_out"] > 0 and report["trainable_tokens"] > 0
    rejected = [json.loads(line) for line in (run.path / "data/rejected.jsonl").open()]
    assert len(rejected) == sum(report["rejected"].values()) and all(
        r["file"] and r["reason"] and r["row"] for r in rejected
    )
    groups = {
        s: {g for r in split(run, s) for g in r["group"].split(" & ")} for s in report["splits"]
    }
    for a in groups:
        for b in groups:
            assert a == b or not groups[a] & groups[b], f"a group stands in {a} and in {b}"


@on_real_rows
def test_the_same_questions_whatever_the_numbering(tmp_path, folder):
    a, b = (
        {
            r["id"]: (r["prompt"], r["completion"], r["answer"])
            for s in ("train", "test")
            for r in split(prepared(tmp_path, folder / f"medmcqa/{f}", *LOOSE)[0], s)
        }
        for f in ("dev.json", "validation-00000-of-00001.parquet")
    )
    assert a == b and len(a) > 10
    assert not any("Ans." in p for p, *_ in a.values()), (
        "an explanation that tells the answer was read"
    )


@on_real_rows
def test_unlabelled_rows_are_set_aside_and_named(tmp_path, folder):
    with pytest.raises(MedftError, match="no usable training row"):
        prepared(tmp_path, folder / "medmcqa/test_unlabelled.parquet")
    rejected = [
        json.loads(line) for line in next((tmp_path / "runs").rglob("data/rejected.jsonl")).open()
    ]
    assert len(rejected) == (5 if folder == SMALL else 200) and all(
        "no answer" in r["reason"] and r["file"].endswith("test_unlabelled.parquet")
        for r in rejected
    )


@on_real_rows
def test_llama_prompts_are_refused_by_a_model_that_does_not_know_their_markers(tmp_path, folder):
    with pytest.raises(MedftError, match="begin_of_text|start_header_id"):
        prepared(tmp_path, folder / "llama3_prompt/medical_llama3_instruct.jsonl", *LOOSE)
    run, report = prepared(
        tmp_path,
        folder / "llama3_prompt/medical_llama3_instruct.jsonl",
        *LOOSE,
        "dataset.schema=alpaca",
    )
    assert balanced(report) and report["rows_in"] == (10 if folder == SMALL else 2000)


@on_real_rows
def test_pairs_of_patients_never_cross(tmp_path, folder):
    run, report = prepared(
        tmp_path,
        folder / "synthea/er_pairs.jsonl",
        *LOOSE,
        "model.task=classification",
        "model.num_labels=2",
        "dataset.holdout=0.2",
    )
    assert balanced(report) and (folder == SMALL or report["filtered"]["crosses_split"] > 0)
    of = {s: {g for r in split(run, s) for g in r["group"].split(" & ")} for s in report["splits"]}
    assert (
        not of["train"] & of["test"]
        and not of["train"] & of["validation"]
        and not of["test"] & of["validation"]
    )
    assert {r["label"] for r in split(run, "train")} == {0, 1}


# ---- rows, splits, checks ----
MCQ = dict(question="q", opa="a", opb="b", opc="c", opd="d", cop=0)


def questions(n):
    return [
        MCQ
        | dict(
            question=f"Which sign belongs to finding number {i}, seen on day {i * i}?", cop=i % 4
        )
        for i in range(n)
    ]


def test_bad_rows_are_counted_and_kept(tmp_path):
    rows = questions(50) + [
        MCQ | dict(cop=9),
        MCQ | dict(opa=""),
        MCQ | dict(question=" "),
        MCQ | dict(cop=None),
    ]
    run, report = prepared(tmp_path, write(tmp_path / "r.jsonl", rows))
    assert (
        balanced(report) and sum(report["rejected"].values()) == 4 and len(report["rejected"]) == 4
    )
    assert [json.loads(line)["row"] for line in (run.path / "data/rejected.jsonl").open()] == [
        51,
        52,
        53,
        54,
    ]


def test_a_scored_question_in_the_training_rows_is_refused_or_dropped(tmp_path):
    row = MCQ | dict(question="Which vitamin prevents scurvy?")
    a, b = (
        write(tmp_path / "a.jsonl", questions(20) + [row]),
        write(tmp_path / "b.jsonl", [row | dict(question="which  VITAMIN prevents scurvy?")]),
    )
    test = f"dataset.test_path={b}"
    with pytest.raises(MedftError, match="overlap"):
        prepared(tmp_path, a, test)
    run, report = prepared(tmp_path, a, test, "dataset.checks={overlap: warn}")
    assert report["checks"]["overlap"]["count"] == 1 and report["checks"]["overlap"]["ids"] == [
        "b.jsonl:1"
    ]
    assert dict(
        check="overlap", id="b.jsonl:1", file=str(b), row=1, split="test", dropped=False
    ) in flagged(run)
    run, report = prepared(tmp_path, a, test, "dataset.drop=[overlap]")
    assert (
        balanced(report)
        and report["filtered"]["dropped_overlap"] == 1
        and not any("scurvy" in r["prompt"] for r in split(run, "train"))
    )
    assert dict(
        check="overlap", id="a.jsonl:21", file=str(a), row=21, split=None, dropped=True
    ) in flagged(run)


def test_a_benchmark_item_in_the_training_rows_is_found(tmp_path):
    item = MCQ | dict(
        question="A 54-year-old man with a long history of smoking presents with "
        "haemoptysis, weight loss and a mass in the hilum of the right lung; which "
        "cells are seen?"
    )
    a, b = (
        write(tmp_path / "a.jsonl", questions(30) + [item]),
        write(tmp_path / "exam.jsonl", [item]),
    )
    _, report = prepared(tmp_path, a, f"dataset.benchmarks={{exam: {b}}}", "dataset.holdout=0.0")
    assert report["checks"]["contamination"]["ids"] == ["a.jsonl:31"]
    _, report = prepared(
        tmp_path,
        a,
        f"dataset.benchmarks={{exam: {b}}}",
        "dataset.holdout=0.0",
        "dataset.drop=[contamination]",
    )
    assert balanced(report) and report["rows_out"] == 30
    with pytest.raises(MedftError, match="benchmarks"):
        prepared(tmp_path, a, "dataset.benchmarks={exma: null}")


def test_max_samples_is_counted_as_filtered_and_repeatable(tmp_path):
    path = write(tmp_path / "r.jsonl", questions(100))
    (a, ra), (b, rb) = (prepared(tmp_path, path, "dataset.max_samples=20") for _ in range(2))
    assert (
        balanced(ra)
        and ra["filtered"]["max_samples"] > 50
        and read_json(a.path / "data/split.json") == read_json(b.path / "data/split.json")
    )


def test_near_copies_stay_on_one_side(tmp_path):
    words = (
        "fever cough rash nausea fatigue tremor oedema pallor dyspnoea jaundice syncope ataxia"
    ).split()
    rng = np.random.default_rng(0)
    base = [" ".join(rng.choice(words, 30)) + f" case {i}" for i in range(150)]
    rows = [
        dict(question=t, answer="yes")
        for b in base
        for t in (b, b.replace("case", "Case:"), b + " .")
    ]
    run, report = prepared(tmp_path, write(tmp_path / "r.jsonl", rows))

    def number(s):
        return {r["prompt"].split("ase")[-1].strip(": .\nAnswer") for r in split(run, s)}

    assert (
        not number("train") & number("test")
        and not number("train") & number("validation")
        and number("test")
    )


def test_more_rows_move_no_row_to_another_side():
    few, many = (
        dict(zip(keys, splits.split_by_hash(keys, 1, 0.1), strict=False))
        for keys in (list(map(str, range(n))) for n in (100, 1000))
    )
    assert few.items() <= many.items() and set(many.values()) == {"train", "validation", "test"}


def test_text_with_a_label_becomes_a_classifiers_rows(tmp_path):
    path = write(
        tmp_path / "r.jsonl",
        [
            dict(
                text=f"Report {i}: " + ("normal" if i % 3 else "a mass is seen"),
                label=int(i % 3 == 0),
            )
            for i in range(90)
        ],
    )
    run, report = prepared(
        tmp_path,
        path,
        "model.task=classification",
        "model.num_labels=2",
        "dataset.labels=['0', '1']",
    )
    rows = split(run, "train")
    assert (
        balanced(report)
        and all(r["label"] == ("mass" in r["prompt"]) for r in rows)
        and "completion_mask" not in rows[0]
    )
    run, report = prepared(tmp_path, path)
    assert report["labels"] == ["0", "1"] and all(
        r["options"][r["answer"]] in r["completion"] for r in split(run, "train")
    )


def test_own_columns(tmp_path):
    path = write(
        tmp_path / "r.jsonl",
        [
            dict(frage=f"What is disease {i}?", antwort=f"It is number {i}.", fall=i // 2)
            for i in range(200)
        ],
    )
    run, report = prepared(
        tmp_path, path, "dataset.columns={question: frage, answer: antwort, group: fall}"
    )
    assert (
        balanced(report)
        and len(
            {r["group"] for r in split(run, "train")} & {r["group"] for r in split(run, "test")}
        )
        == 0
    )
    with pytest.raises(MedftError, match="antwrt.*antwort"):
        prepared(tmp_path, path, "dataset.columns={question: frage, answer: antwrt}")
    plain = write(
        tmp_path / "p.jsonl",
        [dict(question=f"What is disease {i}?", answer=f"It is number {i}.") for i in range(100)],
    )
    with pytest.raises(MedftError, match="clinic"):
        prepared(tmp_path, plain, "dataset.columns={group: clinic}")
    assert (
        prepared(
            tmp_path,
            path,
            "dataset.columns={question: frage, answer: antwort}",
            f"dataset.test_path={plain}",
            "dataset.checks={overlap: warn}",
        )[1]["splits"]["test"]
        == 100
    )


def test_an_exact_mask(tmp_path):
    run, _ = prepared(tmp_path, write(tmp_path / "r.jsonl", questions(40)))
    tok = chat_templates.load_tokenizer(run.recipe)
    for r in split(run, "train"):
        slow = [tok(r[k], add_special_tokens=False)["input_ids"] for k in ("prompt", "completion")]
        assert r["input_ids"] == slow[0] + slow[1] and r["completion_mask"] == [0] * len(
            slow[0]
        ) + [1] * len(slow[1])
        assert (
            tok.decode([i for i, m in zip(r["input_ids"], r["completion_mask"], strict=False) if m])
            == r["completion"]
        )


# ---- the cache ----
def test_a_second_run_links_the_same_rows_and_a_changed_file_does_not(tmp_path):
    path = write(tmp_path / "r.jsonl", questions(60))
    keep = "dataset.cache=true"
    (a, ra), (b, rb) = prepared(tmp_path, path, keep), prepared(tmp_path, path, keep)
    assert (
        "cached" not in ra
        and rb["cached"]
        and split(a, "train") == split(b, "train")
        and (ra["rows_out"], ra["checks"]) == (rb["rows_out"], rb["checks"])
    )

    def inode(r, f):
        return (r.path / "data" / f).stat().st_ino

    assert inode(a, "train/data-00000-of-00001.arrow") == inode(
        b, "train/data-00000-of-00001.arrow"
    ), "linked, not copied"
    assert inode(a, "split.json") != inode(b, "split.json"), (
        "a change to one run's file would be one to the other's"
    )
    assert "cached" not in prepared(tmp_path, path, keep, "training.seed=1")[1]
    write(path, questions(61))
    assert "cached" not in prepared(tmp_path, path, keep)[1]
    assert split(a, "train") == split(b, "train"), "an older run keeps its rows"


def test_a_refusal_leaves_its_report_and_is_not_cached(tmp_path):
    path = write(tmp_path / "r.jsonl", [dict(question="q", answer="a " * 2000)] * 3)
    for _ in range(2):
        with pytest.raises(MedftError, match="truncated"):
            prepared(tmp_path, path, "dataset.cache=true", "dataset.holdout=0.0")
    report = read_json(next((tmp_path / "runs").rglob("data/report.json")))
    assert (
        report["truncated"] == 3
        and report["truncation"]["completion"]["tokens_lost"] > 1000
        and report["checks"]["duplicates"]["count"] == 3
    )


def test_every_room_that_decides_the_rows_decides_the_cache_too():
    from medft.core.files import PACKAGE

    import ast

    def file_of(name):
        return (PACKAGE / name.replace(".", "/")).with_suffix(".py")

    seen = {"data.pipeline"}
    while True:
        found = set(seen)
        for name in seen:
            for node in ast.walk(ast.parse(file_of(name).read_text(encoding="utf-8"))):
                if not isinstance(node, ast.ImportFrom):
                    continue
                package = ["medft", *name.split(".")][: -node.level] if node.level else []
                whole = ".".join([*package, *([node.module] if node.module else [])])
                near = [
                    m.removeprefix("medft.")
                    for m in (whole, *(f"{whole}.{a.name}" for a in node.names))
                    if m.startswith("medft.")
                ]
                found |= {m for m in near if file_of(m).exists()}
        if found == seen:
            break
        seen = found
    said = {
        "core.run",
        "data.pipeline",
        "core.files",
        "core.sections",
        "core.recipe",
    }  # what these decide is in the key itself: the resolved recipe
    said |= {
        "core.secrets",
        "core.run",
    }  # these decide what is written about rows, not the rows
    rooms = {room.replace("/", ".") for room in storing.DATA_MODULES}
    assert seen - said <= rooms, seen - said - rooms


# ---- what testers found ----
def test_a_changed_benchmark_is_looked_at_again(tmp_path):
    a, b = (
        write(tmp_path / "a.jsonl", questions(30)),
        write(
            tmp_path / "exam.jsonl",
            [MCQ | dict(question="What is the unit of radioactivity in the international system?")],
        ),
    )
    more = ["dataset.cache=true", "dataset.holdout=0.0", f"dataset.benchmarks={{exam: {b}}}"]
    assert prepared(tmp_path, a, *more)[1]["checks"]["contamination"]["count"] == 0
    write(b, questions(3))
    assert prepared(tmp_path, a, *more)[1]["checks"]["contamination"]["count"] >= 3


def test_one_document_stays_for_training(tmp_path):
    path = write(
        tmp_path / "r.jsonl",
        [
            dict(
                document_id="d1",
                question=f"Which sign has disease {i * i}?",
                answer=f"sign {i}",
                question_focus=f"disease {i % 2}",
            )
            for i in range(20)
        ],
    )
    for seed in range(6):
        run, report = prepared(
            tmp_path, path, f"training.seed={seed}", "dataset.columns={group: document_id}"
        )
        assert report["splits"] == {"train": 20}


def test_what_is_trained_on_may_stand_before_the_cut(tmp_path):
    def turns(i):
        return [
            dict(role="user", content=f"Case {i}?"),
            dict(role="assistant", content="Yes."),
            dict(role="user", content="word " * 400),
            dict(role="assistant", content="No."),
        ]

    path = write(tmp_path / "r.jsonl", [dict(messages=turns(i)) for i in range(30)])
    run, report = prepared(
        tmp_path,
        path,
        "training.max_length=256",
        "training.assistant_only_loss=true",
        "dataset.checks={truncated: warn, near_duplicates: 'off', near_overlap: 'off'}",
    )
    assert (
        report["checks"]["untrainable"]["count"] == 0
        and report["checks"]["truncated"]["count"] == report["splits"]["train"]
    )
    assert (
        report["truncation"]["completion"]["rows"]
        == report["splits"]["train"]
        == report["truncated"]
    )


@pytest.mark.parametrize("name", ["../evil", "train", "", "a/b", "flagged.jsonl", ".work"])
def test_a_sets_name_stays_in_its_place(name):
    with pytest.raises(MedftError, match="dataset.sets: .*(names no further set|is no name)"):
        load_recipe("quickstart", [f"dataset.sets={{'{name}': starter/test.jsonl}}"])


def test_a_test_file_without_a_usable_row_is_refused(tmp_path):
    a, b = (
        write(tmp_path / "a.jsonl", questions(30)),
        write(
            tmp_path / "b.jsonl",
            [q | dict(cop=-1) for q in questions(5)]
            + [MCQ | dict(question="", cop=0), MCQ | dict(question="", cop=3)],
        ),
    )
    with pytest.raises(MedftError, match="test_path: no usable row"):
        prepared(tmp_path, a, f"dataset.test_path={b}")
    with pytest.raises(MedftError, match="max_samples"):
        load_recipe("quickstart", ["dataset.max_samples=-5"])


def test_leaks_between_named_files_are_told(tmp_path):
    a, v = write(tmp_path / "a.jsonl", questions(30)), write(tmp_path / "v.jsonl", questions(3))
    with pytest.raises(MedftError, match="overlap"):
        prepared(tmp_path, a, f"dataset.validation_path={v}")

    def pair(x, y, label):
        return dict(
            left=dict(first=f"A{x}"),
            right=dict(first=f"A{y}"),
            left_patient=f"p{x}",
            right_patient=f"p{y}",
            label=label,
            pair_id=f"{x}-{y}",
        )

    a, b = (
        write(tmp_path / "p.jsonl", [pair(i, i + 1, i % 2) for i in range(20)]),
        write(tmp_path / "q.jsonl", [pair(3, 50, 0), pair(60, 61, 1)]),
    )
    loose = "dataset.checks={near_duplicates: 'off', near_overlap: 'off', truncated: warn}"
    run, report = prepared(tmp_path, a, f"dataset.test_path={b}", "dataset.holdout=0.0", loose)
    assert report["checks"]["group_overlap"]["ids"] == ["3-50"]

    def words(i):
        return f"Chapter {i}: " + " ".join(f"word{i}x{k}" for k in range(40))

    a, b = (
        write(tmp_path / "t.jsonl", [dict(text=words(i)) for i in range(20)]),
        write(tmp_path / "u.jsonl", [dict(text=words(3))]),
    )
    with pytest.raises(MedftError, match="overlap"):
        prepared(tmp_path, a, f"dataset.test_path={b}", "model.task=pretraining")


def test_class_names_keep_their_order(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Value

    rows = dict(
        text=[f"pressure reading number {i}" for i in range(60)], label=[i % 3 for i in range(60)]
    )
    Dataset.from_dict(
        rows, Features(text=Value("string"), label=ClassLabel(names=["low", "mid", "high"]))
    ).to_parquet(tmp_path / "r.parquet")
    run, report = prepared(
        tmp_path,
        tmp_path / "r.parquet",
        "model.task=classification",
        "model.num_labels=3",
        "dataset.checks={near_duplicates: 'off', near_overlap: 'off'}",
    )
    assert report["labels"] == ["low", "mid", "high"] and all(
        r["label"] == int(r["prompt"].split()[-1]) % 3 for r in split(run, "train")
    )


def test_reordered_options_and_other_labels_contradict(tmp_path):
    q = dict(
        question="Which vitamin prevents scurvy in sailors?", opa="A", opb="B", opc="C", opd="D"
    )
    path = write(
        tmp_path / "r.jsonl", questions(20) + [q | dict(cop=2), q | dict(opa="C", opc="A", cop=2)]
    )
    assert prepared(tmp_path, path, "dataset.holdout=0.0")[1]["checks"]["contradictions"][
        "ids"
    ] == ["r.jsonl:21", "r.jsonl:22"]
    path = write(
        tmp_path / "l.jsonl",
        [dict(text=f"report number {i}", label=i % 2) for i in range(20)]
        + [dict(text="one report", label=0), dict(text="one report", label=1)],
    )
    report = prepared(
        tmp_path,
        path,
        "dataset.holdout=0.0",
        "model.task=classification",
        "model.num_labels=2",
        "dataset.checks={near_duplicates: 'off'}",
    )[1]
    assert (
        report["checks"]["duplicates"]["count"] == 0
        and report["checks"]["contradictions"]["count"] == 2
    )


def test_one_label_alone_is_told(tmp_path):
    path = write(
        tmp_path / "r.jsonl", [dict(text=f"report number {i}", label=1) for i in range(20)]
    )
    with pytest.raises(MedftError, match="every one of the 20 training rows has the label '1'"):
        prepared(
            tmp_path,
            path,
            "dataset.holdout=0.0",
            "model.task=classification",
            "model.num_labels=2",
            "dataset.labels=['0', '1']",
            "dataset.checks={near_duplicates: 'off'}",
        )
    assert (
        read_json(next((tmp_path / "runs").rglob("data/report.json")))["checks"]["label_balance"][
            "count"
        ]
        == 20
    )
