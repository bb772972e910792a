"""How is BatchNorm folded into the convolution before it, for evaluation?

What a convolution gives is multiplied by scale / sqrt(var + epsilon) for each channel: so can its
kernel be, once and for all, and of BatchNorm a bias is left. Convolution, bias and ReLU are one
kernel of cuDNN. Which BatchNorm follows which convolution is read off the program that the network
makes, not off names: whatever is used in any other way, too, stays as it is.
"""

import inspect
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import core, traverse_util
from flax import linen as nn
from jax.extend.core import Literal

from resvariants.errors import InputError
from resvariants.networks.convolution import conv_general_dilated
from resvariants.networks.normalisation import BatchNorm
from resvariants.platforms import made_for


def fold_batch_norm(
    model: nn.Module, variables: Mapping[str, Any], image_shape: Sequence[int]
) -> dict[str, Any]:
    """`variables` for evaluation, with each BatchNorm folded into the convolution that it follows.

    `model` takes them as it takes its own, with `train=False`, and gives the same logits up to
    rounding, under any gates. In training it refuses them.

    Folded are our BatchNorms that normalise just what an `nn.Conv` or `nn.Dense` gives, wherever
    they are. All else stays: a BatchNorm of sums, of concatenated maps, of activations; one whose
    convolution has another reader, be it `return_features`, or variables that have another use.
    Of a folded BatchNorm a `bias` is left in `params`, of no channels if the convolution has a bias
    of its own, which then takes it in.

    Args:
      model: called as `model(images, train=False)`, also with `gates` (of `model.num_blocks`) and
        `return_features` if it takes them.
      variables: `params` and `batch_stats`, of one network. Kernels are multiplied in at least
        float32, and keep their dtype.
      image_shape: (height, width, channels) of images that it takes.

    Raises:
      InputError: there is nothing to fold.
    """
    flat = dict(traverse_util.flatten_dict(core.unfreeze(dict(variables))))
    pairs = _pairs(model, flat, image_shape)
    if not pairs:
        raise InputError(
            f"{type(model).__name__} has nothing to fold: none of its BatchNorms (if it has any,"
            " not folded yet) normalises just what one convolution gives. Evaluate it as it is"
        )
    return {"batch_stats": {}, **traverse_util.unflatten_dict(_folded(flat, pairs))}


def _folded(flat, pairs):
    changed = {path for pair in pairs for layer in pair for path in layer.paths}

    def fold(old):
        new = dict(old)
        for convolution, norm in pairs:
            _fold(new, convolution, norm)
        return new

    new = jax.jit(fold)({path: flat.pop(path) for path in changed})
    return flat | new


def _fold(flat, convolution, norm):
    layer, own = ({path[-1]: path for path in part.paths} for part in (norm, convolution))
    kernel = flat[own["kernel"]]
    scale, bias, mean, var = (flat.pop(layer[name]) for name in ("scale", "bias", "mean", "var"))
    wide = jnp.result_type(kernel, scale, bias, mean, var, jnp.float32)
    factor = jnp.asarray(scale, wide) / jnp.sqrt(jnp.asarray(var, wide) + norm.epsilon)
    shift = jnp.asarray(bias, wide) - jnp.asarray(mean, wide) * factor
    # Both may be stacked, along axes that come first.
    inner = range(factor.ndim - 1, kernel.ndim - 1)
    folded = jnp.asarray(kernel, wide) * jnp.expand_dims(factor, tuple(inner))
    flat[own["kernel"]] = folded.astype(kernel.dtype)
    if "bias" in own:
        old = flat[own["bias"]]
        flat[own["bias"]] = (jnp.asarray(old, wide) * factor + shift).astype(old.dtype)
        shift = shift[..., :0]
    flat[layer["bias"]] = shift.astype(bias.dtype)


