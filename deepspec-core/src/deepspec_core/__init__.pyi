"""The names of __init__.py for type checkers, which cannot follow imports that happen on first use."""

from deepspec_core.config.load import RunFile as RunFile
from deepspec_core.errors import DeepSpecError as DeepSpecError
from deepspec_core.interface.evaluating import evaluate as evaluate
from deepspec_core.interface.generating import generate as generate
from deepspec_core.interface.models import load_draft as load_draft
from deepspec_core.interface.models import load_target as load_target
from deepspec_core.interface.training import train as train

__version__: str
__all__ = ["DeepSpecError", "RunFile", "evaluate", "generate", "load_draft", "load_target", "train"]
