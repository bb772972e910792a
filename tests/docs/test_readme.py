"""What the README says, done."""

import json
import re
import subprocess
import sys

import pytest
from repository import ROOT

from resvariants import InputError, __main__
from resvariants.networks import zoo
from resvariants.training.keys import OPEN

README = (ROOT / "README.md").read_text()


def test_the_readmes_snippet_runs():
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(snippet, "README.md", "exec"), {"__name__": "readme"})


def test_every_file_that_the_readme_names_is_there():
    names = re.findall(r"`((?:resvariants|configs|experiments)/[\w./]*)`", README)
    assert len(names) > 10
    for name in names:
        assert (ROOT / name).exists(), name


def test_every_experiment_is_listed():
    listed = (ROOT / "experiments" / "README.md").read_text()
    programs = {path.name for path in (ROOT / "experiments").glob("*.py")}
    assert programs == set(re.findall(r"^\| `(\w+\.py)`", listed, re.MULTILINE))
    for name in re.findall(r"python experiments/(\w+\.py)", listed):
        assert name in programs


def test_every_key_that_the_readme_sets_exists():
    from configs import default

    config = default.get_config()
    keys = re.findall(r"--config\.([\w.]+)", README)
    assert keys
    for key in keys:
        if key.rpartition(".")[0] in OPEN:
            continue
        node = config
        for part in key.split("."):
            assert part in node, key
            node = node[part]


def test_the_package_is_light_to_import():
    heavy = ("tensorflow_datasets", "orbax.checkpoint", "matplotlib", "absl.app", "sklearn", "PIL")
    code = f"import sys, resvariants; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_list_of_models_gives_families_sizes_and_papers(capsys, monkeypatch):
    few = {name: zoo.ZOO[name] for name in ("resnet110", "densenet121", "vgg16")}  # of a hundred
    monkeypatch.setattr(zoo, "ZOO", few)
    __main__.main([])
    printed = capsys.readouterr().out
    assert re.search(r"resnet110 +1,727,962 parameters +32x32x3 +He et al. 2015", printed)
    assert printed.index("\nDenseNet\n") < printed.index("densenet121") < printed.index("\nVGG\n")


def test_the_list_of_models_can_be_one_family_and_json(capsys):
    __main__.main(["--family", "VGG", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {n for n, entry in zoo.ZOO.items() if entry.family == "VGG"}
    assert found["vgg16"]["parameters"] == 138_357_544
    assert found["vgg16"]["image_shape"] == [224, 224, 3]
    __main__.main(["resnet20", "--json"])
    assert json.loads(capsys.readouterr().out)["resnet20"][-1]["parameters"] == 269_722
    with pytest.raises(InputError, match="unknown family 'Vgg'; allowed: AlexNet, DenseNet"):
        __main__.main(["--family", "Vgg"])


@pytest.mark.parametrize(("name", "says"), [("resnet20", "40,551,040"), ("resnet21", "6n+2")])
def test_the_summary_is_a_command(name, says):
    done = subprocess.run(
        [sys.executable, "-m", "resvariants", name], capture_output=True, text=True
    )
    assert says in done.stdout + done.stderr and "Traceback" not in done.stderr
    assert done.returncode == (2 if name == "resnet21" else 0)
