"""The fast step equals the plain step: same loss, same gradients, rows that do not see each other,
and logits that are never all in memory."""

from medft.core.files import MedftError
from medft.fast import attention, patching
from medft.fast import fused_layers as heads
from medft.fast.fused_layers import supervised_loss
from medft.fast.patching import quicken
from medft.model.families import NAMES, lora_targets, model_class, tiny_config

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch.nn.functional import cross_entropy
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

LENGTHS = (45, 7, 33)  # longer than the windows of sliding layers
SUPERVISED = (9, 3, 20)
SMALL = dict(
    vocab_size=2048,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    pad_token_id=0,
)
PACKED = [n for n in NAMES if n != "nemotron_h"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rows(seed=0, lengths=LENGTHS):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 2048, (n,), generator=g) for n in lengths]


def build(name, dtype=torch.float32, lora=True, task="generative", **kwargs):
    "A tiny model with a random adapter; `lora=False`: everything is trained."
    torch.manual_seed(0)
    config = tiny_config(name) if isinstance(name, str) else name
    if task == "classification":
        config.num_labels = 3
    other_classes = {"gemma2": Gemma2ForCausalLM, "qwen3": Qwen3ForCausalLM}
    cls = other_classes.get(config.model_type) or model_class(config, task)
    attention = "eager" if config.model_type == "gemma2" else "sdpa"
    m = cls._from_config(config, dtype=dtype, attn_implementation=attention)
    if lora:
        settings = dict(target_modules=lora_targets(config)) | kwargs
        m = get_peft_model(m, LoraConfig(r=4, lora_alpha=8, **settings))
    g = torch.Generator().manual_seed(5)
    for n, p in m.named_parameters():
        if "lora_B" in n or "lora_embedding_A" in n:
            p.data = torch.randn(p.shape, generator=g) * 0.05
        if p.requires_grad:
            p.data = p.data.float()
    return m.train()


def gradients(m):
    return {n: p.grad.float().clone() for n, p in m.named_parameters() if p.grad is not None}


def needs_token_types(m):
    "Whether a model of text and images asks in training which tokens are which."
    base = m.get_base_model() if hasattr(m, "get_base_model") else m
    return "Gemma3For" in type(base).__name__ and hasattr(m.config, "vision_config")


def plain_step(m, texts, supervised=SUPERVISED):
    "Every row by itself, all logits: the definition."
    m.zero_grad()
    loss = 0
    for x, k in zip(texts, supervised, strict=True):
        inputs = dict(input_ids=x[None], attention_mask=torch.ones_like(x)[None])
        if needs_token_types(m):
            inputs["token_type_ids"] = torch.zeros_like(x)[None]
        logits = m(**inputs, use_cache=False).logits[0].float()
        row_loss = cross_entropy(logits[-k - 1 : -1], x[-k:], reduction="sum")
        loss = loss + row_loss / sum(supervised)
    loss.backward()
    return float(loss.detach()), gradients(m)


def packed(texts, supervised=SUPERVISED):
    "Token ids and positions (1, tokens) of rows laid end to end, and the positions that predict."
    ids = torch.cat(texts)[None]
    positions = torch.cat([torch.arange(len(x)) for x in texts])[None]
    ends = torch.tensor([len(x) for x in texts]).cumsum(0).tolist()
    keep = [torch.arange(end - k - 1, end - 1) for end, k in zip(ends, supervised, strict=True)]
    return ids, positions, torch.cat(keep)


def quick_step(q, texts, supervised=SUPERVISED, whole=False):
    "All rows end to end, the head on what is learned."
    q.model.zero_grad()
    ids, at, keep = packed(texts, supervised)
    h = q.hidden(ids, at)[0, keep] if whole else q.hidden(ids, at, keep=keep)[0]
    loss, _, _ = supervised_loss(h, q.head, ids[0, keep + 1], float(len(keep)), q.softcap)
    loss.backward()
    return float(loss.detach()), gradients(q.model)


def gap(a, b):
    "The distance of two sets of gradients, relative to the second."
    assert set(a) == set(b), set(a) ^ set(b)
    x, y = (torch.cat([g[n].flatten() for n in sorted(b)]) for g in (a, b))
    return float((x - y).norm() / y.norm())


def agree(m, notes=None, whole=False):
    "Plain and quick on the same model in float32; returns the quick one."
    loss, g = plain_step(m, rows())
    q = quicken(m)
    found, h = quick_step(q, rows(), whole=whole)
    assert abs(found - loss) < 1e-5 and gap(h, g) < 1e-4, (found - loss, gap(h, g))
    assert bool(q.notes) == bool(notes), q.notes
    for note in notes or ():
        assert any(note in line for line in q.notes), q.notes
    return q


# ---- exactness


@pytest.mark.parametrize("name", PACKED)
def test_every_family_in_float32(name):
    m = build(name)
    before = list(m.state_dict())
    q = agree(m)
    assert list(m.state_dict()) == before  # names unchanged while quick
    loss, g = quick_step(q, rows(), whole=True)
    assert abs(loss - quick_step(q, rows())[0]) < 1e-6  # all positions, or those wanted
    q.restore()
    assert not any("forward" in module.__dict__ for module in m.modules())
    assert abs(plain_step(m, rows())[0] - loss) < 1e-5


