"""Evaluation: the same answers however they are batched, figures that follow from the files, and nothing scored that was trained on."""
import json

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, MistralConfig, NemotronHConfig

from medft import data, evaluate as ev
from medft.core import MedftError, Run, assets, load_recipe, read_json, write_json

SHAPE = dict(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
             pad_token_id=0, initializer_range=.3)
FAMILIES = dict(
    gemma3=Gemma3TextConfig(**SHAPE, sliding_window=8, layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    gemma2=Gemma2Config(**SHAPE, sliding_window=8, final_logit_softcapping=2.0),
    mistral=MistralConfig(**SHAPE, sliding_window=8),
    nemotron_h=NemotronHConfig(vocab_size=128, hidden_size=32, intermediate_size=64, layers_block_type=["mamba", "attention", "mlp"], num_attention_heads=4,
                               num_key_value_heads=2, head_dim=8, mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=8, n_groups=1, chunk_size=8))


def questions(n=11, seed=0):
    rng = np.random.default_rng(seed); ids = lambda k: rng.integers(3, 120, k).tolist()
    return [(ids(rng.integers(3, 40)), [ids(rng.integers(1, 6)) for _ in range(rng.integers(2, 5))]) for _ in range(n)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_scores_the_same_in_a_batch_alone_and_behind_a_shared_prompt(family):
    torch.manual_seed(0)
    model, items = AutoModelForCausalLM.from_config(FAMILIES[family]).eval(), questions()
    rows = [(p + o, [0]*len(p) + [1]*len(o)) for p, options in items for o in options]
    def plain(ids, mask): logs = model(torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1); return sum(logs[t - 1, ids[t]].item() for t in range(1, len(ids)) if mask[t])
    with torch.no_grad(): reference = np.array([plain(*r) for r in rows])
    assert np.allclose(ev.score_rows(model, rows), reference, atol=1e-4)
    assert ev.shares_prompts(model) == (family != "nemotron_h")
    if family != "nemotron_h": assert np.allclose(ev.score_branches(model, items), reference, atol=1e-4)


def test_the_head_never_sees_more_than_the_scored_positions():
    model = AutoModelForCausalLM.from_config(FAMILIES["mistral"]).eval(); seen = []
    hook = model.get_output_embeddings().register_forward_hook(lambda head, args, out: seen.append(out.shape[1]))
    ev.score_rows(model, [([5]*40, [0]*37 + [1]*3), ([6]*30, [0]*29 + [1])]); hook.remove()
    assert seen == [4]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    from transformers import AutoConfig, AutoTokenizer
    out = tmp_path_factory.mktemp("base"); config = AutoConfig.from_pretrained(assets()/"tiny_base"); config.num_hidden_layers, config.initializer_range = 2, .1
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(out)
    AutoTokenizer.from_pretrained(assets()/"tiny_base").save_pretrained(out)
    return out


def rows(n, seed, subject=("Anatomy", "Medicine")):
    rng = np.random.default_rng(seed)
    return [dict(id=f"{seed}-{i}", question=f"Question {seed} {i}?", opa="iron", opb="zinc" if i % 6 else "zinc sulphate", opc="lead", opd="gold", cop=int(rng.integers(0, 4)),
                 subject_name=subject[i % len(subject)]) for i in range(n)]


def make_run(tmp_path, base, *more, train_rows=None, test_rows=None, engines=("trl",)):
    "A run with adapters that were never trained: random ones, each engine's its own."
    from peft import get_peft_model
    from medft import model
    for name, part in (("train", train_rows or rows(6, 1)), ("validation", rows(4, 2)), ("test", test_rows or rows(24, 3)), ("other", rows(8, 4))):
        (tmp_path/f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
    run = Run.create(load_recipe("quickstart", [
        f"model.name={base}", f"dataset.path={tmp_path}/train.jsonl", f"dataset.validation_path={tmp_path}/validation.jsonl", f"dataset.test_path={tmp_path}/test.jsonl",
        f"dataset.sets={{other: {tmp_path}/other.jsonl}}", "dataset.max_samples=null", *more]), root=tmp_path)
    data.prepare(run)
    for i, engine in enumerate(engines):
        torch.manual_seed(i); config = model.lora_config(run.recipe); config.init_lora_weights = False
        get_peft_model(model.load_base(run.recipe), config).save_pretrained(run.path/engine/"adapters")
        write_json(run.path/engine/"training.json", dict(status="finished", engine=engine, seconds=1.0, steps=3))
    return run


def test_a_run_is_scored_and_every_figure_follows_from_its_files(tmp_path, base):
    run = make_run(tmp_path, base, engines=("trl", "unsloth"))
    metrics = ev.evaluate(run)
    assert list(metrics["models"]) == ["base", "trl", "unsloth"] and list(metrics["verdict"]) == ["trl", "unsloth"] and "unsloth - trl" in metrics["between"]
    assert sorted(p.name for p in (run.path/"predictions").iterdir()) == sorted(f"{m}.{s}.parquet" for m in ("base", "trl", "unsloth") for s in ("test", "other"))
    frame = pd.read_parquet(run.path/"predictions/trl.test.parquet")
    assert set(frame) >= {"id", "group", "subject", "prompt_sha256", "scores", "choice", "choice_norm", "truth", "correct"}
    for who in metrics["models"]:
        f = pd.read_parquet(run.path/f"predictions/{who}.test.parquet"); told = metrics["models"][who]["test"]["accuracy"]
        assert told["value"] == round(f.correct.mean(), 6) and told["n"] == 24 and told["ci95"][0] <= told["value"] <= told["ci95"][1]
        assert [int(np.argmax(s)) for s in f.scores] == f.choice.tolist()
    assert set(metrics["verdict"]["trl"]) >= {"label", "metric", "effect", "ci95", "p", "n", "detectable", "sentence"}
    assert read_json(run.path/"metrics.json") == json.loads(json.dumps(metrics))


def test_neither_batch_size_nor_what_was_scored_before_changes_a_choice(tmp_path, base):
    run = make_run(tmp_path, base, engines=("trl", "unsloth"))
    ev.evaluate(run); before = ev.read_predictions(run)
    tok, items = data.load_tokenizer(run.recipe), data.load_split(run, "test").to_list()
    for size in (1, 7):
        fresh = ev.predict_choices(ev.load_tuned(run, "unsloth"), tok, items, batch_size=size)
        assert fresh.choice.tolist() == before["unsloth", "test"].choice.tolist()
        assert np.allclose(fresh.scores.tolist(), before["unsloth", "test"].scores.tolist(), atol=1e-3)
    scores = {who: np.array(before[who, "test"].scores.tolist()) for who in ("base", "trl", "unsloth")}
    assert not any(np.allclose(scores[a], scores[b], atol=.01) for a, b in (("base", "trl"), ("trl", "unsloth"), ("base", "unsloth")))


def test_scoring_twice_writes_the_same_bytes(tmp_path, base):
    run = make_run(tmp_path, base); files = lambda: {p.name: p.read_bytes() for p in (run.path/"predictions").iterdir()} | {"metrics": (run.path/"metrics.json").read_bytes()}
    ev.evaluate(run); first = files(); ev.evaluate(run)
    assert files() == first


def test_a_row_that_was_trained_on_is_not_scored(tmp_path, base):
    run = make_run(tmp_path, base, "dataset.checks={overlap: off}", test_rows=[*rows(5, 3), *rows(1, 1)])
    with pytest.raises(MedftError, match="1-0.*measure memory"): ev.evaluate(run)
    assert not (run.path/"predictions").exists() and not (run.path/"metrics.json").exists()


def test_predictions_about_other_items_are_not_compared(tmp_path, base):
    frame = pd.DataFrame(dict(id=["a"], prompt_sha256=["x"], correct=[True]))
    with pytest.raises(MedftError, match="different items"): ev.compare(frame, frame.assign(prompt_sha256="y"))


def test_options_are_scored_without_the_end_token_and_chosen_by_their_sum(tmp_path, base):
    run = make_run(tmp_path, base); items = data.load_split(run, "test").to_list()
    assert not any(o.endswith(data.load_tokenizer(run.recipe).eos_token) for r in items for o in r["options"])
    frame = ev.predict_choices(ev.load_base(run.recipe), data.load_tokenizer(run.recipe), items)
    assert any(len(set(map(len, r["options"]))) > 1 for r in items)
    lengths = [[len(o.strip()) for o in r["options"]] for r in items]
    assert frame.choice_norm.tolist() == [int(np.argmax(np.array(s)/l)) for s, l in zip(frame.scores, lengths)]


def test_running_text_is_scored_token_for_token(tmp_path, base):
    from transformers import AutoTokenizer
    tok = AutoTokenizer.from_pretrained(base); model = AutoModelForCausalLM.from_pretrained(base).eval()
    text = [dict(id=str(i), group=str(i), prompt="", **{k: v[0] for k, v in data.encode(tok, [""], [t]).items()}) for i, t in enumerate(["Zinc heals wounds. "*9, "Iron."])]
    frame = ev.predict_text(model, tok, text, length=512)
    with torch.no_grad(): loss = model(torch.tensor([text[0]["input_ids"]]), labels=torch.tensor([text[0]["input_ids"]])).loss.item()
    assert frame.nll[0]/frame.tokens[0] == pytest.approx(loss, rel=1e-4) and frame.tokens.tolist() == [len(t["input_ids"]) - 1 for t in text]
    assert ev.predict_text(model, tok, text, length=10).tokens.tolist() == frame.tokens.tolist()
    worse = ev.compare(frame, frame.assign(nll=frame.nll*1.5)); assert worse["metric"] == "loss" and worse["effect"] > 0
    assert set(ev.measure(frame)) == {"loss", "perplexity", "bits_per_byte"}


def test_losses_get_a_verdict_too():
    rng = np.random.default_rng(0); tokens = rng.integers(50, 150, 80)
    base = pd.DataFrame(dict(id=range(80), prompt_sha256="", nll=tokens*rng.normal(2.3, .3, 80), tokens=tokens, bytes=tokens*3))
    assert ev.compare(base, base.assign(nll=base.nll*rng.normal(.9, .02, 80)))["label"] == "better"
    assert ev.compare(base, base.assign(nll=base.nll*rng.normal(1.1, .02, 80)))["label"] == "worse"
    same = ev.compare(base, base.assign(nll=base.nll + rng.normal(0, 5, 80))); assert same["label"] == "tie" and same["detectable"] > 0
    assert ev.compare(base, base)["label"] == "tie"


def test_mcnemar_is_exact_when_few_pairs_disagree():
    from scipy.stats import binomtest
    few = ev.compare_choices(np.repeat([True, False, True], [80, 9, 2]), np.repeat([True, True, False], [80, 9, 2]))
    assert few["p"] == pytest.approx(binomtest(2, 11).pvalue) and (few["gained"], few["lost"]) == (9, 2)
    alike = ev.compare_choices([True]*50, [True]*50)
    assert alike["p"] == 1 and alike["label"] == "tie" and alike["ci95"][0] < 0 < alike["ci95"][1] and alike["detectable"] > 0


def test_words_say_what_the_figures_say():
    d = dict(label="better", metric="accuracy", effect=.452, ci95=[.41, .493], p=1e-9, n=423, detectable=.06, test="McNemar")
    assert ev.sentence(d, "trl") == "trl is better than the base: +45.2 points [41.0, 49.3] on test (n = 423, McNemar p < 0.001)"
    assert "smallest difference" in ev.sentence(d | dict(label="tie", p=.5), "trl")


@pytest.mark.long
@pytest.mark.parametrize("n,disagree,gain", [(200, .3, 0), (500, .2, 0), (1273, .1, 0), (500, .2, .05), (1273, .3, -.04)])
def test_the_verdict_is_neither_jumpy_nor_shy(n, disagree, gain):
    rng = np.random.default_rng(0); repeat = lambda *k: np.repeat([True, True, False, False], k)
    found = []
    for _ in range(2000):
        up, down, both, neither = rng.multinomial(n, [(disagree + gain)/2, (disagree - gain)/2, .4, .6 - disagree])
        found.append(ev.compare_choices(np.repeat([False, True, True, False], [up, down, both, neither]), np.repeat([True, False, True, False], [up, down, both, neither])))
    assert .935 <= np.mean([d["ci95"][0] <= gain <= d["ci95"][1] for d in found]) <= .965
    if gain == 0: assert .025 <= np.mean([d["label"] != "tie" for d in found]) <= .065
