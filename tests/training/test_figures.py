"""Networks' names in figures, curves and files."""

import pytest

from configs import default
from resvariants.networks.zoo import ZOO
from resvariants.training import figures


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("resnet110", "ResNet-110"),
        ("resnet20_b", "ResNet-20 (shortcut B)"),
        ("preact_resnet1001", "pre-activation ResNet-1001"),
        ("resnetv2_50", "ResNetV2-50"),
        ("resnet50_v1_5", "ResNet-50 (v1.5)"),
        ("resnext29_8x64d", "ResNeXt-29 (8×64d)"),
        ("densenet_bc100_k12", "DenseNet-BC-100 (k = 12)"),
        ("plain_fc50", "plain-50 (fully connected)"),
        ("cifar_vgg19_bn", "CIFAR VGG-19 (BatchNorm)"),
        ("vgg15_width128", "VGG-15 (width 128)"),
        ("resnet110_exclusive_gating", "ResNet-110 (exclusive gating)"),
        ("resnet110_relu_before_addition", "ResNet-110 (ReLU before addition)"),
        ("my_net20", "my_net20"),
    ],
)
def test_networks_are_called_as_in_papers(name, title):
    assert figures.title(name) == title


def test_no_two_networks_are_called_the_same():
    titles = [figures.title(name) for name in ZOO]
    assert len(set(titles)) == len(titles)
    assert not [title for title in titles if "_" in title]


def config(name, **changes):
    made = default.get_config()
    changes["model__name"] = name
    made.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return made


def test_runs_are_told_apart_by_what_differs():
    given = {
        "a": config("resnet56"),
        "b": config("resnet56", model__survival_probability=0.5),
        "c": config(
            "resnet56", model__survival_probability=0.8, model__survival_schedule="uniform"
        ),
        "d": config("resnet20", seed=0, schedule__learning_rate=0.2),
        "e": config("resnet20", seed=1, schedule__learning_rate=0.01),
        "f": config("plain20", schedule__learning_rate=0.01),
        "g": config("resnet32"),
        "h": config("resnet32", seed=1, log_every_steps=7),
        "k": config("resnet26"),
        "l": config("resnet26", schedule__cut_to_steps=4688, eval_every_epochs=5.0),
        "runs/i/seed0": config("resnet44"),
        "runs/old/j/seed0": config(
            "resnet44", loss="binary", ema_decay=0.9, batch_size=64, dataset__flip=True
        ),
    }
    assert figures.titles(given) == {
        "a": "ResNet-56",
        "b": "ResNet-56, $p_L$ = 0.5",
        "c": "ResNet-56, $p$ = 0.8 uniformly",
        "d": "ResNet-20, learning rate 0.2",
        "e": "ResNet-20, learning rate 0.01",
        "f": "plain-20",
        "g": "ResNet-32 (g)",
        "h": "ResNet-32 (h)",
        "k": "ResNet-26",
        "l": "ResNet-26, cut to steps 4688",
        "runs/i/seed0": "ResNet-44 (i)",
        "runs/old/j/seed0": "ResNet-44 (old/j)",
    }


@pytest.mark.parametrize(
    ("paths", "short"),
    [
        (["runs/a/seed0", "runs/b/seed0"], ["a", "b"]),
        (["g", "h"], ["g", "h"]),
        (["a", "a/b"], ["a", "a/b"]),
        (["a/seed0", "a/a/seed0"], ["seed0", "a/seed0"]),
    ],
)
def test_paths_are_named_by_where_they_part(paths, short):
    found = figures.titles({path: config("resnet20") for path in paths})
    assert list(found.values()) == [f"ResNet-20 ({each})" for each in short]


def test_curves_show_every_run_and_name_the_mean_of_their_last_errors(tmp_path):
    def row(split, step, error):
        rate = 0.1 if step < 20 else 0.01
        return {"split": split, "step": step, "error": error, "learning_rate": rate}

    def rows(last):
        return [
            *(row("train", step, 90.0 - step) for step in (10, 20, 24, 30)),  # 24: of few steps
            *(row("test", step, error) for step, error in ((20, 60.0), (30, last))),
        ]

    figure, (axes,) = figures.new_figure()
    figures.plot_curves(axes, {"one": [rows(50.0), rows(52.0)], "other": [rows(40.0)]})
    drawn = [line for line in axes.lines if len(line.get_xdata()) > 2]
    assert [line.get_linestyle() for line in drawn] == ["--"] * 3
    assert [list(line.get_ydata()) for line in drawn] == [[80.0, 70.0, 60.0]] * 3
    solid = [line for line in axes.lines if list(line.get_xdata()) == [20, 30]]
    assert [line.get_ydata()[1] for line in solid] == [50.0, 52.0, 40.0]
    assert solid[0].get_color() == solid[1].get_color() != solid[2].get_color()
    falls = [line for line in axes.lines if list(line.get_xdata()) == [10, 10]]
    assert len(falls) == 1
    constant = [{**row, "learning_rate": 0.1} for row in rows(40.0)]
    _, (mixed,) = figures.new_figure()
    figures.plot_curves(mixed, {"one": [rows(50.0)], "other": [constant]})
    assert not [line for line in mixed.lines if list(line.get_xdata()) == [10, 10]]
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == ["one, test: 51.00 %", "other, test: 40.00 %"]

    # However few of all rows it is, the end of every curve is seen.
    low = [row("train", step, 1.0) for step in range(1, 50)]
    _, (axes,) = figures.new_figure()
    figures.plot_curves(axes, {"one": [[*low, row("test", 50, 66.0)]]})
    assert 66 < axes.get_ylim()[1] < 100

    # A linear schedule divides its rate at last, too.
    falling = [{**row("train", s, 50.0), "learning_rate": (40 - s) / 300} for s in range(2, 40, 2)]
    _, (axes,) = figures.new_figure()
    figures.plot_curves(axes, {"one": [[*falling, row("test", 38, 50.0)]]})
    assert [len(line.get_xdata()) for line in axes.lines] == [19, 1, 0]  # the last: the legend's

    figures.save_figure(figure, tmp_path / "new" / "curves.png", vector=True)
    assert (tmp_path / "new" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "new" / "curves.pdf").read_bytes().startswith(b"%PDF")
