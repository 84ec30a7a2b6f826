"""The migration page covers the pinned package's Llama; and the comparison notices when it does not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import check_migration  # noqa: E402

PEER = {"__init__": ["model_path", "n_gqa"], "eval": ["tokens"], "ctx": []}
OWN = {"__init__": ["model_path"], "eval": ["ids"]}
PAGE = """
## Constructor

| `model_path` | same |  |
| `n_gqa` | not supported | the file says it |

## Methods

| `eval` | same |  |
| `ctx` | not supported | inside |

## `eval`

| `tokens` | renamed | `ids` |
"""


def test_a_complete_page_has_no_problems() -> None:
    assert list(check_migration.problems(PAGE, PEER, OWN)) == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("| `n_gqa` | not supported | the file says it |\n", "", "'n_gqa' is missing"),
        ("| `n_gqa` | not supported |", "| `n_gqa` | same |", "we have none"),
        ("not supported | inside", "not supported | ", "needs a note"),
        ("`ids`", "`nothing`", "renamed to nothing"),
        ("| `model_path` | same |", "| `model_path` | perhaps |", "is 'perhaps'"),
        ("| `tokens`", "| `words`", "'words' does not exist"),
    ],
)
def test_what_is_wrong_is_named(old: str, new: str, message: str) -> None:
    assert old in PAGE
    assert message in "\n".join(check_migration.problems(PAGE.replace(old, new), PEER, OWN))


def test_the_page_covers_the_pinned_package() -> None:
    archive = check_migration.find_archive()
    if archive is None:
        pytest.skip("the pinned archive was not fetched on this machine")
    peer = check_migration.functions(check_migration.peer_source(archive), "Llama")
    assert len(peer) > 20
    page = check_migration.PAGE.read_text("utf-8")
    assert list(check_migration.problems(page, peer, check_migration.ours())) == []
