"""Every exception this package raises on purpose, and nothing else.

One base, ``PyllamaError``; each subclass also inherits the builtin a caller would expect to catch. The facts
(path, tensor, key, found, expected, hint) are attributes, so that programs need not parse messages; the message
is built from them in one place. Pure Python: importing this module never loads the engine.
"""

from __future__ import annotations

import os

__all__ = [
    "ArgumentError",
    "CancelledError",
    "ChatError",
    "CheckpointError",
    "ClosedError",
    "ContextFullError",
    "ConvertError",
    "DialectError",
    "DiskFullError",
    "FormatError",
    "InferenceError",
    "MemoryLimitError",
    "MissingKeyError",
    "MissingScaleError",
    "MissingShardError",
    "MissingTensorError",
    "ModelFileError",
    "ModelLoadError",
    "ModelNotFoundError",
    "NotGGUFError",
    "PyllamaError",
    "ServerError",
    "StateError",
    "TensorShapeError",
    "ThreadError",
    "TileShapeError",
    "TokenizeError",
    "TruncatedFileError",
    "Type42Error",
    "UnknownOptionError",
    "UnsupportedCpuError",
    "UnsupportedModelError",
]


class PyllamaError(Exception):
    """Base of all errors of this package.

    Args:
        attempted: What was being done and what went wrong, one clause without a full stop.
        path: File or folder concerned.
        tensor: Tensor name as spelled in the file.
        key: Metadata key, option or argument name.
        found: What was found.
        expected: What would have been right.
        hint: What the user can do about it, one sentence.
        native_log: Last lines of the engine's log, oldest first.

    Attributes are the arguments of the same names; ``str(error)`` is one message made of all of them.
    """

    def __init__(
        self,
        attempted: str,
        *,
        path: str | os.PathLike[str] | None = None,
        tensor: str | None = None,
        key: str | None = None,
        found: object = None,
        expected: object = None,
        hint: str | None = None,
        native_log: tuple[str, ...] = (),
    ) -> None:
        self.attempted = attempted
        self.path = None if path is None else os.fspath(path)
        self.tensor = tensor
        self.key = key
        self.found = found
        self.expected = expected
        self.hint = hint
        self.native_log = tuple(native_log)
        super().__init__(self._message())

    def _message(self) -> str:
        where = ", ".join(
            f"{name} '{value}'"
            for name, value in (("tensor", self.tensor), ("key", self.key))
            if value is not None and f"'{value}'" not in self.attempted
        )
        text = self.attempted
        if where:
            text += f" ({where})"
        if self.path is not None and self.path not in text:
            text = f"{self.path}: {text}"
        if self.found is not None:
            text += f"; found {self.found}"
        if self.expected is not None:
            text += f"{',' if self.found is not None else ';'} expected {self.expected}"
        if self.hint:
            text += f". {self.hint}"
        if self.native_log:
            text += "\nengine log:\n" + "\n".join(f"  {line}" for line in self.native_log)
        return text


# --- input files -----------------------------------------------------------------------------------------------


class ModelFileError(PyllamaError, OSError):
    """The path cannot be read as a file: a directory, no permission, an I/O error."""


class ModelNotFoundError(ModelFileError, FileNotFoundError):
    """The path does not exist."""


class FormatError(PyllamaError, ValueError):
    """The file is not what its kind of file must look like."""


class NotGGUFError(FormatError):
    """No GGUF magic: empty, another format, or an unsupported GGUF version or byte order."""


class TruncatedFileError(FormatError):
    """The file ends before its header or its last tensor does (an interrupted download, usually)."""


class Type42Error(FormatError):
    """Tensors of file type id 42 whose block layout cannot be told, is mixed, or is not supported."""


class DialectError(FormatError):
    """Native and upstream names of DeepSeek-V4 are mixed in one file, or a derived key contradicts a tensor."""


class MissingKeyError(FormatError, LookupError):
    """A metadata key that the model needs is absent and cannot be derived, or has the wrong type."""


class MissingTensorError(FormatError, LookupError):
    """A tensor that the model needs is absent."""


class TensorShapeError(FormatError):
    """A tensor has other dimensions or another type than the model needs."""


class UnsupportedModelError(FormatError):
    """The file is well formed, but of an architecture or variant this package does not run."""


class CheckpointError(FormatError):
    """A hub-form checkpoint is malformed, incomplete, or of a kind that cannot be converted without loss."""


class MissingShardError(CheckpointError, FileNotFoundError):
    """A safetensors shard or another file named by the checkpoint is absent."""


class MissingScaleError(CheckpointError):
    """A quantised weight has no scale tensor."""


class TileShapeError(CheckpointError):
    """A scale tensor does not have one entry per 128x128 tile (FP8) or per 32 columns (FP4)."""


# --- work ------------------------------------------------------------------------------------------------------


class UnsupportedCpuError(PyllamaError, ImportError):
    """The engine was built for instructions that this CPU lacks; raised before it is loaded."""


class ModelLoadError(PyllamaError, OSError):
    """The engine refused a file that the header check accepted; ``native_log`` says why."""


class MemoryLimitError(PyllamaError, MemoryError):
    """Memory for the model, the KV cache or the compute buffers could not be had."""


class ConvertError(PyllamaError, RuntimeError):
    """A conversion did not finish; the partial output was removed or is clearly marked."""


class DiskFullError(ConvertError, OSError):
    """The disk filled up while writing."""


class InferenceError(PyllamaError, RuntimeError):
    """The engine failed while evaluating tokens."""


class ContextFullError(PyllamaError, ValueError):
    """The tokens do not fit into the context."""


class StateError(PyllamaError, ValueError):
    """A saved state is damaged, or of another model, build or setting."""


class CancelledError(PyllamaError, RuntimeError):
    """The caller cancelled a load or an evaluation."""


class ServerError(PyllamaError, RuntimeError):
    """The server cannot listen, or ended with an error."""


class ClosedError(PyllamaError, ValueError):
    """An object was used after ``close()``."""


class ThreadError(PyllamaError, RuntimeError):
    """One object was used from two threads at once, or after a fork."""


class TokenizeError(PyllamaError, ValueError):
    """Text cannot be tokenised, or ids cannot be turned into text (no vocabulary, id out of range)."""


class ChatError(PyllamaError, ValueError):
    """Messages, tools or a chat template cannot be turned into a prompt."""


class ArgumentError(PyllamaError, ValueError):
    """An argument has a value outside its range, or contradicts another."""


class UnknownOptionError(PyllamaError, TypeError):
    """A keyword argument that does not exist; the message names the nearest one, or the replacement."""
