"""`medft evaluate` and `medft report`: scoring without training, comparing runs, reports."""

from medft.cli import runner
from medft.cli.verbs import main
from medft.core.files import MedftError, Refused, read_json, sha256, write_json
from medft.core.recipe import load_recipe
from medft.core.run import Run
from medft.data import pipeline as data
from medft.evaluate import metrics as ev
from medft.evaluate.scoring import external_models as further
from medft.evaluate.scoring import predict
from medft.export import compare_runs as again

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import test_evaluate
from stages import manifest, start, until
from test_evaluate import make_run, rows

OFF = "tracking.mlflow=false"
base = test_evaluate.base  # a fixture


@pytest.fixture(scope="module")
def trained(tmp_path_factory, base):
    "A finished run with two random adapters."
    run = make_run(
        tmp_path_factory.mktemp("trained"), base, "engine=[trl, fast]", engines=("trl", "fast")
    )
    ev.evaluate(run)
    run.update(
        dict(status="finished", stages={s: dict(status="finished") for s in ("data", "evaluate")})
    )
    return run


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A folder for runs, and stages that run in this process: other tests start kernels."

    def go(run, stages, show=print, warn=print, started=None, progress=None):
        run.update(dict(status="running", wanted=stages))
        data.prepare(run)
        ev.evaluate(run)
        run.update(
            dict(
                status="finished", stages={s: dict(status="finished", seconds=1.0) for s in stages}
            )
        )

    monkeypatch.setenv("MEDFT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(runner, "go", go)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_page(monkeypatch):
    monkeypatch.setattr(
        again, "write_comparison_report", lambda run: None
    )  # pictures take seconds, and one test looks at them


def scores(frame):
    return np.stack(frame.scores)


def only_run(folder):
    found = [p.parent for p in (folder / "runs").glob("*/*/manifest.json")]
    assert len(found) == 1, found
    return Run.open(found[0])


def test_a_finished_run_is_scored_again_in_a_folder_of_its_own(here, trained, capfd):
    before = {p: sha256(p) for p in trained.path.rglob("*") if p.is_file()}
    assert main(["evaluate", str(trained.path), OFF]) == 0, capfd.readouterr().err
    run = only_run(here)
    found, old = read_json(run.path / "metrics.json"), read_json(trained.path / "metrics.json")
    assert (
        run.recipe.engine == []
        and list(found["models"]) == ["base", "fast", "trl"]
        and (run.path / "report.html").stat().st_size > 5000
    )
    assert {m: f["test"]["accuracy"] for m, f in found["models"].items()} == {
        m: f["test"]["accuracy"] for m, f in old["models"].items()
    }
    assert {k: v["sentence"] for k, v in found["verdict"].items()} == {
        k: v["sentence"] for k, v in old["verdict"].items()
    }
    about = run.manifest["evaluated"]
    assert (
        about["trl"]["adapter"]
        and about["trl"]["fingerprint"] == sha256(trained.path / "trl" / "adapters")
        and about["base"]["fingerprint"] == sha256(trained.recipe.model.name)
    )
    assert {p: sha256(p) for p in trained.path.rglob("*") if p.is_file()} == before
    assert (
        main(["list"]) == 0 and f"trl {found['verdict']['trl']['label']}" in capfd.readouterr().out
    )


def test_models_from_anywhere_answer_the_same_items(here, no_page, trained, base, capfd):
    "An adapter with its base, a whole model, and one that writes conversations in another way."
    other = here / "other"
    shutil.copytree(base, other)
    (other / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    settings = json.loads((other / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (other / "tokenizer_config.json").write_text(json.dumps(settings))
    assert (
        main(
            [
                "evaluate",
                str(trained.path / "trl" / "adapters"),
                OFF,
                "--recipe",
                str(trained.path / "recipe.yaml"),
                "--with",
                f"same={base}",
                "--with",
                f"other={other}",
            ]
        )
        == 0
    ), capfd.readouterr().err
    run = only_run(here)
    frames = ev.read_predictions(run)
    assert {w for w, _ in frames} == {
        "base",
        "trl",
        "same",
        "other",
    } and run.recipe.model.name == str(base)
    assert np.array_equal(scores(frames["same", "test"]), scores(frames["base", "test"]))
    assert frames["other", "test"].item_sha256.tolist() == frames[
        "base", "test"
    ].prompt_sha256.tolist() and not set(frames["other", "test"].prompt_sha256) & set(
        frames["base", "test"].prompt_sha256
    )
    assert not np.allclose(scores(frames["other", "test"]), scores(frames["base", "test"]))
    found = read_json(run.path / "metrics.json")
    assert (
        set(found["verdict"]) == {"trl", "same", "other"}
        and found["verdict"]["same"]["label"] == "tie"
    )


@pytest.mark.long
def test_one_model_alone_has_figures_and_no_verdict(here, no_page, trained, base, capfd):
    assert (
        main(
            [
                "evaluate",
                str(base),
                OFF,
                "evaluation.max_items=5",
                "--recipe",
                str(trained.path / "recipe.yaml"),
            ]
        )
        == 0
    ), capfd.readouterr().err
    found = read_json(only_run(here).path / "metrics.json")
    out = capfd.readouterr().out
    assert (
        found["verdict"] == {}
        and found["models"]["base"]["test"]["accuracy"]["n"] == 5
        and found["names"] == dict(base=Path(base).name)
    )
    assert "accuracy" in out and "verdict" not in out
    assert main(["list"]) == 0 and f"{Path(base).name}: accuracy" in capfd.readouterr().out


def test_an_adapter_is_not_scored_on_what_it_was_trained_on(
    here, no_page, trained, base, tmp_path, capfd
):
    "The recipe of somebody else, whose test is what our adapter was tuned on."
    (tmp_path / "theirs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows(6, 9)))
    recipe = [
        "--recipe",
        str(trained.path / "recipe.yaml"),
        OFF,
        f"dataset.path={tmp_path}/theirs.jsonl",
        "dataset.sets={}",
        f"dataset.test_path={trained.path.parent.parent}/train.jsonl",
    ]
    assert main(["evaluate", str(trained.path / "trl" / "adapters"), *recipe]) == 2
    assert "measure memory" in capfd.readouterr().err and not list(
        (here / "runs").glob("*/*/predictions/*.parquet")
    )
    shutil.rmtree(here / "runs")
    assert main(["evaluate", str(base), *recipe]) == 0, (
        capfd.readouterr().err
    )  # its base has not seen them


def test_a_scoring_that_was_stopped_goes_on_where_it_stopped(trained, tmp_path, monkeypatch):
    run = Run.create(
        trained.recipe.model_copy(
            update=dict(
                engine=[],
                evaluation=trained.recipe.evaluation.model_copy(
                    update=dict(models=dict(one=str(trained.path / "trl" / "adapters")))
                ),
            )
        ),
        root=tmp_path,
        run_id="a",
    )
    data.prepare(run)
    asked, real = [], predict.predict

    def stopping(model, tok, rows, *a, stop=None, **k):
        if len(asked) == stop_after:
            raise KeyboardInterrupt
        asked.append(rows[0]["id"])
        return real(model, tok, rows, *a, **k)

    monkeypatch.setattr(ev, "predict", stopping)

    def files():
        return {
            str(p.relative_to(run.path)): p.read_bytes()
            for p in (run.path / "predictions").rglob("*.parquet")
        }

    stop_after = 4
    with pytest.raises(KeyboardInterrupt):
        ev.score_run(run)
    assert len(files()) == 4
    stop_after = None
    ev.score_run(run)
    assert len(asked) == 6  # two models, three sets: validation, test, other
    whole = files()
    ev.score_run(run)
    assert len(asked) == 6 and files() == whole
    torn = run.path / "predictions" / "one.test.parquet"
    torn.write_bytes(torn.read_bytes()[:-100])  # a disk that lost the end of a file
    ev.score_run(run)
    assert len(asked) == 7 and files() == whole

    def change(**new):
        return setattr(
            run,
            "recipe",
            run.recipe.model_copy(
                update=dict(evaluation=run.recipe.evaluation.model_copy(update=new))
            ),
        )

    change(confidence=0.9)
    ev.score_run(run)
    assert len(asked) == 7  # figures change, scores do not
    change(max_items=7)
    found = ev.score_run(run)
    assert len(asked) == 7 + 2 * 2 and {len(f) for (_, s), f in found.items() if s == "test"} == {
        7
    }  # validation has but four rows
    change(models={})
    assert (
        set(ev.score_run(run)) == {("base", "test"), ("base", "other")}
        and len(asked) == 11
        and not list((run.path / "predictions").rglob("one.*"))
    )


@pytest.mark.long
def test_another_adapter_in_the_same_place_is_scored_anew(trained, tmp_path, base):
    folder = tmp_path / "adapter"
    shutil.copytree(trained.path / "trl" / "adapters", folder)
    e = trained.recipe.evaluation.model_copy(update=dict(models=dict(one=str(folder)), max_items=3))
    run = Run.create(
        trained.recipe.model_copy(update=dict(engine=[], evaluation=e)), root=tmp_path, run_id="a"
    )
    data.prepare(run)
    first = ev.score_run(run)
    shutil.rmtree(folder)
    shutil.copytree(trained.path / "fast" / "adapters", folder)
    second = ev.score_run(run)
    assert first["base", "test"].equals(second["base", "test"]) and not np.allclose(
        scores(first["one", "test"]), scores(second["one", "test"])
    )


BAD = {  # arguments -> what the line must name
    "tiny-bsae --recipe quickstart": ["tiny-bsae", "tiny-base"],
    "tiny-base": ["--recipe"],
    "tiny-base --recipe quikstart": ["quikstart", "quickstart"],
    "./nowhere --recipe quickstart": ["nowhere"],
    "{here} --recipe quickstart": ["config.json", "adapter_config.json"],
    "{here}/orphan --recipe quickstart": ["gone"],
    "{here}/labels --recipe quickstart": ["classification", "generative"],
    "tiny-base --recipe quickstart --merged": ["--merged", "run"],
    "tiny-base --recipe quickstart --with tiny-base": ["NAME=PATH"],
    "tiny-base --recipe quickstart --with a.b=tiny-base": ["a.b", "letters"],
    "tiny-base --recipe quickstart --with a/b=tiny-base": ["a/b", "letters"],
    "tiny-base --recipe quickstart --with a@b=tiny-base": ["a@b", "letters"],
    "tiny-base --recipe quickstart --with base=tiny-base": ["base", "none of base"],
    "tiny-base --recipe quickstart --with new={run}": ["is a run", "trl/adapters"],
    "tiny-base --recipe quickstart --with new=./nowhere": ["nowhere"],
    "tiny-base --recipe quickstart --benchmarks never_read": ["never_read", "set"],
    "tiny-base --recipe quickstart evaluation.max_itmes=3": ["max_itmes", "max_items"],
    "tiny-base --recipe quickstart dataset.test_path=gone.jsonl": ["gone.jsonl"],
    "tiny-base --recipe quickstart --json": ["--json", "--compare"],
    "{run} model.task=pretraining": ["generative", "pretraining"],
    "{run} --with trl=tiny-base": ["trl"],
    "{run} --merged": ["trl/merged"],
    "--compare {run}": ["two runs"],
    "--compare {run} {run}": ["twice"],
    "--compare {run} nowhere": ["nowhere"],
    "--compare {run} {run} --benchmarks medmcqa": ["--benchmarks", "--compare"],
}

SLOW = {
    "tiny-base --recipe quickstart --benchmarks medmqa": ["medmqa"]
}  # the harness takes long to load


@pytest.mark.parametrize("line", [*BAD, *(pytest.param(x, marks=pytest.mark.long) for x in SLOW)])
def test_bad_input_is_one_line_and_leaves_nothing(here, trained, capfd, line):
    write_json(
        here / "orphan" / "adapter_config.json",
        dict(base_model_name_or_path="./gone", task_type="CAUSAL_LM"),
    )
    write_json(
        here / "labels" / "adapter_config.json",
        dict(base_model_name_or_path="tiny-base", task_type="SEQ_CLS"),
    )
    assert main(["evaluate", *line.format(here=here, run=trained.path).split()]) == 2
    said = capfd.readouterr()
    assert len(said.err.strip().splitlines()) == 1 and all(
        w in said.err for w in (BAD | SLOW)[line]
    ), said.err
    assert not (here / "runs").exists()


def test_a_classifiers_head_must_fit(tmp_path):
    from types import SimpleNamespace

    from safetensors.numpy import save_file

    write_json(
        tmp_path / "a" / "adapter_config.json",
        dict(base_model_name_or_path="tiny-base", task_type="SEQ_CLS"),
    )
    save_file(
        {"base_model.model.score.weight": np.zeros((3, 8), np.float32)},
        tmp_path / "a" / "adapter_model.safetensors",
    )

    def ask(labels):
        return SimpleNamespace(
            task="classification",
            model=SimpleNamespace(cache_dir=None),
            evaluation=SimpleNamespace(models=dict(a=str(tmp_path / "a"))),
            dataset=SimpleNamespace(labels=None),
        )

    further.check_further(ask(None), ["x", "y", "z"])
    with pytest.raises(MedftError, match="3 labels.*2"):
        further.check_further(ask(None), ["x", "y"])


def test_what_only_another_stage_can_train_is_not_trained_with_trl(tmp_path, base):
    run = make_run(tmp_path, base, "engine=[fast]", engines=())
    with pytest.raises(MedftError, match="stage fast.*04_fast"):
        ev.evaluate(run)
    assert not (run.path / "trl").exists()


def made(folder, name, hits, ids=None, **columns):
    "A finished run of made-up predictions."
    run = Run.create(load_recipe("quickstart", ["engine=[]"]), root=folder, run_id=name)
    n = len(hits)
    ids = ids or [f"q{i}" for i in range(n)]

    def frame(right):
        return pd.DataFrame(
            dict(
                id=ids,
                group=ids,
                subject="",
                prompt_sha256=ids,
                scores=[[-1.0, -2.0] if h else [-2.0, -1.0] for h in right],
                choice=[0 if h else 1 for h in right],
                choice_norm=0,
                truth=0,
                correct=list(map(bool, right)),
            )
            | columns
        )

    for who, right in dict(base=[i % 4 == 0 for i in range(n)], tuned=hits).items():
        ev.keep(run.path / "predictions" / f"{who}.test.parquet", frame(right))
    write_json(run.path / "metrics.json", ev.figures(run))
    run.update(dict(status="finished", stages=dict(evaluate=dict(status="finished"))))
    return run


def test_two_runs_are_compared_item_by_item(tmp_path, capfd, monkeypatch):
    rng = np.random.default_rng(0)
    a, b = made(tmp_path, "a", rng.random(300) < 0.6), made(tmp_path, "b", rng.random(300) < 0.75)
    monkeypatch.setattr(ev, "load_base", None)  # nothing is loaded
    assert main(["evaluate", "--compare", str(a.path), str(b.path), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    (one,) = found["comparisons"]
    fa, fb = (pd.read_parquet(r.path / "predictions" / "tuned.test.parquet") for r in (a, b))
    assert one["effect"] == pytest.approx(fb.correct.mean() - fa.correct.mean(), abs=1e-6) and (
        one["a"],
        one["b"],
        one["label"],
        one["n"],
    ) == ("tuned", "tuned", "better", 300)
    assert (one["gained"], one["lost"]) == (
        int((fb.correct & ~fa.correct).sum()),
        int((fa.correct & ~fb.correct).sum()),
    ) and found["bases_alike"] == ["test"]
    assert main(["evaluate", "--compare", str(b.path), str(a.path)]) == 0
    out = capfd.readouterr().out
    assert "tuned of B is worse than tuned of A" in out and max(map(len, out.splitlines())) < 250


def test_the_order_of_items_does_not_matter(tmp_path):
    hits = np.random.default_rng(0).random(60) < 0.6
    order = np.random.default_rng(1).permutation(60)
    a, b = made(tmp_path, "a", hits), made(tmp_path, "b", hits[order], [f"q{i}" for i in order])
    assert [
        d["effect"] for d in again.compare_finished_runs(a, b)["comparisons"] if d["a"] == "tuned"
    ] == [0.0]


@pytest.mark.parametrize(
    "how,said",
    [
        (dict(n=40), "A has 50, B 40; only in A: 10 (q40, q41, q42, …), only in B: none"),
        (dict(truth=1), "another group or truth: 50"),
        (dict(prompt_sha256="other"), "another prompt: 50"),
        (dict(group="one"), "another group or truth"),
    ],
)
def test_other_items_are_refused(tmp_path, capfd, how, said):
    hits = [True] * 50
    a = made(tmp_path, "a", hits)
    b = made(tmp_path, "b", hits[: how.pop("n", 50)], **how)
    b.update(dict(hashes=dict(data={"test": "another"})))
    assert main(["evaluate", "--compare", str(a.path), str(b.path)]) == 3
    assert said in capfd.readouterr().err


def test_runs_of_another_kind_or_unfinished_are_refused(tmp_path):
    a, b = made(tmp_path, "a", [True] * 20), made(tmp_path, "b", [True] * 20)
    frame = (
        pd.read_parquet(b.path / "predictions" / "base.test.parquet")
        .drop(columns=["scores", "choice", "choice_norm", "truth", "correct"])
        .assign(nll=1.0, tokens=5, bytes=9)
    )
    for p in (b.path / "predictions").glob("*.parquet"):
        ev.keep(p, frame)
    with pytest.raises(Refused, match="options, B text"):
        again.compare_finished_runs(a, b)
    b.update(dict(status="failed"))
    with pytest.raises(MedftError, match="is failed; only finished"):
        again.compare_finished_runs(a, b)


def test_a_report_is_made_again_from_predictions_alone(trained, tmp_path, capfd, monkeypatch):
    run = Run.open(shutil.copytree(trained.path, tmp_path / "quickstart" / "copy"))
    for name in ("trl", "fast"):
        shutil.rmtree(run.path / name / "adapters")
    monkeypatch.setattr(ev, "load_base", None)
    old = read_json(run.path / "metrics.json")
    assert main(["report", str(run.path)]) == 0, capfd.readouterr().err
    assert (
        "every figure is as it was" in capfd.readouterr().out
        and read_json(run.path / "metrics.json") == old
        and (run.path / "report.html").exists()
    )
    monkeypatch.setattr(
        again, "report", lambda *args: "<html>another page</html>"
    )  # pictures take seconds
    wrong = json.loads(json.dumps(old))
    wrong["models"]["trl"]["test"]["accuracy"]["value"] = 0.99
    write_json(run.path / "metrics.json", wrong)
    assert (
        main(["report", str(run.path)]) == 0
        and "1 value changed: models.trl.test.accuracy.value: 0.99 ->" in capfd.readouterr().out
        and read_json(run.path / "metrics.json") == old
    )
    page = (run.path / "report.html").read_bytes()
    (run.path / "predictions" / "trl.other.parquet").unlink()
    assert (
        main(["report", str(run.path)]) == 2
        and "trl.other" in capfd.readouterr().err
        and (run.path / "report.html").read_bytes() == page
    )  # nothing is replaced by half
    assert main(["report", "nowhere"]) == 2


def test_a_run_without_engines_is_not_run(here, capfd):
    assert (
        main(["run", "quickstart", "engine=[]"]) == 2 and "medft evaluate" in capfd.readouterr().err
    )


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_evaluation_is_resumed_to_the_same_result(trained, tmp_path, number):
    "The real thing: kernels, papermill, a signal while the second model answers."
    from stages import medft

    args = ["evaluate", trained.path, OFF, "evaluation.batch_size=1"]
    env = dict(MEDFT_NOTEBOOKS=Path(__file__).parents[2] / "nbs", TQDM_DISABLE=1)
    (tmp_path / "home").mkdir()
    whole, cut = (
        tmp_path / "runs" / "quickstart" / "whole",
        tmp_path / "runs" / "quickstart" / "cut",
    )
    code, out, err = medft(
        tmp_path, *args, "--run-dir", whole, timeout=600, MEDFT_RUNS=tmp_path / "runs", **env
    )
    assert code == 0, err
    p = start(tmp_path, *args, "--run-dir", cut, MEDFT_RUNS=tmp_path / "runs", **env)
    until(lambda: len(list((cut / "predictions").rglob("*.parquet"))) > 2, seconds=300, pause=0.02)
    p.send_signal(number)
    p.communicate(timeout=60)
    assert (
        manifest(cut)["status"] in ("running", "interrupted")
        and not (cut / "metrics.json").exists()
    )
    code, out, err = medft(
        tmp_path, "resume", cut, timeout=600, MEDFT_RUNS=tmp_path / "runs", **env
    )
    assert code == 0, err
    assert "are there already" in (cut / "logs" / "finetune.log").read_text() and read_json(
        cut / "metrics.json"
    ) == read_json(whole / "metrics.json")


@pytest.mark.long
def test_a_model_and_an_adapter_from_the_hub(trained, tmp_path):
    "By name alone, from a stand-in for the hub; a name that it does not know is one line."
    from hub_server import HubServer
    from stages import medft

    def files(folder):
        return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.is_file()}

    (tmp_path / "home").mkdir()
    with HubServer() as hub:
        hub.add("org/base", files(trained.recipe.model.name), kind="model")
        hub.add("org/tuned", files(trained.path / "trl" / "adapters"), kind="model")
        env = hub.env(tmp_path) | dict(
            MEDFT_NOTEBOOKS=Path(__file__).parents[2] / "nbs",
            TQDM_DISABLE=1,
            MEDFT_RUNS=tmp_path / "runs",
        )
        asked = ["--recipe", trained.path / "recipe.yaml", OFF]
        code, out, err = medft(
            tmp_path,
            "evaluate",
            "org/base",
            *asked,
            "--with",
            "tuned=org/tuned",
            "--run-dir",
            tmp_path / "there",
            timeout=600,
            **env,
        )
        assert code == 0, err
        code, out, err = medft(tmp_path, "evaluate", "org/nothere", *asked, timeout=600, **env)
        assert code == 2 and "org/nothere" in err
    here, there = (
        read_json(trained.path / "metrics.json")["models"],
        read_json(tmp_path / "there" / "metrics.json")["models"],
    )
    assert (
        there["base"]["test"]["accuracy"] == here["base"]["test"]["accuracy"]
        and there["tuned"]["test"]["accuracy"] == here["trl"]["test"]["accuracy"]
    )
