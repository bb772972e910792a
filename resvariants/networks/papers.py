"""What do the papers report? Test errors at their full budgets."""

from typing import NamedTuple


class Reported(NamedTuple):
    """A test error in per cent, and where it stands."""

    error: float
    source: str


_HE2015 = "He et al. 2015, table 6"

_HE2016 = "He et al. 2016, median of five runs"

_HUANG2016 = "Huang et al. 2016"

_DENSENET = "Huang et al. 2017, table 2"

_XIE2016 = "Xie et al. 2016, mean of ten runs"

_HIGHWAY = "Srivastava et al. 2015, mean of five runs"

_CONVENTION = "public code, no paper"

# (data set, model, survival probability of the last block) -> test error. CIFAR with augmentation.
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
    ("cifar10", "resnet110_average", 1.0): Reported(6.41, _HUANG2016),
    ("cifar10", "resnet110_average", 0.5): Reported(5.25, _HUANG2016),
    ("cifar10", "resnet110", 0.5): Reported(5.25, _HUANG2016),
    ("cifar10", "resnet1202_average", 1.0): Reported(6.67, _HUANG2016),
    ("cifar10", "resnet1202_average", 0.5): Reported(4.91, _HUANG2016),
    ("cifar10", "resnet1202", 0.5): Reported(4.91, _HUANG2016),
    ("cifar100", "resnet164", 1.0): Reported(25.16, _HE2016),
    ("cifar100", "resnet1001", 1.0): Reported(27.82, _HE2016),
    ("cifar100", "preact_resnet164", 1.0): Reported(24.33, _HE2016),
    ("cifar100", "preact_resnet1001", 1.0): Reported(22.71, _HE2016),
    ("cifar100", "resnet110_average", 1.0): Reported(27.76, _HUANG2016),
    ("cifar100", "resnet110_average", 0.5): Reported(24.98, _HUANG2016),
    ("cifar100", "resnet110", 0.5): Reported(24.98, _HUANG2016),
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
    ("svhn_extra", "cifar_resnet152", 1.0): Reported(1.80, _HUANG2016),
    ("svhn_extra", "cifar_resnet152", 0.5): Reported(1.75, _HUANG2016),
    ("svhn_extra", "densenet40_k12", 1.0): Reported(1.79, _DENSENET),
    ("svhn_extra", "densenet100_k12", 1.0): Reported(1.67, _DENSENET),
    ("svhn_extra", "densenet100_k24", 1.0): Reported(1.59, _DENSENET),
    ("svhn_extra", "densenet_bc100_k12", 1.0): Reported(1.76, _DENSENET),
    ("svhn_extra", "densenet_bc250_k24", 1.0): Reported(1.74, _DENSENET),
    ("cifar10", "highway19", 1.0): Reported(7.69, _HIGHWAY),
    ("cifar100", "highway19", 1.0): Reported(32.39, _HIGHWAY),
    ("mnist", "highway10_width16", 1.0): Reported(0.60, _HIGHWAY),
    ("mnist", "highway10_width32", 1.0): Reported(0.46, _HIGHWAY),
    ("cifar10", "cifar_vgg19_bn", 1.0): Reported(6.66, _CONVENTION),
    ("cifar100", "cifar_vgg19_bn", 1.0): Reported(28.05, _CONVENTION),
    ("cifar10", "cifar_alexnet", 1.0): Reported(22.78, _CONVENTION),
    ("cifar100", "cifar_alexnet", 1.0): Reported(56.13, _CONVENTION),
}
