"""Rows as files really have them: printed lists, missing values, options, passages, labels."""

from medft.core.files import MedftError
from medft.core.recipe import load_recipe
from medft.core.run import Run
from medft.core.sections import Dataset
from medft.data import pipeline as data
from medft.data.chat_templates import load_tokenizer
from medft.data.reading.answer_options import (
    UnreadableCell,
    keeps_its_order,
    missing_kind,
    read_printed,
    refers_to_others,
    unlettered,
)
from medft.data.reading.free_text import fold_labels, from_label, from_messages
from medft.data.reading.multiple_choice import (
    Reject,
    from_medqa,
    outcome,
    parse_options,
    passages,
    plain_answer,
)
from medft.data.reading.schemas import not_read_line, read_examples
from medft.evaluate.scoring import predict as scoring

import json
from collections import Counter

import pytest

DRUGS = ["naloxone", "atropine", "flumazenil", "insulin"]
MIXED = [
    "dataset.checks={near_duplicates: off, near_overlap: off}",
    "dataset.cache=false",
    "dataset.holdout=0.2",
]


def read(rows, where="f.jsonl", **dataset):
    "The reading, its examples, and its reasons."
    reading = read_examples(enumerate(rows, 1), where, Dataset(**dataset))
    out = list(reading)
    assert len(out) == len(rows)
    return reading, [ex for *_, ex, _ in out if ex], Counter(why for *_, why in out if why)


def one(row, where="f.jsonl", **dataset):
    "The example that a row becomes, or the reason why it is none."
    _, good, bad = read([row], where, **dataset)
    return good[0] if good else next(iter(bad))


def prepared(tmp_path, rows, *overrides, recipe="your_data"):
    "A run whose data are prepared, and its report."
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    run = Run.create(
        load_recipe(recipe, [f"dataset.path={path}", *MIXED, *overrides]), root=tmp_path / "runs"
    )
    return run, data.prepare(run)


# ------------------------------------------------------------------------------------ printed lists


@pytest.mark.parametrize(
    "text",
    [
        "['a b' 'c']",
        "['a b'\n 'c']",
        "['a b', 'c']",
        '["a b", "c"]',
        "('a b', 'c')",
        "array(['a b', 'c'], dtype=object)",
        "array(['a b', 'c'],\n      dtype='<U3')",
        "np.array(['a b', 'c'])",
        "[np.str_('a b'), np.str_('c')]",
        "list(['a b', 'c'])",
        "Index(['a b', 'c'], dtype='object')",
        'c("a b", "c")',
        '{"a b","c"}',
        "[u'a b', u'c']",
        '["a b"\n "c"]',
        '"[\\"a b\\", \\"c\\"]"',
        "[ 'a b'  'c' ]",
        "['a '\n 'b',\n 'c']",
        "array(['a b', 'c'], dtype=dtype('O'))",
    ],
)
def test_a_list_is_read_in_every_printed_form(text):
    assert read_printed(text) == ["a b", "c"]


@pytest.mark.parametrize(
    "text, value",
    [
        ("""["it's" 'b']""", ["it's", "b"]),
        ("['x.' 'Seen']", ["x.", "Seen"]),
        ("[1 2 3]", [1, 2, 3]),
        ("[1. 2.5 nan]", [1.0, 2.5, None]),
        ("[list(['a']), list(['b' 'c'])]", [["a"], ["b", "c"]]),
        ("[None, 'a', nan]", [None, "a", None]),
        ("[True False]", [True, False]),
        ("[array(['a'], dtype=object) array(['b'], dtype=object)]", [["a"], ["b"]]),
        ("array([], dtype=object)", []),
        ("[]", []),
        ("[{'role': 'user'}\n {'role': 'assistant'}]", [{"role": "user"}, {"role": "assistant"}]),
        (r"['a\'b' 'c\nd']", ["a'b", "c\nd"]),
        (
            "{'contexts': array(['a', 'b'], dtype=object), 'n': np.int64(2)}",
            {"contexts": ["a", "b"], "n": 2},
        ),
        ("['…' '...']", ["…", "..."]),
    ],
)
def test_printed_values(text, value):
    assert read_printed(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "['a' ... 'z']",
        "['a', 'b",
        "['a';'b']",
        "[__import__('os')]",
        "['a', 'b' 'c']",
        "{'a': array(['b'",
        "[...]",
        "0    a\n1    b\nName: contexts, dtype: object",
        "<pyarrow.lib.StringArray>\n['a']",
        "array(['a', ...])",
    ],
)
def test_what_looks_like_a_list_and_is_none_is_refused(text):
    with pytest.raises(UnreadableCell):
        read_printed(text)
    row = dict(pubid=1, question="Does it?", context=text, long_answer="x", final_decision="yes")
    assert one(row).startswith("context holds a list that cannot be read")


