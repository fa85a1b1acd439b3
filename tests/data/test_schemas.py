"""Every schema: real files where they are at hand, the traps of each, their order, random rows."""

from medft.core.files import MedftError, assets
from medft.core.sections import Dataset
from medft.data.reading import formats, multiple_choice, schemas, sources
from medft.data.reading.multiple_choice import FirstOption
from medft.data.reading.schemas import read_examples

import itertools
import json
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_data import SMALL, on_real_files, on_real_rows

MCQ = dict(question="q", opa="a", opb="b", opc="c", opd="d")
TALK = [dict(role="user", content="Urate?"), dict(role="assistant", content="7.9 mg")]
OPTIONS = dict(A="p", B="q", C="r", D="s")


def read(rows, d=None, features=None, where="f.jsonl"):
    "The schema, the examples and the reasons of rows."
    reading = read_examples(enumerate(rows, 1), where, d, features)
    out = list(reading)
    assert len(out) == len(rows) and all((ex is None) != (why is None) for _, _, ex, why in out), (
        "a row was lost"
    )
    good = [ex for *_, ex, _ in out if ex]
    assert len({ex["id"] for ex in good}) == len(good) and all(
        isinstance(ex["group"], (str, list)) and ex["group"] for ex in good
    )
    return (
        reading.schema,
        good,
        Counter(re.sub(r" \(a letter, a number.*", "", why) for *_, why in out if why),
    )


def one(row, **d):
    "What becomes of one row: the example, or the reason."
    _, good, bad = read([row], Dataset(**d))
    return good[0] if good else next(iter(bad))


def refused(rows, d=None, **kw):
    with pytest.raises(MedftError) as e:
        read(rows, d, **kw)
    assert "\n" not in str(e.value)
    return str(e.value)


def shared(folder, name):
    "A real file, read as a recipe would."
    examples, bad, schema, n = [], Counter(), set(), 0
    for part in sources.source_parts(str(folder / name)):
        reading = read_examples(formats.rows(part), part.name, Dataset(), formats.features(part))
        for _, _, ex, why in reading:
            n += 1
            examples += [ex] * (ex is not None)
            bad.update([why] * (why is not None))
        schema.add(reading.schema)
    return schema, n, examples, dict(bad)


def same(a, b, keys):
    assert len(a) == len(b) and [[x.get(k) for k in keys] for x in a] == [
        [x.get(k) for k in keys] for x in b
    ]


# --------------------------------------------------------------------------------------- real files

UNLABELLED = "no answer (cop missing or -1)"


@on_real_files(
    "name, schema, rows, good, bad",
    [
        ("medmcqa/dev.json", "medmcqa", 20, 20, {}),
        ("medmcqa/validation-00000-of-00001.parquet", "medmcqa", 20, 20, {}),
        ("medmcqa/validation.csv", "medmcqa", 20, 20, {}),
        ("medmcqa/test_unlabelled.json", "medmcqa", 5, 0, {UNLABELLED: 5}),
        ("medmcqa/test_unlabelled.parquet", "medmcqa", 5, 0, {UNLABELLED: 5}),
        ("medqa/phrases_no_exclude_test.jsonl", "medqa", 10, 10, {}),
        ("medqa/train_from_devsplit.jsonl", "medqa", 10, 10, {}),
        ("pubmedqa/ori_pqal.json", "pubmedqa", 10, 10, {}),
        ("pubmedqa/train-00000-of-00001.parquet", "pubmedqa", 10, 10, {}),
        ("medquad/medquad.parquet", "medquad", 34, 25, {"no answer": 9}),
        ("medquad/medDataset_processed.csv", "medquad", 25, 25, {}),
        ("llama3_prompt/medical_llama3_instruct.jsonl", "formatted", 10, 10, {}),
        ("llama3_prompt/train-00000-of-00001.parquet", "formatted", 10, 10, {}),
        ("synthea/er_pairs.jsonl", "entity-pairs", 16, 16, {}),
        ("cpt_text/plos_articles.jsonl.gz", "text", 4, 4, {}),
        ("cpt_text/openstax_ap2e.jsonl.gz", "text", 5, 5, {}),
    ],
    [
        ("medmcqa/dev.json", "medmcqa", 2683, 2683, {}),
        ("medmcqa/validation-00000-of-00001.parquet", "medmcqa", 2683, 2683, {}),
        ("medmcqa/validation.csv", "medmcqa", 500, 500, {}),
        ("medmcqa/test_unlabelled.json", "medmcqa", 200, 0, {UNLABELLED: 200}),
        ("medmcqa/test_unlabelled.parquet", "medmcqa", 200, 0, {UNLABELLED: 200}),
        ("medqa/phrases_no_exclude_test.jsonl", "medqa", 773, 773, {}),
        ("medqa/train_from_devsplit.jsonl", "medqa", 1269, 1269, {}),
        ("pubmedqa/ori_pqal.json", "pubmedqa", 500, 500, {}),
        ("pubmedqa/train-00000-of-00001.parquet", "pubmedqa", 500, 500, {}),
        ("medquad/medquad.parquet", "medquad", 6435, 5000, {"no answer": 1435}),
        ("medquad/medDataset_processed.csv", "medquad", 5000, 5000, {}),
        ("llama3_prompt/medical_llama3_instruct.jsonl", "formatted", 2000, 2000, {}),
        ("llama3_prompt/train-00000-of-00001.parquet", "formatted", 2000, 2000, {}),
        ("synthea/er_pairs.jsonl", "entity-pairs", 2000, 2000, {}),
        ("cpt_text/plos_articles.jsonl.gz", "text", 81, 81, {}),
        ("cpt_text/openstax_ap2e.jsonl.gz", "text", 136, 136, {}),
    ],
)
def test_real_files(folder, name, schema, rows, good, bad):
    found, n, examples, reasons = shared(folder, name)
    assert (found, n, len(examples), reasons) == ({schema}, rows, good, bad)
    assert len({ex["id"] for ex in examples}) == good


