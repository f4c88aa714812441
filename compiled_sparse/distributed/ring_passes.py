"""Forward and backward pass of ring attention on one rank."""

from __future__ import annotations

import torch
from torch import Tensor

from compiled_sparse.distributed.ring_call import RingCall
from compiled_sparse.distributed.ring_exchange import Pair
from compiled_sparse.distributed.ring_exchange import RingExchange
from compiled_sparse.distributed.ring_messages import Messages
from compiled_sparse.distributed.ring_schedule import Message
from compiled_sparse.distributed.ring_schedule import Part
from compiled_sparse.distributed.ring_schedule import Step
from compiled_sparse.distributed.ring_schedule import backward_messages
from compiled_sparse.ops.tensors import compute_dtype

Gradients = tuple[Tensor, Tensor, Tensor]


def merged(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> Pair:
    """Merge attention over two disjoint sets of keys; a query without keys has 0 and -inf.

    Args:
        out: [..., head_dim], in the dtype of sums.
        lse: [...], the log-sum-exp of its scores.
        other: Like `out`, over other keys; any dtype.
        other_lse: Like `lse`.
    """
    total = torch.logaddexp(lse, other_lse)
    # Where there are no keys the difference would be one of infinities.
    base = total.masked_fill(total == float("-inf"), 0.0)
    mine, theirs = (lse - base).exp()[..., None], (other_lse - base).exp()[..., None]
    return out * mine + other.to(out.dtype) * theirs, total


def ring_forward(
    call: RingCall, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the output of the own queries, [batch, heads, length, head_dim], and the lse."""
    attention = torch.ops.compiled_sparse.block_sparse_attention
    steps, messages = call.steps, Messages(call.group, k)
    exchange = RingExchange(call, messages, (k, v))
    if steps:
        exchange.start(Message(keys=steps[0]))
    out, lse = attention(q, k, v, *call.kernel_arguments(call.own, key_mask, q.device))
    out = out.to(compute_dtype(v))
    for number, step in enumerate(steps):
        keys, _ = exchange.finish()
        if number + 1 < len(steps):
            exchange.start(Message(keys=steps[number + 1]))
        part = call.part(step)
        if part is not None and keys is not None:
            rows, lse_rows = call.queries(out, part), call.queries(lse, part)
            arguments = call.kernel_arguments(part, key_mask, q.device)
            found = merged(rows, lse_rows, *attention(call.queries(q, part), *keys, *arguments))
            rows.copy_(found[0])
            lse_rows.copy_(found[1])
    if call.shares_text:
        _merge_texts(call, messages, out, lse)
    return out.to(v.dtype), lse


def _merge_texts(call: RingCall, messages: Messages, out: Tensor, lse: Tensor) -> None:
    """Merge the text's attention over every rank's keys; all ranks add in one order."""
    values, sums = torch.cat(call.texts(out), dim=2), torch.cat(call.texts(lse), dim=2)
    parts = messages.gather(torch.cat([values, sums.to(values.dtype)[..., None]], dim=-1))
    values, sums = parts[0, ..., :-1], parts[0, ..., -1]
    for other in parts[1:].unbind():
        values, sums = merged(values, sums, other[..., :-1], other[..., -1])
    call.put_texts(out, values)
    call.put_texts(lse, sums)


class RingBackward:
    """The backward pass; gradients are summed in float32, or float64.

    Args:
        call: Geometry and ranks.
        saved: q, k, v, the output and the log-sum-exp.
        key_mask: The mask of the whole sequence.
    """

    def __init__(self, call: RingCall, saved: tuple[Tensor, ...], key_mask: Tensor | None) -> None:
        self._call = call
        self._q, self._k, self._v, self._out, self._lse = saved
        self._key_mask = key_mask

    def run(self, grad_out: Tensor) -> Gradients:
        """Return the gradients of q, k and v.

        Args:
            grad_out: That of the own output.
        """
        call, steps = self._call, self._call.steps
        messages = Messages(call.group, grad_out)
        if call.shares_text:
            grad_out = grad_out.clone()
            texts = torch.cat(call.texts(grad_out), dim=2).to(compute_dtype(grad_out))
            call.put_texts(grad_out, messages.sum(texts))
        exchange = RingExchange(call, messages, (self._k, self._v))
        if steps:
            exchange.start(Message(keys=steps[0]))
        whole = (self._q, self._out, self._lse, grad_out)
        own = self._of_part(call.own, whole, (self._k, self._v))
        totals = [each.to(compute_dtype(each)) for each in own]
        self._go_round(exchange, totals, whole)
        q, k, v = (each.to(self._q.dtype) for each in totals)
        return q, k, v

    def _go_round(
        self, exchange: RingExchange, totals: list[Tensor], whole: tuple[Tensor, ...]
    ) -> None:
        """Add what other ranks' keys give, and what other ranks find for the own keys."""
        call = self._call
        plan = backward_messages(call.steps)
        found: dict[Step | None, Pair] = {}
        for place, message in enumerate(plan):
            keys, gradients = exchange.finish()
            following = plan[place + 1] if place + 1 < len(plan) else None
            # Only the last step's gradients are not there yet.
            waits = following is not None and following.home == message.keys
            if following is not None and not waits:
                exchange.start(following, found.pop(following.home, None))
            self._add_home(totals, message, gradients)
            part = None if message.keys is None else call.part(message.keys)
            if message.keys is not None and part is not None and keys is not None:
                rows = tuple(call.queries(each, part) for each in whole)
                grad_q, *of_keys = self._of_part(part, rows, keys)
                call.queries(totals[0], part).add_(grad_q)
                found[message.keys] = of_keys[0], of_keys[1]
            if following is not None and waits:
                exchange.start(following, found.pop(following.home, None))

    def _add_home(self, totals: list[Tensor], message: Message, gradients: Pair | None) -> None:
        """Add gradients of own keys, which another rank has computed."""
        sent = None if message.home is None else message.home.sent_by(self._call.group.rank)
        if sent is None or gradients is None:
            return
        _, part = sent
        for total, gradient in zip(totals[1:], gradients, strict=True):
            self._call.layers(total, part.key_first, part.count).add_(gradient)

    def _of_part(self, part: Part, rows: tuple[Tensor, ...], keys: Pair) -> Gradients:
        """Return the gradients by one part: with the lse over all keys, parts only add up."""
        q, out, lse, grad_out = rows
        arguments = self._call.kernel_arguments(part, self._key_mask, q.device)
        backward = torch.ops.compiled_sparse.block_sparse_attention_backward
        found: Gradients = backward(grad_out, None, q, *keys, out, lse, *arguments)
        return found
