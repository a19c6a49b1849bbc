"""Running a training: the loop, checkpoints, metrics and run directories."""

from bilevel.training.checkpoints import Checkpoints as Checkpoints
from bilevel.training.config import LoopConfig as LoopConfig
from bilevel.training.feed import Data as Data
from bilevel.training.feed import Loader as Loader
from bilevel.training.feed import Source as Source
from bilevel.training.loop import OnSelected as OnSelected
from bilevel.training.loop import OnState as OnState
from bilevel.training.loop import TrainingDiverged as TrainingDiverged
from bilevel.training.loop import TrainResult as TrainResult
from bilevel.training.loop import train as train
from bilevel.training.metrics import MetricsWriter as MetricsWriter
from bilevel.training.metrics import read_metrics as read_metrics
from bilevel.training.programs import StepChoice as StepChoice
from bilevel.training.recorder import SequenceRecorder as SequenceRecorder
from bilevel.training.replay import Replay as Replay
from bilevel.training.replay import Snapshots as Snapshots
from bilevel.training.resident import Resident as Resident
from bilevel.training.run_dir import hold_run_dir as hold_run_dir
from bilevel.training.run_dir import prepare_run_dir as prepare_run_dir
from bilevel.training.sampled import Sampled as Sampled
from bilevel.training.transfer import load_sampler as load_sampler
from bilevel.training.transfer import load_sequence as load_sequence
from bilevel.training.transfer import save_sampler as save_sampler
from bilevel.training.transfer import save_sequence as save_sequence
from bilevel.training.two_stage import TwoStageData as TwoStageData