@on_real_rows
def test_two_forms_of_the_same_rows_give_the_same_examples(folder):
    mcq = "question", "options", "answer", "subject", "id", "group"
    dev, hub = (
        shared(folder, "medmcqa/dev.json")[2],
        shared(folder, "medmcqa/validation-00000-of-00001.parquet")[2],
    )
    same(dev, hub, mcq)
    same(dev[:500], shared(folder, "medmcqa/validation.csv")[2], mcq)
    same(
        shared(folder, "pubmedqa/ori_pqal.json")[2],
        shared(folder, "pubmedqa/train-00000-of-00001.parquet")[2],
        (*mcq, "listed", "text"),
    )
    parquet, table = (
        shared(folder, "medquad/medquad.parquet")[2],
        shared(folder, "medquad/medDataset_processed.csv")[2],
    )
    same(parquet, table, ("question", "answer", "subject"))
    same(
        shared(folder, "llama3_prompt/medical_llama3_instruct.jsonl")[2],
        shared(folder, "llama3_prompt/train-00000-of-00001.parquet")[2],
        ("formatted", "group"),
    )


@on_real_rows
def test_what_gives_the_answer_away_stays_out(folder):
    dev = {
        json.loads(line)["id"]: json.loads(line) for line in (folder / "medmcqa/dev.json").open()
    }
    for ex in shared(folder, "medmcqa/dev.json")[2]:
        exp = dev[ex["id"]]["exp"] or ""
        assert len(exp) < 40 or exp not in json.dumps(ex, ensure_ascii=False)
    papers = json.loads((folder / "pubmedqa/ori_pqal.json").read_text())
    for ex in shared(folder, "pubmedqa/ori_pqal.json")[2]:
        paper = papers[ex["id"]]
        assert (
            paper["LONG_ANSWER"] not in ex["question"]
            and ex["options"][ex["answer"]] == paper["final_decision"]
        )
        assert (
            ex["question"]
            == "Abstract: "
            + "\n".join(c.strip() for c in paper["CONTEXTS"])
            + "\nQuestion: "
            + paper["QUESTION"].strip()
        )


@on_real_rows
def test_medmcqa_letters_in_explanations_agree_with_what_is_read(folder):
    rows = [json.loads(line) for line in (folder / "medmcqa/dev.json").open()]
    told = [
        (r["cop"], multiple_choice.explained_option(r))
        for r in rows
        if multiple_choice.explained_option(r) is not None
    ]
    assert len(told) > (3 if folder == SMALL else 500) and all(cop - i == 1 for cop, i in told)
    middle = [r for r in rows if r["cop"] in (2, 3)]
    assert read(middle)[1][0]["answer"] == middle[0]["cop"] - 1, (
        "without a 1 or a 4 the explanations tell"
    )


@on_real_rows
def test_medquad_xml_in_three_dialects(folder):
    found, n, examples, bad = shared(folder, "medquad/xml")
    assert (
        found == {"medquad"}
        and n == len(examples) + sum(bad.values())
        and set(bad) == {"no answer"}
    )
    answers = {
        (ex["question"], ex["answer"]) for ex in shared(folder, "medquad/medquad.parquet")[2]
    }
    mine = {(ex["question"], ex["answer"]) for ex in examples}
    assert len(mine & answers) > 0.95 * len(mine)
    assert all(ex["group"][0].startswith("document ") for ex in examples)


@on_real_rows
def test_no_pair_shares_a_group_by_chance_and_patients_are_its_groups(folder):
    rows = [json.loads(line) for line in (folder / "synthea/er_pairs.jsonl").open()]
    for row, ex in zip(rows, shared(folder, "synthea/er_pairs.jsonl")[2], strict=True):
        assert (
            ex["group"] == [f"patient {row['left_patient']}", f"patient {row['right_patient']}"]
            and ex["id"] == row["pair_id"]
        )
        assert (
            ex["answer"] == row["label"]
            and row["left"]["last"] in ex["text"]
            and ex["text"] in ex["question"]
            and not ex["listed"]
        )


@on_real_files(
    "name, n",
    [("synthea/csv", 8), ("synthea/csv_full_record", 8), ("synthea/fhir", 8)],
    [("synthea/csv_full_record", 27), ("synthea/fhir", 10)],
)
def test_patients(folder, name, n):
    found, rows, examples, bad = shared(folder, name)
    assert (
        found == {"patient"}
        and rows == n == len(examples)
        and all(ex["group"] == f"patient {ex['id']}" and "Born: " in ex["text"] for ex in examples)
    )


# ------------------------------------------------------------------------------------------ shipped


