"""Texts in their many forms: owners of rows, equal texts, conversations in one string, repair."""

from medft.core.files import MedftError
from medft.core.identity import group_rows, identity, identity_columns, kind_of_column, text_key
from medft.core.recipe import load_recipe
from medft.core.run import Run
from medft.data import pipeline as data
from medft.data.quality import leakage as leaks
from medft.data.quality.broken_text import damage, repair
from medft.data.reading import chat_formats

import json
import unicodedata

import pytest

QUIET = ["dataset.cache=false", "dataset.checks={near_duplicates: off, near_overlap: off}"]


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def prepared(folder, rows, *more):
    "A run whose data are these rows, and its report; further files are named by `more`."
    path = write(folder / "rows.jsonl", rows)
    run = Run.create(
        load_recipe("your_data", [f"dataset.path={path}", *QUIET, *more]), root=folder / "runs"
    )
    return run, data.prepare(run)


def split(run, name):
    return data.load_split(run, name).to_list()


def notes(column, values):
    "Rows of text with a label, two labels in turn, and a column that says whose each is."
    words = "cough fever rash nausea vertigo pallor".split()
    return [
        {
            column: v,
            "text": f"{words[i % 6]} on day {i}, then {words[i * i % 5]} {i * 7}",
            "label": "home" if i % 2 else "stay",
        }
        for i, v in enumerate(values)
    ]


# ---- whose rows ----
@pytest.mark.parametrize(
    "name",
    [
        "PatientID",
        "patient id",
        "Patient-ID",
        "patient.id",
        "pat_id",
        "patid",
        "pt_id",
        "subject_id",
        "SUBJECT_ID",
        "subjectId",
        "mrn",
        "MRN",
        "person_id",
        "hadm_id",
        "HADM_ID",
        "stay_id",
        "icustay_id",
        "encounter_id",
        "visit_id",
        "StudyInstanceUID",
        "SeriesInstanceUID",
        "study_id",
        "case_id",
        "doc_id",
        "documentId",
        "pmid",
        "PMID",
        "pmcid",
        "article_id",
        "participant",
        "record_id",
        "note_id",
        "deid_patient_id",
        "\ufeffPatientID",
    ],
)
def test_a_column_is_known_in_every_spelling(name):
    assert kind_of_column(name)


@pytest.mark.parametrize(
    "name",
    [
        "id",
        "idx",
        "subject",
        "label",
        "question",
        "answer_idx",
        "patient_age",
        "patient_history",
        "document",
        "study",
        "visit_date",
    ],
)
def test_a_column_of_content_is_no_identity(name):
    assert kind_of_column(name) is None


def test_one_patient_in_every_type_of_cell():
    assert {identity(v) for v in (101, 101.0, "101", " 101\u00a0", "101.0", "１０１")} == {"101"}
    assert identity("0101") == "0101" and identity(9007199254740991.0) == "9007199254740991"
    assert not any(
        map(identity, (None, float("nan"), "", " ", "NaN", "null", "N/A", "<NA>", [], {}))
    )
    assert identity("U\u0308-7") == identity("Ü-7")


