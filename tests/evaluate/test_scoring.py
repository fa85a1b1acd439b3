"""Scores: three ways of computing them agree, the harness agrees, and batches change nothing."""

from medft.core.files import MedftError, assets
from medft.core.recipe import load_recipe
from medft.evaluate.scoring import log_likelihood
from medft.evaluate.scoring import predict as scoring
from medft.evaluate.scoring import shared_prefix as br
from medft.model import families

import importlib.util
import json

import numpy as np
import pytest
import torch
from real_data import LARGE, needs_large, on_real_rows
from transformers import AutoTokenizer, Gemma2Config

harness = pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="needs lm_eval")
GEMMA2 = Gemma2Config(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    pad_token_id=0,
    sliding_window=8,
    final_logit_softcapping=2.0,
)
FAMILIES = ["gemma2", *families.NAMES]


def tiny(family, vocab=128):
    "A random model of a family, with weights large enough that its answers differ."
    config = GEMMA2 if family == "gemma2" else families.tiny_config(family, vocab)
    for c in (config, config.get_text_config()):
        c.initializer_range = 0.3
    torch.manual_seed(0)
    return families.model_class(config)(config).float().eval()


def drawn(rng, *lengths):
    return [rng.integers(3, 120, n).tolist() for n in lengths]


def items_of(seed=0):
    "Ragged, one-token and single options; prompts of one token and longer than any window."
    rng = np.random.default_rng(seed)

    def ids(*n):
        return drawn(rng, *n)

    return [
        (ids(9)[0], ids(1, 1, 1, 1)),
        (ids(70)[0], ids(5, 1, 40, 2)),
        (ids(1)[0], ids(3)),
        (ids(33)[0], ids(1)),
        (ids(20)[0], ids(2, 2, 7)),
        (ids(3)[0], ids(36, 1)),
    ]


def plain(model, items):
    "All logits, one option at a time."
    out = []
    for p, options in items:
        for o in options:
            with torch.no_grad():
                logs = (
                    model(input_ids=torch.tensor([p + o]), use_cache=False)
                    .logits[0]
                    .float()
                    .log_softmax(-1)
                )
            out.append(sum(logs[t - 1, (p + o)[t]].item() for t in range(len(p), len(p) + len(o))))
    return np.array(out)


@pytest.mark.parametrize("family", FAMILIES)
def test_branches_rows_and_the_plainest_code_agree(family, monkeypatch):
    model, items = tiny(family), items_of()
    prefix = drawn(np.random.default_rng(9), 37)[0]
    shared = [(prefix + p, o) for p, o in items]
    assert br.Tree(shared).prefix == 37
    for some in (items, shared):
        reference = plain(model, some)
        assert np.allclose(
            log_likelihood.score_rows(model, log_likelihood.option_rows(some)), reference, atol=1e-4
        )
        if family != "nemotron_h":
            assert np.allclose(br.score_branches(model, some), reference, atol=1e-4)
            monkeypatch.setattr(br, "QUERIES_PER_MASK", 7)
            assert np.allclose(br.score_branches(model, some), reference, atol=1e-4)
            monkeypatch.undo()
        assert np.allclose(
            [x for many in br.score_items(model, some, batch_size=5) for x in many],
            reference,
            atol=1e-4,
        )
    assert (br.branching_obstacle(model) is None) == (family != "nemotron_h")


def test_a_changed_neighbour_changes_nothing():
    model, items, others = tiny("gemma3"), items_of(0), items_of(1)
    alone = br.score_branches(model, items[:2])
    beside = br.score_branches(model, items[:2] + others)
    assert torch.allclose(alone, beside[:8], atol=1e-5)
    first = br.score_branches(model, [(items[1][0], [items[1][1][2]])])
    assert torch.allclose(first, alone[6:7], atol=1e-5)


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_bfloat16_and_eager_attention_give_the_same_within_their_precision(family):
    model, items = tiny(family), items_of()
    exact = br.score_branches(model, items)
    model.set_attn_implementation("eager")
    assert (
        br.branching_obstacle(model) is None
        and torch.allclose(br.score_branches(model, items), exact, atol=1e-4)
        and model.config._attn_implementation == "eager"
    )
    model.set_attn_implementation("sdpa")
    model.to(torch.bfloat16)
    a, b = (
        br.score_branches(model, items),
        log_likelihood.score_rows(model, log_likelihood.option_rows(items)),
    )
    tokens = torch.tensor([len(o) for _, options in items for o in options])
    assert ((a - exact).abs() / tokens).mean() <= 1.5 * ((b - exact).abs() / tokens).mean() + 1e-3


