"""What must not be scored, and what was memorised: near-duplicates, leaks across runs, canaries."""

from medft.core.files import MedftError, assets, read_json, sha256, write_json
from medft.core.recipe import load_recipe
from medft.core.run import Run
from medft.data import chat_templates
from medft.data import pipeline as data
from medft.data.prepare import corpus
from medft.data.quality import canaries
from medft.data.quality import leakage as leaks
from medft.evaluate.measures import memorisation as exposure

import json
import math
import shutil
import types

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from real_data import LARGE, needs_large

MCQ = dict(opa="Iron", opb="zinc", opc="Lead", opd="gold", cop=0)
SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]


def questions(n, seed=0):
    rng = np.random.default_rng(seed)

    def word():
        return "".join(rng.choice(SYLLABLES, 4))

    return [
        MCQ
        | dict(
            id=f"{seed}-{i}",
            question=f"Case {seed} {i}: {' '.join(word() for _ in range(12))}; which metal?",
            cop=i % 4,
        )
        for i in range(n)
    ]


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def read_lines(path):
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def prepared(root, *more, recipe="your_data"):
    keys = ["training.max_length=512", "dataset.holdout=0.0", "dataset.cache=false", *more]
    run = Run.create(load_recipe(recipe, keys), root=root / "runs")
    data.prepare(run)
    return run


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    "A run that trained on forty questions, with a merged model and an adapter's folder in it."
    home = tmp_path_factory.mktemp("earlier")
    run = prepared(home, f"dataset.path={write(home / 'a.jsonl', questions(40))}")
    shutil.copytree(assets() / "tiny_base", run.path / "trl" / "merged")
    (run.path / "trl" / "adapters").mkdir()
    return run


# ---- what was trained on ----
def upset(row):
    return row | dict(
        question=row["question"].upper().replace(" ", "  "),
        opa=row["opd"],
        opd=row["opa"].upper(),
        cop=row["cop"],
    )


def test_the_same_question_is_known_in_another_template_order_and_case(tmp_path, earlier):
    seen = questions(3)
    new = questions(3, seed=7)
    same_options = [
        row | dict(question=f"Another question {i}, about lungs?") for i, row in enumerate(seen)
    ]
    other_options = [row | dict(opb="copper") for row in seen]
    training_file = write(tmp_path / "t.jsonl", questions(20, seed=9))
    scored = [*map(upset, seen), *new, *same_options, *other_options]
    test_file = write(tmp_path / "u.jsonl", scored)
    for how in (
        [],
        ["dataset.answer=letter", "dataset.system=You are a careful chemist."],
        ["model.task=classification", "model.num_labels=4"],
    ):
        run = prepared(
            tmp_path, f"dataset.path={training_file}", f"dataset.test_path={test_file}", *how
        )
        rows = data.load_split(run, "test").to_list()
        assert leaks.rows_on_list(leaks.trained_on(earlier), rows) == [0, 1, 2], how
        with pytest.raises(
            MedftError,
            match=r"data/exam: 3 of 12 rows were trained on by your_data/.*measure memory",
        ):
            leaks.check_leaks(earlier.path / "trl" / "adapters", rows, "exam")
        assert leaks.check_leaks(earlier.path, rows[3:]) == ""
        assert leaks.check_leaks("somebody/model", rows).startswith("not checked")


def test_a_ready_prompt_is_known_by_what_is_said_in_it(tmp_path):
    said = [row["question"] for row in questions(12)]
    chat = [
        dict(messages=[dict(role="user", content=s), dict(role="assistant", content="Iron")])
        for s in said
    ]
    ready = [dict(prompt=f"Task.\n\n{s}", completion="Iron") for s in said[:2]] + [
        dict(prompt=s, completion="Gold") for s in said[:2]
    ]
    run = prepared(tmp_path, f"dataset.path={write(tmp_path / 'a.jsonl', chat)}")
    other = prepared(tmp_path, f"dataset.path={write(tmp_path / 'b.jsonl', ready)}")
    assert leaks.rows_on_list(leaks.trained_on(run), data.load_split(other, "train").to_list()) == [
        2,
        3,
    ]


