"""Every family from its real classes, tiny: loaded, adapted, saved, merged;
and the traps in the bare libraries."""

from medft.core.files import MedftError
from medft.core.recipe import load_recipe
from medft.data.chat_templates import load_tokenizer
from medft.export import merging
from medft.model import adapters, families
from medft.model import load as model
from medft.model.families import NAMES

import copy
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, BitsAndBytesConfig

IDS = torch.randint(
    2, 2048, (2, 48), generator=torch.Generator().manual_seed(0)
)  # longer than the windows of sliding layers
PADDED = IDS.masked_fill(torch.arange(48) >= torch.tensor([[48], [20]]), 0)
FOUR, EIGHT, CLASSIFY = (
    "quantization.load_in_4bit=true",
    "quantization.load_in_8bit=true",
    "model.task=classification",
)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    top = tmp_path_factory.mktemp("tiny")
    return {n: families.build_tiny(n, top / n, dtype=torch.bfloat16) for n in NAMES}


def recipe(folder, *more):
    return load_recipe("quickstart", ["engine=trl", f"model.name={folder}", "lora.r=4", *more])


def adapted(r, base=None):
    return get_peft_model(model.load_base(r) if base is None else base, adapters.lora_config(r))


def step(m, labels, x=PADDED):
    "One optimizer step on whatever is trained, in bf16 autocast, as a trainer takes it."
    for p in m.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    opt = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = m(input_ids=x, attention_mask=x.ne(0).long(), labels=labels).loss
    loss.backward()
    grads = {n: p.grad for n, p in m.named_parameters() if p.requires_grad}
    opt.step()
    return loss.item(), grads


def seen(names):
    return [n for n in names if "vision" in n or "projector" in n]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("task", ["generative", "classification"])
def test_a_step_in_every_family_reaches_all_that_is_trained(tiny, name, task):
    for more in ([], [FOUR], [EIGHT], ["lora.use_dora=true"], ["lora.use_rslora=true"]):
        r = recipe(tiny[name], f"model.task={task}", *more)
        m = adapted(r)
        _, grads = step(
            m,
            torch.tensor([0, 1])
            if task == "classification"
            else PADDED.masked_fill(PADDED == 0, -100),
        )
        assert grads and all(g is not None and g.isfinite().all() for g in grads.values()), (
            name,
            more,
        )
        assert any(g.abs().max() > 0 for n, g in grads.items() if "lora_B" in n) and not seen(grads)
        if task == "classification":
            assert grads["base_model.model.score.modules_to_save.default.weight"].abs().max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_what_is_tiny_is_still_its_family(name):
    real, small = families.published(name), families.tiny_config(name)
    a, b = real.get_text_config(), small.get_text_config()
    assert (
        families.family_of(small) == name
        and type(small) is type(real)
        and families.count(families.meta_model(small)) < 1_000_000
    )
    assert families.kinds(a) == families.kinds(b) and (
        a.num_key_value_heads < a.num_attention_heads
    ) == (b.num_key_value_heads < b.num_attention_heads)
    for key in (
        "rope_parameters",
        "tie_word_embeddings",
        "hidden_act",
        "hidden_activation",
        "final_logit_softcapping",
        "max_position_embeddings",
        "mlp_hidden_act",
    ):
        assert getattr(a, key, None) == getattr(b, key, None), key
    assert (
        bool(getattr(a, "sliding_window", None)) == bool(getattr(b, "sliding_window", None))
        and (getattr(b, "sliding_window", None) or 0) < IDS.shape[1]
    )
    assert (b.pad_token_id, b.eos_token_id) == (0, 1)


def test_any_other_architecture_is_shrunk_or_refused():
    from transformers import Gemma2Config, GPT2Config, MixtralConfig, Phi3Config, Qwen3Config

    for config in (Qwen3Config(), Gemma2Config(), MixtralConfig(), Phi3Config(pad_token_id=0)):
        small = families.shrink(config)
        x = families.model_class(small)(small)(IDS).logits
        assert (
            x.isfinite().all()
            and families.family_of(small) == config.model_type
            and x.shape[-1] == 2048
        )
    assert families.shrink(Gemma2Config()).final_logit_softcapping == 30.0
    with pytest.raises((MedftError, KeyError)):
        families.shrink(GPT2Config(n_embd=4096, n_layer=48))


