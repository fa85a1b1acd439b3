"""What is refused before a weight is loaded: by name, with the way out."""

from medft.core import files
from medft.core.files import MedftError
from medft.core.recipe import load_recipe
from medft.core.run import Run
from medft.data import chat_templates
from medft.model import adapters, families, preflight
from medft.model.families import NAMES

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from hub_server import HubServer

BASE = Path(files.assets()) / "tiny_base"
CLASSIFY = "model.task=classification"
GPU = torch.cuda.is_available()


def recipe(*more):
    return load_recipe("quickstart", ["engine=trl", *more])


@pytest.fixture(scope="module")
def tok():
    return chat_templates.load_tokenizer(recipe())


def said(tok, config, *more):
    with pytest.raises(MedftError) as e:
        preflight.preflight(recipe(*more), tok, config)
    assert "\n" not in str(e.value), "an error is one line"
    return str(e.value)


@pytest.mark.parametrize("name", NAMES)
def test_every_family_passes_for_every_task(tok, name):
    config = families.tiny_config(name)
    for task in ("generative", "classification", "pretraining"):
        for more in ([], ["lora=null"], ["lora.use_dora=true"], ["quantization.load_in_4bit=true"]):
            counts = preflight.preflight(recipe(f"model.task={task}", *more), tok, config)
            assert (
                0 < counts["trainable"] <= counts["total"] + (counts["modules"] is not None) * 10**6
                and counts["share"] > 0
            )


TWO_RANKS = ["scale.processes=2", "training.gradient_accumulation_steps=2"]
REFUSED = [  # family, what is asked, what is answered
    ("llama2", ["lora.target_modules=[q_proj, v_prj]"], "'v_prj' (did you mean 'v_proj'?)"),
    ("llama2", ["lora.target_modules=[nothing]"], "This model has: down_proj"),
    ("nemotron_h", ["lora.target_modules=[out_proj]"], "Mamba"),
    ("llama2", ["training.max_length=5000"], "longer than the 4096 positions"),
    ("gemma", ["model.dtype=float16"], "bfloat16 (or float32)"),
    ("gemma3", ["training.fp16=true"], "NaN"),
    ("medgemma", ["training.fp16=true"], "NaN"),
    ("llama2", ["model.attn_implementation=sdap"], "(did you mean 'sdpa'?)"),
    ("llama2", ["model.attn_implementation=kernels-community/flash-attn2"], "never runs"),
    ("llama2", ["training.optim=grokadamw"], "grokadamw does not work here"),
    ("llama2", ["training.optim=galore_adamw"], "galore"),
    ("llama2", ["training.lr_scheduler_type=warmup_stable_decay"], "num_decay_steps"),
    ("llama2", ["training.lr_scheduler_type=cosine_with_min_lr"], "min_lr"),
    (
        "llama2",
        [
            "training.lr_scheduler_type=warmup_stable_decay",
            "training.lr_scheduler_kwargs={num_decay_steps: 90}",
            "training.max_steps=100",
        ],
        "20 steps of warm-up and 90 of decay do not fit into this run's 100",
    ),
    ("llama2", ["training.lr_scheduler_type=reduce_lr_on_plateau"], "requires an eval strategy"),
    ("llama2", ["training.load_best_model_at_end=true"], "training.eval_strategy"),
    ("llama2", ["training.use_liger_kernel=true"], "liger-kernel"),
    ("llama2", [CLASSIFY, "training.packing=true"], "only task generative can use it"),
    ("llama2", [CLASSIFY, "training.assistant_only_loss=true"], "only task generative can use it"),
    (
        "llama2",
        ["training.packing=true", "training.packing_strategy=wrapped"],
        "continuation of another",
    ),
    ("nemotron_h", ["training.packing=true"], "carries state"),
    ("nemotron_h", ["training.padding_free=true"], "carries state"),
    ("llama2", ["model.task=pretraining", "training.padding_free=true"], "only task generative"),
    (
        "llama2",
        ["training.completion_only_loss=false", "training.assistant_only_loss=true"],
        "leave one of them out",
    ),
    ("llama2", [CLASSIFY, "model.num_labels=1"], "greater than or equal to 2"),
    (
        "llama2",
        [CLASSIFY, "dataset.labels=[a, b]", "model.class_weights=[1.0, 2.0, 3.0]"],
        "3 weights for 2 labels",
    ),
    ("llama2", [*TWO_RANKS, "scale.strategy=fsdp"], "scale.strategy: several processes"),
]
ON_CPU = [
    (
        "llama2",
        ["model.attn_implementation=flash_attention_2"],
        "use model.attn_implementation: sdpa or eager",
    ),
    ("llama2", ["model.attn_implementation=flex_attention"], "NVIDIA GPU only"),
    ("llama2", ["training.tf32=true"], "Ampere"),
    ("llama2", ["training.fsdp=full_shard"], "data parallelism"),
    ("llama2", ["training.deepspeed=ds.json"], "data parallelism"),
    ("llama2", ["training.optim=paged_ademamix_8bit"], "paged_ademamix_8bit does not work here"),
    ("mistral", ["lora.use_dora=true", "quantization.load_in_8bit=true"], "load_in_4bit"),
]