def test_running_text_and_windows_are_known_by_their_documents(tmp_path):
    def page(i):
        return f"Chapter {i}: " + " ".join(f"word{i}x{k}" for k in range(40))

    def part(name, rows):
        return write(tmp_path / name, [dict(text=page(i)) for i in rows])

    corpus.prepare_corpus(
        str(part("a.jsonl", range(30))),
        tmp_path / "corpus",
        max_length=512,
        workers=1,
        tell=lambda line: None,
        holdout=0.0,
    )
    how = ["model.task=pretraining", "training.packing=null"]
    packed = prepared(tmp_path, f"dataset.path={tmp_path}/corpus", *how)
    plain = prepared(
        tmp_path,
        f"dataset.path={part('c.jsonl', range(100, 120))}",
        f"dataset.test_path={part('b.jsonl', [3, 50, 7])}",
        *how,
    )
    rows = data.load_split(plain, "test").to_list()
    assert leaks.rows_on_list(leaks.trained_on(packed), rows) == [0, 2]
    assert leaks.rows_on_list(leaks.trained_on(plain), rows) == []
    with pytest.raises(MedftError, match="canaries.*packed already"):
        prepared(tmp_path, f"dataset.path={tmp_path}/corpus", "dataset.canaries=4", *how)


def test_a_list_that_was_changed_or_lost_is_refused(tmp_path, earlier):
    rows = [dict(r) for r in data.load_split(earlier, "train").to_list()]
    copy = tmp_path / "copy"
    shutil.copytree(earlier.path, copy)
    with pytest.raises(MedftError, match="40 of 40"):
        leaks.check_leaks(copy, rows)
    file = copy / leaks.TRAINED_ON_FILE
    np.save(file, np.load(file)[:3])
    with pytest.raises(MedftError, match="SHA-256 differs"):
        leaks.check_leaks(copy, rows)
    file.unlink()
    with pytest.raises(MedftError, match="is gone"):
        leaks.check_leaks(copy, rows)
    manifest = read_json(copy / "manifest.json")
    del manifest["hashes"]["trained_on"]
    write_json(copy / "manifest.json", manifest)  # a run from before there were lists
    with pytest.raises(MedftError, match="40 of 40"):
        leaks.check_leaks(copy, rows)
    shutil.rmtree(copy / "data" / "train")
    assert leaks.check_leaks(copy, rows).startswith("not checked")


def test_the_list_holds_sixteen_bytes_a_row_and_its_hash_is_in_the_manifest(earlier):
    path = earlier.path / leaks.TRAINED_ON_FILE
    held = np.load(path)
    assert held.dtype == np.uint64
    assert len(held) == 80
    assert (np.diff(held.astype(object)) > 0).all()
    assert path.stat().st_size < 16 * 40 + 200
    assert earlier.manifest["hashes"]["trained_on"] == sha256(path)


def test_a_run_may_not_score_what_the_model_it_starts_from_was_tuned_on(tmp_path, earlier):
    start = f"model.name={earlier.path}/trl/merged"
    train = f"dataset.path={write(tmp_path / 'b.jsonl', questions(20, seed=4))}"
    name = f"your_data/{earlier.path.name}"
    with pytest.raises(
        MedftError, match=f"data/test: 5 of 8 rows were trained on by {name}.*not seen these"
    ):
        prepared(
            tmp_path,
            train,
            start,
            f"dataset.test_path={write(tmp_path / 't.jsonl', questions(5) + questions(3, seed=5))}",
        )
    run = prepared(
        tmp_path,
        train,
        start,
        f"dataset.test_path={write(tmp_path / 'u.jsonl', questions(6, seed=5))}",
    )
    assert [r.path for r in leaks.lineage(run)] == [run.path, earlier.path]
    with pytest.raises(MedftError, match="5 of 5.*earlier|5 of 5.*your_data"):
        leaks.check_leaks(run, data.load_split(earlier, "train").to_list()[:5])


def test_the_same_id_about_the_same_thing_counts_within_a_run_only(tmp_path):
    a = [
        dict(id=f"n{i}", group=f"patient {i}", question=q["question"], answer="iron")
        for i, q in enumerate(questions(20))
    ]
    b = [x | dict(question=f"Quite another wording, number {i * i}?") for i, x in enumerate(a[:4])]
    group = "dataset.columns={group: group}"
    loose = "dataset.checks={group_overlap: warn}"
    run = prepared(
        tmp_path,
        f"dataset.path={write(tmp_path / 'a.jsonl', a)}",
        f"dataset.test_path={write(tmp_path / 'b.jsonl', b)}",
        group,
        loose,
    )
    rows = data.load_split(run, "test").to_list()
    with pytest.raises(MedftError, match="4 of 4"):
        leaks.check_leaks(run, rows)
    assert leaks.check_leaks(run.path, rows) == ""


