"""Scores for online batch selection, by the model's own view of the rows.

A scorer takes the place of the weighting function in `make_step`, with a filter that acts on its scores and the method
`frozen()`, which leaves the scorer's parameters as they are:

    scorer = scoring.rho_loss(loss)
    train = make_step(loss, scorer, optimizer, None, frozen(), batch_size=b, filter=filters.top_k())
    state = train.init(rng, params, {"table": irreducible_losses}, model_state)

| scorer | score of row i | filter | parameters |
| --- | --- | --- | --- |
| `train_loss` | ℓ_i(θ) | `top_k()` | – |
| `gradient_norm` | norm of the gradient of ℓ_i in the last layer | `top_k()` | – |
| `log_gradient_norm` | its logarithm | `importance(unbiased=True)` | – |
| `irreducible_loss` | −IL_i | `top_k()` | {"table": IL, float32 `[N]`} |
| `rho_loss` | ℓ_i(θ) − IL_i | `top_k()` | {"table": IL, float32 `[N]`} |
| `entropy` | entropy of the model's prediction | `top_k()` | – |
| `by_id` | any number known beforehand | `top_k()` | {"table": float32 `[N]`} |

`frozen_proxy` and `trained_proxy` make any of them look at a small model instead of the one that is trained;
`scoring_loss` sets how BatchNorm normalises the scored rows, and in which precision.

Reference: Mindermann et al., "Prioritized training on points that are learnable, worth learning, and not yet learnt", ICML 2022,
  called RHO-LOSS here; sections, equations and figures are numbered as in its first version (RHOLS).
"""

from bilevel.selection.evaluation import Statistics as Statistics
from bilevel.selection.evaluation import scoring_loss as scoring_loss
from bilevel.selection.known_scores import by_id as by_id
from bilevel.selection.known_scores import irreducible_loss as irreducible_loss
from bilevel.selection.known_scores import look_up as look_up
from bilevel.selection.known_scores import rho_loss as rho_loss
from bilevel.selection.model_scores import entropies as entropies
from bilevel.selection.model_scores import entropy as entropy
from bilevel.selection.model_scores import gradient_norm as gradient_norm
from bilevel.selection.model_scores import last_layer_gradient_norms as last_layer_gradient_norms
from bilevel.selection.model_scores import log_gradient_norm as log_gradient_norm
from bilevel.selection.model_scores import train_loss as train_loss
from bilevel.selection.proxies import frozen_proxy as frozen_proxy
from bilevel.selection.proxies import frozen_proxy_params as frozen_proxy_params
from bilevel.selection.proxies import of_target as of_target
from bilevel.selection.proxies import trained_proxy as trained_proxy
from bilevel.selection.proxies import with_proxy as with_proxy
