"""How many requests are answered at a time, and how many may wait."""

import asyncio


class QueueFull(Exception):
    """More requests are waiting than may wait."""


class Gate:
    """
    A number of slots and a queue before them. Admitted requests take memory for their body and what they named while
    they wait, for pictures and tensors once they hold a slot.

    Args:
        slots: requests prepared or answered at a time: some are being prepared, the others are rows of a batch.
        queue: requests that may wait.
    """

    def __init__(self, slots: int, queue: int):
        self._slots = asyncio.Semaphore(slots)
        self._capacity = slots + queue
        self.admitted = 0
        self.running = 0

    def check(self) -> None:
        """Raise QueueFull if nobody would be admitted."""
        if self.admitted >= self._capacity:
            raise QueueFull

    def admit(self) -> "Ticket":
        """A ticket for one request; release it in every case. Raises QueueFull."""
        self.check()
        self.admitted += 1
        return Ticket(self)


class Ticket:
    """The place of one request."""

    def __init__(self, gate: Gate):
        self._gate = gate
        self._holds_slot = False
        self._released = False

    async def take_slot(self) -> None:
        """Wait for the request's turn."""
        await self._gate._slots.acquire()
        self._holds_slot = True
        self._gate.running += 1

    def release(self) -> None:
        """Give place and slot back; a second time does nothing."""
        if self._released:
            return
        self._released = True
        self._gate.admitted -= 1
        if self._holds_slot:
            self._gate.running -= 1
            self._gate._slots.release()