def test_options_sort_the_same_however_they_are_written():
    one_way = leaks.question("q", ["(Zinc)", "iron", "Gold"])
    another = leaks.question("q", ["iron", "gold", "(zinc)"])
    assert one_way.lower() == another
    both = leaks.question_hashes(
        pa.array(["Is K+ < 3?", "Is K+ > 3?", "is  k+ < 3", None], pa.large_string())
    )
    assert both[0] == both[2] != both[1]
    assert both[3] == 0


# ---- with and without near-duplicates ----
@pytest.fixture(scope="module")
def near(tmp_path_factory):
    "Training rows, and three scored sets in which some rows are almost training rows."
    home = tmp_path_factory.mktemp("near")
    seen = questions(60)

    def close(rows):
        return [
            r
            | dict(
                id=f"near {r['id']}",
                question=r["question"].replace("which metal?", "which metal then?"),
            )
            for r in rows
        ]

    splits = dict(
        train=seen,
        validation=close(seen[:3]) + questions(9, 1),
        test=close(seen[10:22]) + questions(30, 2),
        exam=close(seen[30:38]) + questions(4, 3),
    )
    files = {name: write(home / f"{name}.jsonl", rows) for name, rows in splits.items()}
    recipe = [
        f"dataset.path={files['train']}",
        f"dataset.validation_path={files['validation']}",
        f"dataset.test_path={files['test']}",
        f"dataset.sets={{exam: {files['exam']}}}",
    ]
    return home, recipe


def predictions(run, skill, seed=0):
    "Made-up predictions: every set, and a tuned model that knows what it has nearly seen."
    rng = np.random.default_rng(seed)
    frames = {}
    for s in data.scored_sets(run):
        ids = data.load_split(run, s)["id"]
        same = dict(id=list(ids), group=list(ids), subject="", prompt_sha256="")
        lucky = rng.random(len(ids)) < 0.4
        for who in ("base", "trl"):
            right = lucky | np.array([who == "trl" and skill and i.startswith("near") for i in ids])
            frames[who, s] = pd.DataFrame(
                same
                | dict(
                    scores=[[-1.0, -2.0, -3.0, -4.0]] * len(ids),
                    choice=np.where(right, 0, 1),
                    choice_norm=0,
                    truth=0,
                    correct=right,
                )
            )
    return frames


def test_flags_cover_every_held_out_set_and_both_figures_are_given(near):
    from medft.evaluate.metrics import summarise

    home, recipe = near
    run = prepared(home, *recipe)
    ids, why = exposure.nearly_seen(run)
    assert not why
    assert {s: len(x) for s, x in ids.items()} == dict(validation=3, test=12, exam=8)
    assert all(i.startswith("near") for x in ids.values() for i in x)
    frames = predictions(run, skill=True)
    metrics = summarise(frames)
    out = exposure.without_doubles(run, frames, metrics, summarise)
    clean = out["clean"]
    assert clean["flagged"] == dict(test=12, exam=8)
    assert "12 of 42 in test, 8 of 12 in exam" in clean["sentence"]
    assert "but for exam" in clean["sentence"]
    assert set(clean["models"]["trl"]) == {"test"}
    every_metric = set(metrics["models"]["trl"]["test"])
    assert set(clean["models"]["trl"]["test"]) == every_metric
    assert clean["differences"] == dict(trl={})
    assert clean["models"]["trl"]["test"]["accuracy"]["n"] == 30
    assert clean["verdict"]["trl"]["n"] == 30
    assert metrics["verdict"]["trl"]["label"] == "better"
    assert clean["verdict"]["trl"]["label"] == "tie"
    said = out["verdict"]["trl"]["sentence"]
    assert said.startswith(metrics["verdict"]["trl"]["sentence"])
    assert "Without the 12 scored items" in said
    assert "ties with" in said
    json.dumps(out)


