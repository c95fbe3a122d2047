"""The public stateless functions: checks, defaults, and the choice of a backend; the ops do the rest.

Conventions: logits [N, K] float32, float64, bfloat16 or float16, any row stride; labels [N] int64 or
int32, foreground 0..C-1, background C; losses are float32 (float64 for float64 logits). ``reduction`` is
"mean" (over the rows that are not ignored, or by ``avg_factor``), "sum", or "none" (one number a row).
A row of weight 0 or of label ``ignore_index`` does not exist: it adds nothing and receives nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .backends import choose
from .ops import overload
from .reweight import (
    EQL,
    Drop,
    InverseLink,
    Reweight,
    check_eps,
    check_table,
    inverse_gumbel,
    inverse_probit,
    inverse_sigmoid,
    op_arguments,
)

UNCLIPPED_FLOOR = -80.0
"""Without a clip, z/T below this is taken as this: exp(80) = 5.5e34 leaves float32 room for weights."""

UNCLIPPED_PROBIT = 1e4
"""Without a clip, a probit logit beyond this on either side is taken as this."""

GOL_MAX_LOSS = 20.0
"""The released GumbelCE clamps its reduced loss here."""

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

Link = tuple[str, float, float, float, str]
"""(link, temperature, clip_min, clip_max, slope) of the op's schema."""


def gumbel_activation(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    clip: tuple[float, float] | None = None,
    backend: str | None = None,
) -> Tensor:
    """p = exp(-exp(-z/T)) (Gumbel Optimized Loss, section 3), differentiable once.

    Args:
        logits: any shape; the result has its shape and dtype.
        clip: clamp z to (min, max) first; the gradient outside is 0. None, as at inference: no clamp.

    Raises:
        TypeError, ValueError: wrong dtype, temperature or clip.
    """
    _check_dtype(logits)
    low, high = _clip_range(clip, temperature)
    return overload("gumbel_activation", _backend("gumbel_activation", logits, backend))(
        logits, temperature, low, high
    )


def gumbel_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    reweight: Reweight | None = None,
    row_weights: Tensor | None = None,
    avg_factor: float | Tensor | None = None,
    reduction: str = "mean",
    class_gradients: Tensor | None = None,
    temperature: float = 1.0,
    clip: tuple[float, float] | None = (-4.0, 10.0),
    outside: str = "zero",
    max_loss: float | None = None,
    ignore_index: int = -100,
    compat: str | None = None,
    validate: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """Bernoulli loss of the clipped Gumbel activation (Gumbel Optimized Loss, ECCV 2022).

    Each column is a binary term: -log p = exp(-z/T) for the label's column, -log(1-p) for the others.

    Args:
        logits: [N, K]. K = C+1, the last column is background, trained as a class; or, with a reweighting
            without ``background_column``, K = C, and a background row has no positive column.
        reweight: one of ``gol_kernels.reweight``; ``Drop(rare)`` makes GOL.
        row_weights: [N], constant.
        avg_factor: divides the sum instead of the number of rows; a number, or a 0-d tensor that is never
            read on the host. 0 divides by 1.
        class_gradients: float64 [2, K]; what the same pass over the logits finds is added to it: for each
            column the sum over rows of row weight times |d row_loss / d z|, of positives and of negatives.
        clip: z is clamped to it. None: no clamp (z/T below -80 counts as -80, with its slope).
        outside: slope beyond the clip: "zero", or "straight_through", the slope at its edge.
        max_loss: clamp of the reduced loss to [0, max_loss]; above it the gradient is 0.
        compat: "gol" reproduces the released code: its dead zone (see ``gol_kernels.released``), and
            without ``reweight`` its cap of the reduced loss at 20. With EQL, Drop or no reweighting.
        validate: raise on labels out of range; default on a CPU. Where it is off, such a row's loss and
            gradient are NaN.
        backend: insist on one of ``available_backends()``.

    Returns:
        0-d loss, or [N] for reduction "none".

    Raises:
        TypeError, ValueError: wrong dtype, shape, device, option, or label (the first bad row is named).
        RuntimeError: the backend is not usable here; or, in backward, a double backward.
    """
    slope = _gumbel_slope(outside, compat)
    if max_loss is None and compat == "gol" and reweight is None and reduction != "none":
        max_loss = GOL_MAX_LOSS
    if max_loss is not None and reduction == "none":
        raise ValueError("max_loss caps the reduced loss: it cannot go with reduction='none'")
    if compat is not None and not (reweight is None or isinstance(reweight, (EQL, Drop))):
        raise ValueError(f"compat={compat!r} exists for EQL, Drop and no reweighting, not {reweight}")
    low, high = _clip_range(clip, temperature)
    loss = _bernoulli(
        ("gumbel", temperature, low, high, "straight_through" if clip is None else slope),
        inverse_gumbel(temperature),
        logits,
        labels,
        reweight,
        row_weights,
        avg_factor,
        reduction,
        class_gradients,
        ignore_index,
        validate,
        backend,
    )
    return loss if max_loss is None else loss.clamp(0.0, max_loss)


