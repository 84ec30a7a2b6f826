"""Generate pyllama_dsv4/cdef.h and _llama.pyi from the vendored headers and native/capi: gen_cdef.py [--check].

The names in pyllama_dsv4/symbols.txt, plus every type they need, are copied out of the preprocessed headers.
Enum values and array sizes are left to the C compiler (cffi API mode checks every struct offset). Needs a C
preprocessor and pycparser; run after a pin bump or after a change in native/capi/*.h.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from pycparser import c_ast, c_generator, c_parser

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pyllama_dsv4"
INCLUDES = [
    ROOT / "vendor" / "llama.cpp" / "include",
    ROOT / "vendor" / "llama.cpp" / "ggml" / "include",
    ROOT / "native" / "capi",
]

# Declarations of the C library that the headers mention. cffi knows these types itself.
FAKE_HEADERS = {
    "stddef.h": "typedef unsigned long size_t; typedef long ptrdiff_t;\n#define NULL ((void *) 0)\n",
    "stdint.h": "".join(
        f"typedef {c} {name}_t;\n"
        for name, c in (
            ("int8", "signed char"), ("uint8", "unsigned char"), ("int16", "short"), ("uint16", "unsigned short"),
            ("int32", "int"), ("uint32", "unsigned int"), ("int64", "long"), ("uint64", "unsigned long"),
            ("uintptr", "unsigned long"),
        )
    ),
    "stdbool.h": "typedef _Bool bool;\n#define true 1\n#define false 0\n",
    "stdio.h": "typedef struct _FILE FILE;\n",
    "stdarg.h": "", "string.h": "", "assert.h": "", "limits.h": "",
}  # fmt: skip
BUILTIN = {"bool", "FILE", "size_t", "ptrdiff_t", "uintptr_t"} | {
    f"{sign}int{bits}_t" for sign in ("", "u") for bits in (8, 16, 32, 64)
}


def preprocess() -> str:
    """Return llama.h and pyllama.h after the preprocessor, without the C library's own headers."""
    with tempfile.TemporaryDirectory() as tmp:
        for name, text in FAKE_HEADERS.items():
            (Path(tmp) / name).write_text(f"#pragma once\n{text}", encoding="utf-8")
        compiler = os.environ.get("CC", "cc")
        command = [compiler, "-E", "-P", "-nostdinc", "-std=c11", "-D__attribute__(x)=", "-D_Static_assert(...)=",
                   f"-I{tmp}", *(f"-I{path}" for path in INCLUDES), "-include", "stddef.h", "-x", "c", "-"]  # fmt: skip
        source = '#include "llama.h"\n#include "pyllama.h"\n'
        run = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
        if run.returncode != 0:
            sys.exit(f"the preprocessor failed:\n{run.stderr}")
        return run.stdout


class Declarations:
    """All declarations by name, and the closure of names that a set of functions needs."""

    def __init__(self, source: str) -> None:
        self.by_name: dict[str, c_ast.Node] = {}
        self.order: dict[str, int] = {}
        self.opaque: set[str] = set()  # structs seen only behind pointers: their fields are nobody's business
        for node in c_parser.CParser().parse(source).ext:
            for name in self._names(node):
                # a later full definition replaces a forward declaration
                if name not in self.by_name or self._is_definition(node):
                    self.by_name[name] = node
                    self.order[name] = len(self.order)

    @staticmethod
    def _tag(node: c_ast.Node) -> str | None:
        kinds = {c_ast.Struct: "struct", c_ast.Union: "union", c_ast.Enum: "enum"}
        return f"{kinds[type(node)]} {node.name}" if type(node) in kinds and node.name else None

    @staticmethod
    def _is_struct_pointer(node: c_ast.Node) -> bool:
        return (
            isinstance(node, c_ast.PtrDecl)
            and isinstance(node.type, c_ast.TypeDecl)
            and isinstance(node.type.type, c_ast.Struct)
            and node.type.type.decls is None
        )

    def _names(self, node: c_ast.Node) -> list[str]:
        names = []
        if isinstance(node, (c_ast.Typedef, c_ast.Decl)) and node.name:
            names.append(node.name)
        inner = node.type if isinstance(node, (c_ast.Typedef, c_ast.Decl)) else node
        while isinstance(inner, (c_ast.TypeDecl, c_ast.PtrDecl)):
            inner = inner.type
        tag = self._tag(inner)
        if tag and (self._is_definition(node) or not names):
            names.append(tag)
        return names

    @staticmethod
    def _is_definition(node: c_ast.Node) -> bool:
        inner = node.type if isinstance(node, (c_ast.Typedef, c_ast.Decl)) else node
        while isinstance(inner, (c_ast.TypeDecl, c_ast.PtrDecl)):
            inner = inner.type
        if isinstance(inner, c_ast.Enum):
            return inner.values is not None
        return isinstance(inner, (c_ast.Struct, c_ast.Union)) and inner.decls is not None

    def closure(self, roots: list[str]) -> set[str]:
        """Return roots and all names reachable from them."""
        found: set[str] = set()
        todo = list(roots)
        while todo:
            name = todo.pop()
            if name in found or name in BUILTIN:
                continue
            node = self.by_name.get(name)
            if node is None:
                if name.startswith("struct "):
                    self.opaque.add(name)
                    continue
                sys.exit(f"symbols.txt: {name} is not declared by the headers")
            found.add(name)
            stack = [node]
            while stack:
                child = stack.pop()
                if self._is_struct_pointer(child):
                    opaque = self._tag(child.type.type)
                    if opaque not in roots:
                        self.opaque.add(str(opaque))
                        continue
                if isinstance(child, c_ast.IdentifierType):
                    todo.extend(n for n in child.names if n in self.by_name)
                tag = self._tag(child)
                if tag:
                    todo.append(tag)
                stack.extend(c for _, c in child.children())
        return found


