"""The built wheel: its files, its requirements, and that it works in an empty folder."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

TOP = Path(__file__).resolve().parents[2]


def lock(name):
    "A lock file's packages: name -> version."
    versions = {}
    for line in (TOP / name).read_text().splitlines():
        requirement = line.strip()
        if not requirement or line.startswith("#"):
            continue
        is_exact = requirement.count("==") == 1
        assert is_exact and "@" not in line and "+" not in line, "only exact, public versions"
        package, version = requirement.lower().replace("_", "-").split("==")
        versions[package] = version
    return versions


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    "The wheel, built from a copy (setuptools leaves build/ behind) that also holds a run folder."
    src, out = tmp_path_factory.mktemp("source") / "medft", tmp_path_factory.mktemp("dist")

    def ignored(folder, names):
        left_out = {"__pycache__", ".ipynb_checkpoints"}
        if Path(folder) == TOP:
            left_out |= {".git", ".venv", "build", "_proc", "_docs"}
        if Path(folder) == TOP / "runs":
            left_out |= {name for name in names if not name.endswith(".yaml")}
        return left_out & set(names)

    shutil.copytree(TOP, src, ignore=ignored, symlinks=True)
    run = src / "runs/quickstart/20260101"
    (run / "notebooks").mkdir(parents=True)
    (run / "recipe.yaml").touch()
    (run / "notebooks/01_data.ipynb").touch()
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, src],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="session")
def names(wheel):
    return zipfile.ZipFile(wheel).namelist()


@pytest.fixture(scope="session")
def metadata(wheel, names):
    name = next(n for n in names if n.endswith(".dist-info/METADATA"))
    return message_from_bytes(zipfile.ZipFile(wheel).read(name))


def test_wheel_carries_notebooks_recipes_and_assets(names):
    from medft.core.sections import STAGES

    pages = [p for p in (TOP / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts]
    files = [p for p in (TOP / "medft").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    wanted = {f"medft/{p.relative_to(TOP).as_posix()}" for p in pages}
    wanted |= {f"medft/recipes/{p.name}" for p in (TOP / "runs").glob("*.yaml")}
    wanted |= {p.relative_to(TOP).as_posix() for p in files}
    assert {f"medft/nbs/{stem}.ipynb" for stem in STAGES.values()} <= wanted
    assert "medft/recipes/quickstart.yaml" in wanted
    assert wanted <= set(names), sorted(wanted - set(names))


def test_wheel_carries_nothing_else(names):
    assert not [n for n in names if not n.startswith(("medft/", "medft-"))]
    assert not [n for n in names if "__pycache__" in n or "20260101" in n or "/." in n]


def test_source_distribution_builds_the_wheel_and_has_no_runs(wheel):
    import tarfile

    with tarfile.open(next(wheel.parent.glob("*.tar.gz"))) as archive:
        names = archive.getnames()
    assert not [n for n in names if "20260101" in n]
    assert any(n.endswith("/settings.ini") for n in names)
    assert not [n for n in names if "/tests/files/" in n], (
        "rows from other people's data sets are for the checkout's tests only"
    )


def test_wheel_is_small(wheel):
    assert wheel.stat().st_size < 25e6, (
        "25 MB: the tiny base is 4 MB, notebooks with plots the rest"
    )


def test_entry_points(wheel, names):
    name = next(n for n in names if n.endswith("entry_points.txt"))
    text = zipfile.ZipFile(wheel).read(name).decode()
    assert "[console_scripts]\nmedft = medft.cli.verbs:main" in text
    assert "[nbdev]\nmedft = medft._modidx:d" in text


def test_extras_and_ranges_allow_both_lock_files(metadata):
    assert {"unsloth", "dev"} <= set(metadata.get_all("Provides-Extra"))
    needs = [Requirement(r) for r in metadata.get_all("Requires-Dist")]
    optional = [r for r in needs if r.marker and r.marker.evaluate({"extra": "unsloth"})]
    assert "unsloth" in {r.name for r in optional}
    cpu, gpu = lock("requirements-cpu.txt"), lock("requirements-gpu.txt")
    for locked in (cpu, gpu):
        versions = {name.replace(".", "-"): version for name, version in locked.items()}
        for r in needs:
            name = re.sub("[_.]", "-", r.name).lower()
            assert Version(versions[name]) in r.specifier, r
    assert (cpu["trl"], gpu["trl"], cpu["torch"]) == ("1.16.0", "1.15.0", gpu["torch"])


def test_cpu_lock_is_what_is_installed():
    from importlib.metadata import version

    locked = lock("requirements-cpu.txt")
    installed = {name: version(name).split("+")[0] for name in locked}
    wrong = {name: found for name, found in installed.items() if found != locked[name]}
    assert not wrong, f"run `make install`: {wrong}"
    for_gpus = ("nvidia", "triton", "torchvision", "xformers")
    assert not [name for name in locked if name.startswith(for_gpus)]


def test_no_file_names_a_package_index():
    files = [
        *TOP.glob("requirements-*.txt"),
        TOP / "Makefile",
        TOP / "pyproject.toml",
        *(TOP / ".github").rglob("*.yaml"),
        *(TOP / ".ci").iterdir(),
    ]
    for file in files:
        for line in file.read_text().splitlines():
            assert not ("index-url" in line and "://" in line), file
            assert not line.startswith(("--index", "-i ", "-f ")), file


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    "A Python that has this environment's packages, but medft from the wheel only."
    home = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home / "venv"], check=True)
    python = home / "venv/bin/python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", wheel], check=True)
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    site = Path(done.stdout.strip())
    import torch

    # A plain path: the .pth files in there, such as that of the editable medft, are not read.
    (site / "packages.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    return python


def medft(python, folder, *args):
    ours = ("MEDFT_", "MLFLOW_", "PYTHON")
    env = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    env["HF_HUB_OFFLINE"] = "1"
    return subprocess.run(
        [python.parent / "medft", *args], cwd=folder, env=env, capture_output=True, text=True
    )


def test_installed_medft_is_the_wheels(installed, tmp_path):
    code = """
