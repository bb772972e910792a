"""How does a linear map carry a transpose of our own through every kind of differentiation?

`jax.custom_vjp` shuts out forward mode, and so Hessian-vector products; `jax.custom_jvp` keeps both
modes, but leaves the transpose of its tangent map to autodiff, which for convolutions in loops and
for BatchNorm is the slow one. `linear_map` is the missing part: a primitive that transposes into
another one of its kind. (`jax.custom_derivatives.linear_call` is that, too, but knows neither
`vmap` nor derivatives of its residuals, without which there are no second derivatives.)
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir


def linear_map(function: Callable, transpose: Callable, residuals: Any, x: Any) -> Any:
    """`function(residuals, x)`, linear in `x`, whose transpose is `transpose(residuals, ct)`.

    Both are functions of trees of arrays alone: no traced array may be in their closure. They are
    differentiated as they are written, with respect to `residuals` too, and to any order if what
    they call can be.
    """
    flat_residuals, residual_tree = jax.tree.flatten(residuals)
    flat, tree = jax.tree.flatten(x)
    out_tree: Any = None

    def forward(*args):
        nonlocal out_tree
        given, linear = args[: len(flat_residuals)], args[len(flat_residuals) :]
        y = function(residual_tree.unflatten(given), tree.unflatten(linear))
        flat_y, out_tree = jax.tree.flatten(y)
        return flat_y

    def backward(*args):
        given, cotangents = args[: len(flat_residuals)], args[len(flat_residuals) :]
        ct = transpose(residual_tree.unflatten(given), out_tree.unflatten(cotangents))
        return tree.flatten_up_to(ct)

    y = _bind(forward, backward, flat_residuals, flat)
    return out_tree.unflatten(y)


def equally_varying(*trees: Any) -> Any:
    """The trees with arrays that all differ between the devices of `shard_map` if one does.

    For transposes that are written as if there were one device: cast outside of the map, what was
    the same on all devices gets the sum of their cotangents, as everywhere in JAX.
    """
    axes = frozenset().union(*(varying_axes(leaf) for leaf in jax.tree.leaves(trees)))
    return jax.tree.map(lambda leaf: vary(leaf, axes), trees)


def varying_axes(array: Any) -> frozenset:
    """The axes of `shard_map` along which an array, or a tracer's type, differs."""
    kind = array if hasattr(array, "update") else jax.typeof(array)
    return kind.mat.varying if hasattr(kind, "mat") else getattr(kind, "vma", frozenset())


def vary(array: Any, axes: frozenset) -> Any:
    """The array as one that differs along these axes, too."""
    new = tuple(axes - varying_axes(array))
    return lax.pcast(array, new, to="varying") if new else array


_linear_p = Primitive("linear_map")
_linear_p.multiple_results = True


def _bind(function, transpose, residuals: Sequence, x: Sequence):
    # Of `function(*residuals, *x)`, traced here, and `transpose(*residuals, *ct)`, traced later.
    traced = jax.make_jaxpr(function)(*residuals, *x)
    return _linear_p.bind(
        *residuals, *x, function=traced, transpose=transpose, split=len(residuals)
    )


def _run(*args, function: ClosedJaxpr, **_):
    return jaxpr_as_fun(function)(*args)


def _jvp(primals, tangents, *, function, transpose, split):
    params = {"function": function, "transpose": transpose, "split": split}
    y = _linear_p.bind(*primals, **params)
    terms = []
    if any(type(t) is not ad.Zero for t in tangents[split:]):
        dx = [ad.instantiate_zeros(t) for t in tangents[split:]]
        terms.append(_linear_p.bind(*primals[:split], *dx, **params))
    moving = [i for i, t in enumerate(tangents[:split]) if type(t) is not ad.Zero]
    if moving:

        def of_residuals(*values):
            args = list(primals)
            for i, value in zip(moving, values, strict=True):
                args[i] = value
            return jaxpr_as_fun(function)(*args)

        given = [primals[i] for i in moving]
        terms.append(jax.jvp(of_residuals, given, [tangents[i] for i in moving])[1])
    return y, [sum(parts[1:], parts[0]) for parts in zip(*terms, strict=True)]


def _transpose(cotangents, *args, function, transpose, split):
    residuals, x = args[:split], args[split:]
    if all(type(ct) is ad.Zero for ct in cotangents):
        return [None] * split + [ad.Zero(each.aval) for each in x]
    cotangents = [ad.instantiate_zeros(ct) for ct in cotangents]
    found = _bind(transpose, jaxpr_as_fun(function), residuals, cotangents)
    return [None] * split + list(found)


def _batch(args, axes, *, function, transpose, split):
    (size,) = {arg.shape[axis] for arg, axis in zip(args, axes, strict=True) if axis is not None}
    # What is linear is mapped over its first axis, all of it: so are its cotangents.
    x = [
        batching.bdim_at_front(arg, axis, size)
        for arg, axis in zip(args[split:], axes[split:], strict=True)
    ]
    of_residuals = tuple(axes[:split])
    mapped = jax.vmap(jaxpr_as_fun(function), (*of_residuals, *(0 for _ in x)))

    def transposed(*args):
        cotangents = args[split:]
        return jax.vmap(transpose, (*of_residuals, *(0 for _ in cotangents)))(*args)

    y = _bind(mapped, transposed, args[:split], x)
    return y, [0] * len(y)


_linear_p.def_impl(_run)
_linear_p.def_abstract_eval(lambda *_, function, **__: function.out_avals)
ad.primitive_jvps[_linear_p] = _jvp
ad.primitive_transposes[_linear_p] = _transpose
batching.primitive_batchers[_linear_p] = _batch
mlir.register_lowering(_linear_p, mlir.lower_fun(_run, multiple_results=True))
