"""The methods that learn the weighting network, one file each."""

from bilevel.methods.anograd import AnogradState as AnogradState
from bilevel.methods.anograd import anograd as anograd
from bilevel.methods.base import Method as Method
from bilevel.methods.base import MethodUpdate as MethodUpdate
from bilevel.methods.base import Problem as Problem
from bilevel.methods.dds import DDSState as DDSState
from bilevel.methods.dds import dds as dds
from bilevel.methods.fixed import frozen as frozen
from bilevel.methods.fixed import uniform as uniform
from bilevel.methods.implicit import ImplicitState as ImplicitState
from bilevel.methods.implicit import implicit_cg as implicit_cg
from bilevel.methods.implicit import implicit_neumann as implicit_neumann
from bilevel.methods.learning_to_reweight import learning_to_reweight as learning_to_reweight
from bilevel.methods.mentornet import MentorNetState as MentorNetState
from bilevel.methods.mentornet import mentornet as mentornet
from bilevel.methods.penalty import PenaltyState as PenaltyState
from bilevel.methods.penalty import penalty as penalty
from bilevel.methods.soba import SOBAState as SOBAState
from bilevel.methods.soba import soba as soba
from bilevel.methods.spcl import SPCLState as SPCLState
from bilevel.methods.spcl import spcl as spcl