@pytest.mark.parametrize(
    "text",
    [
        "[Gout in the elderly.]",
        "(A) gout",
        "[1] Smith. In [2]",
        "a, b",
        "c(lassic)",
        "38.5",
        "[",
        "array of drugs",
        "{x}",
        "<b>x</b>",
    ],
)
def test_a_text_in_brackets_is_a_text(text):
    assert read_printed(text) == text


def test_paragraphs_stay_apart_and_columns_are_named():
    row = dict(question="Does it?", final_decision="yes", abstract="['One ends.'\n 'Seen later.']")
    assert one(row)["question"] == "Abstract: One ends.\nSeen later.\nQuestion: Does it?"
    assert one(row | dict(abstract="['a' ...]")).startswith(
        "abstract holds a list that cannot be read: it was cut"
    )
    assert (
        passages(
            "{'contexts': array(['a', 'b'], dtype=object), 'labels': array(['M'], dtype=object)}"
        )
        == "a\nb"
    )
    ex = one(
        dict(
            conversations=(
                "[{'from': 'human', 'value': 'Gout?'}\n {'from': 'gpt', 'value': \"It's urate.\"}]"
            )
        )
    )
    assert [m["content"] for m in ex["messages"]] == ["Gout?", "It's urate."]
    ex = one(dict(question="q", answer="['Urate.']", context="['a' 'b']"))
    assert (ex["question"], ex["answer"]) == ("Context: a\nb\nQuestion: q", "Urate.")
    assert one(dict(question="q", answer='["a", "b"]'))["answer"] == '["a", "b"]', (
        "JSON may be the answer that is meant"
    )
    assert one(dict(question="q", answer="['a' 'b']")) == "a list or object where text belongs"


# ----------------------------------------------------------------------------------- missing values


@pytest.mark.parametrize(
    "word",
    [
        "nan",
        "NaN",
        "NULL",
        "null",
        "N/A",
        "n/a",
        "#N/A",
        "<NA>",
        "NaT",
        "-",
        "--",
        "?",
        ".",
        "NA",
        "None",
        "none",
        "missing",
        "(null)",
        "\\N",
    ],
)
def test_words_for_missing_values_are_no_answers(word):
    for row in (
        dict(question="q", answer=word),
        dict(instruction="q", output=word),
        dict(prompt="q", response=word),
    ):
        assert one(row, "f.csv") == f"without an answer: {word} stands for a missing value"
    assert (
        one(dict(question=word, answer="a"), "f.csv")
        == f"without a question: {word} stands for a missing value"
    )
    assert one(dict(question="q", answer="a", context=word), "f.csv")["question"] == "q"
    assert one(dict(instruction="q", input=word, output="a"))["question"] == "q"


def test_what_only_resembles_a_missing_value():
    for text in ("Na", "NAT", "None.", "No", "0", "Not applicable here", "-1"):
        assert one(dict(question="q", answer=text), "f.csv")["answer"] == text
    reading, good, _ = read([dict(question=f"Allergy {i}?", answer="None") for i in range(3)])
    assert [ex["answer"] for ex in good] == ["None"] * 3 and "None (3 rows)" in reading.notes[0]
    options = dict(question="q", options=["gout", "lupus", "None"], answer="None")
    assert one(options)["options"] == ["gout", "lupus", "None"] and one(options)["answer"] == 2
    assert missing_kind("Na") is None and missing_kind("NA") == "word"


def test_a_group_or_an_id_that_is_missing_binds_nothing():
    rows = [dict(question=f"q{i}", answer="a", patient_id="nan", id="NULL") for i in range(2)]
    assert [ex["group"] for ex in read(rows, "f.csv")[1]] == ["q0", "q1"]


# ------------------------------------------------------------------------------ options and letters


