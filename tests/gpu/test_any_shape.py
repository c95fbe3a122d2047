"""What hypothesis draws: shapes, dtypes, layouts, options. Native alone: Triton compiles for every width."""

from __future__ import annotations

import pytest

pytest.importorskip("hypothesis")

from hypothesis import given, settings

from tests import test_properties


@pytest.mark.parametrize("native_backend", ["native"], indirect=True)
@settings(test_properties.PROPERTY, max_examples=150)
@given(data=test_properties.drawn())
def test_equals_the_float64_reference(native_backend: str, data: test_properties.Drawn) -> None:
    test_properties.test_equals_the_float64_reference.hypothesis.inner_test(native_backend, data)
