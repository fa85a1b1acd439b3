"""The site without Quarto: nbdev prepares every page, nbconvert renders it, links are checked."""

import getpass
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

TOP = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted(
    p.relative_to(TOP / "nbs")
    for p in (TOP / "nbs").rglob("*.ipynb")
    if not any(o.startswith(".") for o in p.parts)
)
page_ids = dict(argvalues=NOTEBOOKS, ids=[p.as_posix() for p in NOTEBOOKS])


# One notebook at a time, so that one which fails does not hide the others.
PREPARE = """
import json, pathlib
from nbdev.serve import proc_nbs
failed = {}
for p in sorted(pathlib.Path("nbs").rglob("*.ipynb")):
    try: proc_nbs(file_glob=p.name, n_workers=0)
    except Exception as e: failed[p.relative_to("nbs").as_posix()] = str(e)
pathlib.Path("failed.json").write_text(json.dumps(failed))
"""


# Variables that stand in the environment while the pages are made, and must not stand on one.
PLANTED = dict(
    ACTIONS_ID_TOKEN_REQUEST_TOKEN="planted-3f9c27b1d04e",
    HARMLESS_NAME="planted-88d1e6a2c57f",
    MEDFT_RUNS="/planted-b40c9e77/runs",
)


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "A folder with the prepared notebooks, as for Quarto; a copy, because nbdev writes into it."
    copy = tmp_path_factory.mktemp("site")
    for name in ("nbs", "medft"):
        shutil.copytree(
            TOP / name,
            copy / name,
            symlinks=True,
            ignore=shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__"),
        )
    for name in ("pyproject.toml", "settings.ini", "setup.py", "_quarto.yml"):
        shutil.copy(TOP / name, copy)
    done = subprocess.run(
        [sys.executable, "-c", PREPARE],
        cwd=copy,
        env=os.environ | PLANTED,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return copy


def cells(path, kind):
    return [
        c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind
    ]


def source(cell):
    return "".join(cell["source"])


def front(path):
    "The page's front matter: the first raw cell, as nbdev writes it."
    raw = [source(c) for c in cells(path, "raw") if source(c).startswith("---")]
    return yaml.safe_load(raw[0].strip().strip("-")) if raw else {}


@pytest.fixture(scope="session")
def pages(site):
    "Address relative to the site's top -> notebook; 00_core.ipynb is core.html there."
    addresses = {}
    for page in NOTEBOOKS:
        prepared = site / "_proc" / page
        if prepared.exists():
            name = front(prepared).get("output-file", page.with_suffix(".html").name)
            addresses[(page.parent / name).as_posix()] = page
    return addresses


@pytest.mark.parametrize("page", **page_ids)
def test_page_is_prepared(site, page):
    proc, failed = site / "_proc" / page, json.loads((site / "failed.json").read_text())
    assert page.as_posix() not in failed, (
        f"the site runs a notebook's imports and exported cells: {failed[page.as_posix()]}"
    )
    assert proc.exists(), f"{page}: not on the site"
    assert front(proc).get("title"), (
        f"{page}: begin with a markdown cell '# title', then '> one line'"
    )
    lines = [line for c in cells(proc, "code") for line in source(c).splitlines()]
    left = [line for line in lines if re.match(r"#\s*\|\s*\w+(\s+[\w.]+)*\s*$", line)]
    assert not left, f"{page}: directives left over: {left}"


@pytest.mark.parametrize("page", **page_ids)
def test_outputs_can_be_shown(page):
    outputs = [o for c in cells(TOP / "nbs" / page, "code") for o in c["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error"], (
        f"{page}: a saved output is an error"
    )
    home = rf"(?:/home|/root|/Users|{re.escape(str(TOP))})/[\w./-]+"
    packages = r"/[\w./-]+/site-packages/[\w./-]+"
    folders = sorted(set(re.findall(f"{home}|{packages}", json.dumps(outputs))))
    assert not folders, f"{page}: outputs name folders of the machine: {folders[:5]}"
    assert len(json.dumps(outputs)) < 1.5e6, f"{page}: outputs over 1.5 MB"


def test_no_page_holds_a_value_of_this_machine(site):
    "Signatures are printed with their defaults: the environment as a default would show a token."
    values = {*PLANTED.values(), str(site), "environ({"}
    common = {"root", "runner", "localhost", "user", "ubuntu", "admin"}
    names = {socket.gethostname(), getpass.getuser()} - common
    values |= {name for name in names if len(name) > 5}
    home = os.environ.get("HOME", "")
    if len(home) > 5:
        values.add(home + "/")
    for page in NOTEBOOKS:
        prepared = site / "_proc" / page
        text = prepared.read_text(encoding="utf-8") if prepared.exists() else ""
        outputs = [c["outputs"] for c in cells(TOP / "nbs" / page, "code")]
        stored = json.dumps(outputs, ensure_ascii=False)
        assert not [v for v in values if v in text or v in stored], page


def render(path):
    "The page as HTML, without nbdev's notes in cells, which are not in the notebook format."
    import nbformat
    from nbconvert import HTMLExporter

    raw = json.loads(path.read_text(encoding="utf-8"))
    known = {"cell_type", "id", "metadata", "source", "attachments", "outputs", "execution_count"}
    for i, cell in enumerate(raw["cells"]):
        raw["cells"][i] = {k: v for k, v in cell.items() if k in known} | {"metadata": {}}
    notebook = nbformat.reads(json.dumps(raw), as_version=4)
    exporter = HTMLExporter(template_name="basic", exclude_anchor_links=True)
    return exporter.from_notebook_node(notebook)[0]


def links(html):
    "The addresses in href and src of a page's body."
    found = re.findall(r'(?:href|src)="([^"]+)"', html)
    not_files = ("data:", "mailto:", "javascript:")
    return [unquote(url) for url in found if not url.startswith(not_files)]


@pytest.mark.parametrize("page", **page_ids)
def test_local_links_resolve(site, pages, page):
    if not (site / "_proc" / page).exists():
        pytest.skip("not prepared")
    html = render(site / "_proc" / page)
    home = yaml.safe_load((TOP / "nbs/nbdev.yml").read_text())["website"]["site-url"]
    top = (site / "_proc").resolve()
    broken = []
    for url in links(html):
        is_whole = url.startswith(home)
        parts = urlsplit(url[len(home) :].lstrip("/") if is_whole else url)
        if parts.scheme or parts.netloc or not parts.path:
            continue
        target = (top / ("" if is_whole else page.parent) / parts.path).resolve()
        address = target.relative_to(top).as_posix() if target.is_relative_to(top) else None
        if not (target.is_file() or address in pages or address == "."):
            broken.append(url)
    assert not broken, f"{page}: {broken}"


def test_pages_do_not_share_an_address(site, pages):
    assert len(pages) == len(list((site / "_proc").rglob("*.ipynb")))


def test_sidebar_lists_every_page():
    "Each page once, whether it has a text of its own or its title."
    text = (TOP / "nbs/sidebar.yml").read_text()
    listed = re.findall(r"^\s*(?:-|href:) ([\w/]+\.ipynb)$", text, re.M)
    assert sorted(listed) == sorted(p.as_posix() for p in NOTEBOOKS)


STORY = [page for page in NOTEBOOKS if re.match(r"\d\d_|cases$", page.parts[0])]


@pytest.mark.parametrize("page", STORY, ids=[page.as_posix() for page in STORY])
def test_a_reader_can_open_a_page_of_the_story_elsewhere(site, page):
    "The badges are still there when nbdev has replaced the title's cell by front matter."
    text = "".join(source(c) for c in cells(site / "_proc" / page, "markdown"))
    for address in ("colab.research.google.com/github", "kaggle.com/kernels/welcome?src="):
        assert re.search(rf"{re.escape(address)}\S*/nbs/{re.escape(page.as_posix())}\)", text)


@pytest.mark.parametrize("page", **page_ids)
def test_a_figure_is_shown_as_a_picture(page):
    outputs = [o for c in cells(TOP / "nbs" / page, "code") for o in c["outputs"]]
    for output in outputs:
        data = output.get("data", {})
        text = "".join(data.get("text/plain", output.get("text", "")))
        is_figure = re.match(r"<(Figure size|Axes|matplotlib)", text.strip("[ "))
        assert not is_figure or {"image/png", "image/svg+xml"} & set(data), (page, text)


@pytest.fixture(scope="session")
def executed(tmp_path_factory):
    "Pages whose tables are made from the code, executed in a copy: one of them draws a picture."
    copy = tmp_path_factory.mktemp("guide") / "nbs"
    shutil.copytree(TOP / "nbs", copy, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    pages = [copy / "index.ipynb", *sorted((copy / "guide").glob("*.ipynb"))]
    run = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--inplace"]
    done = subprocess.run([*run, *pages], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return copy


def shown_tables(path):
    "The Markdown that a page's cells print."
    outputs = [output for cell in cells(path, "code") for output in cell["outputs"]]
    return ["".join(o["data"].get("text/markdown", "")) for o in outputs if "data" in o]


def test_generated_pages_show_what_the_code_says_today(executed):
    pages = [path.relative_to(executed) for path in sorted(executed.glob("guide/*.ipynb"))]
    made = [page for page in [Path("index.ipynb"), *pages] if shown_tables(TOP / "nbs" / page)]
    assert len(made) >= 8
    stale = [p for p in made if shown_tables(TOP / "nbs" / p) != shown_tables(executed / p)]
    assert not stale, f"run these pages again, and keep their outputs: {stale}"
    picture = "images/wings.svg"
    assert (executed / picture).read_bytes() == (TOP / "nbs" / picture).read_bytes()


def test_quarto_settings():
    assert (TOP / "nbs/_quarto.yml").resolve() == TOP / "_quarto.yml"
    settings = yaml.safe_load((TOP / "_quarto.yml").read_text())
    assert settings["metadata-files"] == ["nbdev.yml", "sidebar.yml"]
    assert (TOP / "nbs" / settings["format"]["html"]["css"]).exists()


def test_nbdev_yml_is_current():
    "nbdev rewrites it from pyproject.toml when the site is built; the committed one must be equal."
    from nbdev.config import get_config
    from nbdev.quarto import _nbdev_yml

    config = get_config(TOP / "nbs")
    keys = ("title", "description", "branch", "git_url", "doc_host", "doc_baseurl")
    values = {key: config[key] for key in keys}
    expected = _nbdev_yml.format(**values, doc_path=config.doc_path.name)
    assert (TOP / "nbs/nbdev.yml").read_text() == expected
