"""The op and the preparation of its heads once more: token by token, in float64 NumPy, derivatives written by hand.

Nothing here is shared with `idattn.ops`, which is judged by it. Arrays have the names and shapes of
`idattn.ops.interdomain_attention` and `idattn.ops.prepare.HeadInputs`; the cotangent of NAME is d_NAME. That of a
complex x is dL/dRe(x) + i dL/dIm(x).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

PADDING = -1
Arrays = dict[str, NDArray[Any]]
einsum = np.einsum  # loops of its own: the threads of a BLAS wait for one another where processors are busy


def attention(x: Arrays, d: Arrays) -> Arrays:
    """Interdomain Attention (eq. 11 and 13) and its cotangents.

    With X = [X_k, X_v] the state, o_t = Re(q_t^T U^T Gamma) is Re(w^T X_v) for w = C^T p, p = C y and y = X_k q_t, so
    that neither U = C X_k nor Gamma = C X_v need be formed.

    Args:
      x: q, k, v, log_delta, a_log, a_imag, c_re and c_im (G, M, M), all float64; and where the case has them
        initial_state and segment_ids.
      d: cotangents of o and state.

    Returns:
      o, state, d_initial_state, and d_NAME of all of x but segment_ids.
    """
    (B, T, H, R), G = x["q"].shape, x["k"].shape[2]
    delta, a = np.exp(x["log_delta"])[:, None], -np.exp(x["a_log"]) + 1j * x["a_imag"]
    lam, beta, c = np.exp(delta * a), np.expm1(delta * a) / a, x["c_re"] + 1j * x["c_im"]
    ids = x.get("segment_ids", np.zeros((B, T), int))
    token = (ids != PADDING)[..., None, None, None]
    continues = np.pad(ids[:, 1:] == ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)[..., None, None, None]
    z, q = np.concatenate([x["k"], x["v"]], axis=-1), x["q"].reshape(B, T, G, H // G, R)
    d_o = np.where(token, d["o"].reshape(*q.shape[:4], -1), 0)

    def read(X, q):
        y = einsum("bgmr,bgjr->bgjm", X[..., :R], q)
        p = einsum("gmn,bgjn->bgjm", c, y)
        return y, p, einsum("gmn,bgjm->bgjn", c, p)

    X, states, o = _complex(x.get("initial_state", np.zeros_like(d["state"]))), [], np.empty_like(d_o)
    for t in range(T):
        states.append(X)
        X = np.where(token[:, t], continues[:, t] * lam[..., None] * X + beta[..., None] * z[:, t, :, None], X)
        o[:, t] = einsum("bgjm,bgme->bgje", read(X, q[:, t])[2], X[..., R:]).real
    result = {"o": np.where(token, o, 0).reshape(d["o"].shape), "state": _rows(X)}
    d_X, d_q, d_z = _complex(d["state"]), np.empty_like(q), np.empty_like(z)
    d_lam, d_beta, d_c = np.zeros_like(lam), np.zeros_like(beta), np.zeros_like(c)
    for t in reversed(range(T)):
        y, p, w = read(X, q[:, t])
        d_w = einsum("bgje,bgme->bgjm", d_o[:, t], X[..., R:].conj())
        d_p = einsum("gmn,bgjn->bgjm", c.conj(), d_w)
        d_y = einsum("gmn,bgjm->bgjn", c.conj(), d_p)
        d_c += einsum("bgjm,bgjn->gmn", p.conj(), d_w) + einsum("bgjm,bgjn->gmn", d_p, y.conj())
        d_q[:, t] = einsum("bgjm,bgmr->bgjr", d_y, X[..., :R].conj()).real
        d_X[..., :R] += einsum("bgjm,bgjr->bgmr", d_y, q[:, t])
        d_X[..., R:] += einsum("bgjm,bgje->bgme", w.conj(), d_o[:, t])
        X, d_new = states.pop(), np.where(token[:, t], d_X, 0)  # the state before the token
        d_z[:, t] = einsum("gm,bgmw->bgw", beta.conj(), d_new).real
        d_beta += einsum("bgmw,bgw->gm", d_new, z[:, t])
        d_lam += einsum("bgmw,bgmw->gm", d_new, continues[:, t] * X.conj())
        d_X = np.where(token[:, t], continues[:, t] * lam.conj()[..., None] * d_X, d_X)
    d_a = (delta * lam).conj() * d_lam + ((delta * lam - beta) / a).conj() * d_beta
    result["d_log_delta"] = np.sum(delta * ((a * lam).conj() * d_lam + lam.conj() * d_beta).real, axis=1)
    result |= {"d_a_log": -np.exp(x["a_log"]) * d_a.real, "d_a_imag": d_a.imag, "d_c_re": d_c.real, "d_c_im": d_c.imag}
    result |= {"d_q": d_q.reshape(x["q"].shape), "d_k": d_z[..., :R], "d_v": d_z[..., R:]}
    return result | {"d_initial_state": _rows(d_X)}


def _complex(rows: NDArray[Any]) -> NDArray[Any]:
    """The states (B, G, M, W) of the rows (B, G, W, 2M) by which they are stored."""
    re, im = np.split(rows.swapaxes(2, 3), 2, axis=2)
    return re + 1j * im


def _rows(X: NDArray[Any]) -> NDArray[Any]:
    """What `_complex` was given."""
    return np.concatenate([np.real(X), np.imag(X)], axis=2).swapaxes(2, 3)


def heads(x: Arrays, d: Arrays, width: int, base: float, eps: float) -> Arrays:
    """Heads as keys are prepared: convolution, rotation, xi of eq. 10, RMSNorm and bias of eq. 12; and the cotangents.

    Args:
      x: x (B, T, C), taps, conv_bias, tail, scale, bias, all float64, and positions (B, T).
      d: the cotangent of y.
      width: channels of a head.
      base: of the rotary positions.
      eps: of the RMSNorm.

    Returns:
      y, and d_NAME of all of x but the positions.
    """
    (B, T, C), taps, half = x["x"].shape, x["taps"], width // 2
    W = len(taps)
    padded = np.concatenate([x["tail"], x["x"]], axis=1)
    # The tokens `back` before, where they are of the same document.
    seen = [(x["positions"] >= back)[..., None] * padded[:, W - 1 - back : W - 1 - back + T] for back in range(W)]
    convolved = x["conv_bias"] + sum(seen[back] * taps[W - 1 - back] for back in range(W))
    turn = np.exp(1j * x["positions"][..., None, None] * base ** (-np.arange(half) / half))

    def rotate(h, turn):
        rotated = (h[..., :half] + 1j * h[..., half:]) * turn
        return np.concatenate([rotated.real, rotated.imag], axis=-1)

    h = rotate(convolved.reshape(B, T, -1, width), turn)
    gate = 1 / (1 + np.exp(-h))
    silu_norm = np.sqrt(np.sum((h * gate) ** 2, axis=-1, keepdims=True) + 1e-6)
    xi = h * gate / silu_norm
    rms = np.sqrt(np.mean(xi**2, axis=-1, keepdims=True) + eps)
    d_h = d["y"].reshape(h.shape)
    result = {"d_bias": d["y"].sum((0, 1)), "d_scale": np.sum(d_h * xi / rms, axis=(0, 1, 2))}
    d_h = d_h * x["scale"] / rms
    d_h = d_h - xi / rms**2 * np.mean(d_h * xi, axis=-1, keepdims=True)
    d_h = (d_h - xi * np.sum(d_h * xi, axis=-1, keepdims=True)) / silu_norm
    d_u = rotate(d_h * gate * (1 + h * (1 - gate)), turn.conj()).reshape(B, T, C)
    d_padded = np.zeros_like(padded)
    for back in range(W):
        d_padded[:, W - 1 - back : W - 1 - back + T] += (x["positions"] >= back)[..., None] * d_u * taps[W - 1 - back]
    result["d_taps"] = np.stack([np.sum(d_u * seen[W - 1 - i], axis=(0, 1)) for i in range(W)])
    result |= {"d_conv_bias": d_u.sum((0, 1)), "d_tail": d_padded[:, : W - 1], "d_x": d_padded[:, W - 1 :]}
    return result | {"y": (xi / rms * x["scale"]).reshape(B, T, C) + x["bias"]}
