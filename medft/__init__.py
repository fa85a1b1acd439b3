"Fine-tune language models on medical data, as notebooks you can read and runs you can trust."

__version__ = "0.1.0"

from medft.core import files  # noqa: E402, F401  sets switches that libraries read when imported
