"""Numpy float64 judges of the core ops: the literal recurrence and its hand-written adjoint.

Nothing here is shared with idattn. A case is a mapping from names to real arrays (dimensions as in idattn.shapes):
q, k, v (or z), log_delta (G,), a_log and a_imag (G, M), and where present c_re and c_im ((G, M, M) full,
(G, M) diagonal, absent for the identity), c_out (H, M) and initial_state (B, G, width, 2M). The cotangents come
under the same names.

The cotangent of a complex number x is g = dL/dRe(x) + i dL/dIm(x), so that y = f(x), f holomorphic, gives
g_x = conj(f'(x)) g_y.
"""

from collections.abc import Mapping

import mpmath
import numpy as np

Case = Mapping[str, np.ndarray]
PADDING = -1
# (lambda - 1) - lambda Delta a loses 2 log10(1 / |Delta a|) digits: 53 of them where log_delta = a_log = -30.
DIGITS = 120


def discretize(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """lambda = exp(Delta a) and beta = (lambda - 1) / a, complex (G, M), rounded once."""
    lam, beta, *_ = _discretize(case)
    return lam, beta


def _discretize(case: Case) -> tuple[np.ndarray, ...]:
    """lambda, beta and dlambda/dDelta, dlambda/da, dbeta/dDelta, dbeta/da, each complex (G, M)."""
    a_log, a_imag = np.asarray(case["a_log"], np.float64), np.asarray(case["a_imag"], np.float64)
    log_delta = np.broadcast_to(np.asarray(case["log_delta"], np.float64)[:, None], a_log.shape)
    results = np.empty((6, *a_log.shape), np.complex128)
    with mpmath.workdps(DIGITS):
        for index in np.ndindex(a_log.shape):
            delta = mpmath.exp(mpmath.mpf(log_delta[index]))
            a = mpmath.mpc(-mpmath.exp(mpmath.mpf(a_log[index])), mpmath.mpf(a_imag[index]))
            lam = mpmath.exp(delta * a)
            dbeta_da = (delta * lam * a - (lam - 1)) / a**2
            for i, value in enumerate((lam, (lam - 1) / a, a * lam, delta * lam, lam, dbeta_da)):
                results[i, *index] = complex(value)
    return tuple(results)


def _discretize_adjoint(case: Case, g_lam: np.ndarray, g_beta: np.ndarray) -> dict[str, np.ndarray]:
    """Cotangents of log_delta, a_log and a_imag for those of lambda and beta."""
    _, _, dlam_ddelta, dlam_da, dbeta_ddelta, dbeta_da = _discretize(case)
    g_delta = np.real(dlam_ddelta.conj() * g_lam + dbeta_ddelta.conj() * g_beta).sum(axis=1)
    g_a = dlam_da.conj() * g_lam + dbeta_da.conj() * g_beta
    decay = np.exp(np.asarray(case["a_log"], np.float64))
    delta = np.exp(np.asarray(case["log_delta"], np.float64))
    return {"log_delta": g_delta * delta, "a_log": -decay * g_a.real, "a_imag": g_a.imag}


def _dense_c(case: Case) -> np.ndarray:
    """C as complex (G, M, M) matrices, whichever kind the case has."""
    G, M = case["a_log"].shape
    if "c_re" not in case:
        return np.tile(np.eye(M, dtype=np.complex128), (G, 1, 1))
    c = np.asarray(case["c_re"], np.float64) + 1j * np.asarray(case["c_im"], np.float64)
    return c if c.ndim == 3 else c[:, :, None] * np.eye(M)


def _c_adjoint(case: Case, g_c: np.ndarray) -> dict[str, np.ndarray]:
    """Cotangents of the planes of C for that of the dense C; a diagonal C receives the diagonal."""
    if "c_re" not in case:
        return {}
    if case["c_re"].ndim == 2:
        g_c = np.einsum("gmm->gm", g_c)
    return {"c_re": g_c.real, "c_im": g_c.imag}


def _real_tokens(row: np.ndarray) -> list[tuple[int, bool]]:
    """(t, whether t continues the document of the token before it) for the tokens of a row that are not padding."""
    return [(t, t == 0 or row[t - 1] == row[t]) for t in range(len(row)) if row[t] != PADDING]


def _clean(x: np.ndarray, segment_ids: np.ndarray) -> np.ndarray:
    """x (B, T, heads, width) in float64 with zeros for padding, which nothing may read."""
    return np.where((segment_ids == PADDING)[:, :, None, None], 0.0, np.asarray(x, np.float64))


def _initial(case: Case, shape: tuple[int, ...]) -> np.ndarray:
    """The initial state as complex (B, G, M, width); zeros where the case has none."""
    if "initial_state" not in case:
        return np.zeros(shape, np.complex128)
    return _complex(np.asarray(case["initial_state"], np.float64))


def _rows(x: np.ndarray) -> np.ndarray:
    """Complex (B, G, M, width) as the rows (B, G, width, 2M) of the public state."""
    return np.concatenate([x.real, x.imag], axis=2).swapaxes(2, 3)


def _complex(rows: np.ndarray) -> np.ndarray:
    """What `_rows` was given."""
    re, im = np.split(rows.swapaxes(2, 3), 2, axis=2)
    return re + 1j * im


def _states(z: np.ndarray, case: Case, segment_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """X_t = lambda X_{t-1} + beta z_t^T, literally.

    Returns:
      the states before and after every token, both complex (B, T, G, M, width); padding leaves its state alone.
    """
    lam, beta = discretize(case)
    B, T, G, width = z.shape
    initial = _initial(case, (B, G, lam.shape[1], width))
    before = np.empty((B, T, *initial.shape[1:]), np.complex128)
    after = np.empty_like(before)
    for b in range(B):
        x = initial[b]
        continues = dict(_real_tokens(segment_ids[b]))
        for t in range(T):
            before[b, t] = x
            if t in continues:
                x = continues[t] * lam[:, :, None] * x + beta[:, :, None] * z[b, t, :, None, :]
            after[b, t] = x
    return before, after


def _states_adjoint(
    g_after: np.ndarray, g_final: np.ndarray, z: np.ndarray, before: np.ndarray, case: Case, segment_ids: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Transpose of _states: g_after (B, T, G, M, width) from the readouts, g_final (B, G, width, 2M) of the last state.

    Returns:
      the cotangent of z, and those of log_delta, a_log, a_imag and, where the case has one, initial_state.
    """
    lam, beta = discretize(case)
    g_z, g_lam, g_beta = np.zeros_like(z), np.zeros_like(lam), np.zeros_like(beta)
    g_final = _complex(g_final)
    g_initial = np.empty_like(before[:, 0])
    for b in range(z.shape[0]):
        g = g_final[b]
        for t, continues in reversed(_real_tokens(segment_ids[b])):
            g = g + g_after[b, t]
            g_z[b, t] = np.real(np.einsum("gm,gmw->gw", beta.conj(), g))
            g_beta += np.einsum("gmw,gw->gm", g, z[b, t])
            g_lam += continues * np.einsum("gmw,gmw->gm", g, before[b, t].conj())
            g = continues * lam.conj()[:, :, None] * g
        g_initial[b] = g
    result = _discretize_adjoint(case, g_lam, g_beta)
    if "initial_state" in case:
        result["initial_state"] = _rows(g_initial)
    return g_z, result


def _ids(x: np.ndarray, segment_ids: np.ndarray | None) -> np.ndarray:
    return np.zeros(x.shape[:2], np.int64) if segment_ids is None else np.asarray(segment_ids)


def _per_query_head(x: np.ndarray, case: Case) -> np.ndarray:
    """(B, T, G, ...) repeated to (B, T, H, ...): query head h reads key-value head h // (H / G)."""
    H, G = case["q"].shape[2], case["k"].shape[2]
    return x[:, :, np.arange(H) // (H // G)]


def forward(case: Case, readout: str, segment_ids: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Interdomain attention: outputs (B, T, H, E) and the final state (B, G, R + E, 2M), float64."""
    o, after, *_ = _forward(case, readout, _ids(case["q"], segment_ids))
    return o, _rows(after[:, -1])


def _forward(case: Case, readout: str, ids: np.ndarray) -> tuple[np.ndarray, ...]:
    R = case["k"].shape[-1]
    q = _clean(case["q"], ids)
    z = np.concatenate([_clean(case["k"], ids), _clean(case["v"], ids)], axis=-1)
    before, after = _states(z, case, ids)
    read = np.einsum("gmn,btgnw->btgmw", _dense_c(case), after)
    u, gamma = _per_query_head(read[..., :R], case), _per_query_head(read[..., R:], case)
    p = np.einsum("bthmr,bthr->bthm", u, q)
    if readout == "transpose":
        o = np.einsum("bthm,bthme->bthe", p, gamma).real
    elif readout == "hermitian":
        o = np.einsum("bthm,bthme->bthe", p.conj(), gamma).real
    elif readout == "real":
        o = np.einsum("bthm,bthme->bthe", p.real, gamma.real)
    else:
        raise ValueError(f"{readout=}")
    return _clean(o, ids), after, before, q, z, u, gamma, p


def cotangents(
    case: Case, readout: str, g_o: np.ndarray, g_state: np.ndarray, segment_ids: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Cotangents of everything in the case for those of the outputs and of the final state."""
    ids = _ids(case["q"], segment_ids)
    _, after, before, q, z, u, gamma, p = _forward(case, readout, ids)
    g_o = _clean(g_o, ids)
    if readout == "transpose":
        g_p = np.einsum("bthme,bthe->bthm", gamma.conj(), g_o)
        g_gamma = np.einsum("bthm,bthe->bthme", p.conj(), g_o)
    elif readout == "hermitian":
        g_p = np.einsum("bthme,bthe->bthm", gamma, g_o)
        g_gamma = np.einsum("bthm,bthe->bthme", p, g_o)
    else:
        g_p = np.einsum("bthme,bthe->bthm", gamma.real, g_o) + 0j
        g_gamma = np.einsum("bthm,bthe->bthme", p.real, g_o) + 0j
    g_u = np.einsum("bthm,bthr->bthmr", g_p, q)
    B, T, H, M = p.shape
    G, R = case["k"].shape[2:]
    g_read = np.concatenate([g_u, g_gamma], axis=-1).reshape(B, T, G, H // G, M, -1).sum(axis=3)
    g_c = np.einsum("btgmw,btgnw->gmn", g_read, after.conj())
    g_after = np.einsum("gmn,btgmw->btgnw", _dense_c(case).conj(), g_read)
    g_z, result = _states_adjoint(g_after, np.asarray(g_state, np.float64), z, before, case, ids)
    g_q = np.einsum("bthmr,bthm->bthr", u.conj(), g_p).real
    return {"q": g_q, "k": g_z[..., :R], "v": g_z[..., R:], **result, **_c_adjoint(case, g_c)}


def linear_forward(case: Case, segment_ids: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The learned linear readout: y_t = Re(c_out^T C X_t) (B, T, H, W) and the final state (B, H, W, 2M), float64."""
    ids = _ids(case["z"], segment_ids)
    _, after = _states(_clean(case["z"], ids), case, ids)
    y = np.einsum("hm,hmn,bthnw->bthw", np.asarray(case["c_out"], np.float64), _dense_c(case), after).real
    return _clean(y, ids), _rows(after[:, -1])


def linear_cotangents(
    case: Case, g_y: np.ndarray, g_state: np.ndarray, segment_ids: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Cotangents of everything in the case of the linear readout for those of its outputs and final state."""
    ids = _ids(case["z"], segment_ids)
    z, g_y, c, c_out = _clean(case["z"], ids), _clean(g_y, ids), _dense_c(case), np.asarray(case["c_out"], np.float64)
    before, after = _states(z, case, ids)
    read = np.einsum("hmn,bthnw->bthmw", c, after)
    g_read = np.einsum("hm,bthw->bthmw", c_out, g_y)
    g_c = np.einsum("bthmw,bthnw->hmn", g_read, after.conj())
    g_after = np.einsum("hmn,bthmw->bthnw", c.conj(), g_read)
    g_z, result = _states_adjoint(g_after, np.asarray(g_state, np.float64), z, before, case, ids)
    g_c_out = np.einsum("bthmw,bthw->hm", read.real, g_y)
    return {"z": g_z, "c_out": g_c_out, **result, **_c_adjoint(case, g_c)}


def ideal_forward(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, num_modes: int, floor: float, segment_ids: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The ideal layer by projecting the whole past of every token by quadrature: outputs and the last coefficients.

    Args:
      q, k: (B, T, H, R).
      v: (B, T, H, E).
      num_modes: M.
      floor: denominators up to which the output is the mean of the values.
      segment_ids: (B, T) or None.

    Returns:
      (B, T, H, E), 0 where padding is, and (B, H, M, R + E) after each row's last token, 0 where it has none.
    """
    B, T, H, R = q.shape
    ids = np.zeros((B, T), int) if segment_ids is None else segment_ids
    o, coefficients = np.zeros(v.shape), np.zeros((B, H, num_modes, R + v.shape[-1]))
    nodes, weights = np.polynomial.legendre.leggauss(num_modes // 2 + 1)
    norms = np.sqrt(2 * np.arange(num_modes) + 1)
    begin = 0
    for b, t in np.ndindex(B, T):
        if t == 0 or ids[b, t] != ids[b, t - 1]:
            begin = t
        if ids[b, t] == PADDING:
            continue
        f = np.concatenate([k[b, begin : t + 1], v[b, begin : t + 1]], axis=-1)
        times = (np.arange(len(f))[:, None] + (nodes + 1) / 2) / len(f)  # within each token's part of [0, 1]
        basis = np.polynomial.legendre.legvander(2 * times - 1, num_modes - 1) * norms
        coefficients[b] = np.einsum("i,sim,shw->hmw", weights / (2 * len(f)), basis, f)
        scores = np.einsum("hr,hmr->hm", q[b, t], coefficients[b, ..., :R])
        for h in range(H):
            gamma = coefficients[b, h, :, R:]
            o[b, t, h] = scores[h] @ gamma / scores[h, 0] if scores[h, 0] > floor else gamma[0]
    return o, coefficients


def adaptive_forward(
    case: Case, readout: str, segment_ids: np.ndarray | None = None, write: str = "delta"
) -> tuple[np.ndarray, np.ndarray]:
    """Outputs and the final state, where the case has `log_steps`, `gains` or both, (B, T, G): token by token."""
    ids, c = _ids(case["q"], segment_ids), _dense_c(case)
    q, k, v = (_clean(case[name], ids) for name in ("q", "k", "v"))
    (B, T, G, R), E, J = k.shape, v.shape[-1], q.shape[2] // k.shape[2]
    state = _initial(case, (B, G, c.shape[1], R + E)).copy()
    f = {"transpose": lambda x: x, "hermitian": np.conj, "real": np.real}[readout]
    o, own = np.zeros((B, T, G * J, E)), np.ones(G)
    if write == "damped":
        own = np.array([(x.T @ f(x @ beta) @ beta).real for x, beta in zip(c, discretize(case)[1], strict=True)])
    for b, g in np.ndindex(B, G):
        x = state[b, g]
        for t, continues in _real_tokens(ids[b]):
            token = {name: np.asarray(case[name])[g : g + 1] for name in ("log_delta", "a_log", "a_imag")}
            if "log_steps" in case:
                token["log_delta"] = token["log_delta"] + case["log_steps"][b, t, g]
            lam, beta = (y[0] for y in discretize(token))
            x = continues * lam[:, None] * x
            keys, values, address, u = x[:, :R] + np.outer(beta, k[b, t, g]), x[:, R:], beta, v[b, t, g]
            if "gains" in case:
                w, gain = c[g].T @ f(c[g] @ keys @ k[b, t, g]) / own[g], case["gains"][b, t, g]
                if write == "damped":
                    gain = gain / (1 + gain * np.sum(np.abs(w) ** 2) * np.sum(np.abs(beta) ** 2))
                else:
                    address = w.conj() / (np.sum(np.abs(w) ** 2) + 1e-12)
                u = gain * (u - (w @ values).real)
            x = np.concatenate([keys, values + np.outer(address, u)], axis=1)
            for h in range(g * J, (g + 1) * J):
                o[b, t, h] = (c[g].T @ f(c[g] @ x[:, :R] @ q[b, t, h]) @ x[:, R:]).real / own[g]
        state[b, g] = x
    return o, _rows(state)


def gated_forward(case: Case, segment_ids: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Outputs and the final state (B, H, E, R) of linear attention with `log_decays` and, where there are any, `gains`.

    The recurrences as their papers write them: S_t = diag(alpha_t) S_{t-1} + k_t v_t^T (GLA; with equal decays
    Mamba-2), and S_t = alpha_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T (Gated DeltaNet).
    """
    ids = _ids(case["q"], segment_ids)
    q, k, v = (_clean(case[name], ids) for name in ("q", "k", "v"))
    (B, T, H, R), E = k.shape, v.shape[-1]
    state, o = np.asarray(case["initial_state"], np.float64).copy(), np.zeros((B, T, H, E))
    for b, h in np.ndindex(B, H):
        S = state[b, h].T
        for t, continues in _real_tokens(ids[b]):
            alpha, key = np.exp(case["log_decays"][b, t, h]) * np.ones(R), k[b, t, h]
            decay, gain = np.diag(alpha), 1.0
            if "gains" in case:
                gain = case["gains"][b, t, h]
                decay = (np.eye(R) - gain * np.outer(key, key)) @ decay
            S = continues * decay @ S + gain * np.outer(key, v[b, t, h])
            o[b, t, h] = S.T @ q[b, t, h]
        state[b, h] = S.T
    return o, state
