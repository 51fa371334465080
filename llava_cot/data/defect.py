"""The defect of a line of training data."""


class Defect(ValueError):
    """The reason why a line cannot be trained on: a kind, by which lines are counted, and a detail."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"
