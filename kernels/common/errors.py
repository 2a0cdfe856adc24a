"""Bad input, said in one line."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input or a bad setting. The command line prints its message alone, without a traceback.

    `agreed`: every rank raises it with the same words, so the first one's are enough.
    """

    def __init__(self, *args: object, agreed: bool = False) -> None:
        super().__init__(*args)
        self.agreed = agreed