@pytest.mark.parametrize(
    "style",
    [
        "{}. {}",
        "{}) {}",
        "({}) {}",
        "[{}] {}",
        "{}: {}",
        "{}- {}",
        "{} - {}",
        "**{}.** {}",
        "**{})** {}",
        "Option {}: {}",
        "- {}. {}",
        "{}.{}",
        "{}．{}",
        "{} {}",
    ],
)
@pytest.mark.parametrize("signs", ["ABCD", "abcd", "1234"])
def test_letters_of_options_are_taken_off(style, signs):
    if (
        signs != "ABCD"
        and style == "{} {}"
        or signs == "1234"
        and style in ("{}- {}", "{} - {}", "{}.{}")
    ):
        pytest.skip("a number before a blank or a hyphen is a number")
    options = [style.format(sign, drug) for sign, drug in zip(signs, DRUGS, strict=False)]
    assert unlettered(options) == DRUGS
    for answer in (options[1], "B", "(b)", "atropine", "B. atropine"):
        ex = one(dict(question="q", options=options, answer=answer))
        assert (ex["options"], ex["answer"]) == (DRUGS, 1)
    table = dict(question="q", answer=options[2]) | dict(zip("ABCD", options, strict=False))
    assert one(table)["options"] == DRUGS and one(table)["answer"] == 2


@pytest.mark.parametrize(
    "options",
    [
        ["A-fib", "B-cell", "C-section"],
        ["C. difficile", "E. coli", "B. cereus"],
        ["T3", "T4", "TSH"],
        ["H. pylori", "E. coli"],
        ["A cell", "B cell", "C cell"],
        ["1.5 mg", "2.5 mg", "3.5 mg"],
        ["1:10", "2:10", "3:10"],
        ["1 - 2 weeks", "2 - 3 weeks", "3 - 4 weeks"],
        ["A. x", "B. y", "D. z"],
        ["A. x", "B) y"],
        ["A", "B"],
        ["i", "ii"],
    ],
)
def test_what_only_looks_like_letters_stays(options):
    assert unlettered(options) is None


@pytest.mark.parametrize(
    "options, answer",
    [
        ({"option1": "p", "option2": "q", "option5": "N/A"}, "option2"),
        ([{"aid": 1, "atext": "p"}, {"aid": 2, "atext": "q"}], 2),
        ([{"aid": 1, "atext": "p"}, {"aid": 2, "atext": "q"}], "2"),
        ({"label": ["A", "B"], "text": ["p", "q"]}, "B"),
        ([{"label": "A", "text": "p"}, {"label": "B", "text": "q"}], "B"),
        ([{"key": "A", "value": "p"}, {"key": "B", "value": "q"}], "(B)"),
        ([["A", "p"], ["B", "q"]], "B"),
        ([{"A": "p"}, {"B": "q"}], "B"),
        ([{"text": "p"}, {"text": "q"}], "q"),
        ("['p' 'q']", "q"),
        ("A) p\nB) q", "B"),
        ({"a": "p", "b": "q"}, "b"),
        (["p", "q", "nan"], ["B"]),
        (["p", "q", None], "['q']"),
        ({"A": "p", "B": "q"}, {"B": "q"}),
        ({"0": "p", "1": "q"}, 1),
        (["p", "q"], "Q."),
        (["p", "q"], "Answer: B"),
        ({"(A)": "p", "(B)": "q"}, "B"),
        ({"choice_1": "p", "choice_2": "q"}, "choice_2"),
        ({"A": {"text": "p"}, "B": {"text": "q"}}, "B"),
    ],
)
def test_options_and_answers_in_other_shapes(options, answer):
    ex = one(dict(question="Which?", options=options, answer=answer))
    assert (ex["options"], ex["answer"]) == (["p", "q"], 1)


@pytest.mark.parametrize(
    "names",
    [
        "abcd",
        "ABCD",
        ["option_a", "option_b", "option_c", "option_d"],
        ["optionA", "optionB", "optionC", "optionD"],
        ["Option 1", "Option 2", "Option 3", "Option 4"],
        ["choice1", "choice2", "choice3", "choice4"],
        ["answer_1", "answer_2", "answer_3", "answer_4"],
        ["opa", "opb", "opc", "opd"],
        ["option0", "option1", "option2", "option3"],
    ],
)
def test_options_in_columns_of_every_name(names):
    row = dict(question="q") | dict(zip(names, DRUGS, strict=False))
    for column, answer in (
        ("answer", "atropine"),
        ("correct_answer", "B"),
        ("answerKey", "(b)"),
        ("correct_option", "Option B"),
    ):
        ex = one(row | {column: answer})
        assert (ex["options"], ex["answer"]) == (DRUGS, 1)


