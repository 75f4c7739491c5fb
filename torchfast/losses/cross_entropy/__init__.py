r"""Softmax cross entropy, label smoothing and focal loss: one formula, one op.

Per row (one position of the batch), with z = softcap(logit_scale * x), p = softmax(z), L = log p,
and q the target distribution (class index t: q_c = (1-e) [c = t] + e/K; probabilities y:
q_c = (1-e) y_c + e/K, where e is label_smoothing and K the number of classes)::

    u_c  = w_c a_c q_c                                 w: class weight, a: alpha, g: gamma
    loss = sum_c u_c (1 - p_c)^g (-L_c)  +  z_loss * lse(z)^2
    psi_c = -(1 - p_c)^g (1 + g p_c r_c),   r_c = -L_c / (1 - p_c)   (1 where p_c = 1)
    dloss/dz_j = u_j psi_j - p_j sum_c u_c psi_c + 2 z_loss lse p_j,   dz/dx = scale (1 - (z/s)^2)

g = 0 is cross entropy (Szegedy et al. 2016 for e > 0), e = 0 the softmax focal loss (Lin et al.
2017). Everything is computed in coordinates shifted by the row's maximum m, with the largest term
left out of the sum: rest = sum_{j != top} exp(z_j - m), L_c = (z_c - m) - log1p(rest). So 1 - p is
exact where p rounds to 1, and the row's residuals (m, rest, sum_c u_c psi_c) are all that backward
needs besides the logits.
"""

from torchfast.losses.cross_entropy.functional import cross_entropy, focal_loss
from torchfast.losses.cross_entropy.modules import CrossEntropyLoss, FocalLoss, LabelSmoothingCrossEntropy

__all__ = ["CrossEntropyLoss", "FocalLoss", "LabelSmoothingCrossEntropy", "cross_entropy", "focal_loss"]
