"""Which networks exist by name, and what is each?"""

import contextlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import Any

from flax import linen as nn

from resvariants.errors import InputError, nearest
from resvariants.networks.alexnet import cifar_alexnet, single_tower_alexnet, two_tower_alexnet
from resvariants.networks.densenet import cifar_densenet, imagenet_densenet
from resvariants.networks.googlenet import GoogLeNet
from resvariants.networks.highway import HighwayNet, fully_connected_net
from resvariants.networks.parts import WEIGHTS
from resvariants.networks.resnet import (
    BASIC_STAGES,
    BOTTLENECK_STAGES,
    ImageNetStem,
    blocks_per_stage,
    cifar_resnet,
    imagenet_resnet,
)
from resvariants.networks.resnext import resnext
from resvariants.networks.summary import abstract_variables, count_parameters
from resvariants.networks.vgg import VGG
from resvariants.registers import Register, unknown

MNIST = (28, 28, 1)

CIFAR = (32, 32, 3)

IMAGENET = (224, 224, 3)

DENSENET = "Huang et al. 2017 (DenseNet)"

HIGHWAY = "Srivastava et al. 2015"


def _resnext_entry(depth, cardinality, base_width):
    paths = {"cardinality": cardinality, "base_width": base_width}
    if depth in BOTTLENECK_STAGES:
        build = partial(resnext, BOTTLENECK_STAGES[depth], stem=ImageNetStem, **paths)
        return Entry(build, IMAGENET, 1000, "Xie et al. 2016", "ResNeXt")
    n = blocks_per_stage(depth, 9)
    return Entry(partial(resnext, (n, n, n), **paths), CIFAR, 10, "Xie et al. 2016", "ResNeXt")


def _densenet_entry(depth, growth_rate, bc=False):
    build = partial(cifar_densenet, depth, growth_rate, bc=bc)
    build()  # raises if no whole number of layers gives the depth
    return Entry(build, CIFAR, 10, DENSENET, "DenseNet")


def _fully_connected_entry(depth, plain):
    build = partial(fully_connected_net, depth, plain=plain)
    build()  # raises if the depth is none
    return Entry(build, MNIST, 10, HIGHWAY, "highway")


@dataclass(frozen=True)
class Entry:
    """One named network.

    Attributes:
      build: makes it from `num_classes` and options.
      image_shape: (height, width, channels) of the images that it was made for.
      num_classes: of the data set that it was made for.
      paper: where it is described.
      family: what it is listed under.
    """

    build: Callable[..., nn.Module]
    image_shape: tuple[int, int, int]
    num_classes: int
    paper: str
    family: str

    @cached_property
    def parameters(self) -> int:
        """How many numbers are trained, auxiliary classifiers included."""
        model = self.build(num_classes=self.num_classes)
        return count_parameters(abstract_variables(model, self.image_shape)["params"])


