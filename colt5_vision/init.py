"""Fresh weights for a layer and all in it."""

from torch import nn


def init_weights(module: nn.Module) -> None:
    """Draw the weights of ``module`` anew, as its constructor did.

    Children come first, for a parent may scale what they drew. A module that holds parameters has
    ``reset_parameters``. After ``to_empty`` nothing is left uninitialised.
    """
    for child in module.children():
        init_weights(child)
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()