def sigmoid_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    reweight: Reweight | None = None,
    row_weights: Tensor | None = None,
    avg_factor: float | Tensor | None = None,
    reduction: str = "mean",
    class_gradients: Tensor | None = None,
    ignore_index: int = -100,
    validate: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """Binary cross-entropy with logits, summed over columns; arguments as in ``gumbel_loss``."""
    return _bernoulli(
        ("sigmoid", 1.0, -math.inf, math.inf, "straight_through"),
        inverse_sigmoid,
        logits,
        labels,
        reweight,
        row_weights,
        avg_factor,
        reduction,
        class_gradients,
        ignore_index,
        validate,
        backend,
    )


def probit_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    reweight: Reweight | None = None,
    row_weights: Tensor | None = None,
    avg_factor: float | Tensor | None = None,
    reduction: str = "mean",
    class_gradients: Tensor | None = None,
    clip: tuple[float, float] | None = (-5.0, 5.0),
    outside: str = "zero",
    ignore_index: int = -100,
    validate: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """Bernoulli loss of p = Phi(z), the normal distribution function; arguments as in ``gumbel_loss``.

    The clip is that of GOL's released code. None: no clamp (|z| above 1e4 counts as 1e4).
    """
    low, high = (-UNCLIPPED_PROBIT, UNCLIPPED_PROBIT) if clip is None else map(float, clip)
    if not -UNCLIPPED_PROBIT <= low < high <= UNCLIPPED_PROBIT:
        raise ValueError(f"clip must be (min, max) with -1e4 <= min < max <= 1e4, got {clip}")
    slope = _gumbel_slope("straight_through" if clip is None else outside, None)
    return _bernoulli(
        ("probit", 1.0, low, high, slope),
        inverse_probit,
        logits,
        labels,
        reweight,
        row_weights,
        avg_factor,
        reduction,
        class_gradients,
        ignore_index,
        validate,
        backend,
    )


