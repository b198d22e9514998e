"""Run fine-tuned T5 and FLAN-T5 models without PyTorch: one encoding, many samples.

from ramekin import Engine

engine = Engine.load("model")
samples = engine.generate("translate English to German: Hello.", engine.params(n=4, seed=7))
"""

from ramekin.engine import Engine, TruncationWarning
from ramekin.errors import (
    CheckpointError,
    FormatVersionError,
    InputError,
    ModelFormatError,
    ModelNotFoundError,
    PaperError,
    ProviderError,
    RamekinError,
    RuntimeVersionError,
    VerificationError,
)
from ramekin.paper import Paper, build_prompt
from ramekin.qa_pair import QAPair
from ramekin.sample import Completion, Token
from ramekin.sampling import SamplingParams

__all__ = [
    "CheckpointError",
    "Completion",
    "Engine",
    "FormatVersionError",
    "InputError",
    "ModelFormatError",
    "ModelNotFoundError",
    "Paper",
    "PaperError",
    "ProviderError",
    "QAPair",
    "RamekinError",
    "RuntimeVersionError",
    "SamplingParams",
    "Token",
    "TruncationWarning",
    "VerificationError",
    "build_prompt",
]

__version__ = "0.1.0"
