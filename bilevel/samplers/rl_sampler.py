"""RLSampler: a recurrent policy over all rows, learned by REINFORCE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel import trees
from bilevel.samplers import networks
from bilevel.samplers.base import Sampler, check_sizes
from bilevel.samplers.draws import draw_each
from bilevel.samplers.networks import Carry, SamplerParams, Sizes
from bilevel.samplers.reinforce import Window, policy_loss
from bilevel.selection.metrics import weight_metrics
from bilevel.types import Array, Metrics, UserError


class RLSamplerState(NamedTuple):
    """All that the sampler keeps, and goes on from when restored."""

    step: Array
    """int32 scalar: iterations done."""
    params: SamplerParams
    """φ. Changed every `update_every` iterations."""
    opt_state: optax.OptState
    logger: Carry
    """h_η: states of the history logger; 0 after each update of φ."""
    policy: Carry
    """h_π: states of the policy network; 0 after each update of φ."""
    summary: Array
    """s_t `[S]`, what the next batch is drawn by."""
    window: Window
    """What REINFORCE needs of the iterations since the last update of φ."""
    baseline: Array
    """float32 scalar: the moving average of the rewards."""
    rng: Array
    """A typed key. It never changes: iteration t draws from `fold_in(rng, t)`."""


def rl_sampler(
    num_rows: int,
    batch_size: int,
    num_outputs: int,
    *,
    update_every: int = 100,
    reward_every: int = 20,
    summary_size: int = 64,
    logger_size: int = 256,
    policy_size: int = 64,
    reward_scale: float = 2.0,
    baseline_rate: float = 0.1,
    initial_baseline: float | None = None,
    entropy_bonus: float = 0.0,
    learning_rate: float = 0.04,
    optimizer: optax.GradientTransformation | None = None,
    logger_linear_scale: float = 1e-3,
    policy_linear_scale: float = 1e-5,
    learns: bool = True,
    dtype: Any = jnp.float32,
) -> Sampler:
    """Draw rows from a learned policy that sees the model's recent outputs.

    It sees a summary of them.

    After each θ-update t, on the batch's logits l_t (`[k, d]`, no derivative passes through them):

        s_{t+1}, h_η ← η(mean of l_t over the batch, h_η)                       history logger, equation (3)
        l^π_i, h_π ← π(s_t, h_π);  b_{t,i} ~ softmax(l^π_i), i = 1…k            policy over N rows, equation (4)
        r = exp(−2·L_val);  β ← λ·r + (1 − λ)·β;  A = r − β                     every T2, equation (5)
        φ ← Adam(∇ Σ_m A_m Σ_l (1/k) Σ_i −log p(b_{t,i}));  h_η, h_π ← 0        every T1, equation (6)

    The linear weights start so close to 0 that the first draws are uniform to rounding. There are no epochs. The logits
    `[k, N]` of an iteration are in memory at once; the gradient recomputes them, one iteration after the other (`reinforce`).

    Where the paper leaves a choice:
      * draws are independent given the summary, so a row may occur twice in a batch: nothing in section 3.2 forbids it;
      * h_π runs on from the last draw of a batch to the first of the next (the sampler is "an iterator"), until a reset;
      * an update resets h_η and h_π, not s: the first batch after it is drawn by the summary of the parameters before it, a
        constant in the gradient (algorithm 1, lines 6 and 13); the very first summary is 0;
      * β contains the reward at hand, as section 3.3 writes it, so that A = (1 − λ)(r − previous β); the previous β of the
        first reward is not given: see `initial_baseline`;
      * weight matrices are initialised as a whole, the four gates of a cell together, with Xavier's uniform distribution;
        the encoder of the policy network is as wide as its states;
      * `learns=False` ("fixed RLSampler") still resets the states every T1, as it was trained with that.

    Args:
      num_rows: N = |Xt|, the rows to draw from (not those of the validation set).
      batch_size: k.
      num_outputs: d, outputs of the model for one row (axes beyond the first are flattened).
      update_every: T1 (table 5: 100).
      reward_every: T2, divides T1 (table 5: 20).
      summary_size: dim(s) (table 5: 64).
      logger_size: dim(h_η), of each cell (table 5: 256).
      policy_size: dim(h_π), of each cell (table 5: 64).
      reward_scale: the 2 of exp(−2·L_val) (equation 5).
      baseline_rate: λ, the share of the newest reward in the baseline (section 3.3, table 5: 0.1).
      initial_baseline: the baseline before the first reward; None takes the first reward, whose advantage is then 0.
      entropy_bonus: λ ≥ 0 (ours; the paper has none): the policy also raises λ times the entropy of what it draws from, in nats,
        summed over the iterations of an update. Without it rewards of noise alone narrow a policy.
      learning_rate: of Adam with β₁ = 0.9, β₂ = 0.999, ε = 1e-8, constant (table 5: 0.04).
      optimizer: replaces Adam.
      logger_linear_scale: standard deviation of the first weights of the history logger's decoder (A.1: 1e-3).
      policy_linear_scale: the same of the policy network's encoder and decoder (A.1: 1e-5).
      learns: False never changes φ, asks for no rewards and keeps no window: for parameters that another run learned.
      dtype: of parameters and states.

    Returns:
      A sampler. Metrics: effective_sample_size, weight_entropy and largest_weight of the batch's mean distribution over all
      rows; reward, baseline and advantage; policy_loss and sampler_gradient_norm.

    Raises:
      UserError: for values out of range.

    Reference: "Adaptive Dataset Sampling by Deep Policy Gradient", submitted to ICLR 2021, sections 3.2 and 3.3, appendix A.
    """
    check_sizes(num_rows, batch_size)
    sizes = Sizes(num_rows, batch_size, num_outputs, summary_size, logger_size, policy_size)
    rates = _Rates(update_every, reward_every, reward_scale, baseline_rate, initial_baseline, entropy_bonus)
    scales = (logger_linear_scale, policy_linear_scale)
    tx = (optimizer or optax.adam(learning_rate, b1=0.9, b2=0.999, eps=1e-8)) if learns else optax.identity()
    parts = _Parts(sizes, rates, scales, tx, learns, dtype)
    return Sampler(
        parts.init,
        parts.draw,
        num_rows,
        batch_size,
        parts.observe,
        parts.reward if learns else None,
        parts.learn if learns else parts.reset,
        reward_every,
        update_every,
    )


@dataclass(frozen=True)
class _Rates:
    update_every: int
    reward_every: int
    reward_scale: float
    baseline_rate: float
    initial_baseline: float | None
    entropy_bonus: float

    def __post_init__(self) -> None:
        if self.reward_every < 1 or self.update_every < 1 or self.update_every % self.reward_every:
            raise UserError(
                f"reward_every={self.reward_every} must divide update_every={self.update_every}, both at least 1."
            )
        if not 0 <= self.baseline_rate < 1:
            raise UserError(f"baseline_rate={self.baseline_rate} must lie in [0, 1): with 1 all advantages are 0.")
        if self.reward_scale <= 0:
            raise UserError(f"reward_scale={self.reward_scale} must be positive.")
        if self.entropy_bonus < 0:
            raise UserError(f"entropy_bonus={self.entropy_bonus} must not be negative: 0 is none.")


@dataclass(frozen=True, eq=False)
class _Parts:
    """The pure functions of the sampler."""

    sizes: Sizes
    rates: _Rates
    scales: tuple[float, float]
    optimizer: optax.GradientTransformation
    learns: bool
    dtype: Any

    def init(self, rng: Array, params: Any = None) -> RLSamplerState:
        for_params, for_draws = jax.random.split(rng)
        if params is None:
            params = networks.init_params(for_params, self.sizes, self.scales, self.dtype)
        else:
            wanted = jax.eval_shape(lambda: networks.init_params(rng, self.sizes, self.scales, self.dtype))
            networks.check_params(params, wanted)
            params = jax.tree.map(jnp.copy, params)
        summary = jnp.zeros(self.sizes.summary, self.dtype)
        return RLSamplerState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=jax.tree.map(jnp.copy, self.optimizer.init(params)),
            logger=networks.zero_carry(params.logger),
            policy=networks.zero_carry(params.policy),
            summary=summary,
            window=self._empty_window(),
            baseline=jnp.asarray(self.rates.initial_baseline or 0.0, self.dtype),
            rng=for_draws,
        )

    def draw(self, state: RLSamplerState) -> tuple[Array, RLSamplerState, Metrics]:
        logits, policy = networks.propose(state.params.policy, state.summary, state.policy, self.sizes.batch)
        key = jax.random.fold_in(state.rng, state.step)
        chances = jax.nn.softmax(trees.widen(logits), axis=-1)
        rows = draw_each(key, chances)
        window = state.window
        if self.learns:
            window = window._replace(draws=window.draws.at[self._place(state.step)].set(rows))
        return rows, state._replace(policy=policy, window=window), weight_metrics(jnp.log(jnp.mean(chances, axis=0)))

    def observe(self, state: RLSamplerState, outputs: Array) -> RLSamplerState:
        if outputs.shape[0] != self.sizes.batch or outputs.size != self.sizes.batch * self.sizes.outputs:
            raise UserError(
                f"The model's outputs have the shape {outputs.shape}, but the sampler was made for batch_size="
                f"{self.sizes.batch} rows of num_outputs={self.sizes.outputs}: make them equal."
            )
        flat = jax.lax.stop_gradient(outputs).reshape(self.sizes.batch, -1)
        observed = jnp.mean(trees.widen(flat), axis=0).astype(self.dtype)
        summary, logger = networks.log_history(state.params.logger, observed, state.logger)
        window = state.window
        if self.learns:
            window = window._replace(observed=window.observed.at[self._place(state.step)].set(observed))
        return state._replace(step=state.step + 1, logger=logger, summary=summary, window=window)

    def reward(self, state: RLSamplerState, validation_loss: Array) -> tuple[RLSamplerState, Metrics]:
        rates, window = self.rates, state.window
        reward = jnp.exp(-rates.reward_scale * validation_loss).astype(self.dtype)
        before = state.baseline
        if rates.initial_baseline is None:
            before = jnp.where(state.step <= rates.reward_every, reward, before)
        baseline = rates.baseline_rate * reward + (1 - rates.baseline_rate) * before
        period = self._place(state.step - 1) // rates.reward_every
        window = window._replace(advantages=window.advantages.at[period].set(reward - baseline))
        metrics = {"reward": reward, "baseline": baseline, "advantage": reward - baseline}
        return state._replace(baseline=baseline, window=window), metrics

    def learn(self, state: RLSamplerState) -> tuple[RLSamplerState, Metrics]:
        params: Any = state.params
        loss, gradient = jax.value_and_grad(policy_loss)(params, state.window, self.rates.entropy_bonus)
        updates, opt_state = self.optimizer.update(gradient, state.opt_state, params)
        moved: Any = optax.apply_updates(params, updates)
        state, _ = self.reset(state._replace(params=moved, opt_state=opt_state))
        return state, {"policy_loss": loss, "sampler_gradient_norm": trees.norm(gradient)}

    def reset(self, state: RLSamplerState) -> tuple[RLSamplerState, Metrics]:
        """Begin a window: zero states, and a summary that stays as it is."""
        zeros = jax.tree.map(jnp.zeros_like, (state.logger, state.policy))
        window = state.window._replace(summary=state.summary)
        return state._replace(logger=zeros[0], policy=zeros[1], window=window), {}

    def _place(self, step: Array) -> Array:
        return step % self.rates.update_every

    def _empty_window(self) -> Window:
        rates, length = self.rates, self.rates.update_every if self.learns else 0
        return Window(
            summary=jnp.zeros(self.sizes.summary, self.dtype),
            draws=jnp.zeros((length, self.sizes.batch), jnp.int32),
            observed=jnp.zeros((length, self.sizes.outputs), self.dtype),
            advantages=jnp.zeros(length // rates.reward_every, self.dtype),
        )
