"""Every snippet of the documentation, run from the top of its page to the bottom."""

import re

import jax
import pytest
from nets import random_variables
from repository import ROOT

from resvariants import create_model
from resvariants.weights.convert import to_torch

PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if "```python" in page.read_text()]


@pytest.mark.slow_for("dense_prediction", "derivatives", "your_own")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_snippets_run(page, tmp_path, monkeypatch, registers_as_before):
    save_file = pytest.importorskip("safetensors.numpy").save_file
    monkeypatch.chdir(tmp_path)
    for name, file in (("resnet20", "resnet20"), ("resnet50_v1_5", "resnet50")):
        if f"{file}.safetensors" in page.read_text():
            variables = random_variables(create_model(name), (32, 32, 3))
            save_file(to_torch(variables), f"{file}.safetensors")
    snippets = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    with jax.numpy_rank_promotion("allow"):  # JAX's own default, for which users write
        exec(compile("\n".join(snippets), str(page), "exec"), {"__name__": page.stem})
