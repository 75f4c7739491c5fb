"""What only the Triton kernels can get wrong: addresses, bytes moved, the stages over split rows, scalars in fp32.

Run with ``--kernel triton``, that is in Triton's interpreter, where every access can be watched. The contract
itself is in test_cross_entropy.py and test_ops.py, which run there as well.
"""

import pytest
import torch

from torchfast import cross_entropy
from torchfast._common import NONE
from torchfast.losses.cross_entropy.options import Options

triton = pytest.importorskip("triton")
tl = triton.language
interpreter = pytest.importorskip("interpreter")
triton_launch = pytest.importorskip("torchfast.losses.cross_entropy.triton_launch")
forget_plans = pytest.importorskip("torchfast.losses.triton_launch").forget_plans


@pytest.fixture(autouse=True)
def only_interpreted(kernel, device, request, monkeypatch):
    if (kernel, device) != ("triton", "cpu"):
        pytest.skip("these watch the interpreter: pytest --kernel triton")
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("shape") == SHAPES["loop"]:
        monkeypatch.setattr(triton_launch, "splits_of", lambda *_: 1)  # as with hundreds of rows
    forget_plans()  # they are of other tests, which may have replaced something


SHAPES = {
    "few classes": (70, 10),
    "vectors": (9, 64),
    "in registers": (3, 1000),
    "ragged": (5, 333),
    "loop": (3, 9000),
    "split rows": (2, 20000),
    "split ragged rows": (1, 10007),
    "positions": (2, 19, 8, 40),
    "ragged positions": (2, 5, 7, 7),
    "positions, split classes": (1, 700, 3, 3),
    "one class": (4, 1),
}
OPTIONS = {
    "ce": {},
    "smoothed": {"label_smoothing": 0.1, "reduction": "none"},
    "focal": {"gamma": 1.5, "reduction": "sum"},
    "focal smoothed": {"gamma": 2.0, "label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 20.0},
}


def in_layout(x, layout):
    """x between poison: storage that is not an element of x must neither be read nor written."""
    if layout == "classes last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    elif layout == "rows apart":
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 8), torch.nan)
        wide[..., : x.shape[-1]] = x
        return wide[..., : x.shape[-1]]
    elif layout == "unaligned":
        storage = x.new_full((x.numel() + 3,), torch.nan)
        storage[1:-2] = x.flatten()
        return storage[1:-2].view(x.shape)
    return x


