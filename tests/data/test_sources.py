"""The formats and sources rooms on files of every kind, on broken ones, and on noise."""

from medft.core.files import MedftError
from medft.data.reading import formats, sources

import gzip
import io
import json
import os
import socket
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from real_data import on_real_files

ROWS = [
    {"question": f"Which dose of drug {i}?", "answer": '5 mg, "slowly"\nthen 10 mg é'}
    for i in range(20)
]
TABLE = pa.Table.from_pylist(ROWS)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(spec, **more):
    return [r for p in sources.source_parts(spec, **more) for _, r in formats.rows(p)]


def put(name, content):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


def jsonl(rows=ROWS):
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode()


def table_text(sep, rows=ROWS):
    import csv

    out = io.StringIO()
    w = csv.DictWriter(out, rows[0], delimiter=sep)
    w.writeheader()
    w.writerows(rows)
    return out.getvalue().encode()


def parquet(table=TABLE, **more):
    out = io.BytesIO()
    pq.write_table(table, out, **more)
    return out.getvalue()


def arrow(table=TABLE, new=pa.ipc.new_stream):
    out = io.BytesIO()
    with new(out, table.schema) as w:
        w.write_table(table, 7)
    return out.getvalue()


def zipped(members, **more):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        for name, content in members:
            z.writestr(name, content)
    return out.getvalue()


GOOD = {
    "a.jsonl": jsonl(),
    "lines.json": jsonl(),
    "bom.jsonl": b"\xef\xbb\xbf" + jsonl(),
    "crlf.jsonl": jsonl().replace(b"\n", b"\r\n\r\n"),
    "a.ndjson.gz": gzip.compress(jsonl()),
    "a.json": json.dumps(ROWS).encode(),
    "pretty.json": json.dumps(ROWS, indent=1).encode(),
    "data.json": json.dumps({"version": "1", "data": ROWS}).encode(),
    "a.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "array.jsonl": json.dumps(ROWS).encode(),
    "a.csv": table_text(","),
    "a.CSV": table_text(","),
    "bom.csv": b"\xef\xbb\xbf" + table_text(","),
    "a.tsv": table_text("\t"),
    "a.csv.gz": gzip.compress(table_text(",")),
    "two.jsonl.gz": gzip.compress(jsonl(ROWS[:9])) + gzip.compress(jsonl(ROWS[9:])),
    "a.parquet": parquet(),
    "groups.parquet": parquet(row_group_size=3),
    "s.arrow": arrow(),
    "f.arrow": arrow(new=pa.ipc.new_file),
    "a.zip": zipped([("x/a.jsonl", jsonl())]),
    "gz.zip": zipped([("a.csv.gz", gzip.compress(table_text(",")))]),
    "shards.zip": zipped([("0.jsonl", jsonl(ROWS[:9])), ("1.jsonl", jsonl(ROWS[9:]))]),
}


@pytest.mark.parametrize("name", GOOD)
def test_every_format_gives_the_same_rows(name):
    assert read(put(name, GOOD[name])) == ROWS


def test_keys_become_ids_and_a_lone_conversation_stays_whole():
    put("keyed.json", json.dumps({"101": {"QUESTION": "a"}, "102": {"QUESTION": "b"}}))
    assert read("keyed.json") == [
        {"QUESTION": "a", "_key": "101"},
        {"QUESTION": "b", "_key": "102"},
    ]
    chat = {"messages": [{"role": "user", "content": "a"}]}
    assert (
        read(put("chat.json", json.dumps(chat)))
        == read(put("chat.jsonl", json.dumps(chat)))
        == [chat]
    )
    assert read(put("one.json", json.dumps(ROWS[0], indent=2))) == ROWS[:1]


def test_rows_know_their_line():
    put("a.jsonl", '{"q": 1}\n\n{"q": 2}\n')
    put("a.csv", 'q,a\n"two\nlines",1\n\nx,2\n')
    assert [n for n, _ in formats.rows(sources.source_parts("a.jsonl")[0])] == [1, 3] and [
        n for n, _ in formats.rows(sources.source_parts("a.csv")[0])
    ] == [2, 5]


def test_cells_stay_text_and_values_stay_values():
    assert read(put("a.csv", "id,drug\n007,NA\n")) == [{"id": "007", "drug": "NA"}]
    row = dict(
        pubid=7,
        context=dict(contexts=["a", "b"], reasoning_free_pred=["y", "e", "s"]),
        final_decision="yes",
        score=None,
    )
    put("hub.parquet", parquet(pa.Table.from_pylist([row])))
    assert read("hub.parquet") == [row]


