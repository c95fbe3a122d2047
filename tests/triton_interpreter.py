"""A pytest plugin: the suite's ``backend`` is Triton, whose kernels its interpreter runs on CPU tensors.

For a process of its own, with TRITON_INTERPRET=1 in the environment before anything imports Triton.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

# Before every launch and every call of a function in a kernel the interpreter would patch triton.language,
# which takes most of the time: once will do. Nor are checks of integer overflow what is tested here.
interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
interpreter._patch_lang = lambda function: interpreter._LangPatchScope()
interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)

_cast = interpreter.InterpreterBuilder.cast_impl


def _rounding_cast(self: Any, source: Any, to: Any) -> Any:
    """The interpreter cuts float32 off to bfloat16; a GPU rounds to the nearest."""
    if source.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
        return _cast(self, source, to)
    rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
    return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)


interpreter.InterpreterBuilder.create_fp_trunc = _rounding_cast


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """In place of the fixtures of the same names."""
    marked = {mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")}
    for name in ("backend", "native_backend"):
        if name in metafunc.fixturenames and name not in marked:
            metafunc.definition.add_marker(pytest.mark.parametrize(name, ["triton"]))
