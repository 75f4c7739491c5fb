"""The op's tensors from those of the caller, and what is refused."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from torchfast._common import (
    BOOL,
    FLOAT8,
    INTEGERS,
    REALS,
    check,
    check_device,
    check_logits,
    check_tensor,
    readable,
)
from torchfast.metrics._common import check_no_gradient, check_shape
from torchfast.metrics.ranking.group import group_by_query
from torchfast.metrics.ranking.options import Options
from torchfast.metrics.ranking.reference import Documents, documents_of, labels_of, ragged
from torchfast.metrics.ranking.values import DCG, GAINS, NDCG

Unretrieved = Tensor | tuple[Tensor, Tensor]

# ---- Arguments -------------------------------------------------------------------------------


def _without_graph(x: Tensor) -> Tensor:
    return x.detach() if x.requires_grad else x  # detach() alone takes a tenth of the checks' time


def _check_integer(name: str, x: Tensor, shape: tuple[int, ...] | None, preds: Tensor) -> Tensor:
    check_tensor(name, x, INTEGERS, "a tensor of an integer dtype")
    possessive = "'" if name.endswith("s") else "'s"
    if shape is not None:
        check(f"{name}{possessive} shape", x.shape == shape, tuple(x.shape), tuple(shape))
    check_device(name, x, "preds", preds)
    return x.long()


#: A target may have these dtypes, which the kernels do not take: they are converted.
_CONVERTED = {
    torch.uint16: torch.long,
    torch.uint32: torch.long,
    torch.uint64: torch.double,
    **dict.fromkeys(FLOAT8, torch.float32),
}


def check_labels(name: str, target: Tensor, options: Options) -> Tensor:
    """Returns the target in a dtype that the kernels take."""
    check_tensor(name, target, REALS, "a tensor of bool, integers or floats", jagged=True)
    if GAINS[options.gain] == "table" and target.is_floating_point():
        raise TypeError(f"{name} must be bool or integers, places in the gain table, got {target.dtype}")
    target = _without_graph(target)
    dtype = _CONVERTED.get(target.dtype)
    return target if dtype is None else target.to(dtype)


def from_jagged(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the values and offsets of a nested tensor, with its holes closed."""
    check(f"dimensions of {name}", x.dim() == 2, x.dim(), "2, (queries, documents of each)")
    values, offsets, lengths = x.values(), x.offsets(), x.lengths()  # type: ignore[attr-defined]
    if lengths is not None:
        if lengths.is_meta:
            raise NotImplementedError(f"{name} must have values or no holes: on meta they have no number of documents")
        starts, offsets = offsets[:-1], torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        index = torch.arange(int(offsets[-1]), device=values.device)
        values = values[index + (starts - offsets[:-1]).repeat_interleave(lengths)]
    return values, offsets


class Inputs(NamedTuple):
    """The tensors of the op, in its order."""

    preds: Tensor
    target: Tensor
    offsets: Tensor | None
    mask: Tensor | None
    lengths: Tensor | None
    num_relevant: Tensor | None
    unretrieved: Tensor | None
    unretrieved_offsets: Tensor | None