def _pairs(model, flat, image_shape):
    # Convolutions and their BatchNorms, of whose variables nothing else is ever made.
    reading = _Reading()
    shapes = {path: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype) for path, x in flat.items()}
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    takes = inspect.signature(model.__call__).parameters
    features = {"return_features": True} if "return_features" in takes else {}
    gates: list[dict] = [{}]
    if "gates" in takes and hasattr(model, "num_blocks"):
        kinds = (jnp.float32, jnp.bool_)
        gates += [{"gates": jax.ShapeDtypeStruct((model.num_blocks,), kind)} for kind in kinds]
    # Stacks of variables that are cut into groups, or packed, could not be followed.
    whole = {"remat": "none", "unroll": True}
    model = model.clone(**{key: value for key, value in whole.items() if hasattr(model, key)})

    def outputs(flat, images, options):
        variables = traverse_util.unflatten_dict(flat)
        return model.apply(variables, images, train=False, **features, **options)

    for options in gates:
        # (On CPUs, some loops over stacked variables are of another form, which says less.)
        with made_for("gpu"), nn.intercept_methods(reading.mark):
            program = jax.make_jaxpr(outputs)(shapes, images, options).jaxpr
        reading.read(program, [(path, ()) for path in sorted(shapes)])
    return reading.pairs()


# What nn.Conv and nn.Dense may be given in place of their own functions.
_FUNCTIONS = (
    *("conv_general_dilated", "conv_general_dilated_cls", "dot_general", "dot_general_cls"),
    "promote_dtype",
)


def _is_linear(module):
    # In its kernel, for certain.
    kind = type(module)
    return kind in (nn.Conv, nn.Dense) and all(
        getattr(module, name, None) in (getattr(kind, name, None), conv_general_dilated)
        for name in _FUNCTIONS
    )


def _is_whole(module):
    # A BatchNorm in evaluation that is not folded yet.
    return (
        type(module) is BatchNorm
        and module.use_running_average
        and module.has_variable("params", "scale")
        and module.has_variable("batch_stats", "mean")
    )


class _Layer(NamedTuple):
    # A convolution or, with its epsilon, a BatchNorm, by the paths of its variables.
    paths: frozenset[tuple[str, ...]]
    epsilon: float | None


class _Value:
    # An array in a program.

    def __init__(self, axes):
        self.axes = axes


class _Step(NamedTuple):
    # An equation in a program.
    kind: str
    params: dict[str, Any]
    operands: list[_Value]
    results: list[_Value]


