"""How tests look at a header check that must refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pyllama_dsv4.errors import PyllamaError
from pyllama_dsv4.header import check_header


def refusal(path: Path | str, **options: Any) -> PyllamaError:
    """Check a file that must be refused; the error has to name the file it is about."""
    with pytest.raises(PyllamaError) as error:
        check_header(path, **options)
    assert error.value.path is not None
    return error.value


def verdict(path: Path) -> tuple[type[PyllamaError], str | None, str | None]:
    """Return what the engine's own check is compared with: class, tensor, key."""
    error = refusal(path)
    return type(error), error.tensor, error.key