def test_a_tiny_model_is_the_same_bytes_for_a_seed(tmp_path):
    one, two, other = (
        families.build_tiny("gemma3", tmp_path / n, seed=s) / "model.safetensors"
        for n, s in (("a", 0), ("b", 0), ("c", 1))
    )
    assert one.read_bytes() == two.read_bytes() != other.read_bytes()


# Trap 1: 4-bit layers that repack themselves at the first forward pass without gradients
def test_no_loading_path_lets_a_4bit_layer_repack_itself(tiny, tmp_path):
    for name, task in (
        ("llama2", "generative"),
        ("llama2", "classification"),
        ("medgemma", "generative"),
        ("medgemma", "classification"),
        ("nemotron_h", "generative"),
    ):
        r = recipe(tiny[name], f"model.task={task}", FOUR)
        adapted(r).save_pretrained(tmp_path / name / task / "trl/adapters")
        for m in (
            model.load_base(r),
            model.load_tuned(SimpleNamespace(path=tmp_path / name / task, recipe=r), "trl"),
        ):
            four = [x for x in m.modules() if hasattr(x, "support_avx512bf16_for_cpu")]
            assert four and not any(x.support_avx512bf16_for_cpu for x in four), (name, task)
    m = model.load_base(recipe(tiny["llama2"], CLASSIFY, FOUR))

    def gradient():
        e = m.get_input_embeddings()(IDS).detach().requires_grad_()
        m(inputs_embeds=e).logits.sum().backward()
        return e.grad.flatten()

    before = gradient()
    with torch.no_grad():
        m(IDS)
    assert torch.equal(before, gradient())


# Trap 2: a list of layers to skip replaces the library's own, and the head is quantised
def test_the_bare_library_quantises_a_head_and_medft_does_not(tiny):
    for bits in ("load_in_4bit", "load_in_8bit"):
        config = AutoConfig.from_pretrained(tiny["llama2"])
        raw = families.model_class(config, "classification").from_pretrained(
            tiny["llama2"],
            quantization_config=BitsAndBytesConfig(
                **{bits: True}, llm_int8_skip_modules=["lm_head"]
            ),
            device_map={"": "cpu"},
        )
        assert type(raw.score).__name__ != "Linear"
        r = recipe(tiny["llama2"], CLASSIFY, f"quantization.{bits}=true")
        with pytest.raises(MedftError, match="score is quantised"):
            model.check_loaded(r, raw)
        for name in ("llama2", "medgemma", "nemotron_h"):
            m = model.load_base(recipe(tiny[name], CLASSIFY, f"quantization.{bits}=true"))
            assert type(m.score) is torch.nn.Linear and m.score.weight.dtype == torch.float32
        m = model.load_base(recipe(tiny["llama2"], f"quantization.{bits}=true"))
        assert type(m.lm_head) is torch.nn.Linear


@pytest.mark.parametrize("name", ["llama2", "medgemma", "nemotron_h"])
@pytest.mark.parametrize(
    "more", [["model.dtype=bfloat16"], [FOUR], [EIGHT]], ids=["bf16", "4bit", "8bit"]
)
def test_a_head_is_trained_saved_reloaded_and_merged_in_float32(tiny, tmp_path, name, more):
    r = recipe(tiny[name], CLASSIFY, "model.num_labels=3", *more)
    run = SimpleNamespace(path=tmp_path, recipe=r)
    m = adapted(r)
    start = m.score.modules_to_save["default"].weight.detach().clone()
    step(m, torch.tensor([0, 2]))
    m.eval()
    head = m.score.modules_to_save["default"].weight.detach()
    with torch.no_grad():
        logits = m(PADDED, attention_mask=PADDED.ne(0)).logits
    assert (
        head.dtype == torch.float32
        and not torch.equal(head, start)
        and not torch.equal(head, head.bfloat16().float())
    ), "the head must hold more than 16 bits"
    m.save_pretrained(tmp_path / "trl/adapters")
    saved = load_file(tmp_path / "trl/adapters/adapter_model.safetensors")
    assert torch.equal(saved["base_model.model.score.weight"], head)
    again = model.load_tuned(run, "trl")
    with torch.no_grad():
        assert torch.equal(again(PADDED, attention_mask=PADDED.ne(0)).logits, logits)
    load_tokenizer(r).save_pretrained(tmp_path / "trl/adapters")
    out = merging.merge(run, "trl")
    whole = load_file(out / "model.safetensors")
    assert torch.equal(whole["score.weight"], head) and {
        t.dtype for n, t in whole.items() if n.endswith("proj.weight")
    } == {torch.bfloat16}
    config = AutoConfig.from_pretrained(out)
    merged = families.model_class(config, "classification").from_pretrained(
        out, config=config, dtype=torch.bfloat16
    )
    assert torch.equal(merged.score.weight, head) and config.architectures == [
        type(m.get_base_model()).__name__
    ]


