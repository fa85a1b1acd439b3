"""Benchmarks by name: the harness's prompts, our scores, equal results; from files and a hub."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import HubServer

if not importlib.util.find_spec("lm_eval"):
    pytest.skip("needs lm_eval", allow_module_level=True)

from medft.core.files import MedftError, assets, model_path
from medft.core.recipe import load_recipe
from medft.core.run import Run
from medft.data import pipeline as data
from medft.data.quality import leakage as leaks
from medft.evaluate.measures.classification import accuracy
from medft.evaluate.scoring import benchmarks as bm
from medft.evaluate.scoring import harness, predict

import torch
from real_data import LARGE, SMALL, needs_large, on_real_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tiny():
    base = model_path("tiny-base")
    return AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32
    ).eval(), AutoTokenizer.from_pretrained(base)


def rows(name, file, most=None):
    ((_, about, found),) = bm.open_tasks({name: file}, most)[name]
    return found


def lines(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


QUESTIONS = [
    (
        "Which drug is the antidote in opioid overdose? ",
        ["flumazenil", " naloxone", "atropine", "protamine"],
        1,
    ),
    ("Scurvy: which vitamin is lacking?", ["A", "B12", "C", "D"], 2),
    (
        "Which artery supplies the SA node most often?",
        ["right coronary", "left anterior descending", "circumflex", "obtuse marginal"],
        0,
    ),
    (
        "Which valve lies between left atrium and ventricle?",
        ["tricuspid", "pulmonary", "aortic", "mitral"],
        3,
    ),
]
MEDMCQA = [
    dict(
        id=f"m{i}",
        question=q,
        **dict(zip(("opa", "opb", "opc", "opd"), o, strict=True)),
        cop=a,
        choice_type="single",
        exp=None,
        subject_name="Anatomy",
        topic_name=None,
    )
    for i, (q, o, a) in enumerate(QUESTIONS)
]
MEDQA = [
    dict(
        question=q,
        options=dict(zip("ABCD", o, strict=True)),
        answer=o[a],
        answer_idx="ABCD"[a],
        meta_info="step1",
    )
    for q, o, a in QUESTIONS
]
MEDQA_HF = [
    dict(id=f"test-{i}", sent1=q, sent2="", **{f"ending{k}": x for k, x in enumerate(o)}, label=a)
    for i, (q, o, a) in enumerate(QUESTIONS)
]
MMLU = [dict(question=q, subject="anatomy", choices=o, answer=a) for q, o, a in QUESTIONS]


# the prompts, word for word


def test_prompts_are_the_harness_s_to_the_blank(tmp_path):
    "Whatever shape the file has: the texts as they stand, blanks included, and the right option."
    q, o, _ = QUESTIONS[0]
    listed = "".join(f"{x}. {t}\n" for x, t in zip("ABCD", o, strict=True))
    one = rows(
        "medmcqa", lines(tmp_path / "one.jsonl", [r | dict(cop=r["cop"] + 1) for r in MEDMCQA])
    )
    assert one[0]["prompt"] == f"Question: {q}\nChoices:\n{listed}Answer:" and one[0][
        "options"
    ] == [" A", " B", " C", " D"]
    assert (
        [r["answer"] for r in one] == [a for *_, a in QUESTIONS]
        and one[0]["id"] == "m0"
        and one[0]["subject"] == "Anatomy"
    )
    for file in (lines(tmp_path / "a.jsonl", MEDQA), lines(tmp_path / "b.jsonl", MEDQA_HF)):
        two = rows("medqa_4options", file)
        assert two[0]["prompt"] == f"Question: {q}\n{listed}Answer:" and [
            r["answer"] for r in two
        ] == [a for *_, a in QUESTIONS]
    three = rows("mmlu_anatomy", lines(tmp_path / "c.jsonl", MMLU))
    assert (
        three[0]["prompt"]
        == "The following are multiple choice questions (with answers) about anatomy.\n\n"
        f"{q.strip()}\n{listed}Answer:"
    )
    assert (
        len({r["group"] for r in one + two + three}) == 4
    )  # the same question is the same group in every benchmark


def test_a_file_and_the_harness_s_own_columns_give_the_same(tmp_path):
    "A file in the columns of the hub's data set is asked like one in those of the authors."
    a = rows("medmcqa", lines(tmp_path / "hub.jsonl", MEDMCQA))
    b = rows(
        "medmcqa", lines(tmp_path / "official.jsonl", [r | dict(cop=r["cop"] + 1) for r in MEDMCQA])
    )
    pq.write_table(pa.Table.from_pylist(MEDMCQA), tmp_path / "hub.parquet")
    pd.DataFrame(MEDMCQA).to_csv(tmp_path / "hub.csv", index=False)
    for c in (b, rows("medmcqa", tmp_path / "hub.parquet"), rows("medmcqa", tmp_path / "hub.csv")):
        assert [(r["id"], r["prompt"], r["answer"], r["content"]) for r in c] == [
            (r["id"], r["prompt"], r["answer"], r["content"]) for r in a
        ]


@on_real_rows
def test_real_files_in_all_their_shapes(folder):
    def same(name, *files, few):
        n = few if folder == SMALL else 100
        first, *others = [
            [(r["prompt"], r["answer"]) for r in rows(name, folder / f, 100)] for f in files
        ]
        assert len(first) == n and all(o == first for o in others)
        return first

    same(
        "medmcqa",
        "medmcqa/dev.json",
        "medmcqa/validation-00000-of-00001.parquet",
        "medmcqa/validation.csv",
        few=20,
    )
    same("pubmedqa", "pubmedqa/ori_pqal.json", "pubmedqa/train-00000-of-00001.parquet", few=10)
    official = [json.loads(x) for x in (folder / "medqa/phrases_no_exclude_test.jsonl").open()][
        :100
    ]
    said = same("medqa_4options", "medqa/phrases_no_exclude_test.jsonl", few=10)
    assert said == [
        (
            f"Question: {r['question']}\n"
            + "".join(f"{k}. {v}\n" for k, v in r["options"].items())
            + "Answer:",
            "ABCD".index(r["answer_idx"]),
        )
        for r in official
    ]
    key, paper = next(iter(json.loads((folder / "pubmedqa/ori_pqal.json").read_text()).items()))
    one = rows("pubmedqa", folder / "pubmedqa/ori_pqal.json", 1)[0]
    assert (
        one["prompt"]
        == "Abstract: " + "\n".join(paper["CONTEXTS"]) + f"\nQuestion: {paper['QUESTION']}\nAnswer:"
        and paper["LONG_ANSWER"] not in one["prompt"]
        and one["id"] == key
    )
    assert {
        p["options"][p["answer"]] for p in rows("pubmedqa", folder / "pubmedqa/ori_pqal.json")
    } == {" yes", " no", " maybe"}


def test_group_has_its_subjects(tmp_path):
    file = lines(
        tmp_path / "all.jsonl",
        [
            r | dict(subject=s.removeprefix("mmlu_"))
            for s in harness.GROUPS["mmlu_medical"]
            for r in MMLU
        ],
    )
    tasks = bm.open_tasks({"mmlu_medical": file}, 2)["mmlu_medical"]
    assert [t.config.task for t, *_ in tasks] == harness.GROUPS["mmlu_medical"] and all(
        len(found) == 2 for *_, found in tasks
    )
    assert {r["subject"] for *_, found in tasks for r in found} == {
        s.removeprefix("mmlu_") for s in harness.GROUPS["mmlu_medical"]
    }


# what is refused, and how it is said


@pytest.mark.parametrize(
    "wanted, said",
    [
        ({"medmcqa": "gone.json"}, "evaluation.benchmarks.medmcqa: dataset: no file"),
        (
            {"medmcqa": "unlabelled.jsonl"},
            r"unlabelled.jsonl:1: no answer \(cop missing or -1\); a benchmark is scored whole",
        ),
        ({"medqa_4options": "five.jsonl"}, "five.jsonl:1: 5 options, and medqa_4options has 4"),
        ({"pubmedqa": "broken.json"}, "evaluation.benchmarks.pubmedqa: broken.json:1"),
        ({"medmcqa": "text.jsonl"}, "no question with options"),
        ({"mmlu_virology": "mmlu.jsonl"}, "holds no row for mmlu_virology"),
        ({"mmlu_anatomy@5": "mmlu.jsonl"}, "examples come from another split"),
        ({"mmlu_anatomy@five": None}, "write mmlu_anatomy@5"),
        ({"med.mcqa": None}, "has a dot"),
        ({"test_b": "mmlu.jsonl"}, "dataset.sets has a set of that name"),
    ],
)
def test_refused_before_anything_is_loaded(tmp_path, monkeypatch, wanted, said):
    monkeypatch.chdir(tmp_path)
    lines(Path("unlabelled.jsonl"), [r | dict(cop=-1) for r in MEDMCQA])
    Path("broken.json").write_text('{"1": {"QUESTION": ')
    lines(Path("mmlu.jsonl"), MMLU)
    lines(
        Path("five.jsonl"),
        [
            dict(
                question="Which?",
                options=dict(zip("ABCDE", "vwxyz", strict=True)),
                answer_idx="E",
                answer="z",
            )
        ],
    )
    lines(Path("text.jsonl"), [dict(question="Why?", answer="So.")])
    with pytest.raises(MedftError, match=said):
        bm.check_benchmarks(wanted, sets=["test_b"])


def test_a_classifier_is_asked_for_no_words():
    with pytest.raises(MedftError, match="evaluation.benchmarks: a classifier says labels"):
        bm.check_benchmarks({"medmcqa": None}, task="classification")


def test_without_the_harness(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else found(name, *a)
    )
    with pytest.raises(MedftError, match=r"pip install 'medft\[lm-eval\]'"):
        harness.harness()


def test_nothing_wanted_needs_no_harness(monkeypatch):
    monkeypatch.setattr(harness, "harness", lambda: pytest.fail("asked for"))
    bm.check_benchmarks({})
    assert bm.open_tasks({}) == {}


# scored


def test_predictions_have_the_columns_of_all_choices_and_keep_what_was_asked(tmp_path, tiny):
    file = lines(tmp_path / "m.jsonl", MEDMCQA)
    frame = bm.score_benchmarks(*tiny, {"medmcqa": file})["medmcqa"]
    frame.to_parquet(tmp_path / "base.medmcqa.parquet", index=False)
    again = pd.read_parquet(tmp_path / "base.medmcqa.parquet")
    assert {
        "id",
        "group",
        "subject",
        "prompt_sha256",
        "prompt",
        "options",
        "scores",
        "choice",
        "choice_norm",
        "truth",
        "correct",
    } <= set(again)
    assert (
        list(again.prompt) == [r["prompt"] for r in rows("medmcqa", file)]
        and accuracy(again)["value"] == frame.correct.mean()
    )
    said = bm.about_benchmarks(
        None,
        {("base", "medmcqa"): again, ("trl", "medmcqa"): again, ("base", "test"): again.assign()},
        {},
    )["benchmarks"]["medmcqa"]
    assert (
        said["n"] == 4
        and said["lm_eval"] == harness.harness()
        and said["figures"]["trl"]["acc"] == frame.correct.mean()
        and len(said["task_hash"]) == len(said["revision"]) == 64
    )
    assert bm.about_benchmarks(None, {("base", "test"): pd.DataFrame(dict(id=["a"]))}, {}) == {}


def test_fingerprint_is_of_the_content(tmp_path):
    a, b, c = (
        lines(tmp_path / "a.jsonl", MEDQA),
        lines(tmp_path / "b.jsonl", MEDQA),
        lines(tmp_path / "c.jsonl", MEDQA[:3]),
    )
    print1, print2, print3 = (bm.benchmark_fingerprint("medqa_4options", f) for f in (a, b, c))
    assert print1 == print2 != print3


@on_real_rows
@pytest.mark.parametrize("name", list(bm.FILES))
def test_a_few_real_items_as_the_harness_judges_them(tiny, folder, name):
    most = dict(medmcqa=20, medqa_4options=10, pubmedqa=5)[
        name
    ]  # vignettes and abstracts are long; all of them: below
    found = bm.compare_with_harness(*tiny, name, folder / bm.FILES[name], most)
    assert (
        found["rows"] == most
        and found["items_that_differ"] == []
        and found["acc_lm_eval"] == found["acc_medft"]
        and found["largest_difference"] < 1e-3
    )


@needs_large
@pytest.mark.long
def test_all_real_items_as_the_harness_judges_them(tmp_path, tiny):
    found = bm.remake_agreement(LARGE, tmp_path / "evidence.json")["tasks"]
    assert [f["benchmark"] for f in found] == list(bm.FILES) and all(
        f["rows"] >= 500 for f in found
    )
    for f in found:
        assert (
            f["items_that_differ"] == []
            and f["acc_lm_eval"] == f["acc_medft"]
            and f["largest_difference"] < 1e-3
        ), f
    kept = json.loads((assets() / "evidence" / "benchmarks.json").read_text())["tasks"]
    assert [(f["benchmark"], f["rows"], f["task_hash"], f["revision"]) for f in kept] == [
        (f["benchmark"], f["rows"], f["task_hash"], f["revision"]) for f in found
    ]


def test_the_referee_sees_a_difference(tmp_path, tiny, monkeypatch):
    "The comparison is one that can fail."
    file, score = lines(tmp_path / "m.jsonl", MEDMCQA), predict.score_choices
    monkeypatch.setattr(bm, "score_choices", lambda *a, **k: [s[::-1] for s in score(*a, **k)])
    assert bm.compare_with_harness(*tiny, "medmcqa", file)["items_that_differ"]


# trained on


def prepared(tmp_path, file, *more):
    recipe = load_recipe(
        "quickstart",
        [
            f"dataset.path={file}",
            "dataset.validation_path=null",
            "dataset.test_path=null",
            "dataset.sets={}",
            "dataset.holdout=0",
            "dataset.cache=false",
            "dataset.checks={truncated: off, untrainable: off, contradictions: off,"
            " identifiers: off, near_duplicates: off}",
            *more,
        ],
    )
    run = Run.create(recipe, root=tmp_path / "runs")
    data.prepare(run)
    return run


def test_an_item_that_was_trained_on_is_refused_whatever_the_prompt(tmp_path):
    run = prepared(
        tmp_path,
        lines(
            tmp_path / "train.jsonl",
            MEDMCQA[:2] + [MEDMCQA[3] | dict(question="Which valve has three cusps?", cop=0)],
        ),
    )
    file = lines(
        tmp_path / "exam.jsonl", MEDQA
    )  # two of these four, in another benchmark's columns and prompt
    with pytest.raises(MedftError, match="2 of 4 rows were trained on"):
        bm.refuse_trained([run], {"medqa_4options": file})
    assert (
        bm.refuse_trained([run], {"medqa_4options": lines(tmp_path / "clean.jsonl", MEDQA[2:3])})
        == {}
    )
    assert (
        "not checked"
        in bm.refuse_trained([str(tmp_path / "elsewhere")], {"medqa_4options": file})[
            "medqa_4options"
        ][0]
    )


@on_real_rows
@pytest.mark.parametrize("name", list(bm.FILES))
def test_real_rows_are_known_by_what_they_ask(tmp_path, folder, name):
    run = prepared(tmp_path, folder / bm.FILES[name], "dataset.max_samples=40")
    trained = leaks.trained_on(run)
    found = rows(name, folder / bm.FILES[name])
    assert len(leaks.rows_on_list(trained, [dict(content=r["content"]) for r in found])) >= len(
        data.load_split(run, "train")
    )


# from the hub

PUBMEDQA = [
    dict(
        pubid=p,
        question=f"Does {x} help?",
        context=dict(
            contexts=["A trial.", f"Those given {x} lived {y}."], labels=["A", "B"], meshes=[]
        ),
        long_answer="Secret.",
        final_decision=d,
    )
    for p, x, y, d in (
        (999, "rest", "as long", "maybe"),
        (10808977, "of the folds", "long", "yes"),
        (998, "aspirin", "longer", "yes"),
    )
]
ASK = """
import json, sys
from medft.evaluate.scoring import benchmarks as bm
from medft.core.files import MedftError
out = {}
for name in json.loads(sys.argv[1]):
    try:
        out[name] = []
        for _, about, rows in bm.open_tasks({name: None})[name]:
            kept = [{k: v for k, v in row.items() if k != "doc"} for row in rows]
            out[name].append((dict(about), kept))
    except MedftError as e:
        out[name] = str(e)