@pytest.mark.parametrize("name", ["tinyllama", "gemma3"])
def test_bfloat16_is_no_further_from_float32_than_trl(name):
    exact = build(name)
    loss, g = plain_step(exact, rows())
    with torch.autocast("cpu", torch.bfloat16):
        amp, ga = plain_step(build(name), rows())  # TRL's default
    half, gh = plain_step(build(name, torch.bfloat16), rows())  # TRL at its best
    ours, gq = quick_step(quicken(build(name, torch.bfloat16), torch.bfloat16), rows())
    assert abs(ours - loss) < 1e-3 and abs(ours - half) < 1e-3
    assert gap(gq, g) < 1.1 * max(gap(ga, g), gap(gh, g)), (gap(gq, g), gap(ga, g), gap(gh, g))


def test_padded_rows_and_models_that_cannot_be_packed():
    texts = rows()
    width = max(map(len, texts))
    ids = torch.stack([torch.cat([x, x.new_zeros(width - len(x))]) for x in texts])
    mask = ids.ne(0).long()
    for name in ("nemotron_h", "tinyllama"):
        m = build(name)
        want = (
            m.get_base_model()
            .get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False)
            .last_hidden_state
        )
        q = quicken(m)
        got = q.hidden(ids, attention_mask=mask)
        assert q.packs == (name != "nemotron_h")
        assert torch.allclose(got[mask.bool()], want[mask.bool()], atol=2e-5)
    q = quicken(build("nemotron_h"))
    assert any("layers run as transformers wrote them" in note for note in q.notes)
    with pytest.raises(MedftError, match="cannot be packed"):
        q.hidden(*packed(texts)[:2])


def test_nemotron_adapters():
    m = build("nemotron_h")
    x = rows()[:1]
    loss, g = plain_step(m, x, SUPERVISED[:1])
    found, h = quick_step(quicken(m), x, SUPERVISED[:1])
    assert abs(found - loss) < 1e-5 and gap(h, g) < 1e-4


def test_soft_capping_and_other_builds():
    agree(
        build(
            Gemma2Config(
                **SMALL,
                sliding_window=16,
                query_pre_attn_scalar=16,
                attn_logit_softcapping=2.0,
                final_logit_softcapping=3.0,
            )
        )
    )
    agree(build(Qwen3Config(**SMALL)))
    agree(build(LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True)))


