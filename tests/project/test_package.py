"""The built wheel: what is in it, what it says it needs, and that it works in an empty folder, away from the checkout."""

import os
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
    lines = [
        l.strip()
        for l in (TOP / name).read_text().splitlines()
        if l.strip() and not l.startswith("#")
    ]
    assert all(l.count("==") == 1 and "@" not in l and "+" not in l for l in lines), (
        "only exact, public versions"
    )
    return dict(l.lower().replace("_", "-").split("==") for l in lines)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    "The wheel, built from a copy (setuptools leaves build/ behind) that also holds a run folder."
    src, out = tmp_path_factory.mktemp("source") / "medft", tmp_path_factory.mktemp("dist")

    def ignored(d, names):
        return [
            n
            for n in names
            if Path(d) == TOP
            and n in {".git", ".venv", "build", "_proc", "_docs"}
            or Path(d) == TOP / "runs"
            and not n.endswith(".yaml")
            or n in {"__pycache__", ".ipynb_checkpoints"}
        ]

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
    return message_from_bytes(
        zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith(".dist-info/METADATA")))
    )


def test_wheel_carries_notebooks_recipes_and_assets(names):
    wanted = {
        f"medft/{p.relative_to(TOP).as_posix()}"
        for p in (TOP / "nbs").rglob("*.ipynb")
        if ".ipynb_checkpoints" not in p.parts
    } | {f"medft/recipes/{p.name}" for p in (TOP / "runs").glob("*.yaml")}
    wanted |= {
        p.relative_to(TOP).as_posix()
        for p in (TOP / "medft").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    from medft.core.run import STAGES

    assert {
        f"medft/nbs/{stem}.ipynb" for stem in STAGES.values()
    } <= wanted and "medft/recipes/quickstart.yaml" in wanted
    assert wanted <= set(names), sorted(wanted - set(names))


def test_wheel_carries_nothing_else(names):
    assert not [n for n in names if not n.startswith(("medft/", "medft-"))]
    assert not [n for n in names if "__pycache__" in n or "20260101" in n or "/." in n]


def test_source_distribution_builds_the_wheel_and_has_no_runs(wheel):
    import tarfile

    held = tarfile.open(next(wheel.parent.glob("*.tar.gz"))).getnames()
    assert not [n for n in held if "20260101" in n] and any(
        n.endswith("/settings.ini") for n in held
    )
    assert not [n for n in held if "/tests/files/" in n], (
        "the rows of others are for the checkout's tests"
    )


def test_wheel_is_small(wheel):
    assert wheel.stat().st_size < 25e6, (
        "25 MB: the tiny base is 4 MB, notebooks with plots the rest"
    )


def test_entry_points(wheel, names):
    text = (
        zipfile.ZipFile(wheel)
        .read(next(n for n in names if n.endswith("entry_points.txt")))
        .decode()
    )
    assert "[console_scripts]\nmedft = medft.cli.verbs:main" in text
    assert "[nbdev]\nmedft = medft._modidx:d" in text


def test_extras_and_ranges_allow_both_lock_files(metadata):
    assert {"unsloth", "dev"} <= set(metadata.get_all("Provides-Extra"))
    needs = [Requirement(r) for r in metadata.get_all("Requires-Dist")]
    assert "unsloth" in {
        r.name for r in needs if r.marker and r.marker.evaluate({"extra": "unsloth"})
    }
    cpu, gpu = lock("requirements-cpu.txt"), lock("requirements-gpu.txt")
    for held in (cpu, gpu):
        held = {k.replace(".", "-"): v for k, v in held.items()}
        for r in needs:
            assert (
                Version(held[r.name.replace("_", "-").replace(".", "-").lower()]) in r.specifier
            ), r
    assert (cpu["trl"], gpu["trl"], cpu["torch"]) == ("1.16.0", "1.15.0", gpu["torch"])


def test_cpu_lock_is_what_is_installed():
    from importlib.metadata import version

    wrong = {
        n: (want, version(n))
        for n, want in lock("requirements-cpu.txt").items()
        if version(n).split("+")[0] != want
    }
    assert not wrong, f"run `make install`: {wrong}"
    assert not {
        n
        for n in lock("requirements-cpu.txt")
        if n.startswith(("nvidia", "triton", "torchvision", "xformers"))
    }


def test_no_file_names_a_package_index():
    for f in [
        *TOP.glob("requirements-*.txt"),
        TOP / "Makefile",
        TOP / "pyproject.toml",
        *(TOP / ".github").rglob("*.yaml"),
        *(TOP / ".ci").iterdir(),
    ]:
        assert not [
            l
            for l in f.read_text().splitlines()
            if "index-url" in l and "://" in l or l.startswith(("--index", "-i ", "-f "))
        ], f


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    "A Python that has this environment's packages, but medft from the wheel only."
    home = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home / "venv"], check=True)
    python = home / "venv/bin/python"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            python,
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
            wheel,
        ],
        check=True,
    )
    site = Path(
        subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    )
    import torch

    (site / "packages.pth").write_text(
        str(Path(torch.__file__).parent.parent) + "\n"
    )  # a plain entry: its own .pth files, the editable medft, stay unread
    return python


def medft(python, folder, *args):
    env = {
        k: v for k, v in os.environ.items() if not k.startswith(("MEDFT_", "MLFLOW_", "PYTHON"))
    } | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [python.parent / "medft", *args], cwd=folder, env=env, capture_output=True, text=True
    )


def test_installed_medft_is_the_wheels(installed, tmp_path):
    code = "import medft, medft.core.run as c; print(medft.__file__, c.checkout(), c.notebooks().name, c.find_recipe('quickstart'), c.runs_root())"
    out = subprocess.run(
        [installed, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert str(TOP) + "/" not in out and " None nbs " in out and f"{tmp_path}/runs" in out, out


def test_installed_medft_answers(installed, tmp_path):
    done = medft(installed, tmp_path, "--help")
    assert done.returncode == 0 and all(
        v in done.stdout for v in ("run", "resume", "list", "doctor", "ui")
    ), done.stderr
    done = medft(installed, tmp_path, "run", "quickstart", "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(TOP) + "/" not in done.stdout and not (tmp_path / "runs/quickstart").exists(), (
        "a dry run creates nothing"
    )


def test_installed_medft_refuses_what_it_does_not_know(installed, tmp_path):
    done = medft(installed, tmp_path, "run", "quickstrat")
    assert (
        done.returncode == 2
        and "quickstart" in done.stderr + done.stdout
        and not list(tmp_path.iterdir())
    )


def test_installed_medft_runs_into_the_folder_it_stands_in(installed, tmp_path):
    "The first stage of a real run, from the wheel alone: papermill, the wheel's notebook, the shipped assets, ./runs."
    done = medft(
        installed, tmp_path, "run", "quickstart", "--stages", "data", "tracking.mlflow=false"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "runs/quickstart").glob("*/data/report.json"))) == 1
