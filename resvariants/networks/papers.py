"""What do the papers report? Test errors at their full budgets."""

from typing import NamedTuple


class Reported(NamedTuple):
    """A test error in per cent, and where it stands; of ImageNet also how it was evaluated.

    Attributes:
      error: None where a paper gives the top-5 error alone.
      evaluation: `ONE_CROP`, `TEN_CROPS` or `MULTI_SCALE`; empty for images that are tested whole.
    """

    error: float | None
    source: str
    top5: float | None = None
    evaluation: str = ""

    def __str__(self) -> str:
        """Such as "22.85 %, top-5 6.71 % (ten crops; He et al. 2015, table 3)"."""
        error = [] if self.error is None else [f"{self.error:.2f} %"]
        top5 = [] if self.top5 is None else [f"top-5 {self.top5:.2f} %"]
        where = f"{self.evaluation}; {self.source}" if self.evaluation else self.source
        return f"{', '.join(error + top5)} ({where})"


_HE2015 = "He et al. 2015, table 6"

_HE2016 = "He et al. 2016, median of five runs"

HUANG2016 = "Huang et al. 2016"

_DENSENET = "Huang et al. 2017, table 2"

_XIE2016 = "Xie et al. 2016, mean of ten runs"

_HIGHWAY = "Srivastava et al. 2015, mean of five runs"

_CONVENTION = "public code, no paper"

# (data set, model, survival probability of the last block) -> test error, with augmentation.
TEST_ERRORS = {
    ("cifar10", "resnet20", 1.0): Reported(8.75, _HE2015),
    ("cifar10", "resnet32", 1.0): Reported(7.51, _HE2015),
    ("cifar10", "resnet44", 1.0): Reported(7.17, _HE2015),
    ("cifar10", "resnet56", 1.0): Reported(6.97, _HE2015),
    ("cifar10", "resnet110", 1.0): Reported(6.61, f"{_HE2015}, mean of five runs, best 6.43"),
    ("cifar10", "resnet1202", 1.0): Reported(7.93, _HE2015),
    ("cifar10", "resnet164", 1.0): Reported(5.93, _HE2016),
    ("cifar10", "resnet1001", 1.0): Reported(7.61, _HE2016),
    ("cifar10", "preact_resnet110", 1.0): Reported(6.37, _HE2016),
    ("cifar10", "preact_resnet164", 1.0): Reported(5.46, _HE2016),
    ("cifar10", "preact_resnet1001", 1.0): Reported(4.92, _HE2016),
    ("cifar10", "resnet110_one_layer_skip", 1.0): Reported(9.90, _HE2016),
    ("cifar10", "preact_resnet110_one_layer_skip", 1.0): Reported(8.91, _HE2016),
    ("cifar10", "resnet110_norm_after_addition", 1.0): Reported(8.17, _HE2016),
    ("cifar10", "resnet110_relu_before_addition", 1.0): Reported(7.84, _HE2016),
    ("cifar10", "resnet110_relu_only_preactivation", 1.0): Reported(6.71, _HE2016),
    ("cifar10", "resnet164_norm_after_addition", 1.0): Reported(6.50, _HE2016),
    ("cifar10", "resnet164_relu_before_addition", 1.0): Reported(6.14, _HE2016),
    ("cifar10", "resnet164_relu_only_preactivation", 1.0): Reported(5.91, _HE2016),
    ("cifar10", "resnet110_constant_scaling", 1.0): Reported(12.35, _HE2016),
    ("cifar10", "resnet110_exclusive_gating", 1.0): Reported(8.70, _HE2016),
    ("cifar10", "resnet110_shortcut_only_gating", 1.0): Reported(6.91, _HE2016),
    ("cifar10", "resnet110_c", 1.0): Reported(12.22, _HE2016),
    # Huang et al. 2016 average where they subsample; the nets that subsample are shown beside them.
    ("cifar10", "resnet110_average", 1.0): Reported(6.41, HUANG2016),
    ("cifar10", "resnet110_average", 0.5): Reported(5.25, HUANG2016),
    ("cifar10", "resnet110", 0.5): Reported(5.25, HUANG2016),
    ("cifar10", "resnet1202_average", 1.0): Reported(6.67, HUANG2016),
    ("cifar10", "resnet1202_average", 0.5): Reported(4.91, HUANG2016),
    ("cifar10", "resnet1202", 0.5): Reported(4.91, HUANG2016),
    ("cifar100", "resnet164", 1.0): Reported(25.16, _HE2016),
    ("cifar100", "resnet1001", 1.0): Reported(27.82, _HE2016),
    ("cifar100", "preact_resnet164", 1.0): Reported(24.33, _HE2016),
    ("cifar100", "preact_resnet1001", 1.0): Reported(22.71, _HE2016),
    ("cifar100", "resnet110_average", 1.0): Reported(27.76, HUANG2016),
    ("cifar100", "resnet110_average", 0.5): Reported(24.98, HUANG2016),
    ("cifar100", "resnet110", 0.5): Reported(24.98, HUANG2016),
    ("cifar10", "resnext29_8x64d", 1.0): Reported(3.65, _XIE2016),
    ("cifar10", "resnext29_16x64d", 1.0): Reported(3.58, _XIE2016),
    ("cifar100", "resnext29_8x64d", 1.0): Reported(17.77, _XIE2016),
    ("cifar100", "resnext29_16x64d", 1.0): Reported(17.31, _XIE2016),
    ("cifar10", "densenet40_k12", 1.0): Reported(5.24, _DENSENET),
    ("cifar10", "densenet100_k12", 1.0): Reported(4.10, _DENSENET),
    ("cifar10", "densenet100_k24", 1.0): Reported(3.74, _DENSENET),
    ("cifar10", "densenet_bc100_k12", 1.0): Reported(4.51, _DENSENET),
    ("cifar10", "densenet_bc250_k24", 1.0): Reported(3.62, _DENSENET),
    ("cifar10", "densenet_bc190_k40", 1.0): Reported(3.46, _DENSENET),
    ("cifar100", "densenet40_k12", 1.0): Reported(24.42, _DENSENET),
    ("cifar100", "densenet100_k12", 1.0): Reported(20.20, _DENSENET),
    ("cifar100", "densenet100_k24", 1.0): Reported(19.25, _DENSENET),
    ("cifar100", "densenet_bc100_k12", 1.0): Reported(22.27, _DENSENET),
    ("cifar100", "densenet_bc250_k24", 1.0): Reported(17.60, _DENSENET),
    ("cifar100", "densenet_bc190_k40", 1.0): Reported(17.18, _DENSENET),
    ("cifar10", "highway19", 1.0): Reported(7.69, _HIGHWAY),
    ("cifar100", "highway19", 1.0): Reported(32.39, _HIGHWAY),
    ("cifar10", "cifar_vgg19_bn", 1.0): Reported(6.66, _CONVENTION),
    ("cifar100", "cifar_vgg19_bn", 1.0): Reported(28.05, _CONVENTION),
    ("cifar10", "cifar_alexnet", 1.0): Reported(22.78, _CONVENTION),
    ("cifar100", "cifar_alexnet", 1.0): Reported(56.13, _CONVENTION),
}

