r"""Softmax cross entropy of a linear layer's output, which is never held as a whole.

With hidden states h, a classifier W and its bias b: z = W h + b, and of every row z the loss of
:mod:`torchfast.losses.cross_entropy`. Its gradient g = dloss/dz gives the others::

    dloss/dh = g W        dloss/dW = sum over rows of g^T h        dloss/db = sum over rows of g

A chunk of rows at a time: its logits by one matrix product, the fused kernels of ``cross_entropy`` over them, which
write g where z was, two products with g, and the next chunk into the same memory. For a sum or a mean all this
happens in the forward, where z is at hand, for an upstream gradient of 1; the backward multiplies. Where every row has
an upstream gradient of its own (``reduction="none"``) it walks the chunks again.

So do Liger-Kernel, Apple's cut cross entropy and torch's ``F.linear_cross_entropy``, for fewer losses.
"""

from torchfast.losses.linear_cross_entropy.functional import linear_cross_entropy
from torchfast.losses.linear_cross_entropy.modules import LinearCrossEntropyLoss

__all__ = ["LinearCrossEntropyLoss", "linear_cross_entropy"]