def test_the_same_head_starts_every_time_and_leaves_other_random_numbers_alone(tiny):
    r = recipe(tiny["mistral"], CLASSIFY)
    torch.manual_seed(5)
    one = model.load_base(r).score.weight
    torch.manual_seed(6)
    two = model.load_base(recipe(tiny["mistral"], CLASSIFY, FOUR)).score.weight
    other = model.load_base(recipe(tiny["mistral"], CLASSIFY, "training.seed=7")).score.weight
    assert torch.equal(one, two) and not torch.equal(one, other)


@pytest.mark.parametrize("name", ["llama3.1", "gemma3", "medgemma", "nemotron_h"])
def test_a_classifier_reads_the_last_token_that_is_no_padding(tiny, name):
    m = model.load_base(recipe(tiny[name], CLASSIFY))
    with torch.no_grad():
        batch, alone = (
            m(PADDED, attention_mask=PADDED.ne(0).long()).logits,
            m(PADDED[1:, :20]).logits,
        )
    assert (
        torch.allclose(batch[1], alone[0], atol=1e-4)
        and m.config.get_text_config().pad_token_id == 0
    )


def test_labels_are_named_and_counted(tiny):
    m = model.load_base(recipe(tiny["gemma"], CLASSIFY), labels=["no", "yes", "maybe"])
    assert m.config.id2label == {0: "no", 1: "yes", 2: "maybe"} and m.score.out_features == 3
    with pytest.raises(MedftError, match="num_labels=2.*no, yes, maybe"):
        model.load_base(
            recipe(tiny["gemma"], CLASSIFY, "model.num_labels=2"), labels=["no", "yes", "maybe"]
        )


# Trap 3: Nemotron-H
def test_nemotron_h_takes_an_adapter_where_the_bare_library_fails(tiny):
    config = AutoConfig.from_pretrained(tiny["nemotron_h"])
    with pytest.raises(ValueError, match="Mamba"):
        get_peft_model(
            families.meta_model(config),
            LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
        )
    with pytest.raises(MedftError, match="out_proj"):
        adapters.trainable_part(
            recipe(tiny["nemotron_h"], "lora.target_modules=[out_proj]"),
            families.meta_model(config),
        )
    names = {
        m.split(".")[-1]
        for m in adapters.trainable_part(recipe(tiny["nemotron_h"]), families.meta_model(config))[
            "modules"
        ]
    }
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "up_proj", "down_proj"}


def test_experts_of_nemotron_h_are_optional_targets_that_train_and_merge(tiny, tmp_path):
    more = ["lora.target_parameters=[experts.up_proj, experts.down_proj]", "model.dtype=float32"]
    r = recipe(tiny["nemotron_h"], *more)
    counts = adapters.sizes_of(r, families.load_config(r))
    assert (
        counts["trainable"]
        > adapters.sizes_of(recipe(tiny["nemotron_h"]), families.load_config(r))["trainable"]
    )
    m = adapted(r)
    step(m, IDS, IDS)
    _, grads = step(m, IDS, IDS)
    assert all(
        grads[n].abs().max() > 0 for n in grads if "experts" in n and "shared" not in n
    ) and any("mixer.experts" in n for n in grads)
    m.eval()
    run = SimpleNamespace(path=tmp_path, recipe=r)
    m.save_pretrained(tmp_path / "trl/adapters")
    with torch.no_grad():
        logits, again = m(IDS).logits, model.load_tuned(run, "trl")(IDS).logits
        assert torch.allclose(logits, again, atol=1e-5)
        assert torch.allclose(copy.deepcopy(m).merge_and_unload()(IDS).logits, logits, atol=1e-3)