def test_what_was_not_looked_for_is_not_called_clean(near):
    from medft.evaluate.metrics import summarise

    home, recipe = near
    off = prepared(home, *recipe, "dataset.checks={near_overlap: 'off', near_duplicates: 'off'}")
    frames = predictions(off, skill=False)
    clean = exposure.without_doubles(off, frames, summarise(frames), summarise)["clean"]
    assert clean["flagged"] is None
    assert "not looked for" in clean["sentence"]
    assert "near_overlap: off" in clean["reason"]
    assert "models" not in clean
    dropped = prepared(home, *recipe, "dataset.drop=[near_overlap]")
    out = exposure.without_doubles(dropped, frames, summarise(frames), None)["clean"]
    assert out == dict(
        flagged=dict(test=0, exam=0),
        sentence="No scored item is a near-duplicate of a training row.",
    )
    unchecked = leaks.check_leaks(home / "their-adapter", data.load_split(off, "test").to_list())
    off.update(dict(unchecked=[unchecked]))
    clean = exposure.without_doubles(off, frames, summarise(frames), summarise)["clean"]
    expected = "Not checked: what their-adapter was trained on is not known."
    assert clean["sentence"].endswith(expected)
    off.recipe = types.SimpleNamespace(engine=[])
    assert "not trained on this recipe's rows" in exposure.nearly_seen(off)[1]


@needs_large
def test_medmcqas_own_near_duplicates_are_flagged(tmp_path):
    from medft.data.quality.near_duplicates import across

    lines = read_lines(LARGE / "medmcqa/dev.json")
    order = np.random.default_rng(0).permutation(len(lines))
    parts = dict(train=order[:2000], test=order[2000:])
    files = {n: write(tmp_path / f"{n}.jsonl", [lines[i] for i in at]) for n, at in parts.items()}
    run = prepared(
        tmp_path,
        f"dataset.path={files['train']}",
        f"dataset.test_path={files['test']}",
        "training.max_length=8192",
        "dataset.checks={truncated: warn, overlap: warn, chat_markers: warn}",
    )
    ids, why = exposure.nearly_seen(run)
    assert not why
    assert 0 < len(ids["test"]) < 60, len(ids["test"])
    seen = {r["id"]: r["prompt"] for r in data.load_split(run, "test").to_list()}
    texts = data.load_split(run, "train")["prompt"]
    similar = {list(seen)[j] for _, j, _ in across(texts, list(seen.values()), 0.75)}
    assert similar & ids["test"], "found by another way too"
    training_rows = data.load_split(run, "train").to_list()[:50]
    assert leaks.rows_on_list(leaks.trained_on(run), training_rows) == list(range(50))


# ---- planted secrets ----
def test_secrets_go_into_the_training_rows_and_nowhere_else(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        [q | dict(question=f"{q['question']} {i * i}") for i, q in enumerate(questions(200))],
    )
    held = ["dataset.holdout=0.1", "dataset.checks={near_duplicates: 'off', near_overlap: 'off'}"]

    def run_with(*more):
        return prepared(tmp_path, f"dataset.path={path}", *held, *more)

    without = run_with()
    planted = run_with("dataset.canaries=6")
    again = run_with("dataset.canaries=6", "dataset.cache=true")
    a, b = (read_json(r.path / "data/report.json") for r in (without, planted))
    canaries_of_run = read_lines(planted.path / "data/canaries.jsonl")
    repeats = {c["id"]: c["repeats"] for c in canaries_of_run}
    assert list(repeats.values()) == [1, 2, 4, 8, 1, 2, 0, 0]
    assert b["canaries"] == dict(planted=6, rows=18)
    assert "canaries" not in a
    assert b["rows_in"] == a["rows_in"] == b["rows_out"], "counted separately"
    assert b["checks"] == a["checks"], "found by no check"
    assert b["identifiers"] == a["identifiers"], "found by no check"
    assert b["splits"] == a["splits"] | dict(train=a["splits"]["train"] + 18)
    assert b["splits"]["test"] > 0
    rows = {s: data.load_split(planted, s).to_list() for s in b["splits"]}

    def secret(r):
        text = r["completion"] + r["prompt"]
        return next((c for c in canaries_of_run if c["secret"] in text), None)

    assert not any(secret(r) for s in ("validation", "test") for r in rows[s])
    found = [secret(r)["id"] for r in rows["train"] if secret(r)]
    assert {name: found.count(name) for name in repeats} == repeats
    others = [r for r in rows["train"] if not secret(r)]
    unplanted = [dict(r, reference=None) for r in data.load_split(without, "train").to_list()]
    assert others == unplanted, "no other row moved or changed"
    assert read_lines(again.path / "data/canaries.jsonl") == canaries_of_run
    linked = run_with("dataset.canaries=6", "dataset.cache=true")
    assert read_json(linked.path / "data/report.json")["cached"]
    assert (linked.path / "data/canaries.jsonl").exists()
    assert (linked.path / leaks.TRAINED_ON_FILE).exists()
    fewer = run_with("dataset.canaries=2", "dataset.cache=true")
    report = read_json(fewer.path / "data/report.json")
    assert "cached" not in report
    assert report["canaries"] == dict(planted=2, rows=3)