def test_adapters_and_4_bit_weights_can_branch(tmp_path):
    from medft.model.load import load_base

    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(
        tiny("llama3.1"), LoraConfig(target_modules="all-linear", init_lora_weights=False)
    ).eval()
    assert br.branching_obstacle(adapted) is None and np.allclose(
        br.score_branches(adapted, items_of()), plain(adapted, items_of()), atol=1e-4
    )
    base = families.build_tiny("llama2", tmp_path / "m")
    model = load_base(
        load_recipe(
            "quickstart",
            [
                f"model.name={base}",
                "quantization.load_in_4bit=true",
                "quantization.bnb_4bit_compute_dtype=float32",
            ],
        )
    )
    assert "Linear4bit" in {type(m).__name__ for m in model.modules()}
    assert br.branching_obstacle(model) is None and np.allclose(
        br.score_branches(model, items_of()), plain(model, items_of()), atol=1e-3
    )


def test_the_model_is_as_it_was_after_an_error():
    model = tiny("medgemma")
    before = [c._attn_implementation for c in br.configs(model)]
    with pytest.raises(RuntimeError), br.branch_attention(model, br.Tree(items_of())):
        raise RuntimeError
    assert [
        c._attn_implementation for c in br.configs(model)
    ] == before and not model.get_output_embeddings()._forward_pre_hooks


def test_no_block_of_logits_is_larger_than_allowed(monkeypatch):
    model, seen = tiny("mistral"), []
    exact = br.score_branches(model, items_of())
    monkeypatch.setattr(log_likelihood, "MAX_LOGITS", 128 * 6)
    hook = model.get_output_embeddings().register_forward_hook(
        lambda head, args, out: seen.append(out.numel())
    )
    assert torch.allclose(br.score_branches(model, items_of()), exact, atol=1e-5)
    hook.remove()
    assert max(seen) == 128 * 6 and sum(seen) == 128 * (
        1 + len(set(br.Tree(items_of()).predicted_from))
    )


def test_no_mask_grows_with_the_square_of_a_prompt():
    long = [(list(range(3, 100)) * 100, [[5, 6, 7], [8]])]
    for window in (None, 512):
        found = br.attention_blocks(br.Tree(long), window)
        masks = [m for *_, m in found if m is not None]
        assert max(m.numel() for m in masks) <= br.QUERIES_PER_MASK * max(
            br.QUERIES_PER_MASK + (window or 0), 9702
        )
        assert sum(m.numel() for m in masks) < (9702 + 2) * (br.QUERIES_PER_MASK + 512)


def test_batches_hold_what_they_may_and_an_oversized_item_stands_alone(monkeypatch):
    model, seen = tiny("llama2"), []
    rng = np.random.default_rng(0)
    items = [(drawn(rng, n)[0], drawn(rng, 2, 3)) for n in (300, 40, 30, 20, 10, 10)]
    monkeypatch.setattr(br, "token_budget", lambda model: 100)
    hook = model.get_decoder().register_forward_pre_hook(
        lambda m, args, kw: seen.append(kw["input_ids"].numel()), with_kwargs=True
    )
    scores = br.score_items(model, items)
    hook.remove()
    assert sorted(n for n in seen if n > 100) == [303] and np.allclose(
        [x for s in scores for x in s], plain(model, items), atol=1e-4
    )


