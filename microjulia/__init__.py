"A GPT-2 style character-level transformer for classical philosophy, written as notebooks."
__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for type checkers and editors; at run time `_home` below says the same
    from .api import demo as demo, generate as generate, load as load, train as train
    from .checkpoint import load_checkpoint as load_checkpoint, save_checkpoint as save_checkpoint
    from .corpus import Corpus as Corpus
    from .generation import SamplingParams as SamplingParams
    from .gpt import GPT as GPT, GPTConfig as GPTConfig, capture as capture
    from .tokenizer import CharTokenizer as CharTokenizer
    from .training import TrainConfig as TrainConfig

# Each name and the module it lives in. A module is imported when one of its names is first used,
# so that `import microjulia` and `microjulia --help` answer before PyTorch could be loaded.
_home = dict(
    load='api', train='api', generate='api', demo='api',
    CharTokenizer='tokenizer', Corpus='corpus', GPT='gpt', GPTConfig='gpt', capture='gpt',
    load_checkpoint='checkpoint', save_checkpoint='checkpoint',
    TrainConfig='training', SamplingParams='generation')

__all__ = list(_home)


def __getattr__(name):
    "The object `name` of the front door, imported at first use."
    if name not in _home: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f'.{_home[name]}', __name__), name)
    return value


def __dir__(): return sorted({*globals(), *_home})
