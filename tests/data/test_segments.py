"""Texts of which parts are trained on: read, masked, and stored beside rows that are not."""

from medft.core.recipe import load_recipe
from medft.core.run import Run
from medft.data import pipeline as data
from medft.data.chat_templates import load_tokenizer
from medft.data.prompts import render_prompts, sample_text
from medft.data.reading.free_text import from_text
from medft.data.reading.multiple_choice import Reject

import json

import pytest


def test_mixed_rows_keep_their_order_and_their_masks(tmp_path):
    rows = []
    for i in range(60):
        rows += (
            [dict(text=f"Number {i} is plain.")]
            if i % 3 == 0
            else [dict(prompt=f"Number {i}", completion=" is asked.")]
            if i % 3 == 1
            else [dict(segments=[[f"Number {i}", 0], [" is", 1], [" in the", 0], [" middle.", 1]])]
        )
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    off = "{duplicates: off, near_duplicates: off, near_overlap: off, contradictions: off}"
    run = Run.create(
        load_recipe(
            "starter_base",
            [
                f"dataset={{path: {tmp_path / 'rows.jsonl'}, holdout: 0.0, cache: false, "
                f"checks: {off}}}"
            ],
        ),
        root=tmp_path,
    )
    report = data.prepare(run)
    ds, tok = data.load_split(run, "train"), load_tokenizer(run.recipe)
    assert (
        report["rows_out"] == len(ds) == 60
        and report["tokens"] == sum(map(len, ds["input_ids"]))
        and report["trainable_tokens"] == sum(map(sum, ds["completion_mask"]))
    )
    shown = [
        sample_text(tok, x, m) for x, m in zip(ds["input_ids"], ds["completion_mask"], strict=False)
    ]
    at = [int(r["id"].rpartition(":")[2]) - 1 for r in ds]
    for i, text in zip(at, shown, strict=False):
        assert (
            text
            == [
                f"⟦Number {i} is plain.<eos>⟧",
                f"Number {i}⟦ is asked.<eos>⟧",
                f"Number {i}⟦ is⟧ in the⟦ middle.<eos>⟧",
            ][i % 3]
        )


@pytest.mark.parametrize(
    "segments", ["no list", [["a"]], [["a", 0]], [["a", 2]], [["", 1]], [[1, 2, 3]]]
)
def test_odd_segments_are_rejected(segments):
    with pytest.raises(Reject):
        from_text(dict(segments=segments))


def test_everything_is_trained_on_when_the_recipe_says_so():
    recipe = load_recipe("starter_base", ["training.completion_only_loss=false"])
    (row,) = render_prompts(
        load_tokenizer(recipe),
        [dict(id="1", group="g", **from_text(dict(segments=[["2 + 2", 0], [" = 4", 1]])))],
        recipe,
    )
    assert set(row["completion_mask"]) == {1}