def test_4_bits_do_not_reach_the_experts_and_the_estimate_knows(tiny):
    r = recipe(tiny["nemotron_h"], FOUR)
    counts = adapters.sizes_of(r, families.load_config(r))
    m = model.load_base(r)
    packed = sum(
        x.in_features * x.out_features for x in m.modules() if type(x).__name__ == "Linear4bit"
    )
    assert (
        counts["quantised"] == packed
        and m.model.layers[1].mixer.experts.up_proj.dtype == torch.float32
    )
    real = families.published("nemotron_h")
    nano = adapters.sizes_of(recipe(tiny["nemotron_h"], FOUR, "model.dtype=bfloat16"), real)
    assert (
        adapters.memory_estimate(recipe(tiny["nemotron_h"], FOUR, "model.dtype=bfloat16"), nano)[
            "weights"
        ]
        > 55e9
        > 31.6e9 * 0.6
    )


@pytest.mark.parametrize("name", NAMES)
def test_what_quantisation_covers_is_what_the_library_does(tiny, name):
    for task in ("generative", "classification"):
        r = recipe(tiny[name], FOUR, f"model.task={task}")
        packed = sum(
            x.in_features * x.out_features
            for x in model.load_base(r).modules()
            if type(x).__name__ == "Linear4bit"
        )
        assert adapters.sizes_of(r, families.load_config(r))["quantised"] == packed > 0


# Trap 4: MedGemma
def test_medgemma_is_adapted_where_it_reads_and_not_where_it_sees(tiny):
    config = AutoConfig.from_pretrained(tiny["medgemma"])
    raw = get_peft_model(
        families.meta_model(config), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    )
    assert seen(n for n, x in raw.named_modules() if hasattr(x, "lora_A")), (
        "the bare library adapts the vision tower"
    )
    for task, kind in (
        ("generative", "Gemma3ForConditionalGeneration"),
        ("classification", "Gemma3ForSequenceClassification"),
    ):
        for more in ([], ["lora.target_modules=[q_proj, v_proj]"]):
            r = recipe(tiny["medgemma"], f"model.task={task}", *more)
            m = adapted(r)
            names = [n for n, x in m.named_modules() if hasattr(x, "lora_A")]
            assert (
                type(m.get_base_model()).__name__ == kind
                and names
                and not seen(names)
                and not seen(n for n, p in m.named_parameters() if p.requires_grad)
            )


def test_full_tuning_of_medgemma_leaves_its_eyes_alone(tiny):
    r = recipe(tiny["medgemma"], "lora=null")
    m = model.load_base(r)
    before = {n: p.detach().clone() for n, p in m.named_parameters()}
    step(m, IDS, IDS)
    moved = {n for n, p in m.named_parameters() if not torch.equal(p, before[n])}
    assert (
        moved
        and not seen(moved)
        and adapters.sizes_of(r, m.config)["trainable"]
        == sum(p.numel() for n, p in before.items() if not seen([n]))
    )


@pytest.mark.parametrize("task", ["generative", "classification"])
def test_a_fully_tuned_model_comes_back_from_its_folder(tiny, tmp_path, task):
    for name in ("medgemma", "nemotron_h", "mistral"):
        r = recipe(tiny[name], "lora=null", f"model.task={task}")
        m = model.load_base(r)
        step(m, torch.tensor([0, 1]) if task == "classification" else PADDED)
        m.eval()
        m.save_pretrained(tmp_path / name / "trl/model")
        again = model.load_tuned(SimpleNamespace(path=tmp_path / name, recipe=r), "trl")
        with torch.no_grad():
            assert torch.equal(
                again(PADDED, attention_mask=PADDED.ne(0)).logits,
                m(PADDED, attention_mask=PADDED.ne(0)).logits,
            ), name