def test_class_names_of_the_hub_are_kept():
    info = json.dumps(
        {
            "info": {
                "features": {
                    "cop": {"names": ["a", "b", "c", "d"], "_type": "ClassLabel"},
                    "q": {"dtype": "string", "_type": "Value"},
                }
            }
        }
    )
    table = pa.table({"q": ["x"], "cop": [3]}).replace_schema_metadata({"huggingface": info})
    for name, content in {
        "a.parquet": parquet(table),
        "s.arrow": arrow(table),
        "f.arrow": arrow(table, pa.ipc.new_file),
    }.items():
        (part,) = sources.source_parts(put(name, content))
        assert formats.features(part) == {"cop": ["a", "b", "c", "d"]} and [
            r for _, r in formats.rows(part)
        ] == [{"q": "x", "cop": 3}]
    assert formats.features(sources.source_parts(put("a.jsonl", jsonl()))[0]) == {}


def test_saved_data_sets_with_their_splits():
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    features = Features(q=Value("string"), cop=ClassLabel(names=["a", "b"]))
    train, test = (
        Dataset.from_dict(dict(q=[n], cop=[1]), features=features) for n in ("train", "test")
    )
    DatasetDict(train=train, test=test).save_to_disk("both")
    train.save_to_disk("one")
    assert read("both") == read("one") == [dict(q="train", cop=1)] and read(
        "both", split="test"
    ) == [dict(q="test", cop=1)]
    (part,) = sources.source_parts("both")
    assert (
        formats.features(part) == {"cop": ["a", "b"]}
        and part.kind == "folder"
        and len(sources.digest(part)) == 64
    )
    with pytest.raises(MedftError, match="no split 'tset' .did you mean 'test'"):
        sources.source_parts("both", split="tset")
    shard = next(Path("one").glob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(MedftError, match="one/.*arrow.*cut off"):
        sources.source_parts("one")


def test_folders_are_recognised():
    put("synthea/csv/patients.csv", "Id\n1\n")
    put("synthea/csv/encounters.csv", "Id\n1\n")
    put("fhir/a.json", '{"resourceType" : "Bundle", "entry": []}')
    put("xml/1/a.xml", "<Document/>")
    put("corpus/corpus.json", "{}")
    put("text/a.txt", "A chapter.")
    put("text/b.txt", "Another.")
    put("mixed/a.jsonl", jsonl())
    put("mixed/LICENSE.txt", "MIT")
    put("mixed/.hidden.csv", "x")
    kinds = {
        name: [(p.kind, p.path.name) for p in sources.source_parts(name)]
        for name in ("synthea", "fhir", "xml", "corpus", "mixed", "fhir/a.json")
    }
    assert kinds == {
        "synthea": [("synthea", "csv")],
        "fhir": [("fhir", "fhir")],
        "xml": [("xml", "1")],
        "corpus": [("corpus", "corpus")],
        "mixed": [("jsonl", "a.jsonl")],
        "fhir/a.json": [("fhir", "a.json")],
    }
    assert read("text") == [dict(id="a.txt", text="A chapter."), dict(id="b.txt", text="Another.")]
    for name, kind in {"fhir": "fhir", "xml": "xml", "synthea": "synthea"}.items():
        put(
            f"{name}.zip",
            zipped(
                [
                    (p.relative_to(name).as_posix(), p.read_bytes())
                    for p in Path(name).rglob("*")
                    if p.is_file()
                ]
            ),
        )
        (part,) = sources.source_parts(f"{name}.zip")
        assert part.kind == kind and part.path.is_dir()


def test_splits_in_a_folder_never_mix():
    for s in ("train", "dev", "test"):
        put(f"data/exam-{s}.jsonl", json.dumps({"q": s}))
    with pytest.raises(MedftError, match="several splits .train, validation, test."):
        sources.source_parts("data")
    assert read("data", role="train") == [{"q": "train"}] and read("data", role="test") == [
        {"q": "test"}
    ]
    assert read("data", split="train") == [{"q": "train"}] and read(
        "data", split="validation"
    ) == read("data", split="dev") == [{"q": "dev"}]
    with pytest.raises(MedftError, match="no split 'extra'"):
        sources.source_parts("data", split="extra")
    assert len(read(["data/exam-train.jsonl", "data/exam-dev.jsonl"])) == 2


def test_patterns_lists_and_what_is_named_twice():
    for i in range(3):
        put(f"d/{i}.jsonl", json.dumps({"q": i}))
    assert (
        read("d/*.jsonl")
        == read(["d/0.jsonl", "d/1.jsonl", "d/2.jsonl"])
        == read("d")
        == read("**/*.jsonl")
        == read(str(Path("d").resolve() / "*.jsonl"))
    )
    assert [p.name for p in sources.source_parts("d")] == ["d/0.jsonl", "d/1.jsonl", "d/2.jsonl"]
    with pytest.raises(MedftError, match="named twice"):
        sources.source_parts(["d/*.jsonl", "d/1.jsonl"])
    put("[odd].jsonl", jsonl())
    assert read("[odd].jsonl") == ROWS  # a name that looks like a pattern is a name first


def test_digest_is_of_the_content():
    a, b = (sources.source_parts(put(n, jsonl()))[0] for n in ("a.jsonl", "b.jsonl"))
    assert (
        sources.digest(a)
        == sources.digest(b)
        != sources.digest(sources.source_parts(put("c.jsonl", jsonl(ROWS[:3])))[0])
    )


def test_an_archive_is_unpacked_once():
    put("a.zip", GOOD["a.zip"])
    first = sources.source_parts("a.zip")[0]
    stamp = first.path.stat().st_mtime_ns
    assert (
        sources.source_parts("a.zip")[0].path.stat().st_mtime_ns == stamp
        and first.name == "a.zip!a.jsonl"
        and stat.S_IMODE(Path("cache").stat().st_mode) == 0o700
    )
    assert not list(Path("cache").rglob(".part-*"))


TABLES = {
    "Excel's note": b"sep=,\nq,a\n1,2\n",
    "quoted": b'"sep=,"\r\nq,a\r\n1,2\r\n',
    "with a mark": b"\xef\xbb\xbfsep=;\nq;a\n1;2\n",
    "tab": b"SEP=\t\nq\ta\n1\t2\n",
    "written tab": b"Sep=\\t\nq\ta\n1\t2\n",
    "padded": b"sep=;;\nq;a\n1;2\n",
    "utf-16": "sep=;\r\nq;a\r\n1;2\r\n".encode("utf-16"),
    "blank lines": b"\n \nsep=|\n\nq|a\n1|2\n",
    "names none": b"sep=\nq;a\n1;2\n",
    "semicolons": b"q;a\n1;2\n",
    "tabs": b"q\ta\n1\t2\n",
    "bars": b"q|a\n1|2\n",
    "commas": b"q,a\n1,2\n",
    "both": b'q;a\n"1";"2"\n',
    "big endian": b"\xfe\xff" + "q,a\n1,2\n".encode("utf-16-be"),
    "utf-32": "q,a\n1,2\n".encode("utf-32"),
    "comments": b"# exported\n# by me, today, late\nq,a\n1,2\n",
    "comment like a header": b"# exported, 2024\nq,a\n1,2\n",
    "empty rows before": b",\n,\nq,a\n1,2\n",
    "separator at the end": b"q,a,\n1,2,\n",
    "only in rows": b"q,a\n1,2,,\n",
    "only in the header": b"q,a,,\n1,2\n",
}


@pytest.mark.parametrize("ending", ["csv", "tsv", "csv.gz"])
@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_read_whatever_separates_its_cells(name, ending):
    put(f"t.{ending}", gzip.compress(TABLES[name]) if ending.endswith("gz") else TABLES[name])
    assert read(f"t.{ending}") == [{"q": "1", "a": "2"}]


def test_lines_before_the_header_are_counted():
    put("t.csv", 'sep=;\n\n# ward 3\nq;a\n"two\nlines";1\nx;2\n')
    assert [n for n, _ in formats.rows(sources.source_parts("t.csv")[0])] == [5, 7]
    put("t.csv", "sep=;\nq;a\n1;2\n1;2;3\n")
    with pytest.raises(MedftError, match="t.csv:4: 3 cells where the header has 2"):
        read("t.csv")


def test_an_index_that_pandas_wrote_has_a_name():
    import pandas as pd

    df = pd.DataFrame({"q": ["x"], "a": ["y"]})
    df.to_csv("once.csv")
    pd.read_csv("once.csv").to_csv("twice.csv")
    assert read("once.csv") == [{"Unnamed: 0": "0", "q": "x", "a": "y"}] and read("twice.csv") == [
        {"Unnamed: 0.1": "0", "Unnamed: 0": "0", "q": "x", "a": "y"}
    ]


def test_texts_in_utf_16_and_tables_called_txt():
    for encoding in ("utf-16", "utf-32", "utf-8-sig"):
        for name, content in {
            "a.jsonl": jsonl(),
            "a.json": json.dumps(ROWS, indent=1).encode(),
            "a.txt": b"A chapter.",
        }.items():
            put(name, content.decode().encode(encoding))
        assert read("a.jsonl") == read("a.json") == ROWS and read("a.txt") == [
            dict(id="a.txt", text="A chapter.")
        ]
    assert (
        read(put("t.txt", "q\ta\n1\t2\n3\t4\n")) == [{"q": "1", "a": "2"}, {"q": "3", "a": "4"}]
        and len(read(put("p.txt", "A line,\tindented.\nAnother.\n"))) == 1
    )


MANY = jsonl() * 500
CUT = gzip.compress(MANY)
LINK = zipfile.ZipInfo("a.jsonl")
LINK.external_attr = (stat.S_IFLNK | 0o777) << 16


def crypted():
    raw = bytearray(zipped([("a.jsonl", jsonl())]))
    raw[6] |= 1
    raw[raw.rindex(b"PK\x01\x02") + 8] |= 1
    return bytes(raw)


def flipped(data, at, by=0xFF):
    data = bytearray(data)
    data[at] ^= by
    return bytes(data)


#       name: (content, what the message says)
BROKEN = {
    # JSON
    "half.jsonl": (b'{"q": 1}\n{"q": 2, "ans', ":2: the JSON breaks off"),
    "half.json": (b'[{"q": 1}, {"q"', ":1: the JSON breaks off"),
    "open.json": (b'{"a": {"q": 1}', ":1: the JSON breaks off"),
    "list.jsonl": (b'["a"]\n', "a row is an object, not a string"),
    "number.jsonl": (b'{"q": 1}\n7\n', ":2: a row is an object, not a number"),
    "null.jsonl": (b"null\n", ":1: a row is an object, not null"),
    "rows.json": (b'[{"q": 1}, ["x"]]', ":row 2: a row is an object, not an array"),
    "scalar.json": (b'"text"', "not a string"),
    "bool.json": (b"[true]", "not true or false"),
    "nan.jsonl": (b'{"q": 1}\n{"q": NaN}\n', ":2: NaN is not JSON; write null"),
    "inf.json": (b'[{"q": -Infinity}]', ":1: Inf"),
    "big.json": (b'[{"q": 1e999}]', "infinity"),
    "deep.json": (b"[" * 5000 + b"]" * 5000, "nested more than"),
    "deep.jsonl": (b'{"a":' * 5000 + b"1" + b"}" * 5000, "nested more than"),
    "quotes.jsonl": (b"{'q': 1}\n", ":1: not JSON"),
    "comma.json": (b'[{"q": 1},]', "trailing comma"),
    "tail.json": (b'[{"q": 1}] x', "not JSON"),
    "two.json": (b'{\n"q": 1}\n{\n"q": 2}\n', ":3: not JSON"),
    "surrogate.jsonl": (b'{"q": "\\ud800", "a": NaN}', ":1: not JSON"),
    "control.jsonl": (b'{"q": "a\x01b"}', ":1: not JSON: unexpected control"),
    "empty.json": (b"", "holds no row"),
    "blank.jsonl": (b"\n \n\n", "holds no row"),
    "none.json": (b"[]", "holds no row"),
    "lists.json": (b'{"rows": [{"q": 1}], "more": [{"q": 2}]}', "holds 2 lists"),
    "truth.json": (b'{"1": "yes", "2": "no"}', "maps ids to a string"),
    "pandas.json": (b'{"q": {"0": "a"}, "a": {"0": "b"}}', "orient="),
    # encodings
    "latin.jsonl": (
        '{"q": "a"}\n{"q": "Übelkeit"}'.encode("latin-1"),
        ":2: byte 8 of this line, 0xdc",
    ),
    "latin.json": ('[{"q":\n"é"}]'.encode("latin-1"), ":2: byte 2 of this line, 0xe9"),
    "word.jsonl": ('{"q": "a – b"}'.encode("cp1252"), "windows-1252"),
    "latin.csv": ("q,a\n1,2\né,b\n".encode("latin-1"), ":3: byte 1 of this line, 0xe9"),
    "late.csv": (b"q,a\n" + b"1,2\n" * 50_000 + b"\xff,b\n", ":50002: byte 1"),
    "cut16.csv": ("q,a\n1,2\n".encode("utf-16")[:-1], "declares utf-16"),
    "utf16.json": ('[{"q": 1}]'.encode("utf-16-le"), "iconv -f utf-16"),
    "utf32.jsonl": ('{"q": 1}'.encode("utf-32-le"), "NUL"),
    "latin.txt": ("é".encode("latin-1"), "not UTF-8"),
    # CSV
    "shift.csv": (b"q,a\n1,2\n1,2,3\n", ":3: 3 cells where the header has 2"),
    "short.csv": (b"q,a,b\n1,2\n", ":2: 2 cells where"),
    "open.csv": (b'q,a\n1,2\n"x,y\n3,4\n', ":3: a quote opened here is never closed"),
    "stray.csv": (b'q,a\n"x" y,2\n', ":2: "),
    "twice.csv": (b"q,a,q\n1,2,3\n", "two columns are called 'q'"),
    "noname.csv": (b"q,,a\n1,2,3\n", "column 2 has no name"),
    "semicolon.csv": (b"q;a\n1;2;3\n", "separated by ';'"),
    "title.csv": (
        b"Ward 3\nq,a\n1,2\n",
        (
            ":2: 2 cells where the header has 1; quote cells that hold a ','; if the"
            " header's line is a title"
        ),
    ),
    "sepwrong.csv": (b"sep=;\nq,a\n1,2\n", "separated by ','"),
    "trailing.csv": (b"q,a,\n1,2,3\n", "column 3 has no name, and this line has '3'"),
    "arrays.jsonl": (b'["q", "a"]\n["1", "2"]\n', ":1: a row is an object, not an array"),
    "a.pdf.txt": (b"%PDF-1.4", "is a PDF file"),
    "sheet.csv": (b"\xd0\xcf\x11\xe0\xa1", "old Excel"),
    "tabs.csv": (b"q\ta\n1\n", "separated by '\\t'"),
    "commas.tsv": (b"q,a\n1\n", "separated by ','"),
    "nul.csv": (b"q,a\n" + b"1,2\n" * 50 + b"1,\0\n", ":52: a NUL byte"),
    "empty.csv": (b"", "holds no row"),
    "head.csv": (b"q,a\n", "holds no row"),
    # not what the name says
    "page.json": (b"<!DOCTYPE html><html>", "web page"),
    "pointer.parquet": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
    "zip.csv": (GOOD["a.zip"], "is a zip file"),
    "gz.jsonl": (CUT, "is a gzip file"),
    "parquet.csv": (parquet(), "is a Parquet file"),
    "arrow.json": (arrow(new=pa.ipc.new_file), "is an Arrow file"),
    "a.docx": (b"PK", "don't know how to read '.docx'"),
    "noending": (b"x", "a file without an ending"),
    "a.parquet.gz": (b"x", "don't know"),
    "a.pkl": (b"x", "don't know how to read '.pkl'"),
    "line\nbreak.jsonl": (b"{", "line break.jsonl:1: the JSON breaks off"),
    # gzip
    "cut.jsonl.gz": (CUT[: len(CUT) // 2], "cut off"),
    "plain.csv.gz": (b"q,a\n1,2\n", "no whole gzip"),
    "crc.jsonl.gz": (flipped(CUT, -6), "no whole gzip"),
    "cut.json.gz": (gzip.compress(json.dumps(ROWS).encode())[:60], "cut off"),
    "empty.jsonl.gz": (b"", "holds no row"),
    # Parquet and Arrow
    "cut.parquet": (parquet()[:-20], "cannot be read as parquet"),
    "text.parquet": (b"q,a\n1,2\n", "cannot be read as parquet"),
    "empty.parquet": (b"", "cannot be read as parquet"),
    "norows.parquet": (parquet(TABLE[:0]), "holds no row"),
    "hole.parquet": (
        parquet(compression="none").replace(
            b"Which dose", b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"
        ),
        "cannot be read as parquet",
    ),
    "cut.arrow": (arrow()[:-8], "cut off"),
    "half.arrow": (arrow()[:200], "cut off"),
    "text.arrow": (b"hello world, no arrow", "cut off"),
    "file.arrow": (arrow(new=pa.ipc.new_file)[:-9], "cannot be read as arrow"),
    "empty.arrow": (b"", "cut off"),
    "utf8.arrow": (arrow().replace(b"Which", b"\xff\xfe\xfd\xfc\xfb"), "cannot be read as arrow"),
    # zip
    "up.zip": (zipped([("../../a.jsonl", "x")]), "'../../a.jsonl' points outside"),
    "root.zip": (zipped([("/etc/a.jsonl", "x")]), "points outside"),
    "win.zip": (zipped([("C:\\a.jsonl", "x")]), "points outside"),
    "back.zip": (zipped([("..\\a.jsonl", "x")]), "points outside"),
    "link.zip": (zipped([(LINK, "/etc/passwd")]), "is a link"),
    "crypt.zip": (crypted(), "is encrypted"),
    "none.zip": (zipped([]), "an empty archive"),
    "text.zip": (b"text", "not a whole zip"),
    "cut.zip": (GOOD["shards.zip"][:-30], "not a whole zip"),
    "crc.zip": (flipped(GOOD["a.zip"], 60), "not a whole zip"),
    "nested.zip": (zipped([("b.zip", GOOD["a.zip"])]), "is an archive itself"),
    "strange.zip": (zipped([("a.docx", "x")]), "no file in this folder"),
    "mixed.zip": (zipped([("a.csv", "x"), ("a.jsonl", "x")]), "several kinds"),
    "bomb.zip": (zipped([("a.jsonl", b"\0" * (formats.FREE_BYTES + 1))]), "a bomb"),
    "inside.zip": (
        zipped([("a.jsonl", b'{"q": 1}\n{"q')]),
        "inside.zip!a.jsonl:2: the JSON breaks off",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_line_that_names_it(name):
    content, says = BROKEN[name]
    with pytest.raises(MedftError) as e:
        read(put(name, content))
    said = str(e.value)
    assert (
        says in said
        and said.isprintable()
        and (name in said or "break" in name)
        and len(said) < 500
    ), said
    assert not list(Path("cache").rglob(".part-*")), "a half-unpacked archive was left behind"


@pytest.mark.parametrize(
    "half", ["\\ud83d", "\\ude00", "\\ud83d\\u0041", "\\ud83d\\ud83d", "x\\ud83d\\n"]
)
def test_half_a_surrogate_does_not_cost_the_file(half):
    bad = f'{{"q": "{half}"}}'
    row = json.loads(bad)
    assert read(put("a.jsonl", '{"q": 1}\n' + bad + '\n{"q": 2}\n')) == [
        {"q": 1},
        row,
        {"q": 2},
    ] and read(put("b.jsonl", bad + "\n" + bad)) == [row, row]
    assert read(put("c.json", bad + "\n" + '{"q": 2}\n')) == [row, {"q": 2}] and read(
        put("d.json", "[" + bad + "]")
    ) == [row]
    with pytest.raises(MedftError, match=":2: byte 8"):
        read(put("e.jsonl", b'{"q": 1}\n{"q": "\xff\\ud83d"}'))


@pytest.mark.parametrize(
    "members, split, says, never",
    [
        (["a.csv", "b.jsonl"], None, "unpack it and name one", "*"),
        (["train.csv", "train.jsonl"], "train", "unpack it and name one", "dataset.split"),
        (["x/a.csv.gz", "x/b.jsonl"], None, "unpack it", "*"),
    ],
)
def test_several_kinds_and_the_way_out(members, split, says, never):
    put("both.zip", zipped([(m, "x") for m in members]))
    [put(f"both/{m}", "x") for m in members]
    put("both/more/readme.md", "x")
    with pytest.raises(MedftError) as e:
        sources.source_parts("both.zip", split=split)
    assert says in str(e.value) and never not in str(e.value)
    with pytest.raises(MedftError) as e:
        sources.source_parts("both", split=split)
    advice = str(e.value).rpartition("name one: ")[2]
    assert "unpack" not in str(e.value) and sources.glob.glob(advice), advice


def test_a_split_may_be_of_a_kind_of_its_own():
    put("both/train.csv", "q\n1\n2\n")
    put("both/test.jsonl", '{"q": 3}')
    put("both.zip", zipped([("train.csv", "q\n1\n2\n"), ("test.jsonl", '{"q": 3}')]))
    for spec in ("both", "both.zip"):
        assert read(spec, role="train") == read(spec, split="train") == [
            {"q": "1"},
            {"q": "2"},
        ] and read(spec, split="test") == [{"q": 3}]


@pytest.mark.parametrize(
    "content", [flipped(GOOD["a.zip"], 60), GOOD["shards.zip"][:-30], b"text", b""]
)
def test_a_broken_zip_is_not_called_a_gzip_file(content):
    with pytest.raises(MedftError, match="not a whole zip archive .*fetch it again") as e:
        sources.source_parts(put("a.zip", content))
    assert "gzip" not in str(e.value)


def test_a_gzip_bomb_is_refused_before_memory_is_full(monkeypatch):
    monkeypatch.setattr(formats, "FREE_BYTES", 1 << 20)
    put("bomb.json.gz", gzip.compress(b"[" + b" " * (8 << 20)))
    with pytest.raises(MedftError, match="as a bomb does"):
        read("bomb.json.gz")


def test_an_endless_line_is_refused(monkeypatch):
    monkeypatch.setattr(formats, "_MAX_LINE", 1 << 20)
    with pytest.raises(MedftError, match=":2: a line of 1 MiB or more"):
        read(put("a.jsonl", b'{"q": 1}\n{"q": "' + b"x" * (2 << 20) + b'"}\n'))


@pytest.mark.parametrize(
    "spec, says",
    [
        ("nothing.jsonl", "no file 'nothing.jsonl'"),
        ("exan.jsonl", "did you mean 'exam.jsonl'"),
        ("*.nothing", "no file"),
        ("", "no file ''"),
        (" ", "no file"),
        ([], "an empty list"),
        ("a\0b", "no file"),
        ("x" * 5000, "no file"),
        ("dangling.jsonl", "a link to nothing"),
        ("pipe.jsonl", "a pipe, a device or a socket"),
        ("/dev/zero", "a pipe, a device"),
        ("plug.jsonl", "a pipe"),
        ("void", "no file in this folder"),
        ("piped", "a pipe, a device"),
        ("links", "a link to nothing"),
        ("../" * 50 + "etc/nothing.csv", "no file"),
        ("gopher://x/y.csv", "Protocol not known"),
        ("zip://a.csv::s3://b/c.zip", "chained URLs"),
    ],
)
def test_a_path_that_leads_nowhere(spec, says):
    put("exam.jsonl", jsonl())
    Path("dangling.jsonl").symlink_to("gone.jsonl")
    os.mkfifo("pipe.jsonl")
    Path("void").mkdir()
    put("void/readme.md", "x")
    Path("piped").mkdir()
    os.mkfifo("piped/a.jsonl")
    Path("links").mkdir()
    Path("links/a.jsonl").symlink_to("gone")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind("plug.jsonl")
        with pytest.raises(MedftError) as e:
            sources.source_parts(spec)
    assert says in str(e.value) and str(e.value).isprintable()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read():
    put("a.jsonl", jsonl())
    os.chmod("a.jsonl", 0)
    put("d/a.jsonl", jsonl())
    os.chmod("d", 0)
    try:
        for spec in ("a.jsonl", "d"):
            with pytest.raises(MedftError, match="permission|may not be read"):
                read(spec)
    finally:
        os.chmod("d", 0o700)


def test_permission_errors_are_explained(monkeypatch):
    put("a.jsonl", jsonl())

    def refuse(*args, **more):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(formats, "open", refuse, raising=False)
    with pytest.raises(MedftError, match="a.jsonl: may not be read; change its permissions"):
        read("a.jsonl")


def test_a_disk_that_is_full_leaves_nothing_half(monkeypatch):
    put("a.zip", GOOD["shards.zip"])

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sources.zipfile.ZipFile, "extractall", full)
    with pytest.raises(MedftError, match="cannot be unpacked: .*No space left"):
        sources.source_parts("a.zip")
    assert not [p for p in Path("cache").rglob("*") if p.is_file()] and not list(
        Path("cache").rglob(".part-*")
    )


SEEDS = {
    n: GOOD[n]
    for n in (
        "a.jsonl",
        "pretty.json",
        "a.csv",
        "a.tsv",
        "a.json.gz",
        "a.parquet",
        "s.arrow",
        "f.arrow",
        "shards.zip",
    )
}
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def only_medft_errors(name, content):
    "The number of rows, or None when it was refused, in one line."
    try:
        return len(read(put(name, content)))
    except MedftError as e:
        assert str(e).isprintable() and len(str(e)) < 600


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.jsonl.gz", "a.parquet", "a.arrow", "a.zip", "a.txt"],
)
@FUZZ
@given(content=st.binary(max_size=300))
def test_noise_is_refused_or_read_but_never_breaks_anything_else(name, content):
    only_medft_errors(name, content)


@pytest.mark.parametrize("name", SEEDS)
@FUZZ
@given(data=st.data())
def test_a_damaged_file_is_refused_or_read_but_never_breaks_anything_else(name, data):
    content = bytearray(SEEDS[name])
    for _ in range(data.draw(st.integers(1, 6))):
        at, how = (
            data.draw(st.integers(0, max(0, len(content) - 1))),
            data.draw(st.sampled_from(["set", "cut", "drop", "add", "swap"])),
        )
        if how == "set" and content:
            content[at] = data.draw(st.integers(0, 255))
        elif how == "cut":
            del content[at:]
        elif how == "drop":
            del content[at : at + data.draw(st.integers(1, 20))]
        elif how == "add":
            content[at:at] = data.draw(st.binary(max_size=8))
        else:
            content[at : at + 8] = content[-8:]
    only_medft_errors(name, bytes(content))


@FUZZ
@given(
    rows=st.lists(
        st.dictionaries(
            st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(
                lambda k: k not in formats._TURN_KEYS
            ),
            st.none()
            | st.booleans()
            | st.integers(-(2**53), 2**53)
            | st.text(st.characters(codec="utf-8"), max_size=20),
            max_size=4,
        ),
        min_size=1,
        max_size=5,
    )
)
def test_what_json_can_say_comes_back_as_it_was(rows):
    assert (
        read(put("r.jsonl", jsonl(rows))) == rows and read(put("r.json", json.dumps(rows))) == rows
    )


NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="\r\n\0;\t|,"), min_size=1, max_size=8
).filter(lambda k: k == k.strip() and not k.startswith("\ufeff"))
CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=12)


