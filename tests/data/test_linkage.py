"""Record pairs: split by patient, repeatable to the byte, and pushed only when asked."""

from medft.core import files
from medft.core.files import MedftError
from medft.data.prepare import linkage
from medft.data.prepare.linkage import CHANGES, MISMATCH_KINDS, baselines, prepare_pairs
from medft.data.reading.documents import pair_text

import csv
import json
import os
import random
import subprocess
import sys
from collections import Counter

import orjson
import pytest
from hub_server import HubServer
from real_data import LARGE, on_real_files

FIRST, LAST = (
    "Ana Ben Cléo Dora Emil Deborah Gus Samuel Ivo Jane".split(),
    "Abbott Brandt Castro Dietz Ékberg Fischer Gomez".split(),
)


def people(n, seed=0):
    rng = random.Random(seed)
    return [
        dict(
            Id=f"p{i:04d}",
            BIRTHDATE=f"{rng.randint(1940, 2008)}-{rng.randint(1, 12):02d}"
            f"-{rng.randint(1, 28):02d}",
            SSN=f"999-{rng.randint(10, 99)}-{rng.randint(1000, 9999)}",
            FIRST=rng.choice(FIRST) + "7",
            LAST=rng.choice(LAST) + "12",
            MAIDEN=rng.choice(LAST) + "3" if rng.random() < 0.3 else "",
            MARITAL=rng.choice("MS"),
            RACE="white",
            GENDER=rng.choice("MF"),
            ADDRESS=f"{i} Elm Street",
            CITY=rng.choice(["Ames", "Troy"]),
            STATE="Iowa",
            ZIP=f"{i:05d}",
        )
        for i in range(n)
    ]


def write(folder, people, seed=1, visits=9):
    rng, tables = random.Random(seed), dict(encounters=[], conditions=[], immunizations=[])
    for p in people:
        for j in range(rng.randint(1, visits)):
            e = dict(
                Id=f"{p['Id']}.{j}",
                START=f"{rng.randint(2009, 2020)}-0{rng.randint(1, 9)}-11T10:00:00Z",
                PATIENT=p["Id"],
                ENCOUNTERCLASS="wellness",
                DESCRIPTION="Check",
            )
            at = dict(PATIENT=p["Id"], ENCOUNTER=e["Id"])
            tables["encounters"].append(e)
            tables["immunizations"].append(
                dict(DATE=e["START"], DESCRIPTION="Influenza  seasonal", **at)
            )
            if j % 3 == 0:
                tables["conditions"].append(
                    dict(
                        START=e["START"][:10],
                        STOP="" if j else "2021-01-01",
                        DESCRIPTION=rng.choice(["Gout", "Anemia (disorder)"]),
                        **at,
                    )
                )
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (tables | dict(patients=people)).items():
        with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as f:
            w = csv.DictWriter(f, rows[0])
            w.writeheader()
            w.writerows(rows)
    return folder


