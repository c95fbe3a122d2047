"""The ops: one list of schemas, their fake kernels, and autograd once for every backend.

An op exists once for each backend under ``torch.ops.gol_kernels.<op>_<backend>``, with one schema. They
are defined here and not in C++ so that an install without the extension has the same ops. A loss op
returns the loss and, where ``compute_grad`` asks for it, the gradient made in the same pass over the
logits; its backward then only has to scale it (``scale_grad_``, which moves nothing where the upstream
gradient is 1). Without it (``reduction="none"``, float16) backward runs the ``*_grad`` op, which scales in
float32 before it rounds.

What the tables of a loss op hold depends on ``reweight``:

    bernoulli     none       no table
                  eql        class_table bool [K], True is rare
                  drop       as eql; rng int64 (seed, offset)
                  weights    class_table float [2, K], of positives and of negatives
                  federated  class_table bool [K], True is kept
                  acsl       class_table uint8 [K], row_table uint8 [N], a bit for each group; logit_threshold
                  seesaw     class_table, counts of any real dtype, [K] or longer; p, q, eps
    softmax       none       no table
                  prior      class_table float [K], added to the logits
                  seesaw     class_table, counts as above, of the softmax's columns; p, q, eps

``compute_statistics`` makes float64 [2, K]: for each column the sum over rows of row weight times
|d row_loss / d z|, of its positives and of its negatives; rows that are ignored or illegal add nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

NAMESPACE = "gol_kernels"
BACKENDS = ("native", "triton", "reference")

_ROWS = "Tensor logits, Tensor labels, Tensor? row_weights, Tensor? avg_factor"
_ROW_OPTIONS = "int num_classes, int ignore_index, str reduction, float scale, bool validate"
_BERNOULLI = (
    f"{_ROWS}, Tensor? class_table, Tensor? row_table, Tensor? rng, str link, float temperature, "
    "float clip_min, float clip_max, str slope, str reweight, float p, float q, float eps, "
    f"float logit_threshold, {_ROW_OPTIONS}"
)
_SOFTMAX = (
    f"{_ROWS}, Tensor? class_table, str reweight, float p, float q, float eps, "
    f"bool objectness, {_ROW_OPTIONS}"
)
_CLIP = "float temperature, float clip_min, float clip_max"

SCHEMAS = {
    "bernoulli_loss": f"({_BERNOULLI}, bool compute_grad, bool compute_statistics)"
    " -> (Tensor loss, Tensor grad, Tensor statistics)",
    "bernoulli_grad": f"(Tensor grad_loss, {_BERNOULLI}) -> Tensor",
    "softmax_loss": f"({_SOFTMAX}, bool compute_grad) -> (Tensor classes, Tensor objectness, Tensor grad)",
    "softmax_grad": f"(Tensor grad_classes, Tensor grad_objectness, {_SOFTMAX}) -> Tensor",
    "gumbel_activation": f"(Tensor logits, {_CLIP}) -> Tensor",
    "gumbel_activation_grad": f"(Tensor grad_output, Tensor logits, {_CLIP}) -> Tensor",
    # Columns [0, split) times first, the others times second, both 0-d.
    "scale_grad_": "(Tensor(a!) grad, Tensor first, Tensor second, int split) -> ()",
    "label_counts": "(Tensor labels, int num_classes, int ignore_index, bool validate) -> Tensor",
}
OPS = tuple(SCHEMAS)


class RowArguments(NamedTuple):
    """The arguments that all loss ops share; see ``functional.gumbel_loss``."""

    logits: Tensor
    labels: Tensor
    row_weights: Tensor | None
    avg_factor: Tensor | None
    num_classes: int
    ignore_index: int
    reduction: str
    scale: float
    validate: bool


def _row_arguments(arguments: BernoulliArguments | SoftmaxArguments) -> RowArguments:
    return RowArguments(**{name: getattr(arguments, name) for name in RowArguments._fields})


class BernoulliArguments(NamedTuple):
    """The arguments of ``bernoulli_grad`` after the upstream gradient, in the schema's order."""

    logits: Tensor
    labels: Tensor
    row_weights: Tensor | None
    avg_factor: Tensor | None
    class_table: Tensor | None
    row_table: Tensor | None
    rng: Tensor | None
    link: str
    temperature: float
    clip_min: float
    clip_max: float
    slope: str
    reweight: str
    p: float
    q: float
    eps: float
    logit_threshold: float
    num_classes: int
    ignore_index: int
    reduction: str
    scale: float
    validate: bool

    @property
    def rows(self) -> RowArguments:
        return _row_arguments(self)


