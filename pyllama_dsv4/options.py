"""Unknown keyword arguments: refused, with the nearest name or the name of what replaces it.

Swallowed keywords are how users end up with text that is wrong for a reason they cannot see. The table holds the
names that people bring from llama-cpp-python and what they are called, or why they are not needed, here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from .errors import UnknownOptionError

__all__ = ["REPLACEMENTS", "keyword_names", "moved", "refuse_unknown"]

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

# llama-cpp-python's classes and functions -> what to write instead; a pattern of the whole name.
_MOVED: Mapping[str, str] = {
    r"LlamaGrammar": "`Grammar`",
    r"Llama(RAM|Disk)?Cache": "`Llama(prefix_cache=FOLDER)`",
    r"LlamaPromptLookupDecoding|LlamaDraftModel": "`Llama(draft_model=FILE)`, a file of `pyllama-dsv4 convert --draft`",
    r"(Base)?Llama(HF)?Tokenizer": "nothing: the file's vocabulary is used",
    r"LogitsProcessorList": "a list as `logits_processor`",
    r"StoppingCriteriaList": "`stop`, `stop_token_ids` or `stop_event`",
    r"\w*ChatHandler": "`chat_template`, or nothing: V4's format is chosen by itself. Images and sound are not offered",
    r"(llama|ggml|LLAMA|GGML|mtmd)_\w+": "the methods of `Llama`; native objects stay inside",
}


def moved(name: str) -> str | None:
    """Return what stands here for a name of llama-cpp-python's package; None if it has no such name."""
    return next((hint for pattern, hint in _MOVED.items() if re.fullmatch(pattern, name)), None)


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
