"""What stands between the products of an expert on a CPU, in single passes over numpy arrays.

Shapes: n rows, F intermediate size, D hidden size, T tokens.
"""

from numba import njit

REORDERED = {"contract", "reassoc"}  # a sum may be made in vectors; the same vectors in every run


@njit(cache=True, nogil=True, fastmath=REORDERED)
def add_rows(out_TD, tokens_n, rows_nD, weights_n):
    for i in range(len(tokens_n)):
        token = tokens_n[i]
        for d in range(rows_nD.shape[1]):
            out_TD[token, d] += rows_nD[i, d] if weights_n is None else weights_n[i] * rows_nD[i, d]


@njit(cache=True, nogil=True, fastmath=REORDERED)
def silu(share_nF, gate_nF, up_nF):
    """`share_nF` holds sigmoid(gate) and gets the inner value."""
    for i in range(share_nF.shape[0]):
        for f in range(share_nF.shape[1]):
            share_nF[i, f] *= gate_nF[i, f] * up_nF[i, f]


@njit(cache=True, nogil=True, fastmath=REORDERED)
def silu_backward(grad_nF, share_nF, gate_nF, up_nF, weights_n, inner_nF):
    """`grad_nF` gets the gradient of up, `share_nF`, which holds sigmoid(gate), that of gate, `weights_n` its own.

    Two loops a row: of more arrays at once the compiler no longer shows that they do not overlap, and stays scalar.
    """
    one = weights_n.dtype.type(1)
    for i in range(grad_nF.shape[0]):
        weight, total = weights_n[i], one - one
        for f in range(grad_nF.shape[1]):
            inner = gate_nF[i, f] * share_nF[i, f] * up_nF[i, f]
            total += grad_nF[i, f] * inner
            inner_nF[i, f] = inner * weight
        for f in range(grad_nF.shape[1]):
            grad, share = grad_nF[i, f] * weight, share_nF[i, f]
            silu = gate_nF[i, f] * share
            share_nF[i, f] = grad * up_nF[i, f] * (share + silu * (one - share))
            grad_nF[i, f] = grad * silu
        weights_n[i] = total