def softmax_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    log_prior: Tensor | None = None,
    row_weights: Tensor | None = None,
    avg_factor: float | Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    validate: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax cross-entropy over all K columns of logits [N, K]; the other arguments as in ``gumbel_loss``.

    Args:
        log_prior: float [K], constant, added to the logits. ln n of the class counts makes balanced softmax
            (NeurIPS 2020, eq. 4), tau ln n logit adjustment (ICLR 2021, eq. 10), the logarithm of the
            classes' mean scores the equilibrium loss (ICCV 2021, eq. 4).
    """
    if log_prior is not None:
        check_table("log_prior", log_prior, logits, (logits.shape[-1],), torch.float32, torch.float64)
    num_classes = logits.shape[-1] - 1
    kind = "none" if log_prior is None else "prior"
    tensors, options = _common(
        logits, labels, row_weights, avg_factor, reduction, ignore_index, validate, num_classes
    )
    op = overload("softmax_loss", _backend("softmax_loss", logits, backend))
    return op(*tensors, log_prior, kind, 0.0, 0.0, 1.0, False, *options)[0]


def seesaw_loss(
    logits: Tensor,
    labels: Tensor,
    class_counts: Tensor,
    *,
    p: float = 0.8,
    q: float = 2.0,
    eps: float = 1e-2,
    row_weights: Tensor | None = None,
    avg_factor: float | Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    validate: bool | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Seesaw Loss (CVPR 2021, eq. 4-8), classes and objectness.

    Args:
        logits: [N, C+2], C class columns, then (object, background); or [N, C] for classification
            without background, labels 0..C-1, where the objectness is 0.
        class_counts: [C] or [C+1] (background last, unused), cumulative counts as they are AFTER this
            batch was counted; any real dtype.
        p: exponent of the mitigation factor; q: of the compensation factor; <= 0 turns one off.
        eps: floor under the label's score in the compensation factor.

    The other arguments are those of ``gumbel_loss``. Both terms have the same denominator; the class
    term is 0 on background rows.

    Returns:
        (classes, objectness), each 0-d, or [N] for reduction "none".

    Raises:
        as ``gumbel_loss``; ValueError where K fits neither form.
    """
    counts, k = class_counts.shape[0] if class_counts.dim() == 1 else -1, logits.shape[-1]
    if counts not in (k, k + 1, k - 1, k - 2):
        raise ValueError(
            f"seesaw_loss: logits [N, C+2] (or [N, C]) need class_counts [C] or [C+1], got K={k} and "
            f"class_counts {list(class_counts.shape)}"
        )
    if class_counts.device != logits.device:
        raise ValueError(f"class_counts are on {class_counts.device}, logits on {logits.device}")
    check_eps(eps)
    objectness = counts in (k - 1, k - 2)
    num_classes = k - 2 if objectness else k - 1
    tensors, options = _common(
        logits, labels, row_weights, avg_factor, reduction, ignore_index, validate, num_classes
    )
    op = overload("softmax_loss", _backend("softmax_loss", logits, backend))
    classes, background, _ = op(*tensors, class_counts, "seesaw", p, q, eps, objectness, *options)
    return classes, background


def label_counts(
    labels: Tensor,
    num_classes: int,
    *,
    ignore_index: int = -100,
    validate: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """How often each label occurs: int64 [C+1], background last.

    Args: labels [N] int64 or int32 in 0..C, or ignore_index. Raises: ValueError as ``gumbel_loss``.
    """
    _check_labels(labels)
    op = overload("label_counts", _backend("label_counts", labels, backend))
    return op(labels, num_classes, ignore_index, _validate(labels, validate))


# --- shared checks and defaults ------------------------------------------------------------------
def _bernoulli(
    link: Link,
    inverse_link: InverseLink,
    logits: Tensor,
    labels: Tensor,
    reweight: Reweight | None,
    row_weights: Tensor | None,
    avg_factor: float | Tensor | None,
    reduction: str,
    class_gradients: Tensor | None,
    ignore_index: int,
    validate: bool | None,
    backend: str | None,
) -> Tensor:
    k = logits.shape[-1]
    num_classes = k - 1 if reweight is None or reweight.background_column else k
    tensors, options = _common(
        logits, labels, row_weights, avg_factor, reduction, ignore_index, validate, num_classes
    )
    if class_gradients is not None:
        check_table("class_gradients", class_gradients, logits, (2, k), torch.float64)
    kind, class_table, row_table, rng, *factors = op_arguments(reweight, logits, inverse_link)
    op = overload("bernoulli_loss", _backend("bernoulli_loss", logits, backend))
    loss, _, statistics = op(
        *tensors, class_table, row_table, rng, *link, kind, *factors, *options, class_gradients is not None
    )
    if class_gradients is not None:
        class_gradients += statistics
    return loss


def check_rows(
    logits: Tensor, labels: Tensor, row_weights: Tensor | None, avg_factor: float | Tensor | None
) -> None:
    """Raises TypeError or ValueError where shapes, dtypes or devices do not fit together."""
    _check_dtype(logits)
    if logits.dim() != 2:
        raise ValueError(f"logits must be [N, K], got {list(logits.shape)}")
    _check_labels(labels)
    n = logits.shape[0]
    if labels.shape[0] != n:
        raise ValueError(f"labels must be [{n}] like the rows of logits, got {list(labels.shape)}")
    if row_weights is not None and tuple(row_weights.shape) != (n,):
        raise ValueError(f"row_weights must be [{n}] like the rows of logits, got {list(row_weights.shape)}")
    for name, tensor in (("labels", labels), ("row_weights", row_weights)):
        if tensor is not None and tensor.device != logits.device:
            raise ValueError(f"{name} are on {tensor.device}, logits on {logits.device}")
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name} are constants of the loss and cannot require a gradient")
    if isinstance(avg_factor, Tensor):
        if avg_factor.dim() != 0 or avg_factor.requires_grad:
            raise ValueError("avg_factor must be a number or a constant 0-d tensor")
        if avg_factor.device != logits.device:
            raise ValueError(f"avg_factor is on {avg_factor.device}, logits on {logits.device}")
    elif avg_factor is not None and not (avg_factor >= 0 and math.isfinite(avg_factor)):
        raise ValueError(f"avg_factor must be finite and not negative, got {avg_factor}")