def test_shipped_files_keep_their_meaning():
    for path in sorted((assets() / "starter").glob("*.jsonl")):
        rows = [json.loads(line) for line in path.open(encoding="utf-8")]
        schema, good, bad = read(rows)
        assert not bad
        if "opa" in rows[0]:
            assert schema == "medmcqa" and all(
                ex["options"] == [r[k] for k in ("opa", "opb", "opc", "opd")]
                and ex["answer"] == r["cop"]
                and ex["id"] == r["id"]
                and ex["subject"] == r["subject_name"]
                for ex, r in zip(good, rows, strict=True)
            )
    mixed = [
        dict(text="Gout hurts."),
        dict(prompt="Question: x\nAnswer:", completion=" white delta"),
    ]
    schema, good, _ = read(mixed)
    assert (
        schema == "text"
        and good[0]["text"] == "Gout hurts."
        and good[1]["completion"] == " white delta"
    )
    assert (
        read(mixed[::-1])[1][0]["prompt"] == mixed[1]["prompt"]
        and read([mixed[0] | dict(completion=float("nan")), mixed[1]])[2] == {}
    )


# ------------------------------------------------------------------------ counting from 0 or from 1


@pytest.mark.parametrize(
    "cops, answers",
    [
        ((0, 3), [0, 3]),
        ((1, 4), [0, 3]),
        ((2, 0), [2, 0]),
        ((2, 4), [1, 3]),
        (("2", "4"), [1, 3]),
        ((2.0, 4.0), [1, 3]),
        (("b", "d"), [1, 3]),
        (("A", "D"), [0, 3]),
        ((2, 3, 1, -1, None, 4), [1, 2, 0, 3]),
    ],
)
def test_the_whole_file_decides(cops, answers):
    assert [ex["answer"] for ex in read([MCQ | dict(cop=c) for c in cops])[1]] == answers


def test_a_late_contradiction_is_refused_with_both_rows():
    said = refused([MCQ | dict(cop=c) for c in [2, 4] + [3] * 2000 + [0]])
    assert "row 2 " in said and "row 2003 " in said and "f.jsonl" in said
    assert "dataset.first_option=0" in refused([MCQ | dict(cop=4)], Dataset(first_option=0))
    assert "class names" in refused([MCQ | dict(cop=4)], features={"cop": list("abcd")})


def test_a_file_that_does_not_tell_needs_a_word():
    rows = [MCQ | dict(cop=2), MCQ | dict(cop=3)]
    assert "dataset.first_option=0" in (said := refused(rows)) and "=1" in said and "[2, 3]" in said
    assert [ex["answer"] for ex in read(rows, Dataset(first_option=1))[1]] == [1, 2] and [
        ex["answer"] for ex in read(rows, Dataset(first_option=0))[1]
    ] == [2, 3]
    assert [ex["answer"] for ex in read(rows, features={"cop": list("abcd")})[1]] == [2, 3]
    assert [
        ex["answer"] for ex in read([rows[0] | dict(exp="Ans. is 'b' because"), rows[1]])[1]
    ] == [1, 2]
    assert [ex["answer"] for ex in read([rows[0] | dict(exp="Ans. C"), rows[1]])[1]] == [2, 3]
    refused([rows[0] | dict(exp="Ans. b"), rows[1] | dict(exp="Ans. d")])
    mapped = [dict(MCQ, right=2), dict(MCQ, right=3)]
    assert [
        ex["answer"]
        for ex in read(mapped, Dataset(columns={"cop": "right"}), {"right": list("abcd")})[1]
    ] == [2, 3]


def test_rows_stream_once_the_counting_is_settled():
    taken = itertools.count()
    endless = ((next(taken) + 1, MCQ | dict(cop=n % 4)) for n in itertools.count())
    got = list(itertools.islice(read_examples(endless, "stream"), 3000))
    assert len(got) == 3000 and next(taken) <= 3010


def test_five_options_count_to_five():
    rows = [MCQ | dict(ope="e", cop=c) for c in (4, 5, 1)]
    assert [ex["answer"] for ex in read(rows)[1]] == [3, 4, 0]
    assert [
        ex["answer"] for ex in read([MCQ | dict(ope=float("nan"), cop=c) for c in (4, 1)])[1]
    ] == [3, 0]
    table = dict(question="q", A="p", B="q", C="r", D="s", E="t", answer="E")
    assert one(table)["options"] == list("pqrst") and one(table)["answer"] == 4


def test_reasons_of_medmcqa():
    rows = [MCQ | dict(cop=c) for c in (0, 9, -1, None, "", "x y", float("nan"), True)] + [
        MCQ | dict(cop=1, opc=" "),
        MCQ | dict(cop=1, question=None),
        MCQ | dict(cop=1, opa=["a"]),
    ]
    schema, good, bad = read(rows)
    assert len(good) == 1 and bad == {
        "no answer (cop missing or -1)": 4,
        "cop names no option": 3,
        "empty option": 1,
        "empty question": 1,
        "a list or object where text belongs": 1,
    }


# -------------------------------------------------------------------------------------------- MedQA


def test_medqa_in_every_way_files_write_options():
    row = dict(question="q", answer="r", answer_idx="C")
    ways = [
        OPTIONS,
        OPTIONS | dict(E=None),
        [dict(key=k, value=v) for k, v in OPTIONS.items()],
        dict(key=list(OPTIONS), value=list(OPTIONS.values())),
        json.dumps(OPTIONS),
        str(OPTIONS),
        list("pqrs"),
    ]
    assert all(
        (ex := one(row | dict(options=w)))["options"] == list("pqrs") and ex["answer"] == 2
        for w in ways
    )
    assert one(row | dict(options=OPTIONS | dict(E="t")))["options"] == list("pqrst")


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(answer="p"), "answer is not the option that answer_idx names"),
        (dict(answer_idx="F", answer=""), "answer_idx names no option"),
        (dict(answer_idx="Z"), "answer_idx names no option"),
        (dict(options=None), "options are no list and no lettered texts"),
        (dict(options=["p"]), "fewer than two options"),
        (dict(options=dict(A="p", B=" ")), "empty option"),
        (dict(answer=None, answer_idx=None), "no answer (answer missing or -1)"),
        (dict(question=""), "empty question"),
        (dict(options="A. p B. q"), "options are no list and no lettered texts"),
    ],
)
def test_medqa_rejects(change, reason):
    assert one(dict(question="q", options=OPTIONS, answer="r", answer_idx="C") | change) == reason


