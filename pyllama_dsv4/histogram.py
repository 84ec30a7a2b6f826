"""How often each scale and each code occurs in one tensor, as numbers, as text and as a picture.

It owns the counting and both renderings; reading is ``tensor_data``'s. Blocks are taken as stored: no value is
decoded for the counts, so what is shown is what is in the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from .errors import ArgumentError, ModelFileError, TensorShapeError
from .header import Header, Tensor, check_header
from .tensor_data import Bytes, DataReader

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Histogram", "histogram", "plot", "render_text"]

PIECE_BYTES: Final = 2 << 20
BAR_WIDTH: Final = 40

Counts = npt.NDArray[np.int64]

_E2M1: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# type: numpy dtype of the bits, bits of the mantissa, bits of the exponent, bias
_FLOATS: Final[dict[str, tuple[str, int, int, int]]] = {
    "F32": ("<u4", 23, 8, 127),
    "F16": ("<u2", 10, 5, 15),
    "BF16": ("<u2", 7, 8, 127),
}


@dataclass(frozen=True)
class Histogram:
    """Counts over one tensor.

    Attributes:
        tensor: Its name as spelled in the file.
        type: Its type.
        dims: ne0 first.
        scales: ``(256,) int64`` blocks by E8M0 scale byte, of value 2^(byte - 127); None for types without.
        codes: ``(256,)`` values by E4M3 code, ``(16,)`` by E2M1 code, or of plain numbers by the exponent field:
            ``(2, n)``, positive and negative ones.
        kind: What ``codes`` counts: ``e4m3``, ``e2m1`` or ``exponent``.
        bias: Of the exponent field; 0 for codes.
    """

    tensor: str
    type: str
    dims: tuple[int, ...]
    scales: Counts | None
    codes: Counts
    kind: str
    bias: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON types; counts of zero are left out.

        ``scales`` by byte and ``codes`` by code; for plain numbers ``exponents`` by power of two, with
        ``positive`` and ``negative`` counts, and ``zero`` for the smallest field (zeros and subnormals).
        """
        info: dict[str, Any] = {"tensor": self.tensor, "type": self.type, "dims": list(self.dims)}
        if self.scales is not None:
            info["scales"] = _nonzero(self.scales)
        if self.kind != "exponent":
            info["codes"] = _nonzero(self.codes)
            return info
        fields = np.flatnonzero(self.codes.any(axis=0))
        info["exponents"] = [
            {
                "power": "zero" if i == 0 else "none" if i == self.codes.shape[1] - 1 else int(i) - self.bias,
                "positive": int(self.codes[0, i]),
                "negative": int(self.codes[1, i]),
            }
            for i in fields
        ]
        return info


def _nonzero(counts: Counts) -> dict[str, int]:
    return {str(i): int(counts[i]) for i in np.flatnonzero(counts)}


def histogram(source: str | os.PathLike[str] | Header, tensor: str) -> Histogram:
    """Count scales and codes of one tensor.

    Args:
        source: A GGUF file of any architecture, or its header.
        tensor: Name of the tensor in either dialect.

    Raises:
        ArgumentError: There is no such tensor.
        TensorShapeError: Its type has no codes or exponents that could be counted.
        FormatError: Or a subclass: as ``header.check_header``.
        ModelFileError: Reading failed.
    """
    header = source if isinstance(source, Header) else check_header(source, any_architecture=True).header
    found = header.tensor(tensor)
    if found is None:
        raise ArgumentError(
            "the file has no such tensor",
            path=header.path,
            key="tensor",
            found=repr(tensor),
            expected="a name as in the list of tensors",
            hint="pyllama-dsv4 inspect FILE --tensors lists them.",
        )
    name = found.type.name
    if name not in _FLOATS and name not in ("F8_E4M3_B128", "MXFP4"):
        raise TensorShapeError(
            "cannot count codes of this type",
            path=header.path,
            tensor=found.name,
            found=name,
            expected=f"F8_E4M3_B128, MXFP4, {', '.join(_FLOATS)}",
        )
    with DataReader(header) as reader, ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = list(pool.map(lambda piece: _count(reader, found, *piece), _pieces(found)))
    scales = None if name in _FLOATS else np.sum([part[0] for part in parts], axis=0)
    codes = np.sum([part[1] for part in parts], axis=0)
    kind = {"F8_E4M3_B128": "e4m3", "MXFP4": "e2m1"}.get(name, "exponent")
    bias = _FLOATS[name][3] if name in _FLOATS else 0
    return Histogram(found.name, name, found.dims, scales, codes, kind, bias)


