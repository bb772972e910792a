"""Plain NumPy reference of the post-activation residual networks (He et al. 2015, sections 3-4).

It is written from the papers alone and imports nothing of the library, so that an error in one is
not repeated in the other. Everything runs in float64 on the library's checkpoint layout: images are
(batch, height, width, channels), kernels (kh, kw, c_in / groups, c_out).
"""

import numpy as np

EPSILON = 1e-5
MOMENTUM = 0.9  # weight of the old running statistic


def relu(x):
    return np.maximum(x, 0.0)


def _pad(x, padding, value=0.0):
    widths = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    return np.pad(np.asarray(x, np.float64), widths, constant_values=value)


def _taps(padded, window, stride, dilation=1):
    """Pairs of kernel tap (i, j) and the index of the padded inputs that it meets."""
    height, width = (
        (size - dilation * (taps - 1) - 1) // stride + 1
        for size, taps in zip(padded.shape[1:3], window, strict=True)
    )
    for i, j in np.ndindex(*window):
        top, left = i * dilation, j * dilation
        rows = slice(top, top + stride * (height - 1) + 1, stride)
        columns = slice(left, left + stride * (width - 1) + 1, stride)
        yield (i, j), (slice(None), rows, columns)


def _split(groups, *arrays):
    """Channel groups: a grouped convolution is that many separate ones, side by side."""
    return zip(*(np.split(array, groups, axis=-1) for array in arrays), strict=True)


def conv2d(x, kernel, stride=1, padding=0, groups=1, dilation=1):
    """Cross-correlation, as every deep-learning library means by convolution."""
    x, kernel = _pad(x, padding), np.asarray(kernel, np.float64)
    outputs = [
        sum(
            np.tensordot(part[where], weights[tap], axes=1)
            for tap, where in _taps(part, kernel.shape[:2], stride, dilation)
        )
        for part, weights in _split(groups, x, kernel)
    ]
    return np.concatenate(outputs, axis=-1)


def conv2d_gradients(x, kernel, grad_out, stride, padding, groups=1, dilation=1):
    """Gradients (grad_x, grad_kernel) of sum(grad_out * conv2d(x, kernel, ...))."""
    padded, kernel = _pad(x, padding), np.asarray(kernel, np.float64)
    grad_out = np.asarray(grad_out, np.float64)
    grad_parts, grad_kernels = [], []
    for part, weights, grad in _split(groups, padded, kernel, grad_out):
        grad_part, grad_weights = np.zeros_like(part), np.zeros_like(weights)
        for tap, where in _taps(part, kernel.shape[:2], stride, dilation):
            grad_part[where] += np.tensordot(grad, weights[tap].T, axes=1)
            grad_weights[tap] = np.tensordot(part[where], grad, axes=([0, 1, 2], [0, 1, 2]))
        grad_parts.append(grad_part)
        grad_kernels.append(grad_weights)
    rows, columns = (slice(padding, padding + size) for size in x.shape[1:3])
    grad_x = np.concatenate(grad_parts, axis=-1)[:, rows, columns]
    return grad_x, np.concatenate(grad_kernels, axis=-1)


def max_pool(x, window=3, stride=2, padding=1):
    padded = _pad(x, padding, value=-np.inf)
    return np.max([padded[where] for _, where in _taps(padded, (window, window), stride)], axis=0)


def batch_norm(params, stats, x, train):
    """Return the normalised x and the running statistics after it (biased variance throughout)."""
    mean, var = stats["mean"], stats["var"]
    if train:
        mean = x.mean(axis=(0, 1, 2))
        var = ((x - mean) ** 2).mean(axis=(0, 1, 2))
        batch = {"mean": mean, "var": var}
        stats = {name: MOMENTUM * stats[name] + (1 - MOMENTUM) * batch[name] for name in batch}
    return params["scale"] * (x - mean) / np.sqrt(var + EPSILON) + params["bias"], stats


def parameter_free_shortcut(x, channels, stride, average=False):
    """Option A: subsample or average s x s positions, then append zero channels at the end."""
    if average:
        assert x.shape[1] % stride == x.shape[2] % stride == 0, (x.shape, stride)
        x = np.mean([x[:, i::stride, j::stride] for i, j in np.ndindex(stride, stride)], axis=0)
    else:
        x = x[:, ::stride, ::stride]
    return np.pad(x, ((0, 0), (0, 0), (0, 0), (0, channels - x.shape[-1])))