def arguments(shape, probabilities, layout):
    x = in_layout((3 * torch.randn(shape)).bfloat16(), layout)
    rows = (shape[0], *shape[2:])
    if probabilities:
        return x, torch.rand(shape), {}
    t = torch.randint(shape[1], rows)
    bad = torch.tensor([-1, shape[1], 2**31, 2**62, -(2**63), -100])
    t.view(-1)[: t.numel() // 2] = bad[torch.arange(t.numel() // 2) % 6]
    return x, t, {"weight": torch.rand(shape[1]), "sample_weight": torch.rand(rows)}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "classes last", "rows apart", "unaligned"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_no_access_leaves_the_tensors_and_every_output_is_written_once(shape, layout, probabilities, options):
    """Half of the targets are out of range, as far out as int64 goes: no address is made of them."""
    x, t, tensors = arguments(shape, probabilities, layout)
    x.requires_grad_()
    with interpreter.watched() as launches:
        loss = cross_entropy(x, t, **tensors, **options)
        (gradient,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
    *forward, backward = launches
    assert (backward.of(backward.writes, "gradient") == 1).all()
    residuals = sum(launch.writes["residuals"] for launch in forward if "residuals" in launch.tensors)
    assert (residuals == 1).all()
    outputs = [launch.writes[name] for launch in forward for name in ("loss", "out") if name in launch.tensors]
    written = [writes for writes in outputs if writes.any()]
    assert written and all((writes == 1).all() for writes in written)
    if not probabilities:
        row_gradients = gradient.movedim(1, -1).reshape(-1, shape[1])
        assert not row_gradients[: t.numel() // 2].any()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("layout", ["contiguous", "classes last"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_are_read_once_forward_and_once_backward(shape, layout, options):
    """Forward reads the target's own logit once more. Only a focal loss over all classes passes twice."""
    x = in_layout(torch.randn(shape).bfloat16(), layout).requires_grad_()
    t = torch.randint(shape[1], (shape[0], *shape[2:]))
    with interpreter.watched() as launches:
        loss = cross_entropy(x, t, **options)
        torch.autograd.grad(loss, x, torch.ones_like(loss))
    *forward, backward = launches
    reads = sum(launch.of(launch.reads, "logits") for launch in forward if "logits" in launch.tensors)
    reads = torch.from_numpy(reads)
    own = torch.zeros(shape, dtype=reads.dtype).scatter_(1, t.unsqueeze(1), 1)
    passes = (reads - own).unique().tolist()
    dense_focal = "gamma" in options and "label_smoothing" in options
    assert passes == ([2] if dense_focal else [1])
    assert (backward.of(backward.reads, "logits") == 1).all()
    rows = t.numel()
    assert len(forward[0].writes["residuals"]) == 3 * rows + 1


def test_ignored_rows_are_not_read():
    x, t = torch.randn(8, 1000, requires_grad=True), torch.randint(1000, (8,))
    t[::2] = -100
    with interpreter.watched() as launches:
        torch.autograd.grad(cross_entropy(x, t), x)
    for launch in (launches[0], launches[-1]):
        reads = launch.of(launch.reads, "logits")
        assert not reads[::2].any() and reads[1::2].all()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_split_rows_are_as_whole_rows(options, monkeypatch):
    x, t = (3 * torch.randn(2, 20000)).requires_grad_(), torch.tensor([5, 19999])
    x.data[0, :9000] = -torch.inf  # whole splits see nothing

    def loss_and_gradient():
        with interpreter.watched() as launches:
            loss = cross_entropy(x, t, **options)
        return (loss.detach(), *torch.autograd.grad(loss, x, torch.ones_like(loss))), len(launches)

    split, many = loss_and_gradient()
    monkeypatch.setattr(triton_launch, "splits_of", lambda *_: 1)
    forget_plans()
    whole, few = loss_and_gradient()
    assert many > few
    for a, b in zip(split, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["rows", "classes", "images"])
def test_offsets_beyond_2_to_the_31_elements(layout, monkeypatch):
    """Views of 9 GB of address space, of which only the pages of their elements are ever touched."""
    monkeypatch.setattr(interpreter.interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)  # it copies all
    far = 2**31 + 8
    shape, strides = {
        "rows": ((3, 70), (far // 2 + 4, 1)),
        "classes": ((4, 3), (1, far // 2 + 4)),
        "images": ((2, 5, 4), (far, 4, 1)),
    }[layout]
    x = torch.empty(far * 2, dtype=torch.bfloat16).as_strided(shape, strides)
    values = torch.randn(shape).bfloat16()
    x.copy_(values)
    t = torch.randint(shape[1], (shape[0], *shape[2:]))
    near = values.requires_grad_()
    expected = cross_entropy(near, t, label_smoothing=0.1, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), near)
    torch.testing.assert_close(cross_entropy(x, t, label_smoothing=0.1, reduction="none"), expected.detach())
    options = (t, None, None, None, Options(-100, NONE, 0.1, 0.0, 0.0, 0.0, 1.0, False, True))
    loss, residuals = triton_launch.cross_entropy(x, *options)
    triton_launch.cross_entropy_backward_(torch.ones_like(loss), x, *options, residuals)  # over the logits
    torch.testing.assert_close(x, gradient)


# ---- Scalars ---------------------------------------------------------------------------------------


@triton.jit
def store_scalars(out, x, several, by_name):
    tl.store(out, tl.full([], x, tl.float64))
    tl.store(out + 1, tl.full([], several[0], tl.float64))
    tl.store(out + 2, tl.full([], by_name, tl.float64))


def test_scalars_arrive_in_fp32_as_in_a_compiled_kernel():
    """The audit (test_triton_compile.py) says that compiled kernels take them so; the interpreter must not hide it."""
    out = torch.zeros(3, dtype=torch.float64)
    store_scalars[(1,)](out, 0.1, (0.2,), by_name=0.3)
    assert out.tolist() == torch.tensor([0.1, 0.2, 0.3]).double().tolist()


def test_options_that_lost_their_fp64_would_be_seen(monkeypatch):
    x, t = torch.randn(4, 70, dtype=torch.float64), torch.randint(70, (4,))
    options = {"gamma": 1.7, "label_smoothing": 0.1, "reduction": "none"}
    right = cross_entropy(x, t, **options)
    monkeypatch.setattr("torchfast.losses.triton_launch.parts_of", lambda x, dtype: (x, 0.0, 0.0))
    forget_plans()
    assert ((cross_entropy(x, t, **options) / right - 1).abs() > 1e-10).all()
