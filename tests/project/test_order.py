"""A page's path is its module's name; no module imports from one after it in nbs/sidebar.yml."""

import ast
import json
import re
from pathlib import Path

import pytest
import yaml

TOP = Path(__file__).resolve().parents[2]


def module_of(page):
    "The module that a page exports to, without `medft.`; None for a page without code of its own."
    for cell in json.loads((TOP / "nbs" / page).read_text(encoding="utf-8"))["cells"]:
        if found := re.search(r"^#\|\s*default_exp\s+(\S+)", "".join(cell["source"]), re.M):
            return found[1]


SECTIONS = yaml.safe_load((TOP / "nbs/sidebar.yml").read_text())["website"]["sidebar"]["contents"]
REFERENCE = next(s for s in SECTIONS if s["section"] == "Reference")["contents"]
PAGES = [page for wing in REFERENCE for page in wing["contents"]]
MODULES = {module: page for page in PAGES if (module := module_of(page))}
ORDER = list(MODULES)
WINGS = [wing["section"] for wing in REFERENCE]


def imported_by(module):
    "The modules that a module imports from, also inside its functions."
    targets = set()
    path = TOP / "medft" / f"{module.replace('.', '/')}.py"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            package = ["medft", *module.split(".")][: -node.level] if node.level else []
            whole = ".".join([*package, *([node.module] if node.module else [])])
            targets |= {whole, *(f"{whole}.{a.name}" for a in node.names)}
        elif isinstance(node, ast.Import):
            targets |= {a.name for a in node.names}
    return {t.removeprefix("medft.") for t in targets if t.startswith("medft.")} & set(ORDER)


def test_every_module_is_in_the_sidebar_once():
    files = {
        p.relative_to(TOP / "medft").with_suffix("").as_posix().replace("/", ".")
        for p in (TOP / "medft").rglob("*.py")
    }
    files = {f for f in files if f != "_modidx" and not f.endswith("__init__")}
    assert len(PAGES) == len(set(PAGES)) and files == set(ORDER), files ^ set(ORDER)


def test_a_path_is_the_name_of_its_module():
    for module, page in MODULES.items():
        if "/" in page:
            assert page == f"{module.replace('.', '/')}.ipynb"
    for wing in REFERENCE:
        modules = filter(None, map(module_of, wing["contents"]))
        assert {module.split(".")[0] for module in modules} == {wing["section"]}


def test_the_story_is_numbered_and_in_order():
    "The numbered pages, in the sidebar's order."
    story = next(s for s in SECTIONS if s["section"] == "The story")["contents"]
    pages = [entry["href"] for entry in story]
    numbers = [re.match(r"\d\d_", page)[0] for page in pages]
    assert numbers == sorted(numbers) and len(pages) >= 10


@pytest.mark.parametrize("module", ORDER)
def test_a_page_imports_only_from_pages_before_it(module):
    later = [m for m in imported_by(module) if ORDER.index(m) >= ORDER.index(module)]
    assert not later, f"{module} imports {later}, below it in nbs/sidebar.yml"


@pytest.mark.parametrize("wing", WINGS)
def test_a_wing_imports_only_from_wings_before_it(wing):
    modules = [module for module in ORDER if module.split(".")[0] == wing]
    imported = set().union(*map(imported_by, modules))
    used = {module.split(".")[0] for module in imported}
    assert used <= set(WINGS[: WINGS.index(wing) + 1]), used


def test_a_wing_loads_nothing_by_itself():
    "Code there would load transformers before Unsloth."
    folders = {p.parent for p in (TOP / "medft").rglob("*.py")}
    for folder in folders - {TOP / "medft"}:
        assert (folder / "__init__.py").read_text().strip() == ""