def pairs(out):
    return {
        s: [
            json.loads(line)
            for line in (out / f"{s}.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        for s in ("train", "validation", "test")
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return (
        write(folder / "in", people(300)),
        folder / "out",
        prepare_pairs(folder / "in", folder / "out", license="apache-2.0"),
    )


def test_no_patient_crosses_and_labels_are_true(made):
    sides = {
        s: {i for x in rows for i in (x["left_patient"], x["right_patient"])}
        for s, rows in pairs(made[1]).items()
    }
    assert sum(map(len, sides.values())) == len(set().union(*sides.values())) > 280
    for s, rows in pairs(made[1]).items():
        assert [x["pair_id"] for x in rows] == [f"{s}-{i:05d}" for i in range(len(rows))] and len(
            {x["text"] for x in rows}
        ) == len(rows)
        for x in rows:
            assert x["label"] == (x["left_patient"] == x["right_patient"]) == (
                x["kind"] == "same"
            ) and x["text"] == pair_text(x)
            assert (
                set(x["left"]) == set(x["right"])
                and set(x["right_changes"]) <= set(CHANGES)
                and len(x["right_changes"]) <= 4
            )
    about = made[2]
    assert about["patients"] == dict(train=210, validation=45, test=45) and all(
        sum(c.values()) == len(pairs(made[1])[s]) for s, c in about["pairs"].items()
    )


def test_a_match_shares_no_visit_and_kinds_hold(made):
    born = {p["Id"]: p for p in people(300)}
    total = Counter(e["PATIENT"] for e in csv.DictReader((made[0] / "encounters.csv").open()))
    for x in (x for rows in pairs(made[1]).values() for x in rows):
        left, right, changed = x["left"], x["right"], set(x["right_changes"])
        if x["label"]:
            assert (
                left["visits"] + right["visits"] == total[x["left_patient"]]
                and left["visits"]
                and right["visits"]
            )
            untouched = {
                k for k in ("first", "last", "birth_date", "sex", "address", "zip") if not changed
            }
            assert all(left[k] == right[k] for k in untouched)
        if x["kind"] == "same_surname" and not changed & {
            "last_typo",
            "swap_names",
            "maiden",
            "upper",
        }:
            assert left["last"] == right["last"]
        if x["kind"] == "same_year_sex" and not changed & {
            "dob_format",
            "dob_digit",
            "dob_swap",
            "sex_missing",
        }:
            assert (left["birth_date"][:4], left["sex"]) == (right["birth_date"][:4], right["sex"])
        if x["kind"] == "household" and not changed & {"moved", "address_abbrev", "upper"}:
            assert left["address"] == right["address"]
        assert born[x["left_patient"]]["BIRTHDATE"] == left["birth_date"] and not any(
            c.isdigit() for c in left["first"] + left["last"]
        )


def test_changes_do_what_they_are_called(made):
    rows = [x for part in pairs(made[1]).values() for x in part if x["label"]]

    def alone(name):
        return [x for x in rows if x["right_changes"] == [name]]

    one = {name: alone(name) for name in CHANGES}
    assert sum(map(bool, one.values())) >= len(CHANGES) - 1
    fields = dict(
        first_typo="first",
        last_typo="last",
        initial="first",
        nickname="first",
        maiden="last",
        dob_format="birth_date",
        dob_digit="birth_date",
        dob_swap="birth_date",
        ssn_missing="ssn",
        ssn_digit="ssn",
        address_abbrev="address",
        zip_missing="zip",
        sex_missing="sex",
    )
    for name, field in fields.items():
        for x in one[name]:
            assert {
                k
                for k in ("first", "last", "birth_date", "sex", "address", "city", "state", "zip")
                if x["left"][k] != x["right"][k]
            } <= {field}, name
    assert all(x["right"]["sex"] == "" for x in one["sex_missing"]) and all(
        x["left"]["address"] != x["right"]["address"] for x in one["moved"]
    )


def test_errors_and_short_histories_do_not_tell_the_label(made):
    rows = [x for part in pairs(made[1]).values() for x in part]

    def mean(f, label):
        return sum(f(x) for x in rows if x["label"] == label) / sum(
            x["label"] == label for x in rows
        )

    for f in (
        lambda x: len(x["right_changes"]),
        lambda x: x["left"]["visits"],
        lambda x: not x["left"]["ssn"],
        lambda x: not x["right"]["ssn"],
    ):
        assert abs(mean(f, 0) - mean(f, 1)) < 0.25 * max(mean(f, 1), 0.2)

    def close(x):
        return abs(x["left"]["visits"] - x["right"]["visits"]) <= 1

    assert mean(close, 1) - mean(close, 0) < 0.25, "the number of visits gives matches away"
    early = [
        x
        for x in rows
        if any(
            d < x["right"]["birth_date"]
            for k in ("conditions", "immunizations")
            for d, _ in x["right"][k]
        )
        and not {"dob_digit", "dob_format", "dob_swap"} & set(x["right_changes"])
    ]
    assert not early


def test_neither_trivial_nor_impossible(made):
    found = baselines([x for part in pairs(made[1]).values() for x in part])
    assert found["all positive"]["recall"] == 1 and 0.45 < found["all positive"]["precision"] < 0.55
    assert all(
        0.2 < found[k]["recall"] < 0.75 and found[k]["precision"] > 0.95
        for k in ("equal SSN", "equal name and birth date", "either")
    )
    assert made[2]["baselines"] == found


def test_same_seed_same_bytes_whatever_the_hash_seed_the_place_and_the_order(made, tmp_path):
    code = (
        "import sys; from medft.data.prepare.linkage import prepare_pairs; import json; "
        "print(json.dumps(prepare_pairs(sys.argv[1], sys.argv[2], "
        "license='apache-2.0')['files']))"
    )
    for hash_seed in ("1", "4242"):
        out = subprocess.run(
            [sys.executable, "-c", code, str(made[0]), str(tmp_path / hash_seed)],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            cwd=tmp_path,
        )
        assert json.loads(out.stdout) == made[2]["files"]
    assert all((tmp_path / "1" / p.name).read_bytes() == p.read_bytes() for p in made[1].iterdir())
    turned = write(tmp_path / "turned", people(300))
    for name in ("patients", "encounters", "conditions"):
        head, *lines = (turned / f"{name}.csv").read_text(encoding="utf-8").splitlines()
        (turned / f"{name}.csv").write_text(
            "\n".join([head, *lines[::-1]]) + "\n", encoding="utf-8"
        )
    other = prepare_pairs(turned, tmp_path / "other", license="apache-2.0")["files"]
    assert {k: v for k, v in other.items() if k != "README.md"} == {
        k: v for k, v in made[2]["files"].items() if k != "README.md"
    }
    assert (
        prepare_pairs(made[0], tmp_path / "seed", seed=43)["files"]["train.jsonl"]
        != made[2]["files"]["train.jsonl"]
    )


@pytest.mark.parametrize("n", [8, 11, 23, 60])
@pytest.mark.parametrize("visits", [1, 9])
def test_few_patients(tmp_path, n, visits):
    about = prepare_pairs(write(tmp_path / "in", people(n), visits=visits), tmp_path / "out")
    assert (
        sum(about["patients"].values()) == n
        and all(v >= 2 for v in about["patients"].values())
        and all(sum(c.values()) for c in about["pairs"].values())
    )
    if visits == 1:
        assert not any(x["label"] for rows in pairs(tmp_path / "out").values() for x in rows), (
            "one visit cannot be two records"
        )


def test_too_few_or_unusable_patients(tmp_path):
    for n in (1, 7):
        with pytest.raises(MedftError, match=f"{n} usable patients .* at least 8"):
            prepare_pairs(write(tmp_path / str(n), people(n)), tmp_path / "out")
    bad = people(20)
    bad[0]["BIRTHDATE"] = ""
    bad[1]["BIRTHDATE"] = "1990-02-30"
    bad[2]["LAST"] = ""
    bad[3]["Id"] = bad[4]["Id"]
    bad[5]["Id"] = ""
    about = prepare_pairs(write(tmp_path / "bad", bad), tmp_path / "out")
    assert (
        about["left_out"] == {"no birth date": 2, "no name": 1, "id seen before": 1, "no id": 1}
        and sum(about["patients"].values()) == 15
    )
    assert "no birth date" in (tmp_path / "out/README.md").read_text()
    for folder, words in ((tmp_path / "none", "none"), (tmp_path / "jsons", "json")):
        if words == "json":
            folder.mkdir()
            (folder / "a.jsonl").write_text('{"a": 1}\n')
        with pytest.raises(MedftError, match=words) as e:
            prepare_pairs(folder, tmp_path / "no")
        assert "\n" not in str(e.value) and not (tmp_path / "no").exists()


def test_those_who_could_be_one_person_stay_together(tmp_path):
    twins = people(40)
    for i in range(0, 40, 4):
        twins[i + 1]["SSN"] = twins[i]["SSN"]
        twins[i + 2] |= {k: twins[i][k] for k in ("FIRST", "LAST", "BIRTHDATE")}
    prepare_pairs(write(tmp_path / "in", twins), tmp_path / "out", per_patient=4)
    side, group = {}, lambda i: int(i[1:]) // 4 if int(i[1:]) % 4 < 3 else i
    for s, rows in pairs(tmp_path / "out").items():
        for x in rows:
            assert x["label"] or group(x["left_patient"]) != group(x["right_patient"])
            for i in (x["left_patient"], x["right_patient"]):
                assert side.setdefault(group(i), s) == s


def test_more_patients_leave_the_matches_of_the_others(tmp_path):
    few, many = (
        dict(
            (x["left_patient"] + str(x["right"]["visits"]), x["left"]["visits"])
            for rows in pairs(p).values()
            for x in rows
            if x["label"]
        )
        for n in (60, 70)
        for p in [tmp_path / f"o{n}"]
        if prepare_pairs(write(tmp_path / f"i{n}", people(70)[:n]), p)
    )
    assert few.items() <= many.items()


def test_an_odd_split_is_refused_in_words(tmp_path):
    one = people(12)
    for p in one:
        p["SSN"] = "999-11-1111"
    with pytest.raises(MedftError, match="no pair for .* one person"):
        prepare_pairs(write(tmp_path / "in", one), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# the folder
def test_only_our_own_folder_is_replaced(made, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    first = prepare_pairs(made[0], out)  # empty: fine
    assert prepare_pairs(made[0], out, seed=1)["files"] != first["files"]  # ours: replaced
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    (out / "notes.txt").write_text("mine")
    with pytest.raises(MedftError, match="notes.txt"):
        prepare_pairs(made[0], out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before | {"notes.txt": b"mine"}
    for name, text in (("theirs", '{"made_by": "me"}'), ("broken", "{"), ("list", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pairs.json").write_text(text)
        with pytest.raises(MedftError, match="did not make"):
            prepare_pairs(made[0], tmp_path / name)
    with pytest.raises(MedftError, match="is a file"):
        prepare_pairs(made[0], out / "notes.txt")
    with pytest.raises(MedftError, match="did not make"):
        prepare_pairs(made[0], made[0])


def test_a_failure_leaves_the_old_folder_and_no_rubbish(made, tmp_path, monkeypatch):
    out = tmp_path / "out"
    prepare_pairs(made[0], out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    real, calls = files.atomic_write, []

    def full(path, data):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        real(path, data)

    monkeypatch.setattr(linkage, "atomic_write", full)
    with pytest.raises(OSError):
        prepare_pairs(made[0], out, seed=5)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before and [
        p.name for p in tmp_path.iterdir()
    ] == ["out"]


def test_the_card_says_what_is_there_and_the_folder_loads(made):
    from datasets import load_dataset
    from huggingface_hub import DatasetCard

    card = DatasetCard.load(made[1] / "README.md")
    assert card.data.license == "apache-2.0" and "synthetic" in card.data.tags
    text = card.text
    assert (
        "No real person" in text
        and "999" in text
        and "seed 42" in text
        and all(f"| {s} |" in text for s in ("train", "validation", "test"))
        and "equal SSN" in text
    )
    data = load_dataset(str(made[1]), cache_dir=str(made[1].parent / "cache"))
    assert {k: len(v) for k, v in data.items()} == {
        s: len(rows) for s, rows in pairs(made[1]).items()
    } and set(data["test"][0]["left"]) >= {"first", "ssn", "visits"}
    assert (
        "not stated" in (bare := linkage.data_card(made[2] | dict(license=None)))
        and "\nlicense:" not in bare
    )


def test_from_bundles(tmp_path):
    (tmp_path / "fhir").mkdir()
    for p in people(12):
        ref = {"reference": f"urn:uuid:{p['Id']}"}
        resources = [
            dict(
                resourceType="Patient",
                id=p["Id"],
                name=[dict(family=p["LAST"], given=[p["FIRST"]])],
                birthDate=p["BIRTHDATE"],
                gender="male",
            )
        ]
        resources += [
            dict(
                resourceType="Encounter",
                id=f"e{j}",
                subject=ref,
                period=dict(start=f"20{10 + j}-01-01"),
            )
            for j in range(4)
        ]
        (tmp_path / f"fhir/{p['Id']}.json").write_bytes(
            orjson.dumps(
                dict(
                    resourceType="Bundle",
                    entry=[dict(fullUrl=f"urn:uuid:{r['id']}", resource=r) for r in resources],
                )
            )
        )
    about = prepare_pairs(tmp_path / "fhir", tmp_path / "out")
    assert sum(about["patients"].values()) == 12 and any(
        x["label"] for x in pairs(tmp_path / "out")["test"]
    )


# the hub
PUSH = """import sys, json
from medft.core.files import MedftError
from medft.data.prepare.linkage import prepare_pairs
try: print(json.dumps(prepare_pairs(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))))
except MedftError as e: print(f"MedftError: {e}")"""


def run(hub, made, tmp_path, token="hf_owner", offline="0", **kw):
    done = subprocess.run(
        [sys.executable, "-c", PUSH, str(made[0]), str(tmp_path / "out"), json.dumps(kw)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
        env=os.environ | hub.env(tmp_path / "home", token=token) | {"HF_HUB_OFFLINE": offline},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_push_is_private_and_carries_the_folder(made, tmp_path):
    with HubServer() as hub:
        about = json.loads(
            run(
                hub, made, tmp_path, license="apache-2.0", push="owner/pairs", message="First pairs"
            )
        )
        repo = hub.repos["dataset", "owner/pairs"]
        files = repo.commits[repo.refs["main"]]
        assert (
            repo.private
            and about["commit"] == repo.refs["main"]
            and repo.messages[-1] == "First pairs"
            and not hub.unknown
        )
        assert {k: v for k, v in files.items() if k != ".gitattributes"} == {
            p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()
        }
        again = json.loads(
            run(hub, made, tmp_path, license="apache-2.0", push="owner/pairs", seed=3)
        )
        assert again["commit"] != about["commit"]


def test_nothing_leaves_without_being_asked(made, tmp_path):
    with HubServer() as hub:
        assert "MedftError" not in run(hub, made, tmp_path) and hub.requests == []


@pytest.mark.parametrize(
    "why, kw, words",
    [
        (
            "a reader's token",
            dict(token="hf_reader", push="owner/pairs"),
            "push to owner/pairs failed",
        ),
        ("no token", dict(token=None, push="owner/pairs"), "push to owner/pairs failed"),
        ("offline", dict(offline="1", push="owner/pairs"), "push to owner/pairs failed"),
        ("a bad name", dict(push="no spaces/in names/x"), "no name on the hub"),
        (
            "a public one without a licence",
            dict(push="owner/pairs", private=False),
            "needs a licence",
        ),
        ("one that is public", dict(push="owner/open"), "exists and is public"),
    ],
)
def test_a_push_that_fails_says_so_and_keeps_the_folder(made, tmp_path, why, kw, words):
    with HubServer() as hub:
        hub.add("owner/open", {"README.md": "x"})
        said = run(hub, made, tmp_path, **kw)
        assert (
            said.startswith("MedftError")
            and words in said
            and len(hub.repos["dataset", "owner/open"].commits) == 1
            and (tmp_path / "out/pairs.json").exists()
            == ("failed" in words or "public;" in words or "is public" in words)
        )
        assert not any(r.commits[r.refs["main"]].get("train.jsonl") for r in hub.repos.values())


@on_real_files(
    "name, patients",
    [("csv", 8), ("csv_full_record", 8), ("fhir", 8)],
    [("csv", 622), ("csv_full_record", 27), ("fhir", 10)],
)
def test_real_patients(tmp_path, folder, name, patients):
    about = prepare_pairs(folder / "synthea" / name, tmp_path / "out", license="apache-2.0")
    assert sum(about["patients"].values()) + sum(about["left_out"].values()) == patients and all(
        c.get("same") and sum(c.values()) > c["same"] for c in about["pairs"].values()
    )
    if name == "csv" and folder == LARGE:
        assert (
            set(about["right_changes"]) == set(CHANGES)
            and all(set(c) == {"same", *MISMATCH_KINDS} for c in about["pairs"].values())
            and 0.3 < about["baselines"]["either"]["recall"] < 0.75
        )