import medft, medft.core.files as c
print(medft.__file__, c.checkout(), c.notebooks().name, c.find_recipe("quickstart"), c.runs_root())
"""
    command = [installed, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    out = done.stdout
    assert str(TOP) + "/" not in out and " None nbs " in out and f"{tmp_path}/runs" in out, out


def test_installed_medft_answers(installed, tmp_path):
    done = medft(installed, tmp_path, "--help")
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in ("run", "resume", "list", "doctor", "ui"))
    done = medft(installed, tmp_path, "run", "quickstart", "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(TOP) + "/" not in done.stdout and not (tmp_path / "runs/quickstart").exists(), (
        "a dry run creates nothing"
    )


def test_installed_medft_refuses_what_it_does_not_know(installed, tmp_path):
    done = medft(installed, tmp_path, "run", "quickstrat")
    assert done.returncode == 2
    assert "quickstart" in done.stderr + done.stdout
    assert not list(tmp_path.iterdir())


def test_installed_medft_writes_into_the_current_folder(installed, tmp_path):
    "The first stage of a real run from the wheel alone: its notebook, its assets, ./runs."
    done = medft(
        installed, tmp_path, "run", "quickstart", "--stages", "data", "tracking.mlflow=false"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "runs/quickstart").glob("*/data/report.json"))) == 1


def test_contributing_names_what_exists():
    text = (TOP / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = re.findall(r"`((?:nbs|tests|runs|medft|\.ci)/[\w./-]*)`", text)
    assert len(paths) > 20
    named = [path for path in paths if "NAME" not in path]
    assert not [path for path in named if not (TOP / path).exists()]
    names = re.findall(r"`(\w+)`\s+in\s+`(nbs/[\w/]+\.ipynb)`", text)
    assert len(names) > 10
    texts = {page: (TOP / page).read_text(encoding="utf-8") for _, page in names}
    missing = [(n, page) for n, page in names if not re.search(rf"\b{n}\b", texts[page])]
    assert not missing
    modules = re.findall(r"`(medft(?:\.\w+)+)`", text)
    assert all((TOP / f"{module.replace('.', '/')}.py").exists() for module in modules)


def test_the_walks_of_the_house_page_can_be_walked():
    cells = json.loads((TOP / "nbs/guide/house.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    functions = re.findall(r"`((?:core|data|train|evaluate)(?:\.\w+)+)\.(\w+)`", text)
    assert len(functions) >= 8
    for module, name in functions:
        code = (TOP / "medft" / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
        assert re.search(rf"^def {name}\(", code, re.M), f"{module}.{name}"


def test_functions_that_pages_name_exist():
    "`module.name` in prose, comments and docstrings; keys of a recipe look alike and are left out."
    texts, leaves = {}, {}
    for path in (TOP / "medft").rglob("*.py"):
        module = ".".join(path.relative_to(TOP / "medft").with_suffix("").parts)
        texts[module] = path.read_text(encoding="utf-8")
        leaves.setdefault(path.stem, []).append(module)
    wings = {module.split(".")[0] for module in texts}
    keys = set(re.findall(r"^    (\w+):", texts["core.sections"], re.M))
    seen, missing = 0, []
    for page in (TOP / "nbs").rglob("*.ipynb"):
        for cell in json.loads(page.read_text(encoding="utf-8"))["cells"]:
            for named in re.findall(r"`((?:[a-z_]+\.)+[A-Za-z_]+)`", "".join(cell["source"])):
                *owner, name = named.split(".")
                is_ours = owner[0] in wings or owner[0] in leaves
                if not is_ours or named in texts or name in keys or owner[0] in SECTIONS_OR_FILES:
                    continue
                if name in FILE_ENDINGS:
                    continue
                seen += 1
                modules = [".".join(owner), *leaves.get(owner[-1], [])]
                defined = rf"^(?:def|class) {name}\b|^{name} ?="
                if not any(re.search(defined, texts.get(m, ""), re.M) for m in modules):
                    missing.append((page.name, cell["id"], named))
    assert seen > 10 and not missing, missing


SECTIONS_OR_FILES = {
    "data",
    "export",
    "plan",
    "recipe",
}  # `data.jsonl`, `export.merge`, `plan.json`
FILE_ENDINGS = set("html ipynb json jsonl log md parquet py safetensors svg yaml yml".split())