class SoftmaxArguments(NamedTuple):
    """The arguments of ``softmax_grad`` after the upstream gradients, in the schema's order."""

    logits: Tensor
    labels: Tensor
    row_weights: Tensor | None
    avg_factor: Tensor | None
    class_table: Tensor | None
    reweight: str
    p: float
    q: float
    eps: float
    objectness: bool
    num_classes: int
    ignore_index: int
    reduction: str
    scale: float
    validate: bool

    @property
    def rows(self) -> RowArguments:
        return _row_arguments(self)


_OBJECTNESS = SoftmaxArguments._fields.index("objectness")
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def overload(op: str, backend: str) -> Any:
    """The callable of one op on one backend."""
    return getattr(torch.ops.gol_kernels, f"{op}_{backend}").default


def loss_dtype(logits: Tensor) -> torch.dtype:
    """float64 for float64 logits, else float32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


# --- fake kernels: shapes and dtypes alone ------------------------------------------------------
def _fake_loss(logits: Tensor, reduction: str) -> Tensor:
    shape = (logits.shape[0],) if reduction == "none" else ()
    return logits.new_empty(shape, dtype=loss_dtype(logits))


def _fake_grad(logits: Tensor, compute_grad: bool) -> Tensor:
    return logits.new_empty(tuple(logits.shape) if compute_grad else (0,))


def _fake_bernoulli_loss(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    reduction, compute_grad, compute_statistics = args[-5], args[-2], args[-1]
    statistics = logits.new_empty((2, logits.shape[1]) if compute_statistics else (0,), dtype=torch.float64)
    return _fake_loss(logits, reduction), _fake_grad(logits, compute_grad), statistics


def _fake_softmax_loss(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    reduction, compute_grad = args[-4], args[-1]
    return _fake_loss(logits, reduction), _fake_loss(logits, reduction), _fake_grad(logits, compute_grad)


def _fake_bernoulli_grad(grad_loss: Tensor, logits: Tensor, *args: Any) -> Tensor:
    return _fake_grad(logits, True)


def _fake_softmax_grad(grad_classes: Tensor, grad_objectness: Tensor, logits: Tensor, *args: Any) -> Tensor:
    return _fake_grad(logits, True)


def _fake_gumbel_activation(logits: Tensor, *clip: float) -> Tensor:
    return _fake_grad(logits, True)


def _fake_gumbel_activation_grad(grad_output: Tensor, logits: Tensor, *clip: float) -> Tensor:
    return _fake_grad(logits, True)


def _fake_scale_grad_(grad: Tensor, first: Tensor, second: Tensor, split: int) -> None:
    return None


def _fake_label_counts(labels: Tensor, num_classes: int, ignore_index: int, validate: bool) -> Tensor:
    return labels.new_empty((num_classes + 1,), dtype=torch.int64)


_FAKES: dict[str, Callable[..., Any]] = {
    "bernoulli_loss": _fake_bernoulli_loss,
    "bernoulli_grad": _fake_bernoulli_grad,
    "softmax_loss": _fake_softmax_loss,
    "softmax_grad": _fake_softmax_grad,
    "gumbel_activation": _fake_gumbel_activation,
    "gumbel_activation_grad": _fake_gumbel_activation_grad,
    "scale_grad_": _fake_scale_grad_,
    "label_counts": _fake_label_counts,
}


# --- autograd -----------------------------------------------------------------------------------
class _Refused(torch.autograd.Function):
    """A gradient as a function of ``sources`` that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *sources: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "double backward is not supported: the gradient of a gol_kernels loss is made together with the "
            "loss. Use gol_kernels.reference under autograd for second derivatives."
        )


