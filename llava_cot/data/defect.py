"""What is wrong with a line of training data."""


class Defect(ValueError):
    """Why a line can't be trained on: a kind that lines are counted by, and what it is here."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"
