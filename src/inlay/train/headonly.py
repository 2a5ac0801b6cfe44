"""A task head that is trained alone, on the features that reach it: these are computed once per row."""

from __future__ import annotations

from torch import Tensor, nn

from inlay.data.chat import IGNORED
from inlay.evaluate.predict import Output
from inlay.train.frozen import CHUNK, STATES, Frozen, Reached, Say, reached
from inlay.train.store import Room
from inlay.work import Work


def silent(text: str) -> None:
    """Tells nobody."""


class HeadOnly(Frozen):
    """The head on the features that reach it."""

    def __init__(self, work: Work, path: str, room: Room | None = None, chunk: int = CHUNK, say: Say = silent) -> None:
        self.path, self.head = path, work.model.get_submodule(path)
        super().__init__(work, room or Room(), chunk, say)

    @property
    def name(self) -> str:
        return f"what enters '{self.path}'"

    @property
    def place(self) -> nn.Module:
        return self.head

    def inputs(self, rows: int) -> dict[str, Tensor]:
        return {}

    def above(self, batch: dict[str, Tensor]) -> Output:
        with self.work.computing():
            logits = self.head(batch[STATES])
            if self.work.task == "regression":
                loss = nn.functional.mse_loss(logits.squeeze(-1), batch["labels"].to(logits.dtype))
            else:
                loss = nn.functional.cross_entropy(logits, batch["labels"], ignore_index=IGNORED)
        return Output(loss, logits)

    def seen(self, batch: dict[str, Tensor]) -> Tensor:
        inputs: list[Tensor] = []

        def stop(module: nn.Module, args: tuple) -> None:
            inputs.append(args[0])
            raise Reached

        return reached(self.work, batch, self.head.register_forward_pre_hook(stop), inputs)