def test_a_prompt_that_is_too_long_loses_its_beginning():
    model = tiny("llama2")
    model.config.max_position_embeddings = 40
    (p, options), heard = items_of()[1], []
    got = br.score_items(model, [(p, options)], say=heard.append)[0]
    for o, s in zip(options, got, strict=True):
        whole = (p + o)[-41:]
        at = len(whole) - len(o)
        assert abs(plain(model, [(whole[:at], [o])])[0] - s) < 1e-4
    assert len(heard) == 1 and "lose their beginning" in heard[0]


def test_what_cannot_branch_says_why():
    assert "linear_attention" in br.branching_obstacle(tiny("nemotron_h"))
    model, heard = tiny("gemma2"), []
    model.set_attn_implementation("eager")
    model.config.attn_logit_softcapping = 1.0
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = 1.0
    found = br.score_items(model, items_of(), say=heard.append)
    assert "capped" in heard[0] and np.allclose(
        [x for s in found for x in s], plain(model, items_of()), atol=1e-4
    )
    model = tiny("llama2")
    model.forward_before = model.forward
    model.forward = lambda *a, **k: (
        out := type(model).forward(model, *a, **k),
        setattr(out, "logits", out.logits * 3),
    )[0]
    with pytest.raises(MedftError, match="changes its logits after the head"):
        log_likelihood.check_head(model)


@pytest.fixture(scope="module")
def base():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        assets() / "tiny_base", dtype=torch.float32
    ).eval(), AutoTokenizer.from_pretrained(assets() / "tiny_base")


def test_pairs_are_coded_like_the_harness_does(base):
    tok = base[1]
    for prompt, option in [
        ("Answer:", " zinc"),
        ("Answer: ", "zinc"),
        ("a\n\n", "b"),
        ("", "zinc"),
        ("", " "),
        ("vita", "min"),
    ]:
        before, own = scoring.code_pair(tok, prompt, option)
        text = prompt.rstrip()
        whole = tok(prompt + option)["input_ids"]
        assert (
            before == (tok(text)["input_ids"] if prompt else [tok.eos_token_id])
            and own == whole[len(before) * bool(prompt) :]
        )
    with pytest.raises(MedftError, match="q7"):
        scoring.code_jointly(tok, [dict(id="q7", prompt="x", options=["a", ""])])
    with pytest.raises(MedftError, match="q8"):
        scoring.code_choices(tok, [dict(id="q8", prompt="", options=["a", "b"])])
    for prompt, option in (
        ("A: def", "iciency"),
        ("scur", "vy"),
    ):  # a token across the border, and none
        (before, own), (apart, (alone,)) = (
            scoring.code_pair(tok, prompt, option),
            scoring.code_choices(tok, [dict(id="", prompt=prompt, options=[option])])[0],
        )
        whole = tok(prompt + option)["input_ids"]
        assert before == apart == tok(prompt)["input_ids"] and own == whole[len(before) :]
        assert (own == alone) == (whole == apart + alone) == (prompt == "scur")


def medmcqa(folder, n):
    lines = (folder / "medmcqa/dev.json").read_text().splitlines()
    rows = [json.loads(line) for line in lines[:n]]
    return [
        dict(
            id=r["id"],
            group=r["id"],
            question=r["question"],
            texts=[r[k] for k in ("opa", "opb", "opc", "opd")],
            answer=int(r["cop"]) - 1,
        )
        for r in rows
    ]


def scores_of_harness(base, pairs):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=base[0], tokenizer=base[1], batch_size=16, device="cpu", backend="causal")
    return [
        x
        for x, _ in lm.loglikelihood(
            [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)],
            disable_tqdm=True,
        )
    ]