def test_fewer_than_four_columns_of_options():
    ex = one(dict(question="q", A="p", B="q", C="r", answer="C"))
    assert ex["options"] == list("pqr") and ex["answer"] == 2
    assert one(dict(question="q", A="p", B="q", C="r", D="nan", answer="C"))["options"] == list(
        "pqr"
    )


@pytest.mark.parametrize("answer", ["A, C", "A and C", ["A", "C"], [0, 2], "['A' 'C']", "A;C"])
def test_several_right_options_are_rejected_by_name(answer):
    assert one(dict(question="q", options=list("pqrs"), answer=answer)).startswith(
        "answer marks several options as right"
    )


def test_what_cannot_be_an_answer_is_said_with_the_forms_that_can():
    said = one(dict(question="q", choices=list("pqrs"), correct_answer="zz"))
    assert said.startswith(
        "correct_answer names no option (a letter, a number or an option's text is read): zz"
    )
    assert "letter of one option and the text of another" in one(
        dict(question="q", options=DRUGS, answer="A. atropine")
    )
    with pytest.raises(MedftError, match="dataset.first_option"):
        read([dict(question="q", options=list("pqrs"), answer=n) for n in (2, 3)])
    assert "unknown form" in outcome(parse_options, [dict(foo=1, bar=2), dict(foo=2, bar=3)])


# ----------------------------------------------------------------------------- the place of options


@pytest.mark.parametrize(
    "option",
    [
        "Both A and B",
        "both of the above",
        "All of the above.",
        "None of these",
        "NOTA",
        "A+B",
        "a and b",
        "a, b & c",
        "1, 2 and 3",
        "i and ii",
        "Options 1 and 2",
        "Only A",
        "A and C are correct",
        "1 and 3 only",
        "All except B",
        "None",
        "Neither A nor B",
        "(A) and (C)",
        "Two of the above",
        "Any of the below",
        "Both",
        "All are correct",
        "Same as option A",
        "Both (a) & (c)",
        "All of the following",
        "Todas las anteriores",
    ],
)
def test_an_option_that_speaks_of_others(option):
    assert refers_to_others(option) and keeps_its_order([option, *DRUGS[:3]])


@pytest.mark.parametrize(
    "option",
    [
        "Vitamin A and C",
        "Hepatitis B and C",
        "Both kidneys",
        "A",
        "AB",
        "1/2",
        "1-2",
        "Above the knee",
        "All patients",
        "Only insulin",
        "E. coli",
        "Neither drug",
        "IX and X",
        "13 and 14",
        "Most common above 60",
        "First",
        "None of his siblings",
        "No other drug",
        "O negative",
        "T and B cells",
    ],
)
def test_an_option_about_medicine(option):
    assert not refers_to_others(option)


def test_items_with_such_options_are_not_turned(monkeypatch):
    recipe = load_recipe("quickstart")
    tok = load_tokenizer(recipe)
    from medft.data.prompts import render_prompts

    examples = [
        dict(id=str(i), group=str(i), subject="", question="Which?", options=o, answer=0)
        for i, o in enumerate((DRUGS, [*DRUGS[:3], "Both A and B"]))
    ]
    rows = render_prompts(tok, examples, recipe)
    assert {i for i, *_ in scoring.turned(tok, rows, 3)} == {0} and scoring.in_fixed_order(
        tok, rows
    ) == [False, True]
    monkeypatch.setattr(
        scoring,
        "score_forms",
        lambda model, tok, several, *_: [[[-1.0] * 4 for _ in rows] for _ in several],
    )
    monkeypatch.setattr(
        scoring, "score_choices", lambda model, tok, rows, *_: [[-1.0] * 4 for _ in rows]
    )
    monkeypatch.setattr(scoring, "forms_of", lambda *_: {})
    said = []
    frame = scoring.predict_forms(None, tok, rows, shuffles=2, say=said.append)
    assert (
        frame.fixed_order.tolist() == [False, True]
        and list(map(len, frame.shuffled_choice)) == [2, 0]
        and "1 of 2 items" in said[0]
    )
    from medft.evaluate.measures.answers import in_other_orders

    found = in_other_orders(frame)
    assert found["fixed_order"]["value"] == 0.5 and found["shuffle_consistency"]["n"] == 1
    assert set(in_other_orders(frame.iloc[1:])) == {"fixed_order"}