@FUZZ
@given(
    head=st.lists(NAMES, min_size=2, max_size=4, unique=True),
    data=st.data(),
    sep=st.sampled_from([",", "\t"]),
)
def test_what_csv_can_say_comes_back_as_it_was(head, data, sep):
    rows = [
        dict(zip(head, r, strict=True))
        for r in data.draw(
            st.lists(
                st.lists(CELLS, min_size=len(head), max_size=len(head)), min_size=1, max_size=5
            )
        )
    ]
    assert read(put("r.csv" if sep == "," else "r.tsv", table_text(sep, rows))) == rows


def test_memory_and_time_do_not_grow_with_the_file():
    with open("big.jsonl", "wb") as f:
        for _ in range(400):
            f.write(jsonl() * 20)
    assert Path("big.jsonl").stat().st_size > 13e6
    code = """
import resource, time
from medft.data.reading import sources
import pyarrow.parquet

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.time()
n = sum(1 for _ in sources.rows(sources.source_parts("big.jsonl")[0]))
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(n, time.time() - start, grown)
"""
    n, seconds, grown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert int(n) == 160_000 and float(seconds) < 160_000 * 20e-6 and int(grown) < 8_000, (
        seconds,
        grown,
    )  # kB; about 1 microsecond a row on an idle core