def test_numbers_beside_options_are_decided_over_the_file():
    rows = [dict(question=f"q{n}", choices=list("pqrs"), answer=n) for n in (1, 2, 4)]
    assert [ex["answer"] for ex in read(rows)[1]] == [0, 1, 3] and "first_option" in refused(
        rows[:2]
    )
    assert [ex["answer"] for ex in read([r | dict(answer=r["answer"] - 1) for r in rows])[1]] == [
        0,
        1,
        3,
    ]
    assert one(dict(question="q", options=["4", "5", "6", "7"], answer="5"))["answer"] == 1, (
        "a text that is a number is a text"
    )
    hf = dict(sent1="q", sent2="more", ending0="p", ending1="q", ending2="r", ending3="s", label=3)
    assert (
        one(hf)["answer"] == 3
        and one(hf)["question"] == "q more"
        and one(hf | dict(label=-1)) == "no answer (label missing or -1)"
    )


SUMS = [list(p) for p in itertools.permutations(["2", "3", "1", "0"])]


def answers(rows, d=None, features=None):
    return [ex["answer"] for ex in read(rows, d, features)[1]]


def test_a_number_counts_whatever_the_options_read():
    for base in (0, 1):
        rows = [
            dict(question=f"q{i}", choices=SUMS[i % 24], answer=i % 4 + base) for i in range(40)
        ]
        right = [i % 4 for i in range(40)]
        assert (
            answers(rows) == right
            and answers([r | dict(answer=float(r["answer"])) for r in rows]) == right
        )
        assert (
            answers([r | dict(answer=str(r["answer"]), choices=str(r["choices"])) for r in rows])
            == right
        ), "as CSV has them"
        assert answers([r | dict(answer_idx=r["answer"]) for r in rows]) == right, (
            "the same number twice is no text"
        )
        assert answers([r | dict(choices=[int(o) for o in r["choices"]]) for r in rows]) == right
    rows = [dict(question=f"q{i}", choices=SUMS[i], answer=i % 2 + 1) for i in range(24)]
    assert answers(rows, features={"answer": list("abcd")}) == [
        i % 2 + 1 for i in range(24)
    ] and "first_option" in refused(rows)


def test_texts_that_are_numbers_are_texts_in_a_file_of_texts():
    rows = [
        dict(question="q", options=["2 mg", "x", "y", "z"], answer="y"),
        dict(question="q", options=["2", "3", "1", "4"], answer="4"),
        dict(question="q", options=["2", "3", "1", "0"], answer="0"),
    ]
    table = []
    for r in rows:
        options = dict(zip("ABCD", r["options"], strict=True))
        table.append(dict(question="q", answer=r["answer"]) | options)
    for made in (rows, table):
        assert (
            answers(made)
            == answers(made[1:] + made[:1])[-1:] + answers(made[1:] + made[:1])[:2]
            == [2, 3, 3]
        )
    vitamins = [dict(question="q", options=["K", "B", "A", "C"], answer=a) for a in ("A", "K")]
    assert (
        answers(vitamins) == [2, 0]
        and answers(vitamins[:1]) == [0]
        and answers(vitamins[:1] + [dict(vitamins[0], options=list("pqrs"), answer="B")]) == [0, 1]
    )


def test_an_answer_that_nothing_can_decide_is_refused_with_all_three_rows():
    rows = [
        dict(question="q", options=o, answer=a)
        for o, a in (
            (["2", "3", "1", "0"], "1"),
            (list("pqrs"), "2"),
            (["2 mg", "x", "y", "z"], "2 mg"),
        )
    ]
    for order in itertools.permutations(rows):
        said = refused(order)
        assert all(f"row {n}" in said for n in (1, 2, 3)) and "one file says it one way" in said
    assert answers(rows[1:] + [dict(rows[1], answer="0")]) == [2, 0, 0], (
        "without a doubtful row there is nothing to refuse"
    )


def test_a_doubtful_file_is_held_back_but_no_other_is():
    taken = itertools.count()
    endless = (
        (
            next(taken) + 1,
            dict(question="q", choices=SUMS[n % 24] if n else list("pqrs"), answer=str(n % 4)),
        )
        for n in itertools.count()
    )
    assert (
        len(list(itertools.islice(read_examples(endless, "stream"), 2000))) == 2000
        and next(taken) <= 2010
    )


# ----------------------------------------------------------------------------------------- PubMedQA


def test_pubmedqa_unlabelled_and_odd_decisions():
    row = dict(
        pubid=7,
        question="q?",
        context=dict(contexts=["a", "b"], labels=["X", "Y"]),
        long_answer="secret",
        final_decision="Yes",
    )
    ex = one(row)
    assert (
        ex["id"] == "7"
        and ex["answer"] == 0
        and not ex["listed"]
        and ex["question"] == "Abstract: a\nb\nQuestion: q?"
        and "secret" not in str(ex)
    )
    row.pop("final_decision")
    assert (
        one(row) == "no answer (final_decision missing)"
        and one(row | dict(final_decision="perhaps")) == "final_decision is not yes, no or maybe"
    )
    assert one(row | dict(final_decision="no", context=None)) == "empty abstract"


