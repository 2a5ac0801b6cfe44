"""TensorBoard logs, where asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from inlay.train.state import TrainError


class Log:
    """Writes points of the learning curve as scalars; does nothing without a folder."""

    def __init__(self, folder: Path | None, step: int) -> None:
        self.writer: Any = None
        if folder is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise TrainError("tensorboard logs need its package: pip install 'inlay[tensorboard]'") from None
            # points after `step` in an older log file are of steps that are now taken again
            self.writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, point: dict[str, Any]) -> None:
        """One point, every number in it but the step."""
        if self.writer is not None:
            for name, value in point.items():
                if name != "step":
                    self.writer.add_scalar(name, value, point["step"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.writer is not None:
            self.writer.close()
