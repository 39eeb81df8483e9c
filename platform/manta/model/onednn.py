"""Linear layers of a model that only answers, on a CPU in fp32, by oneDNN's kernels.

torch multiplies fp32 matrices on a CPU by MKL, and one row with a matrix in another way than two.
oneDNN's kernels, with each weight laid out once for them, have two advantages here. On an AMD
processor they take a third of the time for eight rows, and less than half for one. And the bits of
a row's result are the same for any number of rows from two on, so that a text's logits do not
depend on what else is in its batch.

torch reaches these kernels through operators that `torch.compile` uses for frozen weights.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from manta.model.loss import Head

OPERATORS = ("_reorder_linear_weight", "_linear_pointwise")


class _Packed:
    """The product of one layer. It stands in for the layer's method of this purpose."""

    def __init__(self, layer: nn.Linear):
        self.weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
        self._bias = layer.bias

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self._bias, "none", [], "")


def pays(device: torch.device, dtype: str) -> bool:
    """Whether `packed` is for this device and precision. (bf16 goes through oneDNN anyway.)"""
    has_kernels = all(hasattr(torch.ops.mkldnn, name) for name in OPERATORS)
    return device.type == "cpu" and dtype == "fp32" and has_kernels


@contextlib.contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Runs all linear layers of a model, on a CPU in fp32 and without gradients, by packed weights.

    Meanwhile these layers' own weights are empty, so that the model takes no more memory, but for
    a head that is also the embedding. Afterwards they are as before, bit for bit.
    """
    shared = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    done: list[tuple[nn.Linear, str, _Packed]] = []
    try:
        for layer in model.modules():
            # What other subclasses compute is their own.
            if isinstance(layer, nn.Linear) and type(layer) in (nn.Linear, Head):
                method = "product" if isinstance(layer, Head) else "forward"
                product = _Packed(layer)
                setattr(layer, method, product)
                done.append((layer, method, product))
                if id(layer.weight) not in shared:
                    layer.weight.data = layer.weight.data.new_empty(0)
        yield
    finally:
        for layer, method, product in done:
            delattr(layer, method)
            if not layer.weight.numel():
                layer.weight.data = product.weight.to_dense()
