"""Training: what stops it, what resumes it, what it must never do.
One process, because imports are slow."""

from medft.core.files import MedftError, sha256
from medft.core.recipe import load_recipe
from medft.core.run import Run
from medft.data import chat_templates
from medft.data import pipeline as data
from medft.model import adapters, families
from medft.model import load as model
from medft.model.preflight import preflight
from medft.train import baseline as train
from medft.train import trainer as batches

import json
import shutil

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

QUICK = [
    "engine=trl",
    "dataset.max_samples=64",
    "training.per_device_train_batch_size=8",
    "training.logging_steps=1",
    "training.warmup_steps=0",
]


OWN = [
    "dataset.validation_path=null",
    "dataset.test_path=null",
    "dataset.sets={}",
    "dataset.checks.truncated=off",
    "dataset.checks.identifiers=off",
    "dataset.checks.near_duplicates=off",
    "dataset.checks.near_overlap=off",
]
PAIRS = [
    *OWN,
    "model.task=classification",
    "dataset.path=starter/er_pairs.jsonl",
    "dataset.max_samples=24",
]
TEXTS = [*OWN, "model.task=pretraining", "dataset.path=TEXTS"]


def bnb_repacks():
    "Does bitsandbytes change 4-bit weights in place on this machine?"
    from bitsandbytes.nn import Linear4bit

    return bool(getattr(Linear4bit(64, 64), "support_avx512bf16_for_cpu", False))


def prepared(tmp_path, *more):
    tmp_path.mkdir(parents=True, exist_ok=True)
    (tmp_path / "texts.jsonl").write_text(
        "".join(
            json.dumps(
                dict(
                    text=f"{word.capitalize()} {i} is a plant of the {word} family. " * (1 + i % 5)
                )
            )
            + "\n"
            for i, word in enumerate("tansy yarrow sage mint rue dill thyme basil".split() * 4)
        )
    )
    run = Run.create(
        load_recipe(
            "quickstart",
            [*QUICK, *(m.replace("TEXTS", str(tmp_path / "texts.jsonl")) for m in more)],
        ),
        root=tmp_path,
    )
    data.prepare(run)
    return run


def test_resumed_equals_uninterrupted_to_the_bit(tmp_path):
    run = prepared(
        tmp_path,
        "training.save_strategy=steps",
        "training.save_steps=4",
        "training.max_steps=8",
        "lora.lora_dropout=0.1",
    )
    whole = train.train(run)
    before = sha256(run.path / "trl/adapters/adapter_model.safetensors")
    for gone in ("trl/adapters", "trl/checkpoints/checkpoint-8"):
        shutil.rmtree(run.path / gone)
    again = train.train(run)
    assert not whole["resumed"] and again["resumed"] and again["steps"] == 8
    assert sha256(run.path / "trl/adapters/adapter_model.safetensors") == before


def test_progress_is_shown_ten_times_and_every_step_is_in_the_log(tmp_path, capsys):
    run = prepared(tmp_path, "training.max_steps=20")
    train.train(run)
    said = capsys.readouterr().out
    shown = [line for line in said.splitlines() if line.startswith("trl: step ")]
    assert len(shown) == 10 and shown[-1].startswith("trl: step 20/20, loss ")
    assert "{" not in said, "transformers prints no dictionary"
    assert (run.path / "logs" / "finetune.log").read_text().count("trl: step ") == 20
    table = train.training_frame(run)
    assert list(table) == ["trl"] and table.trl["steps"] == "20" and "reason" not in table.index


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    run = prepared(
        tmp_path,
        "training.learning_rate=1e30",
        "training.max_grad_norm=1e30",
        "training.max_steps=8",
    )
    with pytest.raises(MedftError, match="in step .*learning_rate") as e:
        train.train(run)
    assert (
        "learning_rate=1e+30" in str(e.value)
        and "rows of its batch: A-" in str(e.value)
        and "\n" not in str(e.value)
    )
    assert not (run.path / "trl/adapters").exists() and train.trained(run) == []


POISON = {"generative": [], "classification": PAIRS, "pretraining": TEXTS}


@pytest.mark.parametrize("task", POISON)
def test_the_row_that_gives_no_number_is_named(tmp_path, task):
    run = prepared(
        tmp_path,
        *POISON[task],
        "lora=null",
        "training.per_device_train_batch_size=4",
        "training.gradient_accumulation_steps=2",
        "training.num_train_epochs=1",
    )
    rows, base = data.load_split(run, "train"), model.load_base(run.recipe, model.labels_of(run))
    holders = {}
    for r in rows:
        for t in set(r["input_ids"][1 : run.recipe.max_length]):
            holders.setdefault(t, []).append(r["id"])
    token, (culprit,) = next(
        (t, ids) for t, ids in holders.items() if len(ids) == 1
    )  # a token of one row alone
    base.get_input_embeddings().register_forward_hook(
        lambda m, given, out: out.masked_fill((given[0] == token)[..., None], float("nan"))
    )
    with pytest.raises(MedftError, match=r"the loss is nan in step \d+") as e:
        train.fit(
            train.make_trainer(run, "trl", base, chat_templates.load_tokenizer(run.recipe), None)
        )
    named = str(e.value).split(": ")[-1].split(", ")
    assert culprit in named and (
        task == "pretraining" or named == [culprit]
    )  # of a window, its documents are named
    assert not list((run.path / "trl" / "checkpoints").glob("*"))


