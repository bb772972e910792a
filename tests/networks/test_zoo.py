"""Names, exact sizes and costs of the networks."""

import json

import pytest

from resvariants import InputError, create_model, list_models
from resvariants.__main__ import SIZES
from resvariants.networks.resnet import cifar_resnet
from resvariants.networks.summary import (
    abstract_variables,
    count_parameters,
    format_summary,
    summarise,
)
from resvariants.networks.zoo import find

# Section 4.2 and table 6 of He et al. 2015, and He et al. 2016: convolutions, BatchNorm scales and
# biases, and the classifier, for 10 classes.
CIFAR_PARAMETERS = {
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
    "resnet110_average": 1_727_962,
    "cifar_resnet152": 2_408_474,
    "resnet1202_average": 19_421_274,
    "resnet1202": 19_421_274,
    "plain20": 269_722,
    "plain32": 464_154,
    "plain44": 658_586,
    "plain56": 853_018,
    "plain110": 1_727_962,
    "resnet20_b": 272_474,
    "resnet32_b": 466_906,
    "resnet44_b": 661_338,
    "resnet56_b": 855_770,
    "resnet110_b": 1_730_714,
    "resnet1202_b": 19_424_026,
    "resnet110_c": 1_826_202,
    "resnet164": 1_704_154,
    "resnet1001": 10_328_602,
    # The placements and shortcuts of He et al. 2016 have the parameters of the net they vary.
    "resnet110_one_layer_skip": 1_727_962,
    "preact_resnet110": 1_727_962,
    "preact_resnet110_one_layer_skip": 1_727_962,
    "resnet110_norm_after_addition": 1_727_962,
    "resnet110_relu_before_addition": 1_727_962,
    "resnet110_relu_only_preactivation": 1_727_962,
    "resnet164_norm_after_addition": 1_704_154,
    "resnet164_relu_before_addition": 1_704_154,
    "resnet164_relu_only_preactivation": 1_704_154,
    "resnet110_constant_scaling": 1_727_962,
    "resnet110_dropout": 1_727_962,
    "resnet110_exclusive_gating": 1_824_186,
    "resnet110_shortcut_only_gating": 1_824_186,
    "preact_resnet164": 1_703_258,
    "preact_resnet1001": 10_327_706,
}
# Table 1 of He et al. 2015, 1000 classes; plain nets have as many as option A.
IMAGENET_PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet18_a": 11_515_688,
    "resnet18_c": 12_043_816,
    "plain18": 11_515_688,
    "resnet34": 21_797_672,
    "resnet34_a": 21_623_848,
    "resnet34_c": 22_716_840,
    "plain34": 21_623_848,
    "resnet50": 25_557_032,
    "resnet50_v1_5": 25_557_032,
    "resnet101_v1_5": 44_549_160,
    "resnet152_v1_5": 60_192_808,
    "resnetv2_50": 25_549_352,  # timm's own
    "resnetv2_101": 44_541_480,
    "resnetv2_152": 60_185_128,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "preact_resnet18": 11_687_720,
    "preact_resnet34": 21_795_880,
    "preact_resnet50": 25_549_352,
    "preact_resnet101": 44_541_480,
    "preact_resnet152": 60_185_128,
    "preact_resnet200": 64_666_152,
}
# Xie et al. 2016; the first row's nets are for CIFAR.
RESNEXT_PARAMETERS = {
    "resnext29_8x64d": 34_426_698,
    "resnext29_16x64d": 68_155_210,
    "resnext29_1x64d": 4_914_250,
    "resnext29_32x4d": 4_775_754,
    "resnext50_32x4d": 25_028_904,
    "resnext50_2x40d": 25_425_000,
    "resnext50_4x24d": 25_292_968,
    "resnext50_8x14d": 25_603_016,
    "resnext101_32x4d": 44_177_704,
    "resnext101_64x4d": 83_455_272,
    "resnext101_2x64d": 84_198_184,
    "resnext101_1x100d": 85_611_336,
}
DENSENET_PARAMETERS = {
    "densenet40_k12": 1_019_722,
    "densenet100_k12": 6_979_642,
    "densenet100_k24": 27_249_082,
    "densenet_bc100_k12": 769_162,
    "densenet_bc250_k24": 15_324_406,
    "densenet_bc190_k40": 25_624_430,
    "densenet121": 7_978_856,
    "densenet169": 14_149_480,
    "densenet201": 20_013_928,
    "densenet161": 28_681_000,
    "densenet264": 33_337_704,
    "densenet264_k48": 72_686_632,
}
CLASSIC_PARAMETERS = {
    "highway19": 2_256_838,
    "highway10_width16": 38_986,
    "highway10_width32": 151_690,
    # Srivastava et al. 2015, 3.1: 5,100 a layer of 50 highway units, 5,112 one of 71 units.
    **{f"highway_fc{depth}": 39_250 + (depth - 1) * 5_100 + 510 for depth in (10, 20, 50, 100)},
    **{f"plain_fc{depth}": 55_735 + (depth - 1) * 5_112 + 720 for depth in (10, 20, 50, 100)},
    "vgg16": 138_357_544,
    "vgg16_bn": 138_357_544 + 2 * (2 * 64 + 2 * 128 + 3 * 256 + 6 * 512),
    "vgg19": 143_667_240,
    "vgg19_bn": 143_678_248,
    "cifar_vgg19_bn": 20_040_522,
    # Convolutions with biases and BatchNorm, and the classifier.
    "vgg15_width128": (9 * 3 + 3) * 128 + 13 * (9 * 128 + 3) * 128 + 129 * 10,
    "alexnet": 60_965_224,
    "alexnet_single_tower": 61_100_840,
    "cifar_alexnet": 2_472_266,
    "googlenet": 13_378_280,  # with both auxiliary classifiers
    "googlenet_torchvision": 13_004_888,  # torchvision's own, with auxiliary classifiers
    "googlenet_bn": 7_005_832 + 13_378_280 - 6_998_552 + 2 * 128,
}
PARAMETERS = (
    CIFAR_PARAMETERS
    | IMAGENET_PARAMETERS
    | RESNEXT_PARAMETERS
    | DENSENET_PARAMETERS
    | CLASSIC_PARAMETERS
)


