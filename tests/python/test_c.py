# SPDX-License-Identifier: MIT
"""The ctypes layer says what the header says."""

import ctypes
import os
import pathlib
import re
import shutil
import subprocess
import sys

import epx
import pytest
from epx import _c

ROOT = pathlib.Path(__file__).parents[2]
HEADER = (ROOT / "include/epx/epx.h").read_text()


def run_c(folder: pathlib.Path, lines: "list[str]") -> "list[str]":
    """What a program of these printf lines says."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    source = folder / "layout.c"
    source.write_text(
        "#include <epx/epx.h>\n#include <stddef.h>\n#include <stdio.h>\n"
        "int main(void) {\n" + "\n".join(lines) + "\nreturn 0; }\n"
    )
    program = folder / "layout"
    include = f"-I{ROOT / 'include'}"
    subprocess.run([compiler, include, source, "-o", program], check=True)
    done = subprocess.run([program], check=True, capture_output=True)
    return done.stdout.decode().splitlines()


def test_structs_are_laid_out_as_in_c(tmp_path: pathlib.Path) -> None:
    lines = []
    expected = []
    for name, struct in _c.STRUCTS.items():
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        expected.append(f"{name} {ctypes.sizeof(struct)}")
        for field, *_ in struct._fields_:
            at = getattr(struct, field)
            lines.append(
                f'printf("{name}.{field} %zu %zu\\n", '
                f"offsetof({name}, {field}), "
                f"sizeof((({name} *)0)->{field}));"
            )
            expected.append(f"{name}.{field} {at.offset} {at.size}")
    assert run_c(tmp_path, lines) == expected


def test_every_struct_field_and_function_of_the_header_is_there() -> None:
    structs = re.findall(
        r"typedef struct (epx_\w+) \{(.*?)\n\} (\w+);", HEADER, re.S
    )
    assert {it[2] for it in structs} == set(_c.STRUCTS)
    functions = set(re.findall(r"EPX_API[^;]*?\b(epx_\w+)\(", HEADER))
    assert len(functions) > 20
    missing = [it for it in functions if getattr(_c.lib, it).argtypes is None]
    assert missing == []


def test_constants_are_those_of_c(tmp_path: pathlib.Path) -> None:
    values = {f"EPX_{it.name}": int(it) for it in epx.Status}
    values.update({f"EPX_LAYOUT_{it.name}": int(it) for it in epx.Layout})
    values.update({f"EPX_QUANTIZE_{it.name}": int(it) for it in epx.Quantize})
    for name in "F32 F16 BF16 F8E4M3 F8E5M2 BYTES I32 I64".split():
        values[f"EPX_{name}"] = getattr(_c, name)
    for name in (
        "DEVICE_CPU DEVICE_CUDA SEND_ONLY NEW_ROUTING MAX_TOPK MAX_BIAS "
        "SCALE_BLOCK"
    ).split():
        values[f"EPX_{name}"] = getattr(_c, name)
    said = run_c(
        tmp_path, [f'printf("{it} %d\\n", (int){it});' for it in values]
    )
    assert said == [f"{name} {value}" for name, value in values.items()]


def test_statuses_become_exceptions_of_their_group() -> None:
    with pytest.raises(epx.CallError) as caught:
        epx.local_experts(0, 1, 0)
    assert caught.value.status == epx.Status.ERR_INVALID
    assert "num_experts" in str(caught.value)
    kinds = {
        epx.Status.ERR_UNSUPPORTED: epx.UnsupportedError,
        epx.Status.ERR_SYSTEM: epx.ResourceError,
        epx.Status.ERR_HEAP_EXHAUSTED: epx.HeapExhaustedError,
        epx.Status.ERR_TIMEOUT: epx.PeerError,
        epx.Status.ERR_MISMATCH: epx.GroupError,
    }
    for status, kind in kinds.items():
        error = epx.errors.error_of(status, "why")
        assert type(error) is kind
        assert isinstance(error, epx.Error)
        assert str(error) == "why"
    assert epx.errors.error_of(-63, "").status == -63


def test_another_version_of_the_library_is_refused() -> None:
    code = (
        "import ctypes, epx._c as c\n"
        "c.VERSION = (0, 99)\n"
        "try: c._check_version()\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True
    )
    assert b"needs 0.99" in done.stdout


def test_import_takes_no_package_along() -> None:
    """Neither PyTorch nor NumPy is imported unless they are used."""
    code = (
        "import sys, epx; print(sorted({'torch', 'numpy'} & {*sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        env=dict(os.environ),
    )
    assert done.stdout.decode().strip() == "[]"