def _common(
    logits: Tensor,
    labels: Tensor,
    row_weights: Tensor | None,
    avg_factor: float | Tensor | None,
    reduction: str,
    ignore_index: int,
    validate: bool | None,
    num_classes: int,
) -> tuple[tuple[Tensor, Tensor, Tensor | None, Tensor | None], tuple[int, int, str, float, bool, bool]]:
    """The first arguments of a loss op, and those from num_classes to compute_grad, all checked."""
    check_rows(logits, labels, row_weights, avg_factor)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    factor, reduction, scale = _denominator(avg_factor, reduction)
    # The gradient is made in forward only where backward can use it as it is: a per-row upstream
    # gradient needs another pass in any case, and fp16 would round the unscaled gradient to 0.
    compute_grad = (
        torch.is_grad_enabled()
        and logits.requires_grad
        and reduction != "none"
        and logits.dtype != torch.float16
    )
    options = (num_classes, ignore_index, reduction, scale, _validate(logits, validate), compute_grad)
    return (logits, labels, row_weights, factor), options


def _denominator(avg_factor: float | Tensor | None, reduction: str) -> tuple[Tensor | None, str, float]:
    """(avg_factor tensor, reduction, scale) of the op: a number becomes a scale of the sum."""
    if avg_factor is None:
        return None, reduction, 1.0
    if reduction != "mean":
        raise ValueError(f"avg_factor goes with reduction='mean', not {reduction!r}")
    if isinstance(avg_factor, Tensor):
        return avg_factor, reduction, 1.0
    return None, "sum", 1.0 / avg_factor if avg_factor != 0 else 1.0


def _gumbel_slope(outside: str, compat: str | None) -> str:
    if outside not in ("zero", "straight_through"):
        raise ValueError(f"outside must be 'zero' or 'straight_through', got {outside!r}")
    if compat is None:
        return "zero_outside" if outside == "zero" else outside
    if compat != "gol":
        raise ValueError(f"compat must be None or 'gol', got {compat!r}")
    if outside != "zero":
        raise ValueError("compat='gol' sends nothing back outside the clip: outside must stay 'zero'")
    return "released"


def _clip_range(clip: tuple[float, float] | None, temperature: float) -> tuple[float, float]:
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if clip is None:
        return UNCLIPPED_FLOOR * temperature, math.inf
    low, high = clip
    if not UNCLIPPED_FLOOR * temperature <= low < high:
        raise ValueError(f"clip must be (min, max) with {UNCLIPPED_FLOOR} T <= min < max, got {clip}")
    return float(low), float(high)


def _check_dtype(logits: Tensor) -> None:
    if logits.dtype not in _DTYPES:
        raise TypeError(f"logits must be float32, float64, bfloat16 or float16, got {logits.dtype}")


def _check_labels(labels: Tensor) -> None:
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels must be int64 or int32, got {labels.dtype}")
    if labels.dim() != 1:
        raise ValueError(f"labels must be [N], got {list(labels.shape)}")


def _validate(tensor: Tensor, validate: bool | None) -> bool:
    return tensor.device.type == "cpu" if validate is None else validate


def _backend(op: str, tensor: Tensor, backend: str | None) -> str:
    return choose(op, tensor.device.type, backend)[0]