@pytest.mark.parametrize("column", ["PatientID", "subjectId", "HADM_ID", "doc id"])
def test_no_owner_stands_on_both_sides(tmp_path, capsys, column):
    values = [[i // 4, float(i // 4), f" {i // 4} ", f"{i // 4}.0"][i % 4] for i in range(100)]
    run, report = prepared(
        tmp_path, notes(column, values), "model.task=classification", "dataset.holdout=0.2"
    )
    of = {s: {r["group"] for r in split(run, s)} for s in report["splits"]}
    assert report["grouped_by"] == [column] and len(of) == 3
    assert not of["train"] & (of["test"] | of["validation"]) and not of["test"] & of["validation"]
    assert len(set().union(*of.values())) == 25
    assert f"rows that share {column} stay on one side" in capsys.readouterr().out


def test_rows_without_an_owner_are_not_one_patient(tmp_path):
    values = [i // 3 if i < 30 else [None, "", "NaN", " "][i % 4] for i in range(90)]
    run, report = prepared(tmp_path, notes("mrn", values), "model.task=classification")
    groups = [r["group"] for s in report["splits"] for r in split(run, s)]
    assert len(set(groups)) == 10 + 60 and report["grouped_by"] == ["mrn"]


def test_a_column_that_differs_in_every_row_makes_no_groups(tmp_path):
    rows = [
        dict(note_id=i, question=f"What is finding {i // 2}?", answer=f"It is {i}.")
        for i in range(60)
    ]
    run, report = prepared(tmp_path, rows)
    assert (
        report["grouped_by"] == []
        and len({r["group"] for s in report["splits"] for r in split(run, s)}) == 30
    )


def test_conversations_have_owners_too(tmp_path):
    rows = [
        dict(
            patientId=i // 5,
            messages=[
                dict(role="user", content=f"Sign {i}?"),
                dict(role="assistant", content=f"Yes {i}."),
            ],
        )
        for i in range(50)
    ]
    run, report = prepared(tmp_path, rows)
    assert (
        report["grouped_by"] == ["patientId"]
        and len({r["group"] for s in report["splits"] for r in split(run, s)}) == 10
    )


def test_nested_and_chained_owners():
    stays = [[f"patient_id {p}", f"admission_id {p}{a}"] for p in range(10) for a in range(3)]
    linked = [["admission_id 71"]]
    found = group_rows(stays + linked)
    assert (
        found.kinds == ["patient_id", "admission_id"]
        and found.keys[-1] == "patient_id 7"
        and len(set(found.keys)) == 10
    )
    visits = [
        [f"patient_id {p}", f"encounter_id {v}"] for p in range(30) for v in range(3)
    ]  # visit 1, 2, 3 of each
    assert group_rows(visits).kinds == ["patient_id"]
    assert identity_columns(["SUBJECT_ID", "hadm_id", "text"]) == {
        "patient_id": "SUBJECT_ID",
        "admission_id": "hadm_id",
    }


def test_files_that_call_their_patients_otherwise_meet(tmp_path):
    test = write(tmp_path / "test.jsonl", notes("subject_id", [f"{i}.0" for i in range(5)]))
    train = notes("PatientID", [i // 2 for i in range(40)])
    for row in train:
        row["text"] += " again"
    run, report = prepared(
        tmp_path, train, f"dataset.test_path={test}", "model.task=classification"
    )
    assert report["checks"]["group_overlap"]["count"] == 5 and set(report["grouped_by"]) == {
        "PatientID",
        "subject_id",
    }


def test_the_mapped_group_is_the_only_one(tmp_path):
    rows = [
        r | dict(ward=i % 10) for i, r in enumerate(notes("PatientID", [i // 2 for i in range(60)]))
    ]
    run, report = prepared(
        tmp_path, rows, "model.task=classification", "dataset.columns={group: ward}"
    )
    assert (
        report["grouped_by"] == ["ward"]
        and len({r["group"] for s in report["splits"] for r in split(run, s)}) == 10
    )


# ---- when two texts are the same ----
FORMS = {
    "combining letters": lambda t: unicodedata.normalize("NFD", t),
    "capitals": str.upper,
    "blanks": lambda t: t.replace(" ", "\u00a0"),
    "thin blanks": lambda t: t.replace(" ", "\u2009\n"),
    "soft hyphens": lambda t: t.replace("kei", "\u00adkei"),
    "zero width": lambda t: t.replace("e", "e\u200b"),
    "wide": lambda t: t.replace("5", "５"),
    "micro": lambda t: t.replace("µ", "μ"),
    "quotes": lambda t: t.replace("'", "’"),
    "dashes": lambda t: t.replace("-", "–"),
    "byte order mark": lambda t: "\ufeff" + t,
}
ASKED = "Hilft bei Übelkeit und Müdigkeit Crohn's Mittel {} - 5 µg?"


@pytest.mark.parametrize("form", FORMS)
def test_one_key_for_every_form(form):
    text = ASKED.format(3)
    assert text_key(FORMS[form](text)) == text_key(text) != text_key(ASKED.format(4))


def test_every_check_sees_the_same_question_in_another_form(tmp_path):
    rows = [dict(question=ASKED.format(i), answer=f"Mäßig nach {i} Tagen.") for i in range(33)]
    again = [
        dict(question=change(r["question"]), answer=r["answer"])
        for r, change in zip(rows, list(FORMS.values()) * 3, strict=False)
    ]
    test = write(tmp_path / "test.jsonl", again)
    with pytest.raises(MedftError, match="overlap"):
        prepared(tmp_path, rows, f"dataset.test_path={test}")
    run, report = prepared(
        tmp_path, rows, f"dataset.test_path={test}", "dataset.checks.overlap=warn"
    )
    assert (
        report["checks"]["overlap"]["count"] == 33
        and report["checks"]["group_overlap"]["count"] == 33
    )
    assert split(run, "train")[0]["prompt"].count("Ü") == 1, (
        "what is trained on stays as it was written"
    )
    assert len(leaks.rows_on_list(leaks.trained_on(run), split(run, "test"))) == 33
    _, report = prepared(tmp_path, rows + again, "dataset.holdout=0.0")
    assert report["checks"]["duplicates"]["count"] == 66
    _, report = prepared(
        tmp_path, rows + [r | dict(answer="Nein.") for r in again], "dataset.holdout=0.0"
    )
    assert report["checks"]["contradictions"]["count"] == 66


# ---- conversations in one string ----
FACTS = [(f"Which sign has finding {i}, seen on day {i * i}?", f"Sign {i * 7}.") for i in range(30)]
PLAIN = {
    "Alpaca": "Below is an instruction that describes a task.\n\n### "
    "Instruction:\n{}\n\n### Response:\n{}",
    "Guanaco": "### Human: {}### Assistant: {}",
    "Vicuna": "A chat between a curious user and an assistant. USER: {} ASSISTANT: {}</s>",
    "Human and Assistant": "\n\nHuman: {}\n\nAssistant: {}",
    "Question and Answer": "Question: {}\nAnswer: {}",
    "Q and A": "Q: {}\nA: {}",
}
TOKENS = {
    "TinyLlama": "<|system|>\nHelp.</s>\n<|user|>\n{}</s>\n<|assistant|>\n{}</s>\n",
    "Mistral": "<s>[INST] <<SYS>>\nHelp.\n<</SYS>>\n\n{} [/INST] {} </s>",
    "Phi-3": "<|user|>\n{}<|end|>\n<|assistant|>\n{}<|end|>",
    "Gemma": "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n{}<end_of_turn>",
}
UNKNOWN = {
    "prompter": "<|prompter|>{}<|endoftext|><|assistant|>{}<|endoftext|>",
    "brackets": "[USER] {} [BOT] {}",
    "doctor": "Patient: {}\nDoctor: {}",
    "turn": "<turn|user>{}<turn|assistant>{}",
}


def texts(pattern):
    return [dict(text=pattern.format(*fact)) for fact in FACTS]


@pytest.mark.parametrize("name", PLAIN)
def test_plain_conversations_are_cut_and_masked(tmp_path, name):
    run, report = prepared(tmp_path, texts(PLAIN[name]), "dataset.holdout=0.0")
    row = split(run, "train")[0]
    assert (
        report["shapes"]["train"] == "formatted"
        and chat_formats.format_of_text(PLAIN[name].format(*FACTS[0])) == name
    )
    assert (
        row["completion"].strip() == "Sign 0.<eos>"
        and FACTS[0][0] in row["prompt"]
        and "###" not in row["prompt"] + row["completion"]
    )


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_of_another_family_are_refused_or_cut(tmp_path, name):
    with pytest.raises(MedftError, match=f"written for {name}.*schema: messages"):
        prepared(tmp_path, texts(TOKENS[name]))
    run, _ = prepared(
        tmp_path, texts(TOKENS[name]), "dataset.schema=messages", "dataset.holdout=0.0"
    )
    row = split(run, "train")[0]
    assert row["completion"].strip() == "Sign 0.<eos>" and not any(
        mark in row["prompt"] for mark in ("<|", "[INST]", "<start")
    )


@pytest.mark.parametrize("name", UNKNOWN)
def test_turns_of_an_unknown_format_are_refused_with_the_choice(tmp_path, name):
    with pytest.raises(MedftError, match="dataset.schema: text"):
        prepared(tmp_path, texts(UNKNOWN[name]))
    for choice in ("dataset.schema=text", "model.task=pretraining"):
        _, report = prepared(tmp_path, texts(UNKNOWN[name]), choice, "dataset.holdout=0.0")
        assert report["shapes"]["train"] == "text"


def test_some_conversations_among_running_text_are_named(tmp_path):
    prose = [dict(text=f"Finding {i} is seen on day {i * i} in this ward.") for i in range(40)]
    with pytest.raises(MedftError, match="10 of 50 texts hold turns"):
        prepared(tmp_path, prose + texts(PLAIN["Alpaca"])[:10])


def test_clinical_prose_is_no_conversation(tmp_path):
    note = "Patient: {} M\nDoctor: Smith\nDate: today\nComplaint: cough\nQ: none\nPlan: rest {}"
    _, report = prepared(tmp_path, [dict(text=note.format(i, i * i)) for i in range(30)])
    assert report["shapes"]["train"] == "text"


# ---- broken text ----
BROKEN = {
    "encoding": ["TNF-Î² of 5", "â‰¥ 5 mg", "37 Â°C", "patientâ€™s", "cafÃ©", "ÃƒÂ©", "a\ufffdb"],
    "control_characters": [
        "my\u00adalgia",
        "zero\u200bwidth",
        "a\u202eb",
        "a\ufeffb",
        "nul\x00",
        "bell\x07",
    ],
    "markup": [
        "&lt; 5",
        "&beta;-blocker",
        "&#946;",
        "&#x3b2;",
        "&nbsp;x",
        "&amp;lt;5",
        "<p>x</p>",
        "a<br/>b",
        "CO<sub>2</sub>",
        "<i>H. pylori</i>",
        "a_x000D_b",
        "a_x000a_b",
        r"one.\nTwo",
        r"\u03b2",
        r"{\rtf1\ansi x\par y}",
        "[** Hospital1 **]",
        "[**2101-10-20**]",
        "seen by ___ on",
        "[NAME]",
        "<PATIENT>",
        "Dr XXXX",
        "@@DATE@@",
    ],
}
SOUND = [
    "p < 0.05 and > 3",
    "<5 mg/dL",
    "CD4+ >200",
    "AT&T; H&E",
    "Âge, Île, hâl",
    "NÃO, AMANHÃ, MÃE",
    "ĐÃ CÓ",
    "în România",
    "TNF-α ≥ 5 µg at 37 °C",
    "48,XXXX",
    r"$\nu$",
    "a ____ gap",
    "x<y and y>z",
]


@pytest.mark.parametrize("check", BROKEN)
def test_damage_is_counted_by_kind(check):
    for text in BROKEN[check]:
        assert list(damage(text)) == [check], (text, damage(text))


def test_real_medicine_is_not_damaged():
    for text in SOUND:
        assert damage(text) == {} and repair(text) == (text, []), (text, damage(text), repair(text))


def test_repair_mends_once_and_changes_nothing_else():
    right = {
        "TNF-Î² â‰¥ 5 at 37 Â°C": "TNF-β ≥ 5 at 37 °C",
        "&amp;lt;5 &beta;": "<5 β",
        "<p>a<br/>H<sub>2</sub>O</p>": "a\nH2O",
        "10<sup>5</sup>/L": "10⁵/L",
        "a_x000D_\nb": "a\nb",
        "my\u00adal\u200bgia": "myalgia",
        "p&lt;0.05": "p<0.05",
        "seen by [**Name**] ___": "seen by [**Name**] ___",
        "“ﬁne”": "“ﬁne”",
    }
    for text, mended in right.items():
        assert repair(text)[0] == mended and repair(mended) == (mended, [])
    for text in sum(BROKEN.values(), []):
        once = repair(text)[0]
        assert repair(once) == (once, [])


def test_damage_is_reported_dropped_or_repaired(tmp_path):
    rows = [dict(question=f"What is sign {i}?", answer=f"It is sign {i * i}.") for i in range(20)]
    rows[3]["answer"], rows[4]["question"], rows[5]["answer"] = (
        "TNF-Î² and IFN-Î³",
        "Is p &lt; 0.05 <b>good</b>?",
        "seen by [**Name 1**] on [**2101-10-20**]",
    )
    run, report = prepared(tmp_path, rows, "dataset.holdout=0.0")
    assert report["checks"]["encoding"]["kinds"] == {"letters decoded wrongly": 1}
    assert report["checks"]["markup"]["kinds"] == {
        "HTML entities": 1,
        "HTML tags": 1,
        "de-identification marks": 1,
    }
    assert report["checks"]["identifiers"]["count"] == 0, "a mark of de-identification names nobody"
    with pytest.raises(MedftError, match="HTML tags 1.*dataset.repair=true"):
        prepared(tmp_path, rows, "dataset.holdout=0.0", "dataset.checks.markup=refuse")
    _, report = prepared(tmp_path, rows, "dataset.holdout=0.0", "dataset.drop=[markup]")
    assert report["filtered"] == {"dropped_markup": 2} and report["rows_out"] == 18
    run, report = prepared(tmp_path, rows, "dataset.holdout=0.0", "dataset.repair=true")
    assert (
        report["repaired"] == {"letters decoded wrongly": 1, "HTML entities": 1, "HTML tags": 1}
        and report["checks"]["encoding"]["count"] == 0
    )
    trained = [r["prompt"] + r["completion"] for r in split(run, "train")]
    assert any("TNF-β and IFN-γ" in t for t in trained) and any(
        "Is p < 0.05 good?" in t for t in trained
    )
