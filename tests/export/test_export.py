"""What is handed over is the model that was scored, or is refused.

It has the form asked for; its pages need no other file and hold no secret."""

from medft.core.files import MedftError, Refused, read_json, sha256, write_json
from medft.core.recipe import load_recipe
from medft.core.run import Run
from medft.evaluate import metrics as ev
from medft.evaluate import plots
from medft.export import merging, model_card, parity, publish
from medft.export import publish as ex
from medft.model import adapters, families
from medft.model import load as model

import re
import subprocess

import pandas as pd
import pytest
import test_evaluate
import torch
from safetensors.torch import load_file, save_file
from test_evaluate import make_run, rows

base = test_evaluate.base  # fixtures
classifier = test_evaluate.classifier
reader = test_evaluate.reader


@pytest.fixture
def here(monkeypatch):
    "Score artefacts in this process: a new one would cost every test ten seconds."
    monkeypatch.setattr(parity, "in_fresh_process", parity.score_all)


def again(run, *changes):
    "The same run under a changed recipe."
    return Run(run.path, load_recipe(run.path / "recipe.yaml", changes))


@pytest.fixture(scope="module")
def done(tmp_path_factory, base):
    run = make_run(tmp_path_factory.mktemp("run"), base, engines=("trl", "unsloth"))
    ev.evaluate(run)
    ex.export(run)
    return run


# the files are the model


def test_adapter_and_merged_weights_answer_as_scored(done):
    out = read_json(done.path / "export.json")
    for engine in ("trl", "unsloth"):
        same = out["parity"][engine]["adapter"]
        assert (
            same["label"] == "same"
            and same["n"] == 24
            and same["differing"] == []
            and same["max_score_difference"] == same["median_score_difference"] == 0
        )
        merged = out["parity"][engine]["merged"]
        assert (
            merged["label"] == "same"
            and 0 < merged["mean_logit_difference"] < merged["max_logit_difference"] < 0.2
            and merged["greedy"] == 24
            and merged["how"] == "merged into the base"
        )
    for path, told in out["artefacts"].items():
        assert sha256(done.path / path) == told["sha256"] and told["bytes"] > 0
    assert {
        "trl/adapters",
        "trl/merged",
        "unsloth/merged",
        "README.md",
        "report.html",
        "training.env",
    } <= set(out["artefacts"]) and not (done.path / ".parity").exists()
    assert not list(done.path.rglob("*.bin")) and (done.path / "trl/merged/tokenizer.json").exists()
    weights = load_file(done.path / "trl/merged/model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.bfloat16} and read_json(
        done.path / "trl/merged/config.json"
    )["dtype"] == "bfloat16"


def test_it_was_another_process_that_read_them_back(done):
    log = (done.path / "logs/finetune.log").read_text()
    assert (
        "trl/merged: read back" in log
        and "unsloth/adapters: read back" in log
        and (done.path / "logs/parity.log").exists()
    )


def test_artefacts_that_cannot_be_read_end_in_one_clear_line(tmp_path, base):
    run = make_run(tmp_path, base, "export.merge=false")
    ev.evaluate(run)
    file = run.path / "trl/adapters/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(MedftError) as e:
        ex.export(run)
    assert (
        "fresh process" in str(e.value)
        and "logs/parity.log" in str(e.value)
        and "Error:" not in str(e.value)
        and "\n" not in str(e.value)
        and not (run.path / "export.json").exists()
    )


def test_an_adapter_that_changed_after_scoring_is_refused(tmp_path, base, here):
    run = make_run(tmp_path, base, "export.merge=false")
    ev.evaluate(run)
    file = run.path / "trl/adapters/adapter_model.safetensors"
    save_file({k: torch.randn_like(v) for k, v in load_file(file).items()}, file)
    with pytest.raises(Refused, match="trl/adapter: different"):
        ex.export(run)
    out = read_json(run.path / "export.json")["parity"]["trl"]
    assert (
        out["adapter"]["median_score_difference"] > 0.1
        and "nats per token" in out["adapter"]["why"][-1]
        and "merged" not in out
        and (run.path / "report.html").exists()
    )


def test_a_drift_is_judged_per_scored_token():
    frame = pd.DataFrame(dict(id=["a", "b"], scores=[[-9.0, -20.0], [-9.0, -20.0]], choice=[0, 0]))
    moved = frame.assign(scores=[[-9.3, -20.0], [-9.3, -20.0]])
    assert (
        parity.parity(frame, moved)["label"] == "different"
        and parity.parity(frame, moved, [[6, 6]] * 2)["label"] == "same"
    )