def test_the_table_names_every_model():
    listed = [name for models in list_models().values() for name in models]
    assert sorted(listed) == sorted(PARAMETERS)


def test_the_parameters_traced_ahead_are_those_traced_below():
    assert json.loads(SIZES.read_text()) == PARAMETERS, "python -m resvariants --trace writes them"


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_the_papers(name):
    assert find(name).parameters == PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "options", "total"),
    [
        ("googlenet", {"auxiliary": False}, 6_998_552),
        ("googlenet_bn", {"auxiliary": False}, 7_005_832),
        ("resnext29_8x64d", {"placement": "full_preactivation"}, 34_423_114),
        ("resnext29_16x64d", {"placement": "full_preactivation"}, 68_151_626),
        # The public code's stem, twice the growth rate wide.
        ("densenet40_k12", {"stem_features": 24}, 1_059_298),
        ("densenet100_k12", {"stem_features": 24}, 7_083_538),
        ("densenet100_k24", {"stem_features": 48}, 28_071_706),
        # Option C without BatchNorm behind its 1x1 convolutions.
        ("resnet110", {"shortcut": "C"}, 1_826_202),
    ],
)
def test_parameters_of_variants_are_the_papers(name, options, total):
    model = create_model(name, **options)
    variables = abstract_variables(model, find(name).image_shape)
    assert count_parameters(variables["params"]) == total


def test_an_entry_knows_its_paper_and_family():
    resnet, googlenet = find("resnet110"), find("googlenet")
    assert (resnet.paper, resnet.family) == ("He et al. 2015", "ResNet")
    assert list_models()["GoogLeNet"]["googlenet"] is googlenet


@pytest.mark.slow_for("densenet_bc250_k24-156150", "densenet_bc190_k40-197190")
@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("resnet20", 5_850),
        ("resnet110", 5_850),
        ("resnet164", 23_130),
        ("resnext29_8x64d", 92_250),
        ("resnext29_16x64d", 92_250),
        ("highway19", 9_090),
        ("densenet40_k12", 40_410),
        ("densenet100_k12", 105_210),
        ("densenet100_k24", 208_890),
        ("densenet_bc100_k12", 30_870),
        ("densenet_bc250_k24", 156_150),
        ("densenet_bc190_k40", 197_190),
    ],
)
def test_a_hundred_classes_cost_only_the_head(name, extra):
    variables = abstract_variables(create_model(name, num_classes=100), (32, 32, 3))
    assert count_parameters(variables["params"]) == PARAMETERS[name] + extra