def test_reading_is_lazy():
    put("a.jsonl", jsonl() + b"broken")
    rows = formats.rows(sources.source_parts("a.jsonl")[0])
    assert [next(rows)[1] for _ in ROWS] == ROWS
    with pytest.raises(MedftError, match=":21:"):
        next(rows)


REAL = {
    "medmcqa/dev.json": 2683,
    "medmcqa/validation.csv": 500,
    "medmcqa/validation-00000-of-00001.parquet": 2683,
    "medqa/phrases_no_exclude_test.jsonl": 773,
    "medqa/train_from_devsplit.jsonl": 1269,
    "medquad/medquad.parquet": 6435,
    "medquad/medDataset_processed.csv": 5000,
    "pubmedqa/ori_pqal.json": 500,
    "pubmedqa/train-00000-of-00001.parquet": 500,
    "synthea/er_pairs.jsonl": 2000,
    "llama3_prompt/hf_save_to_disk": 400,
    "llama3_prompt/*.parquet": 2000,
    "cpt_text/plos_articles.jsonl.gz": 81,
}
FEW_ROWS = {
    "medmcqa/dev.json": 20,
    "medmcqa/validation.csv": 20,
    "medmcqa/validation-00000-of-00001.parquet": 20,
    "medqa/phrases_no_exclude_test.jsonl": 10,
    "medqa/train_from_devsplit.jsonl": 10,
    "medquad/medquad.parquet": 34,
    "medquad/medDataset_processed.csv": 25,
    "pubmedqa/ori_pqal.json": 10,
    "pubmedqa/train-00000-of-00001.parquet": 10,
    "synthea/er_pairs.jsonl": 16,
    "llama3_prompt/*.parquet": 10,
    "cpt_text/plos_articles.jsonl.gz": 4,
}


@on_real_files("name, rows", FEW_ROWS.items(), REAL.items())
def test_the_fields_own_files(folder, name, rows):
    assert len(read(str(folder / name))) == rows
