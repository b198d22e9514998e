"""The error tree. Each error is also the builtin that a caller would expect; each text says what to do.

RamekinError
├── ModelNotFoundError (FileNotFoundError)   there is no model folder at that place
├── ModelFormatError (ValueError)            the model folder is damaged, altered or not one of ours
│   └── FormatVersionError                   it was written by another version of ramekin
├── CheckpointError (ValueError)             the checkpoint to export is damaged, ambiguous or not a T5
├── InputError (ValueError)                  a file of prompts or papers is not what was expected
│   └── PaperError                           a file is not a paper
├── ProviderError                            the model cannot be computed where it was asked for
├── RuntimeVersionError (ImportError)        onnxruntime is missing or of a version that is not supported
└── VerificationError                        a model folder does not compute what it did at export, or what float32 does
"""

from __future__ import annotations


class RamekinError(Exception):
    """Base of every error that ramekin raises on purpose, but for wrong arguments (`ValueError`, `TypeError`).

    An export whose folder is taken raises `FileExistsError`.
    """


class ModelNotFoundError(RamekinError, FileNotFoundError):
    """There is no model folder at that place."""


class ModelFormatError(RamekinError, ValueError):
    """The model folder is damaged, altered or not one of ours."""


class FormatVersionError(ModelFormatError):
    """The model folder was written by another version of ramekin."""


class CheckpointError(RamekinError, ValueError):
    """The checkpoint to export is damaged, ambiguous or not a T5."""


class InputError(RamekinError, ValueError):
    """A file of prompts or papers is not what was expected."""


class PaperError(InputError):
    """A file is not a paper."""


class ProviderError(RamekinError):
    """The model cannot be computed where it was asked for: no CUDA, graphs for something else, or too little memory."""


class RuntimeVersionError(RamekinError, ImportError):
    """onnxruntime is missing, or of a version that is not supported."""


class VerificationError(RamekinError):
    """A model folder does not compute what it did at export, or what its checkpoint does in float32."""


def one_line(error: object) -> str:
    """What an error of somebody else's says, to be quoted: at most 300 characters, without line breaks."""
    return " ".join(str(error).split())[:300]
