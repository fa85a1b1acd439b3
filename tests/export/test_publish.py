"""Publishing: only when asked, only what was searched, private by default.

A broken upload continues where it stopped."""

from medft.core.files import MedftError, Refused, read_json
from medft.data.chat_templates import load_tokenizer
from medft.evaluate import metrics as ev
from medft.export import parity, publish
from medft.export import publish as ex

import json

import pytest
import test_evaluate
import torch
from hub_server import HubServer
from safetensors.torch import save_file
from test_evaluate import make_run
from test_export import again

base = test_evaluate.base  # a fixture

NAME = "owner/tuned"


@pytest.fixture(scope="module")
def made(tmp_path_factory, base):
    "A run with an adapter and merged weights, exported without a push."
    run = make_run(tmp_path_factory.mktemp("run"), base, "export.max_shard_size=600KB")
    load_tokenizer(run.recipe).save_pretrained(run.path / "trl/adapters")
    ev.evaluate(run)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(parity, "in_fresh_process", parity.score_all)
        ex.export(run)
    return run


@pytest.fixture
def hub(monkeypatch):
    "A hub of our own, which this process takes for the only one."
    from huggingface_hub import constants

    with HubServer() as hub:
        for k, v in dict(ENDPOINT=hub.url, HF_HUB_OFFLINE=False, HF_HUB_DISABLE_XET=True).items():
            monkeypatch.setattr(constants, k, v)
        monkeypatch.setenv("HF_TOKEN", "hf_owner")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield hub


def push(run, *changes, name=NAME):
    run = again(run, "export.push_to_hub=true", f"output.hub_model_id={name}", *changes)
    return publish.publish(
        run, read_json(run.path / "metrics.json"), read_json(run.path / "export.json")["parity"]
    )


def held(hub, name=NAME):
    repo = hub.repos["model", name]
    return repo.commits[repo.refs["main"]]


def uploads(hub):
    return [path for method, path in hub.requests if method == "PUT"]


def test_nothing_leaves_without_the_flag(made, hub, monkeypatch):
    monkeypatch.setattr(parity, "in_fresh_process", parity.score_all)
    ex.export(again(made, f"output.hub_model_id={NAME}"))
    assert hub.requests == [] and "hub" not in read_json(made.path / "export.json")


def test_a_push_makes_a_private_repository_with_adapter_merged_weights_and_card(
    made, hub, tmp_path, monkeypatch
):
    monkeypatch.setattr(parity, "in_fresh_process", parity.score_all)
    out = ex.export(again(made, "export.push_to_hub=true", f"output.hub_model_id={NAME}"))
    files, repo = held(hub), hub.repos["model", NAME]
    assert (
        repo.private
        and len(repo.messages) == 2
        and not hub.unknown
        and out["hub"]["repository"] == NAME
    )
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "README.md",
        "merged/config.json",
        "merged/generation_config.json",
        "merged/model.safetensors.index.json",
    } <= set(files)
    assert files["adapter_model.safetensors"] == (
        made.path / "trl/adapters/adapter_model.safetensors"
    ).read_bytes() and not [f for f in files if "report" in f or "metrics" in f or "training" in f]
    card = files["README.md"].decode()
    assert (
        f'PeftModel.from_pretrained(base, "{NAME}")' in card
        and "vllm serve tuned/merged" in card
        and f"hf download {NAME} --include 'merged/*'" in card
        and 'trl/adapters")' not in card
    )
    assert (
        "/" in made.recipe.model.name
        and json.loads(files["adapter_config.json"])["base_model_name_or_path"]
        == made.recipe.model.name.rsplit("/", 1)[1]
    )
    assert not (made.path / ".publish").exists()


def test_what_is_pushed_loads_as_what_was_scored(made, hub, tmp_path, monkeypatch):
    push(made)
    files = held(hub)
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    from transformers import AutoModelForCausalLM

    a, b = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
        AutoModelForCausalLM.from_pretrained(made.path / "trl/merged"),
    )
    assert all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def test_an_upload_that_broke_goes_on_and_sends_only_what_is_missing(made, hub):
    hub.uploads_left = 1
    with pytest.raises(MedftError) as e:
        push(made)
    assert (
        "broke off" in str(e.value)
        and "only the rest is sent" in str(e.value)
        and "\n" not in str(e.value)
    )
    there = set(hub.large)
    assert len(there) >= 1 and len(hub.repos["model", NAME].messages) == 1, "no half commit"
    hub.uploads_left = None
    hub.requests.clear()
    push(made)
    large = {p for p, d in held(hub).items() if p.endswith(".safetensors")}
    again_sent = {p.rsplit("/", 1)[1] for p in uploads(hub)}
    assert not again_sent & there and len(again_sent) + len(there) == len(large) and len(large) > 2


