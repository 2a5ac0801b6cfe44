"""Training one adapter: a plain loop that resumes bit for bit."""

from inlay.train.loop import Trained, train
from inlay.train.progress import Bar, Progress, Silent
from inlay.train.state import TrainError
from inlay.work import Work, open_work

__all__ = ["Bar", "Progress", "Silent", "TrainError", "Trained", "Work", "open_work", "train"]