class CdefGenerator(c_generator.CGenerator):  # type: ignore[misc]
    """C output for cffi: enum values left to the compiler."""

    def visit_Enumerator(self, node: c_ast.Enumerator) -> str:  # noqa: N802 (visitor protocol)
        return f"{self._make_indent()}{node.name} = ...,\n"

    def visit_FuncDecl(self, node: c_ast.FuncDecl) -> str:  # noqa: N802
        return str(super().visit_FuncDecl(node))


def emit(decls: Declarations, names: set[str]) -> str:
    generator = CdefGenerator()
    seen: set[int] = set()
    lines = ["// Generated by tools/gen_cdef.py from the vendored headers and native/capi; do not edit.", ""]
    lines += [f"{name};" for name in sorted(decls.opaque - names)]
    for name in sorted(names, key=lambda n: decls.order[n]):
        node = decls.by_name[name]
        if id(node) in seen:
            continue
        seen.add(id(node))
        lines.append(generator.visit(node).replace("_Bool", "bool") + ";")
    return "\n".join(lines) + "\n"


def stub(decls: Declarations, names: set[str]) -> str:
    """Return _llama.pyi: every function and enum constant of the library object, so that mypy sees typos."""
    functions: list[str] = []
    constants: list[str] = []
    for name in sorted(names):
        node = decls.by_name.get(name)
        if isinstance(node, c_ast.Decl) and isinstance(node.type, c_ast.FuncDecl):
            functions.append(name)
        elif name.startswith("enum "):
            inner = node
            while inner is not None and not isinstance(inner, c_ast.Enum):
                inner = inner.type
            if inner is not None and inner.values is not None:
                constants.extend(value.name for value in inner.values.enumerators)
    lines = [
        '"""Generated by tools/gen_cdef.py: names of the compiled cffi module."""',
        "",
        "from typing import Any",
        "",
        "class _Lib:",
        *(f"    {name}: int" for name in sorted(constants)),
        *(f"    def {name}(self, *args: Any) -> Any: ..." for name in functions),
        "",
        "class _FFI:",
        "    NULL: Any",
        "    error: type[Exception]",
        "    def new(self, cdecl: str, init: Any = ...) -> Any: ...",
        "    def cast(self, cdecl: str, value: Any) -> Any: ...",
        "    def string(self, cdata: Any, maxlen: int = ...) -> Any: ...",
        "    def unpack(self, cdata: Any, length: int) -> Any: ...",
        "    def buffer(self, cdata: Any, size: int = ...) -> Any: ...",
        "    def from_buffer(self, cdecl: str, python_buffer: Any, require_writable: bool = ...) -> Any: ...",
        "    def gc(self, cdata: Any, destructor: Any, size: int = ...) -> Any: ...",
        "    def release(self, cdata: Any) -> None: ...",
        "    def sizeof(self, cdecl: Any) -> int: ...",
        "    def addressof(self, cdata: Any, *fields: Any) -> Any: ...",
        "    def typeof(self, cdecl: Any) -> Any: ...",
        "",
        "ffi: _FFI",
        "lib: _Lib",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="compare with the committed files, write nothing"
    )
    args = parser.parse_args()

    decls = Declarations(preprocess())
    symbols = (PACKAGE / "symbols.txt").read_text(encoding="utf-8").splitlines()
    names = decls.closure(
        [line.split("#", 1)[0].strip() for line in symbols if line.split("#", 1)[0].strip()]
    )
    outputs = {PACKAGE / "cdef.h": emit(decls, names), PACKAGE / "_llama.pyi": stub(decls, names)}
    stale = [
        path
        for path, text in outputs.items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    if args.check:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is stale; run tools/gen_cdef.py", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(outputs[path], encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