# --------------------------------------------------------------------------- passages and reasoning


@pytest.mark.parametrize(
    "name",
    [
        "context",
        "passage",
        "abstract",
        "case",
        "vignette",
        "case_report",
        "caseReport",
        "Clinical Note",
        "clinicalNote",
        "background",
        "article",
        "evidence",
        "document",
        "stem",
        "NOTE",
        "clinical_context",
        "SourcePassage",
        "paper abstract",
        "context_text",
    ],
)
def test_what_a_question_is_about_is_read(name):
    text = "All were given atropine."
    for row in (
        dict(question="q", options=DRUGS, answer="B"),
        dict(question="q", opa="p", opb="q", opc="r", opd="s", cop="B"),
        dict(question="q", answer="a"),
        dict(instruction="q", input="x", output="a"),
    ):
        reading, good, _ = read([row | {name: text}])
        assert (
            good[0]["question"].startswith(f"Context: {text}\nQuestion: q")
            and reading.not_read["columns"] == []
        )
        assert "Context" not in one(row | {name: " "})["question"]


def test_passages_in_several_columns_and_codes_that_are_none():
    _, good, _ = read(
        [
            dict(
                question="q",
                answer="a",
                background="Gout hurts.",
                case_report=["A toe.", "", "Red."],
            )
        ]
    )
    assert good[0]["question"] == "Context: Gout hurts.\nA toe.\nRed.\nQuestion: q"
    reading, good, _ = read(
        [dict(question="q", answer="a", case=12, document="PMC12", text="Question: q\nAnswer: a")]
    )
    assert good[0]["question"] == "q" and reading.not_read["columns"] == [
        "case",
        "document",
        "text",
    ]
    assert one(dict(instruction="Q", context="C", response="A"))["question"] == "Q\n\nC"


@pytest.mark.parametrize(
    "name",
    [
        "reasoning_content",
        "reasoning",
        "Complex_CoT",
        "cot",
        "chain_of_thought",
        "thinking",
        "rationale",
        "explanation",
        "chainOfThought",
    ],
)
def test_reasoning_is_named_or_put_before_the_answer(name):
    row = {"Question": "q", "Response": "Gout.", name: "Urate is high."}
    reading, good, _ = read([row])
    assert good[0]["answer"] == "Gout." and reading.not_read == dict(columns=[name], turn_keys=[])
    reading, good, _ = read([row], reasoning="prepend")
    assert good[0]["answer"] == "Urate is high.\n\nGout." and reading.not_read["columns"] == []
    assert one(row | {name: None}, reasoning="prepend")["answer"] == "Gout."


def talk(**more):
    turns = [
        dict(role="user", content="Gout?"),
        dict(role="assistant", content="Urate."),
        dict(role="user", content="And?"),
        dict(role="assistant", content="Rest."),
    ]
    return [*turns[:-1], turns[-1] | more]


def test_reasoning_of_turns():
    for key in ("reasoning_content", "thinking", "reasoning"):
        reading, good, _ = read([dict(messages=talk(**{key: "Hm."}))])
        assert good[0]["messages"][-1]["content"] == "Rest." and reading.not_read["turn_keys"] == [
            key
        ]
        reading, good, _ = read([dict(messages=talk(**{key: "Hm."}))], reasoning="prepend")
        assert (
            good[0]["messages"][-1]["content"] == "Hm.\n\nRest."
            and reading.not_read["turn_keys"] == []
        )
    parts = [dict(type="thinking", thinking="Hm."), dict(type="text", text="Rest.")]
    assert one(dict(messages=talk(content=parts)))["messages"][-1]["content"] == "Rest."
    assert (
        one(dict(messages=talk(content=parts)), reasoning="prepend")["messages"][-1]["content"]
        == "Hm.\n\nRest."
    )


