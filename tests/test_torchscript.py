"""TorchScript: a model that holds a metric can be scripted, as torchmetrics' own testers ask of every metric. The
metric's methods stay in Python."""

import pytest
import torch
from torch import nn

pytest.importorskip("torchmetrics")

from torchfast.metrics import ClassificationMetrics, RankingMetrics, RegressionMetrics

METRICS = {
    "decisions": lambda: ClassificationMetrics(["accuracy", "f1@macro"], num_classes=3),
    "areas": lambda: ClassificationMetrics("roc_auc"),
    "areas in bins": lambda: ClassificationMetrics("roc_auc", bins=4),
    "ranking": lambda: RankingMetrics(["ndcg@10", "mrr"], gain=[0.0, 1.0]),
    "ranking by query": lambda: RankingMetrics("mrr", per_query=True),
    "regression": lambda: RegressionMetrics(["mae", "r2"], num_outputs=2),
}


class Model(nn.Module):
    def __init__(self, metric):
        super().__init__()
        self.metric, self.layer = metric, nn.Linear(2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.mark.parametrize("make", METRICS.values(), ids=METRICS)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_metric_and_a_module_that_holds_one_can_be_scripted(make):
    torch.jit.script(make())
    model, x = Model(make()), torch.rand(4, 2)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))
