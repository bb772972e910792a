"""Every configuration key at its default; `resvariants/training/keys.py` explains each.

Recipes start from here and state what they change. None stands for "not set" where a key allows it.
"""

from ml_collections import ConfigDict

from resvariants.training import keys


def get_config() -> ConfigDict:
    """ResNet-20 on the embedded digits, with the optimiser of He et al. 2015."""
    return keys.default_config()