@pytest.mark.parametrize(
    "mark",
    [
        dict(weight=0),
        dict(weight=0.0),
        dict(weight="0"),
        dict(weight=False),
        dict(train=False),
        dict(trainable=False),
        dict(train_on_turn="false"),
        dict(loss=False),
    ],
)
def test_a_turn_of_weight_0_is_not_trained_on(mark):
    reading, good, bad = read(
        [dict(messages=talk(**mark)), dict(messages=talk(**dict.fromkeys(mark, 1)))]
    )
    assert [ex["messages"][-1]["content"] for ex in good] == [
        "Urate.",
        "Rest.",
    ] and reading.not_read["turn_keys"] == []
    assert reading.notes == [
        "f.jsonl: 1 conversations end before turns of weight 0, which are not trained on"
    ]
    first = talk()
    first[1] |= mark
    assert one(dict(messages=first))["messages"][1] == dict(
        role="assistant", content="Urate.", trained=False
    )
    assert (
        one(dict(messages=first[:2]))
        == "nothing to train on: every turn of the assistant has weight 0"
    )


def test_other_weights_are_refused_with_row_and_turn():
    for key, value in (("weight", 0.5), ("weight", 2), ("mask", True), ("train_detail", [1])):
        with pytest.raises(MedftError, match=f"f.jsonl: row 2: turn 4 has {key}"):
            read([dict(messages=talk()), dict(messages=talk(**{key: value}))])


def test_a_mask_leaves_out_turns_of_weight_0(tmp_path):
    rows = [
        dict(messages=[m | (dict(weight=0) if k == 1 else {}) for k, m in enumerate(talk())])
        for _ in range(2)
    ]
    rows = [json.loads(json.dumps(r).replace("Gout?", f"Gout {i}?")) for i, r in enumerate(rows)]
    run, _ = prepared(tmp_path, rows, "dataset.holdout=0", "training.assistant_only_loss=true")
    tok = load_tokenizer(run.recipe)
    for row in data.load_split(run, "train"):
        tokens = zip(row["input_ids"], row["completion_mask"], strict=True)
        learned = tok.decode([token for token, is_learned in tokens if is_learned])
        assert (
            "Rest." in learned
            and "Urate." not in learned
            and "Urate." in tok.decode(row["input_ids"])
        )
    with pytest.raises(MedftError, match="completion_only_loss: false trains on every turn"):
        prepared(tmp_path, rows, "dataset.holdout=0", "training.completion_only_loss=false")


def test_other_keys_of_turns():
    reading, good, _ = read(
        [dict(messages=talk(name="x", refusal=None, tool_calls=[]), source="s", weight=1)]
    )
    assert good and reading.not_read == dict(columns=["source", "weight"], turn_keys=["name"])
    assert (
        one(dict(messages=talk(images=["a.png"])))
        == "a part of a turn that is no text (image, audio)"
    )


def test_what_is_not_read_stands_in_report_and_log(tmp_path, capsys):
    rows = [
        dict(Question=f"Q {i}?", Response=f"A {i}.", Complex_CoT="Hm.", source="s")
        for i in range(30)
    ]
    rows[-1]["late"] = "x"
    run, report = prepared(tmp_path, rows)
    assert (
        report["not_read"]["columns"] == {"train": ["Complex_CoT", "source", "late"]}
        and report["not_read"]["turn_keys"] == []
    )
    log = (
        (run.path / "run.log").read_text()
        if (run.path / "run.log").exists()
        else capsys.readouterr().out
    )
    assert "not read: columns Complex_CoT, source, late" in log
    assert (
        not_read_line(dict(columns=dict(a=["x"], b=["x", "y"]), turn_keys=["weight"]))
        == "not read: columns x, y; keys of turns: weight"
    )
    assert not_read_line({}) == ""


# ------------------------------------------------------------------------------------------- labels


def labelled_rows(labels, n=40):
    words = "toe knee elbow wrist ankle hip heel thumb spine neck".split()
    return [
        dict(
            text=f"Case {i}: pain in the {words[i % 10]} since {i} days, number {i * i}.",
            label=labels[i % len(labels)],
        )
        for i in range(n)
    ]


def test_spellings_of_a_label_are_one(tmp_path):
    run, report = prepared(
        tmp_path,
        labelled_rows(["Yes", "no", "yes", "Yes", "YES ", "no", "\u200bYes", "No"]),
        "model.task=classification",
    )
    assert report["labels"] == ["Yes", "no"] and not report["rejected"]
    assert any("'Yes'" in note and "differ only in case" in note for note in report["notes"])