def same_as_harness(base, folder, n):
    "Log-likelihoods to 1e-4, and the same choices wherever two options are further apart."
    from lm_eval.tasks.medmcqa.utils_medmcqa import doc_to_text

    rows = medmcqa(folder, n)
    asked = [
        doc_to_text(
            dict(
                zip(
                    ("question", "opa", "opb", "opc", "opd"),
                    (r["question"], *r["texts"]),
                    strict=True,
                )
            )
        )
        for r in rows
    ]
    for form in ("letters", "texts"):
        options = [list("ABCD") if form == "letters" else r["texts"] for r in rows]
        ours = scoring.score_choices(
            *base,
            [
                dict(id=r["id"], prompt=q, options=[f" {o}" for o in os])
                for r, q, os in zip(rows, asked, options, strict=True)
            ],
            jointly=True,
        )
        theirs = np.array(
            scores_of_harness(
                base, [(q, f" {o}") for q, os in zip(asked, options, strict=True) for o in os]
            )
        ).reshape(-1, 4)
        assert np.abs(np.array(ours) - theirs).max() < 1e-4
        sizes = dict(
            acc=lambda o: 1.0,
            acc_norm=lambda o: float(len(o)),
            acc_bytes=lambda o: float(len(o.encode())),
        )  # ConfigurableTask.process_results
        found = scoring.chosen_options([dict(options=o) for o in options], ours)
        for name, size in sizes.items():
            values = theirs / np.array([[size(o) for o in os] for os in options])
            lead = np.sort(values)[:, -1] - np.sort(values)[:, -2]
            assert [a for a, b in zip(found[name], lead, strict=True) if b > 1e-4] == [
                a for a, b in zip(values.argmax(1).tolist(), lead, strict=True) if b > 1e-4
            ]
            assert (lead <= 1e-4).sum() <= 0.01 * len(rows) + sum(
                len(set(os)) < 4 for os in options
            )  # only options that read the same can tie


@harness
@on_real_rows
def test_same_log_likelihoods_and_choices_as_the_harness(base, folder):
    same_as_harness(base, folder, 40)


@harness
@needs_large
@pytest.mark.long
def test_same_log_likelihoods_and_choices_as_the_harness_on_500_questions(base):
    same_as_harness(base, LARGE, 500)


def prepared(tok, answer, **more):
    from medft.data.prompts import render_prompts

    recipe = load_recipe("quickstart", [f"dataset.answer={answer}"])
    examples = [
        dict(
            id="1",
            group="1",
            question="Scurvy?\nA. is this a trap",
            options=["vitamin A", "vitamin C, or\nascorbic acid", "zinc"],
            answer=1,
            **more,
        ),
        dict(id="2", group="2", question="Does it?", options=["yes", "no"], answer=0, listed=False),
    ]
    return render_prompts(tok, examples, recipe)


def test_letters_become_texts_and_texts_letters(base):
    letters, texts = prepared(base[1], "letter"), prepared(base[1], "text")
    assert (
        scoring.rendered(base[1], letters, "letters") == letters
        and scoring.rendered(base[1], texts, "texts") == texts
    )

    def swap(rows, form):
        return [r["options"] for r in scoring.rendered(base[1], rows, form)]

    assert swap(letters, "texts") == [r["options"] for r in texts] and swap(texts, "letters") == [
        r["options"] for r in letters
    ]


def test_what_is_asked_for_stands_beside_what_was_trained(base):
    rows = prepared(base[1], "letter")
    recipe = load_recipe("quickstart", ["evaluation.score=both"])
    frame = scoring.predict(*base, rows, recipe, beside=True)
    assert {
        "letters_acc",
        "texts_acc",
        "texts_acc_norm",
        "texts_acc_bytes",
        "letters_scores",
        "texts_scores",
    } <= set(frame)
    assert (
        frame.letters_scores.tolist() == frame.scores.tolist()
        and frame.letters_acc.tolist() == frame.correct.tolist()
    )
    assert np.allclose(
        frame.texts_scores[0], scoring.score_choices(*base, prepared(base[1], "text"))[0], atol=1e-4
    )
    plain_frame = scoring.predict(*base, rows, load_recipe("quickstart"))
    assert not [c for c in plain_frame if "acc" in c]
    from medft.evaluate.measures.answers import measure_choices

    assert measure_choices(frame)["texts_acc_norm"]["value"] == frame.texts_acc_norm.mean()