def test_files_that_lack_weights_or_are_quantised_already_are_refused(tiny, tmp_path):
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    families.build_tiny("llama2", tmp_path / "a")
    weights = load_file(tmp_path / "a/model.safetensors")
    weights.pop("model.layers.0.mlp.up_proj.weight")
    save_file(weights, tmp_path / "a/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MedftError, match="lacks 1 of its weights .*up_proj"):
        model.load_base(recipe(tmp_path / "a"))
    model.load_base(recipe(tiny["llama2"], FOUR)).save_pretrained(tmp_path / "b")
    AutoTokenizer.from_pretrained(tiny["llama2"]).save_pretrained(tmp_path / "b")
    with pytest.raises(MedftError, match="stored quantised"):
        model.load_base(recipe(tmp_path / "b"))


# Trap 5: Unsloth
def test_recipes_that_unsloth_would_run_as_something_else_are_refused():
    for more, says in (([CLASSIFY], "classifier"), ([EIGHT], "16-bit")):
        with pytest.raises(MedftError, match=says):
            load_recipe("quickstart", ["engine=[trl, unsloth]", *more])
    for task in ("generative", "classification", "pretraining"):
        for adapter in families.ADAPTERS:
            assert all(
                families.refusal(n, task, adapter, e) is None
                for n in NAMES
                for e in ("trl", "fast")
            )
            assert bool(families.refusal("llama2", task, adapter, "unsloth")) == (
                task == "classification" or adapter == "8bit"
            )


UNSLOTH = """
import json
import sys

from medft.core.files import MedftError
from medft.core.recipe import load_recipe
from medft.model.families import NAMES
from medft.train import unsloth_engine

import torch
from transformers import BitsAndBytesConfig
from unsloth import FastLanguageModel

top = sys.argv[1]


def bare(**kwargs):
    path = f"{top}/llama2"
    return FastLanguageModel.from_pretrained(
        path, max_seq_length=64, dtype=torch.float32, **kwargs
    )[0]


def linear_kinds(model):
    return sorted({type(m).__name__ for m in model.modules() if "Linear" in type(m).__name__})


def recipe(name, *more):
    keys = ["engine=[trl, unsloth]", f"model.name={top}/{name}", "lora.r=4"]
    return load_recipe("quickstart", [*keys, "training.max_length=64", *more])


said = dict(
    labels=type(bare(load_in_4bit=False, num_labels=2)).__name__,
    eight=linear_kinds(bare(load_in_4bit=False, load_in_8bit=True)),
)
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
layers = bare(load_in_4bit=True, quantization_config=config).modules()
said["fp4"] = next(m.weight.quant_type for m in layers if type(m).__name__ == "Linear4bit")
four = ["quantization.load_in_4bit=true", "quantization.bnb_4bit_use_double_quant=true"]
fp4 = recipe("llama2", *four, "quantization.bnb_4bit_quant_type=fp4")
said["fp4 reason"] = unsloth_engine.why_not(fp4)
x = torch.arange(2, 50)[None]
for name in NAMES:
    for more in ([], four, ["lora.use_dora=true"], ["lora=null"]):
        r = recipe(name, *more)
        assert unsloth_engine.why_not(r) is None
        m = unsloth_engine.load_unsloth(r)
        m(input_ids=x, labels=x).loss.backward()
        trained = {k: p for k, p in m.named_parameters() if p.requires_grad}
        said[f"{name} {more}"] = [
            k
            for k, p in trained.items()
            if p.grad is None or not p.grad.isfinite().all() or "vision" in k
        ]
for more in (["model.task=classification"], ["quantization.load_in_8bit=true"]):
    keys = ["engine=trl", f"model.name={top}/llama2", "lora.r=4"]
    r = load_recipe("quickstart", [*keys, *more])
    try:
        unsloth_engine.load_unsloth(r)
        said[str(more)] = "loaded"
    except MedftError as e:
        said[str(more)] = str(e)
print("SAID" + json.dumps(said))
"""


@pytest.mark.long
def test_unsloth_loads_every_family_and_what_it_cannot_is_seen(tiny):
    done = subprocess.run(
        [sys.executable, "-c", UNSLOTH, str(tiny["llama2"].parent)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    lines = [line[4:] for line in done.stdout.splitlines() if line.startswith("SAID")]
    assert lines, done.stderr[-3000:]
    said = json.loads(lines[0])
    found = said.pop("labels"), said.pop("eight"), said.pop("fp4")
    expected = "LlamaForCausalLM", ["Linear"], "nf4"
    assert found == expected, "unsloth has learned something: look at families.refusal again"
    assert "NF4 twice" in said.pop("fp4 reason")
    assert "LlamaForCausalLM" in said.pop("['model.task=classification']")
    assert "Linear8bitLt" in said.pop("['quantization.load_in_8bit=true']")
    assert len(said) == 4 * len(NAMES) and not any(said.values()), said