@pytest.mark.parametrize(
    "kwargs,note",
    [
        (dict(use_rslora=True), None),
        (dict(target_modules=["q_proj", "v_proj"]), None),
        (dict(target_modules=["down_proj", "k_proj"]), None),
        (dict(use_dora=True), "DoRA"),
        (dict(lora_bias=True), "bias"),
        (dict(target_modules=["q_proj", "lm_head"]), None),
        (dict(modules_to_save=["lm_head", "embed_tokens"]), None),
        (dict(target_modules=["q_proj", "embed_tokens"]), "Embedding"),
        (dict(modules_to_save=["input_layernorm"]), None),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_kinds_of_adapters(kwargs, note):
    agree(build(LlamaConfig(**SMALL), **kwargs), note and [note])


def test_dropout_is_left_to_peft():
    m = build("tinyllama", lora_dropout=0.5)
    q = quicken(m)
    assert "lora_dropout" in " ".join(q.notes)
    losses = set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        losses.add(quick_step(q, rows())[0])
    assert len(losses) == 2  # it does drop
    m.eval()
    found = quick_step(q, rows())[0]
    q.restore()
    assert abs(found - plain_step(m, rows())[0]) < 1e-5


def test_adapters_off_and_several():
    m = build("tinyllama")
    m.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    q = quicken(m)
    ids, at, keep = packed(rows())
    with m.disable_adapter():
        off = q.hidden(ids, at)
    m.set_adapter("other")
    other = q.hidden(ids, at)
    m.set_adapter("default")
    one = q.hidden(ids, at)
    assert torch.allclose(off, other, atol=1e-6)  # the second adapter is still zero
    assert not torch.allclose(off, one, atol=1e-3)


def test_full_tuning():
    agree(build("tinyllama", lora=False))
    agree(build("gemma3", lora=False))
    loss, g = plain_step(build("tinyllama", lora=False), rows())
    with torch.autocast("cpu", torch.bfloat16):
        amp, ga = plain_step(build("tinyllama", lora=False), rows())
    ours, gq = quick_step(quicken(build("tinyllama", lora=False), torch.bfloat16), rows())
    assert abs(ours - loss) < 1e-3
    assert gap(gq, g) < 1.2 * gap(ga, g)
    assert all(x.dtype is torch.float32 for x in gq.values())


def test_checkpointing():
    m = build("gemma3")
    loss, g = plain_step(m, rows())
    m.gradient_checkpointing_enable(dict(use_reentrant=False))
    m.enable_input_require_grads()
    q = quicken(m)
    found, h = quick_step(q, rows())
    assert abs(found - loss) < 1e-5 and gap(h, g) < 1e-4


def test_attention_dropout_and_classifiers():
    config = LlamaConfig(**SMALL, attention_dropout=0.1)
    assert any("attention dropout" in n for n in quicken(build(config)).notes)
    m = build("tinyllama", task="classification", task_type="SEQ_CLS")
    q = quicken(m)
    texts = rows()
    ids, at, _ = packed(texts)
    last = torch.tensor([len(x) for x in texts]).cumsum(0) - 1
    z = m.get_base_model().score(q.hidden(ids, at, keep=last)[0])
    assert torch.allclose(z, torch.cat([m(input_ids=x[None]).logits for x in texts]), atol=1e-5)


# ---- isolation, memory, names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_changed_neighbour_changes_nothing(dtype):
    for name in ("mistral", "gemma3"):
        q = quicken(build(name, dtype), dtype)
        weights = [p for n, p in q.model.named_parameters() if "lora_A" in n][:2]
        seen = []
        for seed in (0, 1):
            texts = [rows(seed)[0], *rows()[1:]]
            ids, positions, _ = packed(texts)
            x = q.hidden(ids, positions)[:, len(texts[0]) :]
            seen.append([x.detach(), *torch.autograd.grad(x.float().square().sum(), weights)])
        assert torch.equal(seen[0][0], seen[1][0])
        atol = 1e-6 if dtype is torch.float32 else 1e-2
        assert all(torch.allclose(a, b, atol=atol) for a, b in zip(*seen, strict=True))


def test_logits_are_never_all_there(monkeypatch):
    limit = 20 * 2048
    monkeypatch.setattr(heads, "CHUNK_ELEMENTS", limit)
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        "Notes the size of every tensor as wide as the vocabulary, except for the weight."

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if torch.is_tensor(t) and t.shape[-1:] == (2048,) and t.shape != (64, 2048):
                    made.append(t.numel())
            return out

    q = quicken(build("tinyllama"))
    ids, positions, keep = packed(rows(), (44, 6, 32))
    with Watch():
        hidden = q.hidden(ids, positions, keep=keep)[0]
        supervised_loss(hidden, q.head, ids[0, keep + 1], 82.0)[0].backward()
    assert made and max(made) <= limit < 82 * 2048


def test_saved_as_peft_saves(tmp_path):
    m = build("tinyllama")
    before = {k: v.clone() for k, v in get_peft_model_state_dict(m).items()}
    q = quicken(m)
    m.save_pretrained(tmp_path)
    quick_step(q, rows())
    after = get_peft_model_state_dict(m)
    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert (tmp_path / "adapter_model.safetensors").exists()
    with_adapter = len(m.state_dict())
    q.restore()
    assert len(m.merge_and_unload().state_dict()) < with_adapter


def test_a_wrong_replacement_is_left_out(monkeypatch):
    exact = attention.packed_attention
    monkeypatch.setattr(patching, "packed_attention", lambda *a, **k: exact(*a, **k) * 1.01)
    m = build("tinyllama")
    loss, _ = plain_step(m, rows())
    q = quicken(m)
    assert any("attention" in note and "differs" in note for note in q.notes)
    assert abs(quick_step(q, rows())[0] - loss) < 1e-5


def test_entropy_and_correct_predictions():
    m = build("tinyllama")
    ids, at, keep = packed(rows())
    q = quicken(m)
    h, t = q.hidden(ids, at, keep=keep)[0].detach(), ids[0, keep + 1]
    z = q.head(h).detach()
    _, correct, entropy = supervised_loss(h, q.head, z.argmax(-1), 1.0, entropy=True)
    expected = torch.distributions.Categorical(logits=z).entropy().sum()
    assert int(correct) == len(t)
    assert torch.allclose(entropy, expected, rtol=1e-4)
    loss, correct, _ = supervised_loss(h[:0], q.head, t[:0], 1.0)
    assert float(loss) == 0 == int(correct)


def test_four_bits():
    pytest.importorskip("bitsandbytes")
    import bitsandbytes as bnb

    torch.manual_seed(0)
    config = LlamaConfig(**SMALL | dict(hidden_size=128, head_dim=32, intermediate_size=256))
    m = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    linear_layers = [
        name for name, module in m.model.named_modules() if type(module) is torch.nn.Linear
    ]
    for name in linear_layers:
        old = m.model.get_submodule(name)
        new = bnb.nn.Linear4bit(
            old.in_features,
            old.out_features,
            bias=False,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
        )
        new.load_state_dict({"weight": old.weight.data})
        new.support_avx512bf16_for_cpu = False
        m.model.set_submodule(name, new.to("cpu"))
    m = get_peft_model(m, LoraConfig(r=4, target_modules="all-linear")).train()
    for n, p in m.named_parameters():
        if "lora_B" in n:
            p.data = torch.randn(p.shape) * 0.05
        if p.requires_grad:
            p.data = p.data.float()
    loss, g = plain_step(m, rows())
    q = quicken(m, torch.bfloat16)
    found, h = quick_step(q, rows())
    assert not q.notes
    assert abs(found - loss) < 2e-3
    assert gap(h, g) < 0.05
