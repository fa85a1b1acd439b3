"""The house: a page's path is its module's name, and nothing imports from what comes after it. nbs/sidebar.yml says the order."""

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
MODULES = {module_of(page): page for page in PAGES}
ORDER = list(MODULES)
WINGS = [wing["section"] for wing in REFERENCE]


def imported_by(module):
    "The rooms that a module imports from anywhere in it, in its functions too."
    targets = set()
    for node in ast.walk(
        ast.parse((TOP / "medft" / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    ):
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
    rooms = {page: module for module, page in MODULES.items() if "/" in page}
    assert {
        page: module
        for page, module in rooms.items()
        if page != f"{module.replace('.', '/')}.ipynb"
    } == {}
    assert all(
        module.split(".")[0] == wing["section"]
        for wing in REFERENCE
        for module in map(module_of, wing["contents"])
    )


def test_front_pages_are_numbered_in_the_order_of_the_wings():
    fronts = [page for page in PAGES if "/" not in page]
    assert all(re.match(r"\d\d_", page) for page in fronts) and [p[:2] for p in fronts] == sorted(
        p[:2] for p in fronts
    )


@pytest.mark.parametrize("module", ORDER)
def test_a_room_imports_only_from_rooms_before_it(module):
    later = [m for m in imported_by(module) if ORDER.index(m) >= ORDER.index(module)]
    assert not later, f"{module} imports {later}, below it in nbs/sidebar.yml"


@pytest.mark.parametrize("wing", WINGS)
def test_a_wing_imports_only_from_wings_before_it(wing):
    used = {
        m.split(".")[0]
        for module in ORDER
        if module.split(".")[0] == wing
        for m in imported_by(module)
    }
    assert used <= set(WINGS[: WINGS.index(wing) + 1]), used


def test_a_wing_loads_nothing_by_itself():
    "Code there would load transformers before Unsloth."
    full = [
        p
        for p in (TOP / "medft").rglob("__init__.py")
        if p.parent != TOP / "medft" and p.read_text().strip()
    ]
    folders = {p.parent for p in (TOP / "medft").rglob("*.py")}
    assert not full and not [f for f in folders if not (f / "__init__.py").exists()]