def test_a_gradient_that_overflows_is_found_before_it_is_used(tmp_path):
    run = prepared(tmp_path, "training.max_steps=2", "training.max_grad_norm=0")
    base, tok = model.load_base(run.recipe), chat_templates.load_tokenizer(run.recipe)
    trainer = train.make_trainer(run, "trl", base, tok, adapters.lora_config(run.recipe))
    weights = [p for p in trainer.model.parameters() if p.requires_grad]
    weights[-1].register_hook(lambda g: g * float("inf"))
    before = [p.detach().clone() for p in weights]
    with pytest.raises(
        MedftError,
        match="gradient norm is (inf|nan) in step 1; the loss is finite and its gradient overflows",
    ):
        trainer.go()
    assert all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))


def test_only_the_completion_is_trained_on(tmp_path):
    run = prepared(tmp_path, "training.max_steps=1")
    trainer = train.make_trainer(
        run,
        "trl",
        model.load_base(run.recipe),
        chat_templates.load_tokenizer(run.recipe),
        adapters.lora_config(run.recipe),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    tok = chat_templates.load_tokenizer(run.recipe)
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        trained = tok.decode(ids[labels != -100])
        assert trained.startswith(" ")
        assert trained.endswith(tok.eos_token)
        assert "Question" not in trained
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}


def test_a_4bit_base_keeps_float32_adapters_and_frozen_weights(tmp_path):
    run = prepared(tmp_path, "training.max_steps=3", "quantization.load_in_4bit=true")
    base = model.load_base(run.recipe)
    layers = [m for m in base.modules() if type(m).__name__ == "Linear4bit"]
    assert layers and not any(m.support_avx512bf16_for_cpu for m in layers)
    train.train(run)
    from safetensors.torch import load_file

    assert {
        t.dtype for t in load_file(run.path / "trl/adapters/adapter_model.safetensors").values()
    } == {torch.float32}


def test_both_runs_of_a_seed_meet_the_same_rows(tmp_path):
    order = []
    for name in "ab":
        run = prepared(tmp_path / name, "training.max_steps=2")
        trainer = train.make_trainer(
            run,
            "trl",
            model.load_base(run.recipe),
            chat_templates.load_tokenizer(run.recipe),
            adapters.lora_config(run.recipe),
        )
        order.append([b["input_ids"].tolist() for b in trainer.get_train_dataloader()])
    assert order[0] == order[1]