@pytest.mark.parametrize(
    "name,more,answer",
    REFUSED + ([] if GPU else ON_CPU),
    ids=lambda v: "+".join(v)[:60] if isinstance(v, list) else None,
)
def test_refused_with_the_way_out(tok, name, more, answer):
    assert answer in said(tok, families.tiny_config(name), *more)


@pytest.mark.parametrize(
    "more",
    [
        ["training.optim=adamw_8bit"],
        ["training.optim=paged_adamw_8bit"],
        ["training.optim=adamw_torch_fused"],
        ["training.neftune_noise_alpha=5"],
        ["training.gradient_checkpointing=true"],
        ["model.attn_implementation=eager"],
        [CLASSIFY, "training.neftune_noise_alpha=5"],
        [CLASSIFY, "training.packing=false"],
        ["training.packing=true", "training.packing_strategy=bfd_split"],
        ["model.task=pretraining", "training.packing=true"],
        [
            "training.load_best_model_at_end=true",
            "training.eval_strategy=steps",
            "training.save_strategy=steps",
        ],
    ],
    ids="+".join,
)
def test_what_works_is_let_through(tok, more):
    preflight.preflight(recipe(*more), tok, families.tiny_config("llama3.1"))


def test_padding_is_never_the_end_of_a_text(tok):
    from transformers import AutoTokenizer

    bare = AutoTokenizer.from_pretrained(BASE)
    bare.pad_token = bare.eos_token
    assert "never learn to stop" in said(bare, families.tiny_config("llama2"))
    assert "2048 tokens, the model has 2000" in said(tok, families.tiny_config("llama2", 2000))


def test_weights_that_are_stored_quantised(tok):
    config = families.tiny_config("llama2")
    config.quantization_config = dict(quant_method="gptq", bits=4)
    assert "gptq" in said(tok, config)
    config.quantization_config = dict(quant_method="bitsandbytes", load_in_4bit=True)
    assert "quantization.load_in_4bit: true" in said(tok, config)
    preflight.check_stored(recipe("quantization.load_in_4bit=true"), tok, config)