def _zoo() -> dict[str, Entry]:
    he2015, he2016 = "He et al. 2015", "He et al. 2016"
    plain_nets, postactivated = "plain", "ResNet"
    preactivated, variants = "pre-activation ResNet", "placements and shortcuts"
    zoo = {}

    def cifar(family, name, paper, depth, **options):
        zoo[name] = Entry(partial(cifar_resnet, depth, **options), CIFAR, 10, paper, family)

    def imagenet(family, name, paper, *stage_sizes, **options):
        build = partial(imagenet_resnet, stage_sizes, **options)
        zoo[name] = Entry(build, IMAGENET, 1000, paper, family)

    for depth in (20, 32, 44, 56, 110, 1202):
        cifar(postactivated, f"resnet{depth}", he2015, depth)
        cifar(postactivated, f"resnet{depth}_b", he2015, depth, shortcut="B")
    cifar(postactivated, "resnet110_c", he2016, 110, shortcut="C")
    average = {"shortcut": "A_average"}  # as in the stochastic-depth code
    for name, depth in (
        ("resnet110_average", 110),
        ("cifar_resnet152", 152),
        ("resnet1202_average", 1202),
    ):
        cifar(postactivated, name, "Huang et al. 2016", depth, **average)
    for depth in (164, 1001):
        cifar(postactivated, f"resnet{depth}", he2016, depth, bottleneck=True)
    cifar(postactivated, "resnet110_one_layer_skip", he2016, 110, one_layer_skip=True)
    for depth, sizes in BASIC_STAGES.items():
        imagenet(postactivated, f"resnet{depth}", he2015, *sizes)
        imagenet(postactivated, f"resnet{depth}_a", he2015, *sizes, shortcut="A")
        imagenet(postactivated, f"resnet{depth}_c", he2015, *sizes, shortcut="C")
    public = "none; a convention of public code"
    strided: dict[str, Any] = {"bottleneck": True, "strided_conv": 2}
    for depth, sizes in BOTTLENECK_STAGES.items():
        imagenet(postactivated, f"resnet{depth}", he2015, *sizes, bottleneck=True)
        imagenet(postactivated, f"resnet{depth}_v1_5", public, *sizes, **strided)

    for depth in (20, 32, 44, 56, 110):
        cifar(plain_nets, f"plain{depth}", he2015, depth, plain=True)
    for depth, sizes in BASIC_STAGES.items():
        imagenet(plain_nets, f"plain{depth}", he2015, *sizes, plain=True)

    full = {"placement": "full_preactivation"}
    cifar(preactivated, "preact_resnet110", he2016, 110, **full)
    cifar(preactivated, "preact_resnet110_one_layer_skip", he2016, 110, one_layer_skip=True, **full)
    for depth in (164, 1001):
        cifar(preactivated, f"preact_resnet{depth}", he2016, depth, bottleneck=True, **full)
    for depth, sizes in BASIC_STAGES.items():
        imagenet(preactivated, f"preact_resnet{depth}", he2016, *sizes, **full)
    # Pre-activated ones follow fb.resnet.torch, which the 2016 paper's release builds on.
    strided |= full
    for depth, sizes in {**BOTTLENECK_STAGES, 200: (3, 24, 36, 3)}.items():
        imagenet(preactivated, f"preact_resnet{depth}", he2016, *sizes, **strided)
    # timm's: the stem's convolution and pooling alone, and then whole blocks.
    strided |= {"stem": partial(ImageNetStem, activation=False), "shares_stem_activation": False}
    for depth, sizes in BOTTLENECK_STAGES.items():
        imagenet(preactivated, f"resnetv2_{depth}", public, *sizes, **strided)

    for placement in ("norm_after_addition", "relu_before_addition", "relu_only_preactivation"):
        options = {"placement": placement}
        cifar(variants, f"resnet110_{placement}", he2016, 110, **options)
        cifar(variants, f"resnet164_{placement}", he2016, 164, bottleneck=True, **options)
    for weights in WEIGHTS:
        cifar(variants, f"resnet110_{weights}", he2016, 110, weights=weights)

    for depth, cardinality, base_width in (
        *((29, c, d) for c, d in ((8, 64), (16, 64), (1, 64), (32, 4))),
        *((50, c, d) for c, d in ((32, 4), (2, 40), (4, 24), (8, 14))),
        *((101, c, d) for c, d in ((32, 4), (64, 4), (2, 64), (1, 100))),
    ):
        name = f"resnext{depth}_{cardinality}x{base_width}d"
        zoo[name] = _resnext_entry(depth, cardinality, base_width)
    for depth, growth_rate in ((40, 12), (100, 12), (100, 24)):
        zoo[f"densenet{depth}_k{growth_rate}"] = _densenet_entry(depth, growth_rate)
    for depth, growth_rate in ((100, 12), (250, 24), (190, 40)):
        zoo[f"densenet_bc{depth}_k{growth_rate}"] = _densenet_entry(depth, growth_rate, bc=True)
    for size, sizes, growth_rate in (
        ("121", (6, 12, 24, 16), 32),
        ("169", (6, 12, 32, 32), 32),
        ("201", (6, 12, 48, 32), 32),
        ("264", (6, 12, 64, 48), 32),
        ("264_k48", (6, 12, 64, 48), 48),
        ("161", (6, 12, 36, 24), 48),
    ):
        build = partial(imagenet_densenet, sizes, growth_rate)
        zoo[f"densenet{size}"] = Entry(build, IMAGENET, 1000, DENSENET, "DenseNet")

    highway = partial(HighwayNet, (4, 5, 5), (32, 80, 128))
    highway = partial(highway, pool_windows=(2, 2, 0), dropout_rates=(0.2,) * 4, top_features=100)
    zoo["highway19"] = Entry(highway, CIFAR, 10, HIGHWAY, "highway")
    for width in (16, 32):  # stages and pooling as in the public code
        highway = partial(
            HighwayNet,
            (2, 3, 3),
            (width, width, width),
            transform_bias=-1.0,
            first_kernel=5,
            first_padding=0,
            pool_windows=(3, 3, 2),
            dropout_rates=(0.2, 0.3, 0.4, 0.5),
        )
        zoo[f"highway10_width{width}"] = Entry(highway, MNIST, 10, HIGHWAY, "highway")
    for depth in (10, 20, 50, 100):
        for kind in ("highway", "plain"):
            zoo[f"{kind}_fc{depth}"] = _fully_connected_entry(depth, kind == "plain")

    widths = (64, 128, 256, 512, 512)
    for depth, convolutions in ((16, (2, 2, 3, 3, 3)), (19, (2, 2, 4, 4, 4))):
        vgg = partial(VGG, convolutions, widths)
        paper = "Simonyan & Zisserman 2014"
        zoo[f"vgg{depth}"] = Entry(vgg, IMAGENET, 1000, paper, "VGG")
        vgg_bn = partial(vgg, batch_normed=True)
        zoo[f"vgg{depth}_bn"] = Entry(vgg_bn, IMAGENET, 1000, paper, "VGG")
    vgg = partial(VGG, (2, 2, 4, 4, 4), widths, hidden=(), batch_normed=True)
    zoo["cifar_vgg19_bn"] = Entry(vgg, CIFAR, 10, public, "VGG")
    # Accounts of the paper say 15 layers of width 128; how they are dealt out to stages is ours.
    vgg = partial(VGG, (2, 3, 3, 3, 3), (128,) * 5, hidden=(), batch_normed=True)
    zoo["vgg15_width128"] = Entry(vgg, CIFAR, 10, "Veit et al. 2016", "VGG")

    for name, alexnet, image_shape, num_classes, paper in (
        ("alexnet", two_tower_alexnet, (227, 227, 3), 1000, "Krizhevsky et al. 2012"),
        ("alexnet_single_tower", single_tower_alexnet, IMAGENET, 1000, "Krizhevsky 2014"),
        ("cifar_alexnet", cifar_alexnet, CIFAR, 10, public),
    ):
        zoo[name] = Entry(alexnet, image_shape, num_classes, paper, "AlexNet")
    normed = partial(GoogLeNet, batch_normed=True)
    theirs = partial(normed, wide_kernel=3, last_pool_window=2, epsilon=1e-3, dropout_rate=0.2)
    for name, googlenet, paper in (
        ("googlenet", GoogLeNet, "Szegedy et al. 2014"),
        ("googlenet_bn", normed, "Szegedy et al. 2014"),
        ("googlenet_torchvision", theirs, public),
    ):
        zoo[name] = Entry(googlenet, IMAGENET, 1000, paper, "GoogLeNet")
    return zoo