def check_inputs(
    options: Options,
    preds: Tensor,
    target: Tensor,
    offsets: Tensor | None,
    indexes: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    num_relevant: Tensor | None,
    unretrieved: Unretrieved | None,
) -> Inputs:
    check_logits("preds", preds, jagged=True)
    target = check_labels("target", target, options)
    check_no_gradient("ranking metrics", preds)
    preds = _without_graph(preds)
    boundaries = ("offsets", offsets), ("indexes", indexes), ("lengths", lengths)
    given = [name for name, x in boundaries if x is not None]
    check("query boundaries", len(given) <= 1, " and ".join(given), "said one way: by offsets, indexes or lengths")
    if preds.is_nested or target.is_nested:
        given += ["mask"] * (mask is not None)
        check("preds and target", preds.is_nested and target.is_nested, "one of them", "nested both or neither")
        check("query boundaries", not given, given, "left out for nested tensors, which have them")
        (preds, offsets), (target, of_target) = from_jagged("preds", preds), from_jagged("target", target)
        same = offsets.shape == of_target.shape and target.shape == preds.shape
        if same and offsets is not of_target and readable(offsets):
            same = torch.equal(offsets, of_target)
        if not same:
            raise ValueError("target must be nested with the lengths of preds, got others")
    check_shape("target", target, preds)
    check_device("target", target, "preds", preds)
    if mask is not None:
        check_tensor("mask", mask, BOOL, "a bool tensor, True for documents and False for padding")
        check_shape("mask", mask, preds)
        check("mask", lengths is None, "both", "left out where lengths are given")
        check_device("mask", mask, "preds", preds)
    if indexes is not None:
        indexes = _check_integer("indexes", indexes, preds.shape, preds).reshape(-1)
        preds, target = preds.reshape(-1), target.reshape(-1)
        # A graph cannot depend on values, and a GPU moves the documents while the host would wait for the answer.
        skip_sorted = preds.device.type == "cpu" and not torch.compiler.is_compiling()
        order, offsets, _ = group_by_query(indexes, skip_sorted=skip_sorted)
        mask = None if mask is None else mask.reshape(-1)
        if not skip_sorted or order.numel():
            preds, target = preds[order], target[order]
            mask = None if mask is None else mask[order]
    elif offsets is not None:
        check("preds' shape", preds.dim() == 1, tuple(preds.shape), "(documents of all queries,) with offsets")
        offsets = _check_integer("offsets", offsets, None, preds)
        check("offsets' shape", offsets.dim() == 1 and len(offsets) > 0, tuple(offsets.shape), "(queries + 1,)")
        if readable(offsets):
            ends, total = (int(offsets[0]), int(offsets[-1])), len(preds)
            check("first and last of offsets", ends == (0, total), ends, f"0 and {total}, the number of documents")
    elif preds.dim() != 2:
        hint = "; flat preds need offsets or indexes, a single query is preds[None]" if preds.dim() == 1 else ""
        raise ValueError(f"preds' shape must be (queries, documents), got {tuple(preds.shape)}{hint}")
    queries = preds.shape[0] if offsets is None else offsets.shape[0] - 1
    if lengths is not None:
        lengths = _check_integer("lengths", lengths, (queries,), preds)
    if num_relevant is not None:
        num_relevant = _check_integer("num_relevant", num_relevant, (queries,), preds)
    judged = unretrieved_offsets = None
    if unretrieved is not None:
        judged, unretrieved_offsets = _check_unretrieved(options, unretrieved, queries, preds)
    return Inputs(preds, target, offsets, mask, lengths, num_relevant, judged, unretrieved_offsets)