def test_a_toss_up_is_listed_and_a_change_of_mind_refused():
    frame = pd.DataFrame(
        dict(id=[f"q{i}" for i in range(50)], scores=[[-1.0, -1.02]] * 50, choice=[0] * 50)
    )
    edge = parity.parity(
        frame, frame.assign(scores=[[-1.03, -1.02]] + [[-1.0, -1.02]] * 49, choice=[1] + [0] * 49)
    )
    assert edge["label"] == "same" and edge["differing"] == [
        dict(id="q0", scored=0, now=1, undecided=True)
    ]
    other = parity.parity(
        frame, frame.assign(scores=[[-4.0, -1.02]] + [[-1.0, -1.02]] * 49, choice=[1] + [0] * 49)
    )
    assert (
        other["label"] == "different"
        and "1 of 50 answers differ" in parity.parity_in_words(other)
        and "q0" in parity.parity_in_words(other)
    )


def test_greedy_answers_that_part_are_refused_unless_it_was_a_toss_up():
    logits, said = torch.zeros(2, 5), [[[1, 2, 3], [5.0, 3.0, 4.0]], [[1, 2, 3], [5.0, 0.01, 4.0]]]
    now = [[[1, 4, 3], [5.0, 3.0, 4.0]], [[1, 4, 3], [5.0, 0.01, 4.0]]]
    found = parity.compare_written(logits, said, logits, now, ["sure", "toss-up"])
    assert (
        [d["undecided"] for d in found["greedy_differing"]] == [False, True]
        and "sure" in found["why"][0]
        and "toss-up" not in found["why"][0]
    )
    assert parity.compare_written(logits, said, logits + 0.5, said, ["a", "b"])["why"][
        0
    ].startswith("logits moved by 0.5")


@pytest.mark.parametrize("lost", ["stops", "template"])
def test_what_stands_beside_the_weights_must_be_there(done, tmp_path, here, lost):
    import shutil

    shutil.copytree(done.path, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    folder = run.path / "unsloth/merged"
    if lost == "stops":
        write_json(
            folder / "generation_config.json",
            {
                k: v
                for k, v in read_json(folder / "generation_config.json").items()
                if k != "eos_token_id"
            }
            | dict(eos_token_id=5),
        )
    else:
        (folder / "chat_template.jinja").write_text(
            (folder / "chat_template.jinja").read_text().replace("Question", "Query")
        )
    found = parity.check_artefacts(run)
    assert (
        found["trl"]["merged"]["label"] == "same"
        and found["unsloth"]["merged"]["label"] == "different"
    )
    assert dict(stops="stop tokens [1] are missing", template="chat template is another one")[
        lost
    ] in parity.parity_in_words(found["unsloth"]["merged"])


def test_exporting_again_gives_the_same_bytes_and_clears_what_is_not_wanted(done, here):
    before = read_json(done.path / "export.json")["artefacts"]["trl/merged"]["sha256"]
    merging.merge(done, "trl")
    assert sha256(done.path / "trl/merged") == before
    ex.make_artefacts(again(done, "export.merge=false"), "unsloth")
    assert not (done.path / "unsloth/merged").exists()
    merging.merge(done, "unsloth")


# forms


def adapted(tmp_path, family_or_base, *changes, seed=0, **keys):
    "A run with a random adapter, and without data: enough to merge."
    from peft import get_peft_model

    name = (
        family_or_base
        if "/" in str(family_or_base)
        else families.build_tiny(family_or_base, tmp_path / "model")
    )
    run = Run.create(
        load_recipe("quickstart", [f"model.name={name}", "engine=[trl]", *changes]), root=tmp_path
    )
    torch.manual_seed(seed)
    config = adapters.lora_config(run.recipe)
    for k, v in keys.items():
        setattr(config, k, v)
    tuned = get_peft_model(model.load_base(run.recipe), config)
    for n, p in tuned.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p, std=0.02)
    tuned.save_pretrained(run.path / "trl" / "adapters")
    return run


IDS = torch.arange(3, 19).reshape(2, 8)