def test_windows_lose_no_token_and_know_their_documents():
    rows = [
        dict(input_ids=list(range(10 * i, 10 * i + n)), completion_mask=[0] * k + [1] * (n - k))
        for i, (n, k) in enumerate([(7, 3), (9, 0), (4, 4), (8, 2)])
    ]
    for alone in (False, True):
        made = batches.windows(Dataset.from_list(rows), 5, alone)
        ids, labels = sum(made["input_ids"], []), sum(made["labels"], [])
        label_of = dict(zip(ids, labels, strict=True))
        assert sorted(label_of) == sorted(sum((r["input_ids"] for r in rows), []))
        assert all(len(window) <= 5 for window in made["input_ids"])
        for row in rows:
            for i, learned in zip(row["input_ids"], row["completion_mask"], strict=True):
                assert label_of[i] == (i if learned else -100)
        if alone:
            continue
        for window, lengths in zip(made["input_ids"], made["seq_lengths"], strict=True):
            for part in torch.tensor(window).split(lengths):  # a document or a part of one
                assert len(set((part // 10).tolist())) == 1
                assert len(part) == 1 or (part.diff() == 1).all()


@pytest.mark.parametrize("name", families.NAMES)
def test_no_document_sees_another(name):
    torch.manual_seed(0)
    config = families.tiny_config(name)
    net = families.model_class(config, "generative")._from_config(
        config, attn_implementation="eager" if name == "gemma3" else "sdpa"
    )
    collate, draw = batches.isolating_collator(net, 0), torch.Generator().manual_seed(1)
    a, b, c, d = (torch.randint(5, 2000, (n,), generator=draw).tolist() for n in (9, 6, 40, 3))

    def logits(first, how):
        if how.one_document_a_row:
            rows = [dict(input_ids=x) for x in (first, b, c, d)]
        else:
            rows = [
                dict(input_ids=first + b, seq_lengths=[9, 6]),
                dict(input_ids=c + d, seq_lengths=[40, 3]),
            ]
        with torch.no_grad():
            out = net(**{k: v for k, v in how(rows).items() if k != "labels"}).logits
        documents = []
        for row_logits, row in zip(out, rows, strict=True):
            n = len(row["input_ids"])
            documents += row_logits[:n].split(row.get("seq_lengths", [n]))
        return documents

    def change_of_each(how):
        "How far the logits of every document move when the first one is reversed."
        pairs = zip(logits(a, how), logits(a[::-1], how), strict=True)
        return [float((x - y).abs().max()) for x, y in pairs]

    moved = change_of_each(collate)
    assert moved[0] > 1e-3 and max(moved[1:]) <= 1e-6
    assert collate.one_document_a_row == (name == "nemotron_h")

    class Careless(batches.WindowCollator):  # the same without the mask: this test would see it
        def __call__(self, rows):
            return {
                k: v
                for k, v in super().__call__(rows).items()
                if k not in ("use_cache", "position_ids")
            }

    assert max(change_of_each(Careless(0))[1:]) > 1e-5


@pytest.mark.parametrize("task", ["generative", "classification", "pretraining"])
def test_accumulated_gradients_equal_one_large_batch(tmp_path, task):
    losses = []
    for name, batch, steps in (("a", 8, 1), ("b", 1, 8)):
        run = prepared(
            tmp_path / name,
            *POISON[task],
            f"training.per_device_train_batch_size={batch}",
            f"training.gradient_accumulation_steps={steps}",
            "training.max_steps=3",
            "training.bf16=false",
            *(["model.class_weights=balanced"] if task == "classification" else []),
        )
        train.train(run)
        losses.append([r["loss"] for r in train.read_log(run, "trl") if "loss" in r])
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_class_weights_reach_the_loss(tmp_path):
    first = {}
    for i, how in enumerate(("null", "[2.0, 2.0]", "[1.0, 5.0]")):
        run = prepared(
            tmp_path / str(i),
            *PAIRS,
            f"model.class_weights={how}",
            "training.max_steps=1",
            "training.bf16=false",
            "training.per_device_train_batch_size=16",
        )
        train.train(run)
        first[how] = train.read_log(run, "trl")[0]["loss"]
        head = next(
            t
            for k, t in load_file(run.path / "trl/adapters/adapter_model.safetensors").items()
            if "score" in k
        )
        assert head.dtype == torch.float32 and head.shape[0] == 2
    assert (
        first["null"] == pytest.approx(first["[2.0, 2.0]"], abs=1e-6)
        and abs(first["null"] - first["[1.0, 5.0]"]) > 0.01
    )
    with pytest.raises(MedftError, match="3 weights, the data have 2"):
        train.train(prepared(tmp_path, *PAIRS, "model.class_weights=[1.0, 1.0, 1.0]"))


def test_4bit_gradients_are_the_same_after_an_evaluation(tmp_path):
    run = prepared(
        tmp_path, "quantization.load_in_4bit=true", "training.max_steps=1", "lora.lora_dropout=0"
    )

    def gap(exact):
        base, tok = model.load_base(run.recipe), chat_templates.load_tokenizer(run.recipe)
        for m in base.modules():
            if not exact and type(m).__name__ == "Linear4bit":
                m.support_avx512bf16_for_cpu = type(m)(64, 64).support_avx512bf16_for_cpu
        trainer = train.make_trainer(run, "trl", base, tok, adapters.lora_config(run.recipe))
        net, batch = trainer.model, next(iter(trainer.get_train_dataloader()))

        def gradient():
            net.train()
            net.zero_grad()
            trainer.compute_loss(net, dict(batch)).backward()
            return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])

        one = gradient()
        net.eval()
        with torch.no_grad():
            net(input_ids=batch["input_ids"])
        return float(torch.nn.functional.cosine_similarity(one, gradient(), 0))

    assert gap(True) == pytest.approx(1, abs=1e-5)
    if bnb_repacks():
        assert gap(False) < 0.95  # the trap is there, and this test would see it


def test_what_cannot_work_is_refused_before_weights_are_loaded():
    quickstart = load_recipe("quickstart")
    tok = chat_templates.load_tokenizer(quickstart)
    config = families.load_config(quickstart)
    for override, says in (
        (["training.max_length=4096"], "512 positions"),
        (["lora.target_modules=[nothing]"], "this model has|This model has"),
        (["lora.target_modules=[q_proj, nothing]"], "nothing"),
    ):
        with pytest.raises(MedftError, match=says):
            preflight(load_recipe("quickstart", override), tok, config)
    gemma = type(config).from_dict(config.to_dict())
    gemma.model_type = "gemma3_text"
    with pytest.raises(MedftError, match="float16"):
        preflight(load_recipe("quickstart", ["model.dtype=float16"]), tok, gemma)