def test_pubmedqa_as_open_questions():
    row = dict(
        pubid=7,
        question="q?",
        context=dict(contexts=["a", "b"], labels=["X", "Y"], meshes=[]),
        long_answer="Long.",
        final_decision="yes",
    )
    d = Dataset(schema="question-answer", columns=dict(answer="long_answer"))
    for made in (
        row,
        row | dict(context=json.dumps(row["context"])),
        row | dict(context=str(row["context"])),
    ):
        ex = read([made], d)[1][0]
        assert (ex["question"], ex["answer"], ex["id"]) == (
            "Context: a\nb\nQuestion: q?",
            "Long.",
            "7",
        )
    original = dict(
        _key="7", QUESTION="q?", CONTEXTS=["a", "b"], LONG_ANSWER="Long.", final_decision="yes"
    )
    assert (
        read([original], Dataset(schema="question-answer", columns=dict(answer="LONG_ANSWER")))[1][
            0
        ]["question"]
        == ex["question"]
    )
    assert (
        one(dict(question="q", answer="a", context=dict(labels=["X"])))
        == "a list or object where text belongs"
    )


# --------------------------------------------------------------------------------- the open schemas


def test_medquad_ids_and_groups():
    row = dict(
        document_id="7",
        document_source="GARD",
        question_id="7-1",
        question_focus="Gout",
        question_type="causes",
        question="q",
        answer="a",
    )
    schema, good, _ = read(
        [row, row | dict(document_source="NIDDK"), row, row | dict(question_focus=None)]
    )
    assert schema == "medquad" and [ex["id"] for ex in good] == [
        "GARD/7/7-1",
        "NIDDK/7/7-1",
        "GARD/7/7-1:3",
        "GARD/7/7-1:4",
    ]
    assert good[0]["group"] == ["document GARD/7", "focus gout"] and good[3]["group"] == [
        "document GARD/7"
    ]


LLAMA = (
    "<|start_header_id|>system<|end_header_id|> Be true.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|> This is the question: {}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|> {}<|eot_id|>"
)
GEMMA, MISTRAL = (
    "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n{}<end_of_turn>\n",
    "<s>[INST] {} [/INST] {}</s>",
)


@pytest.mark.parametrize(
    "template",
    [LLAMA, GEMMA, MISTRAL, "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>"],
)
def test_formatted_prompts_alone_beside_other_columns_and_in_text(template):
    whole, beside = (
        template.format("Gout?", "Urate."),
        dict(instruction="Be true.", input="Gout?", output="Urate."),
    )
    for row in (dict(prompt=whole), dict(prompt=whole) | beside, dict(text=whole)):
        schema, good, _ = read([row])
        assert (
            schema == "formatted" and good[0]["formatted"] == whole and "gout" in good[0]["group"]
        )
    prompt, completion = whole.split("Urate.")[0], "Urate." + whole.split("Urate.")[1]
    assert read([dict(prompt=prompt, completion=completion)])[1][0]["formatted"] == whole
    bare = template.replace("This is the question: ", "")
    assert (
        one(dict(prompt=bare.format("Gout?", " "))) == "empty answer"
        and one(dict(prompt=bare.format(" ", "a"))) == "empty question"
    )
    assert read([dict(prompt=whole) | beside], Dataset(schema="alpaca"))[1][0]["answer"] == "Urate."


def test_one_users_markers_do_not_change_what_a_file_is():
    rows = [dict(prompt=f"q {i}", completion="a") for i in range(9)] + [
        dict(prompt=GEMMA.format("inject", "x"), completion="a")
    ]
    assert read(rows)[0] == "prompt-completion"
    rows = [dict(prompt=GEMMA.format(i, "a")) for i in range(9)] + [
        dict(prompt="no markers"),
        dict(prompt=None),
    ]
    assert read(rows)[2] == {"no chat markers in the prompt": 1, "empty prompt": 1}


@pytest.mark.parametrize(
    "talk, reason",
    [
        (TALK + [dict(role="tool", content="x")], "tool or function turn"),
        ([TALK[0], dict(role="assistant", content="", tool_calls=[1])], "tool or function turn"),
        (TALK[:1], "the last turn is not the assistant's"),
        ([], "no turns"),
        (None, "messages are no list"),
        ([TALK[0]] + TALK, "user and assistant do not alternate"),
        (TALK[1:], "user and assistant do not alternate"),
        (TALK + [dict(role="system", content="s")], "a system turn that is not the first"),
        ([TALK[0], dict(role="assistant", content=None)], "empty turn"),
        (
            [dict(role="user", content=[dict(type="image")]), TALK[1]],
            "a part of a turn that is no text (image, audio)",
        ),
        ([dict(role="nurse", content="x"), TALK[1]], "a turn of an unknown role"),
        (["hello"], "a turn that is no object"),
    ],
)
def test_conversations_that_cannot_be_trained_on(talk, reason):
    assert read([dict(messages=TALK), dict(messages=talk)])[2] == {reason: 1}


