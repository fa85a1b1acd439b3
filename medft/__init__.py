"Fine-tune language models on medical data, as notebooks you can read and runs you can trust."

__version__ = "0.1.0"

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

from medft.core import files  # noqa: E402, F401  sets switches that libraries read when imported

if TYPE_CHECKING:  # for editors: they read this file without running it
    from medft.cli.face import Run
    from medft.cli.face import compare_two_runs as compare
    from medft.cli.face import evaluate_models as evaluate
    from medft.cli.face import list_recipes as recipes
    from medft.cli.face import load_model as load
    from medft.cli.face import plan_recipe as plan
    from medft.cli.face import resume_run as resume
    from medft.cli.face import run_recipe as run

__all__ = ["Run", "compare", "evaluate", "load", "plan", "recipes", "resume", "run"]
_IN_FACE = {
    "Run": "Run",
    "compare": "compare_two_runs",
    "evaluate": "evaluate_models",
    "load": "load_model",
    "plan": "plan_recipe",
    "recipes": "list_recipes",
    "resume": "resume_run",
    "run": "run_recipe",
}


def _of_face(name):
    "What a name of `__all__` stands for. The first use of any of them imports medft.cli.face."
    return getattr(importlib.import_module("medft.cli.face"), _IN_FACE[name])


def __getattr__(name):
    if name not in _IN_FACE:
        raise AttributeError(f"module 'medft' has no attribute {name!r}")
    globals()[name] = _of_face(name)
    return globals()[name]


def __dir__():  # what tab completion offers
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])


# plan and evaluate are packages of modules, too: importing one of those modules binds its package to
# the name here, and a function of that name would be gone. So the package itself can be called.
class _CallablePackage(ModuleType):
    def __call__(self, *args, **kwargs):
        return self._function(*args, **kwargs)

    @property
    def __signature__(self):
        from inspect import signature

        return signature(self._function)

    @property
    def __doc__(self):
        return self._function.__doc__

    @property
    def _function(self):
        return _of_face(self.__name__.removeprefix("medft."))


for _name in ("medft.plan", "medft.evaluate"):
    importlib.import_module(_name)
    sys.modules[_name].__class__ = _CallablePackage
