"""Interdomain Attention, and the other cells of the paper's ablation by what their state reads and how it is read.

mixer          input of the state   readout   RoPE on
interdomain    [xi(k), v]           queries   q, k      (interdomain_norope: -)
single_query   [a, b]               queries   q, a      (single_query_norope: -)
dual_linear    [xi(k), v]           linear    k         (dual_linear_norope: -)
s4d            [a, b]               linear    -         (s4d_rope: a)

The two corners of this cube that the paper does not train are single_query_norope and dual_linear_norope.
"""

from flax import nnx

from idattn.config import ComputeConfig, ModelConfig, SSMConfig
from idattn.nn.adaptive import AdaptiveCore
from idattn.nn.readout import LinearReadout, QueryReadout
from idattn.nn.ssm import SSMCore, SSMMixer


class _Adaptable(SSMMixer):
    """A mixer that has a clock (`ssm.core`) and corrective writes (`ssm.write`) where it is asked for them."""

    @classmethod
    def core_type(cls, config: ModelConfig) -> type[SSMCore]:
        return AdaptiveCore if AdaptiveCore.controls(config) else SSMCore


class InterdomainAttention(_Adaptable):
    """The paper's layer (eq. 10-13) by itself, for use in any model: `y, state = layer(x)` with x and y (B, T, D).

    The layer computes in the dtype of x, a floating-point one. Parameters are float32; the state is float32, or float64
    if x is. Documents and an earlier state are arguments of the call: see `idattn.nn.Mixer.__call__`.

    Args:
      model_dim: D.
      num_heads: H, a divisor of D; heads are R = E = D / H wide, an even number with `rope`.
      rngs: the stream `params` is used.
      rope: rotary positions on queries and keys.
      compute: backend and chunk size; its other fields are not read.
      num_modes: M, basis functions of a state, at least 1.
      heads_per_kv: query heads that share a state, a divisor of H.
      conv_width: taps of the causal depthwise convolutions; 0 for none.
      feature_map: "silu_l2" (eq. 10); "none", the identity; or as many fixed random features as channels, "positive"
        of a Gaussian kernel or "softmax" of softmax's.
      input_norms: whether the state's inputs are normalised by eq. 12.
      core: "fixed", or "clock", whose steps depend on the tokens; see `idattn.ops.adaptive_attention`.
      write: "add", or "delta" or "damped", whose values correct what the state answers to their key; see there; a
        damped one needs the hermitian readout.
      readout: "transpose" (eq. 13), "hermitian" or "real"; see `idattn.ops.interdomain_attention`.
      a_init: the start of the modes' frequencies: "s4d_inv", crowded at low ones; "s4d_lin", pi n; or "uniform",
        2 pi n / (M Delta), with which a state tells the last M tokens apart.
      c: the form of C: "full" (M, M), "diagonal" (M,) or "identity" (no parameter).
      c_init: the start of C: "normal", complex normal, or "eye", a multiple of the identity.
      c_init_scale: total variance of an output mode of C at the start; for "eye" its square root is the multiple.
        Greater than 0.
      delta_min: the step sizes Delta start log-uniform in [delta_min, delta_max]. Greater than 0.
      delta_max: at least `delta_min`.
      rope_position: rotary positions "before" or "after" the feature map.
      denominator: divide by what the same readout makes of values of 1 (eq. 8), which the paper's layer leaves out; the
        state has a row more.
      output_gate: multiply the heads' outputs by SiLU(W_g x).
      norm_bias_init: start of the biases b_k, b_v of eq. 12.

    Raises:
      ValueError: sizes do not divide, or an option is unknown or out of its range.
    """

    feature_map, readout, rope = True, QueryReadout(), True

    def __init__(
        self,
        model_dim: int,
        num_heads: int,
        *,
        rngs: nnx.Rngs,
        rope: bool = True,
        compute: ComputeConfig = ComputeConfig(),
        num_modes: int = 64,
        heads_per_kv: int = 1,
        conv_width: int = 4,
        feature_map: str = "silu_l2",
        input_norms: bool = True,
        core: str = "fixed",
        write: str = "add",
        readout: str = "transpose",
        a_init: str = "s4d_inv",
        c: str = "full",
        c_init: str = "normal",
        c_init_scale: float = 1 / 16,
        delta_min: float = 1e-3,
        delta_max: float = 0.1,
        rope_position: str = "before",
        denominator: bool = False,
        output_gate: bool = False,
        norm_bias_init: float = 0.0,
    ):
        ssm = SSMConfig(
            num_modes=num_modes, heads_per_kv=heads_per_kv, conv_width=conv_width, feature_map=feature_map,
            input_norms=input_norms, core=core, write=write, readout=readout, a_init=a_init, c=c, c_init=c_init,
            c_init_scale=c_init_scale, delta_min=delta_min, delta_max=delta_max, rope_position=rope_position,
            denominator=denominator, output_gate=output_gate, norm_bias_init=norm_bias_init,
        )  # fmt: skip
        config = ModelConfig(
            vocab_size=1,
            model_dim=model_dim,
            num_layers=1,
            num_heads=num_heads,
            mlp_dim=1,
            mixers=("interdomain" if rope else "interdomain_norope",),
            ssm=ssm,
        )
        self._build(config, rope, config.init_std, compute, rngs)


class Interdomain(_Adaptable):
    """The paper's layer as a mixer of `LanguageModel`."""

    feature_map, readout, rope = True, QueryReadout(), True


class InterdomainNoRope(Interdomain):
    """`Interdomain` without rotary positions."""

    rope = False


class SingleQuery(SSMMixer):
    """Queries that read a state of two generic inputs."""

    feature_map, readout, rope = False, QueryReadout(), True


class SingleQueryNoRope(SingleQuery):
    """`SingleQuery` without rotary positions."""

    rope = False


class DualLinear(SSMMixer):
    """Keys and values in the state, and a learned linear readout."""

    feature_map, readout, rope = True, LinearReadout(), True


class DualLinearNoRope(DualLinear):
    """`DualLinear` without rotary positions."""

    rope = False


class S4D(SSMMixer):
    """Two generic inputs and a learned linear readout: S4D with short convolutions."""

    feature_map, readout, rope = False, LinearReadout(), False


class S4DRope(S4D):
    """`S4D` with rotary positions on the first input."""

    rope = True