@pytest.mark.parametrize(
    ("name", "shares"),
    [("resnet110", (1_719_216, 8_096, 650)), ("resnet1001", (10_175_920, 150_112, 2_570))],
)
def test_convolutions_batchnorm_and_head_add_up_as_published(name, shares):
    params = abstract_variables(create_model(name), (32, 32, 3))["params"]
    head = count_parameters(params.pop("head"))
    norms = count_parameters(_select(params, "norm"))
    assert (count_parameters(params) - norms, norms, head) == shares


def _select(tree, word):
    found = []
    for key, value in tree.items():
        if word in key:
            found.append(value)
        elif isinstance(value, dict):
            found.append(_select(value, word))
    return found


@pytest.mark.parametrize(
    ("name", "giga"),
    [
        ("resnet18", 1.8),
        ("resnet34_a", 3.6),
        ("plain34", 3.6),
        ("resnet50", 3.8),
        ("resnet101", 7.6),
        ("resnet152", 11.3),
        ("vgg19", 19.6),
    ],
)
def test_multiply_adds_are_table_1s(name, giga):
    total = summarise(create_model(name), (224, 224, 3))[-1]["multiply_adds"]
    assert total / 1e9 == pytest.approx(giga, abs=0.06)


def test_stride_in_the_3x3_costs_more_and_weighs_the_same():
    ours = summarise(create_model("resnet50"), (224, 224, 3))[-1]
    theirs = summarise(create_model("resnet50", strided_conv=2), (224, 224, 3))[-1]
    assert theirs["parameters"] == ours["parameters"]
    assert theirs["multiply_adds"] / 1e9 == pytest.approx(4.1, abs=0.05)


def test_the_summary_of_resnet20_by_hand():
    rows = {row["part"]: row for row in summarise(create_model("resnet20"), (32, 32, 3))}
    assert list(rows) == ["stem", "stage1", "stage2", "stage3", "head", "total"]
    assert rows["stem"]["multiply_adds"] == 32 * 32 * 9 * 3 * 16
    assert rows["stage1"]["multiply_adds"] == 6 * 32 * 32 * 9 * 16 * 16
    assert rows["stage2"]["multiply_adds"] == 16 * 16 * 9 * (16 * 32 + 5 * 32 * 32)
    assert rows["head"]["multiply_adds"] == 640
    assert rows["stage3"]["output"] == (8, 8, 64)
    assert "269,722" in format_summary(create_model("resnet20"), (32, 32, 3))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("resnet21", "20 (n=3) or 26 (n=4)"),
        ("plain3", "8 (n=1)"),
        ("resnet30_bottleneck", "29 (n=3) or 38 (n=4)"),
        ("resnt110", "resnet110"),
        ("vgg", "nearest: vgg19, vgg16"),
        ("densenet41_k12", "40 (n=12) or 43 (n=13)"),
        ("resnext30_8x64d", "29 (n=3) or 38 (n=4)"),
        ("highway_fc1", "at least 2"),
    ],
)
def test_an_unknown_name_is_answered_with_valid_ones(name, says):
    with pytest.raises(InputError, match="unknown model") as caught:
        create_model(name)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("name", "option", "says"),
    [
        (
            "resnet20",
            {"cardinality": 8},
            "resnet20 has no option 'cardinality'; it has .*shortcut, placement",
        ),
        (
            "densenet121",
            {"growth_rate": 8},
            "densenet121 has no option 'growth_rate'; it has num_classes, bottleneck",
        ),
    ],
)
def test_options_that_cannot_be_chosen_are_named(name, option, says):
    with pytest.raises(InputError, match=says):
        create_model(name, **option)


def test_depths_outside_the_papers_are_built_by_rule():
    assert create_model("resnet8").stage_sizes == (1, 1, 1)
    assert create_model("cifar_resnet50").stage_sizes == (8, 8, 8)
    assert create_model("resnet29_bottleneck").features == (64, 128, 256)
    assert find("plain14").image_shape == (32, 32, 3)


def test_an_unknown_shortcut_is_answered_with_the_allowed_ones():
    with pytest.raises(InputError, match="allowed: A, A_average, B, C"):
        cifar_resnet(20, shortcut="D")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("resnext50", "of the family ResNeXt, which --family lists: resnext50_32x4d"),
        ("densenet", "of the family DenseNet"),
        ("Transformer", r"nearest: .* \(all: python -m resvariants\)$"),
    ],
)
def test_an_unknown_name_is_answered_with_its_family(name, says):
    with pytest.raises(InputError, match=says):
        find(name)