def test_conversations_in_other_words():
    sharegpt = [
        {"from": "system", "value": ""},
        {"from": "human", "value": "Urate?"},
        {"from": "gpt", "value": "7.9 mg"},
    ]
    parts = [
        dict(role="user", content=[dict(type="text", text="Ura"), dict(type="text", text="te?")]),
        TALK[1],
    ]
    columns = {"role": ["user", "assistant"], "content": ["Urate?", "7.9 mg"]}
    for row in (
        dict(conversations=sharegpt),
        dict(messages=parts),
        dict(messages=columns),
        dict(messages=json.dumps(TALK)),
        dict(prompt=TALK[:1], completion=TALK[1:]),
        dict(messages=TALK, prompt="x", completion="y"),
    ):
        assert one(row)["messages"] == TALK and one(row)["group"] == "urate"
    assert one(dict(conversations=sharegpt, system="Be brief."))["messages"] == [
        dict(role="system", content="Be brief."),
        *TALK,
    ]
    assert read([dict(messages=TALK, tools=t) for t in (None, [], "[]", "", '[{"name": "f"}]')])[
        2
    ] == {"tool or function turn": 1}
    assert "every row has a tool" in refused(
        [dict(messages=TALK + [dict(role="function", content="x")])] * 2
    )


def test_prompts_are_taken_to_the_letter():
    ex = one(dict(prompt="Name as JSON: ", completion=' {"name": "gout"}\n'))
    assert (ex["prompt"], ex["completion"]) == ("Name as JSON: ", ' {"name": "gout"}\n')
    assert (
        one(dict(prompt=None, completion="x"))["prompt"] == ""
        and one(dict(prompt="p", completion=" ")) == "empty completion"
    )
    assert one(dict(prompt="p", completion=float("nan"))) == "empty completion"


@pytest.mark.parametrize(
    "row, question",
    [
        (dict(Question="Q", Answer="A"), "Q"),
        (dict(q="Q", a="A"), "Q"),
        (dict(query="Q", response="A"), "Q"),
        (dict(input="Q", output="A"), "Q"),
        (dict(prompt="Q", response="A"), "Q"),
        (dict(question="Q", context="C", answer="A"), "Context: C\nQuestion: Q"),
        (dict(instruction="I", input="Q", output="A"), "I\n\nQ"),
        (dict(instruction="Q", input=None, output="A"), "Q"),
        (dict(instruction="Q", context="C", response="A"), "Q\n\nC"),
        (dict(question=5, answer="A"), "5"),
    ],
)
def test_spellings_of_question_and_answer(row, question):
    ex = one(row)
    assert (ex["question"], ex["answer"]) == (question, "A")
    assert one(row | {list(row)[-1]: None}) in ("empty answer", "empty output")


def test_a_history_is_not_lost_silently():
    row = dict(instruction="Q", input="", output="A")
    assert [read([row | dict(history=h)])[2] for h in (None, [], "", "[]", float("nan"))] == [
        {}
    ] * 5 and "history" in one(row | dict(history=[["a", "b"]]))


def test_system_travels_with_the_question():
    assert (
        one(dict(instruction="Q", output="A", system="Be brief."))["system"]
        == "Be brief."
        == one(dict(question="Q", answer="A", system="Be brief."))["system"]
    )


@pytest.mark.parametrize(
    "label, names, features, expected",
    [
        (1, None, None, "1"),
        (1, ["no", "yes"], None, "yes"),
        (1, None, ["no", "yes"], "yes"),
        ("gout", None, None, "gout"),
        (True, None, None, "true"),
        (True, ["no", "yes"], None, "yes"),
        (1.0, ["no", "yes"], None, "yes"),
        ("1", ["no", "yes"], None, "yes"),
        (2, ["no", "yes"], None, None),
        ("maybe", ["no", "yes"], None, None),
        (-1, None, None, None),
        (None, None, None, None),
    ],
)
def test_labels(label, names, features, expected):
    for row in (
        dict(text="t", label=label),
        dict(sentence="t", label=label),
        dict(text="t", target=label),
    ):
        column = list(row)[1]
        schema, good, bad = read(
            [row], Dataset(labels=names), {column: features} if features else None
        )
        assert schema == "labelled-text" and (
            [ex["label"] for ex in good] == [expected] if expected else sum(bad.values()) == 1
        )


def test_articles_and_their_titles():
    assert (
        one(dict(title="T", text="Body", kind="jats", id="a1"))["text"] == "T\n\nBody"
        and one(dict(title="T", text="T\n\nBody"))["text"] == "T\n\nBody"
    )
    assert (
        one(dict(title="T", text="Body", kind="jats", id="a1"))["group"] == "article a1"
        and one(dict(title="T", text="  ")) == "empty text"
    )


@pytest.mark.parametrize(
    "label, answer",
    [(1, 1), (0, 0), (True, 1), ("no", 0), ("match", 1), (1.0, 1), (-1, None), ("x", None)],
)
def test_pairs(label, answer):
    row = dict(
        left=dict(first="Ida", last="Stone"),
        right="Name: Ida Stone",
        label=label,
        left_patient="a",
        right_patient="b",
    )
    got = one(row)
    assert (
        got["answer"] == answer
        if answer is not None
        else got in ("no label (missing or -1)", "label is not yes or no")
    )
    assert (
        one(row | dict(label=1, left={})) == "empty record"
        and one(row | dict(label=1, left=dict(conditions=[1]))) == "a record of another form"
    )
    assert one(row | dict(label=1, left=None)) == "empty record"


# ------------------------------------------------------------------------------- which schema is it


