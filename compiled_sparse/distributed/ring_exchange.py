"""Keys on their way to those who need them, and their gradients on the way back."""

from __future__ import annotations

from torch import Tensor

from compiled_sparse.distributed.ring_call import RingCall
from compiled_sparse.distributed.ring_messages import Messages
from compiled_sparse.distributed.ring_messages import Shape
from compiled_sparse.distributed.ring_schedule import Message
from compiled_sparse.distributed.ring_schedule import Step

Pair = tuple[Tensor, Tensor]


class RingExchange:
    """The messages of one pass: each brings a step's keys, takes a step's gradients home, or both.

    Args:
        call: Geometry and ranks.
        messages: Transport.
        keys: Two tensors [batch, key heads, length, head_dim] that go round together.
    """

    def __init__(self, call: RingCall, messages: Messages, keys: Pair) -> None:
        self._call = call
        self._messages = messages
        self._keys = keys
        self._brings_keys = False

    def start(self, message: Message, gradients: Pair | None = None) -> None:
        """Start a message.

        Args:
            message: Which step's keys it brings, and which step's gradients it takes home.
            gradients: Those of the keys that the step had brought here, if any.
        """
        outgoing, incoming = self._of_keys(message.keys)
        self._brings_keys = bool(incoming)
        if message.home is not None:
            part, sent = self._call.part(message.home), message.home.sent_by(self._call.group.rank)
            if part is not None and gradients is not None:
                outgoing += [(part.source, each) for each in gradients]
            if sent is not None:
                receiver, theirs = sent
                incoming += [(receiver, self._shape(theirs.count))] * 2
        self._messages.start(outgoing, incoming)

    def _of_keys(
        self, step: Step | None
    ) -> tuple[list[tuple[int, Tensor]], list[tuple[int, Shape]]]:
        """Return the own keys that a step sends, and the shapes of those it brings."""
        outgoing, incoming = [], []
        sent = None if step is None else step.sent_by(self._call.group.rank)
        if sent is not None:
            receiver, theirs = sent
            keys = [self._call.layers(x, theirs.key_first, theirs.count) for x in self._keys]
            outgoing = [(receiver, each) for each in keys]
        part = None if step is None else self._call.part(step)
        if part is not None:
            incoming = [(part.source, self._shape(part.count))] * 2
        return outgoing, incoming

    def finish(self) -> tuple[Pair | None, Pair | None]:
        """Wait for the message, and return the keys and the gradients that it brought here."""
        received = self._messages.finish()
        keys = (received[0], received[1]) if self._brings_keys else None
        gradients = received[2:] if self._brings_keys else received
        return keys, (gradients[0], gradients[1]) if gradients else None

    def _shape(self, layers: int) -> Shape:
        batch, heads, _, head_dim = self._keys[0].shape
        return batch, heads, layers * self._call.pattern.layer_tokens, head_dim
