"""Samplers: the rows of a θ-update, chosen before anything is loaded."""

from bilevel.samplers.base import Sampler as Sampler
from bilevel.samplers.fixed import ReplayedState as ReplayedState
from bilevel.samplers.fixed import UniformState as UniformState
from bilevel.samplers.fixed import replayed as replayed
from bilevel.samplers.fixed import uniform as uniform
from bilevel.samplers.frequency import Frequencies as Frequencies
from bilevel.samplers.frequency import class_counts as class_counts
from bilevel.samplers.frequency import frequencies as frequencies
from bilevel.samplers.frequency import row_counts as row_counts
from bilevel.samplers.language_rounds import LanguagesState as LanguagesState
from bilevel.samplers.language_scorer import Fitted as Fitted
from bilevel.samplers.language_scorer import ScorerParams as ScorerParams
from bilevel.samplers.language_scorer import fit_scorer as fit_scorer
from bilevel.samplers.language_scorer import scorer_gain as scorer_gain
from bilevel.samplers.languages import fixed_languages as fixed_languages
from bilevel.samplers.languages import multilingual_dds as multilingual_dds
from bilevel.samplers.networks import SamplerParams as SamplerParams
from bilevel.samplers.reinforce import Window as Window
from bilevel.samplers.reinforce import log_probabilities as log_probabilities
from bilevel.samplers.reinforce import policy_loss as policy_loss
from bilevel.samplers.rl_sampler import RLSamplerState as RLSamplerState
from bilevel.samplers.rl_sampler import rl_sampler as rl_sampler