# The same without.
UNAUGMENTED_ERRORS = {
    ("cifar10", "densenet40_k12", 1.0): Reported(7.00, _DENSENET),
    ("cifar10", "densenet100_k12", 1.0): Reported(5.77, _DENSENET),
    ("cifar10", "densenet100_k24", 1.0): Reported(5.83, _DENSENET),
    ("cifar10", "densenet_bc100_k12", 1.0): Reported(5.92, _DENSENET),
    ("cifar10", "densenet_bc250_k24", 1.0): Reported(5.19, _DENSENET),
    ("cifar100", "densenet40_k12", 1.0): Reported(27.55, _DENSENET),
    ("cifar100", "densenet100_k12", 1.0): Reported(23.79, _DENSENET),
    ("cifar100", "densenet100_k24", 1.0): Reported(23.42, _DENSENET),
    ("cifar100", "densenet_bc100_k12", 1.0): Reported(24.15, _DENSENET),
    ("cifar100", "densenet_bc250_k24", 1.0): Reported(19.64, _DENSENET),
    ("svhn_extra", "cifar_resnet152", 1.0): Reported(1.80, HUANG2016),
    ("svhn_extra", "cifar_resnet152", 0.5): Reported(1.75, HUANG2016),
    ("svhn_extra", "densenet40_k12", 1.0): Reported(1.79, _DENSENET),
    ("svhn_extra", "densenet100_k12", 1.0): Reported(1.67, _DENSENET),
    ("svhn_extra", "densenet100_k24", 1.0): Reported(1.59, _DENSENET),
    ("svhn_extra", "densenet_bc100_k12", 1.0): Reported(1.76, _DENSENET),
    ("svhn_extra", "densenet_bc250_k24", 1.0): Reported(1.74, _DENSENET),
    ("mnist", "highway10_width16", 1.0): Reported(0.60, _HIGHWAY),
    ("mnist", "highway10_width32", 1.0): Reported(0.46, _HIGHWAY),
}

# With mixed images, each class against all others and LAMB: the recipe A3, of timm's ResNet-50.
MODERN_ERRORS = {
    ("imagenet2012", "resnet50_v1_5", 1.0): Reported(21.9, "Wightman et al. 2021, table 2, A3"),
}

# How validation images of ImageNet are seen: the centre; corners, centre and their mirror images;
# whole images, resized to several scales. Crops are of 224x224, AlexNet's of 227x227.
ONE_CROP = "one crop"

TEN_CROPS = "ten crops"

MULTI_SCALE = "multi-scale"

_RELEASED = "He et al. 2015's released models, no table"

