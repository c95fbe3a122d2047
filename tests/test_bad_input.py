"""Bad input is refused with a message that says what was expected and what came, before anything is done."""

from __future__ import annotations

import pytest
import torch

import gol_kernels as gk
from gol_kernels.ops import overload
from tests.cases import CASES, Case

Z, Y = torch.zeros(4, 6), torch.tensor([0, 1, 2, 3])


def test_wrong_number_of_columns() -> None:
    message = r"SeesawLoss\(num_classes=1203\) needs logits \[N, 1205\] .*, got \[2, 1204\]"
    with pytest.raises(ValueError, match=message):
        gk.SeesawLoss(num_classes=1203)(torch.zeros(2, 1204), torch.zeros(2, dtype=torch.int64))
    stats = gk.ClassStats(image_count=[5, 1], num_images=10)
    with pytest.raises(ValueError, match=r"DropLoss\(num_classes=2\) needs logits \[N, 2\]"):
        gk.DropLoss(stats)(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("logits", "labels", "options", "error", "message"),
    [
        (Z.long(), Y, {}, TypeError, "logits must be float32.*got torch.int64"),
        (Z, Y.float(), {}, TypeError, "labels must be int64 or int32, got torch.float32"),
        (Z[0], Y, {}, ValueError, r"logits must be \[N, K\], got \[6\]"),
        (Z, Y[:3], {}, ValueError, r"labels must be \[4\] like the rows of logits, got \[3\]"),
        (Z, Y[:, None], {}, ValueError, r"labels must be \[N\], got \[4, 1\]"),
        (Z, Y, {"row_weights": torch.ones(3)}, ValueError, r"row_weights must be \[4\].*got \[3\]"),
        (Z, Y, {"row_weights": torch.ones(4, requires_grad=True)}, ValueError, "cannot require a gradient"),
        (Z, Y, {"row_weights": torch.ones(4, device="meta")}, ValueError, "row_weights are on meta"),
        (Z, Y.to("meta"), {}, ValueError, "labels are on meta, logits on cpu"),
        (Z, Y, {"reduction": "average"}, ValueError, "reduction must be"),
        (Z, Y, {"reduction": "sum", "avg_factor": 2}, ValueError, "avg_factor goes with reduction='mean'"),
        (Z, Y, {"avg_factor": -1.0}, ValueError, "avg_factor must be finite and not negative"),
        (Z, Y, {"avg_factor": float("nan")}, ValueError, "avg_factor must be finite and not negative"),
        (Z, Y, {"avg_factor": torch.ones(2)}, ValueError, "avg_factor must be a number or a constant 0-d"),
        (Z, Y, {"backend": "fpga"}, ValueError, "unknown backend 'fpga'"),
    ],
)
def test_shared_checks(logits, labels, options, error, message) -> None:
    for function in (gk.gumbel_loss, gk.sigmoid_loss, gk.softmax_loss):
        with pytest.raises(error, match=message):
            function(logits, labels, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"clip": (3.0, 1.0)}, "clip must be"),
        ({"clip": (-500.0, 1.0)}, "clip must be"),
        ({"outside": "wrap"}, "outside must be"),
        ({"compat": "mmdet"}, "compat must be"),
        ({"reweight": gk.EQL(torch.zeros(5, dtype=torch.bool))}, r"rare must be bool \[6\].*\[5\]"),
        ({"reweight": gk.EQL(torch.zeros(6))}, r"rare must be bool \[6\].*float32"),
    ],
)
def test_gumbel_options(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        gk.gumbel_loss(Z, Y, **options)


def test_seesaw_counts() -> None:
    with pytest.raises(
        ValueError, match=r"need class_counts \[C\] or \[C\+1\], got K=6 and class_counts \[3\]"
    ):
        gk.seesaw_loss(Z, Y, torch.ones(3))
    with pytest.raises(ValueError, match="eps must lie"):
        gk.seesaw_loss(Z, Y, torch.ones(4), eps=0.0)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("bad", [-1, 2**40, "one too many"])
def test_label_out_of_range_names_row_and_value(backend: str, case: Case, bad: object) -> None:
    logits, labels = case.inputs(5, 7)
    highest = 7 if case.background else 6
    value = highest + 1 if isinstance(bad, str) else bad
    labels[3] = value
    with pytest.raises(ValueError, match=rf"\[0, {highest}\].*got {value} in row 3"):
        case.loss(logits, labels, backend=backend)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_label_out_of_range_is_nan_without_validation(backend: str, case: Case) -> None:
    """Never a plausible number, never a read outside: NaN for that row alone."""
    logits, labels = case.inputs(5, 7)
    labels[3] = 2**40
    leaf = logits.requires_grad_(True)
    losses = case.loss(leaf, labels, validate=False, reduction="none", backend=backend)
    assert losses.isnan().tolist() == [False, False, False, True, False]
    losses.sum().backward()
    assert leaf.grad.isnan().all(dim=1).tolist() == [False, False, False, True, False]
    assert not leaf.grad[[0, 1, 2, 4]].isnan().any()


def test_nothing_is_counted_when_the_input_is_bad() -> None:
    loss = gk.SeesawLoss(4)
    for logits, labels, options in (
        (Z, torch.tensor([0, 1, 2, 9]), {}),
        (Z, Y[:3], {}),
        (Z, Y, {"row_weights": torch.ones(3)}),
        (Z, Y, {"avg_factor": -1.0}),
        (torch.zeros(4, 5), Y, {}),
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            loss(logits, labels, **options)
    assert loss.class_stats.label_counts.tolist() == [0] * 5


def test_ops_check_their_own_input() -> None:
    """The C++ ops are reachable without the functions in front of them: they must not read outside."""
    if "native" not in gk.available_backends():
        pytest.skip("the native backend is not available")
    link, factors = ("gumbel", 1.0, -4.0, 10.0, "zero_outside"), (0.0, 0.0, 1.0, 0.0)
    options = (-100, "mean", 1.0, True, True, False)
    gumbel = (None, None, *link, "none", *factors, 5, *options)
    op = overload("bernoulli_loss", "native")
    with pytest.raises(ValueError, match=r"labels must be \[4\]"):
        op(Z, Y[:2], None, None, None, *gumbel)
    with pytest.raises(ValueError, match=r"row_weights must be \[4\]"):
        op(Z, Y, torch.ones(1), None, None, *gumbel)
    with pytest.raises(TypeError, match="logits must be float32"):
        op(Z.int(), Y, None, None, None, *gumbel)
    with pytest.raises(ValueError, match="class_table"):
        op(Z, Y, None, None, torch.ones(3), None, None, *link, "eql", *factors, 5, *options)
    with pytest.raises(ValueError, match="unknown link"):
        op(Z, Y, None, None, None, None, None, "logit", *link[1:], "none", *factors, 5, *options)
    # A label that is legal by num_classes but has no column must not be written to.
    with pytest.raises(ValueError, match="num_classes"):
        op(Z, Y, None, None, None, None, None, *link, "none", *factors, 9, *options)
    with pytest.raises(ValueError, match=r"two columns for objectness .*, got \[4, 1\]"):
        overload("softmax_loss", "native")(
            Z[:, :1], 0 * Y, None, None, None, "none", *factors[:3], True, 1, *options[:-1]
        )
    with pytest.raises(ValueError, match=r"grad_output must be \[4, \d\] like logits, got \[2, \d\]"):
        overload("gumbel_activation_grad", "native")(Z[:2], Z, 1.0, -4.0, 10.0)
    with pytest.raises(TypeError, match="gumbel_activation: logits must be float32"):
        overload("gumbel_activation", "native")(Z.int(), 1.0, -4.0, 10.0)
    with pytest.raises(ValueError, match=r"split lie in \[0, K\], got \[4, 6\] and 7"):
        overload("scale_grad_", "native")(Z.clone(), torch.ones(1), torch.ones(1), 7)