def gap(run, ids=IDS):
    """Mean differences of a logit: adapter and merged weights, both from disk; adapter and base."""
    logits = {
        what: parity.load_artefact(run, "trl", what)(input_ids=ids).logits.detach().float()
        for what in ("adapter", "merged")
    }
    base = model.load_base(run.recipe)(input_ids=ids).logits.detach().float()
    return (logits["adapter"] - logits["merged"]).abs().mean().item(), (
        logits["adapter"] - base
    ).abs().mean().item()


NF4 = ("quantization.load_in_4bit=true", "quantization.bnb_4bit_use_double_quant=true")


def test_pickles_in_shards_when_asked_though_transformers_ignores_the_wish(tmp_path, base):
    "Trap 6: safe_serialization=False is silently ignored."
    run = adapted(
        tmp_path,
        base,
        "export.merged_save_format=bin",
        "export.max_shard_size=300KB",
        "export.adapter_save_format=bin",
    )
    merging.merge(run, "trl")
    folder = run.path / "trl/merged"
    index = read_json(folder / "pytorch_model.bin.index.json")["weight_map"]
    shards = sorted(folder.glob("pytorch_model-*.bin"))
    assert (
        len(shards) > 1
        and not list(folder.glob("*.safetensors*"))
        and set(index.values()) == {p.name for p in shards}
    )
    held = {k: v for p in shards for k, v in torch.load(p, weights_only=True).items()}
    assert held.keys() == index.keys()
    merging.merge(
        again(run, "export.merged_save_format=safetensors", "export.max_shard_size=5GB"), "trl"
    )
    assert merging.same_tensors(held, load_file(folder / "model.safetensors"))
    merging.merge(run, "trl")
    before = gap(run)
    merging.write_adapter(run.path / "trl/adapters", "bin")
    assert (
        not list((run.path / "trl/adapters").glob("*.safetensors"))
        and gap(run) == before
        and before[0] < 0.05 < before[1]
    )


def test_the_base_that_a_quantised_adapter_is_merged_into(tmp_path, base):
    """Trap 7: merging into the dequantised base loses nothing but rounding.

    The original base is another one, and the export says so."""
    pytest.importorskip("bitsandbytes")
    run = adapted(tmp_path, base, *NF4)
    merging.merge(run, "trl")
    rounding, effect = gap(run)
    merging.merge(other := again(run, "export.merge_base=original"), "trl")
    wrong, _ = gap(run)
    assert (
        rounding < parity.PARITY_TOLERANCE["logits"]
        and rounding < wrong / 3
        and "4-bit base, dequantised" in merging.how_merged(run.recipe)
        and "original 16-bit base" in merging.how_merged(other.recipe)
    )


@pytest.mark.parametrize(
    "changes, keys",
    [
        (["lora.use_dora=true"], {}),
        (["lora.use_rslora=true"], {}),
        (["quantization.load_in_8bit=true"], {}),
    ],
    ids=["dora", "rslora", "8bit"],
)
def test_other_adapters_are_merged_too(tmp_path, base, changes, keys):
    run = adapted(tmp_path, base, *changes, **keys)
    merging.merge(run, "trl")
    lost, effect = gap(run)
    assert lost < min(parity.PARITY_TOLERANCE["logits"], effect / 3)


def test_nemotron_h_with_experts_as_targets(tmp_path):
    run = adapted(
        tmp_path, "nemotron_h", target_parameters=["experts.up_proj", "experts.down_proj"]
    )
    merging.merge(run, "trl")
    lost, effect = gap(run)
    adapter = read_json(run.path / "trl/adapters/adapter_config.json")
    merged = load_file(run.path / "trl/merged/model.safetensors")
    assert (
        adapter["target_parameters"]
        and lost < effect / 3
        and "experts"
        in merging.serve_lines(run, "trl")["not_adapter"].replace("expert parameters", "experts")
    )
    assert {v.dtype for k, v in merged.items() if "e_score_correction_bias" in k} <= {
        torch.float32
    } and torch.bfloat16 in {v.dtype for v in merged.values()}