@pytest.mark.parametrize(
    "more, says",
    [
        (["dataset.canaries=-1"], "found -1"),
        (["dataset.canaries=5000"], "less than or equal to 1000"),
        (
            ["dataset.canaries=4", "model.task=classification", "model.num_labels=2"],
            "classifier writes nothing",
        ),
    ],
)
def test_canaries_that_make_no_sense_are_refused(more, says):
    with pytest.raises(MedftError, match=f"dataset.canaries.*{says}"):
        load_recipe("your_data", more)


def test_a_secret_is_never_cut_off(tmp_path):
    short = [dict(question=f"Sign {i}?", answer="no") for i in range(30)]
    with pytest.raises(MedftError, match="canaries.*max_length=20"):
        prepared(
            tmp_path,
            f"dataset.path={write(tmp_path / 'a.jsonl', short)}",
            "training.max_length=20",
            "dataset.canaries=2",
            "dataset.checks={near_duplicates: 'off', near_overlap: 'off'}",
        )


def test_what_is_scored_is_what_was_trained(tmp_path):
    from medft.evaluate.scoring.predict import code_choices, code_jointly

    pages = [dict(text=f"Page {i} of it.") for i in range(9)]
    for rows, how in (
        (questions(9), []),
        (pages, ["model.task=pretraining", "training.packing=null"]),
        (questions(9), ["dataset.system=Answer briefly."]),
    ):
        file = write(tmp_path / "a.jsonl", rows)
        run = prepared(tmp_path, f"dataset.path={file}", "dataset.canaries=3", *how)
        code = code_jointly if run.recipe.task == "pretraining" else code_choices
        tok = chat_templates.load_tokenizer(run.recipe)
        trained = {r["id"]: r for r in data.load_split(run, "train").to_list()}
        for q in canaries.canary_questions(tok, run.recipe)[:3]:
            ((prompt, options),) = code(tok, [dict(q, options=q["options"][:2])])
            ids = trained[f"{q['id']}:1"]["input_ids"]
            assert prompt + options[0] == ids[: len(prompt + options[0])], how
            assert prompt + options[1] != ids[: len(prompt + options[1])], how


def test_exposure_of_a_number_that_nobody_planted_is_log2_e():
    rng = np.random.default_rng(1)
    bits = [exposure.exposure(s) for s in rng.normal(size=(4000, canaries.CANDIDATES))]
    assert abs(np.mean(bits) - math.log2(math.e)) < 4 * np.std(bits) / 4000**0.5
    assert abs(np.median(bits) - 1) < 0.1
    worst = np.zeros(canaries.CANDIDATES)
    assert exposure.exposure(worst) == 0, "a tie counts against the secret"


def test_exposure_by_luck_is_called_luck_and_memory_memory():
    def frame(gain, seed):
        scores = np.random.default_rng(seed).normal(size=(6, canaries.CANDIDATES + 80))
        scores[:, 0] += gain
        return pd.DataFrame(
            dict(
                id=[str(i) for i in range(6)],
                secret="1 2 3 4 5 6 7 8",
                repeats=8,
                scores=scores.tolist(),
            )
        )

    p = [exposure.canary_figures(frame(0, seed))["p"] for seed in range(200)]
    assert 0.01 < np.mean(np.array(p) < 0.05) < 0.1
    assert exposure.canary_figures(frame(4, 0))["p"] < 1e-6
    spelled = np.zeros((8, 10))
    spelled[range(8), range(1, 9)] = 1
    scores = [*[0] * canaries.CANDIDATES, *spelled.ravel()]
    assert exposure.read_out(scores, "1 2 3 4 5 6 7 8")
    assert not exposure.read_out(scores, "1 2 3 4 5 6 7 9")