ZOO: Register[Entry] = Register("model")
for _name, _entry in _zoo().items():
    ZOO.add(_name, _entry)


def register_model(
    name: str,
    *,
    image_shape: tuple[int, int, int] = CIFAR,
    num_classes: int = 10,
    paper: str = "",
    family: str = "your own",
) -> Callable[[Callable], Callable]:
    """Decorator: the network `name`, built by a function or a Linen class.

    It is called with `num_classes` and with what the config says of it: `dtype`, `remat` and so on
    where they are not the defaults, and keyword-only arguments or attributes that are given in the
    config's `model.options`. The module is called as `model(images, train=...)` and gives logits;
    one that takes `gates`, too, has its `num_blocks`. Such as::

        @register_model("my_net")
        def my_net(num_classes, *, width=16): ...

    Args:
      image_shape, num_classes: of the data set that it was made for.

    Raises:
      InputError: the name is taken, or one of a family's (see `find`).
    """

    ZOO.check(name)
    if _of_another_size(name) is not None:
        raise InputError(f"there is a model {name!r} already; choose another name")

    def register(build):
        ZOO.add(name, Entry(build, image_shape, num_classes, paper, family))
        return build

    return register


def list_models() -> dict[str, dict[str, Entry]]:
    """The papers' networks: family -> name -> entry, with `paper`, `parameters` and more.

    `create_model` also builds many of other sizes (see `find`). `python -m resvariants` prints it.
    """
    return {
        family: {name: entry for name, entry in ZOO.items() if entry.family == family}
        for family in dict.fromkeys(entry.family for entry in ZOO.values())
    }