@pytest.mark.parametrize(
    "columns, schema",
    [
        ("question opa opb opc opd answer", "medmcqa"),
        ("question answer options answer_idx opa opb opc opd", "medmcqa"),
        ("question answer options", "medqa"),
        ("prompt options answer", "medqa"),
        ("question A B C D answer", "medmcqa"),
        ("question context answer final_decision", "pubmedqa"),
        ("QUESTION CONTEXTS LONG_ANSWER", "pubmedqa"),
        ("question context answer", "question-answer"),
        ("qtype Question Answer", "medquad"),
        ("document_id question answer", "medquad"),
        ("left right label text", "entity-pairs"),
        ("messages text label", "messages"),
        ("instruction input output prompt text", "alpaca"),
        ("text label question answer", "labelled-text"),
        ("text question answer", "question-answer"),
        ("text prompt completion", "text"),
        ("prompt completion", "prompt-completion"),
        ("prompt completion response", "prompt-completion"),
        ("title text source", "text"),
        ("Medical-Question Answer question", "question-answer"),
    ],
)
def test_the_most_telling_schema_wins(columns, schema):
    assert schemas.recognise(columns.split())[0].name == schema


def test_a_forced_schema_and_what_it_lacks():
    row = dict(question="q", answer="a", text="t")
    assert (
        read([row], Dataset(schema="text"))[0] == "text"
        and read([row], Dataset(schema="question/answer"))[0] == "question-answer"
    )
    said = refused([row], Dataset(schema="medmcqa"))
    assert "are not medmcqa" in said and "opa, opb, opc, opd" in said
    assert "did you mean 'medmcqa'" in refused([row], Dataset(schema="medmqca"))


def test_columns_of_the_users_own():
    rows = [
        dict(Patient=f"q{i % 2}", Doctor="a", case=i // 2, nr=f"n{i}", field="ENT")
        for i in range(4)
    ]
    schema, good, _ = read(
        rows,
        Dataset(
            columns=dict(
                question="Patient", answer="Doctor", group="case", id="nr", subject="field"
            )
        ),
    )
    assert (
        schema == "question-answer"
        and [ex["group"] for ex in good] == ["group 0"] * 2 + ["group 1"] * 2
        and good[1]["id"] == "n1"
        and good[0]["subject"] == "ENT"
    )
    assert "did you mean 'Doctor'" in refused(
        rows, Dataset(columns=dict(question="Patient", answer="Docter"))
    )
    assert "did you mean 'answer'" in refused(
        rows, Dataset(columns=dict(question="Patient", anwser="Doctor"))
    )
    swapped = read(
        [dict(question="a", answer="q")],
        Dataset(columns=dict(question="answer", answer="question")),
    )[1][0]
    assert (swapped["question"], swapped["answer"]) == ("q", "a")
    exam = [dict(q="q", w="a", x="b", y="c", z="d", right=c) for c in (1, 4)]
    assert [
        ex["answer"]
        for ex in read(
            exam,
            Dataset(columns=dict(question="q", opa="w", opb="x", opc="y", opd="z", cop="right")),
        )[1]
    ] == [0, 3]


def test_nothing_fits():
    said = refused([dict(Patient="x", answer="y")])
    assert (
        "columns Patient, answer" in said
        and "nearest is question-answer" in said
        and "dataset.columns: {question: Patient}" in said
    )
    assert "chat markers in prompt" in refused(
        [dict(prompt="no markers")]
    ) and "no rows" in refused([])
    assert "fit no schema" in refused([dict(foo=1)]) and "fit no schema" in refused(
        [dict(chosen="x", rejected="y")]
    )


def test_what_is_nearest_to_nothing():
    said = refused([dict(foo=1, bar=2)])
    assert (
        "nearest is question-answer, which lacks question, answer" in said
        and "header" not in said
        and "messages" not in said
    )
    for row in (
        {"What is gout?": "q", "Urate crystals": "a"},
        {"17": "q", "Flumazenil": "a"},
        {"a " * 40: "q", "b": "a"},
        {"two\nlines of it.": "q", "b": "a"},
    ):
        said = refused([row])
        assert "no header line" in said and len(said) < 500
    assert (
        "nearest is medmcqa" in refused([dict(question="q", opa="a", opb="b", opc="c", x="d")])
        and len(refused([{f"c{i}": 1 for i in range(5000)}])) < 1000
    )
    assert "\ud83d" not in refused([{"\ud83d": 1}])


def test_a_mapping_is_not_asked_of_a_file_that_has_nothing_of_it():
    d = Dataset(columns=dict(question="Patient", answer="Doctor", group="clinic"))
    plain = [dict(question="q", answer="a")]
    reading = read_examples(enumerate(plain, 1), "test.jsonl", d)
    assert (
        list(reading)[0][2]["question"] == "q"
        and reading.columns == {}
        and reading.schema == "question-answer"
    )
    exam = [MCQ | dict(cop=c) for c in (0, 3)]
    assert answers(
        exam,
        Dataset(columns=dict(question="stem", opa="w", opb="x", opc="y", opd="z", cop="right")),
    ) == [0, 3]
    assert "no column 'Patient'" in refused(
        [dict(question="q", Doctor="a")], d
    ) and "no column 'Patient'" in refused([dict(foo="q")], d)
    assert "did you mean 'patient'" in refused(
        [dict(question="q", answer="a", patient=1)], Dataset(columns=dict(group="patinet"))
    )
    mine = read_examples(iter([(1, dict(Patient="p", Doctor="d", clinic=3))]), "train.jsonl", d)
    assert mine.columns == d.columns and list(mine)[0][2]["group"] == "group 3"
    assert "no column 'Patient'" in refused(
        plain, Dataset(schema="alpaca", columns=dict(instruction="Patient"))
    )


def test_a_patient_column_groups_without_being_asked():
    assert [
        ex["group"]
        for ex in read([dict(question=f"q{i}", answer="a", patient_id=7) for i in range(2)])[1]
    ] == ["patient_id 7"] * 2
    assert (
        one(dict(question="q", answer="a", patient_id=None))["group"] == "q"
        and one(dict(question="Q ?", answer="a", group=3))["group"] == "q"
    )


def test_ids_are_unique_whatever_the_file_says():
    ids = [
        ex["id"]
        for ex in read(
            [dict(id=i, question="q", answer="a") for i in ("x", "x", "x:2", None, "", 5, 5.0)]
        )[1]
    ]
    assert len(set(ids)) == 7 and ids[0] == "x" and ids[3] == "f.jsonl:4"
    assert one(dict(id=[1], question="q", answer="a")) == "a list or object where text belongs"


def test_readings_that_share_their_ids_give_none_twice():
    seen, rows = (
        set(),
        [dict(question=f"q{i}", answer="a") | ({"id": "own"} if i == 3 else {}) for i in range(60)],
    )
    ids = [
        ex["id"]
        for name in ("dA/x.jsonl", "dB/x.jsonl", "dB/x.jsonl")
        for *_, ex, _ in read_examples(enumerate(rows, 1), name, seen=seen)
    ]
    assert (
        len(set(ids)) == 180
        and ids[:4] == ["x.jsonl:1", "x.jsonl:2", "x.jsonl:3", "own"]
        and ids[60] == "dB/x.jsonl:1"
        and ids[63] == "own:4"
    )
    alone = [ex["id"] for *_, ex, _ in read_examples(enumerate(rows, 1), "dB/x.jsonl")]
    assert alone == ids[:60] and len(seen) == 180


@pytest.mark.parametrize(
    "row",
    [
        dict(question="q \ud83d", answer="a"),
        dict(question="q", answer="\ude00 a"),
        dict(question="q", answer="a", id="\ud83d"),
        dict(question="q", answer="a", group="\ud83d"),
        dict(messages=[TALK[0], dict(role="assistant", content="\ud83d")]),
        MCQ | dict(opd="\ud83d", cop=0),
        MCQ | dict(subject_name="\ud83d", cop=0),
    ],
)
def test_half_a_surrogate_costs_one_row(row, tmp_path):
    good = {k: "x" if k != "messages" else TALK for k in row} | (
        dict(cop=0) if "cop" in row else {}
    )
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, [good, row, good])))
    d = Dataset(columns=dict(group="group")) if "group" in row else Dataset()
    (part,) = sources.source_parts(str(path))
    out = list(read_examples(formats.rows(part), part.name, d))
    assert [why for *_, why in out] == [None, "broken Unicode (half of a surrogate pair)", None]
    assert one(dict(question="q", answer="a", note="\ud83d"))["answer"] == "a", (
        "a column that nobody reads costs nothing"
    )