FB = "fb.resnet.torch, no paper"

_HE2015_TABLE2 = "He et al. 2015, table 2"

_HE2015_TABLE3 = "He et al. 2015, table 3"

_HE2015_TABLE4 = "He et al. 2015, table 4"

_XIE2016_TABLE3 = "Xie et al. 2016, table 3"

_XIE2016_TABLE4 = "Xie et al. 2016, table 4"

_DENSENET_TABLE3 = "Huang et al. 2017, table 3"

_VGG_TABLE4 = "Simonyan & Zisserman 2014, table 4"

_ALEXNET = "Krizhevsky et al. 2012, table 2"

_GOOGLENET = "Szegedy et al. 2014, table 3"

# Evaluation -> model -> top-1 error, top-5 error, source.
_IMAGENET: dict[str, dict[str, tuple[float | None, float | None, str]]] = {
    ONE_CROP: {
        "resnet18": (30.43, 10.76, FB),
        "resnet34": (26.73, 8.74, FB),
        "resnet50_v1_5": (24.01, 7.02, FB),
        "resnet101_v1_5": (22.44, 6.21, FB),
        "resnet152_v1_5": (22.16, 6.16, FB),
        "preact_resnet200": (21.66, 5.79, FB),
        "resnet50": (24.7, 7.8, _RELEASED),
        "resnet101": (23.6, 7.1, _RELEASED),
        "resnet152": (23.0, 6.7, "He et al. 2016, table 5"),
        "resnext50_2x40d": (23.0, None, _XIE2016_TABLE3),
        "resnext50_4x24d": (22.6, None, _XIE2016_TABLE3),
        "resnext50_8x14d": (22.3, None, _XIE2016_TABLE3),
        "resnext50_32x4d": (22.2, None, _XIE2016_TABLE3),
        "resnext101_2x40d": (21.7, None, _XIE2016_TABLE3),
        "resnext101_4x24d": (21.4, None, _XIE2016_TABLE3),
        "resnext101_8x14d": (21.3, None, _XIE2016_TABLE3),
        "resnext101_32x4d": (21.2, 5.6, _XIE2016_TABLE4),
        "resnext101_1x100d": (21.3, 5.7, _XIE2016_TABLE4),
        "resnext101_2x64d": (20.7, 5.5, _XIE2016_TABLE4),
        "resnext101_64x4d": (20.4, 5.3, _XIE2016_TABLE4),
        "densenet121": (25.02, 7.71, _DENSENET_TABLE3),
        "densenet169": (23.80, 6.85, _DENSENET_TABLE3),
        "densenet201": (22.58, 6.34, _DENSENET_TABLE3),
        "densenet264": (22.15, 6.12, _DENSENET_TABLE3),
        "densenet161": (22.2, None, "Huang et al. 2017's public code, no table"),
        "googlenet": (None, 10.07, _GOOGLENET),
    },
    TEN_CROPS: {
        "plain18": (27.94, None, _HE2015_TABLE2),
        "resnet18_a": (27.88, None, _HE2015_TABLE2),
        "plain34": (28.54, 10.02, _HE2015_TABLE3),
        "resnet34_a": (25.03, 7.76, _HE2015_TABLE3),
        "resnet34": (24.52, 7.46, _HE2015_TABLE3),
        "resnet34_c": (24.19, 7.40, _HE2015_TABLE3),
        "resnet50": (22.85, 6.71, _HE2015_TABLE3),
        "resnet101": (21.75, 6.05, _HE2015_TABLE3),
        "resnet152": (21.43, 5.71, _HE2015_TABLE3),
        "vgg16": (28.07, 9.33, _HE2015_TABLE3),
        "densenet121": (23.61, 6.66, _DENSENET_TABLE3),
        "densenet169": (22.08, 5.92, _DENSENET_TABLE3),
        "densenet201": (21.46, 5.54, _DENSENET_TABLE3),
        "densenet264": (20.80, 5.29, _DENSENET_TABLE3),
        "alexnet": (40.7, 18.2, _ALEXNET),
        "googlenet": (None, 9.15, _GOOGLENET),
    },
    MULTI_SCALE: {
        "resnet34": (21.84, 5.71, _HE2015_TABLE4),
        "resnet34_c": (21.53, 5.60, _HE2015_TABLE4),
        "resnet50": (20.74, 5.25, _HE2015_TABLE4),
        "resnet101": (19.87, 4.60, _HE2015_TABLE4),
        "resnet152": (19.38, 4.49, _HE2015_TABLE4),
        "vgg16": (24.8, 7.5, _VGG_TABLE4),
        "vgg19": (24.8, 7.5, _VGG_TABLE4),
    },
}

# (model, evaluation) -> errors on ImageNet-2012's validation images.
IMAGENET_ERRORS = {
    (model, evaluation): Reported(error, source, top5, evaluation)
    for evaluation, models in _IMAGENET.items()
    for model, (error, top5, source) in models.items()
}
