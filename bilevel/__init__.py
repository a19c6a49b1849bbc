"""Learn which training data to use while a model trains: bilevel data weighting in JAX and Flax."""

from bilevel import acceleration as acceleration
from bilevel import diagnostics as diagnostics
from bilevel import estimators as estimators
from bilevel import filters as filters
from bilevel import linearization as linearization
from bilevel import methods as methods
from bilevel import scorers as scorers
from bilevel.linearization import Finite as Finite
from bilevel.linearization import Forward as Forward
from bilevel.methods import anograd as anograd
from bilevel.methods import dds as dds
from bilevel.methods import frozen as frozen
from bilevel.methods import implicit_cg as implicit_cg
from bilevel.methods import implicit_neumann as implicit_neumann
from bilevel.methods import learning_to_reweight as learning_to_reweight
from bilevel.methods import penalty as penalty
from bilevel.methods import soba as soba
from bilevel.methods import uniform as uniform
from bilevel.nn.meta_weight_net import MetaWeightNet as MetaWeightNet
from bilevel.nn.meta_weight_net import meta_weight_net as meta_weight_net
from bilevel.scorers import Scorer as Scorer
from bilevel.state import TrainState as TrainState
from bilevel.step import TrainStep as TrainStep
from bilevel.step import make_step as make_step
from bilevel.types import LossAux as LossAux
from bilevel.types import UserError as UserError
