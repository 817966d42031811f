"""How much memory what others send, or have written, may take in this process."""

from __future__ import annotations

from dataclasses import dataclass

import psutil


@dataclass
class ReceivingLimit:
    """A limit on what one message or entry unpacks to; workers set it by their own memory limit.

    A compressed frame of 32 bytes may say that it holds two gigabytes of zeros, and a tensor's strides
    that there is a terabyte between its elements. Both can be right, so what bounds them is what a
    worker has.

    Attributes
    ----------
    num_bytes : int
    """

    num_bytes: int

    def admit(self, num_bytes: int, what: str) -> None:
        """Raise ValueError for what takes more."""
        if num_bytes > self.num_bytes:
            raise ValueError(
                f"{what} would take {num_bytes} bytes here; at most {self.num_bytes} are given to what "
                "others send, half of this process's memory"
            )


RECEIVING = ReceivingLimit(psutil.virtual_memory().total // 2)