class _Reading:
    # Of programs: who uses which variable?

    def __init__(self):
        self.marks: dict[str, tuple[nn.Module, int]] = {}  # with the kernel's number of axes
        self.partners: Any = defaultdict(set)  # layer -> what follows or precedes it; None: others
        self.elsewhere: set[tuple[str, ...]] = set()  # variables that are used in other ways, too

    def mark(self, call, args, kwargs, context):
        # An interceptor. It makes the call a `jit` with a name, whose operands are the variables
        # that are used inside, and then the input.
        module = context.module
        known = _is_linear(module) or _is_whole(module)
        if not known or context.method_name != "__call__" or len(args) != 1:
            return call(*args, **kwargs)
        name = f"resvariants.networks.folding {len(self.marks)}"
        kernel = module.get_variable("params", "kernel")
        self.marks[name] = module, 1 if kernel is None else kernel.ndim

        def marked(x):
            return call(x, **kwargs)

        marked.__name__ = name
        return jax.jit(marked)(*args)

    def read(self, program, origins):
        # `origins` of the program's arguments: the path of a variable, with the loops that took a
        # slice of it, one inside of the other, or None.
        arguments = [_Value(var.aval.ndim) for var in program.invars]
        steps, results = self._inlined(program, arguments)
        known = zip(arguments, origins, strict=False)
        origin = {value: found for value, found in known if found is not None}
        makers = {value: step for step in steps for value in step.results}
        readers: Any = defaultdict(list)
        for step in steps:
            for value in step.operands:
                readers[value].append(step)
        for value in results:
            readers[value].append(None)
        layers = {}
        for step in steps:
            if self._is_marked(step):
                layer = self._layer(step, origin)
                self._use(step.operands if layer is None else step.operands[-1:], origin)
                layers[id(step)] = layer
            else:
                self._enter(step, origin)
        self._use(results, origin)
        for step in steps:
            layer = layers.get(id(step))
            if layer is None:
                continue
            convolution, norm = makers.get(step.operands[-1]), step
            if layer.epsilon is None:
                convolution, norm = step, next(iter(readers[step.results[0]]), None)
            found = None
            if _is_pair(convolution, norm, readers, origin):
                one, two = layers.get(id(convolution)), layers.get(id(norm))
                if one and two and one.epsilon is None and two.epsilon is not None:
                    found = two if layer is one else one
            self.partners[layer].add(found)

    def pairs(self):
        # Convolutions and BatchNorms that belong together whenever they are used.
        users = Counter(path for layer in self.partners for path in layer.paths)
        shared = {path for path, number in users.items() if number > 1} | self.elsewhere
        only = {
            layer: next(iter(others))
            for layer, others in self.partners.items()
            if len(others) == 1 and not layer.paths & shared
        }
        return [
            (layer, norm)
            for layer, norm in only.items()
            if layer.epsilon is None and only.get(norm) == layer
        ]

    def _inlined(self, program, arguments):
        # Its steps and results; calls of other programs become their steps.
        values = dict(zip(program.invars, arguments, strict=True))
        values |= {var: _Value(var.aval.ndim) for var in program.constvars}

        def of(var):
            return _Value(var.aval.ndim) if isinstance(var, Literal) else values[var]

        steps = []
        for equation in program.eqns:
            kind, params = equation.primitive.name, equation.params
            operands = [of(var) for var in equation.invars]
            step = _Step(kind, params, operands, [_Value(v.aval.ndim) for v in equation.outvars])
            if kind in _CALLS and not self._is_marked(step):
                inner = params.get("jaxpr", params.get("call_jaxpr"))
                inner_steps, results = self._inlined(getattr(inner, "jaxpr", inner), operands)
                steps += inner_steps
            else:
                results = step.results
                steps.append(step)
            values |= zip(equation.outvars, results, strict=True)
        return steps, [of(var) for var in program.outvars]

    def _is_marked(self, step):
        return step.params.get("name") in self.marks

    def _layer(self, step, origin):
        # None if it works with anything but variables or what loops take of them.
        module, axes = self.marks[step.params["name"]]
        own = step.operands[:-1]
        if not all(value in origin for value in own) or len(_loops(step, origin)) != 1:
            return None
        found = {origin[value][0][-1]: value.axes for value in own}
        if type(module) is BatchNorm:
            epsilon, names = module.epsilon, ["scale", "bias", "mean", "var"]
        else:
            epsilon, names = None, ["kernel", "bias"] if "bias" in found else ["kernel"]
        # (Under `vmap` there are more axes, and who knows where.)
        if found != {name: axes if name == "kernel" else 1 for name in names}:
            return None
        return _Layer(frozenset(origin[value][0] for value in own), epsilon)

    def _use(self, values, origin):
        self.elsewhere |= {origin[value][0] for value in values if value in origin}

    def _enter(self, step, origin):
        # Programs inside of a step see variables, too.
        operands, params = step.operands, step.params
        if step.kind == "cond":  # by the first operand
            self._use(operands[:1], origin)
            for branch in params["branches"]:
                self.read(branch.jaxpr, [origin.get(value) for value in operands[1:]])
        elif step.kind == "scan":  # constants, what is carried on, what is sliced
            kept = params["num_consts"]
            sliced = kept + params["num_carry"]
            self._use(operands[kept:sliced], origin)
            inner: list[Any] = [origin.get(value) for value in operands]
            inner[kept:sliced] = [None] * (sliced - kept)
            for i, found in enumerate(inner[sliced:], sliced):
                inner[i] = found and (found[0], (*found[1], id(step)))
            self.read(params["jaxpr"].jaxpr, inner)
        else:
            self._use(operands, origin)


# What calls one inner program with its own operands.
_CALLS = ("jit", "pjit", "closed_call", "remat2", "checkpoint", "custom_jvp_call")


def _loops(step, origin):
    return {origin[value][1] for value in step.operands[:-1]}


def _is_pair(convolution, norm, readers, origin):
    # `norm` reads what `convolution` gives, as the only one, once in each of its turns.
    if convolution is None or norm is None or len(convolution.results) != 1:
        return False
    (y,) = convolution.results
    only = len(readers[y]) == 1 and readers[y][0] is norm and norm.operands[-1] is y
    known = all(value in origin for step in (convolution, norm) for value in step.operands[:-1])
    return only and known and _loops(convolution, origin) == _loops(norm, origin)
