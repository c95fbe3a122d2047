"""The C++ extension: loading it, or saying why it is not there."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

_extension: ModuleType | None = None
_reason: str | None = None

try:
    # The schemas must be known before the extension registers its kernels.
    importlib.import_module("gol_kernels.ops")
    _extension = importlib.import_module("gol_kernels._C")
except ModuleNotFoundError as error:
    if error.name != "gol_kernels._C":
        raise
    _reason = "the extension gol_kernels._C was not built (python -m gol_kernels.info says how)"
except (ImportError, OSError, RuntimeError) as error:
    # Built against another torch or for other ops, or a library is missing: the package stays usable without
    # it. The first lines say what; after those of torch's errors comes a stack of calls.
    _what = " ".join(map(str.strip, str(error).splitlines()[:2]))
    _reason = f"the extension gol_kernels._C does not load: {_what}"


# Device types that this build has kernels for.
DEVICES = ("cpu", "cuda") if _extension is not None and _extension.build_info()["cuda"] else ("cpu",)


def unavailable() -> str | None:
    """None when the extension is loaded, else the reason why it is not."""
    return _reason


def extension() -> ModuleType:
    """The loaded extension module; RuntimeError with the reason when there is none."""
    if _extension is None:
        raise RuntimeError(_reason)
    return _extension


def build_info() -> dict[str, object]:
    """What was built: extension, reason, cuda, cuda_archs, compiler, openmp, cpu_capability, file."""
    if _extension is None:
        return {"extension": False, "reason": _reason, "cuda": False, "cuda_archs": "", "compiler": None}
    return {
        "extension": True,
        "reason": None,
        **_extension.build_info(),
        "cpu_capability": _extension.cpu_capability(),
        "file": os.path.basename(_extension.__file__ or ""),
    }