def _anchor(logits: Tensor) -> Tensor:
    """No numbers, but a function of the logits in autograd's books, which does not keep them."""
    return torch.slice_copy(logits, 0, 0, 0)


def _once(grad: Tensor, anchor: Tensor) -> Tensor:
    """The gradient that a backward returns; made with create_graph=True, it refuses to be differentiated.

    Without the logits' anchor it would be a constant, and a second derivative silently 0.
    """
    return _Refused.apply(grad, anchor) if torch.is_grad_enabled() else grad


# Whether the backward pass under way may be run again (retain_graph=True).
_graph_is_kept: Callable[[], bool] = getattr(
    torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True
)


def _scaled(backend: str, grad: Tensor, first: Tensor, second: Tensor, split: int) -> Tensor:
    """The saved gradient, columns [0, split) times ``first`` and the others times ``second``.

    A graph that is neither kept nor differentiated has no further use of its buffer, which is scaled in
    place, and left untouched where both are 1. While a compiler traces, tensors are of other types and the
    general form is recorded.
    """
    eager = type(first) is Tensor and type(second) is Tensor
    if eager and not torch.is_grad_enabled() and not _graph_is_kept():
        overload("scale_grad_", backend)(grad, first, second, split)
        return grad
    if split == grad.shape[1]:
        return grad * first
    return torch.cat([grad[:, :split] * first, grad[:, split:] * second], dim=1)


def _save(ctx: Any, anchor: Tensor, arguments: tuple[Any, ...], grad: Tensor | None) -> None:
    """Saves the gradient where it was made, else the arguments to make it from."""
    ctx.set_materialize_grads(False)
    ctx.anchor = anchor
    ctx.grad_is_made = grad is not None
    if grad is not None:
        ctx.save_for_backward(grad)
    else:
        ctx.save_for_backward(*[a for a in arguments if isinstance(a, Tensor)])
        ctx.arguments = [None if isinstance(a, Tensor) else a for a in arguments]
        ctx.is_tensor = [isinstance(a, Tensor) for a in arguments]


def _saved_arguments(ctx: Any) -> list[Any]:
    tensors = iter(ctx.saved_tensors)
    return [
        next(tensors) if is_tensor else a for is_tensor, a in zip(ctx.is_tensor, ctx.arguments, strict=True)
    ]


