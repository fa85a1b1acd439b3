"""The recipe's own base, every layer tried, checkpoints of these rows only,
one chat template throughout, and no foreign code."""

from medft.core import files as places
from medft.core.files import MedftError, assets, read_json, write_json
from medft.core.recipe import load_recipe
from medft.core.run import Run
from medft.data import pipeline as data
from medft.data.chat_templates import load_tokenizer
from medft.evaluate import metrics as evaluate
from medft.evaluate.scoring import external_models as further
from medft.export import parity
from medft.export import publish as export
from medft.fast import patching as blocks
from medft.model import adapters, families, preflight
from medft.model import load as model
from medft.model import preflight as belongs
from medft.train import baseline as train
from medft.train import trainer as repeats

import json
import os
import pickle
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ROW = (
    "training: {{learning_rate: 1.0e-3, max_steps: 4, per_device_train_batch_size: 4,"
    " max_length: 128, {more}save_strategy: steps, save_steps: 2}}"
)
BY_HAND = """name: mine
engine: [trl]
{training}
dataset:
  path: rows.jsonl
  holdout: 0.0
  sets: {{}}
  cache: false
  checks: {{near_duplicates: "off", near_overlap: "off"}}
tracking: {{mlflow: false}}
"""


def write_rows(folder, word, n=16):
    rows = [
        dict(question=f"What is {word} {i}?", answer=f"{word} answer {i * i}") for i in range(n)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


# --- Unsloth: the recipe's own base


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    "The tiny base, and a copy in which one number is another."
    top = tmp_path_factory.mktemp("copies")
    for name in ("own", "other"):
        shutil.copytree(assets() / "tiny_base", top / name)
    weights = load_file(top / "other" / "model.safetensors")
    key = next(k for k in weights if k.endswith("layers.1.mlp.up_proj.weight"))
    weights[key][0, 0] += 0.01
    save_file(weights, top / "other" / "model.safetensors", metadata={"format": "pt"})
    return top


def test_a_base_under_another_name_or_commit_or_with_other_numbers_is_refused(copies):
    own = load_recipe("quickstart", [f"model.name={copies / 'own'}"])
    config, base = families.load_config(own), model.load_base(own)
    model.check_origin(own, config, base)
    base.config._name_or_path = "unsloth/gemma-3-1b-it"
    with pytest.raises(MedftError, match="unsloth/gemma-3-1b-it.*in the place of"):
        model.check_origin(own, config, base)
    base.config._name_or_path = str(copies / "own")
    config._commit_hash, base.config._commit_hash = "a" * 40, "b" * 40
    with pytest.raises(MedftError, match="model.revision: .*b{40}.*means a{40}"):
        model.check_origin(own, config, base)
    config._commit_hash = base.config._commit_hash = None
    other = model.load_base(load_recipe("quickstart", [f"model.name={copies / 'other'}"]))
    other.config._name_or_path = str(copies / "own")
    with pytest.raises(MedftError, match="other weights.*up_proj"):
        model.check_origin(own, config, other)


@pytest.mark.parametrize(
    "more",
    [
        ["model.dtype=bfloat16"],
        ["quantization.load_in_4bit=true", "quantization.bnb_4bit_use_double_quant=true"],
    ],
)
def test_the_own_base_passes_rounded_and_quantised_and_with_an_adapter(copies, more):
    recipe = load_recipe("quickstart", ["engine=trl", f"model.name={copies / 'own'}", *more])
    config, base = families.load_config(recipe), model.load_base(recipe)
    model.check_origin(
        recipe, config, train.adapted_model(base, adapters.lora_config(recipe, config))
    )


def test_a_shards_index_and_another_place_of_the_layers_are_read(tmp_path, copies):
    recipe = load_recipe("quickstart", [f"model.name={tmp_path}"])
    AutoModelForCausalLM.from_pretrained(copies / "own").save_pretrained(
        tmp_path, max_shard_size="2MB"
    )
    AutoTokenizer.from_pretrained(copies / "own").save_pretrained(tmp_path)
    config = families.load_config(recipe)
    files = model.weight_files(recipe, config)
    assert len(set(files.values())) > 1
    model.check_origin(recipe, config, model.load_base(recipe))
    known = [
        "language_model.model.layers.0.mlp.up_proj.weight",
        "vision.layers.0.mlp.fc1.weight",
        "model.norm.weight",
    ]
    assert (
        model.stored_name("model.language_model.layers.0.mlp.up_proj.base_layer.weight", known)
        == known[0]
    )
    assert model.stored_name("model.layers.3.mlp.up_proj.weight", known) is None


# --- every layer is tried


SMALL = dict(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
NARROW = dict(head_dim=16, sliding_window=16)
ODD = {  # name: (configuration class, what differs)
    "layers without positions": ("SmolLM3Config", dict(initializer_range=0.1)),
    "a window and positions in some layers, parallel, scaled": ("Cohere2Config", NARROW),
    "norms over all heads": ("Olmo2Config", {}),
    "norms of heads": ("Qwen3Config", dict(head_dim=16)),
    "windows from one layer on": (
        "Qwen2Config",
        dict(use_sliding_window=True, sliding_window=16, max_window_layers=2),
    ),
    "soft-capping": (
        "Gemma2Config",
        NARROW | dict(query_pre_attn_scalar=16, attn_implementation="eager"),
    ),
    "rotary tables by kind": ("Gemma3TextConfig", NARROW | dict(query_pre_attn_scalar=16)),
    "scaled residuals and logits": (
        "GraniteConfig",
        dict(
            residual_multiplier=0.22,
            embedding_multiplier=12.0,
            logits_scaling=8.0,
            attention_multiplier=0.1,
        ),
    ),
    "joined projections": ("Phi3Config", {}),
    "partial rotary, rows not handed on": ("StableLmConfig", {}),
    "a window everywhere": ("MistralConfig", dict(sliding_window=16)),
    "biases": ("LlamaConfig", dict(attention_bias=True, mlp_bias=True)),
    "interleaved rotary": ("Glm4Config", dict(head_dim=16)),
    "experts in some layers": (
        "Qwen3MoeConfig",
        dict(
            head_dim=16,
            num_experts=4,
            moe_intermediate_size=32,
            num_experts_per_tok=2,
            mlp_only_layers=[0, 2],
        ),
    ),
    "sinks, rows not kept apart": ("GptOssConfig", NARROW | dict(num_local_experts=4)),
    "layers under another name": ("FalconConfig", None),
}
WHOLLY_QUICK = {
    "layers without positions",
    "norms of heads",
    "windows from one layer on",
    "soft-capping",
    "rotary tables by kind",
    "a window everywhere",
    "biases",
    "experts in some layers",
}


def tiny(name):
    cls, more = ODD[name]
    given = (
        dict(vocab_size=300, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
        if more is None
        else SMALL | more
    )
    torch.manual_seed(0)
    m = AutoModelForCausalLM.from_config(getattr(transformers, cls)(**given)).eval()
    if (more or {}).get("attn_implementation"):
        m.set_attn_implementation("eager")
    for p in m.parameters():
        if p.dim() == 1:
            p.data += 0.1 * torch.randn_like(p)
    return m


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", ODD)
@torch.no_grad()
def test_hidden_states_and_loss_are_the_librarys_in_every_architecture(name):
    m = tiny(name)
    texts = [torch.randint(3, 300, (1, n)) for n in (40, 30)]
    apart = [m.get_decoder()(x).last_hidden_state for x in texts]
    loss = float(m(input_ids=texts[0], labels=texts[0]).loss)
    q = blocks.quicken(m)
    keep = torch.tensor([2, 17, 38])
    assert relative(q.hidden(texts[0], torch.arange(40)[None]), apart[0]) < 1e-4
    assert relative(q.hidden(texts[0], torch.arange(40)[None], keep=keep), apart[0][:, keep]) < 1e-4
    if q.packs:
        both = q.hidden(torch.cat(texts, 1), torch.cat([torch.arange(40), torch.arange(30)])[None])
        assert relative(both, torch.cat(apart, 1)) < 1e-4
    logits = q.head(apart[0][0, :-1]).float()
    if q.softcap:
        logits = q.softcap * torch.tanh(logits / q.softcap)
    own = float(torch.nn.functional.cross_entropy(logits, texts[0][0, 1:]))
    assert bool(q.head_differs) == (abs(own - loss) > 1e-4), (own, loss, q.head_differs)
    assert q.rows_wise == (name in WHOLLY_QUICK) or q.notes, "what is left to the library is said"
    assert q.rows_wise or name not in WHOLLY_QUICK


def test_one_layer_that_differs_is_found_wherever_it_stands():
    for at in (1, 3):
        m = tiny("biases")
        attention = m.model.layers[at].self_attn
        attention.scaling = attention.scaling * 1.5  # seen by both: no difference
        assert blocks.quicken(m).rows_wise
        m = tiny("biases")
        plain = type(m.model.layers[at].self_attn)

        class Other(plain):
            def forward(self, hidden_states, *args, **kwargs):
                out, weights = super().forward(hidden_states, *args, **kwargs)
                return out * 1.01, weights

        m.model.layers[at].self_attn.__class__ = Other
        q = blocks.quicken(m)
        assert not q.rows_wise and any("attention" in n and "differs" in n for n in q.notes)


def test_a_wrong_window_and_a_forgotten_soft_cap_are_found(monkeypatch):
    wide = transformers.MistralConfig(
        **SMALL, sliding_window=100
    )  # wider than the rows that layers are tried on
    assert blocks.quicken(AutoModelForCausalLM.from_config(wide)).rows_wise
    monkeypatch.setattr(blocks, "window_of", lambda m: 120)
    q = blocks.quicken(AutoModelForCausalLM.from_config(wide))
    assert not q.rows_wise and any("sees 100 tokens" in n for n in q.notes)
    monkeypatch.undo()
    monkeypatch.setattr(blocks, "score_softcap", lambda m: 0)
    q = blocks.quicken(tiny("soft-capping"))
    assert not q.rows_wise and any("attention" in n for n in q.notes)


# --- checkpoints and adapters of these rows


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    "One folder in which rows are trained on, changed, and trained on again."
    top = tmp_path_factory.mktemp("by_hand")
    before = os.getcwd()
    os.chdir(top)
    yield top
    os.chdir(before)


def prepared_by_hand(top, word, more=""):
    write_rows(top, word)
    (top / "mine.yaml").write_text(BY_HAND.format(training=ROW.format(more=more)))
    run = (
        Run.create(load_recipe("mine.yaml"), root=top / "runs", run_id="one")
        if not (top / "runs/mine/one").exists()
        else Run.open(top / "runs/mine/one")
    )
    shutil.rmtree(run.path / "data", ignore_errors=True)
    data.prepare(run)
    return run


def test_other_rows_are_trained_afresh_and_the_old_are_kept(by_hand):
    run = prepared_by_hand(by_hand, "apple")
    first = train.train(run)
    assert first["belongs"] == belongs.belongs_to(run)
    assert (
        read_json(run.path / "trl/checkpoints/checkpoint-4/seal.json")["belongs"]
        == first["belongs"]
    )
    adapter = (run.path / "trl/adapters/adapter_model.safetensors").read_bytes()
    assert (
        train.resume_point(run, "trl", belongs.belongs_to(run)).name == "checkpoint-4"
    )  # the same rows: nothing to do again

    run = prepared_by_hand(by_hand, "zebra")
    for use in (
        lambda: model.load_tuned(run, "trl"),
        lambda: evaluate.evaluate(run),
        lambda: export.export(run),
    ):
        with pytest.raises(MedftError, match="trl was trained before the rows changed"):
            use()
    second = train.train(run)
    assert not second["resumed"] and second["steps"] == 4
    assert (run.path / "trl/adapters/adapter_model.safetensors").read_bytes() != adapter
    assert (run.path / "earlier/trl-1/adapters/adapter_model.safetensors").read_bytes() == adapter
    assert (run.path / "earlier/trl-1/checkpoints/checkpoint-4").is_dir()
    log = (run.path / "logs/finetune.log").read_text()
    line = (
        "trl: trained before with other inputs (the rows changed since);"
        " that is kept in earlier/trl-1, and training starts afresh"
    )
    assert line in log
    belongs.refuse_stale(run, "trl")


def test_a_finished_seed_of_other_rows_is_not_taken_for_trained(by_hand):
    run = prepared_by_hand(by_hand, "pear")
    write_json(
        run.path / "fast/training.json", dict(status="finished", belongs=belongs.belongs_to(run))
    )
    trained = []
    repeats.train_once(run, "fast", trained.append)
    assert trained == []
    prepared_by_hand(by_hand, "plum")
    repeats.train_once(run, "fast", trained.append)
    assert trained == [run]


def test_what_counts_for_a_checkpoint(by_hand, tmp_path):
    run = prepared_by_hand(by_hand, "fig")
    now = belongs.belongs_to(run)
    data.prepare(run)
    assert belongs.belongs_to(run) == now, "the same file prepared again is the same rows"
    name = "quickstart"

    def keys(*more):
        return belongs.keys_hash(load_recipe(name, more))

    assert keys() == keys("training.save_steps=7", "evaluation.max_items=3", "description=x")
    others = (
        "training.learning_rate=5e-3",
        "training.seed=3",
        "lora.r=4",
        "lora=null",
        "training.max_steps=9",
        "model.dtype=bfloat16",
        "training.max_length=99",
    )
    assert len({keys(), *map(keys, others)}) == len(others) + 1
    folder = tmp_path / "base"
    shutil.copytree(assets() / "tiny_base", folder)

    def of():
        return belongs.base_hash(load_recipe(name, [f"model.name={folder}"]))

    before = of()
    (folder / "README.md").write_text("a note")
    assert of() == before
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    )
    changed = of()
    assert changed != before
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert of() not in (before, changed)
    assert belongs.changes_since(None, now) == [] and belongs.changes_since(
        now | dict(base="x"), now
    ) == [belongs.FINGERPRINT_PARTS["base"]]


# --- one template and one end token throughout


OTHER = (
    "{% for m in messages %}<<{{ m.role }}>> {{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<<assistant>> {% endif %}"
)


def test_a_recipes_template_writes_the_rows_and_is_saved(by_hand):
    (by_hand / "mine.jinja").write_text(OTHER)
    write_rows(by_hand, "iron")
    (by_hand / "mine.yaml").write_text(
        BY_HAND.format(
            training=ROW.format(more="chat_template_path: mine.jinja, ").replace(
                "max_steps: 4", "max_steps: 1"
            )
        )
    )
    run = Run.create(load_recipe("mine.yaml"), root=by_hand / "runs", run_id="templated")
    data.prepare(run)
    row = data.load_split(run, "train")[0]
    assert (
        row["prompt"]
        == f"<<user>> What is iron {row['prompt'].split()[4].split('?')[0]}?<<assistant>> "
    )
    preflight.preflight(
        run.recipe, load_tokenizer(run.recipe), families.load_config(run.recipe), run
    )
    train.train(run)
    saved = AutoTokenizer.from_pretrained(run.path / "trl/adapters")
    question = row["prompt"].removeprefix("<<user>> ").removesuffix("<<assistant>> ")
    assert (
        saved.apply_chat_template(
            [dict(role="user", content=question)], tokenize=False, add_generation_prompt=True
        )
        == row["prompt"]
    )
    report = read_json(run.path / "data/report.json")
    assert parity.compare_rendering(run, dict(rendering=report["rendering"])) == []
    assert parity.compare_rendering(run, dict(rendering="x")) == [
        "its tokenizer writes prompts otherwise than the rows that were trained on"
    ]
    (by_hand / "mine.jinja").write_text(OTHER.replace("<<", "["))
    with pytest.raises(MedftError, match="another chat template"):
        train.check_served(run, load_tokenizer(run.recipe))


@pytest.mark.parametrize(
    "override, words",
    [
        ("eos_token=.", "training.eos_token: '.' is no special token"),
        ("eos_token=<pad>", "training.eos_token"),
        ("eos_token=<nowhere>", "training.eos_token"),
        ("pad_token=<eos>", "training.pad_token: '<eos>' is the end token"),
        ("pad_token=x", "training.pad_token"),
        ("chat_template_path=none.jinja", "training.chat_template_path: 'none.jinja' is no file"),
        ("chat_template_path=/", "training.chat_template_path"),
        ("chat_template_path=broken.jinja", "training.chat_template_path"),
        ("chat_template_path=mute.jinja", "training.chat_template_path"),
    ],
)
def test_a_template_or_token_that_cannot_be_honoured_is_refused_by_name(
    tmp_path, monkeypatch, override, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.jinja").write_text("{% for m in messages %}")
    (tmp_path / "mute.jinja").write_text("hello")
    with pytest.raises(MedftError) as e:
        load_tokenizer(load_recipe("quickstart", [f"training.{override}"]))
    assert str(e.value).startswith(words) and "\n" not in str(e.value)


def test_tokens_that_are_there_are_taken():
    tok = load_tokenizer(
        load_recipe("quickstart", ["training.eos_token=<eos>", "training.pad_token=<pad>"])
    )
    assert (tok.eos_token, tok.pad_token) == ("<eos>", "<pad>")


@pytest.mark.parametrize(
    "override",
    [
        "shuffle_dataset=true",
        "truncation_mode=keep_end",
        "remove_unused_columns=false",
        "run_name=x",
        "model_init_kwargs={a: 1}",
        "eval_packing=true",
        "do_train=true",
        "dataset_num_proc=2",
        "dataset_text_field=x",
        "dataset_kwargs={skip_prepare_dataset: true}",
        "label_names=[a]",
        "include_for_metrics=[loss]",
        "use_cpu=true",
        "local_rank=1",
        "hub_strategy=end",
        "project=x",
    ],
)
def test_trainer_keys_that_are_not_handed_on_are_refused_by_name(override):
    key = override.split("=")[0]
    with pytest.raises(MedftError, match=f"training.{key}: ") as e:
        load_recipe("quickstart", [f"training.{override}"])
    assert "\n" not in str(e.value)


def test_a_librarys_default_written_out_does_no_harm():
    load_recipe(
        "quickstart", ["training.remove_unused_columns=true", "training.shuffle_dataset=false"]
    )


def test_every_key_is_either_handed_on_or_known_not_to_be():
    from medft.core.recipe import HANDED_ON
    from medft.core.sections import library_fields

    known = set(library_fields("training"))
    assert {
        "learning_rate",
        "chat_template_path",
        "assistant_only_loss",
        "loss_type",
    } <= HANDED_ON & known
    assert (
        not {
            "output_dir",
            "trust_remote_code",
            "model_init_kwargs",
            "dataset_kwargs",
            "formatting_func",
        }
        & HANDED_ON
    )


@pytest.mark.parametrize(
    "task, key",
    [("classification", "chat_template_path=x.jinja"), ("pretraining", "eos_token=<eos>")],
)
def test_tasks_without_conversations_refuse_a_template(task, key):
    with pytest.raises(MedftError, match=f"training.{key.split('=')[0]}: only task generative"):
        load_recipe("quickstart", ["engine=trl", f"model.task={task}", f"training.{key}"])


def test_loss_on_the_answers_or_on_everything_is_the_data_rooms_and_passes_preflight():
    for key in ("assistant_only_loss=true", "completion_only_loss=false"):
        preflight.check_used(load_recipe("quickstart", [f"training.{key}"]), None, None)
    both = load_recipe(
        "quickstart", ["training.assistant_only_loss=true", "training.completion_only_loss=false"]
    )
    with pytest.raises(MedftError, match="leave one of them out"):
        preflight.check_used(both, None, None)


# --- no code from elsewhere


class Evil:
    "A pickle that leaves a trace when it is opened."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def hostile(folder, kind):
    "A copy of the tiny base that tries to run code; returns the file that it would write."
    shutil.copytree(assets() / "tiny_base", folder)
    config, trace = read_json(folder / "config.json"), folder.parent / "ran"
    if kind == "kernel":
        config["attn_implementation"] = "somebody/their-kernel"
    if kind == "experts":
        config["experts_implementation"] = "somebody/their-experts"
    if kind == "weights":
        config["transformers_weights"] = "adapter_model.bin"
    if kind == "pickle":
        (folder / "model.safetensors").unlink()
        with open(folder / "pytorch_model.bin", "wb") as f:
            pickle.dump(Evil(trace), f)
    if kind == "auto_map":
        (folder / "mine.py").write_text(f"open({str(trace)!r}, 'w')")
        config |= dict(
            model_type="not_known",
            architectures=["Mine"],
            auto_map=dict(AutoConfig="mine.Mine", AutoModelForCausalLM="mine.Mine"),
        )
    write_json(folder / "config.json", config)
    return trace


ENTRIES = {
    "load_config": lambda r: families.load_config(r),
    "load_base": lambda r: model.load_base(r),
    "from_config": lambda r: model.load_base(
        r.model_copy(
            update=dict(model=r.model.model_copy(update=dict(from_config=True)), lora=None)
        )
    ),
    "further": lambda r: further.load_further(load_recipe("quickstart"), r.model.name),
    "with_base": lambda r: further.with_base(r.model.name),
    "read_back": lambda r: model.read_back(r.model.name, "generative"),
}
REFUSED = {
    "kernel": set(ENTRIES),
    "experts": set(ENTRIES),
    "weights": set(ENTRIES),
    "auto_map": {"load_config", "load_base", "from_config", "further"},
    "pickle": {"load_base", "further", "with_base"},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_base_that_brings_code_is_refused_wherever_it_is_loaded(tmp_path, kind):
    trace = hostile(tmp_path / "base", kind)
    recipe = load_recipe("quickstart", ["engine=trl", f"model.name={tmp_path / 'base'}"])
    for name in sorted(REFUSED[kind]):
        with pytest.raises(MedftError) as e:
            ENTRIES[name](recipe)
        assert "\n" not in str(e.value), (name, e.value)
        assert not trace.exists(), name


@pytest.mark.parametrize(
    "asked", ["somebody/their-kernel", "kernels-community/flash-attn2", "paged|sdpa", "sdpaa"]
)
def test_a_kernel_from_the_hub_is_refused_by_every_loader(tmp_path, asked):
    recipe = load_recipe("quickstart", ["engine=trl", f"model.attn_implementation={asked}"])
    run = Run.create(recipe, root=tmp_path)
    (run.path / "trl/model").mkdir(parents=True)
    for load in (
        lambda: model.load_base(recipe),
        lambda: model.load_tuned(run, "trl"),
        lambda: further.load_further(recipe, "tiny-base"),
        lambda: preflight.inspect(run),
    ):
        with pytest.raises(MedftError, match="model.attn_implementation"):
            load()


def test_an_adapter_that_is_a_pickle_is_not_opened(tmp_path):
    folder = tmp_path / "adapter"
    write_json(
        folder / "adapter_config.json",
        dict(base_model_name_or_path="tiny-base", peft_type="LORA", task_type="CAUSAL_LM"),
    )
    with open(folder / "adapter_model.bin", "wb") as f:
        pickle.dump(Evil(tmp_path / "ran"), f)
    for load in (
        lambda: further.load_further(load_recipe("quickstart"), str(folder)),
        lambda: further.with_base(str(folder)),
    ):
        with pytest.raises(MedftError, match="adapter_model.safetensors.*pickle"):
            load()
    assert not (tmp_path / "ran").exists()


def test_no_library_may_fetch_kernels_or_converted_weights():
    assert (
        os.environ["USE_HUB_KERNELS"] == "NO"
        and os.environ["DISABLE_SAFETENSORS_CONVERSION"] == "1"
    )
    assert not transformers.integrations.hub_kernels._kernels_enabled


# --- a private folder for compiled code, and a disk without links


def test_compiled_code_lies_where_only_this_user_can_write(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = places.compiled_code()
    assert (
        folder == places.compiled_code()
        and tmp_path in folder.parents
        and folder.stat().st_mode & 0o777 == 0o700
    )
    folder.chmod(0o777)
    assert tmp_path not in places.compiled_code().parents, "somebody else may write there"
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    assert tmp_path not in places.compiled_code().parents
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert places.is_private(places.compiled_code())


def test_the_name_final_is_a_copy_where_the_disk_knows_no_links(tmp_path, monkeypatch):
    out = tmp_path / "adapters"
    out.mkdir()

    def none(*args, **kwargs):
        raise OSError("no links here")

    for text in ("first", "second"):
        (out / "adapter_model.safetensors").write_text(text)
        with monkeypatch.context() as m:
            m.setattr("pathlib.Path.symlink_to", none)
            train.final(out)
        assert (
            not (tmp_path / "final").is_symlink()
            and (tmp_path / "final/adapter_model.safetensors").read_text() == text
        )
    train.final(out)
    assert (tmp_path / "final").is_symlink() and (
        tmp_path / "final/adapter_model.safetensors"
    ).read_text() == "second"
