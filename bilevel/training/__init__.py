"""Running a training: the loop, checkpoints, metrics, run directories and reports."""

from bilevel.training.checkpoints import Checkpoints as Checkpoints
from bilevel.training.config import LoopConfig as LoopConfig
from bilevel.training.feed import Data as Data
from bilevel.training.feed import Loader as Loader
from bilevel.training.loop import TrainingDiverged as TrainingDiverged
from bilevel.training.loop import TrainResult as TrainResult
from bilevel.training.loop import train as train
from bilevel.training.metrics import MetricsWriter as MetricsWriter
from bilevel.training.metrics import read_metrics as read_metrics
from bilevel.training.programs import StepChoice as StepChoice
from bilevel.training.report import Curve as Curve
from bilevel.training.report import Document as Document
from bilevel.training.report import Picture as Picture
from bilevel.training.report import RunRecord as RunRecord
from bilevel.training.report import write_report as write_report
from bilevel.training.resident import Resident as Resident
from bilevel.training.run_dir import hold_run_dir as hold_run_dir
from bilevel.training.run_dir import prepare_run_dir as prepare_run_dir