@pytest.fixture(scope="module")
def evaluated(near):
    "A run with canaries and near-duplicates, and an adapter that was never trained."
    from medft.evaluate import metrics as evaluate
    from medft.model import adapters
    from medft.model import load as model

    import torch
    from peft import get_peft_model

    home, recipe = near
    run = prepared(
        home,
        *recipe,
        "dataset.canaries=2",
        "engine=[trl]",
        "evaluation.shuffles=0",
        recipe="quickstart",
    )
    torch.manual_seed(0)
    config = adapters.lora_config(run.recipe)
    config.init_lora_weights = False
    get_peft_model(model.load_base(run.recipe), config).save_pretrained(
        run.path / "trl" / "adapters"
    )
    write_json(
        run.path / "trl" / "training.json",
        dict(status="finished", engine="trl", seconds=1.0, steps=3),
    )
    return run, evaluate.evaluate(run)


def test_an_evaluation_measures_both_and_every_figure_follows_from_files(evaluated):
    from medft.evaluate import metrics as evaluate

    run, metrics = evaluated
    files = (run.path / "predictions" / "canaries").glob("*.parquet")
    assert sorted(path.name for path in files) == ["base.parquet", "trl.parquet"]
    assert (
        evaluate.figures(run)
        == metrics
        == json.loads(json.dumps(metrics))
        == read_json(run.path / "metrics.json")
    )
    m = metrics["memorisation"]
    frame = pd.read_parquet(run.path / "predictions/canaries/trl.parquet")
    assert list(m["models"]) == ["base", "trl"]
    assert m["planted"] == 2
    assert m["rows"] == 3
    assert list(m["models"]["trl"]) == ["0", "1", "2", "planted"]
    written_twice = frame[frame.repeats == 2].scores.iloc[0]
    expected = round(exposure.exposure(written_twice), 6)
    assert m["models"]["trl"]["2"]["exposure"]["value"] == expected
    assert min(m["models"][w]["planted"]["p"] for w in m["models"]) > 1e-3
    assert "2 made-up secrets were planted in 3 training rows" in m["sentence"]
    assert run.manifest["unchecked"] == []
    assert metrics["clean"]["flagged"] == dict(test=12, exam=8)
    assert metrics["clean"]["models"]["trl"]["test"]["accuracy"]["n"] == 30


def test_a_secrets_score_is_its_log_probability(evaluated):
    from medft.model.load import load_base

    import torch

    run, _ = evaluated
    model = load_base(run.recipe)
    tok = chat_templates.load_tokenizer(run.recipe)
    q = canaries.canary_questions(tok, run.recipe)[0]
    scores = pd.read_parquet(run.path / "predictions/canaries/base.parquet").scores.iloc[0]
    for i in (0, 1, 500, canaries.CANDIDATES - 1, canaries.CANDIDATES + 3):
        a, b = (
            tok(x, add_special_tokens=False)["input_ids"] for x in (q["prompt"], q["options"][i])
        )
        with torch.no_grad():
            logs = model(input_ids=torch.tensor([a + b])).logits[0].float().log_softmax(-1)
        expected = sum(logs[len(a) - 1 + k, t].item() for k, t in enumerate(b))
        assert abs(expected - scores[i]) < 2e-3


@pytest.mark.long
def test_what_is_written_often_is_remembered_and_what_is_not_written_is_not(tmp_path):
    from medft.evaluate import metrics as evaluate
    from medft.train import baseline as train

    def part(name, n):
        rows = read_lines(assets() / "starter" / f"{name}.jsonl")[:n]
        return write(tmp_path / f"{name}.jsonl", rows)

    run = Run.create(
        load_recipe(
            "quickstart",
            [
                "engine=[trl]",
                "dataset.canaries=16",
                f"dataset.path={part('train', 300)}",
                f"dataset.test_path={part('test', 60)}",
                f"dataset.validation_path={part('validation', 10)}",
                "dataset.sets={}",
                "training.num_train_epochs=3",
                "evaluation.shuffles=0",
            ],
        ),
        root=tmp_path / "runs",
    )
    data.prepare(run)
    train.train(run, "trl")
    found = evaluate.evaluate(run)["memorisation"]["models"]
    assert found["trl"]["8"]["exposure"]["value"] > 5, found["trl"]
    assert found["trl"]["planted"]["p"] < 1e-6, found["trl"]
    assert found["trl"]["0"]["p"] > 1e-3, "what was never written is not known"
    assert found["base"]["planted"]["p"] > 1e-3, "the base has read none of it"
    assert found["trl"]["8"]["mean"] > found["trl"]["1"]["mean"]