def test_medgemma_keeps_its_eye(tmp_path):
    """bitsandbytes quantises the vision tower as well; what is handed over has the original one.

    It also has every weight of the checkpoint."""
    pytest.importorskip("bitsandbytes")
    run = adapted(tmp_path, "medgemma", *NF4)
    (tmp_path / "model/preprocessor_config.json").write_text(
        '{"image_processor_type": "Gemma3ImageProcessor"}'
    )
    merging.merge(run, "trl")
    before, after = (
        load_file(tmp_path / "model/model.safetensors"),
        load_file(run.path / "trl/merged/model.safetensors"),
    )
    eye = [k for k in before if "vision" in k or "multi_modal" in k]
    assert (
        before.keys() == after.keys()
        and len(eye) > 10
        and all(torch.equal(before[k], after[k].to(before[k].dtype)) for k in eye)
    )
    assert (
        any(not torch.equal(before[k].bfloat16(), after[k]) for k in before if k not in eye)
        and (run.path / "trl/merged/preprocessor_config.json").exists()
        and gap(run)[0] < parity.PARITY_TOLERANCE["logits"]
    )


def test_the_end_of_a_turn_is_a_stop_token_of_what_is_handed_over(tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    folder = families.build_tiny("gemma3", tmp_path / "model")
    tok = AutoTokenizer.from_pretrained(folder)
    tok.chat_template = (
        "{% for m in messages %}<start>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
    )
    tok.add_special_tokens(dict(additional_special_tokens=["<end_of_turn>"]))
    net = families.model_class(
        families.load_config(load_recipe("quickstart", [f"model.name={folder}"])), "generative"
    ).from_pretrained(folder)
    net.generation_config = GenerationConfig(eos_token_id=1, temperature=0.7, top_p=0.9)
    g = merging.generation_config(net, tok)
    g.save_pretrained(tmp_path)
    assert (
        read_json(tmp_path / "generation_config.json")["eos_token_id"]
        == [1, tok.convert_tokens_to_ids("<end_of_turn>")]
        and g.do_sample
        and g.pad_token_id == tok.pad_token_id
    )


# classifiers and texts


@pytest.fixture(scope="module")
def labelled(classifier):
    "The classifier's run, exported with an ONNX file, its artefacts scored in this process."
    run = again(classifier[0], "export.onnx=true")
    with pytest.MonkeyPatch.context() as m:
        m.setattr(parity, "in_fresh_process", parity.score_all)
        out = ex.export(run)
    return run, out


def test_a_classifier_is_handed_over_with_its_head(labelled):
    run, out = labelled
    found = out["parity"]["trl"]
    assert list(found) == ["adapter", "merged", "onnx"] and all(
        p["label"] == "same" and p["n"] == 60 for p in found.values()
    )
    assert all(
        0 <= found[w]["mean_logit_difference"] <= found[w]["max_logit_difference"] < 0.05
        for w in ("merged", "onnx")
    )
    adapter, merged = (
        load_file(run.path / "trl/adapters/adapter_model.safetensors"),
        load_file(run.path / "trl/merged/model.safetensors"),
    )
    head = next(v for k, v in adapter.items() if "score" in k)
    assert (
        merged["score.weight"].dtype == torch.float32
        and torch.equal(merged["score.weight"], head.float())
        and merged["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
    )
    assert (
        read_json(run.path / "trl/merged/config.json")["id2label"] == {"0": "healthy", "1": "ill"}
        and not (run.path / "trl/merged/generation_config.json").exists()
    )


def test_a_classifier_without_its_head_is_found_out(labelled, tmp_path, here):
    import shutil

    shutil.copytree(labelled[0].path, tmp_path / "run")
    run = again(Run.open(tmp_path / "run"), "export.onnx=true")
    shutil.rmtree(run.path / "trl/onnx")
    file = run.path / "trl/merged/model.safetensors"
    held = load_file(file)
    held["score.weight"] = held["score.weight"].flip(0).contiguous()
    save_file(held, file, metadata={"format": "pt"})
    p = parity.check_artefacts(run)["trl"]["merged"]
    assert (
        p["label"] == "different"
        and "the classifier's head is another one" in p["why"]
        and p["differing"]
    )


def test_an_onnx_classifier_takes_any_batch_and_holds_no_path(labelled):
    run, _ = labelled
    onnx, net = parity.load_artefact(run, "trl", "onnx"), parity.load_artefact(run, "trl", "merged")
    for shape in ((1, 4), (3, 17)):
        ids = torch.randint(3, 2000, shape)
        mask = torch.ones_like(ids)
        mask[0, 2:] = 0
        assert torch.allclose(
            net(input_ids=ids, attention_mask=mask).logits, onnx(ids, mask).logits, atol=1e-4
        )
    raw = (run.path / "trl/onnx/model.onnx").read_bytes()
    assert (
        b"site-packages" not in raw
        and b"/medft" not in raw
        and b".py" not in raw
        and publish.binary_problems(run.path / "trl/onnx/model.onnx") == []
    )


def test_the_pages_of_a_classifier(labelled):
    from huggingface_hub import ModelCard

    run, out = labelled
    card, page, metrics = (
        ModelCard.load(run.path / "README.md"),
        (run.path / "report.html").read_text(),
        read_json(run.path / "metrics.json"),
    )
    told = {r.metric_name: r.metric_value for r in card.data.eval_results}
    assert (
        card.data.pipeline_tag == "text-classification"
        and told["f1 (trl)"] == metrics["models"]["trl"]["test"]["f1"]["value"]
        and {"precision (trl)", "recall (trl)", "auroc (trl)"} <= set(told)
    )
    for text in (card.text, page):
        assert (
            "majority" in text
            and "is ill" in text
            and "said healthy" in text
            and metrics["between"]["trl - " + next(iter(metrics["baselines"]))]["sentence"][:30]
            in text
        )
    assert (
        "AutoModelForSequenceClassification" in card.text
        and "num_labels=2" in card.text
        and "Labels, in order: healthy, ill" in card.text
        and "<h2>Mistakes" in page
        and page.count("<svg") >= 2
    )
    lines = out["serve"]["trl"]
    assert (
        "--runner pooling --convert classify" in lines["merged"]
        and "score" in lines["not_adapter"]
        and lines["merged"] in card.text
        and lines["not_adapter"] in card.text
    )


def test_a_text_model_is_handed_over_whole(reader, here):
    run, metrics = reader
    out = ex.export(run)
    found = out["parity"]["trl"]
    card = (run.path / "README.md").read_text()
    assert (
        list(found) == ["model"]
        and found["model"]["label"] == "same"
        and found["model"]["n"] == 10
        and out["serve"]["trl"]["model"].startswith("vllm serve trl/model ")
    )
    assert (
        "bits per byte" in card
        and "Load the adapter" not in card
        and "none: every weight was trained" in card
        and "<h2>Texts that changed" in (run.path / "report.html").read_text()
    )


def test_what_vllm_does_not_take_is_said(tmp_path, base):
    refuse = merging.not_as_adapter
    assert (
        refuse(dict(r=8)) is None
        and "DoRA" in refuse(dict(r=8, use_dora=True))
        and "512" in refuse(dict(r=600))
        and "biases" in refuse(dict(r=8, bias="all"))
    )
    assert (
        "Nemotron" in merging.not_served("classification", families.tiny_config("nemotron_h"))
        and merging.not_served("generative", families.tiny_config("nemotron_h")) is None
    )


# pages


def test_the_vllm_line_is_in_log_card_and_json(done):
    line = read_json(done.path / "export.json")["serve"]["trl"]
    assert (
        line["merged"]
        == "vllm serve trl/merged --served-model-name quickstart"
        " --dtype bfloat16 --max-model-len 160"
        and "--enable-lora --max-lora-rank 16 --lora-modules quickstart=trl/adapters"
        in line["adapter"]
    )
    for text in (
        (done.path / "README.md").read_text(),
        (done.path / "logs/finetune.log").read_text(),
    ):
        assert line["merged"] in text and line["adapter"] in text


def test_the_report_is_one_page_with_the_verdict_first(done):
    page, metrics = (done.path / "report.html").read_text(), read_json(done.path / "metrics.json")
    assert not re.search(
        r"""(src|href)\s*=\s*["'](?!#)|@import|url\((?!['"]?#)|<script|<link""", page
    )
    assert (
        0 < page.index(metrics["verdict"]["trl"]["sentence"].split(":")[0]) < page.index("<table")
    )
    assert (
        page.count("<svg") >= 2
        and "width=device-width" in page
        and "Recipe" in page
        and "Manifest" in page
    )
    for who in ("base", "trl", "unsloth"):
        assert plots.written(metrics["models"][who]["test"]["accuracy"], True) in page


def test_markup_in_the_data_stays_text(tmp_path, base, here):
    bad = [
        r
        | dict(question=f"<img src=x onerror=alert(1)> {r['question']}", subject_name="<b>bold</b>")
        for r in rows(24, 3)
    ]
    run = make_run(tmp_path, base, "export.merge=false", "description='<i>told</i>'", test_rows=bad)
    ev.evaluate(run)
    ex.export(run)
    page = (run.path / "report.html").read_text()
    assert (
        not any(t in page for t in ("<img", "<b>", "<i>"))
        and "&lt;i&gt;told" in page
        and "&lt;img src=x" in page
    )


def test_the_card_tells_the_same_figures(done):
    from huggingface_hub import ModelCard

    card, metrics = ModelCard.load(done.path / "README.md"), read_json(done.path / "metrics.json")
    told = {(r.dataset_split, r.metric_name): r.metric_value for r in card.data.eval_results}
    assert (
        told["test", "accuracy (trl)"] == metrics["models"]["trl"]["test"]["accuracy"]["value"]
        and ("test", "accuracy (base)") not in told
    )
    assert (
        metrics["verdict"]["trl"]["sentence"] in card.text
        and "Out of scope" in card.text
        and "Notice" not in card.text
    )
    for h in read_json(done.path / "data/report.json")["hashes"].values():
        assert h in card.text
    assert card.text.count("unknown: not stated") >= 4, (
        "the licence of local files is not known, and that is said"
    )


def test_a_stated_licence_is_quoted(tmp_path):
    from medft.export.model_card import UNKNOWN, data_licence

    (tmp_path / "rows.jsonl").write_text("{}")
    d = load_recipe("quickstart").dataset
    assert data_licence(str(tmp_path / "rows.jsonl"), d) == UNKNOWN
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Rows\n")
    assert data_licence(str(tmp_path / "rows.jsonl"), d) == "cc-by-4.0"


def test_derivatives_carry_the_notice_of_their_base(tmp_path):
    subject = "is provided under and subject to the"
    hai_def = "Health AI Developer Foundations Terms of Use found at"
    for name, words in {
        "google/gemma-3-1b-it": f"Gemma {subject} Gemma Terms of Use found at",
        "google/medgemma-1.5-4b-it": f"HAI-DEF {subject} {hai_def}",
        "meta-llama/Llama-3.1-8B": "Built with Llama",
    }.items():
        assert words in model_card.notice(name)
        assert "modified version" in model_card.notice(name)
    assert (
        "Gemma Terms of Use" in model_card.notice("someone/my-tuned", "Gemma3ForCausalLM")
        and model_card.notice("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "LlamaForCausalLM") == ""
    )
    run = Run.create(
        load_recipe("quickstart", ["model.name=google/gemma-3-1b-it", "export.merge=false"]),
        root=tmp_path,
    )
    (run.path / "trl/adapters").mkdir(parents=True)
    ex.make_artefacts(run, "trl")
    assert "modified version of Gemma" in (run.path / "trl/adapters/NOTICE").read_text()


def test_training_env_is_read_by_a_shell(done, tmp_path):
    out = subprocess.run(
        [
            "bash",
            "-c",
            f'set -eu; . "{done.path}/training.env";'
            ' echo "$TRAINING_LEARNING_RATE|$MODEL_NAME|$LORA_R|$DESCRIPTION"',
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    r = done.recipe
    assert out.strip() == f"{r.training.learning_rate}|{r.model.name}|{r.lora.r}|{r.description}"


@pytest.mark.parametrize(
    "text", ["hf_" + "a" * 34, "http://me:hunter22@server/x", "the value swordfish99 itself"]
)
def test_secrets_are_named_never_shown(text):
    with pytest.raises(Refused) as e:
        ex.refuse_secrets(
            text, "README.md", {"MY_API_KEY": "swordfish99", "TOKENIZERS_PARALLELISM": "false"}
        )
    assert (
        "README.md" in str(e.value)
        and "swordfish99" not in str(e.value)
        and "hunter22" not in str(e.value)
        and "a" * 20 not in str(e.value)
    )


def test_a_secret_in_the_recipe_stops_the_export(tmp_path, base, here, monkeypatch):
    run = make_run(tmp_path, base, "export.merge=false", "description=made with swordfish99")
    ev.evaluate(run)
    monkeypatch.setenv("HF_TOKEN", "swordfish99")
    with pytest.raises(Refused, match=r"\$HF_TOKEN"):
        ex.export(run)
    assert not any(
        (run.path / f).exists() for f in ("README.md", "report.html", "training.env", "export.json")
    )
