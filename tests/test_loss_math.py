"""csrc/loss_math.h, the formulas that all kernels share, compiled for the host: every link and factor in
float and in double over z in [-100, 100] and beyond, against the float64 reference."""

from __future__ import annotations

import ctypes
import math
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from gol_kernels import reference

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which(shlex.split(os.environ.get("CXX") or "c++")[0])
pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
    pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="needs a checkout, not an install"),
]
KINDS = {"float": np.float32, "double": np.float64}
# name: (number of the link, temperature, clip_min, clip_max, edge, the reference's link)
LINKS = {
    "gumbel": (0, 1.0, -4.0, 10.0, 0.0, reference.GumbelLink()),
    "gumbel-straight": (0, 1.0, -4.0, 10.0, 1.0, reference.GumbelLink(slope="straight_through")),
    "gumbel-T3": (0, 3.0, -12.0, 30.0, 0.0, reference.GumbelLink(3.0, -12.0, 30.0)),
    "gumbel-unclipped": (
        0,
        1.0,
        -80.0,
        math.inf,
        1.0,
        reference.GumbelLink(1.0, -80.0, math.inf, "straight_through"),
    ),
    "gumbel-released": (1, 1.0, -4.0, 10.0, 0.0, reference.GumbelLink(slope="released")),
    "sigmoid": (2, 1.0, -math.inf, math.inf, 1.0, reference.SigmoidLink()),
    "probit": (3, 1.0, -5.0, 5.0, 0.0, reference.ProbitLink()),
    "probit-unclipped": (3, 1.0, -1e4, 1e4, 1.0, reference.ProbitLink(-1e4, 1e4, "straight_through")),
}


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("probe") / "loss_math_probe.so"
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
    source = ROOT / "tests" / "loss_math_probe.cpp"
    subprocess.run([COMPILER, *flags, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


def _values(probe: ctypes.CDLL, kind: str, name: str, z: np.ndarray) -> tuple[np.ndarray, int]:
    number, temperature, low, high, edge, _ = LINKS[name]
    z = np.ascontiguousarray(z, KINDS[kind])
    out = np.empty((7, len(z)), KINDS[kind])
    options = [ctypes.c_double(value) for value in (temperature, low, high, edge)]
    function = getattr(probe, f"link_{kind}")
    return out, function(number, *options, _pointer(z), ctypes.c_int64(len(z)), _pointer(out))


def _expected(name: str, z: np.ndarray) -> np.ndarray:
    """As _values' first six rows, in float64."""
    link, x = LINKS[name][-1], torch.from_numpy(z.astype(np.float64))
    positive, negative = link.positive(x), link.negative(x)
    log_p = -positive[0]
    return np.stack([t.numpy() for t in (*positive, *negative, log_p / math.log(2), log_p.exp())])


def _grid(kind: str) -> np.ndarray:
    """[-100, 100], denser in the middle, and the numbers next to the clips' edges."""
    edges = [
        np.nextafter(KINDS[kind](edge), KINDS[kind](way)) for edge in (-4, 10, -5, 5) for way in (-99, 99)
    ]
    grid = np.concatenate([np.linspace(-100, 100, 4001), np.linspace(-6, 12, 3601), edges])
    return grid.astype(KINDS[kind])


@pytest.mark.parametrize("name", LINKS)
def test_double(probe: ctypes.CDLL, name: str) -> None:
    z = _grid("double")
    found, _ = _values(probe, "double", name, z)
    expected = _expected(name, z)
    # 1 - p and 1 - g r round at 1e-16, which is what a loss below that is off by.
    np.testing.assert_allclose(found[:6], expected, rtol=5e-13, atol=3e-16)


@pytest.mark.parametrize("name", LINKS)
def test_float(probe: ctypes.CDLL, name: str) -> None:
    """exp(-e) keeps no more relative digits than e has absolute ones: where e = 54, 1e-5."""
    z = _grid("float")
    found, _ = _values(probe, "float", name, z)
    expected = _expected(name, z)
    rtol = 1.5e-5 if name.startswith("gumbel") else 4e-6
    # Against the largest loss and slope of the link near the middle, errors are at float32's last digit.
    np.testing.assert_allclose(found[:6], expected, rtol=rtol, atol=1.5e-7)
    middle = (z > -2) & (z < 9) if name.startswith("gumbel") else np.abs(z) < 4
    np.testing.assert_allclose(found[1, middle], expected[1, middle], rtol=2e-6, atol=0)
    np.testing.assert_allclose(found[3, middle], expected[3, middle], rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_infinity(probe: ctypes.CDLL, kind: str, name: str) -> None:
    z = np.array([np.nan, np.inf, -np.inf], KINDS[kind])
    found, _ = _values(probe, kind, name, z)
    assert np.isnan(found[:6, 0]).all()
    expected = _expected(name, z)
    np.testing.assert_allclose(found[:6, 1:], expected[:, 1:], rtol=1.5e-5, atol=1e-7)


@pytest.mark.parametrize("name", LINKS)
def test_product_of_factors_stays_normal(probe: ctypes.CDLL, name: str) -> None:
    """The smallest factor to the power kMaxProduct, in float."""
    low, high = max(LINKS[name][2], -1e4), min(LINKS[name][3], 1e4)
    z = np.concatenate([_grid("float"), np.array([low, high])])
    found, most = _values(probe, "float", name, z)
    assert found[6].max() <= 1
    assert most * math.log2(float(found[6].min())) > -126


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("q", [0.0, 1.0, 2.0, 0.7])
def test_seesaw_factors(probe: ctypes.CDLL, kind: str, q: float) -> None:
    power = np.array([1e-12, 0.25, 0.5, 1.0], KINDS[kind])
    x = np.array([-40.0, -3.1, -2.9, 0.0], KINDS[kind])
    out = np.empty((2, 4), KINDS[kind])
    options = [ctypes.c_double(value) for value in (0.5, q, -3.0)]
    getattr(probe, f"seesaw_{kind}")(*options, _pointer(power), _pointer(x), ctypes.c_int64(4), _pointer(out))
    np.testing.assert_allclose(out[0], np.minimum(1, power.astype(float) / 0.5), rtol=1e-6)
    np.testing.assert_allclose(out[1], 2 ** (q * np.maximum(x.astype(float) + 3, 0)), rtol=1e-6)


def test_philox(probe: ctypes.CDLL) -> None:
    """Random123's known answers for philox4x32-10, and the reference's numbering."""
    known = [
        ((0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF, 0xFFFFFFFF, 2**64 - 1, 2**64 - 1),
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
    ]
    out = (ctypes.c_uint32 * 4)()
    for (c0, c1, c23, key), words in known:
        probe.philox(c0, c1, ctypes.c_uint64(c23), ctypes.c_uint64(key), out)
        assert tuple(out) == words
    seed, offset = torch.tensor(2**62 + 12345), torch.tensor(987654321012345)
    drawn = reference.philox_uint16(seed, offset, 3, 24)
    for row in range(3):
        for group in range(3):
            probe.philox(group, row, ctypes.c_uint64(int(offset)), ctypes.c_uint64(int(seed)), out)
            halves = [half for word in out for half in (word & 0xFFFF, word >> 16)]
            assert drawn[row, 8 * group : 8 * group + 8].tolist() == halves