def test_torch_compile_without_a_compiler(tok, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    assert "C++ compiler" in said(
        tok, families.tiny_config("llama2"), "training.torch_compile=true"
    )


def test_a_strange_share_is_a_warning(tok):
    config = families.tiny_config("llama2")

    def warned(*more):
        return " ".join(preflight.preflight(recipe(*more), tok, config)["warnings"])

    assert "as many parameters" in warned("lora.r=256") and not warned("lora.r=4")
    assert "never reaches" in warned("training.max_steps=10") and not warned(
        "training.max_steps=100"
    )
    assert "1.0e-06" in " ".join(
        preflight.unusual_settings(recipe(), dict(trainable=1, total=10**6))
    )


def test_planned_steps_are_the_trainers(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = torch.nn.Linear(1, 1)
    for rows, batch, accumulation, epochs in (
        (100, 8, 1, 1),
        (100, 8, 3, 2),
        (7, 8, 1, 3),
        (33, 4, 4, 1.5),
        (64, 8, 8, 1),
    ):
        r = recipe(
            f"training.per_device_train_batch_size={batch}",
            f"training.gradient_accumulation_steps={accumulation}",
            f"training.num_train_epochs={epochs}",
        )
        args = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=epochs,
            report_to=[],
            use_cpu=True,
            remove_unused_columns=False,
        )
        trainer = Trainer(
            model=model, args=args, train_dataset=Dataset.from_dict(dict(x=list(range(rows))))
        )
        steps = trainer.set_initial_training_values(args, trainer.get_train_dataloader())[-1]
        assert preflight.planned_steps(r, rows) == steps, (rows, batch, accumulation, epochs)


def test_rows_of_a_run_are_windows_where_texts_are_packed(tmp_path):
    Dataset.from_dict(dict(input_ids=[[1] * 30, [1] * 50, [1] * 20])).save_to_disk(
        tmp_path / "data/train"
    )

    def rows(*more):
        return preflight.training_rows(Run(tmp_path, recipe("training.max_length=40", *more)))

    assert (
        rows() == 3
        and rows("model.task=pretraining") == 3
        and rows("training.packing=true", "training.max_length=60") == 2
    )
    assert preflight.training_rows(Run(tmp_path / "none", recipe())) is None


def test_evaluations_need_rows_to_evaluate_on(tok, tmp_path):
    Dataset.from_dict(dict(input_ids=[[1] * 30])).save_to_disk(tmp_path / "data/train")
    r = recipe("training.eval_strategy=epoch", "training.save_strategy=epoch")
    with pytest.raises(MedftError, match="validation.*dataset.holdout"):
        preflight.preflight(r, tok, families.load_config(r), Run(tmp_path, r))
    Dataset.from_dict(dict(input_ids=[[1] * 30])).save_to_disk(tmp_path / "data/validation")
    assert preflight.preflight(r, tok, families.load_config(r), Run(tmp_path, r))["steps"] == 1


def test_no_room_for_checkpoints(tok, tmp_path, monkeypatch):
    r = recipe(
        "training.save_strategy=steps",
        "training.save_steps=10",
        "training.max_steps=1000",
        "lora.r=64",
    )
    counts = adapters.sizes_of(r, families.load_config(r))
    monkeypatch.setattr(
        adapters.shutil, "disk_usage", lambda p: SimpleNamespace(free=5 * counts["trainable"] * 12)
    )
    with pytest.raises(MedftError, match="checkpoints .*save_total_limit.*output.dir"):
        preflight.preflight(r, tok, families.load_config(r), Run(tmp_path, r))
    limited = recipe(
        "training.save_strategy=steps",
        "training.save_steps=10",
        "training.max_steps=1000",
        "training.save_total_limit=1",
        "lora.r=64",
        "export.merge=false",
    )
    monkeypatch.setattr(
        adapters.shutil, "disk_usage", lambda p: SimpleNamespace(free=5 * counts["trainable"] * 12)
    )
    assert (
        preflight.preflight(limited, tok, families.load_config(r), Run(tmp_path, limited))["disk"][
            "need"
        ]["checkpoints"]
        >= 2 * counts["trainable"] * 12
    )


def test_a_checkpoint_is_as_large_as_it_is_said_to_be(tmp_path):
    from medft.model import load as model

    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    for optim in ("adamw_torch", "adamw_8bit", "sgd"):
        r = recipe(
            "lora.r=128",
            "training.max_length=64",
            f"training.optim={optim}",
            "training.save_steps=1",
        )
        m = get_peft_model(model.load_base(r), adapters.lora_config(r))
        args = TrainingArguments(
            output_dir=str(tmp_path / optim),
            max_steps=1,
            save_steps=1,
            per_device_train_batch_size=1,
            report_to=[],
            use_cpu=True,
            optim=optim,
            disable_tqdm=True,
        )
        Trainer(
            model=m,
            args=args,
            train_dataset=Dataset.from_dict(dict(input_ids=[[5, 6, 7]], labels=[[5, 6, 7]])),
        ).train()
        written = sum(
            p.stat().st_size for p in (tmp_path / optim / "checkpoint-1").rglob("*") if p.is_file()
        )
        need = adapters.checkpoint_bytes(r, adapters.sizes_of(r, families.load_config(r)))
        assert 0.8 * written < need < 1.25 * written + 2_000_000, (optim, written, need)


GATED = """
import json, os, sys
from medft.core.files import MedftError
from medft.core.recipe import load_recipe
from medft.model import families
for token in ("", "hf_owner"):
    os.environ["HF_TOKEN"] = token
    for name in ("org/gated", "org/private", "org/none", "org/open"):
        recipe = load_recipe("quickstart", [f"model.name={name}"])
        try:
            said = families.family_of(families.load_config(recipe))
        except MedftError as e:
            said = str(e)
        print("SAID" + json.dumps(said))
"""


def test_a_gated_model_without_a_token_is_one_line_that_says_what_to_do(tmp_path):
    files = {"config.json": (BASE / "config.json").read_bytes()}
    with HubServer() as hub:
        hub.add("org/gated", files, kind="model", gated=True)
        hub.add("org/private", files, kind="model", private=True)
        hub.add("org/open", files, kind="model")
        done = subprocess.run(
            [sys.executable, "-c", GATED],
            env={**os.environ, "OMP_NUM_THREADS": "1", **hub.env(tmp_path)},
            capture_output=True,
            text=True,
            timeout=240,
            cwd=tmp_path,
        )
    lines = done.stdout.splitlines()
    said = [json.loads(line[4:]) for line in lines if line.startswith("SAID")]
    assert len(said) == 8 and all("\n" not in s for s in said), done.stderr[-2000:]
    assert "licence has not been accepted" in said[0] and "HF_TOKEN" in said[0]
    assert "no such model, or it is private" in said[1]
    assert "no such model" in said[2]
    assert said[3] == said[4] == said[5] == said[7] == "llama2"
    assert "no such model" in said[6]