def residual_function(params, stats, x, stride, bottleneck, strided_conv, train):
    """F(x), up to and including the last normalisation, and the statistics of its norms."""
    assert strided_conv in (1, 2), f"strided_conv is 1 (first 1x1) or 2 (the 3x3): {strided_conv}"
    kernel_sizes, strided = ((1, 3, 1), strided_conv) if bottleneck else ((3, 3), 1)
    new_stats = {}
    for k, size in enumerate(kernel_sizes, start=1):
        kernel, norm = params[f"conv{k}"]["kernel"], f"norm{k}"
        # The padding follows from the paper's kernel size, so a wrong kernel must not pass.
        assert kernel.shape[:2] == (size, size), (k, kernel.shape)
        x = conv2d(x, kernel, stride if k == strided else 1, padding=size // 2)
        x, new_stats[norm] = batch_norm(params[norm], stats[norm], x, train)
        if k < len(kernel_sizes):
            x = relu(x)
    return x, new_stats


def block(params, stats, x, *, stride, gate, shortcut, plain, bottleneck, strided_conv, train):
    """Return one gated block's output and its new statistics; gate 1 is the paper's block."""
    channels = params["conv3" if bottleneck else "conv2"]["kernel"].shape[-1]
    changes_shape = stride != 1 or x.shape[-1] != channels
    projects = not plain and (shortcut == "C" or (shortcut == "B" and changes_shape))
    assert projects == ("shortcut_conv" in params), "a projection is missing or goes unused"
    new_stats = dict(stats)
    if projects:
        skip = conv2d(x, params["shortcut_conv"]["kernel"], stride)
        skip, new_stats["shortcut_norm"] = batch_norm(
            params["shortcut_norm"], stats["shortcut_norm"], skip, train
        )
    else:
        average = shortcut == "A_average" and not plain
        skip = parameter_free_shortcut(x, channels, stride, average)
    # A boolean gate skips the whole branch; a float 0 only silences it, its statistics move on.
    if np.asarray(gate).dtype == bool and not gate:
        return (skip if plain else relu(skip)), new_stats
    gate = float(gate)
    branch, branch_stats = residual_function(
        params, stats, x, stride, bottleneck, strided_conv, train
    )
    new_stats.update(branch_stats)
    if plain:
        return gate * relu(branch) + (1 - gate) * skip, new_stats
    return relu(skip + gate * branch), new_stats


def _map(function, *trees):
    if hasattr(trees[0], "items"):
        return {name: _map(function, *(tree[name] for tree in trees)) for name in trees[0]}
    return function(*trees)


def _blocks(stage, size):
    """Split a stage into one tree a block: `first`, then the slices of the stacked `rest`."""
    assert ("rest" in stage) == (size > 1), f"`rest` exists exactly where blocks > 1, here {size}"
    rest = stage.get("rest", {})
    # A deeper tree than asked for would otherwise go unread in silence.
    _map(lambda leaf: np.testing.assert_equal(len(leaf), size - 1), rest)
    return [stage["first"], *(_map(lambda leaf, k=k: leaf[k], rest) for k in range(size - 1))]


def forward(
    variables,
    images,
    *,
    stage_sizes,
    bottleneck=False,
    shortcut="A",
    plain=False,
    imagenet_stem=False,
    strided_conv=1,
    gates=None,
    train=False,
):
    """Return (logits, new_batch_stats, features).

    `shortcut` is "A", "A_average", "B" or "C"; a plain network has none, its gates use "A".
    `strided_conv` is the bottleneck convolution that carries the stride: 1 (the first 1x1) or 2
    (the 3x3). `gates` holds one bool or float a block, in the order of the blocks, or is None.
    `features` maps "stem" (after the pool, if any), "stage1", ... to (batch, height, width,
    channels) and "pooled" to (batch, channels).
    """
    assert shortcut in ("A", "A_average", "B", "C"), f"unknown shortcut {shortcut!r}"
    variables = _map(lambda leaf: np.asarray(leaf, np.float64), variables)
    params, stats = variables["params"], variables["batch_stats"]
    gates = [True] * sum(stage_sizes) if gates is None else list(gates)
    assert len(gates) == sum(stage_sizes), (len(gates), stage_sizes)
    options = dict(shortcut=shortcut, plain=plain, bottleneck=bottleneck)
    options.update(strided_conv=strided_conv, train=train)

    stem, size, stride = params["stem"], *((7, 2) if imagenet_stem else (3, 1))
    assert stem["conv"]["kernel"].shape[:2] == (size, size), stem["conv"]["kernel"].shape
    x = conv2d(images, stem["conv"]["kernel"], stride, padding=size // 2)
    x, stem_stats = batch_norm(stem["norm"], stats["stem"]["norm"], x, train)
    x = max_pool(relu(x)) if imagenet_stem else relu(x)
    features, new_stats = {"stem": x}, {"stem": {"norm": stem_stats}}

    remaining = iter(gates)
    for number, blocks in enumerate(stage_sizes, start=1):
        stage, updates = f"stage{number}", []
        trees = zip(_blocks(params[stage], blocks), _blocks(stats[stage], blocks), strict=True)
        for index, (block_params, block_stats) in enumerate(trees):
            stride = 2 if number > 1 and index == 0 else 1
            gate = next(remaining)
            x, update = block(block_params, block_stats, x, stride=stride, gate=gate, **options)
            updates.append(update)
        features[stage], new_stats[stage] = x, {"first": updates[0]}
        if blocks > 1:
            new_stats[stage]["rest"] = _map(lambda *leaves: np.stack(leaves), *updates[1:])

    features["pooled"] = x.mean(axis=(1, 2))
    head = params["head"]
    return features["pooled"] @ head["kernel"] + head["bias"], new_stats, features