import datasets, huggingface_hub     # ... and the same again without the network
huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
for name in ["medmcqa", "mmlu_college_medicine"]:
    try:
        bm.check_benchmarks({name: None})
        out[name + " offline"] = "as before"
    except MedftError as e:
        out[name + " offline"] = str(e)
print(json.dumps(out))
"""


def parquet(rows, path):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path.read_bytes()


def served(hub, tmp_path):
    hub.add(
        "openlifescienceai/medmcqa",
        {
            f"data/{s}-00000-of-00001.parquet": parquet(MEDMCQA, tmp_path / "p")
            for s in ("train", "validation", "test")
        },
    )
    hub.add(
        "bigbio/pubmed_qa",
        {
            "pubmed_qa.py": b"raise SystemExit('this code is never run')\n",
            "README.md": b"# PubMedQA\n",
        },
    )
    hub.add(
        "qiaojin/PubMedQA",
        {
            "README.md": b"---\nconfigs:\n- config_name: pqa_labeled\n  data_files:\n"
            b"  - split: train\n    path: pqa_labeled/train-*\n---\n",
            "pqa_labeled/train-00000-of-00001.parquet": parquet(PUBMEDQA, tmp_path / "p"),
        },
    )
    card = (
        "---\nconfigs:\n- config_name: anatomy\n  data_files:\n"
        + "".join(f"  - split: {s}\n    path: anatomy/{s}-*\n" for s in ("test", "dev"))
        + "---\n"
    )
    hub.add(
        "cais/mmlu",
        {
            "README.md": card.encode(),
            "anatomy/test-00000-of-00001.parquet": parquet(MMLU[:2], tmp_path / "p"),
            "anatomy/dev-00000-of-00001.parquet": parquet(MMLU[2:], tmp_path / "p"),
        },
    )
    return {name: next(iter(repo.refs.values())) for (_, name), repo in hub.repos.items()}


def ask(names, env, code=ASK):
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(names)],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_from_the_hub_one_commit_and_nobody_s_code(tmp_path):
    with HubServer() as hub:
        commits = served(hub, tmp_path)
        env = hub.env(tmp_path / "home") | dict(
            PYTHONPATH=f"{HERE / 'blocked'}:{HERE.parent}",
            MEDFT_SOCKET_LOG=str(tmp_path / "sockets"),
            OMP_NUM_THREADS="1",
        )
        found = ask(["medmcqa", "pubmedqa", "mmlu_anatomy@2", "mmlu_virology"], env)
    ((about, asked),) = found["medmcqa"]
    assert (
        [r["answer"] for r in asked] == [a for *_, a in QUESTIONS]
        and about["dataset"] == "openlifescienceai/medmcqa"
        and about["revision"] == commits["openlifescienceai/medmcqa"]
    )
    assert (
        about["chat_template"] is False
        and about["num_fewshot"] == 0
        and all(r["content"] for r in asked)
    )
    # the definition's own data set is a script: the authors' stands in, without the folds' rows
    ((about, asked),) = found["pubmedqa"]
    assert (
        about["dataset"] == "qiaojin/PubMedQA"
        and about["revision"] == commits["qiaojin/PubMedQA"]
        and [r["id"] for r in asked] == ["999", "998"]
        and "Secret" not in asked[0]["prompt"]
    )
    ((about, asked),) = found["mmlu_anatomy@2"]
    q = [dict(r, question=r["question"].strip()) for r in MMLU]

    def shown(r):
        return (
            f"{r['question']}\n"
            + "".join(f"{x}. {t}\n" for x, t in zip("ABCD", r["choices"], strict=True))
            + "Answer:"
        )

    assert (
        about["num_fewshot"] == 2
        and asked[0]["prompt"].endswith(
            "\n\n".join([shown(q[2]) + " A", shown(q[3]) + " D", shown(q[0])])
        )
        and len(asked) == 2
    )
    assert (
        "evaluation.benchmarks.mmlu_virology" in found["mmlu_virology"]
        and "virology" in found["mmlu_virology"]
    )
    assert not (tmp_path / "sockets").exists()  # no other server was asked, nothing was sent
    assert found["medmcqa offline"] == "as before"  # out of the cache
    assert found["mmlu_college_medicine offline"].startswith(
        "evaluation.benchmarks.mmlu_college_medicine: offline (HF_HUB_OFFLINE), and 'cais/mmlu'"
        " is not in the cache"
    )


ALONE = """
import json, sys
import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from medft.evaluate.scoring import benchmarks as bm
from medft.core.files import MedftError, model_path
from transformers import AutoModelForCausalLM, AutoTokenizer
base = model_path("tiny-base")
tok = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
out = {}
for name in json.loads(sys.argv[1]):
    task, _, shots = name.partition("@")
    theirs = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tok, device="cpu"),
        tasks=[task],
        num_fewshot=int(shots) if shots else None,
        bootstrap_iters=0,
    )
    samples = sorted(theirs["samples"][task], key=lambda s: s["doc_id"])
    ours = bm.score_benchmarks(model, tok, {name: None})[name]
    accuracies = [theirs["results"][task]["acc,none"], ours.attrs["benchmark"]["figures"]["acc"]]
    out[name] = dict(
        theirs=[[s["acc"] == 1, s["arguments"][0][0]] for s in samples],
        ours=[[bool(c), p] for c, p in zip(ours.correct, ours.prompt)],
        acc=accuracies,
    )
for name in ("mmlu_anatomie", "triviaqa", "multimedqa", "winogrande"):
    try:
        if bm.definition(name):
            bm.build_task(name, None)
        out[name] = ""
    except MedftError as e:
        out[name] = str(e)
print(json.dumps(out))
"""


@pytest.mark.long
def test_the_harness_alone_by_name_from_the_same_hub(tmp_path):
    "Its own index, download and loop; the whole index tells what is not scored here."
    with HubServer() as hub:
        served(hub, tmp_path)
        found = ask(
            ["medmcqa", "mmlu_anatomy", "mmlu_anatomy@2"],
            hub.env(tmp_path / "home") | dict(PYTHONPATH=str(HERE.parent), OMP_NUM_THREADS="1"),
            ALONE,
        )
    for name in ("medmcqa", "mmlu_anatomy", "mmlu_anatomy@2"):
        assert (
            found[name]["ours"] == found[name]["theirs"]
            and found[name]["acc"][0] == found[name]["acc"][1]
        ), name
    assert (
        "did you mean 'mmlu_anatomy'" in found["mmlu_anatomie"]
        and "is a group" in found["multimedqa"]
    )
    assert "ask the harness itself: lm_eval" in found["triviaqa"] and found["winogrande"]