def test_rows_that_are_no_rows():
    assert read([dict(question="q", answer="a"), "text", None, ["q", "a"], {}])[2] == {
        "a row that is no object": 3,
        "empty question": 1,
    }


# ---------------------------------------------------------------------------------------- at random

names = st.sampled_from(
    sorted(
        {w for s in schemas.SCHEMAS for ways in s.spellings().values() for w in ways}
        | {"id", "_key", "patient_id", "x"}
    )
)
leaf = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(
        ["yes", "0", "4", "-1", "B", "user", "[1]", "{", "[INST] a [/INST] b", "\ud800"]
    )
)
value = st.recursive(
    leaf,
    lambda v: (
        st.lists(v, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    "A",
                    "B",
                    "role",
                    "content",
                    "from",
                    "value",
                    "key",
                    "contexts",
                    "type",
                    "text",
                    "first",
                    "conditions",
                ]
            )
            | st.text(max_size=3),
            v,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@given(
    st.lists(st.dictionaries(names, value, max_size=8), max_size=8),
    st.sampled_from([None, None, *dict.fromkeys(s.name for s in schemas.SCHEMAS)]),
)
@settings(max_examples=250, deadline=None)
def test_random_rows_are_read_rejected_or_refused(rows, schema):
    try:
        read(rows, Dataset(schema=schema))
    except MedftError as e:
        assert "\n" not in str(e)


@given(st.sampled_from(schemas.SCHEMAS), st.data())
@settings(max_examples=250, deadline=None)
def test_rows_with_the_right_columns_and_any_content(line, data):
    columns = list(line.spellings())
    rows = [{c: data.draw(value) for c in columns} for _ in range(3)]
    try:
        read(
            rows,
            Dataset(
                first_option=data.draw(st.sampled_from([None, 0, 1])),
                labels=data.draw(st.sampled_from([None, ["no", "yes"]])),
            ),
        )
    except MedftError as e:
        assert "\n" not in str(e)


@given(st.lists(st.integers(-1, 5) | st.none(), min_size=1, max_size=30))
@settings(deadline=None)
def test_a_shifted_file_gives_the_same_answers(cops):
    hub = [
        MCQ | dict(question=f"q{i}", cop=c)
        for i, c in enumerate(cops + [0])
        if c in (None, -1, 0, 1, 2, 3)
    ]
    raw = [r | dict(cop=r["cop"] + 1 if r["cop"] not in (None, -1) else r["cop"]) for r in hub] + [
        MCQ | dict(cop=4)
    ]
    a, b = read(hub)[1], read(raw)[1][:-1]
    assert [x["answer"] for x in a] == [x["answer"] for x in b]


def test_first_option_keeps_looking():
    first = FirstOption("f")
    for n in range(9):
        first.observe(n, 2)
    first.observe(10, 4)
    first.observe(11, None)
    first.observe(12, "b")
    assert first.base == 1
    with pytest.raises(MedftError):
        first.observe(13, 0)
