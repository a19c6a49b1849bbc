"""Learn which training data to use while a model trains: bilevel data weighting in JAX and Flax."""

from bilevel import diagnostics as diagnostics
from bilevel import estimators as estimators
from bilevel import filters as filters
from bilevel import linearization as linearization
from bilevel import methods as methods
from bilevel.linearization import Finite as Finite
from bilevel.linearization import Forward as Forward
from bilevel.methods import anograd as anograd
from bilevel.methods import dds as dds
from bilevel.methods import frozen as frozen
from bilevel.methods import soba as soba
from bilevel.methods import uniform as uniform
from bilevel.state import TrainState as TrainState
from bilevel.step import TrainStep as TrainStep
from bilevel.step import make_step as make_step
from bilevel.types import LossAux as LossAux
from bilevel.types import UserError as UserError
