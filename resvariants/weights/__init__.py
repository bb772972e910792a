"""PyTorch's weights as our variables, and our variables as PyTorch's."""

from resvariants.weights.convert import load_torch, read_state_dict, to_torch, transfer
from resvariants.weights.stacks import stack, unstack

__all__ = ["load_torch", "read_state_dict", "stack", "to_torch", "transfer", "unstack"]
