"""Articles, question pages and patients: real folders, made-up ones, broken and hostile files."""

from medft.core.files import MedftError
from medft.data.reading import documents
from medft.data.reading.formats import READERS, Part

import csv
import gzip
import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import orjson
import pyarrow.parquet as pq
import pytest
from real_data import SMALL, on_real_rows

MEDQUAD = (
    '<Document id="{0}" source="NIH" url="u"><Focus>Gout</Focus><QAPairs><QAPair'
    ' pid="1"><Question qid="{0}-1" qtype="causes">Why ?</Question>'
    "<Answer>So.</Answer></QAPair></QAPairs></Document>"
)
ARTICLE = (
    "<article><front><journal-meta><journal-title>J</journal-title></journal-meta>"
    '<article-meta><article-id pub-id-type="doi">10.1/x.1</article-id>'
    "<title-group><article-title>T</article-title></title-group></article-meta>"
    "</front><body>{0}</body></article>"
)
LAUGHS = (
    "<!DOCTYPE a [<!ENTITY a0 'ha'>"
    + "".join(f"<!ENTITY a{i} '{f'&a{i - 1};' * 10}'>" for i in range(1, 10))
    + "]><Document>{0}</Document>"
)


def read(kind, path):
    return [r for _, r in READERS[kind](Part(path.name, path, kind))]


def error(kind, path):
    with pytest.raises(MedftError) as e:
        read(kind, path)
    assert "\n" not in str(e.value) and str(e.value).startswith(path.name), e.value
    return str(e.value)