@pytest.mark.parametrize(
    "counts, kept",
    [
        ({"e\u0301": 2, "é": 3}, {"é"}),
        ({"a  b": 1, "A b": 2}, {"A b"}),
        ({"true": 2, "1": 3, "0": 1, "false": 4}, {"0", "1"}),
        ({"mild": 5, "None": 5}, {"mild", "None"}),
        ({"mild": 50, "none": 1}, {"mild"}),
        ({"+": 5, "-": 5}, {"+", "-"}),
        ({"x": 9, "None": 5, "?": 5}, {"x"}),
        ({"Ａ": 1, "a": 2, "b": 2}, {"a", "b"}),
    ],
)
def test_folded_labels(counts, kept):
    found = {label for label in fold_labels(counts)[0].values() if label is not None}
    assert {f.replace("true", "1").replace("false", "0") for f in found} == kept


@pytest.mark.parametrize(
    "label",
    [
        ["renal", "cardio"],
        "['renal' 'cardio']",
        "['renal', 'cardio']",
        '["renal", "cardio"]',
        [0, 1, 1],
        [[0, 5, "ENT"]],
        {"renal": 1, "cardio": 1},
    ],
)
def test_several_labels_are_refused_with_row_and_value(label):
    with pytest.raises(
        MedftError, match="f.jsonl: row 2: labels? holds several labels .*one label a text"
    ) as e:
        read([dict(text="t", labels=["renal"]), dict(text="t", labels=label)])
    assert "\n" not in str(e.value)


def test_one_label_in_a_list_is_that_label():
    assert [
        ex["label"]
        for ex in read(
            [
                dict(text="t", labels=v)
                for v in (["renal"], "['renal']", '["renal"]', {"renal": 1, "cardio": 0})
            ]
        )[1]
    ] == ["renal"] * 4
    assert from_label(dict(text="t", label="YES"), ["no", "yes"])["label"] == "yes"
    with pytest.raises(MedftError, match="'renal; cardio' is several labels"):
        fold_labels({"renal": 3, "cardio": 3, "renal; cardio": 1})


def test_missing_labels(tmp_path):
    rows = labelled_rows(["yes", "no"], 60)
    for i, word in enumerate(("nan", "None", "N/A", "?")):
        rows[i]["label"] = word
    _, report = prepared(tmp_path, rows, "model.task=classification")
    assert report["labels"] == ["no", "yes"] and report["rejected"] == {
        "no label (missing or -1)": 2,
        "no label": 2,
    }


def test_one_class_is_refused_before_training(tmp_path):
    with pytest.raises(MedftError, match="every one of the 40 training rows has the label 'Yes'"):
        prepared(
            tmp_path,
            labelled_rows(["Yes", "yes", "YES"]),
            "model.task=classification",
            "dataset.holdout=0",
        )
    rows = labelled_rows(["yes"]) + labelled_rows(["no"])[:1]
    with pytest.raises(MedftError, match="has the label 'yes'"):
        prepared(
            tmp_path,
            rows,
            "model.task=classification",
            "dataset.holdout=0",
            "dataset.max_samples=3",
        )


def test_a_label_of_the_test_set_alone_is_named(tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text(
        "\n".join(
            json.dumps(dict(text=f"Other {i} text {i * i}", label="rare" if i else "yes"))
            for i in range(4)
        )
    )
    _, report = prepared(
        tmp_path,
        labelled_rows(["yes", "no"]),
        "model.task=classification",
        f"dataset.test_path={path}",
        "dataset.labels=[no, yes, rare]",
    )
    assert any(
        "labels in test that no training row has: 'rare' (3 rows)" in note
        for note in report["notes"]
    )


def test_the_first_rejected_row_stands_in_a_refusal(tmp_path):
    with pytest.raises(MedftError, match="the first: .*row 1: answer names no option .*: zz"):
        prepared(tmp_path, [dict(question=f"q{i}", options=DRUGS, answer="zz") for i in range(3)])


def test_from_medqa_and_messages_raise_what_they_say():
    with pytest.raises(Reject):
        from_medqa(dict(question="q", options="['a' ...]", answer="a"))
    assert plain_answer("B. atropine", dict(zip("ABCD", DRUGS, strict=True))) == "B"
    assert from_messages(dict(messages=talk()))["messages"][-1]["content"] == "Rest."
