"""The ops: one list of schemas, their fake kernels, and autograd once for every backend.

An op exists once for each backend under ``torch.ops.gol_kernels.<op>_<backend>``, with one schema. They
are defined here and not in C++ so that an install without the extension has the same ops. A loss op
returns the loss and, where ``compute_grad`` asks for it, the gradient made in the same pass over the
logits; its backward then only has to scale it. Without it (``reduction="none"``, float16) backward runs
the ``*_grad`` op, which scales in float32 before it rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "gol_kernels"
BACKENDS = ("native", "reference")

_ROWS = "Tensor logits, Tensor labels, Tensor? row_weights, Tensor? avg_factor"
_ROW_OPTIONS = "int num_classes, int ignore_index, str reduction, float scale, bool validate"
_BERNOULLI = (
    f"{_ROWS}, Tensor? class_table, Tensor? rng, str link, float temperature, float clip_min, "
    f"float clip_max, str slope, str reweight, {_ROW_OPTIONS}"
)
_SOFTMAX = (
    f"{_ROWS}, Tensor? class_counts, str reweight, float p, float q, float eps, "
    f"bool objectness, {_ROW_OPTIONS}"
)
_CLIP = "float temperature, float clip_min, float clip_max"

SCHEMAS = {
    "bernoulli_loss": f"({_BERNOULLI}, bool compute_grad) -> (Tensor loss, Tensor grad)",
    "bernoulli_grad": f"(Tensor grad_loss, {_BERNOULLI}) -> Tensor",
    "softmax_loss": f"({_SOFTMAX}, bool compute_grad) -> (Tensor classes, Tensor objectness, Tensor grad)",
    "softmax_grad": f"(Tensor grad_classes, Tensor grad_objectness, {_SOFTMAX}) -> Tensor",
    "gumbel_activation": f"(Tensor logits, {_CLIP}) -> Tensor",
    "gumbel_activation_grad": f"(Tensor grad_output, Tensor logits, {_CLIP}) -> Tensor",
    "label_counts": "(Tensor labels, int num_classes, int ignore_index, bool validate) -> Tensor",
}
OPS = tuple(SCHEMAS)
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


def _fake_bernoulli_loss(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    reduction, compute_grad = args[-4], args[-1]
    return _fake_loss(logits, reduction), _fake_grad(logits, compute_grad)


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


def _fake_label_counts(labels: Tensor, num_classes: int, ignore_index: int, validate: bool) -> Tensor:
    return labels.new_empty((num_classes + 1,), dtype=torch.int64)


_FAKES: dict[str, Callable[..., Any]] = {
    "bernoulli_loss": _fake_bernoulli_loss,
    "bernoulli_grad": _fake_bernoulli_grad,
    "softmax_loss": _fake_softmax_loss,
    "softmax_grad": _fake_softmax_grad,
    "gumbel_activation": _fake_gumbel_activation,
    "gumbel_activation_grad": _fake_gumbel_activation_grad,
    "label_counts": _fake_label_counts,
}


# --- autograd -----------------------------------------------------------------------------------
def _refuse_gradient(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(
        "double backward is not supported: the gradient of a gol_kernels loss is made together with the "
        "loss. Use gol_kernels.reference under autograd for second derivatives."
    )


class _Once(torch.autograd.Function):
    """Identity on a gradient that was made with create_graph=True: differentiating it is refused.

    The gradient is not a function of the logits in autograd's books; without this node a second
    derivative would silently be 0.
    """

    @staticmethod
    def forward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        _refuse_gradient(ctx, *grads)


def _once(grad: Tensor) -> Tensor:
    return _Once.apply(grad.detach().requires_grad_(True)) if torch.is_grad_enabled() else grad


def _graph_is_kept() -> bool:
    """Whether the backward pass under way may be run again (retain_graph=True)."""
    query = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if query is None else bool(query())


def _scaled(grad: Tensor, *parts: tuple[slice, Tensor]) -> Tensor:
    """The saved gradient with each group of columns times the upstream gradient of its part.

    A graph that is not kept has no further use of its buffer: on a CPU, where reading a scalar costs
    nothing, the buffer itself is handed on, untouched when the upstream gradient is 1. While a compiler
    traces, tensors are of other types and the general form is recorded.
    """
    eager = all(type(upstream) is Tensor for _, upstream in parts)
    if eager and grad.device.type == "cpu" and not _graph_is_kept():
        for columns, upstream in parts:
            if upstream.item() != 1:
                grad[:, columns].mul_(upstream)
        return grad
    if len(parts) == 1:
        return grad * parts[0][1]
    return torch.cat([grad[:, columns] * upstream for columns, upstream in parts], dim=1)


def _setup_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[-1])
    *arguments, compute_grad = inputs
    ctx.compute_grad = compute_grad
    if compute_grad:
        ctx.save_for_backward(output[-1])
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


def _register_formula(op: str, backend: str, backward: Any, setup: Any) -> None:
    """What torch.library.register_autograd does, less the 0.1 ms a call that it spends on defaults."""
    call = overload(op, backend)

    def forward(ctx: Any, *arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = call(*arguments)
        if setup is not None:
            setup(ctx, arguments, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(f"{op}_{backend}", (torch.autograd.Function,), methods)

    def kernel(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
            return function.apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return call(*arguments)

    _LIBRARY.impl(f"{op}_{backend}", kernel, "Autograd")


def _register_autograd(backend: str) -> None:
    n_bernoulli, n_softmax = (
        len(overload(op, backend)._schema.arguments) for op in ("bernoulli_loss", "softmax_loss")
    )

    def bernoulli_backward(ctx: Any, grad_loss: Tensor | None, grad_grad: Tensor | None) -> Any:
        if grad_loss is None:
            return (None,) * n_bernoulli
        if ctx.compute_grad:
            grad = _scaled(ctx.saved_tensors[0], (slice(None), grad_loss))
        else:
            with torch.no_grad():
                grad = overload("bernoulli_grad", backend)(grad_loss, *_saved_arguments(ctx))
        return (_once(grad), *(None,) * (n_bernoulli - 1))

    def softmax_backward(
        ctx: Any, grad_classes: Tensor | None, grad_objectness: Tensor | None, grad_grad: Tensor | None
    ) -> Any:
        some = grad_classes if grad_classes is not None else grad_objectness
        if some is None:
            return (None,) * n_softmax
        upstream = _or_zero(grad_classes, some), _or_zero(grad_objectness, some)
        if ctx.compute_grad:
            (grad,) = ctx.saved_tensors
            split = grad.shape[1] - 2 if ctx.objectness else grad.shape[1]
            parts = [(slice(0, split), upstream[0])]
            if ctx.objectness:
                parts.append((slice(split, None), upstream[1]))
            grad = _scaled(grad, *parts)
        else:
            with torch.no_grad():
                grad = overload("softmax_grad", backend)(*upstream, *_saved_arguments(ctx))
        return (_once(grad), *(None,) * (n_softmax - 1))

    def setup_softmax(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _setup_loss(ctx, inputs, output)
        ctx.objectness = inputs[9]

    def activation_backward(ctx: Any, grad_output: Tensor) -> Any:
        with torch.no_grad():
            grad = overload("gumbel_activation_grad", backend)(grad_output, *ctx.saved_tensors, *ctx.clip)
        return _once(grad), None, None, None

    def setup_activation(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.clip = inputs[1:]

    def register(op: str, backward: Any, setup: Any = None) -> None:
        _register_formula(op, backend, backward, setup)

    register("bernoulli_loss", bernoulli_backward, _setup_loss)
    register("softmax_loss", softmax_backward, setup_softmax)
    register("gumbel_activation", activation_backward, setup_activation)
    for op in ("bernoulli_grad", "softmax_grad", "gumbel_activation_grad"):
        register(op, _refuse_gradient)


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
