"""Unknown keyword arguments: refused, with the nearest name or the name of what replaces it.

Swallowed keywords are how users end up with text that is wrong for a reason they cannot see. The table holds the
names that people bring from llama-cpp-python and what they are called, or why they are not needed, here.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from .errors import UnknownOptionError

__all__ = ["REPLACEMENTS", "keyword_names", "refuse_unknown"]

F = TypeVar("F", bound=Callable[..., Any])

# llama-cpp-python's name -> what to write instead (completes the sentence "use ...").
REPLACEMENTS: Mapping[str, str] = {
    "chat_format": "`chat_template`; V4's format is chosen by itself",
    "chat_handler": "`chat_template`; V4's format is chosen by itself",
    "f16_kv": '`cache_type="f16"`',
    "function_call": "`tool_choice`",
    "functions": "`tools`",
    "last_n_tokens_size": "`repeat_last_n` of a generation",
    "logits_all": '`eval(ids, logits="all")`',
    "lora_base": "nothing: adapters work on the weights of the file",
    "mirostat_mode": "`mirostat`",
    "n_gqa": "nothing: the file says it",
    "n_threads_batch": "`n_threads`, which holds for prefill and decode",
    "numa": "nothing: NUMA placement is left to numactl",
    "offload_kqv": "`n_gpu_layers`",
    "penalize_nl": "`logit_bias` of the newline token; upstream removed it",
    "rms_norm_eps": "nothing: the file says it",
    "rope_freq_base": "nothing: the file says it",
    "rope_freq_scale": "nothing: the file says it",
    "stopping_criteria": "`stop`, `stop_token_ids` or `stop_event`",
    "tensor_type": "nothing: the file says it",
    "temp": "`temperature`",
    "tfs_z": "`top_p` or `min_p`; upstream removed tail-free sampling",
    "type_k": "`cache_type`, which sets K and V together",
    "type_v": "`cache_type`, which sets K and V together",
    "vocab_only": "`pyllama_dsv4.header.read_header(path)`, which reads the metadata without the engine",
    "yarn_ext_factor": "nothing: the file says it",
    "yarn_orig_ctx": "nothing: the file says it",
}


def keyword_names(function: Callable[..., Any]) -> list[str]:
    """Return the names of the keyword parameters that `function` declares."""
    code = function.__code__
    return [n for n in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount] if n != "self"]


def refuse_unknown(where: str, unknown: Iterable[str], known: Iterable[str]) -> None:
    """Raise for the first name in `unknown`.

    Args:
        where: What was called, for the message.
        unknown: Keyword names that `where` does not take.
        known: Keyword names that it takes.

    Raises:
        UnknownOptionError: naming the replacement for a name from llama-cpp-python, or the nearest known name.
    """
    known = list(known)
    for name in unknown:
        if name in REPLACEMENTS and name not in known:
            hint = f"Use {REPLACEMENTS[name]}."
        else:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"Did you mean '{near[0]}'?" if near else f"Known: {', '.join(known)}."
        raise UnknownOptionError(
            f"{where}() got an unexpected keyword argument '{name}'", key=name, hint=hint
        )
