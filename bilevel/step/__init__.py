"""Builds train steps from the parts."""

from bilevel.step.sampled import SampledFn as SampledFn
from bilevel.step.sampled import SampledState as SampledState
from bilevel.step.sampled import SampledStep as SampledStep
from bilevel.step.sampled import make_sampled_step as make_sampled_step
from bilevel.step.train_step import TrainStep as TrainStep
from bilevel.step.train_step import make_step as make_step