def _pieces(tensor: Tensor) -> Iterator[tuple[int, int]]:
    size = tensor.type.block_bytes
    step = max(1, PIECE_BYTES // size) * size
    for start in range(0, tensor.n_bytes, step):
        yield start, min(step, tensor.n_bytes - start)


def _count(reader: DataReader, tensor: Tensor, start: int, n_bytes: int) -> tuple[Counts, Counts]:
    data = reader.read_tensor(tensor, start, n_bytes)
    if tensor.type.name in _FLOATS:
        return np.zeros(0, np.int64), _count_floats(data, tensor.type.name)
    blocks = data.reshape(-1, tensor.type.block_bytes)
    scales = np.bincount(blocks[:, 0], minlength=256)
    counts = np.bincount(blocks[:, 1:].reshape(-1), minlength=256)
    if tensor.type.name == "MXFP4":  # two codes per byte
        table = counts.reshape(16, 16)
        counts = table.sum(axis=0) + table.sum(axis=1)
    return scales, counts


def _count_floats(data: Bytes, name: str) -> Counts:
    dtype, n_mantissa, n_exponent, _ = _FLOATS[name]
    fields = data.view(dtype) >> n_mantissa  # sign and exponent
    return np.bincount(fields, minlength=2 << n_exponent).reshape(2, -1)


# --- text -----------------------------------------------------------------------------------------------


def render_text(counts: Histogram) -> str:
    """Draw bars with characters, for a terminal of 80 columns."""
    lines = [f"{counts.tensor}: {counts.type}, {' x '.join(map(str, counts.dims))}"]
    if counts.scales is not None:
        lines += ["", f"{int(counts.scales.sum()):,} scales", *_scale_lines(counts.scales)]
    if counts.kind == "exponent":
        lines += ["", f"{int(counts.codes.sum()):,} values by magnitude", *_exponent_lines(counts)]
    elif counts.kind == "e2m1":
        lines += ["", f"{int(counts.codes.sum()):,} codes by magnitude", *_e2m1_lines(counts.codes)]
    else:
        lines += ["", f"{int(counts.codes.sum()):,} codes by magnitude", *_e4m3_lines(counts.codes)]
    return "\n".join(lines)


def _bars(rows: Sequence[tuple[str, int]]) -> list[str]:
    total = max(1, sum(n for _, n in rows))
    most = max(1, max((n for _, n in rows), default=1))
    width = max((len(label) for label, _ in rows), default=0)
    return [
        f"  {label:<{width}}  {100 * n / total:6.2f} %  {'#' * round(BAR_WIDTH * n / most)}".rstrip()
        for label, n in rows
    ]


def _scale_lines(scales: Counts) -> list[str]:
    used = np.flatnonzero(scales)
    if used.size == 0:
        return []
    return _bars(
        [
            (f"{i:3}  {'NaN' if i == 255 else f'2^{i - 127}'}", int(scales[i]))
            for i in range(int(used[0]), int(used[-1]) + 1)
        ]
    )


def _exponent_lines(counts: Histogram) -> list[str]:
    both = counts.codes.sum(axis=0)
    last = both.size - 1
    used = np.flatnonzero(both)
    if used.size == 0:
        return []
    rows = []
    for i in range(int(used[0]), int(used[-1]) + 1):
        # a wide gap below the smallest magnitude, down to zero, would fill the screen
        if both[i] == 0 and not both[max(0, i - 1) : i + 2].any():
            continue
        label = "zero" if i == 0 else "no number" if i == last else f"2^{i - counts.bias}"
        rows.append((label, int(both[i])))
    lines = _bars(rows)
    negative = int(counts.codes[1].sum())
    return [*lines, f"  {100 * negative / max(1, int(both.sum())):.2f} % have a minus sign"]


def _e2m1_lines(codes: Counts) -> list[str]:
    rows = [(f"{value:g}", int(codes[i] + codes[i + 8])) for i, value in enumerate(_E2M1)]
    return [*_bars(rows), _sign_line(codes, 8)]


def _e4m3_lines(codes: Counts) -> list[str]:
    magnitudes = codes[:128] + codes[128:]
    rows = [("zero", int(magnitudes[0])), ("below 2^-6", int(magnitudes[1:8].sum()))]
    rows += [(f"2^{e - 7}", int(magnitudes[8 * e : 8 * e + 8].sum())) for e in range(1, 15)]
    rows += [("256 to 416", int(magnitudes[120:126].sum())), ("448", int(magnitudes[126]))]
    rows += [("NaN", int(magnitudes[127]))]
    return [*_bars(rows), _sign_line(codes, 128)]


def _sign_line(codes: Counts, half: int) -> str:
    return f"  {100 * int(codes[half:].sum()) / max(1, int(codes.sum())):.2f} % have a minus sign"


# --- picture --------------------------------------------------------------------------------------------


def plot(counts: Histogram, path: str | os.PathLike[str]) -> Path:
    """Draw the histogram into a PNG file; needs matplotlib.

    Raises:
        ArgumentError: matplotlib is not installed, or the name does not end in ``.png``.
        ModelFileError: The file cannot be written.
    """
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise ArgumentError(
            "cannot plot into this kind of file", key="plot", found=str(path), expected="NAME.png"
        )
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ArgumentError(
            "plotting needs matplotlib",
            key="plot",
            found="no such package",
            hint="Run: pip install 'pyllama-dsv4[plot]'",
        ) from None
    n_panels = 1 if counts.scales is None else 2
    figure = Figure(figsize=(10, 3.4 * n_panels), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # draws without a screen
    axes = list(np.atleast_1d(figure.subplots(n_panels, 1)))
    figure.suptitle(f"{counts.tensor}\n{counts.type}, {' x '.join(map(str, counts.dims))}", fontsize=11)
    if counts.scales is not None:
        _plot_scales(axes[0], counts.scales)
    {"e4m3": _plot_e4m3, "e2m1": _plot_e2m1, "exponent": _plot_exponents}[counts.kind](axes[-1], counts)
    for axis in axes:
        axis.set_ylabel("share, %")
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(target)
    except OSError as error:
        raise ModelFileError(
            "cannot write the picture", path=target, found=error.strerror or error
        ) from error
    return target


def _share(counts: Counts) -> npt.NDArray[np.float64]:
    share: npt.NDArray[np.float64] = 100 * counts / max(1, int(counts.sum()))
    return share


def _plot_scales(axis: Axes, scales: Counts) -> None:
    used = np.flatnonzero(scales)
    first, last = (int(used[0]), int(used[-1])) if used.size else (127, 127)
    index = np.arange(first, last + 1)
    axis.bar(index, _share(scales)[first : last + 1], color="tab:blue", width=0.85)
    step = max(1, index.size // 16)
    axis.set_xticks(index[::step], [f"{i}\n$2^{{{i - 127}}}$" for i in index[::step]])
    axis.set_xlim(first - 0.6, last + 0.6)
    axis.set_title(f"scale bytes of {int(scales.sum()):,} blocks, and their values", fontsize=10)


def _plot_e4m3(axis: Axes, counts: Histogram) -> None:
    share = _share(counts.codes)
    x = np.arange(128)
    axis.bar(x, share[:128], color="tab:orange", width=0.9, label="plus")
    axis.bar(-x, share[128:], color="tab:green", width=0.9, label="minus")
    ticks = np.arange(24, 127, 16)  # labels of smaller values would overlap
    values = [2.0 ** (int(t) // 8 - 7) for t in ticks]
    axis.set_xticks(
        [*(-ticks[::-1]), 0, *ticks], [*(f"-{v:g}" for v in values[::-1]), "0", *(f"{v:g}" for v in values)]
    )
    axis.tick_params(axis="x", labelsize=8)
    n_nan = int(counts.codes[127] + counts.codes[255])
    nan = f", {n_nan:,} of them NaN" if n_nan else ""
    title = f"{int(counts.codes.sum()):,} E4M3 codes in the order of their values (before scaling){nan}"
    axis.set_title(title, fontsize=10)
    axis.legend(frameon=False, fontsize=8)


def _plot_e2m1(axis: Axes, counts: Histogram) -> None:
    share = _share(counts.codes)
    x = np.arange(8)
    axis.bar(x, share[:8], color="tab:orange", width=0.9, label="plus")
    axis.bar(-x - 1, share[8:], color="tab:green", width=0.9, label="minus")
    labels = [f"{v:g}" for v in _E2M1]
    axis.set_xticks([*(-x[::-1] - 1), *x], [*(f"-{v}" for v in labels[::-1]), *labels])
    axis.set_title(f"{int(counts.codes.sum()):,} E2M1 codes by value (before scaling)", fontsize=10)
    axis.legend(frameon=False, fontsize=8)


def _plot_exponents(axis: Axes, counts: Histogram) -> None:
    both = counts.codes.sum(axis=0)
    used = np.flatnonzero(both[1:-1]) + 1
    first, last = (int(used[0]), int(used[-1])) if used.size else (counts.bias, counts.bias)
    index = np.arange(first, last + 1)
    total = max(1, int(both.sum()))
    axis.bar(
        index, 100 * counts.codes[0, first : last + 1] / total, color="tab:orange", width=0.85, label="plus"
    )
    axis.bar(
        index,
        100 * counts.codes[1, first : last + 1] / total,
        bottom=100 * counts.codes[0, first : last + 1] / total,
        color="tab:green",
        width=0.85,
        label="minus",
    )
    step = max(1, index.size // 16)
    axis.set_xticks(index[::step], [f"$2^{{{i - counts.bias}}}$" for i in index[::step]])
    rest = f", {int(both[0]):,} zeros or subnormals, {int(both[-1]):,} no numbers"
    axis.set_title(f"{int(both.sum()):,} values by magnitude{rest}", fontsize=10)
    axis.legend(frameon=False, fontsize=8)