def find(name: str) -> Entry:
    """The entry called `name`, or a CIFAR net of a depth outside the papers.

    `resnet8`, `plain14` (6n+2 layers of basic blocks), `resnet29_bottleneck` (9n+2), the same after
    `preact_` (pre-activated) and, where the short name is an ImageNet net's, `cifar_resnet50`;
    `resnext29_4x32d` (9n+2 layers for CIFAR; 50, 101 or 152 for ImageNet), `densenet22_k12` (3n+4),
    `densenet_bc22_k12` (6n+4); `highway_fc30`, `plain_fc30` (fully connected, any depth).

    Raises:
      InputError: no such name, or no such depth.
    """
    if name in ZOO:
        return ZOO[name]
    try:
        entry = _of_another_size(name)
    except ValueError as error:  # InputError, or a number too long for Python
        raise InputError(
            f"unknown model {name!r}: {error}; nearest names: {nearest(name, ZOO)}"
        ) from None
    if entry is None:
        raise unknown("model", name, ZOO, f" (all: python -m resvariants){_relatives(name)}")
    return entry


def _relatives(name):
    # Names that begin like this one, and their family.
    letters = re.compile(r"[a-z_]*")
    near = [other for other in ZOO if name and other.startswith(name)]
    near = near or [other for other in ZOO if letters.match(other)[0] == letters.match(name)[0]]
    if not near:
        return ""
    family = ZOO[near[0]].family
    return f"; of the family {family}, which --family lists: {', '.join(near[:5])}"


def _of_another_size(name):
    # The entry for a name of a known family, or None.
    if match := re.fullmatch(r"resnext(\d+)_(\d+)x(\d+)d", name):
        return _resnext_entry(*map(int, match.groups()))
    if match := re.fullmatch(r"densenet(_bc)?(\d+)_k(\d+)", name):
        bc, depth, growth_rate = match.groups()
        return _densenet_entry(int(depth), int(growth_rate), bc=bc is not None)
    if match := re.fullmatch(r"(highway|plain)_fc(\d+)", name):
        return _fully_connected_entry(int(match[2]), plain=match[1] == "plain")
    if match := re.fullmatch(r"(?:cifar_)?(preact_)?(resnet|plain)(\d+)(_bottleneck)?", name):
        preactivated, kind, depth, bottleneck = match.groups()
        build = partial(
            cifar_resnet,
            int(depth),
            plain=kind == "plain",
            bottleneck=bottleneck is not None,
            placement="full_preactivation" if preactivated else "original",
        )
        build()  # raises if no whole number of blocks gives the depth
        return Entry(build, CIFAR, 10, "He et al. 2015, another depth", "other sizes")
    return None


def create_model(name: str, num_classes: int | None = None, **options) -> nn.Module:
    """The network called `name`; `model.init(key, images, train=False)` gives its variables.

    Args:
      name: one of `list_models()`, or a net of another size (see `find`).
      num_classes: length of the logits; None is the paper's own data set's, 0 gives features.
      options: attributes of the network (see `ResNet`) and of its builder, such as `remat="block"`,
        `dtype=jnp.bfloat16`, `survival_probability=0.5`, `shortcut="B"`.

    Raises:
      InputError: unknown name, with the nearest ones, or impossible depth, with valid ones nearby,
        or an option that the network does not have.
    """
    entry = find(name)
    try:
        return entry.build(
            num_classes=entry.num_classes if num_classes is None else num_classes, **options
        )
    except TypeError as error:
        if "unexpected keyword argument" not in str(error) and "multiple values" not in str(error):
            raise
        option = str(error).split("'")[1]
        raise InputError(
            f"{name} has no option {option!r}; it has {', '.join(_options(entry))}"
        ) from None


def _options(entry):
    # What can be chosen: the builder's keywords, and the network's attributes that it leaves open.
    parameters = inspect.signature(entry.build).parameters.values()
    options = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    model = entry.build(num_classes=entry.num_classes)
    for field in fields(model):
        with contextlib.suppress(TypeError):
            entry.build(**{"num_classes": 2, field.name: getattr(model, field.name)})
            options.append(field.name)
    return [name for name in dict.fromkeys(options) if name not in ("parent", "name")]
