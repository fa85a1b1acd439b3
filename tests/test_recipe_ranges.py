"""Every key of a recipe knows what it may be: a value outside is refused in one line, before anything is made."""
import math
import re
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medft import ranges, sections
from medft.core import MedftError, Run, load_recipe
from medft.recipe import BASELINES, NOT_LORA, OURS, not_finite
from medft.sections import SECTIONS, Recipe, library_fields

BAD = [
    "0", "-1", "1", "0.5", "-0.5", "1.5", "1e400", "1e308", "1e-320", "10000000000000000000000", ".nan", ".inf", "-.inf",
    "abc", "''", "' '", "[]", "{}", "[0]", "[-1]", "[a]", "['']", "{a: 0}", "{a: -1}", "{a: .nan}",
    "{'': a}", "true", "null", "2020-01-01", "../../x", r'"a\0b"', "[[]]", "[null]", "{a: {b: [.inf]}}",
]   # fmt: skip
KEYS = [f"{section}.{key}" for section, model in SECTIONS.items() for key in model.model_fields]
TOP = [k for k in Recipe.model_fields if k not in SECTIONS]
ENGINE = "engine=[trl, fast]"


def read(*overrides):
    "A recipe, or the error's line."
    try:
        return load_recipe("quickstart", [ENGINE, *overrides])
    except MedftError as e:
        return str(e)


def arguments_hold(recipe):
    "What a plan and a run first make of a recipe: the libraries' own configurations, and the steps."
    from medft import families, preflight
    from medft.adapters import lora_config

    config = families.tiny_config("llama2")
    preflight.training_arguments(recipe)
    lora_config(recipe, config)
    assert preflight.planned_steps(recipe, 1000) > 0
    assert Recipe(**recipe.model_dump(exclude_unset=True)) == recipe


@pytest.mark.parametrize("section", [*SECTIONS, "recipe"])
def test_any_value_of_any_key_is_refused_by_name_or_can_be_planned(section):
    keys = TOP if section == "recipe" else [k for k in KEYS if k.startswith(f"{section}.")]
    for key in keys:
        for value in BAD:
            found = read(f"{key}={value}")
            if isinstance(found, str):
                assert "\n" not in found and len(found) < 1500, (key, value, found)
                named = [key, key.split(".")[0]] if key.startswith(("dataset", "model")) else [key]
                assert any(n in found for n in named), (key, value, found)
                continue
            try:
                arguments_hold(found)
            except MedftError as e:
                assert "\n" not in str(e), (key, value, e)


def test_no_float_of_a_recipe_is_infinite():
    for key in (*KEYS, *TOP):
        for value in (".nan", ".inf", "-.inf", "[.nan]", "{a: .inf}"):
            found = read(f"{key}={value}")
            assert isinstance(found, str) and key.split(".")[0] in found, (key, value)
    assert list(not_finite(dict(a=dict(b=[1.0, math.inf])))) == [(("a", "b", "1"), math.inf)]
