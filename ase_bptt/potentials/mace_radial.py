"""MACE's radial networks, whose outputs are the same for both directions of a pair: computed for one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def each_distance_once(model: Any, n_pairs: int) -> Iterator[None]:
    """While it holds, the radial networks of a MACE see one direction of each pair, and serve both.

    They map a distance to the weights of a tensor product, and take a quarter of the time. The pairs
    that the model is called with have to be all of one direction, then the others in the same order.
    """
    one_way = n_pairs // 2
    features: list[Any] = [None, None]  # of both directions, and of one

    def halve_lengths(module: nn.Module, given: tuple) -> tuple:
        lengths, elements, ends, numbers = given
        return lengths[:one_way], elements, ends[:, :one_way], numbers

    def double_features(module: nn.Module, given: tuple, found: Any) -> Any:
        # The features, from some version on with the cutoff function that is still to be applied.
        several = found if isinstance(found, tuple) else (found,)
        both = tuple(None if x is None else torch.cat((x, x)) for x in several)
        features[:] = both[0], several[0]
        return both if isinstance(found, tuple) else both[0]

    def halve_features(module: nn.Module, given: tuple) -> tuple:
        # Some interactions add the features of the two atoms, which are not the same both ways.
        return (features[1],) if len(given) == 1 and given[0] is features[0] else given

    def double_weights(module: nn.Module, given: tuple, found: Tensor) -> Tensor:
        return torch.cat((found, found)) if given[0] is features[1] else found

    hooks = [(model.radial_embedding, halve_lengths, double_features)]
    hooks += [(layer.conv_tp_weights, halve_features, double_weights) for layer in model.interactions]
    with ExitStack() as held:
        for module, before, after in hooks:
            held.enter_context(module.register_forward_pre_hook(before))
            held.enter_context(module.register_forward_hook(after))
        yield