# XML that is broken or means harm
BAD = {
    "laughs in text": (LAUGHS.format("&a9;"), "unsafe XML"),
    "laughs in an attribute": (
        LAUGHS.replace("<Document>", '<Document id="&a9;">').format(""),
        "unsafe XML",
    ),
    "quadratic": (
        "<!DOCTYPE a [<!ENTITY a '"
        + "x" * 100_000
        + "'>]><Document>"
        + "&a;" * 10_000
        + "</Document>",
        "XML",
    ),
    "few laughs": (
        "<!DOCTYPE a [<!ENTITY a 'ha'>]><Document>&a;</Document>",
        "declares XML entities",
    ),
    "external entity": (
        "<!DOCTYPE a [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><Document>&x;</Document>",
        "declares XML entities",
    ),
    "parameter entity": (
        "<!DOCTYPE a [<!ENTITY % x SYSTEM 'file:///etc/passwd'> %x;]><Document/>",
        "declares XML entities",
    ),
    "unused entity": (
        "<!DOCTYPE a [<!ENTITY x SYSTEM 'http://127.0.0.1:9/x'>]><Document/>",
        "declares XML entities",
    ),
    "unknown name": (
        "<!DOCTYPE a SYSTEM 'a.dtd'><Document>&nosuch;</Document>",
        "unknown entity &nosuch;",
    ),
    "undeclared": ("<Document>&nosuch;</Document>", "not defined"),
    "deep": ("<Document>" + "<a>" * 50_000 + "</a>" * 50_000 + "</Document>", "depth"),
    "cut": (MEDQUAD.format(7)[:150], ":1: broken"),
    "cut on line 3": ("<Document>\n<Focus>\nx", ":3: broken"),
    "two roots": ("<Document/><Document/>", "broken"),
    "Latin-1 unsaid": (
        '<?xml version="1.0" encoding="UTF-8"?><Document><Focus>\xfc</Focus></Document>'.encode(
            "latin-1"
        ),
        "encoding",
    ),
    "nonsense encoding": ('<?xml version="1.0" encoding="klingon"?><Document/>', "encoding"),
    "empty": ("", "broken"),
    "binary": (bytes(range(32)), "broken"),
    "unknown root": ("<recipe><b/></recipe>", "root element <recipe>"),
    "a feed": ('<rss version="2.0"/>', "root element <rss>"),
    "an article without front": ("<article><body/></article>", "not the usual form"),
    "a pair without question": (
        "<Document><QAPairs><QAPair/></QAPairs></Document>",
        "not the usual form",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_xml_is_one_line_that_names_the_file(tmp_path, name):
    raw, expected = BAD[name]
    folder = tmp_path / "xml"
    folder.mkdir()
    (folder / "a good one.xml").write_text(MEDQUAD.format(1))
    (folder / "bad.xml").write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    said = error("xml", folder)
    assert said.startswith("xml/bad.xml") and expected in said and len(said) < 400


def test_nothing_is_fetched_for_a_doctype_or_an_include(tmp_path):
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0.1)  # a connection would wait in its queue
    at = f"http://127.0.0.1:{server.getsockname()[1]}"
    (tmp_path / "secret.txt").write_text("SECRET")
    (tmp_path / "own.dtd").write_text('<!ENTITY alpha "SECRET">')
    for i, doctype in enumerate(
        (
            f'<!DOCTYPE article SYSTEM "{at}/a.dtd">',
            f'<!DOCTYPE article PUBLIC "-//X" "{at}/b.dtd">',
            f'<!DOCTYPE article SYSTEM "{tmp_path}/own.dtd">',
        )
    ):
        include = (
            '<p>&alpha; <x:include xmlns:x="http://www.w3.org/2001/XInclude"'
            f' href="{tmp_path}/secret.txt" parse="text"/></p>'
        )
        text = f"{doctype}\n" + ARTICLE.format(include)
        (tmp_path / f"{i}.xml").write_text(text)
        [row] = read("xml", tmp_path / f"{i}.xml")
        assert row["text"] == "T\n\nα"
    with pytest.raises(TimeoutError):
        server.accept()
    server.close()


def test_gzip_utf16_comments_and_hidden_files(tmp_path):
    (tmp_path / "a.xml.gz").write_bytes(gzip.compress(MEDQUAD.format(1).encode()))
    (tmp_path / "b.XML").write_bytes(
        (
            '<?xml version="1.0" encoding="UTF-16"?>'
            + MEDQUAD.format(2).replace("So.", "S<!-- not this --><?nor this?>ö.")
        ).encode("utf-16")
    )
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/c.xml").write_text(MEDQUAD.format(3))
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX/._c.xml").write_bytes(b"\0\5")
    (tmp_path / "notes.txt").write_text("x")
    rows = read("xml", tmp_path)
    assert [(r["_file"], r["answer"]) for r in rows] == [
        ("a.xml.gz", "So."),
        ("b.XML", "Sö."),
        ("deep/c.xml", "So."),
    ]
    assert read("xml", tmp_path / "deep/c.xml")[0]["_file"] == "c.xml"
    (tmp_path / "cut.xml.gz").write_bytes(gzip.compress(MEDQUAD.format(1).encode())[:60])
    assert "cut.xml.gz" in error("xml", tmp_path)


def test_no_document_and_too_large_a_one(tmp_path, monkeypatch):
    folder = tmp_path / "empty"
    folder.mkdir()
    for kind in ("xml", "fhir"):
        assert "no ." in error(kind, folder)
    (tmp_path / "big.xml.gz").write_bytes(gzip.compress(b"<a>" + b" " * 3_000_000 + b"</a>"))
    with pytest.raises(MedftError, match="big.xml.gz: larger than 1,000,000 bytes"):
        documents.read_document(Part("big.xml.gz", tmp_path / "big.xml.gz", "xml"), limit=1_000_000)


def test_empty_question_pages_give_no_row_and_empty_answers_do(tmp_path):
    (tmp_path / "a.xml").write_text("<Document id='1'><QAPairs/></Document>")
    (tmp_path / "b.xml").write_text(MEDQUAD.format(1).replace("So.", " \n "))
    rows = read("xml", tmp_path)
    assert len(rows) == 1 and rows[0]["answer"] is None and rows[0]["question"] == "Why ?"


# running text
CASES = {
    "inline marks": ("<p>H<sub>2</sub>O <italic>in vitro</italic></p>", "H2O in vitro"),
    "paragraph in a list": (
        (
            "<p>Two:<list><list-item><p>a</p></list-item><list-item><p>b</p></list-item>"
            "</list>then</p>"
        ),
        "Two:\n\n- a\n- b\n\nthen",
    ),
    "figure between": ("<p>one<fig><caption><p>x</p></caption></fig> two</p>", "one two"),
    "display formula": (
        (
            "<p>As<disp-formula><m:math xmlns:m='urn:m'><m:mi>x</m:mi></m:math>"
            "</disp-formula>shows.</p>"
        ),
        "Asshows.",
    ),
    "short formula": (
        (
            "<p>rate <inline-formula><m:math xmlns:m='urn:m'><m:mi>k</m:mi><m:mo>+</m:mo>"
            "</m:math></inline-formula> rises</p>"
        ),
        "rate k+ rises",
    ),
    "long formula": (
        (
            "<p>rate <inline-formula><m:math xmlns:m='urn:m'><m:mi>k = a + b + c + d + e +"
            " f</m:mi></m:math></inline-formula> rises</p>"
        ),
        "rate rises",
    ),
    "empty section": (
        (
            "<sec><title>Supporting Information</title><supplementary-material><p>S1</p>"
            "</supplementary-material></sec><sec><title>End</title><p>x</p></sec>"
        ),
        "End\n\nx",
    ),
    "nested empty sections": (
        "<sec><title>A</title><sec><title>B</title><fig/></sec></sec><p>x</p>",
        "x",
    ),
    "brackets": ("<p>Cells (<xref/>; <xref/>) and [1] (2).</p>", "Cells and [1] (2)."),
    "a lone dash": (
        "<list><list-item><fig/></list-item><list-item><p>b</p></list-item></list>",
        "- b",
    ),
    "Namespace": ("<x:p xmlns:x='urn:x'>a</x:p>", "a"),
    "white space": ("<p>\n  a \t\n b\u00a0c </p>", "a b c"),
}


@pytest.mark.parametrize("name", CASES)
def test_running_text(name):
    body, expected = CASES[name]
    [row] = documents.from_jats(documents.parse_xml(ARTICLE.format(body).encode(), "x"))
    assert row["text"] == f"T\n\n{expected}"


def test_an_article_with_everything_at_another_place():
    raw = """<article xmlns="https://jats.nlm.nih.gov/ns/archiving/1.3/"
    xmlns:xlink="http://www.w3.org/1999/xlink"
    xmlns:ali="http://www.niso.org/schemas/ali/1.0/"><front>
    <journal-meta><journal-id journal-id-type="nlm-ta">J Ex</journal-id></journal-meta>
    <article-meta><article-id pub-id-type="pmc">PMC7</article-id>
    <title-group><article-title>On <italic>E. coli</italic><xref>*</xref></article-title></title-group><permissions><license><ali:license_ref>https://creativecommons.org/licenses/by-nc/4.0/</ali:license_ref></license></permissions>
    <abstract abstract-type="graphical"><p>picture</p></abstract>
    <abstract><title>Summary</title><p>Short.</p></abstract></article-meta></front>
    <body><p>Long.</p></body><back><ack><p>Thanks</p></ack></back><sub-article><body><p>Review</p></body></sub-article></article>"""
    [row] = documents.from_jats(documents.parse_xml(raw.encode(), "x"))
    assert row["text"] == "On E. coli\n\nSummary\n\nShort.\n\nLong." and (
        row["id"],
        row["journal"],
        row["license"],
    ) == ("PMC7", "J Ex", "CC BY-NC 4.0")


# FHIR
PATIENT = {
    "resourceType": "Patient",
    "id": "p",
    "name": [
        {"use": "maiden", "family": "Old1"},
        {"use": "official", "family": "New2", "given": ["Ann3", "Bea"]},
    ],
    "birthDate": "1990-01-02",
    "gender": "female",
    "address": [{"line": ["1 St"], "postalCode": "00501"}],
    "maritalStatus": {"coding": [{"code": "UNK"}]},
    "extension": [
        {
            "url": "http://hl7.org/fhir/us/core/StructureDefinition/us-core-race",
            "extension": [{"url": "ombCategory", "valueCoding": {"code": "2028-9"}}],
        }
    ],
}


def bundle(path, *resources, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        orjson.dumps(
            {
                "resourceType": "Bundle",
                "type": "collection",
                "entry": [{"fullUrl": f"urn:uuid:{r.get('id')}", "resource": r} for r in resources],
            }
            | more
        )
    )


def test_two_patients_in_one_bundle_keep_their_own_events(tmp_path):
    def condition(who, text, **kw):
        return {
            "resourceType": "Condition",
            "id": text,
            "subject": {"reference": who},
            "code": {"text": text},
            "onsetDateTime": "2020-05-06T10:00:00-05:00",
        } | kw

    bundle(
        tmp_path / "two.json",
        PATIENT,
        PATIENT | {"id": "q"},
        condition("Patient/p", "Gout"),
        condition("urn:uuid:q", "Flu", abatementDateTime="2020-06-01"),
        condition(
            "Patient/p", "Wrong", verificationStatus={"coding": [{"code": "entered-in-error"}]}
        ),
        {"resourceType": "Medication", "id": "m", "code": {"coding": [{"display": "Aspirin"}]}},
        {
            "resourceType": "MedicationRequest",
            "id": "r",
            "subject": {"reference": "Patient/q"},
            "medicationReference": {"reference": "urn:uuid:m"},
            "authoredOn": "2020-05-07",
        },
        {
            "resourceType": "Immunization",
            "id": "i",
            "status": "not-done",
            "patient": {"reference": "Patient/q"},
            "vaccineCode": {"text": "Td"},
        },
    )
    p, q = read("fhir", tmp_path)
    assert (
        p["conditions"] == [["2020-05-06", "Gout"]]
        and q["conditions"] == [["2020-05-06", "Flu"]]
        and q["medications"] == [["2020-05-07", "Aspirin"]]
        and not q["immunizations"]
    )
    assert (p["first"], p["last"], p["maiden"], p["race"], p["marital"], p["zip"], p["sex"]) == (
        "Ann3 Bea",
        "New2",
        "Old1",
        "asian",
        "",
        "00501",
        "F",
    )


def test_a_patient_with_next_to_nothing_still_gives_a_row(tmp_path):
    bundle(tmp_path / "bare.json", {"resourceType": "Patient", "id": "p"})
    [row] = read("fhir", tmp_path)
    assert row["birth_date"] == row["last"] == "" and documents.patient_summary(row) == "Visits: 0"


FHIR_BAD = {
    "half.json": (b'{"resourceType": "Bundle", "entry": [', ":1: broken JSON"),
    "list.json": (b"[1]", "'list'"),
    "patient.json": (orjson.dumps(PATIENT), "'Patient'"),
    "latin.json": ('{"resourceType": "Bundle", "x": "\xfc"}'.encode("latin-1"), "broken JSON"),
    "deep.json": (b"[" * 100_000, "broken JSON"),
    "entry.json": (b'{"resourceType": "Bundle", "entry": [{"resource": "text"}]}', "FHIR R4"),
    "none.json": (b'{"resourceType": "Bundle"}', "no bundle holds a Patient"),
    "name.json": (
        (
            b'{"resourceType": "Bundle", "entry": [{"resource": {"resourceType": "Patient",'
            b' "name": "Ann"}}]}'
        ),
        "FHIR R4",
    ),
}


@pytest.mark.parametrize("name", FHIR_BAD)
def test_a_bad_bundle_is_one_line(tmp_path, name):
    raw, expected = FHIR_BAD[name]
    folder = tmp_path / "fhir"
    folder.mkdir()
    (folder / name).write_bytes(raw)
    said = error("fhir", folder)
    assert expected in said and (name in said or name == "none.json")


# Synthea
def synthea(folder, **tables):
    folder.mkdir(exist_ok=True)
    base = dict(
        patients="Id,BIRTHDATE,FIRST,LAST,ZIP\np1,1950-02-01,Zoë9,Öz10,00501\n",
        encounters=(
            "Id,START,PATIENT,ENCOUNTERCLASS,DESCRIPTION\ne1,2020-03-01T08:00:00Z,p1,"
            "wellness,Check\n"
        ),
        conditions="START,STOP,PATIENT,ENCOUNTER,DESCRIPTION\n",
        medications="START,STOP,PATIENT,ENCOUNTER,DESCRIPTION\n",
        immunizations="DATE,PATIENT,ENCOUNTER,DESCRIPTION\n",
    )
    for name, text in (base | tables).items():
        if text is not None:
            (folder / f"{name}.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def test_versions_of_the_tables(tmp_path):
    [row] = read(
        "synthea",
        synthea(
            tmp_path / "a",
            patients=(
                "\ufeffFIPS,LAST,Id,INCOME,BIRTHDATE,FIRST,ZIP\n,Öz10,p1,5,1950-02-01,Zoë9,00501\n"
            ),
            allergies="START,STOP\n",
            medications=None,
            conditions=(
                "SYSTEM,START,STOP,PATIENT,ENCOUNTER,DESCRIPTION\nS,2020-03-01,,p1,e1,Gout\nS,"
                "2020-03-01,,other,e9,Flu\n"
            ),
        ),
    )
    assert (row["zip"], row["last"], row["conditions"], row["medications"]) == (
        "00501",
        "Öz10",
        [["2020-03-01", "Gout"]],
        [],
    )
    lower = {
        n: t.replace(t.split("\n")[0], t.split("\n")[0].lower())
        for n, t in dict(
            patients="Id,BIRTHDATE,FIRST,LAST\np1,1950-02-01,A,B\n",
            encounters="Id,START,PATIENT,ENCOUNTERCLASS,DESCRIPTION\ne,2020-01-01,p1,w,C\n",
        ).items()
    }
    assert read("synthea", synthea(tmp_path / "b", **lower))[0]["encounters"] == [
        ["e", "2020-01-01", "w", "C"]
    ]


SYNTHEA_BAD = {
    "shift": (
        dict(
            conditions="START,STOP,PATIENT,ENCOUNTER,DESCRIPTION\n2020-01-01,,p1,e1,Gout, acute\n"
        ),
        "conditions.csv:2",
    ),
    "column": (
        dict(conditions="START,STOP,PERSON,ENCOUNTER,DESCRIPTION\n2020-01-01,,p1,e1,Gout\n"),
        "no column PATIENT",
    ),
    "latin": (
        dict(patients="Id,BIRTHDATE,FIRST,LAST\np,1950-01-01,Zo\xeb,B\n".encode("latin-1")),
        "patients.csv",
    ),
    "no patient": (dict(patients="Id,BIRTHDATE,FIRST,LAST\n"), "no patient"),
    "empty": (dict(patients=""), "patients.csv"),
    "other table": (dict(patients="name,age\nx,1\n"), "no column ID"),
}


@pytest.mark.parametrize("name", SYNTHEA_BAD)
def test_a_bad_table_is_one_line(tmp_path, name):
    tables, expected = SYNTHEA_BAD[name]
    assert expected in error("synthea", synthea(tmp_path / "csv", **tables))


def test_rows_do_not_depend_on_the_order_of_the_tables(tmp_path):
    head, *lines = (
        "START,STOP,PATIENT,ENCOUNTER,DESCRIPTION\n2020-01-01,,p1,e1,B\n2020-01-01,,p1,"
        "e1,A\n2019-01-01,,p1,e1,C"
    ).split("\n")
    a, b = (
        read("synthea", synthea(tmp_path / n, conditions="\n".join([head, *x]) + "\n"))
        for n, x in (("a", lines), ("b", lines[::-1]))
    )
    assert a == b and [t for _, t in a[0]["conditions"]] == ["C", "A", "B"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_memory_does_not_grow_with_the_tables(tmp_path):
    "Twenty times the events in two processes: the peaks differ by less than the tables' size."

    def peak(n):
        folder = synthea(
            tmp_path / str(n),
            patients="Id,BIRTHDATE,FIRST,LAST\n"
            + "".join(f"p{i},1950-02-01,A,B\n" for i in range(n // 50)),
            conditions="START,STOP,PATIENT,ENCOUNTER,DESCRIPTION\n"
            + "".join(f"2020-01-01,,p{i % (n // 50)},e{i},{'x' * 80}{i % 40}\n" for i in range(n)),
        )
        code = (
            rf"import re; from pathlib import Path; from medft.data.reading.documents import *;"
            rf" from medft.data.reading.formats import Part; print(sum(1 for _ in"
            rf" read_synthea(Part('s', Path({str(folder)!r}), 'synthea'))),"
            rf" re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1])"
        )
        rows, kb = map(
            int,
            subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            ).stdout.split(),
        )
        assert rows == n // 50
        return kb // 1024

    few, many = peak(10_000), peak(200_000)
    assert many - few < 20, (
        few,
        many,
    )  # the larger table is 24 MB; held as Python rows it would be some 80 MB


# text
def test_record_text_leaves_out_what_is_empty_and_never_depends_on_key_order():
    r = dict(
        zip="00501",
        state="",
        city="Ames",
        first="A",
        last="",
        ssn=None,
        visits=3,
        conditions=[["2020-01-01", "Gout  acute"]],
        medications=[],
    )
    assert (
        documents.record_text(r)
        == documents.record_text(dict(reversed(r.items())))
        == "Name: A\nAddress: Ames, 00501\nConditions: 2020-01-01 Gout, acute\nVisits: 3"
    )
    assert documents.record_text({}) == ""


def test_a_record_is_short_however_long_the_life():
    history = [
        [k, f"20{i // 12:02d}-{i % 12 + 1:02d}-01", "x", f"{k} {i % 60}", f"e{i}"]
        for i in range(240)
        for k in documents.RECORD_KINDS
    ]
    row = dict.fromkeys(documents.PERSON, "") | dict(
        first="A1",
        history=history,
        encounters=[[f"e{i}", "2020-01-01", "w", "C"] for i in range(240)],
    )
    r = documents.patient_record(row)
    assert (
        len(r["conditions"]),
        len(r["medications"]),
        len(r["immunizations"]),
        r["visits"],
        r["first"],
    ) == (10, 10, 5, 240, "A")
    assert (
        r["conditions"][-1] == ["2019-12-01", "conditions 59"]
        and len(documents.patient_summary(row)) < 1500
    )


# the real folders
@on_real_rows
def test_real_medquad_files_equal_the_parquet(folder):
    table = pq.read_table(folder / "medquad/medquad.parquet").to_pylist()
    columns = list(table[0])
    known = {tuple(r[c] for c in columns) for r in table}
    rows = read("xml", folder / "medquad/xml")
    assert len(rows) > (30 if folder == SMALL else 1000) and all(
        tuple(r[c] for c in columns) in known for r in rows
    )
    assert len({(r["_file"], r["pid"]) for r in rows}) == len(rows)


@on_real_rows
@pytest.mark.parametrize(
    "texts, ready, recall, precision",
    [
        ("plos_jats_xml", "plos_articles", 0.95, 0.9),
        ("openstax_ap2e_cnxml", "openstax_ap2e", 0.98, 0.98),
    ],
)
def test_real_articles_read_like_the_ready_texts(folder, texts, ready, recall, precision):
    with gzip.open(folder / f"cpt_text/{ready}.jsonl.gz", "rt") as file:
        ready = {row["id"]: row for row in map(json.loads, file)}
    mine = {r["id"]: r for r in read("xml", folder / "cpt_text" / texts)}
    parts = {
        i: [
            [re.sub(r"\W+", "", p) for p in r["text"].split("\n") if p] for r in (mine[i], ready[i])
        ]
        for i in mine
    }

    def share(a, b):
        return sum(
            len(p) for i in parts for known in [set(parts[i][b])] for p in parts[i][a] if p in known
        ) / sum(len(p) for x in parts.values() for p in x[a])

    assert set(mine) <= set(ready) and share(1, 0) > recall and share(0, 1) > precision
    if texts.startswith("plos"):
        assert all(
            r["license"].startswith("CC0" if "CC0" in ready[i]["license"] else "CC BY")
            for i, r in mine.items()
        )


@on_real_rows
def test_real_patients(folder):
    for name in ("csv", "csv_full_record"):
        rows = read("synthea", folder / "synthea" / name)
        tables = {
            t: list(csv.DictReader((folder / f"synthea/{name}/{t}.csv").open(encoding="utf-8")))
            for t in ("patients", "encounters", *documents.RECORD_KINDS)
        }
        assert len(rows) == len(tables["patients"]) and sum(
            len(r["encounters"]) for r in rows
        ) == len({e["Id"] for e in tables["encounters"]})
        assert all(r["birth_date"] and r["last"] and r["ssn"].startswith("999") for r in rows)
        assert sum(bool(r["death_date"]) for r in rows) == sum(
            bool(p["DEATHDATE"]) for p in tables["patients"]
        )
    rows = read("fhir", folder / "synthea/fhir")
    assert len(rows) == (8 if folder == SMALL else 10) and all(
        r["birth_date"] and r["ssn"] and r["race"] and r["encounters"] for r in rows
    )

    def ids(r):
        return {e[0] for e in r["encounters"]}

    assert all(h[4] in ids(r) for r in rows for h in r["history"])


@on_real_rows
def test_real_record_pairs_have_a_text(folder):
    pairs = [
        json.loads(line) for line in (folder / "synthea/er_pairs.jsonl").open(encoding="utf-8")
    ]
    texts = [documents.pair_text(p) for p in pairs]
    assert (
        all(
            "Record A\nName: " in t and "\n\nRecord B\nName: " in t and "  " not in t for t in texts
        )
        and max(map(len, texts)) < 6000
    )
