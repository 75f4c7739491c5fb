r"""Sigmoid losses: binary cross entropy, focal, label smoothing, asymmetric: one formula, one op.

Per element, with p = sigmoid(z), q = 1 - p, and the target y smoothed by e = label_smoothing::

    A = w pw a     ((1-e) y + e/2)          w: weight, pw: pos_weight, a: alpha
    B = w    (1-a) ((1-e) (1-y) + e/2)      alpha < 0: both alpha factors are 1
    p_m = max(p - clip, 0)
    loss = A q^g+ softplus(-z)  +  B p_m^g- (-log(1 - p_m))
    dloss/dz = -A q^g+ (q + g+ p softplus(-z))
               + B p q p_m^g- (1 / (1 - p_m) + g- (-log(1 - p_m)) / p_m)     (0 where p <= clip)

g+ = g- = 0 is binary cross entropy, g+ = g- > 0 the focal loss (Lin et al. 2017), clip > 0 with
g- > g+ the asymmetric loss (Ridnik et al. 2021). Everything is computed from exp(-|z|), so that both
p and 1 - p keep their digits where one of them rounds to 1.
"""

from torchfast.losses.sigmoid_focal_loss.functional import asymmetric_loss, sigmoid_focal_loss
from torchfast.losses.sigmoid_focal_loss.modules import AsymmetricLoss, SigmoidFocalLoss

__all__ = ["AsymmetricLoss", "SigmoidFocalLoss", "asymmetric_loss", "sigmoid_focal_loss"]