def _check_unretrieved(
    options: Options, unretrieved: Unretrieved, queries: int, preds: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the targets as values and offsets."""
    if isinstance(unretrieved, (tuple, list)):
        check("unretrieved's length", len(unretrieved) == 2, len(unretrieved), "2: values and offsets")
        values, offsets = unretrieved
        values = check_labels("unretrieved", values, options)
        check("unretrieved values' shape", values.dim() == 1, tuple(values.shape), "(targets of all queries,)")
    else:
        values = check_labels("unretrieved", unretrieved, options)
        if values.is_nested:
            values, offsets = from_jagged("unretrieved", values)
        else:
            good = values.dim() == 2 and len(values) == queries
            check("unretrieved's shape", good, tuple(values.shape), f"({queries}, targets of each query)")
            offsets = torch.arange(queries + 1, device=values.device) * values.shape[1]
            values = values.reshape(-1)
    check_device("unretrieved", values, "preds", preds)
    return values, _check_integer("unretrieved's offsets", offsets, (queries + 1,), preds)


# ---- What is wrong with the values: looked for where a metric came out as NaN ------------------


def refuse_labels(name: str, target: Tensor, documents: Documents, options: Options) -> None:
    y = target.reshape(-1)
    real = y.double()
    wrong = documents.valid & ~((real >= 0) & (real < torch.inf))
    allowed = "finite and >= 0" + " (padding is said with mask or lengths)" * (name != "relevance")
    if options.table is not None and not wrong.any():
        wrong = documents.valid & (real >= len(options.table))
        allowed = f"below {len(options.table)}, the length of the gain table"
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ValueError(f"{name} must be {allowed}, got {y[at].item()} in query {int(documents.query[at])}")
    if DCG in options.kinds or NDCG in options.kinds:
        _refuse_gains(name, target, documents, options)


def _refuse_gains(name: str, target: Tensor, documents: Documents, options: Options) -> None:
    """A sum of gains that overflows makes a dcg infinite and an ndcg NaN."""
    table = None if options.table is None else options.table.to(target.device)
    gain = labels_of(target, documents.valid, options.gain, table, options.threshold).gain
    sums = gain.new_zeros(len(documents.bad)).index_add_(0, documents.query, gain)
    if sums.isfinite().all():
        return
    q, most = int((~sums.isfinite()).nonzero()[0]), torch.finfo(gain.dtype).max
    largest = target.reshape(-1)[documents.valid & (documents.query == q)].max().item()
    allowed = f"have gains whose sum in a query is at most {most:.2g}"
    if GAINS[options.gain] == "exp":
        allowed += f" (with gain='exp' they are 2^target - 1, so targets below {round(math.log2(most))})"
    raise ValueError(f"{name} must {allowed}, got {largest} in query {q}")


def _refuse_offsets(name: str, offsets: Tensor, total: int) -> None:
    wrong = (offsets[:-1] < 0) | (offsets[1:] < offsets[:-1]) | (offsets[1:] > total)
    if wrong.any():
        q = int(wrong.nonzero()[0])
        given = f"{int(offsets[q])} and then {int(offsets[q + 1])} for query {q}"
        raise ValueError(f"{name} must not decrease and stay within 0 and {total}, got {given}")


def refuse(inputs: Inputs, options: Options) -> None:
    """Raises if the values of an argument are to blame; a NaN score alone is not unless nan="error"."""
    preds, target, offsets, mask, lengths, num_relevant, unretrieved, unretrieved_offsets = inputs
    if offsets is not None:
        _refuse_offsets("offsets", offsets, len(preds))
    if lengths is not None:
        wrong = (lengths < 0) | (lengths > preds.shape[1])
        if wrong.any():
            given = int(lengths[wrong][0])
            raise ValueError(f"lengths must be from 0 to {preds.shape[1]}, the documents of a row, got {given}")
    documents = documents_of(preds, offsets, mask, lengths)
    refuse_labels("target", target, documents, options)
    if unretrieved is not None and unretrieved_offsets is not None:
        _refuse_offsets("unretrieved's offsets", unretrieved_offsets, len(unretrieved))
        refuse_labels("unretrieved", unretrieved, ragged(unretrieved_offsets, len(unretrieved)), options)
    missing = documents.valid & preds.reshape(-1).isnan()
    if num_relevant is not None:
        y = target.reshape(-1)
        relevant = documents.valid & (y >= options.threshold if options.threshold else y > 0)
        found = torch.zeros_like(num_relevant).index_add_(0, documents.query, relevant.long())
        short = (num_relevant < found).nonzero().flatten()
        if len(short):
            q = int(short[0])
            counted = f"{int(num_relevant[q])} in query {q}, where {int(found[q])} are retrieved"
            raise ValueError(f"num_relevant must count all relevant documents, got {counted}")
    if options.nan == "error" and missing.any():
        q = int(documents.query[missing.nonzero()[0]])
        raise ValueError(f"preds must not hold NaN with nan='error', got one in query {q}")
