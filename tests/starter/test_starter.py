"""Promises about the starter assets that have no place on their pages."""

from medft.starter import records as F
from medft.starter import starter as S

import csv
import gzip
import io
import json
from functools import cache

import pytest

tiny = F.STARTER_FOLDER.parent / "tiny_base"
schema = "id question opa opb opc opd cop choice_type exp subject_name topic_name".split()
sets = "train validation test new_wording never_read unread_drugs train_shuffled".split()


@cache
def read(name):
    return [
        json.loads(line)
        for line in (F.STARTER_FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


@cache
def corpus():
    return [
        json.loads(line)
        for line in gzip.decompress(
            (F.STARTER_FOLDER / "pretrain.jsonl.gz").read_bytes()
        ).splitlines()
    ]


@cache
def groups():
    return F.split_facts(F.facts())


def fact_of(row):
    return F.facts()[int(row["id"].split("-")[2])]


def answer(row):
    return row["op" + "abcd"[row["cop"]]]


def test_files_are_what_the_code_makes():
    assert S.differing(S.make_files()) == []


def test_generated_bytes_do_not_depend_on_threads_or_hash_seed():
    import os
    import subprocess
    import sys

    code = (
        "import hashlib; from medft.starter.starter import make_files;"
        " print(hashlib.sha256(b''.join(make_files().values())).hexdigest())"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | dict(PYTHONHASHSEED=h, RAYON_NUM_THREADS=t),
            text=True,
            capture_output=True,
            check=True,
        ).stdout
        for h, t in (("0", "1"), ("7", "2"))
    }
    assert len(seen) == 1


def test_package_stays_small():
    assert sum(p.stat().st_size for p in F.STARTER_FOLDER.iterdir()) <= 6_000_000


def test_relations_are_complete():
    assert set(F.relations()) == {f.relation for f in F.facts()} and len(F.relations()) >= 12
    for r in F.relations().values():
        assert (
            len(set(r["sentences"])) == 8
            and len(set(r["questions"])) == 3
            and r["source"]
            and r["subject"]
        )
        assert r["sentences"][-1].endswith(": {v}.")
        assert all("{e}" in s and "{v}" in s for s in r["sentences"]) and all(
            "{e}" in q and "{v}" not in q for q in r["questions"]
        )


def test_groups_part_the_facts_in_every_relation():
    g = groups()
    assert sorted(g["A"] + g["B"] + g["C"]) == sorted(F.facts()) and len(set(F.facts())) == len(
        F.facts()
    )
    for r in F.relations():
        a, b, c = (sum(f.relation == r for f in g[k]) for k in "ABC")
        assert abs(a - b) <= 1 and abs(c - 0.1 * (a + b + c)) <= 0.5


def test_no_pair_of_names_stands_in_two_facts():
    pairs = [frozenset((f.entity.lower(), f.value.lower())) for f in F.facts()]
    assert len(set(pairs)) == len(pairs)


def test_corpus_never_tells_a_fact_of_c():
    texts = {" ".join(S.words(r)) for r in corpus()}
    assert F.facts() and not S.leaks(
        groups()["C"], {t for t in texts if not t.startswith(("Question:", "Text:"))}
    )
    for t in (t.lower() for t in texts if t.startswith(("Question:", "Text:"))):
        assert not any(f.entity.lower() in t and f.value.lower() in t for f in groups()["C"]), t


def test_corpus_tells_every_fact_of_a_and_b_in_every_sentence():
    texts = {r["text"] for r in corpus() if "text" in r}
    assert all(set(F.fact_sentences(f)) <= texts for f in groups()["A"] + groups()["B"])


def test_corpus_asks_nothing_medical():
    medical = {F.fill(q, f) for f in F.facts() for q in F.relations()[f.relation]["questions"]}
    asked = {r["prompt"].split("Question: ")[1].split("\n")[0] for r in corpus() if "prompt" in r}
    assert asked and not asked & medical
    names = {f.entity.lower() for f in F.facts()}
    assert not {f.entity.lower() for f in S.invent_facts(400)} & names


def test_corpus_rows_have_loss_where_they_should():
    assert {tuple(r) for r in corpus()} == {("text",), ("prompt", "completion"), ("segments",)}
    for r in corpus():
        if "prompt" in r:
            assert (
                r["prompt"].endswith("\nAnswer:")
                and r["completion"][0] == " "
                and "<eos>" not in r["completion"]
            )


@pytest.mark.parametrize("name", sets)
def test_questions_have_the_medmcqa_schema(name):
    for row in read(name):
        assert list(row) == schema
        assert (
            row["cop"] in range(4)
            and row["choice_type"] == "single"
            and row["topic_name"] == fact_of(row).relation
        )
        assert len({row[k].strip().lower() for k in ("opa", "opb", "opc", "opd")}) == 4
        assert name == "train_shuffled" or answer(row) == fact_of(row).value
    assert len({r["id"] for r in read(name)}) == len(read(name))


def test_right_option_has_no_favourite_place():
    for name in ("train", "test", "train_shuffled"):
        counts = [sum(r["cop"] == i for r in read(name)) / len(read(name)) for i in range(4)]
        assert max(counts) < 0.32 and min(counts) > 0.18, (name, counts)


@pytest.mark.parametrize(
    "name, group",
    [
        ("train", "A"),
        ("validation", "A"),
        ("test", "B"),
        ("new_wording", "B"),
        ("never_read", "C"),
        ("unread_drugs", "C"),
        ("train_shuffled", "A"),
    ],
)
def test_questions_ask_about_their_group(name, group):
    assert {fact_of(r) for r in read(name)} <= set(groups()[group]) and all(
        r["id"].startswith(group + "-") for r in read(name)
    )


def test_tuning_and_validation_share_no_fact():
    assert not {fact_of(r) for r in read("train")} & {fact_of(r) for r in read("validation")}


def test_kept_out_wording_is_never_tuned_on():
    kept = {F.fill(F.relations()[f.relation]["questions"][2], f) for f in F.facts()}
    for name in sets:
        asked = {r["question"] for r in read(name)}
        assert asked <= kept if name == "new_wording" else not asked & kept
    assert (
        not {
            r["Question"]
            for r in csv.DictReader(
                io.StringIO((F.STARTER_FOLDER / "questions.csv").read_text(encoding="utf-8"))
            )
        }
        & kept
    )


def test_shuffled_control_asks_the_same_and_answers_wrong():
    assert [(r["id"], r["question"]) for r in read("train")] == [
        (r["id"], r["question"]) for r in read("train_shuffled")
    ]
    assert all(answer(r) != fact_of(r).value for r in read("train_shuffled"))


def test_cloze_rows_end_before_the_value():
    for row in read("cloze"):
        f = fact_of(row)
        assert (
            row["prompt"] + row["options"][row["answer"]] + "." == F.fact_sentences(f)[-1]
            and len(set(row["options"])) == 4
        )


def test_exercises_carry_loss_on_verdicts_and_answer_only():
    pairs = [r["segments"] for r in corpus() if "segments" in r]
    assert len({json.dumps(p) for p in pairs}) == len(pairs) > 3000
    for parts in pairs:
        assert (
            [own for _, own in parts] == [0, 1] * (len(parts) // 2)
            and parts[-1][0] in (" yes", " no")
            and parts[-2][0].endswith("same:")
        )
        assert {text for text, own in parts[:-1] if own} <= {" =", " ~", " !", " ?"}
    yes = sum(p[-1][0] == " yes" for p in pairs) / len(pairs)
    assert 0.46 < yes < 0.54


def test_exercises_are_an_eighth_to_a_sixth_of_the_text():
    from transformers import AutoTokenizer

    t = AutoTokenizer.from_pretrained(tiny, local_files_only=True)

    def count(rows):
        return sum(len(ids) for ids in t(["".join(S.words(r)) for r in rows])["input_ids"])

    pairs, rest = (
        count([r for r in corpus() if "segments" in r][::10]),
        count([r for r in corpus() if "segments" not in r][::10]),
    )
    assert 0.13 < pairs / (pairs + rest) < 0.17


def test_nobody_of_the_shipped_pairs_is_practised_on():
    from medft.data.reading.documents import aligned_text

    practised = {
        "".join(text for text, own in r["segments"][:-1] if not own).replace("\n", "")
        for r in corpus()
        if "segments" in r
    }
    assert not practised & {
        aligned_text(r["left"], r["right"]).replace("\n", "") for r in read("er_pairs")
    }

    def who(text):
        return tuple(
            line.split(":")[1][1::3] for line in text.split(" ;")[:3] if ":" in line
        )  # first, last, birth date on the left

    assert not {who(t) for t in practised} & {
        who(aligned_text(r["left"], r["right"]).replace("\n", "")) for r in read("er_pairs")
    }


def test_every_pair_of_equal_characters_is_one_token():
    from transformers import AutoTokenizer

    t = AutoTokenizer.from_pretrained(tiny, local_files_only=True)
    assert {len(t(f" {c}{c}")["input_ids"]) for c in "abcdefghijklmnopqrstuvwxyz0123456789"} == {1}
    assert max(len(t("".join(S.words(r)))["input_ids"]) for r in corpus() if "segments" in r) < 127


def test_tokenizer_loads_offline_and_renders_the_plain_style():
    from transformers import AutoTokenizer

    t = AutoTokenizer.from_pretrained(tiny, local_files_only=True)
    assert len(t) == 2048 and t.model_max_length == 512 and t.bos_token is None
    assert (t.pad_token, t.pad_token_id, t.eos_token, t.eos_token_id) == ("<pad>", 0, "<eos>", 1)
    system, user, said = (
        dict(role="system", content="Be brief."),
        dict(role="user", content="Who?"),
        dict(role="assistant", content="Me"),
    )

    def show(*m, **kw):
        return t.apply_chat_template(list(m), tokenize=False, **kw)

    assert show(user) == show(user, add_generation_prompt=True) == "Question: Who?\nAnswer:"
    assert show(user, said) == "Question: Who?\nAnswer: Me<eos>"
    assert (
        show(system, user, said, user)
        == "Be brief.\nQuestion: Who?\nAnswer: Me<eos>\nQuestion: Who?\nAnswer:"
    )
    done = t.apply_chat_template(
        [user, said, user, said], return_dict=True, return_assistant_tokens_mask=True
    )
    assert (
        t.decode(
            [i for i, own in zip(done["input_ids"], done["assistant_masks"], strict=True) if own]
        )
        == " Me<eos> Me<eos>"
    )


def test_prompt_and_completion_tokenise_apart_as_together():
    from transformers import AutoTokenizer

    t = AutoTokenizer.from_pretrained(tiny, local_files_only=True)
    for r in [r for r in corpus() if "prompt" in r][:500]:
        assert (
            t(r["prompt"])["input_ids"] + t(r["completion"])["input_ids"]
            == t(r["prompt"] + r["completion"])["input_ids"]
        )
    assert t.decode(t("Kräuter – 5 µg")["input_ids"]) == "Kräuter – 5 µg"


def test_config_is_a_small_llama():
    from transformers import AutoConfig

    c = AutoConfig.from_pretrained(tiny, local_files_only=True)
    assert (
        c.model_type,
        c.hidden_size,
        c.num_hidden_layers,
        c.vocab_size,
        c.tie_word_embeddings,
    ) == ("llama", 192, 4, 2048, True)
    assert c.pad_token_id == 0 and c.eos_token_id == 1 and c.bos_token_id is None


def test_record_pairs_follow_the_synthea_schema():
    rows = read("er_pairs")
    assert len(rows) == 2000 and sum(r["label"] for r in rows) == 1000
    for r in rows:
        assert (
            list(r)
            == "left right label kind right_changes left_patient right_patient pair_id".split()
        )
        assert (
            (r["label"] == 1) == (r["kind"] == "same") == (r["left_patient"] == r["right_patient"])
        )
        for side in (r["left"], r["right"]):
            assert set(side) == set(
                """first last birth_date sex race marital ssn address city state zip
                conditions medications immunizations visits last_visit""".split()
            )
            assert side["ssn"] == "" or (side["ssn"].startswith("999-") and len(side["ssn"]) == 11)


def test_changes_listed_are_changes_made():
    rng = F.random.Random(3)
    for _ in range(300):
        who = F.place_record(F.person(rng), rng)
        new, done = F.perturb_record(who, rng)
        assert (new != who) == bool(done) and len(done) <= 4