def test_pushing_twice_sends_no_weights_again(made, hub):
    push(made)
    hub.requests.clear()
    push(made)
    assert uploads(hub) == []


def test_a_public_repository_is_refused_unless_that_is_meant(made, hub):
    hub.add(NAME, {"README.md": b"# mine"}, kind="model")
    with pytest.raises(Refused, match="is public; set export.private: false"):
        push(made)
    assert set(held(hub)) == {"README.md"} and not uploads(hub)
    push(made, "export.private=false")
    assert "adapter_model.safetensors" in held(hub)
    push(made, "export.private=false", name="owner/open")
    assert not hub.repos["model", "owner/open"].private


def test_problems_with_the_hub_are_one_line_before_any_work(made, hub, monkeypatch):
    def start(*changes):
        return ex.export(again(made, "export.push_to_hub=true", *changes))

    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(MedftError, match="does not let this token write"):
        start(f"output.hub_model_id={NAME}")
    monkeypatch.setattr(publish, "get_token", lambda: None)
    with pytest.raises(MedftError, match="no token"):
        start(f"output.hub_model_id={NAME}")
    monkeypatch.setattr(publish, "get_token", lambda: "hf_reader")
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    with pytest.raises(MedftError, match="does not let this token write"):
        push(made)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(MedftError, match="broke off"):
        start(f"output.hub_model_id={NAME}")


PROMPT = "Question: Question 1 3?\nA. iron\nB. zinc\nC. lead\nD. gold\nAnswer:"


@pytest.mark.parametrize(
    "text, what",
    [
        ("trained with swordfish99", r"README.md:\d+: the value of \$MY_API_KEY"),
        ("made by hf_" + "a" * 34, r"README.md:\d+: something shaped like a hub token"),
        ("from /home/anna/notes/rows.jsonl", r"README.md:\d+: a path on this machine"),
        ("ask anna.muster@example.com", r"README.md:\d+: identifier \(email\)"),
        ("patient MRN: 84812345", r"README.md:\d+: identifier \(mrn\)"),
        ("for example " + PROMPT.replace("\n", " "), r"README.md:\d+: text of a training prompt"),
    ],
)
def test_a_scan_refuses_what_must_not_go_up(made, hub, monkeypatch, text, what):
    monkeypatch.setenv("MY_API_KEY", "swordfish99")
    with pytest.raises(Refused, match="nothing was pushed: .*" + what) as e:
        push(made, f"description={text!r}")
    assert (
        not uploads(hub)
        and ("model", NAME) not in hub.repos
        and not any(
            s in str(e.value) for s in ("swordfish99", "a" * 20, "anna", "84812345", "zinc")
        )
    )
    assert not (made.path / ".publish").exists()


def test_the_run_itself_has_nothing_to_hide(made, hub):
    assert push(made)["files"]


def test_weights_configs_and_tokenizers_are_read_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "swordfish99")
    save_file(
        {"a": torch.eye(2)},
        tmp_path / "model.safetensors",
        metadata=dict(source="/home/anna/llama"),
    )
    (tmp_path / "config.json").write_text('{\n "_name_or_path": "/scratch/anna/llama"\n}')
    (tmp_path / "tokenizer_config.json").write_text('{"token": "swordfish99"}')
    (tmp_path / "tokenizer.json").write_text(
        '{"added_tokens": [], "model": {"vocab": {"/home/user": 1}}, "normalizer": "swordfish99"}'
    )
    torch.save({"a": torch.eye(2)}, tmp_path / "adapter_model.bin")
    torch.save({"a": print}, tmp_path / "pytorch_model.bin")
    torch.save(Exception("code"), tmp_path / "training_args.bin")
    found = publish.scan_upload(tmp_path)

    def at(line):
        return [f for f in found if f.startswith(line)]

    assert (
        at("config.json:2: a path on this machine")
        and at("model.safetensors:1: a path on this machine, in its header")
        and at("tokenizer_config.json:1: the value of $HF_TOKEN")
    )
    assert len(at("tokenizer.json:1")) == 1, "a secret, and no word of its vocabulary"
    assert (
        at("pytorch_model.bin:1: a pickle that is not only tensors")
        and at("training_args.bin:1: a pickle")
        and not at("adapter_model.bin")
    )


def test_only_files_of_a_model_go_up(made, hub):
    stray = made.path / "trl/adapters/training_args.bin"
    torch.save({"a": 1}, stray)
    notes = made.path / "trl/merged/notes.txt"
    notes.write_text("x")
    try:
        push(made)
    finally:
        stray.unlink()
        notes.unlink()
    assert not [f for f in held(hub) if "training_args" in f or "notes" in f]