def _or_zero(upstream: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if upstream is None else upstream


# forward(ctx, logits, (anchor, arguments), outputs) of a node returns the outputs that are differentiable,
# the first ones. It takes all that its op was given and returned in one object each: in every call autograd
# looks at whatever is an argument by itself.
_Node = type[torch.autograd.Function]


def _bernoulli_node(backend: str) -> _Node:
    class BernoulliLoss(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Tensor, given: Any, outputs: Any) -> tuple[Tensor, ...]:
            anchor, (*arguments, compute_grad, _) = given
            _save(ctx, anchor, arguments, outputs[1] if compute_grad else None)
            return outputs[:1]

        @staticmethod
        def backward(ctx: Any, grad_loss: Tensor | None) -> Any:
            if grad_loss is None:
                return None, None, None
            if ctx.grad_is_made:
                (grad,) = ctx.saved_tensors
                grad = _scaled(backend, grad, grad_loss, grad_loss, grad.shape[1])
            else:
                grad = overload("bernoulli_grad", backend)(grad_loss, *_saved_arguments(ctx))
            return _once(grad, ctx.anchor), None, None

    return BernoulliLoss


def _softmax_node(backend: str) -> _Node:
    class SoftmaxLoss(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Tensor, given: Any, outputs: Any) -> tuple[Tensor, ...]:
            anchor, (*arguments, compute_grad) = given
            _save(ctx, anchor, arguments, outputs[2] if compute_grad else None)
            ctx.objectness = arguments[_OBJECTNESS]
            return outputs[:2]

        @staticmethod
        def backward(ctx: Any, grad_classes: Tensor | None, grad_objectness: Tensor | None) -> Any:
            some = grad_classes if grad_classes is not None else grad_objectness
            if some is None:
                return None, None, None
            first = _or_zero(grad_classes, some)
            second = _or_zero(grad_objectness, some) if ctx.objectness else first
            if ctx.grad_is_made:
                (grad,) = ctx.saved_tensors
                grad = _scaled(backend, grad, first, second, grad.shape[1] - 2 * ctx.objectness)
            else:
                grad = overload("softmax_grad", backend)(first, second, *_saved_arguments(ctx))
            return _once(grad, ctx.anchor), None, None

    return SoftmaxLoss


def _activation_node(backend: str) -> _Node:
    class GumbelActivation(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Tensor, given: Any, outputs: Any) -> tuple[Tensor, ...]:
            ctx.save_for_backward(logits)
            ctx.anchor, (_, *ctx.clip) = given
            return outputs

        @staticmethod
        def backward(ctx: Any, grad_output: Tensor) -> Any:
            grad = overload("gumbel_activation_grad", backend)(grad_output, *ctx.saved_tensors, *ctx.clip)
            return _once(grad, ctx.anchor), None, None

    return GumbelActivation


def _attach(node: _Node, arguments: tuple[Any, ...], outputs: Any) -> Any:
    """The outputs with their node, where the logits, the one differentiable argument, require a gradient."""
    if not arguments[0].requires_grad:
        return outputs
    given = _anchor(arguments[0]), arguments
    if isinstance(outputs, Tensor):
        return node.apply(arguments[0], given, (outputs,))[0]
    differentiable = node.apply(arguments[0], given, outputs)
    return *differentiable, *outputs[len(differentiable) :]


def _refuse_tangents(arguments: tuple[Any, ...]) -> None:
    for argument in arguments:
        if isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None:
            raise RuntimeError(
                "forward-mode differentiation (jvp) is not supported: the ops of gol_kernels have no formula "
                "for it. Use gol_kernels.reference."
            )


def _attach_refusal(arguments: tuple[Any, ...], grad: Tensor) -> Tensor:
    sources = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    return _Refused.apply(grad, *sources) if sources else grad


def _register_formula(op: str, backend: str, attach: Callable[[tuple[Any, ...], Any], Any]) -> None:
    """What torch.library.register_autograd does, less the 0.1 ms a call that it spends on defaults."""
    call = overload(op, backend)

    def kernel(*arguments: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(arguments)
        with torch._C._AutoDispatchBelowAutograd():
            outputs = call(*arguments)
        return attach(arguments, outputs) if torch.is_grad_enabled() else outputs

    _LIBRARY.impl(f"{op}_{backend}", kernel, "Autograd")


def _register_autograd(backend: str) -> None:
    _register_formula("bernoulli_loss", backend, partial(_attach, _bernoulli_node(backend)))
    _register_formula("softmax_loss", backend, partial(_attach, _softmax_node(backend)))
    _register_formula("gumbel_activation", backend, partial(_attach, _activation_node(backend)))
    for op in ("bernoulli_grad", "softmax_grad", "gumbel_activation_grad"):
        _register_formula(op, backend, _attach_refusal)


def _define() -> None:
    for backend in BACKENDS:
        for op, schema in SCHEMAS.items():
            _LIBRARY.define(f"{op}_{backend}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
            torch.library.register_fake(f"{NAMESPACE}::{op}_{backend}", _FAKES[op], lib=_LIBRARY)
        _register_autograd(backend)


def implement(op: str, backend: str, function: Any) -> None:
    """Registers a Python implementation for every device."""
    _LIBRARY.impl(f"{op}_{backend}", function, "CompositeExplicitAutograd")


_define()
