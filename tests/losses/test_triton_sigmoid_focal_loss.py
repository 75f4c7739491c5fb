"""What only the Triton kernels of the sigmoid losses can get wrong: addresses, and how often memory is touched.

Run with ``--kernel triton``, as test_triton_cross_entropy.py. The contract itself is in test_sigmoid_focal_loss.py.
"""

import pytest
import torch

from torchfast import sigmoid_focal_loss

pytest.importorskip("triton")
interpreter = pytest.importorskip("interpreter")
triton_launch = pytest.importorskip("torchfast.losses.sigmoid_focal_loss.triton_launch")


@pytest.fixture(autouse=True)
def only_interpreted(kernel, device):
    if (kernel, device) != ("triton", "cpu"):
        pytest.skip("these watch the interpreter: pytest --kernel triton")


SHAPES = {
    "rows": (70, 10),
    "vectors": (9, 64),
    "long rows": (3, 5000),
    "ragged": (5, 333),
    "one class": (300, 1),
    "image": (2, 5, 7, 8),
    "vector": (1001,),
}
LAYOUTS = {
    "contiguous": lambda x: x,
    "classes outermost": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "classes in the middle": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() > 2 else x,
    "apart": lambda x: torch.stack([x.new_full(x.shape, torch.nan), x], -1)[..., 1],
}
OPTIONS = {
    "focal": {},
    "mean": {"reduction": "mean"},
    "asymmetric": {"gamma": 1.0, "gamma_neg": 4.0, "clip": 0.05, "label_smoothing": 0.1, "reduction": "sum"},
}
KINDS = ("float", "bool", "int8", "class ids")
BAD_IDS = torch.tensor([-2, 2**31, 2**62, -(2**63), -100])


def targets_of(kind, shape):
    if kind == "float":
        return torch.rand(shape)
    if kind == "bool":
        return torch.rand(shape) < 0.3
    if kind == "int8":
        t = torch.randint(0, 2, shape, dtype=torch.int8)
        t.view(-1)[::3] = torch.tensor([2, -1, 127, -128, -100], dtype=torch.int8).repeat(t.numel())[
            : -(-t.numel() // 3)
        ]
        return t
    t = torch.randint(-1, shape[-1], shape[:-1])
    t.view(-1)[::2] = BAD_IDS.repeat(t.numel())[: -(-t.numel() // 2)]
    return t


def loss_and_gradient(x, t, **options):
    x = x.detach().requires_grad_()
    with interpreter.watched() as launches:
        loss = sigmoid_focal_loss(x, t, **options)
        (gradient,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
    return loss.detach(), gradient, launches


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_everything_is_touched_once_and_nothing_else(shape, layout, kind, weighted, options):
    """Integer targets are out of range to a part, as far out as the dtype goes: no address is made of them.
    interpreter.watched() itself raises at an access outside of a tensor's elements."""
    x, t = layout((3 * torch.randn(shape)).bfloat16()), targets_of(kind, shape)
    factors = {}
    if weighted:
        factors = {"weight": torch.rand(shape[-1]), "pos_weight": torch.rand(shape), "mask": torch.rand(shape) < 0.8}
    _, _, launches = loss_and_gradient(x, t, **factors, **options)
    forward, *sums, backward = launches
    for launch, output in ((forward, "loss"), (backward, "gradient")):
        assert (launch.writes[output] == 1).all()
        for name in ("logits", "target", "pos_weight", "mask"):
            if name in launch.tensors and len(launch.reads[name]) == x.numel():  # else it is read once a row, or more
                assert (launch.reads[name] == 1).all(), name
    if kind == "class ids" and shape[-1] > 1 and layout is LAYOUTS["contiguous"]:  # once a row of a block of columns
        assert forward.reads["target"].max() <= -(-shape[-1] // 2048)
    if "reduction" in options:
        assert (sums[-1].writes["out"] == 1).all() and (sums[-1].writes["residuals"] == 1).all()
    else:
        assert not sums and (forward.writes["divisor"] == 1).all()


def test_a_layout_of_four_dimensions_that_do_not_merge_is_as_its_copy():
    x = torch.randn(4, 3, 4, 3, 4, 3)[:, ::2, :, ::2, :, ::2]
    t = (torch.rand(x.shape) < 0.5).float()
    for options in ({}, {"reduction": "mean"}):
        actual, expected = loss_and_gradient(x, t, **options), loss_and_gradient(x.contiguous(), t, **options)
        for a, b in zip(actual[:2], expected[:2], strict=True):
            torch.testing.assert_close(a, b)
    ids = torch.randint(-1, 2, x.shape[:-1])
    for a, b in zip(loss_and_gradient(x, ids)[:2], loss_and_gradient(x.contiguous(), ids)[:2], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["float", "class ids"])
def test_offsets_beyond_2_to_the_31_elements(kind, monkeypatch):
    """A view of 9 GB of address space, of which only the pages of its elements are ever touched."""
    monkeypatch.setattr(interpreter.interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)  # it copies all
    far = 2**31 + 8
    for shape, strides in (((3, 70), (far // 2 + 4, 1)), ((4, 3), (1, far // 2 + 4)), ((2, 5, 4), (far, 4, 1))):
        x = torch.empty(far * 2, dtype=torch.bfloat16).as_strided(shape, strides)
        values = torch.randn(shape).bfloat16()
        x.copy_(values)
        t = torch.rand(shape) if kind == "float" else torch.randint(-1, shape[-1], shape[:-1])
        torch.testing.assert_close(sigmoid_focal_loss(x, t), sigmoid_focal_loss(values, t))
