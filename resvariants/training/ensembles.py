"""How are several trained networks evaluated together, or one at several scales?

What is averaged are probabilities: over networks (He et al. 2015, 4.1), over scales, and over an
image and its mirror image (Simonyan & Zisserman 2014, 3.2). Over the positions of one image it is
logits, which is what networks that end in global average pooling do with an image of any size.
"""

import inspect
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from resvariants.data import sets
from resvariants.data.splits import Split
from resvariants.errors import InputError, choose
from resvariants.networks.summary import feature_info
from resvariants.training.evaluation import evaluate, load, means, with_folded_norms
from resvariants.training.parallel import compiler_options
from resvariants.training.passes import apply_to_batches, corrupt_images
from resvariants.training.setup import Setup, takes_images
from resvariants.training.statistics import with_exact_statistics
from resvariants.training.step import TrainState, evaluation_sums, predict


class Member(NamedTuple):
    """A trained network; its `state` lacks the optimiser's."""

    path: str | Path
    config: ConfigDict
    setup: Setup
    state: TrainState


class Answers(NamedTuple):
    """What a network says of images: logits (n, classes), labels (n,), and which count (n,)."""

    logits: Any
    label: Any
    mask: Any


def evaluate_together(
    paths: Sequence[str | Path],
    split: str,
    data_dir: str | None = None,
    scales: Sequence[int] = (),
    *,
    exact_statistics: bool = False,
    fold_batch_norm: bool = False,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Evaluates the newest checkpoints of workdirs, and the ensemble that they are, in one process.

    Each network sees the images as in its own run; with `scales`, whole images and their mirror
    images, the shorter side of each length (He et al. 2015, 3.4). The longer side is cut there at
    both ends, by less than a twelfth of the shorter one, or to three times as much.

    Args:
      split, data_dir, exact_statistics, fold_batch_norm: as of `evaluation.evaluate`; statistics
        are those of the size at which the run itself evaluates.

    Returns:
      What `evaluation.evaluate` gives of each network, and of the ensemble (without `step`). One
      network is its own ensemble.

    Raises:
      InputError: what `evaluation.evaluate` raises; networks of other data, classes or images than
        the first; with `scales`, data that are not streamed, a network that takes images of one
        size only, or a scale that is too small for it.
    """
    if len(paths) == 1 and not scales:
        options = {"exact_statistics": exact_statistics, "fold_batch_norm": fold_batch_norm}
        values = evaluate(paths[0], split, data_dir, **options)
        return [values], values
    members = [_load(path, split, data_dir) for path in paths]
    for member in members:
        _check_same(members[0], member, split)
        if scales:
            _check_scales(member, min(scales))
    groups: Mapping[Any, np.ndarray] = {}
    if scales:
        from resvariants.data.scales import by_aspect  # with Pillow and Grain

        groups = by_aspect(members[0].setup.splits[split])
    corrupt = corrupt_images(members[0].config, print)
    found, total = [], None
    for member in members:
        if exact_statistics:
            exact = with_exact_statistics(member.config, member.setup, member.state, corrupt)
            member = member._replace(state=exact)
        if fold_batch_norm:
            member = member._replace(state=with_folded_norms(member.setup, member.state))
        start = time.perf_counter()
        answers = _answers(member, split, scales, groups, corrupt)
        values = {"step": int(member.state.step), **_figures(answers, split)}
        found.append({**values, "seconds": time.perf_counter() - start})
        total = _added(total, answers)
    return found, {**_figures(total, split), "seconds": sum(x["seconds"] for x in found)}


def _load(path, split, data_dir):
    config, setup, state = load(path, data_dir)
    choose("split", split, setup.splits)
    return Member(path, config, setup, state.replace(opt_state=()))


def _check_same(first, other, split):
    def described(member):
        dataset, images = member.config.dataset, member.setup.splits[split]
        classes = sets.find(dataset.name, dataset.data_dir).num_classes
        facts = {"data set": dataset.name, "number of classes": classes}
        if not isinstance(images, Split):
            facts["dataset.data_dir"] = str(Path(dataset.data_dir or "").expanduser().resolve())
        return facts | {f"number of {split} images": images.size}

    theirs = described(other)
    differing = [
        f"{what} {value} and {theirs[what]}"
        for what, value in described(first).items()
        if value != theirs.get(what)
    ]
    one, two = (member.setup.splits[split] for member in (first, other))
    if not differing and not _equal(one, two):
        differing = [f"other {split} images"]
    if differing:
        raise InputError(
            f"{first.path} and {other.path} make no ensemble: {'; '.join(differing)}. All must"
            " answer for the same images and classes (--data_dir says for all where they lie)"
        )


def _equal(one, two):
    if isinstance(one, Split):
        return all(map(np.array_equal, one, two))
    return np.array_equal(one.indices, two.indices)


def _check_scales(member, smallest):
    data_set, shape = member.config.dataset.name, member.setup.image_shape
    if not sets.find(data_set).streamed:
        streamed = ", ".join(name for name, entry in sets.DATA_SETS.items() if entry.streamed)
        raise InputError(
            f"scales are for streamed data sets ({streamed}), whose images have many sizes;"
            f" {data_set} has images of {shape[0]}x{shape[1]}"
        )
    variables = {"params": member.state.params, "batch_stats": member.state.batch_stats}

    def fits(side):
        return takes_images(_of_any_size(member), variables, (side, side, shape[-1]))

    if not fits(2 * shape[0]):
        raise InputError(
            f"{member.path}: {member.config.model.name} takes no images but {shape[0]}x{shape[1]};"
            " scales are for networks that end in global average pooling (ResNet, ResNeXt,"
            " DenseNet, GoogLeNet) and for VGG"
        )
    sides = range(_stride(member), 2 * shape[0])
    least = sides[bisect_left(sides, True, key=fits)]
    if smallest < least:
        raise InputError(
            f"scale {smallest} is too small for {member.path}: {member.config.model.name} can have"
            f" {least} at least"
        )


def _stride(member):
    # Rows of an image for one of the last maps: less would be a part of one.
    model, shape = member.setup.model, member.setup.image_shape
    if "return_features" not in inspect.signature(model.__call__).parameters:
        return 1
    return max(maps["stride"] for maps in feature_info(model, shape).values())


def _of_any_size(member) -> nn.Module:
    model, side = member.setup.model, member.setup.image_shape[0]
    return model.fully_convolutional(side) if hasattr(model, "fully_convolutional") else model


def _answers(member, split, scales, groups, corrupt):
    # Those of all images; with scales, group by group.
    setup, batch_size = member.setup, member.config.eval_batch_size
    images = setup.splits[split]
    logits_of: Callable = jax.jit(
        partial(predict, model=_of_any_size(member) if scales else setup.model),
        out_shardings=setup.parallel.replicated,
        compiler_options=compiler_options(),
    )

    def step(batch):
        logits = logits_of(member.state.params, member.state.batch_stats, batch["image"])
        return Answers(logits, batch["label"], batch["mask"])

    def answers(part, size, **options):
        found = jax.device_get(apply_to_batches(step, setup, part, size, corrupt, **options))
        return Answers(*(np.concatenate(parts)[: part.size] for parts in zip(*found, strict=True)))

    if not scales:
        return answers(images, batch_size)
    from resvariants.data.scales import whole_and_mirrored

    found = []
    for aspect, positions in groups.items():
        total, crop = None, partial(whole_and_mirrored, aspect=aspect)
        for scale in scales:
            # As many pixels as a batch of the run has.
            size = batch_size * prod(setup.image_shape[:2]) // (2 * prod(aspect.at(scale)))
            part = answers(images.take(positions), max(1, size), image_size=scale, crop=crop)
            total = _added(total, part)
        found.append(total)
    return Answers(*map(np.concatenate, zip(*found, strict=True)))


def _added(total, answers):
    # Probabilities, as logits, which say the same of a sum as of a mean.
    answers = answers._replace(logits=np.asarray(jax.nn.log_softmax(answers.logits)))
    if total is None:
        return answers
    logits = np.asarray(jnp.logaddexp(total.logits, answers.logits))
    return Answers(logits, total.label, total.mask & answers.mask)


def _figures(answers, split):
    return means(jax.device_get(evaluation_sums(*map(jnp.asarray, answers))), split)
