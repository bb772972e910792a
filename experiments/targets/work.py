"""How many floating-point operations do convolutions and matrix products take?

A multiplication and an addition are two. What meets padding, or a hole of a dilated input, is not
counted: it need not be computed. Everything else (activations, normalisation, the optimiser) is
left out, as in published figures of networks.
"""

import json
import re
from math import prod

from targets.hlo import Computation, Instruction

# cuDNN's calls, with who plays input, kernel and output: an operand's number, or the result.
_CUDNN = {
    "__cudnn$convBackwardInput": ("result", 1, 0),
    "__cudnn$convBackwardFilter": (0, "result", 1),
}


def operations(computation: Computation, instruction: Instruction) -> int:
    """Of one instruction itself, not of what it calls."""
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        dims = contracted[1].split(",") if contracted and contracted[1] else []
        return _product(computation, instruction, [int(dim) for dim in dims])
    if instruction.opcode == "convolution":
        return _convolution(computation, instruction, (0, 1, "result"))
    if instruction.opcode == "custom-call":
        if instruction.target.startswith("__cudnn$conv"):
            return _convolution(
                computation, instruction, _CUDNN.get(instruction.target, (0, 1, "result"))
            )
        if "gemm" in instruction.target or "matmul" in instruction.target:
            found = re.search(r'"lhs_contracting_dimensions":(\[[^\]]*\])', instruction.attributes)
            if found:
                return _product(computation, instruction, map(int, json.loads(found[1])))
    return 0


def is_convolution(instruction: Instruction) -> bool:
    """Whether it is one, as an operation or as a library's call."""
    return instruction.opcode == "convolution" or instruction.target.startswith("__cudnn$conv")


def is_product(instruction: Instruction) -> bool:
    """Whether it is a matrix product, as an operation or as a library's call."""
    called = any(name in instruction.target for name in ("gemm", "matmul"))
    return instruction.opcode == "dot" or called


def _product(computation, instruction, contracted):
    left = computation.named[instruction.operands[0]].arrays[0]
    return 2 * instruction.arrays[0].elements * prod(left.dims[dim] for dim in contracted)


def _convolution(computation, instruction, roles):
    shapes = [
        instruction.arrays[0]
        if role == "result"
        else computation.named[instruction.operands[role]].arrays[0]
        for role in roles
    ]
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    of_input, of_kernel, of_output = (
        dict(zip(letters, shape.dims, strict=True))
        for letters, shape in zip(labels.groups(), shapes, strict=True)
    )
    window = window_of(instruction)
    pairs = 1
    for number, dim in enumerate(filter(str.isdigit, labels[3])):
        sizes = of_input[dim], of_kernel[dim], of_output[dim]
        pairs *= _pairs(*sizes, *(window[key][number] for key in window))
    # The kernel's input features are those of one group.
    return 2 * of_output["b"] * of_output["f"] * of_kernel["i"] * pairs


def window_of(instruction: Instruction) -> dict[str, list[int]]:
    """A convolution's stride, padding before, and dilations of input and kernel, by dimension."""
    text = instruction.attribute(r"window=\{([^}]*)\}") or ""
    parts = dict(part.split("=") for part in text.split())
    count = len(parts["size"].split("x")) if "size" in parts else 0

    def numbers(key, default):
        return [int(n.split("_")[0]) for n in parts[key].split("x")] if key in parts else default

    ones = [1] * count
    return {
        "stride": numbers("stride", ones),
        "before": numbers("pad", [0] * count),
        "input_dilation": numbers("lhs_dilate", ones),
        "kernel_dilation": numbers("rhs_dilate", ones),
    }


def _pairs(inputs, taps, outputs, stride, before, input_dilation, kernel_dilation):
    # How many pairs of an output's position and a tap of the kernel meet an element of the input.
    last = (inputs - 1) * input_dilation
    count = 0
    for tap in range(taps):
        first = tap * kernel_dilation - before
        positions = range(first, first + outputs * stride, stride)
        count += sum(0 <= p <= last and p % input_dilation == 0 for p in positions)
    return count
