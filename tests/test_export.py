"""What is handed over: the model that was scored, or a refusal; pages that need nothing else; no secret in them."""
import re, subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

from medft import evaluate as ev, export as ex
from medft.core import Refused, read_json, sha256
from test_evaluate import base, make_run, rows  # noqa: F401


@pytest.fixture(scope="module")
def done(tmp_path_factory, base):
    run = make_run(tmp_path_factory.mktemp("run"), base, engines=("trl", "unsloth"))
    ev.evaluate(run); ex.export(run)
    return run


def test_adapter_and_merged_weights_answer_as_scored(done):
    out = read_json(done.path/"export.json")
    for engine in ("trl", "unsloth"):
        assert out["parity"][engine]["adapter"] == dict(label="same", n=24, differing=[], max_score_difference=0.0, median_score_difference=0.0)
        merged = out["parity"][engine]["merged"]
        assert merged["label"] in ("same", "nearly the same") and 0 < merged["max_logit_difference"] < .2
    for path, told in out["artefacts"].items(): assert sha256(done.path/path) == told["sha256"] and told["bytes"] > 0
    assert {"trl/adapters", "trl/merged", "unsloth/merged", "README.md", "report.html", "training.env"} <= set(out["artefacts"])
    assert not list(done.path.rglob("*.bin")) and list((done.path/"trl/merged").glob("*.safetensors")) and (done.path/"trl/merged/tokenizer.json").exists()


def test_an_adapter_that_changed_after_scoring_is_refused(tmp_path, base):
    run = make_run(tmp_path, base, "export.merge=false"); ev.evaluate(run)
    file = run.path/"trl/adapters/adapter_model.safetensors"
    save_file({k: torch.randn_like(v) for k, v in load_file(file).items()}, file)
    with pytest.raises(Refused, match="trl/adapter: different"): ex.export(run)
    out = read_json(run.path/"export.json")["parity"]["trl"]
    assert out["adapter"]["median_score_difference"] > .1 and "merged" not in out and (run.path/"report.html").exists()


def test_the_report_is_one_page_with_the_verdict_first(done):
    page, metrics = (done.path/"report.html").read_text(), read_json(done.path/"metrics.json")
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)|@import|url\((?!['"]?#)|<script|<link""", page)
    assert 0 < page.index(metrics["verdict"]["trl"]["sentence"].split(":")[0]) < page.index("<table")
    assert page.count("<svg") >= 2 and "width=device-width" in page and "Recipe" in page and "Manifest" in page
    for who in ("base", "trl", "unsloth"): assert ev.written(metrics["models"][who]["test"]["accuracy"], True) in page


def test_markup_in_the_data_stays_text(tmp_path, base):
    bad = [r | dict(question=f"<img src=x onerror=alert(1)> {r['question']}", subject_name="<b>bold</b>") for r in rows(24, 3)]
    run = make_run(tmp_path, base, "export.merge=false", "description='<i>told</i>'", test_rows=bad); ev.evaluate(run); ex.export(run)
    page = (run.path/"report.html").read_text()
    assert not any(t in page for t in ("<img", "<b>", "<i>")) and "&lt;i&gt;told" in page and "&lt;img src=x" in page


def test_the_card_tells_the_same_figures(done):
    from huggingface_hub import ModelCard
    card, metrics = ModelCard.load(done.path/"README.md"), read_json(done.path/"metrics.json")
    told = {(r.dataset_split, r.metric_name): r.metric_value for r in card.data.eval_results}
    assert told["test", "accuracy (trl)"] == metrics["models"]["trl"]["test"]["accuracy"]["value"] and ("test", "accuracy (base)") not in told
    assert metrics["verdict"]["trl"]["sentence"] in card.text and "Out of scope" in card.text and "Notice" not in card.text
    for h in read_json(done.path/"data/report.json")["hashes"].values(): assert h in card.text


def test_derivatives_of_gemma_carry_its_notice():
    assert "Gemma Terms of Use" in ex.notice("someone/my-tuned", "Gemma3ForCausalLM") and "HAI-DEF" in ex.notice("google/medgemma-1.5-4b-it")
    assert ex.notice("meta-llama/Llama-3.1-8B") == ""


def test_training_env_is_read_by_a_shell(done, tmp_path):
    out = subprocess.run(["bash", "-c", f'set -eu; . "{done.path}/training.env"; echo "$TRAINING_LEARNING_RATE|$MODEL_NAME|$LORA_R|$DESCRIPTION"'], capture_output=True, text=True, check=True).stdout
    r = done.recipe
    assert out.strip() == f"{r.training.learning_rate}|{r.model.name}|{r.lora.r}|{r.description}"


@pytest.mark.parametrize("text", ["hf_" + "a"*34, "http://me:hunter22@server/x", "the value swordfish99 itself"])
def test_secrets_are_named_never_shown(text):
    with pytest.raises(Refused) as e: ex.refuse_secrets(text, "README.md", {"MY_API_KEY": "swordfish99", "TOKENIZERS_PARALLELISM": "false"})
    assert "README.md" in str(e.value) and "swordfish99" not in str(e.value) and "hunter22" not in str(e.value) and "a"*20 not in str(e.value)


def test_a_secret_in_the_recipe_stops_the_export(tmp_path, base, monkeypatch):
    run = make_run(tmp_path, base, "export.merge=false", "description=made with swordfish99"); ev.evaluate(run)
    monkeypatch.setenv("HF_TOKEN", "swordfish99")
    with pytest.raises(Refused, match=r"\$HF_TOKEN"): ex.export(run)
    assert not any((run.path/f).exists() for f in ("README.md", "report.html", "training.env", "export.json"))


def test_a_quantised_base_is_dequantised_to_merge_and_the_page_says_so(tmp_path, base):
    pytest.importorskip("bitsandbytes")
    run = make_run(tmp_path, base, "quantization.load_in_4bit=true", "quantization.bnb_4bit_use_double_quant=true"); ev.evaluate(run)
    try: ex.export(run)
    except Refused: pass    # a random base is undecided between its options; what counts here is that the loss is measured and said
    merged = read_json(run.path/"export.json")["parity"]["trl"]["merged"]
    assert "4-bit base, dequantised" in merged["how"] and merged["max_logit_difference"] > 0 and "dequantised" in (run.path/"report.html").read_text()
